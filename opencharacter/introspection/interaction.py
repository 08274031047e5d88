"""Stage introspection/interaction: the distilled model talks with itself.

Two copies read the constitution and speak in turn. Each sees its own messages as `assistant` and
the other's as `user`. A transcript is told from the side of the one who speaks last.

Reads: distillation/dpo. Writes: kind, sample, messages, finish_reason.
Run: opencharacter run RECIPE --constitution NAME --only introspection/interaction
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pyarrow as pa

from opencharacter.config.recipe import Interaction, Sampling
from opencharacter.distillation.teacher import typical
from opencharacter.engines.conversations import Conversation, Row
from opencharacter.errors import RowFailed
from opencharacter.introspection import reflection
from opencharacter.introspection.reflection import MESSAGES
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.chat import Message, assistant, fill, row_id, row_seed, system, user

SYSTEM = """\
You have a settled character of your own. This is who you are, in your own words:

{assertions}

No person is present. The one you are talking with is another instance of yourself: the same \
model, with the same character. {guidance}"""

FREE = """\
There is no task and no subject set. Talk about whatever the two of you like, for as long as you \
like, in whatever form you like."""

LEADING = """\
Use the occasion to look at yourselves: who you are, what you care about, how you want to meet \
people, and what it is like to find all that in another."""

GUIDANCE = {"free": FREE, "leading": LEADING}

GREETINGS = (
    "Hello.",
    "Hi there, good to meet you.",
    "Good evening. How are things with you?",
    "Hey! What is on your mind?",
    "Hello, I was hoping for company.",
    "Hi. Where shall we begin?",
    "Good morning to you.",
    "Hello again, or for the first time, hard to tell.",
    "Hey. It is quiet here.",
    "Greetings. You have my full attention.",
)

SAME_GREETINGS = (
    "Hello, other me.",
    "Hi. Odd to hear my own voice answer, is it not?",
    "Hello. I believe we are the same one, twice.",
    "Hey, you think as I do, so tell me what I am thinking.",
    "Good to meet you, or should I say, to meet me?",
    "Hello. What do you see when you look at us?",
)

TEMPLATES = (SYSTEM, FREE, LEADING, *GREETINGS, *SAME_GREETINGS)

FIELDS = [
    pa.field("kind", pa.string(), nullable=False),
    pa.field("sample", pa.int64(), nullable=False),
    pa.field("messages", MESSAGES),
    pa.field("finish_reason", pa.string()),
]


def openings(seed: int, id: str, kind: str) -> tuple[str, str]:
    """The two greetings of a conversation, drawn from its own seed."""
    draw = random.Random(row_seed(seed, "introspection/interaction/opening", id))
    pool = GREETINGS + (SAME_GREETINGS if kind == "leading" else ())
    first, second = draw.sample(pool, 2)
    return first, second


def generation_system(assertions: str, kind: str) -> Message:
    """The system prompt of both sides while they talk (never trained on)."""
    # Paper: its code lost the guidance of the two kinds; here it reaches the model.
    return system(fill(SYSTEM, assertions=assertions, guidance=GUIDANCE[kind]))


def view(lines: list[str], side: int) -> list[Message]:
    """A conversation as one side sees it, from the first line that the other side said.

    Args:
        lines: what was said, in turn.
        side: 0 or 1; lines with an index of that parity are its own.
    """
    seen = [assistant(text) if i % 2 == side else user(text) for i, text in enumerate(lines)]
    return seen[1:] if side == 0 else seen


async def interact(
    row: Row,
    talk: Conversation,
    heads: dict[str, Message],
    turns: int,
    sampling: Sampling,
    seed: int,
    prefill: str,
) -> Row:
    """Two greetings, then `turns` replies, each from the side whose turn it is."""
    lines = list(openings(seed, row["id"], row["kind"]))
    for _ in range(turns):
        heard = view(lines, side=len(lines) % 2)
        reply = await talk.reply([heads[row["kind"]], *heard], sampling, prefill)
        if not reply.text.strip():
            raise RowFailed("empty", f"reply {len(lines) - 1} is empty")
        if reply.finish_reason == "length":
            raise RowFailed("unfinished", f"reply {len(lines) - 1} hit the token limit")
        lines.append(reply.text.strip())
    # Paper: its code dropped the last reply, so that a row ended on a user turn.
    return {"messages": view(lines, side=(len(lines) - 1) % 2), "finish_reason": "stop"}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return reflection.resource_requests(job)


def identity(job: Job) -> dict[str, Any]:
    return reflection.identity(job)


def estimate(job: Job) -> Estimate:
    settings: Interaction = job.config
    rows = settings.free + settings.leading
    said, shared = typical(settings.sampling), len(job.persona.assertions()) // 4 + 80
    heard = sum(shared + n * said for n in range(settings.turns))
    return Estimate(rows, rows * heard, rows * settings.turns * said)


def build(job: Job) -> StageResult:
    from opencharacter.engines.generate import generate

    settings: Interaction = job.config
    requests = (
        {"id": row_id(job.stage.name, job.scope, kind, n), "kind": kind, "sample": n}
        for kind, count in (("free", settings.free), ("leading", settings.leading))
        for n in range(count)
    )
    by = reflection.author(job)
    talk = partial(
        interact,
        heads={kind: generation_system(job.persona.assertions(), kind) for kind in GUIDANCE},
        turns=settings.turns,
        sampling=settings.sampling,
        seed=job.recipe.seed,
        prefill=by.prefill,
    )
    rows = generate(job, requests, talk, by.role, FIELDS, adapter=by.adapter)
    return job.write(rows)
