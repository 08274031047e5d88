"""Which job starts next, as pure functions: the run asks them, and so does `plan`'s simulation.

A job starts when its parents are done and what it needs fits beside the jobs that run. Among those
that could start, the ones whose engines run already come first, so that an engine has done all its
work before it makes room; then those that need nobody else's engine to stop; then the order of the
pipeline's table. Ray places what is started; this decides only what that is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from opencharacter.config.placement import Placement, Resources, fits, total
from opencharacter.runtime.stage import Job, ResourceRequest, TrainingWorkers


def choose(
    ready: Sequence[Job], running: Sequence[Job], warm: Mapping[str, Resources], there: Resources
) -> Job | None:
    """The job to start next, or None while none should.

    Args:
        ready: jobs whose parents are done, in the table's order.
        running: jobs under way.
        warm: engines that run, used or not, by key.
        there: what the cluster has.
    """
    able = [job for job in ready if fits_beside(job, running, there)]
    if not running:
        able = able or list(ready[:1])  # a cluster that is too small says so itself, or grows

    def rank(job: Job) -> tuple[bool, bool]:
        new = most(phases(job, there), but=warm)
        evicts = new != Resources() and not fits([*warm.values(), *workers(running), new], there)
        return evicts, bool(job.resource_requests) and not keys(job) & warm.keys()

    return min(able, key=rank, default=None)


def ready(waiting: Sequence[Job], running: Iterable[Job]) -> list[Job]:
    """The jobs of which no parent is still to be made."""
    undone = {job.dataset for job in (*waiting, *running)}
    return [job for job in waiting if not any(p.dataset in undone for p in job.parents)]


def fits_beside(job: Job, running: Sequence[Job], there: Resources) -> bool:
    """Whether a job may run at the same time as others.

    Jobs on the driver alone go one at a time: they share its Python.
    """
    if not job.resource_requests:
        return all(other.resource_requests for other in running)
    if sum(bool(other.resource_requests) for other in running) >= (
        job.placement.max_concurrent_jobs or math.inf
    ):
        return False
    users = Counter(key for other in running for key in keys(other))
    if any(
        users[n.key()] >= n.max_concurrent_jobs
        for together in job.resource_requests
        for n in together
    ):
        return False
    return fits(held([*running, job], there), there)


def held(jobs: Iterable[Job], there: Resources) -> list[Resources]:
    """What jobs that run at once hold at most: an engine that several use throughout counts once.

    Args:
        jobs: that run.
        there: what the cluster has.
    """
    asked = [phases(job, there) for job in jobs if job.resource_requests]
    steady = {n.key(): n.resources for alone in asked if len(alone) == 1 for n in alone[0]}
    changing = [most(several, but=steady) for several in asked if len(several) > 1]
    return [*steady.values(), *changing]


def phases(job: Job, there: Resources) -> list[tuple[ResourceRequest, ...]]:
    """What a job holds, pass after pass, each once; what does not fit at once it holds in turn."""
    found: dict[tuple[str, ...], tuple[ResourceRequest, ...]] = {}
    for together in job.resource_requests:
        whole = fits((need.resources for need in together), there)
        for part in [together] if whole else [(need,) for need in together]:
            found[tuple(need.key() for need in part)] = part
    return list(found.values())


def most(phases: Iterable[tuple[ResourceRequest, ...]], but: Iterable[str] = ()) -> Resources:
    """The most that is held in any pass, without what is there already.

    Args:
        phases: of a job.
        but: keys that do not count.
    """
    found = Resources()
    for together in phases:
        new = {n.key(): n.resources for n in together if n.key() not in but}
        found |= total(new.values())
    return found


def keys(job: Job) -> set[str]:
    """Of all that a job needs."""
    return {need.key() for together in job.resource_requests for need in together}


def workers(jobs: Iterable[Job]) -> list[Resources]:
    """What the training of jobs holds."""
    resource_requests = (
        need for job in jobs for together in job.resource_requests for need in together
    )
    return [need.resources for need in resource_requests if isinstance(need, TrainingWorkers)]


def least(placement: Placement) -> Resources:
    """The smallest cluster that holds every role, and the training, by itself."""
    pools = placement.pools
    rooms = [getattr(pools, name).resources for name in type(pools).model_fields]
    found = placement.training.resources
    for room in rooms:
        found |= room
    return found
