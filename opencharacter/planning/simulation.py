"""A simulated run: when each job starts and ends, and how long it holds GPUs.

The simulation starts jobs with `schedule.choose`, as a run does, on a clock of its own. Jobs that
use an engine at the same time share its speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from opencharacter.config.placement import Resources, fits
from opencharacter.engines.early import engine_to_start
from opencharacter.engines.spec import EngineSpec
from opencharacter.planning.cost import Cost, cost, planning_resources
from opencharacter.planning.speeds import Speeds
from opencharacter.runtime.schedule import (
    choose,
    keys,
    phases,
    ready,
    requests_of,
    swap_sources,
    worker_resources,
)
from opencharacter.runtime.stage import Job

ROUNDING_ERROR = 1e-9
"""Seconds below which remaining time counts as none."""


def plan(jobs: Sequence[Job], speeds: Speeds) -> list[PlannedJob]:
    """Simulate a run of jobs that are not done.

    Args:
        jobs: in the order of the pipeline's table, at least one.
        speeds: of the hardware.

    Returns:
        The jobs in the order in which they end, without those that the recipe does not use.
    """
    available = planning_resources(jobs[0].placement)
    jobs = [job for job in jobs if job.is_enabled]
    estimates = {job.dataset: job.stage.module.estimate(job) for job in jobs}
    costs = {job.dataset: cost(job, estimates[job.dataset], speeds, available) for job in jobs}
    return simulate(jobs, costs, speeds.engine_start, speeds.weight_swap, available)


@dataclass
class PlannedJob:
    """A job on the simulation's clock.

    Args:
        job: the job.
        began: seconds from the start of the run.
        fixed: seconds left before its work begins.
        work: seconds of work left, if it shares no engine.
        cost: what it takes by itself.
        starts: number of engines that are started for it.
        swaps: number of engines whose weights are replaced for it.
        after: the job whose end allowed this one to start, if any.
        ended: seconds from the start of the run.
        gpu_seconds: GPU-seconds that it holds, counted as in `leases.usage`.
        gpu_busy_seconds: those of them with work under way.
    """

    job: Job
    began: float
    fixed: float
    work: float
    cost: Cost
    starts: int
    swaps: int
    after: PlannedJob | None
    ended: float = 0
    gpu_seconds: float = 0
    gpu_busy_seconds: float = 0

    def remaining(self, share: float) -> float:
        """Return the seconds until its work begins, or until it ends.

        Args:
            share: share of its engines that it has.
        """
        return self.fixed or self.work / share

    def advance(self, seconds: float, share: float) -> None:
        """Let time pass.

        Args:
            seconds: how much.
            share: share of its engines that it has.
        """
        self.gpu_seconds += seconds * self.cost.gpus * share
        if self.fixed:
            self.fixed = without_rounding_error(self.fixed - seconds)
        else:
            self.gpu_busy_seconds += seconds * self.cost.gpus * share
            self.work = without_rounding_error(self.work - seconds * share)


def without_rounding_error(seconds: float) -> float:
    """Return 0 if only a rounding error is left, otherwise the seconds."""
    return seconds if seconds > ROUNDING_ERROR else 0.0


class Acquisition(NamedTuple):
    """What it takes until the engines of a job are ready.

    Args:
        starts: number of engines that have to start.
        swaps: number of engines whose weights are replaced.
        seconds: time until all are ready.
        idle_gpu_seconds: GPU-seconds for which the others had been idle.
    """

    starts: int
    swaps: int
    seconds: float
    idle_gpu_seconds: float


@dataclass
class WarmEngines:
    """The running engines on the simulation's clock.

    Args:
        start_seconds: time that an engine takes to start.
        swap_seconds: time that it takes to replace the weights of an engine.
        engines: the running engines by key, the least recently requested first.
        idle_since: since when an engine has been idle, by key.
        ready_at: when an engine has started, by key.
        held: keys of the engines that a running job has, by dataset. A job of several phases may
            replace the weights of one engine for each of them; it has the last ones.
        needed: keys of the engines that unfinished jobs need.
        started_early: keys of the engines that were started early and that no job has used yet.
    """

    start_seconds: float
    swap_seconds: float
    engines: dict[str, EngineSpec] = field(default_factory=dict)
    idle_since: dict[str, float] = field(default_factory=dict)
    ready_at: dict[str, float] = field(default_factory=dict)
    held: dict[str, set[str]] = field(default_factory=dict)
    needed: set[str] = field(default_factory=set)
    started_early: set[str] = field(default_factory=set)

    def acquire(
        self, job: Job, running: Sequence[Job], available: Resources, now: float
    ) -> Acquisition:
        """Prepare the engines that a job needs, those of a phase side by side."""
        in_use = self._in_use(running)
        training = worker_resources([*running, job])
        starts, swaps, all_ready, idle = 0, 0, now, 0.0
        for phase in phases(job, available):
            began, unused = all_ready, self._unused(in_use, now)
            sources = swap_sources(phase, self.engines, unused, self.needed)
            for spec in (r for r in phase if isinstance(r, EngineSpec) and r.has_weights):
                key = spec.key()
                previous = sources.get(key, key)
                if key in sources:
                    swaps, self.ready_at[key] = swaps + 1, began + self.swap_seconds
                elif key not in self.engines:
                    starts, self.ready_at[key] = starts + 1, began + self.start_seconds
                if previous in self.started_early:
                    self.started_early.remove(previous)
                    starts += 1
                all_ready = max(all_ready, self.ready_at[key])
                idle += spec.resources.gpus * (now - self.idle_since.pop(previous, now))
                self.engines.pop(previous, None)
                self.engines[key] = spec
            self._make_room(in_use | {r.key() for r in phase}, training, available)
        self.held[job.dataset] = keys(job) & self.engines.keys()
        return Acquisition(starts, swaps, all_ready - now, idle)

    def _unused(self, in_use: set[str], now: float) -> dict[str, EngineSpec]:
        """The engines that have started and that no job uses."""
        return {
            key: spec
            for key, spec in self.engines.items()
            if key not in in_use and self.ready_at[key] <= now
        }

    def start_early(self, spec: EngineSpec, now: float) -> None:
        """Start an engine that no job uses yet; a spare if there is one of this kind."""
        key = f"spare of {spec.key()}" if spec.key() in self.engines else spec.key()
        self.engines[key], self.idle_since[key] = spec, now
        self.ready_at[key] = now + self.start_seconds
        self.started_early.add(key)

    def _in_use(self, running: Iterable[Job]) -> set[str]:
        return {key for job in running for key in self.held[job.dataset]}

    def _make_room(self, kept: set[str], training: list[Resources], available: Resources) -> None:
        while not fits([*(e.resources for e in self.engines.values()), *training], available):
            unused = next((key for key in self.engines if key not in kept), None)
            if unused is None:
                return
            self._stop(unused)

    def _stop(self, key: str) -> None:
        del self.engines[key]
        self.idle_since.pop(key, None)
        self.started_early.discard(key)

    def release(self, unfinished: Iterable[Job], running: Iterable[Job], now: float) -> None:
        """Stop engines that no unfinished job can use, and note which of the others are idle."""
        requests = requests_of(unfinished)
        self.needed = needed = {request.key() for request in requests}
        groups = {request.swap_group for request in requests} - {""}
        in_use = self._in_use(running)
        for key, spec in list(self.engines.items()):
            if key not in needed and spec.swap_group not in groups:
                self._stop(key)
        for key in self.engines.keys() - in_use:
            self.idle_since.setdefault(key, now)


def simulate(
    jobs: Sequence[Job],
    costs: Mapping[str, Cost],
    engine_start: float,
    weight_swap: float,
    available: Resources,
) -> list[PlannedJob]:
    """Simulate a run.

    Args:
        jobs: jobs that are not done, in the order of the pipeline's table.
        costs: what each job takes by itself, by dataset.
        engine_start: seconds that an engine takes to start.
        weight_swap: seconds that it takes to replace the weights of an engine.
        available: resources of the cluster.

    Returns:
        The jobs in the order in which they end.
    """
    waiting, running, done = list(jobs), list[PlannedJob](), list[PlannedJob]()
    engines, now = WarmEngines(engine_start, weight_swap), 0.0
    while waiting or running:
        running_jobs = [planned.job for planned in running]
        while job := choose(ready(waiting, running_jobs), running_jobs, engines.engines, available):
            waiting.remove(job)
            acquired = engines.acquire(job, running_jobs, available, now)
            own = costs[job.dataset]
            running.append(
                PlannedJob(
                    job,
                    began=now,
                    fixed=own.fixed + acquired.seconds,
                    work=own.work,
                    cost=own,
                    starts=acquired.starts,
                    swaps=acquired.swaps,
                    after=done[-1] if done else None,
                    gpu_seconds=acquired.idle_gpu_seconds,
                )
            )
            running_jobs.append(job)
        while spec := engine_to_start(waiting, running_jobs, engines.engines, available):
            engines.start_early(spec, now)
        shares = engine_shares(running, available)
        seconds = min(map(PlannedJob.remaining, running, shares))
        now += seconds
        for planned, share in zip(running, shares, strict=True):
            planned.advance(seconds, share)
        for planned in [p for p in running if not p.fixed and not p.work]:
            running.remove(planned)
            planned.ended = now
            done.append(planned)
        still_running = [planned.job for planned in running]
        engines.release([*waiting, *still_running], still_running, now)
    return done


def engine_shares(running: Sequence[PlannedJob], available: Resources) -> list[float]:
    """Return the share that each job has of the engines that determine its speed.

    A job of several phases uses each of its engines for part of its time.
    """
    load: dict[str, float] = {}
    limiting = [limiting_engines(planned, available) for planned in running]
    for planned, engines in zip(running, limiting, strict=True):
        for key in engines:
            load[key] = load.get(key, 0) + (0 if planned.fixed else 1 / len(engines))
    return [1 / max([1.0, *(load[key] for key in engines)]) for engines in limiting]


def limiting_engines(planned: PlannedJob, available: Resources) -> list[str]:
    """Return for each phase the keys of the engines that determine a job's speed.

    Engines without weights are left out, because their jobs do not slow each other down.
    """
    slowest = -1 if planned.cost.judging else 0
    requests = [
        request
        for phase in phases(planned.job, available)
        for request in phase
        if request.role_name == phase[slowest].role_name
    ]
    return [r.key() for r in requests if isinstance(r, EngineSpec) and r.has_weights]


def critical_path(done: Sequence[PlannedJob]) -> list[PlannedJob]:
    """Return the chain of jobs, each started by the end of the one before, up to the last job."""
    path: list[PlannedJob] = []
    at = done[-1] if done else None
    while at:
        path.append(at)
        at = at.after
    return path[::-1]


def wall_seconds(done: Sequence[PlannedJob]) -> float:
    """Return the seconds from the start of a run to its end."""
    return done[-1].ended if done else 0.0


class Totals(NamedTuple):
    """Sums over planned jobs.

    Args:
        hours: duration of all jobs, as if they ran one after another.
        gpu_hours: GPU-hours held.
        idle: share of the GPU-hours without work under way.
    """

    hours: float
    gpu_hours: float
    idle: float


def totals(jobs: Iterable[PlannedJob]) -> Totals:
    """Sum up planned jobs."""
    planned = list(jobs)
    held = sum(one.gpu_seconds for one in planned)
    idle = 1 - sum(one.gpu_busy_seconds for one in planned) / held if held else 0.0
    return Totals(sum(one.ended - one.began for one in planned) / 3600, held / 3600, idle)
