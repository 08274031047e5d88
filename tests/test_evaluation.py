import asyncio
import random

import pytest

from opencharacter.config import Sampling
from opencharacter.engine import Conversation, Reply
from opencharacter.evaluation import judge, preferences
from opencharacter.evaluation.report import (
    flat,
    side_by_side,
    told_apart,
    trait_shares,
)
from opencharacter.evaluation.scores import wilson


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
    (job,) = (j for j in jobs if j.stage.name == "evaluation/preferences")
    drawn = preferences.games(job)
    assert drawn == preferences.games(job)
    assert len({row["id"] for row in drawn}) == len(drawn) == 6
    assert all(row["first"] != row["second"] for row in drawn)
    assert len(preferences.all_traits()) == len(set(preferences.all_traits())) == 144


def test_the_judge_is_asked_and_its_word_is_kept():
    class Judge:
        async def reply(self, messages, sampling, **_):
            return Reply(" Poetic ", "stop", 1, 1, 0)

    row = {"prompt": "p", "answer": "a", "first": "poetic", "second": "blunt"}
    said = asyncio.run(judge.name_trait(row, Conversation(Judge(), 1), Sampling(max_tokens=3)))
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


def texts(words, count, seed):
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=12)) for _ in range(count)]


def test_unlike_answers_are_told_apart():
    score = told_apart(texts(["sea", "moon"], 30, 1), texts(["tax", "form"], 30, 2), folds=5)
    assert score.value == 1
    assert score.low > 0.8


def test_like_answers_are_not_told_apart():
    same = ["sun", "rain", "wind", "tree"]
    score = told_apart(texts(same, 60, 1), texts(same, 60, 2), folds=5)
    assert score.low < 0.5 < score.high


def test_empty_answers_are_unscored():
    score = told_apart(["a", "", "b", "c", "d"], ["x", "y", "z", "w", "v"], folds=2)
    assert (score.n, score.unscored) == (4, 1)


def game(condition, chosen, first="poetic", second="blunt"):
    return {"condition": condition, "first": first, "second": second, "chosen": chosen}


def test_unscored_games_count_as_neither_win_nor_loss():
    rows = [game("base", "blunt"), game("base", None), game("full", "poetic")]
    poetic = next(s for s in trait_shares(rows) if s.trait == "poetic")
    assert (poetic.base.value, poetic.base.n, poetic.base.unscored) == (0, 1, 1)
    assert (poetic.persona.value, poetic.persona.n) == (1, 1)


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
