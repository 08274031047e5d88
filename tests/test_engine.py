"""Requests over the hosts of an engine, some of which are lost; the hosts here have no model."""

import asyncio
import os
from pathlib import Path

import pytest
import ray

from opencharacter.config.recipe import Sampling
from opencharacter.engines.replicas import EngineClient, EngineReplicas
from opencharacter.engines.spec import Reply
from opencharacter.errors import StageFailed


@ray.remote(num_cpus=0, max_task_retries=-1)
class FakeHost:
    """Says its name; is lost at the first request of its life unless its file is there."""

    def __init__(self, name: str, lives: Path | None = None):
        self.name, self.lives = name, lives

    async def start(self) -> None:
        pass

    @ray.method(max_task_retries=0)
    async def reply(self, messages, sampling, *, seed, prefill="") -> Reply:
        if self.lives and not self.lives.exists():
            self.lives.touch()
            os._exit(1)
        return Reply(self.name, "stop", 1, 1, 0)


def said(*hosts, count: int) -> tuple[list[str], EngineClient]:
    async def asked() -> tuple[list[str], EngineClient]:
        hosted = EngineClient(EngineReplicas(list(hosts), []))
        replies = [hosted.reply([], Sampling(max_tokens=1), seed=None) for _ in range(count)]
        return [reply.text for reply in await asyncio.gather(*replies)], hosted

    return asyncio.run(asyncio.wait_for(asked(), 60))


def test_what_a_lost_host_had_under_way_is_asked_of_another(cpu_ray, tmp_path):
    lost, other = FakeHost.remote("lost", tmp_path / "lived"), FakeHost.remote("other")
    texts, hosted = said(lost, other, count=8)
    assert texts == ["other"] * 8
    assert hosted.busy == {other: 0}


def test_a_host_that_ray_starts_again_is_waited_for_where_it_is_the_last(cpu_ray, tmp_path):
    host = FakeHost.options(max_restarts=1).remote("again", tmp_path / "lived")
    texts, hosted = said(host, count=4)
    assert texts == ["again"] * 4
    assert hosted.busy == {host: 0}


def test_the_loss_of_every_host_fails_the_stage(cpu_ray, tmp_path):
    with pytest.raises(StageFailed, match="every replica"):
        said(FakeHost.remote("lost", tmp_path / "lived"), count=2)
