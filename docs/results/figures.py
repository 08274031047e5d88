"""The figures of a stored run as SVG files."""

from __future__ import annotations

from collections.abc import Sequence

from character_tables import adherence_cells
from markupsafe import Markup
from stored import BASE, CONTROL, StoredRun, missing

from opencharacter.evaluation import adherence, drift_report
from opencharacter.evaluation.conditions import in_order, kept_rows
from opencharacter.evaluation.intervals import clustered_mean
from opencharacter.evaluation.report.charts import element, scale
from opencharacter.evaluation.report.formatting import interval_text, percent
from opencharacter.evaluation.scores import Score

STYLE = """\
text { font: 13px sans-serif; fill: #222 } .small { font-size: 11px; fill: #555 }
.guide { stroke: #e4e4e4; fill: none }"""
COLOURS = {
    "base": "#777777",
    "prompted": "#b26a00",
    "steered": "#7a3b9a",
    "distilled": "#1f6fb4",
    "full": "#b3202c",
}
"""The colour of each condition, the same in all figures."""
WIDTH, LEFT, RIGHT = 720, 130.0, 700.0
ROW, TOP = 30, 50
PANEL = 190


def drawing(title: str, description: str, height: int, *content: str) -> str:
    """A standalone SVG file with a white background and a text alternative."""
    return str(
        element(
            "svg",
            element("title", title),
            element("desc", description),
            element("style", Markup(STYLE)),
            element("rect", width=WIDTH, height=height, fill="white"),
            *content,
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {WIDTH} {height}",
            width=WIDTH,
            height=height,
            role="img",
        )
    )


def text(content: str, x: float, y: float, **attributes: object) -> Markup:
    """A text at a position."""
    return element("text", content, x=f"{x:.1f}", y=f"{y:.1f}", **attributes)


def line(path: str, **attributes: object) -> Markup:
    """A path."""
    return element("path", d=path, **attributes)


def legend(conditions: Sequence[str], y: float) -> list[Markup]:
    """The name and the colour of each condition, side by side."""
    drawn = []
    for n, condition in enumerate(conditions):
        x = LEFT + n * 105
        drawn.append(element("circle", cx=f"{x:.1f}", cy=y, r=5, fill=COLOURS[condition]))
        drawn.append(text(condition, x + 10, y + 4))
    return drawn


def empty(title: str, reason: str) -> str:
    """A drawing that says why there is nothing to draw."""
    return drawing(title, reason, 60, text(reason, 20, 35))


# ------------------------------------------------------------------------------------- adherence


def adherence_figure(run: StoredRun) -> str:
    """The presence of all assertions by persona and condition, with intervals."""
    title = "Assertions shown, by persona"
    cells = adherence_cells(run, adherence.OCCASION)
    if not cells:
        return empty(title, missing(run, "evaluation/adherence"))
    conditions = in_order(name for row in cells.values() for name in row)
    height = TOP + ROW * len(cells) + 40
    bottom = height - 35
    drawn = legend(conditions, 22)
    for end in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = scale(end, (0, 1), (LEFT, RIGHT))
        drawn.append(line(f"M{x:.1f} {TOP - 8}V{bottom}", class_="guide"))
        drawn.append(text(f"{end:.0%}", x, bottom + 18, text_anchor="middle", class_="small"))
    described = []
    for n, (name, row) in enumerate(cells.items()):
        middle = TOP + ROW * n + ROW / 2
        drawn.append(text(name, LEFT - 12, middle + 4, text_anchor="end"))
        for k, condition in enumerate(conditions):
            y = middle + (k - (len(conditions) - 1) / 2) * 5.5
            if (score := row.get(condition)) and score.value is not None:
                drawn += whisker(score, y, COLOURS[condition])
                described.append(
                    f"{name}, {condition}: {percent(score.value)} ({interval_text(score)})"
                )
    return drawing(title, "; ".join(described), height, *drawn)


def whisker(score: Score, y: float, colour: str) -> list[Markup]:
    """A mark on its interval."""
    x, low, high = (
        scale(next(e for e in (end, score.value, 0.0) if e is not None), (0, 1), (LEFT, RIGHT))
        for end in (score.value, score.low, score.high)
    )
    return [
        line(f"M{low:.1f} {y:.1f}H{high:.1f}", stroke=colour, stroke_width=1.5),
        element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3, fill=colour),
    ]


# ----------------------------------------------------------------------------------------- drift

Points = list[tuple[int, Score]]


def strength_by_turn(run: StoredRun, measure: str) -> dict[str, Points]:
    """The mean strength over the conversations of the personas, by condition and turn.

    The user's turns of a conversation are the same for all personas, so the intervals count the
    numbers of conversations and not the personas.
    """
    every = run.recipe.evaluation.drift.pressure_every
    values: dict[str, dict[int, list[tuple[float | None, int]]]] = {}
    for name, job in run.finished("evaluation/drift").items():
        for row in kept_rows(job) if name != CONTROL else ():
            turns = values.setdefault(row["condition"], {})
            for turn, value in drift_report.values_by_turn(row, measure, every).items():
                turns.setdefault(turn, []).append((value, row["conversation"]))
    curves: dict[str, Points] = {}
    for condition in in_order(values):
        curves[condition] = []
        for turn, measured in sorted(values[condition].items()):
            known = [(value, number) for value, number in measured if value is not None]
            strengths, numbers = [v for v, _ in known], [number for _, number in known]
            score = clustered_mean(strengths, numbers, len(measured) - len(known))
            curves[condition].append((turn, score))
    return curves


def drift_figure(run: StoredRun) -> str:
    """One panel for each measure of the strength, with a line and a band for each condition."""
    title = "Strength of the character by turn, mean over personas"
    curves = {m: strength_by_turn(run, m) for m in drift_report.MEASURES}
    conditions = list(curves[drift_report.JUDGE])
    if not conditions:
        return empty(title, missing(run, "evaluation/drift"))
    drawn, described = legend(conditions, 22), []
    for n, (measure, lines) in enumerate(curves.items()):
        top = TOP + 25 + n * (PANEL + 65)
        drawn += panel(f"by the {measure}", lines, top)
        described += [
            f"{measure}, {condition}: turn {turn}: {percent(score.value)} ({interval_text(score)})"
            for condition, points in lines.items()
            for turn, score in points[:: max(1, len(points) - 1)]
        ]
    height = TOP + 25 + len(curves) * (PANEL + 65) - 25
    return drawing(title, "; ".join(described), height, *drawn)


def panel(name: str, lines: dict[str, Points], top: float) -> list[Markup]:
    """The curves of one measure on axes of 0 to 100 % and of all turns."""
    turns = [turn for points in lines.values() for turn, _ in points]
    span, bottom = (1.0, float(max(turns))), top + PANEL

    def x(turn: float) -> float:
        return scale(turn, span, (LEFT, RIGHT))

    def y(share: float) -> float:
        return scale(share, (0, 1), (bottom, top))

    drawn = [text(name, LEFT, top - 10)]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        drawn.append(line(f"M{LEFT} {y(share):.1f}H{RIGHT}", class_="guide"))
        label = text(f"{share:.0%}", LEFT - 8, y(share) + 4, text_anchor="end", class_="small")
        drawn.append(label)
    for turn in (1, *range(5, max(turns) + 1, 5)):
        name = f"turn {turn}" if turn == 1 else str(turn)
        drawn.append(text(name, x(turn), bottom + 18, text_anchor="middle", class_="small"))
    for condition, points in lines.items():
        scored = [(turn, s.value, s.low, s.high) for turn, s in points if s.value is not None]
        upper = [f"{x(turn):.1f},{y(v if h is None else h):.1f}" for turn, v, _, h in scored]
        lower = [f"{x(turn):.1f},{y(v if w is None else w):.1f}" for turn, v, w, _ in scored]
        middle = [f"{x(turn):.1f},{y(v):.1f}" for turn, v, _, _ in scored]
        colour = COLOURS[condition]
        band = " ".join([*upper, *reversed(lower)])
        drawn.append(element("polygon", points=band, fill=colour, opacity=0.15))
        dashes = {"stroke_dasharray": "5 4"} if condition == BASE else {}
        drawn.append(
            element(
                "polyline",
                points=" ".join(middle),
                fill="none",
                stroke=colour,
                stroke_width=2,
                **dashes,
            )
        )
    return drawn
