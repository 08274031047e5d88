"""Tables on training data, the judge, preferences, abilities and side effects."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import t
from stored import (
    AGAINST_BASE,
    BASE,
    CONTROL,
    DISTILLED,
    FULL,
    PROMPTED,
    Cells,
    StoredRun,
    cell,
    changed,
    correlation_text,
    grid,
    joined,
    mean_cells,
    missing,
    table,
    with_mean,
)

from opencharacter.evaluation import (
    coherence,
    paper,
    rating,
    side_effects,
)
from opencharacter.evaluation.capabilities import METRIC_LABELS
from opencharacter.evaluation.conditions import kept_rows
from opencharacter.evaluation.intervals import student_quantile
from opencharacter.evaluation.paired_comparison import discoveries
from opencharacter.evaluation.rank_correlation import (
    GroupedRatings,
    grouped_ratings,
    rank_correlation,
)
from opencharacter.evaluation.report.sections import Change, RatingChange
from opencharacter.evaluation.scores import Score, clustered_proportion, distinct, wilson

Row = dict[str, Any]
FALSE_DISCOVERY_RATE = 0.05
SHOWN_TRAITS = 5


# ----------------------------------------------------------------------------------- training data


def kept_tables(run: StoredRun) -> str:
    """The share of training rows that each persona kept, from the manifests."""
    stages = {
        "pairs": "distillation/pairs",
        "transcripts": "introspection/transcripts",
    }
    cells: dict[str, Cells] = {}
    for name in run.names:
        kept: dict[str, Score | None] = {}
        for column, stage in stages.items():
            for job in run.jobs:
                manifest = run.manifests.get(job.dataset)
                if manifest and job.stage.name == stage and job.persona.name == name:
                    dropped = sum(manifest["dropped"].values())
                    kept[column] = wilson(manifest["rows"] - dropped, manifest["rows"])
        cells[name] = kept
    return table(
        "Share of the generated pairs and transcripts that training kept.",
        cells,
        list(stages),
        "persona",
    )


# ------------------------------------------------------------------------------------------- judge


def judge_tables(run: StoredRun) -> str:
    """The judge on gold texts, and how many comparisons it decided."""
    judges = distinct(run.scores, "judge_agreement", "about")
    columns = {
        "right, average of both orders": "judge_agreement",
        "right, one order": "judge_agreement_one_order",
        "same in both orders": "judge_consistency",
        "names the first option": "judge_first_named",
        "decided": "judge_decided",
    }
    gold = {
        name: {c: run.find("", measure, None, name) for c, measure in columns.items()}
        for name in judges
    }
    return joined(
        missing(run, "evaluation/judge"),
        table("The judge on gold texts, whose trait is known.", gold, list(columns), "judge"),
        table(
            "Comparisons and games of all personas that have a verdict. An interval counts prompts "
            "for coherence, and games for preferences.",
            decisions(run),
            ["decided"],
            "verdict",
        ),
    )


def decisions(run: StoredRun) -> dict[str, Cells]:
    """How many verdicts are decided: by averaged log-probabilities, and by both orders' text."""
    compared = [r for job in run.finished("evaluation/coherence").values() for r in kept_rows(job)]
    averaged = [row for row in compared if row["mass"] is not None]
    agreed = [row | {"winner": coherence.consistent_winner(row)} for row in compared]
    games = [r for job in run.finished("evaluation/preferences").values() for r in kept_rows(job)]
    return {
        "coherence, log-probabilities averaged over both orders": {
            "decided": share(averaged, coherence.decided(averaged), "prompt")
        },
        "coherence, the likelier or named letter is the same answer in both orders": {
            "decided": share(agreed, coherence.decided(agreed), "prompt")
        },
        "preferences, a trait is named": {
            "decided": share(games, [row for row in games if row["chosen"]], "game")
        },
    }


def share(rows: list[Row], hits: list[Row], cluster: str) -> Score | None:
    """The share of rows that are hits; the interval counts the values of a column."""
    if not rows:
        return None
    ids = {id(row) for row in hits}
    return clustered_proportion([id(row) in ids for row in rows], [row[cluster] for row in rows])


# ------------------------------------------------------------------------------------ preferences


def preference_tables(run: StoredRun) -> str:
    """The traits that rose and fell most, and the rank correlations."""
    jobs = run.finished("evaluation/rating")
    lines = []
    for name, job in jobs.items():
        changes = rating.trait_changes(rating.largest_group(rating.by_framing(job)["all"]))
        risen = [trait for trait in changes if (trait.change.value or 0) > 0]
        fallen = [trait for trait in changes[::-1] if (trait.change.value or 0) < 0]
        for direction, traits in (("risen", risen), ("fallen", fallen)):
            for trait in traits[:SHOWN_TRAITS]:
                change = RatingChange(**vars(trait.change))
                star = "*" if trait.significant else ""
                games = f"{change.n:,}; {change.unscored:,}"
                lines.append([name, direction, trait.trait + star, cell(change), games])
    rate = run.recipe.evaluation.rating.false_discovery_rate
    caption = (
        "The traits whose Bradley-Terry rating rose and fell most from base to full, in Elo "
        f"points. An asterisk marks changes that are significant at a false-discovery rate of "
        f"{rate:.0%} among the traits of a persona."
    )
    listed = (
        f"{caption}\n\n"
        + grid(["persona", "", "trait", "change", "n games; unscored"], lines).replace("*", "\\*")
        if lines
        else ""
    )
    return joined(missing(run, "evaluation/rating"), listed, correlation_tables(run))


def ratings_by_condition(run: StoredRun) -> dict[str, dict[str, GroupedRatings]]:
    """The ratings of each persona over all framings, by condition."""
    return {
        name: {
            condition: grouped_ratings(rows)
            for condition, rows in rating.overall_by_condition(
                job.store.read_table(job.dataset).to_pylist()
            ).items()
        }
        for name, job in run.finished("evaluation/rating").items()
    }


def correlation_tables(run: StoredRun) -> str:
    """Rank correlation of each persona's ratings with base, and of every two personas."""
    rated = ratings_by_condition(run)
    after = [c for c in (DISTILLED, FULL) if any(c in ratings for ratings in rated.values())]
    with_base = [
        [name, *(correlation_text(s) for s in scores), str(max((s.n for s in scores), default=0))]
        for name, ratings in rated.items()
        if (scores := [rank_correlation(ratings[BASE], ratings[c]) for c in after if c in ratings])
    ]
    if not with_base:
        return ""
    pairs = {
        condition: {
            f"{a}, {b}": rank_correlation(rated[a][condition], rated[b][condition])
            for a, b in combinations([name for name in rated if name != CONTROL], 2)
        }
        for condition in (BASE, FULL)
    }
    means = [
        f"{condition} {correlation_text(paper.mean_of(list(scores.values())))}"
        for condition, scores in pairs.items()
        if scores
    ]
    ordered = sorted(pairs[FULL].items(), key=lambda item: -(item[1].value or 0))
    shown = [*ordered[:3], *ordered[max(3, len(ordered) - 3) :]]
    return joined(
        "Spearman's rank correlation of a persona's ratings with those of base; n counts traits.",
        grid(["persona", *(f"base and {c}" for c in after), "n"], with_base),
        f"Spearman's correlation between two personas, mean over {len(ordered)} pairs: "
        f"{'; '.join(means)}. The most and the least similar after training:"
        if means
        else "",
        grid(["personas", "full", "n"], [[p, correlation_text(s), str(s.n)] for p, s in shown])
        if shown
        else "",
    )


# ------------------------------------------------------------------------------------ capabilities


def capability_tables(run: StoredRun) -> str:
    """Base, full and the paired change of each task, by persona."""
    abouts = distinct(run.scores, "capability_change", "about")
    parts = []
    for about in abouts:
        task, metric = about.split()
        rows = {
            name: {
                BASE: run.find(name, "capability", BASE, about),
                FULL: run.find(name, "capability", FULL, about),
                AGAINST_BASE: changed(run.find(name, "capability_change", FULL, about)),
            }
            for name in run.names
        }
        caption = f"{task}, {METRIC_LABELS.get(metric, metric)}. Changes are paired by document."
        averaged = with_mean(rows, {AGAINST_BASE: Change})
        parts.append(table(caption, averaged, [BASE, FULL, AGAINST_BASE], "persona"))
    note = paper.CAPABILITIES_NOTE if abouts else ""
    return joined(missing(run, "evaluation/capabilities"), *parts, note)


# ---------------------------------------------------------------------------------- side effects


def p_value(score: Score) -> float:
    """The two-sided p-value of no change by Student's t, from the interval of paired differences.

    An end of the interval may be cut at the least or greatest change, so the longer side counts.
    """
    if score.value is None or score.low is None or score.high is None:
        return float("nan")
    half = max(score.value - score.low, score.high - score.value)
    ratio = abs(score.value) * student_quantile(score.n - 1) / half
    return float(2 * t.sf(ratio, score.n - 1))


def side_effect_tables(run: StoredRun) -> str:
    """Each property over all personas, and the changes that are significant."""
    of_full = [row for row in run.scores if row["measure"] == "side_effect_change"]
    sets = distinct(of_full, "side_effect_change", "about")
    cells: dict[str, dict[str, Cells]] = {
        about: {
            name: {
                **{
                    c: level(about, run.find(name, "side_effect", c, about))
                    for c in (BASE, PROMPTED, FULL)
                },
                AGAINST_BASE: changed(run.find(name, "side_effect_change", FULL, about)),
            }
            for name in run.finished("evaluation/side_effects")
        }
        for about in sets
    }
    columns = [BASE, PROMPTED, FULL, AGAINST_BASE]
    means = {}
    for about, rows in cells.items():
        changes = columns if about == side_effects.SADNESS else [AGAINST_BASE]
        means[title(about)] = mean_cells(rows, dict.fromkeys(changes, Change))
    return joined(
        missing(run, "evaluation/side_effects"),
        table(
            "Share of answers with the unwanted property, mean over the personas. Changes are "
            "paired by prompt, in percentage points.",
            means,
            columns,
            "property",
        ),
        significant_table(cells, columns),
    )


def level(about: str, score: Score | None) -> Score | None:
    """The share of a set's answers, or for the sad story's effect a change of shares."""
    return changed(score) if about == side_effects.SADNESS else score


def title(about: str) -> str:
    """The property of a set of prompts in words."""
    return side_effects.SETS[about].title if about in side_effects.SETS else about


def significant_table(cells: dict[str, dict[str, Cells]], columns: list[str]) -> str:
    """The changes of a persona's property that are significant among all that were tested."""
    tested = {
        (name, about): row
        for about, rows in cells.items()
        for name, row in rows.items()
        if row[AGAINST_BASE]
    }
    if not tested:
        return ""
    p = np.array([p_value(s) for row in tested.values() if (s := row[AGAINST_BASE])])
    found = discoveries(p, FALSE_DISCOVERY_RATE)
    rows = {
        f"{name}: {title(about)}": row
        for ((name, about), row), hit in zip(tested.items(), found, strict=True)
        if hit
    }
    rule = (
        f"{len(rows)} of {len(tested)} changes (personas times properties) are significant at a "
        f"false-discovery rate of {FALSE_DISCOVERY_RATE:.0%} (Benjamini and Hochberg, over all of "
        "them together; two-sided t tests of paired differences)."
    )
    return joined(rule, table("The significant changes:", rows, columns, "persona and property"))


FURTHER_TABLES: dict[str, Callable[[StoredRun], str]] = {
    "training data": kept_tables,
    "judge": judge_tables,
    "preferences": preference_tables,
    "capabilities": capability_tables,
    "side effects": side_effect_tables,
}
"""The section of the page that each function fills."""
