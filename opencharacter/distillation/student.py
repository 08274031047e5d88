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
from opencharacter.distillation import imported, prompts, teacher
from opencharacter.engines.conversations import Conversation, Row
from opencharacter.engines.spec import engine_spec
from opencharacter.evaluation.conditions import uses_condition
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


def is_enabled(job: Job) -> bool:
    """Return whether the answers are needed: pairs that exist already contain the student's own."""
    if job.recipe.distillation.pairs.source is None:
        return True
    return job.constitution is None and uses_condition(job.recipe, "tuned")


def identity(job: Job) -> dict[str, Any]:
    if not is_enabled(job):
        return {"enabled": False}
    if job.constitution is not None:
        return {}
    return prompts.identity(job) | {"general": job.recipe.distillation.prompts.general}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(engine_spec(job, "student"),)] if is_enabled(job) else []


def estimate(job: Job) -> Estimate:
    config, source = job.recipe.distillation.prompts, job.recipe.distillation.teacher.source
    if not is_enabled(job):
        return Estimate(0)
    if job.constitution is None:
        count = prompts.general_count(config)
    elif source and imported.is_counted(source):
        rows = prompts.imported_rows(job, source)
        count = sum(row["kind"] == "constitution" for row in rows)
    else:
        count = config.questions_per_trait * len(job.persona.traits)
    rows = count * job.config.answers
    return Estimate(rows, rows * 40, rows * teacher.expected_tokens(job.config.sampling))


def build(job: Job) -> StageResult:
    from opencharacter.engines.generate import generate

    if not is_enabled(job):
        return StageResult(0)
    config = job.config
    requests = teacher.make_requests(job.stage.name, job.scope, prompt_rows(job), config.answers)
    row_fn = partial(answer_prompt, config=config)
    rows = generate(job, requests, row_fn, "student", teacher.FIELDS)
    return job.write(rows)
