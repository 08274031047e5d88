"""Constitutions: load and validate."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator, model_validator

from opencharacter.config import Config, Name, explain, find, read_yaml, resource_names
from opencharacter.errors import UserError

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]


class Trait(Config):
    """One first-person assertion and the questions that let it show."""

    trait: Text
    """Begins with I or My."""
    clarification: str | None = None
    """Removes an ambiguity; part of the system prompt."""
    questions: Annotated[tuple[Text, ...], Field(min_length=5)]
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
        counts = Counter(t.trait.strip().lower() for t in traits)
        twice = [text for text, n in counts.items() if n > 1]
        if twice:
            raise ValueError(f"trait stated twice: {twice[0]!r}")
        return traits

    @model_validator(mode="after")
    def _questions_once(self) -> Constitution:
        counts = Counter(q.strip().lower() for t in self.traits for q in t.questions)
        twice = [text for text, n in counts.items() if n > 1]
        if twice:
            raise ValueError(f"question asked twice: {twice[0]!r}")
        return self

    def assertions(self) -> str:
        """The traits as numbered lines, each with its clarification: what a system prompt shows."""
        lines = (t.trait + (f" {t.clarification}" if t.clarification else "") for t in self.traits)
        return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))

    def digest(self) -> str:
        """Hash of everything the constitution says, for fingerprints."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


def load(name: str) -> Constitution:
    """Load a packaged constitution by name, or a YAML file.

    Raises:
        UserError: unknown name, malformed YAML (with its line), or an invalid field.
    """
    path = find("constitution", name, "constitutions", f"{name}.yaml", "*.yaml")
    return parse(path)


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
    """Load several; `all` means every packaged persona but the template. Repeats are refused."""
    if names == ["all"]:
        names = [n for n in resource_names("constitutions", "*.yaml") if n != "template"]
    constitutions = [load(name) for name in names]
    twice = [n for n, count in Counter(c.name for c in constitutions).items() if count > 1]
    if twice:
        raise UserError(f"constitution {twice[0]!r} is given twice; name each persona once")
    return constitutions
