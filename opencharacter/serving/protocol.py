"""What a request may say, what passes to a replica and back, and errors as OpenAI has them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from opencharacter.config.placement import Serving
from opencharacter.config.recipe import Sampling

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ErrorBody(NamedTuple):
    """Why a request gets no answer."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None

    def body(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients understand."""
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, usual),
                "param": self.param,
                "code": self.code,
            }
        }


class ApiError(Exception):
    """Raised by whatever finds the fault; the entrance answers with the refusal."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ):
        super().__init__(status, message, code, param)
        self.refusal = ErrorBody(status, message, code, param)


ResponsePart = str | dict[str, Any] | ErrorBody
"""Server-sent events as one text; `{"body": ...}`, the whole answer; `{"loaded": id}`, before an
answer for which an adapter was loaded; or a refusal."""

T = TypeVar("T")


async def paced(items: AsyncIterator[T], interval: Callable[[], float]) -> AsyncIterator[list[T]]:
    """The first item at once, then all that came within each interval.

    Args:
        items: of a stream; what it raises is raised when what came before has left.
        interval: seconds to the next list at most; it may change on the way.
    """
    found: list[T] = []
    more = asyncio.Event()

    async def read() -> None:
        async for item in items:
            found.append(item)
            more.set()

    reader = asyncio.create_task(read())
    reader.add_done_callback(lambda _: more.set())
    try:
        while True:
            if not found and not reader.done():
                more.clear()
                await more.wait()
            if not found:
                reader.result()  # raises what the stream raised
                return
            ready = found.copy()
            found.clear()
            yield ready
            await asyncio.wait([reader], timeout=interval())
    finally:
        reader.cancel()


IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""Fields that clients send and that change no answer."""

COMMON = {
    "model",
    "stream",
    "stream_options",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stop",
    "stop_token_ids",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "response_format",
    "add_special_tokens",
}
FIELDS = {
    "chat": COMMON
    | {
        "messages",
        "max_completion_tokens",
        "logprobs",
        "top_logprobs",
        "continue_final_message",
        "add_generation_prompt",
    },
    "completions": COMMON | {"prompt", "echo", "logprobs"},
}
ROLES = ("system", "developer", "user", "assistant")


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object that a body holds.

    Raises:
        Refused: 400, saying what is wrong.
    """
    try:
        payload = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        json.dumps(payload, ensure_ascii=False).encode()  # refuses half characters
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the body holds half a character (a lone surrogate)") from None
    except json.JSONDecodeError as error:
        raise ApiError(
            400, f"the body is not JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON that can be read: {error}") from None
    if not isinstance(payload, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(payload).__name__}")
    return payload


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def checked(
    kind: str, payload: dict[str, Any], serving: Serving, sampling: Sampling
) -> dict[str, Any]:
    """A request as the engine gets it: known fields only, text only, within the limits.

    Args:
        kind: `chat` or `completions`.
        payload: what the client sent.
        serving: the limits.
        sampling: what holds where the client does not say.

    Raises:
        Refused: 400, naming the field, its value and the limit.
    """
    payload = {k: v for k, v in payload.items() if k not in IGNORED and v is not None}
    unknown = sorted(payload.keys() - FIELDS[kind])
    if unknown:
        known = ", ".join(sorted(FIELDS[kind]))
        raise ApiError(400, f"unknown field {unknown[0]!r}; known ones: {known}", param=unknown[0])
    if kind == "chat":
        payload["messages"] = messages(payload.get("messages"))
    elif not isinstance(payload.get("prompt"), str):
        raise ApiError(400, "prompt must be a text", param="prompt")
    if not isinstance(payload.get("stream_options", {}), dict):
        raise ApiError(400, "stream_options must be an object", param="stream_options")
    asked = payload.pop("max_completion_tokens", payload.pop("max_tokens", None))
    answers = whole(payload.get("n", 1), "n")
    if asked is not None or answers > 1:  # else as much as context and server allow
        most = serving.max_tokens // answers
        payload["max_tokens"] = most if asked is None else whole(asked, "max_tokens")
        if not 1 <= payload["max_tokens"] <= most:
            raise ApiError(
                400,
                f"max_tokens = {asked} for n = {answers}: this server gives "
                f"{serving.max_tokens} tokens in all",
                param="max_tokens",
            )
    defaults = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
    }
    return defaults | payload


def whole(value: Any, name: str) -> int:
    """A positive whole number, or a refusal that names the field."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ApiError(400, f"{name} = {value!r}: a whole number from 1 is wanted", param=name)
    return value


def messages(found: Any) -> list[dict[str, str]]:
    """The conversation with each content as one text.

    Raises:
        Refused: 400, naming the message that is wrong.
    """
    if not isinstance(found, list) or not found:
        raise ApiError(400, "messages must be a list with at least one message", param="messages")
    return [_message(message, f"messages.{i}") for i, message in enumerate(found)]


def _message(found: Any, at: str) -> dict[str, str]:
    role = found.get("role") if isinstance(found, dict) else None
    if role not in ROLES:
        raise ApiError(400, f"{at}.role must be one of {', '.join(ROLES)}", param=at)
    content = found.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    said = [p.get("text") for p in parts if isinstance(p, dict) and p.get("type") == "text"]
    texts = [text for text in said if isinstance(text, str)]
    if len(texts) < len(parts):
        raise ApiError(400, f"{at}.content must be text", param=at)
    return {"role": "system" if role == "developer" else role, "content": "".join(texts)}


APP = "opencharacter"


@dataclass(frozen=True)
class Served:
    """A name that is no adapter.

    Args:
        deployment: name of the model that answers.
        sampling: what holds where a request does not say.
    """

    deployment: str
    sampling: Sampling


def event(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


def events(text: str) -> list[str]:
    """The single events of a text."""
    return [f"{one}\n\n" for one in text.split("\n\n") if one]


def is_usage(text: str) -> bool:
    """Whether an event has no piece of the answer but its tokens, or a text holds such a one."""
    return '"choices":[]' in text
