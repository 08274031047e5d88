"""Shared code of the two generation benchmarks: engines with random weights and their workloads.

All ways take the engine arguments from `opencharacter.engines.backends.engine_arguments`, so that
they are equal.
"""

from __future__ import annotations

import asyncio
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
    SMOLLM_135M,
    SUBJECT,
    TINY_LLAMA,
    CpuTime,
    Figures,
    Machine,
    Run,
    Series,
    Settings,
    cpu_ms_per_token,
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
    # Together with "uni" the first starts fewer processes, each of which would import torch for
    # seconds. The second is that of the package's engines; `LLM` runs in a process that has torch.
    "environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"},
}

CPU: Settings = TINY | {
    "repeats": 3,
    "shape": SMOLLM_135M,
    "sampling": {"temperature": 0.6, "top_p": 1.0, "repetition_penalty": 1.1},
    "pool": TINY["pool"] | {"max_num_seqs": 16},
}
"""A model of the embedded model's shape on a CPU, sampled as in the demo."""

MEASUREMENT_FIELDS = [pa.field(name, pa.float64()) for name in ("began", "ended", "context")]
"""Columns that `measurements` adds."""


def variants() -> dict[str, Settings]:
    """Return settings that may affect speed; variants of sampling are series of one engine."""
    no_penalty, no_top_p = {"repetition_penalty": 1.0}, {"top_p": 1.0}
    graphs = {"max_cudagraph_capture_size": 1024}
    requests = {
        "seeded": {"seeded": True},
        "no_penalty": {"sampling": no_penalty},
        "no_top_p": {"sampling": no_top_p},
        "no_penalty_no_top_p": {"sampling": no_penalty | no_top_p},
    }
    return {
        "base": {},
        "requests": {"series": requests},
        **{f"sequences_{n}": {"pool": {"max_num_seqs": n}} for n in (128, 512, 1024)},
        **{f"batched_{n}": engine_with(max_num_batched_tokens=n) for n in (2048, 16384)},
        # vLLM 0.26 uses FlashInfer's sampler by default, so here it is turned off.
        "no_flashinfer_sampler": {"environment": {"VLLM_USE_FLASHINFER_SAMPLER": "0"}},
        # By default vLLM captures graphs for up to twice max_num_seqs tokens per step.
        "graphs_1024": engine_with(compilation_config=graphs),
        "full_graphs_1024": engine_with(compilation_config=graphs | {"cudagraph_mode": "FULL"}),
        "async_scheduling": engine_with(async_scheduling=True),
        "no_async_scheduling": engine_with(async_scheduling=False),
        # It applies penalties and seeds on the GPU, unlike the first model runner.
        "second_runner": {
            "environment": {"VLLM_USE_V2_MODEL_RUNNER": "1"},
            "series": {"seeded": {"seeded": True}},
        },
    }


def engine_with(**arguments: Any) -> Settings:
    """Return the settings that pass these arguments to vLLM's engine."""
    return {"pool": {"engine_kwargs": arguments}}


# --------------------------------------------------------------------------------------- the work


def words(draw: random.Random, count: int, settings: Settings) -> str:
    """Draw a text of `count` tokens."""
    vocabulary = settings["shape"]["vocab_size"] - len(RESERVED)
    return " ".join(f"w{draw.randrange(vocabulary)}" for _ in range(count))


# --------------------------------------------------------------------------------- the package's


def make_job(settings: Settings, stage: str, storage: Path, series: str = SUBJECT) -> Job:
    """Return a stage's job in which all roles use the model with random weights."""
    role = {
        "model": str(model_folder(settings["shape"])),
        "name": "benchmark",
        "self_name": "Benchmark",
        "max_model_len": settings["context"],
        "dtype": "bfloat16",
        "quantization": settings.get("quantization"),
    }
    roles, (group, name) = ("teacher", "student", "judge", "prompt_generator"), stage.split("/")
    recipe = {
        "name": "benchmark",
        "seeded_sampling": settings["series"].get(series, {}).get("seeded", False),
        "roles": dict.fromkeys(roles, role),
        group: {name: {"limits": {"min_texts": 10**9}}},  # no quality limits for random words
    }
    jobs = pipeline.jobs(
        Recipe.model_validate(recipe),
        [schema.load("poeticism")],
        Placement.model_validate(
            {**settings["placement"], "pools": dict.fromkeys(roles, settings["pool"])}
        ),
        Store.at(str(storage)),
    )
    return next(job for job in jobs if job.stage.name == stage and job.constitution)


def make_spec(settings: Settings) -> EngineSpec:
    """Return the spec of the engine that the package would start."""
    return engine_spec(make_job(settings, "distillation/student", Path("unused")), "student")


def sampling_of(settings: Settings, series: str) -> dict[str, Any]:
    """Return the sampling parameters of a series."""
    return settings["sampling"] | settings["series"].get(series, {}).get("sampling", {})


@contextmanager
def ray_running(settings: Settings) -> Iterator[None]:
    """Run Ray as the package does while the block runs, and stop its engines at the end."""
    import ray

    set_environment(settings)
    cluster.connect(make_job(settings, "distillation/student", Path("unused")).placement)
    try:
        yield
    finally:
        allocation.stop_unused_engines()
        ray.shutdown()


def measurements(began: float, replies: list[Reply]) -> Row:
    """Return the measurements that a row function adds to its own fields.

    Args:
        began: when the row function was called, in seconds since the epoch.
        replies: the replies that it received.

    Returns:
        The times at which it began and ended, and `context`: the number of preceding tokens,
        summed over all generated tokens.
    """
    context = sum(r.tokens_out * (r.tokens_in + r.tokens_out / 2) for r in replies)
    return {"began": began, "ended": time.time(), "context": context}


def run_package(
    job: Job, requests: list[Row], row_fn: RowFn, fields: list[pa.Field], series: str
) -> tuple[Run, pa.Table]:
    """Time one whole call of `generate`; return the run and the generated rows."""
    began = time.time()
    with CpuTime() as cpu:
        rows = generate(job, requests, row_fn, "student", [*MEASUREMENT_FIELDS, *fields])
        ended = time.time()
    table = rows.table()
    sums = {name: sum(table[name].to_pylist()) for name in ("tokens_out", "tokens_in", "context")}
    return {
        "series": series,
        "seconds": ended - began,
        "cpu_seconds": cpu.by_process,
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
    """Set the environment of the package's engines in this process and its children."""
    os.environ.update(backends.environment(make_spec(settings)))


def engine_arguments(settings: Settings) -> dict[str, Any]:
    """Return the package's engine arguments, except one that only the asynchronous engine has."""
    model = model_folder(settings["shape"])
    arguments = backends.engine_arguments(make_spec(settings), model)
    return {k: v for k, v in arguments.items() if k != "enable_log_requests"}


def offline_engine(settings: Settings, prefix_caching: bool) -> Any:
    """Return a `vllm.LLM` with the package's engine arguments."""
    set_environment(settings)
    from vllm import LLM

    arguments = engine_arguments(settings) | {"enable_prefix_caching": prefix_caching}
    return LLM(model=str(model_folder(settings["shape"])), **arguments)


async def async_engine(settings: Settings) -> Any:
    """Return an `AsyncLLM` with the package's engine arguments."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = engine_arguments(settings)
    folder = str(model_folder(settings["shape"]))
    return AsyncLLM.from_engine_args(AsyncEngineArgs(model=folder, **arguments))


def close_engine(engine: Any, loop: asyncio.AbstractEventLoop) -> None:
    """Stop an `AsyncLLM` and the event loop that it runs in."""
    engine.shutdown()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def sampling_parameters(settings: Settings, lengths: list[int]) -> list[Any]:
    """Return vLLM's sampling parameters for answers of these lengths."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # As the package: only finished answers leave the engine. `LLM.generate` sets this itself.
    options = {**settings["sampling"], "output_kind": RequestOutputKind.FINAL_ONLY}
    return [SamplingParams(max_tokens=length, **options) for length in lengths]


# ---------------------------------------------------------------------------------------- figures


def figures(series: Series, settings: Settings, machine: Machine) -> Figures:
    """Return the speed of every series, and a breakdown of the package's own way."""
    result = {f"{name}_tokens_per_s": figure(speeds(runs)) for name, runs in sorted(series.items())}
    per_token = {name: cpu_ms_per_token(runs) for name, runs in sorted(series.items())}
    result |= {f"{name}_cpu_ms_per_token": figure(each) for name, each in per_token.items() if each}
    runs = series.get(SUBJECT)
    if not runs:
        return result
    bounds = [roofline(settings, each, machine["bytes_per_s"]) for each in runs]
    shares = [speed / bound for speed, bound in zip(speeds(runs), bounds, strict=True)]
    return result | {
        "roofline_fraction": figure(shares),
        "prefix_hit_rate": figure([each["cached_tokens"] / each["tokens_in"] for each in runs]),
        "seconds_before_first_request": figure([each["before"] for each in runs]),
        "seconds_after_last_reply": figure([each["after"] for each in runs]),
    }


def roofline(settings: Settings, run: Run, bytes_per_s: float) -> float:
    """Return the upper bound of tokens per second that memory bandwidth allows.

    A decoding step generates one token for each of n sequences. It reads all weights except the
    input embedding (of which it reads n rows), and the keys and values of each sequence's context
    of c tokens:

        n / ((weights + n * c * kv) / bandwidth)
        weights = 2 bytes * (layers * (2 h q + 2 h k + 3 h f) + v h)
        kv      = 2 bytes * 2 * layers * k

    with h the hidden size, q and k the widths of all query and of all key heads, f the
    feed-forward width, v the vocabulary. n is `max_num_seqs`, or the number of rows if that is
    smaller; c is the mean over generated tokens. The bound neglects prefill, sampling, and the end
    of the run, when fewer than n sequences are left.
    """
    shape = settings["shape"]
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    queries = shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    layer = hidden * (2 * queries + 2 * keys + 3 * shape["intermediate_size"])
    weights = 2 * (layers * layer + shape["vocab_size"] * hidden)
    sequences = min(settings["pool"]["max_num_seqs"], run["rows"])
    return sequences * bytes_per_s / (weights + sequences * run["context"] * 4 * layers * keys)
