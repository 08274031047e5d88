"""`Placement` says where a run executes. It enters no fingerprint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from opencharacter.config.base import Config, Name, Rate


class Resources(Config):
    """What a cluster has, or what something holds of it."""

    cpus: NonNegativeFloat = 0
    gpus: NonNegativeFloat = 0
    memory_gib: NonNegativeFloat = 0

    def __or__(self, other: Resources) -> Resources:
        """The greater of both, kind by kind."""
        return Resources(
            cpus=max(self.cpus, other.cpus),
            gpus=max(self.gpus, other.gpus),
            memory_gib=max(self.memory_gib, other.memory_gib),
        )


def total(rooms: Iterable[Resources]) -> Resources:
    """What several hold together."""
    held = list(rooms)
    return Resources(
        cpus=sum(room.cpus for room in held),
        gpus=sum(room.gpus for room in held),
        memory_gib=sum(room.memory_gib for room in held),
    )


def fits(rooms: Iterable[Resources], there: Resources) -> bool:
    """Whether a cluster holds several at once."""
    wanted = total(rooms)
    return (
        wanted.cpus <= there.cpus + 1e-6
        and wanted.gpus <= there.gpus + 1e-6
        and wanted.memory_gib <= there.memory_gib + 1e-6
    )


MAX_JOBS_PER_ENGINE = 2
"""Jobs that use an engine at once: one fills the seats that the last rows of another leave, and its
time without requests."""
LIGHT_TASK_CPUS = 0.02
"""CPUs that Ray reserves for what only waits or writes: the engines hold the rest."""


class Pool(Config):
    """Where a role's engines run."""

    replicas: PositiveInt = 1
    max_replicas: PositiveInt | None = None
    """More replicas, up to this many, join while a stage runs as the cluster has room."""
    gpus: NonNegativeFloat = 0
    """GPUs per replica; 0 means the CPU wheel of vLLM, a fraction shares a card."""
    cpus: NonNegativeFloat = 0.6
    """CPUs that Ray reserves per replica. Engines that fit into the cluster together, by CPUs,
    memory and GPUs, stay loaded together."""
    memory_gib: PositiveFloat = 2
    """Memory that Ray reserves per replica."""
    tensor_parallel: PositiveInt = 1
    """GPUs over which one replica's weights are split."""
    accelerator: str | None = None
    """Ray's name of the card, such as H100; any where absent."""
    max_num_seqs: PositiveInt = 48
    """Conversations under way per replica."""
    kv_cache_gib: PositiveFloat = 1
    """Key-value cache of a CPU engine."""
    gpu_memory_utilization: Rate = 0.9
    """Share of a GPU that the engine may take."""
    adapters: Literal["merged", "runtime"] = "merged"
    """Whether an adapter is folded into a copy of the weights, or applied as it generates: saves
    the copy's disk, costs throughput."""
    max_restarts: NonNegativeInt = 8
    """Times that a replica whose engine died is started again within a run."""
    engine_kwargs: dict[str, Any] = Field(default={})
    """Further arguments of vLLM's engine, by vLLM's names; they win over what is derived here."""

    @property
    def most_replicas(self) -> int:
        """Replicas when it has grown."""
        return max(self.replicas, self.max_replicas or 0)

    @property
    def resources(self) -> Resources:
        """What its replicas hold together, with what the jobs that use them need beside."""
        return Resources(
            cpus=self.replicas * (self.cpus + MAX_JOBS_PER_ENGINE * LIGHT_TASK_CPUS),
            gpus=self.replicas * self.gpus,
            memory_gib=self.replicas * self.memory_gib,
        )

    @model_validator(mode="after")
    def _a_gpu_for_each_share(self) -> Pool:
        if self.gpus and self.tensor_parallel > max(self.gpus, 1):
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel} needs as many GPUs in a replica, which "
                f"has gpus: {self.gpus:g}; raise gpus or lower tensor_parallel"
            )
        return self


class Pools(Config):
    """One pool a role."""

    teacher: Pool = Pool()
    student: Pool = Pool()
    judge: Pool = Pool()
    prompt_generator: Pool = Pool()


class Training(Config):
    """Where adapters are trained."""

    workers: PositiveInt = 1
    gpus: NonNegativeFloat = 0
    """GPUs per worker."""
    accelerator: str | None = None
    """As in a pool."""
    cpus: PositiveFloat = 2
    """CPUs per worker, also its threads."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Whether each worker holds the whole model, or (FSDP2) a share of it."""
    max_tokens_per_microbatch: PositiveInt | None = None
    """Tokens of a forward pass; from the free memory where absent."""
    activation_checkpointing: bool | None = None
    """Activation checkpointing; only if a pass does not fit without it where absent."""
    kernels: Literal["plain", "liger", "compiled"] | None = None
    """What runs between matrix products: the model's own code, Liger's kernels, or what
    `torch.compile` makes of a block; Liger's on a GPU where they are installed, if absent."""
    checkpoint_steps: PositiveInt = 4
    """Optimiser steps between checkpoints: at most these are redone after a crash."""
    max_failures: NonNegativeInt = 3
    """Restarts after a lost worker."""

    @property
    def resources(self) -> Resources:
        """What its workers hold together."""
        return Resources(cpus=self.workers * self.cpus, gpus=self.workers * self.gpus)


class Serving(Config):
    """What a server allows, and how much of it there is. Engines come from the pools."""

    max_body_bytes: PositiveInt = 1_000_000
    """Of a request."""
    max_tokens: PositiveInt = 1024
    """New tokens that a request may ask for, over all its answers; also what one gets that does
    not say."""
    max_requests_per_key: PositiveInt = 64
    """Requests under way at once for one key (all of them together where there are no keys)."""
    max_queued_requests: PositiveInt = 256
    """Requests that wait for a seat of an engine before further ones are turned away."""
    max_adapters: PositiveInt = 16
    """Adapters that a replica keeps loaded."""
    max_loras: PositiveInt = 8
    """Adapters that may answer in the same step of an engine."""
    max_chunks_per_second: PositiveInt = 1000
    """Pieces of all streamed answers together that leave a replica; each costs every process on its
    way. With more streams a piece holds more tokens; the first one leaves at once."""
    ingress_replicas: PositiveInt = 1
    """Processes that take requests in; the limit of a key holds in each."""
    refresh_seconds: PositiveFloat = 2
    """How soon a newly trained persona is seen: every entrance looks into storage so often."""
    drain_seconds: PositiveFloat = 60
    """Time for answers under way when the server stops."""


class AutoscalingGroup(Config):
    """Nodes that an autoscaling cluster may add when asked for more than it has."""

    nodes: PositiveInt
    """At most."""
    cpus: PositiveFloat
    """Of each."""
    gpus: NonNegativeFloat = 0
    """Of each."""
    accelerator: str | None = None
    """Ray's name of their cards."""
    memory_gib: PositiveFloat
    """Of each that Ray gives out, by itself about 70 % of the machine's."""

    @property
    def resources(self) -> Resources:
        """Of all of them."""
        n = self.nodes
        return Resources(cpus=n * self.cpus, gpus=n * self.gpus, memory_gib=n * self.memory_gib)


class Placement(Config):
    """Where it runs. Enters no fingerprint."""

    name: Name = "laptop"
    pools: Pools = Pools()
    training: Training = Training()
    serving: Serving = Serving()
    autoscaling: tuple[AutoscalingGroup, ...] = ()
    """What a cluster that is joined may add: a run waits for it instead of being refused."""
    ray_cpus: PositiveInt | None = None
    """CPUs of a Ray that this command starts itself; all of the machine's where absent."""
    object_store_gib: PositiveFloat = 0.5
    """Object store of a Ray that this command starts itself."""
    max_concurrent_jobs: PositiveInt | None = None
    """Jobs that generate or train at once: for machines whose cores bear fewer than would fit."""
    cluster: Resources | None = None
    """What `plan` takes the cluster to have; a run asks Ray. Where absent, what `grows` adds up to,
    else the least that holds every role and the training by itself."""
    storage_retry_seconds: NonNegativeFloat = 180
    """Seconds for which a request that s3:// or gs:// refuses is tried again."""
    price_per_gpu_hour: NonNegativeFloat = 0
    """In any currency; `plan` multiplies."""

    @property
    def autoscaling_limit(self) -> Resources:
        """What the cluster may grow to; nothing where that is not said."""
        return total(group.resources for group in self.autoscaling)
