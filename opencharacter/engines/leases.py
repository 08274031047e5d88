"""What jobs hold of the cluster, and how long: the records that `allocation` keeps."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import ray

from opencharacter.engines.replicas import EngineReplicas
from opencharacter.engines.served import RunningApp
from opencharacter.engines.spec import EngineSpec
from opencharacter.runtime.stage import ResourceRequest

Interval = tuple[float, float]
"""Beginning and end of something, in seconds of the monotonic clock."""


@dataclass(eq=False)
class Allocation:
    """The engines and training workers that a job holds during one phase, and their usage.

    Args:
        resource_requests: requests by key. Engines without weights hold nothing and are left out.
        leases: the resources that fulfil the requests, by the same keys.
        held_seconds: seconds for which they were held, summed over all of them; see `charge`.
        gpu_seconds: the same, with each resource weighted by its number of GPUs.
        work_seconds: wall-clock seconds in which work was under way, set by the caller.
        engine_share: fraction of its engines' time that the job had; below 1 if other jobs used
            them at the same time.
        preparation: when it waited until all engines were ready.
        swaps: when weights were replaced for it.
        released_at: monotonic time at which it was released.
        engines_started: labels of the engines that were started for it, or early for a later job.
        start_seconds: seconds that those starts took, each by itself.
        engines_swapped: labels of the engines that got their weights by a replacement.
    """

    resource_requests: dict[str, ResourceRequest]
    leases: dict[str, Lease] = field(default_factory=dict)
    held_seconds: float = 0
    gpu_seconds: float = 0
    work_seconds: float = 0
    engine_share: float = 1
    preparation: Interval = (0, 0)
    swaps: list[Interval] = field(default_factory=list)
    released_at: float = 0
    engines_started: list[str] = field(default_factory=list)
    start_seconds: float = 0
    engines_swapped: list[str] = field(default_factory=list)

    @property
    def work(self) -> Interval:
        """When work was under way, if it lasted until the release."""
        return self.released_at - self.work_seconds, self.released_at

    def replicas(self, spec: EngineSpec) -> EngineReplicas | RunningApp | None:
        """Return the running replicas of an engine, or None for an engine without weights."""
        return self.leases[spec.key()].replicas.result() if spec.has_weights else None


@dataclass
class Lease:
    """A running engine or a set of training workers, and the allocations that use it.

    Args:
        request: what was requested.
        charged_until: monotonic time up to which users have been charged.
        users: allocations that use it now; empty for an idle engine.
        replicas: resolves when the engine has started; unused for training workers.
        swapped_from: the lease of an idle engine whose weights are to be replaced; None to start
            an engine.
        asleep: whether the engine sleeps, because an adapter was trained since its last use.
        starts: labels of the engine and seconds of its start, until a job reports them.
        session: the connection to Ray for which it was made.
    """

    request: ResourceRequest
    charged_until: float
    users: list[Allocation] = field(default_factory=list)
    replicas: Future[EngineReplicas | RunningApp] = field(default_factory=Future)
    swapped_from: Lease | None = None
    asleep: bool = False
    starts: list[tuple[str, float]] = field(default_factory=list)
    session: tuple[str, str] | None = field(default_factory=lambda: session())

    @property
    def is_idle(self) -> bool:
        """Whether an engine has started and no job uses it."""
        return not self.users and self.replicas.done()


def session() -> tuple[str, str] | None:
    """Return the node and the job of this process's connection to Ray; None if it has none."""
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_job_id()


def charge(lease: Lease, now: float, users: list[Allocation]) -> None:
    """Charge the time since the last charge to the users in equal parts.

    The idle time of an engine is charged to the next job that uses it.
    """
    elapsed, lease.charged_until = now - lease.charged_until, now
    for user in users:
        user.held_seconds += elapsed / len(users)
        user.gpu_seconds += elapsed * lease.request.resources.gpus / len(users)


def usage(allocations: list[Allocation]) -> dict[str, Any]:
    """Return the resource usage of a job, from its released allocations.

    An engine, a training worker and their GPUs are *held* from the request (for an engine that is
    already running: from the end of the previous job) until the release. They are *busy* from the
    first request to the last reply, or from the first training step to the last. Jobs that use an
    engine at the same time split both. These sums count every engine, so two engines side by side
    count twice.

    Returns:
        `held_seconds`, `busy_seconds`, `gpu_seconds`, `gpu_busy_seconds`: sums as above.
        `work_seconds`: wall-clock seconds with work under way.
        `swap_seconds`: others in which weights of running engines were replaced.
        `starting_seconds`: others in which the job waited for engines to start.
        `engine_share`: mean fraction of its engines' time that the job had during that work; above
            1 if several of its engines worked at the same time.
        `phases`: number of allocations.
        `engines_started`: labels of the engines that were started for the job.
        `engine_start_seconds`: seconds that those starts took, each by itself.
        `engines_swapped`: labels of the engines that got their weights by a replacement.
    """
    working = [a.work for a in allocations]
    swapping = [interval for a in allocations for interval in a.swaps]
    work = covered_seconds(working)
    work_and_swaps = covered_seconds(working + swapping)
    all_seconds = covered_seconds(working + swapping + [a.preparation for a in allocations])
    shared_work = sum(a.work_seconds * a.engine_share for a in allocations)
    seconds = {
        "held_seconds": sum(a.held_seconds for a in allocations),
        "busy_seconds": sum(_busy_seconds(a) for a in allocations),
        "gpu_seconds": sum(a.gpu_seconds for a in allocations),
        "gpu_busy_seconds": sum(_gpu_busy_seconds(a) for a in allocations),
        "starting_seconds": all_seconds - work_and_swaps,
        "engine_start_seconds": sum(a.start_seconds for a in allocations),
        "swap_seconds": work_and_swaps - work,
        "work_seconds": work,
    }
    return {
        **{name: round(value, 2) for name, value in seconds.items()},
        "engine_share": round(shared_work / work, 4) if work else 1,
        "phases": len(allocations),
        "engines_started": [label for a in allocations for label in a.engines_started],
        "engines_swapped": [label for a in allocations for label in a.engines_swapped],
    }


def covered_seconds(intervals: Iterable[Interval]) -> float:
    """Return the seconds in which at least one interval lasts."""
    covered, end = 0.0, float("-inf")
    for began, ended in sorted(intervals):
        covered += max(0.0, ended - max(began, end))
        end = max(end, ended)
    return covered


def _busy_seconds(allocation: Allocation) -> float:
    busy = allocation.work_seconds * allocation.engine_share * len(allocation.resource_requests)
    return min(busy, allocation.held_seconds)


def _gpu_busy_seconds(allocation: Allocation) -> float:
    gpus = sum(request.resources.gpus for request in allocation.resource_requests.values())
    return min(allocation.work_seconds * allocation.engine_share * gpus, allocation.gpu_seconds)
