"""Bounds on JSON schemas from clients: those of structured output and of the parameters of tools.

The engine compiles a schema into a grammar. For most schemas that takes milliseconds, but the cost
of deep nesting and of counted repetitions in patterns grows so fast that one request could occupy
the engine for minutes.
"""

from __future__ import annotations

import json
from typing import Any

from opencharacter.config.placement import Serving
from opencharacter.serving.protocol import ApiError

MAX_SCHEMA_DEPTH = 32
"""Nested objects and arrays in the JSON text of a schema."""
MAX_PATTERN_LENGTH = 256
"""Characters of a regular expression in a schema."""
MAX_PATTERN_STATES = 128
"""Size of a regular expression with its counted repetitions written out (see `pattern_states`)."""
RESPONSE_FORMATS = ("text", "json_object", "json_schema")


def check_response_format(response_format: Any, serving: Serving, param: str) -> None:
    """Check the format that a client asks for.

    Args:
        response_format: `{"type": "json_schema", "json_schema": {"schema": ...}}`, or another type.
        serving: the server's limits.
        param: name of the field in error messages.

    Raises:
        ApiError: 400, naming the limit.
    """
    if not isinstance(response_format, dict):
        raise ApiError(400, f"{param} must be an object", param=param)
    kind = response_format.get("type")
    if kind not in RESPONSE_FORMATS:
        formats = ", ".join(RESPONSE_FORMATS)
        raise ApiError(400, f"{param}.type = {kind!r:.50} must be one of {formats}", param=param)
    if kind != "json_schema":
        return
    json_schema = response_format.get("json_schema")
    schema = json_schema.get("schema") if isinstance(json_schema, dict) else None
    if not isinstance(schema, dict):
        raise ApiError(
            400,
            f"{param} of type json_schema requires json_schema.schema, an object",
            param=param,
        )
    check_schema(schema, serving, param)


def check_schema(schema: dict[str, Any], serving: Serving, param: str) -> None:
    """Check the size, the nesting and the patterns of a JSON schema.

    Raises:
        ApiError: 400, naming the limit.
    """
    size = len(json.dumps(schema, ensure_ascii=False).encode())
    if size > serving.max_schema_bytes:
        raise ApiError(
            400,
            f"{param}: the JSON schema has {size:,} bytes; this server allows "
            f"{serving.max_schema_bytes:,}",
            param=param,
        )
    _check_node(schema, 1, param)


def _check_node(node: Any, depth: int, param: str) -> None:
    if not isinstance(node, dict | list):
        return
    if depth > MAX_SCHEMA_DEPTH:
        raise ApiError(
            400,
            f"{param}: the JSON schema is nested more than {MAX_SCHEMA_DEPTH} levels deep",
            param=param,
        )
    if isinstance(node, dict):
        _check_patterns(node, param)
    for child in node.values() if isinstance(node, dict) else node:
        _check_node(child, depth + 1, param)


def _check_patterns(node: dict[str, Any], param: str) -> None:
    by_name = node.get("patternProperties")
    patterns = [node.get("pattern"), *(by_name if isinstance(by_name, dict) else ())]
    for pattern in patterns:
        if not isinstance(pattern, str):
            continue
        if len(pattern) > MAX_PATTERN_LENGTH:
            raise ApiError(
                400,
                f"{param}: a pattern has {len(pattern)} characters; this server allows "
                f"{MAX_PATTERN_LENGTH}",
                param=param,
            )
        states = pattern_states(pattern)
        if states > MAX_PATTERN_STATES:
            raise ApiError(
                400,
                f"{param}: the pattern {pattern[:50]!r} stands for {states:,} characters or "
                f"classes once its repetitions are written out; this server allows "
                f"{MAX_PATTERN_STATES}. For long texts use maxLength instead",
                param=param,
            )


def pattern_states(pattern: str) -> int:
    """Return the number of characters and classes of a regular expression, repetitions included.

    `[a-z]{2,5}` counts 5, `(ab){3}` counts 6, `a*` counts 1. A pattern that is not valid gets a
    number as well: the engine rejects it.

    Args:
        pattern: a regular expression.
    """
    totals, atom, position = [0], 0, 0
    while position < len(pattern):
        character = pattern[position]
        position += 1
        if character == "(":
            totals[-1] += atom
            totals.append(0)
            atom = 0
        elif character == ")" and len(totals) > 1:
            atom += totals.pop()
        elif character == "{":
            counts, _, rest = pattern[position:].partition("}")
            atom *= max([int(n) for n in counts.split(",") if n.strip().isdecimal()] or [1])
            position = len(pattern) - len(rest)
        elif character not in "*+?|^$":
            totals[-1] += atom
            atom = 1
            if character == "[":
                position = _end_of_class(pattern, position)
            elif character == "\\":
                position += 1
    return sum(totals) + atom


def _end_of_class(pattern: str, position: int) -> int:
    """Return the position after a character class that begins before `position`."""
    while position < len(pattern) and pattern[position] != "]":
        position += 2 if pattern[position] == "\\" else 1
    return position + 1
