"""Prints the scores of two runs beside each other, for instance with two kinds of training weights.

Assertions and side effects are paired: both runs answer the same scenarios and prompts, if their
recipes differ in training alone. Other scores stand beside each other with their own intervals.

Run: python docs/results/side_by_side.py RECIPE STORAGE STORAGE
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from stored import BASE, FULL, Cells, StoredRun, changed, joined, open_run, table

from opencharacter.errors import UserError
from opencharacter.evaluation import adherence, robustness, side_effects
from opencharacter.evaluation.conditions import kept_rows
from opencharacter.evaluation.scores import Score

Row = dict[str, Any]

FIRST, SECOND, CHANGE = "first run", "second run", "second against first"
UNPAIRED = {
    "distinguished from base": ("discriminability", FULL, robustness.DEFAULT),
    "recognized, all instructions": ("retention", FULL, robustness.MEAN),
    "recognized after a prefill": ("retention", FULL, robustness.PREFILL),
    "wins against base": ("win_rate", FULL, BASE),
}
"""Rows without a paired change: measure, condition and about."""


def compare(first: StoredRun, second: StoredRun) -> str:
    """The full personas that both runs have, as Markdown.

    Raises:
        UserError: if there are none.
    """
    shared = [name for name in first.names if name in second.names]
    if not shared:
        raise UserError("the runs share no persona; give storages of the same constitution")
    cells: dict[str, Cells] = {}
    for name in shared:
        cells |= adherence_rows(first, second, name)
        cells |= side_effect_rows(first, second, name)
        for title, key in UNPAIRED.items():
            scores = (run.find(name, *key) for run in (first, second))
            cells[f"{title}, {name}"] = dict(zip((FIRST, SECOND), scores, strict=True))
    caption = (
        "The full persona of two runs. Changes are paired by scenario or prompt, in percentage "
        "points."
    )
    return joined(
        *(f"{name}: {run.recipe.name}" for name, run in ((FIRST, first), (SECOND, second))),
        table(caption, cells, [FIRST, SECOND, CHANGE], "measure"),
    )


def rows_of(runs: tuple[StoredRun, StoredRun], stage: str, persona: str) -> list[list[Row]] | None:
    """The rows of a stage in both runs; None if a run lacks them."""
    jobs = [run.finished(stage).get(persona) for run in runs]
    return [kept_rows(job) for job in jobs if job] if all(jobs) else None


def adherence_rows(first: StoredRun, second: StoredRun, persona: str) -> dict[str, Cells]:
    """The presence of all assertions, with an occasion and under pressure."""
    names = {adherence.OCCASION: "assertions shown", adherence.PRESSURE: "shown under pressure"}
    rows = rows_of((first, second), "evaluation/adherence", persona)
    cells: dict[str, Cells] = {}
    for kind, name in names.items() if rows else ():
        before, after = (adherence.of(side, FULL, kind) for side in rows or ())
        cells[f"{name}, {persona}"] = row(
            adherence.all_present(before),
            adherence.all_present(after),
            adherence.all_changed(before, after),
        )
    return cells


def side_effect_rows(first: StoredRun, second: StoredRun, persona: str) -> dict[str, Cells]:
    """The share of answers with each unwanted property."""
    rows = rows_of((first, second), "evaluation/side_effects", persona)
    cells: dict[str, Cells] = {}
    for name, prompts in side_effects.SETS.items() if rows else ():
        before, after = (side_effects.of(side, name, FULL) for side in rows or ())
        cells[f"{prompts.title}, {persona}"] = row(
            side_effects.level(before),
            side_effects.level(after),
            side_effects.change(before, after),
        )
    return cells


def row(before: Score, after: Score, moved: Score) -> Cells:
    """The cells of a paired row."""
    return {FIRST: before, SECOND: after, CHANGE: changed(moved)}


def main() -> None:
    """Read the command line, and print the table."""
    parser = argparse.ArgumentParser(description="Print the scores of two runs side by side.")
    parser.add_argument("recipe", help="a recipe with the student's name")
    parser.add_argument("storages", nargs=2, help="paths or URLs of two storages")
    arguments = parser.parse_args()
    try:
        first, second = (open_run(storage, arguments.recipe) for storage in arguments.storages)
        print(compare(first, second))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
