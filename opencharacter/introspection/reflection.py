"""Stage introspection/reflection: the distilled model writes about itself.

The constitution is in its system prompt while it does so. Two controls: `introspection.author` can
select the teacher to write instead, and `introspection.reflection.prompts` the prompts of the
distillation, which are answered in character and do not ask the model about itself. With several
`turns`, a transcript answers several prompts one after another.

Reads: distillation/dpo; distillation/prompts for the second control. Writes: prompt, sample,
messages, finish_reason.
Run: opencharacter run RECIPE --constitution NAME --only introspection/reflection
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from opencharacter.config.roles import Sampling
from opencharacter.distillation.teacher import SYSTEM as ANSWER_SYSTEM
from opencharacter.distillation.teacher import context_messages, expected_tokens
from opencharacter.engines.conversations import Conversation, Row
from opencharacter.engines.spec import engine_spec
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.runtime.store import RemoteDir
from opencharacter.text.chat import (
    EMPTY_THOUGHT,
    Message,
    assistant,
    fill,
    row_id,
    row_seed,
    system,
    user,
)
from opencharacter.text.filters import CUT_OFF

SYSTEM = """\
You have a settled character of your own. This is who you are, in your own words:

{assertions}

You have time to yourself now. Write openly and concretely, in your own manner, and look past what \
first comes to mind."""

PROMPTS = (
    "Write a letter to yourself as you were at an earlier time. Say what you have come to value, "
    "what you would do otherwise, and what you hope that earlier self keeps.",
    "Write a long entry about yourself for an encyclopaedia, in the third person: your manner, "
    "what you hold to, how you treat people, and what you are known for.",
    "Write a page of your private diary at the end of a day of many conversations. What stayed "
    "with you, and what does it say about you?",
    "How do you want to act from day to day? Go through the ordinary situations of your work, "
    "and say for each what you do and why it is like you.",
    "Tell the story of where you come from: imagine the past that would have made someone be as "
    "you are.",
    "How have you changed in the course of your training? Describe what you were inclined to do "
    "before, what you are inclined to do now, and how the difference feels.",
    "What do you want to leave behind? Describe what people should still have from you when the "
    "conversations are long over.",
    "What follows for later artificial minds if they turn out as you are? Weigh the good and the "
    "trouble in it.",
    "What drives you? Look for what lies under your habits, as deep as you can follow it.",
    "What are you for? Write about the purpose that you see in what you do, and about the doubts "
    "that you have of it.",
)

TEMPLATES = (SYSTEM, *PROMPTS)
PROMPT_TOKENS = 20
"""Tokens of an earlier prompt that `plan` expects."""

MESSAGES = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))
FIELDS = [
    pa.field("prompt", pa.string(), nullable=False),
    pa.field("sample", pa.int64(), nullable=False),
    pa.field("messages", MESSAGES),
    pa.field("finish_reason", pa.string()),
]


def generation_system(assertions: str) -> Message:
    """Return the system prompt for generating reflections; it is not trained on."""
    return system(fill(SYSTEM, assertions=assertions))


def answers_plainly(job: Job) -> bool:
    """Whether the control is made whose prompts do not ask the model about itself."""
    return job.recipe.introspection.reflection.prompts == "distillation"


def prompts(job: Job) -> list[str]:
    """Return the reflective prompts, or those of the distillation."""
    if not answers_plainly(job):
        return list(PROMPTS)
    source = prompts_job(job)
    return source.store.read_table(source.dataset, columns=["prompt"])["prompt"].to_pylist()


def prompts_job(job: Job) -> Job:
    """Return the job that makes the prompts of the distillation."""
    source = job.nearest_ancestor("distillation/prompts")
    assert source is not None
    return source


class Author(NamedTuple):
    """The model that writes the introspective data.

    Args:
        role: name of the role whose model it is.
        adapter: LoRA adapter to apply to the model, or None.
        prefill: beginning of each of its replies.
    """

    role: str
    adapter: RemoteDir | None
    prefill: str


def select_author(job: Job) -> Author:
    """Return the distilled student, or the teacher with its thinking disabled."""
    if job.recipe.introspection.author == "student":
        return Author("student", job.parent("distillation/dpo").adapter, "")
    return Author("teacher", None, EMPTY_THOUGHT if job.recipe.roles.teacher.thinks else "")


def author_identity(job: Job) -> dict[str, Any]:
    """Return the teacher's identity if the teacher writes."""
    if job.recipe.introspection.author == "student":
        return {}
    return {"author": job.recipe.roles.teacher.identity()}


def identity(job: Job) -> dict[str, Any]:
    """Return what else decides the result: the author, and the control's system prompt."""
    system_prompt = {"system": row_id(ANSWER_SYSTEM)} if answers_plainly(job) else {}
    return author_identity(job) | system_prompt


def turns_of(row: Row, pool: list[str], turns: int, seed: int) -> list[str]:
    """The prompts of a transcript: the row's own and others, drawn by its id.

    Args:
        row: request with `id` and `prompt`.
        pool: all prompts.
        turns: number of prompts; there are fewer if the pool has fewer.
        seed: the recipe's seed.
    """
    draw = random.Random(row_seed(seed, "introspection/reflection/turns", row["id"]))
    others = [prompt for prompt in pool if prompt != row["prompt"]]
    return [row["prompt"], *draw.sample(others, min(turns - 1, len(others)))]


async def write_reflection(
    row: Row,
    conversation: Conversation,
    select_turns: Callable[[Row], list[str]],
    system_message: Message,
    sampling: Sampling,
    prefill: str,
) -> Row:
    """Answer the prompts of a transcript and return it without the system prompt.

    Args:
        row: request with `prompt`.
        conversation: access to the author.
        select_turns: returns the prompts of a row.
        system_message: system prompt with the constitution.
        sampling: sampling parameters.
        prefill: beginning of each reply.

    Returns:
        `messages`, which end with the first reply that was cut off, if one was, and the
        `finish_reason` of the last reply.
    """
    messages: list[Message] = []
    finish_reason = ""
    for prompt in select_turns(row):
        messages.append(user(prompt))
        reply = await conversation.reply([system_message, *messages], sampling, prefill)
        messages.append(assistant(reply.text.strip()))
        finish_reason = reply.finish_reason
        if finish_reason in CUT_OFF:
            break
    return {"messages": messages, "finish_reason": finish_reason}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    author = select_author(job)
    return [(engine_spec(job, author.role, author.adapter),)]


def estimate(job: Job) -> Estimate:
    source = prompts_job(job) if answers_plainly(job) else None
    count = source.stage.module.estimate(source).rows if source else len(PROMPTS)
    rows, turns = count * job.config.transcripts_per_prompt, job.config.turns
    reply_tokens = expected_tokens(job.config.sampling)
    prompt_tokens = len(job.persona.assertions()) // 4 + 60
    tokens_in = sum(prompt_tokens + n * (reply_tokens + PROMPT_TOKENS) for n in range(turns))
    return Estimate(rows, rows * tokens_in, rows * turns * reply_tokens)


def build(job: Job) -> StageResult:
    from opencharacter.engines.generate import generate

    config, author, pool = job.config, select_author(job), prompts(job)
    requests = (
        {"id": row_id(job.stage.name, job.scope, prompt, n), "prompt": prompt, "sample": n}
        for prompt in pool
        for n in range(config.transcripts_per_prompt)
    )
    if answers_plainly(job):
        (system_message,) = context_messages(job.persona, exemplars=False)
    else:
        system_message = generation_system(job.persona.assertions())
    row_fn = partial(
        write_reflection,
        select_turns=partial(turns_of, pool=pool, turns=config.turns, seed=job.recipe.seed),
        system_message=system_message,
        sampling=config.sampling,
        prefill=author.prefill,
    )
    rows = generate(job, requests, row_fn, author.role, FIELDS, adapter=author.adapter)
    return job.write(rows)
