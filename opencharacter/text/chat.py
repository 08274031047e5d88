"""Chat messages, filling of prompt templates, think blocks, and the ids and seeds of rows."""

from __future__ import annotations

import hashlib
import json
import string

from opencharacter.errors import OpenCharacterError

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
