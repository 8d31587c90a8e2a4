"""The permutation test: within each prompt the labels are dealt anew to its responses.

    p = permutation_p(values, contrast, permutations, at_most, seed, device)

The statistic is studentised, so that chosen and rejected responses may differ in spread. Every
latent is tested by itself with random numbers that depend on the seed alone, and what is compared
are integers: p is the same to the bit on a CPU, on a GPU and whichever latents stand beside it.
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
"""(latents, first permutation, last, seed) to how often each latent's statistic reached what was
observed.
"""

CHUNK = 1024
"""Permutations worked on together on a CPU; changes no figure."""
CHUNK_GPU = 2**26
"""Labels dealt together on a GPU; changes no figure."""
ROWS = 2048
"""Latents worked on together, which bounds memory and changes no figure."""
FIRST = 1000
"""Permutations after which latents are looked at first."""
ENOUGH = 20
"""A latent that chance matched this often at a look needs no more permutations."""
LEVELS = 16319
"""Values are tested as integers up to this, in units of the latent's largest over LEVELS:
differences of two fit in two int8.
"""
TIE = 1 - 1e-12
"""Statistics that differ by less are equal: by rounding alone, as they come of integers."""


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
    Benjamini-Hochberg threshold: its two-sided p is 2 / (permutations + 1).
    """
    return math.ceil(2 * n_tested / fdr)


def permutation_p(
    values: scipy.sparse.csr_array,
    contrast: Contrast,
    permutations: int,
    at_most: int,
    seed: int,
    device: str = "cpu",
) -> Floats:
    """Two-sided p of each latent's mean difference, permuting within each prompt which response is
    the chosen one; `values` is (latents, n).

    All of a prompt's pairs are permuted jointly: its labels are dealt anew to its responses. For a
    single pair that is the sign flip; for one chosen against three rejected it is which of the four
    is the chosen one.

    The statistic is t = sum(d) / sqrt(sum(d^2)) over the prompts' differences d, a monotone form of
    Student's. Where chosen and rejected are alike the test is exact; where their means are equal
    and their spreads are not, the sum alone would be misjudged (one against three, twice the
    spread: 16 % at 0.05), t is right in the limit of many prompts (Janssen 1997; Chung and Romano
    2013).

    Counted is how often t reaches the observed one on its own side, (matched + 1) / (drawn + 1),
    and p is twice that: p / 2 is the one-sided p in the direction observed. Skewed latents make the
    two sides unlike. Latents that chance matched fewer than `ENOUGH` times go on from `FIRST` to
    `permutations` and from there to `at_most`; stopping early where p is large leaves it valid.
    """
    deal = deal_of(contrast)
    whole = integers(values, deal)
    squares = squares_of(whole, deal)
    observed = observed_of(whole, squares, deal)
    count = (
        _counter_on_gpu(whole, squares, deal, observed, device)
        if device != "cpu"
        else _counter_on_cpu(whole, squares, deal, observed)
    )
    chunk = (
        CHUNK
        if device == "cpu"
        else max(1, min(32 * CHUNK, CHUNK_GPU // max(len(contrast.rows), 1)))
    )
    matched = np.zeros(values.shape[0], dtype=np.int64)
    drawn = np.zeros(values.shape[0], dtype=np.int64)
    running = np.arange(values.shape[0])
    looks = {min(FIRST, permutations), permutations, max(permutations, at_most)}
    for begin, end in _chunks(looks, chunk):
        if begin in looks:
            running = running[matched[running] < ENOUGH]
        if not len(running):
            break
        matched[running] += count(running, begin, end, seed)
        drawn[running] += end - begin
    return np.minimum(2 * (matched + 1.0) / (drawn + 1.0), 1.0)


def _chunks(looks: set[int], size: int) -> list[tuple[int, int]]:
    """Consecutive ranges of at most `size` that end at every look."""
    edges = [0, *sorted(looks)]
    steps = [range(a, b, size) for a, b in itertools.pairwise(edges)]
    return list(itertools.pairwise(sorted({*itertools.chain(*steps), edges[-1]})))


class Observed(NamedTuple):
    """The statistic of the labels as they are; (latents,) each."""

    sign: Floats
    """of the sum, 1 where it is 0"""
    total: Floats
    """absolute sum"""
    squares: Floats
    """sum of squared differences, at least 1"""


def observed_of(whole: scipy.sparse.csr_array, squares: Squares, deal: Deal) -> Observed:
    total = whole @ deal.labels.astype(np.float64)
    dealt = torch.from_numpy(deal.labels.astype(np.int8))[None]
    labels = squares.labels(dealt)[0].double().numpy()
    return Observed(
        np.where(total < 0, -1.0, 1.0),
        np.abs(total),
        np.maximum(squares.constant + squares.values @ labels, 1.0),
    )


def _counter_on_cpu(
    whole: scipy.sparse.csr_array, squares: Squares, deal: Deal, observed: Observed
) -> Counter:
    def count(latents: Ints, begin: int, end: int, seed: int) -> Ints:
        dealt = dealt_labels(deal, torch.arange(begin, end), seed)
        labels = dealt.T.double().numpy()
        of_squares = squares.labels(dealt).T.double().numpy()
        matched = np.empty(len(latents), dtype=np.int64)
        for start in range(0, len(latents), ROWS):
            some = latents[start : start + ROWS]
            total = (whole[some] @ labels) * observed.sign[some, None]
            if not of_squares.size:  # the same in every permutation
                reached = total >= observed.total[some, None]
            else:
                spread = squares.values[some] @ of_squares + squares.constant[some, None]
                # total / sqrt(spread) against the observed, without a root to round
                mine = total * total * observed.squares[some, None]
                chance = np.maximum(spread, 1.0) * (np.square(observed.total[some]) * TIE)[:, None]
                reached = (total >= 0) & (mine >= chance)
            matched[start : start + ROWS] = reached.sum(axis=1)
        return matched

    return count


def _counter_on_gpu(
    whole: scipy.sparse.csr_array, squares: Squares, deal: Deal, observed: Observed, device: str
) -> Counter:
    """The same integers as int8 matrix products: a prompt's labels add up to zero, so its last
    response is taken off the others.
    """
    from sarm.probing.probe_kernels import count_matched

    others = np.flatnonzero(deal.last != np.arange(len(deal.last)))
    halves = _int8_halves(whole[:, others] - whole[:, deal.last[others]], device)
    of_squares = _int8_halves(squares.values, device)
    width, squares_width = halves.shape[2], of_squares.shape[2]
    seen = torch.from_numpy(
        np.stack(
            [
                observed.sign,
                observed.total,
                observed.squares,
                squares.constant,
                np.square(observed.total) * TIE,
            ],
            axis=1,
        )
    ).to(device)
    places = torch.from_numpy(others).to(device)

    def count(latents: Ints, begin: int, end: int, seed: int) -> Ints:
        dealt = dealt_labels(deal, torch.arange(begin, end, device=device), seed)
        labels = torch.zeros(end - begin, width, dtype=torch.int8, device=device)
        labels[:, : len(others)] = dealt[:, places]
        squares_labels = torch.zeros(end - begin, squares_width, dtype=torch.int8, device=device)
        squares_labels[:, : len(squares.left)] = squares.labels(dealt)
        some = slice(None) if len(latents) == whole.shape[0] else torch.from_numpy(latents)
        matched = count_matched(
            halves[:, some], labels, of_squares[:, some], squares_labels, seen[some]
        )
        return matched.cpu().numpy().astype(np.int64)

    return count


def _int8_halves(matrix: scipy.sparse.csr_array, device: str) -> Tensor:
    """Integers (latents, columns) as 256 * high + low, (2, latents, width) int8, the width filled
    with zeros to a multiple of 128.
    """
    latents, columns = matrix.shape
    halves = torch.zeros(2, latents, -(-columns // 128) * 128, dtype=torch.int8, device=device)
    matrix = scipy.sparse.csr_array(matrix)
    for start in range(0, latents if columns else 0, ROWS):
        dense = torch.from_numpy(matrix[start : start + ROWS].toarray()).to(device, torch.int32)
        upper = (dense + 128) >> 8
        halves[0, start : start + ROWS, :columns] = upper.to(torch.int8)
        halves[1, start : start + ROWS, :columns] = (dense - 256 * upper).to(torch.int8)
    return halves


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
    scaled = scipy.sparse.csr_array(values / deal.denominators)
    unit = _unit(scaled, float(np.abs(deal.labels).sum()))
    return _rounded(scaled, unit)


def _unit(matrix: scipy.sparse.csr_array, reach: float) -> Floats:
    """What to multiply each row with, (latents,): its largest becomes `LEVELS`, or less where a
    sum of `reach` times that would not fit in 31 bits; 1 for a row of zeros.
    """
    levels = min(LEVELS, (2**31 - 1) // max(int(reach), 1))
    if not matrix.shape[1]:
        return np.ones(matrix.shape[0])
    largest = abs(matrix).max(axis=1).toarray().ravel()
    return np.where(largest > 0, levels / np.where(largest > 0, largest, 1.0), 1.0)


def _rounded(matrix: scipy.sparse.csr_array, unit: Floats) -> scipy.sparse.csr_array:
    data = np.rint(matrix.data * np.repeat(unit, np.diff(matrix.indptr)))
    return scipy.sparse.csr_array((data, matrix.indices, matrix.indptr), shape=matrix.shape)


class Squares(NamedTuple):
    """Each latent's sum over prompts of the squared difference, linear in columns that follow from
    the labels dealt: constant + values @ labels(dealt), integers in a unit of the latent's own.
    """

    constant: Floats
    """(latents,) what no deal changes"""
    values: scipy.sparse.csr_array
    """(latents, q)"""
    left: Ints
    """(q,) a response whose label the column follows"""
    right: Ints
    """(q,) the other of a pair of responses whose labels' product it follows; -1 where it follows
    the one label
    """
    scale: Ints
    """(q,) what products are divided by to fit int8; 1 but for labels above 11"""

    def labels(self, dealt: Tensor) -> Tensor:
        """The columns' labels (p, q) int8 from labels dealt (p, n)."""
        left, right = (torch.from_numpy(x).to(dealt.device) for x in (self.left, self.right))
        scale = torch.from_numpy(self.scale).to(dealt.device)
        one = dealt[:, left]
        product = one.int() * dealt[:, right.clamp(min=0)].int()
        scaled = -torch.div(product + scale // 2, scale, rounding_mode="floor")
        return torch.where(right < 0, one.int(), scaled.int()).to(torch.int8)


def squares_of(whole: scipy.sparse.csr_array, deal: Deal) -> Squares:
    """What every deal makes of the squared differences of values (latents, n).

    With L a prompt's labels, x its values and d = sum(L x): of two responses d^2 is the same in
    either deal. Where one response has a label a of its own and all others b, d^2 follows which of
    them is the lone one: with S = sum(x) it is b^2 S^2 - b sum(g) + sum(L g), g = (a - b) x^2 + 2 b
    x S. In any other prompt it is the sum over pairs of -L_r L_s (x_r - x_s)^2.
    """
    n, rows = len(deal.labels), whole.shape[0]
    a, b = np.zeros(n), np.zeros(n)
    constant, columns = np.zeros(rows), []
    left, right, scale, reach = [], [], [], 0

    def add(matrix: scipy.sparse.csr_array, *of: Ints) -> None:
        columns.append(matrix)
        for all_, mine in zip((left, right, scale), of, strict=True):
            all_.append(mine)

    for group in deal.groups:
        if group.shape[1] < 2:
            continue
        labels = np.sort(deal.labels[group], axis=1)
        low = (labels[:, 0] < labels[:, 1]) & (labels[:, 1] == labels[:, -1])
        high = (labels[:, -1] > labels[:, -2]) & (labels[:, -2] == labels[:, 0])
        if group.shape[1] == 2:
            difference = whole[:, group[:, 0]] - whole[:, group[:, 1]]
            constant += scipy.sparse.csr_array(difference).power(2) @ np.square(labels[:, 1] * 1.0)
            continue
        lone = low | high
        a[group[lone]] = np.where(low, labels[:, 0], labels[:, -1])[lone, None]
        b[group[lone]] = np.where(low, labels[:, -1], labels[:, 0])[lone, None]
        for r, s in itertools.combinations(range(group.shape[1]), 2):
            one, other = group[~lone, r], group[~lone, s]
            largest = np.abs(labels[~lone]).max(axis=1, initial=0) ** 2
            by = np.maximum(-(-largest // 127), 1)
            reach += int((largest // by + 1).sum())
            squared = scipy.sparse.csr_array(whole[:, one] - whole[:, other]).power(2)
            add(scipy.sparse.csr_array(squared * by), one, other, by)
    member = scipy.sparse.csr_array((np.ones(n), (np.arange(n), deal.last)), shape=(n, n))
    alone = a != 0
    total = whole @ member  # S, in the place of the prompt's last response
    spread = scipy.sparse.csr_array(whole * (total @ member.T))
    g = scipy.sparse.csr_array(whole.power(2) * (a - b) + spread * (2 * b))
    constant += total.power(2) @ np.square(b) - g @ b
    others = np.flatnonzero(alone & (deal.last != np.arange(n)))
    ones = np.ones(len(others), np.int64)
    add(scipy.sparse.csr_array(g[:, others] - g[:, deal.last[others]]), others, -ones, ones)
    matrix = scipy.sparse.csr_array(scipy.sparse.hstack(columns))
    lefts, rights, by = (np.concatenate(x).astype(np.int64) for x in (left, right, scale))
    unit = _unit(matrix, reach + np.abs(deal.labels[alone]).sum())
    return Squares(np.rint(constant * unit), _rounded(matrix, unit), lefts, rights, by)


def permuted_labels(contrast: Contrast, total: int, seed: int) -> Iterator[Floats]:
    """Chunks (n, up to CHUNK) of labels dealt anew within each prompt, as the test deals them,
    `total` in all.
    """
    deal = deal_of(contrast)
    for begin, end in _chunks({total}, CHUNK):
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
