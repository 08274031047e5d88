"""Chats of several turns with two replicas of one model, behind two routers.

Every turn repeats all earlier ones, as chat clients do. Where a replica has answered the earlier
turns, its prefix cache has their tokens. Between the turns people think, for seconds that are drawn
from an exponential distribution. Without that, the replica that has just answered would be the less
busy one, so that any router that looks at the load would keep conversations together.

Ways:
- `opencharacter`: `serving.router.ConversationRouter`, which a server with replicas has.
- `default_router`: Ray Serve's own, the power of two choices.

Figures: `cached_share` and `default_cached_share`, the share of the prompts' tokens that a cache
had; the median and the 95th percentile of a turn's seconds, and the ratio of the medians.

Run: python benchmarks/routing.py --out benchmarks/results --cpu
     python benchmarks/routing.py --out benchmarks/results            on a GPU host
     python benchmarks/routing.py --out /tmp/results --tiny
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import harness
import ray
from harness import LLAMA_8B, SUBJECT, Figures, Machine, Run, Series, Settings, figure

from opencharacter.config.files import load_recipe
from opencharacter.config.placement import Placement
from opencharacter.config.recipe import Recipe
from opencharacter.config.roles import Roles
from opencharacter.runtime import cluster
from opencharacter.runtime.store import Store
from opencharacter.serving.access import AccessPolicy
from opencharacter.serving.application import build_application
from opencharacter.serving.evaluation import HOST, free_port
from opencharacter.text.chat import assistant, user

DEFAULT = "default_router"
MODEL = "student"
SETTINGS: Settings = {
    "repeats": 3,
    "conversations": 256,
    "turns": 8,
    "user_tokens": 150,
    "answer_tokens": 100,
    "thinking_seconds": 4.0,
    "shape": LLAMA_8B,
    "placement": "single-gpu",
    "pool": {
        "replicas": 2,
        "gpus": 0.46,
        "cpus": 2,
        "max_num_seqs": 256,
        "engine_kwargs": {"load_format": "dummy", "max_model_len": 4096},
    },
}
CPU: Settings = {
    "conversations": 12,
    "turns": 6,
    "user_tokens": 60,
    "answer_tokens": 12,
    "thinking_seconds": 8.0,
    "shape": None,
    "placement": "laptop",
    "pool": {
        "replicas": 2,
        "gpus": 0,
        "cpus": 0.6,
        "memory_gib": 2,
        "max_num_seqs": 12,
        "engine_kwargs": {"max_model_len": 2048},
    },
}
TINY: Settings = CPU | {"repeats": 1, "conversations": 4, "turns": 2}


def make_recipe(settings: Settings) -> Recipe:
    """Return a recipe with one model in all roles: of a shape, or the embedded one."""
    role = load_recipe("demo").roles.student
    model = str(harness.model_folder(settings["shape"])) if settings["shape"] else role.model
    role = role.model_copy(update={"name": MODEL, "model": model})
    return Recipe.model_validate(
        {"name": "routing", "roles": dict.fromkeys(Roles.model_fields, role)}
    )


def make_placement(settings: Settings) -> Placement:
    """Return the placement with the student's replicas."""
    changes = {
        "pools": {"student": settings["pool"]},
        "serving": {"max_requests_per_key": 10_000, "max_queued_requests": 10_000},
    }
    return harness.placement(settings["placement"], changes)


def serve_student(settings: Settings, storage: str) -> str:
    """Deploy the student's replicas on a local Ray; return the URL."""
    from ray import serve

    recipe, placement = make_recipe(settings), make_placement(settings)
    cluster.connect(placement)
    port = free_port(placement.evaluation.port)
    serve.start(http_options={"host": HOST, "port": port})
    policy = AccessPolicy((), local=True)
    serve.run(build_application(recipe, placement, Store.at(storage), [], policy))
    return f"http://{HOST}:{port}"


def words(draw: random.Random, count: int) -> str:
    """A text of about as many tokens, for both tokenizers, that no other text begins like."""
    return " ".join(f"w{draw.randrange(3900)}" for _ in range(count))


async def converse(url: str, settings: Settings, repeat: int) -> list[dict[str, Any]]:
    """Hold all conversations at the same time; return the turns."""
    turns: list[dict[str, Any]] = []
    limits, forever = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, connector=limits, timeout=forever) as session:

        async def conversation(number: int) -> None:
            draw = random.Random(f"{repeat} {number}")
            messages = []
            for turn in range(settings["turns"]):
                if turn:
                    await asyncio.sleep(draw.expovariate(1 / settings["thinking_seconds"]))
                messages.append(user(words(draw, settings["user_tokens"])))
                length = settings["answer_tokens"]
                body = {"model": MODEL, "messages": messages, "ignore_eos": True}
                body |= {"max_tokens": length, "min_tokens": length}
                began = time.monotonic()
                async with session.post("/v1/chat/completions", json=body) as response:
                    answer = await response.json()
                if response.status != 200:
                    raise ValueError(f"status {response.status}: {answer}")
                usage = answer["usage"]
                details = usage.get("prompt_tokens_details") or {}
                turns.append(
                    {
                        "seconds": time.monotonic() - began,
                        "prompt": usage["prompt_tokens"],
                        "cached": details.get("cached_tokens") or 0,
                        "answer": usage["completion_tokens"],
                    }
                )
                messages.append(assistant(answer["choices"][0]["message"]["content"] or "w"))

        await asyncio.gather(*map(conversation, range(settings["conversations"])))
    return turns


def chat(settings: Settings, router: str) -> Iterator[Run]:
    """Serve two replicas behind a router and hold conversations with them, several times."""
    from opencharacter.serving import replica  # which imports vLLM

    if router == DEFAULT:
        replica.router_options = lambda pool: {}
    with tempfile.TemporaryDirectory() as storage:
        url = serve_student(settings, storage)
        warm_up = settings | {"turns": 1}
        asyncio.run(converse(url, warm_up, -1))
        for repeat in range(settings["repeats"]):
            began = time.monotonic()
            turns = asyncio.run(converse(url, settings, repeat))
            seconds = [turn["seconds"] for turn in turns]
            yield {
                "series": router,
                "seconds": time.monotonic() - began,
                "tokens": sum(turn["answer"] for turn in turns),
                "turns": len(turns),
                "prompt_tokens": sum(turn["prompt"] for turn in turns),
                "cached_tokens": sum(turn["cached"] for turn in turns),
                "turn_p50": statistics.median(seconds),
                "turn_p95": statistics.quantiles(seconds, n=20)[-1],
            }
    ray.shutdown()


def figures(series: Series, settings: Settings, machine: Machine) -> Figures:
    """Cached shares and seconds of a turn of each way."""
    result: Figures = {}
    medians = {}
    for router, prefix in ((SUBJECT, ""), (DEFAULT, "default_")):
        if router in series:
            runs = series[router]
            medians[router] = [run["turn_p50"] for run in runs]
            result |= {
                f"{prefix}cached_share": figure(
                    [run["cached_tokens"] / run["prompt_tokens"] for run in runs]
                ),
                f"{prefix}turn_p50_s": figure(medians[router]),
                f"{prefix}turn_p95_s": figure([run["turn_p95"] for run in runs]),
            }
    if len(medians) == 2:
        result["ratio_turn_p50"] = harness.ratio(medians[DEFAULT], medians[SUBJECT])
    return result


BENCHMARK = harness.Benchmark(
    name="routing",
    script=Path(__file__).resolve(),
    settings=SETTINGS,
    tiny=TINY,
    cpu=CPU,
    ways={
        SUBJECT: partial(chat, router=SUBJECT),
        DEFAULT: partial(chat, router=DEFAULT),
    },
    figures=figures,
)

if __name__ == "__main__":
    harness.main(BENCHMARK, __doc__ or "")
