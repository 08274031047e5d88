"""The chat page: two models side by side, and what people think of them.

The page is one file, `chat.html`, without anything from elsewhere: it works offline, and its
content policy lets the browser ask nobody but this server. All text goes in as text, never as
markup. A rating is one row of Parquet in `<student>/evaluation/ratings/`.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import re
import uuid
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opencharacter.config.base import NAME
from opencharacter.constitution.schema import Constitution, load
from opencharacter.distillation.teacher import SYSTEM
from opencharacter.errors import UserError
from opencharacter.runtime.store import Store
from opencharacter.serving.catalogue import ServedAdapter
from opencharacter.serving.protocol import ApiError
from opencharacter.text.chat import fill

RATINGS = "evaluation/ratings"
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

Short = Annotated[str, Field(max_length=200)]
Long = Annotated[str, Field(max_length=100_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Said(_Strict):
    """A message as the page shows it."""

    role: Literal["user", "assistant"]
    content: Long


class Side(_Strict):
    """One of the two conversations, its model by the identity that its answers named."""

    model: Short
    system: Long
    messages: Annotated[list[Said], Field(min_length=2, max_length=200)]


class AnswerRating(_Strict):
    """Which of two conversations is more in the character of a persona."""

    persona: Short
    verdict: Literal["first", "second", "same"]
    conversations: Annotated[list[Side], Field(min_length=2, max_length=2)]


@cache
def page() -> str:
    """The page as text."""
    return resources.files("opencharacter.persona").joinpath("chat.html").read_text("utf-8")


def policy(text: str) -> str:
    """The content policy: the page's own script and style by their hash, and this server."""

    def allowed(tag: str) -> str:
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        return f"{tag}-src 'sha256-{digest}'"

    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
    return (
        f"default-src 'none'; {allowed('script')}; {allowed('style')}; {rest}; "
        "frame-ancestors 'none'"
    )


def headers() -> dict[str, str]:
    """What goes with the page."""
    return {
        "Content-Security-Policy": policy(page()),
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def persona(adapter: ServedAdapter, given: Constitution | None) -> dict[str, Any]:
    """What the page says of a persona.

    Args:
        adapter: what was trained.
        given: its constitution where the server was told; a packaged one of the name otherwise.
    """
    constitution = given or packaged(adapter.persona)
    if constitution is None:
        return {"description": "", "traits": [], "system": "", "as_trained": False}
    return {
        "description": constitution.description,
        "traits": [trait.trait for trait in constitution.traits],
        "system": fill(SYSTEM, assertions=constitution.assertions()),
        "as_trained": constitution.digest() == adapter.manifest["payload"]["constitution"],
    }


def packaged(name: str) -> Constitution | None:
    """The packaged constitution of a name, if there is one."""
    try:
        return load(name) if NAME.fullmatch(name) else None
    except UserError:
        return None


def rating(payload: dict[str, Any], rater: str) -> dict[str, Any]:
    """A rating as a row.

    Args:
        payload: what the page sent.
        rater: a name for the key that came with it, empty where there are none.

    Raises:
        Refused: 400, naming the field that is wrong.
    """
    try:
        found = AnswerRating.model_validate(payload)
    except ValidationError as error:
        first = error.errors()[0]
        raise ApiError(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    now = datetime.datetime.now(datetime.UTC)
    return {"id": uuid.uuid4().hex, "time": now, "rater": rater, **found.model_dump()}


def keep(store: Store, student: str, row: dict[str, Any]) -> None:
    """Write a rating beside the student's evaluation, a file each: no writer waits for another."""
    table = pa.Table.from_pylist([row], schema=SCHEMA)
    store.write_table(f"{student}/{RATINGS}", table, row["id"])
