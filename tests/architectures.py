"""Tiny random models of many architectures, and the table of which of them work as students.

Run `python tests/architectures.py --write` to generate the page of the documentation.
"""

# ruff: noqa: E501 (the page of the documentation has longer lines)

from __future__ import annotations

import argparse
import math
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import student_columns
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from opencharacter import models
from opencharacter.config.recipe import Lora
from opencharacter.config.roles import Role
from opencharacter.training import adapters, architectures, packing, probe

ROLE = Role(model="tiny", name="tiny", self_name="Tiny")
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
CONFIGS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bamba": {**MAMBA, "attn_layer_indices": [1], "mamba_expand": 2},
    "bitnet": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {**GPT, "rotary_dim": 8},
    "cohere": {},
    "cohere2": SLIDING,
    "deepseek_v2": ROUTED | LATENT,
    "deepseek_v3": ROUTED | LATENT,
    "diffllama": {},
    "doge": {},
    "ernie4_5": {},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
        "moe_num_shared_experts": 1,
    },
    "exaone4": {**SLIDING, "sliding_window_pattern": 2},
    "falcon": {
        "new_decoder_architecture": False,
        "multi_query": True,
        "alibi": False,
        "head_dim": None,
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "gemma": {},
    "gemma2": {
        **SLIDING,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 16},
    "gemma3": {
        "text_config": COMMON
        | SLIDING
        | {"query_pre_attn_scalar": 16, "model_type": "gemma3_text"},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 299,
        "boi_token_index": 298,
        "eoi_token_index": 297,
    },
    "gemma3n_text": {
        **SLIDING,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "intermediate_size": [128, 128],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {
        **SLIDING,
        "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {**ROUTED, "n_shared_experts": 1},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "gpt_neox": {},
    "gpt_oss": {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {**GPT, "rotary_dim": 8},
    "granite": {},
    "granitemoe": {"num_local_experts": 2},
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["mamba", "attention"],
        "mamba_expand": 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
        "position_embedding_type": "rope",
    },
    "granitemoeshared": {"num_local_experts": 2, "shared_intermediate_size": 32},
    "helium": {},
    "hunyuan_v1_dense": {},
    "internlm3": {},
    "jamba": {
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 4,
        "mamba_d_state": 8,
    },
    "jetmoe": {"num_local_experts": 2, "kv_channels": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 128, "conv_L_cache": 3},
    "llama": {},
    "llama4_text": {
        "num_local_experts": 2,
        "intermediate_size_mlp": 128,
        "attention_chunk_size": 16,
    },
    "mamba2": {
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 16,
        "n_groups": 1,
        "expand": 2,
        "chunk_size": 16,
    },
    "minimax": {
        "num_local_experts": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 16,
    },
    "ministral": SLIDING,
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        "hybrid_override_pattern": "M*",
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "persimmon": {},
    "phi": {},
    "phi3": {"sliding_window": None, "partial_rotary_factor": 1.0},
    "phimoe": {"num_local_experts": 2},
    "qwen2": {},
    "qwen2_moe": EXPERTS,
    "qwen3": {},
    "qwen3_5_text": LINEAR_ATTENTION,
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS | LINEAR_ATTENTION,
    "recurrent_gemma": {
        "lru_width": 64,
        "attention_window_size": 16,
        "block_types": ["recurrent", "attention"],
    },
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {**SLIDING, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
}
"""Fields of each architecture's configuration that differ from `COMMON`."""


PAGE = Path(__file__).parents[1] / "docs" / "students.md"
INTRODUCTION = """\
# Which students work

Training is right for a student if the log-probabilities of its packs are those of the model itself, one sequence at a
time. This is measured with a tiny random model of each architecture below, and again with every real student when it is
loaded: a student for which it is not so is refused.

- **Packed** students process a pack in one forward pass. **Sequential** ones pass information along the sequence in
  convolutions or state-space layers, or have a fixed attention; they process the sequences of a pack one by one, with the
  same loss and gradients, more slowly, and not with `strategy: fsdp`. The choice is automatic; `opencharacter plan` says
  it.
- **Difference** is the largest difference of a log-probability from the model's own, in float32 and nats.
- **Adapted** is the share of the weights of the decoder's layers that get an adapter. Where it is small, the experts of
  the model are fused into one weight, and only the layers beside them are adapted.
- **Merge** is the largest difference of a log-probability between the adapter merged into the weights and the adapter
  beside them, in nats.
- **Template** names the format of the architecture's chat models, if it is among those of [the second
  table](#chat-templates).
- **Serving** is what vLLM {vllm} declares: *LoRA* (one engine serves many personas as adapters), *merged* (no adapters;
  evaluation merges them by default, and a persona is served as a model of its own, from `export --form merged`), or
  *no*. A star means that vLLM runs the code of transformers. Other versions of vLLM may differ.

Three real models went from prompts to a served persona on a CPU, in float32 (`tests/test_real_weights.py`):
SmolLM2-135M, Qwen2.5-Coder-0.5B, and Gemma 3 270M, a base model, with Gemma's format as its `chat_template`. The server's
log-probabilities of greedy answers (5 prompts, up to 24 tokens each) differ from those of transformers by less than
1e-4 nats for the base model, for the persona as an adapter beside the weights, and for the merged weights. A few steps of
training had changed them by up to 0.17, 0.30 and 0.83 nats. Merged weights are stored in bfloat16; its rounding changes a
log-probability by 0.02, 0.01 and 0.02 nats on average.

Other architectures of transformers are allowed. A run refuses, before it starts, those without linear layers or a
causal language model; the rest are verified when they are loaded.

The architecture is `model_type` in the model's `config.json`, in `text_config` if it has one. This page is generated by
`python tests/architectures.py --write`.
"""
CHAT_TEMPLATES = """\
## Chat templates

Every template is rendered before a run starts, and a run is refused if the template rejects a conversation or drops a
message. Templates are adapted once, when a tokenizer is loaded, so that training, generation and serving give the model
the same tokens; `chat_template` of the role replaces a template or gives one to a base model. The formats below are
tested; the first two columns are for a role that does not think:

- **Rendered** says what is adapted.
- **A conversation in training** is one sequence if the template renders earlier turns as they were served. If it renders
  them differently once later turns follow, each answer is a sequence of its own, with the prompt that is served.
- **A student that thinks** is refused if the template would train it on empty thoughts: set its `thinks` to false.
"""


class Result(NamedTuple):
    """What was measured for one architecture.

    Args:
        architecture: name by which the package knows it.
        mode: `packed` or `sequential`.
        nats: largest difference of a log-probability from the model's own, in float32.
        adapted: share of the weights of the decoder's layers that have an adapter.
        skeleton: the same share, computed without weights.
        merge: largest difference of a log-probability between the adapter merged into the weights
            and applied beside them, in nats.
    """

    architecture: str
    mode: str
    nats: float
    adapted: float
    skeleton: float
    merge: float

    @property
    def expected_mode(self) -> str:
        """The mode that the package's table gives."""
        return "packed" if self.architecture in architectures.PACKED else "sequential"


def write_model(name: str, folder: Path) -> None:
    """Save a tiny random model of an architecture."""
    config_class = type(transformers.AutoConfig.for_model(name))
    fields = {k: v for k, v in (COMMON | CONFIGS[name]).items() if v is not None}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**fields))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "sinks" in name:
            torch.nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 1.0)
    model.float().save_pretrained(folder)


def examples(config: Any) -> list[packing.Example]:
    return [[tokens] for tokens in probe.sequences(config)]


def stock_log_probs(path: Path) -> torch.Tensor:
    """Compute the log-probabilities with a model that this package has not changed."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return log_probs_alone(model.eval())


def log_probs_alone(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return probe.own_log_probs(model, packing.pack(examples(model.config)))


def examine(name: str, folder: Path) -> Result:
    """Take an architecture through loading, the probe, an adapter and its merge."""
    path = folder / "base"
    write_model(name, path)
    model = adapters.load(path, ROLE, on_gpu=False).eval()
    mode = "packed" if probe.prepare(model) else "sequential"
    batch = packing.pack(examples(model.config))
    with torch.no_grad():
        values = packing.log_probs(model, batch)
    nats = (values - stock_log_probs(path)).abs().max().item()
    adapted = architectures.adapted_share(model)
    models.weight_names(path, adapters.adapted_layers(model))
    peft_model = adapters.add_lora(model, Lora(rank=4, alpha=8))
    for key, parameter in peft_model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        adapted_values = packing.log_probs(peft_model, batch)
    assert (adapted_values - values).abs().max() > 0.01
    peft_model.save_pretrained(folder / "adapter")
    merged = stock_log_probs(models.merge_into_base(path, folder / "adapter"))
    return Result(
        architecture=architectures.architecture(path),
        mode=mode,
        nats=nats,
        adapted=adapted,
        skeleton=architectures.adapted_share(architectures.skeleton(path)),
        merge=(merged - adapted_values).abs().max().item(),
    )


def page() -> str:
    """Measure all architectures and return the page of the documentation."""
    lines = [
        INTRODUCTION.replace("{vllm}", student_columns.vllm_version()),
        "| architecture | mode | difference | adapted | merge | template | serving |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for name in sorted(CONFIGS):
        if name in architectures.REFUSED:
            lines.append(f"| `{name}` | refused: {architectures.REFUSED[name]} | | | | | |")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            result = examine(name, Path(scratch))
        numbers = f"{power(result.nats)} | {result.adapted:.0%} | {power(result.merge)}"
        served = student_columns.serving(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
        text = f"{student_columns.template_names(name)} | {served}"
        lines.append(f"| `{name}` | {result.mode} | {numbers} | {text} |")
    return "\n".join([*lines, "", CHAT_TEMPLATES, student_columns.template_table()])


def power(value: float) -> str:
    """Return the power of ten that bounds a value: rounding differs between machines."""
    return f"< 1e{max(-4, math.ceil(math.log10(max(value, 1e-9))))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["OPENCHARACTER_CACHE"] = cache
        text = page()
    if arguments.write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
