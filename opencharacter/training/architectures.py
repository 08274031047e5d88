"""Which architectures work as students, known before a model is loaded.

The tests measure every architecture of the table with a tiny random model (docs/students.md). Other
architectures are not refused: `probe.prepare` verifies them when the model is loaded.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from opencharacter import models
from opencharacter.config.base import ECHO
from opencharacter.config.placement import Training
from opencharacter.config.roles import Role
from opencharacter.errors import UserError
from opencharacter.runtime.progress import console

PACKED = frozenset(
    """
    apertus arcee bitnet cohere cohere2 deepseek_v2 deepseek_v3 diffllama ernie4_5 ernie4_5_moe
    exaone4 gemma gemma2 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe gpt_bigcode
    gpt_neox gpt_oss granite granitemoe granitemoeshared helium hunyuan_v1_dense internlm3 llama
    ministral mistral mixtral nanochat olmo olmo2 olmo3 olmoe opt persimmon phi phi3
    qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 starcoder2 vaultgemma
    """.split()  # noqa: SIM905
)
"""Architectures (`model_type`) of which a pack is processed in one forward pass."""
SEQUENTIAL = frozenset(
    """
    bamba bloom codegen doge falcon falcon_h1 gpt_neo gptj granitemoehybrid jamba jetmoe lfm2
    llama4_text mamba2 minimax mpt nemotron nemotron_h qwen3_5_text qwen3_next recurrent_gemma
    stablelm
    """.split()  # noqa: SIM905
)
"""Architectures of which the sequences of a pack are processed one by one: they pass information
along the sequence in convolutions or state-space layers, or have a fixed attention."""
PARTLY_ADAPTED = frozenset(
    """
    bamba deepseek_v2 deepseek_v3 ernie4_5_moe falcon_h1 glm4_moe gpt_oss granitemoe
    granitemoehybrid granitemoeshared jamba jetmoe llama4_text mamba2 minimax mixtral nemotron_h
    olmoe qwen2_moe qwen3_moe qwen3_next
    """.split()  # noqa: SIM905
)
"""Architectures with large weights that get no adapter, such as fused experts."""
REFUSED = {
    "gpt2": "its decoder has no linear layers (nn.Linear) that adapters could be added to",
    "phimoe": "its routers choose experts at random in training",
}
"""Architectures that cannot be trained, with the reason."""
NEARLY_ALL = 0.95
"""Share of adapted weights above which `plan` does not mention it."""
KNOWN = PACKED | SEQUENTIAL | REFUSED.keys()


def check_student(role: Role, placement: Training) -> None:
    """Raise UserError if the student's architecture cannot be trained.

    Models that are not on this machine are checked when they are loaded.
    """
    path = local_path(role)
    if path is None:
        return
    name = architecture(path)
    reason = refusal(path, role)
    if reason:
        raise UserError(
            f"student {role.model} ({name}): {reason}; choose a student of another architecture"
        )
    if name in SEQUENTIAL and placement.strategy == "fsdp":
        raise UserError(
            f"student {role.model} ({name}): its sequences are processed one by one, which does "
            "not work with strategy: fsdp; set strategy: ddp"
        )


def refusal(path: Path, role: Role) -> str | None:
    """Return why a student cannot be trained; None if nothing speaks against it."""
    name = architecture(path)
    if name in KNOWN or role.trust_remote_code:
        return REFUSED.get(name)
    try:
        model = skeleton(path)
    except Exception as error:
        return f"transformers cannot create it ({str(error).splitlines()[0]})"
    return None if adapted_share(model) else REFUSED["gpt2"]


def student_notes(role: Role) -> list[str]:
    """Return what a user should know about training a student before the run starts."""
    path = local_path(role)
    if path is None:
        return []
    name = architecture(path)
    reason = refusal(path, role)
    if reason:
        return [f"student {role.model} ({name}) cannot be trained: {reason}"]
    notes = []
    if name in SEQUENTIAL:
        notes.append(
            f"attention: packing is not supported for {name}; training processes one sequence per "
            "forward pass, which is slower"
        )
    if name not in KNOWN:
        notes.append(
            f"attention: {name} is not among the tested architectures; its log-probabilities are "
            "verified when the model is loaded, before training"
        )
    if name in PARTLY_ADAPTED or (name not in KNOWN and not role.trust_remote_code):
        notes += adapter_notes(name, path)
    return notes


def adapter_notes(name: str, path: Path) -> list[str]:
    """Say which share of the weights is adapted if it is not (almost) all."""
    model = skeleton(path)
    share = adapted_share(model)
    if share > NEARLY_ALL:
        return []
    fused = any("expert" in key and p.dim() == 3 for key, p in model.named_parameters())
    cause = f"the experts of {name} are fused and are" if fused else "other kinds of layers are"
    return [f"adapters: on {share:.0%} of the weights of the decoder's layers; {cause} not adapted"]


def report_packing(dataset: str, counts: dict[str, float]) -> dict[str, bool]:
    """Print a line if the sequences of packs were processed one by one.

    Args:
        dataset: the dataset that was made.
        counts: what its workers reported, with `packed` as `probe.prepare` returned it.

    Returns:
        The figure for the manifest; none if the counts were lost.
    """
    if "packed" not in counts:
        return {}
    packed = bool(counts["packed"])
    if not packed:
        console.print(
            f"{dataset}: training processes one sequence per forward pass, because the student "
            "does not support packing",
            soft_wrap=True,
        )
    return {"packed": packed}


def local_path(role: Role) -> Path | None:
    """Return the directory of a student that is on this machine."""
    if role.endpoint or role.model.startswith(ECHO):
        return None
    return models.local_weights(role.model, role.revision)


def architecture(path: Path) -> str:
    """Return the `model_type` of a model's language model."""
    config = json.loads((path / "config.json").read_text())
    text = config.get("text_config") or config
    return text.get("model_type") or config.get("model_type", "unknown")


@functools.cache
def skeleton(path: Path) -> Any:
    """Create a model without weights from its configuration."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def adapted_share(model: Any) -> float:
    """Return the share of the weights of a decoder's layers that get an adapter."""
    import torch

    from opencharacter.training.adapters import adapted_layers

    decoder = model.get_decoder()
    adapted = sum(model.get_submodule(name).weight.numel() for name in adapted_layers(model))
    embeddings = {
        module.weight for module in decoder.modules() if isinstance(module, torch.nn.Embedding)
    }
    weights = [p for p in decoder.parameters() if p.dim() > 1 and p not in embeddings]
    return adapted / sum(p.numel() for p in weights)
