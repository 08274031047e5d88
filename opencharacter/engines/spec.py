"""What an engine is: its specification, its interface, and its replies."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from opencharacter.config.placement import MAX_JOBS_PER_ENGINE, Pool, Resources
from opencharacter.config.recipe import Role, Sampling
from opencharacter.runtime.stage import Job
from opencharacter.runtime.store import RemoteDir
from opencharacter.text.chat import Message


@dataclass(frozen=True)
class Reply:
    """One answer: its text (without the prefill), and what it cost in tokens."""

    text: str
    finish_reason: str
    tokens_in: int
    tokens_out: int
    cached_tokens: int


@dataclass(frozen=True)
class EngineSpec:
    """What an engine needs to start, wherever it starts.

    Args:
        role: the model.
        pool: where it runs.
        folded: adapter folder to fold into the weights before loading, or None.
        plays: the role by its name in the recipe; one engine may play several.
    """

    role: Role
    pool: Pool
    adapter: RemoteDir | None = None
    role_name: str = ""

    @property
    def has_weights(self) -> bool:
        """Whether it is worth keeping: an endpoint and an echo start at once."""
        return self.role.has_weights

    @property
    def resources(self) -> Resources:
        """What its hosts hold."""
        return self.pool.resources if self.has_weights else Resources()

    @property
    def max_concurrent_jobs(self) -> int:
        """Jobs that may use it at once; an endpoint has a limit of requests, so one."""
        return 1 if self.role.endpoint else MAX_JOBS_PER_ENGINE

    def shared_by(self, tasks: int) -> EngineSpec:
        """The same for tasks that ask it side by side: an endpoint's limit is for all of them."""
        limit = math.ceil(self.role.endpoint_concurrency / tasks)
        return replace(self, role=self.role.model_copy(update={"endpoint_concurrency": limit}))

    @property
    def label(self) -> str:
        """Its weights, in words."""
        return " + ".join([self.role.model, *([self.adapter.relative] if self.adapter else [])])

    def key(self) -> str:
        """The same for specs that one engine can serve."""
        return self._key

    @cached_property
    def _key(self) -> str:
        role = self.role.model_copy(update={"name": "", "self_name": "", "aliases": ()})
        return repr((role, self.pool, self.adapter if self.has_weights else None))


class Engine(Protocol):
    """What a conversation may ask for."""

    async def reply(
        self,
        messages: list[Message],
        sampling: Sampling,
        *,
        seed: int | None,
        prefill: str = "",
    ) -> Reply:
        """Answer a conversation.

        Args:
            messages: the conversation, ending on a user turn.
            sampling: how to draw.
            seed: the request's own seed, or None.
            prefill: beginning of the answer, to be continued.

        Raises:
            RowFailed: if this conversation cannot be answered; others can.
        """
        ...

    def stream(self, messages: list[Message], sampling: Sampling) -> AsyncIterator[str]:
        """Answer piece by piece."""
        ...

    def close(self) -> None:
        """Stop the engine's processes."""
        ...


def engine_spec(
    job: Job, role: str, adapter: RemoteDir | None = None, model: Role | None = None
) -> EngineSpec:
    """The engine that a job needs for a role.

    Args:
        job: provides the recipe and the placement.
        role: name of the role; selects the model and the pool.
        adapter: LoRA adapter to apply to the model, or None.
        model: overrides the role's model, for roles that have several.
    """
    pool: Pool = getattr(job.placement.pools, role)
    return EngineSpec(model or getattr(job.recipe.roles, role), pool, adapter, role)
