"""What the ingress and a model replica exchange, and how the ingress reports errors to clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opencharacter.config.recipe import Sampling

APP = "opencharacter"
"""Name of the Serve application, and `owned_by` of every model."""

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""OpenAI's error type by HTTP status, where it differs from the default."""


class ErrorBody(NamedTuple):
    """An error response: HTTP status, message, and OpenAI's optional code and parameter name."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the error in OpenAI's format."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": ERROR_TYPES.get(self.status, default),
                "param": self.param,
                "code": self.code,
            }
        }


class ApiError(Exception):
    """An error that the ingress reports to the client."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ):
        super().__init__(status, message, code, param)
        self.body = ErrorBody(status, message, code, param)

    @classmethod
    def from_validation(cls, error: ValidationError) -> ApiError:
        """Return the error of a body that pydantic rejects, naming the first invalid field."""
        first = error.errors()[0]
        return cls(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


ShortText = Annotated[str, Field(max_length=200)]
LongText = Annotated[str, Field(max_length=100_000)]


class StrictModel(BaseModel):
    """The body of a request of the chat page: no other fields, no conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True)


ResponsePart = str | dict[str, Any] | ErrorBody
"""What a replica yields: server-sent events as one string; `{"body": ...}` for a complete response;
`{"loaded": model}` before a response for which an adapter was loaded; or an error."""


@dataclass(frozen=True)
class BaseModelEntry:
    """A served model name that does not stand for an adapter: the student, or the judge.

    Args:
        deployment: name of the deployment that generates.
        sampling: sampling parameters for requests that leave them unset.
        tools: whether the model can call tools.
    """

    deployment: str
    sampling: Sampling
    tools: bool = False


def format_event(data: dict[str, Any]) -> str:
    """Format a server-sent event."""
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


def split_events(text: str) -> list[str]:
    """Split a string into its server-sent events."""
    return [f"{event}\n\n" for event in text.split("\n\n") if event]


FINAL_RESPONSE_EVENTS = ("event: response.completed\n", "event: response.incomplete\n")


def has_usage(text: str) -> bool:
    """Return whether a server-sent event, or any event in a string, reports token usage."""
    return '"choices":[]' in text or any(event in text for event in FINAL_RESPONSE_EVENTS)


def read_usage(event: str) -> tuple[dict[str, Any] | None, bool]:
    """Read the token usage from a server-sent event.

    Returns:
        The usage, and whether the event reports nothing else.
    """
    data = json.loads(event.partition("data: ")[2])
    if event.startswith(FINAL_RESPONSE_EVENTS):
        return data["response"].get("usage"), False
    return data.get("usage"), True


Item = TypeVar("Item")


async def coalesce(
    items: AsyncIterator[Item], interval: Callable[[], float]
) -> AsyncIterator[list[Item]]:
    """Yield the first item at once, then a batch of what arrived in each interval.

    Args:
        items: a stream. An exception that it raises is raised after the items before it.
        interval: returns the seconds until the next batch; called anew for each batch.
    """
    buffer: list[Item] = []
    arrived = asyncio.Event()

    async def fill_buffer() -> None:
        async for item in items:
            buffer.append(item)
            arrived.set()

    reader = asyncio.create_task(fill_buffer())
    reader.add_done_callback(lambda _: arrived.set())
    try:
        while True:
            if not buffer and not reader.done():
                arrived.clear()
                await arrived.wait()
            if not buffer:
                reader.result()  # raises the stream's exception, if any
                return
            batch = buffer.copy()
            buffer.clear()
            yield batch
            await asyncio.wait([reader], timeout=interval())
    finally:
        reader.cancel()
