"""`opencharacter status`: what storage holds of a run."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

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
from opencharacter.runtime.progress import console, duration
from opencharacter.runtime.stage import Job, repeated_work

HELD = ("held_seconds", "busy_seconds", "gpu_seconds", "gpu_busy_seconds")


def status(
    recipe: RecipeName,
    names: Names,
    placement: PlacementFile = None,
    storage: Storage = None,
    smoke: Smoke = False,
) -> None:
    """Say what storage holds of a run: rows, drops by reason, time, idle time, what was redone."""
    asked = Run(recipe, names, placement, storage, smoke)
    if not asked.store.exists():
        where = escape(asked.store.address())
        console.print(f"there is nothing at {where} yet; --storage names another", soft_wrap=True)
        return
    table = job_table("rows", "dropped", "tokens", "time", "GPU-hours", "idle", "redone")
    for job in asked.jobs:
        table.add_row(job.dataset, *status_cells(job))
    print_whole(table)
    done = [job.store.manifest(job.dataset) for job in asked.jobs if job.state()[0] == "done"]
    console.print(held_line([manifest for manifest in done if manifest]), highlight=False)


def held_line(manifests: list[dict[str, Any]]) -> str:
    """What finished jobs held, and how much of that was idle."""
    sums = {name: sum(m.get(name, 0) for m in manifests) for name in HELD}
    started = sum(len(m.get("engines_started", ())) for m in manifests)
    kind = "gpu_" if sums["gpu_seconds"] else ""
    held, busy = sums[f"{kind}seconds" if kind else "held_seconds"], sums[f"{kind}busy_seconds"]
    idle = f", {1 - busy / held:.0%} of it idle" if held else ""
    what = "GPUs" if kind else "engines and workers"
    return f"{what} held for {duration(held)}{idle}; {started} starts of an engine"


def status_cells(job: Job) -> list[str]:
    """The cells of one job in `status`."""
    state, differing = job.state()
    manifest = job.store.manifest(job.dataset)
    if state == "partial":
        history = job.store.attempts(job.dataset)
        begun = f"{history[-1]['reached']} begun"
        return [state, begun, *[""] * 5, str(repeated_work(history))]
    if manifest is None:
        return [state, *[""] * 7]
    if differing:
        state = f"stale: {differing[0]}"
    dropped = ", ".join(f"{n} {reason}" for reason, n in manifest["dropped"].items())
    held, busy = manifest.get("held_seconds", 0), manifest.get("busy_seconds", 0)
    return [
        state,
        f"{manifest['rows']:,}",
        dropped,
        f"{manifest['tokens_out']:,}",
        duration(manifest["seconds"]),
        f"{manifest['gpu_seconds'] / 3600:,.2f}" if manifest["gpu_seconds"] else "",
        f"{1 - busy / held:.0%}" if held else "",
        str(repeated_work(manifest["attempts"])),
    ]
