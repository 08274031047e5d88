"""What the two benchmarks of generation share: engines without weights, and how they are driven.

Every way gets its engine's arguments from `engines.backends.engine_arguments`, so they are
the same for all.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from harness import (
    LLAMA_8B,
    RESERVED,
    SUBJECT,
    TINY_LLAMA,
    Figures,
    Machine,
    Run,
    Series,
    Settings,
    figure,
    model_folder,
    speeds,
)

from opencharacter import pipeline
from opencharacter.config.placement import Placement
from opencharacter.config.recipe import Recipe
from opencharacter.constitution import schema
from opencharacter.engines import allocation, backends
from opencharacter.engines.conversations import Row, RowFn
from opencharacter.engines.generate import generate
from opencharacter.engines.spec import EngineSpec, Reply, engine_spec
from opencharacter.runtime import cluster
from opencharacter.runtime.stage import Job
from opencharacter.runtime.store import Store

SETTINGS: Settings = {
    "repeats": 3,
    "series": {SUBJECT: {}},
    "shape": LLAMA_8B,
    "sampling": {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1},
    "pool": {
        "gpus": 1,
        "max_num_seqs": 256,
        "engine_kwargs": {"load_format": "dummy"},
    },
    "placement": {"object_store_gib": 4},
    "environment": {},
}

TINY: Settings = {
    "repeats": 1,
    "shape": TINY_LLAMA,
    "pool": {
        "memory_gib": 2,
        "max_num_seqs": 8,
        "engine_kwargs": {"load_format": "dummy", "distributed_executor_backend": "uni"},
    },
    "placement": {"object_store_gib": 0.25, "ray_cpus": 2},
    # With "uni" above: fewer processes, each of which would import torch for many seconds.
    "environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
}

SPREAD = 0.6
"""Standard deviation of the logarithm of an answer's length."""

OBSERVED = [pa.field(name, pa.float64()) for name in ("began", "ended", "context")]
"""Columns that `observed` makes."""


def variants() -> dict[str, Settings]:
    """Settings that may cost or gain speed; those of requests are series of one engine."""
    plain, whole = {"repetition_penalty": 1.0}, {"top_p": 1.0}
    graphs = {"max_cudagraph_capture_size": 1024}
    requests = {
        "seeded": {"seeded": True},
        "no_penalty": {"sampling": plain},
        "no_top_p": {"sampling": whole},
        "no_penalty_no_top_p": {"sampling": plain | whole},
    }
    return {
        "base": {},
        "requests": {"series": requests},
        **{f"sequences_{n}": {"pool": {"max_num_seqs": n}} for n in (128, 512, 1024)},
        **{f"batched_{n}": engine_with(max_num_batched_tokens=n) for n in (2048, 16384)},
        # vLLM 0.26 uses FlashInfer's sampler by default, so here it is turned off.
        "no_flashinfer_sampler": {"environment": {"VLLM_USE_FLASHINFER_SAMPLER": "0"}},
        # By default vLLM captures graphs for steps of up to twice the sequences in tokens.
        "graphs_1024": engine_with(compilation_config=graphs),
        "full_graphs_1024": engine_with(compilation_config=graphs | {"cudagraph_mode": "FULL"}),
        "async_scheduling": engine_with(async_scheduling=True),
        "no_async_scheduling": engine_with(async_scheduling=False),
        # Its penalties and seeds are computed on the GPU, those of the first runner are not.
        "second_runner": {
            "environment": {"VLLM_USE_V2_MODEL_RUNNER": "1"},
            "series": {"seeded": {"seeded": True}},
        },
    }


def engine_with(**arguments: Any) -> Settings:
    """What differs when vLLM's engine gets these arguments."""
    return {"pool": {"engine_kwargs": arguments}}


# --------------------------------------------------------------------------------------- the work


def lengths(draw: random.Random, count: int, mean: float, low: int, high: int) -> list[int]:
    """Lengths of answers in tokens, log-normal about `mean` and clipped."""
    middle = math.log(mean) - SPREAD**2 / 2
    drawn = (round(draw.lognormvariate(middle, SPREAD)) for _ in range(count))
    return [min(max(length, low), high) for length in drawn]


def words(draw: random.Random, count: int, settings: Settings) -> str:
    """Text of `count` tokens."""
    there = settings["shape"]["vocab_size"] - len(RESERVED)
    return " ".join(f"w{draw.randrange(there)}" for _ in range(count))


# --------------------------------------------------------------------------------- the package's


def make_job(settings: Settings, stage: str, storage: Path, series: str = SUBJECT) -> Job:
    """A stage's job whose roles are all the model without weights."""
    role = {
        "model": str(model_folder(settings["shape"])),
        "name": "benchmark",
        "self_name": "Benchmark",
        "max_model_len": settings["context"],
        "dtype": "bfloat16",
    }
    roles, (group, name) = ("teacher", "student", "judge", "prompt_generator"), stage.split("/")
    recipe = {
        "name": "benchmark",
        "seeded_sampling": settings["series"].get(series, {}).get("seeded", False),
        "roles": dict.fromkeys(roles, role),
        group: {name: {"limits": {"after": 10**9}}},  # random words are measured, not judged
    }
    found = pipeline.jobs(
        Recipe.model_validate(recipe),
        [schema.load("poeticism")],
        Placement.model_validate(
            {**settings["placement"], "pools": dict.fromkeys(roles, settings["pool"])}
        ),
        Store.at(str(storage)),
    )
    return next(job for job in found if job.stage.name == stage and job.constitution)


def make_spec(settings: Settings) -> EngineSpec:
    """The engine that the package would start."""
    return engine_spec(make_job(settings, "distillation/student", Path("unused")), "student")


def sampling_of(settings: Settings, series: str) -> dict[str, Any]:
    """How a series draws."""
    return settings["sampling"] | settings["series"].get(series, {}).get("sampling", {})


@contextmanager
def ray_running(settings: Settings) -> Iterator[None]:
    """The package's Ray for as long as the block; its engines end with it."""
    import ray

    set_environment(settings)
    cluster.connect(make_job(settings, "distillation/student", Path("unused")).placement)
    try:
        yield
    finally:
        allocation.stop_hosts()
        ray.shutdown()


def observed(began: float, replies: list[Reply]) -> Row:
    """What a row function tells beside its own fields.

    Args:
        began: when it was called, in seconds since the epoch.
        replies: what it was answered.

    Returns:
        The two times, and `context`: over all tokens generated, the tokens that stood before.
    """
    context = sum(r.tokens_out * (r.tokens_in + r.tokens_out / 2) for r in replies)
    return {"began": began, "ended": time.time(), "context": context}


def run_package(
    job: Job, requests: list[Row], talk: RowFn, fields: list[pa.Field], series: str
) -> tuple[Run, pa.Table]:
    """Time one call of `generate`, all that it does included."""
    began = time.time()
    rows = generate(job, requests, talk, "student", [*OBSERVED, *fields])
    ended = time.time()
    table = rows.table()
    sums = {name: sum(table[name].to_pylist()) for name in ("tokens_out", "tokens_in", "context")}
    return {
        "series": series,
        "seconds": ended - began,
        "rows": len(table),
        "tokens": sums["tokens_out"],
        "tokens_in": sums["tokens_in"],
        "cached_tokens": sum(table["cached_tokens"].to_pylist()),
        "context": sums["context"] / sums["tokens_out"],
        "before": min(table["began"].to_pylist()) - began,
        "after": ended - max(table["ended"].to_pylist()),
    }, table


# ---------------------------------------------------------------------------------- bare engines


def set_environment(settings: Settings) -> None:
    """Give this process, and what it starts, the environment of the package's engines."""
    os.environ.update(backends.environment(make_spec(settings)))


def engine_arguments(settings: Settings) -> dict[str, Any]:
    """What the package gives vLLM, less one argument that only its asynchronous engine knows."""
    arguments = backends.engine_arguments(make_spec(settings))
    return {k: v for k, v in arguments.items() if k != "enable_log_requests"}


def offline_engine(settings: Settings, prefix_caching: bool) -> Any:
    """A `vllm.LLM` with the package's arguments."""
    set_environment(settings)
    from vllm import LLM

    arguments = engine_arguments(settings) | {"enable_prefix_caching": prefix_caching}
    return LLM(model=str(model_folder(settings["shape"])), **arguments)


def sampling_parameters(settings: Settings, lengths: list[int]) -> list[Any]:
    """VLLM's parameters for answers of these lengths."""
    from vllm import SamplingParams

    return [SamplingParams(max_tokens=length, **settings["sampling"]) for length in lengths]


# ---------------------------------------------------------------------------------------- figures


def figures(series: Series, settings: Settings, machine: Machine) -> Figures:
    """The speed of every series, and how the package's own path spends its time."""
    found = {f"{name}_tokens_per_s": figure(speeds(runs)) for name, runs in sorted(series.items())}
    runs = series.get(SUBJECT)
    if not runs:
        return found
    bounds = [roofline(settings, each, machine["bytes_per_s"]) for each in runs]
    shares = [speed / bound for speed, bound in zip(speeds(runs), bounds, strict=True)]
    return found | {
        "roofline_fraction": figure(shares),
        "prefix_hit_rate": figure([each["cached_tokens"] / each["tokens_in"] for each in runs]),
        "seconds_before_first_request": figure([each["before"] for each in runs]),
        "seconds_after_last_reply": figure([each["after"] for each in runs]),
    }


def roofline(settings: Settings, run: Run, bytes_per_s: float) -> float:
    """Tokens per second if decoding only had to read memory, once a step.

    A step makes one token for each of n sequences. It reads all weights but the input embedding
    (of which it reads n rows), and the keys and values of each sequence's context of c tokens:

        n / ((weights + n * c * kv) / bandwidth)
        weights = 2 bytes * (layers * (2 h q + 2 h k + 3 h f) + v h)
        kv      = 2 bytes * 2 * layers * k

    with h the hidden size, q and k the widths of all query and of all key heads, f the
    feed-forward width, v the vocabulary. n is the engine's limit, or all rows if those are fewer;
    c is the mean over generated tokens. Reading prompts and sampling are free in this bound, and
    so are the last moments, when fewer than n sequences are left.
    """
    shape = settings["shape"]
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    queries = shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    layer = hidden * (2 * queries + 2 * keys + 3 * shape["intermediate_size"])
    weights = 2 * (layers * layer + shape["vocab_size"] * hidden)
    sequences = min(settings["pool"]["max_num_seqs"], run["rows"])
    return sequences * bytes_per_s / (weights + sequences * run["context"] * 4 * layers * keys)
