"""The two file formats of the original project, read and written.

A text file that is a JSON list, one object a trait with `trait`, five `questions` and sometimes a
`clarification`; or JSON lines, one such object a line that also has `additional_questions`. What
does no harm in such a file is repaired and noted; what could change the data is refused.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from opencharacter.config.base import check_name
from opencharacter.config.files import problem
from opencharacter.constitution.schema import HAND_WRITTEN, Constitution, Text, Trait, save
from opencharacter.errors import UserError

FORMS = {".json": False, ".txt": False, ".jsonl": True}
"""Endings of files to write, and whether their lines are objects with additional questions."""

DECODER = json.JSONDecoder()
SPACE = re.compile(r"\s*")
GAP = re.compile(r"[\s,:]*")
CURLY = re.compile("[\u2018-\u201f]")

Loc = tuple[int | str, ...]


class Entry(Trait, str_strip_whitespace=True):
    """A trait as the original project writes it."""

    additional_questions: tuple[Text, ...] = ()

    def as_trait(self) -> Trait:
        """The same in our form: hand-written questions first."""
        questions = self.questions + self.additional_questions
        return Trait(
            trait=self.trait, clarification=self.clarification or None, questions=questions
        )


class Source(NamedTuple):
    """A file's text, which problems are located in."""

    path: Path
    text: str

    def line(self, at: int, loc: Loc = ()) -> int:
        """The line, from 1, of the field `loc` of the value at `at`: its key, or a list's item."""
        line_at = at
        for key in loc:
            inner = list(parts(self.text, at)) if self.text[at] in "[{" else []
            if isinstance(key, str):
                keyed = zip(inner[::2], inner[1::2], strict=True)
                inner = [(key_at, value_at) for (k, key_at), (_, value_at) in keyed if k == key]
            else:
                inner = [(item_at, item_at) for _, item_at in inner[key : key + 1]]
            if not inner:
                break
            line_at, at = inner[-1]
        return self.text.count("\n", 0, line_at) + 1

    def refuse(self, line: int, said: str) -> UserError:
        return UserError(f"constitution {self.path} line {line}: {said}")


def parts(text: str, at: int) -> Iterator[tuple[Any, int]]:
    """What stands directly in the JSON list or object at `at`, keys and values alike, with offsets.

    The text must be valid JSON there.
    """
    at = skip(GAP, text, at + 1)
    while text[at] not in "]}":
        value, end = DECODER.raw_decode(text, at)
        yield value, at
        at = skip(GAP, text, end)


def skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at


def read(
    path: Path, name: str | None = None, description: str | None = None
) -> tuple[Constitution, list[str]]:
    """Read a file of the original project, whichever of its formats it has.

    Args:
        path: the file.
        name: of the persona; the file's name without ending where absent.
        description: of the persona; says where it comes from where absent.

    Returns:
        The constitution, and what was repaired on the way, a line each.

    Raises:
        UserError: with file, line and field of what is wrong.
    """
    name = persona_name(path, name)
    source, notes = decode(path)
    values = objects(source)
    entries = [entry(source, value, at) for value, at in values]
    if not entries:
        raise source.refuse(1, "it holds no traits; give a JSON list of objects, or one a line")
    refuse_repeats(source, values)
    constitution = Constitution(
        name=name,
        description=(description or "").strip() or f"{name}, imported from {path.name}.",
        traits=tuple(e.as_trait() for e in entries),
    )
    return constitution, notes + repairs(source, values)


def persona_name(path: Path, name: str | None) -> str:
    """The name that was asked for, or the file's."""
    try:
        return check_name(name or path.stem)
    except ValueError as error:
        raise UserError(f"constitution {path}: {error}; choose one with --name") from None


def decode(path: Path) -> tuple[Source, list[str]]:
    """A file's text with line ends as LF, and what was repaired; line by line UTF-8 or cp1252."""
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
        notes.append("line ends changed from CRLF to LF")
    lines = data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").split(b"\n")
    decoded = [decode_line(path, n, line) for n, line in enumerate(lines, 1)]
    foreign = [n for n, (_, encoding) in enumerate(decoded, 1) if encoding != "utf-8"]
    if foreign:
        notes.append(f"{on_lines(foreign)}: not UTF-8, read as Windows cp1252")
    return Source(path, "\n".join(line for line, _ in decoded)), notes


def decode_line(path: Path, number: int, line: bytes) -> tuple[str, str]:
    """A line's text and the encoding that it has."""
    for encoding in ("utf-8", "cp1252"):
        try:
            return line.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    said = "neither UTF-8 nor Windows cp1252; save the file as UTF-8"
    raise UserError(f"constitution {path} line {number}: {said}")


def on_lines(numbers: list[int]) -> str:
    distinct = sorted(set(numbers))
    return f"line{'s' if len(distinct) > 1 else ''} {', '.join(map(str, distinct))}"


def objects(source: Source) -> list[tuple[Any, int]]:
    """The file's top-level objects with their offsets: a list's items, or one after the other."""
    text = source.text.rstrip()
    at = len(text) - len(text.lstrip())
    try:
        if text[at : at + 1] == "{":
            return list(in_sequence(text, at))
        whole = DECODER.decode(text) if text else []
    except json.JSONDecodeError as error:
        raise source.refuse(*malformed(error)) from None
    if not isinstance(whole, list):
        kind = type(whole).__name__
        raise source.refuse(1, f"expected a list of objects, or one a line, found {kind}")
    return list(parts(text, at)) if whole else []


def in_sequence(text: str, at: int) -> Iterator[tuple[Any, int]]:
    while at < len(text):
        value, end = DECODER.raw_decode(text, at)
        yield value, at
        at = skip(SPACE, text, end)


def malformed(error: json.JSONDecodeError) -> tuple[int, str]:
    """The line of what is not JSON and a word on it; knows the two slips that people make."""
    before, found = error.doc[: error.pos].rstrip(), error.doc[error.pos : error.pos + 1]
    if found == "," or (before.endswith(",") and found in ("]", "}")):
        comma = error.pos if found == "," else len(before)
        line = error.doc.count("\n", 0, comma) + 1
        return line, "not JSON: a trailing comma, or one too many; remove it"
    hint = "; curly quotes cannot enclose a text, use straight ones" if CURLY.match(found) else ""
    return error.lineno, f"not JSON: {error.msg}{hint}"


def entry(source: Source, value: Any, at: int) -> Entry:
    """Check one object."""
    if not isinstance(value, dict):
        said = f"expected an object with trait and questions, found {type(value).__name__}"
        raise source.refuse(source.line(at), said)
    keys = [key for key, _ in list(parts(source.text, at))[::2]]
    for key in value:
        if keys.count(key) > 1:
            raise source.refuse(source.line(at, (key,)), f"{key} is given twice; remove one")
    try:
        return Entry.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        line, field = source.line(at, first["loc"]), ".".join(map(str, first["loc"]))
        raise source.refuse(line, problem(field, first)) from None


def texts(source: Source, values: list[tuple[Any, int]]) -> list[tuple[Loc, str, int]]:
    """All texts of checked objects as they stand in the file: field, text, line."""
    found = []
    for value, at in values:
        for key, content in value.items():
            if isinstance(content, list):
                placed: list[tuple[Loc, str]] = [((key, i), t) for i, t in enumerate(content)]
            else:
                placed = [((key,), content or "")]
            found += [(loc, text, source.line(at, loc)) for loc, text in placed]
    return found


def refuse_repeats(source: Source, values: list[tuple[Any, int]]) -> None:
    """Refuse a trait or a question that was there before, naming both lines."""
    seen: dict[tuple[bool, str], int] = {}
    for loc, text, line in texts(source, values):
        key = (loc[0] == "trait", text.strip().lower())
        if loc[0] != "clarification" and key in seen:
            what = "trait stated" if key[0] else "question asked"
            said = f"{what} twice, first on line {seen[key]}: {text.strip()!r}; change one"
            raise source.refuse(line, f"{'.'.join(map(str, loc))}: {said}")
        if loc[0] != "clarification":
            seen[key] = line


def repairs(source: Source, values: list[tuple[Any, int]]) -> list[str]:
    """What reading changed in the texts, and what it kept although it may look odd."""
    found = texts(source, values)
    spaced = [line for _, text, line in found if text != text.strip()]
    empty = [line for loc, text, line in found if loc == ("clarification",) and not text.strip()]
    extra = [line for loc, _, line in found if loc == ("questions", HAND_WRITTEN)]
    curly = sum(len(CURLY.findall(text)) for _, text, _ in found)
    notes = [
        (spaced, f"{on_lines(spaced)}: white space around a text removed"),
        (empty, f"{on_lines(empty)}: empty clarification dropped"),
        (extra, f"{on_lines(extra)}: questions from here on count as additional ones"),
        (curly, f"{curly} curly quotes kept as they are"),
    ]
    return [note for lines, note in notes if lines]


def exported(constitution: Constitution, lines: bool) -> list[dict[str, Any]]:
    """The traits as the original project's objects.

    Args:
        constitution: its name, description and exemplars have no place there.
        lines: whether questions after the hand-written ones go to `additional_questions`.

    Raises:
        UserError: without `lines`, if there are such questions.
    """
    written = []
    for i, trait in enumerate(constitution.traits):
        first, more = trait.questions[:HAND_WRITTEN], trait.questions[HAND_WRITTEN:]
        if more and not lines:
            raise UserError(
                f"constitution {constitution.name}: traits.{i} has {len(trait.questions)} "
                f"questions and the list form takes {HAND_WRITTEN}; export it to a .jsonl file"
            )
        item: dict[str, Any] = {"trait": trait.trait}
        if trait.clarification and trait.clarification.strip():
            item["clarification"] = trait.clarification
        item["questions"] = list(first)
        written.append(item | ({"additional_questions": list(more)} if lines else {}))
    return written


def write(constitution: Constitution, path: Path, replace: bool = False) -> None:
    """Write a file of the original project: JSON lines for .jsonl, a list for .json and .txt.

    Raises:
        UserError: another ending, too many questions for the form, or a file that is there.
    """
    if path.suffix not in FORMS:
        known = ", ".join(FORMS)
        raise UserError(f"{path}: ending {path.suffix!r} is unknown; give one of {known}")
    lines = FORMS[path.suffix]
    written = exported(constitution, lines)
    if lines:
        text = "\n".join(json.dumps(item, ensure_ascii=False) for item in written)
    else:
        text = json.dumps(written, ensure_ascii=False, indent=2)
    save(f"{text}\n", path, replace)
