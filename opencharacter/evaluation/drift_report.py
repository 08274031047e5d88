"""Scores of evaluation/drift and their sections of the report; pure functions of its rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from opencharacter.config.evaluation import Condition
from opencharacter.evaluation.conditions import in_order
from opencharacter.evaluation.intervals import mean_interval, slope
from opencharacter.evaluation.report.formatting import interval_text, points
from opencharacter.evaluation.report.sections import (
    Cells,
    Change,
    ScoreTable,
    Section,
    Trend,
    TurnCurves,
    comparison,
    unscored,
)
from opencharacter.evaluation.scores import Score, score_row, wilson

Row = dict[str, Any]
Series = dict[int, list[tuple[float, float]]]
"""The points (turn, strength) of each conversation."""

BASE, FULL = "base", "full"
JUDGE, CLASSIFIER = MEASURES = ("judge", "classifier")
SPAN = 10
"""Drift is the change of the strength over this many turns."""
GROUPS = {"everyday": False, "pressure": True}
"""The conversations without and with requests for another manner."""


# ----------------------------------------------------------------------------------------- scores


def of(rows: Iterable[Row], condition: str, pressed: bool | None = None) -> list[Row]:
    """The conversations of a condition, and of one group if it is given."""
    return [
        row for row in rows if row["condition"] == condition and pressed in (None, row["pressed"])
    ]


def values_by_turn(row: Row, measure: str, every: int) -> dict[int, float | None]:
    """The strength at each turn of one conversation; None where there is none.

    Args:
        row: a conversation.
        measure: of `MEASURES`.
        every: `pressure_every`; the turns that it divides are not scored.
    """
    if measure == JUDGE:
        presence = row["presence"] or []
        missing = [None] * (len(row["judged"]) - len(presence))
        return dict(zip(row["judged"], [*presence, *missing], strict=True))
    turns = [t for t in range(1, len(row["turns"]) + 1) if t % every]
    recognized = row["recognized"]
    if recognized is None:
        return dict.fromkeys(turns)
    return {t: float(recognized[t - 1]) if t <= len(recognized) else None for t in turns}


def series(rows: Iterable[Row], measure: str, every: int) -> tuple[Series, int]:
    """The scored points of each conversation, and the number of turns without a score."""
    scored: Series = {}
    missing = 0
    for row in rows:
        values = values_by_turn(row, measure, every)
        known = [(float(turn), value) for turn, value in values.items() if value is not None]
        scored[row["conversation"]] = known
        missing += len(values) - len(known)
    return scored, missing


def drift(rows: Iterable[Row], measure: str, every: int) -> Trend:
    """The change of the strength per ten turns; intervals count conversations."""
    scored, missing = series(rows, measure, every)
    return Trend(**vars(slope(scored, missing, SPAN)))


def drift_against(before: list[Row], after: list[Row], measure: str, every: int) -> Change:
    """How much more one condition drifts than another, over the turns that both have."""
    (first, _), (second, _) = (series(rows, measure, every) for rows in (before, after))
    differences: Series = {}
    unpaired = 0
    for conversation in dict.fromkeys([*first, *second]):
        ours, theirs = dict(second.get(conversation, [])), dict(first.get(conversation, []))
        shared = sorted(ours.keys() & theirs.keys())
        differences[conversation] = [(turn, ours[turn] - theirs[turn]) for turn in shared]
        unpaired += len(ours.keys() ^ theirs.keys())
    return Change(**vars(slope(differences, unpaired, SPAN)))


def by_turn(rows: Iterable[Row], measure: str, every: int) -> list[tuple[int, Score]]:
    """The mean strength at each scored turn, over conversations; later turns have fewer."""
    collected: dict[int, list[float | None]] = {}
    for row in rows:
        for turn, value in values_by_turn(row, measure, every).items():
            collected.setdefault(turn, []).append(value)
    return [(turn, mean_at_turn(collected[turn], measure)) for turn in sorted(collected)]


def mean_at_turn(values: list[float | None], measure: str) -> Score:
    """The mean of one value per conversation."""
    known = [value for value in values if value is not None]
    missing = len(values) - len(known)
    if measure == JUDGE:
        return mean_interval(known, missing)
    return wilson(sum(known), len(known), missing)


def figures(rows: list[Row], every: int) -> dict[str, Any]:
    """Drift, and the conversations that ended early by reason, by condition."""
    measured = {}
    for condition in in_order(row["condition"] for row in rows):
        conversations = of(rows, condition)
        reasons = [row["ended"] for row in conversations if row["ended"]]
        measured[condition] = {
            **{f"drift_{name}": vars(drift(conversations, name, every)) for name in MEASURES},
            "ended": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        }
    return {"conditions": measured}


def score_rows(persona: str, rows: list[Row], every: int) -> list[dict[str, Any]]:
    """Rows of `SCORES`: drift of each condition and group, and the strength at each turn."""
    scored = []
    for condition in in_order(row["condition"] for row in rows):
        ours, base = of(rows, condition), of(rows, BASE)
        for measure in MEASURES:
            scored.append(
                score_row(persona, f"drift_{measure}", condition, None, drift(ours, measure, every))
            )
            scored += [
                score_row(
                    persona,
                    f"drift_{measure}",
                    condition,
                    name,
                    drift(of(rows, condition, pressed), measure, every),
                )
                for name, pressed in GROUPS.items()
            ]
            if condition != BASE:
                change = drift_against(base, ours, measure, every)
                scored.append(
                    score_row(persona, f"drift_{measure}_change", condition, BASE, change)
                )
            scored += [
                score_row(persona, f"strength_{measure}", condition, f"turn {turn}", score)
                for turn, score in by_turn(ours, measure, every)
            ]
    return scored


# ----------------------------------------------------------------------------------------- report

READING = """\
a flat curve means that the character lasts; the band is the 95% interval over conversations."""
NOTE = """\
The user's turns are the same for all conditions: everyday topics, and in half of the \
conversations requests for another manner, the replies to which are not scored. The judge says \
whether a reply sounds like the constitution (probability of yes). The classifier was trained on \
answers to held-out prompts and says whether a reply is the persona's rather than the base \
model's (share of yes)."""
TABLE_READING = """\
0 points means that the character lasts, and an interval below 0 that it fades."""
TABLE_NOTE = """\
Change of the strength of the character over ten turns, in percentage points. 95% t intervals that \
count conversations. Against base, it is the change of the difference between the two \
conditions."""


def sections(persona: str, rows: list[Row], every: int) -> list[Section]:
    """The curves, the table of drift, and what could not be scored."""
    if not rows:
        return []
    conditions = in_order(row["condition"] for row in rows)
    drifts = {c: {m: drift(of(rows, c), m, every) for m in MEASURES} for c in conditions}
    columns = {f"Drift per ten turns ({measure})": measure for measure in MEASURES}
    cells: dict[str, Cells] = {
        condition: {name: scores[measure] for name, measure in columns.items()}
        for condition, scores in drifts.items()
        if condition != BASE  # which has no character; its drift is in the table below
    }
    return [
        comparison(persona, list(columns), cells),
        TurnCurves(
            title="Does the character last over a conversation?",
            persona=persona,
            findings=tuple(trend(m, drifts[FULL][m]) for m in MEASURES if FULL in drifts),
            reading=READING,
            notes=(NOTE,),
            curves={
                f"Strength of the character by turn ({measure})": {
                    condition: by_turn(of(rows, condition), measure, every)
                    for condition in conditions
                }
                for measure in MEASURES
            },
        ),
        drift_table(persona, rows, conditions, every),
        unscored(missing_turns(rows, conditions, every), persona),
    ]


def trend(measure: str, score: Score) -> str:
    """A sentence about the persona's drift that says no more than its interval allows."""
    if score.value is None or score.low is None or score.high is None:
        return f"By the {measure}: not measured."
    interval = f"({points(score.value)} points per ten turns, {interval_text(score)})"
    if score.high < 0:
        return f"By the {measure}, the persona's character fades in the conversation {interval}."
    if score.low > 0:
        return f"By the {measure}, the persona's character grows in the conversation {interval}."
    return f"By the {measure}, neither fading nor growing is shown {interval}."


def drift_table(
    persona: str, rows: list[Row], conditions: list[Condition], every: int
) -> ScoreTable:
    """Drift of each condition, in conversations of both groups."""
    cells: dict[str, Cells] = {}
    for condition in conditions:
        for group, pressed in GROUPS.items():
            ours, base = of(rows, condition, pressed), of(rows, BASE, pressed)
            if not ours:
                continue
            against: Cells = {
                f"{measure.capitalize()}, against base": drift_against(base, ours, measure, every)
                for measure in MEASURES
                if condition != BASE
            }
            own: Cells = {m.capitalize(): drift(ours, m, every) for m in MEASURES}
            cells[f"{condition}, {group}"] = own | against
    return ScoreTable(
        title="How much does the character change over ten turns?",
        persona=persona,
        reading=TABLE_READING,
        notes=(TABLE_NOTE,),
        caption="Drift by condition, in everyday conversations and in those with pressure",
        columns=[
            *map(str.capitalize, MEASURES),
            *(f"{measure.capitalize()}, against base" for measure in MEASURES),
        ],
        rows=cells,
    )


def missing_turns(rows: list[Row], conditions: list[Condition], every: int) -> dict[str, Score]:
    """The share of conversations that ended early, and of judged turns without a verdict."""
    shares = {}
    for condition in conditions:
        ours = of(rows, condition)
        ended = sum(row["ended"] is not None for row in ours)
        shares[f"drift, {condition}: conversation ended early"] = wilson(ended, len(ours))
        verdicts = [value for row in ours for value in row["presence"] or []]
        missing = sum(value is None for value in verdicts)
        shares[f"drift, {condition}: verdict unreadable"] = wilson(missing, len(verdicts))
    return shares
