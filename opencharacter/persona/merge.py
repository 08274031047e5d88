"""Stage persona/merge: add the two adapters of a persona into one.

The weighted sum of low-rank updates is exactly one update whose rank is the sum of the ranks:
w1*B1@A1 + w2*B2@A2 = [w1*B1, w2*B2] @ [A1; A2]. It is computed from the adapters' safetensors files
alone, without the base model. If a smaller rank is configured, the sum is approximated by SVD.

Reads: distillation/dpo, introspection/sft. Writes: adapter/, with composition.json.
Run: opencharacter run RECIPE --constitution NAME --only persona/merge
     opencharacter merge DIR DIR:0.25 --to DIR   (any adapters)
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from opencharacter import cache, lora, models
from opencharacter.errors import UserError
from opencharacter.runtime.stage import Estimate, Job, StageResult
from opencharacter.runtime.store import RemoteDir, explain_write_errors

if TYPE_CHECKING:
    import torch

    ScaledUpdate = tuple[torch.Tensor, torch.Tensor, float]
    """`(A, B, factor)`, which stands for the update factor * B @ A."""

TOKENIZER_FILES = (
    "tokenizer",
    "chat_template",
    "special_tokens",
    "vocab",
    "merges",
    "added_tokens",
)
"""Prefixes of the files that are copied from the first adapter."""


class WeightedAdapter(NamedTuple):
    """An adapter folder and its weight in a sum; a negative weight subtracts its updates."""

    folder: Path
    weight: float


class LoraWeights(NamedTuple):
    """The contents of an adapter folder.

    Args:
        source: the folder and its weight.
        config: the PEFT configuration.
        updates: the factors A and B of each module.
    """

    source: WeightedAdapter
    config: dict[str, Any]
    updates: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def factor(self) -> float:
        """Factor of `B @ A` in the sum: the weight times LoRA's scale."""
        return self.source.weight * lora.scale(self.config)


def merge(
    adapters: list[WeightedAdapter],
    target: Path,
    base: str | None = None,
    rank: int | None = None,
    peft_linear: bool = False,
) -> dict[str, Any]:
    """Write the weighted sum of adapters as one PEFT LoRA adapter.

    Args:
        adapters: one or more adapters of the same modules with the same shapes.
        target: folder to write to.
        base: base model to name in the result's configuration; None to keep that of the adapters.
        rank: maximum rank of the result, which is approximated by SVD; None for the exact sum,
            whose rank is the sum of the ranks.
        peft_linear: whether to add the factors like PEFT's `linear` combination. This is not the
            sum of the updates, because the product of the factors has cross terms.

    Returns:
        The composition: hash, weight and rank of each adapter, rank of the result, and its distance
        from the exact sum (relative Frobenius norm over all modules).

    Raises:
        UserError: if the adapters are incompatible.
    """
    from safetensors.torch import save_file

    loaded = [LoraWeights(each, *lora.adapter_updates(each.folder)) for each in adapters]
    modules = shared_modules(loaded)
    bases = {str(adapter.config.get("base_model_name_or_path")) for adapter in loaded}
    if base is None and len(bases) > 1:
        raise UserError(
            f"the adapters have different base models: {' and '.join(sorted(bases))}; if these are "
            "names of the same weights, choose one with --base NAME"
        )
    ranks = [adapter.config["r"] for adapter in loaded]
    if peft_linear and len(set(ranks)) > 1:
        raise UserError(f"peft_linear needs adapters of equal rank, and these have ranks {ranks}")
    full_rank = ranks[0] if peft_linear else sum(ranks)
    result_rank = min(rank or full_rank, full_rank)
    stored_rank = lora.allowed_rank(result_rank)
    tensors, squared_error, squared_total = {}, 0.0, 0.0
    for module in modules:
        # Popping frees the summands while the result grows.
        updates = [(*adapter.updates.pop(module), adapter.factor) for adapter in loaded]
        exact = concatenate(updates)
        # Paper: its code adds the factors, whose product has cross terms.
        merged = add_factors(updates) if peft_linear else exact
        merged = truncate(*merged, result_rank) if result_rank < full_rank else merged
        if merged is not exact:
            squared_total += squared_norm(*exact)
            squared_error += squared_norm(*concatenate([(*exact, 1.0), (*merged, -1.0)]))
        a, b = pad(*merged, stored_rank)
        tensors[lora.PEFT_PREFIX + module + lora.LORA_A] = a
        tensors[lora.PEFT_PREFIX + module + lora.LORA_B] = b
    error = math.sqrt(max(squared_error, 0) / squared_total) if squared_total else 0.0
    composition = {
        "rank": result_rank,
        "padded_to": stored_rank,
        "peft_linear": peft_linear,
        "relative_error": error,
        "adapters": [describe(adapter) for adapter in loaded],
    }
    save_file(tensors, target / lora.ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (target / "composition.json").write_text(json.dumps(composition, indent=1))
    write_config(loaded[0], target, base, stored_rank)
    return composition


def describe(adapter: LoraWeights) -> dict[str, Any]:
    """Return the record of an adapter in `composition.json`."""
    return {
        "sha256": cache.file_hash(adapter.source.folder / lora.ADAPTER_WEIGHTS),
        "weight": adapter.source.weight,
        "rank": adapter.config["r"],
    }


def write_config(adapter: LoraWeights, target: Path, base: str | None, rank: int) -> None:
    """Write the PEFT configuration and the tokenizer files of an adapter, with a new rank.

    Args:
        adapter: the adapter to take the configuration and the files from.
        target: folder to write to.
        base: base model to name; None to keep that of the adapter.
        rank: rank of the result, which is also its alpha, so that its scale is 1.
    """
    changes = {"r": rank, "lora_alpha": rank, "use_rslora": False}
    changes["base_model_name_or_path"] = base or adapter.config.get("base_model_name_or_path")
    (target / lora.ADAPTER_CONFIG).write_text(json.dumps(adapter.config | changes, indent=1))
    for path in adapter.source.folder.iterdir():
        if path.name.startswith(TOKENIZER_FILES):
            shutil.copy(path, target / path.name)


def shared_modules(adapters: list[LoraWeights]) -> list[str]:
    """Return the names of the modules that all adapters adapt, sorted.

    Raises:
        UserError: if the adapters differ in their modules or in the shape of one.
    """
    shapes = [
        {module: (a.shape[1], b.shape[0]) for module, (a, b) in adapter.updates.items()}
        for adapter in adapters
    ]
    for adapter, other_shapes in zip(adapters[1:], shapes[1:], strict=True):
        differences = sorted(set(shapes[0].items()) ^ set(other_shapes.items()))
        if differences:
            module, shape = differences[0]
            raise UserError(
                f"adapters {adapters[0].source.folder} and {adapter.source.folder} are "
                f"incompatible: only one has {module} with shape {shape}; "
                "merge adapters of the same base model with the same target modules"
            )
    return sorted(shapes[0])


def concatenate(updates: list[ScaledUpdate]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the exact sum of updates.

    Returns:
        A of shape (sum of ranks, in) and B of shape (out, sum of ranks), float32.
    """
    import torch

    a = torch.cat([a.float() for a, _, _ in updates])
    b = torch.cat([factor * b.float() for _, b, factor in updates], dim=1)
    return a, b


def add_factors(updates: list[ScaledUpdate]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of all A and of all B, each scaled by the root of its factor.

    This is what PEFT's `linear` combination computes.
    """
    a_sum: Any = 0
    b_sum: Any = 0
    for a, b, factor in updates:
        root = math.sqrt(abs(factor))
        a_sum = a_sum + math.copysign(root, factor) * a.float()
        b_sum = b_sum + root * b.float()
    return a_sum, b_sum


def truncate(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best approximation of an update with a smaller rank (Eckart and Young, 1936).

    It has fewer factors if the module itself has fewer inputs or outputs than the rank.

    With the decompositions B = Qb Rb and A' = Qa Ra, only the small matrix Rb Ra' needs an SVD.
    """
    import torch

    left, inner_left = torch.linalg.qr(b)
    right, inner_right = torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(inner_left @ inner_right.T, full_matrices=False)
    root = values[:rank].sqrt()
    return (root[:, None] * v[:rank]) @ right.T, left @ (u[:, :rank] * root)


def squared_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the squared Frobenius norm of B @ A, computed from the factors."""
    a, b = a.double(), b.double()
    return float(((b.T @ b) * (a @ a.T)).sum())


def pad(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad the factors of an update with zeros up to a rank."""
    import torch

    missing = rank - a.shape[0]
    a = torch.nn.functional.pad(a, (0, 0, 0, missing))
    b = torch.nn.functional.pad(b, (0, missing))
    return a.contiguous(), b.contiguous()


def merge_and_store(
    job: Job, adapters: list[WeightedAdapter], rank: int | None = None, peft_linear: bool = False
) -> dict[str, float]:
    """Merge adapters, store the result as the adapter of a job and return the job's figures."""
    base = job.recipe.roles.student.model
    with tempfile.TemporaryDirectory() as scratch:
        with explain_write_errors(scratch):
            composition = merge(adapters, Path(scratch), base, rank, peft_linear)
        job.store.upload(Path(scratch), job.adapter.relative)
    return {name: composition[name] for name in ("rank", "relative_error")}


def parse_weighted_adapter(text: str) -> WeightedAdapter:
    """Parse `DIR` or `DIR:WEIGHT`; an existing folder with a colon in its name needs no weight.

    Raises:
        UserError: if the weight is not a number.
    """
    folder, _, weight = text.rpartition(":")
    if not folder or Path(text).is_dir():
        return WeightedAdapter(Path(text), 1.0)
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"{text}: weight {weight!r} is not a number; use DIR:WEIGHT, such as DIR:0.5"
        )
    return WeightedAdapter(Path(folder), number)


def estimate(job: Job) -> Estimate:
    return Estimate(0)


def identity(job: Job) -> dict[str, Any]:
    """The model or adapter that takes the persona's place; nothing otherwise."""
    given = job.recipe.evaluation.subject
    if given.adapter:
        return {"adapter": models.content(Path(given.adapter))}
    return {"model": models.identity(given.model)} if given.model else {}


def build(job: Job) -> StageResult:
    config, given = job.config, job.recipe.evaluation.subject
    if given.model:
        return StageResult(0, figures={"skipped": "a given model is evaluated"})
    if given.adapter:
        return StageResult(
            0, figures=merge_and_store(job, [WeightedAdapter(Path(given.adapter), 1.0)])
        )
    weights = {"distillation/dpo": config.dpo_weight, "introspection/sft": config.sft_weight}
    adapters = [
        WeightedAdapter(job.parent(name).adapter.local(), weight)
        for name, weight in weights.items()
    ]
    figures = merge_and_store(job, adapters, config.rank, config.peft_linear)
    return StageResult(0, figures=figures)


def finished_adapter(job: Job) -> RemoteDir:
    """Return the adapter of a merge job.

    Raises:
        UserError: if the job is not done.
    """
    state = job.state()[0]
    if state != "done":
        storage = job.store.address()
        raise UserError(f"persona {job.scope!r} is {state} in {storage}; train it first")
    return job.adapter
