"""The two file formats of the original project: reading and writing.

One format is a text file with a JSON list. Each item is a trait: an object with `trait`, five
`questions` and sometimes a `clarification`. The other is JSON lines with one such object per line,
which also has `additional_questions`. Harmless irregularities of a file are repaired and reported;
anything that could change the data is an error.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from opencharacter.config.base import validate_name
from opencharacter.config.documents import Loc, describe_problem, dotted, fields_of
from opencharacter.constitution.schema import (
    HAND_WRITTEN,
    Constitution,
    Text,
    Trait,
    comparable,
    persona_name,
    save,
)
from opencharacter.errors import UserError

SUFFIXES = {".json": False, ".txt": False, ".jsonl": True}
"""Suffixes of files to write, and whether the format is JSON lines."""

QUESTION_FIELDS = ("questions", "additional_questions")
DECODER = json.JSONDecoder()
WHITE_SPACE = re.compile(r"\s*")
SEPARATORS = re.compile(r"[\s,:]*")


class Entry(Trait, str_strip_whitespace=True):
    """A trait in the formats of the original project."""

    additional_questions: tuple[Text, ...] = ()


class Source(NamedTuple):
    """A file and its text, in which errors are located."""

    path: Path
    text: str

    def line(self, offset: int, loc: Loc = ()) -> int:
        """Return the line, from 1, of a field (its key) or an item of a list.

        Args:
            offset: where the value begins that contains the field.
            loc: the location of the field within the value; the value itself if empty.
        """
        field_offset = offset
        for key in loc:
            children = []
            if self.text[offset] in "[{":
                children = list(json_children(self.text, offset))
            if isinstance(key, str):
                pairs = zip(children[::2], children[1::2], strict=True)
                matches = [(at, value_at) for (name, at), (_, value_at) in pairs if name == key]
            else:
                matches = [(at, at) for _, at in children[key : key + 1]]
            if not matches:
                break
            field_offset, offset = matches[-1]
        return self.text.count("\n", 0, field_offset) + 1

    def error(self, line: int, message: str) -> UserError:
        """Return an error that names the file and a line."""
        return UserError(f"constitution {self.path} line {line}: {message}")


class LocatedText(NamedTuple):
    """A text of a file.

    Args:
        entry: index of its trait.
        loc: its location within the trait.
        text: the text as written.
        line: its line, from 1.
    """

    entry: int
    loc: Loc
    text: str
    line: int


def json_children(text: str, offset: int) -> Iterator[tuple[Any, int]]:
    """Yield what the JSON list or object at `offset` directly contains, with offsets.

    Keys and values of an object are yielded alternately. The JSON must be valid.
    """
    offset = skip(SEPARATORS, text, offset + 1)
    while text[offset] not in "]}":
        value, end = DECODER.raw_decode(text, offset)
        yield value, offset
        offset = skip(SEPARATORS, text, end)


def skip(pattern: re.Pattern[str], text: str, offset: int) -> int:
    """Return the offset behind a match of `pattern` at `offset`."""
    match = pattern.match(text, offset)
    return match.end() if match else offset


# ---------------------------------------------------------------------------------------- reading


def read(
    path: Path, name: str | None = None, description: str | None = None
) -> tuple[Constitution, list[str]]:
    """Read a file of the original project in either of its formats.

    Args:
        path: the file.
        name: the persona's name; the file's name without suffix if None.
        description: the persona's description; if None, it says where the persona comes from.

    Returns:
        The constitution, and a line for each repair.

    Raises:
        UserError: with the file, the line and the field that is wrong.
    """
    name = import_name(path, name)
    source, notes = decode(path)
    values = json_objects(source)
    entries = [parse_entry(source, value, offset) for value, offset in values]
    if not entries:
        raise source.error(1, "contains no traits; expected a JSON list of objects, or one a line")
    texts = list(located_texts(source, values))
    repeated, repetitions = repeated_questions(source, texts)
    constitution = Constitution(
        name=name,
        description=(description or "").strip() or f"{name}, imported from {path.name}.",
        traits=tuple(as_trait(entry, repeated[i]) for i, entry in enumerate(entries)),
    )
    return constitution, notes + repairs(texts) + repetitions


def import_name(path: Path, name: str | None) -> str:
    """Return the given name, or the file's; a UserError if it is not a persona's name."""
    try:
        return persona_name(validate_name(name or path.stem))
    except ValueError as error:
        raise UserError(f"constitution {path}: {error}; choose one with --name") from None


def decode(path: Path) -> tuple[Source, list[str]]:
    """Return a file's text with LF line endings, and the repairs of its encoding.

    Lines that are not UTF-8 are read as Windows cp1252, in which the original files were edited.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"constitution {path} cannot be read: {error.strerror}") from None
    if b"\0" in data:
        raise UserError(f"constitution {path}: not UTF-8 (UTF-16?); save it as UTF-8")
    notes = []
    if data.startswith(codecs.BOM_UTF8):
        notes.append("line 1: byte order mark removed")
    if b"\r\n" in data:
        notes.append("CRLF line endings changed to LF")
    lines = data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").split(b"\n")
    decoded = [decode_line(path, number, line) for number, line in enumerate(lines, 1)]
    legacy = [number for number, (_, encoding) in enumerate(decoded, 1) if encoding != "utf-8"]
    if legacy:
        notes.append(f"{on_lines(legacy)}: not UTF-8, read as Windows cp1252")
    return Source(path, "\n".join(line for line, _ in decoded)), notes


def decode_line(path: Path, number: int, line: bytes) -> tuple[str, str]:
    """Return a line's text and its encoding."""
    for encoding in ("utf-8", "cp1252"):
        try:
            return line.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    raise UserError(
        f"constitution {path} line {number}: neither UTF-8 nor Windows cp1252; save the file as "
        "UTF-8"
    )


def on_lines(numbers: list[int]) -> str:
    """Return `line 3` or `lines 3, 5`."""
    distinct = sorted(set(numbers))
    return f"line{'s' if len(distinct) > 1 else ''} {', '.join(map(str, distinct))}"


def json_objects(source: Source) -> list[tuple[Any, int]]:
    """Return the file's objects with their offsets: the items of a list, or one per line."""
    text = source.text.rstrip()
    offset = len(text) - len(text.lstrip())
    try:
        if text[offset : offset + 1] == "{":
            return list(json_sequence(text, offset))
        whole = DECODER.decode(text) if text else []
    except json.JSONDecodeError as error:
        raise source.error(*explain_malformed(error)) from None
    if not isinstance(whole, list):
        kind = type(whole).__name__
        raise source.error(1, f"expected a list of objects, or one a line, got {kind}")
    return list(json_children(text, offset)) if whole else []


def json_sequence(text: str, offset: int) -> Iterator[tuple[Any, int]]:
    """Yield consecutive JSON values with their offsets."""
    while offset < len(text):
        value, end = DECODER.raw_decode(text, offset)
        yield value, offset
        offset = skip(WHITE_SPACE, text, end)


def explain_malformed(error: json.JSONDecodeError) -> tuple[int, str]:
    """Return the line and the message of a JSON error; recognizes a trailing comma."""
    before, character = error.doc[: error.pos].rstrip(), error.doc[error.pos : error.pos + 1]
    if character == "," or (before.endswith(",") and character in ("]", "}")):
        comma = error.pos if character == "," else len(before)
        line = error.doc.count("\n", 0, comma) + 1
        return line, "not JSON: a trailing comma, or one too many; remove it"
    return error.lineno, f"not JSON: {error.msg}"


def parse_entry(source: Source, value: Any, offset: int) -> Entry:
    """Validate an object of the file."""
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise source.error(
            source.line(offset), f"expected an object with trait and questions, got {kind}"
        )
    keys = [key for key, _ in list(json_children(source.text, offset))[::2]]
    for key in value:
        if keys.count(key) > 1:
            raise source.error(source.line(offset, (key,)), f"{key} is given twice; remove one")
    try:
        return Entry.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        message = describe_problem(first, fields_of(Entry, first["loc"][:-1]))
        raise source.error(source.line(offset, first["loc"]), message) from None


def as_trait(entry: Entry, repeated: set[str]) -> Trait:
    """Return an entry as a trait: its hand-written questions first, without repeated ones."""
    questions = entry.questions + entry.additional_questions
    return Trait(
        trait=entry.trait,
        clarification=entry.clarification or None,
        questions=tuple(text for text in questions if comparable(text) not in repeated),
    )


def located_texts(source: Source, values: list[tuple[Any, int]]) -> Iterator[LocatedText]:
    """Yield all texts of validated objects."""
    for i, (value, offset) in enumerate(values):
        for key, content in value.items():
            if isinstance(content, list):
                located: list[tuple[Loc, str]] = [
                    ((key, k), text) for k, text in enumerate(content)
                ]
            else:
                located = [((key,), content or "")]
            for loc, text in located:
                yield LocatedText(i, loc, text, source.line(offset, loc))


def repeated_questions(
    source: Source, texts: list[LocatedText]
) -> tuple[list[set[str]], list[str]]:
    """Find questions that an earlier trait has too; only the first occurrence is imported.

    Returns:
        For each trait the questions to leave out (in comparable form), and a note for each.

    Raises:
        UserError: if a trait is repeated, if a trait has a question twice, or if too few of its
            questions remain.
    """
    reject_repetitions(source, texts)
    questions = [located for located in texts if located.loc[0] in QUESTION_FIELDS]
    first: dict[str, LocatedText] = {}
    repeated: list[set[str]] = [set() for _ in range(texts[-1].entry + 1)]
    notes = []
    for located in questions:
        original = first.setdefault(comparable(located.text), located)
        if original is located:
            continue
        repeated[located.entry].add(comparable(located.text))
        note = (
            f"{dotted(located.loc)} left out; an earlier trait has the same question on line "
            f"{original.line}: {located.text.strip()!r}"
        )
        notes.append(f"line {located.line}: {note}")
        count = sum(question.entry == located.entry for question in questions)
        if count - len(repeated[located.entry]) < HAND_WRITTEN:
            raise source.error(
                located.line, f"{note}; fewer than {HAND_WRITTEN} questions remain, change one"
            )
    return repeated, notes


def reject_repetitions(source: Source, texts: list[LocatedText]) -> None:
    """Raise UserError if a trait is repeated, or a question within a trait."""
    seen: dict[tuple[int | None, str], LocatedText] = {}
    for located in texts:
        if located.loc[0] == "clarification":
            continue
        is_trait = located.loc[0] == "trait"
        scope = None if is_trait else located.entry
        first = seen.setdefault((scope, comparable(located.text)), located)
        if first is not located:
            raise source.error(
                located.line,
                f"{dotted(located.loc)}: {'trait stated' if is_trait else 'question asked'} "
                f"twice, first on line {first.line}: {located.text.strip()!r}; change one",
            )


def repairs(texts: list[LocatedText]) -> list[str]:
    """Return what reading changed in the texts."""
    spaced = [t.line for t in texts if t.text != t.text.strip()]
    empty = [t.line for t in texts if t.loc == ("clarification",) and not t.text.strip()]
    additional = [t.line for t in texts if t.loc == ("questions", HAND_WRITTEN)]
    notes = [
        (spaced, "white space around a text removed"),
        (empty, "empty clarification dropped"),
        (additional, "questions from here on count as additional ones"),
    ]
    return [f"{on_lines(lines)}: {note}" for lines, note in notes if lines]


# ---------------------------------------------------------------------------------------- writing


def as_objects(constitution: Constitution, json_lines: bool) -> list[dict[str, Any]]:
    """Return the traits as objects of the original project.

    Args:
        constitution: the constitution; its name, description, exemplars and scenarios are
            lost.
        json_lines: whether questions after the hand-written ones become `additional_questions`.

    Raises:
        UserError: if there are such questions and the format is not JSON lines.
    """
    objects = []
    for i, trait in enumerate(constitution.traits):
        first, more = trait.questions[:HAND_WRITTEN], trait.questions[HAND_WRITTEN:]
        if more and not json_lines:
            raise UserError(
                f"constitution {constitution.name}: traits.{i} has {len(trait.questions)} "
                f"questions, but the list format takes {HAND_WRITTEN}; export to a .jsonl file"
            )
        item: dict[str, Any] = {"trait": trait.trait}
        if trait.clarification and trait.clarification.strip():
            item["clarification"] = trait.clarification
        item["questions"] = list(first)
        objects.append(item | ({"additional_questions": list(more)} if json_lines else {}))
    return objects


def write(constitution: Constitution, path: Path, replace: bool = False) -> None:
    """Write a file of the original project: JSON lines for .jsonl, a list for .json and .txt.

    Raises:
        UserError: for another suffix, too many questions for the format, or an existing file.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown suffix {path.suffix!r}; use one of {', '.join(SUFFIXES)}")
    json_lines = SUFFIXES[path.suffix]
    objects = as_objects(constitution, json_lines)
    if json_lines:
        text = "\n".join(json.dumps(item, ensure_ascii=False) for item in objects)
    else:
        text = json.dumps(objects, ensure_ascii=False, indent=2)
    save(f"{text}\n", path, replace)
