"""The student with its LoRA adapter: loading, kernels, and how a microbatch fits into memory."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from opencharacter.config.placement import Training
from opencharacter.config.recipe import Lora, Role
from opencharacter.training import packing

CPU_TOKENS = 1024
GPU_TOKENS = 16384
"""Tokens of a pass at most, where the placement does not say: more is not faster."""
MEMORY_SHARE = 0.8
"""Of the free memory that activations may take."""


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


def with_adapter(
    model: Any, lora: Lora, activation_checkpointing: bool = False, kernels: str = "plain"
) -> Any:
    """The model with a new LoRA adapter on the `adapted_layers`, without dropout.

    Args:
        model: as loaded.
        lora: rank and alpha.
        activation_checkpointing: keep only the inputs of each block and recompute it in the
            backward pass.
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
    if activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if kernels == "liger":
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})
    for layer in layers(model) if kernels == "compiled" else ():
        layer.compile(dynamic=True)
    return adapted


class MemoryPlan(NamedTuple):
    """How a pass fits into memory."""

    tokens: int
    """Of a pass."""
    activation_checkpointing: bool
    """Whether activations are computed again on the way back."""


def plan_memory(model: Any, placement: Training, longest: int) -> MemoryPlan:
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
    wanted = placement.max_tokens_per_microbatch or max(longest, min(room, most))
    activation_checkpointing = placement.gpus > 0 and wanted > room
    if placement.activation_checkpointing is not None:
        activation_checkpointing = placement.activation_checkpointing
    return MemoryPlan(wanted, activation_checkpointing)


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
