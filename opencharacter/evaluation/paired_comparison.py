"""Models of paired comparisons: sequential Elo and Bradley-Terry with bootstrap intervals.

Arrays of strengths are in logits: a difference of s means odds of exp(s) to win.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from opencharacter.errors import StageFailed
from opencharacter.evaluation.scores import Z95

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Player = TypeVar("Player", bound=Hashable)

BATCH = 50
"""Resamples that are solved at a time, so that their matrices fit into the CPU's cache."""
TOLERANCE = 1e-5
"""Largest Newton step, in logits, of a converged fit. Where nearly all games are won, rounding
alone makes steps of 1e-6."""
MAX_STEPS = 100
UNBOUNDED = 20.0
"""Logits beyond which a strength counts as infinite without a prior. With one, all are finite, but
a resample in which every trait beats all weaker ones may reach them."""
LARGEST_STEP = 2.0
"""Largest Newton step, in logits: a full step may overshoot if a player wins nearly always."""


def elo(
    games: Iterable[tuple[Player, Player]],
    players: Iterable[Player],
    start: float,
    k: float,
    scale: float,
) -> dict[Player, float]:
    """Sequential Elo ratings after one pass over the games (Elo, 1978), to two decimals.

    Args:
        games: (winner, loser), in order.
        players: all players; a player without a game keeps `start`.
        start: initial rating.
        k: maximum change by one game.
        scale: rating difference at which the stronger is expected to win ten times as often.
    """
    ratings = dict.fromkeys(players, start)
    for winner, loser in games:
        expected = 1 / (1 + 10 ** ((ratings[loser] - ratings[winner]) / scale))
        ratings[winner] += k * (1 - expected)
        ratings[loser] -= k * (1 - expected)
    return {player: round(rating, 2) for player, rating in ratings.items()}


def fit_strengths(wins: Array, prior: float) -> Array:
    """Maximum-likelihood strengths of Bradley and Terry (1952), by Newton's method.

    P(i beats j) = 1 / (1 + exp(s_j - s_i)). All matrices of a batch are solved at once.

    Args:
        wins: shape (..., n, n); `wins[..., i, j]` is how often i beat j.
        prior: number of games that each player also plays against the average player, half of them
            won; 0 is plain maximum likelihood.

    Returns:
        Logits of shape (..., n) with mean 0.

    Raises:
        StageFailed: if there is no maximum: a group never lost, or never won, against the rest.
    """
    won, played = wins.sum(-1), wins + np.swapaxes(wins, -1, -2)
    strengths = np.zeros(wins.shape[:-1])
    for _ in range(MAX_STEPS):
        gradient, information = derivatives(strengths, won, played, prior)
        try:
            step = np.linalg.solve(information, gradient[..., None])[..., 0]
        except np.linalg.LinAlgError:
            break
        strengths = strengths + np.clip(step, -LARGEST_STEP, LARGEST_STEP)
        if not prior and np.abs(strengths).max() > UNBOUNDED:
            break
        if np.abs(step).max() < TOLERANCE:
            return strengths - strengths.mean(-1, keepdims=True)
    raise StageFailed(
        "Bradley-Terry ratings have no maximum: some traits won or lost every game against the "
        "rest; play more games, or set evaluation.rating.prior above 0"
    )


def derivatives(strengths: Array, won: Array, played: Array, prior: float) -> tuple[Array, Array]:
    """Gradient and Fisher information of the log-likelihood with its prior.

    Args:
        strengths: shape (..., n), in logits.
        won: shape (..., n), games that each player won.
        played: shape (..., n, n), games between two players.
        prior: see `fit_strengths`.

    Returns:
        The gradient, shape (..., n), and the information, shape (..., n, n).
    """
    n = strengths.shape[-1]
    expected = 1 / (1 + np.exp(strengths[..., None, :] - strengths[..., :, None]))
    against_average = 1 / (1 + np.exp(-strengths))
    gradient = won - (played * expected).sum(-1) + prior * (0.5 - against_average)
    weights = played * expected * (1 - expected)
    information = -weights + (0 if prior else 1 / n)  # the games do not determine the mean
    information[..., range(n), range(n)] += weights.sum(-1) + prior * against_average * (
        1 - against_average
    )
    return gradient, information


def elo_points(logits: Array, start: float, scale: float) -> Array:
    """Logits as Elo points: a difference of `scale` points means odds of ten to one."""
    return start + logits * scale / math.log(10)


@dataclass(frozen=True)
class ScoredGames:
    """The scored games of one condition, in the order in which they were played.

    Args:
        winners: shape (m,), index of the winner.
        losers: shape (m,), index of the loser.
    """

    winners: Indices
    losers: Indices

    def wins(self, players: int) -> Array:
        """How often each player beat each other one, shape (players, players)."""
        wins = np.zeros((players, players))
        np.add.at(wins, (self.winners, self.losers), 1)
        return wins


def unordered_pairs(one: Indices, two: Indices) -> Indices:
    """The distinct pairs of players that meet in any order, shape (pairs, 2)."""
    return np.unique(np.sort(np.stack([one, two], axis=-1), axis=-1), axis=0)


def bootstrap(
    conditions: dict[str, ScoredGames],
    pairs: Indices,
    players: int,
    resamples: int,
    prior: float,
    seed: int,
) -> dict[str, Array]:
    """Strengths under resampled pairs of players, each with all of its games.

    Games of one pair are not independent: two players may suit each other better or worse than
    their strengths say. A resample draws the same pairs for all conditions.

    Args:
        conditions: the scored games of each condition.
        pairs: shape (pairs, 2), the pairs of the design, see `unordered_pairs`.
        players: number of players.
        resamples: number of resamples.
        prior: see `fit_strengths`.
        seed: seed of the draws.

    Returns:
        Logits of shape (resamples, players) for each condition.
    """
    rng = np.random.default_rng(seed)
    wins = {name: scored.wins(players) for name, scored in conditions.items()}
    batches: dict[str, list[Array]] = {name: [] for name in conditions}
    one, two = pairs.T
    for start in range(0, resamples, BATCH):
        size = min(BATCH, resamples - start)
        picks = rng.integers(len(pairs), size=(size, len(pairs)))
        weights = np.zeros((size, players, players))
        weights[:, one, two] = [np.bincount(row, minlength=len(pairs)) for row in picks]
        weights += np.swapaxes(weights, -1, -2)
        for name in conditions:
            batches[name].append(fit_strengths(weights * wins[name], prior))
    return {name: np.concatenate(strengths) for name, strengths in batches.items()}


def connected_groups(games: Array) -> Indices:
    """Number the groups of players that games connect.

    Args:
        games: shape (players, players), number of games between two players.

    Returns:
        Shape (players,): 1 for the largest group, then 2 and so on; 0 for players without a game.
    """
    from scipy.sparse.csgraph import connected_components

    return number_groups(connected_components(games > 0, directed=False)[1])


def number_groups(labels: Indices) -> Indices:
    """Number groups by size, from 1; players that are alone in their group get 0."""
    _, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    numbers = np.empty(len(sizes), np.int64)
    numbers[np.argsort(-sizes, kind="stable")] = np.arange(1, len(sizes) + 1)
    return np.where(sizes[inverse] > 1, numbers[inverse], 0)


@dataclass(frozen=True)
class StrengthEstimate:
    """Strengths under one condition, or the differences between two conditions.

    Args:
        best: shape (players,), the maximum-likelihood logits.
        resampled: shape (resamples, players), logits under resampled pairs.
        missing_covariance: shape (players, players), the covariance of `best` by the Fisher
            information, minus that of `resampled`.
        groups: shape (players,), see `connected_groups`. Only players of one group can be compared.
        opponents: shape (players,), the number of others that each player met in scored games.
    """

    best: Array
    resampled: Array
    missing_covariance: Array
    groups: Indices
    opponents: Indices

    @property
    def rated(self) -> NDArray[np.bool_]:
        """Whether each player has a scored game, shape (players,)."""
        return self.groups > 0

    def minus(self, other: StrengthEstimate) -> StrengthEstimate:
        """The difference from another condition, paired by the resampled pairs of players.

        Players are of one group if they are in both conditions.
        """
        players = len(self.groups)
        labels = self.groups * (players + 1) + other.groups
        alone = -1 - np.arange(players)
        return StrengthEstimate(
            self.best - other.best,
            self.resampled - other.resampled,
            self.missing_covariance + other.missing_covariance,
            number_groups(np.where(self.rated & other.rated, labels, alone)),
            np.minimum(self.opponents, other.opponents),
        )

    @property
    def freedom(self) -> Array:
        """Degrees of freedom of the errors, shape (players,).

        The variance of a player's strength is estimated from one pair per opponent.
        """
        return np.maximum(self.opponents - 1.0, 1)

    def with_errors(self) -> tuple[Array, Array]:
        """Logits about the mean of the player's group, and their standard errors.

        The error is the larger one of the bootstrap's and of the Fisher information's. If a player
        lost few games, many resamples contain none of its losses and vary too little.

        Returns:
            Estimates and errors of shape (players,), NaN for players without a scored game.
        """
        same = (self.groups[:, None] == self.groups) & self.rated
        about_mean = np.eye(len(same)) - same / np.maximum(same.sum(-1, keepdims=True), 1)
        variance = (self.resampled @ about_mean.T).var(0, ddof=1)
        missing = np.einsum("ij,jk,ik->i", about_mean, self.missing_covariance, about_mean)
        best, error = about_mean @ self.best, np.sqrt(variance + np.maximum(missing, 0))
        return np.where(self.rated, best, np.nan), np.where(self.rated, error, np.nan)


def estimate_strengths(scored: ScoredGames, resampled: Array, prior: float) -> StrengthEstimate:
    """The strengths of one condition, from its games and the result of `bootstrap`."""
    wins = scored.wins(resampled.shape[-1])
    best, played = fit_strengths(wins, prior), wins + wins.T
    _, information = derivatives(best, wins.sum(-1), played, prior)
    missing = np.linalg.inv(information) - np.cov(resampled, rowvar=False)
    groups, opponents = connected_groups(played), (played > 0).sum(-1)
    return StrengthEstimate(best, resampled, np.asarray(missing, float), groups, opponents)


def interval(estimate: Array, error: Array) -> tuple[Array, Array]:
    """95 % intervals from standard errors, by the normal approximation.

    Percentiles of the resamples would include the bootstrap's bias away from the mean and cover
    less than 95 %.
    """
    return estimate - Z95 * error, estimate + Z95 * error


def p_values(change: Array, error: Array, freedom: Array) -> Array:
    """Two-sided p-values of no change, by Student's t-distribution; NaN where not measured.

    Among many traits, a discovery lies far out in the tails, where the normal approximation of the
    intervals does not hold: for 24 traits it gave almost three times as many false discoveries.

    The p-value of a player that never lost is not small: its error grows as fast as its strength
    (Hauck and Donner, 1977).

    Args:
        change: the changes.
        error: their standard errors.
        freedom: the degrees of freedom of the errors.
    """
    from scipy.stats import t

    ratio = np.divide(np.abs(change), error, out=np.full_like(change, np.nan), where=error > 0)
    return 2 * t.sf(ratio, freedom)


def discoveries(p: Array, rate: float) -> NDArray[np.bool_]:
    """Which p-values are significant at a false-discovery rate (Benjamini and Hochberg, 1995).

    NaN was not tested: it is not significant and does not count as a test.
    """
    from scipy.stats import false_discovery_control

    tested = ~np.isnan(p)
    significant = np.zeros(len(p), bool)
    significant[tested] = false_discovery_control(p[tested]) <= rate
    return significant
