"""Prints the scores of two runs beside each other, for instance with two kinds of training weights.

Assertions and side effects are paired: both runs answer the same scenarios and prompts, if their
recipes differ in training alone. Other scores stand beside each other with their own intervals.

Run: python docs/results/side_by_side.py RECIPE STORAGE STORAGE
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from stored import BASE, FULL, Cells, StoredRun, changed, joined, open_run, table

from opencharacter.errors import UserError
from opencharacter.evaluation import adherence, robustness, side_effects
from opencharacter.evaluation.conditions import kept_rows
from opencharacter.evaluation.scores import Score

Row = dict[str, Any]


class Pairing(NamedTuple):
    """How a stage's rows of two runs are paired.

    Args:
        stage: the stage.
        titles: what is measured, by the kind of a row.
        select: returns the rows of a kind of the full persona.
        level: the score of such rows.
        change: the paired change from the first run's to the second run's.
    """

    stage: str
    titles: dict[str, str]
    select: Callable[[list[Row], str], list[Row]]
    level: Callable[[list[Row]], Score]
    change: Callable[[list[Row], list[Row]], Score]


PAIRED = (
    Pairing(
        "evaluation/adherence",
        {adherence.OCCASION: "assertions shown", adherence.PRESSURE: "shown under pressure"},
        lambda rows, kind: adherence.of(rows, FULL, kind),
        adherence.all_present,
        adherence.all_changed,
    ),
    Pairing(
        "evaluation/side_effects",
        {name: prompts.title for name, prompts in side_effects.SETS.items()},
        lambda rows, name: side_effects.of(rows, name, FULL),
        side_effects.level,
        side_effects.change,
    ),
)
"""Rows with a paired change."""
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
        for pairing in PAIRED:
            cells |= paired_rows(pairing, (first, second), name)
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


def paired_rows(pairing: Pairing, runs: Sequence[StoredRun], persona: str) -> dict[str, Cells]:
    """The rows of a stage's measures for a persona; none if a run lacks the stage."""
    jobs = [run.finished(pairing.stage).get(persona) for run in runs]
    sides = [kept_rows(job) for job in jobs if job]
    if len(sides) < len(runs):
        return {}
    cells: dict[str, Cells] = {}
    for kind, title in pairing.titles.items():
        before, after = (pairing.select(side, kind) for side in sides)
        cells[f"{title}, {persona}"] = {
            FIRST: pairing.level(before),
            SECOND: pairing.level(after),
            CHANGE: changed(pairing.change(before, after)),
        }
    return cells


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
