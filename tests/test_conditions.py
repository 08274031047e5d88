"""Conditions on the echo engine: the same requests for each, answers and verdicts in one stream."""

import time

import pyarrow as pa
import pytest
from samples import ECHO_ROLE, recipe_of

from opencharacter.config.placement import Placement
from opencharacter.config.roles import Sampling
from opencharacter.engines import generate
from opencharacter.errors import RowFailed
from opencharacter.evaluation.conditions import under_each_condition
from opencharacter.text.chat import user

SHORT = Sampling(max_tokens=12)
SLOW = {**ECHO_ROLE, "model": "echo:0.2"}
FIELDS = [pa.field("condition", pa.string()), pa.field("prompt", pa.string())]
FIELDS += [pa.field("answer", pa.string()), pa.field("answered_at", pa.float64())]
JUDGED = [pa.field("verdict", pa.string()), pa.field("judged_at", pa.float64())]
FEW = Placement.model_validate({"pools": {"student": {"max_num_seqs": 4}}})
CONDITIONS = ("base", "prompted", "full")


async def answer(row, conversation, prefix):
    reply = await conversation.reply([*prefix, user(row["prompt"])], SHORT)
    return {"answer": reply.text, "answered_at": time.monotonic()}


async def judged(row, conversation):
    if row["prompt"] == "number 3":
        raise RowFailed("too_long", "for the judge")
    at = time.monotonic()
    reply = await conversation.reply([user(f"Judge: {row['answer']}")], SHORT)
    return {"verdict": reply.text, "judged_at": at}


@pytest.fixture
def played(cpu_ray, make_jobs, monkeypatch):
    """Plays 16 requests under all conditions; `streamed` says how the judge is asked."""

    def play(streamed, conditions):
        recipe = recipe_of(SLOW, name="streamed" if streamed else "apart")
        jobs = make_jobs(recipe, FEW)
        (_, job) = (j for j in jobs if j.stage.name == "evaluation/preferences")
        monkeypatch.setattr(generate, "fit_together", lambda *_: streamed)
        requests = [{"id": f"{n:02}", "prompt": f"number {n}"} for n in range(16)]
        table = under_each_condition(job, requests, answer, FIELDS, conditions, judged, JUDGED)
        job.store.delete(job.dataset)
        return table

    return play


def test_the_judge_starts_before_all_answers_are_done_and_its_verdicts_do_not_change(played):
    together, apart = played(True, ("full",)), played(False, ("full",))

    def first_verdict_before_last_answer(table):
        rows = [row for row in table.to_pylist() if row["judged_at"]]
        return min(r["judged_at"] for r in rows) < max(r["answered_at"] for r in rows)

    assert first_verdict_before_last_answer(together)
    assert not first_verdict_before_last_answer(apart)
    times = ["answered_at", "judged_at"]
    assert together.drop_columns(times).equals(apart.drop_columns(times))


def test_all_conditions_get_the_same_prompts_and_seeds(played):
    rows = played(True, CONDITIONS).to_pylist()
    assert len(rows) == 16 * 3
    by_condition = {c: {r["prompt"]: r for r in rows if r["condition"] == c} for c in CONDITIONS}
    for prompt, row in by_condition["base"].items():
        assert by_condition["full"][prompt]["answer"] == row["answer"]  # an echo says its seed
        assert "in character" in by_condition["prompted"][prompt]["answer"]
    lost = [row for row in rows if row["drop_reason"]]
    assert [row["prompt"] for row in lost] == ["number 3"] * 3
    assert all(row["answer"] and row["verdict"] is None for row in lost)
    for row in rows:
        if not row["drop_reason"]:  # an echo's tokens are its words
            assert row["tokens_out"] == len(f"{row['answer']} {row['verdict']}".split())
