"""GPU kernels of the direction probe: TopK of moved pre-activations. `TRITON_INTERPRET=1` runs them
on a CPU.

Their plain twin is `sarm.probing.direction`, with which tests compare them.
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
