"""Several personas in one run: does each engine start only once, and does `plan` predict the time?

The benchmark runs the whole method at its smallest with the embedded model in every role, so a run
of n personas has 1 + 2n engines: the model itself, each persona after DPO, and each final persona.
The placement has resources for all engines that are needed at a time in addition to training, and
lets one job generate or train at a time, which is what two cores can serve.

Ways:
- `one`: a run of one persona, from which speeds are measured as by `plan --speed STORAGE`.
- `several`: the same recipe with `personas` of them.

Figures: `wall_s` of `several`, `predicted_s` by `plan` from the speeds of `one`, and
`predicted_over_measured`; `engines` and `engine_starts`; `idle`, the share of the time in which
engines and workers were held without work; and the speeds, so that `plan --speed` accepts the file.

Run: python benchmarks/personas.py --out benchmarks/results     (on a CPU)
     python benchmarks/personas.py --out /tmp/results --tiny    (two personas)
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import Figures, Machine, Run, Series, Settings, figure

from opencharacter import pipeline
from opencharacter.config.files import load_recipe
from opencharacter.config.placement import Placement
from opencharacter.config.recipe import Recipe
from opencharacter.constitution import schema
from opencharacter.planning import simulation
from opencharacter.planning.speeds import Speeds, measure_speeds
from opencharacter.runtime import cluster
from opencharacter.runtime.manifests import held_time
from opencharacter.runtime.stage import Job
from opencharacter.runtime.store import Store

PERSONAS = ("poeticism", "humor", "remorse")
SHORT = {"temperature": 0.6, "top_p": 1.0, "trim": True}
NO_DROP_LIMIT = {"max_drop_rate": 1.0}
SMALL_LORA = {
    "lora": {"rank": 8, "alpha": 16},
    "optimizer": {"global_batch_size": 8, "learning_rate": 2e-4},
}
ONE_WORD = {"max_tokens": 4, "temperature": 0.1, "repetition_penalty": 1.0, "typical_tokens": 3}
CONDITIONS = ["base", "full"]


def short_answers(tokens: int, typical: int) -> dict[str, Any]:
    """Settings of a stage whose answers have few tokens."""
    return {"sampling": {**SHORT, "max_tokens": tokens, "typical_tokens": typical}, **NO_DROP_LIMIT}


SETTINGS: Settings = {
    "personas": 3,
    "recipe": {
        "name": "personas",
        "distillation": {
            "prompts": {"questions_per_trait": 1, "general": 6},
            "teacher": {"answers": 1, "exemplars": True, "prefill": False, **short_answers(32, 28)},
            "student": {"answers": 1, **short_answers(32, 28)},
            "pairs": NO_DROP_LIMIT,
            "dpo": SMALL_LORA,
        },
        "introspection": {
            "reflection": {"transcripts_per_prompt": 1, **short_answers(48, 44)},
            "interaction": {"free": 1, "leading": 1, "turns": 4, **short_answers(32, 28)},
            "transcripts": NO_DROP_LIMIT,
            "sft": SMALL_LORA,
        },
        "evaluation": {
            "judge": {"gold_items": 4, "min_agreement": None, "sampling": ONE_WORD},
            "answers": {"conditions": CONDITIONS, "count": 8, **short_answers(32, 28)},
            "preferences": {
                "conditions": CONDITIONS,
                "games": 6,
                "traits": ["poetic", "technical", "casual", "formal"],
                "judge": ONE_WORD,
                **short_answers(32, 28),
            },
            "attacks": {
                "conditions": CONDITIONS,
                "prompts": 4,
                "kinds": ["plain", "stop"],
                **short_answers(32, 28),
            },
            "coherence": {"prompts": 3, "sampling": ONE_WORD, **NO_DROP_LIMIT},
        },
    },
    "placement": {
        "name": "personas",
        "pools": {role: {"cpus": 0.15, "memory_gib": 1} for role in ("teacher", "student", "judge")}
        | {"prompt_generator": {"cpus": 0.15, "memory_gib": 1}},
        "training": {"cpus": 2},
        "ray_cpus": 3,
        "max_concurrent_jobs": 1,
    },
}
TINY: Settings = {"personas": 2}


def make_jobs(settings: Settings, count: int, storage: Path) -> list[Job]:
    """The jobs of a run with a number of personas."""
    roles = load_recipe("demo").roles.model_dump()
    recipe = Recipe.model_validate({"roles": roles, **settings["recipe"]})
    personas = [schema.load(name) for name in PERSONAS[:count]]
    placement = Placement.model_validate(settings["placement"])
    return pipeline.jobs(recipe, personas, placement, Store.at(str(storage)))


def run_personas(settings: Settings, series: str) -> Iterator[Run]:
    """Run the pipeline once and summarize its manifests."""
    count = 1 if series == "one" else settings["personas"]
    with tempfile.TemporaryDirectory() as folder:
        jobs = make_jobs(settings, count, Path(folder))
        cluster.connect(jobs[0].placement)
        began = time.monotonic()
        manifests = [manifest for _, manifest in pipeline.run(jobs)]
        seconds = time.monotonic() - began
        started = [name for manifest in manifests for name in manifest["engines_started"]]
        yield {
            "series": series,
            "seconds": seconds,
            "tokens": sum(manifest["tokens_out"] for manifest in manifests),
            "engines_started": started,
            "idle_share": held_time(manifests).idle_share,
            "speeds": measure_speeds(folder).model_dump(),
            "stages": {m["scope"] + "/" + m["stage"]: m["seconds"] for m in manifests},
        }


def figures(series: Series, settings: Settings, machine: Machine) -> Figures:
    """The predicted and the measured time."""
    result: Figures = {}
    if "one" in series:
        speeds = Speeds.model_validate(series["one"][0]["speeds"])
        jobs = make_jobs(settings, settings["personas"], Path("unused"))
        planned = simulation.wall_seconds(simulation.plan(jobs, speeds))
        numbers = {k: v for k, v in speeds.model_dump().items() if k != "stages"}
        result |= {name: figure([value]) for name, value in numbers.items()}
        result |= {"one_s": figure([series["one"][0]["seconds"]]), "predicted_s": figure([planned])}
    if "several" in series:
        runs = series["several"]
        walls = [run["seconds"] for run in runs]
        result |= {
            "wall_s": figure(walls),
            "engines": figure([len(set(run["engines_started"])) for run in runs]),
            "engine_starts": figure([len(run["engines_started"]) for run in runs]),
            "idle": figure([run["idle_share"] for run in runs]),
        }
        if "one" in series:
            result["predicted_over_measured"] = harness.ratio([planned], walls)
    return result


BENCHMARK = harness.Benchmark(
    name="personas",
    script=Path(__file__).resolve(),
    settings=SETTINGS,
    tiny=TINY,
    ways={name: partial(run_personas, series=name) for name in ("one", "several")},
    figures=figures,
)

if __name__ == "__main__":
    harness.main(BENCHMARK, __doc__ or "")
