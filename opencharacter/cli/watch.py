"""`opencharacter status --watch`: a run as a table of bars that is redrawn until it is done."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from opencharacter.api import Run
from opencharacter.cli.plan import describe_states
from opencharacter.errors import UserError
from opencharacter.planning import simulation
from opencharacter.planning.speeds import Speeds, load_speeds
from opencharacter.runtime.manifests import held_time
from opencharacter.runtime.progress import duration
from opencharacter.runtime.stage import Job

SECONDS_BETWEEN_FRAMES = 2
SECONDS_BETWEEN_SPEEDS = 60
"""Seconds after which the speeds are measured again from the stages that have finished since."""
SILENT_SECONDS = 30
"""Seconds without progress after which a stage counts as interrupted."""
MIN_BAR_WIDTH, MAX_BAR_WIDTH = 8, 30
COLORS = {"done": "green", "running": "cyan", "interrupted": "yellow", "stale": "red"}


@dataclass(frozen=True)
class StageProgress:
    """What storage says about a job.

    Args:
        dataset: its dataset.
        state: done, running, interrupted, stale or waiting.
        done: finished rows or steps.
        total: all of them, or None if unknown.
        seconds: how long it took, or has been running.
        remaining: estimated seconds left of a running job, or None.
        idle: share of the reserved time without work, or None.
    """

    dataset: str
    state: str
    done: int = 0
    total: int | None = None
    seconds: float = 0
    remaining: float | None = None
    idle: float | None = None


def watch(
    run: Run,
    console: Console,
    usage_line: Callable[[list[dict[str, Any]]], str],
    speed: str | None = None,
) -> None:
    """Redraw the progress of a run until all stages are done.

    Args:
        run: the run.
        console: where to draw.
        usage_line: returns the summary of the manifests of finished jobs.
        speed: a file of speeds or a storage to measure them from; the run's own storage if None.
    """
    finished: dict[str, dict[str, Any]] = {}
    speeds, measured_at = None, -SECONDS_BETWEEN_SPEEDS
    with Live(console=console, auto_refresh=False) as live:
        while True:
            if time.monotonic() - measured_at >= SECONDS_BETWEEN_SPEEDS:
                speeds, measured_at = measured_speeds(run, speed), time.monotonic()
            now = datetime.datetime.now(datetime.UTC)
            stages = [progress(job, finished, now) for job in run.jobs if job.is_enabled]
            summary = [usage_line(list(finished.values())), remaining_line(run, stages, speeds)]
            live.update(frame(stages, summary, console.width), refresh=True)
            if all(stage.state == "done" for stage in stages):
                return
            time.sleep(SECONDS_BETWEEN_FRAMES)


def measured_speeds(run: Run, speed: str | None) -> Speeds | None:
    """Return the speeds of a file or storage; None if the run's own has too little to measure."""
    if speed:
        return load_speeds(speed)
    try:
        return load_speeds(run.store.address())
    except UserError:
        return None


def progress(
    job: Job, finished: dict[str, dict[str, Any]], now: datetime.datetime
) -> StageProgress:
    """Read the progress of a job.

    Args:
        job: the job.
        finished: manifests of finished jobs, which are read once.
        now: the current time.
    """
    if job.dataset not in finished:
        state, differing = job.state()
        if differing:
            return StageProgress(job.dataset, describe_states([(state, differing)]))
        if state == "partial":
            return partial_progress(job.dataset, job.store.attempts(job.dataset), now)
        manifest = job.store.manifest(job.dataset) if state == "done" else None
        if manifest is None:
            return StageProgress(job.dataset, "waiting")
        finished[job.dataset] = manifest
    manifest = finished[job.dataset]
    idle = held_time([manifest]).idle_share
    rows = manifest["rows"]
    return StageProgress(job.dataset, "done", rows, rows, manifest["seconds"], idle=idle)


def partial_progress(
    dataset: str, attempts: Sequence[Mapping[str, Any]], now: datetime.datetime
) -> StageProgress:
    """Return the progress of an unfinished dataset: that of the parts that are under way.

    Args:
        dataset: the dataset.
        attempts: see `AttemptLog`.
        now: the current time.
    """
    last_by_part = {attempt["part"]: attempt for attempt in attempts}.values()
    alive = [a for a in last_by_part if (now - updated_at(a)).total_seconds() <= SILENT_SECONDS]
    shown = alive or attempts[-1:]
    began = min(datetime.datetime.fromisoformat(attempt["at"]) for attempt in shown)
    seconds = (max(map(updated_at, shown)) - began).total_seconds()
    done = sum(attempt.get("done", attempt["reached"]) for attempt in shown)
    totals = [attempt.get("total") for attempt in shown]
    total = None if None in totals else sum(filter(None, totals))
    if not alive:
        return StageProgress(dataset, "interrupted", done, total, seconds)
    made = done - sum(attempt["kept"] for attempt in shown)
    remaining = (total - done) * seconds / made if total and made > 0 else None
    return StageProgress(dataset, "running", done, total, seconds, remaining)


def updated_at(attempt: Mapping[str, Any]) -> datetime.datetime:
    """Return when an attempt last reported its progress."""
    return datetime.datetime.fromisoformat(attempt.get("updated", attempt["at"]))


def remaining_line(run: Run, stages: list[StageProgress], speeds: Speeds | None) -> str:
    """Return the time until the run is done: that of the running stages and of the waiting ones.

    The stages that have not started are simulated as `plan` does it, one after the running ones, so
    the sum is an upper bound.
    """
    if all(stage.state == "done" for stage in stages):
        return "done"
    running = [stage for stage in stages if stage.state == "running"]
    unknown = any(stage.remaining is None for stage in running)
    later = {stage.dataset for stage in stages if stage.state not in ("done", "running")}
    jobs = [job for job in run.jobs if job.dataset in later]
    if unknown or (jobs and speeds is None):
        return "time left: unknown until the student has generated and been trained once"
    seconds = max((stage.remaining or 0 for stage in running), default=0.0)
    if jobs and speeds:
        seconds += simulation.wall_seconds(simulation.plan(jobs, speeds))
    return f"time left: at most about {duration(seconds)}"


def frame(stages: list[StageProgress], summary: list[str], width: int) -> RenderableType:
    """Return the summary and the table of all stages, which a low terminal cuts at its end.

    Args:
        stages: in the order of the pipeline.
        summary: lines above the table.
        width: columns of the terminal.
    """
    names = max(len(stage.dataset) for stage in stages)
    bar = max(MIN_BAR_WIDTH, min(MAX_BAR_WIDTH, width - names - 52))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("dataset", no_wrap=True)
    table.add_column("", width=bar)
    for title in ("state", "done", "time", "left", "idle"):
        justify = "left" if title == "state" else "right"
        table.add_column(title, justify=justify, no_wrap=True)
    for stage in stages:
        color = COLORS.get(stage.state.split(":")[0], "dim")
        full = 1.0 if stage.state == "done" else None
        share = full or (min(1.0, stage.done / stage.total) if stage.total else 0.0)
        count = f"{stage.done:,}" if stage.done else ""
        if stage.total and stage.state != "done":
            count = f"{stage.done:,}/{stage.total:,}"
        table.add_row(
            Text(stage.dataset),
            ProgressBar(
                total=1, completed=share, width=bar, complete_style=color, finished_style=color
            ),
            Text(stage.state, style=color),
            count,
            duration(stage.seconds) if stage.seconds else "",
            duration(stage.remaining) if stage.remaining is not None else "",
            f"{stage.idle:.0%}" if stage.idle is not None else "",
        )
    done = sum(stage.state == "done" for stage in stages)
    return Group(*map(Text, [f"{done} of {len(stages)} stages done", *summary, ""]), table)
