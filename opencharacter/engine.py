"""Engines: the only file that builds a vLLM engine, and the tasks that run conversations.

Three engines speak the same two methods, `reply` and `stream`: vLLM, any OpenAI-compatible
endpoint, and an echo for tests. A vLLM engine lives in a `Host`, a Ray actor that outlasts a
stage, so that the next stage with the same weights finds it warm. A row of a dataset is a whole
conversation: a task of Ray Data (`converse`) runs every turn of it, so no turn waits for another
row's.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import pyarrow as pa
import ray
import ray.exceptions

from opencharacter import models
from opencharacter.chat import (
    CLOSED_THOUGHT,
    THINK_CLOSE,
    THINK_OPEN,
    Message,
    assistant,
    prompt,
    row_id,
    row_seed,
    strip_think,
)
from opencharacter.config import ECHO, JOBS_AN_ENGINE, Pool, Role, Room, Sampling, fits
from opencharacter.errors import RowFailed, StageFailed, UserError
from opencharacter.filters import whole_sentences
from opencharacter.progress import Tally, actor_name
from opencharacter.quality import texts_of
from opencharacter.store import Folder, Parts, among, digests

CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # two threads were a third slower than one on two cores
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


ENGINE_ERROR = "engine_error"
"""Why a row has no answer that another attempt may have: it is asked for again by a rerun."""
HOPELESS = 50
"""Rows that fail so, with none that does not, until a stage gives up."""


@dataclass(frozen=True)
class Reply:
    """One answer: its text (without the prefill), and what it cost in tokens."""

    text: str
    finish_reason: str
    tokens_in: int
    tokens_out: int
    cached_tokens: int


@dataclass(frozen=True)
class EngineSpec:
    """What an engine needs to start, wherever it starts.

    Args:
        role: the model.
        pool: where it runs.
        folded: adapter folder to fold into the weights before loading, or None.
        plays: the role by its name in the recipe; one engine may play several.
    """

    role: Role
    pool: Pool
    folded: Folder | None = None
    plays: str = ""

    @property
    def has_weights(self) -> bool:
        """Whether it is worth keeping: an endpoint and an echo start at once."""
        return not self.role.endpoint and not self.role.model.startswith(ECHO)

    @property
    def room(self) -> Room:
        """What its hosts hold."""
        return self.pool.room if self.has_weights else Room()

    @property
    def at_once(self) -> int:
        """Jobs that may use it at once; an endpoint has a limit of requests, so one."""
        return 1 if self.role.endpoint else JOBS_AN_ENGINE

    def shared_by(self, tasks: int) -> EngineSpec:
        """The same for tasks that ask it side by side: an endpoint's limit is for all of them."""
        limit = math.ceil(self.role.endpoint_concurrency / tasks)
        return replace(self, role=self.role.model_copy(update={"endpoint_concurrency": limit}))

    @property
    def label(self) -> str:
        """Its weights, in words."""
        return " + ".join([self.role.model, *([self.folded.relative] if self.folded else [])])

    def key(self) -> str:
        """The same for specs that one engine can serve."""
        return self._key

    @cached_property
    def _key(self) -> str:
        role = self.role.model_copy(update={"name": "", "called": "", "aliases": ()})
        return repr((role, self.pool, self.folded if self.has_weights else None))


@dataclass(frozen=True)
class Workers:
    """Processes of training, which a job has for itself.

    Args:
        owner: the job's dataset.
        room: of all of them together.
        count: how many there are.
    """

    owner: str
    room: Room
    count: int = 1
    at_once: int = 1

    def key(self) -> str:
        return f"workers of {self.owner}"


Need = EngineSpec | Workers
"""What a job may hold; its `key()` is the same for jobs that can share it."""


class Engine(Protocol):
    """What a conversation may ask for."""

    async def reply(
        self,
        messages: list[Message],
        sampling: Sampling,
        *,
        seed: int | None,
        prefill: str = "",
    ) -> Reply:
        """Answer a conversation.

        Args:
            messages: the conversation, ending on a user turn.
            sampling: how to draw.
            seed: the request's own seed, or None.
            prefill: beginning of the answer, to be continued.

        Raises:
            RowFailed: if this conversation cannot be answered; others can.
        """
        ...

    def stream(self, messages: list[Message], sampling: Sampling) -> AsyncIterator[str]:
        """Answer piece by piece."""
        ...

    def close(self) -> None:
        """Stop the engine's processes."""
        ...


def start(spec: EngineSpec) -> Engine:
    """Build the engine of a spec; for vLLM inside a running event loop."""
    if spec.role.endpoint:
        return EndpointEngine(spec)
    if spec.role.model.startswith(ECHO):
        return EchoEngine(float(spec.role.model.removeprefix(ECHO) or 0))
    return VllmEngine(spec)


class VllmEngine:
    """vLLM's asynchronous engine over one model."""

    def __init__(self, spec: EngineSpec):
        os.environ.update(environment(spec))
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.async_llm import AsyncLLM

        base, adapter = models.resolve(spec.role.model), spec.folded and spec.folded.local()
        models.check_parallel(base, spec.pool.tensor_parallel)
        arguments, self.adapter = engine_arguments(spec), None
        at_run_time = spec.pool.adapters == "runtime"
        if adapter and at_run_time and not models.is_steering(adapter):
            arguments |= {"enable_lora": True, "max_lora_rank": models.engine_rank(adapter)}
            self.adapter = LoRARequest(adapter.name, 1, str(adapter))
        elif adapter:
            base = models.fold(base, adapter)
        if spec.pool.tensor_parallel > 1:  # within this actor, whose GPUs are all on one node
            arguments.setdefault("distributed_executor_backend", "mp")
        self.model, self.context = str(base), spec.role.context
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=self.model, **arguments))
        self.requests = 0

    async def _generate(
        self,
        messages: list[Message],
        sampling: Sampling,
        seed: int | None,
        prefill: str,
        final_only: bool,
    ) -> AsyncIterator[Any]:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        tokenizer: Any = self.engine.get_tokenizer()
        text = prompt(tokenizer, messages, prefill)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        room = self.context - len(ids)
        if room < 1:
            raise RowFailed("too_long", f"prompt of {len(ids)} tokens, context {self.context}")
        kind = RequestOutputKind.FINAL_ONLY if final_only else RequestOutputKind.DELTA
        parameters = SamplingParams(
            max_tokens=min(sampling.max_tokens, room),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=seed,
            output_kind=kind,
        )
        self.requests += 1
        async for output in self.engine.generate(
            TokensPrompt(prompt_token_ids=ids),
            parameters,
            request_id=str(self.requests),
            lora_request=self.adapter,
        ):
            yield output

    async def reply(self, messages, sampling, *, seed, prefill="") -> Reply:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            outputs = self._generate(messages, sampling, seed, prefill, final_only=True)
            (final,) = [output async for output in outputs]
        except EngineDeadError:
            raise
        except ValueError as error:  # vLLM's word for a request that it cannot serve
            raise RowFailed(ENGINE_ERROR, str(error)) from None
        return Reply(
            text=final.outputs[0].text,
            finish_reason=final.outputs[0].finish_reason or "",
            tokens_in=len(final.prompt_token_ids),
            tokens_out=len(final.outputs[0].token_ids),
            cached_tokens=final.num_cached_tokens or 0,
        )

    async def stream(self, messages, sampling) -> AsyncIterator[str]:
        async for output in self._generate(messages, sampling, None, "", final_only=False):
            yield output.outputs[0].text

    def close(self) -> None:
        self.engine.shutdown()


def environment(spec: EngineSpec) -> dict[str, str]:
    """Environment variables under which vLLM is imported for a spec."""
    quiet = {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
    if spec.pool.gpus:
        return quiet
    space = str(max(1, round(spec.pool.kv_cache_gib)))
    return quiet | CPU_ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": space}


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """VLLM's engine arguments for a spec, but for the model."""
    pool, role = spec.pool, spec.role
    arguments: dict[str, Any] = {
        "dtype": role.dtype,
        "max_model_len": role.context,
        "max_num_seqs": pool.max_sequences,
        "tensor_parallel_size": pool.tensor_parallel,
        "trust_remote_code": role.trust_remote_code,
        "enable_prefix_caching": True,  # Paper: off in its code, though rows share system prompts.
        "enable_log_requests": False,
        "disable_log_stats": True,
        "generation_config": "vllm",  # sampling is the recipe's business alone
    }
    if pool.gpus == 0:
        arguments |= {
            "enforce_eager": True,
            "block_size": 32,  # the default of 128 never hits on short chats
            # A prompt cut in two kills a CPU engine whose requests have seeds (vLLM 0.29 rewinds
            # a generator offset that CPU generators do not have).
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(role.context, 4096),
        }
    else:
        arguments |= {
            "gpu_memory_utilization": pool.memory_fraction,
            "max_num_batched_tokens": 8192,  # vLLM's asynchronous engine takes 2,048 by itself
        }
    return arguments | pool.engine


OF_A_ROW = (400, 413, 422, 500)
"""HTTP statuses that may be one request's fault; the others are the server's, or its key's."""


class EndpointEngine:
    """Any OpenAI-compatible server. Retries (429, 5xx, lost connections) are the client's.

    Where the server cannot be had the stage fails: its rows would all be lost, and are asked for
    again by a rerun.
    """

    def __init__(self, spec: EngineSpec):
        from openai import AsyncOpenAI

        key = os.environ.get(spec.role.api_key_env, "none")
        self.model = spec.role.model
        self.client = AsyncOpenAI(base_url=spec.role.endpoint, api_key=key, max_retries=8)
        self.limit = asyncio.Semaphore(spec.role.endpoint_concurrency)

    def _request(
        self,
        messages: list[Message],
        sampling: Sampling,
        seed: int | None,
        prefill: str,
    ) -> dict[str, Any]:
        body: dict[str, Any] = {}
        if sampling.repetition_penalty != 1:  # not every server knows it
            body["repetition_penalty"] = sampling.repetition_penalty
        if prefill == CLOSED_THOUGHT:
            body["chat_template_kwargs"] = {"enable_thinking": False}
        elif prefill:
            messages = [*messages, assistant(prefill)]
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        return {
            "model": self.model,
            "messages": messages,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "extra_body": body,
            **({"seed": seed} if seed is not None else {}),
        }

    async def reply(self, messages, sampling, *, seed, prefill="") -> Reply:
        from openai import APIError

        request = self._request(messages, sampling, seed, prefill)
        try:
            async with self.limit:
                answer = await self.client.chat.completions.create(**request)
        except APIError as error:
            if getattr(error, "status_code", None) in OF_A_ROW:
                raise RowFailed(ENGINE_ERROR, str(error)) from None
            url = self.client.base_url
            raise StageFailed(f"{self.model} at {url} cannot be had: {error}; run again") from None
        if not getattr(answer, "choices", None):  # an error told with status 200
            raise RowFailed(ENGINE_ERROR, f"no choices in {str(answer)[:300]}")
        usage = answer.usage
        details = usage.prompt_tokens_details if usage else None
        return Reply(
            text=answer.choices[0].message.content or "",
            finish_reason=answer.choices[0].finish_reason or "",
            tokens_in=usage.prompt_tokens if usage else 0,
            tokens_out=usage.completion_tokens if usage else 0,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
        )

    async def stream(self, messages, sampling) -> AsyncIterator[str]:
        request = self._request(messages, sampling, None, "")
        async for chunk in await self.client.chat.completions.create(**request, stream=True):
            if chunk.choices and chunk.choices[0].delta.content:
                yield chunk.choices[0].delta.content

    def close(self) -> None:
        """Nothing to stop: the server is not ours."""


class EchoEngine:
    """Answers with what it was asked, for tests of everything but the text.

    Args:
        seconds: that a reply takes, however many are under way.
    """

    def __init__(self, seconds: float = 0):
        self.seconds = seconds

    async def reply(self, messages, sampling, *, seed, prefill="") -> Reply:
        if self.seconds:
            await asyncio.sleep(self.seconds)
        character = " in character" if messages[0]["role"] == "system" else ""
        words = f"Echo {seed}{character}: {messages[-1]['content']}".split()
        text = " ".join(words[: sampling.max_tokens]).rstrip(".?!") + "."
        size = sum(len(m["content"]) for m in messages) // 4
        return Reply(text, "stop", size, min(len(words), sampling.max_tokens), 0)

    async def stream(self, messages, sampling) -> AsyncIterator[str]:
        reply = await self.reply(messages, sampling, seed=0)
        for word in reply.text.split(" "):
            yield word + " "

    def close(self) -> None:
        """Nothing to stop."""


# ---------------------------------------------------------------------------------------- hosts


@ray.remote
class Host:
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


AHEAD_OF_RAY = 2
"""Calls that a host takes at once, over its seats; Ray's default would be 1,000."""
PATIENCE = 60
"""Seconds for which new hosts wait for Ray to place them before another engine makes room."""


@dataclass(frozen=True)
class Fleet:
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


@dataclass(eq=False)
class Held:
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

    needs: dict[str, Need]
    places: dict[str, _Place] = field(default_factory=dict)
    seconds: float = 0
    gpu_seconds: float = 0
    busy: float = 0
    share: float = 1
    starting: float = 0
    started: list[str] = field(default_factory=list)

    def fleet(self, spec: EngineSpec) -> Fleet | None:
        """The running hosts of one of its engines; None for an engine without weights."""
        return self.places[spec.key()].fleet.result() if spec.has_weights else None


@dataclass
class _Place:
    """Something that is held: by whom now, and since when that has been so."""

    need: Need
    since: float
    users: list[Held] = field(default_factory=list)
    fleet: Future[Fleet] = field(default_factory=Future)


_places: dict[str, _Place] = {}
"""Running engines and workers by their key, the one that was asked for last at the end."""
_changed = threading.Condition()
"""Guards `_places`, and tells when something was given back."""
_spent: dict[str, list[Held]] = {}
"""What jobs have held, by the job."""


@contextlib.contextmanager
def hold(job: str, needs: Sequence[Need], growth: Room) -> Iterator[Held]:
    """Have engines and workers at once, and nobody else evicts them meanwhile.

    Engines that run already are shared. Where the cluster has no room, engines that no job uses
    are stopped, the longest unused first; if that is not enough, this waits until another job
    gives something back. A job waits with empty hands, so none waits for ever.

    Args:
        job: the dataset that is made, on whose account it goes.
        needs: all that is used at the same time.
        growth: what the cluster may grow to, by the placement.

    Raises:
        StageFailed: if an engine does not start.
    """
    held = Held({n.key(): n for n in needs if isinstance(n, Workers) or n.has_weights})
    new = _take(held, capacity(growth)) if held.needs else []
    began = time.monotonic()
    try:
        for spec in new:
            _start(held.places[spec.key()], spec)
            held.started.append(spec.label)
        for need in held.needs.values():
            if isinstance(need, EngineSpec):
                _grow(held.places[need.key()], need)
        held.starting = time.monotonic() - began
        with _sharing(held):
            yield held
    finally:
        _give_back(held)
        _spent.setdefault(job, []).append(held)


@contextlib.contextmanager
def _sharing(held: Held) -> Iterator[None]:
    """Note which share a job has of its engines, from when all have started."""
    began, before = _charged(held)
    try:
        yield
    finally:
        ended, after = _charged(held)
        alone = len(held.needs) * (ended - began)
        held.share = (after - before) / alone if alone else 1


def _charged(held: Held) -> tuple[float, float]:
    """The time, and the seconds that a job is charged until then."""
    with _changed:
        now = time.monotonic()
        for place in held.places.values():
            _settle(place, now, place.users)
        return now, held.seconds


def _take(held: Held, there: Room) -> list[EngineSpec]:
    """Become a user of all that is needed; returns the engines that are to be started."""
    new: list[EngineSpec] = []
    with _changed:
        while not _make_room(held.needs, there):
            _changed.wait()
        for key, need in held.needs.items():
            now = time.monotonic()
            if key not in _places and isinstance(need, EngineSpec):
                new.append(need)
            place = _places.pop(key, None) or _Place(need, now)
            _settle(place, now, place.users or [held])
            place.users.append(held)
            _places[key] = held.places[key] = place
    return new


def _make_room(needs: dict[str, Need], there: Room) -> bool:
    """Stop unused engines until there is room; whether there is, or nothing to wait for."""
    others = [key for key in _places if key not in needs]
    if not needs.keys() <= _places.keys():
        for key in others:
            _shrink(_places[key])
    wanted = [need.room for need in needs.values()]
    while not fits([*wanted, *(_places[key].need.room for key in others)], there):
        unused = [key for key in others if not _places[key].users]
        if not unused:
            return not others  # what does not fit by itself is Ray's to refuse, or to grow for
        others.remove(unused[0])
        _stop(unused[0])
    return True


def _settle(place: _Place, now: float, users: list[Held]) -> None:
    """Charge the time since the last change to its users, in equal shares.

    An engine that stood unused is charged to the job that comes.
    """
    passed, place.since = now - place.since, now
    for user in users:
        user.seconds += passed / len(users)
        user.gpu_seconds += passed * place.need.room.gpus / len(users)


def _give_back(held: Held) -> None:
    with _changed:
        for key, place in held.places.items():
            _settle(place, time.monotonic(), place.users)
            place.users.remove(held)
            if isinstance(place.need, Workers):
                del _places[key]
            elif _places.get(key) is place and any(other.users for other in _places.values()):
                _shrink(place)  # somebody may be waiting for that room
        _changed.notify_all()


def _shrink(place: _Place) -> None:
    """Stop the replicas of an unused engine that came beyond those which its pool waits for."""
    if not place.users and isinstance(place.need, EngineSpec):
        fleet = place.fleet.result()
        Fleet([], fleet.coming).stop()
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
        place.fleet.set_result(Fleet(handles, []))
    except Exception as error:  # told to whoever waits for the engine, whatever it is
        for host in handles:
            ray.kill(host)
        cause = getattr(error, "cause", None) or error
        with _changed:
            del _places[spec.key()]
        failed = StageFailed(f"engine for {spec.role.model} did not start: {cause}")
        place.fleet.set_exception(cause if isinstance(cause, UserError) else failed)


def _new_hosts(spec: EngineSpec, count: int) -> list[Any]:
    """Ask Ray for hosts."""
    pool = spec.pool
    options = {
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus,
        "accelerator_type": pool.accelerator,
        "memory": int(pool.memory_gib * 2**30),
        "max_restarts": pool.restarts,
        "max_task_retries": -1,
        "max_concurrency": AHEAD_OF_RAY * seats(spec),
    }
    names = (actor_name(f"engine {spec.role.model}") for _ in range(count))
    return [Host.options(**options, name=name).remote(spec) for name in names]


def _await_placed(handles: list[Any]) -> None:
    """Wait until Ray has found room; where nodes are too broken up for it, unused engines go."""
    placed = [host.__ray_ready__.remote() for host in handles]
    while len(ray.wait(placed, num_returns=len(placed), timeout=PATIENCE)[0]) < len(placed):
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
    gpus = {id(held): sum(need.room.gpus for need in held.needs.values()) for held in made}
    shared = {id(held): held.busy * held.share for held in made}
    work = sum(h.busy for h in made)
    seconds = {
        "held_seconds": sum(h.seconds for h in made),
        "busy_seconds": sum(min(shared[id(h)] * len(h.needs), h.seconds) for h in made),
        "gpu_seconds": sum(h.gpu_seconds for h in made),
        "gpu_busy_seconds": sum(min(shared[id(h)] * gpus[id(h)], h.gpu_seconds) for h in made),
        "starting_seconds": sum(h.starting for h in made),
        "work_seconds": work,
    }
    started = [name for held in made for name in held.started]
    rounded = {k: round(v, 2) for k, v in seconds.items()}
    return rounded | {
        "engine_share": round(sum(shared.values()) / work, 4) if work else 1,
        "passes": len(made),
        "engines_started": started,
    }


def capacity(growth: Room) -> Room:
    """What the cluster has now, or may grow to if that is more."""
    there = ray.cluster_resources() if ray.is_initialized() else {}
    now = Room(
        cpus=there.get("CPU", 0),
        gpus=there.get("GPU", 0),
        memory_gib=there.get("memory", 0) / 2**30,
    )
    return now | growth


def running_engines() -> dict[str, Room]:
    """Engines that run, used or not, by their key."""
    with _changed:
        places = list(_places.items())
    return {key: place.need.room for key, place in places if isinstance(place.need, EngineSpec)}


def is_warm(spec: EngineSpec) -> bool:
    """Whether hosts of a spec are running."""
    return spec.key() in _places


def stop_hosts(but: Container[str] = ()) -> None:
    """Stop all engines that no job uses, but for some keys."""
    with _changed:
        for key in [k for k, place in _places.items() if not place.users and k not in but]:
            _stop(key)


class Hosted:
    """An engine whose work is done by hosts; each request goes to the least busy one.

    What a lost host had under way is asked of the others. It joins again when Ray has found a place
    for it; only where no host is left is that waited for.
    """

    def __init__(self, fleet: Fleet):
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


# -------------------------------------------------------------------------------- conversations


@dataclass
class Conversation:
    """What a row's function is given: an engine that knows the row's seed and counts its tokens.

    Args:
        engine: shared by all rows of the actor.
        seed: of the row, or None; the n-th reply draws with seed + n.
        thinks: whether the model opens its replies with a think block.
        partner: a conversation with another role's model, for rows that need two.
    """

    engine: Engine
    seed: int | None
    thinks: bool = False
    partner: Conversation | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens: int = 0
    replies: int = 0

    async def reply(
        self,
        messages: list[Message],
        sampling: Sampling,
        prefill: str = "",
    ) -> Reply:
        """As `Engine.reply`, with the row's seed and without the think block.

        Raises:
            RowFailed: also if the think block was never closed.
        """
        seed = None if self.seed is None else (self.seed + self.replies) % 2**31
        self.replies += 1
        answer = await self.engine.reply(messages, sampling, seed=seed, prefill=prefill)
        self.tokens_in += answer.tokens_in
        self.tokens_out += answer.tokens_out
        self.cached_tokens += answer.cached_tokens
        answer = replace(answer, text=self._spoken(answer.text, THINK_CLOSE in prefill))
        if sampling.trim and answer.finish_reason == "length":
            whole = whole_sentences(answer.text)
            return replace(answer, text=whole, finish_reason="trimmed") if whole else answer
        return answer

    def _spoken(self, text: str, closed: bool) -> str:
        """What follows the think block, so that no block is kept or gets into a history."""
        spoken = strip_think(text)
        if spoken is not None:
            return spoken
        if not closed and (self.thinks or text.lstrip().startswith(THINK_OPEN)):
            raise RowFailed("thought_unclosed")
        return text

    def spent(self, what: str) -> int:
        """Tokens of one kind, the partner's too."""
        return getattr(self, what) + (self.partner.spent(what) if self.partner else 0)


FLUSH_SECONDS = 5
FLUSH_ROWS = 512
REQUESTS = 1000
"""That are one object in Ray's store, or Python objects at once."""

SPENT = ("tokens_in", "tokens_out", "cached_tokens")

Row = dict[str, Any]
Talk = Callable[[Row, Conversation], Awaitable[Row]]
"""A stage's row function: the row and its conversation in, the fields that it adds out."""

ROW_FIELDS = [
    pa.field("id", pa.string(), nullable=False),
    pa.field("drop_reason", pa.string()),
    pa.field("error", pa.string()),
    pa.field("tokens_in", pa.int64()),
    pa.field("tokens_out", pa.int64()),
    pa.field("cached_tokens", pa.int64()),
]
"""Columns that every generated dataset has beside its own."""


@dataclass(frozen=True)
class Seat:
    """An engine as a task of conversations is given it.

    Args:
        spec: the engine.
        fleet: running hosts of the spec; None for an engine without weights.
    """

    spec: EngineSpec
    fleet: Fleet | None

    def engine(self) -> Engine:
        return Hosted(self.fleet) if self.fleet else start(self.spec)


def converse(share: pa.Table, **settings: Any) -> Iterator[pa.Table]:
    """The function of Ray Data's `map_batches`: has a share of a stage's conversations.

    A task and not an actor: an actor has a process of its own, which takes a second to start for
    each stage; tasks find the process of the stage before, with all its modules.

    Args:
        share: one row, `from` and `to`: the first request and the one after the last. Those that
            are stored already, where a lost task is repeated, are left out.
        settings: of `Conversations`; and `chunks`, references to the tables that all requests are
            in, `REQUESTS` in each but the last.

    Yields:
        How many rows were `stored`, each time that some were.
    """
    first, end = share["from"][0].as_py(), share["to"][0].as_py()
    needed: Any = ray.get(settings.pop("chunks")[first // REQUESTS : -(-end // REQUESTS)])
    together = pa.concat_tables(needed, promote_options="permissive")
    block = together.slice(first % REQUESTS, end - first)
    conversations = Conversations(**settings)
    with asyncio.Runner() as runner:
        stored = aiter(conversations.of(block))
        while (rows := runner.run(following(stored))) is not None:
            yield pa.table({"stored": [rows]})


async def following(numbers: AsyncIterator[int]) -> int | None:
    """The next one, or None."""
    return await anext(numbers, None)


class Conversations:
    """Runs conversations, as many at once as there are seats, and stores them as they finish.

    Args:
        seat: the engine that answers.
        partner: one that the row function may ask as well, or None.
        talk: the stage's row function.
        parts: where rows are written.
        stage: enters the seed.
        seed: of the recipe, or None for unseeded sampling.
        counters: handle of the `progress.Counters` actor.
    """

    def __init__(
        self,
        seat: Seat,
        partner: Seat | None,
        talk: Talk,
        parts: Parts,
        stage: str,
        seed: int | None,
        counters: Any,
    ):
        self.engine, self.thinks = seat.engine(), seat.spec.role.thinks
        self.partner = partner and (partner.engine(), partner.spec.role.thinks)
        self.seats, self.talk, self.parts = seats(seat.spec), talk, parts
        self.stage, self.seed, self.tally = stage, seed, Tally(counters)
        self.finished: list[Row] = []
        self.enough = asyncio.Event()
        self.errors: int | None = 0
        """Rows that the engine failed while no other has been had, then None."""

    async def of(self, block: pa.Table) -> AsyncIterator[int]:
        """Have the conversations of a block; yields how many were stored, every few seconds."""
        name = "part-" + row_id(block["id"][0].as_py())
        stored = among(digests(block["id"]), self.parts.stored(name))
        rows = one_by_one(block.filter(pa.array(~stored)))
        talking = asyncio.gather(*(self._sit(rows) for _ in range(self.seats)))
        talking.add_done_callback(lambda _: self.enough.set())
        ended = False
        while not ended:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.enough.wait(), FLUSH_SECONDS)
            self.enough.clear()
            ended = talking.done()
            rows, self.finished = self.finished, []
            for at in range(0, len(rows), FLUSH_ROWS):
                yield await self._store(rows[at : at + FLUSH_ROWS], name)
        self.tally.send()
        await talking

    async def _sit(self, rows: Iterator[Row]) -> None:
        """A seat: takes one conversation after another."""
        for row in rows:
            finished = await self._row(row)
            self.finished.append(finished)  # the list of now, not of before the row
            if len(self.finished) >= FLUSH_ROWS:
                self.enough.set()
            await asyncio.sleep(0)  # others have a turn though this row waited for nothing

    async def _row(self, row: Row) -> Row:
        talk = Conversation(self.engine, self._seed(row.get("seed_id") or row["id"]), self.thinks)
        if self.partner:
            engine, thinks = self.partner
            talk.partner = Conversation(engine, self._seed(row["id"]), thinks)
        before = {name: row.get(name) or 0 for name in SPENT}  # by an earlier pass
        said: Row = {"drop_reason": None, "error": None}
        self.tally.add(started=1)
        try:
            said |= await self.talk(row, talk)
        except RowFailed as failed:
            said |= {"drop_reason": failed.reason, "error": failed.detail[:500]}
        self._count(said)
        dropped = said["drop_reason"] is not None
        self.tally.add(
            texts=[] if dropped else texts_of(row | said),
            finished=1,
            dropped=dropped,
            tokens_out=talk.spent("tokens_out"),
        )
        return {
            **{k: v for k, v in row.items() if k in self.parts.schema.names},
            **{name: before[name] + talk.spent(name) for name in SPENT},
            **said,
        }

    def _count(self, said: Row) -> None:
        """Give up where every row fails: what ails the engine ails the rest as well."""
        if said["drop_reason"] != ENGINE_ERROR:
            self.errors = None
        elif self.errors is not None:
            self.errors += 1
            if self.errors >= HOPELESS:
                raise StageFailed(
                    f"the first {HOPELESS} conversations of {self.stage} all failed; the last: "
                    f"{said['error']}"
                )

    def _seed(self, of: str) -> int | None:
        return None if self.seed is None else row_seed(self.seed, self.stage, of)

    async def _store(self, rows: list[Row], name: str) -> int:
        """Write a file of rows; what finishes meanwhile goes into a later one."""
        table = pa.Table.from_pylist(rows, schema=self.parts.schema)
        await asyncio.to_thread(self.parts.write, table, name)
        return len(rows)


def one_by_one(table: pa.Table) -> Iterator[Row]:
    """Rows, of which few at a time are Python objects."""
    for batch in table.to_batches(max_chunksize=REQUESTS):
        yield from batch.to_pylist()


def seats(spec: EngineSpec) -> int:
    """Conversations that one task has under way: enough for all replicas that may come."""
    pool = spec.pool
    share = math.ceil(pool.max_sequences * pool.most_replicas / pool.replicas)
    return spec.role.endpoint_concurrency if spec.role.endpoint else share
