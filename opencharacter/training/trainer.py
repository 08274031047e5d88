"""LoRA training on Ray Train, shared by DPO and SFT.

Each worker runs a Hugging Face `Trainer` around a PEFT adapter. The examples of an optimizer step
are packed (see `packing`) into microbatches of about `max_tokens_per_microbatch` tokens, which are
divided evenly among the workers. Loss and gradients are those of the whole batch, independent of
the number of microbatches and workers. Checkpoints and metrics are reported to Ray; after a lost
worker or an interrupted run, training resumes from the last checkpoint.
"""

from __future__ import annotations

import math
import operator
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train
import ray.train.huggingface.transformers as ray_hf
import torch
import transformers
from ray.train.torch import TorchTrainer
from torch.utils.data import DataLoader

from opencharacter import models
from opencharacter.config.placement import Tracking, Training
from opencharacter.config.recipe import Lora, Optimizer
from opencharacter.config.roles import Role
from opencharacter.engines.allocation import acquire
from opencharacter.errors import StageFailed, UserError
from opencharacter.runtime.attempts import AttemptLog
from opencharacter.runtime.progress import (
    ProgressLine,
    TrainingProgress,
    active_seconds,
    console,
    start_counters,
)
from opencharacter.runtime.stage import Job, StageResult, without_dropped
from opencharacter.runtime.store import SHARDS, RemoteDir, Store
from opencharacter.text.templates import load_tokenizer
from opencharacter.training import packing, trackers
from opencharacter.training.adapters import (
    adapted_layers,
    add_lora,
    autocast,
    decoder_blocks,
    load,
    plan_memory,
    select_kernels,
    smallest_plan,
)
from opencharacter.training.architectures import report_packing
from opencharacter.training.batches import PackedBatches, held_out_batch, split_held_out
from opencharacter.training.callbacks import HeldOutCallback, ProgressCallback
from opencharacter.training.frozen import fuse_lora
from opencharacter.training.packing import Example, LossDenominators, Pack
from opencharacter.training.probe import prepare

CURVES = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)
PERFORMANCE_METRICS = ("tokens_per_s", "mfu", "memory_gb")
"""Metrics that the manifest records as the median over all steps instead of the last value."""
ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Packs differ in size; without this setting the allocator reserves twice the memory in use."""
MakeExamples = Callable[[Any, pa.Table], list[Example]]
"""Takes a tokenizer and a table of rows and returns the tokenized training examples."""
LossFn = Callable[[torch.Tensor, Pack, LossDenominators], dict[str, torch.Tensor]]
"""Takes the log-probabilities (s,) of a pack, the pack and the denominators of the step. Returns
scalars by name, of which `loss` is minimized. Every scalar is the pack's share: the scalars of all
packs of a step add up to the value of the step."""


@dataclass(frozen=True)
class TrainingTask:
    """Everything that a training worker needs.

    Args:
        store: storage of the rows and of the result.
        dataset: dataset that the adapter and the curves are written to.
        data: dataset with the rows to train on.
        role: the student.
        frozen_weights: precision of the weights that are not trained, `bf16` or `fp8`.
        base_adapter: adapter to merge into the student's weights before training, or None.
        config: the stage's section of the recipe, with `lora` and `optimizer`.
        seed: the recipe's seed.
        placement: the training placement.
        tracking: where the curves are logged.
        make_examples: tokenizes the rows.
        loss_fn: the loss.
        counters: handle of a `ProgressCounters` actor.
    """

    store: Store
    dataset: str
    data: str
    role: Role
    frozen_weights: str
    base_adapter: RemoteDir | None
    config: Any
    seed: int
    placement: Training
    tracking: Tracking
    make_examples: MakeExamples
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
    make_examples: MakeExamples,
    loss_fn: LossFn,
    base_adapter: RemoteDir | None = None,
) -> StageResult:
    """Train an adapter on the rows of a parent and store it as `<dataset>/adapter`.

    Args:
        job: the training job, whose config has `lora` and `optimizer`.
        data: the parent job that wrote the rows.
        make_examples: tokenizes the rows.
        loss_fn: the loss.
        base_adapter: adapter to merge into the student's weights before training, or None.

    Returns:
        The result; its figures are the final metrics, and whether packs were processed in one
        forward pass.

    Raises:
        StageFailed: if the workers failed more often than the placement allows.
    """
    workers = job.workers()
    counters = start_counters(job.dataset, workers.resources.gpus)
    task = TrainingTask(
        store=job.store,
        dataset=job.dataset,
        data=data.dataset,
        role=job.recipe.roles.student,
        frozen_weights=job.recipe.distillation.reference.frozen_weights,
        base_adapter=base_adapter,
        config=job.config,
        seed=job.recipe.seed,
        placement=job.placement.training,
        tracking=job.placement.tracking,
        make_examples=make_examples,
        loss_fn=loss_fn,
        counters=counters,
    )
    trainer = torch_trainer(task)
    progress = TrainingProgress(counters, AttemptLog(job, kept=0))
    with (
        ProgressLine(console, job.dataset, progress),
        acquire(job.dataset, [workers], job.placement.autoscaling_resources) as allocation,
    ):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise StageFailed(f"{job.dataset}: training failed: {error_message(error)}") from error
        allocation.work_seconds = active_seconds(counters)
    progress()
    packed = report_packing(job.dataset, ray.get(counters.read.remote()))
    counters.end.remote()
    curves = job.store.read_table(job.dataset, "curves")
    rows, share = without_dropped(job.store.read_table(task.data)), held_out_share(job.config)
    trained, held_out = split_held_out(rows, share)
    held_out_rows = {"held_out_rows": len(held_out)} if share else {}
    return StageResult(
        rows=len(trained),
        schema=[f"{f.name}: {f.type}" for f in curves.schema],
        figures=summarize_curves(curves) | packed | held_out_rows,
    )


def held_out_share(config: Any) -> float:
    """Return the share of rows that a stage's section of the recipe holds out."""
    return getattr(config, "held_out", 0.0)


def torch_trainer(task: TrainingTask) -> TorchTrainer:
    """Create the Ray trainer that runs a task on the workers of its placement."""
    placement, store = task.placement, task.store
    return TorchTrainer(
        # Ray's controller would read the task from `train_loop_config`, and import this module and
        # transformers before it starts the workers.
        partial(train_loop_per_worker, task),
        scaling_config=ray.train.ScalingConfig(
            num_workers=placement.workers,
            use_gpu=placement.gpus > 0,
            accelerator_type=placement.accelerator,
            resources_per_worker=worker_resources(placement),
        ),
        run_config=ray.train.RunConfig(
            name="train",  # a fixed name and path let a rerun resume from the last checkpoint
            storage_path=store.path(task.dataset, SHARDS),
            storage_filesystem=store.fs,
            failure_config=ray.train.FailureConfig(max_failures=placement.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": ALLOCATOR} if placement.gpus else None,
        ),
    )


def error_message(error: ray.train.TrainingFailedError) -> str:
    """Return the last line of the error of the first worker that failed."""
    failures = getattr(error, "worker_failures", {})
    text = str(failures[min(failures)] if failures else error).strip()
    return text.splitlines()[-1] if text else type(error).__name__


def worker_resources(placement: Training) -> dict[str, float]:
    """Return the Ray resources of one worker."""
    return {"CPU": placement.cpus} | ({"GPU": placement.gpus} if placement.gpus else {})


def summarize_curves(curves: pa.Table) -> dict[str, float]:
    """Return the last value of each metric, and the median of the performance metrics."""
    values: dict[str, list[float]] = {}
    for row in curves.sort_by("step").to_pylist():
        values.setdefault(row["metric"], []).append(row["value"])
    return {
        name: statistics.median_high(series) if name in PERFORMANCE_METRICS else series[-1]
        for name, series in values.items()
    }


def train_loop_per_worker(task: TrainingTask) -> None:
    """Train on one Ray Train worker; the worker of rank 0 stores the adapter and the curves."""
    placement = task.placement
    on_gpu = placement.gpus > 0
    torch.set_num_threads(max(1, int(placement.cpus)))
    base = models.resolve_role(task.role)
    path = models.merge_into_base(base, task.base_adapter.local()) if task.base_adapter else base
    tokenizer = load_tokenizer(path, task.role)
    rows = without_dropped(task.store.read_table(task.data)).sort_by("id")
    trained, held_out = split_held_out(rows, held_out_share(task.config))
    examples = task.make_examples(tokenizer, trained)
    unseen = task.make_examples(tokenizer, held_out) if len(held_out) else []
    model = load(path, task.role, on_gpu)
    models.weight_names(path, adapted_layers(model))  # fail now if a later merge would fail
    model.config._name_or_path = task.role.model
    longest = max(map(packing.num_tokens, [*examples, *unseen]))
    memory = smallest_plan(plan_memory(model, placement, longest), "cuda" if on_gpu else "cpu")
    packed = verify_packing(model, placement)
    transformers.set_seed(task.seed)  # all workers initialize the same adapter
    model = add_lora(model, task.lora, memory.activation_checkpointing, select_kernels(placement))
    rank = ray.train.get_context().get_world_rank()
    batches = PackedBatches(
        examples, task.optimizer, task.seed, memory.max_tokens, rank, placement.workers
    )
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= trackers.environment(task.tracking, f"{scratch}/tensorboard")
        trainer = PackedTrainer(
            model=model,
            args=transformers.TrainingArguments(
                **trainer_arguments(task, scratch, on_gpu, model),
                **trackers.arguments(task.tracking, task.dataset),
            ),
            batches=batches,
            loss_fn=task.loss_fn,
            held_out=held_out_batch(unseen, memory.max_tokens, rank, placement.workers),
        )
        fuse_frozen(trainer.model, task)
        trainer.add_callback(ray_hf.RayTrainReportCallback())
        trainer.add_callback(ProgressCallback(task.counters, packed))
        checkpoint = ray.train.get_checkpoint()
        if checkpoint:
            with checkpoint.as_directory() as folder:
                trainer.train(resume_from_checkpoint=str(Path(folder) / "checkpoint"))
        else:
            trainer.train()
        save(task, trainer, tokenizer, Path(scratch), rank)


def verify_packing(model: Any, placement: Training) -> bool:
    """Move a model to its device and choose how it processes packs; see `probe.prepare`.

    A model that will be sharded does not fit on one GPU, so it is verified on the CPU.

    Returns:
        Whether packs are processed in one forward pass.

    Raises:
        UserError: if the log-probabilities would be wrong.
    """
    sharded = placement.strategy == "fsdp"
    if placement.gpus and not sharded:
        model.to("cuda")
    packed = prepare(model)
    if not packed and sharded:
        raise UserError(
            f"{model.config.model_type}: its sequences are processed one by one, which does not "
            "work with strategy: fsdp; set strategy: ddp"
        )
    return packed


def fuse_frozen(model: Any, task: TrainingTask) -> None:
    """Run the LoRA layers of a model that is on its device with fused products.

    They need whole weights, so sharded models keep PEFT's layers, and so do compiled blocks, which
    `torch.compile` fuses itself. On a CPU that multiplies bf16, the frozen weights are kept in it,
    because autocast would convert them for every product.

    Raises:
        UserError: if FP8 weights are asked for where fused products are not used.
    """
    placement, fp8 = task.placement, task.frozen_weights == "fp8"
    kernels = select_kernels(placement)
    if placement.strategy == "fsdp" or kernels == "compiled":
        if fp8:
            raise UserError(
                "frozen_weights: fp8 does not work with strategy: fsdp or kernels: compiled; "
                "change the placement or set frozen_weights: bf16"
            )
    elif fp8 or kernels == "liger":
        fuse_lora(model, fp8)
    elif placement.kernels is None and not placement.gpus:
        fuse_lora(model, keep_in=torch.bfloat16 if models.fast_bf16() else None)


def trainer_arguments(task: TrainingTask, scratch: str, on_gpu: bool, model: Any) -> dict[str, Any]:
    """Return the keyword arguments of `transformers.TrainingArguments`."""
    optimizer, placement = task.optimizer, task.placement
    blocks = sorted({type(block).__name__ for block in decoder_blocks(model)})
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {
        "output_dir": scratch,
        "num_train_epochs": 1,  # `PackedBatches` contains the steps of all epochs
        "per_device_train_batch_size": 1,
        "learning_rate": optimizer.learning_rate,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "weight_decay": 0.0,
        "max_grad_norm": optimizer.max_grad_norm,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": optimizer.min_lr_ratio},
        "warmup_steps": optimizer.warmup_ratio,
        "bf16": on_gpu or models.fast_bf16(),
        "use_cpu": not on_gpu,
        "fsdp": placement.strategy == "fsdp",
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": blocks},
        # Experts that are separate layers may receive no token of a microbatch; all other
        # parameters are used in every one.
        "ddp_find_unused_parameters": any(".experts." in name for name in trainable),
        "seed": task.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": placement.checkpoint_steps,
        "save_total_limit": 1,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


class PackedTrainer(transformers.Trainer):
    """A Hugging Face trainer that processes the packs of a step one by one and sums their losses.

    Args:
        batches: the packs of this worker.
        loss_fn: the loss, see `LossFn`.
        held_out: this worker's packs of the held-out examples and their denominators, or None.
        options: keyword arguments of `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        batches: PackedBatches,
        loss_fn: LossFn,
        held_out: tuple[list[Pack], LossDenominators] | None = None,
        **options: Any,
    ):
        super().__init__(train_dataset=batches, **options)
        self.held_out = held_out
        if held_out:
            self.add_callback(HeldOutCallback(self))
        self.loss_fn, self.world_size = loss_fn, batches.world_size
        self.step_metrics: tuple[list[str], Any] = ([], None)
        self.tokens_since_log = 0
        self.last_log = time.monotonic()
        model: Any = self.model
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        self.flops_per_token = 4 * frozen
        self.peak_flops = matmul_peak_flops(self.args.device, self.args.bf16)

    def get_train_dataloader(self) -> DataLoader:
        """Return the steps in order; `PackedBatches` has shuffled and divided them already."""
        steps: Any = self.train_dataset
        return DataLoader(steps, batch_size=1, collate_fn=operator.itemgetter(0))

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Run the forward and backward passes of one optimizer step.

        Args:
            model: the wrapped model.
            inputs: this worker's packs and the denominators of the step.
            num_items_in_batch: unused; the denominators replace it.

        Returns:
            This worker's share of the loss times the number of workers, which the trainer averages.
        """
        from peft.helpers import disable_input_dtype_casting

        packs, denominators = inputs
        model.train()
        sums: dict[str, Any] = {}
        for number, batch in enumerate(packs, start=1):
            batch = batch.to(self.args.device)
            is_last = number == len(packs)
            sync = nullcontext() if is_last else self.accelerator.no_sync(model)
            # The backward pass is included because it may recompute activations.
            with sync, disable_input_dtype_casting(model):
                with autocast(self.args.device):
                    log_probs = packing.log_probs(model, batch)
                metrics = self.loss_fn(log_probs, batch, denominators)
                # Gradients are averaged over the workers, and the sum is needed.
                self.accelerator.backward(metrics["loss"] * self.world_size)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0) + value.detach()
        totals = self.accelerator.reduce(torch.stack(list(sums.values())))
        self.step_metrics = list(sums), totals  # read only when logged: reading waits for the GPU
        self.tokens_since_log += denominators.tokens
        return sums["loss"] * self.world_size

    def measure_held_out(self) -> None:
        """Log the metrics of the loss on the held-out examples, as `eval_` and their names."""
        assert self.held_out is not None
        packs, denominators = self.held_out
        model: Any = self.model_wrapped
        model.eval()
        sums: dict[str, Any] = {}
        with torch.no_grad():
            for batch in packs:
                batch = batch.to(self.args.device)
                with autocast(self.args.device):
                    log_probs = packing.log_probs(model, batch)
                for name, value in self.loss_fn(log_probs, batch, denominators).items():
                    sums[name] = sums.get(name, 0) + value
        totals: Any = self.accelerator.reduce(torch.stack(list(sums.values())))
        self.log({f"eval_{n}": v for n, v in zip(sums, totals.tolist(), strict=True)})
        self.last_log = time.monotonic()  # the speed of training leaves out this time

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the loss, the speed and the memory to the logs of a step.

        Raises:
            StageFailed: if the loss or the norm of the gradient is not finite.
        """
        if "loss" in logs:
            now = time.monotonic()
            speed = self.tokens_since_log / (now - self.last_log)
            self.tokens_since_log, self.last_log = 0, now
            names, totals = self.step_metrics
            metrics = dict(zip(names, totals.tolist(), strict=True))
            check_finite(metrics["loss"], logs.get("grad_norm", 0.0), self.state.global_step)
            logs |= {name: value for name, value in metrics.items() if name != "loss"}
            mfu = speed * self.flops_per_token / self.world_size / self.peak_flops
            logs |= {"tokens_per_s": speed, "mfu": mfu}
            if self.args.device.type == "cuda":
                logs["memory_gb"] = torch.cuda.max_memory_reserved() / 1e9
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: the metric `mfu` replaces the trainer's own count."""
        return 0


def check_finite(loss: float, grad_norm: float, step: int) -> None:
    """Raise StageFailed if training has diverged; its adapter would contain nan from here on."""
    if not math.isfinite(loss + grad_norm):
        raise StageFailed(
            f"training diverged at step {step}: loss {loss:g}, norm of the gradient {grad_norm:g}; "
            "lower optimizer.learning_rate, or correct the data"
        )


def matmul_peak_flops(device: torch.device, bf16: bool) -> float:
    """Measure the FLOP/s of one large matrix product on a device, the reference of `mfu`."""
    size, repeats = (8192, 10) if device.type == "cuda" else (1024, 4)
    square = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best = float("inf")
    for _ in range(3):
        start = time.monotonic()
        for _ in range(repeats):
            _ = square @ square
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.monotonic() - start)
    return repeats * 2 * size**3 / best


def save(
    task: TrainingTask, trainer: PackedTrainer, tokenizer: Any, scratch: Path, rank: int
) -> None:
    """Store the adapter in PEFT's format, the tokenizer, the curves and the TensorBoard events."""
    state = trainer.accelerator.get_state_dict(trainer.model)  # a collective operation
    if rank:
        return
    folder = scratch / "adapter"
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card is an empty template
    task.store.upload(folder, f"{task.dataset}/adapter")
    if (scratch / "tensorboard").exists():
        task.store.upload(scratch / "tensorboard", f"{task.dataset}/tensorboard")
    task.store.write_table(task.dataset, curves_table(trainer.state.log_history), "curves")


def curves_table(history: list[dict[str, Any]]) -> pa.Table:
    """Convert a trainer's log history to a long table of step, metric and value."""
    rows = [
        {"step": entry["step"], "metric": name, "value": float(value)}
        for entry in history
        for name, value in entry.items()
        if name != "step" and isinstance(value, int | float)
    ]
    return pa.Table.from_pylist(rows, schema=CURVES)
