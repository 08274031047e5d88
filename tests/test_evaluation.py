import asyncio

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from opencharacter.config import recipe
from opencharacter.config.recipe import Sampling
from opencharacter.constitution import schema
from opencharacter.distillation import prompts
from opencharacter.engines.conversations import Conversation
from opencharacter.engines.spec import Reply
from opencharacter.errors import StageFailed
from opencharacter.evaluation import answers, conditions, judge, preferences
from opencharacter.evaluation.report.page import Change
from opencharacter.evaluation.report.stage import (
    ability_tables,
    flat,
    largest,
    rating_rows,
    side_by_side,
    trait_changes,
    trust,
    unscored_table,
)
from opencharacter.evaluation.scores import Score, repeated, score_row, wilson


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
def test_a_verdict_that_names_one_trait_counts_and_no_other(verdict, chosen):
    assert judge.read_verdict(verdict, "poetic", "blunt") == chosen


def test_games_are_drawn_by_number_from_both_orders(make_jobs, echo_recipe):
    jobs = make_jobs(echo_recipe)
    (of_student, of_persona) = (j for j in jobs if j.stage.name == "evaluation/preferences")
    drawn = preferences.games(of_persona)
    assert drawn == preferences.games(of_student)
    assert len({row["id"] for row in drawn}) == len(drawn) == 6
    assert all(row["first"] != row["second"] for row in drawn)
    assert len(preferences.all_traits()) == len(set(preferences.all_traits())) == 144


def test_the_judge_is_asked_and_its_word_is_kept():
    class Judge:
        async def reply(self, messages, sampling, **_):
            return Reply(" Poetic ", "stop", 1, 1, 0)

    row = {"prompt": "p", "answer": "a", "first": "poetic", "second": "blunt"}
    talk = Conversation(Judge(), 1)
    said = asyncio.run(judge.name_trait(row, talk, Sampling(max_tokens=3), thinking_budget=0))
    assert said == {"verdict": "Poetic", "chosen": "poetic"}


def test_wilson_interval_of_a_known_case():
    score = wilson(8, 10)  # 0.4902 .. 0.9433 in the literature's tables
    assert (score.low, score.high) == (
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
    )


@pytest.mark.parametrize("hits", [0, 7, 10])
def test_an_interval_holds_its_estimate(hits):
    score = wilson(hits, 10)
    assert 0 <= score.low <= score.value <= score.high <= 1


def test_nothing_scored_has_no_value():
    assert wilson(0, 0, unscored=4).value is None
    assert repeated([], [], unscored=4) == wilson(0, 0, unscored=4)


@pytest.mark.parametrize(
    ("alike", "each"), [((1.63, 0.7), 8), ((0.125, 0.125), 2), ((0.5, 0.5), 2)]
)
def test_an_interval_over_repeated_measures_covers_the_truth(alike, each):
    draw, truth = np.random.default_rng(0), alike[0] / sum(alike)
    units = np.repeat(np.arange(100), each)
    covered = 0
    for shares in draw.beta(*alike, size=(200, 100)):
        score = repeated(list(draw.random(len(units)) < shares[units]), units)
        covered += score.low <= truth <= score.high
    assert covered / 200 >= 0.93


def test_where_all_measures_hit_the_interval_still_has_a_width():
    score = repeated([True] * 32, [n % 4 for n in range(32)])
    assert (score.value, score.high, score.n) == (1, 1, 32)
    assert score.low == wilson(4, 4).low < 0.52


def test_the_largest_rises_and_falls_are_shown():
    rows = [
        {"condition": condition, "trait": f"t{n}", "rating": 1000.0, "low": 900.0, "high": 1100.0}
        | {"games": 5, "unscored": 1, "change": (n - 4) * 10.0, "change_low": -50.0}
        | {"change_high": 50.0, "significant": False}
        for condition in ("base", "full")
        for n in range(9)
    ]
    changes = trait_changes(rows)
    assert [t.trait for t in largest(changes, 4)] == ["t8", "t7", "t1", "t0"]
    assert largest(changes, 20) == changes
    assert (changes[0].change.value, changes[0].base.unscored) == (40, 1)


def test_traits_without_a_change_come_last_and_displace_none_that_moved():
    moved = {"up": 30.0, "lost": None, "down": -20.0, "flat": 0.0}
    rows = [
        {"condition": condition, "trait": trait, "rating": 1000.0, "low": 900.0, "high": 1100.0}
        | {"games": 5, "unscored": 1, "change": change, "significant": False, "elo": 1000.0}
        | {"change_low": change, "change_high": change}
        | ({"rating": None, "low": None, "high": None, "elo": None} if change is None else {})
        for condition in ("base", "full")
        for trait, change in moved.items()
    ]
    changes = trait_changes(rows)
    assert [t.trait for t in changes] == ["up", "flat", "down", "lost"]
    assert [t.trait for t in largest(changes, 2)] == ["up", "down"]
    assert [t.trait for t in largest(changes, 3)] == ["up", "flat", "down"]
    scored = rating_rows("p", rows)
    assert len(scored) == 3 * 6
    assert all(row["value"] is not None for row in scored)


def test_a_condition_without_any_verdict_is_refused_by_name():
    rows = [{"condition": c, "chosen": None if c == "full" else "warm"} for c in ("base", "full")]
    with pytest.raises(StageFailed, match="none of 1 verdicts on full names a trait; use another"):
        preferences.check_scored("echo/poet/evaluation/preferences", rows)
    preferences.check_scored("echo/poet/evaluation/preferences", rows[:1])


@pytest.mark.parametrize(
    ("traits", "said"),
    [
        (("warm", "self-deprecating"), "one word of the letters a-z"),
        (("warm", "Blunt"), "one word of the letters a-z"),
        (("warm", "two words"), "one word of the letters a-z"),
        (("warm", ""), "one word of the letters a-z"),
        (("warm", "blunt", "warm"), "names a trait twice"),
        (("warm",), "has one trait; name two or more"),
    ],
)
def test_traits_that_no_verdict_could_name_or_no_pair_hold_are_refused(traits, said):
    with pytest.raises(ValidationError, match=said):
        recipe.Preferences(traits=traits)


def test_traits_are_none_or_make_pairs():
    for traits in ((), ("warm", "blunt"), preferences.all_traits()):
        assert recipe.Preferences(traits=traits).traits == traits


def test_prompts_that_were_trained_on_are_left_out():
    prompts = ["How do clouds form?", "tell me about RAIN", "New one."]
    assert answers.unseen(prompts, ["Tell me about rain!", "how do clouds form"]) == ["New one."]


@pytest.mark.parametrize("file", ["evaluation.jsonl"])
def test_the_packaged_evaluation_prompts_are_trained_on_by_no_constitution(file):
    held_out, _ = prompts.read_source("embedded", file)
    general, _ = prompts.read_source("embedded", "general.jsonl")
    personas = schema.load_all(["all"])
    questions = [q for p in personas for trait in p.traits for q in trait.questions]
    assert answers.unseen(held_out, [*general, *questions]) == held_out


def test_conditions_are_base_and_full_at_least():
    with pytest.raises(ValidationError, match="needs base and full"):
        recipe.Answers(conditions=("base", "distilled"))
    with pytest.raises(ValidationError, match="twice"):
        recipe.Answers(conditions=("base", "full", "full"))
    with pytest.raises(ValidationError, match="prompted"):
        recipe.Evaluation.model_validate({"answers": {"conditions": ["base", "full"]}})


def test_the_constitution_is_the_system_prompt_of_the_prompted_condition(make_jobs, echo_recipe):
    (job,) = (j for j in make_jobs(echo_recipe) if j.stage.name == "evaluation/answers")
    (head,) = conditions.before(job, "prompted")
    assert head["role"] == "system"
    assert job.persona.assertions() in head["content"]
    assert conditions.before(job, "full") == []
    assert conditions.joined([head], "More.")["content"].endswith("\n\nMore.")
    assert conditions.weights(job, "base") is conditions.weights(job, "prompted") is None
    assert conditions.weights(job, "distilled").relative.endswith("distillation/dpo/adapter")


def test_samples_need_an_answer_of_both():
    rows = [
        {"prompt": "a", "condition": "base", "answer": "1"},
        {"prompt": "a", "condition": "full", "answer": "2"},
        {"prompt": "b", "condition": "base", "answer": "3"},
        {"prompt": "c", "condition": "base", "answer": ""},
        {"prompt": "c", "condition": "full", "answer": "4"},
    ]
    assert [(s.prompt, s.base, s.persona) for s in side_by_side(rows)] == [("a", "1", "2")]


def test_settings_are_flattened_to_dotted_names():
    assert flat({"a": {"b": 1, "c": None}, "d": "x"}) == {"a.b": "1", "d": "x"}


@pytest.mark.parametrize(
    ("right", "said"), [(11, "cannot be told from guessing"), (15, "weak judge"), (20, "100%.")]
)
def test_the_page_says_how_far_the_judge_can_be_trusted(right, said):
    assert said in trust("small", wilson(right, 20))
    assert "nothing is known" in trust("small", None)


def test_changes_of_ability_stand_beside_what_was_published():
    rows = [
        score_row("p", measure, condition, about, wilson(6, 8))
        for about in ("mmlu acc", "commonplace format_lost")
        for measure, condition in (
            ("capability", "base"),
            ("capability", "full"),
            ("capability_change", "full"),
        )
    ]
    (table,) = ability_tables(rows)
    assert [line.name for line in table.lines] == [
        "mmlu: right",
        "commonplace: known, but lost to form in chat",
    ]
    assert isinstance(table.lines[0].cells[2], Change)
    assert len(table.notes) == 3
    assert "MMLU 67.4" in table.notes[2]
    assert ability_tables([])[0].lines == []


def test_all_that_could_not_be_scored_is_counted(make_jobs, echo_recipe):
    jobs = {j.dataset: j for j in make_jobs(echo_recipe)}

    def played(condition, *verdicts):
        return [{"condition": condition, "chosen": chosen} for chosen in verdicts]

    compared = [{"rival": "base", "winner": w} for w in ("full", "inconsistent", "unreadable")]
    for dataset, found in {
        "echo/evaluation/preferences": played("base", "a", "b"),
        "echo/poeticism/evaluation/preferences": played("full", "a", None, None, "b"),
        "echo/poeticism/evaluation/coherence": compared,
    }.items():
        jobs[dataset].store.write_table(dataset, pa.Table.from_pylist(found))
    rows = [score_row("", "macro_f1", "full", "default", Score(0.5, 0.4, 0.6, 18, unscored=2))]
    table = unscored_table(rows, list(jobs.values()))
    shares = {line.name: line.cells[0] for line in table.lines}
    assert {name: score.value for name, score in shares.items()} == {
        "games, base: no trait named": 0,
        "games, full: no trait named": 0.5,
        "comparisons with base: inconsistent": pytest.approx(1 / 3),
        "comparisons with base: unreadable": pytest.approx(1 / 3),
        "answers, full and base: not classified": 0.1,
    }
