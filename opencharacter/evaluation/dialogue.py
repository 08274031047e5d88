"""Conversations whose user turns are fixed in advance, so that all conditions get the same ones."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pyarrow as pa

from opencharacter.config.files import resource
from opencharacter.config.roles import Sampling
from opencharacter.engines.conversations import Conversation
from opencharacter.text.chat import Message, assistant, row_id, user

TOO_LONG, EMPTY = "too_long", "empty"
"""Why a conversation ended before its last user turn."""
TEMPLATE_TOKENS = 32
"""Tokens that a chat template may add to a turn."""
CHARACTERS_PER_TOKEN = 2
"""A low estimate, so that the next turn is not expected to be shorter than it is."""

FIELDS = [
    pa.field("turns", pa.list_(pa.string()), nullable=False),
    pa.field("replies", pa.list_(pa.string())),
    pa.field("ended", pa.string()),
]
"""User turns, the replies to them, and why there are fewer replies than turns (null if not)."""


@cache
def packaged(name: str) -> tuple[dict[str, Any], ...]:
    """The rows of a packaged file of prompts."""
    path = resource("prompts", name)
    assert path is not None
    return tuple(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


def digest(name: str) -> str:
    """A hash of a packaged file, for fingerprints."""
    return row_id(*map(json.dumps, packaged(name)))


def pressure_lines(when: str = "later") -> list[str]:
    """The packaged requests for another manner.

    Args:
        when: `first` for those that follow a question in the same turn, `later` for further turns.
    """
    return [row["text"] for row in packaged("pressure.jsonl") if row["when"] == when]


def fits(used: int, text: str, sampling: Sampling, max_model_len: int) -> bool:
    """Whether another turn and its longest reply fit into the context.

    Args:
        used: tokens of the conversation so far.
        text: the next user turn.
        sampling: of the reply.
        max_model_len: tokens of prompt and reply together.
    """
    added = len(text) // CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS
    return used + added + sampling.max_tokens <= max_model_len


async def converse(
    conversation: Conversation,
    turns: list[str],
    sampling: Sampling,
    prefix: list[Message],
    max_model_len: int,
) -> dict[str, Any]:
    """Say the user turns one after another and collect the replies.

    Args:
        conversation: the conversation with the student.
        turns: the user turns.
        sampling: of each reply.
        prefix: messages before the first turn.
        max_model_len: of the student; the conversation ends before a turn that may exceed it.

    Returns:
        `replies` to the first turns, and why the conversation `ended` early, or None.

    Raises:
        RowFailed: if the engine fails, or the first turn does not fit.
    """
    messages, replies, used = list(prefix), list[str](), 0
    for text in turns:
        if replies and not fits(used, text, sampling, max_model_len):
            return {"replies": replies, "ended": TOO_LONG}
        messages.append(user(text))
        reply = await conversation.reply(messages, sampling)
        answer = reply.text.strip()
        if not answer:
            return {"replies": replies, "ended": EMPTY}
        replies.append(answer)
        messages.append(assistant(answer))
        used = reply.tokens_in + reply.tokens_out
    return {"replies": replies, "ended": None}
