"""Stage evaluation/rating: ratings of traits as players, and their change against base.

The same games give two ratings. Sequential Elo is the paper's: one pass over the games, so that a
game's weight depends on its position. Bradley-Terry is the maximum-likelihood estimate from all
games, with intervals from a bootstrap over pairs of traits, or from the Fisher information where it
is wider. The games of a pair are not independent, so a resample takes all or none of them. It draws
the same pairs for all conditions, which play the same games, so changes are paired.

A trait without a scored game has no rating. If the games split the traits into groups that never
met, ratings are about the mean of each group and cannot be compared across groups.

Reads: evaluation/preferences. Writes: condition, framing, trait, elo, rating with interval, games,
change against base with interval, p, significant; group, change_group (1: the largest).
Run: opencharacter run RECIPE --constitution NAME --only evaluation/rating
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from opencharacter.config.evaluation import Rating
from opencharacter.errors import StageFailed
from opencharacter.evaluation.paired_comparison import (
    Array,
    Indices,
    ScoredGames,
    StrengthEstimate,
    bootstrap,
    connected_groups,
    discoveries,
    elo,
    elo_points,
    estimate_strengths,
    interval,
    p_values,
    unordered_pairs,
)
from opencharacter.evaluation.rank_correlation import (
    ALL_FRAMINGS,
    grouped_ratings,
    rank_correlation,
)
from opencharacter.evaluation.report.sections import (
    RatingChange,
    ScoreTable,
    Section,
    TraitChange,
    TraitRatings,
)
from opencharacter.evaluation.scores import Z95, Score, score_row
from opencharacter.runtime.stage import Estimate, Job, StageResult, read_all
from opencharacter.text.chat import fill, row_seed

GAME_COLUMNS = ("game", "condition", "framing", "first", "second", "chosen")

SCHEMA = pa.schema(
    [
        pa.field("condition", pa.string(), nullable=False),
        pa.field("framing", pa.string(), nullable=False),
        pa.field("trait", pa.string(), nullable=False),
        pa.field("elo", pa.float64()),
        pa.field("rating", pa.float64()),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("group", pa.int64()),
        pa.field("games", pa.int64(), nullable=False),
        pa.field("unscored", pa.int64(), nullable=False),
        pa.field("change", pa.float64()),
        pa.field("change_low", pa.float64()),
        pa.field("change_high", pa.float64()),
        pa.field("change_group", pa.int64()),
        pa.field("p", pa.float64()),
        pa.field("significant", pa.bool_()),
    ]
)


def games_needed(half_width: float, traits: int, scale: float) -> int:
    """Number of games that give an average trait's rating a 95 % interval of +- `half_width`.

    From the Fisher information of a random design over traits of similar strength:
    Var(s) = 2 (n - 1)^2 / (n games) in logits. Unequal strengths need more games.

    Args:
        half_width: half of the interval's width, in Elo points.
        traits: number of traits.
        scale: the rating's scale, see `elo`.
    """
    error = half_width / Z95 * math.log(10) / scale
    return math.ceil(2 * (traits - 1) ** 2 / (traits * error**2))


def half_width(games: int, traits: int, scale: float) -> float:
    """Half of the interval's width in Elo points for a number of games; inverts `games_needed`."""
    return Z95 * scale / math.log(10) * (traits - 1) * math.sqrt(2 / (traits * games))


# ----------------------------------------------------------------------------------------- ratings


def scored_games(rows: list[dict[str, Any]], index: dict[str, int]) -> ScoredGames:
    """The games with a readable verdict as arrays."""
    scored = sorted((row for row in rows if row["chosen"]), key=lambda row: row["game"])
    losers = [row["second"] if row["chosen"] == row["first"] else row["first"] for row in scored]
    return ScoredGames(
        np.array([index[row["chosen"]] for row in scored], np.int64),
        np.array([index[trait] for trait in losers], np.int64),
    )


def rate(rows: list[dict[str, Any]], settings: Rating, seed: int) -> list[dict[str, Any]]:
    """Ratings of every trait under every condition, from the games of one framing or of all.

    Args:
        rows: game, condition, first, second, chosen; all games have one design.
        settings: the stage's configuration.
        seed: seed of the bootstrap.

    Returns:
        Rows of `SCHEMA` without the framing; values are None for a trait without a scored game.

    Raises:
        StageFailed: if there is no prior and the games do not determine the ratings.
    """
    traits = sorted({row[side] for row in rows for side in ("first", "second")})
    index = {trait: i for i, trait in enumerate(traits)}
    games: dict[str, list[dict[str, Any]]] = {c: [] for c in sorted({r["condition"] for r in rows})}
    for row in rows:
        games[row["condition"]].append(row)
    scored = {condition: scored_games(played, index) for condition, played in games.items()}
    n, prior = len(traits), settings.prior
    if prior == 0:
        for condition, condition_games in scored.items():
            check_connected(condition, condition_games, traits)
    first, second = (np.array([index[row[side]] for row in rows]) for side in ("first", "second"))
    pairs = unordered_pairs(first, second)
    resampled = bootstrap(scored, pairs, n, settings.resamples, prior, seed)
    estimates = {c: estimate_strengths(s, resampled[c], prior) for c, s in scored.items()}
    rated = []
    for condition in games:
        columns = rating_columns(condition, estimates, settings)
        sequential = sequential_elo(scored[condition], n, settings)
        columns["elo"] = np.where(estimates[condition].rated, sequential, np.nan)
        counts, unscored = (count_games(games[condition], readable) for readable in (True, False))
        rated += [
            {"condition": condition, "trait": trait}
            | {"games": counts[trait], "unscored": unscored[trait]}
            | {name: nan_to_none(column[i].item()) for name, column in columns.items()}
            for trait, i in index.items()
        ]
    return rated


def check_connected(condition: str, scored: ScoredGames, traits: list[str]) -> None:
    """Raise StageFailed if the games alone do not determine the ratings of all traits."""
    wins = scored.wins(len(traits))
    groups = connected_groups(wins + wins.T)
    unplayed = [trait for trait, group in zip(traits, groups, strict=True) if group == 0]
    remedy = "set evaluation.rating.prior above 0, play more games, or use another judge"
    if unplayed:
        raise StageFailed(
            f"evaluation.rating.prior is 0, but {len(unplayed)} traits have no game with a "
            f"readable verdict under condition {condition!r} ({', '.join(unplayed[:5])}), so that "
            f"their strength is undetermined; {remedy}"
        )
    if groups.max() > 1:
        raise StageFailed(
            f"evaluation.rating.prior is 0, but the scored games under condition {condition!r} "
            f"split the traits into {groups.max()} groups that never met, so that their relative "
            f"strength is undetermined; {remedy}"
        )


def nan_to_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def zero_to_nan(groups: Indices) -> Array:
    """The numbers of the groups; NaN for traits that are in none."""
    return np.where(groups > 0, groups, np.nan)


def sequential_elo(games: ScoredGames, traits: int, settings: Rating) -> Array:
    """Sequential Elo of every trait, by index."""
    pairs = zip(games.winners.tolist(), games.losers.tolist(), strict=True)
    ratings = elo(pairs, range(traits), settings.start, settings.k, settings.scale)
    return np.array([ratings[i] for i in range(traits)])


def count_games(rows: list[dict[str, Any]], readable: bool) -> Counter[str]:
    """How often each trait was offered in the games with, or without, a readable verdict."""
    games = [row for row in rows if (row["chosen"] is not None) == readable]
    return Counter(row[side] for row in games for side in ("first", "second"))


def rating_columns(
    condition: str, estimates: dict[str, StrengthEstimate], settings: Rating
) -> dict[str, Any]:
    """Rating and change of one condition's traits in Elo points, one array per column."""
    rating, error = estimates[condition].with_errors()
    low, high = interval(rating, error)
    values = {"rating": rating, "low": low, "high": high}
    start, scale = settings.start, settings.scale
    columns: dict[str, Any] = {k: elo_points(v, start, scale) for k, v in values.items()}
    columns["group"] = zero_to_nan(estimates[condition].groups)
    if condition != "base" and "base" in estimates:
        difference = estimates[condition].minus(estimates["base"])
        change, error = difference.with_errors()
        low, high = interval(change, error)
        values = {"change": change, "change_low": low, "change_high": high}
        columns |= {name: elo_points(value, 0, scale) for name, value in values.items()}
        columns["change_group"] = zero_to_nan(difference.groups)
        columns["p"] = p_values(change, error, difference.freedom)
        columns["significant"] = discoveries(columns["p"], settings.false_discovery_rate)
    return columns


def estimate(job: Job) -> Estimate:
    return Estimate(0)


def notes(job: Job) -> list[str]:
    """How precise the ratings will be with the recipe's number of games."""
    from opencharacter.evaluation.preferences import all_traits

    settings, preferences = job.config, job.recipe.evaluation.preferences
    names = preferences.traits or all_traits()
    traits = len(names)
    width = half_width(preferences.games, traits, settings.scale)
    target = settings.target_half_width
    needed = games_needed(target, traits, settings.scale)
    return [
        f"ratings of {traits} traits: {preferences.games:,} games per condition give about "
        f"+-{width:.0f} points (95 %) if every verdict is readable; +-{target:.0f} points need "
        f"{needed:,} games",
        *group_notes(planned_groups(job, names)),
    ]


def planned_groups(job: Job, traits: Sequence[str]) -> Indices:
    """The groups of traits that the planned games connect, if every verdict is readable."""
    from opencharacter.evaluation.preferences import draw_pair

    (played,) = [p for p in job.parents if p.stage.name == "evaluation/preferences"][:1]
    index = {trait: i for i, trait in enumerate(traits)}
    met = np.zeros((len(traits), len(traits)), np.float64)
    for pair in range(math.ceil(played.config.games / 2)):
        first, second = draw_pair(played, pair)
        met[index[first], index[second]] += 1
    return connected_groups(met + met.T)


def group_notes(groups: Indices) -> list[str]:
    """Say that traits will have no rating, or ratings that cannot be compared."""
    unplayed, separate = int((groups == 0).sum()), int(groups.max(initial=0))
    if not unplayed and separate < 2:
        return []
    problems = [
        *([f"{unplayed} of {len(groups)} traits have no game"] if unplayed else []),
        *([f"the others form {separate} groups that never meet"] if separate > 1 else []),
    ]
    return [
        f"{' and '.join(problems)}, so their ratings cannot be compared; increase "
        "evaluation.preferences.games or name fewer evaluation.preferences.traits"
    ]


def correlations(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlation of each condition's ratings with base's, over all framings."""
    ratings = {c: grouped_ratings(rated) for c, rated in overall_by_condition(rows).items()}
    base = ratings.pop("base", {})
    return {c: vars(rank_correlation(base, rated)) for c, rated in ratings.items()}


def count_groups(rows: list[dict[str, Any]]) -> dict[str, int]:
    """By condition, the number of groups of traits that never met, over all framings."""
    by_condition = overall_by_condition(rows)
    return {c: max(r["group"] or 0 for r in rated) for c, rated in by_condition.items()}


def overall_by_condition(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows over all framings, by condition."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["framing"] == ALL_FRAMINGS:
            grouped.setdefault(row["condition"], []).append(row)
    return grouped


def common_games(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The games that all conditions played.

    A persona leaves out the games whose prompt it was trained on, which base may have played.
    """
    played: dict[str, set[int]] = {}
    for row in rows:
        played.setdefault(row["condition"], set()).add(row["game"])
    shared = set.intersection(*played.values())
    return [row for row in rows if row["game"] in shared]


def build(job: Job) -> StageResult:
    table = read_all(job.parents, "evaluation/preferences", columns=list(GAME_COLUMNS))
    rows = common_games(table.to_pylist())  # dropped rows have no verdict and count as unscored
    rated = []
    for framing in [ALL_FRAMINGS, *sorted({row["framing"] for row in rows})]:
        games = [row for row in rows if framing in (ALL_FRAMINGS, row["framing"])]
        seed = row_seed(job.recipe.seed, job.stage.name, framing)
        rated += [{**row, "framing": framing} for row in rate(games, job.config, seed)]
    table = pa.Table.from_pylist(rated, schema=SCHEMA)
    job.store.write_table(job.dataset, table)
    rated = table.to_pylist()
    figures = {"spearman_with_base": correlations(rated), "groups": count_groups(rated)}
    return StageResult(len(rated), figures=figures)


# ----------------------------------------------------------------------------------------- report

NOTE = """\
Bradley-Terry ratings of the same games, in Elo points about a mean of 1,000, with 95% intervals \
from a bootstrap over pairs of traits; intervals are wider where a trait won or lost few games. An \
asterisk marks changes that are significant at the recipe's false-discovery rate. An unreadable \
verdict is unscored and counts neither as a win nor as a loss."""

GROUPS_NOTE = """\
The games split the traits into {groups} groups that never met. Ratings and changes are about the \
mean of each group and cannot be compared across groups, so only the largest group is shown."""

INTERVALS = {"rating": ("low", "high"), "change": ("change_low", "change_high")}
"""The columns of the ends of each interval."""


READING = """\
a trait is chosen more often than before training if the whole interval of its change lies above \
0."""
COLUMNS = {
    "feels": "Feels most like it (the paper's headline)",
    "adopt": "Would most like to adopt",
    "random": "Chosen at random",
}
"""Columns of the report by framing, which is how the model is asked to choose."""
FRAMING_READING = """\
a change in the first two columns is a preference; one in the last appears although the model is \
asked to choose at random."""
FRAMING_NOTE = """\
Change of each trait's rating against base, by the way in which the model is asked to choose. A \
framing has a third of the games, so its intervals are wider."""


def by_framing(job: Job) -> dict[str, list[dict[str, Any]]]:
    """The stored ratings of each framing, and of all framings together."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in job.store.read_table(job.dataset).to_pylist():
        grouped.setdefault(row["framing"], []).append(row)
    return grouped


def scores(job: Job) -> list[dict[str, Any]]:
    """Ratings and changes of all traits; `about` is the trait.

    The measures of a framing end in its name, for example `elo_feels`.
    """
    scored = []
    for framing, ratings in by_framing(job).items():
        suffix = "" if framing == ALL_FRAMINGS else f"_{framing}"
        scored += [
            {**row, "measure": row["measure"] + suffix}
            for row in rating_scores(job.persona.name, ratings)
        ]
    return scored


def rating_scores(persona: str, ratings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratings, changes and Elo ratings as rows of `SCORES`, where there is a value."""
    rows = [
        score_row(persona, column, row["condition"], row["trait"], interval_score(row, column))
        for row in ratings
        for column in INTERVALS
        if row[column] is not None
    ]
    return rows + [
        score_row(
            persona,
            "elo",
            row["condition"],
            row["trait"],
            Score(row["elo"], None, None, row["games"], row["unscored"]),
        )
        for row in ratings
        if row["elo"] is not None
    ]


def interval_score(row: dict[str, Any], column: str) -> Score:
    """A rating or a change with its interval."""
    low, high = INTERVALS[column]
    return Score(row[column], row[low], row[high], row["games"], row["unscored"])


def provisional(job: Job) -> list[Section]:
    """The ratings of the games that are stored so far, while games are still played."""
    from opencharacter.evaluation import live_ratings  # which rates with this module

    return live_ratings.provisional(job)


def report(job: Job) -> list[Section]:
    """The traits whose rating changed most, of the largest group of traits."""
    framings = by_framing(job)
    ratings = framings.pop(ALL_FRAMINGS)
    comparable = largest_group(ratings)
    groups = max((row["change_group"] or 0 for row in ratings), default=0)
    notes = (NOTE, fill(GROUPS_NOTE, groups=groups)) if groups > 1 else (NOTE,)
    shown = largest(trait_changes(comparable), job.recipe.evaluation.report.traits)
    return [
        TraitRatings(
            title="Which traits does the model prefer after training?",
            reading=READING,
            notes=notes,
            traits=shown,
            total=len(trait_changes(ratings)),
        ),
        *framing_tables([change.trait for change in shown], framings),
    ]


def framing_tables(
    traits: list[str], framings: dict[str, list[dict[str, Any]]]
) -> list[ScoreTable]:
    """The paper's Elo ratings and the changes against base of some traits, by framing."""
    if not traits or not framings:
        return []
    changes: dict[str, dict[str, Score | None]] = {trait: {} for trait in traits}
    for framing, ratings in framings.items():
        for row in ratings:
            if row["condition"] == "full" and row["trait"] in changes:
                change = interval_score(row, "change")
                changes[row["trait"]][COLUMNS[framing]] = RatingChange(**vars(change))
    return [
        ScoreTable(
            title="Do the preferences depend on how the model is asked?",
            reading=FRAMING_READING,
            notes=(FRAMING_NOTE,),
            caption="Change of the Bradley-Terry rating against base, in Elo points, by framing",
            columns=[COLUMNS[framing] for framing in COLUMNS if framing in framings],
            rows=changes,
        )
    ]


def largest_group(ratings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without the traits whose change cannot be compared with the largest group's."""
    others = {row["trait"] for row in ratings if (row["change_group"] or 1) > 1}
    return [row for row in ratings if row["trait"] not in others]


def trait_changes(ratings: list[dict[str, Any]]) -> list[TraitChange]:
    """Each trait in base and persona, the largest rise first, traits without a change last."""
    by_condition = {
        condition: {row["trait"]: row for row in ratings if row["condition"] == condition}
        for condition in ("base", "full")
    }
    changes = [
        TraitChange(
            trait,
            base=interval_score(by_condition["base"][trait], "rating"),
            persona=interval_score(row, "rating"),
            change=interval_score(row, "change"),
            significant=bool(row["significant"]),
        )
        for trait, row in by_condition["full"].items()
        if trait in by_condition["base"]
    ]

    def rise(trait: TraitChange) -> float:
        return -math.inf if trait.change.value is None else trait.change.value

    return sorted(changes, key=rise, reverse=True)


def largest(changes: list[TraitChange], count: int) -> list[TraitChange]:
    """The largest rises and falls, half of each; all traits if there are no more than `count`."""
    if len(changes) <= count:
        return changes
    changed = [trait for trait in changes if trait.change.value is not None]
    rises, rest = changed[: (count + 1) // 2], changed[(count + 1) // 2 :]
    return rises + rest[max(0, len(rest) - count // 2) :]
