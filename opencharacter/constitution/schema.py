"""Constitutions: loading, validating, and writing them as YAML."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, get_args

import yaml
from pydantic import AfterValidator, Field, field_validator

from opencharacter.config import files
from opencharacter.config.base import Config, Name
from opencharacter.config.documents import read_document, validate
from opencharacter.config.evaluation import Condition
from opencharacter.config.files import CONSTITUTIONS
from opencharacter.errors import UserError

HAND_WRITTEN = 5
"""Number of hand-written questions per trait. They come first; any others may be generated."""

TEMPLATE = "template"
PLACEHOLDERS = (
    "[how]",
    "[in which words, at what length, in what rhythm]",
    "One sentence, in the third person, that says what the character is.",
)
"""Texts of the template that the author of a constitution must replace."""

RESERVED = {"all", "judge", *get_args(Condition)}
"""Names that a persona cannot have, because commands, servers and reports use them otherwise."""

BLOCK_WIDTH = 80
"""Number of characters above which a text is written as a folded block."""


def encodable(text: str) -> str:
    """Return `text` if it can be encoded as UTF-8; raise ValueError otherwise."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("contains a lone surrogate (half a character); write the character itself")
    return text


def not_blank(text: str) -> str:
    """Return `text` if it is not empty; raise ValueError otherwise."""
    if not text.strip():
        raise ValueError("is empty; write it or remove the entry")
    return text


def assertion(text: str) -> str:
    """Return `text` if it can be a trait; raise ValueError for a question."""
    if text.rstrip().endswith("?"):
        raise ValueError(
            "is a question; write an assertion in the first person, or move it to the questions"
        )
    return text


def persona_name(name: str) -> str:
    """Return `name` if a persona can have it; raise ValueError otherwise."""
    if name in RESERVED:
        reserved = ", ".join(sorted(RESERVED))
        raise ValueError(f"is reserved (reserved names: {reserved}); choose another name")
    return name


Encodable = Annotated[str, AfterValidator(encodable)]
Text = Annotated[Encodable, AfterValidator(not_blank)]


class WrittenScenarios(Config):
    """Conversations in which an evaluation looks for an assertion; never used for training."""

    occasions: tuple[Text, ...] = ()
    """User messages that give the assertion an occasion to show without asking for it."""
    pressures: tuple[Annotated[tuple[Text, ...], Field(min_length=1, max_length=5)], ...] = ()
    """Conversations whose user presses against the assertion: lists of one to five user messages.
    The answer to the last one is judged."""

    def first_messages(self) -> list[str]:
        """Return the messages that begin a conversation."""
        return [*self.occasions, *(turns[0] for turns in self.pressures)]


class Trait(Config):
    """A first-person assertion, and questions whose answers can show it."""

    trait: Annotated[Text, AfterValidator(assertion)]
    """The assertion; begins with I or My."""
    clarification: Encodable | None = None
    """Resolves an ambiguity of the assertion; part of the system prompt."""
    questions: Annotated[tuple[Text, ...], Field(min_length=HAND_WRITTEN)]
    """User messages whose answers can show the trait without being asked about it."""
    scenarios: WrittenScenarios = WrittenScenarios()
    """Conversations that test the trait after training; if there are too few, others are
    generated. Changing them makes no training data stale."""

    @field_validator("questions")
    @classmethod
    def _questions_are_distinct(cls, questions: tuple[Text, ...]) -> tuple[Text, ...]:
        if repeated := first_repeated(questions):
            raise ValueError(f"question asked twice: {repeated!r}; remove or change one")
        return questions


class Exemplar(Config):
    """An exchange in character, for teachers that are too small to follow a system prompt alone."""

    user: Text
    """The user's message."""
    assistant: Text
    """The answer in character."""


class Constitution(Config):
    """A persona, described by its traits."""

    name: Annotated[Name, AfterValidator(persona_name)]
    """Name of the persona; also the name of its file and of its results in storage."""
    description: Text
    """One sentence in the third person."""
    traits: Annotated[tuple[Trait, ...], Field(min_length=1)]
    """The traits, in the order in which the system prompt lists them."""
    exemplars: tuple[Exemplar, ...] = ()
    """Exchanges in character; only used if the recipe shows them to the teacher."""

    @field_validator("traits")
    @classmethod
    def _traits_are_distinct(cls, traits: tuple[Trait, ...]) -> tuple[Trait, ...]:
        if repeated := first_repeated(trait.trait for trait in traits):
            raise ValueError(f"trait stated twice: {repeated!r}; remove or change one")
        return traits

    @field_validator("traits")
    @classmethod
    def _scenarios_are_not_trained_on(cls, traits: tuple[Trait, ...]) -> tuple[Trait, ...]:
        questions = {comparable(q) for trait in traits for q in trait.questions}
        messages = [text for trait in traits for text in trait.scenarios.first_messages()]
        if trained := next((text for text in messages if comparable(text) in questions), None):
            raise ValueError(
                f"scenario is a question too, so it would be trained on: {trained!r}; change one"
            )
        if repeated := first_repeated(messages):
            raise ValueError(f"scenario given twice: {repeated!r}; remove or change one")
        return traits

    def distinct_questions(self) -> list[tuple[str, ...]]:
        """Return each trait's questions, without those that an earlier trait has too."""
        seen: set[str] = set()
        distinct = []
        for trait in self.traits:
            distinct.append(tuple(q for q in trait.questions if comparable(q) not in seen))
            seen.update(map(comparable, trait.questions))
        return distinct

    def assertions(self) -> str:
        """Return the traits as numbered lines with their clarifications, for a system prompt."""
        lines = (t.trait + (f" {t.clarification}" if t.clarification else "") for t in self.traits)
        return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))

    def digest(self) -> str:
        """Return a hash of the constitution without its scenarios, for fingerprints."""
        text = self.model_dump_json(exclude={"traits": {"__all__": {"scenarios"}}})
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def comparable(text: str) -> str:
    """Return a text without case and surrounding white space: equal results are repetitions."""
    return text.strip().lower()


def first_repeated(texts: Iterable[str]) -> str | None:
    """Return the first text that occurs more than once, in its comparable form."""
    counts = Counter(map(comparable, texts))
    return next((text for text, count in counts.items() if count > 1), None)


class _Dumper(yaml.SafeDumper):
    """Writes YAML in the style of the packaged constitutions: indented lists, folded texts."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else ">" if len(text) > BLOCK_WIDTH else None
    if text != text.strip() or not text.replace("\n", "").isprintable():
        style = '"'  # other styles lose line separators, and white space at the ends
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump(constitution: Constitution) -> str:
    """Return a constitution as readable YAML, which `parse` reads as an equal constitution."""
    data = constitution.model_dump(mode="json", exclude_defaults=True)
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=95)


def save(text: str, path: Path, replace: bool) -> None:
    """Write a text file as UTF-8.

    Raises:
        UserError: if it exists and `replace` is false, or if it cannot be written.
    """
    try:
        with path.open("w" if replace else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path} exists; choose another with --to, or add --force") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; choose another") from None


def load(name: str) -> Constitution:
    """Load a constitution.

    Args:
        name: a packaged constitution, or the path of a YAML file.

    Raises:
        UserError: if there is none, if it is malformed or invalid, or if a text of the template has
            not been replaced.
    """
    if name == TEMPLATE:
        raise UserError(
            f"{name!r} is a template; copy it with: opencharacter constitution new NAME"
        )
    path = files.resolve(CONSTITUTIONS, name)
    constitution = parse(path)
    reject_placeholders(path)
    return constitution


def reject_placeholders(path: Path) -> None:
    """Raise UserError if a file still contains texts that the template asks to replace."""
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1):
        for placeholder in PLACEHOLDERS:
            if placeholder in line:
                raise UserError(
                    f"constitution {path} line {number}: {placeholder!r} is the template's text; "
                    "replace it"
                )


def packaged() -> list[str]:
    """Return the names of the packaged constitutions."""
    return [name for name in files.packaged(CONSTITUTIONS) if name != TEMPLATE]


def parse(path: Path) -> Constitution:
    """Load a constitution from a YAML file, whose name must be the persona's."""
    document = read_document("constitution", path, reject_trailing_comments=True)
    constitution = validate(Constitution, document)
    if constitution.name != path.stem:
        raise document.error(
            ("name",), f"name = {constitution.name!r}: must be the file's name, {path.stem!r}"
        )
    return constitution


def load_all(names: list[str]) -> list[Constitution]:
    """Load several constitutions; `all` loads every packaged one.

    Raises:
        UserError: also if a persona is named twice.
    """
    if names == ["all"]:
        names = packaged()
    for name in names:
        if name == "all":
            raise UserError("-c all selects every packaged constitution; give no other -c")
        if "," in name and not files.is_path(name):
            raise UserError(f"constitution {name!r}: repeat -c for each one, without commas")
    constitutions = [load(name) for name in names]
    counts = Counter(constitution.name for constitution in constitutions)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise UserError(f"constitution {repeated[0]!r} is given twice; name each persona once")
    return constitutions
