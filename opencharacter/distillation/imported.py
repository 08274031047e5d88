"""Answers and preference pairs that exist already, in place of generated ones.

A source is a .jsonl or .parquet file, a folder of such files, `hf:DATASET` (the training split of a
dataset on the Hugging Face Hub) or `hf:DATASET:FILE` (one of its files). `{persona}` in it stands
for the persona's name. A row has a prompt and an answer:

    prompt                          a text, or a conversation of one user turn. Without it, the user
                                    turn of the answer's conversation.
    answer, response, completion    the answer, as a text or a conversation.
    chosen, rejected                the two answers of a preference pair, likewise.
    messages, conversations         a user turn and the assistant's reply.
    sample                          optional number of the answer among those of its prompt.
    finish_reason                   optional, why generation ended, as in OpenAI's API.
    persona, constitution           optional, rows of other personas are left out.

These are the layouts of the original project (`prompt` and `response`; `chosen` and `rejected`), of
TRL's conversational datasets, and of `opencharacter export --what pairs`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opencharacter.config.recipe import Distillation
from opencharacter.distillation.sources import (
    HUB,
    LONE_SURROGATE,
    USER_ROLES,
    Numbered,
    load_hub_rows,
    read_json_lines,
    read_parquet,
    turn_text,
)
from opencharacter.errors import UserError
from opencharacter.text.chat import THINK_CLOSE, row_id, strip_think

Row = dict[str, Any]

ANSWER_FIELDS = (
    "answer",
    "response",
    "completion",
    "chosen",
    "messages",
    "conversations",
    "conversation",
)
"""Fields that may contain the answer, in order of preference."""
PERSONA_FIELDS = ("persona", "constitution")
SUFFIXES = (".jsonl", ".parquet")
WHAT = "answers"
PLACEHOLDER = "{persona}"
PREFERENCE_FINISH = "stop"
"""Finish reason of preference pairs, whose answers somebody has selected already."""


@dataclass(frozen=True)
class Imported:
    """The rows of a source for one persona.

    Args:
        rows: `prompt`, `sample`, `answer`, `rejected` and `finish_reason`, sorted by prompt and
            sample. `answer` and `rejected` are None where the source has none.
        digest: hash of the rows, independent of their order and of the file's format.
        repeated: number of rows that repeat an earlier one and are left out.
    """

    rows: tuple[Row, ...]
    digest: str
    repeated: int

    @property
    def prompts(self) -> list[str]:
        """The distinct prompts, in order."""
        return list(dict.fromkeys(row["prompt"] for row in self.rows))


def source_of(config: Distillation) -> str | None:
    """Return the source of the chosen answers; None if the teacher generates them."""
    return config.pairs.source or config.teacher.source


def is_counted(source: str) -> bool:
    """Whether a plan knows the rows of a source; those of the Hub are not downloaded for it."""
    return not source.startswith(HUB)


def source_digest(source: str, persona: str) -> str:
    """Return what identifies a source in fingerprints: its content, or its name on the Hub."""
    if source.startswith(HUB):
        return row_id(locate(source, persona), persona)
    return read(source, persona).digest


def read(source: str, persona: str) -> Imported:
    """Read a source.

    Args:
        source: see the module's docstring.
        persona: name of the persona.

    Raises:
        UserError: if the source cannot be read, or a row has no prompt; with its line.
    """
    located = locate(source, persona)
    if not located.startswith(HUB):
        path = find_file(Path(located).expanduser(), persona)
        status = path.stat()
        return read_file(path, persona, (status.st_mtime_ns, status.st_size))
    name, _, file = located.removeprefix(HUB).partition(":")
    if file:
        path = download(name, file)
        return read_file(path, persona, (0, path.stat().st_size))
    return collect(located, "row", enumerate(load_hub_rows(name, WHAT), 1), persona)


def locate(source: str, persona: str) -> str:
    """Return a source with the persona's name in place of the placeholder."""
    return source.replace(PLACEHOLDER, persona)


def find_file(path: Path, persona: str) -> Path:
    """Return a file, or the file of a persona in a folder: that with its name, or the only one."""
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        named = [f for f in files if f.stem == persona]
        if len(named or files) == 1:
            return (named or files)[0]
        names = ", ".join(str(f.relative_to(path)) for f in files[:10]) or "none"
        raise UserError(
            f"answers {path}: expected one file {persona}.jsonl or {persona}.parquet, or one file "
            f"in all; the folder has: {names}. Name the file"
        )
    if not path.is_file() or path.suffix not in SUFFIXES:
        raise UserError(
            f"answers {str(path)!r}: file not found; use a .jsonl or .parquet file, a folder of "
            "them, hf:DATASET or hf:DATASET:FILE"
        )
    return path


def download(name: str, file: str) -> Path:
    """Download a file of a dataset on the Hugging Face Hub, or find it in the local cache."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, repo_type="dataset"))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"answers 'hf:{name}:{file}' could not be loaded ({reason}); check the names and "
            "HF_TOKEN, or use a file"
        ) from None


@functools.lru_cache(maxsize=64)
def read_file(path: Path, persona: str, version: tuple[int, int]) -> Imported:
    """Read a file.

    Args:
        path: the file.
        persona: name of the persona.
        version: time and size of the file, so that a changed file is read again.
    """
    if path.suffix == ".parquet":
        return collect(str(path), "row", enumerate(read_parquet(path, WHAT), 1), persona)
    return collect(str(path), "line", read_json_lines(path, path.read_bytes(), WHAT), persona)


def collect(name: str, unit: str, rows: Iterable[Numbered], persona: str) -> Imported:
    """Parse all rows of a persona, leave out repeated ones, and number the answers of each prompt.

    Args:
        name: name of the source, for errors.
        unit: what the rows' numbers count, `line` or `row`.
        rows: the rows with their numbers.
        persona: name of the persona.
    """
    parsed: dict[str, Row] = {}
    others, repeated, answered = 0, 0, 0
    for number, value in rows:
        try:
            row = parse_row(value, persona)
        except ValueError as error:
            raise UserError(f"answers {name} {unit} {number}: {error}") from None
        if row is None:
            others += 1
            continue
        key = row_id(row["prompt"], row["answer"], row["rejected"], row["sample"])
        repeated += key in parsed
        parsed[key] = row
        answered += row["answer"] is not None
    if not answered:
        reason = f"all {others:,} rows belong to other personas than {persona!r}" if others else ""
        raise UserError(f"answers {name}: {reason or 'no row has an answer'}; use another source")
    try:
        numbered = number_samples(parsed)
    except ValueError as error:
        raise UserError(f"answers {name}: {error}") from None
    return Imported(tuple(numbered), content_digest(numbered), repeated)


def parse_row(value: Any, persona: str) -> Row | None:
    """Return a row as `prompt`, `answer`, `rejected`, `sample`, `finish_reason`.

    Returns:
        The row, or None if it belongs to another persona.

    Raises:
        ValueError: if the row has no prompt or is otherwise unusable.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"expected an object with a prompt and an answer, got {value!r:.40}")
    owner = next((value[field] for field in PERSONA_FIELDS if value.get(field)), persona)
    if owner != persona:
        return None
    field = next((field for field in ANSWER_FIELDS if value.get(field)), None)
    if field is None and not any(field in value for field in ANSWER_FIELDS):
        fields = ", ".join(map(repr, list(value)[:10])) or "none"
        expected = ", ".join(map(repr, ANSWER_FIELDS))
        raise ValueError(f"no answer (fields: {fields}); it needs one of {expected}")
    answer = value.get(field or "")
    prompt = only_user_turn(value.get("prompt") or (answer if isinstance(answer, list) else None))
    if not prompt:
        raise ValueError("no prompt; it needs a text 'prompt' or a conversation with a user turn")
    sample = value.get("sample")
    if sample is not None and (not isinstance(sample, int) or sample < 0):
        raise ValueError(f"sample is {sample!r}; it must be an integer from 0 on, or be left out")
    row = {
        "prompt": prompt,
        "answer": reply_text(answer),
        "rejected": reply_text(value.get("rejected")),
        "sample": sample,
        "finish_reason": value.get("finish_reason")
        or (PREFERENCE_FINISH if field == "chosen" else None),
    }
    if LONE_SURROGATE.search("".join((prompt, row["answer"] or "", row["rejected"] or ""))):
        raise ValueError("the text contains a lone surrogate, which is no character; remove it")
    return row


def turn_role(turn: Any) -> str:
    """Return the role of a conversation's turn, in lower case; empty if it has none."""
    return str(turn.get("role") or turn.get("from") or "").lower() if is_turn(turn) else ""


def is_turn(value: Any) -> bool:
    return isinstance(value, Mapping)


def only_user_turn(value: Any) -> str:
    """Return the prompt of a text or conversation; empty if it has none.

    Raises:
        ValueError: for a conversation with a system prompt or several user turns.
    """
    if not isinstance(value, list):
        return turn_text(value)
    users = [turn for turn in value if turn_role(turn) in USER_ROLES]
    if len(users) > 1 or any(turn_role(turn) == "system" for turn in value):
        raise ValueError(
            "the conversation has a system prompt or several user turns; the pairs of this method "
            "have one user turn"
        )
    return turn_text(users[0]) if users else ""


def reply_text(value: Any) -> str | None:
    """Return the answer of a text or conversation, without a think block; None if it has none."""
    if isinstance(value, list):
        value = value[-1] if value and turn_role(value[-1]) not in USER_ROLES else None
    text = turn_text(value)
    if THINK_CLOSE in text:
        text = strip_think(text) or ""
    return text or None


def number_samples(parsed: Mapping[str, Row]) -> list[Row]:
    """Number the answers of each prompt, those without a number in an order given by their content.

    Args:
        parsed: rows by a hash of their content.

    Raises:
        ValueError: if two answers of a prompt have the same number.
    """
    taken = [(r["prompt"], r["sample"]) for r in parsed.values() if r["sample"] is not None]
    used = set(taken)
    if len(used) < len(taken):
        prompt, sample = next(key for key in taken if taken.count(key) > 1)
        raise ValueError(
            f"sample {sample} of the prompt {prompt!r:.60} has two answers; number them or leave "
            "out the field 'sample'"
        )
    rows = []
    for _, row in sorted(parsed.items()):
        sample = row["sample"]
        if sample is None:
            sample = 0
            while (row["prompt"], sample) in used:
                sample += 1
            used.add((row["prompt"], sample))
        rows.append({**row, "sample": sample})
    return sorted(rows, key=lambda row: (row["prompt"], row["sample"]))


def content_digest(rows: Iterable[Row]) -> str:
    """Return the hash of prompts and answers, independent of the order of the rows.

    Args:
        rows: rows with `prompt`, `sample`, and `answer` or `chosen`, and optionally `rejected`.
    """
    keys = sorted(
        row_id(row["prompt"], row["sample"], row.get("chosen", row.get("answer")))
        + row_id(row.get("rejected"))
        for row in rows
    )
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]


def prompt_row(persona: str, text: str, general: Mapping[str, str]) -> Row:
    """Return a row of distillation/prompts for a prompt of a source.

    Args:
        persona: name of the persona.
        text: the prompt.
        general: ids of the recipe's general prompts by text; the student's answers to them are
            shared by all personas.
    """
    if text in general:
        return {"id": general[text], "kind": "general", "trait": None, "prompt": text}
    id = row_id("constitution", persona, text)
    return {"id": id, "kind": "constitution", "trait": None, "prompt": text}
