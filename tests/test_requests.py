"""Requests that a server refuses, and what it passes on to the engine from those it accepts."""

import re

import pytest
from bad_requests import BAD_REQUESTS, CALL, HELLO, TOOL, VALID, nested_schema
from client_requests import CLIENT_REQUESTS
from starlette.requests import Request

from opencharacter.config.placement import Serving
from opencharacter.config.roles import Sampling
from opencharacter.serving import protocol, structured
from opencharacter.serving.access import AccessPolicy, hash_key
from opencharacter.serving.protocol import ApiError
from opencharacter.serving.validation import parse_json_object, template_error, validate_request

SAMPLING = Sampling(max_tokens=9, temperature=0.3)


def validate(kind: str, body: dict, tools: bool = False, **limits) -> dict:
    body = {"model": "m"} | VALID[kind] | body
    return validate_request(kind, body, Serving(**limits), SAMPLING, tools)


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests_are_refused_in_one_line_that_names_the_field(case):
    kind, changes, expected = BAD_REQUESTS[case]
    with pytest.raises(ApiError) as refused:
        validate(kind, changes)
    body = refused.value.body
    assert body.status == 400
    assert body.param
    assert re.search(expected, body.message), body.message
    assert "\n" not in body.message
    assert len(body.message) < 1000


@pytest.mark.parametrize("kind", VALID)
def test_the_smallest_request_gets_the_recipes_sampling_parameters(kind):
    request = validate(kind, {})
    assert (request["temperature"], request["top_p"]) == (0.3, 0.95)


@pytest.mark.parametrize("client", CLIENT_REQUESTS)
def test_the_requests_of_widely_used_clients_are_accepted(client):
    for kind, body in CLIENT_REQUESTS[client]:
        request = validate_request(kind, {"model": "m"} | body, Serving(), SAMPLING, tools=True)
        assert not request.keys() & {"include", "max_completion_tokens"}


def test_numbers_at_the_limits_are_accepted():
    limits = {"temperature": 2, "top_p": 1, "top_k": -1, "seed": -(2**63), "n": 16}
    limits |= {"stop": ["a" * 256] * 16, "logit_bias": {str(i): -100 for i in range(300)}}
    request = validate("chat", limits | {"top_logprobs": 20, "logprobs": True})
    assert request["max_tokens"] == 1024 // 16


def test_a_number_that_is_not_finite_is_refused():
    body = parse_json_object(b'{"temperature": 1e999}')
    with pytest.raises(ApiError, match="temperature"):
        validate("chat", body)


# ---------------------------------------------------------------------------------------- tools


def conversation_with_tools() -> list[dict]:
    return [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "7"}]},
    ]


def test_tools_calls_and_results_are_passed_on_to_a_model_with_a_parser():
    body = {"messages": conversation_with_tools(), "tools": [TOOL], "tool_choice": "auto"}
    request = validate("chat", body | {"parallel_tool_calls": False}, tools=True)
    assert request["messages"][1:] == [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "7"},
    ]
    assert (request["tools"], request["tool_choice"]) == ([TOOL], "auto")
    assert request["parallel_tool_calls"] is False


def test_a_request_that_says_it_has_no_tools_reaches_the_engine_without_these_fields():
    body = {"tools": [], "tool_choice": "none", "parallel_tool_calls": True}
    assert not validate("chat", body).keys() & body.keys()
    flat = {"tools": [], "tool_choice": "auto"}
    assert not validate("responses", flat).keys() & flat.keys()


def function(**fields) -> dict:
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"tools": "f"}, "tools must be a list"),
        ({"tools": [TOOL] * 129}, "at most 128 functions"),
        ({"tools": [TOOL, TOOL]}, "different names"),
        ({"tools": ["f"]}, r"tools\.0\.type must be function"),
        ({"tools": [{"type": "web_search"}]}, r"tools\.0\.type must be function"),
        ({"tools": [{"type": "function"}]}, "a function needs a name"),
        ({"tools": [function(name="a b")]}, "'a b' must match"),
        ({"tools": [function(name="a" * 65)]}, "must match"),
        ({"tools": [function(description=1)]}, "description must be text"),
        ({"tools": [function(parameters=[])]}, "parameters must be a JSON schema"),
        ({"tools": [function(parameters=nested_schema(40))]}, "more than 32 levels"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice must be one of"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "name one of the tools"),
        ({"tools": [TOOL], "tool_choice": function(name="g")}, "name one of the tools"),
        ({"messages": [{"role": "tool", "content": "7"}]}, "id of the tool call"),
        ({"messages": [{"role": "tool", "tool_call_id": "c"}]}, "content must be text"),
        ({"messages": [{"role": "assistant", "tool_calls": "f"}]}, "tool_calls must be a list"),
        ({"messages": [{"role": "assistant", "tool_calls": ["f"]}]}, "must be function calls"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL | {"id": None}]}]},
            "needs an id",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL | function(arguments="[")]}]},
            "must be a JSON object as text",
        ),
    ],
)
def test_invalid_tools_are_refused_with_the_place(body, expected):
    with pytest.raises(ApiError, match=expected):
        validate("chat", body, tools=True)


def test_the_responses_api_passes_on_functions_calls_and_results():
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "be brief"}]},
        {"type": "message", "role": "user", "content": "hello", "id": "x", "status": "completed"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "id": "fc"},
        {"type": "function_call_output", "call_id": "c", "output": "7"},
    ]
    choice = {"type": "function", "name": "f"}
    body = {"input": items, "tools": [tool], "tool_choice": choice}
    request = validate("responses", body, tools=True)
    assert request["input"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "7"},
    ]
    assert request["max_output_tokens"] == 1024
    assert request["store"] is False


# ------------------------------------------------------------------------------ schemas, thinking


@pytest.mark.parametrize(
    ("pattern", "states"),
    [
        ("", 0),
        ("abc", 3),
        (r"\d{4}-\d{2}-\d{2}", 10),
        ("[a-z]{2,5}", 5),
        ("[a-z]{7,}", 7),
        ("(ab){3}", 6),
        ("((a{2}){3}b){4}", 304),
        (r"(\d{1,3}\.){3}\d{1,3}", 39),
        ("a*b+c?", 3),
        ("^(a|b|cd)$", 4),
        (r"[\]{9}]{2}", 2),
        (r"\{9}", 3),
        ("(a", 1),
        ("a{", 1),
        ("[", 1),
        (")", 1),
    ],
)
def test_the_size_of_a_pattern_counts_its_repetitions(pattern, states):
    assert structured.pattern_states(pattern) == states


def test_a_schema_that_people_use_is_accepted():
    schema = {
        "type": "object",
        "properties": {
            "date": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
            "mail": {"type": "string", "pattern": "^[^@ ]+@[^@ ]+$", "maxLength": 1000},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 50},
        },
        "required": ["date"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    assert validate("chat", {"response_format": form})["response_format"] == form
    text = {"format": {"type": "json_schema", "name": "a", "schema": schema, "strict": True}}
    assert validate("responses", {"text": text})["text"] == text


@pytest.mark.parametrize(
    ("body", "template", "refused"),
    [
        ({"reasoning_effort": "low"}, "", "reasoning_effort = low: the chat template of m has no"),
        ({"reasoning_effort": "low"}, "{{ enable_thinking }}", None),
        ({"reasoning_effort": "low"}, "{{ reasoning_effort }}", None),
        ({"reasoning_effort": "none"}, "", None),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "{{ messages }}", "has no such"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "{{ enable_thinking }}", None),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "", None),
        ({"reasoning": {"effort": "high"}}, "", r"reasoning\.effort = high"),
        ({}, "", None),
    ],
)
def test_thinking_is_refused_if_the_chat_template_has_no_such_setting(body, template, refused):
    error = template_error(body, template, "m")
    assert bool(error) == bool(refused)
    if error and refused:
        assert re.search(refused, error.message)


# ------------------------------------------------------------------------------- keys and usage


def request_with(key: str) -> Request:
    headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {key}".encode())]
    return Request({"type": "http", "headers": headers})


def test_each_key_has_its_own_cache_salt_which_is_not_the_logged_id():
    keys = ("a" * 16, "b" * 16)
    policy = AccessPolicy(tuple(map(hash_key, keys)))
    first, second = (policy.authenticate(request_with(key)) for key in keys)
    assert first == policy.authenticate(request_with(keys[0]))
    assert first.cache_salt != second.cache_salt
    assert len(first.cache_salt) == 64
    assert first.id not in first.cache_salt
    assert AccessPolicy().authenticate(request_with("")).cache_salt == ""


def test_usage_is_read_from_both_apis_and_only_chat_has_an_event_for_it():
    chat = protocol.format_event({"choices": [], "usage": {"prompt_tokens": 1}})
    assert protocol.read_usage(chat) == ({"prompt_tokens": 1}, True)
    data = protocol.format_event({"response": {"usage": {"input_tokens": 2}}})
    final = f"event: response.completed\n{data}"
    assert protocol.has_usage(final)
    assert protocol.read_usage(final) == ({"input_tokens": 2}, False)
    assert not protocol.has_usage(f"event: response.created\n{data}")
