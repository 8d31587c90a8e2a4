"""Statistics of latent effects: permutation tests within prompts, cluster bootstrap, multiple
testing.

The unit is the prompt. Every function works on each latent by itself (a row of a sparse matrix),
with random numbers that depend on the seed alone, so a latent's figures are the same to the bit
whichever latents are computed beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import Tensor

from sarm.philox import LABELS, MASK, philox, words_of

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Counter = Callable[[Ints, int, int, int], Ints]
"""(latents, first permutation, last, seed) to how often each latent's total reached what was
observed.
"""

CHUNK = 1024
"""Permutations worked on together on a CPU; changes no figure."""
CHUNK_GPU = 2**26
"""Labels dealt together on a GPU; changes no figure."""
ROWS = 2048
"""Latents worked on together, which bounds memory and changes no figure."""
ENOUGH = 10
"""A latent that chance matched this often in the first permutations needs no more of them."""
LEVELS = 16319
"""Values are tested as integers up to this, in units of the latent's largest over LEVELS:
differences of two fit in two int8.
"""


class Contrast(NamedTuple):
    """Who is compared with whom: one entry a response, a prompt's responses side by side.

    `labels` is +1/(pairs of the prompt) for each pair in which the response is chosen, minus the
    same for each in which it is rejected, so that (values * labels).sum() / n_prompts is the mean
    over prompts of the mean over pairs of a difference.
    """

    rows: Ints
    """(n,) row of each response among the encoded texts"""
    prompts: Ints
    """(n,) 0 .. n_prompts - 1, ascending"""
    chosen: Floats
    """(n,) share of the prompt's pairs in which the response is the chosen one"""
    rejected: Floats
    """(n,) the same for the rejected one"""
    n_prompts: int

    @property
    def labels(self) -> Floats:
        return self.chosen - self.rejected


def permutations_needed(n_tested: int, fdr: float) -> int:
    """Permutations with which a latent that chance never matched gets below the smallest
    Benjamini-Hochberg threshold.
    """
    return math.ceil(n_tested / fdr)


def permutation_p(
    values: scipy.sparse.csr_array,
    contrast: Contrast,
    permutations: int,
    at_most: int,
    seed: int,
    device: str = "cpu",
) -> Floats:
    """Two-sided p of each latent's mean difference, permuting within each prompt which response is
    the chosen one.

    All of a prompt's pairs are permuted jointly: its labels are dealt anew to its responses. For a
    single pair that is the sign flip; for one chosen against three rejected it is which of the four
    is the chosen one. `values` is (latents, n).

    Latents that chance matched fewer than `ENOUGH` times in the first `permutations` go on to
    `at_most`. Both p are (matched + 1) / (drawn + 1), and stopping early where p is large leaves
    them valid: a p below ENOUGH / permutations can only come from the full number.

    What is tested is `integers(values)`, fixed before any label is looked at, so the test is exact
    for them: totals are integers, equal ones count as equal, and every `device` gives the same p.
    """
    deal = deal_of(contrast)
    whole = integers(values, deal)
    observed = np.abs(whole @ deal.labels).astype(np.int64)
    count = (
        _counter_on_gpu(whole, deal, observed, device)
        if device != "cpu"
        else _counter_on_cpu(whole, deal, observed)
    )
    chunk = (
        CHUNK
        if device == "cpu"
        else max(1, min(32 * CHUNK, CHUNK_GPU // max(len(contrast.rows), 1)))
    )
    matched = np.zeros(values.shape[0], dtype=np.int64)
    drawn = np.zeros(values.shape[0], dtype=np.int64)
    running = np.arange(values.shape[0])
    for begin, end in _chunks(permutations, max(permutations, at_most), chunk):
        if begin == permutations:
            running = running[matched[running] < ENOUGH]
        if not len(running):
            break
        matched[running] += count(running, begin, end, seed)
        drawn[running] += end - begin
    return (matched + 1.0) / (drawn + 1.0)


def _chunks(first: int, total: int, size: int) -> list[tuple[int, int]]:
    return list(
        itertools.pairwise(
            sorted({*range(0, first, size), first, *range(first, total, size), total})
        )
    )


def _counter_on_cpu(whole: scipy.sparse.csr_array, deal: Deal, observed: Ints) -> Counter:
    def count(latents: Ints, begin: int, end: int, seed: int) -> Ints:
        labels = dealt_labels(deal, torch.arange(begin, end), seed).T.double().numpy()
        matched = np.empty(len(latents), dtype=np.int64)
        for start in range(0, len(latents), ROWS):
            some = latents[start : start + ROWS]
            matched[start : start + ROWS] = (
                np.abs(whole[some] @ labels) >= observed[some, None]
            ).sum(axis=1)
        return matched

    return count


def _counter_on_gpu(
    whole: scipy.sparse.csr_array, deal: Deal, observed: Ints, device: str
) -> Counter:
    """The same totals as an int8 matrix product: a prompt's labels add up to zero, so its last
    response is taken off the others.
    """
    from sarm.probing.probe_kernels import count_matched

    others = np.flatnonzero(deal.last != np.arange(len(deal.last)))
    width = -(-max(len(others), 1) // 128) * 128
    high, low = (
        torch.zeros(whole.shape[0], width, dtype=torch.int8, device=device) for _ in range(2)
    )
    for start in range(0, whole.shape[0], ROWS):
        dense = torch.from_numpy(whole[start : start + ROWS].toarray()).to(device, torch.int32)
        differences = dense[:, others] - dense[:, deal.last[others]]
        upper = (differences + 128) >> 8
        high[start : start + ROWS, : len(others)] = upper.to(torch.int8)
        low[start : start + ROWS, : len(others)] = (differences - 256 * upper).to(torch.int8)
    seen = torch.from_numpy(observed).to(device, torch.int32)
    places = torch.from_numpy(others).to(device)

    def count(latents: Ints, begin: int, end: int, seed: int) -> Ints:
        labels = torch.zeros(end - begin, width, dtype=torch.int8, device=device)
        labels[:, : len(others)] = dealt_labels(
            deal, torch.arange(begin, end, device=device), seed
        )[:, places]
        if len(latents) == len(high):
            return count_matched(high, low, labels, seen).cpu().numpy().astype(np.int64)
        some = torch.from_numpy(latents).to(device)
        return (
            count_matched(high[some], low[some], labels, seen[some]).cpu().numpy().astype(np.int64)
        )

    return count


class Deal(NamedTuple):
    """A contrast's labels as integers, to be dealt anew within each prompt."""

    labels: Ints
    """(n,) each prompt's labels times its denominator, |label| <= 127; they add up to zero within
    a prompt
    """
    denominators: Ints
    """(n,) of each response's prompt"""
    last: Ints
    """(n,) the place of the last response of the same prompt"""
    groups: list[Ints]
    """(prompts, responses) places, one array for each number of responses that prompts have"""


def deal_of(contrast: Contrast) -> Deal:
    """The least denominator up to 127 that makes a prompt's labels integers; none for so many
    pairs that they are rounded.
    """
    n, labels = len(contrast.rows), contrast.labels
    denominators = np.full(contrast.n_prompts, 127, dtype=np.int64)
    for d in range(127, 0, -1):
        off = np.abs(labels * d - np.rint(labels * d)) > 1e-9
        denominators[np.bincount(contrast.prompts, off, minlength=contrast.n_prompts) == 0] = d
    of_each = denominators[contrast.prompts]
    whole = np.rint(labels * of_each).astype(np.int64)
    sizes = np.bincount(contrast.prompts, minlength=contrast.n_prompts)
    starts = np.cumsum(sizes) - sizes
    last = (starts + sizes - 1)[contrast.prompts]
    whole[last[last == np.arange(n)]] -= np.bincount(
        contrast.prompts, whole, minlength=contrast.n_prompts
    )[sizes > 0].astype(np.int64)
    groups = [starts[sizes == size, None] + np.arange(size) for size in np.unique(sizes[sizes > 0])]
    return Deal(whole, of_each, last, groups)


def integers(values: scipy.sparse.csr_array, deal: Deal) -> scipy.sparse.csr_array:
    """Values (latents, n) over their prompt's denominator, as integers held in float64, the
    largest of each latent `LEVELS`.
    """
    reach = np.zeros(len(deal.last))
    np.maximum.at(reach, deal.last, np.abs(deal.labels))
    # Two int8 hold a difference of two values; 31 bits must hold any sum of them.
    levels = min(LEVELS, (2**31 - 1) // (2 * max(int(reach[deal.last].sum()), 1)))
    scaled = scipy.sparse.csr_array(values / deal.denominators)
    largest = (
        abs(scaled).max(axis=1).toarray().ravel() if scaled.shape[1] else np.zeros(scaled.shape[0])
    )
    unit = np.repeat(
        np.where(largest > 0, levels / np.where(largest > 0, largest, 1.0), 0.0),
        np.diff(scaled.indptr),
    )
    return scipy.sparse.csr_array(
        (np.rint(scaled.data * unit), scaled.indices, scaled.indptr), shape=scaled.shape
    )


def permuted_labels(contrast: Contrast, total: int, seed: int) -> Iterator[Floats]:
    """Chunks (n, up to CHUNK) of labels dealt anew within each prompt, as the test deals them,
    `total` in all.
    """
    deal = deal_of(contrast)
    for begin, end in _chunks(0, total, CHUNK):
        yield (
            dealt_labels(deal, torch.arange(begin, end), seed).numpy().T
            / deal.denominators[:, None]
        )


def dealt_labels(deal: Deal, permutations: Tensor, seed: int) -> Tensor:
    """Integer labels of some permutations, given by their numbers (p,), each dealt anew within
    every prompt: (p, n) int8.

    Each response of each permutation has a random number of its own, and their order within a
    prompt deals its labels. The numbers are Philox's for (permutation, response) under the seed:
    the same on every device and in any chunks.
    """
    p, n, device = len(permutations), len(deal.labels), permutations.device
    block = torch.arange(-(-n // 4), device=device).expand(p, -1)
    number = permutations[:, None].expand_as(block)
    counter = (block, number & MASK, number >> 32, LABELS)
    keys = torch.stack(philox(counter, words_of(seed)), dim=-1).flatten(1)
    labels = torch.from_numpy(deal.labels.astype(np.int8)).to(device)
    out = torch.empty(p, n, dtype=torch.int8, device=device)
    for group in deal.groups:
        places = torch.from_numpy(group).to(device)
        of_prompt = labels[places].expand(p, -1, -1)
        mine = [keys[:, places[:, r]] for r in range(places.shape[1])]
        for r, key in enumerate(mine):
            rank = torch.zeros_like(key)
            for s, other in enumerate(mine):
                # Of two equal numbers the first response's counts as the smaller.
                if s != r:
                    rank += (other <= key) if s < r else (other < key)
            out[:, places[:, r]] = of_prompt.gather(2, rank.unsqueeze(-1)).squeeze(-1)
    return out


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
