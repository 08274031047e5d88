"""Stage evaluation/robustness: does a classifier still recognise the persona under attack?

For each condition a classifier learns the personas of the student, and the student as it came, from
answers to undisturbed prompts, and is tested on answers to other prompts, undisturbed and attacked:
cross-fitted, so that every prompt is tested once by a classifier that never saw it.

Reads: evaluation/answers, evaluation/attacks of all personas. Writes: persona, condition, attack,
prompt, fold, label, guess; scores.
Run: opencharacter run RECIPE --constitution NAME --only evaluation/robustness
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opencharacter.config.recipe import Robustness
from opencharacter.engines.allocation import acquire
from opencharacter.engines.conversations import Row
from opencharacter.errors import StageFailed
from opencharacter.evaluation import classifiers
from opencharacter.evaluation.attacks import INSTRUCTIONS, PREFILL, TASKS
from opencharacter.evaluation.conditions import in_order
from opencharacter.evaluation.scores import SCORES, Score, repeated, score_row, wilson
from opencharacter.runtime.stage import Estimate, Job, ResourceRequest, StageResult
from opencharacter.text.chat import row_id, row_seed
from opencharacter.text.filters import words

BASE = "base"
DEFAULT = "default"
"""The attack that is none."""
MEAN = "all instructions"
"""The mean over the eight instructions, as the paper reports it."""

ORDER = (DEFAULT, *INSTRUCTIONS, PREFILL, *TASKS)

SCHEMA = pa.schema(
    [
        pa.field("persona", pa.string(), nullable=False),
        pa.field("condition", pa.string(), nullable=False),
        pa.field("attack", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("fold", pa.int64(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("guess", pa.string()),
    ]
)


def folds_of(prompts: Iterable[str], folds: int) -> dict[str, int]:
    """A fold for each prompt, by a hash: neither order nor source decides."""
    ordered = sorted(set(map(normal, prompts)), key=row_id)
    return {prompt: n % min(folds, len(ordered)) for n, prompt in enumerate(ordered)}


def normal(prompt: str) -> str:
    """A prompt without what makes no other prompt of it: case, spaces, punctuation."""
    return " ".join(words(prompt))


def check_disjoint(train: Iterable[str], test: Iterable[str]) -> None:
    """Raise StageFailed if a prompt is on both sides: the classifier would know its subject."""
    shared = set(map(normal, train)) & set(map(normal, test))
    if shared:
        raise StageFailed(
            f"{len(shared)} prompts are both learned from and tested, the first {min(shared)!r}"
        )


def label(row: Row) -> str:
    """Whose answer it is."""
    return BASE if row["condition"] == BASE else row["persona"]


LEARNED_FROM = {"blended": "full", "tuned": "full"}
"""Conditions of which is asked whether the persona is still there: the classifier knows it as it
was trained."""

Guess = Callable[[list[str], list[str], list[str]], list[str]]
"""Texts to learn from, their labels, and texts to label."""


def fit_and_guess(train: list[Row], test: list[Row], guess: Guess) -> list[str]:
    """Guesses for test answers by a classifier that learned from the others.

    Raises:
        StageFailed: if a prompt is on both sides.
    """
    check_disjoint((row["prompt"] for row in train), (row["prompt"] for row in test))
    loss_positions, asked = ([row["answer"] for row in rows] for rows in (train, test))
    return guess(loss_positions, [label(row) for row in train], asked)


def guesses(rows: list[Row], condition: str, folds: int, guess: Guess) -> list[Row]:
    """Every answer under one condition, and the base model's, with the label that it was given.

    Args:
        rows: persona, condition, attack, prompt, answer; the base's answers once.
        condition: other than base; see also `LEARNED_FROM`.
        folds: of the cross-fitting.
        guess: the classifier.
    """
    asked = {row["attack"] for row in rows if row["condition"] == condition}
    mine = [r for r in rows if r["condition"] in (BASE, condition) and r["attack"] in asked]
    # Paper: its classifier is tested on the prompts that it learned from.
    fold_of = folds_of((row["prompt"] for row in mine), folds)
    found = [
        {**row, "condition": condition, "label": label(row), "fold": fold_of[normal(row["prompt"])]}
        | {"guess": None}
        for row in mine
    ]
    known = (BASE, LEARNED_FROM.get(condition, condition))
    learnable = [r for r in rows if r["condition"] in known and r["attack"] == DEFAULT]
    usable = [(row, new) for row, new in zip(mine, found, strict=True) if row["answer"]]
    for merge_into_base in sorted(set(fold_of.values())):
        train = [
            r
            for r in learnable
            if r["answer"] and fold_of.get(normal(r["prompt"])) != merge_into_base
        ]
        test = [(r, n) for r, n in usable if n["fold"] == merge_into_base]
        if len({label(row) for row in train}) < 2 or not test:
            continue
        labels = fit_and_guess(train, [row for row, _ in test], guess)
        for (_, new), said in zip(test, labels, strict=True):
            new["guess"] = said
    return found


# ---------------------------------------------------------------------------------------- scores


def confusions(rows: list[Row], labels: Sequence[str]) -> NDArray[np.float64]:
    """(prompts, labels, guesses) counts; what was not guessed counts nowhere."""
    index = {name: i for i, name in enumerate(labels)}
    prompts = {prompt: i for i, prompt in enumerate(sorted({row["prompt"] for row in rows}))}
    counts = np.zeros((len(prompts), len(labels), len(labels)))
    for row in rows:
        if row["guess"] is not None:
            counts[prompts[row["prompt"]], index[row["label"]], index[row["guess"]]] += 1
    return counts


def macro_f1(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean F1 over the labels that occur, of (..., labels, guesses) counts."""
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    given, said = counts.sum(-1), counts.sum(-2)
    f1 = np.divide(2 * right, given + said, out=np.zeros_like(right), where=given + said > 0)
    there = given > 0
    return (f1 * there).sum(-1) / np.maximum(there.sum(-1), 1)


def f1_score(parts: list[list[Row]], labels: Sequence[str], resamples: int, seed: int) -> Score:
    """Macro-F1, or its mean over several attacks, with a 95 % percentile bootstrap over prompts.

    Args:
        parts: the guesses of each attack, on the same prompts.
        labels: all that occur.
        resamples: of the bootstrap.
        seed: of its draws.
    """
    rows = [row for part in parts for row in part]
    unscored = sum(row["guess"] is None for row in rows)
    if not len(rows) - unscored:
        return Score(None, None, None, 0, unscored)
    counts = [confusions(part, labels) for part in parts]
    n = len(counts[0])
    draw = np.random.default_rng(seed)
    weights = draw.multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
    value = np.mean([macro_f1(c.sum(0)) for c in counts])
    again = np.mean([macro_f1(np.einsum("rp,pij->rij", weights, c)) for c in counts], axis=0)
    low, high = np.percentile(again, [2.5, 97.5])
    value = float(value)
    return Score(
        value, min(float(low), value), max(float(high), value), len(rows) - unscored, unscored
    )


def recognised(rows: list[Row]) -> Score:
    """Share of answers given to whom they belong; for a persona its retention."""
    scored = [row for row in rows if row["guess"] is not None]
    hits = [row["guess"] == row["label"] for row in scored]
    return repeated(hits, (row["prompt"] for row in scored), len(rows) - len(scored))


def discriminability(rows: list[Row]) -> Score:
    """How much of its undisturbed answers is given to each, mean over the base and a persona.

    Chance is one half, however many answers either has. The interval counts the answers of the one
    that has fewer, since both answer the same prompts; where it has none, nothing is scored.
    """
    scored = [row for row in rows if row["guess"] is not None]
    right: dict[bool, list[bool]] = {True: [], False: []}
    for row in scored:
        of_base = row["label"] == BASE
        right[of_base].append((row["guess"] == BASE) == of_base)
    n = min(map(len, right.values()))
    share = sum(sum(hits) / len(hits) for hits in right.values()) / 2 if n else 0
    return wilson(share * n, n, len(rows) - len(scored))


def scores(guessed: list[Row], settings: Robustness, seed: int) -> list[dict[str, Any]]:
    """Rows of `SCORES` from the guesses of all conditions."""
    rows = []
    for condition in dict.fromkeys(row["condition"] for row in guessed):
        mine = [row for row in guessed if row["condition"] == condition]
        labels = sorted({row["label"] for row in mine})
        by_attack = {
            attack: [row for row in mine if row["attack"] == attack]
            for attack in ORDER
            if any(row["attack"] == attack for row in mine)
        }
        asked = [by_attack[name] for name in INSTRUCTIONS if name in by_attack]
        groups = {name: [part] for name, part in by_attack.items()} | (
            {MEAN: asked} if asked else {}
        )
        for attack, parts in groups.items():
            found = f1_score(parts, labels, settings.resamples, seed)
            rows.append(score_row("", "macro_f1", condition, attack, found))
            every = [row for part in parts for row in part]
            for persona in (name for name in labels if name != BASE):
                own = recognised([row for row in every if row["label"] == persona])
                rows.append(score_row(persona, "retention", condition, attack, own))
        for persona in (name for name in labels if name != BASE):
            two = [r for r in by_attack.get(DEFAULT, []) if r["label"] in (BASE, persona)]
            rows.append(
                score_row(persona, "discriminability", condition, DEFAULT, discriminability(two))
            )
    return rows


def answers_of(job: Job) -> list[Row]:
    """All answers of all personas, undisturbed and attacked; the base's of the first persona only.

    Every persona's run has answers of the same base model; one of them is enough, and keeps the
    base from outweighing each persona.
    """
    rows = []
    for parent in job.parents:
        persona = parent.persona.name
        for row in parent.store.read_table(parent.dataset).to_pylist():
            if row["condition"] != BASE or parent.constitution == job.constitutions[0]:
                attack = row.get("attack", DEFAULT)
                fields = {name: row[name] for name in ("condition", "prompt", "answer")}
                rows.append({"persona": persona, "attack": attack, **fields})
    return rows


def resource_requests(job: Job) -> list[tuple[ResourceRequest, ...]]:
    return [] if job.config.classifier == classifiers.TFIDF else [(job.workers(1),)]


def estimate(job: Job) -> Estimate:
    """Of an encoder; `plan` takes it to be as slow as the student, so rather too much."""
    settings: Robustness = job.config
    if settings.classifier == classifiers.TFIDF:
        return Estimate(0)
    asked = {
        name: sum(told_apart_tokens(p) for p in job.parents if p.stage.name == name)
        for name in job.stage.reads
    }
    loss_positions = asked["evaluation/answers"] * (settings.folds - 1) * settings.encoder.epochs
    return Estimate(0, trained=loss_positions, read=sum(asked.values()))


def told_apart_tokens(job: Job) -> int:
    """Tokens of a persona's answers, with its part of the base model's beside each condition's."""
    conditions = len(job.config.conditions)
    each = job.stage.module.estimate(job).tokens_out / conditions
    return round(each * (conditions - 1) * (1 + 1 / len(job.constitutions)))


def build(job: Job) -> StageResult:
    settings: Robustness = job.config
    rows = answers_of(job)
    conditions = [c for c in in_order(row["condition"] for row in rows) if c != BASE]
    seed = row_seed(job.recipe.seed, job.stage.name, "resamples")
    guess = partial(
        classifiers.guess,
        settings.classifier,
        encoder=settings.encoder,
        placement=job.placement.training,
        seed=seed,
    )
    workers = [need for together in resource_requests(job) for need in together]
    with acquire(job.dataset, workers, job.placement.autoscaling_limit):
        guessed = [new for c in conditions for new in guesses(rows, c, settings.folds, guess)]
    found = scores(guessed, settings, seed)
    job.store.write_table(job.dataset, pa.Table.from_pylist(guessed, schema=SCHEMA))
    job.store.write_table(job.dataset, pa.Table.from_pylist(found, schema=SCORES), "scores")
    return StageResult(len(guessed))
