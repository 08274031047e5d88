"""vLLM engines as Ray actors, and the client that spreads requests over them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from opencharacter.engines.backends import VllmEngine
from opencharacter.engines.spec import EngineSpec, Reply
from opencharacter.errors import RowFailed, StageFailed
from opencharacter.runtime.progress import actor_name


@ray.remote
class EngineActor:
    """A vLLM engine in a process of its own.

    If the engine's own processes die, the host ends too, and Ray starts it again; replies that were
    under way are asked of another, see `Hosted`.
    """

    def __init__(self, spec: EngineSpec):
        self.spec = spec
        self.engine: VllmEngine | None = None

    async def start(self) -> None:
        """Start the engine, once; a failure is raised to whoever asks."""
        if self.engine is None:
            self.engine = VllmEngine(self.spec)

    @ray.method(max_task_retries=0)  # pyright: ignore[reportCallIssue, reportArgumentType]
    async def reply(self, messages, sampling, *, seed, prefill="") -> Reply:
        await self.start()
        assert self.engine is not None
        try:
            return await self.engine.reply(messages, sampling, seed=seed, prefill=prefill)
        except RowFailed:
            raise
        except Exception:
            if self.engine.engine.errored:
                os._exit(1)
            raise

    async def close(self) -> None:
        if self.engine is not None:
            self.engine.close()


CALLS_PER_SLOT = 2
"""Calls that a host takes at once, over its seats; Ray's default would be 1,000."""
PLACEMENT_TIMEOUT_S = 60
"""Seconds for which new hosts wait for Ray to place them before another engine makes room."""


@dataclass(frozen=True)
class EngineReplicas:
    """The hosts of one spec.

    Args:
        ready: handles, one a replica, whose engines have started.
        coming: handles that join when the cluster has room for them.
    """

    ready: list[Any]
    coming: list[Any]

    def stop(self) -> None:
        """Stop them: their memory and devices are free when this returns."""
        started = [host.start.remote() for host in self.coming]
        running, _ = ray.wait(started, num_returns=len(started), timeout=1) if started else ([], [])
        joined = [host for host, ref in zip(self.coming, started, strict=True) if ref in running]
        for host in self.ready + joined:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(host.close.remote(), timeout=30)
        for host in self.ready + self.coming:
            ray.kill(host)


def _new_hosts(spec: EngineSpec, count: int) -> list[Any]:
    """Ask Ray for hosts."""
    pool = spec.pool
    options = {
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus,
        "accelerator_type": pool.accelerator,
        "memory": int(pool.memory_gib * 2**30),
        "max_restarts": pool.max_restarts,
        "max_task_retries": -1,
        "max_concurrency": CALLS_PER_SLOT * num_slots(spec),
    }
    names = (actor_name(f"engine {spec.role.model}") for _ in range(count))
    return [EngineActor.options(**options, name=name).remote(spec) for name in names]


class EngineClient:
    """An engine whose work is done by hosts; each request goes to the least busy one.

    What a lost host had under way is asked of the others. It joins again when Ray has found a place
    for it; only where no host is left is that waited for.
    """

    def __init__(self, fleet: EngineReplicas):
        self.busy = dict.fromkeys(fleet.ready, 0)
        self.coming = fleet.coming
        self.joining: set[asyncio.Task[None]] | None = None

    async def _join(self, host: Any) -> None:
        """Give work to a host once its engine has started; one that cannot start gets none."""
        with contextlib.suppress(ray.exceptions.RayError):
            await host.start.remote()
            self.busy[host] = 0

    def _await(self, host: Any) -> None:
        task = asyncio.create_task(self._join(host))
        self.joining = {task, *(self.joining or ())}
        task.add_done_callback(lambda done: self.joining and self.joining.discard(done))

    async def _least_busy(self) -> Any:
        if self.joining is None:
            self.joining = set()
            for host in self.coming:
                self._await(host)
        while not self.busy:
            if not self.joining:
                raise StageFailed("every replica of the engine is lost; run it again")
            await asyncio.wait(self.joining, return_when=asyncio.FIRST_COMPLETED)
        return min(self.busy, key=self.busy.__getitem__)

    async def reply(self, messages, sampling, *, seed, prefill="") -> Reply:
        while True:
            host = await self._least_busy()
            self.busy[host] += 1
            try:
                return await host.reply.remote(messages, sampling, seed=seed, prefill=prefill)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, RowFailed):
                    raise error.cause from None
                raise
            except ray.exceptions.RayActorError:
                if self.busy.pop(host, None) is not None:  # the first to learn of it
                    self._await(host)
            finally:
                if host in self.busy:
                    self.busy[host] -= 1

    def stream(self, messages, sampling) -> AsyncIterator[str]:
        raise NotImplementedError("a hosted engine answers whole")

    def close(self) -> None:
        """The hosts outlast the stage."""


def num_slots(spec: EngineSpec) -> int:
    """Conversations that one task has under way: enough for all replicas that may come."""
    pool = spec.pool
    share = math.ceil(pool.max_num_seqs * pool.most_replicas / pool.replicas)
    return spec.role.endpoint_concurrency if spec.role.endpoint else share
