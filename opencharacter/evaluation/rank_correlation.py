"""Rank correlation of the trait ratings of two students, or of two conditions of one student."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opencharacter.errors import UserError
from opencharacter.evaluation.scores import Z95, Score

ALL_FRAMINGS, HEADLINE = "all", "feels"
"""Games of all framings together, and the framing of the paper's headline."""


def spearman(a: Sequence[float], b: Sequence[float]) -> Score:
    """Rank correlation with a 95 % interval (Bonett and Wright, 2000, doi:10.1007/BF02294183).

    Args:
        a: ratings of one student.
        b: ratings of another student, of the same traits in the same order.
    """
    from scipy.stats import spearmanr

    n = len(a)
    if n < 4:
        return Score(None, None, None, n)
    r = float(np.asarray(spearmanr(a, b))[0])
    if not math.isfinite(r):
        return Score(None, None, None, n)
    z = math.atanh(min(max(r, -0.999999), 0.999999))
    half = Z95 * math.sqrt((1 + r * r / 2) / (n - 3))
    return Score(r, math.tanh(z - half), math.tanh(z + half), n)


GroupedRatings = dict[str, tuple[float, int]]
"""Rating and group of each trait."""


def compare_folders(
    folders: Sequence[str], condition: str, elo: bool = False
) -> list[tuple[str, str, Score]]:
    """Rank correlation of every two rating datasets, see `rank_correlation`.

    Args:
        folders: the datasets' folders, `<storage>/<student>/<persona>/evaluation/rating`.
        condition: the condition whose ratings are compared.
        elo: compare sequential Elo ratings of the framing `HEADLINE`, as the paper does, instead of
            Bradley-Terry ratings of all games.

    Raises:
        UserError: if a folder has no such ratings.
    """
    rated = [read_ratings(folder, condition, elo) for folder in folders]
    pairs = combinations(zip(folders, rated, strict=True), 2)
    return [(left, right, rank_correlation(a, b)) for (left, a), (right, b) in pairs]


def rank_correlation(a: GroupedRatings, b: GroupedRatings) -> Score:
    """Rank correlation over the largest set of traits that are of one group in both ratings."""
    groups: dict[tuple[int, int], list[str]] = {}
    for trait in sorted(a.keys() & b.keys()):
        groups.setdefault((a[trait][1], b[trait][1]), []).append(trait)
    shared = max(groups.values(), key=len, default=[])
    return spearman([a[trait][0] for trait in shared], [b[trait][0] for trait in shared])


def read_ratings(folder: str, condition: str, elo: bool = False) -> GroupedRatings:
    """The stored ratings of a condition; traits without a rating are left out."""
    file = f"{folder.rstrip('/')}/rows.parquet"
    column, framing = ("elo", HEADLINE) if elo else ("rating", ALL_FRAMINGS)
    columns = ["condition", "framing", "trait", column, "group"]
    try:
        rows = pq.read_table(file, columns=columns).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"ratings {file!r} cannot be read: {str(error).splitlines()[0]}; name folders of the "
            "form STORAGE/STUDENT/PERSONA/evaluation/rating"
        ) from None
    selected = [row for row in rows if (row["condition"], row["framing"]) == (condition, framing)]
    if not selected:
        available = ", ".join(sorted({row["condition"] for row in rows}))
        raise UserError(f"ratings {file!r} have no condition {condition!r}; there are {available}")
    return grouped_ratings(selected, column)


def grouped_ratings(rows: list[dict[str, Any]], column: str = "rating") -> GroupedRatings:
    """Rating and group by trait, for the traits that have a rating."""
    rated = (row for row in rows if row[column] is not None)
    return {row["trait"]: (row[column], row["group"]) for row in rated}
