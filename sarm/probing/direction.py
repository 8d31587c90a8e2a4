"""The `direction` intervention for every latent at once: h + c std(h) d_i, then normalisation,
encoder, TopK and head anew.

    sae, weight = load_sae(config.sarm, device)  # in float64
    base = baseline(sae, weight, states, k)      # the texts as they are
    # a tile of latents at a time
    for found in direction_changes(base, sae, range(start, stop), [3.0]): ...

Moving a state along d_i changes every pre-activation, but all by one law: the new normalised state
is an affine combination of the old one, d_i and the ones vector, so with G_ij = W_j . (d_i - mean
d_i), which no text enters,

    a'_j = alpha (a_j - b_j) + beta G_ij + b_j,    b = b_lat - W b_pre,

alpha and beta being numbers of a text and a latent. TopK of that needs no sort: the k-th among the
text's own `candidates` of largest a is a threshold that the k-th of all can only exceed; a scan
finds the few others above it. Everything that decides is float64, on the GPU and on the CPU, so the
result is that of a recomputation from the state up to 1e-12 or so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sarm.config import SarmConfig, UserError
from sarm.reward_model.interventions import Direction
from sarm.reward_model.interventions import direction_changes as recomputed
from sarm.reward_model.model import load_sae as read_sae
from sarm.reward_model.sae import EPS, TopKSae, stable_topk

TILE_BYTES = 2**29
"""What one tile of latents may take: G, and a few numbers per text."""
TILE_ROWS = 1024
CPU_ROWS = 64
"""Latents worked on together on a CPU."""
SURE, TIED = 0, 1


class Baseline(NamedTuple):
    """Texts before any intervention; everything float64, on the device that computes."""

    centred: Tensor
    """(n, d_in) h - mean(h)"""
    std: Tensor
    """(n,)"""
    a: Tensor
    """(n, d_sae) pre-activations"""
    bias: Tensor
    """(d_sae,) the pre-activations of a normalised state of zero"""
    candidates: Tensor
    """(n, M) int32: the latents of the largest pre-activations, descending, ties by lowest latent;
    the first k are TopK's
    """
    rewards: Tensor
    """(n,)"""
    weight: Tensor
    """(d_sae,) the head"""
    k: int


class Moved(NamedTuple):
    """What moving every text along each latent's direction does; (latents, n), float64 but for
    `swapped`.
    """

    latents: range
    change: Tensor
    """of the reward"""
    frozen: Tensor
    """of the reward had TopK kept the same latents: the own latent and cross-talk, without
    re-selection
    """
    swapped: Tensor
    """int32: latents that entered TopK, as many as left it"""
    sorted_out: int
    """texts x latents left to a sort: the k-th and the next were equal, or too many came from
    outside the candidates
    """


def load_sae(sarm: SarmConfig, device: str) -> tuple[TopKSae, Tensor]:
    """A SARM's SAE and head (d_sae,) in float64, without its trunk. Raises UserError where the
    checkpoint has no decoder.
    """
    sae, head_weight, _ = read_sae(sarm)
    if sae.decoder is None:
        raise UserError(
            f"{sarm.model} has no sae.decoder.weight, whose columns the direction probe adds to"
            " states; set probe.directions=[] to go without it"
        )
    return sae.to(device).double(), head_weight.to(device).double()


def n_candidates(k: int, d_sae: int) -> int:
    """A power of two at least five times k, or all latents."""
    return min(d_sae, 1 << math.ceil(math.log2(5 * k)))


def baseline(
    sae: TopKSae, weight: Tensor, states: Tensor, k: int, candidates: int | None = None
) -> Baseline:
    """Prepare texts from their states (n, d_in); `sae` and the head's `weight` (d_sae,) in float64
    on the states' device.
    """
    states = states.to(weight)
    d_sae = len(weight)
    count = n_candidates(k, d_sae) if candidates is None else min(candidates, d_sae)
    a = sae.preactivations(states)
    top = stable_topk(a, count)
    rewards = (weight[top.indices[:, :k]] * top.values[:, :k]).sum(-1)
    centred = states - states.mean(-1, keepdim=True)
    bias = sae.latent_bias - sae.encoder(sae.pre_bias)
    return Baseline(
        centred, states.std(-1), a, bias, top.indices.int().contiguous(), rewards, weight, k
    )


class Tile(NamedTuple):
    """Some latents' directions against the encoder and the texts, for any c."""

    latents: range
    squares: Tensor
    """(L, 1) squared length of d_i - mean(d_i)"""
    along: Tensor
    """(L, n) (h - mean h) . (d_i - mean d_i) / std h"""
    gains: Tensor
    """(L, d_sae) G"""


def tiles(base: Baseline, sae: TopKSae, latents: range, rows: int) -> Iterator[Tile]:
    """The latents' directions, up to `rows` at a time.

    Products are of whole tiles, whose edges are multiples of `rows`, so a latent's figures do not
    depend on the range asked for: a library's rounding depends on the shape.
    """
    d_sae = len(base.weight)
    for start in range(latents.start // rows * rows, latents.stop, rows):
        whole = range(start, min(start + rows, d_sae))
        some = range(max(start, latents.start), min(whole.stop, latents.stop))
        unit = sae.directions(torch.arange(whole.start, whole.stop, device=base.weight.device))
        centred = unit - unit.mean(-1, keepdim=True)
        mine = slice(some.start - start, some.stop - start)
        along = centred @ base.centred.T / base.std
        yield Tile(
            some,
            centred.square().sum(-1, keepdim=True)[mine],
            along[mine],
            sae.encoder(centred)[mine],
        )


def tile_rows(base: Baseline) -> int:
    """Latents in a tile, by what it takes."""
    n, d_sae = base.a.shape
    return max(1, min(TILE_ROWS, TILE_BYTES // (8 * (d_sae + 8 * n))))


@torch.no_grad()
def direction_changes(
    base: Baseline, sae: TopKSae, latents: range, cs: Sequence[float]
) -> Iterator[dict[float, Moved]]:
    """Move every text along the direction of each latent, c standard deviations for each of `cs`;
    a tile of latents at a time.
    """
    prepared = None
    if base.a.device.type == "cuda":
        from sarm.probing.probe_kernels import prepare

        prepared = prepare(base)
    for tile in tiles(base, sae, latents, tile_rows(base)):
        yield {c: moved(base, tile, c, prepared) for c in cs}


def moved(base: Baseline, tile: Tile, c: float, prepared: Any = None) -> Moved:
    """One tile of latents at one c; `prepared` is what the GPU's kernels want besides."""
    alpha, beta = affine(base, tile, c)
    if base.a.device.type == "cuda":
        from sarm.probing.probe_kernels import prepare, select_moved

        change, frozen, swapped, status = select_moved(
            base, prepared or prepare(base), tile.gains, alpha, beta
        )
    else:
        change, frozen, swapped, status = select_on_cpu(base, tile.gains, alpha, beta)
    unsure = (status != SURE).nonzero()
    for pairs in unsure.split(max(1, TILE_BYTES // (32 * base.a.shape[1]))):
        i, t = pairs.unbind(1)
        change[i, t], frozen[i, t], swapped[i, t] = _by_sorting(
            base, tile.gains[i], alpha[i, t], beta[i, t], t
        )
    return Moved(tile.latents, change, frozen, swapped, len(unsure))


def affine(base: Baseline, tile: Tile, c: float) -> tuple[Tensor, Tensor]:
    """alpha and beta of each latent and text, (L, n) each, from the new standard deviation."""
    free = base.centred.shape[1] - 1
    new_std = base.std * (1 + (2 * c * tile.along + c * c * tile.squares) / free).sqrt()
    return (base.std + EPS) / (new_std + EPS), c * base.std / (new_std + EPS)


def select_on_cpu(
    base: Baseline, gains: Tensor, alpha: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernels do, in NumPy: change, frozen, swapped and status of each latent and text,
    (L, n) each.

    A text and few latents at a time, so that what they share stays in the cache; NumPy's partition
    is a multiple of torch's topk here.
    """
    k, (rows, n), d_sae = base.k, alpha.shape, base.a.shape[1]
    change, frozen = np.empty((rows, n)), np.empty((rows, n))
    swapped, status = np.zeros((rows, n), np.int32), np.zeros((rows, n), np.int32)
    g, al, be = gains.numpy(), alpha.numpy(), beta.numpy()
    bias, weight, rewards = base.bias.numpy(), base.weight.numpy(), base.rewards.numpy()
    for t in range(n):
        shifted, candidates = (base.a[t] - base.bias).numpy(), base.candidates[t].numpy()
        was = np.zeros(d_sae, bool)
        was[candidates[:k]] = True
        for start in range(0, rows, CPU_ROWS):
            some = slice(start, start + CPU_ROWS)
            new = g[some] * be[some, t, None]
            new += al[some, t, None] * shifted
            new += bias
            near = new[:, candidates]
            frozen[some, t] = (near[:, :k] * weight[candidates[:k]]).sum(axis=1) - rewards[t]
            # The k-th of the candidates is no more than the k-th of all, so what reaches it is all
            # that can be kept.
            row, latent = np.nonzero(
                new >= np.partition(near, near.shape[1] - k, axis=1)[:, near.shape[1] - k, None]
            )
            counts = np.bincount(row, minlength=len(new))
            place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
            reached = np.full((len(new), counts.max()), -np.inf)
            reached[row, place] = new[row, latent]
            kth = np.partition(reached, reached.shape[1] - k, axis=1)[:, reached.shape[1] - k]
            kept = reached[row, place] >= kth[row]
            row, latent = row[kept], latent[kept]
            change[some, t] = (
                np.bincount(row, weight[latent] * new[row, latent], minlength=len(new)) - rewards[t]
            )
            swapped[some, t] = np.bincount(row, ~was[latent], minlength=len(new))
            status[some, t] = np.where(np.bincount(row, minlength=len(new)) > k, TIED, SURE)
    return (
        torch.from_numpy(change),
        torch.from_numpy(frozen),
        torch.from_numpy(swapped),
        torch.from_numpy(status),
    )


def _by_sorting(
    base: Baseline, gains: Tensor, alpha: Tensor, beta: Tensor, texts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for P pairs of a text and a latent, whose gains are (P, d_sae), a latent that ties
    losing to one of a lower number.
    """
    new = alpha[:, None] * (base.a[texts] - base.bias) + beta[:, None] * gains + base.bias
    top, before = stable_topk(new, base.k), base.candidates[texts, : base.k].long()
    change = (base.weight[top.indices] * top.values).sum(-1) - base.rewards[texts]
    frozen = (base.weight[before] * new.gather(1, before)).sum(-1) - base.rewards[texts]
    was = torch.zeros_like(new, dtype=torch.bool).scatter_(1, before, True)
    return change, frozen, (~was.gather(1, top.indices)).sum(-1).int()


class Check(NamedTuple):
    """How far results are from a recomputation from the states, latent by latent."""

    pairs: int
    """texts x latents looked at"""
    worst: float
    """largest difference of a change, over the latent's largest change"""
    mismatches: int
    """pairs that differ by more than 1e-6 of that: another latent was kept"""


@torch.no_grad()
def check(
    sae: TopKSae, base: Baseline, states: Tensor, found: Tensor, latents: Sequence[int], c: float
) -> Check:
    """Compare `found` (len(latents), n) with adding the direction to the states and computing
    everything again in float64.
    """
    if not latents:
        return Check(0, 0.0, 0)
    again = torch.stack(
        [
            recomputed(sae, base.weight, states.to(base.weight), base.k, Direction(latent, c))
            for latent in latents
        ]
    )
    difference = (found - again).abs() / again.abs().amax(-1, keepdim=True).clamp_min(1e-300)
    return Check(difference.numel(), float(difference.max()), int((difference > 1e-6).sum()))
