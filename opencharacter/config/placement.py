"""`Placement`: where a run executes and what it may use. It enters no fingerprint."""

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
    """CPUs, GPUs and memory of a cluster, or of what is reserved on it."""

    cpus: NonNegativeFloat = 0
    """Number of CPU cores."""
    gpus: NonNegativeFloat = 0
    """Number of GPUs."""
    memory_gib: NonNegativeFloat = 0
    """Main memory in GiB."""

    def __or__(self, other: Resources) -> Resources:
        """Return the larger of both, for each kind of resource."""
        return Resources(
            cpus=max(self.cpus, other.cpus),
            gpus=max(self.gpus, other.gpus),
            memory_gib=max(self.memory_gib, other.memory_gib),
        )


def total_resources(requests: Iterable[Resources]) -> Resources:
    """Return the sum of several requests."""
    each = list(requests)
    return Resources(
        cpus=sum(request.cpus for request in each),
        gpus=sum(request.gpus for request in each),
        memory_gib=sum(request.memory_gib for request in each),
    )


def fits(requests: Iterable[Resources], available: Resources) -> bool:
    """Return whether several requests fit into the available resources together."""
    needed = total_resources(requests)
    return (
        needed.cpus <= available.cpus + 1e-6
        and needed.gpus <= available.gpus + 1e-6
        and needed.memory_gib <= available.memory_gib + 1e-6
    )


MAX_JOBS_PER_ENGINE = 4
"""Number of jobs that use an engine concurrently: the others fill the batch while the last rows of
one finish, while it sends no requests, or while its conversations are few and long."""
MAX_JOBS_PER_CPU_ENGINE = 2
"""The same for an engine on a CPU, whose cores the processes of the jobs use too."""
MAX_RUNTIME_ADAPTERS = 4
"""Number of adapters that an engine with `adapters: runtime` applies concurrently, and of jobs."""
OWN_APPLICATION = "own"
"""Value of `evaluation.served` for an application that the run deploys itself."""
LIGHT_TASK_CPUS = 0.02
"""CPUs that Ray reserves for a task that only waits or writes; engines reserve the rest."""


class Pool(Config):
    """The engines of a role: how many there are, and their resources and vLLM settings."""

    replicas: PositiveInt = 1
    """Number of engine replicas."""
    max_replicas: PositiveInt | None = None
    """Maximum number of replicas. While a stage runs, replicas are added up to this number as the
    cluster has resources for them. If null, the number stays `replicas`."""
    gpus: NonNegativeFloat = 0
    """GPUs per replica. A fraction shares a GPU with other replicas; 0 runs vLLM on the CPU."""
    cpus: NonNegativeFloat = 0.6
    """CPUs that Ray reserves per replica. Engines stay loaded side by side as long as the CPUs,
    GPUs and memory of all of them fit into the cluster."""
    memory_gib: PositiveFloat = 2
    """Main memory in GiB that Ray reserves per replica."""
    tensor_parallel: PositiveInt = 1
    """Number of GPUs over which the weights of one replica are split."""
    accelerator: str | None = None
    """Ray's accelerator type, for example `H100`; any if null."""
    max_num_seqs: PositiveInt = 48
    """Maximum number of sequences that a replica generates concurrently, as in vLLM."""
    kv_cache_gib: PositiveFloat = 1
    """Size of the key-value cache in GiB, for engines on the CPU."""
    gpu_memory_utilization: Rate = 0.9
    """Share of a GPU's memory that the engine may use, as in vLLM."""
    sleep_for_training: bool = False
    """Whether the engines sleep while an adapter is trained. They free the memory of their GPU,
    keep their weights in main memory, and wake in about a second; jobs that need them wait. This
    needs room for pools and training side by side, as fractions of a GPU. Otherwise, and on a CPU,
    engines are stopped if training needs their resources."""
    adapters: Literal["merged", "runtime"] = "merged"
    """How an engine applies a LoRA adapter: `merged` writes a copy of the weights with the adapter
    merged in; `runtime` applies the adapters of all personas during generation, side by side in one
    engine, which saves starts, replacements of weights and disk space, but has a lower throughput.
    Steering vectors, blends and tuned personas are merged in any case."""
    max_restarts: NonNegativeInt = 8
    """How often a replica whose engine died is restarted within a run."""
    engine_kwargs: dict[str, Any] = Field(default={})
    """Additional arguments of vLLM's engine, by vLLM's names. They override those that are derived
    from the other fields."""

    @property
    def replica_limit(self) -> int:
        """The largest number of replicas that the pool may reach."""
        return max(self.replicas, self.max_replicas or 0)

    @property
    def max_concurrent_jobs(self) -> int:
        """Number of jobs that use the pool's engine concurrently."""
        if self.adapters == "runtime":
            return MAX_RUNTIME_ADAPTERS
        return MAX_JOBS_PER_ENGINE if self.gpus else MAX_JOBS_PER_CPU_ENGINE

    @property
    def resources(self) -> Resources:
        """What all `replicas` reserve together, including the light tasks of jobs that use them."""
        return Resources(
            cpus=self.replicas * (self.cpus + self.max_concurrent_jobs * LIGHT_TASK_CPUS),
            gpus=self.replicas * self.gpus,
            memory_gib=self.replicas * self.memory_gib,
        )

    @model_validator(mode="after")
    def _has_a_gpu_for_each_rank(self) -> Pool:
        if self.gpus and self.tensor_parallel > max(self.gpus, 1):
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel} needs as many GPUs in a replica, which "
                f"has gpus: {self.gpus:g}; raise gpus or lower tensor_parallel"
            )
        return self


class Pools(Config):
    """The pool of each role. Roles with the same model and the same pool share engines."""

    teacher: Pool = Pool()
    """Engines of the teacher."""
    student: Pool = Pool()
    """Engines of the student and of its adapters."""
    judge: Pool = Pool()
    """Engines of the judge."""
    prompt_generator: Pool = Pool()
    """Engines of the prompt generator."""


class Training(Config):
    """The workers that train adapters."""

    workers: PositiveInt = 1
    """Number of Ray Train workers. The global batch is split over them, so their number does not
    change what is learned."""
    gpus: NonNegativeFloat = 0
    """GPUs per worker; 0 trains on the CPU."""
    accelerator: str | None = None
    """Ray's accelerator type, for example `H100`; any if null."""
    cpus: PositiveFloat = 2
    """CPUs per worker, which is also its number of threads."""
    task_cpus: PositiveFloat | None = None
    """CPUs, and threads, of a task that reads a model in a single process, such as steering vectors
    and the capabilities; `cpus` if null."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How the model is distributed: `ddp` gives each worker the whole model, `fsdp` (FSDP2) shards
    it over the workers."""
    max_tokens_per_microbatch: PositiveInt | None = None
    """Maximum number of tokens per forward pass; derived from the free memory if null."""
    activation_checkpointing: bool | None = None
    """Recompute activations in the backward pass instead of storing them. If null, only when a
    microbatch does not fit into memory otherwise."""
    kernels: Literal["plain", "liger", "compiled"] | None = None
    """Kernels for all operations except matrix products: `plain` is the model's own code, `liger`
    uses Liger's, `compiled` applies `torch.compile` to each block. If null, Liger's on a GPU where
    they are installed."""
    checkpoint_steps: PositiveInt = 4
    """Number of optimizer steps between checkpoints, and so the largest number of steps that are
    repeated after a crash."""
    max_failures: NonNegativeInt = 3
    """How often training is restarted after it lost a worker."""

    @property
    def resources(self) -> Resources:
        """What all workers reserve together."""
        return Resources(cpus=self.workers * self.cpus, gpus=self.workers * self.gpus)

    @property
    def single(self) -> Training:
        """One worker with the CPUs of a task in a single process."""
        return self.model_copy(update={"workers": 1, "cpus": self.task_cpus or self.cpus})


class Serving(Config):
    """Limits and sizes of a server. Its engines are those of the pools."""

    max_body_bytes: PositiveInt = 1_000_000
    """Maximum size of a request's body in bytes."""
    max_tokens: PositiveInt = 1024
    """Maximum number of new tokens per request, over all its choices. Also the default of a request
    that does not set it."""
    max_choices: PositiveInt = 16
    """Maximum number of choices (`n`) per request."""
    max_messages: PositiveInt = 1000
    """Maximum number of messages per request."""
    max_schema_bytes: PositiveInt = 20_000
    """Maximum size in bytes of a JSON schema for structured output or a tool's parameters."""
    max_requests_per_key: PositiveInt = 64
    """Maximum number of concurrent requests per API key, or of all clients together on a server
    without keys. Each ingress replica counts for itself."""
    max_queued_requests: PositiveInt = 256
    """Maximum number of requests that wait for an engine; further ones are rejected with status
    503."""
    max_adapters: PositiveInt = 16
    """Number of adapters that an engine replica keeps loaded."""
    max_loras: PositiveInt = 8
    """Number of adapters that one batch of an engine may mix, as in vLLM."""
    max_chunks_per_second: PositiveInt = 1000
    """Maximum number of chunks that an engine replica sends per second, over all streamed answers.
    With more concurrent streams each chunk carries more tokens; the first chunk of an answer is
    always sent at once."""
    ingress_replicas: PositiveInt = 1
    """Number of processes that accept requests."""
    refresh_seconds: PositiveFloat = 2
    """Seconds between two looks into storage for newly trained personas."""
    drain_seconds: PositiveFloat = 60
    """Seconds that running requests may take to finish when the server stops."""


Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
"""A tracker of experiments, by its name in transformers."""


class Tracking(Config):
    """Where training curves and the scores of the report are logged, besides storage."""

    trackers: tuple[Tracker, ...] | None = None
    """`tensorboard` (files in storage), `wandb`, `mlflow` and `trackio`. If null, TensorBoard, and
    Weights & Biases if it is installed and `WANDB_API_KEY` is set."""
    project: str = "opencharacter"
    """Name of the project (W&B, Trackio) or experiment (MLflow). A run has the name of its
    dataset."""
    mlflow_uri: str | None = None
    """Address of the MLflow server, or a database such as `sqlite:////shared/mlflow.db`, that all
    workers reach. If null, `MLFLOW_TRACKING_URI` or MLflow's default."""
    trackio_space: str | None = None
    """Hugging Face Space that shows Trackio's runs. If null, they stay on the machine of the first
    worker, in `TRACKIO_DIR`."""


class EvaluationPlacement(Config):
    """Where evaluations generate."""

    served: str | None = None
    """Generate through a Ray Serve application that hosts the student with all adapters, and the
    judge: `own` deploys one for the run; the name of an application of the cluster, or the URL of a
    server, joins one. If null, each condition has an engine with merged weights."""
    port: PositiveInt = 8001
    """Port on which an application of the run's own accepts chats meanwhile, on this machine
    only."""


class AutoscalingGroup(Config):
    """A group of nodes that an autoscaling cluster may add on demand."""

    nodes: PositiveInt
    """Maximum number of nodes."""
    cpus: PositiveFloat
    """CPUs per node."""
    gpus: NonNegativeFloat = 0
    """GPUs per node."""
    accelerator: str | None = None
    """Ray's accelerator type of the GPUs, for example `H100`."""
    memory_gib: PositiveFloat
    """Memory in GiB per node that Ray can reserve: by default about 70 % of the machine's."""

    @property
    def resources(self) -> Resources:
        """The resources of all nodes together."""
        n = self.nodes
        return Resources(cpus=n * self.cpus, gpus=n * self.gpus, memory_gib=n * self.memory_gib)


class Placement(Config):
    """Where a run executes and what it may use. The defaults suit a laptop."""

    name: Name = "laptop"
    """Name of the placement."""
    pools: Pools = Pools()
    """Engines, by role."""
    training: Training = Training(workers=2, cpus=1, task_cpus=2)
    """Training workers."""
    serving: Serving = Serving()
    """Limits of a server."""
    evaluation: EvaluationPlacement = EvaluationPlacement()
    """Where evaluations generate."""
    tracking: Tracking = Tracking()
    """Where training curves and scores are logged."""
    autoscaling: tuple[AutoscalingGroup, ...] = ()
    """Nodes that the cluster may add. A run that needs them waits for them instead of being
    refused."""
    ray_cpus: PositiveInt | None = None
    """CPUs of a Ray instance that the command starts itself; if null, all of the machine's, but at
    least 3, so that an idle engine may stay beside a training on two cores."""
    object_store_gib: PositiveFloat = 0.5
    """Size in GiB of the object store of a Ray instance that the command starts itself."""
    max_concurrent_jobs: PositiveInt | None = None
    """Maximum number of jobs that generate or train concurrently; as many as fit if null. For
    machines on which fewer run well."""
    cluster: Resources | None = None
    """The resources that `plan` assumes; a run asks Ray instead. If null, those of `autoscaling`,
    or else the smallest that hold each role and the training by itself."""
    storage_retry_seconds: NonNegativeFloat = 180
    """For how many seconds a failed request to s3:// or gs:// is retried."""
    price_per_gpu_hour: NonNegativeFloat = 0
    """Price of a GPU-hour in any currency, with which `plan` multiplies."""

    @property
    def autoscaling_resources(self) -> Resources:
        """The resources of all nodes that the cluster may add; none without `autoscaling`."""
        return total_resources(group.resources for group in self.autoscaling)
