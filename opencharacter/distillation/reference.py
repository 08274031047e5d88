"""Stage distillation/reference: tokenized pairs with the log-probabilities of the reference model.

The reference model is the student before training. Computing the log-probabilities of all answer
tokens once in advance means that DPO needs neither a second model nor a second forward pass.

Reads: distillation/pairs. Writes: id, token ids and log-probabilities of both sides.
Run: opencharacter run RECIPE --constitution NAME --only distillation/reference
"""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data.read_api import from_blocks

from opencharacter import models
from opencharacter.config.placement import Training
from opencharacter.config.roles import Role
from opencharacter.runtime import cluster
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.chat import assistant, user
from opencharacter.text.templates import encode_answer, load_tokenizer
from opencharacter.training.architectures import report_packing, student_notes
from opencharacter.training.packing import Example, Tokens

SIDES = ("chosen", "rejected")
TOKEN_IDS = pa.list_(pa.int32())
LOG_PROBS = pa.list_(pa.float32())
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt_ids", TOKEN_IDS, nullable=False),
        *[pa.field(f"{side}_ids", TOKEN_IDS, nullable=False) for side in SIDES],
        *[pa.field(f"{side}_logprobs", LOG_PROBS, nullable=False) for side in SIDES],
        pa.field("drop_reason", pa.string()),
    ]
)
ID_COLUMNS = ("prompt_ids", "chosen_ids", "prompt_ids", "rejected_ids")
"""The columns that together hold both sequences of a pair."""
PAIRS_PER_BATCH = 64
"""Pairs that are packed together."""
MAX_BLOCK_PAIRS = 10_000
"""Pairs that an actor gets at most in one block, which bounds its memory."""


def tokenize(tokenizer: Any, row: dict[str, Any]) -> dict[str, list[int]]:
    """Tokenize the prompt and both answers of a pair, each with its end-of-turn token."""
    ids = {}
    prompt: list[int] = []
    for side in SIDES:
        prompt, answer = encode_answer(tokenizer, [user(row["prompt"]), assistant(row[side])])
        ids[f"{side}_ids"] = answer
    return {"prompt_ids": prompt, **ids}


def pair_example(row: dict[str, Any]) -> Example:
    """Return the chosen and the rejected conversation of a row of `SCHEMA`."""
    prompt = list(row["prompt_ids"])
    return [
        Tokens(
            ids=prompt + list(row[f"{side}_ids"]),
            loss_positions=list(range(len(prompt), len(prompt) + len(row[f"{side}_ids"]))),
            reference=row.get(f"{side}_logprobs"),
        )
        for side in SIDES
    ]


class ReferenceModel:
    """A Ray Data actor that adds token ids and log-probabilities to pairs.

    Args:
        role: the student.
        placement: the training placement.
        frozen_weights: precision of the weights, `bf16` or `fp8`.
        gpus: GPUs of this actor.
        counters: handle of a `ProgressCounters` actor, which records when the actor is active.
    """

    def __init__(
        self, role: Role, placement: Training, frozen_weights: str, gpus: float, counters: Any
    ):
        import torch

        from opencharacter.training.adapters import load, plan_memory

        torch.set_num_threads(max(1, int(placement.cpus)))
        self.counters = counters
        path = models.resolve_role(role)
        self.tokenizer = load_tokenizer(path, role)
        self.model: Any = load(path, role, gpus > 0)
        # Without a backward pass, whatever fits in training fits here; no example sets a minimum.
        self.max_tokens = plan_memory(self.model, placement, longest=0).max_tokens
        if gpus > 1:
            from accelerate import dispatch_model, infer_auto_device_map

            blocks = self.model._no_split_modules
            self.model = dispatch_model(
                self.model, infer_auto_device_map(self.model, no_split_module_classes=blocks)
            )
        elif gpus:
            self.model = self.model.to("cuda")
        self.packed: bool | None = None
        self.frozen_weights = frozen_weights

    def prepare(self) -> None:
        """Verify the model, and quantize its weights.

        Called with the first batch, because Ray Data hides the type of errors in `__init__`.
        """
        from opencharacter.training.adapters import adapted_layers
        from opencharacter.training.frozen import quantize_linear
        from opencharacter.training.probe import prepare

        self.packed = prepare(self.model)
        if self.frozen_weights == "fp8":
            quantize_linear(self.model, adapted_layers(self.model))

    def __call__(self, table: pa.Table) -> pa.Table:
        """Convert rows of distillation/pairs to rows of `SCHEMA`."""
        if self.packed is None:
            self.prepare()
        self.counters.set.remote(packed=self.packed)
        tables = []
        for start in range(0, len(table), PAIRS_PER_BATCH):
            rows = [
                {"id": row["id"], "drop_reason": None, **tokenize(self.tokenizer, row)}
                for row in table.slice(start, PAIRS_PER_BATCH).to_pylist()
            ]
            pairs = [pair_example(row) for row in rows]
            log_probs = pair_log_probs(self.model, pairs, self.max_tokens)
            for row, sides in zip(rows, log_probs, strict=True):
                row |= {f"{side}_logprobs": v for side, v in zip(SIDES, sides, strict=True)}
            self.counters.set.remote()
            tables.append(pa.Table.from_pylist(rows, schema=SCHEMA))
        return pa.concat_tables(tables)


def pair_log_probs(model: Any, pairs: list[Example], max_tokens: int) -> list[list[list[float]]]:
    """Compute the log-probabilities of the answer tokens of pairs, in nats.

    Args:
        model: a model from `adapters.load`.
        pairs: tokenized pairs.
        max_tokens: maximum tokens of a microbatch.

    Returns:
        For each pair, the log-probabilities of the chosen and of the rejected answer.
    """
    import torch

    from opencharacter.training import packing
    from opencharacter.training.adapters import autocast

    log_probs: list[list[list[float]]] = [[] for _ in pairs]
    lengths = [packing.num_tokens(pair) for pair in pairs]
    for indices in packing.assign_to_packs(lengths, max_tokens):
        batch = packing.pack([pairs[i] for i in indices]).to(model.device)
        with torch.inference_mode(), autocast(model.device):
            values = packing.log_probs(model, batch).cpu()
        sizes = [len(tokens.loss_positions) for i in indices for tokens in pairs[i]]
        answers = [answer.tolist() for answer in values.split(sizes)]
        for number, i in enumerate(indices):
            log_probs[i] = answers[2 * number : 2 * number + 2]
    return log_probs


def actor_layout(placement: Training, max_gpus_per_node: float) -> tuple[int, float]:
    """Return the number of actors and the GPUs of each.

    Args:
        placement: the training placement.
        max_gpus_per_node: GPUs of the largest node.
    """
    if placement.strategy == "fsdp":  # the model needs several GPUs; an actor runs on one node
        return 1, min(placement.gpus * placement.workers, max_gpus_per_node)
    return placement.workers, placement.gpus


def reference_rows(job: Job, pairs: pa.Table, counters: Any) -> ray.data.Dataset:
    """Return the dataset that computes rows of `SCHEMA` for all pairs when it is iterated over.

    Each actor gets its pairs in one block, or in a few large ones. With a block for each batch, an
    H200 sometimes waited about six seconds between two batches.
    """
    placement = job.placement.training
    count, gpus = actor_layout(placement, cluster.max_gpus_per_node(job.placement))
    size = min(MAX_BLOCK_PAIRS, max(1, math.ceil(len(pairs) / count)))
    blocks = [pairs.slice(start, size) for start in range(0, len(pairs), size)]
    return from_blocks(blocks).map_batches(
        ReferenceModel,
        fn_constructor_args=(
            job.recipe.roles.student,
            placement,
            job.config.frozen_weights,
            gpus,
            counters,
        ),
        batch_size=size,  # Ray Data refuses None with a GPU
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=count),
        num_cpus=placement.cpus,
        num_gpus=gpus,
        accelerator_type=placement.accelerator,
    )


def compute_reference(job: Job, pairs: pa.Table, counters: Any) -> pa.Table:
    """Return the rows of `SCHEMA` for all pairs, sorted by id."""
    dataset = reference_rows(job, pairs, counters)
    tables = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    return pa.concat_tables([table.cast(SCHEMA) for table in tables]).sort_by("id")


def notes(job: Job) -> list[str]:
    return student_notes(job.recipe.roles.student)


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(job.workers(),)]


def estimate(job: Job) -> Estimate:
    from opencharacter.distillation.teacher import expected_tokens

    pairs, config = job.parent("distillation/pairs"), job.recipe.distillation
    rows = pairs.stage.module.estimate(pairs).rows
    answers = expected_tokens(config.teacher.sampling) + expected_tokens(config.student.sampling)
    return Estimate(rows, read=rows * min(80 + answers, 2 * config.pairs.max_tokens))


def build(job: Job) -> StageResult:
    from opencharacter.engines.allocation import acquire
    from opencharacter.engines.generate import silence_ray_data
    from opencharacter.runtime.progress import active_seconds, start_counters

    silence_ray_data()
    pairs, workers = job.read("distillation/pairs"), job.workers()
    counters = start_counters(job.dataset, workers.resources.gpus)
    with acquire(job.dataset, [workers], job.placement.autoscaling_resources) as allocation:
        rows = compute_reference(job, pairs, counters)
        allocation.work_seconds = active_seconds(counters)
    packed = report_packing(job.dataset, ray.get(counters.read.remote()))
    counters.end.remote()
    tokens = sum(pc.sum(pc.list_value_length(rows[name])).as_py() or 0 for name in ID_COLUMNS)
    return job.write(rows, figures={"tokens_read": tokens, **packed})
