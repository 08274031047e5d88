"""Stage distillation/student: the student answers the same prompts without the constitution.

It runs in two scopes. The answers to the general prompts belong to the student and are shared by
all its personas; the answers to a constitution's prompts belong to the persona.

Reads: distillation/prompts (persona), the general prompts (student). Writes: see `teacher.FIELDS`.
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


async def answer_prompt(row: Row, conversation: Conversation, config: Student) -> Row:
    """Answer one prompt without a system prompt, except what the chat template itself adds."""
    reply = await conversation.reply([user(row["prompt"])], config.sampling)
    return {"answer": reply.text.strip(), "finish_reason": reply.finish_reason}


def prompt_rows(job: Job) -> list[Row]:
    """Return the prompts of the job's scope."""
    if job.constitution is None:
        return prompts.general_rows(job.recipe.distillation.prompts)
    rows = job.read("distillation/prompts").to_pylist()
    return [row for row in rows if row["kind"] == "constitution"]


def identity(job: Job) -> dict[str, Any]:
    if job.constitution is not None:
        return {}
    return prompts.identity(job) | {"general": job.recipe.distillation.prompts.general}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(engine_spec(job, "student"),)]


def estimate(job: Job) -> Estimate:
    config = job.recipe.distillation.prompts
    if job.constitution is None:
        count = prompts.general_count(config)
    else:
        count = config.questions_per_trait * len(job.persona.traits)
    rows = count * job.config.answers
    return Estimate(rows, rows * 40, rows * teacher.expected_tokens(job.config.sampling))


def build(job: Job) -> StageResult:
    from opencharacter.engines.generate import generate

    config = job.config
    requests = teacher.make_requests(job.stage.name, job.scope, prompt_rows(job), config.answers)
    row_fn = partial(answer_prompt, config=config)
    rows = generate(job, requests, row_fn, "student", teacher.FIELDS)
    return job.write(rows)
