"""VLLM engines as Ray actors, and the client that balances requests over them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.exceptions

from opencharacter.engines.backends import VllmEngine
from opencharacter.engines.spec import EngineSpec, Reply
from opencharacter.errors import OpenCharacterError, RowFailed, StageFailed
from opencharacter.runtime.progress import actor_name


class OtherWeights(OpenCharacterError):
    """A replica has no engine since it was restarted, or an engine with other weights."""


@ray.remote
class EngineActor:
    """One replica: a vLLM engine in a process of its own.

    If a process of the engine dies, the actor exits and Ray restarts it, without an engine.
    `EngineClient` sends the requests that were in flight to another replica and starts the engine
    again.
    """

    def __init__(self) -> None:
        self.engine: VllmEngine | None = None
        self.weights: str | None = None
        self.starting = asyncio.Lock()

    async def start(self, spec: EngineSpec) -> None:
        """Start the engine unless it is running; a failure is raised to every caller."""
        async with self.starting:
            if self.engine is None:
                self.engine = await start_engine(spec)
                self.weights = spec.weights
        if self.weights != spec.weights:
            raise OtherWeights(f"the engine has the weights {self.weights}")

    @ray.method(max_task_retries=0)  # pyright: ignore[reportCallIssue, reportArgumentType]
    async def swap(self, spec: EngineSpec) -> None:
        """Replace the weights of the engine, which generates nothing at the moment.

        If this fails, the engine may have weights of both checkpoints and must be stopped; until
        then it refuses all requests.
        """
        self.weights = None
        if self.engine is None:  # its process died while it was unused
            self.engine = await start_engine(spec)
        else:
            with exit_if_dead(self.engine):
                await self.engine.swap(spec)
        self.weights = spec.weights

    @ray.method(max_task_retries=0)  # pyright: ignore[reportCallIssue, reportArgumentType]
    async def reply(self, messages, sampling, *, weights="", **options) -> Reply:
        if self.engine is None or self.weights != weights:
            raise OtherWeights(f"the engine has the weights {self.weights}")
        with exit_if_dead(self.engine):
            return await self.engine.reply(messages, sampling, **options)

    @ray.method(max_task_retries=0)  # pyright: ignore[reportCallIssue, reportArgumentType]
    async def sleep(self) -> None:
        if self.engine is not None:
            await self.engine.sleep()

    @ray.method(max_task_retries=0)  # pyright: ignore[reportCallIssue, reportArgumentType]
    async def wake(self) -> None:
        if self.engine is not None:
            await self.engine.wake()

    async def close(self) -> None:
        if self.engine is not None:
            self.engine.close()


async def start_engine(spec: EngineSpec) -> VllmEngine:
    """Start an engine; on a GPU from the weights of the base model, which are then replaced.

    VLLM keeps what it has compiled for the next start from the same path, and compiles again for
    every other path, which takes longer than to replace the weights.
    """
    base = replace(spec, adapter=None)
    if not (spec.pool.gpus and spec.weights and spec.swap_group == base.swap_group != ""):
        return VllmEngine(spec)
    engine = VllmEngine(base)
    try:
        await engine.swap(spec)
    except Exception:  # whatever the reason, an engine that loads the weights itself is right
        engine.close()
        return VllmEngine(spec)
    return engine


@contextlib.contextmanager
def exit_if_dead(engine: VllmEngine) -> Iterator[None]:
    """End this process if the block fails because a process of the engine has died."""
    try:
        yield
    except RowFailed:
        raise
    except Exception:
        if engine.engine.errored:
            os._exit(1)
        raise


CALLS_PER_SLOT = 2
"""Concurrent calls that a replica accepts per conversation slot; Ray's default is 1,000 in all."""
PLACEMENT_TIMEOUT_S = 60
"""Seconds that new replicas wait for Ray to place them before an idle engine is stopped."""
SWAP_TIMEOUT_S = 600
"""Seconds after which a replacement of weights has failed; merging an adapter is part of it."""
SLEEP_TIMEOUT_S = 120
"""Seconds after which an engine has failed to fall asleep or to wake."""
CLOSE_TIMEOUT_S = 30
"""Seconds that replicas have to end their processes before they are killed."""


@dataclass(frozen=True)
class EngineReplicas:
    """The replicas of one engine.

    Args:
        spec: the engine that they run.
        ready: actor handles of the replicas whose engines have started.
        pending: actor handles of replicas that join once the cluster has resources for them.
    """

    spec: EngineSpec
    ready: list[Any]
    pending: list[Any]

    def stop_pending(self) -> None:
        """Stop the replicas that are not ready."""
        if self.pending:
            replace(self, ready=[]).stop()
            self.pending.clear()

    def swap(self, spec: EngineSpec) -> EngineReplicas:
        """Replace the weights of all replicas, which must be idle.

        Args:
            spec: the same engine with another adapter merged into its weights.

        Returns:
            The same replicas with the new weights.

        Raises:
            RayError: if any replica failed; then all of them must be stopped.
        """
        self.stop_pending()
        ray.get([actor.swap.remote(spec) for actor in self.ready], timeout=SWAP_TIMEOUT_S)
        return EngineReplicas(spec, self.ready, [])

    def sleep(self) -> None:
        """Put all replicas, which must be idle, to sleep; the memory of their GPUs is free then.

        Raises:
            RayError: if any replica failed; then all of them must be stopped.
        """
        self.stop_pending()
        ray.get([actor.sleep.remote() for actor in self.ready], timeout=SLEEP_TIMEOUT_S)

    def wake(self) -> None:
        """Wake all replicas.

        Raises:
            RayError: if any replica failed; then all of them must be stopped.
        """
        ray.get([actor.wake.remote() for actor in self.ready], timeout=SLEEP_TIMEOUT_S)

    def stop(self) -> None:
        """Stop all replicas; their memory and devices are free when this returns."""
        starts = [actor.start.remote(self.spec) for actor in self.pending]
        started, _ = ray.wait(starts, num_returns=len(starts), timeout=1) if starts else ([], [])
        joined = [actor for actor, ref in zip(self.pending, starts, strict=True) if ref in started]
        closed = [actor.close.remote() for actor in self.ready + joined]
        if closed:  # side by side, because a lost replica does not answer
            ray.wait(closed, num_returns=len(closed), timeout=CLOSE_TIMEOUT_S)
        for actor in self.ready + self.pending:
            ray.kill(actor)


def create_actors(spec: EngineSpec, count: int) -> list[Any]:
    """Request actors for new replicas from Ray; their engines are not started yet."""
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
    return [EngineActor.options(**options, name=name).remote() for name in names]


class EngineClient:
    """An `Engine` that sends each request to the replica with the fewest requests in flight.

    The requests of one conversation stay on one replica, whose prefix cache has the earlier turns;
    see `for_conversation`. Requests that were in flight on a lost replica are sent again to the
    others. The lost replica rejoins when Ray has restarted it; the client waits for that only if no
    other replica is left.

    Args:
        replicas: the replicas of the engine.
    """

    def __init__(self, replicas: EngineReplicas):
        self.spec = replicas.spec
        self.model: dict[str, Any] = {"weights": self.spec.weights}
        """The weights that a replica must have, and the adapter that it applies, if any."""
        if self.spec.runtime_adapter:
            self.model["adapter"] = self.spec.runtime_adapter
        self.in_flight = dict.fromkeys(replicas.ready, 0)
        self.pending = replicas.pending
        self.joins: set[asyncio.Task[None]] | None = None
        """Tasks that wait for a replica to start; None until the first request."""

    async def _join(self, replica: Any) -> None:
        """Use a replica once its engine has started; ignore one that cannot start."""
        with contextlib.suppress(ray.exceptions.RayError):
            await replica.start.remote(self.spec)
            self.in_flight[replica] = 0

    def _join_later(self, replica: Any) -> None:
        task = asyncio.create_task(self._join(replica))
        self.joins = {task, *(self.joins or ())}
        task.add_done_callback(lambda done: self.joins and self.joins.discard(done))

    def _leave(self, replica: Any) -> None:
        """Send no more requests to a lost replica until its engine has started again."""
        # Only the first failed request of a lost replica schedules its return.
        if self.in_flight.pop(replica, None) is not None:
            self._join_later(replica)

    def for_conversation(self) -> ConversationClient:
        """Return the engine for the requests of one conversation."""
        return ConversationClient(self)

    async def _choose(self, preferred: Any) -> Any:
        """Return the preferred replica if it is ready, otherwise the least busy one."""
        if preferred in self.in_flight:
            return preferred
        if self.joins is None:
            self.joins = set()
            for replica in self.pending:
                self._join_later(replica)
        while not self.in_flight:
            if not self.joins:
                raise StageFailed(
                    "every replica of the engine was lost; run the same command again"
                )
            await asyncio.wait(self.joins, return_when=asyncio.FIRST_COMPLETED)
        return min(self.in_flight, key=self.in_flight.__getitem__)

    async def reply(self, messages, sampling, *, seed, prefill="") -> Reply:
        reply, _ = await self.reply_from(None, messages, sampling, seed=seed, prefill=prefill)
        return reply

    async def reply_from(self, preferred: Any, *request: Any, **options: Any) -> tuple[Reply, Any]:
        """Generate a reply on a preferred replica if that is ready, otherwise on another one.

        Args:
            preferred: an actor handle, or None for the least busy replica.
            request: positional arguments of `reply`.
            options: keyword arguments of `reply`.

        Returns:
            The reply and the replica that generated it.
        """
        while True:
            replica = await self._choose(preferred)
            self.in_flight[replica] += 1
            try:
                reply = await replica.reply.remote(*request, **options, **self.model)
                return reply, replica
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, RowFailed):
                    raise error.cause from None
                if not isinstance(error.cause, OtherWeights):
                    raise
                self._leave(replica)
            except ray.exceptions.RayActorError:
                self._leave(replica)
            finally:
                if replica in self.in_flight:
                    self.in_flight[replica] -= 1

    def stream(self, messages, sampling) -> AsyncIterator[str]:
        raise NotImplementedError("an engine in an actor does not stream its replies")

    def close(self) -> None:
        """Do nothing: replicas outlive the clients that use them."""


class ConversationClient:
    """An `Engine` for one conversation, which stays on the replica that replied first.

    If that replica is lost, the conversation continues on another one and stays there.

    Args:
        client: the client of all conversations.
    """

    def __init__(self, client: EngineClient):
        self.client, self.replica = client, None

    async def reply(self, messages, sampling, *, seed, prefill="") -> Reply:
        reply, self.replica = await self.client.reply_from(
            self.replica, messages, sampling, seed=seed, prefill=prefill
        )
        return reply

    def stream(self, messages, sampling) -> AsyncIterator[str]:
        return self.client.stream(messages, sampling)

    def close(self) -> None:
        """Do nothing: replicas outlive the clients that use them."""


def num_slots(spec: EngineSpec) -> int:
    """Conversations that one task runs concurrently.

    That is its part of the slots of all replicas, including those that may join later; for an
    endpoint, the endpoint's limit.
    """
    if spec.role.endpoint:
        return spec.role.endpoint_concurrency
    pool = spec.pool
    return math.ceil(pool.max_num_seqs * pool.replica_limit / pool.replicas)
