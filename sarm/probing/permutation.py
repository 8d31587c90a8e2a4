"""The permutation test: within each prompt the labels are dealt anew to its responses.

    p = permutation_p(values, contrast, permutations, at_most, seed, device)

The statistic is studentised, so that chosen and rejected responses may differ in spread. Every
latent is tested by itself with random numbers that depend on the seed alone, and what is compared
are integers: p is the same to the bit on a CPU, on a GPU and whichever latents stand beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
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
    for begin, end in chunks(looks, chunk):
        if begin in looks:
            running = running[matched[running] < ENOUGH]
        if not len(running):
            break
        matched[running] += count(running, begin, end, seed)
        drawn[running] += end - begin
    return np.minimum(2 * (matched + 1.0) / (drawn + 1.0), 1.0)


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
    from sarm.probing.permutation_kernel import count_matched

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
    of: tuple[list[Ints], list[Ints], list[Ints]] = ([], [], [])
    reach = 0

    def add(matrix: scipy.sparse.csr_array, left: Ints, right: Ints, scale: Ints) -> None:
        columns.append(matrix)
        for known, new in zip(of, (left, right, scale), strict=True):
            known.append(new)

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
    left, right, scale = (np.concatenate(x).astype(np.int64) for x in of)
    unit = _unit(matrix, reach + np.abs(deal.labels[alone]).sum())
    return Squares(np.rint(constant * unit), _rounded(matrix, unit), left, right, scale)
