"""Stage distillation/reference: pairs in tokens, and how likely the student finds each of them.

The log-probabilities of every answer token under the student before training, read once: DPO then
needs no second model and no second forward pass.

Reads: distillation/pairs. Writes: id, tokens and log-probabilities of both sides.
Run: opencharacter run RECIPE --constitution NAME --only distillation/reference
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from opencharacter import models
from opencharacter.config.placement import Training
from opencharacter.config.recipe import Role
from opencharacter.runtime import cluster
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.chat import assistant, encode_answer, load_tokenizer, user
from opencharacter.training.packing import Example, Tokens

SIDES = ("chosen", "rejected")
IDS = pa.list_(pa.int32())
VALUES = pa.list_(pa.float32())
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt_ids", IDS, nullable=False),
        *[pa.field(f"{side}_ids", IDS, nullable=False) for side in SIDES],
        *[pa.field(f"{side}_logprobs", VALUES, nullable=False) for side in SIDES],
        pa.field("drop_reason", pa.string()),
    ]
)
ID_COLUMNS = ("prompt_ids", "chosen_ids", "prompt_ids", "rejected_ids")
"""Columns of both sequences."""
BATCH = 64
"""Pairs that are laid out as packs together."""


def tokenise(tokenizer: Any, row: dict[str, Any]) -> dict[str, list[int]]:
    """A pair in tokens: the prompt, and each answer to the token that ends it."""
    ids = {}
    prompt: list[int] = []
    for side in SIDES:
        prompt, answer = encode_answer(tokenizer, [user(row["prompt"]), assistant(row[side])])
        ids[f"{side}_ids"] = answer
    return {"prompt_ids": prompt, **ids}


def example(row: dict[str, Any]) -> Example:
    """Both sides of a row, the chosen one first, with the reference if the row has it."""
    prompt = list(row["prompt_ids"])
    return [
        Tokens(
            ids=prompt + list(row[f"{side}_ids"]),
            loss_positions=list(range(len(prompt), len(prompt) + len(row[f"{side}_ids"]))),
            reference=row.get(f"{side}_logprobs"),
        )
        for side in SIDES
    ]


class Reader:
    """An actor that holds the student and adds tokens and log-probabilities to pairs.

    Args:
        role: the student.
        placement: of training.
        devices: GPUs that this actor has.
        counters: told when it reads.
    """

    def __init__(self, role: Role, placement: Training, devices: float, counters: Any):
        import torch

        from opencharacter.training.adapters import load, plan_memory

        torch.set_num_threads(max(1, int(placement.cpus)))
        self.counters = counters
        path = models.resolve(role.model)
        self.tokenizer = load_tokenizer(path, role)
        self.model: Any = load(path, role, devices > 0)
        # Without a way back a pass is far smaller than in training, where a whole one must fit.
        self.budget = plan_memory(self.model, placement, longest=0).tokens
        if devices > 1:
            from accelerate import dispatch_model, infer_auto_device_map

            blocks = self.model._no_split_modules
            self.model = dispatch_model(
                self.model, infer_auto_device_map(self.model, no_split_module_classes=blocks)
            )
        elif devices:
            self.model = self.model.to("cuda")

    def __call__(self, table: pa.Table) -> pa.Table:
        """Rows of `SCHEMA` for rows of distillation/pairs."""
        self.counters.set.remote()
        rows = [
            {"id": row["id"], "drop_reason": None, **tokenise(self.tokenizer, row)}
            for row in table.to_pylist()
        ]
        found = log_probs(self.model, [example(row) for row in rows], self.budget)
        for row, values in zip(rows, found, strict=True):
            row |= {f"{side}_logprobs": v for side, v in zip(SIDES, values, strict=True)}
        self.counters.set.remote()
        return pa.Table.from_pylist(rows, schema=SCHEMA)


def log_probs(model: Any, pairs: list[Example], budget: int) -> list[list[list[float]]]:
    """Of the learned tokens of both sequences of each pair, in nats.

    Args:
        model: as `training.load` makes it.
        pairs: in tokens.
        budget: tokens of a pass.
    """
    import torch

    from opencharacter.training import packing
    from opencharacter.training.adapters import autocast

    found: list[list[list[float]]] = [[] for _ in pairs]
    for share in packing.share_out([packing.length(pair) for pair in pairs], budget):
        batch = packing.pack([pairs[i] for i in share]).to(model.device)
        with torch.inference_mode(), autocast(model.device):
            values = packing.log_probs(model, batch).cpu()
        sizes = [len(tokens.loss_positions) for i in share for tokens in pairs[i]]
        parts = [part.tolist() for part in values.split(sizes)]
        for number, i in enumerate(share):
            found[i] = parts[2 * number : 2 * number + 2]
    return found


def actors(placement: Training, widest: float) -> tuple[int, float]:
    """How many actors read, and the GPUs of each.

    Args:
        placement: of training.
        widest: GPUs of the largest node.
    """
    if placement.parallel == "fsdp":  # the model needs several GPUs, and an actor is on one node
        return 1, min(placement.gpus * placement.workers, widest)
    return placement.workers, placement.gpus


def read(job: Job, pairs: pa.Table, counters: Any) -> pa.Table:
    """Rows of `SCHEMA`, sorted by id."""
    placement = job.placement.training
    count, gpus = actors(placement, cluster.max_gpus_per_node(job.placement))
    batches = [pairs.slice(at, BATCH) for at in range(0, len(pairs), BATCH)]
    dataset = ray.data.from_arrow(batches).map_batches(
        Reader,
        fn_constructor_args=(job.recipe.roles.student, placement, gpus, counters),
        batch_size=BATCH,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=count),
        num_cpus=placement.cpus,
        num_gpus=gpus,
        accelerator_type=placement.accelerator,
    )
    tables = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    return pa.concat_tables([t.cast(SCHEMA) for t in tables]).sort_by("id")


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [(job.workers(),)]


def estimate(job: Job) -> Estimate:
    from opencharacter.distillation.teacher import typical

    pairs, made = job.parent("distillation/pairs"), job.recipe.distillation
    rows = pairs.stage.module.estimate(pairs).rows
    answers = typical(made.teacher.sampling) + typical(made.student.sampling)
    return Estimate(rows, read=rows * min(80 + answers, 2 * made.pairs.max_tokens))


def build(job: Job) -> StageResult:
    from opencharacter.engines.allocation import acquire
    from opencharacter.engines.generate import quieten
    from opencharacter.runtime.progress import active_seconds, start_counters

    quieten()
    pairs, workers = job.read("distillation/pairs"), job.workers()
    counters = start_counters(job.dataset, workers.resources.gpus)
    with acquire(job.dataset, [workers], job.placement.autoscaling_limit) as held:
        rows = read(job, pairs, counters)
        held.busy = active_seconds(counters)
    counters.end.remote()
    tokens = sum(pc.sum(pc.list_value_length(rows[name])).as_py() or 0 for name in ID_COLUMNS)
    return job.write(rows, figures={"tokens_read": tokens})
