"""Write which share of its messages a deployment of two replicas finds in their caches, as JSON.

Run: python routed_replicas.py FILE
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid
from pathlib import Path

os.environ["RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S"] = "10"  # a slow host is not a full replica
os.environ["RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S"] = "10"

import ray
from ray import serve

from opencharacter.config.placement import Pool
from opencharacter.serving.router import router_options
from opencharacter.text.chat import assistant, user

CONVERSATIONS, TURNS = 12, 5


class CachingModel:
    """Has the messages of earlier requests in a prefix cache; each replica has its own."""

    def __init__(self) -> None:
        self.cache: set[tuple[str, ...]] = set()
        self.name = uuid.uuid4().hex

    async def replica(self) -> str:
        """Return a name that is the replica's own."""
        return self.name

    async def answer(self, kind: str, payload: dict) -> tuple[int, int]:
        """Return how many of the request's messages were cached, and how many it has."""
        texts = tuple(message["content"] for message in payload["messages"])
        prefixes = [texts[:count] for count in range(1, len(texts) + 1)]
        cached = sum(prefix in self.cache for prefix in prefixes)
        self.cache.update(prefixes)
        await asyncio.sleep(0.02)
        return cached, len(texts)


async def cached_share(handle) -> float:
    """Hold conversations at the same time; return the cached share of their messages."""
    names: set[str] = set()
    while len(names) < 2:  # until the router knows both replicas
        names.add(await handle.replica.remote())

    async def converse(number: int) -> list[tuple[int, int]]:
        messages, counts = [user(f"{number} sheep " * 20)], []
        for turn in range(TURNS):
            payload = {"model": "m", "messages": list(messages)}
            counts.append(await handle.answer.remote("chat", payload))
            messages += [assistant(f"{number} in turn {turn}. "), user("And then? " * 10)]
        return counts

    each = await asyncio.gather(*map(converse, range(CONVERSATIONS)))
    both = [sum(column) for column in zip(*(c for counts in each for c in counts), strict=True)]
    return both[0] / both[1]


def main(file: str) -> None:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    shares = {}
    for name, options in (("routed", router_options(Pool(replicas=2))), ("default", {})):
        deployment = serve.deployment(
            num_replicas=2, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=48, **options
        )(CachingModel)
        handle = serve.run(deployment.bind(), name=name, route_prefix=None)
        shares[name] = asyncio.run(cached_share(handle))
        serve.delete(name)
    serve.shutdown()
    Path(file).write_text(json.dumps(shares))


if __name__ == "__main__":
    main(sys.argv[1])
