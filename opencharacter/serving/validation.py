"""Parses and validates request bodies, so that a replica only ever sees supported requests."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opencharacter.config.placement import Serving
from opencharacter.config.recipe import Sampling
from opencharacter.serving import responses
from opencharacter.serving.messages import check_tools, normalize_messages
from opencharacter.serving.protocol import ApiError, ErrorBody
from opencharacter.serving.structured import check_response_format

IGNORED_FIELDS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
}
"""Fields that clients send and that do not affect the response."""
MAX_TOKEN_ID = 2**31 - 1

Penalty = Annotated[float, Field(ge=-2, le=2)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIdText = Annotated[str, Field(pattern=r"^\d{1,7}$")]
LogProbs = Annotated[int, Field(ge=0, le=20)]
Structured = Any
"""A field that is checked by a function of its own."""


class StreamOptions(BaseModel):
    """What a streamed response contains."""

    model_config = ConfigDict(extra="allow", strict=True)
    include_usage: bool = False


class TemplateOptions(BaseModel):
    """Variables of the chat template that a client may set."""

    model_config = ConfigDict(extra="forbid", strict=True)
    enable_thinking: bool = False
    date_string: Annotated[str, Field(pattern=r"^[\w ,./:-]{1,40}$")] = ""


class CommonFields(BaseModel):
    """Fields of all requests, with the values that are accepted."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] = 1
    top_p: Annotated[float, Field(gt=0, le=1)] = 1
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] = 0
    presence_penalty: Penalty = 0
    frequency_penalty: Penalty = 0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] = 0
    stop: Annotated[list[Stop], Field(max_length=16)] = []
    logit_bias: Annotated[
        dict[TokenIdText, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=300)
    ] = {}
    ignore_eos: bool = False
    skip_special_tokens: bool = True


class GenerationFields(CommonFields):
    """Further fields of chat and text completions."""

    stream_options: StreamOptions = StreamOptions()
    max_tokens: Structured = None
    n: Structured = None
    min_p: Annotated[float, Field(ge=0, le=1)] = 0
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)] = 0
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] = []
    response_format: Structured = None
    add_special_tokens: bool = True


class TemplateFields(BaseModel):
    """Fields that become variables of the chat template."""

    chat_template_kwargs: TemplateOptions = TemplateOptions()


class ToolFields(BaseModel):
    """Fields about tools."""

    tools: Structured = None
    tool_choice: Structured = None
    parallel_tool_calls: bool = True


class ChatFields(GenerationFields, TemplateFields, ToolFields):
    """Fields of chat completions."""

    messages: Structured = None
    max_completion_tokens: Structured = None
    logprobs: bool = False
    top_logprobs: LogProbs = 0
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    reasoning_effort: responses.Effort = "none"


class CompletionFields(GenerationFields):
    """Fields of text completions."""

    prompt: Structured = None
    echo: bool = False
    logprobs: LogProbs = 0


class ResponsesFields(CommonFields, TemplateFields, ToolFields):
    """Fields of the Responses API."""

    input: Structured = None
    instructions: str = ""
    max_output_tokens: Structured = None
    text: Structured = None
    reasoning: responses.Reasoning = responses.Reasoning()
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    include: list[Literal["reasoning.encrypted_content"]] = []


FIELDS: dict[str, type[CommonFields]] = {
    "chat": ChatFields,
    "completions": CompletionFields,
    "responses": ResponsesFields,
}
"""Supported fields by kind of request."""


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
    kind: str, payload: dict[str, Any], serving: Serving, sampling: Sampling, tools: bool = False
) -> dict[str, Any]:
    """Validate a request and return what the engine receives.

    The result has supported fields only, messages as plain text, a token limit within the server's,
    and default sampling parameters where the request leaves them unset.

    Args:
        kind: `chat`, `completions` or `responses`.
        payload: the request body.
        serving: the server's limits.
        sampling: the default sampling parameters.
        tools: whether the model can call tools.

    Raises:
        ApiError: 400, naming the field, its value and the limit.
    """
    payload = {k: v for k, v in payload.items() if v is not None and k not in IGNORED_FIELDS}
    if isinstance(payload.get("stop"), str):
        payload["stop"] = [payload["stop"]]
    check_fields(kind, payload)
    if kind == "responses":
        check_tools(payload, serving, tools, flat=True)
        responses.normalize(payload, serving, tools)
        set_max_tokens(payload, serving, "max_output_tokens")
        payload.setdefault("max_output_tokens", serving.max_tokens)
    else:
        if kind == "chat":
            payload["messages"] = normalize_messages(payload.get("messages"), serving, tools)
            check_tools(payload, serving, tools, flat=False)
            _check_logprobs(payload)
        else:
            _check_prompt(payload.get("prompt"))
        if "response_format" in payload:
            check_response_format(payload["response_format"], serving, "response_format")
        set_max_tokens(payload, serving, "max_tokens")
    defaults = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
    }
    return defaults | payload


def check_fields(kind: str, payload: dict[str, Any]) -> None:
    """Check the names of a request's fields, and the types and ranges of simple values.

    Raises:
        ApiError: 400, naming the field.
    """
    try:
        FIELDS[kind].model_validate(payload)
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
        field = str(error["loc"][0])
        path = ".".join(map(str, error["loc"]))
        if field not in FIELDS[kind].model_fields:
            supported = ", ".join(sorted(FIELDS[kind].model_fields))
            problem = f"unsupported field {field[:100]!r}; supported fields: {supported}"
        elif field == "chat_template_kwargs" and error["type"] == "extra_forbidden":
            supported = ", ".join(TemplateOptions.model_fields)
            problem = f"unsupported field {path[:100]}; supported variables: {supported}"
        else:
            problem = f"{path[:100]} = {error['input']!r:.100}: {error['msg']}"
        raise ApiError(400, problem, param=field[:100]) from None


def template_error(payload: dict[str, Any], template: str, model: str) -> ErrorBody | None:
    """Return an error if a request sets variables that the model's chat template does not read.

    `reasoning_effort: none` is accepted for every model: one without thoughts obeys it anyway.

    Args:
        payload: a validated request.
        template: source of the chat template.
        model: name of the model, for the message.
    """
    options = payload.get("chat_template_kwargs", {})
    effort = payload.get("reasoning_effort", payload.get("reasoning", {}).get("effort"))
    requested = {
        "chat_template_kwargs.enable_thinking": options.get("enable_thinking"),
        "reasoning_effort" if "reasoning_effort" in payload else "reasoning.effort": (
            effort if effort != "none" else None
        ),
    }
    for field, value in requested.items():
        known = ("enable_thinking", "reasoning_effort")[: 2 if "effort" in field else 1]
        if value and not any(name in template for name in known):
            return ErrorBody(
                400,
                f"{field} = {value}: the chat template of {model} has no such setting; leave it "
                "out",
                param=field.partition(".")[0],
            )
    return None


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, str):
        raise ApiError(400, "prompt must be a string", param="prompt")
    if not prompt:
        raise ApiError(400, "prompt must not be empty", param="prompt")


def _check_logprobs(payload: dict[str, Any]) -> None:
    if payload.get("top_logprobs") and not payload.get("logprobs"):
        raise ApiError(400, "top_logprobs requires logprobs = true", param="top_logprobs")


def set_max_tokens(payload: dict[str, Any], serving: Serving, name: str) -> None:
    """Check the number of choices, and replace all names of the token limit by one, per choice.

    A request for one choice that sets no limit gets as much as the context and the engine's
    default allow.

    Args:
        payload: the request; changed in place.
        serving: the server's limits.
        name: the name of the limit that the engine reads.

    Raises:
        ApiError: 400, naming the limit.
    """
    requested = payload.pop("max_completion_tokens", payload.pop(name, None))
    choices = require_positive_int(payload.get("n", 1), "n")
    if choices > serving.max_choices:
        raise ApiError(
            400,
            f"n = {choices}: this server generates at most {serving.max_choices} choices per "
            "request",
            param="n",
        )
    if requested is None and choices == 1:
        return
    limit_per_choice = serving.max_tokens // choices
    max_tokens = limit_per_choice if requested is None else require_positive_int(requested, name)
    if not 1 <= max_tokens <= limit_per_choice:
        raise ApiError(
            400,
            f"{name} = {requested} with n = {choices}: this server generates at most "
            f"{serving.max_tokens} tokens per request",
            param=name,
        )
    payload[name] = max_tokens


def require_positive_int(value: Any, name: str) -> int:
    """Return a field's value if it is a positive integer.

    Raises:
        ApiError: 400, naming the field, if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ApiError(400, f"{name} = {value!r:.100} must be a positive integer", param=name)
    return value
