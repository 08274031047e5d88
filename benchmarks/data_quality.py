"""How long the signatures and near-duplicates of a set of transcripts take, and in what memory.

Self-conversations of ten turns with words drawn by Zipf's law, a known share of them repeated with
a changed ending, go through what the stage `introspection/transcripts` does at its end, at three
sizes, each in a process of its own.

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
from opencharacter.runtime.stage import texts
from opencharacter.runtime.store import Store
from opencharacter.text.statistics import TextBaseline, measure, near_duplicates

TURNS = 10
WORDS_A_TURN = 115
"""About 150 tokens."""
VOCABULARY = 30_000
REPEATED = 0.1
"""Share of transcripts that repeat an earlier one but for the last words of each turn."""
BATCH = 1000


def turn(draw: np.random.Generator, vocabulary: np.ndarray) -> str:
    ranks = np.minimum(draw.zipf(1.2, WORDS_A_TURN), VOCABULARY) - 1
    return " ".join(vocabulary[ranks]) + "."


def transcripts(count: int) -> Iterator[dict[str, Any]]:
    """Rows of the stage; the tenth of each ten repeats the first."""
    draw = np.random.default_rng(0)
    vocabulary = np.array([f"word{i}" for i in range(VOCABULARY)])
    first: list[str] = []
    for i in range(count):
        if i % 10 == 9:
            said = [text.rsplit(" ", 5)[0] + " and so on it goes." for text in first]
        else:
            said = [turn(draw, vocabulary) for _ in range(TURNS)]
            first = said if i % 10 == 0 else first
        roles = ["user", "assistant"] * (TURNS // 2)
        messages = [{"role": "system", "content": "Another instance of you."}]
        messages += [{"role": r, "content": t} for r, t in zip(roles, said, strict=True)]
        yield {"id": f"{i:08}", "kind": "free", "messages": messages, "drop_reason": None}


def tables_of(count: int) -> Iterator[pa.Table]:
    """The rows, a batch at a time."""
    rows = transcripts(count)
    while batch := [row for _, row in zip(range(BATCH), rows, strict=False)]:
        yield pa.Table.from_pylist(batch, schema=SCHEMA)


def one_size(count: int) -> dict[str, float]:
    """Seconds of both measures over one file, the share found, and the process's peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        store.write_tables("made", tables_of(count), SCHEMA)
        began = time.monotonic()
        measured = measure(texts(store.scan("made", BATCH)), TextBaseline(language="en"))
        between = time.monotonic()
        repeated = sum(near_duplicates(texts(store.scan("made", BATCH)))) / measured["texts"]
        ended = time.monotonic()
    return {
        "signatures_s": between - began,
        "near_duplicates_s": ended - between,
        "total_s": ended - began,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "near_duplicates_found": repeated / REPEATED,
    }


def in_a_process(count: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_200, 12_000, 120_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.one:
        print(json.dumps(one_size(chosen.one)))
        return
    figures = {}
    for size in chosen.sizes:
        runs = [in_a_process(size) for _ in range(chosen.repeats)]
        for name in runs[0]:
            figures[f"{name}_{size}"] = figure([run[name] for run in runs])
        print(size, {name: round(runs[0][name], 2) for name in runs[0]})
    settings = {"turns": TURNS, "words_a_turn": WORDS_A_TURN, "vocabulary": VOCABULARY}
    with tempfile.TemporaryDirectory() as folder:
        machine = measure_machine(Path(folder), seconds=120)
    chosen.out.mkdir(parents=True, exist_ok=True)
    write_result(chosen.out, "data_quality", machine, settings, figures, errors={})


if __name__ == "__main__":
    main()
