"""Statistics of latent effects over prompts: cluster bootstrap, multiple testing, partial
conjunction, matching at random.

The unit is the prompt. Every function works on each latent by itself (a row of a sparse matrix),
with random numbers that depend on the seed alone, so a latent's figures are the same to the bit
whichever latents are computed beside it. The permutation test is in `permutation.py`.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from sarm.probing.contrast import Contrast, Floats, Ints
from sarm.probing.permutation import ROWS


def prompt_effects(values: scipy.sparse.csr_array, contrast: Contrast) -> scipy.sparse.csr_array:
    """Each prompt's mean difference, (latents, n_prompts), from values (latents, n)."""
    n = len(contrast.rows)
    by_prompt = scipy.sparse.csr_array(
        (contrast.labels, (np.arange(n), contrast.prompts)), shape=(n, contrast.n_prompts)
    )
    product = scipy.sparse.csr_array(values @ by_prompt)
    product.sort_indices()
    return product


def bootstrap_intervals(
    effects: scipy.sparse.csr_array, draws: int, seed: int, level: float = 0.95
) -> tuple[Floats, Floats]:
    """Percentile intervals of each latent's mean over prompts, prompts drawn with replacement;
    effects (latents, prompts).

    NaN with fewer than two prompts, which tell nothing of the spread.
    """
    latents, n = effects.shape
    low, high = np.full(latents, np.nan), np.full(latents, np.nan)
    if n < 2:
        return low, high
    weights = np.random.default_rng([seed, 2]).multinomial(n, np.full(n, 1 / n), size=draws).T / n
    low[:], high[:] = 0.0, 0.0
    active = np.flatnonzero(np.diff(effects.indptr))
    for start in range(0, len(active), ROWS):
        some = active[start : start + ROWS]
        means = effects[some] @ weights
        low[some], high[some] = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=1)
    return low, high


def benjamini_hochberg(p: Floats) -> Floats:
    """q values: the false discovery rate at which each test would be among the discoveries. NaN
    stays NaN and counts for nothing.
    """
    q = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    m = len(order)
    q[order] = np.minimum.accumulate((p[order] * m / np.arange(1, m + 1))[::-1])[::-1].clip(max=1.0)
    return q


def holm(p: Floats) -> Floats:
    """Holm's adjusted p, the family-wise error rate at which each test would be rejected. NaN
    stays NaN and counts for nothing.
    """
    adjusted = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    m = len(order)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(m, 0, -1)).clip(max=1.0)
    return adjusted


def partial_conjunction(first: Floats, second: Floats, same_sign: NDArray[np.bool_]) -> Floats:
    """Two-sided p that an effect is there in both of two sources and of one sign, from the
    two-sided p of each.

    In either direction it is the larger of the two one-sided p (Friston et al. 2005; Benjamini and
    Heller 2008), so no source can carry the other. Twice the smaller of the directions: where the
    signs agree that is the larger two-sided p, elsewhere 1. NaN where either is.
    """
    both = np.maximum(first, second)
    return np.where(np.isnan(both), np.nan, np.where(same_sign, both, 1.0))


def matched_at_random(
    targets: Ints, pool: Ints, features: Floats, each: int, seed: int
) -> list[list[int]]:
    """For each target, up to `each` latents of the pool drawn at random from the 2 * each nearest;
    none is drawn twice.

    `features` (latents, f) is what they are matched on; every column is scaled by its spread over
    targets and pool.
    """
    rng = np.random.default_rng([seed, 3])
    everyone = np.concatenate([targets, pool])
    scaled = (
        features / np.maximum(features[everyone].std(axis=0), 1e-12) if len(everyone) else features
    )
    left = list(dict.fromkeys(int(latent) for latent in pool))
    drawn = []
    for position, target in enumerate(targets):
        share = min(each, math.ceil(len(left) / (len(targets) - position)))
        near = sorted(
            left,
            key=lambda latent: (float(np.square(scaled[latent] - scaled[target]).sum()), latent),
        )[: 2 * share]
        drawn.append([near[i] for i in rng.permutation(len(near))[:share]])
        left = [latent for latent in left if latent not in drawn[-1]]
    return drawn
