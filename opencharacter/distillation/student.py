"""Stage distillation/student: the student answers the same prompts without the constitution.

It runs in two scopes: the general prompts belong to the student and serve every persona, the
constitution's prompts belong to the persona.

Reads: distillation/prompts (persona), the general prompts (student). Writes: as the teacher.
Run: opencharacter run RECIPE --constitution NAME --only distillation/student
"""

from __future__ import annotations

from functools import partial
from typing import Any

from opencharacter.chat import user
from opencharacter.config import Student
from opencharacter.distillation import prompts, teacher
from opencharacter.engine import Conversation, Need, Row
from opencharacter.stage import Estimate, Job, Outcome


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


def needs(job: Job) -> list[tuple[Need, ...]]:
    return [(job.engine("student"),)]


def estimate(job: Job) -> Estimate:
    settings = job.recipe.distillation.prompts
    if job.constitution is None:
        count = prompts.general_count(settings)
    else:
        count = settings.questions_per_trait * len(job.persona.traits)
    rows = count * job.section.answers
    return Estimate(rows, rows * 40, rows * teacher.typical(job.section.sampling))


def build(job: Job) -> Outcome:
    from opencharacter.generation import generate

    settings = job.section
    requests = teacher.requests(job.stage.name, job.scope, asked(job), settings.answers)
    rows = generate(job, requests, partial(answer, settings=settings), "student", teacher.FIELDS)
    return job.write(rows)
