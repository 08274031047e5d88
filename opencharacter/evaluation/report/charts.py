"""The charts of the report as inline SVG, each with a text alternative."""

from __future__ import annotations

import math

from markupsafe import Markup, escape

from opencharacter.evaluation.report.formatting import (
    interval_text,
    label,
    number,
    percent,
    rating_interval,
    value_text,
)
from opencharacter.evaluation.report.sections import (
    Change,
    Curve,
    Distance,
    EloRating,
    RatingChange,
    TextStatistic,
    TraitChange,
)
from opencharacter.evaluation.scores import Score

Range = tuple[float, float]

CURVE_SIZE = (280, 130)
CURVE_X = (72.0, 276.0)
CURVE_Y = (106.0, 10.0)
"""Positions of the least and the greatest value of a curve; SVG counts downwards."""

STATISTIC_SIZE = (64, 8)

SCORE_SIZE = (96, 12)
LARGEST = {Change: 0.6, RatingChange: 600.0, Distance: 3.0}
"""The value that fills a signed bar, to each side: the same for all scores of a kind, so that rows
can be compared. A larger value fills it too."""

RATING_SIZE = (212, 36)
RATING_X = (8.0, 204.0)
RATING_Y = {"base": 11.0, "persona": 25.0}


def element(name: str, *content: str, **attributes: object) -> Markup:
    """Return an SVG element; content and attribute values are escaped unless they are markup.

    Attributes are named as in Python: `class_`, `text_anchor`.
    """
    pairs = (
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
    )
    opening = Markup("<") + name + Markup("").join(pairs) + Markup(">")
    return opening + Markup("").join(map(escape, content)) + Markup(f"</{name}>")


def svg(title: str, description: str, size: tuple[int, int], *content: str) -> Markup:
    """Return a drawing with its text alternative."""
    width, height = size
    text = element("title", title) + element("desc", description)
    box = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    return element("svg", text, *content, role="img", **box)


def scale(value: float, domain: Range, target: Range) -> float:
    """Map a value linearly from one range to another; a domain of one point maps to the middle."""
    low, high = domain
    fraction = (value - low) / (high - low) if high > low else 0.5
    return target[0] + fraction * (target[1] - target[0])


# ------------------------------------------------------------------------------- training curves


def finite_points(curve: Curve) -> list[tuple[float, float]]:
    """The points that can be drawn."""
    return [point for point in curve.points if all(map(math.isfinite, point))]


def curve_chart(training: str, curve: Curve) -> Markup:
    """Draw a training curve; nothing if it has no finite point."""
    finite = finite_points(curve)
    if not finite:
        return Markup("")
    steps, values = zip(*finite, strict=True)
    x_range, y_range = (min(steps), max(steps)), (min(values), max(values))
    summary = {"first": values[0], "last": values[-1], "min": y_range[0], "max": y_range[1]}
    described = ", ".join(f"{name} {number(value)}" for name, value in summary.items())
    span = f"{number(x_range[0])} to {number(x_range[1])}"
    positions = [(scale(x, x_range, CURVE_X), scale(y, y_range, CURVE_Y)) for x, y in finite]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in positions)
    x, y = positions[-1]
    return svg(
        f"{training}: {curve.metric}",
        f"{described}; points: {len(finite):,}, steps {span}.",
        CURVE_SIZE,
        axes(x_range, y_range),
        element("polyline", points=path, class_="line"),
        element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="2.5", class_="end"),
    )


def axes(x_range: Range, y_range: Range) -> Markup:
    """Two axes, labelled with their least and greatest value, or with the only one."""
    (left, right), (bottom, top) = CURVE_X, CURVE_Y
    drawn = [element("path", d=f"M{left - 6} {top}V{bottom + 6}H{right}", class_="axis")]
    for value in sorted(set(y_range)):
        y = f"{scale(value, y_range, CURVE_Y) + 3.5:.1f}"
        drawn.append(element("text", number(value), x=f"{left - 10}", y=y, text_anchor="end"))
    ends = sorted(set(x_range))
    anchors = ("start", "end") if len(ends) == 2 else ("middle",)
    for step, anchor in zip(ends, anchors, strict=True):
        x = f"{scale(step, x_range, CURVE_X):.1f}"
        drawn.append(element("text", number(step), x=x, y=f"{bottom + 20}", text_anchor=anchor))
    return Markup("").join(drawn)


# ---------------------------------------------------------------------------------- turn curves


def scored_points(points: list[tuple[int, Score]]) -> list[tuple[int, Score]]:
    """The points that have a value."""
    return [point for point in points if point[1].value is not None]


def conversation_counts(scored: list[tuple[int, Score]]) -> str:
    """How many conversations the points of a turn chart count: one number, or the range."""
    counts = [score.n for _, score in scored]
    ends = " to ".join(f"{n:,}" for n in sorted({min(counts), max(counts)}))
    unscored = max(score.unscored for _, score in scored)
    return f"n = {ends} conversations, at most {unscored:,} unscored at a turn"


def turn_chart(heading: str, condition: str, points: list[tuple[int, Score]]) -> Markup:
    """Draw a proportion by turn with a band for its intervals; nothing if nothing was scored.

    All charts have the scale of 0 .. 100 %, so that conditions can be compared.
    """
    scored = scored_points(points)
    if not scored:
        return Markup("")
    turns = (float(points[0][0]), float(points[-1][0]))
    first, last = scored[0][1], scored[-1][1]

    def position(turn: int, value: float) -> str:
        return f"{scale(turn, turns, CURVE_X):.1f},{scale(value, (0.0, 1.0), CURVE_Y):.1f}"

    known = [(turn, s.low, s.high) for turn, s in scored if s.low is not None]
    upper = [position(turn, high or 0.0) for turn, _, high in known]
    lower = [position(turn, low or 0.0) for turn, low, _ in known]
    line = [position(turn, score.value or 0.0) for turn, score in scored]
    x, y = line[-1].split(",")
    return svg(
        f"{heading}: {condition}",
        f"turn {scored[0][0]}: {percent(first.value)} ({interval_text(first)}), turn "
        f"{scored[-1][0]}: {percent(last.value)} ({interval_text(last)}).",
        CURVE_SIZE,
        turn_axes(turns),
        element("polygon", points=" ".join([*upper, *reversed(lower)]), class_="band"),
        element("polyline", points=" ".join(line), class_="line"),
        element("circle", cx=x, cy=y, r="2.5", class_="end"),
    )


def turn_axes(turns: Range) -> Markup:
    """Axes of a turn chart: 0, 50 and 100 %, the first and the last turn."""
    (left, right), (bottom, top) = CURVE_X, CURVE_Y
    drawn = [element("path", d=f"M{left - 6} {top}V{bottom + 6}H{right}", class_="axis")]
    for share in (0.0, 0.5, 1.0):
        y = f"{scale(share, (0.0, 1.0), CURVE_Y) + 3.5:.1f}"
        drawn.append(element("text", f"{share:.0%}", x=f"{left - 10}", y=y, text_anchor="end"))
    for turn, anchor in zip(turns, ("start", "end"), strict=True):
        x = f"{scale(turn, turns, CURVE_X):.1f}"
        text = f"turn {turn:.0f}"
        drawn.append(element("text", text, x=x, y=f"{bottom + 20}", text_anchor=anchor))
    return Markup("").join(drawn)


# ------------------------------------------------------------------------------------- ratings


def rating_domain(traits: list[TraitChange]) -> Range:
    """The range that the intervals of all traits cover."""
    ends = [end for t in traits for score in (t.base, t.persona) for end in (score.low, score.high)]
    known = [end for end in ends if end is not None]
    return min(known, default=0.0), max(known, default=1.0)


def rating_chart(trait: TraitChange, domain: Range) -> Markup:
    """Draw the ratings of base (disc) and persona (diamond) on their intervals."""
    scores = {"base": trait.base, "persona": trait.persona}
    described = "; ".join(
        f"{name} {'not rated' if score.value is None else format(score.value, ',.0f')} "
        f"({rating_interval(score)})"
        for name, score in scores.items()
    )
    (left, right), height = RATING_X, RATING_SIZE[1]
    return svg(
        f"{trait.trait}: rating of base and persona",
        f"{described}. The dashed line is the middle of the scale.",
        RATING_SIZE,
        element("path", d=f"M{left} {height - 1}H{right}", class_="axis"),
        element("path", d=f"M{(left + right) / 2} 0V{height}", class_="chance"),
        *(rating_mark(name, score, domain) for name, score in scores.items()),
    )


def rating_mark(name: str, score: Score, domain: Range) -> Markup:
    """Draw an estimate on its interval; nothing if there is no estimate."""
    if score.value is None:
        return Markup("")
    x, y = scale(score.value, domain, RATING_X), RATING_Y[name]
    shape = f"M{x - 4:.1f} {y}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z"
    if name == "persona":
        shape = f"M{x - 5:.1f} {y}l5 -5l5 5l-5 5z"
    drawn = element("path", d=shape, class_="mark")
    if score.low is not None and score.high is not None:
        low, high = (scale(end, domain, RATING_X) for end in (score.low, score.high))
        drawn = element("path", d=f"M{low:.1f} {y}H{high:.1f}", class_="whisker") + drawn
    return element("g", drawn, class_=name)


# ---------------------------------------------------------------------------------------- bars


def score_bar(score: Score) -> Markup:
    """Draw a proportion as a bar of 0 .. 100 % with its interval; nothing if it has no value."""
    if score.value is None or isinstance(score, EloRating):
        return Markup("")
    for kind, largest in LARGEST.items():
        if isinstance(score, kind):
            what = "distance" if kind is Distance else "change"
            return signed_bar(score, largest, f"{what} of {value_text(score)}", what)
    width, height = SCORE_SIZE
    middle = height / 2
    drawn = [
        element("path", d=f"M0 {middle}H{width}", class_="axis"),
        element("path", d=f"M0 {middle}H{width * score.value:.1f}", class_="bar"),
    ]
    if score.low is not None and score.high is not None:
        low, high = width * score.low, width * score.high
        ends = f"M{low:.1f} 2V{height - 2}M{low:.1f} {middle}H{high:.1f}M{high:.1f} 2V{height - 2}"
        drawn.append(element("path", d=ends, class_="tick"))
    return svg(percent(score.value), interval_text(score), SCORE_SIZE, *drawn)


def signed_bar(score: Score, largest: float, title: str, what: str) -> Markup:
    """Draw a signed value as a bar that begins in the middle, with its interval.

    Args:
        score: the score.
        largest: the value that fills the bar, to each side.
        title: the value as text.
        what: what is 0 in the middle.
    """
    width, height = SCORE_SIZE
    value, low, high = (
        min(max(scale(end or 0, (-largest, largest), (0, width)), 0), width)
        for end in (score.value, score.low, score.high)
    )
    middle, line = width / 2, height / 2
    return svg(
        title,
        f"{interval_text(score)}; the dashed line is no {what}.",
        SCORE_SIZE,
        element("path", d=f"M0 {line}H{width}", class_="axis"),
        element("path", d=f"M{middle} {line}H{value:.1f}", class_="bar"),
        element("path", d=f"M{low:.1f} {line}H{high:.1f}", class_="tick"),
        element("path", d=f"M{middle} 0V{height}", class_="chance"),
    )


def statistic_bar(statistic: TextStatistic, largest: float) -> Markup:
    """Draw a text statistic as a bar, with ticks at the recipe's limits.

    Args:
        statistic: the statistic.
        largest: the largest value of this statistic on the page.
    """
    limits = [end for end in (statistic.minimum, statistic.maximum) if 0 < end < math.inf]
    full = max([1.0 if largest <= 1 else largest, *limits])
    width, height = STATISTIC_SIZE
    ticks = (f"M{width * end / full:.1f} 0V{height}" for end in limits)
    return svg(
        f"{label(statistic.name)} {number(statistic.value)}",
        ", ".join(f"limit {number(end)}" for end in limits) or "no limit",
        STATISTIC_SIZE,
        element("path", d=f"M0 {height / 2}H{width}", class_="axis"),
        element("path", d=f"M0 {height / 2}H{width * statistic.value / full:.1f}", class_="bar"),
        *(element("path", d=tick, class_="tick") for tick in ticks),
    )
