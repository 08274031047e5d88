"""The specification of an engine, the interface of all engines, and their replies."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from opencharacter import lora
from opencharacter.config.placement import Pool, Resources
from opencharacter.config.recipe import Recipe
from opencharacter.config.roles import Role, Sampling
from opencharacter.runtime.stage import Job
from opencharacter.runtime.store import RemoteDir
from opencharacter.text.chat import Message


@dataclass(frozen=True)
class Reply:
    """One reply of an engine.

    Args:
        text: generated text, without the prefill.
        finish_reason: as in OpenAI's API, such as `stop` or `length`; `trimmed` for a reply that
            reached its token limit and was cut back to whole sentences.
        tokens_in: prompt tokens, the prefill included.
        tokens_out: generated tokens.
        cached_tokens: prompt tokens that came from the prefix cache.
        first_tokens: the likeliest first tokens with their log-probabilities, the likeliest first,
            if `FirstToken` asked for them and the engine has them.
    """

    text: str
    finish_reason: str
    tokens_in: int
    tokens_out: int
    cached_tokens: int
    first_tokens: tuple[tuple[str, float], ...] = ()


class FirstToken(Sampling):
    """Greedy decoding of a single token, with the log-probabilities of the likeliest ones."""

    max_tokens: PositiveInt = 1
    temperature: NonNegativeFloat = 0.0
    top_p: float = 1.0
    repetition_penalty: PositiveFloat = 1.0
    top_logprobs: PositiveInt = 20
    """Number of tokens whose log-probabilities are returned; 20 is the maximum of most engines."""


@dataclass(frozen=True)
class EngineSpec:
    """Everything that is needed to start an engine on any node.

    Args:
        role: the model.
        pool: the resources of the engine and the number of its replicas.
        adapter: LoRA adapter to apply to the model, or None.
        role_name: name of the role in the recipe. Roles with equal models and pools share an
            engine, so this is not part of the key.
        max_lora_rank: largest rank of the adapters that the engine applies during generation; 0 if
            its adapter is merged into its weights.
    """

    role: Role
    pool: Pool
    adapter: RemoteDir | None = None
    role_name: str = ""
    max_lora_rank: int = 0

    @property
    def has_weights(self) -> bool:
        """Whether the engine loads weights; endpoints and echo engines start without any."""
        return self.role.has_weights

    @property
    def resources(self) -> Resources:
        """Resources that its replicas hold together."""
        return self.pool.resources if self.has_weights else Resources()

    @property
    def max_concurrent_jobs(self) -> int:
        """Jobs that may use it concurrently; one for an endpoint, to keep its request limit."""
        return 1 if self.role.endpoint else self.pool.max_concurrent_jobs

    def shared_by(self, tasks: int) -> EngineSpec:
        """Return the spec for each of several tasks, which share an endpoint's request limit."""
        limit = math.ceil(self.role.endpoint_concurrency / tasks)
        return replace(self, role=self.role.model_copy(update={"endpoint_concurrency": limit}))

    @property
    def runtime_adapter(self) -> RemoteDir | None:
        """The adapter, if it is applied during generation."""
        return self.adapter if self.max_lora_rank else None

    @property
    def merged_adapter(self) -> RemoteDir | None:
        """The adapter, if it is merged into the weights."""
        return None if self.max_lora_rank else self.adapter

    @property
    def label(self) -> str:
        """Model and merged adapter, for people."""
        adapter = self.merged_adapter
        return " + ".join([self.role.model, *([adapter.relative] if adapter else [])])

    def key(self) -> str:
        """Return a key that is equal for all specs that one engine can serve."""
        return self._key

    @cached_property
    def _key(self) -> str:
        adapter = self.merged_adapter if self.has_weights else None
        return repr((self._engine, adapter, self.max_lora_rank))

    @property
    def _engine(self) -> tuple[Role, Pool]:
        """The model and the pool, without the fields that do not concern an engine."""
        role = self.role.model_copy(update={"name": "", "self_name": "", "aliases": ()})
        return role, self.pool

    @property
    def sleeps(self) -> bool:
        """Whether the engine sleeps while an adapter is trained, instead of being stopped."""
        return self.has_weights and self.pool.gpus > 0 and self.pool.sleep_for_training

    @property
    def weights(self) -> str:
        """The adapter that is merged into the model's weights; empty for none."""
        adapter = self.merged_adapter
        return adapter.store.address(adapter.relative) if adapter else ""

    @property
    def swap_group(self) -> str:
        """A string that is equal for specs whose engines can replace each other's weights.

        They differ in nothing but the merged adapter. A model with steering vectors has biases that
        the model without them lacks, so it has another group. Empty if an engine of this spec
        cannot replace its weights.
        """
        return self._swap_group

    @cached_property
    def _swap_group(self) -> str:
        if not self.has_weights or self.max_lora_rank or no_swap_reason(self.role, self.pool):
            return ""
        return repr((self._engine, bool(self.adapter and STEERING in self.adapter.relative)))


STEERING = "/evaluation/steering/"
"""Part of the path of steering vectors in storage."""
RUNTIME_ADAPTERS = ("/distillation/dpo/adapter", "/persona/merge/adapter")
"""Ends of the paths of adapters that can be applied during generation. Others are steering vectors,
or may have a rank that no engine supports."""
UNVERIFIABLE = ("quantization", "load_format", "worker_extension_cls", "enable_sleep_mode")
"""Arguments of vLLM under which replaced weights could not be verified."""


def no_swap_reason(role: Role, pool: Pool) -> str:
    """Explain why a model's engines cannot replace their weights; empty if they can."""
    used = pool.engine_kwargs.keys() | ({"quantization"} if role.quantization else set())
    return ", ".join(name for name in UNVERIFIABLE if name in used)


class Engine(Protocol):
    """The interface of all engines."""

    async def reply(
        self,
        messages: list[Message],
        sampling: Sampling,
        *,
        seed: int | None,
        prefill: str = "",
    ) -> Reply:
        """Generate the reply to a conversation.

        Args:
            messages: the conversation; the last message is the user's.
            sampling: sampling parameters.
            seed: seed of this request, or None for unseeded sampling.
            prefill: beginning of the reply, which the model continues.

        Raises:
            RowFailed: if this conversation cannot be continued although others can.
        """
        ...

    def stream(self, messages: list[Message], sampling: Sampling) -> AsyncIterator[str]:
        """Generate the reply to a conversation and yield it in pieces of text."""
        ...

    def close(self) -> None:
        """Stop the engine's processes."""
        ...


def engine_spec(
    job: Job, role: str, adapter: RemoteDir | Role | None = None, model: Role | None = None
) -> EngineSpec:
    """Return the spec of the engine that a job uses for a role.

    Args:
        job: provides the recipe and the placement.
        role: name of the role, which selects the model and the pool.
        adapter: LoRA adapter to apply to the model, or None; or another model that is used in its
            place.
        model: replaces the role's model, for roles with several models.
    """
    if isinstance(adapter, Role):
        return EngineSpec(adapter, getattr(job.placement.pools, role), None, role)
    from opencharacter.engines.served import served_spec  # which builds on this module

    if served := served_spec(job, role, adapter, model):
        return served
    pool: Pool = getattr(job.placement.pools, role)
    used: Role = model or getattr(job.recipe.roles, role)
    applies_adapters = (
        pool.adapters == "runtime"
        and used.model == job.recipe.roles.student.model
        and (adapter is None or adapter.relative.endswith(RUNTIME_ADAPTERS))
    )
    rank = max_lora_rank(job.recipe) if applies_adapters else 0
    return EngineSpec(used, pool, adapter, role, rank)


def max_lora_rank(recipe: Recipe) -> int:
    """Return the LoRA rank that an engine must allow for the adapters of a recipe's personas.

    They are the DPO adapter and the merged adapter, or the one that is evaluated in their place.
    """
    dpo, sft = recipe.distillation.dpo.lora.rank, recipe.introspection.sft.lora.rank
    given = recipe.evaluation.subject.adapter
    if given:
        return lora.engine_rank(Path(given))
    return lora.allowed_rank(max(dpo, recipe.persona.merge.rank or dpo + sft))
