"""Loading recipes and placements: packaged or from files, derived, and with overridden fields."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from opencharacter.config.base import NAME
from opencharacter.config.documents import Document, Loc, parse_value, read_document, validate
from opencharacter.config.placement import Placement
from opencharacter.config.recipe import Recipe
from opencharacter.config.smoke import shrink
from opencharacter.errors import UserError

EXTENDS = "extends"


class Source(NamedTuple):
    """Where the packaged files of a kind are.

    Args:
        kind: for error messages.
        folder: in the installed package, or beside it in a checkout.
        file: the file of a name, within the folder.
    """

    kind: str
    folder: str
    file: str

    @property
    def pattern(self) -> str:
        """The glob pattern of all packaged files."""
        return self.file.format(name="*")


RECIPES = Source("recipe", "recipes", "{name}.yaml")
PLACEMENTS = Source("placement", "clusters", "{name}/placement.yaml")
CONSTITUTIONS = Source("constitution", "constitutions", "{name}.yaml")


def resource(folder: str, name: str) -> Path | None:
    """Return a packaged file: in the installed package, or beside it in a source checkout."""
    package = Path(str(resources.files("opencharacter")))
    for root in (package, package.parent):
        if (root / folder / name).is_file():
            return root / folder / name
    return None


def resource_names(folder: str, pattern: str) -> list[str]:
    """Return the sorted names, without suffix, of the packaged files that match `pattern`."""
    package = Path(str(resources.files("opencharacter")))
    paths = [path for root in (package, package.parent) for path in (root / folder).glob(pattern)]
    return sorted({p.stem if p.parent.name == folder else p.parent.name for p in paths})


def packaged(source: Source) -> list[str]:
    """Return the names of the packaged files of a kind."""
    return resource_names(source.folder, source.pattern)


def is_path(name: str) -> bool:
    """Return whether a name given by the user is a path and not that of a packaged file."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def resolve(source: Source, name: str, folder: Path = Path()) -> Path:
    """Return the path of a packaged file, or of a file of the user's own.

    Args:
        source: the kind of file.
        name: a packaged name, or a path.
        folder: what a relative path is relative to.

    Raises:
        UserError: if there is no such file, listing the packaged names.
    """
    if is_path(name):
        if not (folder / name).is_file():
            raise UserError(f"{source.kind} {name!r}: no such file")
        return folder / name
    path = resource(source.folder, source.file.format(name=name)) if NAME.fullmatch(name) else None
    if path is None:
        raise UserError(
            f"{source.kind} {name!r} is unknown; packaged ones: {', '.join(packaged(source))}; "
            "or give a .yaml file"
        )
    return path


def load_document(source: Source, path: Path, derived: tuple[Path, ...] = ()) -> Document:
    """Read a file and what it extends.

    A file may begin with `extends: NAME`, where NAME is a packaged name or a path relative to the
    file. Its own fields override those of the extended file: mappings are merged recursively, lists
    are replaced.

    Args:
        source: the kind of file.
        path: the file.
        derived: the files that extend this one, directly or not.

    Raises:
        UserError: if a file is malformed or missing, or if files extend each other.
    """
    document = read_document(source.kind, path)
    chain = (*derived, path)
    if path.resolve() in [other.resolve() for other in derived]:
        raise UserError(
            f"{source.kind} {path}: files extend each other: {' -> '.join(map(str, chain))}; "
            "remove one `extends`"
        )
    if EXTENDS not in document.data:
        return document
    own = {key: value for key, value in document.data.items() if key != EXTENDS}
    name = document.data[EXTENDS]
    if not isinstance(name, str):
        raise document.error((EXTENDS,), f"extends = {name!r}: expected one name or path")
    try:
        base = resolve(source, name, path.parent)
    except UserError as error:
        raise document.error((EXTENDS,), f"extends: {error}") from None
    child = Document(source.kind, document.name, own, document.places)
    return load_document(source, base, chain).updated(child)


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Parse `FIELD=VALUE` texts, where a field is a dotted path and a value is YAML.

    Raises:
        UserError: naming the text that is malformed.
    """
    parsed = {}
    for text in assignments:
        path, separator, value = text.partition("=")
        if not separator or not all(path.split(".")):
            raise UserError(
                f"--set {text!r}: expected FIELD=VALUE, for example distillation.dpo.beta=0.2"
            )
        try:
            parsed[path.strip()] = parse_value(value)
        except yaml.YAMLError:
            raise UserError(f"--set {text!r}: {value!r} is not YAML; quote it") from None
    return parsed


def overridden(document: Document, overrides: Mapping[str, Any]) -> Document:
    """Return a document with some fields replaced, each given by its dotted path."""
    for path, value in overrides.items():
        keys = path.split(".")
        data: Any = value
        for key in reversed(keys):
            data = {key: data}
        places: dict[Loc, str] = {
            tuple(keys[:length]): f"--set {path}" for length in range(1, len(keys) + 1)
        }
        document = document.updated(Document(document.kind, document.name, data, places))
    return document


def load_recipe(
    name: str, smoke: bool = False, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """Load a recipe.

    Args:
        name: a packaged recipe, or the path of a YAML file.
        smoke: shrink the recipe to about 1 % of its size.
        overrides: values of fields by their dotted path, for example
            `{"distillation.dpo.beta": 0.2}`.

    Raises:
        UserError: if there is no such recipe, or a field is invalid.
    """
    document = load_document(RECIPES, resolve(RECIPES, name))
    recipe = validate(Recipe, overridden(document, overrides or {}))
    return shrink(recipe) if smoke else recipe


def load_placement(name: str | None) -> Placement:
    """Load a placement: a packaged one (`clusters/NAME/placement.yaml`) or a YAML file.

    Args:
        name: of the placement; the defaults, which suit a laptop, if None.

    Raises:
        UserError: if there is no such placement, or a field is invalid.
    """
    if name is None:
        return Placement()
    return validate(Placement, load_document(PLACEMENTS, resolve(PLACEMENTS, name)))


def read_yaml(kind: str, path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; see `read_document`."""
    return read_document(kind, path).data
