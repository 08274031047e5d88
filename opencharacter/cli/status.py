"""`opencharacter status`: what storage holds of a run."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer
from rich.markup import escape

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
from opencharacter.runtime.attempts import repeated_work
from opencharacter.runtime.manifests import held_time
from opencharacter.runtime.progress import console, duration
from opencharacter.runtime.stage import Job
from opencharacter.runtime.staleness import explain_stale


def status(
    recipe: RecipeArgument,
    constitution: PersonaOption,
    placement: PlacementOption = None,
    storage: StorageOption = None,
    set_: SetOption = None,
    smoke: SmokeOption = False,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Redraw bars, idle share and time left until it is done."),
    ] = False,
    speed: Annotated[
        str | None,
        typer.Option(help="Speeds for the time left of --watch, as in `plan`. Default: measured."),
    ] = None,
) -> None:
    """Show what storage holds of a run: state, rows, drops, tokens, time, and repeated work."""
    run = open_run(recipe, constitution, placement, storage, smoke, set_)
    if watch:
        from opencharacter.cli import watch as dashboard

        with contextlib.suppress(KeyboardInterrupt):
            dashboard.watch(run, console, usage_line, speed)
        return
    if not run.store.exists():
        address = escape(run.store.address())
        console.print(f"{address} is empty; --storage selects another storage", soft_wrap=True)
        return
    table = job_table("rows", "dropped", "tokens", "time", "GPU-hours", "idle", "repeated")
    for job in (job for job in run.jobs if job.is_enabled):
        table.add_row(job.dataset, *status_cells(job))
    print_table(table)
    for job in run.jobs:
        print_live_results(job)
    done = [job.store.manifest(job.dataset) for job in run.jobs if job.state()[0] == "done"]
    console.print(usage_line([manifest for manifest in done if manifest]), highlight=False)


def print_live_results(job: Job) -> None:
    """Print the results so far of an unfinished stage whose module defines `live`."""
    live = getattr(job.stage.module, "live", None)
    if live and job.state()[0] == "partial":
        for line in live(job):
            console.print(f"{job.dataset}, so far: {line}", soft_wrap=True, highlight=False)


def usage_line(manifests: list[dict[str, Any]]) -> str:
    """Return the time for which finished jobs reserved resources, and the idle share of it."""
    total = held_time(manifests)
    what = "GPU time" if total.on_gpu else "engine and worker time"
    idle = "" if total.idle_share is None else f" ({total.idle_share:.0%} idle)"
    starts = sum(len(manifest.get("engines_started", ())) for manifest in manifests)
    swaps = sum(len(manifest.get("engines_swapped", ())) for manifest in manifests)
    return f"{what}: {duration(total.held)}{idle}; engine starts: {starts}, weight swaps: {swaps}"


def status_cells(job: Job) -> list[str]:
    """Return the cells of a job, from its state on."""
    state, differing = job.state()
    manifest = job.store.manifest(job.dataset, any_format=True)
    if state == "partial":
        history = job.store.attempts(job.dataset)
        started = f"{history[-1]['reached']} started"
        return [state, started, *[""] * 5, str(repeated_work(history))]
    if manifest is None:
        return [state, *[""] * 7]
    if differing:
        state = f"stale: {explain_stale(differing)}"
    idle = held_time([manifest]).idle_share
    return [
        state,
        f"{manifest['rows']:,}",
        ", ".join(f"{count} {reason}" for reason, count in manifest["dropped"].items()),
        f"{manifest['tokens_out']:,}",
        duration(manifest["seconds"]),
        f"{manifest['gpu_seconds'] / 3600:,.2f}" if manifest["gpu_seconds"] else "",
        "" if idle is None else f"{idle:.0%}",
        str(repeated_work(manifest["attempts"])),
    ]
