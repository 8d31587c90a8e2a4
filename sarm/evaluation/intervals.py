"""Confidence intervals over prompts and seeds. Numpy and SciPy's t distribution alone.

`python -m pytest tests/evaluation/test_intervals.py` compares them with numbers worked by hand,
`python -m benchmarks.verdict` measures their coverage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

LEVEL = 0.95
POWER = 0.8
AT_ONCE = 4_000_000
"""Draws times clusters held together; changes no figure."""

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate with its 95 % interval, standard error and degrees of freedom."""

    value: float
    low: float
    high: float
    se: float
    df: float

    @property
    def detectable(self) -> float:
        """`detectable_effect` of such a sample."""
        return detectable_effect(self.se, self.df)


UNKNOWN = Interval(math.nan, math.nan, math.nan, math.nan, math.nan)


def detectable_effect(se: float, df: float) -> float:
    """Minimum detectable effect: the smallest true change that is significant at 5 % with 80 %
    power, at a standard error and its degrees of freedom.
    """
    return float(stdtrit(df, (1 + LEVEL) / 2) + stdtrit(df, POWER)) * se


def satterthwaite(variance: float, parts: Sequence[tuple[float, int]]) -> float:
    """Degrees of freedom of a variance that is made up of (variance, degrees of freedom)
    (Satterthwaite 1946).
    """
    return variance**2 / sum(part**2 / df for part, df in parts)


def t_interval(value: float, variance: float, df: float) -> Interval:
    """Student's t; a `df` under 1 counts as 1."""
    df, se = max(df, 1.0), math.sqrt(variance)
    half = float(stdtrit(df, (1 + LEVEL) / 2)) * se
    return Interval(value, value - half, value + half, se, df)


def two_way(table: Floats, scale: float = 1.0) -> Interval:
    """Interval of the mean of differences (prompts, seeds) that vary over both.

    To the prompts' means are added half a prompt at +scale, half a prompt at -scale and one at 0,
    `scale` being the largest difference possible, so that equal differences have an interval of
    some width. The variance is that of prompts plus that of seeds less their interaction's
    (Cameron, Gelbach and Miller 2011), never below either; Student's t with Satterthwaite's
    degrees. `value` is the plain mean. With one seed the variance is that of prompts alone.
    """
    prompts, seeds = table.shape
    if prompts == 0 or seeds == 0:
        return UNKNOWN
    variance, df = two_way_variance(table, scale)
    mean = float(table.mean())
    centre = mean * prompts / (prompts + 2)
    around = t_interval(centre, variance, df)
    low, high = max(around.low, -scale), min(around.high, scale)
    return around._replace(value=mean, low=low, high=high)


def two_way_variance(table: Floats, scale: float) -> tuple[float, float]:
    """(variance, degrees of freedom) of the mean over prompts, the two added ones among them, and
    seeds.
    """
    prompts, seeds = table.shape
    means = table.mean(1)
    weight = prompts + 2
    centre = float(means.sum()) / weight
    squares = float(((means - centre) ** 2).sum()) + centre**2
    squares += 0.5 * (scale - centre) ** 2 + 0.5 * (scale + centre) ** 2
    by_prompt = squares / (weight - 1) / weight
    parts = [(by_prompt, weight - 1)]
    variance = by_prompt
    if seeds > 1:
        # The added prompts are alike for every seed: they only shrink the seeds' differences.
        shrink = (prompts / weight) ** 2
        by_seed = shrink * float(table.mean(0).var(ddof=1)) / seeds
        parts.append((by_seed, seeds - 1))
        together = 0.0
        if prompts > 1:
            rest = table - means[:, None] - table.mean(0) + table.mean()
            df = (prompts - 1) * (seeds - 1)
            together = shrink * float((rest**2).sum()) / df / (prompts * seeds)
            parts.append((together, df))
        variance = max(by_prompt + by_seed - together, by_prompt, by_seed)
    return variance, satterthwaite(variance, parts)


def clustered_interval(
    values: Floats, clusters: NDArray[np.str_], draws: int, seed: int
) -> tuple[float, float]:
    """95 % percentile interval of a mean (n,), clusters (n,) drawn with replacement. For means
    without a largest difference, such as rewards.

    NaN below two clusters, and where all values are equal: such a sample cannot tell how wide.
    """
    if len(np.unique(clusters)) < 2 or not np.isfinite(values).all() or np.ptp(values) == 0:
        return math.nan, math.nan
    means = bootstrap_means(values[None], clusters, draws, seed)[0]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrap_means(values: Floats, clusters: NDArray[np.str_], draws: int, seed: int) -> Floats:
    """Means of rows (m, n) when the clusters (n,) are drawn with replacement: (m, draws)."""
    _, cluster = np.unique(clusters, return_inverse=True)
    n_clusters = int(cluster.max()) + 1
    sums = np.stack([np.bincount(cluster, weights=row) for row in values])
    sizes = np.bincount(cluster)
    rng = np.random.default_rng(seed)
    means, at_once = [], max(1, AT_ONCE // n_clusters)
    for start in range(0, draws, at_once):
        drawn = rng.multinomial(
            n_clusters, np.full(n_clusters, 1 / n_clusters), size=min(at_once, draws - start)
        )
        means.append(sums @ drawn.T / (drawn @ sizes))
    return np.concatenate(means, axis=1)
