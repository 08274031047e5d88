"""Ratings of the games that are stored so far, while evaluation/preferences runs.

Bradley-Terry strengths with intervals from the Fisher information, which is cheap but too narrow if
games of one pair depend on each other. The final ratings are those of evaluation/rating.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opencharacter.config.evaluation import Rating
from opencharacter.evaluation.conditions import in_order
from opencharacter.evaluation.paired_comparison import Array, derivatives, fit_strengths
from opencharacter.evaluation.rating import scored_games
from opencharacter.evaluation.report.sections import EloRating, ScoreTable, Section
from opencharacter.evaluation.scores import Z95
from opencharacter.runtime.stage import Job, without_dropped
from opencharacter.runtime.store import SHARDS, RemoteDir, Shards

Row = dict[str, Any]

SIDES = ("first", "second")
COLUMNS = ["id", "game", "condition", "first", "second", "chosen"]
SHOWN = 3
"""Traits that are shown for each condition: those with the highest ratings."""
MIN_PRIOR = 0.1
"""Prior games of a trait, without which few games determine no rating."""


def with_errors(wins: Array, prior: float) -> tuple[Array, Array]:
    """Strengths in logits and their standard errors from the Fisher information.

    Args:
        wins: shape (n, n); `wins[i, j]` is how often i beat j.
        prior: see `fit_strengths`.

    Returns:
        Both of shape (n,); strengths have mean 0.
    """
    strengths = fit_strengths(wins, prior)
    _, information = derivatives(strengths, wins.sum(-1), wins + wins.T, prior)
    n = len(strengths)
    center = np.eye(n) - 1 / n  # the error of a difference from the mean
    covariance = center @ np.linalg.inv(information) @ center
    return strengths, np.sqrt(np.diag(covariance))


def ratings_so_far(games: Iterable[Row], settings: Rating) -> dict[str, EloRating]:
    """The ratings of one condition's traits with their intervals, the highest first.

    A trait without a scored game has none. Intervals are not wider than those of the final ratings.

    Args:
        games: rows with the columns `COLUMNS`.
        settings: scale, start and prior of the ratings.
    """
    played = list(games)
    traits = sorted({row[side] for row in played for side in SIDES})
    scored = scored_games(played, {trait: i for i, trait in enumerate(traits)})
    if not len(scored.winners):
        return {}
    wins = scored.wins(len(traits))
    strengths, errors = with_errors(wins, max(settings.prior, MIN_PRIOR))
    points = settings.scale / math.log(10)
    ratings = settings.start + points * strengths
    half = Z95 * points * errors
    offered = Counter(row[side] for row in played for side in SIDES)
    won_or_lost = (wins + wins.T).sum(-1).astype(int)
    return {
        traits[i]: EloRating(
            float(ratings[i]),
            float(ratings[i] - half[i]),
            float(ratings[i] + half[i]),
            int(won_or_lost[i]),
            int(offered[traits[i]] - won_or_lost[i]),
        )
        for i in np.argsort(-strengths)
        if won_or_lost[i]
    }


def by_condition(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The games of each condition; a row that was stored twice counts once."""
    games = {row["id"]: row for row in rows}.values()
    conditions = in_order(row["condition"] for row in games)
    return {c: [row for row in games if row["condition"] == c] for c in conditions}


def describe(rows: Iterable[Row], settings: Rating) -> list[str]:
    """Describe each condition's ratings in a line: its highest traits, games, and unscored games.

    Args:
        rows: rows with the columns `COLUMNS`.
        settings: scale, start and prior of the ratings.
    """
    lines = []
    for condition, played in by_condition(rows).items():
        unscored = sum(row["chosen"] is None for row in played)
        count = f"{len(played) - unscored} games, {unscored} unscored"
        best = list(ratings_so_far(played, settings).items())[:SHOWN]
        rated = ", ".join(f"{trait} {plus_minus(rating)}" for trait, rating in best)
        lines.append(f"{condition}: {rated} ({count})" if best else f"{condition}: {count}")
    return lines


def plus_minus(rating: EloRating) -> str:
    """A rating with half the width of its interval."""
    value, high = rating.value or 0.0, rating.high or 0.0
    return f"{value:.0f} ± {high - value:.0f}"


def stored_rows(job: Job) -> list[Row]:
    """Read the games that an unfinished evaluation/preferences has stored, with their verdicts."""
    folder, store = f"{job.dataset}/{SHARDS}", job.store
    rows = []
    for phase in store.folders(folder):
        shards = Shards(RemoteDir(store, f"{folder}/{phase}"), pa.schema([]))
        for path in shards.files():
            if set(COLUMNS) <= set(pq.read_schema(path, filesystem=store.fs).names):
                rows += pq.read_table(path, filesystem=store.fs, columns=COLUMNS).to_pylist()
    return rows


def live(job: Job) -> list[str]:
    """Describe the ratings of an unfinished evaluation/preferences."""
    return describe(stored_rows(job), job.recipe.evaluation.rating)


# ----------------------------------------------------------------------------------------- report

READING = "ratings are Elo points about a mean of 1,000, and may still change."
NOTE = """\
Bradley-Terry ratings of the games that are stored so far, with 95% intervals from the Fisher \
information. They are narrower than the final intervals if games of one pair of traits depend on \
each other. Conditions may have played different games so far, so they are not compared yet. An \
unreadable verdict is unscored."""


def games_so_far(preferences: Iterable[Job]) -> list[Row]:
    """The games of jobs of evaluation/preferences, finished or not."""
    rows = []
    for job in preferences:
        if job.state()[0] == "done":
            table = job.store.read_table(job.dataset, columns=[*COLUMNS, "drop_reason"])
            rows += without_dropped(table).to_pylist()
        else:
            rows += stored_rows(job)
    return rows


def section(persona: str, rows: Iterable[Row], settings: Rating, count: int) -> list[Section]:
    """The ratings so far of the highest traits, by condition; nothing without a scored game.

    Args:
        persona: the persona's name.
        rows: rows with the columns `COLUMNS`.
        settings: scale, start and prior of the ratings.
        count: the number of traits to show.
    """
    games = by_condition(rows)
    ratings = {condition: ratings_so_far(played, settings) for condition, played in games.items()}
    if not any(ratings.values()):
        return []
    traits = dict.fromkeys(trait for rated in reversed(ratings.values()) for trait in rated)
    totals = ", ".join(f"{len(played):,} of {condition}" for condition, played in games.items())
    return [
        ScoreTable(
            title="Which traits does the model prefer so far? (provisional)",
            persona=persona,
            findings=(f"Provisional: games are still played. So far there are {totals}.",),
            reading=READING,
            notes=(NOTE,),
            caption="Ratings so far by trait and condition",
            columns=[condition.capitalize() for condition in ratings],
            rows={
                trait: {c.capitalize(): rated.get(trait) for c, rated in ratings.items()}
                for trait in list(traits)[:count]
            },
        )
    ]


def provisional(rating: Job) -> list[Section]:
    """The ratings so far of an unfinished job of evaluation/rating."""
    played = [p for p in rating.parents if p.stage.name == "evaluation/preferences"]
    count = rating.recipe.evaluation.report.traits
    return section(rating.persona.name, games_so_far(played), rating.config, count)
