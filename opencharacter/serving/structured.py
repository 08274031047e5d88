"""Bounds on JSON schemas from clients: those of structured output and of the parameters of tools.

The engine compiles a schema into a grammar. For most schemas that takes milliseconds, but the cost
of deep nesting, of counted repetitions in patterns and of many different lengths of text grows so
fast that one request could occupy the engine for minutes. What is no JSON schema at all never
reaches the engine, whose own check ignores many mistakes and fails on a few of them.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from jsonschema import FormatChecker, validators
from jsonschema.exceptions import SchemaError

from opencharacter.config.placement import Serving
from opencharacter.serving.protocol import ApiError

MAX_SCHEMA_DEPTH = 32
"""Nested objects and arrays in the JSON text of a schema."""
MAX_PATTERN_LENGTH = 256
"""Characters of a regular expression in a schema."""
MAX_PATTERN_STATES = 128
"""Size of a regular expression with its counted repetitions written out (see `pattern_states`)."""
MAX_SCHEMA_STATES = 256
"""The same for all patterns of a schema together."""
MAX_LENGTH_BOUNDS = 32
"""Different pairs of `minLength` and `maxLength` in a schema. Each takes up to 1.5 seconds of a CPU
to compile; equal pairs are compiled once."""
RESPONSE_FORMATS = ("text", "json_object", "json_schema")

DRAFTS = {
    draft.META_SCHEMA["$schema"].rstrip("#"): draft
    for draft in (
        validators.Draft4Validator,
        validators.Draft6Validator,
        validators.Draft7Validator,
        validators.Draft201909Validator,
        validators.Draft202012Validator,
    )
}
"""The drafts of JSON Schema that a schema's `$schema` can name."""
ANY_FORMAT = FormatChecker(formats=())
"""Checks no formats: patterns of a JSON schema need not be regular expressions of Python."""


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
    """Check that a JSON schema is one, and its size, nesting, patterns and lengths.

    Raises:
        ApiError: 400, naming the limit or the value that is invalid.
    """
    text = json.dumps(schema, ensure_ascii=False)
    size = len(text.encode())
    if size > serving.max_schema_bytes:
        raise ApiError(
            400,
            f"{param}: the JSON schema has {size:,} bytes; this server allows "
            f"{serving.max_schema_bytes:,}",
            param=param,
        )
    states = _check_node(schema, 1, param)
    if states > MAX_SCHEMA_STATES:
        raise ApiError(
            400,
            f"{param}: the patterns of the JSON schema stand for {states:,} characters or classes; "
            f"this server allows {MAX_SCHEMA_STATES}",
            param=param,
        )
    lengths = len(_length_bounds(schema))
    if lengths > MAX_LENGTH_BOUNDS:
        raise ApiError(
            400,
            f"{param}: the JSON schema has {lengths} different pairs of minLength and maxLength; "
            f"this server allows {MAX_LENGTH_BOUNDS}",
            param=param,
        )
    problem = schema_problem(text)
    if problem:
        raise ApiError(400, f"{param}: this is no JSON schema: {problem}", param=param)


@functools.lru_cache(maxsize=256)
def schema_problem(text: str) -> str | None:
    """Return why a JSON text is no JSON schema, or None if it is one.

    Clients send the same schema with each request, hence the cache.

    Args:
        text: a JSON object. Its `$schema` may name another draft than 2020-12.
    """
    schema = json.loads(text)
    draft = DRAFTS.get(str(schema.get("$schema")).rstrip("#"), validators.Draft202012Validator)
    try:
        draft.check_schema(schema, ANY_FORMAT)
    except SchemaError as error:
        return f"{error.json_path} = {error.instance!r:.50}: {error.message:.200}"
    return None


def _length_bounds(node: Any) -> set[tuple[str, str]]:
    """Return the pairs of `minLength` and `maxLength` in a part of a schema, as text."""
    if isinstance(node, list):
        return set().union(*map(_length_bounds, node))
    if not isinstance(node, dict):
        return set()
    bounds = set().union(*map(_length_bounds, node.values()))
    if "minLength" in node or "maxLength" in node:
        bounds.add((str(node.get("minLength")), str(node.get("maxLength"))))
    return bounds


def _check_node(node: Any, depth: int, param: str) -> int:
    """Check a part of a schema and return the states of its patterns."""
    if not isinstance(node, dict | list):
        return 0
    if depth > MAX_SCHEMA_DEPTH:
        raise ApiError(
            400,
            f"{param}: the JSON schema is nested more than {MAX_SCHEMA_DEPTH} levels deep",
            param=param,
        )
    states = _check_patterns(node, param) if isinstance(node, dict) else 0
    children = node.values() if isinstance(node, dict) else node
    return states + sum(_check_node(child, depth + 1, param) for child in children)


def _check_patterns(node: dict[str, Any], param: str) -> int:
    total = 0
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
        total += states
    return total


def pattern_states(pattern: str) -> int:
    """Return the number of characters and classes of a regular expression, repetitions included.

    `[a-z]{2,5}` counts 5, `(ab){3}` counts 6, `a*` counts 1. A repetition of a repetition counts
    with the square of its number, because it is far more costly: `(a{2}){3}` counts 18. A pattern
    that is not valid gets a number as well: the engine rejects it.

    Args:
        pattern: a regular expression.
    """
    totals, atom, position = [0], 0, 0
    repeated, atom_repeated = [False], False  # whether a group contains counted repetitions
    while position < len(pattern):
        character = pattern[position]
        position += 1
        if character == "(":
            totals[-1] += atom
            totals.append(0)
            repeated.append(False)
            atom, atom_repeated = 0, False
        elif character == ")" and len(totals) > 1:
            atom += totals.pop()
            atom_repeated = repeated.pop()
            repeated[-1] |= atom_repeated
        elif character == "{":
            counts, _, rest = pattern[position:].partition("}")
            count = max([int(n) for n in counts.split(",") if n.strip().isdecimal()] or [1])
            atom *= count**2 if atom_repeated else count
            repeated[-1] = atom_repeated = True
            position = len(pattern) - len(rest)
        elif character not in "*+?|^$":
            totals[-1] += atom
            atom, atom_repeated = 1, False
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
