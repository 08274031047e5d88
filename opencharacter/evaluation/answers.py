"""Stage evaluation/answers: held-out prompts, answered under each condition.

Conditions: `base` is the student as it came, `full` the trained persona. All answer the same
prompts with the same seeds and no system prompt.

Reads: persona/merge, the evaluation prompts. Writes: prompt, condition, answer.
Run: opencharacter run RECIPE --constitution NAME --only evaluation/answers
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pyarrow as pa

from opencharacter.chat import row_id, user
from opencharacter.config import Answers, Sampling
from opencharacter.distillation.prompts import read_source
from opencharacter.distillation.teacher import typical
from opencharacter.engine import Conversation, Row, Talk
from opencharacter.stage import Estimate, Job, Outcome

CONDITIONS = ("base", "full")
FIELDS = [
    pa.field("prompt", pa.string(), nullable=False),
    pa.field("condition", pa.string(), nullable=False),
    pa.field("answer", pa.string()),
]
EVALUATION_FILE = "evaluation.jsonl"


async def answer(row: Row, talk: Conversation, sampling: Sampling) -> Row:
    """Answer one held-out prompt."""
    reply = await talk.reply([user(row["prompt"])], sampling)
    return {"answer": reply.text.strip()}


def held_out(settings: Answers) -> list[str]:
    """The evaluation prompts."""
    return read_source(settings.prompts, EVALUATION_FILE)[0]


def under_each_condition(
    job: Job, requests: list[Row], talk: Talk, fields: list[pa.Field]
) -> pa.Table:
    """Have each request answered once under every condition, from the condition's own weights.

    Args:
        job: the stage that asks.
        requests: rows with an `id`, which all conditions share and draw their seed from.
        talk: the row function.
        fields: columns of the result, `condition` among them.
    """
    from opencharacter.generation import generate, is_warm

    weights = {c: None if c == "base" else job.parent("persona/merge").adapter for c in CONDITIONS}
    warm_first = sorted(CONDITIONS, key=lambda c: not is_warm(job, "student", weights[c]))
    tables = []
    for condition in warm_first:
        rows = [
            {
                **row,
                "id": row_id(row["id"], condition),
                "condition": condition,
                "seed_id": row["id"],
            }
            for row in requests
        ]
        parts = generate(job, rows, talk, "student", fields, condition, weights[condition])
        tables.append(parts.table())
    return pa.concat_tables(tables).sort_by("id")


def identity(job: Job) -> dict[str, Any]:
    source = job.recipe.evaluation.answers.prompts
    return {"prompts": read_source(source, EVALUATION_FILE)[1][:16]}


def estimate(job: Job) -> Estimate:
    rows = min(job.section.count, len(held_out(job.section))) * len(CONDITIONS)
    return Estimate(rows, rows * 40, rows * typical(job.section.sampling))


def build(job: Job) -> Outcome:
    settings: Answers = job.section
    requests = [
        {"id": row_id(job.stage.name, job.scope, text), "prompt": text}
        for text in held_out(settings)[: settings.count]
    ]
    talk = partial(answer, sampling=settings.sampling)
    table = under_each_condition(job, requests, talk, FIELDS)
    return job.write(table, gpus=job.gpus("student"))
