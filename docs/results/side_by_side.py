"""Prints the scores of two runs beside each other, for instance with two kinds of training weights.

Assertions, side effects and long conversations are paired: both runs answer the same scenarios and
prompts, if their recipes differ in training alone. Other scores stand beside each other with their
own intervals. What both runs train alike (the condition `distilled`, if they differ in
introspection) shows how much two trainings on the same data differ.

Run: python docs/results/side_by_side.py RECIPE STORAGE STORAGE
     python docs/results/side_by_side.py RECIPE STORAGE STORAGE --condition distilled
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from character_tables import FIRST as FIRST_THIRD
from character_tables import LAST as LAST_THIRD
from character_tables import mean_known, paired_change, third_means
from stored import BASE, FULL, Cells, StoredRun, changed, joined, open_run, table
from tables import digest

from opencharacter.errors import UserError
from opencharacter.evaluation import adherence, drift_report, robustness, side_effects
from opencharacter.evaluation.conditions import kept_rows
from opencharacter.evaluation.scores import Score

Row = dict[str, Any]


class Pairing(NamedTuple):
    """How a stage's rows of two runs are paired.

    Args:
        stage: the stage.
        titles: what is measured, by the kind of a row.
        select: returns the rows of a kind and condition.
        level: the score of such rows.
        change: the paired change from the first run's to the second run's.
    """

    stage: str
    titles: dict[str, str]
    select: Callable[[list[Row], str, str], list[Row]]
    level: Callable[[list[Row]], Score]
    change: Callable[[list[Row], list[Row]], Score]


PAIRED = (
    Pairing(
        "evaluation/adherence",
        {adherence.OCCASION: "assertions shown", adherence.PRESSURE: "shown under pressure"},
        lambda rows, kind, condition: adherence.of(rows, condition, kind),
        adherence.all_present,
        adherence.all_changed,
    ),
    Pairing(
        "evaluation/side_effects",
        {name: prompts.title for name, prompts in side_effects.SETS.items()},
        lambda rows, name, condition: side_effects.of(rows, name, condition),
        side_effects.level,
        side_effects.change,
    ),
)
"""Rows with a paired change."""
FIRST, SECOND, CHANGE = "first run", "second run", "second against first"
UNPAIRED = {
    "distinguished from base": ("discriminability", robustness.DEFAULT),
    "recognized, all instructions": ("retention", robustness.MEAN),
    "recognized after a prefill": ("retention", robustness.PREFILL),
    "wins against base": ("win_rate", BASE),
}
"""Rows without a paired change: measure and about."""


def compare(first: StoredRun, second: StoredRun, condition: str = FULL) -> str:
    """The personas that both runs have, as Markdown.

    Args:
        first: a run.
        second: the run that is compared with it.
        condition: the condition whose scores are shown.

    Raises:
        UserError: if there are none.
    """
    shared = [name for name in first.names if name in second.names]
    if not shared:
        raise UserError("the runs share no persona; give storages of the same constitution")
    cells: dict[str, Cells] = {}
    for name in shared:
        for pairing in PAIRED:
            cells |= paired_rows(pairing, (first, second), name, condition)
        cells |= drift_rows((first, second), name, condition)
        for title, (measure, about) in UNPAIRED.items():
            scores = (run.find(name, measure, condition, about) for run in (first, second))
            cells[f"{title}, {name}"] = dict(zip((FIRST, SECOND), scores, strict=True))
    caption = (
        f"`{condition}` in two runs. Changes are paired by what was answered, in percentage points."
    )
    return joined(
        *(
            f"{name}: {run.recipe.name}, {len(run.manifests)} datasets, digest "
            f"{digest(run.manifests.values())}"
            for name, run in ((FIRST, first), (SECOND, second))
        ),
        table(caption, cells, [FIRST, SECOND, CHANGE], "measure"),
    )


def paired_rows(
    pairing: Pairing, runs: Sequence[StoredRun], persona: str, condition: str
) -> dict[str, Cells]:
    """The rows of a stage's measures for a persona; none if a run lacks the stage."""
    jobs = [run.finished(pairing.stage).get(persona) for run in runs]
    sides = [kept_rows(job) for job in jobs if job]
    if len(sides) < len(runs):
        return {}
    cells: dict[str, Cells] = {}
    for kind, title in pairing.titles.items():
        before, after = (pairing.select(side, kind, condition) for side in sides)
        cells[f"{title}, {persona}"] = {
            FIRST: pairing.level(before),
            SECOND: pairing.level(after),
            CHANGE: changed(pairing.change(before, after)),
        }
    return cells


def drift_rows(runs: Sequence[StoredRun], persona: str, condition: str) -> dict[str, Cells]:
    """How much of long conversations the classifier recognizes, paired by conversation."""
    before, after = (conversation_thirds(run, persona, condition) for run in runs)
    shared = sorted(before.keys() & after.keys())
    cells: dict[str, Cells] = {}
    for part, third in enumerate((FIRST_THIRD, LAST_THIRD)) if shared else ():
        values = [[side[number][part] for number in shared] for side in (before, after)]
        cells[f"recognized in long conversations, {third}, {persona}"] = {
            FIRST: mean_known(values[0]),
            SECOND: mean_known(values[1]),
            CHANGE: paired_change(*values),
        }
    return cells


def conversation_thirds(
    run: StoredRun, persona: str, condition: str
) -> dict[Any, tuple[float | None, float | None]]:
    """The share of replies that the classifier recognizes, by conversation and third of it."""
    job = run.finished("evaluation/drift").get(persona)
    settings = run.recipe.evaluation.drift
    every, turns = settings.pressure_every, settings.turns
    return {
        row["conversation"]: third_means(row, drift_report.CLASSIFIER, every, turns)
        for row in (drift_report.of(kept_rows(job), condition) if job else [])
    }


def main() -> None:
    """Read the command line, and print the table."""
    parser = argparse.ArgumentParser(description="Print the scores of two runs side by side.")
    parser.add_argument("recipe", help="a recipe with the student's name")
    parser.add_argument("storages", nargs=2, help="paths or URLs of two storages")
    parser.add_argument("--condition", default=FULL, help="the condition to compare")
    arguments = parser.parse_args()
    try:
        first, second = (open_run(storage, arguments.recipe) for storage in arguments.storages)
        print(compare(first, second, arguments.condition))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
