"""The responses of the echo model in the format of each API."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from opencharacter.serving.protocol import format_event

OBJECTS = {
    "chat": ("chat.completion", "chat.completion.chunk"),
    "completions": ("text_completion", "text_completion"),
}
"""The `object` of a complete response and of a chunk, by kind of request."""


def input_text(kind: str, payload: dict[str, Any]) -> str:
    """Return the text that the echo model repeats: the prompt, or the last message."""
    if kind == "completions":
        return payload["prompt"]
    last = payload["messages" if kind == "chat" else "input"][-1]
    return last.get("content") or last.get("output") or ""


def format_body(kind: str, model: str, words: list[str]) -> dict[str, Any]:
    """Return a complete response.

    Args:
        kind: `chat`, `completions` or `responses`.
        model: name of the model.
        words: the words of the answer.
    """
    text = " ".join(words)
    if kind == "responses":
        return _response(model, text, len(words))
    answer = {"message": {"role": "assistant", "content": text}} if kind == "chat" else None
    choice = {"index": 0, "finish_reason": "stop", **(answer or {"text": text})}
    usage = _usage("prompt", "completion", len(words))
    return {**_base(kind, model), "choices": [choice], "usage": usage}


def format_events(kind: str, model: str, words: list[str]) -> list[str]:
    """Return the server-sent events of a streamed response, one per word.

    Args:
        kind: `chat`, `completions` or `responses`.
        model: name of the model.
        words: the words of the answer.
    """
    pieces = [word if i == 0 else f" {word}" for i, word in enumerate(words)]
    if kind == "responses":
        return _response_events(model, pieces)
    base = _base(kind, model, chunk=True)
    events = []
    for i, piece in enumerate(pieces):
        delta = {"delta": {"role": "assistant", "content": piece}} if kind == "chat" else None
        finish_reason = "stop" if i == len(words) - 1 else None
        choice = {"index": 0, **(delta or {"text": piece}), "finish_reason": finish_reason}
        events.append(format_event({**base, "choices": [choice]}))
    usage = _usage("prompt", "completion", len(words))
    return [*events, format_event({**base, "choices": [], "usage": usage}), "data: [DONE]\n\n"]


def _base(kind: str, model: str, chunk: bool = False) -> dict[str, Any]:
    name = OBJECTS[kind][chunk]
    created = int(time.time())
    return {"id": f"echo-{uuid.uuid4().hex}", "object": name, "created": created, "model": model}


def _usage(received: str, generated: str, words: int) -> dict[str, int]:
    return {f"{received}_tokens": 1, f"{generated}_tokens": words, "total_tokens": 1 + words}


def _response(model: str, text: str | None, words: int) -> dict[str, Any]:
    """Return the object of the Responses API; without output if `text` is None."""
    part = {"type": "output_text", "text": text, "annotations": []}
    message = {"type": "message", "role": "assistant", "status": "completed", "content": [part]}
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "status": "in_progress" if text is None else "completed",
        "output": [] if text is None else [{"id": f"msg_{uuid.uuid4().hex}", **message}],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": None
        if text is None
        else {
            **_usage("input", "output", words),
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        },
    }


def _response_events(model: str, pieces: list[str]) -> list[str]:
    final = _response(model, "".join(pieces), len(pieces))
    (item,) = final["output"]
    where = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    deltas = [("output_text.delta", {**where, "delta": piece}) for piece in pieces]
    events = [
        ("created", {"response": {**_response(model, None, 0), "id": final["id"]}}),
        ("output_item.added", {"output_index": 0, "item": {**item, "content": []}}),
        ("content_part.added", {**where, "part": {**item["content"][0], "text": ""}}),
        *deltas,
        ("output_text.done", {**where, "text": item["content"][0]["text"]}),
        ("content_part.done", {**where, "part": item["content"][0]}),
        ("output_item.done", {"output_index": 0, "item": item}),
        ("completed", {"response": final}),
    ]
    return [
        f"event: response.{name}\ndata: "
        f"{json.dumps({'type': f'response.{name}', 'sequence_number': i, **data})}\n\n"
        for i, (name, data) in enumerate(events)
    ]
