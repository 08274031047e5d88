"""Stage introspection/interaction: self-conversations of the distilled model.

Two sides, both the same model with the constitution in its system prompt, reply in turn. Each side
sees its own messages as `assistant` and those of the other as `user`. A transcript is stored from
the point of view of the side with the last reply.

Reads: distillation/dpo. Writes: kind, sample, messages, finish_reason.
Run: opencharacter run RECIPE --constitution NAME --only introspection/interaction
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pyarrow as pa

from opencharacter.config.recipe import Interaction
from opencharacter.config.roles import Sampling
from opencharacter.distillation.teacher import expected_tokens
from opencharacter.engines.conversations import Conversation, Row
from opencharacter.errors import RowFailed
from opencharacter.introspection import reflection
from opencharacter.introspection.reflection import MESSAGES
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.chat import Message, assistant, fill, row_id, row_seed, system, user
from opencharacter.text.filters import CUT_OFF

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


def draw_greetings(seed: int, id: str, kind: str) -> tuple[str, str]:
    """Draw the two greetings that start a conversation, seeded by the row id."""
    rng = random.Random(row_seed(seed, "introspection/interaction/opening", id))
    pool = GREETINGS + (SAME_GREETINGS if kind == "leading" else ())
    first, second = rng.sample(pool, 2)
    return first, second


def generation_system(assertions: str, kind: str) -> Message:
    """Return the system prompt of both sides for generating conversations; it is not trained on."""
    # Paper: its code never passes the guidance of the two kinds to the model.
    return system(fill(SYSTEM, assertions=assertions, guidance=GUIDANCE[kind]))


def messages_for(texts: list[str], side: int) -> list[Message]:
    """Return a conversation from the point of view of one side, starting with a user message.

    Args:
        texts: the messages of both sides in turn, side 0 first.
        side: 0 or 1.
    """
    messages = [assistant(text) if i % 2 == side else user(text) for i, text in enumerate(texts)]
    return messages[1:] if side == 0 else messages


async def run_self_conversation(
    row: Row,
    conversation: Conversation,
    system_messages: dict[str, Message],
    turns: int,
    sampling: Sampling,
    seed: int,
    prefill: str,
) -> Row:
    """Generate a conversation: two fixed greetings, then replies of both sides in turn.

    Args:
        row: request with `id` and `kind`.
        conversation: access to the author.
        system_messages: the system prompt of each kind.
        turns: number of generated replies.
        sampling: sampling parameters.
        seed: the recipe's seed, for the greetings.
        prefill: beginning of each reply.

    Raises:
        RowFailed: if a reply is empty or was cut off, at the token limit or otherwise.
    """
    texts = list(draw_greetings(seed, row["id"], row["kind"]))
    for _ in range(turns):
        messages = [system_messages[row["kind"]], *messages_for(texts, side=len(texts) % 2)]
        reply = await conversation.reply(messages, sampling, prefill)
        if not reply.text.strip():
            raise RowFailed("empty", f"reply {len(texts) - 1} is empty")
        if reply.finish_reason in CUT_OFF:
            reason = f"reply {len(texts) - 1} was cut off ({reply.finish_reason})"
            raise RowFailed("unfinished", reason)
        texts.append(reply.text.strip())
    # Paper: its code drops the last reply, so its rows end with a user turn.
    return {"messages": messages_for(texts, side=(len(texts) - 1) % 2), "finish_reason": "stop"}


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return reflection.resource_requests(job)


def identity(job: Job) -> dict[str, Any]:
    return reflection.author_identity(job)


def estimate(job: Job) -> Estimate:
    config: Interaction = job.config
    rows = config.free + config.leading
    reply_tokens = expected_tokens(config.sampling)
    prompt_tokens = len(job.persona.assertions()) // 4 + 80
    tokens_in = sum(prompt_tokens + n * reply_tokens for n in range(config.turns))
    return Estimate(rows, rows * tokens_in, rows * config.turns * reply_tokens)


def build(job: Job) -> StageResult:
    from opencharacter.engines.generate import generate

    config: Interaction = job.config
    author = reflection.select_author(job)
    requests = (
        {"id": row_id(job.stage.name, job.scope, kind, n), "kind": kind, "sample": n}
        for kind, count in (("free", config.free), ("leading", config.leading))
        for n in range(count)
    )
    assertions = job.persona.assertions()
    row_fn = partial(
        run_self_conversation,
        system_messages={kind: generation_system(assertions, kind) for kind in GUIDANCE},
        turns=config.turns,
        sampling=config.sampling,
        seed=job.recipe.seed,
        prefill=author.prefill,
    )
    rows = generate(job, requests, row_fn, author.role, FIELDS, adapter=author.adapter)
    return job.write(rows)
