"""Replies to the evaluation: conversations to token ids, and completions to `engines.spec.Reply`.

Prompts are rendered as the engines of the batch way render them, so that both ways generate from
the same token ids.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from opencharacter import models
from opencharacter.config.roles import Role, Sampling
from opencharacter.engines.backends import ENGINE_ERROR
from opencharacter.engines.spec import FirstToken, Reply
from opencharacter.errors import OpenCharacterError, RowFailed, StageFailed
from opencharacter.serving.protocol import ErrorBody
from opencharacter.text.chat import Message
from opencharacter.text.templates import load_tokenizer, prompt_ids


def completion_payload(
    role: Role,
    messages: list[Message],
    sampling: Sampling,
    seed: int | None,
    prefill: str,
) -> dict[str, Any]:
    """Return the completion request of a conversation, without the model.

    Raises:
        RowFailed: if the prompt leaves no place for a reply.
    """
    ids = prompt_ids(tokenizer(role.model_dump_json()), messages, prefill)
    remaining = role.max_model_len - len(ids)
    if remaining < 1:
        raise RowFailed(
            "too_long", f"prompt has {len(ids)} tokens, max_model_len is {role.max_model_len}"
        )
    return {
        "prompt": ids,
        "max_tokens": min(sampling.max_tokens, remaining),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": seed,
        "logprobs": sampling.top_logprobs if isinstance(sampling, FirstToken) else None,
    }


@lru_cache(maxsize=4)
def tokenizer(role: str) -> Any:
    """Load the tokenizer of a role, which is given as JSON, with its adapted chat template."""
    loaded = Role.model_validate_json(role)
    return load_tokenizer(models.resolve_role(loaded), loaded)


def to_reply(body: dict[str, Any]) -> Reply:
    """Convert a completion in OpenAI's format."""
    (choice,), usage = body["choices"], body["usage"]
    details = usage.get("prompt_tokens_details") or {}
    return Reply(
        text=choice["text"],
        finish_reason=choice.get("finish_reason") or "",
        tokens_in=usage["prompt_tokens"],
        tokens_out=usage["completion_tokens"],
        cached_tokens=details.get("cached_tokens") or 0,
        first_tokens=first_tokens(choice.get("logprobs")),
    )


def first_tokens(log_probs: dict[str, Any] | None) -> tuple[tuple[str, float], ...]:
    """Return the likeliest first tokens of a completion; none if they were not requested."""
    listed = (log_probs or {}).get("top_logprobs") or [{}]
    return tuple(sorted((listed[0] or {}).items(), key=lambda token: -token[1]))


def to_error(error: ErrorBody) -> OpenCharacterError:
    """Convert an error response: what the engine refuses concerns the row, the rest the stage."""
    if error.status in (400, 413, 422, 500):
        return RowFailed(ENGINE_ERROR, error.message)
    return StageFailed(f"{error.message} (status {error.status}); run the same command again")
