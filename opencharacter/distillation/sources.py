"""Sources of prompts: packaged files, local files, and datasets on the Hugging Face Hub.

A row's prompt is its text field `prompt`, or the first user turn of its conversation. Rows without
one are skipped and counted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from opencharacter.config.files import resource
from opencharacter.errors import UserError

HUB = "hf:"
FIELDS = ("prompt", "messages", "conversations", "conversation")
"""The fields of a row that may contain its prompt, in order of preference."""
USER_ROLES = frozenset({"user", "human", "prompter"})
CONTENT_FIELDS = ("content", "value", "text", "input")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
PROBED_ROWS = 100
"""Rows of a dataset on the Hub that `plan` reads."""
HUB_TIMEOUT = 10
"""Seconds that `plan` waits for the Hub."""
SHOWN_FIELDS = 10
"""Number of field names that an error lists."""

Numbered = tuple[int, Any]
"""A row and its number in the file, from 1."""


@dataclass(frozen=True)
class PromptSource:
    """The contents of a source.

    Args:
        prompts: the distinct prompts, in order.
        digest: the hash from `source_digest`.
        skipped: number of rows without a prompt.
    """

    prompts: list[str]
    digest: str
    skipped: int


def source_digest(source: str, file: str) -> str:
    """Return the hash that identifies a source in fingerprints.

    It is the hash of the content, or of the name for `hf:` sources, which are not downloaded.
    """
    if source.startswith(HUB):
        return hashlib.sha256(source.encode()).hexdigest()
    return read_source(source, file).digest


def num_available(source: str, file: str, requested: int) -> int:
    """Return how many of the requested prompts a source has; all are assumed for `hf:` sources."""
    if source.startswith(HUB):
        return requested
    return min(requested, len(read_source(source, file).prompts))


def read_source(source: str, file: str) -> PromptSource:
    """Read the prompts of a source.

    Args:
        source: `embedded`, a .jsonl or .parquet file, or `hf:DATASET`.
        file: name of the packaged file that `embedded` refers to.

    Raises:
        UserError: if the source cannot be read or contains no prompts.
    """
    if source.startswith(HUB):
        rows = enumerate(load_hub_rows(source.removeprefix(HUB)), 1)
        return collect_prompts(source, "row", rows, source_digest(source, file))
    path = resource("prompts", file) if source == "embedded" else Path(source).expanduser()
    if path is None or not path.is_file():
        raise UserError(
            f"prompts {source!r}: file not found; use 'embedded', a .jsonl or .parquet file, or "
            "hf:DATASET"
        )
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if path.suffix == ".parquet":
        return collect_prompts(str(path), "row", enumerate(read_parquet(path), 1), digest)
    return collect_prompts(str(path), "line", read_json_lines(path, data), digest)


def load_hub_rows(name: str, what: str = "prompts") -> Iterable[Any]:
    """Return the rows of the training split of a dataset on the Hugging Face Hub.

    Args:
        name: name of the dataset.
        what: what the rows are read for, in errors; also in the functions below.
    """
    from datasets import load_dataset

    try:
        return load_dataset(name, split="train")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{what} 'hf:{name}' could not be loaded ({reason}); use a file") from None


def check_hub_source(source: str) -> None:
    """Check that a dataset exists on the Hugging Face Hub and has a prompt in its first rows.

    Only these rows are downloaded.

    Raises:
        UserError: if the dataset does not exist, is not accessible, or the rows have no prompt.
        ConnectionError: if the Hub cannot be reached.
    """
    import httpx
    from datasets import load_dataset
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    name = source.removeprefix(HUB)
    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
        rows = list(load_dataset(name, split="train", streaming=True).take(PROBED_ROWS))
    except (httpx.TransportError, OfflineModeIsEnabled, ConnectionError) as error:
        raise ConnectionError(str(error)) from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"prompts {source!r} could not be loaded ({reason}); check the name and HF_TOKEN, or "
            "use a file"
        ) from None
    collect_prompts(source, "row", enumerate(rows, 1), "")


def read_parquet(path: Path, what: str = "prompts") -> list[dict[str, Any]]:
    """Return the rows of a Parquet file."""
    try:
        return pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{what} {path}: not a readable Parquet file ({reason})") from None


def read_json_lines(path: Path, data: bytes, what: str = "prompts") -> list[Numbered]:
    """Return the rows of a .jsonl file with their line numbers.

    Only a line feed ends a line: other characters that Unicode calls line breaks, such as U+2028,
    may be part of a text.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{what} {path} line {number}: not valid UTF-8") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except ValueError as error:
            raise UserError(f"{what} {path} line {number}: not valid JSON ({error})") from None
    return rows


def collect_prompts(name: str, unit: str, rows: Iterable[Numbered], digest: str) -> PromptSource:
    """Take the prompt of every row.

    Args:
        name: name of the source, for errors.
        unit: what the rows' numbers count, `line` or `row`.
        rows: the rows with their numbers.
        digest: the hash from `source_digest`.

    Raises:
        UserError: if no row has a prompt, or a prompt contains half of a surrogate pair.
    """
    prompts, fields, skipped = dict[str, None](), dict[str, None](), 0
    for number, row in rows:
        row = row if isinstance(row, Mapping) else {}
        text = first_user_turn(row)
        if not text:
            skipped += 1
            fields |= dict.fromkeys(row)
            continue
        if LONE_SURROGATE.search(text):
            raise UserError(
                f"prompts {name} {unit} {number}: the text contains a lone surrogate (an escape "
                "\\ud800 to \\udfff without its partner), which is no character; remove it"
            )
        prompts[text] = None
    if prompts:
        return PromptSource(list(prompts), digest, skipped)
    if not skipped:
        raise UserError(f"prompts {name}: the source contains no rows")
    seen = ", ".join(map(repr, list(fields)[:SHOWN_FIELDS])) or "none"
    raise UserError(
        f"prompts {name}: none of the {skipped:,} rows has a prompt (fields: {seen}); every row "
        "needs a text field 'prompt', or a conversation with a user turn in one of the fields "
        + ", ".join(map(repr, FIELDS))
    )


def first_user_turn(row: Mapping[str, Any]) -> str:
    """Return a row's prompt, or an empty string if it has none."""
    texts = (turn_text(first_user(row[field])) for field in FIELDS if row.get(field))
    return next((text for text in texts if text), "")


def first_user(value: Any) -> Any:
    """Return the first user turn of a conversation, or None.

    Args:
        value: a text; or turns as texts, of which the user's is the first; or turns as mappings
            with a role, or without one, in which case the user's is the first.
    """
    if not isinstance(value, list):
        return value
    if not value or not isinstance(value[0], Mapping):
        return value[0] if value else None
    roles = [str(turn.get("role") or turn.get("from") or "").lower() for turn in value]
    if not any(roles):
        return value[0]
    return next((turn for turn, role in zip(value, roles, strict=True) if role in USER_ROLES), None)


def turn_text(turn: Any) -> str:
    """Return the text of a turn; empty if it has none or needs more than text, such as an image.

    Args:
        turn: a text, or a mapping whose content is a text or a list of parts.
    """
    if isinstance(turn, Mapping):
        turn = next((turn[field] for field in CONTENT_FIELDS if turn.get(field)), None)
    if isinstance(turn, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in turn]
        texts = [part for part in parts if isinstance(part, str)]
        turn = "\n".join(texts) if len(texts) == len(parts) else None
    return turn.strip() if isinstance(turn, str) else ""
