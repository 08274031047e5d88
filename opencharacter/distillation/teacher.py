"""Stage distillation/teacher: the teacher answers in character, with the constitution as context.

Reads: distillation/prompts. Writes: prompt_id, kind, prompt, sample, answer, finish_reason.
Run: opencharacter run RECIPE --constitution NAME --only distillation/teacher
"""

from __future__ import annotations

from functools import partial

import pyarrow as pa

from opencharacter.config.recipe import Teacher
from opencharacter.config.roles import Sampling
from opencharacter.constitution.schema import Constitution
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


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(engine_spec(job, "teacher"),)]


def estimate(job: Job) -> Estimate:
    from opencharacter.distillation import prompts

    rows = prompts.estimate(job.parent("distillation/prompts")).rows * job.config.answers
    constitution_tokens = len(job.persona.assertions()) // 4
    return Estimate(
        rows, rows * (constitution_tokens * 2 + 60), rows * expected_tokens(job.config.sampling)
    )


def expected_tokens(sampling: Sampling) -> int:
    """Return the number of tokens that `plan` expects of one reply."""
    return sampling.typical_tokens or max(1, sampling.max_tokens // 3)


def build(job: Job) -> StageResult:
    from opencharacter.engines.generate import generate

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
