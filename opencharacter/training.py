"""LoRA training on Ray Train: what DPO and SFT share.

Each worker builds its trainer (a TRL trainer with a PEFT adapter), reports checkpoints and metrics
through Ray, and resumes from the last checkpoint, after a lost worker as after a killed run.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train
import ray.train.huggingface.transformers as ray_hf
from ray.train.torch import TorchTrainer
from transformers import TrainerCallback

from opencharacter import models
from opencharacter.config import Lora, Optimizer, Role, Training, per_step
from opencharacter.engine import stop_hosts
from opencharacter.errors import StageFailed
from opencharacter.progress import Line, StepMeter, console, new_counters
from opencharacter.stage import Attempts, Job, Outcome
from opencharacter.store import PARTS, Folder, Store

CURVES = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Task:
    """What a worker needs to train.

    Args:
        store: where the data and the result are.
        dataset: the stage's folder.
        role: the student.
        folded: adapter folded into the weights before training, or None.
        section: the stage's part of the recipe.
        seed: of the recipe.
        placement: threads, micro-batch, checkpoints.
        make_trainer: builds the TRL trainer from (task, model, tokenizer, TRL arguments).
        counters: handle of a `Counters` actor.
    """

    store: Store
    dataset: str
    data: str
    role: Role
    folded: Folder | None
    section: Any
    seed: int
    placement: Training
    make_trainer: Callable[[Task, Any, Any, dict[str, Any]], Any]
    counters: Any

    @property
    def lora(self) -> Lora:
        return self.section.lora

    @property
    def optimizer(self) -> Optimizer:
        return self.section.optimizer

    def rows(self) -> list[dict[str, Any]]:
        """The training rows, those with a drop reason left out, sorted by id."""
        table = self.store.read_table(self.data).sort_by("id")
        return [row for row in table.to_pylist() if row["drop_reason"] is None]


def train(
    job: Job, data: str, make_trainer: Callable[..., Any], folded: Folder | None = None
) -> Outcome:
    """Train an adapter on the rows of a parent; it lands in `<dataset>/adapter`.

    Args:
        job: a stage whose section has `lora` and `optimizer`.
        data: name of the parent stage that has the rows.
        make_trainer: see `Task`.
        folded: adapter to fold into the student's weights first.
    """
    placement = job.placement.training
    counters = new_counters()
    task = Task(
        store=job.store,
        dataset=job.dataset,
        data=job.parent(data).dataset,
        role=job.recipe.roles.student,
        folded=folded,
        section=job.section,
        seed=job.recipe.seed,
        placement=placement,
        make_trainer=make_trainer,
        counters=counters,
    )
    resources = {"CPU": placement.cpus} | ({"GPU": placement.gpus} if placement.gpus else {})
    trainer = TorchTrainer(
        worker,
        train_loop_config={"task": task},
        scaling_config=ray.train.ScalingConfig(
            num_workers=placement.workers,
            use_gpu=placement.gpus > 0,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name="train",  # the same name and place: a rerun resumes from the last checkpoint
            storage_path=job.store.path(job.dataset, PARTS),
            storage_filesystem=job.store.fs,
            failure_config=ray.train.FailureConfig(max_failures=placement.retries),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    stop_hosts()  # training needs what the engines hold
    attempts = Attempts(job, kept=0)
    meter = StepMeter(counters, attempts)
    with Line(console, job.dataset, meter):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise StageFailed(f"{job.dataset}: training failed: {error}") from error
    meter()
    curves = job.store.read_table(job.dataset, "curves")
    return Outcome(
        rows=job.store.read_table(task.data)["drop_reason"].null_count,
        schema=[f"{f.name}: {f.type}" for f in curves.schema],
        gpus=placement.workers * placement.gpus,
        figures=last_values(curves),
    )


def last_values(curves: pa.Table) -> dict[str, float]:
    """The last value of each metric."""
    rows = curves.sort_by("step").to_pylist()
    return {row["metric"]: row["value"] for row in rows}


def worker(config: dict[str, Any]) -> None:
    """One Ray Train worker: build, resume, train; rank 0 stores the adapter and the curves."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task: Task = config["task"]
    on_gpu = task.placement.gpus > 0
    torch.set_num_threads(max(1, int(task.placement.cpus)))
    base = models.resolve(task.role.model)
    path = models.fold(base, task.folded.local()) if task.folded else base
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        trust_remote_code=task.role.trust_remote_code,
    )
    model.config._name_or_path = task.role.model
    with tempfile.TemporaryDirectory() as scratch:
        arguments = trainer_arguments(task, Path(scratch), on_gpu)
        trainer = task.make_trainer(task, model, tokenizer, arguments)
        trainer.add_callback(ray_hf.RayTrainReportCallback())
        trainer.add_callback(Told(task.counters))
        trainer = ray_hf.prepare_trainer(trainer)
        checkpoint = ray.train.get_checkpoint()
        if checkpoint:
            with checkpoint.as_directory() as folder:
                trainer.train(resume_from_checkpoint=str(Path(folder) / "checkpoint"))
        else:
            trainer.train()
        if ray.train.get_context().get_world_rank() == 0:
            save(task, trainer, tokenizer)


def fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware: more than twice as fast where it does."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def lora_config(lora: Lora) -> Any:
    """PEFT's configuration: all linear layers but the head, no dropout."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def trainer_arguments(task: Task, scratch: Path, on_gpu: bool) -> dict[str, Any]:
    """Arguments that both TRL trainers take."""
    optimizer = task.optimizer
    micro, passes = per_step(optimizer.batch, task.placement)
    return {
        "output_dir": str(scratch),
        "num_train_epochs": optimizer.epochs,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": passes,
        "learning_rate": optimizer.learning_rate,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "weight_decay": 0.0,
        "max_grad_norm": optimizer.clip,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": optimizer.final_ratio},
        "warmup_steps": optimizer.warmup,
        "bf16": on_gpu or fast_bf16(),
        "use_cpu": not on_gpu,
        "seed": task.seed,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": task.placement.checkpoint_steps,
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
    }


def save(task: Task, trainer: Any, tokenizer: Any) -> None:
    """Store the adapter (PEFT layout, stock chat template) and the curves."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (Path(scratch) / "README.md").unlink(missing_ok=True)  # a template that says nothing yet
        task.store.upload(Path(scratch), f"{task.dataset}/adapter")
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


class Told(TrainerCallback):
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
