"""Throughput of single-turn generation: the package, bare vLLM, and `ray.data.llm`.

Many prompts share a system prompt; each asks for an answer of a given length, drawn once from a
log-normal distribution. The model has the shape of Llama 3.1 8B and random weights, which are as
fast as trained ones. Prompts differ between repeats, so that the prefix cache holds only the
system prompt. All ways have the same engine settings, prompts, lengths and sampling.

Ways:
- `opencharacter`: `generate` with a running engine. The time is that of the whole call, including
  Ray Data, tasks and Parquet. Runs without and with a seed per request alternate, as
  `opencharacter` and `opencharacter_seeded`. The other ways use no seeds.
- `two_replicas`: the same on two GPUs, with twice the prompts. Runs only if `--ways` names it.
- `fp8`: the same with `quantization: fp8`. Runs only if `--ways` names it, on a GPU.
- `async_llm`: a coroutine for each prompt on one `AsyncLLM` in the same process, with nothing
  stored. At most `max_num_seqs` run at a time. Its distance to `vllm_generate` is the price of the
  asynchronous engine.
- `vllm_generate`: `LLM.generate` on prompts that were rendered beforehand.
- `ray_data_llm`: `build_processor` with chat template, tokenization and detokenization, and its
  default batch settings. It starts an engine for every dataset; that time is excluded: a repeat
  begins when the first row enters the engine (the time at which a row leaves minus
  `time_taken_llm`, the minimum over all rows) and ends when the last row reaches the driver.
  There is no warm-up, because the engine does not outlive its dataset; only the other ways'
  compilation caches on disk are reused.
- `ray_data_llm_wide`: the same with concurrent batches for twice the engine's sequences, which
  keeps the engine full. The default is just as many as the engine has, and a batch ends with its
  longest answer. Runs only if `--ways` names it.

Figures: `<way>_tokens_per_s` (generated tokens), `<way>_cpu_ms_per_token` (CPU time of all
processes), `ratio_to_<way>`, `seeded_ratio` (with seeds over without), `two_replicas_ratio` (over
one), `fp8_ratio` (over bf16), `prefix_hit_rate` (cached over all prompt tokens),
`roofline_fraction` (of the bound in `engines.roofline`), and the seconds that `generate` takes
before its first request and after its last reply.

Run: python benchmarks/generation.py --out benchmarks/results
     python benchmarks/generation.py --out benchmarks/results --sweep   (settings of the engine)
     python benchmarks/generation.py --out benchmarks/results --cpu     (on a CPU)
     python benchmarks/generation.py --out /tmp/results --tiny          (a test that it works)
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import engines
import harness
import pyarrow as pa
from harness import SUBJECT, Figures, Machine, Run, Series, Settings

from opencharacter.config.roles import Sampling
from opencharacter.engines.conversations import Conversation, Row
from opencharacter.text.chat import Message, system, user

SETTINGS = engines.SETTINGS | {
    "series": {SUBJECT: {}, "opencharacter_seeded": {"seeded": True}},
    "prompts": 2048,
    "warmup": 256,
    "system_tokens": 450,
    "user_tokens": 60,
    "answer_mean": 300,
    "answer_low": 16,
    "answer_high": 1024,
    "context": 2048,
}

TINY = engines.TINY | {
    "prompts": 24,
    "warmup": 4,
    "system_tokens": 96,
    "user_tokens": 12,
    "answer_mean": 12,
    "answer_low": 4,
    "answer_high": 24,
    "context": 256,
}

CPU = engines.CPU | {
    "prompts": 96,
    "warmup": 16,
    "system_tokens": 200,
    "user_tokens": 24,
    "answer_mean": 32,
    "answer_low": 8,
    "answer_high": 96,
    "context": 512,
}

STAGE = "distillation/student"
FIELDS = [pa.field("answer", pa.string())]


# --------------------------------------------------------------------------------------- the work


def shared_prompt(settings: Settings) -> Message:
    """Return the system prompt that all requests share."""
    return system(engines.words(random.Random("system"), settings["system_tokens"], settings))


def workload(settings: Settings, repeat: str, count: int) -> list[Row]:
    """Return the requests of one repeat: the same lengths in every repeat, but other prompts."""
    limits = [settings[f"answer_{name}"] for name in ("mean", "low", "high")]
    lengths, draw = random.Random("lengths"), random.Random(f"prompts/{repeat}")
    return [
        {
            "id": f"{at:06}",
            "prompt": engines.words(draw, settings["user_tokens"], settings),
            "max_tokens": harness.draw_length(lengths, *limits),
        }
        for at in range(count)
    ]


# -------------------------------------------------------------------------------------- the ways


async def answer(
    row: Row, conversation: Conversation, head: Message, sampling: dict[str, Any]
) -> Row:
    """Generate one answer of the given length; the package's row function."""
    began = time.time()
    parameters = Sampling(max_tokens=row["max_tokens"], **sampling)
    reply = await conversation.reply([head, user(row["prompt"])], parameters)
    return {"answer": reply.text, **engines.measurements(began, [reply])}


def opencharacter(settings: Settings) -> Iterator[Run]:
    """The package, with its series alternating."""
    names = [*settings["series"]]

    def once(series: str, repeat: str, count: int) -> Run:
        rows = workload(settings, f"{series} {repeat}", count)
        sampling = engines.sampling_of(settings, series)
        row_fn = partial(answer, head=shared_prompt(settings), sampling=sampling)
        with tempfile.TemporaryDirectory() as storage:
            job = engines.make_job(settings, STAGE, Path(storage), series)
            return engines.run_package(job, rows, row_fn, FIELDS, series)[0]

    with engines.ray_running(settings):
        for series in names:
            once(series, "warm-up", settings["warmup"])
        for repeat in range(settings["repeats"]):
            for series in names if repeat % 2 == 0 else names[::-1]:
                yield once(series, str(repeat), settings["prompts"])


def two_replicas(settings: Settings) -> Iterator[Run]:
    """The package on two replicas, with twice the work."""
    changes = {
        "pool": {**settings["pool"], "replicas": 2},
        "series": {SUBJECT: {}},
        "prompts": 2 * settings["prompts"],
        "warmup": 2 * settings["warmup"],
    }
    for run in opencharacter(settings | changes):
        yield run | {"series": "two_replicas"}


def fp8(settings: Settings) -> Iterator[Run]:
    """The package with an engine whose matrix products are in FP8."""
    changes = {"series": {SUBJECT: {}}, "quantization": "fp8"}
    for run in opencharacter(settings | changes):
        yield run | {"series": "fp8"}


def vllm_generate(settings: Settings) -> Iterator[Run]:
    """Bare vLLM, offline."""
    llm = engines.offline_engine(settings, prefix_caching=True)
    tokenizer, head = llm.get_tokenizer(), shared_prompt(settings)

    def once(repeat: str, count: int) -> Run:
        rows = workload(settings, repeat, count)
        prompts = [
            tokenizer.apply_chat_template(
                [head, user(row["prompt"])], tokenize=False, add_generation_prompt=True
            )
            for row in rows
        ]
        parameters = engines.sampling_parameters(settings, [row["max_tokens"] for row in rows])
        began = time.time()
        with harness.CpuTime() as cpu:
            outputs = llm.generate(prompts, parameters, use_tqdm=False)
            seconds = time.time() - began
        times = {"seconds": seconds, "cpu_seconds": cpu.by_process}
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return {"series": "vllm_generate", **times, "tokens": tokens}

    once("warm-up", settings["warmup"])
    for repeat in range(settings["repeats"]):
        yield once(f"vllm {repeat}", settings["prompts"])


def async_llm(settings: Settings) -> Iterator[Run]:
    """Bare vLLM, asynchronous."""
    engines.set_environment(settings)
    loop = asyncio.new_event_loop()
    engine = loop.run_until_complete(engines.async_engine(settings))

    def once(repeat: str, count: int) -> Run:
        rows = workload(settings, repeat, count)
        began = time.time()
        with harness.CpuTime() as cpu:
            tokens = loop.run_until_complete(answer_all(engine, settings, rows))
            seconds = time.time() - began
        return {
            "series": "async_llm",
            "seconds": seconds,
            "cpu_seconds": cpu.by_process,
            "tokens": tokens,
        }

    try:
        once("warm-up", settings["warmup"])
        for repeat in range(settings["repeats"]):
            yield once(f"async {repeat}", settings["prompts"])
    finally:
        engines.close_engine(engine, loop)


async def answer_all(engine: Any, settings: Settings, rows: list[Row]) -> int:
    """Generate all answers; return the number of generated tokens."""
    tokenizer = harness.make_tokenizer(settings["shape"]["vocab_size"])
    head = shared_prompt(settings)
    parameters = engines.sampling_parameters(settings, [row["max_tokens"] for row in rows])
    slots = asyncio.Semaphore(settings["pool"]["max_num_seqs"])

    async def answer_one(row: Row, each: Any) -> int:
        async with slots:
            prompt = tokenizer.apply_chat_template(
                [head, user(row["prompt"])], tokenize=False, add_generation_prompt=True
            )
            async for output in engine.generate(prompt, each, row["id"]):
                last = output.outputs[0]
        return len(last.token_ids)

    return sum(await asyncio.gather(*map(answer_one, rows, parameters)))


def ray_data_llm(settings: Settings) -> Iterator[Run]:
    """Ray's batch inference with its defaults."""
    return run_processor(settings, "ray_data_llm", {})


def ray_data_llm_wide(settings: Settings) -> Iterator[Run]:
    """Ray's batch inference with concurrent batches for twice the engine's sequences."""
    batches = -(-2 * settings["pool"]["max_num_seqs"] // 32)
    return run_processor(settings, "ray_data_llm_wide", {"max_concurrent_batches": batches})


def run_processor(settings: Settings, series: str, options: dict[str, Any]) -> Iterator[Run]:
    """Run every repeat as a dataset, which starts its own engine."""
    with engines.ray_running(settings):
        for repeat in range(settings["repeats"]):
            harness.wait_for_device()  # until the previous engine has released it
            rows = workload(settings, f"{series} {repeat}", settings["prompts"])
            yield {"series": series, **process(settings, rows, options)}


def process(settings: Settings, rows: list[Row], options: dict[str, Any]) -> Run:
    """Time one dataset, from its first row in the engine to its last row in the driver."""
    import ray.data
    from ray.data.llm import build_processor

    from opencharacter.engines.generate import silence_ray_data

    silence_ray_data()
    processor = build_processor(
        processor_config(settings, options),
        preprocess=partial(as_request, head=shared_prompt(settings), sampling=settings["sampling"]),
        postprocess=as_result,
        **light(settings, "preprocess_map_kwargs", "postprocess_map_kwargs"),
    )
    finished = processor(ray.data.from_items(rows)).take_all()
    ended = time.time()
    began = min(row["left"] - row["took"] for row in finished)
    return {"seconds": ended - began, "tokens": sum(row["tokens"] for row in finished)}


def processor_config(settings: Settings, options: dict[str, Any]) -> Any:
    """Return the configuration of one engine with the package's arguments."""
    from ray.data.llm import vLLMEngineProcessorConfig

    gpus = settings["pool"].get("gpus", 0)
    return vLLMEngineProcessorConfig(
        model_source=str(harness.model_folder(settings["shape"])),
        engine_kwargs=engines.engine_arguments(settings),
        placement_group_config={"bundles": [{"CPU": 1, **({"GPU": gpus} if gpus else {})}]},
        concurrency=1,
        **light(settings, "chat_template_stage", "tokenize_stage", "detokenize_stage"),
        **options,
    )


def light(settings: Settings, *stages: str) -> dict[str, Any]:
    """Return fewer CPUs per stage if Ray has so few that its defaults would never be placed."""
    few_cpus = "ray_cpus" in settings["placement"]
    return {stage: {"num_cpus": 0.1} for stage in stages} if few_cpus else {}


def as_request(row: Row, head: Message, sampling: dict[str, Any]) -> Row:
    """Convert a row to the processor's format."""
    return {
        "messages": [head, user(row["prompt"])],
        "sampling_params": {**sampling, "max_tokens": int(row["max_tokens"])},
    }


def as_result(row: Row) -> Row:
    """Keep the needed fields of a finished row, and the time at which it left the engine."""
    return {
        "id": row["id"],
        "answer": row["generated_text"],
        "tokens": row["num_generated_tokens"],
        "took": row["time_taken_llm"],
        "left": time.time(),
    }


# ---------------------------------------------------------------------------------------- figures


def figures(series: Series, settings: Settings, machine: Machine) -> Figures:
    """Return all figures that can be computed from the runs."""
    others = ("async_llm", "vllm_generate", "ray_data_llm", "ray_data_llm_wide")
    pairs = {f"ratio_to_{other}": (SUBJECT, other) for other in others}
    pairs["seeded_ratio"] = ("opencharacter_seeded", SUBJECT)
    pairs["two_replicas_ratio"] = ("two_replicas", SUBJECT)
    pairs["fp8_ratio"] = ("fp8", SUBJECT)
    return engines.figures(series, settings, machine) | harness.ratios(series, pairs)


BENCHMARK = harness.Benchmark(
    name="generation",
    script=Path(__file__).resolve(),
    settings=SETTINGS,
    tiny=TINY,
    ways={
        way.__name__: way
        for way in (
            opencharacter,
            async_llm,
            vllm_generate,
            ray_data_llm,
            ray_data_llm_wide,
            two_replicas,
            fp8,
        )
    },
    figures=figures,
    extra=("ray_data_llm_wide", "two_replicas", "fp8"),
    variants=engines.variants(),
    cpu=CPU,
)

if __name__ == "__main__":
    harness.main(BENCHMARK, __doc__ or "")
