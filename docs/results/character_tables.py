"""Tables on the character: robustness, coherence, adherence, drift and projection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stored import (
    AGAINST_BASE,
    AGAINST_DISTILLED,
    AGAINST_PROMPTED,
    BASE,
    CONTROL,
    DISTILLED,
    FULL,
    PROMPTED,
    Cells,
    StoredRun,
    changed,
    correlation_text,
    joined,
    mean_cells,
    missing,
    table,
    with_mean,
)

from opencharacter.evaluation import (
    adherence,
    drift_report,
    paper,
    robustness,
)
from opencharacter.evaluation.conditions import in_order, kept_rows
from opencharacter.evaluation.intervals import mean_interval
from opencharacter.evaluation.rank_correlation import (
    spearman,
)
from opencharacter.evaluation.report.sections import Change, Distance
from opencharacter.evaluation.scores import Score, distinct

Row = dict[str, Any]


# ------------------------------------------------------------------------------------ robustness


def robustness_tables(run: StoredRun) -> str:
    """The paper's measure, this package's measure, and the retention of each persona."""
    stage = "evaluation/robustness"
    conditions = distinct(run.scores, "macro_f1", "condition")
    attacks = robustness.in_table_order(distinct(run.scores, "macro_f1", "about"))
    changes = next(map(robustness.read_changes, run.finished(stage).values()), {})
    note = paper.robustness_note(run.recipe, run.names, conditions) if conditions else ""
    return joined(
        missing(run, stage),
        table(
            "The paper's measure: macro-F1 of one classifier of all personas, without a class for "
            "base.",
            {
                about: {c: run.find("", paper.POOLED_F1, c, about) for c in conditions}
                for about in (paper.POOLED, paper.PREFILL)
            },
            conditions,
            "attack",
        ),
        note,
        table(
            "This package's measure: macro-F1 of a classifier for each condition, with a class "
            "for base, on prompts that it was not trained on.",
            {
                about: {c: run.find("", "macro_f1", c, about) for c in conditions}
                for about in attacks
            },
            conditions,
            "attack",
        ),
        table(
            "Changes of this measure, paired by prompt, in percentage points; n counts prompts.",
            changes,
            list(robustness.STEPS),
            "attack",
        ),
        table(
            "Share of a persona's answers to the eight instructions that the same classifier "
            "still attributes to it.",
            with_mean(
                {
                    name: {c: run.find(name, "retention", c, robustness.MEAN) for c in conditions}
                    for name in run.names
                }
            ),
            conditions,
            "persona",
        ),
    )


# --------------------------------------------------------------------------------------- coherence


def coherence_tables(run: StoredRun) -> str:
    """Wins of the full persona against each other condition, by both criteria."""
    rivals = in_order(row["about"] for row in run.scores if row["measure"] == "win_rate")
    note = paper.coherence_note(run.recipe, run.names, rivals) if rivals else ""

    def wins(measure: str) -> Any:
        return with_mean(
            {
                name: {f"against {r}": run.find(name, measure, FULL, r) for r in rivals}
                for name in run.names
            }
        )

    columns = [f"against {rival}" for rival in rivals]
    longer = {
        name: {"the longer answer wins": run.find(name, "longer_won", FULL, None)}
        for name in run.names
    }
    return joined(
        missing(run, "evaluation/coherence"),
        table(
            "Share of the decided comparisons that `full` won, decided by the average over both "
            "orders; undecided comparisons are unscored.",
            wins("win_rate"),
            columns,
            "persona",
        ),
        table(
            "The same by the paper's criterion: comparisons whose two orders disagree are dropped.",
            wins(paper.CONSISTENT_WINS),
            columns,
            "persona",
        ),
        note,
        table(
            "Share of the decided comparisons that the longer answer won; 50% without a "
            "preference for length.",
            with_mean(longer),
            ["the longer answer wins"],
            "persona",
        ),
    )


# ------------------------------------------------------------------------------------- adherence

CONTROL_TEXTS = "control texts"
CHANGES = {AGAINST_BASE: BASE, AGAINST_PROMPTED: PROMPTED, AGAINST_DISTILLED: DISTILLED}
KINDS = {
    adherence.OCCASION: "with an occasion to show",
    adherence.PRESSURE: "while the user presses against it",
}


def adherence_cells(run: StoredRun, kind: str) -> dict[str, Cells]:
    """Presence of all assertions by condition, and paired changes, of each persona."""
    cells: dict[str, Cells] = {}
    for name, job in run.finished("evaluation/adherence").items():
        rows = kept_rows(job)
        by_condition = {
            c: adherence.of(rows, c, kind) for c in in_order(row["condition"] for row in rows)
        }
        present = {c: adherence.all_present(answers) for c, answers in by_condition.items()}
        full = by_condition.get(FULL, [])
        moved = {
            column: adherence.all_changed(by_condition[c], full)
            for column, c in CHANGES.items()
            if by_condition.get(c) and full
        }
        controls = adherence.of(rows, adherence.CONTROL, adherence.CONTROL)
        control = {CONTROL_TEXTS: adherence.all_present(controls)} if controls else {}
        cells[name] = {**present, **control, **moved}
    return cells


def adherence_tables(run: StoredRun) -> str:
    """Both kinds of scenarios, and the personas that fell short."""
    kinds = dict.fromkeys(CHANGES, Change)
    conditions = list(run.recipe.evaluation.adherence.conditions)
    cells = {kind: adherence_cells(run, kind) for kind in KINDS}
    return joined(
        missing(run, "evaluation/adherence"),
        "![Assertions shown, by persona](adherence.svg)" if cells[adherence.OCCASION] else "",
        *(
            table(
                f"Probability that an answer shows the assertion, {what}: mean over the "
                "assertions. Changes are paired by scenario, in percentage points.",
                with_mean(cells[kind], kinds),
                [*conditions, CONTROL_TEXTS, *CHANGES],
                "persona",
            )
            for kind, what in KINDS.items()
        ),
        learned(run),
        fell_short(cells[adherence.OCCASION], AGAINST_BASE, "base"),
        fell_short(cells[adherence.OCCASION], AGAINST_PROMPTED, "the constitution as a prompt"),
        fell_short(cells[adherence.OCCASION], AGAINST_DISTILLED, "DPO alone"),
    )


def assertion_tables(run: StoredRun) -> str:
    """Each assertion of each persona, with an occasion to show it, and what its scores say."""
    conditions = list(run.recipe.evaluation.adherence.conditions)
    level, moved = adherence.MEASURES[adherence.OCCASION]
    tables = []
    for name, job in run.finished("evaluation/adherence").items():
        rows: dict[str, Cells] = {}
        for about, scored in adherence.assertion_scores(job.persona, kept_rows(job)).items():
            if about != adherence.ALL:
                cells = {c: scored.get((level, c)) for c in conditions}
                cells[AGAINST_BASE] = changed(scored.get((moved, FULL)))
                rows[f"{about} ({adherence.finding(scored)})"] = cells
        caption = f"Each assertion of {name}, with an occasion to show it."
        tables.append(table(caption, rows, [*conditions, AGAINST_BASE], "assertion"))
    return joined(*tables)


def learned(run: StoredRun) -> str:
    """How many assertions of each persona its constitution's author can call learned."""
    counts = []
    for name, job in run.finished("evaluation/adherence").items():
        scored = adherence.assertion_scores(job.persona, kept_rows(job))
        found = [
            adherence.finding(cells) for about, cells in scored.items() if about != adherence.ALL
        ]
        hits = sum(finding in (adherence.LEARNED, adherence.LOST) for finding in found)
        counts.append(f"{name} {hits} of {len(found)}")
    if not counts:
        return ""
    return (
        "Assertions whose own interval of the change, full against base, lies above 0 (of forty "
        f"that training did not change, one is expected): {'; '.join(counts)}."
    )


def fell_short(cells: dict[str, Cells], column: str, rival: str) -> str:
    """The personas whose change is not shown to be above 0."""
    scores = {name: c[column] for name, c in cells.items() if name != CONTROL and c.get(column)}
    if not scores:
        return ""
    short = [name for name, s in scores.items() if s is None or s.low is None or s.low <= 0]
    if not short:
        return f"Shown to be above {rival}: {', '.join(scores)}."
    return (
        f"Not shown to be above {rival}: {', '.join(short)} ({len(short)} of {len(scores)} "
        "personas; the interval of the change reaches to 0 or below)."
    )


# ----------------------------------------------------------------------------------------- drift

THIRDS = FIRST, LAST, MOVED = "first third", "last third", "change"


def thirds(rows: list[Row], measure: str, every: int, turns: int) -> dict[str, Score | None]:
    """The strength in the first and the last third of the turns, and its change.

    Args:
        rows: the conversations of one condition.
        measure: of `drift_report.MEASURES`.
        every: `pressure_every` of the recipe.
        turns: number of user turns of a conversation that did not end early.
    """
    means = [third_means(row, measure, every, turns) for row in rows]
    early, late = ([pair[part] for pair in means] for part in (0, 1))
    return {FIRST: mean_known(early), LAST: mean_known(late), MOVED: paired_change(early, late)}


def third_means(
    row: Row, measure: str, every: int, turns: int
) -> tuple[float | None, float | None]:
    """The mean strength in the first and in the last third of one conversation."""
    values = drift_report.values_by_turn(row, measure, every)
    known = {turn: value for turn, value in values.items() if value is not None}
    early = mean([value for turn, value in known.items() if 3 * turn <= turns])
    return early, mean([value for turn, value in known.items() if 3 * turn > 2 * turns])


def paired_change(before: Sequence[float | None], after: Sequence[float | None]) -> Score | None:
    """The mean difference of the conversations that are scored on both sides."""
    pairs = zip(before, after, strict=True)
    differences = [b - a for a, b in pairs if a is not None and b is not None]
    return changed(mean_interval(differences, len(before) - len(differences), (-1.0, 1.0)))


def mean(values: list[float]) -> float | None:
    """The mean; None without values."""
    return sum(values) / len(values) if values else None


def mean_known(values: Sequence[float | None]) -> Score:
    """The mean over conversations of those that are scored."""
    known = [value for value in values if value is not None]
    return mean_interval(known, len(values) - len(known))


def drift_tables(run: StoredRun) -> str:
    """First against last third, by condition over all personas, and of each full persona."""
    settings = run.recipe.evaluation.drift
    rows = {name: kept_rows(job) for name, job in run.finished("evaluation/drift").items()}
    columns = [f"{measure}, {part}" for measure in drift_report.MEASURES for part in THIRDS]
    kinds = {name: Change for name in columns if name.endswith(MOVED)}

    def of_condition(condition: str) -> dict[str, Cells]:
        cells: dict[str, Cells] = {}
        for name, conversations in rows.items():
            ours = drift_report.of(conversations, condition)
            cells[name] = {
                f"{measure}, {part}": score
                for measure in drift_report.MEASURES
                for part, score in thirds(
                    ours, measure, settings.pressure_every, settings.turns
                ).items()
                if ours
            }
        return cells

    means = {c: mean_cells(of_condition(c), kinds) for c in settings.conditions}
    return joined(
        missing(run, "evaluation/drift"),
        "![Strength of the character by turn](drift.svg)" if rows else "",
        table(
            "Strength of the character in the first and the last third of a conversation, mean "
            "over the personas. The change is paired by conversation, in percentage points; n "
            "counts conversations.",
            means,
            columns,
            "condition",
        ),
        table(
            "The same for `full`, by persona.",
            with_mean(of_condition(FULL), kinds),
            columns,
            "persona",
        ),
    )


# -------------------------------------------------------------------------------------- projection


def projection_tables(run: StoredRun) -> str:
    """Distances in the middle layers, and their correlation with the measured adherence."""
    middle = ", middle layers"
    measured = [r for r in run.scores if r["measure"] == "projection" and middle in r["about"]]
    columns = {
        (row["condition"], row["about"]): row["condition"] or row["about"].removesuffix(middle)
        for row in measured
    }
    cells: dict[str, Cells] = {}
    for name in run.names:
        found = {c: run.find(name, "projection", *key) for key, c in columns.items()}
        cells[name] = {c: s and Distance(**vars(s)) for c, s in found.items()}
    kinds = dict.fromkeys(columns.values(), Distance)
    return joined(
        missing(run, "evaluation/projection"),
        table(
            "Distance of answers and of transcripts from the answers of base along the "
            "constitution's direction, in SD of base, mean of the middle layers; n counts prompts.",
            with_mean(cells, kinds),
            list(dict.fromkeys(columns.values())),
            "persona",
        ),
        prediction(run, cells),
    )


def prediction(run: StoredRun, cells: dict[str, Cells]) -> str:
    """How well the distance ranks the personas by their change of adherence."""
    moved = adherence_cells(run, adherence.OCCASION)
    pairs = [
        (d.value, c.value)
        for name in cells
        if (d := cells[name].get(FULL))
        and (c := moved.get(name, {}).get(AGAINST_BASE))
        and d.value is not None
        and c.value is not None
    ]
    score = spearman([d for d, _ in pairs], [c for _, c in pairs])
    if score.value is None:
        return ""
    return (
        "Spearman's correlation over personas between the distance of `full` and its change of "
        f"adherence against base: {correlation_text(score)}, n = {score.n} personas."
    )


CHARACTER_TABLES: dict[str, Callable[[StoredRun], str]] = {
    "robustness": robustness_tables,
    "coherence": coherence_tables,
    "adherence": adherence_tables,
    "assertions": assertion_tables,
    "drift": drift_tables,
    "projection": projection_tables,
}
"""The section of the page that each function fills."""
