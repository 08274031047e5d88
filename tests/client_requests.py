"""The bodies that widely used clients send, recorded from the versions in `docs/serving.md`.

Those of Open WebUI are written after its source.
"""

from __future__ import annotations

from typing import Any

QUESTION = {"role": "user", "content": "What is rain?"}
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Weather of a city.", "parameters": WEATHER},
}
CALL = {
    "id": "chatcmpl-tool-1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
}
CITY = {
    "title": "City",
    "type": "object",
    "properties": {"city": {"title": "City", "type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
RAIN_TASK = [{"role": "system", "content": "Be brief."}, QUESTION]

CLIENT_REQUESTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "openai (Python)": [
        ("chat", {"messages": [QUESTION], "max_completion_tokens": 8}),
        (
            "chat",
            {
                "messages": [QUESTION],
                "max_tokens": 8,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        ),
        (
            "chat",
            {
                "messages": [QUESTION],
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": CITY, "name": "City", "strict": True},
                },
            },
        ),
        ("completions", {"prompt": "Rain is", "max_tokens": 8}),
        (
            "responses",
            {"input": "What is rain?", "instructions": "Be brief.", "max_output_tokens": 8},
        ),
        ("responses", {"input": [QUESTION], "max_output_tokens": 8, "stream": True}),
    ],
    "openai (npm)": [
        ("chat", {"messages": [QUESTION], "max_tokens": 8, "stream": True}),
        ("responses", {"input": "hi", "max_output_tokens": 8, "stream": True}),
    ],
    "LiteLLM": [
        (
            "chat",
            {
                "messages": [QUESTION],
                "max_tokens": 8,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        ),
    ],
    "LangChain": [
        ("chat", {"stream": True, "messages": [QUESTION], "max_completion_tokens": 8}),
        (
            "responses",
            {"stream": False, "input": [{**QUESTION, "type": "message"}], "max_output_tokens": 8},
        ),
        ("chat", {"stream": False, "messages": [QUESTION], "tools": [TOOL]}),
        (
            "chat",
            {
                "messages": [
                    QUESTION,
                    {"content": None, "role": "assistant", "tool_calls": [CALL]},
                    {"content": "rain", "role": "tool", "tool_call_id": CALL["id"]},
                ],
                "tools": [TOOL],
                "parallel_tool_calls": False,
            },
        ),
    ],
    "llm": [
        (
            "chat",
            {
                "stream": True,
                "messages": RAIN_TASK,
                "max_tokens": 8,
                "temperature": 0.5,
                "stream_options": {"include_usage": True},
            },
        ),
    ],
    "lm-eval": [
        (
            "chat",
            {
                "messages": [QUESTION],
                "max_tokens": 8,
                "temperature": 0,
                "stop": ["\n\n"],
                "seed": 1234,
            },
        ),
    ],
    "inspect-ai": [
        ("chat", {"messages": RAIN_TASK, "max_tokens": 8, "seed": 1}),
        (
            "responses",
            {
                "include": ["reasoning.encrypted_content"],
                "input": [
                    {
                        "type": "message",
                        "role": "developer",
                        "content": [{"type": "input_text", "text": "Be brief."}],
                    },
                    {
                        "type": "message",
                        "role": "user",
                        "content": [{"type": "input_text", "text": "What is rain?"}],
                    },
                ],
                "max_output_tokens": 16,
                "store": False,
            },
        ),
    ],
    "Open WebUI": [
        (
            "chat",
            {
                "stream": True,
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": [{"type": "text", "text": "What is rain?"}]},
                ],
                "stream_options": {"include_usage": True},
                "temperature": 0.8,
                "top_p": 0.9,
                "max_tokens": 128,
                "frequency_penalty": 0.0,
                "seed": 42,
                "stop": ["###"],
            },
        ),
        ("chat", {"messages": [QUESTION], "stream": False, "max_completion_tokens": 1000}),
    ],
}
"""By client: kind of request, and the body without the model."""
