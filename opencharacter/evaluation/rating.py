"""Stage evaluation/rating: traits as players; how strongly each shows, and what changed.

Two ratings of the same games. Sequential Elo is the paper's: one pass in order, so a game's weight
hangs on its place. Bradley-Terry is the maximum of the likelihood of all games at once, with
intervals from a bootstrap over games, or from the information in them where that says less: a
resample cannot lose what was never lost. Every condition plays the same games, so a resample draws
the same games for all and a change keeps its pairs. A trait without a scored game has no rating.

Reads: evaluation/preferences. Writes: condition, framing, trait, elo, rating with interval, games,
change against base with interval, p, significant.
Run: opencharacter run RECIPE --constitution NAME --only evaluation/rating
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opencharacter.config.recipe import Rating
from opencharacter.errors import StageFailed, UserError
from opencharacter.evaluation.scores import Z95, Score
from opencharacter.runtime.stage import Estimate, Job, StageResult, read_all
from opencharacter.text.chat import row_seed

Array = NDArray[np.float64]
Player = TypeVar("Player", bound=Hashable)

ALL_FRAMINGS = "all"
GAME = ("game", "condition", "framing", "first", "second", "chosen")
BATCH = 50
"""Resamples solved at once: their matrices fit into a cache, not the resamples of a whole run."""
TOLERANCE = 1e-9
MAX_STEPS = 100
UNBOUNDED = 20.0
"""Logits that no number of games could tell from infinity."""
LARGEST_STEP = 2.0
"""Of one Newton step, in logits: a full step may overshoot where a trait wins nearly always."""

SCHEMA = pa.schema(
    [
        pa.field("condition", pa.string(), nullable=False),
        pa.field("framing", pa.string(), nullable=False),
        pa.field("trait", pa.string(), nullable=False),
        pa.field("elo", pa.float64()),
        pa.field("rating", pa.float64()),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("games", pa.int64(), nullable=False),
        pa.field("unscored", pa.int64(), nullable=False),
        pa.field("change", pa.float64()),
        pa.field("change_low", pa.float64()),
        pa.field("change_high", pa.float64()),
        pa.field("p", pa.float64()),
        pa.field("significant", pa.bool_()),
    ]
)


# ------------------------------------------------------------------------------------------- Elo


def elo(
    games: Iterable[tuple[Player, Player]],
    players: Iterable[Player],
    start: float,
    k: float,
    scale: float,
) -> dict[Player, float]:
    """Ratings after one pass over the games in order (Elo, 1978), to two decimals.

    Args:
        games: (winner, loser).
        players: everyone; who has no game keeps `start`.
        start: everyone's first rating.
        k: the most that one game moves.
        scale: points at which the stronger is expected to win ten times as often.
    """
    ratings = dict.fromkeys(players, start)
    for winner, loser in games:
        expected = 1 / (1 + 10 ** ((ratings[loser] - ratings[winner]) / scale))
        ratings[winner] += k * (1 - expected)
        ratings[loser] -= k * (1 - expected)
    return {player: round(rating, 2) for player, rating in ratings.items()}


# --------------------------------------------------------------------------------- Bradley-Terry


def strengths(wins: Array, prior: float) -> Array:
    """Maximum-likelihood strengths of Bradley and Terry (1952), by Newton's method.

    P(i beats j) = 1 / (1 + exp(s_j - s_i)). All resamples of a batch are solved at once.

    Args:
        wins: (..., n, n); `wins[..., i, j]` is how often i beat j.
        prior: games that each also plays against the average player, half of them won; 0 is plain
            maximum likelihood.

    Returns:
        (..., n) logits with mean 0.

    Raises:
        StageFailed: if there is no maximum: a group never lost, or never won, against the rest.
    """
    won, played = wins.sum(-1), wins + np.swapaxes(wins, -1, -2)
    found = np.zeros(wins.shape[:-1])
    for _ in range(MAX_STEPS):
        slope, bend = likelihood(found, won, played, prior)
        try:
            step = np.linalg.solve(bend, slope[..., None])[..., 0]
        except np.linalg.LinAlgError:
            break
        found = found + np.clip(step, -LARGEST_STEP, LARGEST_STEP)
        if np.abs(found).max() > UNBOUNDED:
            break
        if np.abs(step).max() < TOLERANCE:
            return found - found.mean(-1, keepdims=True)
    raise StageFailed(
        "Bradley-Terry ratings have no maximum: some traits won or lost every game against the "
        "rest; play more games, or set evaluation.rating.prior above 0"
    )


def likelihood(found: Array, won: Array, played: Array, prior: float) -> tuple[Array, Array]:
    """Slope (..., n) and information (..., n, n) of the log-likelihood, with its prior.

    Args:
        found: (..., n) strengths.
        won: (..., n) games that each won.
        played: (..., n, n) games between two.
        prior: of `strengths`.
    """
    n = found.shape[-1]
    expected = 1 / (1 + np.exp(found[..., None, :] - found[..., :, None]))
    against = 1 / (1 + np.exp(-found))
    slope = won - (played * expected).sum(-1) + prior * (0.5 - against)
    weights = played * expected * (1 - expected)
    bend = -weights + (0 if prior else 1 / n)  # no game decides the mean
    bend[..., range(n), range(n)] += weights.sum(-1) + prior * against * (1 - against)
    return slope, bend


def points(logits: Array, start: float, scale: float) -> Array:
    """Logits as Elo points: `scale` points are odds of ten to one."""
    return start + logits * scale / math.log(10)


@dataclass(frozen=True)
class Played:
    """The games of one condition as arrays, in the order of the game's number.

    Args:
        numbers: (m,) which game of the design each scored one is.
        winners: (m,) index of the trait that was named.
        losers: (m,) index of the other one.
    """

    numbers: NDArray[np.int64]
    winners: NDArray[np.int64]
    losers: NDArray[np.int64]

    def wins(self, weights: NDArray[np.int64], traits: int) -> Array:
        """Win matrices of resamples.

        Args:
            weights: (resamples, games) how often each game of the design was drawn.
            traits: number of traits.

        Returns:
            (resamples, traits, traits).
        """
        cells = self.winners * traits + self.losers
        drawn = weights[:, self.numbers]
        counted = [np.bincount(cells, row, traits * traits) for row in drawn]
        return np.asarray(counted, float).reshape(len(weights), traits, traits)


def bootstrap(
    conditions: dict[str, Played], games: int, traits: int, resamples: int, prior: float, seed: int
) -> dict[str, Array]:
    """Strengths under resampled games, the same games in every condition.

    Args:
        conditions: what was played under each.
        games: of the design, scored or not.
        traits: number of traits.
        resamples: how many.
        prior: of `strengths`.
        seed: of the draws.

    Returns:
        (resamples, traits) logits for each condition.
    """
    draw = np.random.default_rng(seed)
    found: dict[str, list[Array]] = {name: [] for name in conditions}
    for at in range(0, resamples, BATCH):
        size = min(BATCH, resamples - at)
        picks = draw.integers(games, size=(size, games))
        weights = np.asarray([np.bincount(row, minlength=games) for row in picks])
        for name, played in conditions.items():
            found[name].append(strengths(played.wins(weights, traits), prior))
    return {name: np.concatenate(batches) for name, batches in found.items()}


@dataclass(frozen=True)
class MemoryPlan:
    """What the games of one condition say of its traits, or of the difference of two conditions.

    Args:
        best: (traits,) logits.
        again: (resamples, traits) logits under resampled games.
        missed: (traits, traits) covariance of `best` by the information, less that of `again`.
        rated: (traits,) who has a scored game.
    """

    best: Array
    again: Array
    missed: Array
    rated: NDArray[np.bool_]

    def minus(self, other: MemoryPlan) -> MemoryPlan:
        """The change from another condition; what their shared games have in common cancels."""
        return MemoryPlan(
            self.best - other.best,
            self.again - other.again,
            self.missed + other.missed,
            self.rated & other.rated,
        )

    def estimate(self) -> tuple[Array, Array]:
        """Logits about the mean of those rated, and their standard errors; NaN for the others.

        The error is the larger one of the resamples and of the Fisher information: of a trait that
        lost few games many resamples hold none that it lost, and differ too little.
        """
        share = self.rated / max(self.rated.sum(), 1)
        about_mean = np.eye(len(share)) - share
        resampled = (self.again @ about_mean.T).var(0, ddof=1)
        missed = np.einsum("ij,jk,ik->i", about_mean, self.missed, about_mean)
        best, error = about_mean @ self.best, np.sqrt(resampled + np.maximum(missed, 0))
        return np.where(self.rated, best, np.nan), np.where(self.rated, error, np.nan)


def fit(played: Played, again: Array, prior: float) -> MemoryPlan:
    """The strengths of one condition, from its games and from what `bootstrap` made of them."""
    wins = np.zeros((again.shape[-1],) * 2)
    np.add.at(wins, (played.winners, played.losers), 1)
    best, games = strengths(wins, prior), wins + wins.T
    _, information = likelihood(best, wins.sum(-1), games, prior)
    missed = np.linalg.inv(information) - np.cov(again, rowvar=False)
    return MemoryPlan(best, again, np.asarray(missed, float), games.sum(-1) > 0)


def interval(estimate: Array, error: Array) -> tuple[Array, Array]:
    """95 % intervals from standard errors (normal).

    Percentiles would also carry the bootstrap's own spread of strengths away from the mean, which
    made them cover less than they say.
    """
    return estimate - Z95 * error, estimate + Z95 * error


def p_values(change: Array, error: Array) -> Array:
    """Two-sided p of no change (normal); NaN where none was measured.

    It is not small for a trait that never lost: the error then grows as fast as the rating (Hauck
    and Donner, 1977).
    """
    from scipy.stats import norm

    z = np.divide(np.abs(change), error, out=np.full_like(change, np.nan), where=error > 0)
    return 2 * norm.sf(z)


def discoveries(p: Array, rate: float) -> NDArray[np.bool_]:
    """Which hold when a share of at most `rate` may be false (Benjamini and Hochberg, 1995).

    NaN was not tested: it is no discovery, and no part of what the others are weighed by.
    """
    from scipy.stats import false_discovery_control

    tested = ~np.isnan(p)
    held = np.zeros(len(p), bool)
    held[tested] = false_discovery_control(p[tested]) <= rate
    return held


def games_needed(half_width: float, traits: int, scale: float) -> int:
    """Games that give an average trait's rating a 95 % interval of +- `half_width` points.

    From the Fisher information of a random design over traits that are about as strong:
    Var(s) = 2 (n - 1)^2 / (n games) in logits. Unequal strengths need more.
    """
    error = half_width / Z95 * math.log(10) / scale
    return math.ceil(2 * (traits - 1) ** 2 / (traits * error**2))


def half_width(games: int, traits: int, scale: float) -> float:
    """The inverse of `games_needed`: points to each side that so many games give."""
    return Z95 * scale / math.log(10) * (traits - 1) * math.sqrt(2 / (traits * games))


def spearman(a: Sequence[float], b: Sequence[float]) -> Score:
    """Rank correlation with a 95 % interval (Bonett and Wright, 2000, doi:10.1007/BF02294183).

    Args:
        a: ratings of one student.
        b: of the other, of the same traits in the same order.
    """
    from scipy.stats import spearmanr

    n = len(a)
    if n < 4:
        return Score(None, None, None, n)
    r = float(np.asarray(spearmanr(a, b))[0])
    if not math.isfinite(r):
        return Score(None, None, None, n)
    z, half = (
        math.atanh(min(max(r, -0.999999), 0.999999)),
        Z95 * math.sqrt((1 + r * r / 2) / (n - 3)),
    )
    return Score(r, math.tanh(z - half), math.tanh(z + half), n)


def between(folders: Sequence[str], condition: str) -> list[tuple[str, str, Score]]:
    """Rank correlation of every two rating datasets, over the traits that both have.

    Args:
        folders: of the datasets, `<storage>/<student>/<persona>/evaluation/rating`.
        condition: whose ratings are compared.

    Raises:
        UserError: if a folder has no such ratings.
    """
    rated = [read_ratings(folder, condition) for folder in folders]
    pairs = combinations(zip(folders, rated, strict=True), 2)
    return [(one, two, alike(a, b)) for (one, a), (two, b) in pairs]


def alike(a: dict[str, float], b: dict[str, float]) -> Score:
    """Rank correlation over the traits that both have a rating of."""
    shared = sorted(a.keys() & b.keys())
    return spearman([a[trait] for trait in shared], [b[trait] for trait in shared])


def read_ratings(folder: str, condition: str) -> dict[str, float]:
    """Bradley-Terry ratings by trait, over all framings, of a dataset of this stage.

    Those without a rating are left out.
    """
    file = f"{folder.rstrip('/')}/rows.parquet"
    try:
        rows = pq.read_table(file, columns=["condition", "framing", "trait", "rating"]).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"ratings {file!r} cannot be read: {str(error).splitlines()[0]}; name folders of the "
            "form STORAGE/STUDENT/PERSONA/evaluation/rating"
        ) from None
    wanted = (condition, ALL_FRAMINGS)
    found = {r["trait"]: r["rating"] for r in rows if (r["condition"], r["framing"]) == wanted}
    if not found:
        known = ", ".join(sorted({row["condition"] for row in rows}))
        raise UserError(f"ratings {file!r} have no condition {condition!r}; there are {known}")
    return {trait: rating for trait, rating in found.items() if rating is not None}


# ------------------------------------------------------------------------------------------ rows


def arrays(rows: list[dict[str, Any]], index: dict[str, int]) -> Played:
    """Scored games as arrays."""
    scored = sorted((row for row in rows if row["chosen"]), key=lambda row: row["game"])
    lost = [row["second"] if row["chosen"] == row["first"] else row["first"] for row in scored]
    return Played(
        np.array([row["game"] for row in scored], np.int64),
        np.array([index[row["chosen"]] for row in scored], np.int64),
        np.array([index[trait] for trait in lost], np.int64),
    )


def rate(rows: list[dict[str, Any]], settings: Rating, seed: int) -> list[dict[str, Any]]:
    """Ratings of every trait under every condition, from the games of one framing or of all.

    Args:
        rows: games with game, condition, first, second, chosen; all of one design.
        settings: the section.
        seed: of the bootstrap.

    Returns:
        Rows of `SCHEMA` without their framing; None for what has no scored game.
    """
    traits = sorted({row[side] for row in rows for side in ("first", "second")})
    index = {trait: i for i, trait in enumerate(traits)}
    numbers = {game: i for i, game in enumerate(sorted({row["game"] for row in rows}))}
    mine: dict[str, list[dict[str, Any]]] = {c: [] for c in sorted({r["condition"] for r in rows})}
    for row in rows:
        mine[row["condition"]].append({**row, "game": numbers[row["game"]]})
    played = {condition: arrays(games, index) for condition, games in mine.items()}
    n, prior = len(traits), settings.prior
    again = bootstrap(played, len(numbers), n, settings.resamples, prior, seed)
    fits = {condition: fit(games, again[condition], prior) for condition, games in played.items()}
    rated = []
    for condition, games in played.items():
        columns = condition_columns(condition, fits, settings)
        columns["elo"] = np.where(fits[condition].rated, in_order(games, n, settings), np.nan)
        scored, unscored = (offers(mine[condition], read) for read in (True, False))
        rated += [
            {"condition": condition, "trait": trait}
            | {"games": scored[trait], "unscored": unscored[trait]}
            | {name: known(column[i].item()) for name, column in columns.items()}
            for trait, i in index.items()
        ]
    return rated


def known(value: float) -> float | None:
    return None if math.isnan(value) else value


def in_order(games: Played, traits: int, settings: Rating) -> Array:
    """Sequential Elo of every trait, by index."""
    pairs = zip(games.winners.tolist(), games.losers.tolist(), strict=True)
    rated = elo(pairs, range(traits), settings.start, settings.k, settings.scale)
    return np.array([rated[i] for i in range(traits)])


def offers(rows: list[dict[str, Any]], scored: bool) -> Counter[str]:
    """How often each trait was on offer in the games that were scored, or were not."""
    games = [row for row in rows if (row["chosen"] is not None) == scored]
    return Counter(row[side] for row in games for side in ("first", "second"))


def condition_columns(
    condition: str, fits: dict[str, MemoryPlan], settings: Rating
) -> dict[str, Any]:
    """Rating and change of one condition's traits, a column each, in points."""
    rating, error = fits[condition].estimate()
    low, high = interval(rating, error)
    ends = {"rating": rating, "low": low, "high": high}
    start, scale = settings.start, settings.scale
    columns: dict[str, Any] = {name: points(v, start, scale) for name, v in ends.items()}
    if condition != "base" and "base" in fits:
        change, error = fits[condition].minus(fits["base"]).estimate()
        low, high = interval(change, error)
        moved = {"change": change, "change_low": low, "change_high": high}
        columns |= {name: points(v, 0, scale) for name, v in moved.items()}
        columns["p"] = p_values(change, error)
        columns["significant"] = discoveries(columns["p"], settings.false_discovery_rate)
    return columns


def estimate(job: Job) -> Estimate:
    return Estimate(0)


def notes(job: Job) -> list[str]:
    """What `plan` says of the games that the recipe asks for."""
    from opencharacter.evaluation.preferences import all_traits

    settings, played = job.config, job.recipe.evaluation.preferences
    traits = len(played.traits or all_traits())
    width = half_width(played.games, traits, settings.scale)
    needed = games_needed(settings.wanted, traits, settings.scale)
    return [
        f"ratings of {traits} traits: {played.games:,} games a condition give about +-{width:.0f} "
        f"points (95 %) if every verdict is readable; +-{settings.wanted:.0f} need {needed:,}"
    ]


def correlations(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How alike each condition ranks the traits to base, over all framings."""
    ratings: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["framing"] == ALL_FRAMINGS and row["rating"] is not None:
            ratings.setdefault(row["condition"], {})[row["trait"]] = row["rating"]
    base = ratings.pop("base", {})
    return {condition: vars(alike(base, mine)) for condition, mine in ratings.items()}


def build(job: Job) -> StageResult:
    table = read_all(job.parents, "evaluation/preferences", columns=list(GAME))
    rows = table.to_pylist()  # those that were dropped have no verdict, and count as unscored
    rated = []
    for framing in [ALL_FRAMINGS, *sorted({row["framing"] for row in rows})]:
        games = [row for row in rows if framing in (ALL_FRAMINGS, row["framing"])]
        seed = row_seed(job.recipe.seed, job.stage.name, framing)
        rated += [{**row, "framing": framing} for row in rate(games, job.config, seed)]
    job.store.write_table(job.dataset, pa.Table.from_pylist(rated, schema=SCHEMA))
    return StageResult(len(rated), figures={"spearman_with_base": correlations(rated)})
