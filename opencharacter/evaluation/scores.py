"""A figure with its interval, and the intervals that several stages share."""

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
"""Columns of every table of scores. `about` is what within the measure: a trait, an attack, a
rival."""


@dataclass(frozen=True)
class Score:
    """A figure with its interval.

    Args:
        value: the estimate; None where nothing was scored.
        low: lower end of the interval.
        high: upper end.
        n: how many were scored; the interval may count fewer, see `repeated`.
        unscored: how many could not be.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int = 0


def wilson(hits: float, n: int, unscored: int = 0) -> Score:
    """A share with its 95 % Wilson score interval (Wilson, 1927)."""
    if not n:
        return Score(None, None, None, 0, unscored)
    share, z2 = hits / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Score(share, min(low, share), max(high, share), n, unscored)


def repeated(hits: Sequence[bool], units: Iterable[Hashable], unscored: int = 0) -> Score:
    """A share whose 95 % Wilson interval counts units, for several measures of each unit.

    Measures of one unit are alike. The number of units is the least that the effective size of
    such a sample may be (Kish, 1965: where all of a unit say the same), so the interval is too wide
    rather than too narrow; unlike a bootstrap over units it has a width where all are hits.

    Args:
        hits: whether each measure is one.
        units: of each measure, what it was taken of: a prompt, an item.
        unscored: how many measures could not be scored.
    """
    n, size = len(hits), len(set(units))
    found = wilson(sum(hits) * size / n if n else 0, size, unscored)
    return replace(found, n=n)


def score_row(
    persona: str, measure: str, condition: str | None, about: str | None, score: Score
) -> dict[str, Any]:
    """A score as a row of `SCORES`; an empty persona is all of them."""
    where = {"persona": persona, "measure": measure, "condition": condition, "about": about}
    return {**where, **vars(score)}
