"""Decides whose mistake it is that vLLM does not answer a request: the client's or the server's.

A request may ask for text of a schema that no text fits, such as one whose `$ref` refers to itself.
VLLM notices that only while it generates, ends this request as failed, and goes on with the others.
That is an error of the request, as much as a field that vLLM rejects at once.

Importing this module imports vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from pydantic import ValidationError
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.exceptions import EngineGenerateError

from opencharacter.serving.observability import log
from opencharacter.serving.protocol import ApiError, ErrorBody

REFUSALS = (ValueError, VLLMValidationError)
"""What vLLM raises for a request that it does not accept; its own is not a ValueError in 0.29."""
NO_TEXT_FITS = (
    "the model cannot continue its answer: no text fits the JSON schema of this request. Check it "
    "for a $ref that refers to itself and for patterns that match nothing"
)
ERROR_EVENT = 'data: {"error"'
"""How vLLM begins the event of an error within a stream."""
SOURCE_LOCATION = re.compile(r"\[[\d:]+\] /\S+: ")
"""A time and a line of source code, which the compiler of grammars puts before its messages."""


async def generate(
    engine_generate: Callable[..., Any], prompt: Any, sampling: Any, *args: Any, **kwargs: Any
) -> AsyncIterator[Any]:
    """Generate as vLLM's `AsyncLLM.generate` does, and refuse a schema that no text fits.

    Args:
        engine_generate: the engine's `generate`.
        prompt: the prompt.
        sampling: vLLM's sampling parameters.
        args: further arguments of `generate`.
        kwargs: further arguments of `generate`.

    Raises:
        VLLMValidationError: if the grammar of the request's schema cannot be compiled, or a state
            of it allows no token.
    """
    constraint = getattr(sampling, "structured_outputs", None)
    constrained = constraint is not None
    if constrained and isinstance(constraint.json, dict):
        # As text, because messages to the engine cannot hold integers of more than 64 bits.
        constraint.json = json.dumps(constraint.json)
    async with aclosing(engine_generate(prompt, sampling, *args, **kwargs)) as outputs:
        async for output in outputs:
            if constrained and any(choice.finish_reason == "error" for choice in output.outputs):
                raise VLLMValidationError(NO_TEXT_FITS)
            yield output


def to_error_body(error: Exception) -> ErrorBody:
    """Describe why a request fails: what vLLM rejects is the client's error, the rest the server's.

    Args:
        error: pydantic's error, vLLM's own, or whatever the engine raised.
    """
    if isinstance(error, ValidationError):
        return ApiError.from_validation(error).body
    cause = error.__cause__ if isinstance(error, EngineGenerateError) else error
    if isinstance(cause, REFUSALS):
        return refusal(str(cause), getattr(cause, "parameter", None))
    log.error("the engine failed on a request", exc_info=error)
    return ErrorBody(503, f"the model failed ({type(cause).__name__}); retry later")


def from_response(status: int, message: str, param: str | None) -> ErrorBody:
    """Describe an error that vLLM reports in a response or in an event of a stream."""
    if status < 500:
        return refusal(message, param)._replace(status=status)
    log.error("the engine failed on a request: %s", message)
    return ErrorBody(503, "the model failed; retry later")


def from_event(event: Any) -> ErrorBody | None:
    """Describe the error that an event of a stream reports; None for all other events."""
    if not isinstance(event, str) or not event.startswith(ERROR_EVENT):
        return None
    error = json.loads(event.removeprefix("data: "))["error"]
    return from_response(int(error["code"]), error["message"], error.get("param"))


def refusal(message: str, param: str | None) -> ErrorBody:
    """Return the client's error with a message of vLLM's, without lines of source code."""
    return ErrorBody(400, SOURCE_LOCATION.sub("", message).strip(), param=param)
