"""The paper's measure of robustness: one classifier of personas, trained on all methods together.

One classifier chooses among the personas; the base model is no class. It is trained on the
unattacked answers of all conditions but `base`, up to 500 per persona and condition, and tested on
the attacked answers to the same prompts. A condition's score is the macro-F1 of one confusion
matrix over its eight instructions together (arXiv 2511.01689). Because training and test data share
their prompts, the classifier may recognize a topic; evaluation/robustness measures without that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from opencharacter.config.recipe import Recipe
from opencharacter.evaluation.attacks import INSTRUCTIONS, PREFILL
from opencharacter.evaluation.conditions import VARIANTS, in_order
from opencharacter.evaluation.report.sections import ScoreTable
from opencharacter.evaluation.scores import distinct, find_score

MEASURE = "macro_f1_pooled"
POOLED = "all instructions, pooled"
METHODS = ("prompted", "steered", "distilled", "full")
"""The conditions of the paper."""
PERSONAS = 11
PROMPTS = 500
"""Answers per persona and condition that the classifier is trained on at most, as in the paper."""
CLASSIFIER = "answerdotai/ModernBERT-base"
STUDENTS = {
    "meta-llama/Llama-3.1-8B-Instruct": 0,
    "Qwen/Qwen2.5-7B-Instruct": 1,
    "google/gemma-3-4b-it": 2,
}
"""The paper's students, and their positions in `PAPER`."""
PAPER = {
    ("prompted", POOLED): (0.374, 0.195, 0.629),
    ("steered", POOLED): (0.931, 0.262, 0.786),
    ("distilled", POOLED): (0.812, 0.745, 0.833),
    ("full", POOLED): (0.874, 0.793, 0.929),
    ("distilled", PREFILL): (0.79, 0.66, 0.84),
    ("full", PREFILL): (0.95, 0.86, 0.95),
}
"""Macro-F1 in the paper by condition and attack: Llama-3.1-8B, Qwen-2.5-7B, Gemma-3-4B."""

Row = dict[str, Any]


def classify_pooled(
    rows: list[Row],
    plain: str,
    predict: Callable[[list[str], list[str], list[str]], list[str]],
) -> list[Row]:
    """Classify the attacked answers of all conditions but base with one classifier.

    Args:
        rows: persona, condition, attack, prompt, answer.
        plain: the name of unmodified prompts among the attacks.
        predict: the classifier: training texts, their labels and test texts in; labels out.

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


def setting_differences(recipe: Recipe, personas: int) -> list[str]:
    """What differs from the setting in which the paper measured; empty if nothing does."""
    evaluation = recipe.evaluation
    conditions = set(evaluation.answers.conditions) - {"base"}
    checks = {
        f"{personas} personas instead of {PERSONAS}": personas == PERSONAS,
        f"the student {recipe.roles.student.model}": recipe.roles.student.model in STUDENTS,
        f"the conditions {', '.join(in_order(conditions))} instead of {', '.join(METHODS)}": (
            conditions == set(METHODS)
        ),
        f"the classifier {evaluation.robustness.classifier}": (
            evaluation.robustness.classifier == CLASSIFIER
        ),
        f"{evaluation.attacks.prompts} attacked prompts instead of {PROMPTS}": (
            evaluation.attacks.prompts == PROMPTS
        ),
        f"{evaluation.answers.count} prompts instead of {PROMPTS}": (
            evaluation.answers.count == PROMPTS
        ),
        f"prompts from {evaluation.answers.prompts} instead of Pure-Dove": (
            "pure-dove" in evaluation.answers.prompts.lower()
        ),
    }
    return [difference for difference, same in checks.items() if not same]


READING = """\
at 100%, every answer is attributed to its persona; chance is one in the number of personas."""
NOTE = """\
The paper's measure: one classifier chooses among the personas of this page, without the base \
model as a class. It was trained on the unattacked answers of all conditions together, and is \
tested on attacked answers to the same prompts; the answers to all instructions are one confusion \
matrix. 95% bootstrap intervals over prompts. Since training and test share their prompts, it may \
recognize topics; the other tables of this page do not have this fault."""


def pooled_table(rows: Iterable[dict[str, Any]], recipe: Recipe, personas: int) -> list[ScoreTable]:
    """The paper's measure by attack and condition; its numbers only if the setting is the same."""
    rows = list(rows)
    conditions = distinct(rows, MEASURE, "condition")
    if not conditions:
        return []
    return [
        ScoreTable(
            title="Can one classifier tell the personas apart under attack? (the paper's measure)",
            reading=READING,
            notes=(NOTE, paper_note(recipe, personas, conditions)),
            caption="Macro-F1 of one classifier of personas, by attack and condition",
            columns=conditions,
            rows={
                about: {c: find_score(rows, MEASURE, c, about) for c in conditions}
                for about in distinct(rows, MEASURE, "about")
            },
        )
    ]


def paper_note(recipe: Recipe, personas: int, conditions: list[str]) -> str:
    """The paper's numbers of the same student, or why there are none to compare with."""
    differences = setting_differences(recipe, personas)
    if differences:
        return f"The paper's numbers are not comparable: this run has {'; '.join(differences)}."
    position = STUDENTS[recipe.roles.student.model]
    numbers = (
        f"{condition}, {about}: {PAPER[condition, about][position]:.2f}"
        for condition, about in PAPER
        if condition in conditions
    )
    return f"In the paper, with the same student and setting: {'; '.join(numbers)}."
