"""The echo model: serves a role whose model is `echo:`, for tests of everything but the text."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from ray import serve

from opencharacter.config.roles import Role, Sampling
from opencharacter.engines.backends import EchoEngine
from opencharacter.engines.spec import Reply
from opencharacter.serving.protocol import ResponsePart, format_event
from opencharacter.text.chat import Message


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=100)
class EchoModel:
    """Repeats the last message after the model's name, streamed word by word.

    Args:
        seconds: duration of each response.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds

    async def ready(self) -> bool:
        """Report that the replica responds."""
        return True

    async def reply(
        self,
        role: Role,
        model: str,
        messages: list[Message],
        sampling: Sampling,
        seed: int | None,
        prefill: str,
    ) -> Reply:
        """Reply to a conversation, as `PersonaServer.reply` does, like an echo engine."""
        engine = EchoEngine(self.seconds)
        return await engine.reply(messages, sampling, seed=seed, prefill=prefill)

    async def answer(self, kind: str, payload: dict[str, Any]) -> AsyncIterator[ResponsePart]:
        """Respond to one request, as `replica.PersonaServer.answer` does."""
        text = payload["messages"][-1]["content"] if kind == "chat" else payload["prompt"]
        words = f"{payload['model']}: {text}".split(" ")[: payload.get("max_tokens")]
        usage = {
            "prompt_tokens": 1,
            "completion_tokens": len(words),
            "total_tokens": 1 + len(words),
        }
        base = {"id": f"echo-{uuid.uuid4().hex}", "created": int(time.time())}
        base["model"] = payload["model"]
        if not payload.get("stream"):
            await asyncio.sleep(self.seconds)
            message = {"role": "assistant", "content": " ".join(words)}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            yield {
                "body": {**base, "object": "chat.completion", "choices": [choice], "usage": usage}
            }
            return
        base["object"] = "chat.completion.chunk"
        for i, word in enumerate(words):
            await asyncio.sleep(self.seconds / len(words))
            delta = {"role": "assistant", "content": word if i == 0 else f" {word}"}
            finish_reason = "stop" if i == len(words) - 1 else None
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
            yield format_event({**base, "choices": [choice]})
        yield format_event({**base, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"
