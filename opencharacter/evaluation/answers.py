"""Stage evaluation/answers: held-out prompts, answered under each condition.

The stage runs in two scopes: the answers of `base` belong to the student and serve every persona;
those of the other conditions (see conditions) belong to the persona and share their seeds. All
answer the same prompts. No general prompt of the training is asked; a persona also leaves out the
questions of its constitution.

Reads: the evaluation prompts, the general prompts; persona/merge, distillation/dpo,
distillation/prompts, the answers of base (persona). Writes: prompt, condition, answer.
Run: opencharacter run RECIPE --constitution NAME --only evaluation/answers
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pyarrow as pa

from opencharacter.config.evaluation import Answers
from opencharacter.config.roles import Sampling
from opencharacter.distillation.prompts import general_rows
from opencharacter.distillation.sources import HUB, num_available, read_source, source_digest
from opencharacter.distillation.teacher import expected_tokens
from opencharacter.engines.conversations import Conversation, Row
from opencharacter.errors import StageFailed
from opencharacter.evaluation.conditions import (
    answer_phases,
    of_scope,
    prefix_tokens,
    under_each_condition,
)
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


def untrained_prompts(job: Job) -> list[str]:
    """The evaluation prompts that are not among the general prompts of the training."""
    general = general_rows(job.recipe.distillation.prompts)
    return unseen(held_out(job.recipe.evaluation.answers), [row["prompt"] for row in general])


def require_untrained_prompts(job: Job) -> list[str]:
    """Return the `untrained_prompts`, of which there must be some.

    Raises:
        StageFailed: if there are none.
    """
    prompts = untrained_prompts(job)
    if not prompts:
        raise StageFailed(
            f"{job.dataset}: the training uses all evaluation prompts; name others in "
            "evaluation.answers.prompts"
        )
    return prompts


def untrained_by(job: Job, prompts: list[str]) -> list[str]:
    """The prompts that the job's persona was not trained on; all of them for the student's job."""
    if job.constitution is None:
        return prompts
    return unseen(prompts, job.read("distillation/prompts")["prompt"].to_pylist())


def source_identity(job: Job) -> dict[str, Any]:
    """The content of the evaluation prompts."""
    source = job.recipe.evaluation.answers.prompts
    return {"prompts": source_digest(source, EVALUATION_FILE)[:16]}


def excluded_identity(job: Job) -> dict[str, Any]:
    """What excludes evaluation prompts: nothing in most runs, and unknown for `hf:` sources."""
    config = job.recipe.distillation.prompts
    if config.general_prompts.startswith(HUB):
        return {"general": [config.general_prompts, config.general]}
    excluded = set(held_out(job.recipe.evaluation.answers)) - set(untrained_prompts(job))
    return {"excluded": sorted(map(row_id, excluded))} if excluded else {}


def identity(job: Job) -> dict[str, Any]:
    conditions = of_scope(job, job.config.conditions)
    return source_identity(job) | {"conditions": conditions} | excluded_identity(job)


def check(job: Job) -> None:
    """Raise UserError before a run if the evaluation prompts cannot be read."""
    held_out(job.config)


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return answer_phases(job, of_scope(job, job.config.conditions))


def estimate(job: Job) -> Estimate:
    settings: Answers = job.config
    count = num_available(settings.prompts, EVALUATION_FILE, settings.count)
    conditions = of_scope(job, settings.conditions)
    rows = count * len(conditions)
    tokens_in = rows * 40 + count * prefix_tokens(job, conditions)
    return Estimate(rows, tokens_in, rows * expected_tokens(settings.sampling))


def build(job: Job) -> StageResult:
    settings: Answers = job.config
    prompts = require_untrained_prompts(job)[: settings.count]
    fresh = untrained_by(job, prompts)
    requests = [{"id": row_id(job.stage.name, job.scope, text), "prompt": text} for text in fresh]
    answer_fn = partial(answer, sampling=settings.sampling)
    conditions = of_scope(job, settings.conditions)
    table = under_each_condition(job, requests, answer_fn, FIELDS, conditions)
    return job.write(table, figures={"trained_on": len(prompts) - len(fresh)})


# ----------------------------------------------------------------------------------------- report


def report(job: Job) -> list[Section]:
    """Some prompts with the answers of base and persona."""
    if job.constitution is None:
        return []
    both = (job, job.parent(job.stage.name))
    rows = [row for j in both for row in without_dropped(j.store.read_table(j.dataset)).to_pylist()]
    samples = side_by_side(rows)[: job.recipe.evaluation.report.samples]
    return [Samples(title="Base and persona side by side", samples=samples)]


def side_by_side(rows: list[Row]) -> list[Sample]:
    """Prompts that base and persona answered, in an order that does not depend on the answers."""
    answers = {(row["prompt"], row["condition"]): row["answer"] for row in rows}
    prompts = sorted({prompt for prompt, _ in answers}, key=row_id)
    both = ((p, answers.get((p, "base")), answers.get((p, "full"))) for p in prompts)
    return [Sample(p, base, full) for p, base, full in both if base and full]
