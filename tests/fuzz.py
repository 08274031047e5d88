"""Random requests: mutations of valid bodies, random JSON schemas, and bytes that are no JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from bad_requests import BAD_REQUESTS, PATHS, VALID

TEXTS = [
    "", " ", "hello", "a" * 3000, "\x00", "\u2028", "\U0001f600" * 20, "<|im_end|>", "<|im_start|>",
    "{{ 7 * 7 }}", "%s%n", "../../etc/passwd", "é" * 50, "\n\n", "null", "\ufffe", "ﷺ" * 30,
]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 0.5, 1.5, 1e-300, 1e300, 100, 2**31, 2**63, -(2**63), 10**30, 49151, 49152]
FIELDS = [
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "n", "max_tokens", "max_completion_tokens", "max_output_tokens",
    "min_tokens", "stop", "stop_token_ids", "logit_bias", "logprobs", "top_logprobs", "stream",
    "stream_options", "response_format", "ignore_eos", "skip_special_tokens", "add_special_tokens",
    "continue_final_message", "add_generation_prompt", "echo", "tools", "tool_choice",
    "parallel_tool_calls", "reasoning_effort", "chat_template_kwargs", "reasoning", "text",
    "instructions", "input", "messages", "prompt", "user", "metadata", "store", "truncation",
    "include", "background", "previous_response_id", "suffix",
]  # fmt: skip
ROLES = ["system", "developer", "user", "assistant", "tool", "function", "", None]
KEYWORDS = [
    "type", "properties", "required", "items", "enum", "const", "pattern", "minLength", "maxLength",
    "minItems", "maxItems", "minimum", "maximum", "anyOf", "allOf", "oneOf", "not", "$ref",
    "additionalProperties", "patternProperties", "format", "uniqueItems", "prefixItems",
    "minProperties", "multipleOf",
]  # fmt: skip
TYPES = ["string", "integer", "number", "object", "array", "boolean", "null", "wizard"]
PATTERNS = ["^a+$", "[a-z]{1,20}", "(ab|c)*", "(", "[", "a{2,1}", "(?=a)b", "\\d{3}", "\x00", ".*"]


@dataclass(frozen=True)
class FuzzRequest:
    """One request, and whether the client leaves before the response is complete."""

    path: str
    content: bytes
    content_type: str
    leave: bool


class Fuzzer:
    """Generates requests from a seed.

    Args:
        seed: the same seed gives the same requests.
        models: names of served models.
    """

    def __init__(self, seed: int, models: list[str]):
        self.random, self.models = Random(seed), models

    def request(self) -> FuzzRequest:
        """Return the next request."""
        draw = self.random.random()
        kind = self.random.choice(list(VALID))
        body = {"model": self.random.choice(self.models), **self.body(kind)}
        if draw < 0.05:
            body["model"] = self.value(1)
        content = json.dumps(body).encode()
        if draw > 0.95:
            content = self.damage(content)
        media_type = "text/plain" if 0.05 < draw < 0.07 else "application/json"
        return FuzzRequest(PATHS[kind], content, media_type, leave=0.1 < draw < 0.15)

    def body(self, kind: str) -> dict[str, Any]:
        """Return a body with some fields of the kind set to valid and invalid values."""
        limit = "max_output_tokens" if kind == "responses" else "max_tokens"
        body = {**VALID[kind], limit: self.random.randint(1, 8)}
        if self.random.random() < 0.15:
            bad_kind, changes, _ = self.random.choice(list(BAD_REQUESTS.values()))
            body |= changes if bad_kind == kind else {}
        for _ in range(self.random.choice([0, 0, 1, 1, 2, 3])):
            field = self.random.choice(FIELDS)
            body[field] = self.field(field)
        return body

    def field(self, name: str) -> Any:
        """Return a value for a field, which is of the right type more often than not."""
        if self.random.random() < 0.2:
            return self.value(3)
        special = {
            "messages": self.messages,
            "input": self.messages,
            "prompt": lambda: self.random.choice(TEXTS),
            "response_format": lambda: {
                "type": self.random.choice(["json_schema", "json_schema", "json_object", "text"]),
                "json_schema": {"name": "a", "schema": self.schema(4)},
            },
            "text": lambda: {
                "format": {"type": "json_schema", "name": "a", "schema": self.schema(4)}
            },
            "logit_bias": lambda: {
                str(self.random.choice([0, 5, 49151, 49152, 10**6])): self.random.choice(NUMBERS)
            },
            "stop": lambda: self.random.choices(TEXTS, k=self.random.randint(0, 4)),
            "stop_token_ids": lambda: self.random.choices(NUMBERS, k=2),
            "stream": lambda: True,
            "n": lambda: self.random.choice([1, 2, 3, 16, 17]),
            "tools": lambda: [
                {"type": "function", "function": {"name": "f", "parameters": self.schema(3)}}
            ],
            "tool_choice": lambda: self.random.choice(["auto", "none", "required"]),
            "chat_template_kwargs": lambda: {"enable_thinking": self.random.choice([True, False])},
        }
        return special[name]() if name in special else self.scalar()

    def messages(self) -> list[Any]:
        """Return a conversation of random roles."""
        return [
            {"role": self.random.choice(ROLES[:4] * 3 + ROLES), "content": self.content()}
            for _ in range(self.random.randint(0, 5))
        ]

    def content(self) -> Any:
        """Return the content of a message."""
        text = self.random.choice(TEXTS)
        return self.random.choice([text, text, text, [{"type": "text", "text": text}], None, 1])

    def schema(self, depth: int) -> Any:
        """Return a JSON schema that is often invalid."""
        if depth == 0:
            return {"type": self.random.choice(TYPES)}
        schema: dict[str, Any] = {"type": self.random.choice(TYPES)}
        for _ in range(self.random.randint(0, 3)):
            keyword = self.random.choice(KEYWORDS)
            schema[keyword] = self.keyword(keyword, depth - 1)
        return schema

    def keyword(self, keyword: str, depth: int) -> Any:
        """Return the value of a keyword of a JSON schema."""
        if self.random.random() < 0.1:
            return self.value(2)
        if keyword in ("properties", "patternProperties"):
            names = PATTERNS if keyword == "patternProperties" else ["a", "b", "é", ""]
            return {name: self.schema(depth) for name in self.random.sample(names, 2)}
        if keyword in ("anyOf", "allOf", "oneOf", "prefixItems"):
            return [self.schema(depth) for _ in range(self.random.randint(0, 3))]
        if keyword in ("items", "not", "additionalProperties"):
            return self.random.choice([True, False, self.schema(depth)])
        if keyword == "$ref":
            return self.random.choice(["#", "#/properties/a", "#/$defs/x", "http://localhost/x"])
        if keyword == "pattern":
            return self.random.choice(PATTERNS)
        if keyword in ("required", "enum"):
            return self.random.choices([*TEXTS[:4], *NUMBERS[:3]], k=self.random.randint(0, 3))
        return self.random.choice([*NUMBERS, "date", True])

    def scalar(self) -> Any:
        """Return a number, a text or a constant."""
        return self.random.choice([*NUMBERS, *TEXTS, True, False, None])

    def value(self, depth: int) -> Any:
        """Return any JSON value."""
        draw = self.random.random()
        if depth == 0 or draw < 0.7:
            return self.scalar()
        size = self.random.randint(0, 3)
        if draw < 0.85:
            return [self.value(depth - 1) for _ in range(size)]
        return {self.random.choice(TEXTS): self.value(depth - 1) for _ in range(size)}

    def damage(self, content: bytes) -> bytes:
        """Return a body that is cut off, or in which bytes are replaced."""
        if self.random.random() < 0.5:
            return content[: self.random.randrange(len(content))]
        data = bytearray(content)
        for _ in range(3):
            data[self.random.randrange(len(data))] = self.random.randrange(256)
        return bytes(data)
