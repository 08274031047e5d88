"""The student model with its LoRA adapter: loading, kernels and the memory of a microbatch."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from opencharacter import models
from opencharacter.config.placement import Training
from opencharacter.config.recipe import Lora
from opencharacter.config.roles import Role
from opencharacter.training import packing

CPU_MAX_TOKENS = 1024
GPU_MAX_TOKENS = 16384
"""Maximum tokens of a microbatch if the placement sets none; larger ones are not faster. Workers on
a CPU divide theirs."""
ACTIVATION_MEMORY_SHARE = 0.8
"""Share of the free GPU memory that activations may use."""
NOISE = ("input_jitter_noise", "jitter_noise")
"""Attributes of layers with experts that add noise in training, and have no effect otherwise."""


def load(path: Path, role: Role, on_gpu: bool) -> Any:
    """Load the student, with attention over packs if it has one, and a head that keeps no logits.

    `probe.prepare` must be called once the model is on its device.
    """
    from trl.trainer import add_fused_lm_head

    packing.register()
    from_pretrained = functools.partial(
        transformers.AutoModelForCausalLM.from_pretrained,
        path,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        trust_remote_code=role.trust_remote_code,
    )
    model: Any = None
    with contextlib.suppress(AttributeError, KeyError, ValueError):
        model = from_pretrained(attn_implementation=packing.ATTENTION)
    if model is None or not model._can_set_attn_implementation():  # its attention is fixed
        model = from_pretrained()
    disable_noise(model)
    text = model.config.get_text_config()
    if hasattr(text, "logits_soft_cap"):  # RecurrentGemma's name for what the fused head reads
        text.final_logit_softcapping = text.logits_soft_cap
    add_fused_lm_head(model)
    if not on_gpu:
        score_loss_positions_only(model)
    return model


def score_loss_positions_only(model: Any) -> None:
    """Let TRL's fused head compute only the tokens with a loss on a CPU too, in place.

    On devices without Triton it computes the logits of all positions and discards the others.

    Args:
        model: a model with TRL's fused head.
    """
    forward = model.forward

    @functools.wraps(forward)
    def forward_scored(*arguments: Any, shift_labels: Any = None, **options: Any) -> Any:
        if shift_labels is None or not options.get("fused_lm_head"):
            return forward(*arguments, shift_labels=shift_labels, **options)
        scored = shift_labels != packing.IGNORED
        if not scored.any():
            return forward(*arguments, shift_labels=shift_labels, **options)

        def keep_scored(_module: Any, _arguments: Any, outputs: Any) -> Any:
            outputs.last_hidden_state = outputs.last_hidden_state[scored][None]
            return outputs

        hook = model.base_model.register_forward_hook(keep_scored)
        try:
            outputs = forward(*arguments, shift_labels=shift_labels[scored][None], **options)
        finally:
            hook.remove()
        zeros = outputs.log_probs.new_zeros(scored.shape)
        outputs.log_probs = zeros.masked_scatter(scored, outputs.log_probs)
        return outputs

    model.forward = forward_scored


def disable_noise(model: torch.nn.Module) -> None:
    """Turn off the dropout of a model and the noise that it adds to the inputs of experts."""
    for module in model.modules():
        for name, value in vars(module).items():
            dropout = "dropout" in name or (name == "p" and isinstance(module, torch.nn.Dropout))
            if isinstance(value, float) and (dropout or name in NOISE):
                setattr(module, name, 0.0)


def decoder_blocks(model: Any) -> list[torch.nn.Module]:
    """Return the repeated transformer blocks of a model."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def select_kernels(placement: Training) -> str:
    """Return the kernels of the placement, by default Liger's on a GPU if they are installed."""
    liger = placement.gpus > 0 and importlib.util.find_spec("liger_kernel")
    return placement.kernels or ("liger" if liger else "plain")


def adapted_layers(model: Any) -> list[str]:
    """Return the names of the decoder's linear layers that get an adapter.

    These are all of them, except for the head, any vision tower and
    - the routers of experts, which are not always linear layers;
    - layers whose weights a Mamba mixer reads directly, so that an adapter would have no effect;
    - layers that PEFT takes for experts when the experts of a model are fused.
    """
    decoder = {*model.get_decoder().modules()} - {model.get_output_embeddings()}
    names = [
        name
        for name, module in model.named_modules()
        if module in decoder and isinstance(module, torch.nn.Linear)
        if "Router" not in type(module).__name__
    ]
    mixers = {name for name, module in model.named_modules() if hasattr(module, "ssm_state_size")}
    bypassed = {f"{mixer}.{layer}" for mixer in mixers for layer in ("out_proj", "dt_proj")}
    return without_experts(model, [name for name in names if name not in bypassed])


def without_experts(model: Any, names: list[str]) -> list[str]:
    """Remove the layers that PEFT would replace by all fused experts of the model.

    PEFT does so for adapters that were made when experts were separate layers. It cannot tell dense
    and shared layers of the same name (`gate_proj`, `up_proj`, `down_proj`) from experts.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=names)
    convert_peft_config_for_transformers(config, model, conversions=None)
    return [name for name in names if name in (config.target_modules or ())]


def add_lora(
    model: Any, lora: Lora, activation_checkpointing: bool = False, kernels: str = "plain"
) -> Any:
    """Add a new LoRA adapter without dropout to all `adapted_layers`.

    Args:
        model: a model from `load`.
        lora: rank and alpha.
        activation_checkpointing: whether to keep only the inputs of each block and recompute its
            activations in the backward pass.
        kernels: `liger`, `compiled` or `plain`.

    Returns:
        The PEFT model.
    """
    from peft import LoraConfig, get_peft_model

    # Paper: its code names Gemma's layers, and other models have different ones.
    peft_model = get_peft_model(
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
    for block in decoder_blocks(model) if kernels == "compiled" else ():
        block.compile(dynamic=True)
    return peft_model


class MemoryPlan(NamedTuple):
    """How large a microbatch is and whether its activations are recomputed.

    Args:
        max_tokens: maximum tokens of a microbatch.
        activation_checkpointing: whether activations are recomputed in the backward pass.
    """

    max_tokens: int
    activation_checkpointing: bool


def plan_memory(model: Any, placement: Training, longest: int) -> MemoryPlan:
    """Choose the size of a microbatch and whether to use activation checkpointing.

    Args:
        model: a model on the CPU, before it is moved to its device.
        placement: the training placement; what it does not set is derived from the GPU's free
            memory.
        longest: tokens of the longest example, which must fit into one microbatch.
    """
    bytes_per_token = activation_bytes(model.config.get_text_config())
    if placement.gpus:
        free, _ = torch.cuda.mem_get_info()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        shards = placement.workers if placement.strategy == "fsdp" else 1
        fitting = int(ACTIVATION_MEMORY_SHARE * (free - weights / shards) / bytes_per_token)
        limit = GPU_MAX_TOKENS
    else:
        fitting = limit = CPU_MAX_TOKENS // placement.workers  # which share the main memory
    max_tokens = placement.max_tokens_per_microbatch or max(longest, min(fitting, limit))
    activation_checkpointing = placement.gpus > 0 and max_tokens > fitting
    if placement.activation_checkpointing is not None:
        activation_checkpointing = placement.activation_checkpointing
    return MemoryPlan(max_tokens, activation_checkpointing)


def smallest_plan(memory: MemoryPlan, device: str) -> MemoryPlan:
    """Return the plan for the worker with the least free memory, which all workers follow.

    With plans of their own, workers would lay out the batch as different packs, so that some
    examples would count twice and others not at all.

    Args:
        memory: the plan of this worker.
        device: `cuda` or `cpu`, for the exchange between the workers.
    """
    distributed = torch.distributed
    if not distributed.is_initialized():
        return memory
    own = [memory.max_tokens, int(not memory.activation_checkpointing)]
    least = torch.tensor(own, device=device)
    distributed.all_reduce(least, op=distributed.ReduceOp.MIN)
    max_tokens, keeps_activations = least.tolist()
    return MemoryPlan(max_tokens, not keeps_activations)


def activation_bytes(config: Any) -> int:
    """Return an upper bound of the bytes of activations per token.

    A block keeps at most 15 vectors of the hidden size and 4 of the intermediate size for the
    backward pass, in 16 bits.

    Args:
        config: the text model's configuration.
    """
    return 2 * config.num_hidden_layers * (15 * config.hidden_size + 4 * config.intermediate_size)


def autocast(device: torch.device) -> torch.autocast:
    """Return the autocast context of training, for forward passes outside of a trainer."""
    enabled = device.type == "cuda" or models.fast_bf16()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
