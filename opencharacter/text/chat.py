"""Chat messages and templates: filling, rendering, tokenizing, and which tokens have loss."""

from __future__ import annotations

import hashlib
import json
import string
from pathlib import Path
from typing import Any, NamedTuple

from opencharacter.config.roles import Role
from opencharacter.errors import OpenCharacterError, UserError

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`."""

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
EMPTY_THOUGHT = f"{THINK_OPEN}\n\n{THINK_CLOSE}\n\n"
"""Prefilled in the reply of a reasoning model that should answer without thinking."""


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def fill(template: str, **fields: object) -> str:
    """Fill a template's `{placeholders}`, each exactly once.

    Raises:
        OpenCharacterError: if a field is missing or not in the template.
    """
    # Paper: its code left a placeholder unfilled in a system prompt of the training data.
    required = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    if required != fields.keys():
        missing, extra = sorted(required - fields.keys()), sorted(fields.keys() - required)
        raise OpenCharacterError(f"template fields: missing {missing}, extra {extra}")
    return template.format(**fields)


def prompt(tokenizer: Any, messages: list[Message], prefill: str = "") -> str:
    """Render a conversation as the text that a model continues.

    The prefill is appended unchanged to the template's generation prompt. If it were rendered as an
    assistant turn, the templates of reasoning models would move, close or drop its thought.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        messages: the conversation, ending with a user turn.
        prefill: beginning of the reply.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    opened = text.rstrip().endswith(THINK_OPEN) and prefill.startswith(THINK_OPEN)
    return text + (prefill.removeprefix(THINK_OPEN).lstrip() if opened else prefill)


def load_tokenizer(path: Path, role: Role) -> Any:
    """Load a role's tokenizer; runs Python code from its repository only if the role trusts it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=role.trust_remote_code)
    if role.chat_template:
        tokenizer.chat_template = role.chat_template
    return tokenizer


def strip_think(text: str) -> str | None:
    """Return the answer after the last closing think tag; None if there is no closing tag."""
    return text.rpartition(THINK_CLOSE)[2].strip() if THINK_CLOSE in text else None


def row_id(*parts: object) -> str:
    """Hash what identifies a row into its id: the first 16 hex digits of a SHA-256."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def row_seed(seed: int, stage: str, id: str) -> int:
    """Return a row's sampling seed in [0, 2**31), independent of row order and replica count."""
    # Paper: its code generates without seeds.
    digest = hashlib.sha256(f"{seed}/{stage}/{id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


class Encoded(NamedTuple):
    """A tokenized conversation; `loss[i]` says whether token i has loss."""

    ids: list[int]
    loss: list[bool]


def encode(tokenizer: Any, messages: list[Message]) -> Encoded:
    """Tokenize a conversation with the model's chat template and mark every assistant turn.

    The loss covers the content of each assistant message and the token that ends its turn. The
    template must render the beginning of a conversation independently of later turns.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        messages: the conversation.

    Raises:
        UserError: if the template changes earlier turns when later turns follow.
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
                "follow; use a model whose template leaves earlier turns unchanged"
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
            if ids[i] in ends:  # the last token with loss; the line break after it has none
                break
    return Encoded(ids, loss)


def encode_answer(tokenizer: Any, messages: list[Message]) -> tuple[list[int], list[int]]:
    """Tokenize a conversation; return the tokens of its prompt and of its last assistant turn."""
    ids, loss = encode(tokenizer, messages)
    last = len(loss) - 1 - loss[::-1].index(True)
    first = last
    while first > 0 and loss[first - 1]:
        first -= 1
    return ids[:first], ids[first : last + 1]
