"""Intervals of means and slopes: exact values, degenerate cases, and simulated coverage."""

import numpy as np
import pytest
from scipy import stats

from opencharacter.evaluation import intervals
from opencharacter.evaluation.intervals import clustered_mean, grouped_mean, mean_interval, slope

DIFFERENCES = (-1.0, 1.0)


def test_a_large_sample_has_the_interval_of_student():
    values = np.random.default_rng(0).normal(0.1, 0.2, 500)
    score = mean_interval(list(values), bounds=DIFFERENCES)
    low, high = stats.t.interval(0.95, 499, values.mean(), stats.sem(values))
    assert score.value == pytest.approx(values.mean())
    assert (score.low, score.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_equal_values_have_an_interval_of_positive_width():
    score = mean_interval([0.5] * 10, unscored=3)
    assert score.low < score.value == 0.5 < score.high
    assert (score.n, score.unscored) == (10, 3)


def test_one_value_has_no_interval_and_no_value_has_no_mean():
    assert mean_interval([0.5]).low is None
    assert mean_interval([]).value is None
    assert clustered_mean([0.5, 0.7], ["a", "a"]).low is None
    assert slope({"a": [(1, 0.5)]}).value is None


def test_groups_count_equally_whatever_their_size():
    assert grouped_mean([[0.0] * 8, [1.0, 1.0]]).value == 0.5
    assert grouped_mean([[0.0], [1.0], []]).n == 2


def test_the_difference_between_groups_does_not_widen_the_interval():
    one = grouped_mean([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]], bounds=DIFFERENCES)
    two = grouped_mean([[0.1, 0.2, 0.3], [0.7, 0.8, 0.9]], bounds=DIFFERENCES)
    assert two.high - two.low == pytest.approx(one.high - one.low)


def test_measurements_of_one_cluster_do_not_narrow_the_interval():
    values, clusters = [0.2, 0.4, 0.6, 0.5], [1, 2, 3, 4]
    once = clustered_mean(values, clusters)
    ten_times = clustered_mean(values * 10, clusters * 10)
    assert (ten_times.low, ten_times.high) == (pytest.approx(once.low), pytest.approx(once.high))
    assert ten_times.n == 40


def test_a_slope_is_that_of_least_squares_with_an_intercept_for_each_cluster():
    series = {"a": [(1, 0.9), (2, 0.8), (3, 0.7)], "b": [(1, 0.2), (3, 0.0)], "c": [(1, 0.5)]}
    score = slope(series, span=10)
    assert score.value == pytest.approx(-1.0)
    assert score.n == 5


def test_a_conversation_that_ends_early_at_a_low_level_does_not_tilt_the_slope():
    series = {i: [(t, 0.9) for t in range(20)] for i in range(5)}
    series |= {i: [(t, 0.1) for t in range(5)] for i in range(5, 10)}
    assert slope(series).value == pytest.approx(0)


def test_items_that_only_one_side_scored_are_unpaired():
    before = [{"id": 1, "p": 0.2}, {"id": 2, "p": None}, {"id": 3, "p": 0.4}]
    after = [{"id": 1, "p": 0.7}, {"id": 2, "p": 0.9}]
    differences, unpaired = intervals.pair(before, after, lambda row: row["id"], "p")
    assert differences == {1: pytest.approx(0.5)}
    assert unpaired == 2


# ------------------------------------------------------------------------------------- coverage

RUNS = 1500


def covered(score, truth):
    return score.low <= truth <= score.high


def beta(rng, mean, concentration, size=None):
    return rng.beta(mean * concentration, (1 - mean) * concentration, size)


@pytest.mark.parametrize("items", [10, 20, 40])
def test_the_interval_of_a_paired_change_covers_the_truth(items):
    """A judge's probabilities spread over the whole range, more yes after training than before."""
    rng = np.random.default_rng(items)
    hits = 0
    for _ in range(RUNS):
        change = beta(rng, 0.55, 2, items) - beta(rng, 0.25, 2, items)
        hits += covered(mean_interval(change.tolist(), bounds=DIFFERENCES), 0.3)
    assert 0.93 <= hits / RUNS <= 0.97


def test_the_interval_over_assertions_covers_the_truth():
    """Eight assertions with effects of their own, ten scenarios each, of different difficulty."""
    rng = np.random.default_rng(1)
    effects = np.linspace(-0.1, 0.6, 8)
    hits = 0
    for _ in range(RUNS):
        groups = [(beta(rng, 0.3 + e, 1, 10) - beta(rng, 0.3, 1, 10)).tolist() for e in effects]
        hits += covered(grouped_mean(groups, bounds=DIFFERENCES), effects.mean())
    assert 0.93 <= hits / RUNS <= 0.97


@pytest.mark.parametrize("conversations", [10, 40])
def test_the_interval_of_a_slope_covers_the_truth_when_turns_are_correlated(conversations):
    """Levels and slopes differ between conversations; a third of them end halfway."""
    rng = np.random.default_rng(conversations)
    turns, hits = np.arange(1, 21), 0
    for _ in range(RUNS):
        series = {}
        for i in range(conversations):
            level, own = rng.normal(0.7, 0.1), rng.normal(-0.01, 0.01)
            noise = rng.normal(0, 0.1, 20) + rng.normal(0, 0.1)
            length = 10 if i % 3 == 0 else 20
            values = level + own * turns + noise
            series[i] = list(zip(turns[:length], values[:length], strict=True))
        hits += covered(slope(series, span=10), -0.1)
    assert 0.93 <= hits / RUNS <= 0.97


def test_the_interval_of_a_mean_covers_the_truth_when_turns_are_correlated():
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(RUNS):
        own = beta(rng, 0.6, 4, 25)
        values = (rng.random((25, 8)) < own[:, None]).astype(float)
        hits += covered(clustered_mean(values.ravel().tolist(), np.repeat(range(25), 8)), 0.6)
    assert 0.93 <= hits / RUNS <= 0.97


def test_the_interval_of_a_slope_from_two_short_series_stays_within_what_is_possible():
    score = slope({1: [(1, 0.0), (4, 1.0)], 2: [(1, 1.0), (4, 0.0)]}, span=10)
    assert (score.low, score.high) == (-10, 10)
