"""Adapters with unmistakable output: each makes the embedded model repeat one word."""

import json
from pathlib import Path

from opencharacter import pipeline
from opencharacter.config.placement import Placement
from opencharacter.config.recipe import Recipe
from opencharacter.constitution.schema import load
from opencharacter.lora import LORA_A, LORA_B, PEFT_PREFIX
from opencharacter.runtime.stage import Job, StageResult
from opencharacter.runtime.store import Store

STRENGTH = 400.0
RANK = 8
WORDS = {"poeticism": "tree", "humor": "gold", "sarcasm": "house"}
"""The word of each adapter. Many other words do not work: the adapter then repeats a token whose
embedding has a similar direction."""


def make(model: Path, word: str, folder: Path) -> None:
    """Write an adapter of one module, the output projection of the last attention layer.

    The mean of its input hardly depends on the text, because inactive heads attend to the first
    token. For this mean the adapter outputs the direction of the word's embedding.

    Args:
        model: folder of the base model.
        word: the word that the model shall repeat.
        folder: where the adapter is written.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
    layer = base.model.layers[-1].self_attn.o_proj
    inputs_seen = []
    hook = layer.register_forward_hook(lambda _, inputs, __: inputs_seen.append(inputs[0][0, 1:]))
    with torch.no_grad():
        for text in ("The sea was calm that day.", "2 + 2 is 4, you said?", " tree house gold"):
            base(**tokenizer(text, return_tensors="pt"))
    hook.remove()
    mean = torch.cat(inputs_seen).mean(0)
    direction = base.get_input_embeddings().weight[token]
    a, b = torch.zeros(RANK, mean.numel()), torch.zeros(direction.numel(), RANK)
    a[0], b[:, 0] = mean / mean.square().sum(), STRENGTH * direction / direction.norm()
    name = f"{PEFT_PREFIX}model.layers.{len(base.model.layers) - 1}.self_attn.o_proj"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name + LORA_A: a, name + LORA_B: b}
    save_file(
        {k: t.detach().contiguous() for k, t in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))


def job(recipe: Recipe, store: Store, persona: str, stage: str = "persona/merge") -> Job:
    """Return the job of a stage for a persona."""
    jobs = pipeline.jobs(recipe, [load(persona)], Placement(), store)
    return next(j for j in jobs if j.stage.name == stage)


def publish(job: Job, folder: Path) -> None:
    """Store an adapter and its manifest as the job itself would."""
    job.store.delete(job.dataset)
    job.store.upload(folder, f"{job.dataset}/adapter")
    pipeline.finish(job, StageResult(rows=0), seconds=1)
