"""Numbers of the report as text."""

from __future__ import annotations

from opencharacter.evaluation.report.sections import (
    Change,
    Distance,
    EloRating,
    RatingChange,
    Trend,
)
from opencharacter.evaluation.scores import Score


def percent(proportion: float | None) -> str:
    return "not scored" if proportion is None else f"{proportion:.1%}"


def points(difference: float) -> str:
    """A difference of proportions in percentage points, with its sign."""
    return signed(100 * difference, 1)


def number(value: float) -> str:
    """Four significant digits, and every digit of a whole part below a billion."""
    if 1000 <= abs(value) < 1e9 or (value == int(value) and abs(value) < 1e9):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{n:,} {unit}" for n, unit in ((hours, "h"), (minutes, "m"), (rest, "s")) if n]
    return " ".join(parts) or "0 s"


def label(name: str) -> str:
    """`self_bleu` -> `Self bleu`."""
    return name.replace("_", " ").capitalize()


def signed(value: float, decimals: int) -> str:
    """A number with its sign."""
    return f"{value:+,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def bare_text(score: Score, value: float) -> str:
    """A value of a score without the name of its unit; per cent keep their sign."""
    if isinstance(score, EloRating):
        return f"{value:,.0f}".replace("-", "\N{MINUS SIGN}")
    if isinstance(score, RatingChange):
        return signed(value, 0)
    if isinstance(score, Distance):
        return signed(value, 2)
    return points(value) if isinstance(score, Change) else percent(value)


def value_text(score: Score) -> str:
    """The value of a score with its unit: %, percentage points, SD or Elo points."""
    if score.value is None:
        return "not scored"
    unit = next((name for kind, name in UNITS.items() if isinstance(score, kind)), "")
    return " ".join(filter(None, (bare_text(score, score.value), unit)))


UNITS = {EloRating: "", RatingChange: "Elo", Distance: "SD", Change: "points"}
"""Names of the units by kind of score; a percentage needs none."""


def interval_text(score: Score) -> str:
    """The interval of a score, in the unit of its value."""
    if score.low is None or score.high is None:
        return "no interval"
    return f"{bare_text(score, score.low)} to {bare_text(score, score.high)}"


def rating_interval(score: Score) -> str:
    """The interval of a rating in Elo points."""
    if score.low is None or score.high is None:
        return "no interval"
    return f"{score.low:,.0f} to {score.high:,.0f}"


def sample_size(score: Score) -> str:
    """The number of scored and of unscored items."""
    if isinstance(score, EloRating | RatingChange):
        return f"n = {score.n:,} games, {score.unscored:,} unscored"
    if isinstance(score, Trend):
        return f"n = {score.n:,} turns, {score.unscored:,} unscored"
    if isinstance(score, Distance):
        return f"n = {score.n:,} prompts, {score.unscored:,} unscored"
    if isinstance(score, Change):
        return f"n = {score.n:,} pairs, {score.unscored:,} unpaired"
    return f"n = {score.n:,}, {score.unscored:,} unscored"
