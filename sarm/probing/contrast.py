"""Which response is chosen: a contrast of texts, and its labels dealt anew within each prompt.

deal = deal_of(contrast)
labels = dealt_labels(deal, torch.arange(1000), seed)   # (1000, n) int8, alike on every device
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sarm.philox import LABELS, MASK, philox, words_of

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
CHUNK = 1024
"""Permutations worked on together on a CPU; changes no figure."""


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


def chunks(looks: set[int], size: int) -> list[tuple[int, int]]:
    """Consecutive ranges of at most `size` that end at every look."""
    edges = [0, *sorted(looks)]
    steps = [range(a, b, size) for a, b in itertools.pairwise(edges)]
    return list(itertools.pairwise(sorted({*itertools.chain(*steps), edges[-1]})))


def permuted_labels(contrast: Contrast, total: int, seed: int) -> Iterator[Floats]:
    """Chunks (n, up to CHUNK) of labels dealt anew within each prompt, as the test deals them,
    `total` in all.
    """
    deal = deal_of(contrast)
    for begin, end in chunks({total}, CHUNK):
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
