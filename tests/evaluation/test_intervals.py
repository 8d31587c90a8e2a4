"""Intervals over prompts and seeds by hand, the bootstrap against SciPy
and a loop.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from sarm.evaluation import intervals
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


def variance_by_hand(table: list[list[float]], scale: float) -> tuple[float, float]:
    return two_way_variance(np.array(table), scale)


def test_the_larger_of_prompts_seeds_and_both_by_hand():
    """Each of the three is the largest once; the added prompts' part is scale^2 / (w (w - 1))."""
    # One prompt of mean 0.3, w = 3: centre 0.1, so squares 0.04 + 0.01 + (1.9^2 + 2.1^2) / 2 = 4.06
    # over 2 and 3; seeds' variance 0.08 / 2 over 3 and shrunk by 1/9; no interaction to subtract.
    prompts, seeds = 4.06 / 6, 0.04 / 3 / 9
    variance, df = variance_by_hand([[0.1, 0.5, 0.3]], 2.0)
    assert variance == pytest.approx(prompts + seeds)
    assert df == pytest.approx((prompts + seeds) ** 2 / (prompts**2 / 2 + seeds**2 / 2))
    # Two prompts, w = 4, means 0.2 and 0.4, seeds' means 0.4 and 0.2, interaction +-0.3:
    # centre 0.15; squares 0.0025 + 0.0625 + 0.0225 + (0.85^2 + 1.15^2) / 2 = 1.11 over 3 and 4;
    # seeds 0.02 / 2 / 4; both 4 * 0.09 / 1 / 4 / 4, more than the seeds', so prompts alone are left
    variance, df = variance_by_hand([[0.6, -0.2], [0.2, 0.6]], 1.0)
    prompts, seeds, both = 1.11 / 12, 0.02 / 8, 0.09 / 4
    assert variance == pytest.approx(prompts)
    assert df == pytest.approx(prompts**2 / (prompts**2 / 3 + seeds**2 / 1 + both**2 / 1))
    # Four prompts of mean 0, w = 6: prompts 1 / 30; seeds' means +-0.5, variance 0.5 / 2 * 4/9;
    # interaction +-0.5 in all 8 cells: 2 / 3 / 8 * 4/9, more than the prompts' part
    variance, df = variance_by_hand([[1.0, -1.0], [0.0, 0.0]] * 2, 1.0)
    prompts, seeds, both = 1 / 30, 1 / 9, 1 / 27
    assert variance == pytest.approx(seeds)
    assert df == pytest.approx(seeds**2 / (prompts**2 / 5 + seeds**2 / 1 + both**2 / 3))


def test_no_interval_goes_beyond_the_largest_difference_on_either_side():
    above, below = (two_way(np.full((2, 3), value)) for value in (1.0, -1.0))
    assert above.high == 1.0 and below.low == -1.0
    assert (above.low, above.high) == (-below.high, -below.low) and above.low < 0


@pytest.mark.parametrize(("df", "counted"), [(0.4, 1.0), (1.5, 1.5), (2.5, 2.5)])
def test_fewer_than_one_degree_of_freedom_counts_as_one_and_no_other_is_rounded(df, counted):
    found = t_interval(0.3, 0.04, df)
    half = 0.2 * stats.t.ppf(0.975, counted)
    assert found == pytest.approx((0.3, 0.3 - half, 0.3 + half, 0.2, counted))


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


@pytest.mark.parametrize("at_once", [1, 7, 4_000_000])
@pytest.mark.parametrize("of", [["b", "a", "b"], ["b", "a", "c", "a", "c", "a"]])
def test_the_bootstrap_written_out(of, at_once, monkeypatch: pytest.MonkeyPatch):
    """Whatever is held at once; NumPy draws how often each cluster, in order of name, is taken."""
    monkeypatch.setattr(intervals, "AT_ONCE", at_once)
    values, clusters = np.array([3.0, -1.0, 8.5, 2.0, 4.0, 7.25])[: len(of)], np.array(of)
    names, draws = sorted(set(of)), 11
    rng = np.random.default_rng(23)
    taken = rng.multinomial(len(names), [1 / len(names)] * len(names), size=draws)
    groups = [values[clusters == name] for name in names]
    means = [
        sum(n * group.sum() for n, group in zip(times, groups, strict=True))
        / sum(n * len(group) for n, group in zip(times, groups, strict=True))
        for times in taken
    ]
    both = bootstrap_means(np.stack([values, -2 * values]), clusters, draws, 23)
    assert both.shape == (2, draws)
    np.testing.assert_allclose(both, [means, [-2 * mean for mean in means]])
    found = clustered_interval(values, clusters, draws, 23)
    assert found == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert found[0] < found[1]


def test_one_cluster_has_no_bootstrap_interval_however_its_values_differ():
    assert all(
        map(math.isnan, clustered_interval(np.array([1.0, 2.0]), np.array(["a"] * 2), 50, 0))
    )


@pytest.mark.parametrize("values", [[1.0], [0.5, 0.5, 0.5], [1.0, math.nan, 2.0]])
def test_a_sample_that_cannot_vary_has_no_bootstrap_interval(values):
    clusters = np.arange(len(values)).astype(str)
    assert all(map(math.isnan, clustered_interval(np.array(values), clusters, 50, 0)))
