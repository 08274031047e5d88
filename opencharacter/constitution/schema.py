"""Constitutions: load, validate, and write as YAML."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator, Field, ValidationError, field_validator

from opencharacter.config.base import Config, Name
from opencharacter.config.files import explain, find, is_path, read_yaml, resource_names
from opencharacter.errors import UserError

HAND_WRITTEN = 5
"""Questions of a trait that a person writes, the first ones; a model may have written the rest."""

TEMPLATE = "template"
TO_FILL = (
    "[how]",
    "[in which words, at what length, in what rhythm]",
    "One sentence, in the third person, that says what the character is.",
)
"""What the template says where something is to be written."""

FOLDED = 80
"""Characters from which a text is written as a block of its own, wrapped."""


def encodable(text: str) -> str:
    """Return `text` if it can be written as UTF-8; raise ValueError otherwise."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half a character (a lone surrogate); write the character itself")
    return text


def not_blank(text: str) -> str:
    """Return `text` if it says something; raise ValueError otherwise."""
    if not text.strip():
        raise ValueError("is empty; write it or remove the entry")
    return text


def assertion(text: str) -> str:
    """Return `text` if it may be a trait; a question in its place is raised as a ValueError."""
    if text.rstrip().endswith("?"):
        raise ValueError("is a question; say it in the first person, or move it to the questions")
    return text


Encodable = Annotated[str, AfterValidator(encodable)]
Text = Annotated[Encodable, AfterValidator(not_blank)]


class Trait(Config):
    """One first-person assertion and the questions that let it show."""

    trait: Annotated[Text, AfterValidator(assertion)]
    """Begins with I or My."""
    clarification: Encodable | None = None
    """Removes an ambiguity; part of the system prompt."""
    questions: Annotated[tuple[Text, ...], Field(min_length=HAND_WRITTEN)]
    """User messages in which the trait can show without being asked about."""


class Exemplar(Config):
    """One exchange in character, for teachers too weak for a system prompt alone."""

    user: Text
    assistant: Text


class Constitution(Config):
    """A persona in words."""

    name: Name
    description: Text
    """One sentence, third person."""
    traits: Annotated[tuple[Trait, ...], Field(min_length=1)]
    exemplars: tuple[Exemplar, ...] = ()

    @field_validator("traits")
    @classmethod
    def _distinct(cls, traits: tuple[Trait, ...]) -> tuple[Trait, ...]:
        said = {
            "trait stated": [t.trait for t in traits],
            "question asked": [q for t in traits for q in t.questions],
        }
        for what, texts in said.items():
            counts = Counter(text.strip().lower() for text in texts)
            if twice := [text for text, n in counts.items() if n > 1]:
                raise ValueError(f"{what} twice: {twice[0]!r}; remove or change one")
        return traits

    def assertions(self) -> str:
        """The traits as numbered lines, each with its clarification: what a system prompt shows."""
        lines = (t.trait + (f" {t.clarification}" if t.clarification else "") for t in self.traits)
        return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))

    def digest(self) -> str:
        """Hash of everything the constitution says, for fingerprints."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


class Readable(yaml.SafeDumper):
    """Writes YAML as the packaged constitutions are written: lists indented, long texts folded."""

    def increase_indent(self, flow=False, indentless=False):
        return super().increase_indent(flow, False)


def _write_text(dumper: Readable, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else ">" if len(text) > FOLDED else None
    if text != text.strip() or not text.replace("\n", "").isprintable():
        style = '"'  # blocks and plain scalars lose line separators and white space at the ends
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Readable.add_representer(str, _write_text)


def dump(constitution: Constitution) -> str:
    """A constitution as YAML that a person can edit; `parse` gives back an equal one."""
    data = constitution.model_dump(mode="json", exclude_defaults=True)
    return yaml.dump(data, Dumper=Readable, sort_keys=False, allow_unicode=True, width=95)


def save(text: str, path: Path, replace: bool) -> None:
    """Write a file as UTF-8.

    Raises:
        UserError: it exists and `replace` is false, or its folder cannot be written.
    """
    try:
        with path.open("w" if replace else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path} exists; choose another with --to, or add --force") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; choose another") from None


def load(name: str) -> Constitution:
    """Load a packaged constitution by name, or a YAML file.

    Raises:
        UserError: unknown name, malformed YAML (with its line), an invalid field, or something
            of the template that is still to be filled in.
    """
    if name == TEMPLATE:
        raise UserError(f"{name!r} is a form to fill in: opencharacter constitution new NAME")
    path = find("constitution", name, "constitutions", f"{name}.yaml", "*.yaml")
    loaded = parse(path)
    check_filled(path)
    return loaded


def check_filled(path: Path) -> None:
    """Refuse a copy of the template that was not filled in."""
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1):
        if left := [part for part in TO_FILL if part in line]:
            raise UserError(
                f"constitution {path} line {number}: {left[0]!r} is still the template's; write "
                "your own"
            )


def packaged() -> list[str]:
    """Names of the packaged constitutions."""
    return [name for name in resource_names("constitutions", "*.yaml") if name != TEMPLATE]


def parse(path: Path) -> Constitution:
    """Load a constitution from a YAML file whose name is the persona's."""
    try:
        constitution = Constitution.model_validate(read_yaml("constitution", path))
    except ValidationError as error:
        raise explain("constitution", path, error) from None
    if constitution.name != path.stem:
        raise UserError(
            f"constitution {path}: name is {constitution.name!r}; make it {path.stem!r} or rename"
        )
    return constitution


def load_all(names: list[str]) -> list[Constitution]:
    """Load several; `all` means every packaged one. Repeats are refused."""
    if names == ["all"]:
        names = packaged()
    for name in names:
        if name == "all":
            raise UserError("constitution 'all' is every packaged one; name no other beside it")
        if "," in name and not is_path(name):
            raise UserError(f"constitution {name!r}: repeat -c for each, without commas")
    constitutions = [load(name) for name in names]
    twice = [n for n, count in Counter(c.name for c in constitutions).items() if count > 1]
    if twice:
        raise UserError(f"constitution {twice[0]!r} is given twice; name each persona once")
    return constitutions
