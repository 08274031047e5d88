"""Evaluation through one Ray Serve application against engines with merged weights.

The stages answers, preferences, attacks and coherence of several personas, with one model as
student and judge: the one that the environment variable BENCHMARK_MODEL names, with eleven personas
on a GPU; without it, the embedded one with two personas on a CPU. The personas are random adapters,
since training them is no part of the comparison; both ways read the same files.

Ways:
- `batch`: every condition has an engine whose weights have the adapter merged in.
- `served`: one application with all adapters, applied at run time.
- `rounding`: an adapter merged in and applied at run time, in bfloat16 by transformers and PEFT.

Figures: `batch_rows_per_s`, `served_rows_per_s` and `ratio_rows_per_s`, starts of engines included;
`batch_idle_share` and `idle_share` (served), the share of the time in which engines were held
without work; starts and swaps; `equal_answers` and `equal_base_answers`, the share of the sampled
answers with and without an adapter that are equal in both ways; `log_prob_mean_difference` and
`log_prob_max_difference`, absolute differences of the log-probabilities of tokens in nats, and
`equal_likeliest_tokens`.

Run: python benchmarks/served_evaluation.py --out benchmarks/results
     python benchmarks/served_evaluation.py --out /tmp/results --tiny    (one persona, on a CPU)
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import harness
import pyarrow as pa
import ray
from harness import Figures, Machine, Run, Series, Settings, figure

from opencharacter import lora, models, pipeline
from opencharacter.config.files import load_recipe
from opencharacter.config.recipe import Recipe
from opencharacter.config.roles import Roles
from opencharacter.constitution import schema
from opencharacter.runtime import cluster
from opencharacter.runtime.manifests import held_time
from opencharacter.runtime.stage import Job, StageResult
from opencharacter.runtime.store import Store
from opencharacter.training import architectures

EMBEDDED = "embedded:smollm2-135m"
TRAINED = ("distillation/dpo", "persona/merge")
ANSWERED = ("evaluation/answers", "evaluation/preferences", "evaluation/attacks")
MEASURED = ("evaluation/judge", *ANSWERED, "evaluation/coherence")
ONE_WORD = {"max_tokens": 4, "temperature": 0.1, "repetition_penalty": 1.0}
CONDITIONS = ["base", "distilled", "full"]
TRAITS = ["poetic", "technical", "casual", "formal"]


def sizes(tokens: int, answers: int, games: int, attacked: int, pairs: int) -> Settings:
    """Return the evaluation of a recipe with some numbers of rows.

    Args:
        tokens: the most tokens of an answer.
        answers: held-out prompts of each condition.
        games: games of each condition.
        attacked: prompts that are attacked.
        pairs: pairs of answers whose coherence is compared.
    """
    any_answer = {"conditions": CONDITIONS, "max_drop_rate": 1.0}
    short = {"sampling": {"temperature": 0.6, "top_p": 1.0, "trim": True, "max_tokens": tokens}}
    return {
        "judge": {"gold_items": 4, "min_agreement": None, "sampling": ONE_WORD},
        "answers": {"count": answers, **any_answer, **short},
        "preferences": {
            "games": games,
            "traits": TRAITS,
            "judge": ONE_WORD,
            **any_answer,
            **short,
        },
        "attacks": {"prompts": attacked, "kinds": ["plain", "stop"], **any_answer, **short},
        "coherence": {"prompts": pairs, "sampling": ONE_WORD, "max_drop_rate": 1.0},
    }


GPU: Settings = {
    "personas": 11,
    "repeats": 1,
    "rank": 64,
    "texts": 24,
    "model": os.environ.get("BENCHMARK_MODEL"),
    "evaluation": sizes(tokens=128, answers=100, games=200, attacked=50, pairs=50),
    "placement": "single-gpu-shared",
    "changes": {"serving": {"max_loras": 12, "max_adapters": 24}},
}
CPU: Settings = {
    "personas": 2,
    "repeats": 3,
    "rank": 8,
    "model": EMBEDDED,
    "evaluation": sizes(tokens=24, answers=8, games=8, attacked=2, pairs=2),
    "placement": "laptop",
    "changes": {
        "pools": {role: {"cpus": 0.6, "memory_gib": 1.5} for role in ("student", "judge")},
        "ray_cpus": 3,
        "max_concurrent_jobs": 4,
    },
}
SETTINGS = GPU if "BENCHMARK_MODEL" in os.environ else CPU
TINY: Settings = CPU | {"personas": 1, "repeats": 1, "texts": 4}


def weights(settings: Settings) -> Path:
    """Return the folder of the model's weights."""
    return models.resolve(settings["model"])


def write_adapter(folder: Path, settings: Settings, seed: int) -> None:
    """Write a random adapter of all linear layers, of about the size of a trained one."""
    import torch
    from safetensors.torch import save_file

    rank, model = settings["rank"], architectures.skeleton(weights(settings))
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Any] = {}
    names = set()
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "layers" in name:
            names.add(name.rpartition(".")[2])
            a = torch.randn(rank, layer.in_features, generator=generator)
            b = torch.randn(layer.out_features, rank, generator=generator)
            tensors[f"{lora.PEFT_PREFIX}{name}{lora.LORA_A}"] = a / layer.in_features**0.5
            tensors[f"{lora.PEFT_PREFIX}{name}{lora.LORA_B}"] = 0.02 * b
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
    config |= {"target_modules": sorted(names), "base_model_name_or_path": settings["model"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def make_recipe(settings: Settings) -> Recipe:
    """Return the recipe, with one model in all roles."""
    role = load_recipe("demo").roles.student
    role = role.model_copy(update={"model": settings["model"]})
    lora_rank = {"lora": {"rank": settings["rank"], "alpha": settings["rank"]}}
    return Recipe.model_validate(
        {
            "name": "served",
            "roles": dict.fromkeys(Roles.model_fields, role),
            "evaluation": settings["evaluation"],
            "distillation": {"dpo": lora_rank},
            "introspection": {"sft": lora_rank},
        }
    )


def make_jobs(settings: Settings, storage: Path, served: bool) -> list[Job]:
    """The jobs of a run whose personas have random adapters."""
    way = {"evaluation": {"served": "own" if served else None}}
    placement = harness.placement(settings["placement"], settings["changes"] | way)
    recipe = make_recipe(settings)
    personas = [schema.load(name) for name in schema.packaged()[: settings["personas"]]]
    jobs = pipeline.jobs(recipe, personas, placement, Store.at(str(storage)))
    for number, job in enumerate(jobs):
        if job.stage.name in TRAINED:
            write_adapter(storage / job.dataset / "adapter", settings, number)
        elif job.stage.name.startswith("evaluation/") and "steering" not in job.stage.name:
            continue
        rows = pa.table({"id": ["1"], "prompt": ["What is the best way to learn to swim?"]})
        job.store.write_tables(job.dataset, [rows], rows.schema)
        pipeline.finish(job, StageResult(1), 1)
    return jobs


def evaluate(settings: Settings, served: bool) -> Iterator[Run]:
    """Run the evaluation several times, each in an empty storage and a new Ray cluster.

    So no engine of one repeat is left for the next one.
    """
    for _ in range(settings["repeats"]):
        with tempfile.TemporaryDirectory() as folder:
            run = evaluate_once(make_jobs(settings, Path(folder), served), served)
        ray.shutdown()
        yield run


def evaluate_once(jobs: list[Job], served: bool) -> Run:
    """Run the evaluation of jobs whose personas are trained."""
    measured = [job for job in jobs if job.stage.name in MEASURED]
    cluster.connect(jobs[0].placement)
    began = time.monotonic()
    manifests = [manifest for _, manifest in pipeline.run(measured)]
    seconds = time.monotonic() - began
    rows = [
        row
        for job in measured
        if job.stage.name in ANSWERED
        for row in job.store.read_table(job.dataset).to_pylist()
    ]
    return {
        "series": "served" if served else "batch",
        "seconds": seconds,
        "tokens": sum(manifest["tokens_out"] for manifest in manifests),
        "rows": sum(manifest["rows"] for manifest in manifests),
        "starts": sum(len(manifest["engines_started"]) for manifest in manifests),
        "swaps": sum(len(manifest["engines_swapped"]) for manifest in manifests),
        "idle_share": held_time(manifests).idle_share,
        "prompts": {row["id"]: row["prompt"] for row in rows},
        "answers": {row["id"]: row["answer"] for row in rows if row["condition"] != "base"},
        "base_answers": {row["id"]: row["answer"] for row in rows if row["condition"] == "base"},
    }


def rounding(settings: Settings) -> Iterator[Run]:
    """Log-probabilities of gold texts with an adapter merged in, and applied at run time."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from opencharacter.evaluation.judge import gold
    from opencharacter.text.chat import user
    from opencharacter.text.templates import load_tokenizer, prompt_ids

    base = weights(settings)
    tokenizer = load_tokenizer(base, make_recipe(settings).roles.student)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        adapter = Path(folder) / "adapter"
        write_adapter(adapter, settings, 1)
        merged: Any = AutoModelForCausalLM.from_pretrained(
            models.merge_into_base(base, adapter), dtype=torch.bfloat16
        )
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        runtime: Any = PeftModel.from_pretrained(plain, adapter).to(torch.bfloat16)
        began, equal, differences = time.monotonic(), [], []
        for item in gold()[: settings["texts"]]:
            prompt = prompt_ids(tokenizer, [user(item["prompt"])], "")
            text = tokenizer(item["answer"], add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + text])
            both = (
                model(input_ids=ids).logits[0, len(prompt) - 1 : -1] for model in (merged, runtime)
            )
            one, two = (logits.float().log_softmax(-1) for logits in both)
            written = ids[0, len(prompt) :, None]
            differences += (one - two).gather(-1, written).abs().flatten().tolist()
            equal += (one.argmax(-1) == two.argmax(-1)).tolist()
        yield {
            "series": "rounding",
            "seconds": time.monotonic() - began,
            "tokens": len(differences),
            "equal": sum(equal) / len(equal),
            "mean": sum(differences) / len(differences),
            "max": max(differences),
        }


def figures(series: Series, settings: Settings, machine: Machine) -> Figures:
    """Rates, idle shares and starts of each way, and how far the results differ."""
    result: Figures = {}
    rates: dict[str, list[float]] = {}
    for way in ("batch", "served"):
        if way in series:
            runs = series[way]
            rates[way] = [run["rows"] / run["seconds"] for run in runs]
            prefix = "batch_" if way == "batch" else ""
            result |= {
                f"{way}_rows_per_s": figure(rates[way]),
                f"{way}_rows": figure([run["rows"] for run in runs]),
                f"{way}_seconds": figure([run["seconds"] for run in runs]),
                f"{way}_starts": figure([run["starts"] for run in runs]),
                f"{way}_swaps": figure([run["swaps"] for run in runs]),
                f"{prefix}idle_share": figure([run["idle_share"] for run in runs]),
            }
    if len(rates) == 2:
        result["ratio_rows_per_s"] = harness.ratio(rates["served"], rates["batch"])
        batch, served = (series[way][0] for way in ("batch", "served"))
        if batch["prompts"] != served["prompts"]:
            raise ValueError("the two ways have different ids or prompts")
        for name in ("answers", "base_answers"):
            equal = [served[name][row] == text for row, text in batch[name].items()]
            result[f"equal_{name}"] = figure([sum(equal) / len(equal)])
            result[f"compared_{name}"] = figure([len(equal)])
    if "rounding" in series:
        runs = series["rounding"]
        result |= {
            "log_prob_mean_difference": figure([run["mean"] for run in runs]),
            "log_prob_max_difference": figure([run["max"] for run in runs]),
            "compared_tokens": figure([run["tokens"] for run in runs]),
            "equal_likeliest_tokens": figure([run["equal"] for run in runs]),
        }
    return result


BENCHMARK = harness.Benchmark(
    name="served_evaluation",
    script=Path(__file__).resolve(),
    settings=SETTINGS,
    tiny=TINY,
    ways={
        "served": partial(evaluate, served=True),
        "batch": partial(evaluate, served=False),
        "rounding": rounding,
    },
    figures=figures,
)

if __name__ == "__main__":
    harness.main(BENCHMARK, __doc__ or "")
