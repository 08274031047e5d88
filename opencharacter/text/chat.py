"""Messages and templates: filling, rendering, what is loss and what is not."""

from __future__ import annotations

import hashlib
import json
import string
from pathlib import Path
from typing import Any, NamedTuple

from opencharacter.config.recipe import Role
from opencharacter.errors import OpenCharacterError, UserError

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`."""

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
EMPTY_THOUGHT = f"{THINK_OPEN}\n\n{THINK_CLOSE}\n\n"
"""Begins a reply of a model that thinks where there is no room for a thought."""


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def fill(template: str, **fields: object) -> str:
    """Fill a template's `{placeholders}`; a missing or an extra field is an error.

    Raises:
        OpenCharacterError: naming the fields that do not match.
    """
    # Paper: its code left a placeholder unfilled in a system prompt that was trained on.
    wanted = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    if wanted != fields.keys():
        missing, extra = sorted(wanted - fields.keys()), sorted(fields.keys() - wanted)
        raise OpenCharacterError(f"template fields: missing {missing}, extra {extra}")
    return template.format(**fields)


def prompt(tokenizer: Any, messages: list[Message], prefill: str = "") -> str:
    """The text that a model continues: a conversation, and how its reply begins.

    The prefill follows the template's generation prompt as it is. Templates that know of thoughts
    would take it for a finished reply and move, close or drop the thought that it holds.

    Args:
        tokenizer: with a chat template.
        messages: the conversation, ending on a user turn.
        prefill: beginning of the reply.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    opened = text.rstrip().endswith(THINK_OPEN) and prefill.startswith(THINK_OPEN)
    return text + (prefill.removeprefix(THINK_OPEN).lstrip() if opened else prefill)


def load_tokenizer(path: Path, role: Role) -> Any:
    """The tokenizer of a role's weights, with their Python where the role trusts it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=role.trust_remote_code)


def strip_think(text: str) -> str | None:
    """The answer after the last closing think tag; None if the block was never closed."""
    return text.rpartition(THINK_CLOSE)[2].strip() if THINK_CLOSE in text else None


def row_id(*parts: object) -> str:
    """A stable id from what makes the row: the first 16 hex digits of a SHA-256."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def row_seed(seed: int, stage: str, id: str) -> int:
    """A row's sampling seed, in 0 .. 2**31 - 1, whatever the order or the number of replicas."""
    # Paper: its code generates without seeds.
    digest = hashlib.sha256(f"{seed}/{stage}/{id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


class Encoded(NamedTuple):
    """A conversation in tokens; `loss[i]` says whether token i is learned."""

    ids: list[int]
    loss: list[bool]


def encode(tokenizer: Any, messages: list[Message]) -> Encoded:
    """Tokenise a conversation with the model's stock chat template and mark every assistant turn.

    The loss covers the content of each assistant message and the token that ends its turn. Works
    for any template that renders a conversation's beginning the same whatever follows.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        messages: the conversation.

    Raises:
        UserError: if the template rewrites earlier turns.
    """

    def render(upto: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages[:upto], tokenize=False, add_generation_prompt=prompt
        )

    text = render(len(messages), prompt=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, through = render(i, prompt=True), render(i + 1, prompt=False)
        if not (text.startswith(through) and through.startswith(before)):
            raise UserError(
                f"chat template of {tokenizer.name_or_path!r} rewrites turn {i} when later ones "
                "follow; use a model whose template keeps earlier turns as they were"
            )
        spans.append((len(before), len(through)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    loss = [False] * len(ids)
    added = tokenizer.added_tokens_decoder
    ends = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
    for start, stop in spans:
        inside = [i for i, (a, b) in enumerate(offsets) if start <= a and b <= stop and a < b]
        for i in inside:
            loss[i] = True
            if ids[i] in ends:  # the end of the turn is learned, the line break after it is not
                break
    return Encoded(ids, loss)


def encode_answer(tokenizer: Any, messages: list[Message]) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of the final assistant turn, split where the loss begins."""
    ids, loss = encode(tokenizer, messages)
    last = len(loss) - 1 - loss[::-1].index(True)
    first = last
    while first > 0 and loss[first - 1]:
        first -= 1
    return ids[:first], ids[first : last + 1]
