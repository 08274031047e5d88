"""Stage evaluation/answers: held-out prompts, answered under each condition.

All conditions (see conditions) answer the same prompts with the same seeds.

Reads: persona/merge, distillation/dpo, distillation/prompts, the evaluation prompts. Writes:
prompt, condition, answer.
Run: opencharacter run RECIPE --constitution NAME --only evaluation/answers
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pyarrow as pa

from opencharacter.config.recipe import Answers, Sampling
from opencharacter.distillation.prompts import available, digest, read_source
from opencharacter.distillation.teacher import typical
from opencharacter.engines.conversations import Conversation, Row
from opencharacter.evaluation.conditions import engines, under_each_condition
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.chat import Message, row_id, user
from opencharacter.text.filters import words

FIELDS = [
    pa.field("prompt", pa.string(), nullable=False),
    pa.field("condition", pa.string(), nullable=False),
    pa.field("answer", pa.string()),
]
EVALUATION_FILE = "evaluation.jsonl"


async def answer(row: Row, talk: Conversation, sampling: Sampling, before: list[Message]) -> Row:
    """Answer one held-out prompt."""
    reply = await talk.reply([*before, user(row["prompt"])], sampling)
    return {"answer": reply.text.strip()}


def held_out(settings: Answers) -> list[str]:
    """The evaluation prompts."""
    return read_source(settings.prompts, EVALUATION_FILE)[0]


def unseen(prompts: list[str], trained: list[str]) -> list[str]:
    """The prompts that are none of those trained on, whatever their case and punctuation."""
    known = {tuple(words(text)) for text in trained}
    return [text for text in prompts if tuple(words(text)) not in known]


def identity(job: Job) -> dict[str, Any]:
    source = job.recipe.evaluation.answers.prompts
    return {"prompts": digest(source, EVALUATION_FILE)[:16]}


def check(job: Job) -> None:
    """Refuse, before a run, evaluation prompts that cannot be had."""
    held_out(job.config)


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(engine,) for engine in engines(job, job.config.conditions)]


def estimate(job: Job) -> Estimate:
    settings: Answers = job.config
    count = available(settings.prompts, EVALUATION_FILE, settings.count)
    rows = count * len(settings.conditions)
    return Estimate(rows, rows * 40, rows * typical(settings.sampling))


def build(job: Job) -> StageResult:
    settings: Answers = job.config
    prompts = held_out(settings)
    fresh = unseen(prompts, job.read("distillation/prompts")["prompt"].to_pylist())
    requests = [
        {"id": row_id(job.stage.name, job.scope, text), "prompt": text}
        for text in fresh[: settings.count]
    ]
    talk = partial(answer, sampling=settings.sampling)
    table = under_each_condition(job, requests, talk, FIELDS, settings.conditions)
    seen = {"trained_on": len(prompts) - len(fresh)}
    return job.write(table, figures=seen)
