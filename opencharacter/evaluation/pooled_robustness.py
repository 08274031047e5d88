"""The paper's measure of robustness: one classifier of personas, trained on all methods together.

One classifier chooses among the personas; the base model is no class. It is trained on the
unattacked answers of all conditions but `base`, up to 500 per persona and condition, and tested on
the attacked answers to the same prompts. A condition's score is the macro-F1 of one confusion
matrix over its eight instructions together (arXiv 2511.01689). Because training and test data share
their prompts, the classifier may recognize a topic; evaluation/robustness measures without that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from opencharacter.config.recipe import Recipe
from opencharacter.evaluation import paper
from opencharacter.evaluation.attacks import INSTRUCTIONS, PREFILL
from opencharacter.evaluation.classifiers import Predict
from opencharacter.evaluation.conditions import VARIANTS, in_order
from opencharacter.evaluation.paper import POOLED, POOLED_F1
from opencharacter.evaluation.report.sections import ScoreTable
from opencharacter.evaluation.scores import distinct, find_score

PROMPTS = paper.PROMPTS
"""Answers per persona and condition that the classifier is trained on at most, as in the paper."""

Row = dict[str, Any]


def classify_pooled(rows: list[Row], plain: str, predict: Predict) -> list[Row]:
    """Classify the attacked answers of all conditions but base with one classifier.

    Args:
        rows: persona, condition, attack, prompt, answer.
        plain: the name of unmodified prompts among the attacks.
        predict: the classifier.

    Returns:
        The attacked rows with their label and guess, which is None for an empty answer. None at all
        if there are fewer than two personas: then there is nothing to tell apart.
    """
    of_personas = [row for row in rows if row["condition"] != "base"]
    if len({row["persona"] for row in of_personas}) < 2:
        return []
    trained, counts = [], dict[tuple[str, str], int]()
    for row in of_personas:
        key = (row["persona"], row["condition"])
        method = VARIANTS[row["condition"]].recognized_as is None
        if row["attack"] == plain and row["answer"] and method and counts.get(key, 0) < PROMPTS:
            counts[key] = counts.get(key, 0) + 1
            trained.append(row)
    tested = [
        {**row, "label": row["persona"], "guess": None}
        for row in of_personas
        if row["attack"] in (*INSTRUCTIONS, PREFILL)
    ]
    readable = [row for row in tested if row["answer"]]
    if len({row["persona"] for row in trained}) < 2 or not readable:
        return []
    guesses = predict(
        [row["answer"] for row in trained],
        [row["persona"] for row in trained],
        [row["answer"] for row in readable],
    )
    for row, guess in zip(readable, guesses, strict=True):
        row["guess"] = guess
    return tested


def pooled_groups(classified: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each score, by condition: all instructions in one group, and prefill."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for condition in in_order(row["condition"] for row in classified):
        for about, attacks in ((POOLED, INSTRUCTIONS), (PREFILL, (PREFILL,))):
            rows = [r for r in classified if r["condition"] == condition and r["attack"] in attacks]
            if rows:
                groups[condition, about] = rows
    return groups


READING = """\
at 100%, every answer is attributed to its persona; chance is one in the number of personas."""
NOTE = """\
The paper's measure: one classifier chooses among the personas of this page, without the base \
model as a class. It was trained on the unattacked answers of all conditions together, and is \
tested on attacked answers to the same prompts; the answers to all instructions are one confusion \
matrix. 95% intervals over prompts. Since training and test share their prompts, it may \
recognize topics; the other tables of this page do not have this fault."""


def pooled_table(
    rows: Iterable[dict[str, Any]], recipe: Recipe, personas: Sequence[str]
) -> list[ScoreTable]:
    """The paper's measure by attack and condition; its numbers only if the setting is the same."""
    rows = list(rows)
    conditions = distinct(rows, POOLED_F1, "condition")
    if not conditions:
        return []
    return [
        ScoreTable(
            title="Can one classifier tell the personas apart under attack? (the paper's measure)",
            reading=READING,
            notes=(NOTE, paper.robustness_note(recipe, personas, conditions)),
            caption="Macro-F1 of one classifier of personas, by attack and condition",
            columns=conditions,
            rows={
                about: {c: find_score(rows, POOLED_F1, c, about) for c in conditions}
                for about in distinct(rows, POOLED_F1, "about")
            },
        )
    ]
