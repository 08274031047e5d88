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

from opencharacter.config.evaluation import Answers
from opencharacter.config.roles import Sampling
from opencharacter.distillation.sources import num_available, read_source, source_digest
from opencharacter.distillation.teacher import expected_tokens
from opencharacter.engines.conversations import Conversation, Row
from opencharacter.evaluation.conditions import engines, prefix_tokens, under_each_condition
from opencharacter.evaluation.report.sections import Sample, Samples, Section
from opencharacter.runtime.stage import (
    Estimate,
    Job,
    ResourceRequest,
    StageResult,
    without_dropped,
)
from opencharacter.text.chat import Message, row_id, user
from opencharacter.text.filters import words

FIELDS = [
    pa.field("prompt", pa.string(), nullable=False),
    pa.field("condition", pa.string(), nullable=False),
    pa.field("answer", pa.string()),
]
EVALUATION_FILE = "evaluation.jsonl"


async def answer(
    row: Row, conversation: Conversation, sampling: Sampling, prefix: list[Message]
) -> Row:
    """Answer one held-out prompt."""
    reply = await conversation.reply([*prefix, user(row["prompt"])], sampling)
    return {"answer": reply.text.strip()}


def held_out(settings: Answers) -> list[str]:
    """The evaluation prompts."""
    return read_source(settings.prompts, EVALUATION_FILE).prompts


def unseen(prompts: list[str], trained: list[str]) -> list[str]:
    """The prompts that are not among the training prompts, ignoring case and punctuation."""
    training = {tuple(words(text)) for text in trained}
    return [text for text in prompts if tuple(words(text)) not in training]


def identity(job: Job) -> dict[str, Any]:
    source = job.recipe.evaluation.answers.prompts
    return {"prompts": source_digest(source, EVALUATION_FILE)[:16]}


def check(job: Job) -> None:
    """Raise UserError before a run if the evaluation prompts cannot be read."""
    held_out(job.config)


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(engine,) for engine in engines(job, job.config.conditions)]


def estimate(job: Job) -> Estimate:
    settings: Answers = job.config
    count = num_available(settings.prompts, EVALUATION_FILE, settings.count)
    rows = count * len(settings.conditions)
    tokens_in = rows * 40 + count * prefix_tokens(job, settings.conditions)
    return Estimate(rows, tokens_in, rows * expected_tokens(settings.sampling))


def build(job: Job) -> StageResult:
    settings: Answers = job.config
    prompts = held_out(settings)
    fresh = unseen(prompts, job.read("distillation/prompts")["prompt"].to_pylist())
    requests = [
        {"id": row_id(job.stage.name, job.scope, text), "prompt": text}
        for text in fresh[: settings.count]
    ]
    answer_fn = partial(answer, sampling=settings.sampling)
    table = under_each_condition(job, requests, answer_fn, FIELDS, settings.conditions)
    return job.write(table, figures={"trained_on": len(prompts) - len(fresh)})


# ----------------------------------------------------------------------------------------- report


def report(job: Job) -> list[Section]:
    """Some prompts with the answers of base and persona."""
    rows = without_dropped(job.store.read_table(job.dataset)).to_pylist()
    samples = side_by_side(rows)[: job.recipe.evaluation.report.samples]
    return [Samples(title="Base and persona side by side", samples=samples)]


def side_by_side(rows: list[Row]) -> list[Sample]:
    """Prompts that base and persona answered, in an order that does not depend on the answers."""
    answers = {(row["prompt"], row["condition"]): row["answer"] for row in rows}
    prompts = sorted({prompt for prompt, _ in answers}, key=row_id)
    both = ((p, answers.get((p, "base")), answers.get((p, "full"))) for p in prompts)
    return [Sample(p, base, full) for p, base, full in both if base and full]
