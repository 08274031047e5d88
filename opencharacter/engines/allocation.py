"""Which jobs hold which engines and training workers, and what that costs them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions

from opencharacter.config.placement import Resources, fits
from opencharacter.engines.replicas import PLACEMENT_TIMEOUT_S, EngineReplicas, _new_hosts
from opencharacter.engines.spec import EngineSpec
from opencharacter.errors import StageFailed, UserError
from opencharacter.runtime.stage import ResourceRequest, TrainingWorkers


@dataclass(eq=False)
class Allocation:
    """What a job holds for a while, and what that came to.

    Args:
        needs: engines with weights, and workers.
        places: where they are held, by the same keys.
        seconds: of all of them together; see `_settle`.
        gpu_seconds: the same, times the GPUs of each.
        busy: seconds in which work was under way, told by who does it.
        share: that it had of its engines meanwhile, others using them at once.
        starting: seconds until all engines had started.
        started: the engines that were started for this.
    """

    resource_requests: dict[str, ResourceRequest]
    places: dict[str, _Place] = field(default_factory=dict)
    seconds: float = 0
    gpu_seconds: float = 0
    busy: float = 0
    share: float = 1
    starting: float = 0
    started: list[str] = field(default_factory=list)

    def fleet(self, spec: EngineSpec) -> EngineReplicas | None:
        """The running hosts of one of its engines; None for an engine without weights."""
        return self.places[spec.key()].fleet.result() if spec.has_weights else None


@dataclass
class _Place:
    """Something that is held: by whom now, and since when that has been so."""

    need: ResourceRequest
    since: float
    users: list[Allocation] = field(default_factory=list)
    fleet: Future[EngineReplicas] = field(default_factory=Future)


_places: dict[str, _Place] = {}
"""Running engines and workers by their key, the one that was asked for last at the end."""
_changed = threading.Condition()
"""Guards `_places`, and tells when something was given back."""
_spent: dict[str, list[Allocation]] = {}
"""What jobs have held, by the job."""


@contextlib.contextmanager
def acquire(
    job: str, resource_requests: Sequence[ResourceRequest], growth: Resources
) -> Iterator[Allocation]:
    """Have engines and workers at once, and nobody else evicts them meanwhile.

    Engines that run already are shared. Where the cluster has no room, engines that no job uses
    are stopped, the longest unused first; if that is not enough, this waits until another job
    gives something back. A job waits with empty hands, so none waits for ever.

    Args:
        job: the dataset that is made, on whose account it goes.
        resource_requests: all that is used at the same time.
        growth: what the cluster may grow to, by the placement.

    Raises:
        StageFailed: if an engine does not start.
    """
    held = Allocation({n.key(): n for n in resource_requests if getattr(n, "has_weights", True)})
    new = _take(held, capacity(growth)) if held.resource_requests else []
    began = time.monotonic()
    try:
        for spec in new:
            _start(held.places[spec.key()], spec)
            held.started.append(spec.label)
        for need in held.resource_requests.values():
            if isinstance(need, EngineSpec):
                _grow(held.places[need.key()], need)
        held.starting = time.monotonic() - began
        with _sharing(held):
            yield held
    finally:
        _give_back(held)
        _spent.setdefault(job, []).append(held)


@contextlib.contextmanager
def _sharing(held: Allocation) -> Iterator[None]:
    """Note which share a job has of its engines, from when all have started."""
    began, before = _charged(held)
    try:
        yield
    finally:
        ended, after = _charged(held)
        alone = len(held.resource_requests) * (ended - began)
        held.share = (after - before) / alone if alone else 1


def _charged(held: Allocation) -> tuple[float, float]:
    """The time, and the seconds that a job is charged until then."""
    with _changed:
        now = time.monotonic()
        for place in held.places.values():
            _settle(place, now, place.users)
        return now, held.seconds


def _take(held: Allocation, there: Resources) -> list[EngineSpec]:
    """Become a user of all that is needed; returns the engines that are to be started."""
    new: list[EngineSpec] = []
    with _changed:
        while not _make_room(held.resource_requests, there):
            _changed.wait()
        for key, need in held.resource_requests.items():
            now = time.monotonic()
            if key not in _places and isinstance(need, EngineSpec):
                new.append(need)
            place = _places.pop(key, None) or _Place(need, now)
            _settle(place, now, place.users or [held])
            place.users.append(held)
            _places[key] = held.places[key] = place
    return new


def _make_room(resource_requests: dict[str, ResourceRequest], there: Resources) -> bool:
    """Stop unused engines until there is room; whether there is, or nothing to wait for."""
    others = [key for key in _places if key not in resource_requests]
    if not resource_requests.keys() <= _places.keys():
        for key in others:
            _shrink(_places[key])
    wanted = [need.resources for need in resource_requests.values()]
    while not fits([*wanted, *(_places[key].need.resources for key in others)], there):
        unused = [key for key in others if not _places[key].users]
        if not unused:
            return not others  # what does not fit by itself is Ray's to refuse, or to grow for
        others.remove(unused[0])
        _stop(unused[0])
    return True


def _settle(place: _Place, now: float, users: list[Allocation]) -> None:
    """Charge the time since the last change to its users, in equal shares.

    An engine that stood unused is charged to the job that comes.
    """
    passed, place.since = now - place.since, now
    for user in users:
        user.seconds += passed / len(users)
        user.gpu_seconds += passed * place.need.resources.gpus / len(users)


def _give_back(held: Allocation) -> None:
    with _changed:
        for key, place in held.places.items():
            _settle(place, time.monotonic(), place.users)
            place.users.remove(held)
            if isinstance(place.need, TrainingWorkers):
                del _places[key]
            elif _places.get(key) is place and any(other.users for other in _places.values()):
                _shrink(place)  # somebody may be waiting for that room
        _changed.notify_all()


def _shrink(place: _Place) -> None:
    """Stop the replicas of an unused engine that came beyond those which its pool waits for."""
    if not place.users and isinstance(place.need, EngineSpec):
        fleet = place.fleet.result()
        EngineReplicas([], fleet.coming).stop()
        fleet.coming.clear()


def _grow(place: _Place, spec: EngineSpec) -> None:
    """Wait for an engine, and ask Ray for the replicas that join when there is room."""
    fleet = place.fleet.result()
    with _changed:
        if not fleet.coming:
            fleet.coming.extend(_new_hosts(spec, spec.pool.most_replicas - spec.pool.replicas))


def _stop(key: str) -> None:
    """Stop an unused engine."""
    _places.pop(key).fleet.result().stop()


def _start(place: _Place, spec: EngineSpec) -> None:
    """Start an engine's hosts; who waits for them is told of a failure."""
    handles: list[Any] = []
    try:
        handles += _new_hosts(spec, spec.pool.replicas)
        _await_placed(handles)
        ray.get([host.start.remote() for host in handles])
        place.fleet.set_result(EngineReplicas(handles, []))
    except Exception as error:  # told to whoever waits for the engine, whatever it is
        for host in handles:
            ray.kill(host)
        cause = getattr(error, "cause", None) or error
        with _changed:
            del _places[spec.key()]
        failed = StageFailed(f"engine for {spec.role.model} did not start: {cause}")
        place.fleet.set_exception(cause if isinstance(cause, UserError) else failed)


def _await_placed(handles: list[Any]) -> None:
    """Wait until Ray has found room; where nodes are too broken up for it, unused engines go."""
    placed = [host.__ray_ready__.remote() for host in handles]
    while len(ray.wait(placed, num_returns=len(placed), timeout=PLACEMENT_TIMEOUT_S)[0]) < len(
        placed
    ):
        with _changed:
            unused = [key for key, place in _places.items() if not place.users]
            if unused:
                _stop(unused[0])


def spent(job: str) -> dict[str, Any]:
    """What a job has held, as its manifest says it.

    An engine or a worker, and its GPUs, are *held* from when they are asked for (what runs already:
    since the job before) until they are given back, and *busy* from the first request to the last
    reply, or from the first training step to the last. Jobs that use an engine at once share that.
    All engines count, two side by side twice; `work_seconds` are the clock's, and `engine_share` is
    what the job had of its engines meanwhile.
    """
    made = _spent.pop(job, [])
    gpus = {
        id(held): sum(need.resources.gpus for need in held.resource_requests.values())
        for held in made
    }
    shared = {id(held): held.busy * held.share for held in made}
    work = sum(h.busy for h in made)
    seconds = {
        "held_seconds": sum(h.seconds for h in made),
        "busy_seconds": sum(min(shared[id(h)] * len(h.resource_requests), h.seconds) for h in made),
        "gpu_seconds": sum(h.gpu_seconds for h in made),
        "gpu_busy_seconds": sum(min(shared[id(h)] * gpus[id(h)], h.gpu_seconds) for h in made),
        "starting_seconds": sum(h.starting for h in made),
        "work_seconds": work,
    }
    started = [name for held in made for name in held.started]
    rounded = {k: round(v, 2) for k, v in seconds.items()}
    return rounded | {
        "engine_share": round(sum(shared.values()) / work, 4) if work else 1,
        "phases": len(made),
        "engines_started": started,
    }


def capacity(growth: Resources) -> Resources:
    """What the cluster has now, or may grow to if that is more."""
    there = ray.cluster_resources() if ray.is_initialized() else {}
    now = Resources(
        cpus=there.get("CPU", 0),
        gpus=there.get("GPU", 0),
        memory_gib=there.get("memory", 0) / 2**30,
    )
    return now | growth


def running_engines() -> dict[str, Resources]:
    """Engines that run, used or not, by their key."""
    with _changed:
        places = list(_places.items())
    return {
        key: place.need.resources for key, place in places if isinstance(place.need, EngineSpec)
    }


def is_warm(spec: EngineSpec) -> bool:
    """Whether hosts of a spec are running."""
    return spec.key() in _places


def stop_hosts(but: Container[str] = ()) -> None:
    """Stop all engines that no job uses, but for some keys."""
    with _changed:
        for key in [k for k, place in _places.items() if not place.users and k not in but]:
            _stop(key)
