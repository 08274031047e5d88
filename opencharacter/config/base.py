"""The base class of all configuration, and the markers that keep fingerprints stable.

A stage's fingerprint hashes the *identity* of its configuration: the fields that decide what the
stage produces. Two markers in a field's annotation change how the field takes part:

- `NotIdentity`: the field never enters the identity. Mark a field so when it only decides when to
  stop, what to expect, or which server to ask, for example
  `max_drop_rate: Annotated[Rate, NotIdentity] = 0.2`.
- `AddedLater(version)`: the field enters the identity only if its value is not its default. Mark
  every field so that is added to an existing section after a release, for example
  `ipo: Annotated[bool, AddedLater("0.3")] = False`. Choose a default that reproduces the earlier
  behavior; then datasets that were made before the field existed stay valid. Never change the
  default of such a field: that would change what an unchanged fingerprint stands for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
EMBEDDED = "embedded:"
ECHO = "echo:"
LOCAL = ("/", "./", "../", "~")
"""Beginnings of a model's name that make it a path."""


class NotIdentity:
    """Marks a field that never enters the identity."""


@dataclass(frozen=True)
class AddedLater:
    """Marks a field that enters the identity only if its value differs from its default.

    Args:
        version: the first release of this package that has the field.
        earlier: the value that reproduces the earlier behavior, if that is not the default: then
            this value, and not the default, stays out of the identity.
    """

    version: str
    earlier: Any = None


def validate_name(name: str) -> str:
    """Return `name` if it can be used in a path; raise ValueError otherwise."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is not a valid name: use a-z, 0-9, '.', '_' and '-', and begin with a "
            "letter or a digit"
        )
    return name


Name = Annotated[str, AfterValidator(validate_name)]
Rate = Annotated[float, Field(ge=0, le=1)]
RateBelowOne = Annotated[float, Field(ge=0, lt=1)]


class Config(BaseModel):
    """Base of all configuration: immutable, and unknown fields are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def identity(self) -> dict[str, Any]:
        """Return the JSON values that decide what a stage with this configuration produces."""
        dumped = self.model_dump(mode="json")
        return {
            name: _identity(getattr(self, name), dumped[name])
            for name, field in type(self).model_fields.items()
            if _in_identity(field, getattr(self, name))
        }


def _in_identity(field: FieldInfo, value: Any) -> bool:
    if NotIdentity in field.metadata:
        return False
    for marker in field.metadata:
        if isinstance(marker, AddedLater):
            default = field.get_default(call_default_factory=True)
            return value != (default if marker.earlier is None else marker.earlier)
    return True


def _identity(value: Any, dumped: Any) -> Any:
    """Apply the markers inside a field's value, which `dumped` represents as JSON."""
    if isinstance(value, Config):
        return value.identity()
    if isinstance(value, dict):
        pairs = zip(dumped.items(), value.values(), strict=True)
        return {key: _identity(inner, text) for (key, text), inner in pairs}
    if isinstance(value, list | tuple):
        return [_identity(inner, text) for inner, text in zip(value, dumped, strict=True)]
    return dumped
