"""YAML documents that remember where each field stands, so that an error can name the line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from opencharacter.config.renames import renamed
from opencharacter.errors import UserError

Loc = tuple[int | str, ...]
Model = TypeVar("Model", bound=BaseModel)

COMMENT = re.compile(r"[ \t]+#")
TIMESTAMP = "tag:yaml.org,2002:timestamp"
TEXT = "tag:yaml.org,2002:str"
MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Document:
    """A mapping from a file, and the place of each of its fields.

    Args:
        kind: what the file is, for error messages: recipe, placement, constitution, ...
        name: the file's path, for errors that concern no particular field.
        data: the mapping.
        places: the place of each field by its location, for example `demo.yaml line 3`.
    """

    kind: str
    name: str
    data: dict[str, Any]
    places: dict[Loc, str] = field(default_factory=dict)

    def place(self, loc: Loc) -> str:
        """Return the place of a field; of the closest enclosing field if it is missing."""
        for length in range(len(loc), 0, -1):
            if loc[:length] in self.places:
                return self.places[loc[:length]]
        return self.places.get((), self.name)

    def error(self, loc: Loc, message: str) -> UserError:
        """Return the error that a field is wrong."""
        return UserError(f"{self.kind} {self.place(loc)}: {message}")

    def updated(self, other: Document) -> Document:
        """Return this document with the fields of another one, which take precedence.

        Mappings are merged recursively; lists and all other values are replaced.
        """
        return Document(
            self.kind, other.name, _merge(self.data, other.data), self.places | other.places
        )


def _merge(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return old | {key: _merge(old.get(key), value) for key, value in new.items()}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader; reads dates as text, and reports the line of an invalid scalar."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(
                None, None, f"invalid value {node.value!r}: {error}", node.start_mark
            ) from None


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_value(text: str) -> Any:
    """Parse one YAML value, for example from the command line; raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)  # a safe loader


def read_document(kind: str, path: Path, reject_trailing_comments: bool = False) -> Document:
    """Parse a YAML file that holds a mapping.

    Args:
        kind: what the file is, for error messages.
        path: the file.
        reject_trailing_comments: refuse a comment behind an unquoted text, because the comment may
            be meant as part of the text.

    Raises:
        UserError: naming the line, if the file cannot be read or is malformed, or if a mapping has
            a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{kind} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{kind} {path}: not UTF-8: {error}; save it as UTF-8") from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines = dict(_field_lines(node, ()))
        data = loader.construct_document(node) if node else None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{kind} {path} line {line}: not YAML: {error.reason}") from None
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{kind} {path}{line}: not YAML: {error.problem}") from None
    if not isinstance(data, dict):
        raise UserError(f"{kind} {path}: expected a mapping, got {type(data).__name__}")
    places = {loc: f"{path} line {line}" for loc, line in lines.items()}
    document = Document(kind, str(path), data, places)
    for loc, scalar in _scalars(node, ()) if reject_trailing_comments else ():
        if _has_trailing_comment(scalar, text):
            raise document.error(
                loc,
                f"{dotted(loc)}: the text ends before ' #', which begins a comment; quote the "
                "text, or move the comment to a line of its own",
            )
    return document


def _has_trailing_comment(node: yaml.ScalarNode, text: str) -> bool:
    unquoted = node.style is None and node.tag == TEXT
    return unquoted and bool(COMMENT.match(text, node.end_mark.index))


def _children(node: yaml.Node, loc: Loc) -> Iterator[tuple[Loc, yaml.Node, yaml.Node]]:
    """Yield location, key (or item) and value of what a node directly contains."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            yield (*loc, name), key, value
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*loc, index), item, item


def _field_lines(
    node: yaml.Node | None, loc: Loc, ancestors: tuple[yaml.Node, ...] = ()
) -> Iterator[tuple[Loc, int]]:
    """Yield the line of each field, from 1; raises for repeated keys and recursive aliases."""
    if node is None:
        return
    if any(node is ancestor for ancestor in ancestors):
        raise _problem(node, "an alias contains itself")
    if not loc:
        yield loc, node.start_mark.line + 1
    seen: dict[str, yaml.Node] = {}
    for inner, key, value in _children(node, loc):
        if isinstance(node, yaml.MappingNode) and isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                first = seen[key.value].start_mark.line + 1
                raise _problem(key, f"{key.value!r} is already given on line {first}; remove one")
            seen[key.value] = key
        if key.tag == MERGE:  # the merged fields are those of this mapping
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                yield from list(_field_lines(merged, loc, (*ancestors, node)))
            continue
        yield inner, key.start_mark.line + 1
        yield from _field_lines(value, inner, (*ancestors, node))


def _problem(node: yaml.Node, message: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=message, problem_mark=node.start_mark)


def _scalars(node: yaml.Node | None, loc: Loc) -> Iterator[tuple[Loc, yaml.ScalarNode]]:
    if isinstance(node, yaml.ScalarNode):
        yield loc, node
    for inner, _, value in _children(node, loc) if node else ():
        yield from _scalars(value, inner)


# ------------------------------------------------------------------------------------- validation


def validate(model: type[Model], document: Document) -> Model:
    """Validate a document.

    Raises:
        UserError: for the first problem, with the field's place, path, value and what is wrong.
    """
    reject_renamed(document)
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        first, more = error.errors()[0], len(error.errors()) - 1
        valid = fields_of(model, first["loc"][:-1])
        message = describe_problem(first, valid) + (f" (and {more} more)" if more else "")
        raise document.error(first["loc"], message) from None


def describe_problem(details: Any, valid: list[str] | None = None) -> str:
    """Describe one of pydantic's errors as `field = value: what is wrong`.

    Args:
        details: an item of `ValidationError.errors()`.
        valid: the names of the valid fields, for an unknown one.
    """
    path = dotted(details["loc"])
    if details["type"] == "extra_forbidden":
        remedy = f"valid fields are {', '.join(valid)}" if valid else "remove or correct it"
        return f"unknown field {path!r}; {remedy}"
    if details["type"] == "missing":
        return f"missing field {path!r}; add it"
    message = details["msg"].removeprefix("Value error, ")
    message = message.replace("valid tuple", "list").replace("Tuple", "List")
    message = re.sub(r"valid dictionary( or instance of \w+)?", "mapping", message)
    if isinstance(details["input"], dict | list | tuple):
        return f"{path}: {message}"
    value = repr(details["input"])
    value = value if len(value) <= 60 else value[:57] + "..."
    return f"{path} = {value}: {message}"


def dotted(loc: Loc) -> str:
    """Return a field's location as a dotted path."""
    return ".".join(map(str, loc)) or "(top)"


def fields_of(model: type[BaseModel], loc: Loc) -> list[str]:
    """Return the names of the fields of the section at `loc`; none if it is no section."""
    section: type[BaseModel] | None = model
    for key in (key for key in loc if isinstance(key, str)):
        if section is None or key not in section.model_fields:
            return []
        section = _section_in(section.model_fields[key].annotation)
    return list(section.model_fields) if section else []


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model within an annotation such as `tuple[Role, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def reject_renamed(document: Document) -> None:
    """Raise UserError if a document uses names of version 0.1, with the new names."""
    old_names = [
        (loc, message)
        for loc, value in _values(document.data, ())
        for message in renamed(document.kind, dotted(loc), value)
    ]
    if old_names:
        (first, message), *others = old_names
        also = "".join(f"; {document.place(loc)}: {other}" for loc, other in others)
        raise document.error(first, f"{message}{also}")


def _values(data: Any, loc: Loc) -> Iterator[tuple[Loc, Any]]:
    """Yield all fields and items below a value, with their locations."""
    if isinstance(data, dict):
        items = list(data.items())
    else:
        items = list(enumerate(data)) if isinstance(data, list) else []
    for key, value in items:
        yield (*loc, key), value
        yield from _values(value, (*loc, key))
