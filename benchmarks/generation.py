"""How fast single answers are made: the package's path, bare vLLM, and `ray.data.llm`.

Many prompts share a system prompt; each asks for an answer of a given length, drawn once from a
log-normal. The model has the shape of Llama 3.1 8B and random weights, which take as long as
trained ones. Prompts differ from repeat to repeat, so that a prefix cache keeps only the system
prompt. All ways have the same engine settings, prompts, lengths and sampling.

Ways:
- `opencharacter`: `generation.generate` with its engine warm; everything from the call to the
  table that it returns is timed: Ray Data, actors, Parquet. Without and with a seed per request,
  in turn, as `opencharacter` and `opencharacter_seeded`. The other ways have no seeds.
- `two_replicas`: the same on two GPUs, with twice the prompts. Only when `--ways` names it.
- `vllm_generate`: `LLM.generate` on prompts that are rendered beforehand.
- `ray_data_llm`: `build_processor` with chat template, tokenisation and detokenisation, its own
  defaults for batches. It starts an engine for every dataset; that time is not counted: a repeat
  begins when the first row enters the engine (when a row leaves, less `time_taken_llm`; the
  earliest of all rows) and ends when the last row reaches the driver. Nothing would stay warm
  from one dataset to the next, so it has no warm-up but what the other ways left on disk.
- `ray_data_llm_wide`: the same with twice the engine's sequences in its concurrent batches, which
  keeps the engine full; by default they are just as many as the engine has, and a batch leaves
  with its longest answer. Only when `--ways` names it.

Figures: `<way>_tokens_per_s` (generated tokens), `ratio_to_<way>`, `seeded_ratio` (with seeds over
without), `two_replicas_ratio` (over one), `prefix_hit_rate` (cached prompt tokens over prompt
tokens), `roofline_fraction` (of the bound in `engines.roofline`), and seconds that `generate` takes
before its first request and after its last reply.

Run: python benchmarks/generation.py --out benchmarks/results
     python benchmarks/generation.py --out benchmarks/results --sweep   (settings of the engine)
     python benchmarks/generation.py --out /tmp/results --tiny          (on a CPU)
"""

from __future__ import annotations

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

from opencharacter.config.recipe import Sampling
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

STAGE = "distillation/student"
FIELDS = [pa.field("answer", pa.string())]


# --------------------------------------------------------------------------------------- the work


def shared_prompt(settings: Settings) -> Message:
    """The system prompt of all."""
    return system(engines.words(random.Random("system"), settings["system_tokens"], settings))


def workload(settings: Settings, repeat: str, count: int) -> list[Row]:
    """Rows of one repeat: their lengths are the same in every repeat, their prompts are not."""
    limits = (settings[f"answer_{name}"] for name in ("mean", "low", "high"))
    drawn = engines.lengths(random.Random("lengths"), count, *limits)
    draw = random.Random(f"prompts/{repeat}")
    return [
        {
            "id": f"{at:06}",
            "prompt": engines.words(draw, settings["user_tokens"], settings),
            "max_tokens": length,
        }
        for at, length in enumerate(drawn)
    ]


# -------------------------------------------------------------------------------------- the ways


async def answer(row: Row, talk: Conversation, head: Message, sampling: dict[str, Any]) -> Row:
    """The package's row function."""
    began = time.time()
    drawn = Sampling(max_tokens=row["max_tokens"], **sampling)
    reply = await talk.reply([head, user(row["prompt"])], drawn)
    return {"answer": reply.text, **engines.observed(began, [reply])}


def opencharacter(settings: Settings) -> Iterator[Run]:
    """The package's path, its series in turn."""
    kinds = [*settings["series"]]

    def once(series: str, repeat: str, count: int) -> Run:
        rows = workload(settings, f"{series} {repeat}", count)
        drawn = engines.sampling_of(settings, series)
        talk = partial(answer, head=shared_prompt(settings), sampling=drawn)
        with tempfile.TemporaryDirectory() as storage:
            job = engines.make_job(settings, STAGE, Path(storage), series)
            return engines.run_package(job, rows, talk, FIELDS, series)[0]

    with engines.ray_running(settings):
        for series in kinds:
            once(series, "warm-up", settings["warmup"])
        for repeat in range(settings["repeats"]):
            for series in kinds if repeat % 2 == 0 else kinds[::-1]:
                yield once(series, str(repeat), settings["prompts"])


def two_replicas(settings: Settings) -> Iterator[Run]:
    """The package's path on two replicas, with twice the work."""
    more = {
        "pool": {**settings["pool"], "replicas": 2},
        "series": {SUBJECT: {}},
        "prompts": 2 * settings["prompts"],
        "warmup": 2 * settings["warmup"],
    }
    for run in opencharacter(settings | more):
        yield run | {"series": "two_replicas"}


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
        asked = engines.sampling_parameters(settings, [row["max_tokens"] for row in rows])
        began = time.time()
        outputs = llm.generate(prompts, asked, use_tqdm=False)
        seconds = time.time() - began
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return {"series": "vllm_generate", "seconds": seconds, "tokens": tokens}

    once("warm-up", settings["warmup"])
    for repeat in range(settings["repeats"]):
        yield once(f"vllm {repeat}", settings["prompts"])


def ray_data_llm(settings: Settings) -> Iterator[Run]:
    """Ray's own batch inference, with its defaults."""
    return run_processor(settings, "ray_data_llm", {})


def ray_data_llm_wide(settings: Settings) -> Iterator[Run]:
    """Ray's own batch inference, with batches for twice the engine's sequences."""
    batches = -(-2 * settings["pool"]["max_num_seqs"] // 32)
    return run_processor(settings, "ray_data_llm_wide", {"max_concurrent_batches": batches})


def run_processor(settings: Settings, series: str, options: dict[str, Any]) -> Iterator[Run]:
    """Every repeat is a dataset of its own, with an engine of its own."""
    with engines.ray_running(settings):
        for repeat in range(settings["repeats"]):
            harness.wait_for_device()  # the engine of the repeat before
            rows = workload(settings, f"{series} {repeat}", settings["prompts"])
            yield {"series": series, **process(settings, rows, options)}


def process(settings: Settings, rows: list[Row], options: dict[str, Any]) -> Run:
    """Time one dataset from the first row in the engine to the last row here."""
    import ray.data
    from ray.data.llm import build_processor

    from opencharacter.engines.generate import quieten

    quieten()
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
    """One engine with the package's arguments."""
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
    """CPUs of stages: Ray's default on a GPU host; on two CPUs that would leave it waiting."""
    few = "ray_cpus" in settings["placement"]
    return {stage: {"num_cpus": 0.1} for stage in stages} if few else {}


def as_request(row: Row, head: Message, sampling: dict[str, Any]) -> Row:
    """A row as the processor wants it."""
    return {
        "messages": [head, user(row["prompt"])],
        "sampling_params": {**sampling, "max_tokens": int(row["max_tokens"])},
    }


def as_result(row: Row) -> Row:
    """What is kept of a row, and when it left."""
    return {
        "id": row["id"],
        "answer": row["generated_text"],
        "tokens": row["num_generated_tokens"],
        "took": row["time_taken_llm"],
        "left": time.time(),
    }


# ---------------------------------------------------------------------------------------- figures


def figures(series: Series, settings: Settings, machine: Machine) -> Figures:
    """All figures that the runs allow."""
    others = ("vllm_generate", "ray_data_llm", "ray_data_llm_wide")
    wanted = {f"ratio_to_{other}": (SUBJECT, other) for other in others}
    wanted["seeded_ratio"] = ("opencharacter_seeded", SUBJECT)
    wanted["two_replicas_ratio"] = ("two_replicas", SUBJECT)
    return engines.figures(series, settings, machine) | harness.ratios(series, wanted)


BENCHMARK = harness.Benchmark(
    name="generation",
    script=Path(__file__).resolve(),
    settings=SETTINGS,
    tiny=TINY,
    ways={
        way.__name__: way
        for way in (opencharacter, vllm_generate, ray_data_llm, ray_data_llm_wide, two_replicas)
    },
    figures=figures,
    extra=("ray_data_llm_wide", "two_replicas"),
    variants=engines.variants(),
)

if __name__ == "__main__":
    harness.main(BENCHMARK, __doc__ or "")
