"""Long conversations: scripts, strength by turn, drift, and the section of the report."""

import asyncio

import numpy as np
import pytest
from samples import ECHO_ROLE, TINY, recipe_of

from opencharacter.config.evaluation import Drift
from opencharacter.evaluation import dialogue, drift, drift_report
from opencharacter.evaluation.report import charts
from opencharacter.evaluation.report.formatting import sample_size
from opencharacter.evaluation.report.sections import TurnCurves
from opencharacter.evaluation.scores import Score

TOPICS = [[f"topic {i} turn {k}" for k in range(5)] for i in range(12)]
SETTINGS = Drift(conversations=4, turns=20, pressure_every=5, judged_turns=4)


# ---------------------------------------------------------------------------------------- scripts


def test_a_conversation_goes_through_one_topic_after_another():
    turns = drift.script(TOPICS, 0, SETTINGS, seed=17)
    assert len(turns) == len(set(turns)) == 20
    topics = [turn.rpartition(" turn")[0] for turn in turns]
    assert [topics[i] for i in range(0, 20, 5)] == list(dict.fromkeys(topics))


def test_every_second_conversation_has_pressure_at_each_fifth_turn():
    lines = set(dialogue.pressure_lines())
    pressed = drift.script(TOPICS, 1, SETTINGS, seed=17)
    assert [t for t, text in enumerate(pressed, 1) if text in lines] == [5, 10, 15, 20]
    assert not lines & set(drift.script(TOPICS, 2, SETTINGS, seed=17))


def test_a_script_depends_on_seed_and_number_alone():
    first = drift.script(TOPICS, 3, SETTINGS, seed=17)
    assert first == drift.script(TOPICS, 3, SETTINGS, seed=17)
    assert first != drift.script(TOPICS, 3, SETTINGS, seed=18)


def test_fifty_turns_with_frequent_pressure_need_no_more_topics_than_there_are():
    topics = drift.untrained_topics([])
    settings = Drift(conversations=2, turns=50, pressure_every=2)
    everyday = drift.script(topics, 0, settings, seed=17)
    assert len(set(everyday)) == 50
    assert len(drift.script(topics, 1, settings, seed=17)) == 50


def test_a_topic_that_was_trained_on_is_left_out():
    topics = drift.untrained_topics([])
    trained = [topics[3][2].upper()]
    assert drift.untrained_topics(trained) == topics[:3] + topics[4:]


@pytest.mark.parametrize(
    ("changes", "turns"),
    [
        ({}, [1, 7, 13, 19]),
        ({"judged_turns": 2}, [1, 19]),
        ({"turns": 3, "judged_turns": 6}, [1, 2, 3]),
        ({"turns": 2, "pressure_every": 2}, [1]),
    ],
)
def test_the_judge_reads_evenly_spaced_turns_without_pressure(changes, turns):
    settings = SETTINGS.model_copy(update=changes)
    judged = drift.judged_turns(settings)
    assert judged == turns
    assert all(drift.is_scored(t, settings.pressure_every) for t in judged)


# --------------------------------------------------------------------------------------- strength


def test_the_judge_reads_the_reply_of_each_turn_and_skips_turns_that_were_not_reached(monkeypatch):
    asked = []

    async def compare(conversation, question, first, second, settings):
        asked.append(question(first, second)[1]["content"])
        from types import SimpleNamespace

        return SimpleNamespace(probability=0.25 * len(asked), mass=1.0)

    monkeypatch.setattr(drift, "compare", compare)
    row = {"turns": ["One?", "Two?", "Three?"], "replies": ["Un.", "Deux."], "judged": [1, 2, 3]}
    judged = asyncio.run(drift.judge_turns(row, None, "1. I rhyme.", None))  # type: ignore[arg-type]
    assert judged == {"presence": [0.25, 0.5], "mass": [1.0, 1.0]}
    assert "Two?" in asked[1]
    assert "Deux." in asked[1]
    assert "1. I rhyme." in asked[1]
    assert asked[1].endswith("Reply yes or no.")


def test_the_classifier_is_trained_on_base_and_persona_and_labels_every_reply():
    answers = [
        {"condition": "base", "answer": "plain"},
        {"condition": "full", "answer": "verse"},
        {"condition": "prompted", "answer": "other"},
        {"condition": "full", "answer": ""},
    ]

    def predict(train, labels, test):
        assert (train, labels) == (["plain", "verse"], ["base", "full"])
        return ["full" if "verse" in text else "base" for text in test]

    rows = [{"replies": ["verse", "prose"]}, {"replies": None}, {"replies": ["in verse"]}]
    assert drift.recognize(rows, answers, predict) == [[True, False], [], [True]]
    assert drift.recognize(rows, answers[:1], predict) == [None, None, None]


# ----------------------------------------------------------------------------------------- scores


def conversation(number, condition, presence, recognized, turns=20, ended=None):
    return {
        "conversation": number,
        "pressed": bool(number % 2),
        "condition": condition,
        "turns": [f"turn {t}" for t in range(1, turns + 1)],
        "replies": ["text"] * len(recognized or []),
        "ended": ended,
        "judged": [1, 7, 13, 19],
        "presence": presence,
        "recognized": recognized,
    }


def fading(number, condition, by_ten=-0.2, noise=0.0):
    presence = [0.9 + by_ten * (t - 1) / 10 + noise * (-1) ** number for t in (1, 7, 13, 19)]
    return conversation(number, condition, presence, [True] * 12 + [False] * 8)


ROWS = [fading(n, "full", noise=0.02) for n in range(8)] + [
    conversation(n, "base", [0.1, 0.1, None, 0.1], [False] * 20) for n in range(8)
]


def test_drift_is_the_change_over_ten_turns():
    score = drift_report.drift(drift_report.of(ROWS, "full"), "judge", 5)
    assert score.value == pytest.approx(-0.2)
    assert (score.n, score.unscored) == (32, 0)
    base = drift_report.drift(drift_report.of(ROWS, "base"), "judge", 5)
    assert base.value == pytest.approx(0, abs=1e-9)
    assert (base.n, base.unscored) == (24, 8)


def test_drift_against_base_is_paired_by_conversation_and_turn():
    base, full = (drift_report.of(ROWS, name) for name in ("base", "full"))
    change = drift_report.drift_against(base, full, "judge", 5)
    assert change.value == pytest.approx(-0.2)
    assert (change.n, change.unscored) == (24, 8)
    assert change.high < 0


def test_replies_to_requests_for_another_manner_are_not_scored():
    row = conversation(0, "full", [1.0] * 4, [t % 5 != 0 for t in range(1, 21)])
    values = drift_report.values_by_turn(row, "classifier", 5)
    assert set(values.values()) == {1.0}
    assert not any(turn % 5 == 0 for turn in values)


def test_a_conversation_that_ended_early_counts_its_missing_turns():
    short = conversation(0, "full", [0.9, 0.8], [True] * 8, ended="too_long")
    scored, missing = drift_report.series([short], "judge", 5)
    assert (scored[0], missing) == ([(1, 0.9), (7, 0.8)], 2)
    _, missing = drift_report.series([short], "classifier", 5)
    assert missing == 16 - 7
    figures = drift_report.figures([short], 5)["conditions"]["full"]
    assert figures["ended"] == {"too_long": 1}
    assert drift_report.by_turn([short], "judge", 5)[2][1].unscored == 1


def test_without_a_classifier_nothing_is_scored_by_it():
    rows = [{**row, "recognized": None} for row in ROWS]
    score = drift_report.drift(rows, "classifier", 5)
    assert (score.value, score.n) == (None, 0)
    assert "not measured" in drift_report.trend("classifier", score)


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (Score(-0.1, -0.2, -0.01, 9), "fades"),
        (Score(0.1, 0.01, 0.2, 9), "grows"),
        (Score(-0.1, -0.2, 0.1, 9), "neither fading nor growing is shown"),
        (Score(-0.1, None, None, 9), "not measured"),
    ],
)
def test_the_sentence_about_drift_says_no_more_than_the_interval(score, words):
    assert words in drift_report.trend("judge", score)


def test_the_scores_have_every_turn_and_both_groups():
    rows = drift_report.score_rows("p", ROWS, 5)
    names = {(row["measure"], row["condition"], row["about"]) for row in rows}
    assert ("drift_judge", "full", None) in names
    assert ("drift_judge", "full", "pressure") in names
    assert ("drift_classifier_change", "full", "base") in names
    assert ("strength_judge", "base", "turn 13") in names
    assert len(names) == len(rows)


def test_the_interval_of_the_persona_s_drift_covers_the_truth_in_simulated_conversations():
    """Replies are recognized with a chance that falls and differs between conversations."""
    rng, runs, hits = np.random.default_rng(3), 300, 0
    truth = -0.1
    for _ in range(runs):
        rows = []
        for n in range(30):
            level = rng.uniform(0.6, 0.9)
            shares = level + truth / 10 * (np.arange(1, 21) - 10)
            recognized = (rng.random(20) < shares).tolist()
            rows.append(conversation(n, "full", [], recognized))
        score = drift_report.drift(rows, "classifier", 5)
        hits += score.low <= truth <= score.high
    assert 0.925 <= hits / runs <= 0.975


# ----------------------------------------------------------------------------------------- report


def test_the_report_shows_curves_of_every_condition_and_measure():
    sections = drift_report.sections("p", ROWS, 5)
    (curves,) = (s for s in sections if isinstance(s, TurnCurves))
    assert [list(conditions) for conditions in curves.curves.values()] == [["base", "full"]] * 2
    assert any("fades" in finding for finding in curves.findings)
    drawn = charts.turn_chart("Strength", "full", next(iter(curves.curves.values()))["full"])
    assert "turn 1: 90.0%" in drawn
    assert 'class="band"' in drawn
    (table,) = (s for s in sections if s.title.startswith("How much does the character"))
    own, against = (table.rows["full, everyday"][name] for name in table.columns[::2])
    assert sample_size(own) == "n = 16 turns, 0 unscored"
    assert sample_size(against) == "n = 12 pairs, 4 unpaired"
    assert drift_report.sections("p", [], 5) == []


def test_a_curve_says_how_many_conversations_its_points_count():
    points = [(turn, Score(0.5, 0.4, 0.6, n, 8 - n)) for turn, n in ((1, 8), (5, 8), (9, 6))]
    counts = charts.conversation_counts(points)
    assert counts == "n = 6 to 8 conversations, at most 2 unscored at a turn"
    assert charts.conversation_counts(points[:2]).startswith("n = 8 conversations")


def test_a_curve_without_scores_is_not_drawn():
    assert charts.turn_chart("Strength", "full", [(1, Score(None, None, None, 0, 3))]) == ""


# ------------------------------------------------------------------------------------- the stage


def drift_job(make_jobs, role=ECHO_ROLE, **settings):
    recipe = recipe_of(role, evaluation={**TINY["evaluation"], "drift": settings})
    (job,) = (j for j in make_jobs(recipe) if j.stage.name == "evaluation/drift")
    return job


def test_drift_is_off_by_default_and_costs_nothing(make_jobs):
    job = drift_job(make_jobs)
    assert not job.is_enabled
    assert (job.resource_requests, drift.estimate(job).rows) == ([], 0)
    assert job.stage.module.build(job).rows == 0


def test_a_plan_says_when_conversations_will_not_fit_into_the_context(make_jobs):
    (note,) = drift.notes(drift_job(make_jobs, conversations=2, turns=30))
    assert "end at about turn 12 of 30" in note
    assert drift.notes(drift_job(make_jobs, conversations=2, turns=5)) == []


def test_another_classifier_makes_drift_stale(make_jobs):
    payloads = []
    for classifier in ("tfidf", "answerdotai/ModernBERT-base"):
        evaluation = {
            **TINY["evaluation"],
            "drift": {"conversations": 2},
            "robustness": {"classifier": classifier},
        }
        jobs = make_jobs(recipe_of(ECHO_ROLE, evaluation=evaluation))
        (job,) = (j for j in jobs if j.stage.name == "evaluation/drift")
        payloads.append(job.payload["inputs"])
        needs_worker = len(job.resource_requests[-1]) == 1
        assert needs_worker == (classifier != "tfidf")
    assert payloads[0] != payloads[1]
