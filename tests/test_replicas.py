"""How the engine client balances requests over replicas, some of which are lost; no models."""

import asyncio
import os
from pathlib import Path

import pytest
import ray
from samples import ECHO_ROLE, recipe_of

from opencharacter.config.placement import Pool
from opencharacter.config.roles import Sampling
from opencharacter.engines.replicas import EngineClient, EngineReplicas
from opencharacter.engines.spec import EngineSpec, Reply
from opencharacter.errors import StageFailed

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


def test_the_loss_of_every_replica_fails_the_stage(cpu_ray, tmp_path):
    with pytest.raises(StageFailed, match="every replica"):
        send_requests(FakeReplica.remote("lost", tmp_path / "marker"), count=2)
