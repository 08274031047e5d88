"""How fast self-conversations are made: the package's path, and a barrier after every turn.

Two sides with one system prompt speak in turn; the lengths of all replies are drawn once from a
log-normal. The model has the shape of Llama 3.1 8B and random weights. What is said differs from
repeat to repeat, so that a prefix cache keeps only the system prompts.

Ways:
- `opencharacter`: `generation.generate` with its engine warm; every conversation goes at its own
  pace. Timed is the whole call: Ray Data, actors, Parquet.
- `barrier`: the way of the original project: offline vLLM without prefix cache, one call of
  `LLM.generate` a turn over all conversations, so that each turn waits for its longest reply.
  It reads every conversation anew each turn and takes long, so it gets fewer conversations
  (`--barrier-conversations`); the package's way is run once more with as few, as
  `opencharacter_fewer`, and that is what is compared.
- `barrier_cached`: the same with the prefix cache.

All have the same engine settings, lengths and sampling, and no seeds.

Figures: `<way>_tokens_per_s` (generated tokens), `ratio_to_barrier`, `ratio_to_barrier_cached`,
`prefix_hit_rate` (cached prompt tokens over prompt tokens; also of each side, the first speaks
first), `roofline_fraction` (of the bound in `engines.roofline`), and seconds that `generate` takes
before its first request and after its last reply.

Run: python benchmarks/interaction.py --out benchmarks/results
     python benchmarks/interaction.py --out benchmarks/results --sweep   (settings of the engine)
     python benchmarks/interaction.py --out /tmp/results --tiny          (on a CPU)
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
from opencharacter.introspection.interaction import view
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
    """The system prompt of each kind of conversation."""
    size = settings["system_tokens"]
    return {kind: system(engines.words(random.Random(kind), size, settings)) for kind in KINDS}


def workload(settings: Settings, repeat: str, count: int, turns: int) -> list[Row]:
    """Rows of one repeat: their lengths are the same in every repeat, their greetings are not."""
    limits = [settings[f"reply_{name}"] for name in ("mean", "low", "high")]
    drawn = random.Random("lengths")
    draw = random.Random(f"greetings/{repeat}")
    return [
        {
            "id": f"{at:06}",
            "kind": KINDS[at % 2],
            "lines": [engines.words(draw, settings["greeting_tokens"], settings) for _ in range(2)],
            "lengths": engines.lengths(drawn, settings["turns"], *limits)[:turns],
        }
        for at in range(count)
    ]


# -------------------------------------------------------------------------------------- the ways


async def converse(
    row: Row, talk: Conversation, heads: dict[str, Message], sampling: dict[str, Any]
) -> Row:
    """The package's row function: as `interact`, but with replies of given lengths."""
    began, lines, replies = time.time(), list(row["lines"]), []
    for length in row["lengths"]:
        heard = view(lines, side=len(lines) % 2)
        drawn = Sampling(max_tokens=length, **sampling)
        replies.append(await talk.reply([heads[row["kind"]], *heard], drawn))
        lines.append(replies[-1].text)
    sides = (replies[0::2], replies[1::2])
    return {
        "messages": view(lines, side=(len(lines) - 1) % 2),
        "tokens_by_side": [sum(r.tokens_in for r in side) for side in sides],
        "cached_by_side": [sum(r.cached_tokens for r in side) for side in sides],
        **engines.observed(began, replies),
    }


def opencharacter(settings: Settings) -> Iterator[Run]:
    """The package's path, with all conversations and, if the barrier gets fewer, with as few."""
    sizes = dict.fromkeys(settings["series"], settings["conversations"])
    if settings["barrier_conversations"] != settings["conversations"] and len(sizes) == 1:
        sizes["opencharacter_fewer"] = settings["barrier_conversations"]

    def once(series: str, repeat: str, count: int, turns: int) -> Run:
        rows = workload(settings, f"{series} {repeat}", count, turns)
        drawn = engines.sampling_of(settings, series)
        talk = partial(converse, heads=heads(settings), sampling=drawn)
        with tempfile.TemporaryDirectory() as storage:
            job = engines.make_job(settings, STAGE, Path(storage), series)
            run, table = engines.run_package(job, rows, talk, FIELDS, series)
        return run | by_side(table)

    with engines.ray_running(settings):
        once("warm-up", "", settings["warmup"], 2)
        for repeat in range(settings["repeats"]):
            for series, count in sizes.items():
                yield once(series, str(repeat), count, settings["turns"])


def by_side(table: pa.Table) -> Run:
    """Prompt tokens, and the cached ones among them, of each side."""
    return {
        name: [sum(row[at] for row in table[name].to_pylist()) for at in range(len(SIDES))]
        for name in ("tokens_by_side", "cached_by_side")
    }


def barrier(settings: Settings) -> Iterator[Run]:
    """One call a turn, without prefix cache."""
    return run_barrier(settings, "barrier", False, settings["barrier_conversations"])


def barrier_cached(settings: Settings) -> Iterator[Run]:
    """One call a turn, with prefix cache."""
    return run_barrier(settings, "barrier_cached", True, settings["conversations"])


def run_barrier(settings: Settings, series: str, prefix_caching: bool, count: int) -> Iterator[Run]:
    """Repeats of one offline engine, after a warm-up."""
    llm = engines.offline_engine(settings, prefix_caching)

    def once(repeat: str, count: int, turns: int) -> Run:
        rows = workload(settings, f"{series} {repeat}", count, turns)
        began = time.time()
        tokens = sum(turn_of_all(llm, settings, rows, turn) for turn in range(turns))
        return {"series": series, "seconds": time.time() - began, "rows": count, "tokens": tokens}

    once("warm-up", settings["warmup"], 2)
    for repeat in range(settings["repeats"]):
        yield once(str(repeat), count, settings["turns"])


def turn_of_all(llm: Any, settings: Settings, rows: list[Row], turn: int) -> int:
    """One reply of every conversation, added to its lines; returns the tokens generated."""
    first = heads(settings)
    tokenizer, side = llm.get_tokenizer(), turn % 2
    prompts = [
        tokenizer.apply_chat_template(
            [first[row["kind"]], *view(row["lines"], side)],
            tokenize=False,
            add_generation_prompt=True,
        )
        for row in rows
    ]
    asked = engines.sampling_parameters(settings, [row["lengths"][turn] for row in rows])
    outputs = [each.outputs[0] for each in llm.generate(prompts, asked, use_tqdm=False)]
    for row, output in zip(rows, outputs, strict=True):
        row["lines"].append(output.text)
    return sum(len(output.token_ids) for output in outputs)


# ---------------------------------------------------------------------------------------- figures


def figures(series: Series, settings: Settings, machine: Machine) -> Figures:
    """All figures that the runs allow."""
    equal = "opencharacter_fewer" if "opencharacter_fewer" in series else SUBJECT
    wanted = {
        "ratio_to_barrier": (equal, "barrier"),
        "ratio_to_barrier_cached": (SUBJECT, "barrier_cached"),
    }
    found = engines.figures(series, settings, machine) | harness.ratios(series, wanted)
    for at, side in enumerate(SIDES):
        rates = [
            run["cached_by_side"][at] / run["tokens_by_side"][at] for run in series.get(SUBJECT, [])
        ]
        if rates:
            found[f"prefix_hit_rate_{side}_side"] = harness.figure(rates)
    return found


BENCHMARK = harness.Benchmark(
    name="interaction",
    script=Path(__file__).resolve(),
    settings=SETTINGS,
    tiny=TINY,
    ways={way.__name__: way for way in (opencharacter, barrier_cached, barrier)},
    figures=figures,
    variants=engines.variants(),
)

if __name__ == "__main__":
    harness.main(BENCHMARK, __doc__ or "")
