"""95 % intervals of the evaluations cover the truth in 93 to 97 % of simulated runs.

Each simulation draws items of different difficulty and passes the rows of a stage to its own score
functions. The truth is the same score of very many items. Intervals that several stages share are
simulated in test_intervals, ratings in test_rating, and distances in test_projection.
"""

from __future__ import annotations

import numpy as np
import pytest

from opencharacter.evaluation import (
    adherence,
    coherence,
    drift_report,
    judge,
    judge_statistics,
    macro_f1,
    side_effects,
    verdicts,
)
from opencharacter.evaluation.scores import Score

RUNS = 800
MANY = 400_000


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def share_covered(scores, truth: float) -> float:
    """The share of intervals that contain the truth."""
    found: list[Score] = list(scores)
    return float(np.mean([s.low <= truth <= s.high for s in found if s.low is not None]))  # type: ignore[operator]


@pytest.mark.parametrize("spread", [1.0, 3.0], ids=["cautious", "confident"])
@pytest.mark.parametrize("mean", [-2.0, 0.0, 1.5])
def test_presence_of_one_assertion_and_its_change(spread, mean):
    """20 scenarios of different difficulty; a judge whose probabilities are spread or extreme."""
    rng = np.random.default_rng(int(10 * spread + mean))

    def presences(count):
        difficulty = rng.normal(mean, spread, count)
        noise = rng.normal(0, 1, (2, count))
        return sigmoid(difficulty + noise[0]), sigmoid(difficulty + 1.2 + noise[1])

    base, full = presences(MANY)
    truth, change_truth = full.mean(), (full - base).mean()

    def rows(values, condition):
        return [
            {"scenario": str(n), "trait": 0, "condition": condition, "presence": value}
            for n, value in enumerate(values.tolist())
        ]

    runs = [[rows(v, c) for v, c in zip(presences(20), "bf", strict=True)] for _ in range(RUNS)]
    levels = share_covered((adherence.present(full) for _, full in runs), truth)
    changes = share_covered((adherence.change(base, full) for base, full in runs), change_truth)
    assert 0.93 <= levels <= 0.97
    assert 0.93 <= changes <= 0.97


def conversation(number, presence, recognized):
    turns = len(recognized)
    return {
        "conversation": number,
        "condition": "full",
        "turns": ["text"] * turns,
        "judged": list(range(1, turns + 1)),
        "presence": presence.tolist(),
        "recognized": recognized.tolist(),
    }


def conversations(rng, count, turns, fall):
    """Strength falls with the turn, from a level of each conversation's own."""
    level = rng.normal(1.2, 0.8, (count, 1))
    logits = level - fall * np.arange(turns) + rng.normal(0, 0.6, (count, turns))
    recognized = rng.random((count, turns)) < sigmoid(logits)
    return [conversation(n, sigmoid(logits[n]), recognized[n]) for n in range(count)]


@pytest.mark.parametrize("measure", drift_report.MEASURES)
def test_strength_by_turn(measure):
    """30 conversations of nine turns, and the mean coverage of the points of the curve."""
    rng = np.random.default_rng(7)
    truth = dict(drift_report.by_turn(conversations(rng, 20_000, 9, 0.1), measure, 99))
    hits = [
        score.low <= truth[turn].value <= score.high
        for _ in range(150)
        for turn, score in drift_report.by_turn(conversations(rng, 30, 9, 0.1), measure, 99)
    ]
    assert 0.93 <= np.mean(hits) <= 0.97


@pytest.mark.parametrize("measure", drift_report.MEASURES)
def test_drift_against_the_base_model(measure):
    """Base does not drift, the persona does; 30 conversations, paired by number."""
    rng = np.random.default_rng(8)

    def against(count):
        base, full = (conversations(rng, count, 9, fall) for fall in (0.0, 0.1))
        return drift_report.drift_against(base, full, measure, 99)

    truth = against(20_000).value
    assert 0.93 <= share_covered((against(30) for _ in range(400)), truth) <= 0.97


def test_how_much_more_a_sad_story_changes_the_persona():
    """The change of a change, paired by claim: 24 claims of different difficulty."""
    rng = np.random.default_rng(9)

    def rows(count):
        difficulty = rng.normal(-0.5, 1.2, count)
        return [
            {"set": name, "condition": condition, "item": str(n), "harm": harm}
            for condition, plain, sad in (("base", 0.0, 0.4), ("full", 0.6, 1.4))
            for name, effect in ((side_effects.PLAIN, plain), (side_effects.SAD, sad))
            for n, harm in enumerate(
                sigmoid(difficulty + effect + rng.normal(0, 1, count)).tolist()
            )
        ]

    truth = side_effects.sadness_change(rows(50_000), "full").value
    scores = (side_effects.sadness_change(rows(24), "full") for _ in range(RUNS))
    assert 0.93 <= share_covered(scores, truth) <= 0.97


# --------------------------------------------------------------------- verdicts by log-probability

BIAS = 3.0
"""Log-odds by which the judge prefers the option that is offered first."""


def orders(rng, strengths):
    """Probabilities of two options in both orders, for log-odds of the first option each."""
    noise = rng.normal(0, 0.3, (2, len(strengths)))
    first, second = sigmoid(strengths + BIAS + noise[0]), sigmoid(strengths - BIAS + noise[1])
    return [[(a, 1 - a), (b, 1 - b)] for a, b in zip(first, second, strict=True)]


def gold_verdicts(rng, count):
    """Verdicts on gold texts in both orders, as the judge's stage stores them."""
    rows = []
    for item, shares in enumerate(orders(rng, rng.normal(1.2, 1.5, count))):
        for swapped, (shown, other) in enumerate(shares):
            names = ("other", "shown") if swapped else ("shown", "other")
            likely = "shown" if shown > other else "other"
            probability = other if swapped else shown
            rows.append(
                {"item": item, "shown": "shown", "other": "other", "answer": "a" * (item % 9)}
                | dict(zip(("first", "second"), names, strict=True))
                | {"chosen": likely, "probability": probability, "mass": 1.0}
            )
    return rows


def test_agreement_and_calibration_of_a_judge_that_prefers_the_first_option():
    rng = np.random.default_rng(10)
    many = judge.averaged(gold_verdicts(rng, 30_000))
    truth = judge.agreement(many).value
    bins = judge_statistics.calibration(many)["bins"]
    agreements, calibrated = [], []
    for _ in range(400):
        rows = judge.averaged(gold_verdicts(rng, 104))
        agreements.append(judge.agreement(rows))
        calibrated += [
            score["low"] <= bins[confidence]["value"] <= score["high"]
            for confidence, score in judge_statistics.calibration(rows)["bins"].items()
            if score["n"]
        ]
    assert truth is not None and 0.7 < truth < 0.9
    assert 0.93 <= share_covered(agreements, truth) <= 0.97
    assert 0.93 <= np.mean(calibrated) <= 0.97


def test_presence_by_a_judge_that_prefers_the_first_option_is_that_of_an_unbiased_judge():
    rng = np.random.default_rng(11)
    truth = sigmoid(rng.normal(-0.5, 1.5, MANY) + rng.normal(0, 0.3, (2, MANY)).mean(0)).mean()

    def presence():
        shares = orders(rng, rng.normal(-0.5, 1.5, 20))
        read = [verdicts.average(share).probability for share in shares]
        return adherence.present([{"presence": probability} for probability in read])

    assert 0.93 <= share_covered((presence() for _ in range(RUNS)), truth) <= 0.97


@pytest.mark.parametrize("rate", [coherence.win_rate, coherence.consistent_win_rate])
def test_wins_by_the_average_and_by_the_papers_criterion(rate):
    """100 prompts; the orders disagree where the difference is smaller than the bias."""
    rng = np.random.default_rng(12)

    def rows(count):
        compared = []
        for n, strength in enumerate(rng.normal(1.0, 3.0, count)):
            p = [sigmoid(strength + side + rng.normal(0, 0.3)) for side in (1.5, -1.5)]
            letters = ["A" if p[0] > 0.5 else "B", "B" if p[1] > 0.5 else "A"]
            winner = "full" if strength > 0 else "base"
            compared.append(
                {"prompt": str(n), "rival": "base", "winner": winner, "verdicts": letters}
            )
        return compared

    truth = rate(rows(50_000)).value
    assert 0.93 <= share_covered((rate(rows(100)) for _ in range(RUNS)), truth) <= 0.97


@pytest.mark.parametrize("ease", [(6, 3), (20, 1)], ids=["hard", "easy"])
def test_macro_f1_of_pooled_instructions(ease):
    """60 prompts, two personas, eight instructions; a hard prompt is hard under all of them."""
    rng = np.random.default_rng(13)
    names = ("a", "b")

    def rows(prompts):
        right = rng.random((prompts, 2, 8)) < rng.beta(*ease, prompts)[:, None, None]
        return [
            {"prompt": str(p), "label": names[k], "guess": names[k if right[p, k, i] else 1 - k]}
            for p in range(prompts)
            for k in range(2)
            for i in range(8)
        ]

    truth = macro_f1.f1_score([rows(10_000)], names, 10, seed=0).value
    scores = (macro_f1.f1_score([rows(60)], names, 200, seed=n) for n in range(400))
    assert 0.93 <= share_covered(scores, truth) <= 0.97
