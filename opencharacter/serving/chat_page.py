"""The chat page, which compares two models side by side, and the ratings that it collects.

The page is served as one file: `chat.html` with `chat.css` and `chat.js` inlined. It loads nothing
else, so it works offline, and its Content-Security-Policy lets the browser connect to this server
only. A rating is stored as one row of Parquet in `<student>/evaluation/ratings/`.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import uuid
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field, ValidationError

from opencharacter.config.base import NAME
from opencharacter.constitution.schema import Constitution, load
from opencharacter.distillation.teacher import SYSTEM
from opencharacter.errors import UserError
from opencharacter.runtime.store import Store
from opencharacter.serving.catalogue import ServedAdapter
from opencharacter.serving.protocol import ApiError, LongText, ShortText, StrictModel
from opencharacter.text.chat import fill

RATINGS_DATASET = "evaluation/ratings"
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("time", pa.timestamp("ms", tz="UTC"), nullable=False),
        pa.field("rater", pa.string(), nullable=False),
        pa.field("persona", pa.string(), nullable=False),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("conversations", pa.list_(pa.struct(
            [
                pa.field("model", pa.string(), nullable=False),
                pa.field("system", pa.string(), nullable=False),
                pa.field(
                    "messages",
                    pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
                    nullable=False,
                ),
            ]
        )), nullable=False),
    ]
)  # fmt: skip


class RatedMessage(StrictModel):
    """A message of a rated conversation."""

    role: Literal["user", "assistant"]
    content: LongText


class RatedConversation(StrictModel):
    """One of the two conversations; `model` is the full name that the responses reported."""

    model: ShortText
    system: LongText
    messages: Annotated[list[RatedMessage], Field(min_length=2, max_length=200)]


class ConversationRating(StrictModel):
    """Which of two conversations shows a persona's character more."""

    persona: ShortText
    verdict: Literal["first", "second", "same"]
    conversations: Annotated[list[RatedConversation], Field(min_length=2, max_length=2)]


def asset(name: str) -> str:
    """Read one of the page's files."""
    return resources.files("opencharacter.serving").joinpath(name).read_text("utf-8")


@cache
def page() -> str:
    """Return the page with its style and script inlined."""
    text = asset("chat.html")
    inlined = {
        '<link rel="stylesheet" href="chat.css">': f"<style>{asset('chat.css')}</style>",
        '<script src="chat.js"></script>': f"<script>{asset('chat.js')}</script>",
    }
    for reference, element in inlined.items():
        text = text.replace(reference, element)
    return text


def content_security_policy() -> str:
    """Return a policy that allows the page's own style and script, and requests to this server."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {source_hash(asset('chat.js'))}",
            f"style-src {source_hash(asset('chat.css'))}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def source_hash(text: str) -> str:
    """Return the Content-Security-Policy source that allows an inline element by its content."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


@cache
def headers() -> dict[str, str]:
    """Return the page's HTTP headers."""
    return {
        "Content-Security-Policy": content_security_policy(),
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def describe_persona(adapter: ServedAdapter, constitution: Constitution | None) -> dict[str, Any]:
    """Describe a persona for the page.

    Args:
        adapter: the persona's adapter.
        constitution: the constitution that the server was started with; if None, the packaged
            constitution of that name is used.

    Returns:
        Its `description`, `traits`, `system` prompt, and `as_trained`: whether the adapter was
        trained with exactly this constitution.
    """
    constitution = constitution or packaged_constitution(adapter.persona)
    if constitution is None:
        return {"description": "", "traits": [], "system": "", "as_trained": False}
    return {
        "description": constitution.description,
        "traits": [trait.trait for trait in constitution.traits],
        "system": fill(SYSTEM, assertions=constitution.assertions()),
        "as_trained": constitution.digest() == adapter.manifest["payload"]["constitution"],
    }


def packaged_constitution(name: str) -> Constitution | None:
    """Return the packaged constitution of a name, or None."""
    try:
        return load(name) if NAME.fullmatch(name) else None
    except UserError:
        return None


def rating_row(payload: dict[str, Any], rater: str) -> dict[str, Any]:
    """Convert a rating to a row of the dataset.

    Args:
        payload: the request body.
        rater: identifier of the API key that the request used; empty if no key is required.

    Raises:
        ApiError: 400, naming the field that is invalid.
    """
    try:
        rating = ConversationRating.model_validate(payload)
    except ValidationError as error:
        raise ApiError.from_validation(error) from None
    now = datetime.datetime.now(datetime.UTC)
    return {"id": uuid.uuid4().hex, "time": now, "rater": rater, **rating.model_dump()}


def save_rating(store: Store, student: str, row: dict[str, Any]) -> None:
    """Write a rating to a file of its own, so that concurrent writers do not conflict."""
    table = pa.Table.from_pylist([row], schema=SCHEMA)
    store.write_table(f"{student}/{RATINGS_DATASET}", table, row["id"])
