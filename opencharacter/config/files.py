"""Loading recipes and placements from YAML, with errors that name the line."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from opencharacter.config.base import NAME
from opencharacter.config.placement import Placement
from opencharacter.config.recipe import Recipe
from opencharacter.config.smoke import shrink
from opencharacter.errors import UserError


def resource(folder: str, name: str) -> Path | None:
    """A packaged file: inside the installed package, or beside it in a source checkout."""
    package = Path(str(resources.files("opencharacter")))
    for root in (package, package.parent):
        if (root / folder / name).is_file():
            return root / folder / name
    return None


def resource_names(folder: str, pattern: str) -> list[str]:
    """Sorted names, without ending, of the packaged files that match `pattern`."""
    package = Path(str(resources.files("opencharacter")))
    found = [p for root in (package, package.parent) for p in (root / folder).glob(pattern)]
    return sorted({p.stem if p.parent.name == folder else p.parent.name for p in found})


def is_path(name: str) -> bool:
    """Whether a user names a file of their own and not a packaged one."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def find(kind: str, name: str, folder: str, file: str, pattern: str) -> Path:
    """Resolve a packaged NAME or a path; a UserError lists what there is.

    Args:
        kind: for the message.
        name: what the user gave.
        folder: where packaged ones are.
        file: the packaged file of that name, within the folder.
        pattern: matches all packaged files.
    """
    if is_path(name):
        if not Path(name).is_file():
            raise UserError(f"{kind} {name!r}: no such file")
        return Path(name)
    packaged = resource(folder, file) if NAME.fullmatch(name) else None
    if packaged is None:
        known = ", ".join(resource_names(folder, pattern))
        raise UserError(f"{kind} {name!r} is unknown; packaged ones: {known}; or give a .yaml file")
    return packaged


def read_yaml(kind: str, path: Path) -> dict[str, Any]:
    """Parse a YAML mapping; a UserError carries the line of what is malformed."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{kind} {path}{line}: not YAML: {error.problem}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{kind} {path}: not UTF-8 YAML: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{kind} {path}: expected a mapping, found {type(data).__name__}")
    return data


def explain(kind: str, where: Path, error: ValidationError) -> UserError:
    """The first validation problem in one line: the file's line, field, value, what is wrong."""
    first, more = error.errors()[0], len(error.errors()) - 1
    field = ".".join(map(str, first["loc"])) or "(top)"
    place = f"{kind} {where} line {field_line(where, first['loc'])}"
    tail = f" (and {more} more)" if more else ""
    return UserError(f"{place}: {problem(field, first)}{tail}")


def field_line(path: Path, loc: tuple[int | str, ...]) -> int:
    """The line, from 1, of a field's key or a list's item; of what holds it where it is missing."""
    node: Any = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    line = node.start_mark.line
    for key in loc:
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            inner = [pair for pair in parts if pair[0].value == str(key)]
        else:
            inner = [(part, part) for part in parts[key:][:1]] if isinstance(key, int) else []
        if not inner:
            break
        line, node = inner[-1][0].start_mark.line, inner[-1][1]
    return line + 1


def problem(field: str, details: Any) -> str:
    """One of pydantic's error details in words: `field = value: what is wrong`."""
    if details["type"] == "extra_forbidden":
        return f"unknown field {field!r}; remove or correct it"
    if details["type"] == "missing":
        return f"missing field {field!r}; add it"
    said = details["msg"].removeprefix("Value error, ")
    said = said.replace("valid tuple", "list").replace("Tuple", "List")
    said = re.sub(r"valid dictionary( or instance of \w+)?", "mapping", said)
    if isinstance(details["input"], dict | list | tuple):
        return f"{field}: {said}"
    value = repr(details["input"])
    value = value if len(value) <= 60 else value[:57] + "..."
    return f"{field} = {value}: {said}"


def load_recipe(name: str, smoke: bool = False) -> Recipe:
    """Load a packaged recipe by name, or a YAML file; `smoke` shrinks it to about 1 %."""
    path = find("recipe", name, "recipes", f"{name}.yaml", "*.yaml")
    try:
        recipe = Recipe.model_validate(read_yaml("recipe", path))
    except ValidationError as error:
        raise explain("recipe", path, error) from None
    return shrink(recipe) if smoke else recipe


def load_placement(name: str | None) -> Placement:
    """Load `clusters/<name>/placement.yaml` or a file; the laptop's defaults where None."""
    if name is None:
        return Placement()
    path = find("placement", name, "clusters", f"{name}/placement.yaml", "*/placement.yaml")
    try:
        return Placement.model_validate(read_yaml("placement", path))
    except ValidationError as error:
        raise explain("placement", path, error) from None
