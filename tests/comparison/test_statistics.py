"""Intervals of paired differences, against scipy's and against what is known of them."""

import numpy as np
import pytest
from scipy import stats

from distillkit.comparison.statistics import Difference, mean_and_deviation, paired_difference

PROMPTS = 80


def metrics(seed: int, shift: float, seeds: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Figures of a method and of the one that it is compared with: prompts differ much, the methods by `shift`."""
    draw = np.random.default_rng(seed)
    prompts = 3 * draw.standard_normal(PROMPTS)
    other = prompts + 0.2 * draw.standard_normal((seeds, PROMPTS))
    return prompts + shift + 0.2 * draw.standard_normal((seeds, PROMPTS)), other


def test_the_interval_is_that_of_scipy() -> None:
    method, other = metrics(0, 0.3)
    weights = np.random.default_rng(1).integers(1, 30, PROMPTS).astype(float)
    found = paired_difference(method, other, weights)

    def ratio(difference: np.ndarray, weight: np.ndarray, axis: int = -1) -> np.ndarray:
        return (difference * weight).sum(axis) / weight.sum(axis)

    expected = stats.bootstrap(
        ((method - other)[0], weights),
        ratio,
        paired=True,
        method="percentile",
        n_resamples=20_000,
        random_state=np.random.default_rng(2),
    )
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert found.mean == pytest.approx(float(ratio((method - other)[0], weights)))
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.05 * width)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.05 * width)


def test_it_is_much_narrower_than_that_of_two_unpaired_means() -> None:
    method, other = metrics(0, 0.3)
    found = paired_difference(method, other, np.ones(PROMPTS))
    unpaired = 1.96 * np.sqrt(method.var() / PROMPTS + other.var() / PROMPTS)
    assert found.high - found.low < 2 * unpaired / 5
    assert found.is_sure
    assert -unpaired < found.mean < unpaired, "unpaired, the difference is lost in the prompts"


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        method, other = metrics(seed, 0.1)
        found = paired_difference(method, other, np.ones(PROMPTS), resamples=1000)
        covered += found.low <= 0.1 <= found.high
    assert 180 <= covered <= 198, "95 % of 200, and 3 standard deviations on either side"


def test_seeds_that_disagree_make_it_wider() -> None:
    method, other = metrics(3, 0.0, seeds=3)
    alike = paired_difference(method, other, np.ones(PROMPTS))
    method += np.array([[-0.5], [0.0], [0.5]])
    assert paired_difference(method, other, np.ones(PROMPTS)).low < alike.low - 0.2
    assert paired_difference(method, other, np.ones(PROMPTS)).high > alike.high + 0.2


def test_the_mean_is_that_of_the_seeds_weighted_means() -> None:
    method, other = np.array([[1.0, 2.0], [3.0, 8.0]]), np.array([[0.0, 0.0], [1.0, 1.0]])
    found = paired_difference(method, other, np.array([3.0, 1.0]))
    assert found.mean == ((3 * 1 + 2) / 4 + (3 * 2 + 7) / 4) / 2


def test_equal_figures_have_no_difference_and_the_interval_is_the_same_again() -> None:
    method, other = metrics(0, 0.3)
    assert paired_difference(method, method, np.ones(PROMPTS)) == Difference(0.0, 0.0, 0.0)
    assert not paired_difference(method, method, np.ones(PROMPTS)).is_sure
    assert paired_difference(method, other, np.ones(PROMPTS)) == paired_difference(method, other, np.ones(PROMPTS))


def test_the_deviation_is_that_of_a_sample() -> None:
    assert mean_and_deviation(np.array([1.0, 3.0])) == (2.0, pytest.approx(np.sqrt(2)))
    mean, deviation = mean_and_deviation(np.array([5.0]))
    assert mean == 5.0
    assert np.isnan(deviation)
