"""Macro-F1 of classified answers, with an interval over prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opencharacter.evaluation.intervals import student_quantile
from opencharacter.evaluation.scores import Score, wilson

Row = dict[str, Any]


def confusions(rows: list[Row], labels: Sequence[str]) -> NDArray[np.float64]:
    """Confusion counts of shape (prompts, labels, guesses); rows without a guess are left out."""
    index = {name: i for i, name in enumerate(labels)}
    prompts = {prompt: i for i, prompt in enumerate(sorted({row["prompt"] for row in rows}))}
    counts = np.zeros((len(prompts), len(labels), len(labels)))
    for row in rows:
        if row["guess"] is not None:
            counts[prompts[row["prompt"]], index[row["label"]], index[row["guess"]]] += 1
    return counts


def macro_f1(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean F1 over the labels that occur, from counts of shape (..., labels, guesses)."""
    correct = np.diagonal(counts, axis1=-2, axis2=-1)
    actual, predicted = counts.sum(-1), counts.sum(-2)
    total = actual + predicted
    f1 = np.divide(2 * correct, total, out=np.zeros_like(correct), where=total > 0)
    occurs = actual > 0
    return (f1 * occurs).sum(-1) / np.maximum(occurs.sum(-1), 1)


def f1_score(by_attack: list[list[Row]], labels: Sequence[str], resamples: int, seed: int) -> Score:
    """Macro-F1, or its mean over several attacks, with a 95 % interval over prompts.

    The standard error is that of a bootstrap over prompts. The interval is Student's t on the scale
    of log-odds: percentiles of the resamples cover too little, most of all if F1 is close to 1.
    Without any error there is no such interval; then it is Wilson's for a proportion of prompts.

    Args:
        by_attack: the classified rows of each attack, on the same prompts.
        labels: all labels that occur.
        resamples: number of bootstrap resamples.
        seed: seed of the bootstrap.
    """
    rows = [row for attacked in by_attack for row in attacked]
    unscored = sum(row["guess"] is None for row in rows)
    scored = len(rows) - unscored
    if not scored:
        return Score(None, None, None, 0, unscored)
    counts = [confusions(attacked, labels) for attacked in by_attack]
    value, n = float(np.mean([macro_f1(c.sum(0)) for c in counts])), len(counts[0])
    if n < 2:
        return Score(value, None, None, scored, unscored)

    def resampled(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.mean([macro_f1(np.einsum("rp,pij->rij", weights, c)) for c in counts], axis=0)

    error = bootstrap_error(resampled, n, resamples, seed)
    if error < 1e-9 or not 0 < value < 1:
        return replace(wilson(value * n, n, unscored), n=scored)
    low, high = log_odds_interval(value, error, n)
    return Score(value, low, high, scored, unscored)


def f1_change(
    before: list[list[Row]],
    after: list[list[Row]],
    labels: Sequence[str],
    resamples: int,
    seed: int,
) -> Score:
    """Change of macro-F1, or of its mean over several attacks, paired by prompt, -1 .. 1.

    The 95 % interval is Student's t with the standard error of a bootstrap over prompts.

    Args:
        before: the classified rows of each attack under one condition.
        after: those under the other condition, in the same order of attacks.
        labels: all labels that occur.
        resamples: number of bootstrap resamples.
        seed: seed of the bootstrap.

    Returns:
        The change; `n` counts the prompts that both conditions have in all attacks, `unscored` the
        others.
    """
    sides = (before, after)
    prompts = [{row["prompt"] for row in rows} for side in sides for rows in side]
    shared = set.intersection(*prompts)
    n, unpaired = len(shared), len(set.union(*prompts) - shared)
    if not n:
        return Score(None, None, None, 0, unpaired)
    counts = np.array(
        [
            [confusions([row for row in rows if row["prompt"] in shared], labels) for rows in side]
            for side in sides
        ]
    )

    def change(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        resampled = macro_f1(np.einsum("rp,sapij->rsaij", weights, counts)).mean(-1)
        return resampled[:, 1] - resampled[:, 0]

    value = float(change(np.ones((1, n)))[0])
    if n < 2:
        return Score(value, None, None, n, unpaired)
    half = student_quantile(n - 1) * bootstrap_error(change, n, resamples, seed)
    return Score(value, value - half, value + half, n, unpaired)


def bootstrap_error(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    n: int,
    resamples: int,
    seed: int,
) -> float:
    """The standard error of a statistic of n prompts, by a bootstrap over them.

    Args:
        statistic: its values for weights of the prompts, shape (resamples, n).
        n: number of prompts, at least 2.
        resamples: number of bootstrap resamples.
        seed: seed of the bootstrap.
    """
    draw = np.random.default_rng(seed)
    weights = draw.multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
    return float(statistic(weights).std()) * math.sqrt(n / (n - 1))


def log_odds_interval(value: float, error: float, n: int) -> tuple[float, float]:
    """A 95 % interval of a value in 0 .. 1 that is symmetric in its log-odds.

    Args:
        value: the estimate, between 0 and 1.
        error: its standard error.
        n: number of independent prompts.
    """
    half = student_quantile(n - 1) * error / (value * (1 - value))
    odds = math.log(value / (1 - value))
    low, high = (1 / (1 + math.exp(min(-end, 700))) for end in (odds - half, odds + half))
    return low, high
