"""Stage persona/merge: the two adapters become one.

The sum of weighted low-rank updates is exact as one update of the summed rank:
w1*B1@A1 + w2*B2@A2 = [w1*B1, w2*B2] @ [A1; A2]. Computed from the safetensors alone; the base
model is not loaded. A smaller rank is the nearest update of that rank, by SVD.

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

from opencharacter import models
from opencharacter.errors import UserError
from opencharacter.runtime.stage import Estimate, Job, StageResult
from opencharacter.runtime.store import RemoteDir, explain_write_errors

if TYPE_CHECKING:
    import torch

    Term = tuple[torch.Tensor, torch.Tensor, float]
    """`(A, B, factor)`: an update of factor * B @ A."""

SIDE_FILES = ("tokenizer", "chat_template", "special_tokens", "vocab", "merges", "added_tokens")


class WeightedAdapter(NamedTuple):
    """An adapter folder and what it counts; a negative weight takes its character away."""

    folder: Path
    weight: float


class LoraWeights(NamedTuple):
    """An adapter that is read."""

    part: WeightedAdapter
    config: dict[str, Any]
    updates: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def factor(self) -> float:
        """What multiplies `B @ A` in the sum."""
        return self.part.weight * models.scale(self.config)


def merge(
    adapters: list[WeightedAdapter],
    target: Path,
    base: str | None = None,
    rank: int | None = None,
    peft_linear: bool = False,
) -> dict[str, Any]:
    """Write the weighted sum of adapters as one PEFT LoRA adapter.

    Args:
        adapters: at least one; all must adapt the same modules with the same shapes.
        target: folder to write into.
        base: name of the base model for the adapter's configuration; as in the parts if None.
        rank: of the result, by SVD; None for the exact sum, whose rank is the sum of the ranks.
        peft_linear: add the factors as PEFT's `linear` combination does, which is not the sum of
            the updates: it has cross terms.

    Returns:
        The composition: what was summed, with hashes, weights and ranks, and how far the result
        is from the exact sum (relative Frobenius norm over all modules).

    Raises:
        UserError: if the adapters do not fit each other.
    """
    from safetensors.torch import save_file

    loaded = [read(one) for one in adapters]
    modules = check_fit(loaded)
    bases = {str(adapter.config.get("base_model_name_or_path")) for adapter in loaded}
    if base is None and len(bases) > 1:
        raise UserError(f"adapters are of different bases, {' and '.join(sorted(bases))}")
    ranks = [adapter.config["r"] for adapter in loaded]
    if peft_linear and len(set(ranks)) > 1:
        raise UserError(f"adapters of ranks {ranks} have no linear combination of their factors")
    summed = ranks[0] if peft_linear else sum(ranks)
    kept = min(rank or summed, summed)
    padded = models.allowed_rank(kept)
    tensors, wrong, whole = {}, 0.0, 0.0
    for module in modules:
        # Popped: what is summed is freed while the sum grows.
        terms = [(*adapter.updates.pop(module), adapter.factor) for adapter in loaded]
        exact = concatenate(terms)
        # Paper: its code adds the factors, whose product has cross terms.
        made = add_factors(terms) if peft_linear else exact
        made = truncate(*made, kept) if kept < summed else made
        if made is not exact:
            whole += squared_norm(*exact)
            wrong += squared_norm(*concatenate([(*exact, 1.0), (*made, -1.0)]))
        a, b = pad(*made, padded)
        tensors[models.PEFT_PREFIX + module + models.LORA_A] = a
        tensors[models.PEFT_PREFIX + module + models.LORA_B] = b
    save_file(tensors, target / models.ADAPTER_WEIGHTS, metadata={"format": "pt"})
    changes = {"r": padded, "lora_alpha": padded, "use_rslora": False}
    changes["base_model_name_or_path"] = base or loaded[0].config.get("base_model_name_or_path")
    (target / models.ADAPTER_CONFIG).write_text(json.dumps(loaded[0].config | changes, indent=1))
    for path in adapters[0].folder.iterdir():
        if path.name.startswith(SIDE_FILES):
            shutil.copy(path, target / path.name)
    composition = {
        "rank": kept,
        "padded_to": padded,
        "peft_linear": peft_linear,
        "relative_error": math.sqrt(max(wrong, 0) / whole) if whole else 0.0,
        "adapters": [
            {
                "sha256": models.file_hash(part.folder / models.ADAPTER_WEIGHTS),
                "weight": part.weight,
                "rank": config["r"],
            }
            for part, config, _ in loaded
        ],
    }
    (target / "composition.json").write_text(json.dumps(composition, indent=1))
    return composition


def read(part: WeightedAdapter) -> LoraWeights:
    """Read an adapter that is nothing but one rank and scale of LoRA.

    Raises:
        UserError: if it is not there or is something else.
    """
    adapter = LoraWeights(part, *models.adapter_updates(part.folder))
    if adapter.config.get("peft_type") != "LORA":
        kind = adapter.config.get("peft_type")
        raise UserError(f"adapter {part.folder}: peft_type {kind!r} cannot be merged, LORA can")
    for name in ("rank_pattern", "alpha_pattern", "use_dora", "modules_to_save"):
        if adapter.config.get(name):
            raise UserError(f"adapter {part.folder}: {name} is set, which cannot be merged")
    return adapter


def check_fit(adapters: list[LoraWeights]) -> list[str]:
    """The modules that all adapters have, in order; a UserError names what does not fit."""
    shapes = [
        {module: (a.shape[1], b.shape[0]) for module, (a, b) in adapter.updates.items()}
        for adapter in adapters
    ]
    for adapter, other in zip(adapters[1:], shapes[1:], strict=True):
        odd = sorted(set(shapes[0].items()) ^ set(other.items()))
        if odd:
            raise UserError(
                f"adapters {adapters[0].part.folder} and {adapter.part.folder} do not fit: "
                f"{odd[0][0]} is {odd[0][1]} in one only; "
                "merge adapters of one base with the same target modules"
            )
    return sorted(shapes[0])


def concatenate(terms: list[Term]) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact sum of updates.

    Returns:
        A of shape (summed rank, in) and B of shape (out, summed rank), float32.
    """
    import torch

    a = torch.cat([a.float() for a, _, _ in terms])
    b = torch.cat([factor * b.float() for _, b, factor in terms], dim=1)
    return a, b


def add_factors(terms: list[Term]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of A and of B, each times the root of its factor, as PEFT's `linear` has them."""
    a: Any = 0
    b: Any = 0
    for one, other, factor in terms:
        root = math.sqrt(abs(factor))
        a = a + math.copysign(root, factor) * one.float()
        b = b + root * other.float()
    return a, b


def truncate(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest update of a smaller rank (Eckart and Young, 1936).

    With B = Qb Rb and A' = Qa Ra, only Rb Ra' needs the SVD, which is as small as the rank is.
    """
    import torch

    left, inner_left = torch.linalg.qr(b)
    right, inner_right = torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(inner_left @ inner_right.T)
    root = values[:rank].sqrt()
    return (root[:, None] * v[:rank]) @ right.T, left @ (u[:, :rank] * root)


def squared_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """The squared Frobenius norm of B @ A, from the factors."""
    a, b = a.double(), b.double()
    return float(((b.T @ b) * (a @ a.T)).sum())


def pad(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same update with zeros up to a rank."""
    import torch

    spare = rank - a.shape[0]
    a = torch.nn.functional.pad(a, (0, 0, 0, spare))
    b = torch.nn.functional.pad(b, (0, spare))
    return a.contiguous(), b.contiguous()


def merge_into(
    job: Job, adapters: list[WeightedAdapter], rank: int | None = None, peft_linear: bool = False
) -> dict[str, float]:
    """Merge into the adapter of a stage, and return the stage's figures."""
    base = job.recipe.roles.student.model
    with tempfile.TemporaryDirectory() as scratch:
        with explain_write_errors(scratch):
            composition = merge(adapters, Path(scratch), base, rank, peft_linear)
        job.store.upload(Path(scratch), job.adapter.relative)
    return {name: composition[name] for name in ("rank", "relative_error")}


def parse_weighted_adapter(text: str) -> WeightedAdapter:
    """`DIR` or `DIR:WEIGHT`; a folder whose own name has a colon is taken as it is.

    Raises:
        UserError: if the weight is not a number.
    """
    folder, _, weight = text.rpartition(":")
    if not folder or Path(text).is_dir():
        return WeightedAdapter(Path(text), 1.0)
    try:
        return WeightedAdapter(Path(folder), float(weight))
    except ValueError:
        raise UserError(f"{text}: weight {weight!r} is not a number; write DIR:0.5") from None


def estimate(job: Job) -> Estimate:
    return Estimate(0)


def build(job: Job) -> StageResult:
    settings = job.config
    weights = {"distillation/dpo": settings.dpo_weight, "introspection/sft": settings.sft_weight}
    adapters = [
        WeightedAdapter(job.parent(name).adapter.local(), weight)
        for name, weight in weights.items()
    ]
    return StageResult(0, figures=merge_into(job, adapters, settings.rank, settings.peft_linear))


def merged(job: Job) -> RemoteDir:
    """The adapter of a finished merge."""
    state = job.state()[0]
    if state != "done":
        where = job.store.address()
        raise UserError(f"persona {job.scope!r} is {state} in {where}; train it first")
    return job.adapter
