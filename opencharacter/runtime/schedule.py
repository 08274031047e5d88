"""Which job starts next. Pure functions, used by the run and by `plan`'s simulation alike.

A job can start when its parents are done and its resources fit beside those of the running jobs.
Jobs that do not require another engine to be stopped come first. Among them, jobs whose engines are
already running come first, so that an engine finishes all its work before its weights are replaced
or it is stopped; then jobs for which the weights of an idle engine can be replaced; then the order
of the pipeline's table. Ray places what is started; this module only decides what is started.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence

from opencharacter.config.placement import Placement, Resources, fits, total_resources
from opencharacter.runtime.stage import Job, ResourceRequest, TrainingWorkers


def choose(
    ready: Sequence[Job],
    running: Sequence[Job],
    engines: Mapping[str, ResourceRequest],
    available: Resources,
) -> Job | None:
    """Choose the job to start next, or None if none should start now.

    Args:
        ready: jobs whose parents are done, in the order of the pipeline's table.
        running: jobs that run.
        engines: all running engines by key, idle ones included.
        available: resources of the cluster.
    """
    candidates = [job for job in ready if fits_beside(job, running, available)]
    if not running:
        # If the cluster is too small even for one job, Ray reports it or scales the cluster up.
        candidates = candidates or list(ready[:1])

    in_use = {key for job in running for key in keys(job)}
    idle = {key: engine for key, engine in engines.items() if key not in in_use}
    held = [engine.resources for engine in engines.values()] + worker_resources(running)

    def rank(job: Job) -> tuple[bool, int]:
        job_phases = phases(job, available)
        swaps = {key for phase in job_phases for key in swap_sources(phase, engines, idle)}
        new = peak(job_phases, exclude=engines.keys() | swaps)
        stops_engines = new != Resources() and not fits([*held, new], available)
        if not job_phases or keys(job) & engines.keys():
            return stops_engines, 0
        return stops_engines, 1 if swaps else 2

    return min(candidates, key=rank, default=None)


def swap_sources(
    requests: Iterable[ResourceRequest],
    running: Container[str],
    idle: Mapping[str, ResourceRequest],
    needed: Container[str] = (),
) -> dict[str, str]:
    """Assign to engines that do not run idle ones whose weights can be replaced.

    Args:
        requests: what is requested.
        running: keys of all running engines.
        idle: the idle engines by key; the first suitable one is taken.
        needed: keys of engines that jobs will need as they are, which are taken last.

    Returns:
        The key of an idle engine by the key of the request for which its weights are replaced.
    """
    distinct = {request.key(): request for request in requests}
    unneeded_first = sorted(idle, key=needed.__contains__)
    sources: dict[str, str] = {}
    for key, request in distinct.items():
        suitable = (
            other
            for other in unneeded_first
            if idle[other].swap_group == request.swap_group
            and other not in distinct
            and other not in sources.values()
        )
        if request.swap_group and key not in running and (source := next(suitable, None)):
            sources[key] = source
    return sources


def ready(waiting: Sequence[Job], running: Iterable[Job]) -> list[Job]:
    """Return the waiting jobs whose parents are neither waiting nor running."""
    unfinished = {job.dataset for job in (*waiting, *running)}
    return [job for job in waiting if not any(p.dataset in unfinished for p in job.parents)]


def fits_beside(job: Job, running: Sequence[Job], available: Resources) -> bool:
    """Whether a job may run at the same time as others.

    Jobs that run on the driver alone run one at a time, because they share its Python process.
    """
    if not job.resource_requests:
        return all(other.resource_requests for other in running)
    if sum(bool(other.resource_requests) for other in running) >= (
        job.placement.max_concurrent_jobs or math.inf
    ):
        return False
    if any(exclude_each_other(job, other) for other in running):
        return False
    users = Counter(key for other in running for key in keys(other))
    if any(
        users[request.key()] >= request.max_concurrent_jobs
        for phase in job.resource_requests
        for request in phase
    ):
        return False
    return fits(held_resources([*running, job], available), available)


def exclude_each_other(first: Job, second: Job) -> bool:
    """Whether one of two jobs trains while the other one's engines would have to sleep."""
    for one, other in ((first, second), (second, first)):
        if worker_resources([one]) and any(request.sleeps for request in requests_of([other])):
            return True
    return False


def held_resources(jobs: Iterable[Job], available: Resources) -> list[Resources]:
    """Return the most that jobs can hold at the same time.

    An engine that several jobs use throughout is counted once.

    Args:
        jobs: jobs that run together.
        available: resources of the cluster.
    """
    all_phases = [phases(job, available) for job in jobs if job.resource_requests]
    constant = {r.key(): r.resources for one in all_phases if len(one) == 1 for r in one[0]}
    changing = [peak(several, exclude=constant) for several in all_phases if len(several) > 1]
    return [*constant.values(), *changing]


def phases(job: Job, available: Resources) -> list[tuple[ResourceRequest, ...]]:
    """Return the distinct phases of a job; one that does not fit at once is split into turns."""
    distinct: dict[tuple[str, ...], tuple[ResourceRequest, ...]] = {}
    for phase in job.resource_requests:
        for part in turns(phase, available):
            distinct[tuple(request.key() for request in part)] = part
    return list(distinct.values())


def turns(
    phase: tuple[ResourceRequest, ...], available: Resources
) -> list[tuple[ResourceRequest, ...]]:
    """Split a phase that does not fit at once.

    Each request has a turn of its own, together with the last one if that is for another role,
    such as a judge, and fits beside it.
    """
    if fits_at_once(phase, available):
        return [phase]
    *others, last = phase
    pairs = [(request, last) for request in others if request.role_name != last.role_name]
    fitting = [pair for pair in pairs if fits_at_once(pair, available)]
    paired = {request.key() for pair in fitting for request in pair}
    return [*fitting, *((request,) for request in phase if request.key() not in paired)]


def fits_at_once(phase: Iterable[ResourceRequest], available: Resources) -> bool:
    """Whether the distinct requests of a phase fit into the cluster together."""
    distinct = {request.key(): request.resources for request in phase}
    return fits(distinct.values(), available)


def peak(phases: Iterable[tuple[ResourceRequest, ...]], exclude: Iterable[str] = ()) -> Resources:
    """Return the most resources that any phase holds.

    Args:
        phases: phases of a job.
        exclude: keys of requests that are not counted, such as running engines.
    """
    most = Resources()
    for phase in phases:
        resources = {r.key(): r.resources for r in phase if r.key() not in exclude}
        most |= total_resources(resources.values())
    return most


def requests_of(jobs: Iterable[Job]) -> list[ResourceRequest]:
    """Return all requests of jobs."""
    return [request for job in jobs for phase in job.resource_requests for request in phase]


def keys(job: Job) -> set[str]:
    """Return the keys of all requests of a job."""
    return {request.key() for request in requests_of([job])}


def worker_resources(jobs: Iterable[Job]) -> list[Resources]:
    """Return the resources that the training workers of jobs hold."""
    return [r.resources for r in requests_of(jobs) if isinstance(r, TrainingWorkers)]


def smallest_cluster(placement: Placement) -> Resources:
    """Return the smallest cluster that can hold each role, and training, one at a time."""
    pools = placement.pools
    smallest = placement.training.resources
    for name in type(pools).model_fields:
        smallest |= getattr(pools, name).resources
    return smallest
