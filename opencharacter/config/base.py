"""The base class of all configuration, and the names that it validates."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
EMBEDDED = "embedded:"
ECHO = "echo:"
NOT_IDENTITY = {
    "max_drop_rate",
    "limits",
    "typical_tokens",
    "api_key_env",
    "endpoint",
    "endpoint_concurrency",
    "wanted",
    "min_agreement",
}
"""Fields that say when to stop, what to expect or whom to ask, not what is made: left out of
fingerprints."""


def check_name(name: str) -> str:
    """Return `name` if it may become a path; raise ValueError otherwise."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} may only hold a-z, 0-9, '.', '_', '-' and start with a letter")
    return name


Name = Annotated[str, AfterValidator(check_name)]
Rate = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Immutable, and strict about what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def identity(self) -> dict[str, Any]:
        """What of this configuration enters a fingerprint: JSON values, limits left out."""
        return _without_limits(self.model_dump(mode="json"))


def _without_limits(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_limits(v) for k, v in value.items() if k not in NOT_IDENTITY}
    return [_without_limits(v) for v in value] if isinstance(value, list) else value
