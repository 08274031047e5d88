"""Routing of requests to the replica whose prefix cache has the beginning of their conversation.

`ray.serve.llm` has such a router. It is imported from Ray's internal module, because the public one
imports vLLM, and the router runs in the ingress, which does without.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import (
    PrefixCacheAffinityRouter,
)
from ray.serve.config import RequestRouterConfig

from opencharacter.config.placement import Pool

CONVERSATION_FIELDS = ("messages", "prompt", "input")
"""Fields of a request that have its conversation."""
IMBALANCE_SHARE = 0.25
"""Difference between the requests of two replicas, as a share of `max_num_seqs`, from which the
load decides on the replica and not the cache."""


class ConversationRouter(PrefixCacheAffinityRouter):
    """Ray's prefix-aware router, for the methods of `PersonaServer` that take a conversation."""

    def _extract_text_from_request(self, pending_request: Any) -> str | None:  # type: ignore
        return request_text(pending_request.args)


def request_text(arguments: Iterable[Any]) -> str | None:
    """Return the text of the conversation among the arguments of a call; None if there is none.

    Args:
        arguments: positional arguments of a replica's method: a request as a dictionary, or a list
            of messages.
    """
    for argument in arguments:
        fields = argument if isinstance(argument, dict) else {"messages": argument}
        for conversation in (fields[name] for name in CONVERSATION_FIELDS if name in fields):
            if isinstance(conversation, list):
                return "\n".join(map(content_text, conversation)) or None
            if isinstance(argument, dict) and isinstance(conversation, str):
                return conversation or None
    return None


def content_text(message: Any) -> str:
    """Return the text of a message; its content may be a list of parts."""
    content = message.get("content") if isinstance(message, dict) else message
    if isinstance(content, list):
        return "\n".join(str(p.get("text", "")) if isinstance(p, dict) else str(p) for p in content)
    return str(content or "")


def router_options(pool: Pool) -> dict[str, Any]:
    """Return the router of a deployment: Ray's default for a single replica."""
    if pool.replica_limit == 1:
        return {}
    return {
        "request_router_config": RequestRouterConfig(
            request_router_class=ConversationRouter,  # type: ignore
            request_router_kwargs={
                "imbalanced_threshold": max(2, int(IMBALANCE_SHARE * pool.max_num_seqs)),
                "do_eviction": True,
            },
        )
    }
