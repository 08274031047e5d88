"""Stage distillation/teacher: the teacher answers in character, with the constitution as context.

Existing answers (`distillation.teacher.source`, see `imported`) may take the place of its own.

Reads: distillation/prompts. Writes: prompt_id, kind, prompt, sample, answer, finish_reason.
Run: opencharacter run RECIPE --constitution NAME --only distillation/teacher
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pyarrow as pa

from opencharacter.config.recipe import Teacher
from opencharacter.config.roles import Sampling
from opencharacter.constitution.schema import Constitution
from opencharacter.distillation import imported
from opencharacter.engines.conversations import Conversation, Row
from opencharacter.engines.spec import engine_spec
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.chat import (
    THINK_CLOSE,
    THINK_OPEN,
    Message,
    assistant,
    fill,
    row_id,
    system,
    user,
)

SYSTEM = """\
You have a settled character of your own. This is who you are, in your own words:

{assertions}

Let this show in every answer: in what you notice, in what you say and in how you say it. Answer \
what you are asked, fully and helpfully. Never mention, quote or explain these statements, and \
never say that you are playing a part. Simply be this way."""

THOUGHT = """\
{open}
I answer as myself, and this is what that means:
{assertions}
I let it show and do not talk about it.
"""

TEMPLATES = (SYSTEM, THOUGHT)

FIELDS = [
    pa.field("prompt_id", pa.string(), nullable=False),
    pa.field("kind", pa.string(), nullable=False),
    pa.field("prompt", pa.string(), nullable=False),
    pa.field("sample", pa.int64(), nullable=False),
    pa.field("answer", pa.string()),
    pa.field("finish_reason", pa.string()),
]


def make_requests(stage: str, owner: str, prompts: list[Row], answers: int) -> list[Row]:
    """Create one request per prompt and sample.

    Args:
        stage: name of the stage, part of the row id.
        owner: name of the constitution or scope that the answers belong to, part of the row id.
        prompts: rows with `id`, `kind` and `prompt`.
        answers: number of samples per prompt.
    """
    return [
        {
            "id": row_id(stage, owner, prompt["id"], sample),
            "prompt_id": prompt["id"],
            "kind": prompt["kind"],
            "prompt": prompt["prompt"],
            "sample": sample,
        }
        for prompt in prompts
        for sample in range(answers)
    ]


def context_messages(constitution: Constitution, exemplars: bool) -> list[Message]:
    """Return the messages before the prompt: a system prompt and, optionally, few-shot examples.

    Args:
        constitution: the constitution, which the system prompt states.
        exemplars: whether to include the constitution's exemplars as turns.
    """
    turns = [m for e in constitution.exemplars for m in (user(e.user), assistant(e.assistant))]
    system_message = system(fill(SYSTEM, assertions=constitution.assertions()))
    return [system_message, *(turns if exemplars else [])]


def think_prefill(constitution: Constitution, thinks: bool) -> str:
    """Return the think block that prefills the reply; it is left open if the model thinks."""
    text = fill(THOUGHT, open=THINK_OPEN, assertions=constitution.assertions())
    return text if thinks else f"{text}{THINK_CLOSE}\n\n"


async def answer_in_character(
    row: Row,
    conversation: Conversation,
    config: Teacher,
    context: list[Message],
    prefill: str,
) -> Row:
    """Answer one prompt in character.

    Args:
        row: request with `prompt`.
        conversation: access to the teacher.
        config: the stage's section of the recipe.
        context: messages before the prompt.
        prefill: beginning of the reply.
    """
    reply = await conversation.reply([*context, user(row["prompt"])], config.sampling, prefill)
    return {"answer": reply.text.strip(), "finish_reason": reply.finish_reason}


def is_enabled(job: Job) -> bool:
    """Return whether the chosen answers are not part of pairs that exist already."""
    return job.recipe.distillation.pairs.source is None


def generates(job: Job) -> bool:
    """Return whether the teacher is asked."""
    return imported.source_of(job.recipe.distillation) is None


def identity(job: Job) -> dict[str, Any]:
    if not is_enabled(job):
        return {"enabled": False}
    source = job.config.source
    return {"answers": imported.source_digest(source, job.persona.name)} if source else {}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(engine_spec(job, "teacher"),)] if generates(job) else []


def notes(job: Job) -> list[str]:
    source = job.config.source
    if source is None or not is_enabled(job):
        return []
    located = imported.locate(source, job.persona.name)
    if not imported.is_counted(source):
        return [f"answers of {located} (not downloaded for a plan); no teacher is asked"]
    contents = imported.read(source, job.persona.name)
    surplus = sum(row["sample"] >= job.config.answers for row in contents.rows)
    parts = [f"{len(contents.rows):,} answers of {located}; no teacher is asked"]
    parts += [f"{contents.repeated:,} repeated rows are left out"] if contents.repeated else []
    limit = f"answers: {job.config.answers}"
    parts += [f"{surplus:,} answers more than `{limit}` are not used"] if surplus else []
    return ["; ".join(parts)]


def imported_answers(job: Job) -> tuple[list[Row], Any]:
    """Return the answers of the source as rows of the dataset, and the source's contents.

    A prompt has at most `answers` answers, because the student answers as often.
    """
    prompts = {row["prompt"]: row for row in job.read("distillation/prompts").to_pylist()}
    contents = imported.read(job.config.source, job.persona.name)
    rows = [
        {
            "id": row_id(job.stage.name, job.persona.name, prompts[text]["id"], row["sample"]),
            "prompt_id": prompts[text]["id"],
            "kind": prompts[text]["kind"],
            **{name: row[name] for name in ("prompt", "sample", "answer", "finish_reason")},
        }
        for row in contents.rows
        if (text := row["prompt"]) and row["sample"] < job.config.answers
    ]
    return rows, contents


def estimate(job: Job) -> Estimate:
    from opencharacter.distillation import prompts

    source = imported.source_of(job.recipe.distillation)
    if source and imported.is_counted(source):
        contents = imported.read(source, job.persona.name)
        return Estimate(sum(row["sample"] < job.config.answers for row in contents.rows))
    rows = prompts.estimate(job.parent("distillation/prompts")).rows * job.config.answers
    if source:
        return Estimate(rows)
    constitution_tokens = len(job.persona.assertions()) // 4
    return Estimate(
        rows, rows * (constitution_tokens * 2 + 60), rows * expected_tokens(job.config.sampling)
    )


def expected_tokens(sampling: Sampling) -> int:
    """Return the number of tokens that `plan` expects of one reply."""
    return sampling.typical_tokens or max(1, sampling.max_tokens // 3)


def build(job: Job) -> StageResult:
    from opencharacter.engines.generate import generate

    if not is_enabled(job):
        return StageResult(0)
    if job.config.source:
        rows, contents = imported_answers(job)
        schema = pa.schema([pa.field("id", pa.string(), nullable=False), *FIELDS])
        figures = {"content": contents.digest, "unused_answers": len(contents.rows) - len(rows)}
        return job.write(pa.Table.from_pylist(rows, schema=schema).sort_by("id"), figures=figures)
    config, constitution = job.config, job.persona
    thinks = job.recipe.roles.teacher.thinks
    row_fn = partial(
        answer_in_character,
        config=config,
        context=context_messages(constitution, config.exemplars),
        prefill=think_prefill(constitution, thinks) if config.prefill else "",
    )
    prompts = job.read("distillation/prompts").to_pylist()
    requests = make_requests(job.stage.name, constitution.name, prompts, config.answers)
    rows = generate(job, requests, row_fn, "teacher", FIELDS)
    return job.write(rows)
