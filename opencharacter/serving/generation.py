"""Passes a request on to a model replica and returns its response, streamed or complete."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from starlette.responses import JSONResponse, Response, StreamingResponse

from opencharacter.serving.metrics import ADAPTER_LOADS, FIRST_TOKEN_SECONDS, REQUESTS_WAITING
from opencharacter.serving.observability import RequestRecord, log
from opencharacter.serving.protocol import (
    ApiError,
    ErrorBody,
    ResponsePart,
    format_event,
    has_usage,
    read_usage,
    split_events,
)

MAX_ATTEMPTS = 3
"""Attempts at a request whose replicas die before they respond."""


async def call_replica(
    handle: Any, kind: str, payload: dict[str, Any], cleanup: ExitStack
) -> AsyncIterator[ResponsePart]:
    """Yield a replica's response; retry if the replica dies before the response has begun."""
    for attempts_left in reversed(range(MAX_ATTEMPTS)):
        responded = False
        stream = handle.answer.remote(kind, payload)
        cleanup.callback(stream.cancel)
        try:
            async for part in stream:
                responded = responded or not is_load_notice(part)
                yield part
            return
        except RayActorError:
            if responded or not attempts_left:
                raise
            log.warning("a replica died before it responded; retrying its request")


def is_load_notice(part: ResponsePart) -> bool:
    """Return whether a part only reports that an adapter was loaded."""
    return isinstance(part, dict) and "loaded" in part


async def generate(
    handle: Any, kind: str, payload: dict[str, Any], record: RequestRecord
) -> AsyncIterator[Any]:
    """Yield the parts of a response, with metrics recorded and load notices removed.

    Raises:
        ApiError: if the replica reports an error, all queues are full, or the replica fails.
    """
    started, model = time.monotonic(), record.fields["model"]
    waiting = record.cleanup.enter_context(ExitStack())
    REQUESTS_WAITING.inc()
    waiting.callback(REQUESTS_WAITING.dec)
    try:
        async for part in call_replica(handle, kind, payload, record.cleanup):
            if is_load_notice(part):
                ADAPTER_LOADS.labels(model).inc()
                continue
            waiting.close()
            if isinstance(part, ErrorBody):
                raise ApiError(*part)
            if "first_token" not in record.fields:
                record.fields["first_token"] = round(time.monotonic() - started, 3)
                FIRST_TOKEN_SECONDS.labels(model).observe(record.fields["first_token"])
            if isinstance(part, dict):
                record.count_tokens(part["body"].get("usage"))
            yield part
    except BackPressureError:
        raise ApiError(503, "the request queue is full; retry later") from None
    except (ApiError, asyncio.CancelledError, GeneratorExit):
        raise
    except Exception as error:  # whatever happens to a replica, the client gets a response
        log.exception("a request failed")
        raise ApiError(503, f"the model failed ({type(error).__name__}); retry later") from None


async def to_response(
    parts: AsyncIterator[Any], record: RequestRecord, include_usage: bool
) -> Response:
    """Wait for the first part of a response and turn it and the rest into an HTTP response.

    Raises:
        ApiError: as `generate` does for the first part.
    """
    first = await anext(parts)
    if isinstance(first, dict):
        return JSONResponse(first["body"])
    return StreamingResponse(
        stream_events(first, parts, record, include_usage),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store"},
    )


async def stream_events(
    first: str, rest: AsyncIterator[Any], record: RequestRecord, include_usage: bool
) -> AsyncIterator[str]:
    """Yield the server-sent events of a response.

    An error after the first part becomes an event as well, and no `[DONE]` follows.

    Args:
        first: the first part.
        rest: the other parts.
        record: receives the token usage.
        include_usage: whether the client asked for the event with the token usage.
    """
    part: Any = first
    try:
        while True:
            for event in filter(has_usage, split_events(part) if has_usage(part) else ()):
                usage, usage_only = read_usage(event)
                record.count_tokens(usage)
                if usage_only and not include_usage:
                    part = part.replace(event, "")
            if part:
                yield part
            part = await anext(rest)
    except StopAsyncIteration:
        return
    except ApiError as error:
        record.fields["status"] = error.body.status
        yield format_event(error.body.to_json())
