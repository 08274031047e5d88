"""Stage persona/merge: the two adapters become one.

The sum of weighted low-rank updates is exact as one update of the summed rank:
w1*B1@A1 + w2*B2@A2 = [w1*B1, w2*B2] @ [A1; A2]. Computed from the safetensors alone; the base
model is not loaded.

Reads: distillation/dpo, introspection/sft. Writes: adapter/, with composition.json.
Run: opencharacter run RECIPE --constitution NAME --only persona/merge
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from opencharacter import models
from opencharacter.errors import StageFailed
from opencharacter.stage import Estimate, Job, Outcome

if TYPE_CHECKING:
    import torch

SIDE_FILES = ("tokenizer", "chat_template", "special_tokens", "vocab", "merges", "added_tokens")


class Part(NamedTuple):
    """An adapter folder and what it counts."""

    folder: Path
    weight: float


def merge(parts: list[Part], target: Path, base: str) -> dict[str, Any]:
    """Write the weighted sum of adapters as one PEFT LoRA adapter.

    Args:
        parts: at least one; all must adapt the same modules with the same shapes.
        target: folder to write into.
        base: name of the base model for the adapter's configuration.

    Returns:
        The composition: what was summed, with hashes, weights and ranks.

    Raises:
        StageFailed: if the adapters do not fit each other.
    """
    from safetensors.torch import save_file

    loaded = [(*models.adapter_updates(part.folder), part.weight) for part in parts]
    modules = check_fit([updates for _, updates, _ in loaded], [str(p.folder) for p in parts])
    rank = sum(config["r"] for config, _, _ in loaded)
    padded = models.allowed_rank(rank)
    tensors = {}
    for module in modules:
        terms = [(*u[module], w * models.scale(config)) for config, u, w in loaded]
        a, b = concatenate(terms, padded)
        tensors[models.PEFT_PREFIX + module + models.LORA_A] = a
        tensors[models.PEFT_PREFIX + module + models.LORA_B] = b
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    changes = {"r": padded, "lora_alpha": padded, "base_model_name_or_path": base}
    changes |= {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    (target / "adapter_config.json").write_text(json.dumps(loaded[0][0] | changes, indent=1))
    for path in parts[0].folder.iterdir():
        if path.name.startswith(SIDE_FILES):
            shutil.copy(path, target / path.name)
    composition = {
        "rank": rank,
        "padded_to": padded,
        "parts": [
            {
                "sha256": models.file_hash(part.folder / "adapter_model.safetensors"),
                "weight": part.weight,
                "rank": config["r"],
            }
            for part, (config, _, _) in zip(parts, loaded, strict=True)
        ],
    }
    (target / "composition.json").write_text(json.dumps(composition, indent=1))
    return composition


def check_fit(updates: list[dict[str, Any]], names: list[str]) -> list[str]:
    """The modules that all adapters have, in order; a StageFailed names what does not fit."""
    first = {module: (a.shape[1], b.shape[0]) for module, (a, b) in updates[0].items()}
    for other, name in zip(updates[1:], names[1:], strict=True):
        shapes = {module: (a.shape[1], b.shape[0]) for module, (a, b) in other.items()}
        if shapes != first:
            odd = sorted(set(first.items()) ^ set(shapes.items()))[0]
            raise StageFailed(
                f"adapters {names[0]} and {name} do not fit: {odd[0]} is {odd[1]} in one only; "
                "merge adapters of one base with the same target modules"
            )
    return sorted(first)


def concatenate(
    terms: list[tuple[torch.Tensor, torch.Tensor, float]], rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack `(A, B, factor)` into one `(A, B)` of the given rank, zeros where it is larger.

    Returns:
        A of shape (rank, in) and B of shape (out, rank), float32, with B @ A the exact sum.
    """
    import torch

    a = torch.cat([a.float() for a, _, _ in terms])
    b = torch.cat([factor * b.float() for _, b, factor in terms], dim=1)
    spare = rank - a.shape[0]
    a = torch.nn.functional.pad(a, (0, 0, 0, spare))
    b = torch.nn.functional.pad(b, (0, spare))
    return a.contiguous(), b.contiguous()


def estimate(job: Job) -> Estimate:
    return Estimate(0)


def build(job: Job) -> Outcome:
    settings = job.section
    weights = {"distillation/dpo": settings.dpo_weight, "introspection/sft": settings.sft_weight}
    parts = [Part(job.parent(name).adapter.local(), weight) for name, weight in weights.items()]
    with tempfile.TemporaryDirectory() as scratch:
        composition = merge(parts, Path(scratch), job.recipe.roles.student.model)
        job.store.upload(Path(scratch), f"{job.dataset}/adapter")
    return Outcome(rows=0, figures={"rank": composition["rank"]})
