"""The whole method in one run: how long does it take, and how much of the held time is idle?

Ways:
- `opencharacter`: the run as the command line makes it.
- `restarts`: the same without replacing the weights of running engines, so that each merged adapter
  starts an engine, one engine and one condition after another, none before it is needed, and with
  two jobs to an engine, as before version 0.2.
- `runtime` (only if `--ways` names it): adapters are applied during generation, so that one engine
  serves all conditions but the steered student.

All make everything anew from the same recipe and seed. The environment variable BENCHMARK_MODEL
replaces the recipe's model, for instance by the folder of local weights.

Figures: `wall_s`; `idle_share`, the part of the time in which engines and training workers were
held (of the GPU time, with a GPU) without a request or a training step; `wall_idle_share`, the part
of the wall time in which no job has a request or a step under way; the parts of all jobs'
wall time by cause: `share_working`, `share_starting` (engines), `share_swapping` (weights),
`share_driver` (jobs without engines and workers), `share_training` (what a training takes beside
its steps: workers that start and end, the model that is loaded) and `share_generating` (the same of
generating jobs: tasks that start and storage); `engine_starts` and `weight_swaps`; and `speedup`,
the ratio of the wall time of `restarts` to that of another way.

Run: python benchmarks/run.py --out benchmarks/results       (on a GPU)
     python benchmarks/run.py --out benchmarks/results --cpu (on a CPU)
     python benchmarks/run.py --out /tmp/results --tiny      (a test that it works)
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import SUBJECT, Figures, Machine, Run, Series, Settings, figure

from opencharacter import pipeline
from opencharacter.config import placement as placements
from opencharacter.config.files import load_recipe
from opencharacter.config.recipe import Recipe
from opencharacter.config.roles import Roles
from opencharacter.constitution import schema
from opencharacter.engines import allocation, generate, leases
from opencharacter.engines.leases import Allocation, Interval, covered_seconds
from opencharacter.runtime import cluster
from opencharacter.runtime.manifests import held_time
from opencharacter.runtime.schedule import requests_of
from opencharacter.runtime.stage import Job, TrainingWorkers
from opencharacter.runtime.store import Store

WALL_PARTS = {
    "share_working": "work_seconds",
    "share_starting": "starting_seconds",
    "share_swapping": "swap_seconds",
}
"""Parts of a job's wall time, by the figure that shows them."""
REST = ("share_driver", "share_training", "share_generating")
"""Figures of the rest, by the kind of the job."""

SETTINGS: Settings = {
    "repeats": 1,
    "recipe": "qwen-2.5-coder-1.5b",
    "constitution": "poeticism",
    "placement": "single-gpu-shared",
    "model": os.environ.get("BENCHMARK_MODEL"),
    "sizes": {},
}
SHORT = {"max_tokens": 32}
CPU: Settings = {
    "recipe": "demo",
    "placement": "laptop",
    "model": None,
    "sizes": {
        "distillation": {
            "prompts": {"questions_per_trait": 1, "general": 6},
            "teacher": {"answers": 1, "sampling": SHORT},
            "student": {"answers": 1, "sampling": SHORT},
            "pairs": {"max_drop_rate": 1.0},
            "dpo": {"optimizer": {"epochs": 1}},
        },
        "introspection": {
            "reflection": {"transcripts_per_prompt": 1, "sampling": SHORT},
            "interaction": {"free": 2, "leading": 2, "sampling": SHORT},
            "transcripts": {"max_drop_rate": 1.0},
        },
        "evaluation": {
            "judge": {"gold_items": 8},
            "answers": {"count": 8, "sampling": SHORT},
            "attacks": {"prompts": 1, "sampling": SHORT},
            "coherence": {"prompts": 2},
            "preferences": {"games": 8, "sampling": SHORT},
            "direction": {"texts": 4, "prompts": 4},
            "projection": {"texts": 4},
            "scenarios": {"occasions": 0, "pressures": 0},
            "drift": {"conversations": 0},
            "side_effects": {"items": 0},
            "capabilities": {"tasks": []},
        },
    },
}
"""The demo with fewer rows and without its longest evaluations."""

TINY = CPU


def make_recipe(settings: Settings) -> Recipe:
    """Return the recipe with the benchmark's sizes, and its model in all roles."""
    recipe = load_recipe(settings["recipe"]).model_dump(exclude_unset=True)
    recipe = harness.merged(recipe, settings["sizes"])
    if settings["model"]:
        roles = recipe["roles"]
        recipe["roles"] = {
            name: {**role, "model": settings["model"], "name": roles["teacher"]["name"]}
            for name, role in roles.items()
        }
    return Recipe.model_validate(recipe)


def make_jobs(settings: Settings, storage: Path, adapters: str = "merged") -> list[Job]:
    """Return all jobs of the run.

    Args:
        settings: the benchmark's.
        storage: the run's.
        adapters: how engines of the student's model apply adapters, as in a pool.
    """
    personas = [schema.load(settings["constitution"])]
    pools = {role: {"adapters": adapters} for role in Roles.model_fields}
    placement = harness.placement(settings["placement"], {"pools": pools})
    return pipeline.jobs(make_recipe(settings), personas, placement, Store.at(str(storage)))


def run_all(settings: Settings, series: str) -> Iterator[Run]:
    """Run the method and summarize its manifests."""
    if series == "restarts":
        allocation.swap_sources = lambda *_: {}
        placements.MAX_JOBS_PER_ENGINE = placements.MAX_JOBS_PER_CPU_ENGINE
        pipeline.may_start_early = lambda: False
        for module in (allocation, generate):
            module.run_side_by_side = lambda calls: [call() for call in calls]
    for _ in range(settings["repeats"]):
        with tempfile.TemporaryDirectory() as folder:
            adapters = "runtime" if series == "runtime" else "merged"
            jobs = make_jobs(settings, Path(folder), adapters)
            working = record_work()
            began = time.monotonic()
            cluster.connect(jobs[0].placement)
            manifests = [manifest | {"rest": rest_of(job)} for job, manifest in pipeline.run(jobs)]
            seconds = time.monotonic() - began
            yield summarize(manifests, series, seconds, working)


def record_work() -> list[Interval]:
    """Return a list that grows with the intervals in which jobs have work under way."""
    working: list[Interval] = []

    def usage(allocations: list[Allocation]) -> dict[str, Any]:
        working.extend(one.work for one in allocations)
        return leases.usage(allocations)

    allocation.usage = usage
    return working


def rest_of(job: Job) -> str:
    """Return the figure that shows the time of a job in which it neither works nor waits."""
    requests = requests_of([job])
    trains = any(isinstance(request, TrainingWorkers) for request in requests)
    driver, training, generating = REST
    return training if trains else generating if requests else driver


def summarize(
    manifests: list[dict[str, Any]], series: str, seconds: float, working: list[Interval]
) -> Run:
    """Return the sums over all manifests of a run.

    Args:
        manifests: with the figure that shows what is left of a job's time, as `rest`.
        series: name of the way.
        seconds: wall time of the run.
        working: when its jobs had work under way.
    """
    names = ("seconds", "tokens_out", *WALL_PARTS.values())
    sums = {name: sum(manifest[name] for manifest in manifests) for name in names}
    return {
        "series": series,
        "seconds": seconds,
        "tokens": sums["tokens_out"],
        "idle_share": held_time(manifests).idle_share,
        "wall_idle_share": 1 - covered_seconds(working) / seconds,
        "job_seconds": sums["seconds"],
        **{name: sums[name] for name in WALL_PARTS.values()},
        **{name: sum(rest_seconds(m) for m in manifests if m["rest"] == name) for name in REST},
        "engine_starts": sum(len(manifest["engines_started"]) for manifest in manifests),
        "weight_swaps": sum(len(manifest["engines_swapped"]) for manifest in manifests),
        "stages": {f"{m['scope']}/{m['stage']}": m["seconds"] for m in manifests},
    }


def rest_seconds(manifest: dict[str, Any]) -> float:
    """Return the seconds of a job in which it does nothing that `WALL_PARTS` names."""
    return manifest["seconds"] - sum(manifest[name] for name in WALL_PARTS.values())


def figures(series: Series, settings: Settings, machine: Machine) -> Figures:
    """Return the times and shares of each way, and their ratio."""
    result: Figures = {}
    for name, runs in series.items():
        prefix = "" if name == SUBJECT else f"{name}_"
        result[f"{prefix}wall_s"] = figure([run["seconds"] for run in runs])
        for count in ("idle_share", "wall_idle_share", "engine_starts", "weight_swaps"):
            result[f"{prefix}{count}"] = figure([run[count] for run in runs])
        for share, part in {**WALL_PARTS, **{name: name for name in REST}}.items():
            result[f"{prefix}{share}"] = figure([run[part] / run["job_seconds"] for run in runs])
    if "restarts" in series:
        seconds = {name: [run["seconds"] for run in runs] for name, runs in series.items()}
        for name in series.keys() - {"restarts"}:
            speedup = "speedup" if name == SUBJECT else f"{name}_speedup"
            result[speedup] = harness.ratio(seconds["restarts"], seconds[name])
    return result


BENCHMARK = harness.Benchmark(
    name="run",
    script=Path(__file__).resolve(),
    settings=SETTINGS,
    tiny=TINY,
    ways={name: partial(run_all, series=name) for name in (SUBJECT, "restarts", "runtime")},
    extra=("runtime",),
    figures=figures,
    cpu=CPU,
)

if __name__ == "__main__":
    harness.main(BENCHMARK, __doc__ or "")
