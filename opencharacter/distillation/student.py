"""Stage distillation/student: the student answers the same prompts without the constitution.

It runs in two scopes: the general prompts belong to the student and serve every persona, the
constitution's prompts belong to the persona.

Reads: distillation/prompts (persona), the general prompts (student). Writes: as the teacher.
Run: opencharacter run RECIPE --constitution NAME --only distillation/student
"""

from __future__ import annotations

from functools import partial
from typing import Any

from opencharacter.config.recipe import Student
from opencharacter.distillation import prompts, teacher
from opencharacter.engines.conversations import Conversation, Row
from opencharacter.engines.spec import engine_spec
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.chat import user


async def answer(row: Row, talk: Conversation, settings: Student) -> Row:
    """Answer one prompt with no system prompt but what the chat template adds by itself."""
    reply = await talk.reply([user(row["prompt"])], settings.sampling)
    return {"answer": reply.text.strip(), "finish_reason": reply.finish_reason}


def asked(job: Job) -> list[Row]:
    """The prompts of this scope."""
    if job.constitution is None:
        return prompts.general_rows(job.recipe.distillation.prompts)
    rows = job.read("distillation/prompts").to_pylist()
    return [row for row in rows if row["kind"] == "constitution"]


def identity(job: Job) -> dict[str, Any]:
    if job.constitution is not None:
        return {}
    settings = job.recipe.distillation.prompts
    return prompts.identity(job) | {"general": settings.general}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(engine_spec(job, "student"),)]


def estimate(job: Job) -> Estimate:
    settings = job.recipe.distillation.prompts
    if job.constitution is None:
        count = prompts.general_count(settings)
    else:
        count = settings.questions_per_trait * len(job.persona.traits)
    rows = count * job.config.answers
    return Estimate(rows, rows * 40, rows * teacher.typical(job.config.sampling))


def build(job: Job) -> StageResult:
    from opencharacter.engines.generate import generate

    settings = job.config
    requests = teacher.requests(job.stage.name, job.scope, asked(job), settings.answers)
    rows = generate(job, requests, partial(answer, settings=settings), "student", teacher.FIELDS)
    return job.write(rows)
