"""LoRA training on Ray Train: what DPO and SFT share.

Each worker runs a Hugging Face `Trainer` around a PEFT adapter. A batch is laid out as packs (see
`packing`) of about `tokens_per_pass` tokens, evenly shared by the workers; its loss and gradients
are those of the whole batch, however many packs and workers. Checkpoints and metrics go through
Ray; training resumes from the last checkpoint, after a lost worker as after a killed run.
"""

from __future__ import annotations

import importlib.util
import operator
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train
import ray.train.huggingface.transformers as ray_hf
import torch
import transformers
from ray.train.torch import TorchTrainer
from torch.utils.data import DataLoader, Dataset

from opencharacter import models
from opencharacter.config.placement import Training
from opencharacter.config.recipe import Lora, Optimizer, Role
from opencharacter.engines.allocation import acquire
from opencharacter.errors import StageFailed
from opencharacter.runtime.progress import (
    ProgressLine,
    TrainingProgress,
    active_seconds,
    console,
    start_counters,
)
from opencharacter.runtime.stage import AttemptLog, Job, StageResult, kept
from opencharacter.runtime.store import SHARDS, RemoteDir, Store
from opencharacter.text.chat import load_tokenizer
from opencharacter.training import packing
from opencharacter.training.adapters import (
    adapted_layers,
    autocast,
    fast_bf16,
    kernels,
    layers,
    load,
    plan_memory,
    with_adapter,
)
from opencharacter.training.packing import Example, LossDenominators, Pack

CURVES = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)
SPEEDS = ("tokens_per_s", "mfu", "memory_gb")
"""Metrics whose median over the steps is a stage's figure, not their last value."""
ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Packs differ in size; without this, twice the memory that they need is held."""
LossFn = Callable[[torch.Tensor, Pack, LossDenominators], dict[str, torch.Tensor]]
"""(log-probabilities (s,), pack, totals of the step) -> scalars, of which `loss` is minimised. Each
is the pack's share of the step's value: over the packs of a step they add up to it."""


@dataclass(frozen=True)
class Task:
    """What a worker needs to train.

    Args:
        store: where the data and the result are.
        dataset: the stage's folder.
        data: the folder of the rows.
        role: the student.
        base_adapter: adapter merged into the weights before training, or None.
        config: the stage's part of the recipe.
        seed: of the recipe.
        placement: tokens of a pass, threads, checkpoints.
        examples: (tokenizer, rows) -> what is learned.
        loss_fn: the loss.
        counters: handle of a `Counters` actor.
    """

    store: Store
    dataset: str
    data: str
    role: Role
    base_adapter: RemoteDir | None
    config: Any
    seed: int
    placement: Training
    examples: Callable[[Any, pa.Table], list[Example]]
    loss_fn: LossFn
    counters: Any

    @property
    def lora(self) -> Lora:
        return self.config.lora

    @property
    def optimizer(self) -> Optimizer:
        return self.config.optimizer


def train(
    job: Job,
    data: Job,
    examples: Callable[[Any, pa.Table], list[Example]],
    loss_fn: LossFn,
    base_adapter: RemoteDir | None = None,
) -> StageResult:
    """Train an adapter on the rows of a parent; it lands in `<dataset>/adapter`.

    Args:
        job: a stage whose section has `lora` and `optimizer`.
        data: the parent that has the rows.
        examples: see `Task`.
        loss_fn: see `Task`.
        base_adapter: adapter to merge into the student's weights first.
    """
    placement = job.placement.training
    workers = job.workers()
    counters = start_counters(job.dataset, workers.resources.gpus)
    task = Task(
        store=job.store,
        dataset=job.dataset,
        data=data.dataset,
        role=job.recipe.roles.student,
        base_adapter=base_adapter,
        config=job.config,
        seed=job.recipe.seed,
        placement=placement,
        examples=examples,
        loss_fn=loss_fn,
        counters=counters,
    )
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"task": task},
        scaling_config=ray.train.ScalingConfig(
            num_workers=placement.workers,
            use_gpu=placement.gpus > 0,
            accelerator_type=placement.accelerator,
            resources_per_worker=resources(placement),
        ),
        run_config=ray.train.RunConfig(
            name="train",  # the same name and place: a rerun resumes from the last checkpoint
            storage_path=job.store.path(job.dataset, SHARDS),
            storage_filesystem=job.store.fs,
            failure_config=ray.train.FailureConfig(max_failures=placement.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": ALLOCATOR} if placement.gpus else None,
        ),
    )
    attempts = AttemptLog(job, kept=0)
    meter = TrainingProgress(counters, attempts)
    with (
        ProgressLine(console, job.dataset, meter),
        acquire(job.dataset, [workers], job.placement.autoscaling_limit) as held,
    ):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise StageFailed(f"{job.dataset}: training failed: {cause(error)}") from error
        held.busy = active_seconds(counters)
    meter()
    counters.end.remote()
    curves = job.store.read_table(job.dataset, "curves")
    return StageResult(
        rows=kept(job.store.read_table(task.data, columns=["drop_reason"])).num_rows,
        schema=[f"{f.name}: {f.type}" for f in curves.schema],
        figures=figures(curves),
    )


def cause(error: ray.train.TrainingFailedError) -> str:
    """What ended a training, in one line: what the first worker that failed said last."""
    failures = getattr(error, "worker_failures", {})
    said = str(failures[min(failures)] if failures else error).strip()
    return said.splitlines()[-1] if said else type(error).__name__


def resources(placement: Training) -> dict[str, float]:
    """What Ray reserves for a worker."""
    return {"CPU": placement.cpus} | ({"GPU": placement.gpus} if placement.gpus else {})


def figures(curves: pa.Table) -> dict[str, float]:
    """The last value of each metric; of speeds the median."""
    values: dict[str, list[float]] = {}
    for row in curves.sort_by("step").to_pylist():
        values.setdefault(row["metric"], []).append(row["value"])
    return {
        name: statistics.median_high(of) if name in SPEEDS else of[-1]
        for name, of in values.items()
    }


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """One Ray Train worker: build, resume, train; rank 0 stores the adapter and the curves."""
    task: Task = config["task"]
    placement = task.placement
    on_gpu = placement.gpus > 0
    torch.set_num_threads(max(1, int(placement.cpus)))
    base = models.resolve(task.role.model)
    path = models.merge_into_base(base, task.base_adapter.local()) if task.base_adapter else base
    tokenizer = load_tokenizer(path, task.role)
    rows = kept(task.store.read_table(task.data)).sort_by("id")
    examples = task.examples(tokenizer, rows)
    model = load(path, task.role, on_gpu)
    models.weight_names(path, adapted_layers(model))  # refuse what could not be folded in later
    model.config._name_or_path = task.role.model
    fit = plan_memory(model, placement, max(map(packing.length, examples)))
    transformers.set_seed(task.seed)  # every worker begins with the same adapter
    model = with_adapter(model, task.lora, fit.activation_checkpointing, kernels(placement))
    rank, world = ray.train.get_context().get_world_rank(), placement.workers
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TENSORBOARD_LOGGING_DIR"] = f"{scratch}/tensorboard"
        trainer = Trainer(
            model=model,
            args=transformers.TrainingArguments(**trainer_arguments(task, scratch, on_gpu, model)),
            batches=Batches(examples, task.optimizer, task.seed, fit.tokens, rank, world),
            loss_fn=task.loss_fn,
        )
        trainer.add_callback(ray_hf.RayTrainReportCallback())
        trainer.add_callback(ProgressCallback(task.counters))
        checkpoint = ray.train.get_checkpoint()
        if checkpoint:
            with checkpoint.as_directory() as folder:
                trainer.train(resume_from_checkpoint=str(Path(folder) / "checkpoint"))
        else:
            trainer.train()
        save(task, trainer, tokenizer, Path(scratch), rank)


def trainer_arguments(task: Task, scratch: str, on_gpu: bool, model: Any) -> dict[str, Any]:
    """Arguments of the Hugging Face trainer."""
    optimizer, placement = task.optimizer, task.placement
    blocks = sorted({type(layer).__name__ for layer in layers(model)})
    loss_positions = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    return {
        "output_dir": scratch,
        "num_train_epochs": 1,  # `Batches` goes through all of them
        "per_device_train_batch_size": 1,
        "learning_rate": optimizer.learning_rate,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "weight_decay": 0.0,
        "max_grad_norm": optimizer.max_grad_norm,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": optimizer.min_lr_ratio},
        "warmup_steps": optimizer.warmup_ratio,
        "bf16": on_gpu or fast_bf16(),
        "use_cpu": not on_gpu,
        "fsdp": placement.parallel == "fsdp",
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": blocks},
        # Experts that are layers of their own may see no token of a pass; all else is always used.
        "ddp_find_unused_parameters": any(".experts." in name for name in loss_positions),
        "seed": task.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": placement.checkpoint_steps,
        "save_total_limit": 1,
        "report_to": loggers(),
        "run_name": task.dataset,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def loggers() -> list[str]:
    """TensorBoard, and Weights & Biases where the environment has its key."""
    wandb = os.environ.get("WANDB_API_KEY") and importlib.util.find_spec("wandb")
    return ["tensorboard", "wandb"] if wandb else ["tensorboard"]


class Batches(Dataset[tuple[list[Pack], LossDenominators]]):
    """Packs of one worker for each optimiser step, all epochs one after another.

    What a batch holds depends on the seed alone; each worker has as many packs of it as the others.

    Args:
        examples: what is learned.
        optimizer: batch and epochs.
        seed: of the order.
        budget: tokens of a pack.
        rank: of this worker.
        world: workers.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        optimizer: Optimizer,
        seed: int,
        budget: int,
        rank: int = 0,
        world: int = 1,
    ):
        self.examples, self.budget, self.rank, self.world = examples, budget, rank, world
        self.order: list[list[int]] = []
        for epoch in range(optimizer.epochs):
            generator = torch.Generator().manual_seed(seed + epoch)
            mixed = torch.randperm(len(examples), generator=generator).tolist()
            self.order += [
                mixed[at : at + optimizer.global_batch_size]
                for at in range(0, len(mixed), optimizer.global_batch_size)
            ]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> tuple[list[Pack], LossDenominators]:
        batch = [self.examples[i] for i in self.order[step]]
        shares = packing.share_out([packing.length(e) for e in batch], self.budget, self.world)
        mine = [
            packing.pack([batch[i] for i in share]) for share in shares[self.rank :: self.world]
        ]
        return mine, packing.loss_denominators(batch)


class Trainer(transformers.Trainer):
    """Runs the packs of a step one after another and adds up their shares of its loss.

    Args:
        batches: of this worker.
        loss_fn: see `Objective`.
        options: of the Hugging Face trainer.
    """

    def __init__(self, *, batches: Batches, loss_fn: LossFn, **options: Any):
        super().__init__(train_dataset=batches, **options)
        self.loss_fn, self.world = loss_fn, batches.world
        self.parts: tuple[list[str], Any] = ([], None)
        self.tokens = 0
        self.since = time.monotonic()
        base: Any = self.model
        frozen = sum(p.numel() for p in base.parameters() if not p.requires_grad)
        self.flops_per_token = 4 * frozen
        self.peak = matmul_peak(self.args.device, self.args.bf16)

    def get_train_dataloader(self) -> DataLoader:
        """Steps in order: `Batches` has mixed them, and shares them among the workers."""
        steps: Any = self.train_dataset
        return DataLoader(steps, batch_size=1, collate_fn=operator.itemgetter(0))

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Forward and backward of one optimiser step; returns its loss over the workers' mean."""
        from peft.helpers import disable_input_dtype_casting

        packs, loss_denominators = inputs
        model.train()
        sums: dict[str, Any] = {}
        for at, batch in enumerate(packs, start=1):
            batch = batch.to(self.args.device)
            last = at == len(packs)
            sync = nullcontext() if last else self.accelerator.no_sync(model)
            with sync, disable_input_dtype_casting(model):  # on the way back too: it may recompute
                with autocast(self.args.device):
                    values = packing.log_probs(model, batch)
                shares = self.loss_fn(values, batch, loss_denominators)
                self.accelerator.backward(shares["loss"] * self.world)  # workers are averaged
            for name, value in shares.items():
                sums[name] = sums.get(name, 0) + value.detach()
        stacked = self.accelerator.reduce(torch.stack(list(sums.values())))
        self.parts = list(sums), stacked  # read when logged: it waits for the GPU
        self.tokens += loss_denominators.tokens
        return sums["loss"] * self.world

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss, speed and memory to what is logged of a step."""
        if "loss" in logs:
            now = time.monotonic()
            rate = self.tokens / (now - self.since)
            self.tokens, self.since = 0, now
            names, values = self.parts
            parts = dict(zip(names, values.tolist(), strict=True))
            own = {name: value for name, value in parts.items() if name != "loss"}
            reached = rate * self.flops_per_token / self.world / self.peak
            logs |= own | {"tokens_per_s": rate, "mfu": reached}
            if self.args.device.type == "cuda":
                logs["memory_gb"] = torch.cuda.max_memory_reserved() / 1e9
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted here: see `mfu`."""
        return 0


def matmul_peak(device: torch.device, bf16: bool) -> float:
    """FLOP/s that this device reaches in one large matrix product, the bound of `mfu`."""
    size, times = (8192, 10) if device.type == "cuda" else (1024, 4)
    square = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best = float("inf")
    for _ in range(3):
        began = time.monotonic()
        for _ in range(times):
            _ = square @ square
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.monotonic() - began)
    return times * 2 * size**3 / best


def save(task: Task, trainer: Trainer, tokenizer: Any, scratch: Path, rank: int) -> None:
    """Store the adapter (PEFT layout, stock chat template), the curves and TensorBoard's files."""
    state = trainer.accelerator.get_state_dict(trainer.model)  # every worker takes part
    if rank:
        return
    folder = scratch / "adapter"
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # a template that says nothing yet
    task.store.upload(folder, f"{task.dataset}/adapter")
    task.store.upload(scratch / "tensorboard", f"{task.dataset}/tensorboard")
    task.store.write_table(task.dataset, curves_table(trainer.state.log_history), "curves")


def curves_table(history: list[dict[str, Any]]) -> pa.Table:
    """A trainer's log in long form: step, metric, value."""
    rows = [
        {"step": entry["step"], "metric": name, "value": float(value)}
        for entry in history
        for name, value in entry.items()
        if name != "step" and isinstance(value, int | float)
    ]
    return pa.Table.from_pylist(rows, schema=CURVES)


class ProgressCallback(transformers.TrainerCallback):
    """Tells the driver how far training is."""

    def __init__(self, counters: Any):
        self.counters = counters
        self.began = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.monotonic()
        self._set(kept=state.global_step, step=state.global_step, steps=state.max_steps, seconds=0)

    def on_step_end(self, args, state, control, **kwargs):
        self._set(step=state.global_step, seconds=time.monotonic() - self.began)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self._set(loss=logs["loss"])

    def _set(self, **numbers: float) -> None:
        if ray.train.get_context().get_world_rank() == 0:
            self.counters.set.remote(**numbers)
