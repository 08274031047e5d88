"""`opencharacter plan`: rows, tokens, time and cost of a run before it starts."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from opencharacter import models, pipeline
from opencharacter.api import Run
from opencharacter.cli.options import (
    PersonaOption,
    PlacementOption,
    RecipeArgument,
    SetOption,
    SmokeOption,
    StorageOption,
    job_table,
    open_run,
    print_table,
)
from opencharacter.config.placement import Placement, Pool, fits, total_resources
from opencharacter.config.roles import Role
from opencharacter.distillation.sources import HUB, check_hub_source
from opencharacter.planning import cost, simulation
from opencharacter.planning.preflight import asks_teacher
from opencharacter.planning.savings import savings
from opencharacter.planning.speeds import Speeds, load_speeds
from opencharacter.runtime.cluster import GIB
from opencharacter.runtime.progress import console, duration
from opencharacter.runtime.stage import Job
from opencharacter.runtime.staleness import explain_stale

if TYPE_CHECKING:
    from opencharacter.engines.spec import EngineSpec

COUNTS = ("rows", "tokens read", "generated", "trained")
COSTS = ("hours", "GPU-hours", "idle", "price")


def plan(
    recipe: RecipeArgument,
    constitution: PersonaOption,
    placement: PlacementOption = None,
    storage: StorageOption = None,
    set_: SetOption = None,
    smoke: SmokeOption = False,
    speed: Annotated[
        str | None,
        typer.Option(
            help="A .yaml file of speeds, or a storage with finished runs to measure them from. "
            "Adds time, GPU-hours and price."
        ),
    ] = None,
) -> None:
    """Show what a run would do, without starting it: rows, tokens, cost, and what is missing."""
    run = open_run(recipe, constitution, placement, storage, smoke, set_)
    speeds = load_speeds(speed) if speed else None
    states = {job.dataset: job.state() for job in run.jobs}
    unfinished = [job for job in run.jobs if states[job.dataset][0] != "done"]
    planned = simulation.plan(unfinished, speeds) if speeds and unfinished else []
    table = job_table(*COUNTS, *(COSTS if speeds else ()))
    groups = group_jobs(run)
    for name, group in groups.items():
        state = describe_states([states[job.dataset] for job in group])
        table.add_row(name, state, *plan_cells(group, planned if speeds else None))
    table.add_row("total", "", *plan_cells(run.jobs, planned if speeds else None), style="bold")
    print_table(table)
    if speeds:
        for line in (*schedule_lines(planned, run.placement), *saving_lines(run, speeds)):
            console.print(line, soft_wrap=True, highlight=False)
    for name, group in groups.items():
        for note in stage_notes(group):
            console.print(f"{name}: {note}", soft_wrap=True)
    engines = {role: describe_engine(run, role) for role in type(run.recipe.roles).model_fields}
    for line in roles_by_text(engines):
        console.print(f"engine {line}", soft_wrap=True)
    for line in unchecked_sources(run):
        console.print(line, soft_wrap=True)
    for line in missing_here(run):
        console.print(f"missing on this machine: {line}", soft_wrap=True)


def unchecked_sources(run: Run) -> list[str]:
    """Check the prompts on the Hugging Face Hub; return a line for each that cannot be reached.

    Raises:
        UserError: if a dataset does not exist or its first rows have no prompt.
    """
    recipe = run.recipe
    sources = {recipe.distillation.prompts.general_prompts, recipe.evaluation.answers.prompts}
    lines = []
    for source in sorted(source for source in sources if source.startswith(HUB)):
        try:
            check_hub_source(source)
        except ConnectionError:
            lines.append(f"prompts {source!r} could not be checked: the Hub cannot be reached")
    return lines


def stage_notes(group: list[Job]) -> list[str]:
    """Return the distinct notes that a stage has for some of its jobs."""
    notes = (getattr(job.stage.module, "notes", lambda _: ())(job) for job in group)
    return list(dict.fromkeys(note for of_job in notes for note in of_job))


def sleep_note(placement: Placement, spec: EngineSpec) -> str:
    """Say what happens to an engine during training if its pool asks for sleep."""
    from opencharacter.planning.cost import planning_resources

    if not spec.pool.sleep_for_training:
        return ""
    if not spec.sleeps:
        return ", stopped if training needs its CPUs, because engines on a CPU cannot sleep"
    together = [spec.resources, placement.training.resources]
    if fits(together, planning_resources(placement)):
        return ", asleep during training"
    return ", stopped for training, because both do not fit into the cluster side by side"


def roles_by_text(texts: Mapping[str, str]) -> list[str]:
    """Return a line for each distinct text, with the roles that it is about before it."""
    roles: dict[str, list[str]] = {}
    for role, text in texts.items():
        roles.setdefault(text, []).append(role)
    return [f"{', '.join(names)}: {text}" for text, names in roles.items()]


def describe_engine(run: Run, role_name: str) -> str:
    """Describe the engines of a role: number, size, and the memory that they need."""
    from opencharacter.engines.backends import engine_arguments
    from opencharacter.engines.spec import EngineSpec

    if role_name == "teacher" and not asks_teacher(run.recipe):
        return "none, its answers exist already"
    role, pool = getattr(run.recipe.roles, role_name), getattr(run.placement.pools, role_name)
    spec = EngineSpec(role, pool)
    if not spec.has_weights:
        return f"{role.endpoint or role.model}{endpoint_date(role)}"
    batched_tokens = engine_arguments(spec)["max_num_batched_tokens"]
    adapters = adapters_note(role, pool) if role_name == "student" else ""
    line = (
        f"{role.model}, {pool.replicas} x {pool.gpus:g} GPU, each up to "
        f"{pool.max_num_seqs} sequences of {role.max_model_len:,} tokens, "
        f"{batched_tokens:,} tokens a step" + adapters + sleep_note(run.placement, spec)
    )
    path = models.local_weights(role.model, role.revision)
    if path is None:
        return line
    footprint = models.memory_footprint(path)
    cache = footprint.per_token * role.max_model_len * pool.max_num_seqs
    reserved = "" if pool.gpus else f" ({pool.kv_cache_gib:g} GiB reserved)"
    return (
        f"{line}; weights {footprint.weights / GIB:.2g} GiB, key-value cache {cache / GIB:.2g} GiB "
        f"if all sequences were full{reserved}"
    )


def adapters_note(role: Role, pool: Pool) -> str:
    """Say how the student's engines get the adapters of personas, unless weights are replaced."""
    from opencharacter.engines.spec import no_swap_reason

    if pool.adapters == "runtime":
        return ", with all adapters side by side"
    reason = no_swap_reason(role, pool)
    return f", restarted for each adapter because of {reason}" if reason else ""


def endpoint_date(role: Role) -> str:
    """Say which date the chat template of an endpoint states, if it states one."""
    if not role.endpoint:
        return ""
    if role.date_string is None:
        return " (its chat template states its own date unless date_string is set)"
    return f" (date_string {role.date_string!r} is sent; templates that ignore it state their own)"


def group_jobs(run: Run) -> dict[str, list[Job]]:
    """Group jobs by dataset, with `*` for the persona if the run has several."""
    groups: dict[str, list[Job]] = {}
    for job in (job for job in run.jobs if job.is_enabled):
        name = job.dataset
        if job.constitution and len(run.constitutions) > 1:
            scope = job.scope.split("/")
            name = "/".join([*scope[:-1], "*", job.stage.name])
        groups.setdefault(name, []).append(job)
    return groups


def describe_states(states: list[tuple[str, list[str]]]) -> str:
    """Summarize the states of a group of jobs."""
    counts = Counter(
        f"{state}: {explain_stale(differing)}" if differing else state
        for state, differing in states
    )
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def plan_cells(group: list[Job], planned: list[simulation.PlannedJob] | None) -> list[str]:
    """Return the cells of a group of jobs; those of the cost only if there are planned jobs."""
    estimates = [job.stage.module.estimate(job) for job in group]
    sums = [
        sum(getattr(e, name) for e in estimates) for name in ("rows", "tokens_in", "tokens_out")
    ]
    cells = [*map(number_cell, sums), number_cell(sum(e.trained or e.read for e in estimates))]
    if planned is None:
        return cells
    datasets = {job.dataset for job in group}
    totals = simulation.totals(p for p in planned if p.job.dataset in datasets)
    price = totals.gpu_hours * group[0].placement.price_per_gpu_hour
    idle = f"{totals.idle:.0%}" if totals.gpu_hours else ""
    return [
        *cells,
        number_cell(totals.hours),
        number_cell(totals.gpu_hours),
        idle,
        number_cell(price),
    ]


def schedule_lines(planned: list[simulation.PlannedJob], placement: Placement) -> list[str]:
    """Describe how long the unfinished jobs take, and the longer steps of the critical path."""
    available, seconds = cost.planning_resources(placement), simulation.wall_seconds(planned)
    by_stage: dict[str, list[float]] = {}
    for job in simulation.critical_path(planned):
        by_stage.setdefault(job.job.stage.name, []).append(job.ended - job.began)
    steps = [
        f"{f'{len(durations)} x ' if len(durations) > 1 else ''}{stage} {duration(sum(durations))}"
        for stage, durations in by_stage.items()
        if sum(durations) >= seconds / 100
    ]
    return [
        f"wall time {duration(seconds)} (GPUs: {available.gpus:g}, CPUs: {available.cpus:g}), "
        f"{sum(job.starts for job in planned)} engine starts, "
        f"{sum(job.swaps for job in planned)} weight swaps",
        f"critical path: {' > '.join(steps)}",
    ]


def saving_lines(run: Run, speeds: Speeds) -> Iterator[str]:
    """Describe what smaller recipes save of a complete run."""
    whole = simulation.plan(run.jobs, speeds)
    for saving in savings(run.recipe):
        jobs = pipeline.jobs(saving.recipe, run.constitutions, run.placement, run.store)
        smaller = simulation.plan(jobs, speeds)
        saved = simulation.wall_seconds(whole) - simulation.wall_seconds(smaller)
        gpu_hours = simulation.totals(whole).gpu_hours - simulation.totals(smaller).gpu_hours
        and_gpus = f" and {gpu_hours:,.1f} GPU-hours" if gpu_hours else ""
        yield f"{saving.change}: saves {duration(saved)}{and_gpus}; {saving.effect}"


def number_cell(number: float) -> str:
    """Format an integer with commas, another number with two decimals, and zero as nothing."""
    if not number:
        return ""
    return f"{number:,}" if isinstance(number, int) else f"{number:,.2f}"


def missing_here(run: Run) -> list[str]:
    """Return what this machine lacks to run the recipe by itself."""
    import torch

    from opencharacter.engines.spec import EngineSpec

    roles, pools = dict(run.recipe.roles), run.placement.pools
    if not asks_teacher(run.recipe):
        del roles["teacher"]
    requirements = {name: models.missing_requirement(role) for name, role in roles.items()}
    missing = roles_by_text({name: text for name, text in requirements.items() if text})
    if importlib.util.find_spec("vllm") is None:
        missing.append("vLLM: pip install '.[vllm,capabilities]' in the checkout, or make demo")
    requests = [EngineSpec(role, getattr(pools, name)).resources for name, role in roles.items()]
    gpus = total_resources([*requests, run.placement.training.resources]).gpus
    if gpus and not torch.cuda.is_available():
        missing.append("a GPU (submit the run to a cluster, or use the demo recipe)")
    return missing
