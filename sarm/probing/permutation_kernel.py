"""GPU kernel of the permutation test: how often each latent's statistic reaches what was observed.
`TRITON_INTERPRET=1` runs it on a CPU.

Its plain twin is `sarm.probing.permutation`, with which tests compare it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver


@triton.jit
def _add_products(values_ptr, at, low_half, real, labels, high, low):
    """Both halves of a tile of values (latents, k) times a tile of labels (k, permutations), added
    to what there is of either.
    """
    values = tl.load(values_ptr + at, mask=real, other=0)
    high = tl.dot(values, labels, high, out_dtype=tl.int32)
    values = tl.load(values_ptr + low_half + at, mask=real, other=0)
    low = tl.dot(values, labels, low, out_dtype=tl.int32)
    return high, low


@triton.jit
def _count_matched(
    totals_ptr,
    squares_ptr,
    labels_ptr,
    observed_ptr,
    matched_ptr,
    latents,
    permutations,
    width,
    labels_width,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WITH_SQUARES: tl.constexpr,
):
    """One program a block of latents and one of permutations: how often the statistic reaches the
    observed one on its side. A tile of labels is read once for both sums.
    """
    l_at = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    p_at = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    k_at = tl.arange(0, BLOCK_K)
    l_real, p_real = l_at < latents, p_at < permutations
    real, dealt = l_real[:, None], p_real[None, :]
    totals_at = l_at.to(tl.int64)[:, None] * width + k_at[None, :]
    squares_at = l_at.to(tl.int64)[:, None] * labels_width + k_at[None, :]
    labels_at = p_at.to(tl.int64)[None, :] * labels_width + k_at[:, None]
    low_totals = tl.cast(latents, tl.int64) * width
    low_squares = tl.cast(latents, tl.int64) * labels_width
    high = tl.zeros((BLOCK_L, BLOCK_P), dtype=tl.int32)
    low = tl.zeros((BLOCK_L, BLOCK_P), dtype=tl.int32)
    square_high = tl.zeros((BLOCK_L, BLOCK_P), dtype=tl.int32)
    square_low = tl.zeros((BLOCK_L, BLOCK_P), dtype=tl.int32)
    for k in range(0, width, BLOCK_K):
        labels = tl.load(labels_ptr + labels_at + k, mask=dealt, other=0)
        high, low = _add_products(totals_ptr, totals_at + k, low_totals, real, labels, high, low)
        if WITH_SQUARES:
            square_high, square_low = _add_products(
                squares_ptr, squares_at + k, low_squares, real, labels, square_high, square_low
            )
    if WITH_SQUARES:
        for k in range(width, labels_width, BLOCK_K):
            labels = tl.load(labels_ptr + labels_at + k, mask=dealt, other=0)
            square_high, square_low = _add_products(
                squares_ptr, squares_at + k, low_squares, real, labels, square_high, square_low
            )
    sign = tl.load(observed_ptr + l_at * 5, mask=l_real, other=1.0).to(tl.int32)
    total = (high * 256 + low) * sign[:, None]
    if WITH_SQUARES:
        spread = square_high * 256 + square_low
        squares = tl.load(observed_ptr + l_at * 5 + 2, mask=l_real, other=1.0)
        constant = tl.load(observed_ptr + l_at * 5 + 3, mask=l_real, other=0.0)
        least = tl.load(observed_ptr + l_at * 5 + 4, mask=l_real, other=0.0)
        mine = total.to(tl.float64) * total.to(tl.float64) * squares[:, None]
        chance = tl.maximum(constant[:, None] + spread.to(tl.float64), 1.0) * least[:, None]
        reached = (total >= 0) & (mine >= chance)
    else:
        observed = tl.load(observed_ptr + l_at * 5 + 1, mask=l_real, other=0.0).to(tl.int32)
        reached = total >= observed[:, None]
    reached = reached & dealt
    tl.atomic_add(matched_ptr + l_at, tl.sum(reached.to(tl.int32), 1), mask=l_real)


def count_matched(
    totals: Tensor,
    squares: Tensor,
    labels: Tensor,
    observed: Tensor,
    blocks: tuple[int, int, int] = (64, 128, 128),
    warps: int | None = None,
    stages: int | None = None,
) -> Tensor:
    """For each latent in how many permutations its studentised sum reaches the observed one,
    (latents,) int32.

    `totals` (2, latents, width) int8 hold integers as 256 * first + second, labels (permutations,
    labels width) int8, of which totals follow the first `width`; `squares` (2, latents, labels
    width) follow all, or are of no width where no deal changes them; `observed` (latents, 5)
    float64: sign, absolute sum, sum of squares, constant part of the latter, squared sum less what
    counts as a tie. Widths are multiples of the last block, totals fit in 31 bits, and the figures
    equal the CPU's to the bit.
    """
    (_, latents, width), permutations = totals.shape, len(labels)
    matched = torch.zeros(latents, dtype=torch.int32, device=totals.device)
    block_l, block_p, block_k = blocks
    grid = (triton.cdiv(latents, block_l), triton.cdiv(permutations, block_p))
    with_squares = squares.shape[2] > 0
    tiles = ((4 if with_squares else 2) * block_l + block_p) * block_k
    _count_matched[grid](
        totals.contiguous(),
        squares.contiguous() if with_squares else totals,
        labels,
        observed.contiguous(),
        matched,
        latents,
        permutations,
        width,
        labels.shape[1],
        BLOCK_L=block_l,
        BLOCK_P=block_p,
        BLOCK_K=block_k,
        WITH_SQUARES=with_squares,
        # four sums and float64 comparisons of a whole block need the registers of twice the threads
        num_warps=warps or (8 if with_squares else 4),
        num_stages=stages or stages_of(tiles, totals.device),
    )
    return matched


def stages_of(tiles: int, device: torch.device) -> int:
    """How many iterations' tiles, of so many bytes, are in a GPU's shared memory at once: three,
    or as many as it holds.
    """
    if device.type != "cuda":
        return 3
    largest = driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
    return max(1, min(3, largest // tiles))
