"""Validates conversations and tools, which reach a model as its chat template expects them."""

from __future__ import annotations

import json
import re
from typing import Any

from opencharacter.config.placement import Serving
from opencharacter.serving.protocol import ApiError
from opencharacter.serving.structured import check_schema

ROLES = ("system", "developer", "user", "assistant")
TOOL_ROLE = "tool"
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that hold text, in OpenAI's two APIs."""
FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
MAX_TOOLS = 128
TOOL_CHOICES = ("none", "auto", "required")
NO_TOOL_PARSER = (
    "this model is served without tools; name its tool parser of vLLM in the recipe, for example "
    "roles.student.tool_parser: hermes"
)


# ------------------------------------------------------------------------------------- messages


def normalize_messages(messages: Any, serving: Serving, tools: bool) -> list[dict[str, Any]]:
    """Return a conversation with each content as one string, and without fields of no effect.

    Args:
        messages: the field of the request.
        serving: the server's limits.
        tools: whether the model can call tools.

    Raises:
        ApiError: 400, naming the message that is invalid.
    """
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message", param="messages")
    check_message_count(messages, serving, "messages")
    return [
        _normalize_message(message, f"messages.{i}", tools) for i, message in enumerate(messages)
    ]


def check_message_count(messages: list[Any], serving: Serving, param: str) -> None:
    """Raise an `ApiError` with status 400 if a conversation has too many messages."""
    if len(messages) > serving.max_messages:
        raise ApiError(
            400,
            f"{param} has {len(messages):,} entries; this server allows {serving.max_messages:,}",
            param=param,
        )


def _normalize_message(message: Any, path: str, tools: bool) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    if role == TOOL_ROLE:
        require_tools(tools, path)
        return tool_result(message.get("tool_call_id"), message.get("content"), path)
    if role not in ROLES:
        raise ApiError(400, f"{path}.role must be one of {', '.join(ROLES)}", param=path)
    calls = message.get("tool_calls") if role == "assistant" else None
    if calls:
        require_tools(tools, path)
        content = join_text(message.get("content") or "", path)
        return {"role": role, "content": content or None, "tool_calls": _tool_calls(calls, path)}
    content = join_text(message.get("content"), path)
    return {"role": "system" if role == "developer" else role, "content": content}


def join_text(content: Any, path: str) -> str:
    """Return a message's content, a string or a list of text parts, as one string.

    Raises:
        ApiError: 400 if it is anything else.
    """
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [p.get("text") for p in parts if isinstance(p, dict) and p.get("type") in TEXT_PARTS]
    strings = [text for text in texts if isinstance(text, str)]
    if len(strings) < len(parts):
        raise ApiError(400, f"{path}.content must be text", param=path)
    return "".join(strings)


def tool_result(call_id: Any, content: Any, path: str) -> dict[str, Any]:
    """Return the message with a tool's result.

    Raises:
        ApiError: 400 if the id of the call is missing, or the result is not text.
    """
    if not isinstance(call_id, str) or not call_id:
        raise ApiError(400, f"{path}: the id of the tool call must be a string", param=path)
    return {"role": TOOL_ROLE, "tool_call_id": call_id, "content": join_text(content, path)}


def _tool_calls(calls: Any, path: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise ApiError(400, f"{path}.tool_calls must be a list", param=path)
    normalized = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise ApiError(400, f"{path}.tool_calls must be function calls", param=path)
        normalized.append(
            tool_call(call.get("id"), function.get("name"), function.get("arguments"), path)
        )
    return normalized


def tool_call(call_id: Any, name: Any, arguments: Any, path: str) -> dict[str, Any]:
    """Return a call that the model has made earlier, in the format of a message.

    Raises:
        ApiError: 400 if a part is missing, or the arguments are not the JSON text of an object.
    """
    if not isinstance(call_id, str) or not isinstance(name, str) or not call_id or not name:
        raise ApiError(400, f"{path}: a tool call needs an id and the function's name", param=path)
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else None
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ApiError(
            400, f"{path}: the arguments of a tool call must be a JSON object as text", param=path
        )
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


# ---------------------------------------------------------------------------------------- tools


def require_tools(available: bool, param: str) -> None:
    """Raise an `ApiError` with status 400 if the model cannot call tools."""
    if not available:
        raise ApiError(400, f"{param}: {NO_TOOL_PARSER}", param=param)


def check_tools(payload: dict[str, Any], serving: Serving, available: bool, flat: bool) -> None:
    """Check the tools of a request, and remove the fields by which a client says that it has none.

    Args:
        payload: the request; changed in place.
        serving: the server's limits.
        available: whether the model can call tools.
        flat: whether tools have the Responses API's form, without the object `function`.

    Raises:
        ApiError: 400, naming the field.
    """
    tools, choice = payload.get("tools"), payload.get("tool_choice")
    if tools in (None, []):
        payload.pop("tools", None)
        payload.pop("parallel_tool_calls", None)
        if choice == "none" or (flat and choice == "auto"):
            payload.pop("tool_choice", None)
        elif choice is not None:
            raise ApiError(400, "tool_choice requires tools", param="tool_choice")
        return
    require_tools(available, "tools")
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        raise ApiError(400, f"tools must be a list of at most {MAX_TOOLS} functions", param="tools")
    names = [_check_tool(tool, f"tools.{i}", serving, flat) for i, tool in enumerate(tools)]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools must have different names", param="tools")
    if choice is not None and choice not in TOOL_CHOICES:
        _check_named_choice(choice, names, flat)


def _check_tool(tool: Any, path: str, serving: Serving, flat: bool) -> str:
    """Check one tool and return its name."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise ApiError(400, f"{path}.type must be function", param="tools")
    function = tool if flat else tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise ApiError(400, f"{path}: a function needs a name", param="tools")
    if not FUNCTION_NAME.fullmatch(name):
        raise ApiError(
            400, f"{path}: the name {name[:70]!r} must match {FUNCTION_NAME.pattern}", param="tools"
        )
    if not isinstance(function.get("description") or "", str):
        raise ApiError(400, f"{path}: the description must be text", param="tools")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise ApiError(400, f"{path}: parameters must be a JSON schema", param="tools")
    check_schema(parameters or {}, serving, "tools")
    return name


def _check_named_choice(choice: Any, names: list[str], flat: bool) -> None:
    named = choice if flat or not isinstance(choice, dict) else choice.get("function")
    name = named.get("name") if isinstance(named, dict) else None
    if name not in names or choice.get("type") != "function":
        choices = ", ".join(TOOL_CHOICES)
        raise ApiError(
            400,
            f"tool_choice must be one of {choices}, or name one of the tools",
            param="tool_choice",
        )
