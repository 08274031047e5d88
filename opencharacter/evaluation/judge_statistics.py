"""Statistics of judges: calibration of their probabilities, and agreement among several judges."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from opencharacter.evaluation.scores import wilson

CONFIDENCE = (0.5, 0.6, 0.75, 0.9)
"""Lower ends of the classes of the reliability table."""


def calibration(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How far a judge's probabilities can be believed, from averaged verdicts on gold items.

    Args:
        rows: one row per item; `probability` is that of the trait shown.

    Returns:
        `slope`: the factor of the log-odds that fits best (maximum likelihood; Platt, 1999, without
        an offset, since both orders are averaged): below 1, the judge is overconfident. It is null
        if no finite factor fits best. `log_loss`: in nats, 0.69 when guessing. `bins`: by
        confidence, the share of right verdicts. Empty for verdicts in text.
    """
    shown = [row["probability"] for row in rows if row.get("probability") is not None]
    if not shown:
        return {}
    shown = [min(max(p, 1e-9), 1 - 1e-9) for p in shown]
    log_odds = [math.log(p / (1 - p)) for p in shown]
    bins = {}
    for low, high in zip(CONFIDENCE, (*CONFIDENCE[1:], 1.01), strict=True):
        inside = [p > 0.5 for p in shown if low <= max(p, 1 - p) < high]
        bins[f"{low:.0%} to {min(high, 1):.0%}"] = vars(wilson(sum(inside), len(inside)))
    return {
        "slope": best_slope(log_odds),
        "log_loss": statistics.mean(-math.log(p) for p in shown),
        "bins": bins,
    }


def best_slope(log_odds: Sequence[float]) -> float | None:
    """The factor of the log-odds of right answers with the largest likelihood; None if infinite."""
    from scipy.optimize import brentq
    from scipy.special import expit

    if not any(x > 0 for x in log_odds):
        return 0.0
    if not any(x < 0 for x in log_odds):
        return None

    def gradient(slope: float) -> float:
        return sum(x * float(expit(-slope * x)) for x in log_odds)

    if gradient(0.0) <= 0:
        return 0.0
    high = 1.0
    while gradient(high) > 0:
        high *= 2
    root: Any = brentq(gradient, 0.0, high)
    return float(root)


def kappa(a: Sequence[Hashable | None], b: Sequence[Hashable | None]) -> float | None:
    """Cohen's kappa of two judges over the items that both could judge; None if there are none."""
    from sklearn.metrics import cohen_kappa_score

    both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not both:
        return None
    left, right = zip(*both, strict=True)
    return 1.0 if left == right else float(cohen_kappa_score(left, right))


def alpha(units: Iterable[Sequence[Hashable | None]]) -> float | None:
    """Krippendorff's alpha for nominal data: agreement of any number of judges.

    1 - observed / expected disagreement, from the coincidences of values within units
    (Krippendorff, 2011, "Computing Krippendorff's alpha-reliability"). Values may be missing.

    Args:
        units: for each unit, every judge's value or None.

    Returns:
        Alpha; None if no unit has two values.
    """
    weights: Counter[Hashable] = Counter()
    disagreement = 0.0
    for unit in units:
        values = Counter(value for value in unit if value is not None)
        n = values.total()
        if n < 2:
            continue
        weights.update(values)
        disagreement += sum(
            k * m for (a, k) in values.items() for (b, m) in values.items() if a != b
        ) / (n - 1)
    n = weights.total()
    expected = sum(k * (n - k) for k in weights.values())
    if not expected:
        return None if not n else 1.0
    return 1 - (n - 1) * disagreement / expected
