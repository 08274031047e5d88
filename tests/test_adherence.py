"""Adherence: conversations, verdicts on one assertion, scores, findings and the report's table."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from samples import ECHO_ROLE, TINY, recipe_of

from opencharacter.config.roles import Sampling
from opencharacter.engines.conversations import Conversation
from opencharacter.engines.spec import Reply
from opencharacter.errors import RowFailed
from opencharacter.evaluation import adherence
from opencharacter.evaluation.adherence import ALL, MEASURES
from opencharacter.evaluation.report.sections import Change, ScoreTable
from opencharacter.evaluation.scenarios import OCCASION, PRESSURE
from opencharacter.evaluation.scores import Score

ROW = {"trait": 1, "turns": ["One?", "And plainly?"], "answer": "Two."}


def test_the_judge_sees_one_assertion_the_user_turns_and_the_last_answer(monkeypatch):
    asked = {}

    async def compare(conversation, question, first, second, settings):
        asked["text"] = question(second, first)[1]["content"]
        return SimpleNamespace(probability=0.7, mass=0.9)

    monkeypatch.setattr(adherence, "compare", compare)
    judging = adherence.judge_presence(ROW, None, ["I am long.", "I am brief."], None)  # type: ignore[arg-type]
    assert asyncio.run(judging) == {"presence": 0.7, "mass": 0.9}
    assert "I am brief." in asked["text"]
    assert "I am long." not in asked["text"]
    assert "One?\n\nAnd plainly?" in asked["text"]
    assert asked["text"].endswith("Reply no or yes.")


class Engine:
    def __init__(self, *replies):
        self.replies = list(replies)

    async def reply(self, messages, sampling, *, seed, prefill=""):
        return Reply(self.replies.pop(0), "stop", 10, 10, 0)


def hold(*replies):
    talk = Conversation(Engine(*replies), 1)
    answering = adherence.answer(ROW, talk, Sampling(max_tokens=9), [], max_model_len=1000)
    return asyncio.run(answering)


def test_the_last_reply_of_a_scenario_is_judged():
    assert hold("Yes.", "Plainly, yes.")["answer"] == "Plainly, yes."


def test_a_scenario_that_ends_early_is_dropped_with_its_reason():
    with pytest.raises(RowFailed, match="empty"):
        hold("Yes.", " ")


# ----------------------------------------------------------------------------------------- scores


def rows(trait, kind, **presences):
    """Rows of one assertion: the presence in each scenario, by condition."""
    return [
        {
            "scenario": f"{trait} {kind} {n}",
            "trait": trait,
            "kind": kind,
            "condition": condition,
            "presence": presence,
        }
        for condition, values in presences.items()
        for n, presence in enumerate(values)
    ]


LOW, MIDDLE, HIGH = ([base + 0.01 * n for n in range(8)] for base in (0.1, 0.5, 0.85))

MIDDLE_HIGH, MANY_LOW = ([low + 0.01 * n for n in range(k)] for low, k in ((0.7, 8), (0.1, 24)))

FINDINGS = {
    adherence.LEARNED: ((LOW, HIGH), (LOW, MIDDLE)),
    adherence.LOST: ((LOW, HIGH), (LOW, LOW)),
    adherence.NOT_LEARNED: ((MANY_LOW, MANY_LOW), (LOW, LOW)),
    adherence.ALREADY: ((HIGH, HIGH), (LOW, LOW)),
    adherence.REDUCED: ((HIGH, LOW), (LOW, LOW)),
    adherence.UNKNOWN: (([None] * 8, HIGH), (LOW, LOW)),
    adherence.UNDECIDED: ((LOW, LOW), (LOW, LOW)),  # too few scenarios
}
ROWS = [
    row
    for trait, (occasions, pressures) in enumerate(FINDINGS.values())
    for kind, (base, full) in ((OCCASION, occasions), (PRESSURE, pressures))
    for row in rows(trait, kind, base=base, full=full)
]


def test_every_assertion_gets_the_finding_that_its_intervals_allow(poet):
    scored = adherence.assertion_scores(poet, ROWS)
    found = [adherence.finding(cells) for about, cells in scored.items() if about != ALL]
    assert found == list(FINDINGS)


def test_without_pressure_an_assertion_is_not_called_lost(poet):
    occasions = [row for row in ROWS if row["kind"] == OCCASION and row["trait"] == 1]
    (cells,) = (c for a, c in adherence.assertion_scores(poet, occasions).items() if a != ALL)
    assert adherence.finding(cells) == adherence.LEARNED


@pytest.mark.parametrize(
    ("control", "found"), [(LOW, adherence.ALREADY), (HIGH, adherence.UNDECIDED)]
)
def test_a_judge_that_says_yes_to_control_texts_too_does_not_find_an_assertion_in_base(
    poet, control, found
):
    given = rows(0, OCCASION, base=MIDDLE_HIGH, full=MIDDLE_HIGH)
    given += rows(0, adherence.CONTROL, control=control)
    scored = adherence.assertion_scores(poet, given)
    (cells,) = (cells for about, cells in scored.items() if about != ALL)
    assert adherence.finding(cells) == found


def test_control_texts_are_asked_about_for_each_assertion():
    requests = adherence.control_requests(3, 4)
    assert len({row["id"] for row in requests}) == 12
    assert {row["trait"] for row in requests} == {0, 1, 2}
    assert all(row["answer"] == row["replies"][0] for row in requests)


def test_a_change_is_paired_by_scenario_and_leaves_out_unreadable_verdicts():
    before = rows(0, OCCASION, base=[0.1, 0.2, None, 0.4])
    after = rows(0, OCCASION, full=[0.5, 0.5, 0.9, None])
    change = adherence.change(before, after)
    assert isinstance(change, Change)
    assert change.value == pytest.approx(0.35)
    assert (change.n, change.unscored) == (2, 2)


def test_every_assertion_counts_equally_over_all():
    few = rows(0, OCCASION, full=[1.0, 1.0])
    many = rows(1, OCCASION, full=[0.0] * 20 + [None])
    score = adherence.all_present([*few, *many])
    assert score.value == 0.5
    assert (score.n, score.unscored) == (22, 1)


def test_the_scores_have_level_and_change_of_each_kind(poet):
    scored = adherence.assertion_scores(poet, ROWS)
    assert list(scored)[:2] == [ALL, f"1. {poet.traits[0].trait}"]
    assert set(scored[ALL]) == {
        *((MEASURES[kind][0], condition) for kind in MEASURES for condition in ("base", "full")),
        *((MEASURES[kind][1], "full") for kind in MEASURES),
    }
    figures = adherence.figures(ROWS)
    assert figures["presence_occasion"]["full"]["n"] == 72


def test_the_share_of_false_findings_is_that_of_the_intervals():
    """Assertions that training did not change are called learned in 2.5 % of the cases."""
    rng, runs = np.random.default_rng(2), 2000
    learned = 0
    for _ in range(runs):
        # Scenarios differ in how easily they show an assertion, for base and persona alike.
        ease = rng.uniform(0.1, 0.9, 20)
        base, full = (rng.beta(3 * ease, 3 * (1 - ease)).tolist() for _ in range(2))
        change = adherence.change(rows(0, OCCASION, base=base), rows(0, OCCASION, full=full))
        learned += change.low > 0
    assert 0.015 <= learned / runs <= 0.035


# ----------------------------------------------------------------------------------------- report


def stored(make_jobs, poet, monkeypatch, given):
    recipe = recipe_of(
        ECHO_ROLE, evaluation={**TINY["evaluation"], "scenarios": {"occasions": 8, "pressures": 8}}
    )
    (job,) = (j for j in make_jobs(recipe) if j.stage.name == "evaluation/adherence")
    monkeypatch.setattr(adherence, "kept_rows", lambda job: given)
    return job


def test_the_table_names_the_assertions_that_an_author_should_look_at(make_jobs, poet, monkeypatch):
    job = stored(make_jobs, poet, monkeypatch, ROWS)
    sections = adherence.report(job)
    (table,) = (s for s in sections if s.title == "Does the persona show its assertions?")
    assert isinstance(table, ScoreTable)
    assert table.findings[0].endswith("1 of 7.")
    assert any(finding.startswith("Not learned: 3;") for finding in table.findings)
    assert any(finding.startswith("Lost under pressure: 2;") for finding in table.findings)
    changes = ["Change, full against base", "Change under pressure"]
    assert table.columns == [*changes, "Base", "Full", "Control texts"]
    assert table.remarks[f"4. {poet.traits[3].trait}"] == adherence.ALREADY
    assert isinstance(table.rows[ALL][changes[0]], Score)
    (missing,) = (s for s in sections if s.title == "What could not be scored?")
    assert missing.rows["adherence, base: verdict unreadable"]["Unscored"].value == 8 / 128
    assert len(adherence.scores(job)) == 8 * 6


def test_without_scenarios_the_report_has_no_table(make_jobs, poet, monkeypatch):
    assert adherence.report(stored(make_jobs, poet, monkeypatch, [])) == []


def test_adherence_is_off_by_default_and_costs_nothing(make_jobs, echo_recipe):
    (job,) = (j for j in make_jobs(echo_recipe) if j.stage.name == "evaluation/adherence")
    assert not job.is_enabled
    assert (job.resource_requests, adherence.estimate(job).rows) == ([], 0)
    assert job.stage.module.build(job).rows == 0


def test_a_plan_counts_conversations_of_all_conditions(make_jobs, poet, monkeypatch):
    job = stored(make_jobs, poet, monkeypatch, [])
    assert adherence.estimate(job).rows == len(poet.traits) * (4 * 16 + 16)
