"""The part of OpenAI's Responses API that concerns text and functions.

Responses are not stored, and there are no images and no built-in tools.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from opencharacter.config.placement import Serving
from opencharacter.serving.messages import (
    ROLES,
    check_message_count,
    join_text,
    require_tools,
    tool_call,
    tool_result,
)
from opencharacter.serving.protocol import ApiError
from opencharacter.serving.structured import check_response_format

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Reasoning(BaseModel):
    """How much a model thinks before it answers."""

    model_config = ConfigDict(extra="forbid", strict=True)
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


def normalize(payload: dict[str, Any], serving: Serving, tools: bool) -> None:
    """Check the input and the text format of a request, and reduce them to what the engine reads.

    Args:
        payload: the request; changed in place.
        serving: the server's limits.
        tools: whether the model can call tools.

    Raises:
        ApiError: 400, naming the item that is invalid.
    """
    payload["input"] = normalize_input(payload.get("input"), serving, tools)
    payload["store"] = False
    payload.pop("include", None)  # agents ask for encrypted thoughts, which do not exist here
    if "text" in payload:
        payload["text"] = _text_config(payload["text"], serving)


def normalize_input(items: Any, serving: Serving, tools: bool) -> list[dict[str, Any]]:
    """Return the input as a list of messages, calls and results of tools.

    Raises:
        ApiError: 400, naming the item that is invalid.
    """
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if not isinstance(items, list) or not items:
        raise ApiError(400, "input must be text or a list with at least one item", param="input")
    check_message_count(items, serving, "input")
    return [_normalize_item(item, f"input.{i}", tools) for i, item in enumerate(items)]


def _normalize_item(item: Any, path: str, tools: bool) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ApiError(400, f"{path} must be an object", param="input")
    kind = item.get("type", "message")
    if kind == "function_call":
        require_tools(tools, path)
        call = tool_call(item.get("call_id"), item.get("name"), item.get("arguments"), path)
        return {"type": kind, "call_id": call["id"], **call["function"]}
    if kind == "function_call_output":
        require_tools(tools, path)
        result = tool_result(item.get("call_id"), item.get("output"), path)
        return {"type": kind, "call_id": result["tool_call_id"], "output": result["content"]}
    if kind != "message":
        raise ApiError(
            400,
            f"{path}.type = {kind!r:.50} must be message, function_call or function_call_output",
            param="input",
        )
    role = item.get("role")
    if role not in ROLES:
        raise ApiError(400, f"{path}.role must be one of {', '.join(ROLES)}", param="input")
    content = join_text(item.get("content"), path)
    return {"role": "system" if role == "developer" else role, "content": content}


def _text_config(text: Any, serving: Serving) -> dict[str, Any]:
    """Return the format of the text, whose schema the Responses API does not wrap."""
    extra = sorted(text.keys() - {"format"}) if isinstance(text, dict) else ["text"]
    if extra:
        raise ApiError(400, f"text supports format only, not {extra[0]!r:.50}", param="text")
    form = text.get("format") or {"type": "text"}
    wrapped = form | {"json_schema": form} if isinstance(form, dict) else form
    check_response_format(wrapped, serving, "text.format")
    if form["type"] == "json_schema" and not isinstance(form.get("name", ""), str):
        raise ApiError(400, "text.format.name must be text", param="text")
    return {"format": {"name": "format", **form} if form["type"] == "json_schema" else form}
