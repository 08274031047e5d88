from types import ModuleType, SimpleNamespace

import pytest
from samples import ECHO_ROLE, TINY, recipe_of

from opencharacter import pipeline
from opencharacter.config import files
from opencharacter.config.base import AddedLater, NotIdentity
from opencharacter.config.placement import Placement
from opencharacter.errors import StageFailed, StaleError, UserError
from opencharacter.runtime.attempts import repeated_work
from opencharacter.runtime.stage import StageResult, rule_versions
from opencharacter.runtime.staleness import explain_stale
from opencharacter.runtime.store import REBUILDS
from opencharacter.text import filters

AFTER_DPO = {
    "distillation/dpo",
    "introspection/reflection",
    "introspection/interaction",
    "introspection/transcripts",
    "introspection/sft",
    "persona/merge",
    "persona/blend",
    "persona/tune",
    "evaluation/capabilities",
    "evaluation/answers",
    "evaluation/preferences",
    "evaluation/rating",
    "evaluation/attacks",
    "evaluation/robustness",
    "evaluation/coherence",
    "evaluation/adherence",
    "evaluation/drift",
    "evaluation/side_effects",
    "evaluation/projection",
    "evaluation/report",
}


def finish_all(jobs):
    """Write the manifest of every job, as if all had run."""
    for job in jobs:
        pipeline.finish(job, StageResult(rows=1), seconds=1.0)


def states(jobs):
    return {job.dataset: job.state()[0] for job in jobs}


def stale(jobs):
    return {job.stage.name for job in jobs if job.state()[0] == "stale"}


def test_every_stage_has_a_module_that_meets_its_contract_and_a_section_of_the_recipe():
    for stage in pipeline.STAGES:
        assert callable(stage.module.build), stage.name
        assert callable(stage.module.estimate), stage.name
        assert stage.module.__doc__.startswith(f"Stage {stage.name}:")
        recipe_of(ECHO_ROLE).config(stage.name)


def test_a_stage_reads_only_stages_that_come_before_it():
    seen = set()
    for stage in pipeline.STAGES:
        assert set(stage.reads) <= seen
        seen.add(stage.name)


def test_datasets_are_stored_below_their_scope(make_jobs, echo_recipe):
    places = [job.dataset for job in make_jobs(echo_recipe)]
    assert len(places) == len(set(places))
    assert "poeticism/distillation/teacher" in places
    assert "echo/distillation/student" in places
    assert "echo/poeticism/distillation/student" in places
    assert "echo/poeticism/distillation/pairs" in places
    assert "echo/evaluation/report" in places


def test_a_second_run_does_nothing(make_jobs, echo_recipe):
    jobs = make_jobs(echo_recipe)
    finish_all(jobs)
    assert list(pipeline.run(jobs)) == []


def test_a_changed_beta_makes_dpo_and_its_descendants_stale(make_jobs, echo_recipe):
    finish_all(make_jobs(echo_recipe))
    changed = recipe_of(ECHO_ROLE, distillation={**TINY["distillation"], "dpo": {"beta": 0.2}})
    assert stale(make_jobs(changed)) == AFTER_DPO


def test_a_changed_placement_makes_nothing_stale(make_jobs, echo_recipe):
    finish_all(make_jobs(echo_recipe))
    other = Placement.model_validate(
        {"name": "big", "pools": {"student": {"replicas": 8}}, "training": {"workers": 4}}
    )
    assert stale(make_jobs(echo_recipe, other)) == set()


def test_a_changed_limit_makes_nothing_stale(make_jobs, echo_recipe):
    finish_all(make_jobs(echo_recipe))
    changed = recipe_of(
        ECHO_ROLE,
        distillation={**TINY["distillation"], "pairs": {"max_drop_rate": 0.9}},
    )
    assert stale(make_jobs(changed)) == set()


def test_a_changed_seed_makes_everything_stale(make_jobs, echo_recipe):
    finish_all(make_jobs(echo_recipe))
    assert stale(make_jobs(recipe_of(ECHO_ROLE, seed=1))) == set(pipeline.NAMES)


def test_a_changed_constitution_keeps_the_general_answers_of_the_student(
    store, make_jobs, echo_recipe, poet
):
    finish_all(make_jobs(echo_recipe))
    other = poet.model_copy(update={"description": "Another sentence."})
    jobs = pipeline.jobs(echo_recipe, [other], Placement(), store)
    assert states(jobs)["echo/distillation/student"] == "done"
    assert states(jobs)["poeticism/distillation/teacher"] == "stale"


def test_stale_data_stops_the_run_and_names_the_changed_field(make_jobs, echo_recipe):
    finish_all(make_jobs(echo_recipe))
    changed = recipe_of(ECHO_ROLE, distillation={**TINY["distillation"], "dpo": {"beta": 0.2}})
    with pytest.raises(
        StaleError,
        match=r"another recipe \(config\.beta: 0\.1 -> 0\.2\);.*--rebuild distillation/dpo",
    ):
        list(pipeline.run(make_jobs(changed)))


def rewrite_manifest(job, **changes):
    """Change the manifest of a job as another version of the package would have written it."""
    path = f"{job.dataset}/manifest.json"
    manifest = job.store.read_json(path)
    job.store.write_json(path, manifest | changes)


def stale_message(jobs):
    with pytest.raises(StaleError) as refused:
        pipeline.check(jobs, rebuild=None)
    return str(refused.value)


def test_other_filter_rules_make_their_stages_stale_and_are_named(
    make_jobs, echo_recipe, monkeypatch
):
    finish_all(make_jobs(echo_recipe))
    monkeypatch.setattr(filters, "VERSION", 3)
    jobs = make_jobs(echo_recipe)
    done = {job.stage.name for job in jobs if job.state()[0] == "done"}
    assert {"distillation/prompts", "distillation/teacher", "distillation/student"} <= done
    message = stale_message(jobs)
    assert "distillation/pairs was made by other filter rules (text.filters version 2, now 3)" in (
        message
    )
    assert "recipe" not in message.partition(";")[0]


def test_other_prompt_templates_are_named(make_jobs, echo_recipe, monkeypatch):
    finish_all(make_jobs(echo_recipe))
    jobs = make_jobs(echo_recipe)
    monkeypatch.setattr(jobs[0].stage.module, "TEMPLATES", ("another",))
    message = stale_message(jobs)
    assert "distillation/prompts was made with other prompt templates;" in message


def test_a_field_of_a_later_version_makes_nothing_stale_at_its_default(
    make_jobs, echo_recipe, monkeypatch
):
    dpo_config = type(echo_recipe.distillation.dpo)
    with monkeypatch.context() as earlier_version:
        earlier_version.setattr(dpo_config.model_fields["beta"], "metadata", [NotIdentity])
        finish_all(make_jobs(echo_recipe))
    monkeypatch.setattr(dpo_config.model_fields["beta"], "metadata", [AddedLater("0.3")])
    assert stale(make_jobs(echo_recipe)) == set()
    changed = recipe_of(ECHO_ROLE, distillation={**TINY["distillation"], "dpo": {"beta": 0.2}})
    assert "another recipe (config.beta: null -> 0.2)" in stale_message(make_jobs(changed))


def test_every_cause_of_a_stale_dataset_is_named():
    assert explain_stale(["config.beta: 0.1 -> 0.2", "seed: 0 -> 1", 'templates: "a" -> "b"']) == (
        "made from another recipe (config.beta: 0.1 -> 0.2; seed: 0 -> 1) "
        "and made with other prompt templates"
    )
    assert explain_stale(["rules.text.filters: null -> 1", 'parents.a/b: "x" -> "y"']) == (
        "made by other filter rules (text.filters version none, now 1)"
    )
    assert explain_stale(['constitution: "x" -> "y"']) == (
        "made from another version of its constitution"
    )
    assert explain_stale(["inputs.file: 1 -> 2"]) == "made from other inputs (inputs.file: 1 -> 2)"
    assert explain_stale(['parents.humor/distillation/prompts: "x" -> "y"']) == (
        "made from another version of humor/distillation/prompts"
    )


def test_a_stage_that_filters_rows_has_the_version_of_the_rules_in_its_payload(
    make_jobs, echo_recipe
):
    rules = {job.stage.name: job.payload["rules"] for job in make_jobs(echo_recipe)}
    assert {name: value for name, value in rules.items() if value} == {
        "distillation/prompts": {"text.statistics": 1},
        "distillation/pairs": {"text.filters": 2},
        "introspection/transcripts": {"text.filters": 2},
        "evaluation/scenarios": {"text.statistics": 1, "evaluation.scenario_checks": 1},
        "evaluation/side_effects": {"text.filters": 2},
    }


def test_rules_are_named_by_their_path_in_the_package():
    stage_module = ModuleType("stage")
    assert rule_versions(stage_module) == {}
    stage_module.RULES = (filters,)  # type: ignore[attr-defined]
    assert rule_versions(stage_module) == {"text.filters": filters.VERSION}


def test_a_dataset_of_an_older_format_is_stale_and_its_version_is_named(
    make_jobs, echo_recipe, built
):
    jobs = make_jobs(echo_recipe)
    finish_all(jobs)
    rewrite_manifest(jobs[0], format_version=1, fingerprint="0", payload={"section": {}})
    assert jobs[0].state() == ("stale", ["format_version: 1 -> 2"])
    message = stale_message(jobs)
    assert "was written by opencharacter 0.1 (manifest format 1; this version reads format 2)" in (
        message
    )
    assert message.endswith(
        "use another --storage, or replace it with --rebuild distillation/prompts"
    )
    list(pipeline.run(jobs, rebuild="distillation/prompts"))
    assert set(states(jobs).values()) == {"done"}


def test_a_persona_can_be_added_to_existing_storage(store, make_jobs, echo_recipe, poet):
    finish_all(make_jobs(echo_recipe))
    other = poet.model_copy(update={"name": "sarcasm"})
    for chosen in ([poet, other], [other]):
        jobs = pipeline.jobs(echo_recipe, chosen, Placement(), store)
        pipeline.check(jobs, rebuild=None)
        assert stale(jobs) == {"evaluation/robustness", "evaluation/report"}


def test_rebuild_replaces_only_the_stage_and_its_descendants(make_jobs, echo_recipe):
    finish_all(make_jobs(echo_recipe))
    changed = recipe_of(ECHO_ROLE, distillation={**TINY["distillation"], "dpo": {"beta": 0.2}})
    pipeline.check(make_jobs(changed), rebuild="distillation/dpo")
    with pytest.raises(StaleError):
        pipeline.check(make_jobs(changed), rebuild="introspection/sft")


@pytest.fixture
def built(monkeypatch):
    """Records the names of built stages; stages in `broken` raise instead."""
    made = SimpleNamespace(names=[], broken={})

    def build(job):
        if job.stage.name in made.broken:
            raise made.broken[job.stage.name]
        made.names.append(job.stage.name)
        return StageResult(rows=1)

    for stage in pipeline.STAGES:
        monkeypatch.setattr(stage.module, "build", build)
    return made


def begin_rebuild(jobs, built):
    """Interrupt a rebuild of dpo; return the names of the stages that it built."""
    finish_all(jobs)
    built.broken = {"introspection/sft": StageFailed("no room")}
    with pytest.raises(StageFailed, match="no room"):
        list(pipeline.run(jobs, rebuild="distillation/dpo"))
    made, built.names, built.broken = set(built.names), [], {}
    return made


def test_the_same_command_resumes_an_unfinished_rebuild(make_jobs, echo_recipe, built):
    jobs = make_jobs(echo_recipe)
    made = begin_rebuild(jobs, built)
    assert {"distillation/dpo", "introspection/transcripts"} <= made
    list(pipeline.run(jobs, rebuild="distillation/dpo"))
    assert set(built.names) == AFTER_DPO - made
    built.names = []
    list(
        pipeline.run(jobs, rebuild="distillation/dpo")
    )  # the first rebuild has ended, so this is a new one
    assert set(built.names) == AFTER_DPO
    assert jobs[0].store.folders(REBUILDS) == []


def test_a_rebuild_that_another_command_completes_is_not_resumed(make_jobs, echo_recipe, built):
    jobs = make_jobs(echo_recipe)
    begin_rebuild(jobs, built)
    list(pipeline.run(jobs))
    built.names = []
    list(pipeline.run(jobs, rebuild="distillation/dpo"))
    assert set(built.names) == AFTER_DPO


def test_an_unfinished_rebuild_of_another_recipe_is_not_resumed(make_jobs, echo_recipe, built):
    begin_rebuild(make_jobs(echo_recipe), built)
    changed = recipe_of(ECHO_ROLE, distillation={**TINY["distillation"], "dpo": {"beta": 0.2}})
    for recipe in (changed, echo_recipe):
        jobs, built.names = make_jobs(recipe), []
        list(pipeline.run(jobs, rebuild="distillation/dpo"))
        assert set(built.names) == AFTER_DPO
        assert set(states(jobs).values()) == {"done"}


def test_a_rebuilt_stage_needs_its_parents_even_if_it_is_done(make_jobs, echo_recipe, built):
    jobs = make_jobs(echo_recipe)
    finish_all(jobs)
    (reference,) = (job for job in jobs if job.stage.name == "distillation/reference")
    reference.store.delete(reference.dataset)
    only = pipeline.select(jobs, only="distillation/dpo")
    pipeline.check(only, rebuild=None)
    with pytest.raises(UserError, match="needs echo/poeticism/distillation/reference"):
        list(pipeline.run(only, rebuild="distillation/dpo"))
    assert only[0].state()[0] == "done"
    assert built.names == []


@pytest.mark.parametrize("choice", [{"only": "distillation/dpo"}, {"until": "introspection/sft"}])
def test_a_rebuild_of_some_stages_is_refused_if_others_were_made_from_them(
    make_jobs, echo_recipe, built, choice
):
    """Otherwise the old persona would count as made from the new adapter."""
    jobs = make_jobs(echo_recipe)
    finish_all(jobs)
    with pytest.raises(UserError, match=r"would leave echo/poeticism/.*leave out --only"):
        list(pipeline.run(pipeline.select(jobs, **choice), rebuild="distillation/dpo"))
    assert set(states(jobs).values()) == {"done"}
    for job in jobs:
        if job.stage.name in AFTER_DPO - {"distillation/dpo"}:
            job.store.delete(job.dataset)
    list(pipeline.run(pipeline.select(jobs, **choice), rebuild="distillation/dpo"))
    assert "distillation/dpo" in built.names


def test_each_failure_is_printed_when_it_happens(make_jobs, echo_recipe, built, capsys):
    reasons = {
        "poeticism/distillation/prompts": StageFailed("dropped [all] rows"),
        "echo/distillation/student": KeyError("who"),
        "echo/evaluation/answers": StageFailed("no answer"),
        "echo/evaluation/judge": StageFailed("no verdict"),
        "echo/evaluation/capabilities": StageFailed("no task"),
    }
    built.broken = {name.partition("/")[2]: error for name, error in reasons.items()}
    with pytest.raises((StageFailed, KeyError)) as raised:
        list(pipeline.run(make_jobs(echo_recipe)))
    output = capsys.readouterr().out
    for name, error in reasons.items():
        prefix = f"failed {name}; jobs that do not depend on it continue: "
        if error is raised.value:  # the last one is raised, not printed
            assert prefix not in output
        elif isinstance(error, KeyError):
            assert f"{prefix}Traceback" in output
            assert "KeyError: 'who'\n" in output
        else:
            assert f"{prefix}{error}\n" in output


def test_a_stage_run_with_only_needs_its_parents(make_jobs, echo_recipe):
    only = pipeline.select(make_jobs(echo_recipe), only="distillation/pairs")
    with pytest.raises(UserError, match="needs poeticism/distillation/teacher, which is missing"):
        pipeline.check(only, rebuild=None)


def test_until_selects_the_stage_and_all_before_it(make_jobs, echo_recipe):
    jobs = pipeline.select(make_jobs(echo_recipe), until="distillation/student")
    assert {job.stage.name for job in jobs} == {
        "distillation/prompts",
        "distillation/teacher",
        "distillation/student",
    }


def test_the_report_covers_all_personas_of_the_run(store, echo_recipe, poet):
    other = poet.model_copy(update={"name": "other"})
    jobs = pipeline.jobs(echo_recipe, [poet, other], Placement(), store)
    (report,) = (job for job in jobs if job.stage.name == "evaluation/report")
    assert {p.scope for p in report.parents} == {
        *("echo", "echo/poeticism", "echo/other"),
        *("poeticism", "other"),  # the scenarios, which all students share
    }
    (dpo,) = (job for job in jobs if job.dataset == "echo/other/distillation/dpo")
    assert [p.dataset for p in dpo.parents] == ["echo/other/distillation/reference"]


def test_a_manifest_holds_all_its_keys(make_jobs, echo_recipe):
    job = make_jobs(echo_recipe)[1]
    pipeline.finish(job, StageResult(rows=3, dropped={"empty": 1}), seconds=2.0)
    manifest = job.store.manifest(job.dataset)
    assert manifest["format_version"] == 2
    assert manifest["fingerprint"] == job.fingerprint
    assert manifest["payload"] == job.payload
    assert {"rows", "dropped", "schema", "seed", "versions", "git_commit", "placement"} <= set(
        manifest
    )
    assert {"seconds", "gpu_seconds", "tokens_in", "tokens_out"} <= set(manifest)
    assert manifest["writer"] == "teacher"


def test_repeated_work_is_counted_within_each_part():
    history = [
        {"part": "base", "kept": 0, "reached": 10},
        {"part": "base", "kept": 7, "reached": 12},
        {"part": "full", "kept": 0, "reached": 5},
        {"part": "base", "kept": 12, "reached": 12},
    ]
    assert repeated_work(history) == 3


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen-2.5-7b", "gemma-3-4b"])
def test_the_recipes_of_the_paper_have_its_sizes(name, store):
    from opencharacter.constitution import schema

    recipe = files.load_recipe(name)
    template = schema.load("poeticism")
    jobs = pipeline.jobs(recipe, [template], Placement(), store)
    rows = {job.dataset: job.stage.module.estimate(job).rows for job in jobs}
    assert rows[f"{name}/poeticism/introspection/reflection"] == 10_000
    assert rows[f"{name}/poeticism/introspection/interaction"] == 2_000
    lora = recipe.distillation.dpo.lora
    assert (lora.rank, lora.alpha) == (64, 128)
    small = files.load_recipe(name, smoke=True)
    jobs = pipeline.jobs(small, [template], Placement(), store)
    least = {job.dataset: job.stage.module.estimate(job).rows for job in jobs}
    assert sum(least.values()) < 0.05 * sum(rows.values())


def numbers(value, at=""):
    """Every number of a recipe by its path; None counts as unlimited."""
    if isinstance(value, dict):
        return {k: n for key, v in value.items() for k, n in numbers(v, f"{at}.{key}").items()}
    return {at: float("inf") if value is None else value} if not isinstance(value, str) else {}


@pytest.mark.parametrize("name", files.resource_names("recipes", "*.yaml"))
def test_smoke_only_reduces_numbers(name):
    whole = numbers(files.load_recipe(name).model_dump(mode="json"))
    small = numbers(files.load_recipe(name, smoke=True).model_dump(mode="json"))
    changed = {at for at in whole if small[at] != whole[at]}
    assert changed
    assert all(small[at] < whole[at] for at in changed)
