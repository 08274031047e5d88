"""Throughput of self-conversations: the package, bare vLLM, and vLLM with a barrier per turn.

Two sides with one system prompt take turns; the lengths of all replies are drawn once from a
log-normal distribution. The model has the shape of Llama 3.1 8B and random weights. The texts
differ between repeats, so that the prefix cache holds only the system prompts.

Ways:
- `opencharacter`: `generate` with a running engine; every conversation goes at its own pace. The
  time is that of the whole call, including Ray Data, tasks and Parquet.
- `async_llm`: what one would write by hand: a coroutine for each conversation on one `AsyncLLM` in
  the same process, with nothing stored. At most `max_num_seqs` conversations run at a time.
- `barrier`: how the paper's code works: offline vLLM without prefix cache and one call of
  `LLM.generate` per turn for all conversations, so that each turn waits for its longest reply.
  It prefills every conversation again in each turn, which takes long, so it gets fewer
  conversations (`--barrier-conversations`). The package runs once more with that number, as
  `opencharacter_fewer`, for the comparison.
- `barrier_cached`: the same with the prefix cache.

All ways have the same engine settings, lengths and sampling, and no seeds.

Figures: `<way>_tokens_per_s` (generated tokens), `<way>_cpu_ms_per_token` (CPU time of all
processes), `ratio_to_async_llm`, `ratio_to_barrier_cached`, `ratio_to_barrier`, `prefix_hit_rate`
(cached over all prompt tokens; also for each side, of which the first one begins),
`roofline_fraction` (of the bound in `engines.roofline`), and the seconds that `generate` takes
before its first request and after its last reply.

Run: python benchmarks/interaction.py --out benchmarks/results
     python benchmarks/interaction.py --out benchmarks/results --sweep   (settings of the engine)
     python benchmarks/interaction.py --out benchmarks/results --cpu     (on a CPU)
     python benchmarks/interaction.py --out /tmp/results --tiny          (a test that it works)
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
from opencharacter.introspection.interaction import messages_for
from opencharacter.introspection.reflection import MESSAGES
from opencharacter.text.chat import Message, system

SETTINGS = engines.SETTINGS | {
    "conversations": 512,
    "barrier_conversations": 64,
    "warmup": 32,
    "turns": 10,
    "system_tokens": 500,
    "greeting_tokens": 8,
    "reply_mean": 150,
    "reply_low": 16,
    "reply_high": 512,
    "context": 16_384,
}

TINY = engines.TINY | {
    "conversations": 6,
    "barrier_conversations": 6,
    "warmup": 2,
    "turns": 4,
    "system_tokens": 96,
    "reply_mean": 12,
    "reply_low": 4,
    "reply_high": 24,
    "context": 512,
}

CPU = engines.CPU | {
    "conversations": 24,
    "barrier_conversations": 24,
    "warmup": 8,
    "turns": 6,
    "system_tokens": 200,
    "reply_mean": 24,
    "reply_low": 8,
    "reply_high": 64,
    "context": 1024,
}

STAGE = "introspection/interaction"
KINDS = ("free", "leading")
SIDES = ("first", "second")
FIELDS = [
    pa.field("kind", pa.string()),
    pa.field("messages", MESSAGES),
    pa.field("tokens_by_side", pa.list_(pa.int64())),
    pa.field("cached_by_side", pa.list_(pa.int64())),
]


# --------------------------------------------------------------------------------------- the work


def heads(settings: Settings) -> dict[str, Message]:
    """Return the system prompt of each kind of conversation."""
    size = settings["system_tokens"]
    return {kind: system(engines.words(random.Random(kind), size, settings)) for kind in KINDS}


def workload(settings: Settings, repeat: str, count: int, turns: int) -> list[Row]:
    """Return the requests of one repeat: the same lengths in every repeat, but other greetings."""
    limits = [settings[f"reply_{name}"] for name in ("mean", "low", "high")]
    lengths = random.Random("lengths")
    draw = random.Random(f"greetings/{repeat}")
    return [
        {
            "id": f"{at:06}",
            "kind": KINDS[at % 2],
            "lines": [engines.words(draw, settings["greeting_tokens"], settings) for _ in range(2)],
            "lengths": [harness.draw_length(lengths, *limits) for _ in range(turns)],
        }
        for at in range(count)
    ]


# -------------------------------------------------------------------------------------- the ways


async def interact(
    row: Row, conversation: Conversation, heads: dict[str, Message], sampling: dict[str, Any]
) -> Row:
    """Run one conversation with replies of given lengths; the package's row function."""
    began, lines, replies = time.time(), list(row["lines"]), []
    for length in row["lengths"]:
        history = messages_for(lines, side=len(lines) % 2)
        parameters = Sampling(max_tokens=length, **sampling)
        messages = [heads[row["kind"]], *history]
        replies.append(await conversation.reply(messages, parameters))
        lines.append(replies[-1].text)
    sides = (replies[0::2], replies[1::2])
    return {
        "messages": messages_for(lines, side=(len(lines) - 1) % 2),
        "tokens_by_side": [sum(r.tokens_in for r in side) for side in sides],
        "cached_by_side": [sum(r.cached_tokens for r in side) for side in sides],
        **engines.measurements(began, replies),
    }


def opencharacter(settings: Settings) -> Iterator[Run]:
    """The package, with all conversations and, if they differ, with as many as `barrier`."""
    sizes = dict.fromkeys(settings["series"], settings["conversations"])
    if settings["barrier_conversations"] != settings["conversations"] and len(sizes) == 1:
        sizes["opencharacter_fewer"] = settings["barrier_conversations"]

    def once(series: str, repeat: str, count: int, turns: int) -> Run:
        rows = workload(settings, f"{series} {repeat}", count, turns)
        sampling = engines.sampling_of(settings, series)
        row_fn = partial(interact, heads=heads(settings), sampling=sampling)
        with tempfile.TemporaryDirectory() as storage:
            job = engines.make_job(settings, STAGE, Path(storage), series)
            run, table = engines.run_package(job, rows, row_fn, FIELDS, series)
        return run | by_side(table)

    with engines.ray_running(settings):
        once("warm-up", "", settings["warmup"], 2)
        for repeat in range(settings["repeats"]):
            for series, count in sizes.items():
                yield once(series, str(repeat), count, settings["turns"])


def by_side(table: pa.Table) -> Run:
    """Return the prompt tokens and the cached prompt tokens of each side."""
    return {
        name: [sum(row[at] for row in table[name].to_pylist()) for at in range(len(SIDES))]
        for name in ("tokens_by_side", "cached_by_side")
    }


def async_llm(settings: Settings) -> Iterator[Run]:
    """One coroutine per conversation on a bare `AsyncLLM`."""
    engines.set_environment(settings)
    loop = asyncio.new_event_loop()
    engine = loop.run_until_complete(engines.async_engine(settings))

    def once(repeat: str, count: int, turns: int) -> Run:
        rows = workload(settings, f"async_llm {repeat}", count, turns)
        began = time.time()
        with harness.CpuTime() as cpu:
            tokens = loop.run_until_complete(converse_all(engine, settings, rows))
            seconds = time.time() - began
        times = {"seconds": seconds, "cpu_seconds": cpu.by_process}
        return {"series": "async_llm", **times, "rows": count, "tokens": tokens}

    try:
        once("warm-up", settings["warmup"], 2)
        for repeat in range(settings["repeats"]):
            yield once(str(repeat), settings["conversations"], settings["turns"])
    finally:
        engines.close_engine(engine, loop)


async def converse_all(engine: Any, settings: Settings, rows: list[Row]) -> int:
    """Run all conversations; return the number of generated tokens."""
    tokenizer = harness.make_tokenizer(settings["shape"]["vocab_size"])
    system_prompts = heads(settings)
    slots = asyncio.Semaphore(settings["pool"]["max_num_seqs"])

    async def converse(row: Row) -> int:
        tokens, lines = 0, list(row["lines"])
        async with slots:
            for turn, parameters in enumerate(
                engines.sampling_parameters(settings, row["lengths"])
            ):
                history = messages_for(lines, side=len(lines) % 2)
                prompt = tokenizer.apply_chat_template(
                    [system_prompts[row["kind"]], *history],
                    tokenize=False,
                    add_generation_prompt=True,
                )
                async for output in engine.generate(prompt, parameters, f"{row['id']}-{turn}"):
                    last = output.outputs[0]
                lines.append(last.text)
                tokens += len(last.token_ids)
        return tokens

    return sum(await asyncio.gather(*map(converse, rows)))


def barrier(settings: Settings) -> Iterator[Run]:
    """One call per turn, without prefix cache."""
    return run_barrier(settings, "barrier", False, settings["barrier_conversations"])


def barrier_cached(settings: Settings) -> Iterator[Run]:
    """One call per turn, with prefix cache."""
    return run_barrier(settings, "barrier_cached", True, settings["conversations"])


def run_barrier(settings: Settings, series: str, prefix_caching: bool, count: int) -> Iterator[Run]:
    """Run all repeats on one offline engine, after a warm-up."""
    llm = engines.offline_engine(settings, prefix_caching)

    def once(repeat: str, count: int, turns: int) -> Run:
        rows = workload(settings, f"{series} {repeat}", count, turns)
        began = time.time()
        with harness.CpuTime() as cpu:
            tokens = sum(run_turn(llm, settings, rows, turn) for turn in range(turns))
            seconds = time.time() - began
        times = {"seconds": seconds, "cpu_seconds": cpu.by_process}
        return {"series": series, **times, "rows": count, "tokens": tokens}

    once("warm-up", settings["warmup"], 2)
    for repeat in range(settings["repeats"]):
        yield once(str(repeat), count, settings["turns"])


def run_turn(llm: Any, settings: Settings, rows: list[Row], turn: int) -> int:
    """Append one reply to every conversation; return the number of generated tokens."""
    system_prompts = heads(settings)
    tokenizer, side = llm.get_tokenizer(), turn % 2
    prompts = [
        tokenizer.apply_chat_template(
            [system_prompts[row["kind"]], *messages_for(row["lines"], side)],
            tokenize=False,
            add_generation_prompt=True,
        )
        for row in rows
    ]
    parameters = engines.sampling_parameters(settings, [row["lengths"][turn] for row in rows])
    outputs = [each.outputs[0] for each in llm.generate(prompts, parameters, use_tqdm=False)]
    for row, output in zip(rows, outputs, strict=True):
        row["lines"].append(output.text)
    return sum(len(output.token_ids) for output in outputs)


# ---------------------------------------------------------------------------------------- figures


def figures(series: Series, settings: Settings, machine: Machine) -> Figures:
    """Return all figures that can be computed from the runs."""
    same_size = "opencharacter_fewer" if "opencharacter_fewer" in series else SUBJECT
    pairs = {
        "ratio_to_async_llm": (SUBJECT, "async_llm"),
        "ratio_to_barrier": (same_size, "barrier"),
        "ratio_to_barrier_cached": (SUBJECT, "barrier_cached"),
    }
    result = engines.figures(series, settings, machine) | harness.ratios(series, pairs)
    for at, side in enumerate(SIDES):
        rates = [
            run["cached_by_side"][at] / run["tokens_by_side"][at] for run in series.get(SUBJECT, [])
        ]
        if rates:
            result[f"prefix_hit_rate_{side}_side"] = harness.figure(rates)
    return result


BENCHMARK = harness.Benchmark(
    name="interaction",
    script=Path(__file__).resolve(),
    settings=SETTINGS,
    tiny=TINY,
    ways={way.__name__: way for way in (opencharacter, async_llm, barrier_cached, barrier)},
    figures=figures,
    variants=engines.variants(),
    cpu=CPU,
)

if __name__ == "__main__":
    harness.main(BENCHMARK, __doc__ or "")
