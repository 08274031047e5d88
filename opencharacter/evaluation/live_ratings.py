"""Ratings of the games that are stored so far, while evaluation/preferences runs.

Bradley-Terry strengths with intervals from the Fisher information, which is cheap but too narrow if
games of one pair depend on each other. The final ratings are those of evaluation/rating.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opencharacter.config.evaluation import Rating
from opencharacter.evaluation.paired_comparison import Array, derivatives, fit_strengths
from opencharacter.evaluation.rating import scored_games
from opencharacter.evaluation.scores import Z95
from opencharacter.runtime.stage import Job
from opencharacter.runtime.store import SHARDS, RemoteDir, Shards

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


def describe(rows: Iterable[dict[str, Any]], settings: Rating) -> list[str]:
    """Describe each condition's ratings in a line: its highest traits, games, and unscored games.

    Args:
        rows: rows with the columns `COLUMNS`; a row that was stored twice counts once.
        settings: scale and prior of the ratings.
    """
    games = list({row["id"]: row for row in rows}.values())
    lines = []
    for condition in sorted({row["condition"] for row in games}):
        played = [row for row in games if row["condition"] == condition]
        traits = sorted({row[side] for row in played for side in ("first", "second")})
        scored = scored_games(played, {trait: i for i, trait in enumerate(traits)})
        count = f"{len(scored.winners)} games, {len(played) - len(scored.winners)} unscored"
        if not len(scored.winners):
            lines.append(f"{condition}: {count}")
            continue
        wins = scored.wins(len(traits))
        strengths, errors = with_errors(wins, max(settings.prior, MIN_PRIOR))
        points = settings.scale / math.log(10)
        met = (wins + wins.T).sum(-1) > 0
        best = [i for i in np.argsort(-strengths) if met[i]][:SHOWN]
        rated = ", ".join(
            f"{traits[i]} {settings.start + points * strengths[i]:.0f} "
            f"± {Z95 * points * errors[i]:.0f}"
            for i in best
        )
        lines.append(f"{condition}: {rated} ({count})")
    return lines


def stored_rows(job: Job) -> list[dict[str, Any]]:
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
