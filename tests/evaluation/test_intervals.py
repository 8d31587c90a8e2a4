"""Intervals over prompts and seeds by hand, the bootstrap against SciPy
and a loop.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from sarm.evaluation.intervals import (
    bootstrap_means,
    clustered_interval,
    t_interval,
    two_way,
    two_way_variance,
)


def padded(table: np.ndarray, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(rows, weights): the prompts' means with the added ones, as the definition has them."""
    rows = [*table.mean(1), scale, -scale, 0.0]
    return np.array(rows), np.array([1.0] * len(table) + [0.5, 0.5, 1.0])


@pytest.mark.parametrize("shape", [(7, 3), (40, 5), (3, 2)])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_two_way_is_prompts_plus_seeds_less_their_interaction(shape, scale):
    rng = np.random.default_rng(sum(shape))
    prompts, seeds = shape
    table = (
        rng.normal(0.1, 0.2, shape) + rng.normal(0, 0.3, seeds) + rng.normal(0, 0.2, (prompts, 1))
    )
    rows, weights = padded(table, scale)
    total = weights.sum()
    mean = (weights * rows).sum() / total
    by_prompt = (weights * (rows - mean) ** 2).sum() / (total - 1) / total
    shrink = prompts / (prompts + 2)
    by_seed = np.var(shrink * table.mean(0), ddof=1) / seeds
    both = [
        table[p, s] - table[p].mean() - table[:, s].mean() + table.mean()
        for p in range(prompts)
        for s in range(seeds)
    ]
    df = (prompts - 1) * (seeds - 1)
    together = shrink**2 * sum(x**2 for x in both) / df / (prompts * seeds)
    expected = max(by_prompt + by_seed - together, by_prompt, by_seed)
    variance, degrees = two_way_variance(table, scale)
    assert variance == pytest.approx(expected)
    below = by_prompt**2 / (prompts + 1) + by_seed**2 / (seeds - 1) + together**2 / df
    assert degrees == pytest.approx(expected**2 / below)
    found = two_way(table, scale)
    half = stats.t.ppf(0.975, max(degrees, 1)) * math.sqrt(expected)
    assert found.value == pytest.approx(table.mean())
    assert (found.low, found.high) == pytest.approx(
        (max(mean - half, -scale), min(mean + half, scale))
    )


def test_a_difference_between_seeds_widens_the_interval_and_more_prompts_do_not_help():
    seeds = np.array([-0.1, 0.0, 0.1, 0.0, 0.0])
    few, many = (np.tile(seeds, (n, 1)) for n in (100, 10_000))
    assert two_way(many).se == pytest.approx(np.std(seeds, ddof=1) / math.sqrt(5), rel=0.01)
    assert two_way(few).df < 6 and two_way(many).df == pytest.approx(4, rel=0.01)
    alike = np.tile(np.linspace(-0.1, 0.1, 100)[:, None], (1, 5))
    assert two_way(alike).se < two_way(few).se


@pytest.mark.parametrize("value", [0.0, 1.0, -0.4])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1), (2, 3), (60, 5)])
def test_no_interval_has_zero_width_and_each_holds_its_estimate(value, shape):
    found = two_way(np.full(shape, value))
    assert found.low <= found.value <= found.high and found.high - found.low > 1 / shape[0] / 2
    assert found.value == pytest.approx(value) and found.detectable > 0


def test_two_prompts_that_agree_exclude_nothing():
    found = two_way(np.full((2, 3), -1.0))
    assert found.low == -1.0 and found.high > 0


def test_nothing_has_no_interval():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in ((0, 3), (3, 0)):
            assert all(map(math.isnan, two_way(np.zeros(shape))))


def test_the_detectable_effect_is_that_of_a_power_calculation():
    found = t_interval(0.0, 0.02**2, 30.0)
    rng = np.random.default_rng(0)
    scale = np.sqrt(stats.chi2.rvs(30, size=200_000, random_state=rng) / 30)
    t = (found.detectable / 0.02 + rng.normal(size=200_000)) / scale
    assert (t > stats.t.ppf(0.975, 30)).mean() == pytest.approx(0.8, abs=0.01)


def test_bootstrap_agrees_with_scipy_and_with_a_loop():
    rng = np.random.default_rng(0)
    values = rng.normal(size=80)
    low, high = clustered_interval(values, np.arange(80).astype(str), 5000, 0)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.02)

    clusters = np.array([0, 0, 0, 1, 2])
    data = np.array([1.0, 2.0, 3.0, 10.0, -4.0])
    ours = bootstrap_means(data[None], clusters, 40_000, 3)[0]
    groups = [data[clusters == c] for c in range(3)]
    loop = [
        np.concatenate([groups[c] for c in rng.integers(0, 3, 3)]).mean() for _ in range(20_000)
    ]
    assert ours.mean() == pytest.approx(np.mean(loop), abs=0.06) and ours.std() == pytest.approx(
        np.std(loop), rel=0.03
    )


@pytest.mark.parametrize("values", [[1.0], [0.5, 0.5, 0.5], [1.0, math.nan, 2.0]])
def test_a_sample_that_cannot_vary_has_no_bootstrap_interval(values):
    clusters = np.arange(len(values)).astype(str)
    assert all(map(math.isnan, clustered_interval(np.array(values), clusters, 50, 0)))
