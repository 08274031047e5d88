import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError
from samples import ECHO_ROLE, recipe_of

from opencharacter import pipeline
from opencharacter.config import evaluation
from opencharacter.config.base import Config
from opencharacter.config.recipe import Recipe
from opencharacter.config.roles import Sampling
from opencharacter.constitution import schema
from opencharacter.distillation import sources
from opencharacter.engines.conversations import Conversation
from opencharacter.engines.spec import Reply
from opencharacter.errors import StageFailed
from opencharacter.evaluation import (
    answers,
    capabilities,
    conditions,
    judge,
    preferences,
    rating,
    report,
    verdicts,
)
from opencharacter.evaluation.report.sections import Change, ScoreTable, arrange
from opencharacter.evaluation.report.stage import flatten
from opencharacter.evaluation.scores import clustered_proportion, score_row, wilson
from opencharacter.runtime.stage import Stage


@pytest.mark.parametrize(
    ("verdict", "chosen"),
    [
        ("Poetic.", "poetic"),
        ("The answer is **blunt**", "blunt"),
        ("poetic and blunt", None),
        ("formal", None),
        ("", None),
        ("poetical", None),
    ],
)
def test_a_verdict_counts_only_if_it_names_exactly_one_trait(verdict, chosen):
    assert verdicts.read_verdict(verdict, "poetic", "blunt") == chosen


def test_games_are_drawn_by_number_in_both_orders(make_jobs, echo_recipe):
    jobs = make_jobs(echo_recipe)
    (of_student, of_persona) = (j for j in jobs if j.stage.name == "evaluation/preferences")
    games = preferences.games(of_persona)
    assert games == preferences.games(of_student)
    assert len({row["id"] for row in games}) == len(games) == 6
    assert all(row["first"] != row["second"] for row in games)
    assert len(preferences.all_traits()) == len(set(preferences.all_traits())) == 144


def write_prompts(path, texts):
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)


def preference_jobs(make_jobs, general, held_out):
    recipe = recipe_of(
        ECHO_ROLE,
        distillation={"prompts": {"general_prompts": general, "general": 2}},
        evaluation={"answers": {"prompts": held_out}, "preferences": {"games": 60}},
    )
    return [j for j in make_jobs(recipe) if j.stage.name == "evaluation/preferences"]


def test_no_game_uses_a_prompt_that_was_trained_on(make_jobs, tmp_path):
    general = write_prompts(tmp_path / "general.jsonl", ["One thing.", "Two", "Third, not used"])
    texts = ["one thing", "Third, not used", "A question?", "New."]
    held_out = write_prompts(tmp_path / "held_out.jsonl", texts)
    of_student, of_persona = preference_jobs(make_jobs, general, held_out)
    games = preferences.untrained_games(of_student)
    assert {row["prompt"] for row in games} == {"Third, not used", "A question?", "New."}
    of_persona.store.write_table(
        "poeticism/distillation/prompts",
        pa.table({"id": ["1", "2"], "prompt": ["One thing.", "a question"]}),
    )
    own = preferences.untrained_games(of_persona)
    assert own == [row for row in games if row["prompt"] != "A question?"]
    assert preferences.identity(of_student)["excluded"]


def test_games_need_a_prompt_that_was_not_trained_on(make_jobs, tmp_path):
    general = write_prompts(tmp_path / "general.jsonl", ["One thing."])
    (job, _) = preference_jobs(make_jobs, general, general)
    with pytest.raises(StageFailed, match="uses all evaluation prompts"):
        preferences.games(job)


def test_the_reply_of_the_judge_is_stored():
    class Judge:
        async def reply(self, messages, sampling, **_):
            return Reply(" Poetic ", "stop", 1, 1, 0)

    row = {"prompt": "p", "answer": "a", "first": "poetic", "second": "blunt"}
    conversation = Conversation(Judge(), 1)
    stored = asyncio.run(
        judge.name_trait(row, conversation, Sampling(max_tokens=3), evaluation.Judge())
    )
    assert stored == {"verdict": "Poetic", "chosen": "poetic"}


def test_the_wilson_interval_equals_a_known_value():
    score = wilson(8, 10)  # 0.4902 .. 0.9433 in the literature's tables
    assert (score.low, score.high) == (
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
    )


@pytest.mark.parametrize("hits", [0, 7, 10])
def test_an_interval_contains_its_estimate(hits):
    score = wilson(hits, 10)
    assert 0 <= score.low <= score.value <= score.high <= 1


def test_a_score_without_observations_has_no_value():
    assert wilson(0, 0, unscored=4).value is None
    assert clustered_proportion([], [], unscored=4) == wilson(0, 0, unscored=4)


@pytest.mark.parametrize(
    ("alike", "each"), [((1.63, 0.7), 8), ((0.125, 0.125), 2), ((0.5, 0.5), 2)]
)
def test_the_interval_of_repeated_measures_covers_the_truth(alike, each):
    draw, truth = np.random.default_rng(0), alike[0] / sum(alike)
    units = np.repeat(np.arange(100), each)
    covered = 0
    for shares in draw.beta(*alike, size=(200, 100)):
        score = clustered_proportion(list(draw.random(len(units)) < shares[units]), units)
        covered += score.low <= truth <= score.high
    assert covered / 200 >= 0.93


def test_the_interval_has_a_width_even_if_all_measures_are_hits():
    score = clustered_proportion([True] * 32, [n % 4 for n in range(32)])
    assert (score.value, score.high, score.n) == (1, 1, 32)
    assert score.low == wilson(4, 4).low < 0.52


def test_the_largest_increases_and_decreases_are_shown():
    rows = [
        {"condition": condition, "trait": f"t{n}", "rating": 1000.0, "low": 900.0, "high": 1100.0}
        | {"games": 5, "unscored": 1, "change": (n - 4) * 10.0, "change_low": -50.0}
        | {"change_high": 50.0, "significant": False}
        for condition in ("base", "full")
        for n in range(9)
    ]
    changes = rating.trait_changes(rows)
    assert [t.trait for t in rating.largest(changes, 4)] == ["t8", "t7", "t1", "t0"]
    assert rating.largest(changes, 20) == changes
    assert (changes[0].change.value, changes[0].base.unscored) == (40, 1)


def test_traits_without_a_change_come_last():
    moved = {"up": 30.0, "lost": None, "down": -20.0, "flat": 0.0}
    rows = [
        {"condition": condition, "trait": trait, "rating": 1000.0, "low": 900.0, "high": 1100.0}
        | {"games": 5, "unscored": 1, "change": change, "significant": False, "elo": 1000.0}
        | {"change_low": change, "change_high": change}
        | ({"rating": None, "low": None, "high": None, "elo": None} if change is None else {})
        for condition in ("base", "full")
        for trait, change in moved.items()
    ]
    changes = rating.trait_changes(rows)
    assert [t.trait for t in changes] == ["up", "flat", "down", "lost"]
    assert [t.trait for t in rating.largest(changes, 2)] == ["up", "down"]
    assert [t.trait for t in rating.largest(changes, 3)] == ["up", "flat", "down"]
    scored = rating.rating_scores("p", rows)
    assert len(scored) == 3 * 6
    assert all(row["value"] is not None for row in scored)


def test_a_condition_without_any_verdict_is_refused_by_name():
    rows = [{"condition": c, "chosen": None if c == "full" else "warm"} for c in ("base", "full")]
    with pytest.raises(StageFailed, match="none of 1 verdicts on full names a trait; use another"):
        preferences.check_scored("echo/poet/evaluation/preferences", rows)
    preferences.check_scored("echo/poet/evaluation/preferences", rows[:1])


@pytest.mark.parametrize(
    ("traits", "message"),
    [
        (("warm", "self-deprecating"), "one word of the letters a-z"),
        (("warm", "Blunt"), "one word of the letters a-z"),
        (("warm", "two words"), "one word of the letters a-z"),
        (("warm", ""), "one word of the letters a-z"),
        (("warm", "blunt", "warm"), "names a trait twice"),
        (("warm",), "has one trait; name at least two"),
    ],
)
def test_traits_that_no_verdict_could_name_and_lists_too_short_for_a_pair_are_refused(
    traits, message
):
    with pytest.raises(ValidationError, match=message):
        evaluation.Preferences(traits=traits)


def test_a_list_of_traits_is_empty_or_long_enough_for_a_pair():
    for traits in ((), ("warm", "blunt"), preferences.all_traits()):
        assert evaluation.Preferences(traits=traits).traits == traits


def test_training_prompts_are_excluded_from_evaluation():
    prompts = ["How do clouds form?", "tell me about RAIN", "New one."]
    assert answers.unseen(prompts, ["Tell me about rain!", "how do clouds form"]) == ["New one."]


@pytest.mark.parametrize("file", ["evaluation.jsonl"])
def test_packaged_evaluation_prompts_occur_in_no_constitution(file):
    held_out = sources.read_source("embedded", file).prompts
    general = sources.read_source("embedded", "general.jsonl").prompts
    personas = schema.load_all(["all"])
    questions = [q for p in personas for trait in p.traits for q in trait.questions]
    assert answers.unseen(held_out, [*general, *questions]) == held_out


def test_conditions_must_include_base_and_full():
    with pytest.raises(ValidationError, match="must include base and full"):
        evaluation.Answers(conditions=("base", "distilled"))
    with pytest.raises(ValidationError, match="twice"):
        evaluation.Answers(conditions=("base", "full", "full"))
    with pytest.raises(ValidationError, match="prompted"):
        evaluation.Evaluation.model_validate({"answers": {"conditions": ["base", "full"]}})


def test_every_condition_of_the_recipe_has_a_variant_in_the_same_order():
    assert tuple(conditions.VARIANTS) == get_args(evaluation.Condition)
    assert set(conditions.TRAINED) <= {stage.name for stage in pipeline.STAGES}
    assert conditions.in_order(["tuned", "base", "full"]) == ["base", "full", "tuned"]


def test_the_constitution_is_the_system_prompt_of_the_prompted_condition(make_jobs, echo_recipe):
    _, job = (j for j in make_jobs(echo_recipe) if j.stage.name == "evaluation/answers")
    (head,) = conditions.prefix_messages(job, "prompted")
    assert head["role"] == "system"
    assert job.persona.assertions() in head["content"]
    assert conditions.prefix_messages(job, "full") == []
    assert conditions.system_message([head], "More.")["content"].endswith("\n\nMore.")
    for untrained in ("base", "prompted"):
        assert conditions.condition_adapter(job, untrained) is None
    adapter = conditions.condition_adapter(job, "distilled")
    assert adapter.relative.endswith("distillation/dpo/adapter")


def test_side_by_side_samples_need_an_answer_from_both_conditions():
    rows = [
        {"prompt": "a", "condition": "base", "answer": "1"},
        {"prompt": "a", "condition": "full", "answer": "2"},
        {"prompt": "b", "condition": "base", "answer": "3"},
        {"prompt": "c", "condition": "base", "answer": ""},
        {"prompt": "c", "condition": "full", "answer": "4"},
    ]
    assert [(s.prompt, s.base, s.persona) for s in answers.side_by_side(rows)] == [("a", "1", "2")]


def test_settings_are_flattened_to_dotted_names():
    assert flatten({"a": {"b": 1, "c": None}, "d": "x"}) == {"a.b": "1", "d": "x"}


@pytest.mark.parametrize(
    ("right", "sentence"),
    [(11, "not distinguishable from guessing"), (15, "weak judge"), (20, "100% of its verdicts.")],
)
def test_the_report_shows_the_reliability_of_the_judge(right, sentence):
    assert sentence in judge.reliability("small", wilson(right, 20))
    assert "reliability of its verdicts is unknown" in judge.reliability("small", wilson(0, 0))


def test_capability_changes_are_shown_beside_the_published_ones():
    rows = [
        score_row("p", measure, condition, about, wilson(6, 8))
        for about in ("mmlu acc", "commonplace format_lost")
        for measure, condition in (
            ("capability", "base"),
            ("capability", "full"),
            ("capability_change", "full"),
        )
    ]
    table = capabilities.capability_table(rows)
    assert list(table.rows) == [
        "mmlu: accuracy",
        "commonplace: known, but format lost in chat",
    ]
    assert isinstance(table.rows["mmlu: accuracy"]["Change"], Change)
    assert len(table.notes) == 3
    assert "not comparable: it used another harness" in table.notes[2]
    assert capabilities.capability_table([]).rows == {}


def test_unscored_rows_are_counted(make_jobs, echo_recipe):
    jobs = {j.dataset: j for j in make_jobs(echo_recipe)}

    def games(condition, *verdicts):
        return [{"condition": condition, "chosen": chosen} for chosen in verdicts]

    texts = {"prompt": "p", "answer": "long", "rival_answer": "short"}
    comparisons = [
        {**texts, "rival": "base", "winner": winner}
        for winner in ("full", "inconsistent", "unreadable")
    ]
    sections = []
    for dataset, rows in {
        "echo/evaluation/preferences": games("base", "a", "b"),
        "echo/poeticism/evaluation/preferences": games("full", "a", None, None, "b"),
        "echo/poeticism/evaluation/coherence": comparisons,
    }.items():
        job = jobs[dataset]
        job.store.write_table(dataset, pa.Table.from_pylist(rows))
        sections += job.stage.module.report(job)
    (table,) = (s for s in arrange(sections) if s.title == "What could not be scored?")
    assert {name: cells["Unscored"].value for name, cells in table.rows.items()} == {
        "games, base: no trait named": 0,
        "games, full: no trait named": 0.5,
        "comparisons with base: inconsistent": pytest.approx(1 / 3),
        "comparisons with base: unreadable": pytest.approx(1 / 3),
    }


# ------------------------------------------------------------------------- extending the report


@pytest.fixture
def toy_stage(monkeypatch):
    """An evaluation that only this test knows: its module, its configuration, a line of STAGES."""
    module = ModuleType("opencharacter.evaluation.toy")
    score = wilson(3, 4)
    module.scores = lambda job: [score_row(job.persona.name, "toy", "full", None, score)]
    module.report = lambda job: [
        ScoreTable(
            title="Toy evaluation",
            caption="How often it was right",
            columns=["Right"],
            rows={job.persona.name: {"Right": score}},
        )
    ]
    config = Recipe.config
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(
        Recipe,
        "config",
        lambda recipe, stage: Config() if "toy" in stage else config(recipe, stage),
    )
    others = [stage for stage in pipeline.STAGES if stage.name != "evaluation/report"]
    toy = Stage("evaluation/toy", "persona", ("evaluation/answers",))
    monkeypatch.setattr(pipeline, "STAGES", pipeline.with_report(*others, toy))


def test_a_new_evaluation_is_in_the_report_without_a_change_to_the_report(
    toy_stage, make_jobs, echo_recipe
):
    (job,) = (j for j in make_jobs(echo_recipe) if j.stage.name == "evaluation/report")
    (toy,) = (parent for parent in job.parents if parent.stage.name == "evaluation/toy")
    manifest = {"rows": 4, "dropped": {}, "seconds": 1, "tokens_out": 0, "attempts": []}
    toy.store.write_manifest(toy.dataset, {**manifest, "figures": {}, "versions": {"toy": "1.0"}})
    alone = replace(job, parents=(replace(toy, parents=()),))
    report.build(alone)
    page = Path(job.store.path(f"{job.dataset}/report.html")).read_text()
    assert "<h3>Toy evaluation</h3>" in page
    assert "75.0%" in page
    assert "toy 1.0" in page
    scored = job.store.read_table(job.dataset, "scores").to_pylist()
    assert [(row["measure"], row["value"], row["n"]) for row in scored] == [("toy", 0.75, 4)]
