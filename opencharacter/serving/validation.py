"""Parses and validates request bodies, so that a replica only ever sees supported requests."""

from __future__ import annotations

import json
from typing import Any

from opencharacter.config.placement import Serving
from opencharacter.config.recipe import Sampling
from opencharacter.serving.protocol import ApiError

IGNORED_FIELDS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
}
"""Fields that clients send and that do not affect the response."""
NO_TOOLS = {"tools": [], "tool_choice": "none"}
"""Values with which a client says that it uses no tools; they are ignored as well."""

COMMON_FIELDS = {
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
    "chat": COMMON_FIELDS
    | {
        "messages",
        "max_completion_tokens",
        "logprobs",
        "top_logprobs",
        "continue_final_message",
        "add_generation_prompt",
    },
    "completions": COMMON_FIELDS | {"prompt", "echo", "logprobs"},
}
"""Supported fields by kind of request."""
ROLES = ("system", "developer", "user", "assistant")


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Parse a request body.

    Raises:
        ApiError: 400 if the body is not a JSON object in UTF-8.
    """
    try:
        payload = json.loads(body.decode("utf-8"), parse_constant=_reject_constant)
        json.dumps(payload, ensure_ascii=False).encode()  # raises on lone surrogates
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the body contains a lone surrogate (half a character)") from None
    except json.JSONDecodeError as error:
        raise ApiError(
            400, f"the body is not JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(payload, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(payload).__name__}")
    return payload


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def validate_request(
    kind: str, payload: dict[str, Any], serving: Serving, sampling: Sampling
) -> dict[str, Any]:
    """Validate a request and return what the engine receives.

    The result has supported fields only, messages as plain text, a token limit within the server's,
    and default sampling parameters where the request leaves them unset.

    Args:
        kind: `chat` or `completions`.
        payload: the request body.
        serving: the server's limits.
        sampling: the default sampling parameters.

    Raises:
        ApiError: 400, naming the field, its value and the limit.
    """
    payload = _drop_ignored(payload)
    unknown = sorted(payload.keys() - FIELDS[kind])
    if unknown:
        supported = ", ".join(sorted(FIELDS[kind]))
        raise ApiError(
            400,
            f"unsupported field {unknown[0]!r}; supported fields: {supported}",
            param=unknown[0],
        )
    if kind == "chat":
        payload["messages"] = normalize_messages(payload.get("messages"))
    else:
        _check_prompt(payload.get("prompt"))
    if not isinstance(payload.get("stream_options", {}), dict):
        raise ApiError(400, "stream_options must be an object", param="stream_options")
    _check_logprobs(payload)
    _check_response_format(payload.get("response_format"))
    _set_max_tokens(payload, serving.max_tokens)
    defaults = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
    }
    return defaults | payload


def _drop_ignored(payload: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in payload.items()
        if value is not None
        and name not in IGNORED_FIELDS
        and not (name in NO_TOOLS and value == NO_TOOLS[name])
    }


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, str):
        raise ApiError(400, "prompt must be a string", param="prompt")
    if not prompt:
        raise ApiError(400, "prompt must not be empty", param="prompt")


def _check_logprobs(payload: dict[str, Any]) -> None:
    if payload.get("top_logprobs") and not payload.get("logprobs"):
        raise ApiError(400, "top_logprobs requires logprobs = true", param="top_logprobs")


def _check_response_format(response_format: Any) -> None:
    if response_format is None:
        return
    if not isinstance(response_format, dict):
        raise ApiError(400, "response_format must be an object", param="response_format")
    if response_format.get("type") != "json_schema":
        return
    json_schema = response_format.get("json_schema")
    if not isinstance(json_schema, dict) or not isinstance(json_schema.get("schema"), dict):
        raise ApiError(
            400,
            "response_format of type json_schema requires json_schema.schema, an object",
            param="response_format",
        )


def _set_max_tokens(payload: dict[str, Any], limit: int) -> None:
    """Replace both names of the token limit by `max_tokens`, per choice.

    A request for one choice that sets no limit gets as much as the context and the engine's
    default allow.
    """
    requested = payload.pop("max_completion_tokens", payload.pop("max_tokens", None))
    choices = require_positive_int(payload.get("n", 1), "n")
    if requested is None and choices == 1:
        return
    limit_per_choice = limit // choices
    if requested is None:
        max_tokens = limit_per_choice
    else:
        max_tokens = require_positive_int(requested, "max_tokens")
    if not 1 <= max_tokens <= limit_per_choice:
        raise ApiError(
            400,
            f"max_tokens = {requested} with n = {choices}: this server generates at most "
            f"{limit} tokens per request",
            param="max_tokens",
        )
    payload["max_tokens"] = max_tokens


def require_positive_int(value: Any, name: str) -> int:
    """Return a field's value if it is a positive integer.

    Raises:
        ApiError: 400, naming the field, if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ApiError(400, f"{name} = {value!r} must be a positive integer", param=name)
    return value


def normalize_messages(messages: Any) -> list[dict[str, str]]:
    """Return the conversation with every content as one string.

    Raises:
        ApiError: 400, naming the message that is invalid.
    """
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message", param="messages")
    return [_normalize_message(message, f"messages.{i}") for i, message in enumerate(messages)]


def _normalize_message(message: Any, path: str) -> dict[str, str]:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise ApiError(400, f"{path}.role must be one of {', '.join(ROLES)}", param=path)
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [p.get("text") for p in parts if isinstance(p, dict) and p.get("type") == "text"]
    strings = [text for text in texts if isinstance(text, str)]
    if len(strings) < len(parts):
        raise ApiError(400, f"{path}.content must be text", param=path)
    return {"role": "system" if role == "developer" else role, "content": "".join(strings)}
