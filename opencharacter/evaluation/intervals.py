"""95 % intervals of means, of means over groups, and of slopes over clustered measurements.

They are for values such as probabilities and differences of probabilities, for which a proportion's
interval (see `scores.wilson`) would be too wide. All are Student t intervals.

If all values are equal, the sample variance is 0, although the next value may differ. Every sum of
squares is therefore increased by `2 / n` times the square of a large deviation, as if two more
values were observed at a distance of `1 / sqrt(n)` of it from the mean. The intervals then have a
positive width, and 20 values or more hardly change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from opencharacter.evaluation.scores import Score

Row = dict[str, Any]


@cache
def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def mean_interval(
    values: Sequence[float], unscored: int = 0, bounds: tuple[float, float] = (0.0, 1.0)
) -> Score:
    """The mean of independent values with its 95 % interval.

    Args:
        values: the scored values.
        unscored: number of items without a value.
        bounds: least and greatest possible mean; -1 and 1 for a difference of proportions.
    """
    return grouped_mean([values], unscored, bounds)


def grouped_mean(
    groups: Iterable[Sequence[float]], unscored: int = 0, bounds: tuple[float, float] = (0.0, 1.0)
) -> Score:
    """The mean of the means of groups, each of which counts equally, with its 95 % interval.

    The groups are fixed, such as the assertions of one constitution; the values within a group are
    a sample. The variance is pooled over the groups. If no group has two values, the groups'
    means are the sample.

    Args:
        groups: the values of each group; empty groups are left out.
        unscored: number of items without a value.
        bounds: least and greatest possible mean.
    """
    filled = [values for values in groups if len(values)]
    n = sum(map(len, filled))
    if n > 1 and n == len(filled):
        filled = [[value for values in filled for value in values]]
    if not n:
        return Score(None, None, None, 0, unscored)
    means = [sum(values) / len(values) for values in filled]
    value = sum(means) / len(means)
    freedom = n - len(filled)
    if not freedom:
        return Score(value, None, None, n, unscored)
    squares = sum(
        (x - mean) ** 2 for values, mean in zip(filled, means, strict=True) for x in values
    )
    variance = (squares + 2 / n) / freedom
    error = math.sqrt(variance * sum(1 / len(values) for values in filled)) / len(filled)
    return bounded(value, student_quantile(freedom) * error, n, unscored, bounds)


def bounded(value: float, half: float, n: int, unscored: int, bounds: tuple[float, float]) -> Score:
    """A score with a symmetric interval, cut at the least and greatest possible value."""
    return Score(value, max(bounds[0], value - half), min(bounds[1], value + half), n, unscored)


@dataclass(frozen=True)
class Cluster:
    """The share of one cluster in a ratio of sums.

    Args:
        numerator: its part of the numerator.
        weight: its part of the denominator, not negative.
    """

    numerator: float
    weight: float


def clustered_ratio(
    clusters: Sequence[Cluster], n: int, unscored: int = 0, largest: float = 1.0
) -> Score:
    """A ratio of sums over independent clusters, with its 95 % interval.

    The variance is that of the linearized ratio (Cochran, 1977, "Sampling Techniques", section
    6.4), whatever the correlation within a cluster.

    Args:
        clusters: the parts of each cluster; those without weight are left out.
        n: number of scored measurements.
        unscored: number of measurements without a value.
        largest: a large deviation of a single cluster's ratio from that of all clusters; scales
            the squares that are added so that the interval has a positive width.
    """
    weighed = [cluster for cluster in clusters if cluster.weight > 0]
    size, total = len(weighed), sum(cluster.weight for cluster in weighed)
    if not size:
        return Score(None, None, None, 0, unscored)
    ratio = sum(cluster.numerator for cluster in weighed) / total
    if size < 2:
        return Score(ratio, None, None, n, unscored)
    residuals = (cluster.numerator - ratio * cluster.weight for cluster in weighed)
    floor = 2 / size * (largest * total / size) ** 2
    squares = sum(residual**2 for residual in residuals) + floor
    error = math.sqrt(size / (size - 1) * squares) / total
    half = student_quantile(size - 1) * error
    return Score(ratio, ratio - half, ratio + half, n, unscored)


def clustered_mean(
    values: Sequence[float], clusters: Sequence[Hashable], unscored: int = 0
) -> Score:
    """The mean of values in 0 .. 1 that are independent between clusters, with its interval."""
    parts: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        parts.setdefault(cluster, []).append(value)
    sums = [Cluster(sum(part), len(part)) for part in parts.values()]
    score = clustered_ratio(sums, len(values), unscored)
    return replace(
        score,
        low=None if score.low is None else max(0.0, score.low),
        high=None if score.high is None else min(1.0, score.high),
    )


def slope(
    series: Mapping[Any, Sequence[tuple[float, float]]], unscored: int = 0, span: float = 1.0
) -> Score:
    """The mean change of a value in -1 .. 1 over time, with an interval that counts clusters.

    It is the least-squares slope with an intercept for each cluster, so clusters that end early do
    not bias it by their level. The interval ends where the value would jump from one bound to the
    other in the middle of the longest series.

    Args:
        series: the points (time, value) of each cluster, such as the turns of a conversation.
        unscored: number of measurements without a value.
        span: the change is stated for this much time.
    """
    scored = [points for points in series.values() if len(points) > 1]
    parts = [least_squares(points) for points in scored]
    length = max((points[-1][0] - points[0][0] for points in scored), default=1.0)
    jump = 1.5 * span / length  # the slope if a value jumps by 1 in the middle of a series
    scaled = [Cluster(span * part.numerator, part.weight) for part in parts]
    score = clustered_ratio(scaled, sum(map(len, scored)), unscored, jump / 2)
    return replace(
        score,
        low=None if score.low is None else max(-2 * jump, score.low),
        high=None if score.high is None else min(2 * jump, score.high),
    )


def least_squares(points: Sequence[tuple[float, float]]) -> Cluster:
    """The sums of a least-squares slope: covariance of time and value, variance of time."""
    mean = sum(time for time, _ in points) / len(points)
    return Cluster(
        sum((time - mean) * value for time, value in points),
        sum((time - mean) ** 2 for time, _ in points),
    )


def pair(
    before: Iterable[Row], after: Iterable[Row], key: Callable[[Row], Hashable], value: str
) -> tuple[dict[Hashable, float], int]:
    """Differences of the items that both sides scored.

    Args:
        before: rows of one condition.
        after: rows of the other.
        key: returns what identifies an item.
        value: column of the value; None if the item is unscored.

    Returns:
        The difference (after minus before) of each item, and the number of items that are not
        scored on both sides.
    """
    first, second = ({key(row): row[value] for row in rows} for rows in (before, after))
    items = dict.fromkeys([*first, *second])
    known = {item: (first.get(item), second.get(item)) for item in items}
    differences = {item: b - a for item, (a, b) in known.items() if a is not None and b is not None}
    return differences, len(items) - len(differences)


def column_mean(rows: Sequence[Row], column: str) -> Score:
    """The mean of a column of probabilities; rows without a value are unscored."""
    values = [row[column] for row in rows if row[column] is not None]
    return mean_interval(values, len(rows) - len(values))


def column_change(
    before: Iterable[Row], after: Iterable[Row], key: Callable[[Row], Hashable], column: str
) -> Score:
    """The mean change of a column of probabilities, paired by item as in `pair`."""
    differences, unpaired = pair(before, after, key, column)
    return mean_interval(list(differences.values()), unpaired, (-1.0, 1.0))
