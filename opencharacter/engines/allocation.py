"""Allocate engines and training workers to jobs, and measure how long each job uses them.

An engine outlives the job that started it, so that the next job with the same weights need not
start it again. If the next job needs the same model with another adapter merged into its weights,
the weights of an idle engine are replaced, which takes seconds where a start takes minutes. An
engine is stopped only when another job needs its resources. Where there is room, engines that jobs
will need later are started while others run.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import ray
import ray.exceptions

from opencharacter.config.placement import Pool, Resources, fits
from opencharacter.engines.leases import Allocation, Lease, charge, session, usage
from opencharacter.engines.replicas import PLACEMENT_TIMEOUT_S, EngineReplicas, create_actors
from opencharacter.engines.served import RunningApp, ServedSpec, start_app
from opencharacter.engines.spec import EngineSpec
from opencharacter.errors import StageFailed, UserError
from opencharacter.runtime.progress import console
from opencharacter.runtime.schedule import swap_sources
from opencharacter.runtime.stage import ResourceRequest, TrainingWorkers
from opencharacter.runtime.threads import run_side_by_side

_leases: dict[str, Lease] = {}
"""Leases by key, the least recently requested first."""
_leases_changed = threading.Condition()
"""Guards `_leases`; notified when an allocation is released."""
_released: dict[str, list[Allocation]] = {}
"""Released allocations by job, until `resource_usage` reports them."""
_waking = threading.Lock()
"""Held while engines are woken, so that each is woken once."""
_failed_swaps: set[str] = set()
"""Swap groups in which a replacement of weights has failed; their engines are started instead."""
_failed_early: set[str] = set()
"""Keys of the engines whose early start has failed; a job that needs one starts it."""
_needed: set[str] = set()
"""Keys of the engines that unfinished jobs need; the weights of others are replaced first."""
_kept: Counter[str] = Counter()
"""Keys of the engines that running jobs are about to use, by the number of those jobs."""
_spares = itertools.count()
_measuring_memory = threading.Lock()
"""Held while an engine starts that measures the free memory of a GPU that it shares."""


@contextlib.contextmanager
def acquire(
    job: str,
    resource_requests: Sequence[ResourceRequest],
    growth: Resources,
    report: Callable[[str], None] = lambda _: None,
) -> Iterator[Allocation]:
    """Acquire engines and training workers together and release them on exit.

    Engines that are already running are shared. Otherwise an idle engine gets the weights that are
    needed, if it can, and if not, an engine is started. If the cluster lacks resources, idle
    engines are stopped, the least recently used first; if that does not free enough, this call
    blocks until another job releases its allocation. Acquisition is all-or-nothing, so jobs cannot
    deadlock. An engine is never stopped or changed while a job uses it.

    Args:
        job: dataset of the job that is charged.
        resource_requests: everything that is used at the same time.
        growth: resources that the cluster can grow to, according to the placement.
        report: called with what is being done until the engines are ready.

    Raises:
        StageFailed: if an engine does not start.
    """
    requests = {r.key(): r for r in resource_requests if getattr(r, "has_weights", True)}
    allocation = Allocation(requests)
    to_start = _reserve(allocation, capacity(growth)) if requests else []
    start_time = time.monotonic()
    try:
        if _trains(requests.values()):
            _put_engines_to_sleep()
        run_side_by_side([partial(_prepare_engine, allocation, s, report) for s in to_start])
        report(STARTING)
        for request in requests.values():
            if isinstance(request, EngineSpec):
                _await_engine(allocation.leases[request.key()], request)
        allocation.preparation = (start_time, time.monotonic())
        _report_starts(allocation)
        with _measuring_share(allocation):
            yield allocation
    finally:
        allocation.released_at = time.monotonic()
        _release(allocation)
        _released.setdefault(job, []).append(allocation)


@contextlib.contextmanager
def kept_from_swaps(engines: Iterable[EngineSpec]) -> Iterator[None]:
    """Let no other engine be made of these while the block runs, though they may be stopped."""
    keys = {spec.key() for spec in engines}
    with _leases_changed:
        _kept.update(keys)
    try:
        yield
    finally:
        with _leases_changed:
            _kept.subtract(keys)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Lock the leases, without those of an earlier connection to Ray, whose actors are gone."""
    with _leases_changed:
        for key in [key for key, lease in _leases.items() if lease.session != session()]:
            del _leases[key]
        yield


@contextlib.contextmanager
def _measuring_share(allocation: Allocation) -> Iterator[None]:
    """Measure the fraction of its engines' time that a job has while the block runs."""
    start_time, start_held = _charge_now(allocation)
    try:
        yield
    finally:
        end_time, end_held = _charge_now(allocation)
        exclusive = len(allocation.resource_requests) * (end_time - start_time)
        allocation.engine_share = (end_held - start_held) / exclusive if exclusive else 1


def _charge_now(allocation: Allocation) -> tuple[float, float]:
    """Charge all leases of an allocation; return the time and its held seconds until then."""
    with _leases_changed:
        now = time.monotonic()
        for lease in allocation.leases.values():
            charge(lease, now, lease.users)
        return now, allocation.held_seconds


def _reserve(allocation: Allocation, available: Resources) -> list[EngineSpec]:
    """Register an allocation with all its leases.

    Returns:
        The engines that it has to start, or to get by replacing the weights of an idle engine.
    """
    to_start: list[EngineSpec] = []
    requests = allocation.resource_requests
    with _locked():
        while _must_wait_for_sleep(requests.values()) or not _make_room(
            requests, sources := _swap_sources(requests.values()), available
        ):
            _leases_changed.wait()
        for key, request in requests.items():
            now = time.monotonic()
            if key not in _leases and isinstance(request, EngineSpec):
                to_start.append(request)
            lease = _leases.pop(key, None) or _new_lease(request, now, sources.get(key))
            charge(lease, now, lease.users or [allocation])
            lease.users.append(allocation)
            _leases[key] = allocation.leases[key] = lease
    return to_start


def _new_lease(request: ResourceRequest, now: float, source: str | None) -> Lease:
    """Return a lease without users, which replaces that of a swap's source if there is one."""
    if source is None:
        return Lease(request, now)
    old = _leases.pop(source)
    return Lease(request, old.charged_until, swapped_from=old, starts=old.starts)


def _swap_sources(requests: Iterable[ResourceRequest]) -> dict[str, str]:
    """Return the idle engines whose weights can be replaced to fulfil requests, by request."""
    idle = {k: lease.request for k, lease in _leases.items() if lease.is_idle and not _kept[k]}
    sources = swap_sources(requests, _leases, idle, _needed)
    return {
        key: source
        for key, source in sources.items()
        if idle[source].swap_group not in _failed_swaps
    }


def _make_room(
    resource_requests: dict[str, ResourceRequest],
    sources: Mapping[str, str],
    available: Resources,
) -> bool:
    """Stop idle engines until the requests fit, the least recently used first.

    What cannot take other weights, such as an application with all adapters, is stopped last: it
    takes longest to start, and nothing else can do its work.

    Args:
        resource_requests: what is requested, by key.
        sources: keys of the engines whose weights are replaced to fulfil requests, by request.
        available: resources of the cluster.

    Returns:
        True if the requests can be fulfilled now, False if the caller must wait for a release.
    """
    kept = {*resource_requests, *sources.values()}
    others = [key for key in _leases if key not in kept]
    if not resource_requests.keys() <= _leases.keys():
        for key in others:
            _stop_pending_replicas(_leases[key])
    requested = [request.resources for request in resource_requests.values()]
    while not fits([*requested, *(_leases[key].request.resources for key in others)], available):
        idle = [key for key in others if _leases[key].is_idle]
        if not idle:
            return not others  # if it does not fit alone, Ray refuses it or scales the cluster up
        stopped = min(idle, key=lambda key: not _leases[key].request.swap_group)
        others.remove(stopped)
        _stop_engine(stopped)
    return True


def _release(allocation: Allocation) -> None:
    with _leases_changed:
        for key, lease in allocation.leases.items():
            charge(lease, time.monotonic(), lease.users)
            lease.users.remove(allocation)
            if isinstance(lease.request, TrainingWorkers):
                _leases.pop(key, None)
            elif _leases.get(key) is lease and any(other.users for other in _leases.values()):
                _stop_pending_replicas(lease)  # another job may be waiting for their resources
        _leases_changed.notify_all()


def _stop_pending_replicas(lease: Lease) -> None:
    """Stop the replicas that an idle engine has beyond its pool's fixed number."""
    if lease.is_idle and isinstance(lease.request, EngineSpec):
        lease.replicas.result().stop_pending()


def _await_engine(lease: Lease, spec: EngineSpec) -> None:
    """Wait until an engine has started, and request the replicas that may join it later."""
    lease.replicas.result()
    if lease.asleep:
        _wake_engine(lease, spec)
    replicas = lease.replicas.result()
    with _leases_changed:
        if isinstance(replicas, EngineReplicas) and not replicas.pending:
            replicas.pending.extend(
                create_actors(spec, spec.pool.replica_limit - spec.pool.replicas)
            )


def _stop_engine(key: str) -> None:
    _leases.pop(key).replicas.result().stop()


def _trains(requests: Iterable[ResourceRequest]) -> bool:
    """Whether any of some requests is for training workers."""
    return any(isinstance(request, TrainingWorkers) for request in requests)


def _must_wait_for_sleep(requests: Iterable[ResourceRequest]) -> bool:
    """Whether training must wait for engines that should sleep, or such engines for training."""
    requested = list(requests)
    if _trains(requested):
        return any(not lease.is_idle for lease in _leases.values() if lease.request.sleeps)
    training = _trains(lease.request for lease in _leases.values())
    return training and any(request.sleeps for request in requested)


def _put_engines_to_sleep() -> None:
    """Put the idle engines to sleep that should sleep during training; stop those that cannot."""
    with _leases_changed:
        awake = [(k, v) for k, v in _leases.items() if v.request.sleeps and not v.asleep]
    for key, lease in awake:
        replicas = lease.replicas.result()
        if not isinstance(replicas, EngineReplicas):
            continue
        try:
            replicas.sleep()
            lease.asleep = True
        except Exception as error:  # whatever the reason, its memory is needed
            console.print(
                f"an engine is stopped for training, because it cannot sleep: {first_line(error)}",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )
            with _leases_changed:
                if _leases.get(key) is lease:
                    _stop_engine(key)


def _wake_engine(lease: Lease, spec: EngineSpec) -> None:
    """Wake a sleeping engine, or start it again if that fails."""
    with _waking:
        replicas = lease.replicas.result()
        if not lease.asleep:
            return
        assert isinstance(replicas, EngineReplicas)
        try:
            replicas.wake()
        except Exception:  # whatever the reason, an engine that is started is right
            replicas.stop()
            lease.replicas = Future()
            _start_engine(lease, spec)
        lease.asleep = False


def first_line(error: Exception) -> str:
    """Return the first line of an error, without Ray's traceback."""
    cause = getattr(error, "cause", None) or error
    return (str(cause).splitlines() or [type(cause).__name__])[0]


STARTING, SWAPPING = "starting the engine", "swapping weights"
"""What a job does until its engines are ready, for its progress line."""


def _prepare_engine(
    allocation: Allocation, spec: EngineSpec, report: Callable[[str], None]
) -> None:
    """Replace the weights of an idle engine if one was reserved for that; else start an engine."""
    lease = allocation.leases[spec.key()]
    start_time = time.monotonic()
    if lease.swapped_from:
        report(SWAPPING)
        if _swap_engine(lease, lease.swapped_from, spec):
            allocation.engines_swapped.append(spec.label)
            allocation.swaps.append((start_time, time.monotonic()))
            return
    report(STARTING)
    _start_and_record(lease, spec)


def _start_and_record(lease: Lease, spec: EngineSpec) -> None:
    """Start an engine and record how long it took."""
    start_time = time.monotonic()
    with _measuring_memory if shares_gpu(spec.pool) else contextlib.nullcontext():
        _start_engine(lease, spec)
    lease.starts.append((spec.label, time.monotonic() - start_time))


def shares_gpu(pool: Pool) -> bool:
    """Whether engines of a pool measure the free memory of a GPU that others may use meanwhile.

    With a fixed size of the key-value cache, vLLM does not depend on that measurement.
    """
    return 0 < pool.gpus < 1 and "kv_cache_memory_bytes" not in pool.engine_kwargs


def _report_starts(allocation: Allocation) -> None:
    """Move the starts of an allocation's engines to it, unless another one has reported them."""
    with _leases_changed:
        for lease in allocation.leases.values():
            allocation.engines_started += [label for label, _ in lease.starts]
            allocation.start_seconds += sum(seconds for _, seconds in lease.starts)
            lease.starts.clear()


def _swap_engine(lease: Lease, old: Lease, spec: EngineSpec) -> bool:
    """Replace the weights of an engine and verify them.

    If that fails, the engine is stopped, so that it never generates with other weights.

    Returns:
        Whether the lease has the engine now.
    """
    replicas, lease.swapped_from = old.replicas.result(), None
    assert isinstance(replicas, EngineReplicas)  # an application has no swap group
    try:
        if old.asleep:
            replicas.wake()
        swapped = replicas.swap(spec)
    except Exception as error:  # whatever the reason, an engine that is started is right
        replicas.stop()
        if not isinstance(error, ray.exceptions.RayActorError):  # which may not happen again
            _failed_swaps.add(spec.swap_group)
        console.print(
            f"the weights of {spec.label} could not be loaded into a running engine, so an engine "
            f"is started: {first_line(error)}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
        return False
    lease.replicas.set_result(swapped)
    return True


def _start_engine(lease: Lease, spec: EngineSpec) -> None:
    """Start an engine's replicas; a failure is raised to everyone who waits for the engine."""
    actors: list[Any] = []
    try:
        if isinstance(spec, ServedSpec):
            lease.replicas.set_result(start_app(spec))
            return
        actors += create_actors(spec, spec.pool.replicas)
        _await_placement(actors)
        ray.get([actor.start.remote(spec) for actor in actors])
        lease.replicas.set_result(EngineReplicas(spec, actors, []))
    except Exception as error:  # any failure, because all waiting jobs must receive it
        for actor in actors:
            ray.kill(actor)
        cause = getattr(error, "cause", None) or error
        with _leases_changed:
            for key in [key for key, other in _leases.items() if other is lease]:
                del _leases[key]
        failure = StageFailed(f"engine for {spec.role.model} did not start: {cause}")
        lease.replicas.set_exception(cause if isinstance(cause, UserError) else failure)


def _await_placement(actors: list[Any]) -> None:
    """Wait until Ray has placed all actors, stopping idle engines while it cannot.

    The resources of the cluster may suffice in total and yet not on any single node.
    """
    placed = [actor.__ray_ready__.remote() for actor in actors]
    while len(ray.wait(placed, num_returns=len(placed), timeout=PLACEMENT_TIMEOUT_S)[0]) < len(
        placed
    ):
        with _leases_changed:
            idle = [key for key, lease in _leases.items() if lease.is_idle]
            if idle:
                _stop_engine(idle[0])


def start_early(spec: EngineSpec) -> None:
    """Start an engine in the background that no job uses yet.

    If an engine of this spec runs, the new one is a spare: its weights are replaced for the next
    job that needs others.
    """
    with _locked():
        is_spare = spec.key() in _leases
        key = f"spare {next(_spares)} of {spec.key()}" if is_spare else spec.key()
        lease = _leases[key] = Lease(spec, time.monotonic())

    def start() -> None:
        try:
            _start_and_record(lease, spec)
        except Exception:  # raised by the jobs that wait for it, if any
            if lease.session == session():
                _failed_early.add(spec.key())
        with _leases_changed:
            _leases_changed.notify_all()

    threading.Thread(target=start, daemon=True).start()


def may_start_early() -> bool:
    """Whether early starts make sense: none has failed, and neither has a swap, for the spares."""
    return not _failed_early and not _failed_swaps


def resource_usage(job: str) -> dict[str, Any]:
    """Return a job's resource usage for its manifest, as `leases.usage`, and forget it."""
    return usage(_released.pop(job, []))


def capacity(growth: Resources) -> Resources:
    """Return the cluster's current resources, or what it can grow to if that is more."""
    cluster = ray.cluster_resources() if ray.is_initialized() else {}
    current = Resources(
        cpus=cluster.get("CPU", 0),
        gpus=cluster.get("GPU", 0),
        memory_gib=cluster.get("memory", 0) / 2**30,
    )
    return current | growth


def running_engines() -> dict[str, EngineSpec]:
    """Return the specs of all running engines, idle ones included, by key."""
    with _locked():
        leases = list(_leases.items())
    return {key: lease.request for key, lease in leases if isinstance(lease.request, EngineSpec)}


def effort(spec: EngineSpec) -> int:
    """Rank what it takes until an engine is ready: 0 if it runs, 1 for a swap, 2 for a start."""
    with _locked():
        if spec.key() in _leases:
            return 0
        return 1 if _swap_sources([spec]) else 2


def delete_applications() -> None:
    """Delete the Serve applications that this process deployed; they would outlive it."""
    with _locked():
        for key, lease in list(_leases.items()):
            if isinstance(lease.request, ServedSpec):
                del _leases[key]
                RunningApp(lease.request).stop()


def stop_unused_engines(requests: Iterable[ResourceRequest] = ()) -> None:
    """Stop all idle engines except those that fulfil requests, or could after a swap."""
    requested = list(requests)
    keys = {request.key() for request in requested}
    groups = {request.swap_group for request in requested} - {"", *_failed_swaps}
    with _locked():
        _needed.clear()
        _needed.update(keys)
        unused = [
            key
            for key, lease in _leases.items()
            if lease.is_idle and key not in keys and lease.request.swap_group not in groups
        ]
        run_side_by_side([partial(_stop_engine, key) for key in unused])
