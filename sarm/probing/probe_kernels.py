"""GPU kernels of the probe: TopK of moved pre-activations, and permutation counts.
`TRITON_INTERPRET=1` runs them on a CPU.

Each has a plain twin, `sarm.probing.direction` for the first and `sarm.probing.permutation` for
the second, which tests compare.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

HALVINGS = 80
"""Of the search for a threshold between the k-th and the next: float64 runs out before."""
BLOCK = 512
"""Latents of one flag of the scan."""
EXTRAS = 256
"""Latents from outside the candidates that one text and latent can hold."""


@triton.jit
def _select(
    a_ptr,
    candidates_ptr,
    own_ptr,
    own_bias_ptr,
    own_weight_ptr,
    bias_ptr,
    weight_ptr,
    rewards_ptr,
    gains_ptr,
    alpha_ptr,
    beta_ptr,
    low_ptr,
    extras_ptr,
    counts_ptr,
    change_ptr,
    frozen_ptr,
    swapped_ptr,
    status_ptr,
    n,
    d_sae,
    m,
    k,
    M: tl.constexpr,
    E: tl.constexpr,
    HALVINGS: tl.constexpr,
    WITH_EXTRAS: tl.constexpr,
):
    """One program a (latent, text): a threshold with exactly k above it, among the text's
    candidates and then the extras too.
    """
    t = tl.program_id(0)
    i = tl.program_id(1)
    pair = i.to(tl.int64) * n + t
    n_extras = 0
    if WITH_EXTRAS:
        n_extras = tl.load(counts_ptr + pair)
        if n_extras == 0:
            return
    alpha, beta = tl.load(alpha_ptr + pair), tl.load(beta_ptr + pair)
    reward = tl.load(rewards_ptr + t)
    row = gains_ptr + i.to(tl.int64) * d_sae

    at = tl.arange(0, M)
    real = at < m
    place = t.to(tl.int64) * m + at
    candidate = tl.load(candidates_ptr + place, mask=real, other=0)
    old = tl.load(own_ptr + place, mask=real, other=0.0)
    b = tl.load(own_bias_ptr + place, mask=real, other=0.0)
    w = tl.load(own_weight_ptr + place, mask=real, other=0.0)
    new = alpha * (old - b) + beta * tl.load(row + candidate, mask=real, other=0.0) + b
    frozen = tl.sum(tl.where(at < k, w * new, 0.0), 0) - reward
    new = tl.where(real, new, float("-inf"))
    high = tl.max(new, 0)

    if WITH_EXTRAS:
        low = tl.load(low_ptr + pair)
        at_e = tl.arange(0, E)
        real_e = at_e < n_extras
        extra = tl.load(extras_ptr + pair * E + at_e, mask=real_e, other=0)
        b_e = tl.load(bias_ptr + extra, mask=real_e, other=0.0)
        w_e = tl.load(weight_ptr + extra, mask=real_e, other=0.0)
        old_e = tl.load(a_ptr + t.to(tl.int64) * d_sae + extra, mask=real_e, other=0.0)
        new_e = alpha * (old_e - b_e) + beta * tl.load(row + extra, mask=real_e, other=0.0) + b_e
        new_e = tl.where(real_e, new_e, float("-inf"))
        high = tl.maximum(high, tl.max(new_e, 0))
        above = tl.sum((new > low).to(tl.int32), 0) + tl.sum((new_e > low).to(tl.int32), 0)
    else:
        low = tl.min(tl.where(real, new, high), 0) - 1.0
        above = m
    step = 0
    while (above > k) & (step < HALVINGS):
        middle = low + (high - low) * 0.5
        count = tl.sum((new > middle).to(tl.int32), 0)
        if WITH_EXTRAS:
            count += tl.sum((new_e > middle).to(tl.int32), 0)
        enough = count >= k
        low = tl.where(enough, middle, low)
        above = tl.where(enough, count, above)
        high = tl.where(enough, high, middle)
        step += 1

    kept = new > low
    change = tl.sum(tl.where(kept, w * new, 0.0), 0) - reward
    swapped = tl.sum((kept & (at >= k)).to(tl.int32), 0)
    status = tl.where(above > k, 1, 0)
    if WITH_EXTRAS:
        kept_e = new_e > low
        change += tl.sum(tl.where(kept_e, w_e * new_e, 0.0), 0)
        swapped += tl.sum(kept_e.to(tl.int32), 0)
        status = tl.where(n_extras > E, 2, status)
    else:
        tl.store(low_ptr + pair, low)
    tl.store(change_ptr + pair, change)
    tl.store(frozen_ptr + pair, frozen)
    tl.store(swapped_ptr + pair, swapped)
    tl.store(status_ptr + pair, status)


@triton.jit
def _flag(
    shifted_ptr,
    bias_ptr,
    gains_ptr,
    alpha_ptr,
    beta_ptr,
    low_ptr,
    flags_ptr,
    n,
    d_sae,
    rows,
    blocks,
    T: tl.constexpr,
    L: tl.constexpr,
    B: tl.constexpr,
):
    """Whether any latent of a block of B that is no candidate may lie above the threshold, in
    float32: T texts x L latents a program.
    """
    block = tl.program_id(0)
    t_at = tl.program_id(1) * T + tl.arange(0, T)
    first = tl.program_id(2) * L
    j_at = block * B + tl.arange(0, B)
    t_real, j_real = t_at < n, j_at < d_sae
    shifted = tl.load(
        shifted_ptr + t_at.to(tl.int64)[:, None] * d_sae + j_at[None, :],
        mask=t_real[:, None] & j_real[None, :],
        other=-1e30,
    )
    bias = tl.load(bias_ptr + j_at, mask=j_real, other=0.0)
    for i in range(first, tl.minimum(first + L, rows)):
        pair = t_at.to(tl.int64) + i * n
        alpha = tl.load(alpha_ptr + pair, mask=t_real, other=0.0)
        beta = tl.load(beta_ptr + pair, mask=t_real, other=0.0)
        low = tl.load(low_ptr + pair, mask=t_real, other=float("inf"))
        gain = tl.load(gains_ptr + j_at.to(tl.int64) + i * d_sae, mask=j_real, other=0.0)
        new = alpha[:, None] * shifted + (beta[:, None] * gain[None, :] + bias[None, :])
        tl.store(flags_ptr + pair * blocks + block, (tl.max(new, 1) > low).to(tl.int8), mask=t_real)


@triton.jit
def _collect(
    flagged_ptr,
    shifted_ptr,
    a_ptr,
    bias_ptr,
    gains_ptr,
    alpha_ptr,
    beta_ptr,
    low_ptr,
    extras_ptr,
    counts_ptr,
    n,
    d_sae,
    blocks,
    B: tl.constexpr,
    E: tl.constexpr,
):
    """One program a flagged block: append the latents that are no candidates and do lie above the
    threshold, in float64.
    """
    flagged = tl.load(flagged_ptr + tl.program_id(0))
    pair, block = flagged // blocks, flagged % blocks
    i, t = pair // n, pair % n
    j_at = block * B + tl.arange(0, B)
    j_real = j_at < d_sae
    old = tl.load(a_ptr + t * d_sae + j_at, mask=j_real, other=0.0)
    b = tl.load(bias_ptr + j_at, mask=j_real, other=0.0)
    gain = tl.load(gains_ptr + i * d_sae + j_at, mask=j_real, other=0.0)
    new = tl.load(alpha_ptr + pair) * (old - b) + tl.load(beta_ptr + pair) * gain + b
    outside = tl.load(shifted_ptr + t * d_sae + j_at, mask=j_real, other=-1e30) > -1e29
    found = outside & (new > tl.load(low_ptr + pair))
    many = tl.sum(found.to(tl.int32), 0)
    if many > 0:
        start = tl.atomic_add(counts_ptr + pair, many)
        place = start + tl.cumsum(found.to(tl.int32), 0) - 1
        tl.store(extras_ptr + pair * E + place, j_at.to(tl.int32), mask=found & (place < E))


class Prepared(NamedTuple):
    """What the kernels read of the texts, beside `sarm.probing.direction.Baseline`."""

    own: tuple[Tensor, Tensor, Tensor]
    """(n, M) each: pre-activation, bias and head weight of the candidates"""
    shifted: Tensor
    """(n, d_sae) float32: a - b, candidates far below everything"""
    bias: Tensor
    """(d_sae,) float32"""


def prepare(base: Any) -> Prepared:
    """Once for all latents; `base` is a `sarm.probing.direction.Baseline`."""
    picked = base.candidates.long()
    shifted = (base.a - base.bias).float().scatter_(1, picked, -1e30)
    return Prepared(
        (base.a.gather(1, picked), base.bias[picked], base.weight[picked]),
        shifted,
        base.bias.float(),
    )


def select_moved(
    base: Any, prepared: Prepared, gains: Tensor, alpha: Tensor, beta: Tensor, warps: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Change, change with TopK frozen, latents swapped and status (0 sure, 1 a tie, 2 too many
    extras) of each latent and text.

    `gains` (L, d_sae), `alpha` and `beta` (L, n); all float64. A threshold from the candidates, a
    scan in float32 for blocks in which others may exceed it, those others in float64, and the
    threshold anew where there are any.
    """
    (rows, n), d_sae, m = alpha.shape, base.a.shape[1], base.candidates.shape[1]
    alpha, beta = alpha.contiguous(), beta.contiguous()
    change, frozen, low = (torch.empty_like(alpha) for _ in range(3))
    swapped, status, counts = (
        torch.zeros(alpha.shape, dtype=torch.int32, device=alpha.device) for _ in range(3)
    )
    extras = torch.empty((*alpha.shape, EXTRAS), dtype=torch.int32, device=alpha.device)

    def select(with_extras: bool) -> None:
        _select[(n, rows)](
            base.a,
            base.candidates,
            *prepared.own,
            base.bias,
            base.weight,
            base.rewards,
            gains,
            alpha,
            beta,
            low,
            extras,
            counts,
            change,
            frozen,
            swapped,
            status,
            n,
            d_sae,
            m,
            base.k,
            M=triton.next_power_of_2(m),
            E=EXTRAS,
            HALVINGS=HALVINGS,
            WITH_EXTRAS=with_extras,
            num_warps=warps,
        )

    select(False)
    if m == d_sae:
        return change, frozen, swapped, status
    # Float32 must flag whatever float64 would: its rounding, many times over, is taken off the
    # threshold.
    size = base.a.abs().max() + 2 * base.bias.abs().max() + beta.abs().max() * gains.abs().max()
    blocks = triton.cdiv(d_sae, BLOCK)
    flags = torch.empty((rows, n, blocks), dtype=torch.int8, device=alpha.device)
    texts, latents = 8, 16
    _flag[(blocks, triton.cdiv(n, texts), triton.cdiv(rows, latents))](
        prepared.shifted,
        prepared.bias,
        gains.float(),
        alpha.float(),
        beta.float(),
        (low - 1e-6 * size).float(),
        flags,
        n,
        d_sae,
        rows,
        blocks,
        T=texts,
        L=latents,
        B=BLOCK,
        num_warps=4,
    )
    flagged = flags.view(-1).nonzero().squeeze(1)
    if len(flagged):
        _collect[(len(flagged),)](
            flagged,
            prepared.shifted,
            base.a,
            base.bias,
            gains,
            alpha,
            beta,
            low,
            extras,
            counts,
            n,
            d_sae,
            blocks,
            B=BLOCK,
            E=EXTRAS,
            num_warps=1,
        )
        select(True)
    return change, frozen, swapped, status


@triton.jit
def _sums(
    halves_ptr,
    labels_ptr,
    l_at,
    l_real,
    p_at,
    p_real,
    latents,
    width,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sums of labels times values, of a block of latents and one of permutations."""
    k_at = tl.arange(0, BLOCK_K)
    values_at = l_at.to(tl.int64)[:, None] * width + k_at[None, :]
    labels_at = p_at.to(tl.int64)[None, :] * width + k_at[:, None]
    low_ptr = halves_ptr + latents.to(tl.int64) * width
    high = tl.zeros((BLOCK_L, BLOCK_P), dtype=tl.int32)
    low = tl.zeros((BLOCK_L, BLOCK_P), dtype=tl.int32)
    for k in range(0, width, BLOCK_K):
        labels = tl.load(labels_ptr + labels_at + k, mask=p_real[None, :], other=0)
        high = tl.dot(
            tl.load(halves_ptr + values_at + k, mask=l_real[:, None], other=0),
            labels,
            high,
            out_dtype=tl.int32,
        )
        low = tl.dot(
            tl.load(low_ptr + values_at + k, mask=l_real[:, None], other=0),
            labels,
            low,
            out_dtype=tl.int32,
        )
    return high * 256 + low


@triton.jit
def _count_matched(
    halves_ptr,
    labels_ptr,
    squares_ptr,
    squares_labels_ptr,
    observed_ptr,
    matched_ptr,
    latents,
    permutations,
    width,
    squares_width,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WITH_SQUARES: tl.constexpr,
):
    """One program a block of latents and one of permutations: how often the statistic reaches the
    observed one on its side.
    """
    l_at = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    p_at = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    l_real, p_real = l_at < latents, p_at < permutations
    sign = tl.load(observed_ptr + l_at * 5, mask=l_real, other=1.0).to(tl.int32)
    observed = tl.load(observed_ptr + l_at * 5 + 1, mask=l_real, other=0.0).to(tl.int32)
    total = _sums(
        halves_ptr, labels_ptr, l_at, l_real, p_at, p_real, latents, width,
        BLOCK_L, BLOCK_P, BLOCK_K,
    )  # fmt: skip
    total = total * sign[:, None]
    if WITH_SQUARES:
        spread = _sums(
            squares_ptr, squares_labels_ptr, l_at, l_real, p_at, p_real, latents, squares_width,
            BLOCK_L, BLOCK_P, BLOCK_K,
        )  # fmt: skip
        squares = tl.load(observed_ptr + l_at * 5 + 2, mask=l_real, other=1.0)
        constant = tl.load(observed_ptr + l_at * 5 + 3, mask=l_real, other=0.0)
        least = tl.load(observed_ptr + l_at * 5 + 4, mask=l_real, other=0.0)
        mine = total.to(tl.float64) * total.to(tl.float64) * squares[:, None]
        chance = tl.maximum(constant[:, None] + spread.to(tl.float64), 1.0) * least[:, None]
        reached = (total >= 0) & (mine >= chance)
    else:
        reached = total >= observed[:, None]
    reached = reached & p_real[None, :]
    tl.atomic_add(matched_ptr + l_at, tl.sum(reached.to(tl.int32), 1), mask=l_real)


def count_matched(
    halves: Tensor,
    labels: Tensor,
    squares: Tensor,
    squares_labels: Tensor,
    observed: Tensor,
    blocks: tuple[int, int, int] = (64, 128, 128),
    warps: int | None = None,
) -> Tensor:
    """For each latent in how many permutations its studentised sum reaches the observed one,
    (latents,) int32.

    `halves` (2, latents, width) int8 hold values as 256 * first + second, labels (permutations,
    width) int8; `squares` and `squares_labels` likewise, of no width where no deal changes them;
    `observed` (latents, 5) float64: sign, absolute sum, sum of squares, constant part of the
    latter, squared sum less what counts as a tie. Widths are multiples of the last block, totals
    fit in 31 bits, and the figures equal the CPU's to the bit.
    """
    (_, latents, width), permutations = halves.shape, len(labels)
    matched = torch.zeros(latents, dtype=torch.int32, device=halves.device)
    block_l, block_p, block_k = blocks
    grid = (triton.cdiv(latents, block_l), triton.cdiv(permutations, block_p))
    with_squares = squares.shape[2] > 0
    _count_matched[grid](
        halves.contiguous(),
        labels,
        squares.contiguous() if with_squares else halves,
        squares_labels if with_squares else labels,
        observed.contiguous(),
        matched,
        latents,
        permutations,
        width,
        squares.shape[2],
        BLOCK_L=block_l,
        BLOCK_P=block_p,
        BLOCK_K=block_k,
        WITH_SQUARES=with_squares,
        # float64 comparisons of a whole block need the registers of twice the threads
        num_warps=warps or (8 if with_squares else 4),
    )
    return matched
