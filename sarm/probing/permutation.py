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
from torch import Tensor

from sarm.probing.contrast import CHUNK, Contrast, Deal, Floats, Ints, chunks, deal_of, dealt_labels

Counter = Callable[[Ints, int, int, int], Ints]
"""(latents, first permutation, last, seed) to how often each latent's statistic reached what was
observed.
"""

CHUNK_GPU = 2**26
"""Labels dealt together on a GPU; changes no figure."""
ROWS = 2048
"""Latents worked on together, which bounds memory and changes no figure."""
DENSE = 2**22
"""Values held densely together while they are made integers; changes no figure."""
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
    if not values.shape[0] or not contrast.n_prompts:
        return np.ones(values.shape[0])
    design = design_of(deal_of(contrast))
    count = (
        _counter_on_gpu(values, design, device)
        if device != "cpu"
        else _counter_on_cpu(values, design)
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
    for begin, end in chunks(looks, chunk):
        if begin in looks:
            running = running[matched[running] < ENOUGH]
        if not len(running):
            break
        matched[running] += count(running, begin, end, seed)
        drawn[running] += end - begin
    return np.minimum(2 * (matched + 1.0) / (drawn + 1.0), 1.0)


class Design(NamedTuple):
    """What the sums of a deal are linear in: the labels of each prompt's responses but the last
    one's, as a prompt's labels add up to zero; and, for the squares, products of two labels.
    """

    deal: Deal
    others: Ints
    """(m,) the responses but each prompt's last"""
    common: Ints
    """(n,) the label that all responses of the prompt but at most one share; 0 in other prompts"""
    left: Ints
    """(q,) one response of each pair of responses of the other prompts"""
    right: Ints
    """(q,) the other"""
    scale: Ints
    """(q,) what a pair's product of labels is divided by to fit int8; 1 but for labels above 11"""
    squares_vary: bool
    """Whether the sum of squares is another in another deal."""

    def labels(self, dealt: Tensor) -> tuple[Tensor, Tensor]:
        """The labels of others (p, m) and of pairs (p, q), int8, from labels dealt (p, n)."""
        others, left, right, scale = (
            torch.from_numpy(x).to(dealt.device)
            for x in (self.others, self.left, self.right, self.scale)
        )
        product = dealt[:, left].int() * dealt[:, right].int()
        scaled = -torch.div(product + scale // 2, scale, rounding_mode="floor")
        return dealt[:, others], scaled.to(torch.int8)


def design_of(deal: Deal) -> Design:
    n = len(deal.labels)
    common, vary = np.zeros(n, np.int64), False
    pairs: list[tuple[Ints, Ints, Ints]] = [(np.empty(0, np.int64),) * 3]
    for group in deal.groups:
        if group.shape[1] < 2:
            continue
        labels = np.sort(deal.labels[group], axis=1)
        low, high = labels[:, 1] == labels[:, -1], labels[:, 0] == labels[:, -2]
        common[group[high]], common[group[low]] = labels[high, :1], labels[low, -1:]
        vary |= group.shape[1] > 2 and bool(labels.any())
        rest = group[~(low | high)]
        largest = np.abs(deal.labels[rest]).max(axis=1, initial=0) ** 2
        for r, s in itertools.combinations(range(group.shape[1]), 2):
            pairs.append((rest[:, r], rest[:, s], np.maximum(-(-largest // 127), 1)))
    left, right, scale = (np.concatenate(x) for x in zip(*pairs, strict=True))
    others = np.flatnonzero(deal.last != np.arange(n))
    return Design(deal, others, common, left, right, scale, vary)


class Sums(NamedTuple):
    """Of some latents, integers held in float64 that make their sums of a deal with `labels`: of
    the differences `totals @ labels`, of their squares `constant + squares @ labels`, the latter in
    a unit of the latent's own.
    """

    totals: Tensor
    """(latents, m)"""
    squares: Tensor
    """(latents, m + q), of no width where no deal changes them"""
    constant: Tensor
    """(latents,)"""
    observed: Tensor
    """(latents, 3) of the labels as they are: the sum's sign, 1 where it is 0; its absolute value;
    the sum of squares, at least 1
    """


def blocks_of_sums(
    values: scipy.sparse.csr_array, design: Design, device: str
) -> Iterator[tuple[slice, Sums]]:
    """The sums of values (latents, n), some latents after the other, computed on the device. All
    numbers are integers below 2^53, so none depends on where they are added up.
    """
    width = max(values.shape[1], len(design.others) + len(design.left))
    rows = max(1, min(ROWS, DENSE // width))
    for start in range(0, values.shape[0], rows):
        at = slice(start, start + rows)
        yield at, sums_of(_dense(values[at], device), design)


def _dense(values: scipy.sparse.csr_array, device: str) -> Tensor:
    """A sparse matrix without duplicates made dense on the device: what is zero is never sent."""
    counts, columns, data = (
        torch.from_numpy(array).to(device)
        for array in (np.diff(values.indptr), values.indices, values.data)
    )
    rows = torch.repeat_interleave(torch.arange(values.shape[0], device=device), counts)
    dense = torch.zeros(values.shape, dtype=torch.float64, device=device)
    dense[rows, columns.long()] = data
    return dense


def sums_of(values: Tensor, design: Design) -> Sums:
    """The sums of values (latents, n) float64."""
    deal, device = design.deal, values.device
    labels, last, others = (
        torch.from_numpy(x).to(device) for x in (deal.labels, deal.last, design.others)
    )
    x = integers(values, deal)
    totals = x[:, others] - x[:, last[others]]
    total = x @ labels.double()
    if design.squares_vary:
        constant, squares = squares_of(x, design)
        of_others, of_pairs = design.labels(labels.to(torch.int8)[None])
        spread = constant + squares @ torch.cat([of_others, of_pairs], 1)[0].double()
    else:
        constant, squares = torch.zeros_like(total), totals[:, :0]
        spread = constant
    sign = torch.where(total < 0, -1.0, 1.0).double()
    return Sums(
        totals, squares, constant, torch.stack([sign, total.abs(), spread.clamp(min=1.0)], 1)
    )


def squares_of(x: Tensor, design: Design) -> tuple[Tensor, Tensor]:
    """What every deal makes of the squared differences of integers x (latents, n): the constant
    (latents,) and columns (latents, m + q) of `Sums`.

    With L a prompt's labels and d = sum(L x): where one of m responses has a label of its own and
    all others b, d^2 follows which of them is the lone one. With S = sum(x) it is b^2 (m sum(x^2) -
    S^2) + sum(L g), g = b x (2 S - m x); of two responses g is the same, so d^2 is too. In any
    other prompt d^2 is the sum over pairs of -L_r L_s (x_r - x_s)^2.
    """
    common, others, last, left, right, scale = (
        torch.from_numpy(array).to(x.device)
        for array in (
            design.common, design.others, design.deal.last, design.left, design.right, design.scale
        )
    )  # fmt: skip
    g, constant = torch.zeros_like(x), torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for group in design.deal.groups:
        places, m = torch.from_numpy(group).to(x.device), group.shape[1]
        mine, b = x[:, places], common[places].double()
        total = mine.sum(-1, keepdim=True)
        g[:, places] = b * mine * (2 * total - m * mine)
        constant += (b[:, 0] ** 2 * (m * mine.square().sum(-1) - total.squeeze(-1) ** 2)).sum(-1)
    pairs = scale * (x[:, left] - x[:, right]).square()
    columns = torch.cat([g[:, others] - g[:, last[others]], pairs], 1)
    reach = np.abs(design.deal.labels[design.common != 0]).sum() + _reach_of_pairs(design)
    unit = _unit(columns, reach)
    return torch.round(constant * unit), torch.round(columns * unit[:, None])


def _reach_of_pairs(design: Design) -> int:
    """The most that labels of pairs add up to, whatever the deal."""
    labels = np.abs(design.deal.labels)
    largest = np.zeros(len(labels), np.int64)
    np.maximum.at(largest, design.deal.last, labels)
    return int((largest[design.deal.last[design.left]] ** 2 // design.scale + 1).sum())


def integers(values: Tensor, deal: Deal) -> Tensor:
    """Values (latents, n) over their prompt's denominator, as integers held in float64, the
    largest of each latent `LEVELS`.
    """
    scaled = values / torch.from_numpy(deal.denominators).to(values.device)
    return torch.round(scaled * _unit(scaled, int(np.abs(deal.labels).sum()))[:, None])


def _unit(columns: Tensor, reach: int) -> Tensor:
    """What to multiply each latent's row with, (latents,): its largest becomes `LEVELS`, or less
    where a sum of `reach` times that would not fit in 31 bits; 1 for a row of zeros.
    """
    levels = float(min(LEVELS, (2**31 - 1) // max(reach, 1)))
    largest = columns.abs().amax(1)
    return torch.where(largest > 0, levels / largest, 1.0)


def _counter_on_cpu(values: scipy.sparse.csr_array, design: Design) -> Counter:
    blocks = [sums for _, sums in blocks_of_sums(values, design, "cpu")]
    totals, squares = (
        scipy.sparse.csr_array(
            scipy.sparse.vstack([scipy.sparse.csr_array(sums[i].numpy()) for sums in blocks])
        )
        for i in (0, 1)
    )
    constant = torch.cat([sums.constant for sums in blocks]).numpy()
    sign, observed, observed_squares = torch.cat([s.observed for s in blocks]).numpy().T

    def count(latents: Ints, begin: int, end: int, seed: int) -> Ints:
        of_others, of_pairs = design.labels(
            dealt_labels(design.deal, torch.arange(begin, end), seed)
        )
        labels = of_others.T.double().numpy()
        of_squares = torch.cat([of_others, of_pairs], 1).T.double().numpy()
        matched = np.empty(len(latents), dtype=np.int64)
        for start in range(0, len(latents), ROWS):
            some = latents[start : start + ROWS]
            total = (totals[some] @ labels) * sign[some, None]
            if not design.squares_vary:
                reached = total >= observed[some, None]
            else:
                spread = squares[some] @ of_squares + constant[some, None]
                # total / sqrt(spread) against the observed, without a root to round
                mine = total * total * observed_squares[some, None]
                chance = np.maximum(spread, 1.0) * (np.square(observed[some]) * TIE)[:, None]
                reached = (total >= 0) & (mine >= chance)
            matched[start : start + ROWS] = reached.sum(axis=1)
        return matched

    return count


def _counter_on_gpu(values: scipy.sparse.csr_array, design: Design, device: str) -> Counter:
    """The same integers as int8 matrix products."""
    from sarm.probing.permutation_kernel import count_matched

    latents, m, q = values.shape[0], len(design.others), len(design.left)
    width = _padded(m)
    squares_width = width + _padded(q) if design.squares_vary else 0
    totals, squares = (
        torch.zeros(2, latents, columns, dtype=torch.int8, device=device)
        for columns in (width, squares_width)
    )
    seen = torch.empty(latents, 5, dtype=torch.float64, device=device)
    for at, sums in blocks_of_sums(values, design, device):
        totals[:, at, :m] = _int8_halves(sums.totals)
        if design.squares_vary:
            squares[:, at, :m] = _int8_halves(sums.squares[:, :m])
            squares[:, at, width : width + q] = _int8_halves(sums.squares[:, m:])
        seen[at, :3], seen[at, 3] = sums.observed, sums.constant
        seen[at, 4] = sums.observed[:, 1].square() * TIE

    def count(latents: Ints, begin: int, end: int, seed: int) -> Ints:
        dealt = dealt_labels(design.deal, torch.arange(begin, end, device=device), seed)
        labels = torch.zeros(
            end - begin, max(width, squares_width), dtype=torch.int8, device=device
        )
        labels[:, :m], labels[:, width : width + q] = design.labels(dealt)
        some = slice(None) if len(latents) == len(seen) else torch.from_numpy(latents)
        matched = count_matched(totals[:, some], squares[:, some], labels, seen[some])
        return matched.cpu().numpy().astype(np.int64)

    return count


def _padded(columns: int) -> int:
    return -(-columns // 128) * 128


def _int8_halves(integers: Tensor) -> Tensor:
    """Integers (latents, columns) as 256 * high + low, (2, latents, columns) int8."""
    whole = integers.int()
    upper = (whole + 128) >> 8
    return torch.stack([upper, whole - 256 * upper]).to(torch.int8)
