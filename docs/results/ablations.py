"""Prints what SFT on different texts adds to the same DPO adapter.

Each storage is a copy of a run after DPO, in which introspection was made in another way. All have
the same student after DPO (`distilled`), which each of them measured again with other rounding, so
its long conversations are averaged over all storages.

Run: python docs/results/ablations.py RECIPE NAME=STORAGE NAME=STORAGE...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from character_tables import FIRST, LAST, mean, mean_known, paired_change
from side_by_side import CHANGE, PAIRED, conversation_thirds, paired_rows
from stored import DISTILLED, FULL, Cells, StoredRun, grid, joined, open_run, table
from tables import digest

from opencharacter.errors import UserError
from opencharacter.evaluation.scores import Score

AGAINST = "last third, against distilled"
SHARED = "distillation/dpo"
Thirds = tuple[float | None, float | None]


def compare(runs: Mapping[str, StoredRun]) -> str:
    """The tables of all runs, as Markdown.

    Args:
        runs: by name; changes of single answers are from the first to each other run.

    Raises:
        UserError: if the runs do not share one persona and its DPO adapter.
    """
    personas = {name for run in runs.values() for name in run.names}
    if len(personas) != 1:
        raise UserError(f"the storages have the personas {', '.join(sorted(personas))}; give one's")
    (persona,) = personas
    made = {manifest_of(run, persona, SHARED)["finished"] for run in runs.values()}
    if len(made) != 1:
        raise UserError("the runs have several DPO adapters; give copies of one run")
    return joined(
        training_table(runs, persona),
        conversation_table(runs, persona),
        answer_table(runs, persona),
    )


def manifest_of(run: StoredRun, persona: str, stage: str) -> Mapping[str, Any]:
    """The manifest of a persona's stage."""
    jobs = (job for job in run.jobs if job.stage.name == stage and job.constitution)
    job = next(job for job in jobs if job.persona.name == persona)
    return run.manifests[job.dataset]


def training_table(runs: Mapping[str, StoredRun], persona: str) -> str:
    """What each run was trained on."""
    rows = []
    for name, run in runs.items():
        texts = manifest_of(run, persona, "introspection/transcripts")
        trained = manifest_of(run, persona, "introspection/sft")
        manifests = run.manifests.values()
        rows.append(
            [
                name,
                f"{trained['rows']:,}",
                f"{texts['figures']['trained_tokens']:,}",
                f"{len(manifests)}, {digest(manifests)}",
            ]
        )
    return grid(["run", "transcripts", "tokens with a loss", "datasets, digest"], rows)


def conversation_table(runs: Mapping[str, StoredRun], persona: str) -> str:
    """How much of long conversations a classifier recognizes, by run."""
    distilled = [conversation_thirds(run, persona, DISTILLED) for run in runs.values()]
    before = averaged(distilled)
    cells: dict[str, Cells] = {f"`{DISTILLED}`, mean of {len(distilled)}": levels(before)}
    for name, run in runs.items():
        after = conversation_thirds(run, persona, FULL)
        shared = sorted(before.keys() & after.keys())
        last = ([side[at][1] for at in shared] for side in (before, after))
        cells[name] = levels(after) | {AGAINST: paired_change(*last)}
    caption = (
        f"Share of {persona}'s replies in long conversations that a classifier takes for the "
        "persona's; changes are paired by conversation, in percentage points."
    )
    return table(caption, cells, [FIRST, LAST, AGAINST], f"`{FULL}` after SFT on")


def levels(conversations: Mapping[str, Thirds]) -> dict[str, Score | None]:
    """The mean over conversations of each third."""
    first, last = zip(*conversations.values(), strict=True)
    return {FIRST: mean_known(first), LAST: mean_known(last)}


def averaged(sides: Sequence[Mapping[str, Thirds]]) -> dict[str, Thirds]:
    """The mean thirds of each conversation over several measurements of it."""
    shared = set.intersection(*(set(side) for side in sides))

    def known(conversation: str, third: int) -> list[float]:
        return [v for side in sides if (v := side[conversation][third]) is not None]

    return {at: (mean(known(at, 0)), mean(known(at, 1))) for at in sorted(shared)}


def answer_table(runs: Mapping[str, StoredRun], persona: str) -> str:
    """The paired changes of single answers from the first run to each other run."""
    first, *others = runs
    cells: dict[str, dict[str, Score | None]] = {}
    for pairing in PAIRED:
        for name in others:
            rows = paired_rows(pairing, (runs[first], runs[name]), persona, FULL)
            for title, row in rows.items():
                measure = title.removesuffix(f", {persona}")
                cells.setdefault(measure, {})[name] = row[CHANGE]
    caption = f"`{FULL}` in single answers, against {first}, in percentage points."
    return table(caption, cells, others, "measure")


def main() -> None:
    """Read the command line, and print the tables."""
    parser = argparse.ArgumentParser(description="Print what SFT on different texts adds to DPO.")
    parser.add_argument("recipe", help="a recipe with the student's name")
    parser.add_argument("storages", nargs="+", help="each as NAME=PATH or NAME=URL")
    arguments = parser.parse_args()
    named = (argument.partition("=") for argument in arguments.storages)
    try:
        print(compare({name: open_run(where, arguments.recipe) for name, _, where in named}))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
