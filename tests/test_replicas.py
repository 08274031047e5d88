"""How the engine client balances requests over replicas, some of which are lost; no models."""

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from samples import ECHO_ROLE, recipe_of

from opencharacter.config.placement import Pool
from opencharacter.config.roles import Sampling
from opencharacter.engines import replicas
from opencharacter.engines.replicas import EngineClient, EngineReplicas, exit_if_dead
from opencharacter.engines.spec import EngineSpec, Reply
from opencharacter.errors import RowFailed, StageFailed
from opencharacter.runtime.store import RemoteDir, Store
from opencharacter.text.chat import user

SPEC = EngineSpec(recipe_of(ECHO_ROLE).roles.student, Pool())


@ray.remote(num_cpus=0, max_task_retries=-1)
class FakeReplica:
    """Replies with its name.

    Args:
        name: the text of its replies.
        marker: if given, the process exits at the first request and creates this file, so that
            a restarted process replies.
    """

    def __init__(self, name: str, marker: Path | None = None):
        self.name, self.marker = name, marker

    async def start(self, spec) -> None:
        pass

    @ray.method(max_task_retries=0)
    async def reply(self, messages, sampling, *, seed, prefill="", weights="") -> Reply:
        if self.marker and not self.marker.exists():
            self.marker.touch()
            os._exit(1)
        return Reply(self.name, "stop", 1, 1, 0)


def send_requests(*replicas, count: int) -> tuple[list[str], EngineClient]:
    """Send concurrent requests; return the texts of the replies and the client."""

    async def send() -> tuple[list[str], EngineClient]:
        client = EngineClient(EngineReplicas(SPEC, list(replicas), []))
        replies = [client.reply([], Sampling(max_tokens=1), seed=None) for _ in range(count)]
        return [reply.text for reply in await asyncio.gather(*replies)], client

    return asyncio.run(asyncio.wait_for(send(), 60))


def test_requests_in_flight_on_a_lost_replica_are_sent_to_another(cpu_ray, tmp_path):
    lost, other = FakeReplica.remote("lost", tmp_path / "marker"), FakeReplica.remote("other")
    texts, client = send_requests(lost, other, count=8)
    assert texts == ["other"] * 8
    assert client.in_flight == {other: 0}


def test_the_client_waits_for_the_restart_of_its_only_replica(cpu_ray, tmp_path):
    replica = FakeReplica.options(max_restarts=1).remote("again", tmp_path / "marker")
    texts, client = send_requests(replica, count=4)
    assert texts == ["again"] * 4
    assert client.in_flight == {replica: 0}


@ray.remote(num_cpus=0)
class CachingReplica:
    """Has the messages of earlier requests in a prefix cache, and counts conversations."""

    def __init__(self):
        self.cache: set[tuple[str, ...]] = set()

    async def reply(self, messages, sampling, *, seed, prefill="", weights="") -> Reply:
        texts = tuple(message["content"] for message in messages)
        prefixes = [texts[:count] for count in range(1, len(texts) + 1)]
        cached = sum(prefix in self.cache for prefix in prefixes)
        self.cache.update(prefixes)
        await asyncio.sleep(0.01 * (1 + seed % 3))
        return Reply(f"{texts[0]} {len(texts)}", "stop", len(texts), 1, cached)

    async def first_messages(self) -> int:
        return len({prefix[0] for prefix in self.cache})


def chat(client: EngineClient, turns: int, conversations: int) -> float:
    """Run conversations at the same time; return the cached share of their prompts."""

    async def converse(number: int) -> list[Reply]:
        engine, texts, replies = client.for_conversation(), [str(number)], []
        for turn in range(turns):
            messages = [user(text) for text in texts]
            replies.append(await engine.reply(messages, Sampling(max_tokens=1), seed=number + turn))
            texts += [replies[-1].text, f"{number}: {turn}"]
        return replies

    async def converse_all() -> list[Reply]:
        each = await asyncio.gather(*map(converse, range(conversations)))
        return [reply for replies in each for reply in replies]

    replies = asyncio.run(asyncio.wait_for(converse_all(), 60))
    return sum(r.cached_tokens for r in replies) / sum(r.tokens_in for r in replies)


def test_a_conversation_stays_on_its_replica_whose_cache_has_the_earlier_turns(cpu_ray):
    replicas = [CachingReplica.remote() for _ in range(2)]
    share = chat(EngineClient(EngineReplicas(SPEC, replicas, [])), turns=5, conversations=8)
    assert share == 16 / 25  # everything but the first message and two more in each turn
    assert ray.get([replica.first_messages.remote() for replica in replicas]) == [4, 4]


def test_a_conversation_continues_on_another_replica_if_its_own_is_lost(cpu_ray, tmp_path):
    lost, other = FakeReplica.remote("lost", tmp_path / "marker"), FakeReplica.remote("other")

    async def converse() -> list[str]:
        engine = EngineClient(EngineReplicas(SPEC, [lost, other], [])).for_conversation()
        requests = [engine.reply([], Sampling(max_tokens=1), seed=None) for _ in range(3)]
        return [(await request).text for request in requests]

    assert asyncio.run(asyncio.wait_for(converse(), 60)) == ["other"] * 3


@pytest.mark.parametrize("errored", [True, False])
def test_an_actor_ends_if_its_engine_died_and_not_if_one_call_failed(errored, monkeypatch):
    engine: Any = SimpleNamespace(engine=SimpleNamespace(errored=errored))
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with pytest.raises(RuntimeError), exit_if_dead(engine):
        raise RuntimeError("the call failed")
    with pytest.raises(RowFailed), exit_if_dead(engine):
        raise RowFailed("too_long")
    assert codes == [1] * errored


def test_the_loss_of_every_replica_fails_the_stage(cpu_ray, tmp_path):
    with pytest.raises(StageFailed, match="every replica"):
        send_requests(FakeReplica.remote("lost", tmp_path / "marker"), count=2)


@pytest.mark.parametrize(
    ("gpus", "path", "swap_fails", "expected"),
    [
        (1, "persona/merge", False, ["start base", "swap persona/merge"]),
        (1, "persona/merge", True, ["start base", "close", "start persona/merge"]),
        (1, "a/evaluation/steering", False, ["start a/evaluation/steering"]),  # other parameters
        (1, None, False, ["start base"]),
        (0, "persona/merge", False, ["start persona/merge"]),  # nothing is compiled on a CPU
    ],
)
def test_an_engine_for_an_adapter_starts_from_what_is_compiled_for_its_base_model(
    gpus, path, swap_fails, expected, monkeypatch
):
    done = []

    def name(spec: EngineSpec) -> str:
        return spec.adapter.relative.removesuffix("/adapter") if spec.adapter else "base"

    class Engine:
        def __init__(self, spec):
            done.append(f"start {name(spec)}")

        async def swap(self, spec):
            if swap_fails:
                raise StageFailed("no")
            done.append(f"swap {name(spec)}")

        def close(self):
            done.append("close")

    monkeypatch.setattr(replicas, "VllmEngine", Engine)
    role = SPEC.role.model_copy(update={"model": "org/model"})
    adapter = RemoteDir(Store("/storage"), f"{path}/adapter") if path else None
    asyncio.run(replicas.start_engine(EngineSpec(role, Pool(gpus=gpus), adapter)))
    assert done == expected
