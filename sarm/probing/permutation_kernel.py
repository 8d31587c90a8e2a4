"""GPU kernel of the permutation test: how often each latent's statistic reaches what was observed.
`TRITON_INTERPRET=1` runs it on a CPU.

Its plain twin is `sarm.probing.permutation`, with which tests compare it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


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
    low_ptr = halves_ptr + tl.cast(latents, tl.int64) * width
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
