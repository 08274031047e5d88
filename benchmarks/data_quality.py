"""Benchmark of the text statistics and near-duplicate detection: time and memory.

It runs the final checks of the stage `introspection/transcripts` on synthetic self-conversations of
ten turns, whose words follow Zipf's law. A known share of them repeats an earlier one with changed
endings. Each of three sizes runs in its own process.

Run: python benchmarks/data_quality.py --out benchmarks/results [--sizes 1200 12000 120000]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from harness import figure, measure_machine, write_result

from opencharacter.introspection.transcripts import SCHEMA
from opencharacter.runtime.stage import texts as written_texts
from opencharacter.runtime.store import Store
from opencharacter.text.statistics import TextBaseline, measure, near_duplicates

TURNS = 10
WORDS_PER_TURN = 115
"""About 150 tokens."""
VOCABULARY = 30_000
REPEATED_SHARE = 0.1
"""Share of transcripts that repeat an earlier one except for the last words of each turn."""
BATCH = 1000


def random_turn(rng: np.random.Generator, vocabulary: np.ndarray) -> str:
    """Return one turn of random words."""
    ranks = np.minimum(rng.zipf(1.2, WORDS_PER_TURN), VOCABULARY) - 1
    return " ".join(vocabulary[ranks]) + "."


def transcripts(count: int) -> Iterator[dict[str, Any]]:
    """Yield rows of the stage; of every ten, the last repeats the first."""
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"word{i}" for i in range(VOCABULARY)])
    first: list[str] = []
    for i in range(count):
        if i % 10 == 9:
            texts = [text.rsplit(" ", 5)[0] + " and so on it goes." for text in first]
        else:
            texts = [random_turn(rng, vocabulary) for _ in range(TURNS)]
            first = texts if i % 10 == 0 else first
        roles = ["user", "assistant"] * (TURNS // 2)
        messages = [{"role": "system", "content": "Another instance of you."}]
        messages += [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        yield {"id": f"{i:08}", "kind": "free", "messages": messages, "drop_reason": None}


def tables_of(count: int) -> Iterator[pa.Table]:
    """Yield the rows as tables of `BATCH` rows."""
    rows = transcripts(count)
    while batch := [row for _, row in zip(range(BATCH), rows, strict=False)]:
        yield pa.Table.from_pylist(batch, schema=SCHEMA)


def measure_size(count: int) -> dict[str, float]:
    """Measure one size: seconds of both checks, share of repeats found, and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        store.write_tables("transcripts", tables_of(count), SCHEMA)
        start = time.monotonic()
        texts = written_texts(store.scan("transcripts", BATCH))
        num_texts = measure(texts, TextBaseline(language="en"))["texts"]
        between = time.monotonic()
        repeated = sum(near_duplicates(written_texts(store.scan("transcripts", BATCH))))
        end = time.monotonic()
    return {
        "text_statistics_s": between - start,
        "near_duplicates_s": end - between,
        "total_s": end - start,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "near_duplicates_found": repeated / num_texts / REPEATED_SHARE,
    }


def run_in_process(count: int) -> dict[str, float]:
    """Run `measure_size` in a new process, so that peak memory is that of one size."""
    command = [sys.executable, __file__, "--size", str(count)]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(process.stdout)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_200, 12_000, 120_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.size:
        print(json.dumps(measure_size(options.size)))
        return
    figures = {}
    for size in options.sizes:
        runs = [run_in_process(size) for _ in range(options.repeats)]
        for name in runs[0]:
            figures[f"{name}_{size}"] = figure([run[name] for run in runs])
        print(size, {name: round(runs[0][name], 2) for name in runs[0]})
    settings = {"turns": TURNS, "words_per_turn": WORDS_PER_TURN, "vocabulary": VOCABULARY}
    with tempfile.TemporaryDirectory() as folder:
        machine = measure_machine(Path(folder), seconds=120)
    options.out.mkdir(parents=True, exist_ok=True)
    write_result(options.out, "data_quality", machine, settings, figures, errors={})


if __name__ == "__main__":
    main()
