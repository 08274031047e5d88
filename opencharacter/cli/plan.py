"""`opencharacter plan`: rows, tokens, time and cost of a run before it starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated

import typer

from opencharacter import models, pipeline
from opencharacter.cli.options import (
    Names,
    PlacementFile,
    RecipeName,
    Run,
    Smoke,
    Storage,
    job_table,
    print_whole,
)
from opencharacter.config.placement import Placement, total
from opencharacter.planning import cost
from opencharacter.runtime.progress import console, duration
from opencharacter.runtime.stage import Job

GIB = 2**30
HOURS = ("hours", "GPU-hours", "idle", "price")


def plan(
    recipe: RecipeName,
    names: Names,
    placement: PlacementFile = None,
    storage: Storage = None,
    smoke: Smoke = False,
    speed: Annotated[
        str | None,
        typer.Option(help="File of speeds, or a storage with runs: adds time, GPU-hours, price."),
    ] = None,
) -> None:
    """Say what a run would do: rows and tokens by stage, what is done, what is missing here."""
    asked = Run(recipe, names, placement, storage, smoke)
    speeds = cost.load_speeds(speed) if speed else None
    states = {job.dataset: job.state() for job in asked.jobs}
    left = [job for job in asked.jobs if states[job.dataset][0] != "done"]
    planned = cost.plan(left, speeds) if speeds and left else []
    table = job_table("rows", "tokens read", "written", "trained", *(HOURS if speeds else ()))
    for name, group in plan_groups(asked).items():
        said = plan_state([states[job.dataset] for job in group])
        table.add_row(name, said, *plan_cells(group, planned if speeds else None))
    table.add_row("total", "", *plan_cells(asked.jobs, planned if speeds else None), style="bold")
    print_whole(table)
    if speeds:
        for line in (*plan_schedule(planned, asked.placement), *plan_savings(asked, speeds)):
            console.print(line, soft_wrap=True, highlight=False)
    for name, group in plan_groups(asked).items():
        told = (getattr(job.stage.module, "notes", lambda _: ())(job) for job in group)
        for line in dict.fromkeys(line for lines in told for line in lines):
            console.print(f"{name}: {line}", soft_wrap=True)
    for name in type(asked.recipe.roles).model_fields:
        console.print(engine_line(asked, name), soft_wrap=True)
    for line in missing_here(asked):
        console.print(f"missing on this machine: {line}", soft_wrap=True)


def engine_line(asked: Run, name: str) -> str:
    """What a role's engine will be: where, how wide, and the memory that it needs."""
    from opencharacter.engines.backends import engine_arguments
    from opencharacter.engines.spec import EngineSpec

    role, pool = getattr(asked.recipe.roles, name), getattr(asked.placement.pools, name)
    spec = EngineSpec(role, pool)
    if not spec.has_weights:
        return f"engine {name}: {role.endpoint or role.model}"
    step = engine_arguments(spec)["max_num_batched_tokens"]
    said = (
        f"engine {name}: {role.model}, {pool.replicas} x {pool.gpus:g} GPU, each up to "
        f"{pool.max_num_seqs} conversations of {role.max_model_len:,} tokens, "
        f"{step:,} tokens a step"
    )
    path = models.local_weights(role.model)
    if path is None:
        return said
    needs = models.memory_footprint(path)
    cache = needs.per_token * role.max_model_len * pool.max_num_seqs
    given = "" if pool.gpus else f" ({pool.kv_cache_gib:g} GiB given)"
    return (
        f"{said}; weights {needs.weights / GIB:.2g} GiB, "
        f"cache {cache / GIB:.2g} GiB if all were full{given}"
    )


def plan_groups(asked: Run) -> dict[str, list[Job]]:
    """Jobs by stage; a dataset's name has `*` where several personas have one."""
    groups: dict[str, list[Job]] = {}
    for job in asked.jobs:
        name = job.dataset
        if job.constitution and len(asked.constitutions) > 1:
            own = job.scope.split("/")
            name = "/".join([*own[:-1], "*", job.stage.name])
        groups.setdefault(name, []).append(job)
    return groups


def plan_state(states: list[tuple[str, list[str]]]) -> str:
    """What storage holds of a group of jobs."""
    said = Counter(": ".join([state, *differing[:1]]) for state, differing in states)
    if len(said) == 1:
        return next(iter(said))
    return ", ".join(f"{count} {state}" for state, count in said.items())


def plan_cells(group: list[Job], planned: list[cost.PlannedJob] | None) -> list[str]:
    """The cells of some jobs in `plan`."""
    found = [job.stage.module.estimate(job) for job in group]
    numbers = [sum(getattr(e, n) for e in found) for n in ("rows", "tokens_in", "tokens_out")]
    cells = [*map(plan_cell, numbers), plan_cell(sum(e.trained or e.read for e in found))]
    if planned is None:
        return cells
    mine = {job.dataset for job in group}
    sums = cost.sums(one for one in planned if one.job.dataset in mine)
    price = sums.gpu_hours * group[0].placement.price_per_gpu_hour
    idle = f"{sums.idle:.0%}" if sums.gpu_hours else ""
    return [*cells, plan_cell(sums.hours), plan_cell(sums.gpu_hours), idle, plan_cell(price)]


def plan_schedule(planned: list[cost.PlannedJob], placement: Placement) -> list[str]:
    """How long what is not done will take, and what it waits for, but for short steps."""
    there, whole = cost.planning_resources(placement), cost.wall(planned)
    by_stage: dict[str, list[float]] = {}
    for one in cost.critical_path(planned):
        by_stage.setdefault(one.job.stage.name, []).append(one.ended - one.began)
    steps = [
        f"{f'{len(took)} x ' if len(took) > 1 else ''}{stage} {duration(sum(took))}"
        for stage, took in by_stage.items()
        if sum(took) >= whole / 100
    ]
    return [
        f"wall time {duration(whole)} (GPUs: {there.gpus:g}, CPUs: {there.cpus:g}), "
        f"{sum(one.starts for one in planned)} starts of an engine",
        f"critical path: {' > '.join(steps)}",
    ]


def plan_savings(asked: Run, speeds: cost.Speeds) -> Iterator[str]:
    """What asking for less would save of a whole run."""
    whole = cost.plan(asked.jobs, speeds)
    for less in cost.smaller(asked.recipe):
        jobs = pipeline.jobs(less.recipe, asked.constitutions, asked.placement, asked.store)
        made = cost.plan(jobs, speeds)
        saved = cost.wall(whole) - cost.wall(made)
        gpus = cost.sums(whole).gpu_hours - cost.sums(made).gpu_hours
        hours = f" and {gpus:,.1f} GPU-hours" if gpus else ""
        yield f"{less.what}: {duration(saved)}{hours} less; {less.effect}"


def plan_cell(number: float) -> str:
    """Whole numbers with commas, others to two places, nothing for nothing."""
    if not number:
        return ""
    return f"{number:,}" if isinstance(number, int) else f"{number:,.2f}"


def missing_here(asked: Run) -> list[str]:
    """What this machine lacks to run the recipe itself."""
    import importlib.util

    from opencharacter.engines.spec import EngineSpec

    roles, pools = dict(asked.recipe.roles), asked.placement.pools
    found = [
        f"{name}: {models.missing_requirement(role)}"
        for name, role in roles.items()
        if models.missing_requirement(role)
    ]
    if importlib.util.find_spec("vllm") is None:
        found.append("vLLM: pip install '.[vllm,capabilities]' in the checkout, or make demo")
    import torch

    rooms = [EngineSpec(role, getattr(pools, name)).resources for name, role in roles.items()]
    wants_gpu = total([*rooms, asked.placement.training.resources]).gpus
    if wants_gpu and not torch.cuda.is_available():
        found.append("a GPU (submit to a cluster, or use the demo recipe)")
    return found
