"""Which job starts next. Pure functions, used by the run and by `plan`'s simulation alike.

A job can start when its parents are done and its resources fit beside those of the running jobs.
Jobs whose engines are already running come first, so that an engine finishes all its work before it
is stopped; then jobs that do not require another engine to be stopped; then the order of the
pipeline's table. Ray places what is started; this module only decides what is started.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from opencharacter.config.placement import Placement, Resources, fits, total_resources
from opencharacter.runtime.stage import Job, ResourceRequest, TrainingWorkers


def choose(
    ready: Sequence[Job],
    running: Sequence[Job],
    engines: Mapping[str, Resources],
    available: Resources,
) -> Job | None:
    """Choose the job to start next, or None if none should start now.

    Args:
        ready: jobs whose parents are done, in the order of the pipeline's table.
        running: jobs that run.
        engines: resources of all running engines by key, idle ones included.
        available: resources of the cluster.
    """
    candidates = [job for job in ready if fits_beside(job, running, available)]
    if not running:
        # If the cluster is too small even for one job, Ray reports it or scales the cluster up.
        candidates = candidates or list(ready[:1])

    def rank(job: Job) -> tuple[bool, bool]:
        new = peak(phases(job, available), exclude=engines)
        needed = [*engines.values(), *worker_resources(running), new]
        stops_engines = new != Resources() and not fits(needed, available)
        return stops_engines, bool(job.resource_requests) and not keys(job) & engines.keys()

    return min(candidates, key=rank, default=None)


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
    users = Counter(key for other in running for key in keys(other))
    if any(
        users[request.key()] >= request.max_concurrent_jobs
        for phase in job.resource_requests
        for request in phase
    ):
        return False
    return fits(held_resources([*running, job], available), available)


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
    """Return the distinct phases of a job; a phase that does not fit at once is split in turns."""
    distinct: dict[tuple[str, ...], tuple[ResourceRequest, ...]] = {}
    for phase in job.resource_requests:
        fits_at_once = fits((request.resources for request in phase), available)
        for part in [phase] if fits_at_once else [(request,) for request in phase]:
            distinct[tuple(request.key() for request in part)] = part
    return list(distinct.values())


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


def keys(job: Job) -> set[str]:
    """Return the keys of all requests of a job."""
    return {request.key() for phase in job.resource_requests for request in phase}


def worker_resources(jobs: Iterable[Job]) -> list[Resources]:
    """Return the resources that the training workers of jobs hold."""
    requests = (request for job in jobs for phase in job.resource_requests for request in phase)
    return [request.resources for request in requests if isinstance(request, TrainingWorkers)]


def smallest_cluster(placement: Placement) -> Resources:
    """Return the smallest cluster that can hold each role, and training, one at a time."""
    pools = placement.pools
    smallest = placement.training.resources
    for name in type(pools).model_fields:
        smallest |= getattr(pools, name).resources
    return smallest
