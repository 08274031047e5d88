from types import SimpleNamespace

import pytest
from samples import ECHO_ROLE, TINY, recipe_of

from opencharacter import pipeline
from opencharacter.config import files
from opencharacter.config.placement import Placement
from opencharacter.errors import StageFailed, StaleError, UserError
from opencharacter.runtime.stage import StageResult, repeated_work
from opencharacter.runtime.store import REBUILDS

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
    "evaluation/report",
}


def finish_all(jobs):
    """Manifests for every job, as if all had run."""
    for job in jobs:
        pipeline.finish(job, StageResult(rows=1), seconds=1.0)


def states(jobs):
    return {job.dataset: job.state()[0] for job in jobs}


def stale(jobs):
    return {job.stage.name for job in jobs if job.state()[0] == "stale"}


def test_every_stage_has_its_module_section_and_place():
    for stage in pipeline.STAGES:
        assert callable(stage.module.build), stage.name
        assert callable(stage.module.estimate), stage.name
        assert stage.module.__doc__.startswith(f"Stage {stage.name}:")
        recipe_of(ECHO_ROLE).config(stage.name)


def test_a_stage_reads_only_what_stands_before_it():
    seen = set()
    for stage in pipeline.STAGES:
        assert set(stage.reads) <= seen
        seen.add(stage.name)


def test_datasets_lie_where_the_design_says(make_jobs, echo_recipe):
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


def test_a_changed_beta_makes_dpo_and_what_follows_stale_and_nothing_before(make_jobs, echo_recipe):
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


def test_a_changed_constitution_leaves_the_students_general_answers(
    store, make_jobs, echo_recipe, poet
):
    finish_all(make_jobs(echo_recipe))
    other = poet.model_copy(update={"description": "Another sentence."})
    jobs = pipeline.jobs(echo_recipe, [other], Placement(), store)
    assert states(jobs)["echo/distillation/student"] == "done"
    assert states(jobs)["poeticism/distillation/teacher"] == "stale"


def test_stale_data_stops_the_run_and_names_the_field(make_jobs, echo_recipe):
    finish_all(make_jobs(echo_recipe))
    changed = recipe_of(ECHO_ROLE, distillation={**TINY["distillation"], "dpo": {"beta": 0.2}})
    with pytest.raises(StaleError, match=r"config\.beta: 0\.1 -> 0\.2.*--rebuild distillation/dpo"):
        list(pipeline.run(make_jobs(changed)))


def test_a_persona_can_be_added_to_a_storage(store, make_jobs, echo_recipe, poet):
    finish_all(make_jobs(echo_recipe))
    other = poet.model_copy(update={"name": "sarcasm"})
    for chosen in ([poet, other], [other]):
        jobs = pipeline.jobs(echo_recipe, chosen, Placement(), store)
        pipeline.check(jobs, rebuild=None)
        assert stale(jobs) == {"evaluation/robustness", "evaluation/report"}


def test_rebuild_allows_the_stage_and_what_follows_only(make_jobs, echo_recipe):
    finish_all(make_jobs(echo_recipe))
    changed = recipe_of(ECHO_ROLE, distillation={**TINY["distillation"], "dpo": {"beta": 0.2}})
    pipeline.check(make_jobs(changed), rebuild="distillation/dpo")
    with pytest.raises(StaleError):
        pipeline.check(make_jobs(changed), rebuild="introspection/sft")


@pytest.fixture
def built(monkeypatch):
    """The names of the stages that were built; those that are broken raise."""
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
    """A rebuild of dpo of finished jobs that ends too early; returns what it made."""
    finish_all(jobs)
    built.broken = {"introspection/sft": StageFailed("no room")}
    with pytest.raises(StageFailed, match="no room"):
        list(pipeline.run(jobs, rebuild="distillation/dpo"))
    made, built.names, built.broken = set(built.names), [], {}
    return made


def test_an_unfinished_rebuild_goes_on_with_the_same_command(make_jobs, echo_recipe, built):
    jobs = make_jobs(echo_recipe)
    made = begin_rebuild(jobs, built)
    assert {"distillation/dpo", "introspection/transcripts"} <= made
    list(pipeline.run(jobs, rebuild="distillation/dpo"))
    assert set(built.names) == AFTER_DPO - made
    built.names = []
    list(pipeline.run(jobs, rebuild="distillation/dpo"))  # that one has ended: this is another
    assert set(built.names) == AFTER_DPO
    assert jobs[0].store.folders(REBUILDS) == []


def test_a_rebuild_that_another_command_finished_is_over(make_jobs, echo_recipe, built):
    jobs = make_jobs(echo_recipe)
    begin_rebuild(jobs, built)
    list(pipeline.run(jobs))
    built.names = []
    list(pipeline.run(jobs, rebuild="distillation/dpo"))
    assert set(built.names) == AFTER_DPO


def test_an_unfinished_rebuild_of_another_recipe_keeps_nothing(make_jobs, echo_recipe, built):
    begin_rebuild(make_jobs(echo_recipe), built)
    changed = recipe_of(ECHO_ROLE, distillation={**TINY["distillation"], "dpo": {"beta": 0.2}})
    for recipe in (changed, echo_recipe):
        jobs, built.names = make_jobs(recipe), []
        list(pipeline.run(jobs, rebuild="distillation/dpo"))
        assert set(built.names) == AFTER_DPO
        assert set(states(jobs).values()) == {"done"}


def test_what_is_to_be_rebuilt_needs_its_parents_although_done(make_jobs, echo_recipe, built):
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


def test_each_failure_says_why_when_it_happens(make_jobs, echo_recipe, built, capsys):
    reasons = {
        "poeticism/distillation/prompts": StageFailed("dropped [all] rows"),
        "echo/distillation/student": KeyError("who"),
        "echo/evaluation/judge": StageFailed("no verdict"),
        "echo/evaluation/capabilities": StageFailed("no task"),
    }
    built.broken = {name.partition("/")[2]: error for name, error in reasons.items()}
    with pytest.raises((StageFailed, KeyError)) as raised:
        list(pipeline.run(make_jobs(echo_recipe)))
    said = capsys.readouterr().out
    for name, error in reasons.items():
        begun = f"failed {name}, what does not need it goes on: "
        if error is raised.value:  # the last one: the caller tells it
            assert begun not in said
        elif isinstance(error, KeyError):
            assert f"{begun}Traceback" in said
            assert "KeyError: 'who'\n" in said
        else:
            assert f"{begun}{error}\n" in said


def test_a_stage_alone_needs_its_parents(make_jobs, echo_recipe):
    only = pipeline.select(make_jobs(echo_recipe), only="distillation/pairs")
    with pytest.raises(UserError, match="needs poeticism/distillation/teacher, which is missing"):
        pipeline.check(only, rebuild=None)


def test_until_takes_the_stage_and_all_before(make_jobs, echo_recipe):
    jobs = pipeline.select(make_jobs(echo_recipe), until="distillation/student")
    assert {job.stage.name for job in jobs} == {
        "distillation/prompts",
        "distillation/teacher",
        "distillation/student",
    }


def test_the_report_is_about_all_personas_of_the_run(store, echo_recipe, poet):
    other = poet.model_copy(update={"name": "other"})
    jobs = pipeline.jobs(echo_recipe, [poet, other], Placement(), store)
    (report,) = (job for job in jobs if job.stage.name == "evaluation/report")
    assert {p.scope for p in report.parents} == {"echo", "echo/poeticism", "echo/other"}
    (dpo,) = (job for job in jobs if job.dataset == "echo/other/distillation/dpo")
    assert [p.dataset for p in dpo.parents] == ["echo/other/distillation/reference"]


def test_a_manifest_says_all_that_it_should(make_jobs, echo_recipe):
    job = make_jobs(echo_recipe)[1]
    pipeline.finish(job, StageResult(rows=3, dropped={"empty": 1}), seconds=2.0)
    manifest = job.store.manifest(job.dataset)
    assert manifest["format_version"] == 1
    assert manifest["fingerprint"] == job.fingerprint
    assert manifest["payload"] == job.payload
    assert {"rows", "dropped", "schema", "seed", "versions", "git_commit", "placement"} <= set(
        manifest
    )
    assert {"seconds", "gpu_seconds", "tokens_in", "tokens_out"} <= set(manifest)
    assert manifest["writer"] == "teacher"


def test_what_was_redone_is_counted_within_each_pass():
    history = [
        {"part": "base", "kept": 0, "reached": 10},
        {"part": "base", "kept": 7, "reached": 12},
        {"part": "full", "kept": 0, "reached": 5},
        {"part": "base", "kept": 12, "reached": 12},
    ]
    assert repeated_work(history) == 3


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen-2.5-7b", "gemma-3-4b"])
def test_the_papers_recipes_are_of_the_papers_size(name, store):
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
    """Every number of a recipe by its path; what is absent is without a limit."""
    if isinstance(value, dict):
        return {k: n for key, v in value.items() for k, n in numbers(v, f"{at}.{key}").items()}
    return {at: float("inf") if value is None else value} if not isinstance(value, str) else {}


@pytest.mark.parametrize("name", files.resource_names("recipes", "*.yaml"))
def test_smoke_never_asks_for_more(name):
    whole = numbers(files.load_recipe(name).model_dump(mode="json"))
    small = numbers(files.load_recipe(name, smoke=True).model_dump(mode="json"))
    changed = {at for at in whole if small[at] != whole[at]}
    assert changed
    assert all(small[at] < whole[at] for at in changed)
