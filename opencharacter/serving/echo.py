"""The echo model: serves a role whose model is `echo:`, for tests of everything but the text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from ray import serve

from opencharacter.config.roles import Role, Sampling
from opencharacter.engines.backends import EchoEngine
from opencharacter.engines.spec import Reply
from opencharacter.serving import echo_formats
from opencharacter.serving.protocol import ResponsePart
from opencharacter.serving.validation import template_error
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
        model = payload["model"]
        error = template_error(payload, "", model)
        if error:
            yield error
            return
        limit = payload.get("max_tokens", payload.get("max_output_tokens"))
        words = f"{model}: {echo_formats.input_text(kind, payload)}".split(" ")[:limit]
        if not payload.get("stream"):
            await asyncio.sleep(self.seconds)
            yield {"body": echo_formats.format_body(kind, model, words)}
            return
        for event in echo_formats.format_events(kind, model, words):
            await asyncio.sleep(self.seconds / len(words))
            yield event
