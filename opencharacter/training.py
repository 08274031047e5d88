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
from typing import Any, NamedTuple

import pyarrow as pa
import ray
import ray.train
import ray.train.huggingface.transformers as ray_hf
import torch
import transformers
from ray.train.torch import TorchTrainer
from torch.utils.data import DataLoader, Dataset

from opencharacter import models, packing
from opencharacter.chat import load_tokenizer
from opencharacter.config import Lora, Optimizer, Role, Training
from opencharacter.engine import hold
from opencharacter.errors import StageFailed
from opencharacter.packing import Example, Pack, Totals
from opencharacter.progress import Line, StepMeter, console, new_counters, worked
from opencharacter.stage import Attempts, Job, Outcome, kept
from opencharacter.store import PARTS, Folder, Store

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
CPU_TOKENS = 1024
GPU_TOKENS = 16384
"""Tokens of a pass at most, where the placement does not say: more is not faster."""
MEMORY_SHARE = 0.8
"""Of the free memory that activations may take."""

Objective = Callable[[torch.Tensor, Pack, Totals], dict[str, torch.Tensor]]
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
        folded: adapter folded into the weights before training, or None.
        section: the stage's part of the recipe.
        seed: of the recipe.
        placement: tokens of a pass, threads, checkpoints.
        examples: (tokenizer, rows) -> what is learned.
        objective: the loss.
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
    examples: Callable[[Any, pa.Table], list[Example]]
    objective: Objective
    counters: Any

    @property
    def lora(self) -> Lora:
        return self.section.lora

    @property
    def optimizer(self) -> Optimizer:
        return self.section.optimizer


# ---------------------------------------------------------------------------------- on the driver


def train(
    job: Job,
    data: Job,
    examples: Callable[[Any, pa.Table], list[Example]],
    objective: Objective,
    folded: Folder | None = None,
) -> Outcome:
    """Train an adapter on the rows of a parent; it lands in `<dataset>/adapter`.

    Args:
        job: a stage whose section has `lora` and `optimizer`.
        data: the parent that has the rows.
        examples: see `Task`.
        objective: see `Task`.
        folded: adapter to fold into the student's weights first.
    """
    placement = job.placement.training
    workers = job.workers()
    counters = new_counters(job.dataset, workers.room.gpus)
    task = Task(
        store=job.store,
        dataset=job.dataset,
        data=data.dataset,
        role=job.recipe.roles.student,
        folded=folded,
        section=job.section,
        seed=job.recipe.seed,
        placement=placement,
        examples=examples,
        objective=objective,
        counters=counters,
    )
    trainer = TorchTrainer(
        worker,
        train_loop_config={"task": task},
        scaling_config=ray.train.ScalingConfig(
            num_workers=placement.workers,
            use_gpu=placement.gpus > 0,
            accelerator_type=placement.accelerator,
            resources_per_worker=resources(placement),
        ),
        run_config=ray.train.RunConfig(
            name="train",  # the same name and place: a rerun resumes from the last checkpoint
            storage_path=job.store.path(job.dataset, PARTS),
            storage_filesystem=job.store.fs,
            failure_config=ray.train.FailureConfig(max_failures=placement.retries),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": ALLOCATOR} if placement.gpus else None,
        ),
    )
    attempts = Attempts(job, kept=0)
    meter = StepMeter(counters, attempts)
    with (
        Line(console, job.dataset, meter),
        hold(job.dataset, [workers], job.placement.growth) as held,
    ):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise StageFailed(f"{job.dataset}: training failed: {cause(error)}") from error
        held.busy = worked(counters)
    meter()
    counters.end.remote()
    curves = job.store.read_table(job.dataset, "curves")
    return Outcome(
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


# ------------------------------------------------------------------------------------- on a worker


def worker(config: dict[str, Any]) -> None:
    """One Ray Train worker: build, resume, train; rank 0 stores the adapter and the curves."""
    task: Task = config["task"]
    placement = task.placement
    on_gpu = placement.gpus > 0
    torch.set_num_threads(max(1, int(placement.cpus)))
    base = models.resolve(task.role.model)
    path = models.fold(base, task.folded.local()) if task.folded else base
    tokenizer = load_tokenizer(path, task.role)
    rows = kept(task.store.read_table(task.data)).sort_by("id")
    examples = task.examples(tokenizer, rows)
    model = load(path, task.role, on_gpu)
    models.weight_names(path, adapted_layers(model))  # refuse what could not be folded in later
    model.config._name_or_path = task.role.model
    fit = fitting(model, placement, max(map(packing.length, examples)))
    transformers.set_seed(task.seed)  # every worker begins with the same adapter
    model = with_adapter(model, task.lora, fit.recompute, kernels(placement))
    rank, world = ray.train.get_context().get_world_rank(), placement.workers
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TENSORBOARD_LOGGING_DIR"] = f"{scratch}/tensorboard"
        trainer = Trainer(
            model=model,
            args=transformers.TrainingArguments(**trainer_arguments(task, scratch, on_gpu, model)),
            batches=Batches(examples, task.optimizer, task.seed, fit.tokens, rank, world),
            objective=task.objective,
        )
        trainer.add_callback(ray_hf.RayTrainReportCallback())
        trainer.add_callback(Told(task.counters))
        checkpoint = ray.train.get_checkpoint()
        if checkpoint:
            with checkpoint.as_directory() as folder:
                trainer.train(resume_from_checkpoint=str(Path(folder) / "checkpoint"))
        else:
            trainer.train()
        save(task, trainer, tokenizer, Path(scratch), rank)


def load(path: Path, role: Role, on_gpu: bool) -> Any:
    """The student's weights with attention over packs and a head that never keeps logits."""
    from trl.trainer import add_fused_lm_head

    packing.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        attn_implementation=packing.ATTENTION,
        trust_remote_code=role.trust_remote_code,
    )
    add_fused_lm_head(model)
    return model


def layers(model: Any) -> list[torch.nn.Module]:
    """The model's repeated blocks."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def kernels(placement: Training) -> str:
    """What the placement says of kernels, or what this machine has."""
    liger = placement.gpus > 0 and importlib.util.find_spec("liger_kernel")
    return placement.kernels or ("liger" if liger else "plain")


def adapted_layers(model: Any) -> list[str]:
    """Names of the linear layers of the decoder, neither the head nor those of a vision tower."""
    inside = {*model.get_decoder().modules()} - {model.get_output_embeddings()}
    return [
        name
        for name, module in model.named_modules()
        if module in inside and isinstance(module, torch.nn.Linear)
    ]


def with_adapter(model: Any, lora: Lora, recompute: bool = False, kernels: str = "plain") -> Any:
    """The model with a new LoRA adapter on the `adapted_layers`, without dropout.

    Args:
        model: as loaded.
        lora: rank and alpha.
        recompute: keep only the inputs of each block, and compute it again on the way back.
        kernels: `liger`, `compiled`, or `plain`.
    """
    from peft import LoraConfig, get_peft_model

    # Paper: the layers that its code names for Gemma are not all there.
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=0.0,
            target_modules=adapted_layers(model),
            task_type="CAUSAL_LM",
        ),
    )
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if kernels == "liger":
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})
    for layer in layers(model) if kernels == "compiled" else ():
        layer.compile(dynamic=True)
    return adapted


class Fit(NamedTuple):
    """How a pass fits into memory."""

    tokens: int
    """Of a pass."""
    recompute: bool
    """Whether activations are computed again on the way back."""


def fitting(model: Any, placement: Training, longest: int) -> Fit:
    """Tokens of a pass, and whether its activations must be recomputed for that.

    Args:
        model: on the host, before it moves to its device.
        placement: what it leaves open is derived from the free memory of the GPU.
        longest: tokens of the longest example, which must be in one pass.
    """
    per_token = activation_bytes(model.config.get_text_config())
    if placement.gpus:
        free, _ = torch.cuda.mem_get_info()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        share = placement.workers if placement.parallel == "fsdp" else 1
        room = int(MEMORY_SHARE * (free - weights / share) / per_token)
        most = GPU_TOKENS
    else:
        room, most = CPU_TOKENS, CPU_TOKENS
    wanted = placement.tokens_per_pass or max(longest, min(room, most))
    recompute = placement.gpus > 0 and wanted > room
    if placement.recompute is not None:
        recompute = placement.recompute
    return Fit(wanted, recompute)


def activation_bytes(config: Any) -> int:
    """Bytes that a token leaves for the way back: at most 15 widths and 4 inner ones a block.

    Args:
        config: of the text model.
    """
    return 2 * config.num_hidden_layers * (15 * config.hidden_size + 4 * config.intermediate_size)


def fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware: more than twice as fast where it does."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device) -> torch.autocast:
    """The precision of training, for a pass outside of it."""
    on = device.type == "cuda" or fast_bf16()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=on)


def trainer_arguments(task: Task, scratch: str, on_gpu: bool, model: Any) -> dict[str, Any]:
    """Arguments of the Hugging Face trainer."""
    optimizer, placement = task.optimizer, task.placement
    blocks = sorted({type(layer).__name__ for layer in layers(model)})
    learned = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {
        "output_dir": scratch,
        "num_train_epochs": 1,  # `Batches` goes through all of them
        "per_device_train_batch_size": 1,
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
        "fsdp": placement.parallel == "fsdp",
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": blocks},
        # Experts that are layers of their own may see no token of a pass; all else is always used.
        "ddp_find_unused_parameters": any(".experts." in name for name in learned),
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


class Batches(Dataset[tuple[list[Pack], Totals]]):
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
                mixed[at : at + optimizer.batch] for at in range(0, len(mixed), optimizer.batch)
            ]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> tuple[list[Pack], Totals]:
        batch = [self.examples[i] for i in self.order[step]]
        shares = packing.share_out([packing.length(e) for e in batch], self.budget, self.world)
        mine = [
            packing.pack([batch[i] for i in share]) for share in shares[self.rank :: self.world]
        ]
        return mine, packing.totals(batch)


class Trainer(transformers.Trainer):
    """Runs the packs of a step one after another and adds up their shares of its loss.

    Args:
        batches: of this worker.
        objective: see `Objective`.
        options: of the Hugging Face trainer.
    """

    def __init__(self, *, batches: Batches, objective: Objective, **options: Any):
        super().__init__(train_dataset=batches, **options)
        self.objective, self.world = objective, batches.world
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

        packs, totals = inputs
        model.train()
        sums: dict[str, Any] = {}
        for at, batch in enumerate(packs, start=1):
            batch = batch.to(self.args.device)
            last = at == len(packs)
            sync = nullcontext() if last else self.accelerator.no_sync(model)
            with sync, disable_input_dtype_casting(model):  # on the way back too: it may recompute
                with autocast(self.args.device):
                    values = packing.log_probs(model, batch)
                shares = self.objective(values, batch, totals)
                self.accelerator.backward(shares["loss"] * self.world)  # workers are averaged
            for name, value in shares.items():
                sums[name] = sums.get(name, 0) + value.detach()
        stacked = self.accelerator.reduce(torch.stack(list(sums.values())))
        self.parts = list(sums), stacked  # read when logged: it waits for the GPU
        self.tokens += totals.tokens
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


class Told(transformers.TrainerCallback):
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
