"""Scores with confidence intervals, and the intervals that several stages share."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

Z95 = 1.959963984540054
"""Normal quantile of a two-sided 95 % interval."""


SCORES = pa.schema(
    [
        pa.field("persona", pa.string(), nullable=False),
        pa.field("measure", pa.string(), nullable=False),
        pa.field("condition", pa.string()),
        pa.field("about", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("unscored", pa.int64(), nullable=False),
    ]
)
"""Columns of every table of scores. `about` is the subject within the measure, for instance a
trait, an attack or a rival condition. An empty `persona` means all personas."""


@dataclass(frozen=True)
class Score:
    """An estimate with its 95 % interval.

    Args:
        value: the estimate; None if nothing was scored.
        low: lower end of the interval.
        high: upper end of the interval.
        n: number of scored items; the interval may count fewer, see `clustered_proportion`.
        unscored: number of items that could not be scored.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int = 0


def wilson(hits: float, n: int, unscored: int = 0) -> Score:
    """A proportion with its 95 % Wilson score interval (Wilson, 1927).

    Args:
        hits: number of hits; fractional for graded items.
        n: number of scored items.
        unscored: number of items that could not be scored.
    """
    if not n:
        return Score(None, None, None, 0, unscored)
    share, z2 = hits / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Score(share, min(low, share), max(high, share), n, unscored)


def clustered_proportion(
    hits: Sequence[bool], clusters: Iterable[Hashable], unscored: int = 0
) -> Score:
    """A proportion of repeated measurements, with a Wilson interval that counts clusters.

    Measurements of one cluster (a prompt, an item) are correlated. The number of clusters is a
    lower bound of the effective sample size (Kish, 1965), reached if all measurements of a cluster
    agree, so the interval is conservative. Unlike a bootstrap over clusters, it has a positive
    width if all measurements are hits.

    Args:
        hits: whether each measurement is a hit.
        clusters: the cluster of each measurement.
        unscored: number of measurements that could not be scored.
    """
    n, size = len(hits), len(set(clusters))
    score = wilson(sum(hits) * size / n if n else 0, size, unscored)
    return replace(score, n=n)


def score_row(
    persona: str, measure: str, condition: str | None, about: str | None, score: Score
) -> dict[str, Any]:
    """A score as a row of `SCORES`."""
    key = {"persona": persona, "measure": measure, "condition": condition, "about": about}
    return {**key, **vars(score)}


def find_score(
    rows: Iterable[dict[str, Any]], measure: str, condition: str | None, about: str | None
) -> Score | None:
    """The score of a measure in rows of `SCORES` about one persona; None if there is none."""
    key = (measure, condition, about)
    for row in rows:
        if (row["measure"], row["condition"], row["about"]) == key:
            return Score(row["value"], row["low"], row["high"], row["n"], row["unscored"])
    return None


def distinct(rows: Iterable[dict[str, Any]], measure: str, column: str) -> list[Any]:
    """The distinct values of a column in the rows of a measure, in the order of the rows."""
    return list(dict.fromkeys(row[column] for row in rows if row["measure"] == measure))
