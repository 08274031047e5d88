"""Ratings against slow and foreign solvers, and against the truth of simulated tournaments."""

import itertools
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import ECHO_ROLE, recipe_of

from opencharacter import pipeline
from opencharacter.config.evaluation import Rating
from opencharacter.config.placement import Placement
from opencharacter.errors import StageFailed
from opencharacter.evaluation import preferences, rank_correlation, rating
from opencharacter.evaluation.paired_comparison import (
    ScoredGames,
    bootstrap,
    discoveries,
    elo,
    estimate_strengths,
    fit_strengths,
    interval,
    p_values,
    unordered_pairs,
)
from opencharacter.evaluation.report.charts import score_bar
from opencharacter.evaluation.report.formatting import sample_size, value_text


def tournament(truth, games, seed):
    """Games between two random players each, won as Bradley and Terry say."""
    draw = np.random.default_rng(seed)
    n = len(truth)
    one = draw.integers(n, size=games)
    two = (one + draw.integers(1, n, size=games)) % n
    wins = draw.random(games) < 1 / (1 + np.exp(truth[two] - truth[one]))
    return ScoredGames(np.where(wins, one, two), np.where(wins, two, one))


def pairs_of(played):
    return unordered_pairs(played.winners, played.losers)


def truth_of(n, seed, spread=0.7):
    sample = np.random.default_rng(seed).normal(0, spread, n)
    return sample - sample.mean()


def test_elo_applies_its_update_rule_in_order():
    draw = np.random.default_rng(3)
    names = ["warm", "blunt", "calm", "bold"]
    games = [tuple(draw.choice(names, 2, replace=False)) for _ in range(500)]
    table = {"warm": 1000.0, "blunt": 1000.0, "calm": 1000.0, "bold": 1000.0}
    for won, lost in games:
        own, other = table[won], table[lost]
        my_chance = 1.0 / (1.0 + 10.0 ** ((other - own) / 400.0))
        other_chance = 1.0 / (1.0 + 10.0 ** ((own - other) / 400.0))
        table[won] = own + 32.0 * (1.0 - my_chance)
        table[lost] = other + 32.0 * (0.0 - other_chance)
    result = elo(games, names, 1000, 32, 400)
    assert result == pytest.approx({name: round(value, 2) for name, value in table.items()})


def test_strengths_equal_the_maximum_found_by_brute_force():
    wins = tournament(truth_of(5, 1), 400, 2).wins(5)
    brute = np.zeros(5)
    for _ in range(20_000):  # Zermelo's iteration, in float64, until nothing moves
        p = np.exp(brute)
        shares = [
            sum((wins[i, j] + wins[j, i]) / (p[i] + p[j]) for j in range(5) if j != i)
            for i in range(5)
        ]
        brute = np.log(wins.sum(1) / np.array(shares))
        brute -= brute.mean()
    assert fit_strengths(wins, 0.0) == pytest.approx(brute, abs=1e-9)


def test_strengths_equal_those_of_a_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    played = tournament(truth_of(8, 4), 2000, 5)
    design = np.zeros((2000, 8))
    design[np.arange(2000), played.winners] = 1
    design[np.arange(2000), played.losers] = -1
    flip = np.where(np.arange(2000) % 2, 1, -1)  # both outcomes must occur
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=10_000)
    model.fit(design * flip[:, None], flip > 0)
    foreign = model.coef_[0] - model.coef_[0].mean()
    assert fit_strengths(played.wins(8), 0.0) == pytest.approx(foreign, abs=1e-4)


def test_a_batch_of_fits_equals_the_separate_fits():
    several = np.stack([tournament(truth_of(6, s), 300, s).wins(6) for s in range(4)])
    alone = np.stack([fit_strengths(one, 0.1) for one in several])
    assert fit_strengths(several, 0.1) == pytest.approx(alone, abs=1e-8)


@pytest.mark.parametrize("beaten", [1, 23], ids=["the next one", "all weaker ones"])
def test_with_a_prior_a_strict_order_has_finite_ratings(beaten):
    """A bootstrap of few games among many traits draws such resamples."""
    wins = 3 * (np.triu(np.ones((24, 24)), 1) - np.triu(np.ones((24, 24)), 1 + beaten))
    strengths = fit_strengths(np.stack([wins, wins.T]), 0.1)
    assert (np.diff(strengths[0]) < 0).all()
    assert strengths[1] == pytest.approx(-strengths[0], abs=1e-5)


def test_without_a_prior_a_trait_that_never_won_has_no_rating():
    wins = np.array([[0.0, 3, 2], [1, 0, 2], [0, 0, 0]])
    with pytest.raises(StageFailed, match=r"evaluation\.rating\.prior"):
        fit_strengths(wins, 0.0)
    assert np.isfinite(fit_strengths(wins, 0.1)).all()


def covered(truths, games, resamples, prior):
    """(tournaments, traits) whether true strengths are within their intervals."""
    hits = []
    for seed, truth in enumerate(truths):
        played, n = tournament(truth, games, seed), len(truth)
        resampled = bootstrap({"x": played}, pairs_of(played), n, resamples, prior, seed)["x"]
        low, high = interval(*estimate_strengths(played, resampled, prior).with_errors())
        hits.append((low <= truth) & (truth <= high))
    return np.array(hits)


@pytest.mark.parametrize("games", [1200, 3600])
def test_intervals_cover_the_truth_in_simulated_tournaments(games):
    truths = [truth_of(20, seed) for seed in range(100)]
    assert 0.93 <= covered(truths, games, resamples=200, prior=0.1).mean() <= 0.97


def test_intervals_cover_the_truth_for_a_trait_that_nearly_always_wins():
    truth = np.where(np.arange(8) == 0, 3.5, 0) - 3.5 / 8
    hits = covered([truth] * 60, games=120, resamples=100, prior=0.1)
    assert hits[:, 0].mean() >= 0.93  # 0.57 by resamples alone
    assert hits[:, 1:].mean() >= 0.93


def changes(seed, n, games, moved):
    """A design played twice: base, and with some strengths moved."""
    before = truth_of(n, seed)
    after = before + np.where(np.arange(n) < moved, 1.5, 0)
    one, two = tournament(before, games, seed), tournament(after, games, seed + 1000)
    difference = change_between(one, two, n, seed)
    return discoveries(p_values(*difference.with_errors(), difference.freedom), 0.05)


def change_between(one, two, n, seed):
    """The change from one condition to another."""
    pairs = np.unique(np.concatenate([pairs_of(one), pairs_of(two)]), axis=0)
    resampled = bootstrap({"base": one, "full": two}, pairs, n, 200, 0.1, seed)
    base = estimate_strengths(one, resampled["base"], 0.1)
    return estimate_strengths(two, resampled["full"], 0.1).minus(base)


def test_the_false_discovery_rate_is_controlled():
    shares, result = [], 0
    for seed in range(30):
        significant = changes(seed, n=20, games=2500, moved=0)
        shares.append(significant.any())
        result += changes(seed, n=20, games=2500, moved=1)[0]
    assert np.mean(shares) <= 0.15  # 5 % expected, of 30
    assert result >= 28


def mirrored(truth, one, two, pair_effects, draw):
    """Games of pairs in both orders; each pair's effect adds to the difference in strength."""
    logits = truth[one] - truth[two] + pair_effects[one, two]
    wins = [draw.random(len(one)) < 1 / (1 + np.exp(-logits)) for _ in range(2)]
    one_wins, one_twice, two_twice = np.concatenate(wins), np.tile(one, 2), np.tile(two, 2)
    return ScoredGames(
        np.where(one_wins, one_twice, two_twice), np.where(one_wins, two_twice, one_twice)
    )


def pair_effects(n, sd, draw):
    """Antisymmetric effects of shape (n, n)."""
    effects = np.triu(draw.normal(0, sd, (n, n)), 1)
    return effects - effects.T


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_intervals_of_the_change_hold_although_pairs_of_traits_have_effects_of_their_own(shared):
    """24 traits, 2,400 games in mirrored twos, pair effects of 0.7 logits, no change at all.

    The effects of a pair are those of the model, and drawn anew for each condition, or shared by
    both. Resamples of games instead of pairs cover 85 %, with false discoveries in half of the
    runs. Without a change, the false-discovery rate is the share of runs with any discovery.
    """
    n, runs, covered, false = 24, 300, [], []
    for seed in range(runs):
        draw = np.random.default_rng(seed)
        truth = truth_of(n, seed)
        one = draw.integers(n, size=1200)
        two = (one + draw.integers(1, n, size=1200)) % n
        effects = pair_effects(n, 0.7, draw)
        base, full = (
            mirrored(truth, one, two, effects if shared else pair_effects(n, 0.7, draw), draw)
            for _ in "ab"
        )
        difference = change_between(base, full, n, seed)
        change, error = difference.with_errors()
        low, high = interval(change, error)
        covered.append((low < 0) & (high > 0))
        p = p_values(change, error, difference.freedom)
        false.append(discoveries(p, 0.05).any())
    assert np.mean(covered) == pytest.approx(0.945, abs=0.01)
    assert np.mean(false) <= 0.05


def test_untested_hypotheses_do_not_affect_the_tested_ones():
    p = np.array([0.03, np.nan, np.nan, 0.04])
    assert discoveries(p, 0.05).tolist() == [True, False, False, True]
    assert not discoveries(p[1:3], 0.05).any()


def test_a_paired_change_uses_the_correlation_of_shared_games():
    played = tournament(truth_of(40, 1), 8000, 1)
    resampled = bootstrap({"x": played}, pairs_of(played), 40, 1000, 0.1, 1)["x"]
    own = estimate_strengths(played, resampled, 0.1)
    change, error = own.minus(own).with_errors()
    assert np.abs(change).max() == 0
    own_error = own.with_errors()[1]
    assert error.max() < math.sqrt(2) * own_error.min()  # the error of an unpaired change
    assert error.mean() < own_error.mean() / 2


@pytest.mark.parametrize(("games", "sd"), [(25_000, 18), (3_000, 55)])
def test_the_required_number_of_games_agrees_with_simulations_at_the_size_of_the_paper(games, sd):
    assert rating.half_width(games, 144, 400) / rating.Z95 == pytest.approx(sd, rel=0.05)
    width = rating.half_width(games, 144, 400)
    assert rating.games_needed(width, 144, 400) == pytest.approx(games, abs=1)


def test_the_formula_for_the_interval_agrees_with_the_bootstrap():
    played = tournament(np.zeros(20), 2000, 1)
    resampled = bootstrap({"x": played}, pairs_of(played), 20, 300, 0.0, 1)["x"]
    points = resampled.std(0).mean() * 400 / math.log(10)
    assert rating.half_width(2000, 20, 400) / rating.Z95 == pytest.approx(points, rel=0.08)


def test_strengths_are_recovered_at_the_size_of_the_paper():
    truth = truth_of(144, 0)
    played = tournament(truth, 25_000, 0)
    resampled = bootstrap({"x": played}, pairs_of(played), 144, 1000, 0.1, 0)["x"]
    estimates, errors = estimate_strengths(played, resampled, 0.1).with_errors()
    assert resampled.shape == (1000, 144)
    assert (np.abs(estimates - truth) < 1.96 * errors).mean() == pytest.approx(0.95, abs=0.05)


def rows_of(conditions, games):
    traits = ["warm", "blunt", "calm"]
    pairs = list(itertools.permutations(traits, 2))
    for game in range(games):
        first, second = pairs[game % len(pairs)]
        for condition, favourite in conditions.items():
            chosen = favourite if favourite in (first, second) else first
            yield {
                "game": game,
                "condition": condition,
                "first": first,
                "second": second,
                "chosen": None if game == 5 and condition == "full" else chosen,
            }


def test_rows_contain_every_trait_of_every_condition_with_its_change():
    rows = list(rows_of({"base": "calm", "full": "warm"}, 60))
    result = rating.rate(rows, Rating(resamples=100), seed=1)
    by_name = {(row["condition"], row["trait"]): row for row in result}
    assert len(result) == 6
    assert "change" not in by_name["base", "warm"]
    warm = by_name["full", "warm"]
    assert warm["change"] > 0
    assert warm["change_low"] <= warm["change"] <= warm["change_high"]
    assert (warm["games"], by_name["base", "warm"]["games"]) == (40, 40)
    assert sum(row["unscored"] for row in result) == 2  # one game, two traits
    assert warm["elo"] > 1000 > by_name["full", "calm"]["elo"]
    mean = np.mean([row["rating"] for row in result if row["condition"] == "full"])
    assert mean == pytest.approx(1000)


def unreadable_with(trait, rows):
    """The games, those of full with this trait without a verdict."""
    for row in rows:
        lost = row["condition"] == "full" and trait in (row["first"], row["second"])
        yield {**row, "chosen": None if lost else row["chosen"]}


def test_a_trait_without_a_scored_game_has_no_rating_and_affects_no_other():
    played = list(unreadable_with("warm", rows_of({"base": "warm", "full": "calm"}, 60)))
    result = rating.rate(played, Rating(resamples=100), seed=1)
    by_name = {(row["condition"], row["trait"]): row for row in result}
    warm = by_name["full", "warm"]
    measured = ("rating", "low", "high", "elo", "change", "change_low", "change_high", "p")
    assert {warm[name] for name in measured} == {None}
    assert (warm["games"], warm["unscored"], warm["significant"]) == (0, 40, False)
    assert by_name["base", "warm"]["rating"] > 1100
    others = [by_name["full", name] for name in ("blunt", "calm")]
    for name, middle in (("rating", 1000), ("change", 0)):
        assert np.mean([row[name] for row in others]) == pytest.approx(middle)
    table = pa.Table.from_pylist(
        [{**row, "framing": "all"} for row in result], schema=rating.SCHEMA
    )
    assert rating.correlations(table.to_pylist())["full"]["n"] == 2


def games_of(pairs, conditions=("base", "full"), repeat=4):
    """Games of given pairs, of which each side wins some."""
    return [
        {"game": number, "condition": condition, "first": one, "second": two, "chosen": chosen}
        for condition in conditions
        for number, (one, two, chosen) in enumerate(
            (one, two, two if turn == 0 else one) for one, two in pairs for turn in range(repeat)
        )
    ]


def test_groups_of_traits_that_never_met_are_rated_and_ranked_apart():
    pairs = [("a", "b"), ("b", "c"), ("a", "c"), ("x", "y")]
    result = rating.rate(games_of(pairs), Rating(resamples=100), seed=1)
    full = {row["trait"]: row for row in result if row["condition"] == "full"}
    assert {trait: row["group"] for trait, row in full.items()} == {
        **dict.fromkeys("abc", 1),
        **dict.fromkeys("xy", 2),
    }
    assert full["x"]["change_group"] == 2
    for group in ("abc", "xy"):
        assert np.mean([full[trait]["rating"] for trait in group]) == pytest.approx(1000)
    rows = [{**row, "framing": "all", "change_group": row.get("change_group")} for row in result]
    assert rating.count_groups(rows) == {"base": 2, "full": 2}
    assert {row["trait"] for row in rating.largest_group(rows)} == set("abc")


def test_the_report_says_that_groups_cannot_be_compared(make_jobs, echo_recipe):
    (job,) = (j for j in make_jobs(echo_recipe) if j.stage.name == "evaluation/rating")

    def section(pairs):
        result = rating.rate(games_of(pairs), Rating(resamples=100), seed=1)
        rows = [{**row, "framing": "all"} for row in result]
        job.store.write_table(job.dataset, pa.Table.from_pylist(rows, schema=rating.SCHEMA))
        return rating.report(job)[0]

    joined, split = section([("a", "b"), ("b", "c")]), section([("a", "b"), ("b", "c"), ("x", "y")])
    assert joined.notes == (rating.NOTE,)
    assert "2 groups that never met" in split.notes[1]
    assert {trait.trait for trait in split.traits} == set("abc")
    assert split.total == 5


def test_a_change_is_compared_only_within_groups_of_both_conditions():
    joined = [("a", "b"), ("b", "c"), ("c", "d")]
    rows = games_of(joined)
    for row in rows:  # under full, no verdict on b and c is readable
        if row["condition"] == "full" and {row["first"], row["second"]} == {"b", "c"}:
            row["chosen"] = None
    result = rating.rate(rows, Rating(resamples=100), seed=1)
    by_name = {(row["condition"], row["trait"]): row for row in result}
    assert {by_name["base", trait]["group"] for trait in "abcd"} == {1}
    groups = [by_name["full", trait]["change_group"] for trait in "abcd"]
    assert groups[0] == groups[1] != groups[2] == groups[3]


def test_rank_correlations_use_the_largest_group_alone():
    first = {f"t{n}": (float(n), 1) for n in range(5)} | {f"u{n}": (-n, 2) for n in range(4)}
    second = {trait: (value, 1) for trait, (value, _) in first.items()}
    score = rank_correlation.rank_correlation(first, second)
    assert (score.value, score.n) == (pytest.approx(1), 5)


def test_without_a_prior_an_unplayed_trait_is_named():
    rows = list(unreadable_with("warm", games_of([("warm", "calm"), ("calm", "bold")])))
    with pytest.raises(StageFailed, match=r"1 traits have no game .* 'full' \(warm\)"):
        rating.rate(rows, Rating(resamples=100, prior=0), seed=1)


def test_without_a_prior_groups_that_never_met_are_refused():
    rows = games_of([("a", "b"), ("x", "y")])
    with pytest.raises(StageFailed, match="split the traits into 2 groups that never met"):
        rating.rate(rows, Rating(resamples=100, prior=0), seed=1)


def test_games_that_a_persona_left_out_are_left_out_of_base_too():
    rows = games_of([("a", "b"), ("b", "c")])
    kept = [row for row in rows if (row["condition"], row["game"]) != ("full", 3)]
    assert {row["game"] for row in rating.common_games(kept)} == {0, 1, 2, 4, 5, 6, 7}


def test_a_framing_without_any_scored_game_has_no_ratings():
    rows = [{**row, "chosen": None} for row in rows_of({"base": "calm", "full": "warm"}, 12)]
    result = rating.rate(rows, Rating(resamples=100), seed=1)
    assert {row["rating"] for row in result} == {row.get("change") for row in result} == {None}


def test_the_spearman_correlation_equals_a_known_value():
    score = rank_correlation.spearman(
        [1, 2, 3, 4, 5], [2, 1, 4, 3, 5]
    )  # 1 - 6 * 4 / (5 * 24) = 0.8
    assert score.value == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert score.low < 0.8 < score.high
    assert rank_correlation.spearman([1, 2, 3], [1, 2, 3]).value is None


def test_students_are_compared_on_traits_that_both_have_rated(tmp_path):
    from samples import cli

    for name, rise in (("one", 1.0), ("two", 2.0)):
        rows = [
            {
                "condition": "full",
                "framing": framing,
                "trait": f"t{n}",
                "rating": rise * n,
                "group": 1,
            }
            for n in range(8)
            for framing in ("all", "feels")
        ]
        rows.append({**rows[0], "trait": f"unrated in {name}", "rating": None})
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / "rows.parquet")
    done = cli("compare", "one", "two", cwd=tmp_path)
    assert "one two: 1.000" in done.stdout
    assert "8 traits" in done.stdout
    refused = cli("compare", "one", "two", "--condition", "steered", cwd=tmp_path)
    assert refused.returncode == 2
    assert "there are full" in refused.stdout
    assert cli("compare", "one", "three", cwd=tmp_path).returncode == 2


def test_a_plan_states_the_expected_interval_of_ratings(make_jobs, echo_recipe):
    (job,) = (j for j in make_jobs(echo_recipe) if j.stage.name == "evaluation/rating")
    line, groups = rating.notes(job)
    assert "144 traits: 6 games" in line
    assert "+-50 points need 13" in line
    assert groups == (
        "138 of 144 traits have no game and the others form 3 groups that never meet, so their "
        "ratings cannot be compared; increase evaluation.preferences.games or name fewer "
        "evaluation.preferences.traits"
    )


def test_the_groups_of_a_plan_are_those_of_the_games_that_are_played(make_jobs):
    settings = {"preferences": {"games": 400, "traits": ["warm", "blunt", "calm"]}}
    jobs = make_jobs(recipe_of(ECHO_ROLE, evaluation=settings))
    (job,) = (j for j in jobs if j.stage.name == "evaluation/rating")
    (player, *_) = (p for p in job.parents if p.stage.name == "evaluation/preferences")
    played = preferences.games(player)[::2]
    assert preferences.draw_pair(player, 7) == [played[7]["first"], played[7]["second"]]
    assert rating.planned_groups(job, ["warm", "blunt", "calm"]).tolist() == [1, 1, 1]
    assert len(rating.notes(job)) == 1


def test_base_games_are_played_once_and_rated_with_every_persona(store, echo_recipe, poet):
    other = poet.model_copy(update={"name": "sarcasm"})
    jobs = pipeline.jobs(echo_recipe, [poet, other], Placement(), store)
    players = [job for job in jobs if job.stage.name == "evaluation/preferences"]
    assert {job.scope: preferences.conditions(job) for job in players} == {
        "echo": ["base"],
        "echo/poeticism": ["prompted", "distilled", "full"],
        "echo/sarcasm": ["prompted", "distilled", "full"],
    }
    for job in players:
        rows = [
            {name: row.get(name) for name in rating.GAME_COLUMNS} | {"condition": condition}
            for condition in preferences.conditions(job)
            for row in preferences.games(job)
        ]
        for row in rows:
            row["chosen"] = min(row["first"], row["second"])
        store.write_table(job.dataset, pa.Table.from_pylist(rows))
    for job in (j for j in jobs if j.stage.name == "evaluation/rating"):
        rating.build(job)
        rated = store.read_table(job.dataset).to_pylist()
        assert {row["condition"] for row in rated} == {"base", "prompted", "distilled", "full"}
        changes = [r["change"] for r in rated if r["condition"] == "full" and r["games"]]
        assert changes == [0] * len(changes)


def test_the_report_shows_changes_by_framing_in_points():
    def rated(change):
        interval = {"change": change, "change_low": change - 60.0, "change_high": change + 60.0}
        return {"condition": "full", "trait": "warm", "games": 40, "unscored": 2, **interval}

    (table,) = rating.framing_tables(["warm"], {"feels": [rated(80.0)], "random": [rated(-9.0)]})
    assert table.columns == [rating.COLUMNS["feels"], rating.COLUMNS["random"]]
    score = table.rows["warm"][rating.COLUMNS["feels"]]
    assert value_text(score) == "+80 Elo"
    assert sample_size(score) == "n = 40 games, 2 unscored"
    assert "change of +80 Elo" in score_bar(score)
    assert rating.framing_tables([], {"feels": []}) == []
