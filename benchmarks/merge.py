"""Benchmark of merging two LoRA adapters of rank 64 with random factors, shaped for Llama 3.1 8B.

It runs on the CPU without a base model. Each way runs in its own process, whose peak memory is
recorded. Ways: `merge` (exact, rank 128), `svd` (rank 64), and `peft_linear`.

Run: python benchmarks/merge.py --out benchmarks/results
     python benchmarks/merge.py --out /tmp/results --tiny
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import LLAMA_8B, TINY_LLAMA, Figures, Machine, Run, Series, Settings

from opencharacter.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LORA_A, LORA_B, PEFT_PREFIX
from opencharacter.persona.merge import WeightedAdapter, merge

SETTINGS: Settings = {"repeats": 3, "shape": LLAMA_8B, "rank": 64, "environment": {}}
TINY: Settings = {"repeats": 1, "shape": TINY_LLAMA, "rank": 8}
WAYS: dict[str, dict[str, Any]] = {
    "merge": {},
    "svd": {"rank": True},
    "peft_linear": {"peft_linear": True},
}


def linear_layers(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the name and the shape (out, in) of every linear layer except the head."""
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    queries = shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    layers = range(shape["num_hidden_layers"])
    return {f"model.layers.{n}.{name}": size for n in layers for name, size in layer.items()}


def write_adapter(folder: Path, settings: Settings, seed: int) -> None:
    """Write an adapter in the format of training, in float32."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    generator, rank = torch.Generator().manual_seed(seed), settings["rank"]
    tensors = {}
    for module, (out, into) in linear_layers(settings["shape"]).items():
        tensors[f"{PEFT_PREFIX}{module}{LORA_A}"] = torch.randn(rank, into, generator=generator)
        tensors[f"{PEFT_PREFIX}{module}{LORA_B}"] = torch.randn(out, rank, generator=generator)
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))


def run_way(name: str, settings: Settings) -> Iterator[Run]:
    """Merge two adapters; writing the inputs does not count towards time or memory."""
    options = dict(WAYS[name])
    if "rank" in options:
        options["rank"] = settings["rank"]
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / str(n) for n in range(2)]
        for seed, folder in enumerate(folders):
            harness.apart(partial(write_adapter, folder, settings, seed))
        for repeat in range(settings["repeats"]):
            target = Path(scratch) / f"merged-{repeat}"
            target.mkdir()
            start = time.time()
            composition = merge(
                [WeightedAdapter(folders[0], 1.0), WeightedAdapter(folders[1], 0.25)],
                target,
                **options,
            )
            yield {
                "series": name,
                "s": time.time() - start,
                "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
                "relative_error": composition["relative_error"],
            }


def figures(series: Series, settings: Settings, machine: Machine) -> Figures:
    """Return seconds, peak memory and error of each way."""
    return {
        f"{name}_{kind}": harness.figure([run[kind] for run in runs])
        for name, runs in sorted(series.items())
        for kind in ("s", "gb", "relative_error")
    }


BENCHMARK = harness.Benchmark(
    name="merge",
    script=Path(__file__).resolve(),
    settings=SETTINGS,
    tiny=TINY,
    ways={name: partial(run_way, name) for name in WAYS},
    figures=figures,
)

if __name__ == "__main__":
    harness.main(BENCHMARK, __doc__ or "")
