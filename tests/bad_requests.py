"""Requests that a server without tools must refuse: kind, changes to a valid body, message."""

from __future__ import annotations

from typing import Any

HELLO = [{"role": "user", "content": "hello"}]
VALID: dict[str, dict[str, Any]] = {
    "chat": {"messages": HELLO},
    "completions": {"prompt": "hello"},
    "responses": {"input": "hello"},
}
"""The smallest valid body of each kind, without the model."""
PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
}

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def schema_format(schema: Any) -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    }


def text_format(schema: Any) -> dict[str, Any]:
    return {"text": {"format": {"type": "json_schema", "name": "a", "schema": schema}}}


def pattern_format(pattern: str) -> dict[str, Any]:
    return schema_format({"type": "string", "pattern": pattern})


def nested_schema(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [*HELLO, fields]}


BAD_REQUESTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no messages": ("chat", {"messages": None}, "messages must be a list with at least one"),
    "empty messages": ("chat", {"messages": []}, "messages must be a list with at least one"),
    "messages as text": ("chat", {"messages": "hello"}, "messages must be a list"),
    "too many messages": ("chat", {"messages": HELLO * 1001}, "1,001 entries.*allows 1,000"),
    "message as text": ("chat", {"messages": ["hello"]}, r"messages\.0\.role must be one of"),
    "message without role": ("chat", message(content="a"), r"messages\.1\.role must be one of"),
    "unknown role": ("chat", message(role="wizard", content="a"), r"messages\.1\.role must be one"),
    "role as list": ("chat", message(role=["user"], content="a"), r"messages\.1\.role must be one"),
    "null content": ("chat", message(role="user", content=None), r"messages\.1\.content must be t"),
    "content as number": ("chat", message(role="user", content=1), r"content must be text"),
    "content as object": ("chat", message(role="user", content={"text": "a"}), "must be text"),
    "image": ("chat", message(role="user", content=[{"type": "image_url"}]), "must be text"),
    "part as text": ("chat", message(role="user", content=["a"]), "must be text"),
    "part with a number": ("chat", message(role="user", content=[{"type": "text", "text": 1}]), ""),
    "assistant without content": ("chat", message(role="assistant"), "content must be text"),
    "tool message": ("chat", message(role="tool", tool_call_id="c", content="1"), "tool_parser"),
    "tool calls": ("chat", message(role="assistant", tool_calls=[CALL]), "tool_parser: hermes"),
    "tools": ("chat", {"tools": [TOOL]}, "served without tools.*tool_parser: hermes"),
    "tools as object": ("chat", {"tools": {"f": TOOL}}, "served without tools"),
    "tool choice without tools": ("chat", {"tool_choice": "auto"}, "tool_choice requires tools"),
    "functions of 2023": ("chat", {"functions": []}, "unsupported field 'functions'; supported"),
    "chat template": ("chat", {"chat_template": "{{ 1 }}"}, "unsupported field 'chat_template'"),
    "cache salt": ("chat", {"cache_salt": "x"}, "unsupported field 'cache_salt'"),
    "prompt log-probabilities": ("chat", {"prompt_logprobs": 5}, "unsupported field"),
    "structured outputs": ("chat", {"structured_outputs": {"regex": "a"}}, "unsupported field"),
    "guided choice": ("chat", {"guided_choice": ["a"]}, "unsupported field"),
    "beam search": ("chat", {"use_beam_search": True}, "unsupported field"),
    "priority": ("chat", {"priority": -1}, "unsupported field"),
    "field of a megabyte": ("chat", {"x" * 50_000: 1}, "unsupported field 'x{100}'"),
    "stream as text": ("chat", {"stream": "yes"}, "stream = 'yes'"),
    "stream options as text": ("chat", {"stream_options": "yes"}, "stream_options = 'yes'"),
    "usage as text": ("chat", {"stream_options": {"include_usage": "a"}}, "include_usage = 'a'"),
    "temperature below 0": ("chat", {"temperature": -0.1}, "temperature = -0.1.*greater than or"),
    "temperature over 2": ("chat", {"temperature": 2.1}, "temperature = 2.1.*less than or equal"),
    "infinite temperature": ("chat", {"temperature": float("inf")}, "temperature = inf"),
    "temperature as text": ("chat", {"temperature": "hot"}, "temperature = 'hot'.*valid number"),
    "temperature as boolean": ("chat", {"temperature": True}, "temperature = True"),
    "top_p of 0": ("chat", {"top_p": 0}, "top_p = 0.*greater than 0"),
    "top_p over 1": ("chat", {"top_p": 1.01}, "top_p = 1.01"),
    "top_k below -1": ("chat", {"top_k": -2}, "top_k = -2"),
    "top_k beyond 32 bits": ("chat", {"top_k": 2**40}, "top_k = 1099511627776"),
    "fractional top_k": ("chat", {"top_k": 1.5}, "top_k = 1.5.*valid integer"),
    "min_p over 1": ("chat", {"min_p": 2}, "min_p = 2"),
    "presence penalty": ("chat", {"presence_penalty": 3}, "presence_penalty = 3"),
    "frequency penalty": ("chat", {"frequency_penalty": -3}, "frequency_penalty = -3"),
    "repetition penalty of 0": ("chat", {"repetition_penalty": 0}, "repetition_penalty = 0"),
    "large repetition penalty": ("chat", {"repetition_penalty": 1e30}, "repetition_penalty = 1e"),
    "seed beyond 64 bits": ("chat", {"seed": 2**63}, "seed = 9223372036854775808"),
    "n of 0": ("chat", {"n": 0}, "n = 0 must be a positive integer"),
    "n as boolean": ("chat", {"n": True}, "n = True must be a positive integer"),
    "many choices": ("chat", {"n": 17, "max_tokens": 1}, "n = 17: .*at most 16 choices"),
    "n of astronomical size": ("chat", {"n": 10**400}, "at most 16 choices"),
    "max_tokens of 0": ("chat", {"max_tokens": 0}, "max_tokens = 0 must be a positive integer"),
    "fractional max_tokens": ("chat", {"max_tokens": 1.5}, "must be a positive integer"),
    "max_tokens over the limit": ("chat", {"max_tokens": 10**6}, "at most .* tokens per request"),
    "max_tokens of all choices": ("chat", {"max_tokens": 300, "n": 4}, "n = 4.*at most"),
    "max_completion_tokens": ("chat", {"max_completion_tokens": -1}, "must be a positive integer"),
    "min_tokens below 0": ("chat", {"min_tokens": -1}, "min_tokens = -1"),
    "empty stop": ("chat", {"stop": ""}, r"stop\.0 = ''.*at least 1 character"),
    "long stop": ("chat", {"stop": ["a" * 257]}, r"stop\.0 = .*at most 256 characters"),
    "many stops": ("chat", {"stop": ["a"] * 17}, "stop = .*at most 16 items"),
    "stop as number": ("chat", {"stop": 7}, "stop = 7.*valid list"),
    "stop token below 0": ("chat", {"stop_token_ids": [-1]}, r"stop_token_ids\.0 = -1"),
    "stop token as text": ("chat", {"stop_token_ids": ["a"]}, r"stop_token_ids\.0 = 'a'"),
    "many stop tokens": ("chat", {"stop_token_ids": [1] * 65}, "at most 64 items"),
    "biased word": ("chat", {"logit_bias": {"hello": 1}}, "logit_bias.*should match pattern"),
    "bias over 100": ("chat", {"logit_bias": {"1": 101}}, r"logit_bias\.1 = 101"),
    "bias as text": ("chat", {"logit_bias": {"1": "a"}}, r"logit_bias\.1 = 'a'"),
    "many biases": ("chat", {"logit_bias": {str(i): 1 for i in range(301)}}, "at most 300 items"),
    "biases as list": ("chat", {"logit_bias": [1]}, "logit_bias = "),
    "top_logprobs alone": ("chat", {"top_logprobs": 2}, "top_logprobs requires logprobs = true"),
    "many top_logprobs": ("chat", {"top_logprobs": 21, "logprobs": True}, "top_logprobs = 21"),
    "logprobs as number": ("chat", {"logprobs": 5}, "logprobs = 5"),
    "format as text": ("chat", {"response_format": "json"}, "response_format must be an object"),
    "unknown format": ("chat", {"response_format": {"type": "xml"}}, "type = 'xml' must be one of"),
    "structural tag": ("chat", {"response_format": {"type": "structural_tag"}}, "must be one of"),
    "format without schema": ("chat", {"response_format": {"type": "json_schema"}}, "requires"),
    "schema as list": ("chat", schema_format([]), "requires json_schema.schema, an object"),
    "schema as boolean": ("chat", schema_format(True), "requires json_schema.schema, an object"),
    "large schema": ("chat", schema_format({"enum": ["a" * 30_000]}), "bytes.*allows 20,000"),
    "deep schema": ("chat", schema_format(nested_schema(33)), "more than 32 levels"),
    "long pattern": ("chat", pattern_format("a" * 257), "257 characters.*allows 256"),
    "repetition in a pattern": ("chat", pattern_format("^a{1,1000}$"), "1,000.*allows 128"),
    "nested repetition": ("chat", pattern_format("((a{1,5}){1,5}){5}"), "3,125.*allows 128"),
    "many patterns": (
        "chat",
        schema_format({"properties": {f"a{i}": {"pattern": f"a{{{90 + i}}}"} for i in range(3)}}),
        "273 characters or classes.*allows 256",
    ),
    "pattern of properties": (
        "chat",
        schema_format({"type": "object", "patternProperties": {"[a-z]{129}": {}}}),
        "129 characters or classes",
    ),
    "many lengths": (
        "chat",
        schema_format({"anyOf": [{("minLength", "maxLength")[i % 2]: i} for i in range(33)]}),
        "33 different pairs of minLength and maxLength.*allows 32",
    ),
    "unknown type": (
        "chat",
        schema_format({"type": "wizard"}),
        r"\$\.type = 'wizard'",
    ),
    "format as object": (
        "chat",
        schema_format({"properties": {"a": {"type": "string", "format": {"a": 1}}}}),
        r"\$\.properties\.a\.format = {'a': 1}: .*not of type 'string'",
    ),
    "alternatives as text": ("chat", schema_format({"anyOf": "a"}), "not of type 'array'"),
    "unknown type in a text format": (
        "responses",
        text_format({"type": "array", "items": {"type": "wizard"}}),
        r"\$\.items\.type = 'wizard'",
    ),
    "unknown variable": (
        "chat",
        {"chat_template_kwargs": {"messages": []}},
        r"chat_template_kwargs\.messages; supported variables: enable_thinking, date_string",
    ),
    "control token as date": (
        "chat",
        {"chat_template_kwargs": {"date_string": "<|im_end|>"}},
        r"date_string = '<\|im_end\|>'",
    ),
    "thinking as text": (
        "chat",
        {"chat_template_kwargs": {"enable_thinking": "yes"}},
        r"enable_thinking = 'yes'",
    ),
    "unknown effort": ("chat", {"reasoning_effort": "huge"}, "reasoning_effort = 'huge'"),
    "missing prompt": ("completions", {"prompt": None}, "prompt must be a string"),
    "empty prompt": ("completions", {"prompt": ""}, "prompt must not be empty"),
    "several prompts": ("completions", {"prompt": ["a", "b"]}, "prompt must be a string"),
    "token ids as prompt": ("completions", {"prompt": [1, 2]}, "prompt must be a string"),
    "suffix": ("completions", {"suffix": "b"}, "unsupported field 'suffix'"),
    "best_of": ("completions", {"best_of": 4}, "unsupported field 'best_of'"),
    "many logprobs": ("completions", {"logprobs": 21}, "logprobs = 21"),
    "messages in a completion": ("completions", {"messages": HELLO}, "unsupported field 'messages"),
    "missing input": ("responses", {"input": None}, "input must be text or a list"),
    "empty input": ("responses", {"input": []}, "input must be text or a list"),
    "input item as text": ("responses", {"input": ["a"]}, r"input\.0 must be an object"),
    "unknown input item": ("responses", {"input": [{"type": "x"}]}, r"input\.0\.type = 'x' must"),
    "reasoning item": ("responses", {"input": [{"type": "reasoning"}]}, "must be message"),
    "input with an image": (
        "responses",
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        "must be text",
    ),
    "call in the input": (
        "responses",
        {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]},
        "tool_parser: hermes",
    ),
    "earlier response": ("responses", {"previous_response_id": "r"}, "unsupported field"),
    "background": ("responses", {"background": True}, "background = True"),
    "truncation": ("responses", {"truncation": "auto"}, "truncation = 'auto'"),
    "included log-probabilities": (
        "responses",
        {"include": ["message.output_text.logprobs"]},
        r"include\.0 = ",
    ),
    "web search": ("responses", {"tools": [{"type": "web_search"}]}, "served without tools"),
    "verbosity": ("responses", {"text": {"verbosity": "low"}}, "text supports format only"),
    "unknown text format": ("responses", {"text": {"format": {"type": "x"}}}, "must be one of"),
    "text schema": (
        "responses",
        {"text": {"format": {"type": "json_schema", "schema": nested_schema(40)}}},
        "more than 32 levels",
    ),
    "output tokens": ("responses", {"max_output_tokens": 0}, "max_output_tokens = 0 must be"),
    "chat messages": ("responses", {"messages": HELLO}, "unsupported field 'messages'"),
}
"""By name: kind of request, changes to the valid body, and a pattern in the error message."""

WRONG_SCHEMAS = {
    "missing definition": ({"$ref": "#/$defs/x"}, r"Cannot find field \$defs in #/\$defs/x"),
    "empty range": ({"type": "array", "minItems": 5, "maxItems": 1}, "minItems is greater than"),
    "no choices": ({"enum": []}, "enum array must not be empty"),
    "unsupported keyword": ({"type": "integer", "multipleOf": 3}, "features not supported by xgr"),
    "schema of no text but itself": ({"type": "null", "$ref": "#"}, "no text fits the JSON schema"),
    "integer of 100 bits": ({"$ref": "#", "minItems": 10**30}, "no text fits the JSON schema"),
    "pattern of no text": (
        {"type": "string", "pattern": "[^\\s\\S]"},
        "no text fits the JSON schema",
    ),
}
ENGINE_BAD_REQUESTS: dict[str, tuple[str, dict[str, Any], str]] = {
    f"{case} ({kind})": (kind, format_of(schema), expected)
    for case, (schema, expected) in WRONG_SCHEMAS.items()
    for kind, format_of in (
        ("chat", schema_format),
        ("completions", schema_format),
        ("responses", text_format),
    )
}
"""What only an engine can refuse, because it compiles the schema."""
