"""The step of `optimizer.py` as one Triton kernel: every byte of weight, gradient and state
crosses the memory bus once.

`TRITON_INTERPRET=1 python -m pytest tests/ppo/test_optimizer.py` compares it with the plain one on
a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sarm.philox import ROUNDING
from sarm.philox_triton import random_words
from sarm.ppo.learner.optimizer import BLOCK, CODES_PER_OCTAVE, OCTAVE_STEP, Rates, State

BLOCKS = 4
"""Blocks a program."""


def update(weight: Tensor, grad: Tensor, state: State, rates: Rates, scale: Tensor) -> None:
    """Step `weight` (n,) and its state in place; `scale` () float32 on the same device."""
    n, has_low = weight.numel(), weight.dtype == torch.bfloat16
    _update[(triton.cdiv(n, BLOCKS * BLOCK),)](
        weight.view(torch.int16) if has_low else weight,
        grad,
        state.low,
        state.exp_avg_ratio,
        state.exp_avg_scale,
        state.exp_avg_sq,
        state.exp_avg_sq_top,
        scale,
        n,
        rates.key,
        rates.lr,
        rates.decay,
        1 - rates.beta1,
        1 - rates.beta2,
        rates.eps,
        1 / rates.bias1,
        1 / rates.bias2,
        has_low,
        BLOCKS,
        BLOCK,
        CODES_PER_OCTAVE,
        OCTAVE_STEP,
        ROUNDING,
    )


@triton.jit(do_not_specialize=["n", "key"])
def _update(
    weight_ptr,
    grad_ptr,
    low_ptr,
    ratio_ptr,
    unit_ptr,
    square_ptr,
    top_ptr,
    scale_ptr,
    n,
    key,
    lr,
    decay,
    rate1,
    rate2,
    eps,
    unbias1,
    unbias2,
    HAS_LOW: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    CODES_PER_OCTAVE: tl.constexpr,
    OCTAVE_STEP: tl.constexpr,
    PURPOSE: tl.constexpr,
):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    here, blocks_here = at < n, block * BLOCK < n

    quarter: tl.constexpr = BLOCK // 4
    fours = block[:, None] * quarter + tl.arange(0, quarter)[None, :]
    x = random_words(key, fours, PURPOSE)

    g = tl.load(grad_ptr + at, here, 0.0).to(tl.float32) * tl.load(scale_ptr)
    top = tl.load(top_ptr + block, blocks_here, 0.0)
    square = (
        tl.exp2((tl.load(square_ptr + at, here, 0).to(tl.float32) - 255) / CODES_PER_OCTAVE)
        * top[:, None]
    )
    unit = tl.load(unit_ptr + block, blocks_here, 0.0)
    mean = tl.load(ratio_ptr + at, here, 0).to(tl.float32) * unit[:, None] * tl.sqrt(square)
    mean += rate1 * (g - mean)
    square += rate2 * (g * g - square)
    square = tl.where(here, square, 0.0)

    if HAS_LOW:
        bits = (tl.load(weight_ptr + at, here, 0).to(tl.int32) << 16) + tl.load(
            low_ptr + at, here, 0
        ).to(tl.int32)
        weight = bits.to(tl.float32, bitcast=True)
    else:
        weight = tl.load(weight_ptr + at, here, 0.0)
    moved = weight * decay - lr * (mean * unbias1) / (tl.sqrt(square * unbias2) + eps)
    if HAS_LOW:
        bits = moved.to(tl.int32, bitcast=True)
        upper = (bits + 0x8000) >> 16
        tl.store(weight_ptr + at, upper.to(tl.int16), here)
        tl.store(low_ptr + at, (bits - (upper << 16)).to(tl.int16), here)
    else:
        tl.store(weight_ptr + at, moved, here)

    largest = tl.max(square, 1)
    top = ((largest.to(tl.int32, bitcast=True) & 0x7F800000) + 0x00800000).to(
        tl.float32, bitcast=True
    )
    wide = tl.where(largest > 0, top, 1.0)[:, None]
    below = tl.minimum(
        tl.maximum(
            tl.floor(tl.log2(tl.maximum(square / wide, 1e-30)) * CODES_PER_OCTAVE + 255), 0.0
        ),
        254.0,
    )
    level = tl.exp2((below - 255) / CODES_PER_OCTAVE) * wide
    chance = (square / level - 1) / OCTAVE_STEP
    codes = below + tl.where((x >> 18).to(tl.float32) * (2.0**-14) < chance, 1.0, 0.0)
    codes = tl.where(largest[:, None] > 0, codes, 0.0)
    top = tl.where(largest > 0, top, 0.0)
    tl.store(square_ptr + at, codes.to(tl.uint8), here)
    tl.store(top_ptr + block, top, blocks_here)

    root = tl.sqrt(tl.exp2((codes - 255) / CODES_PER_OCTAVE) * top[:, None])
    ratio = tl.where(here & (root > 0), mean / tl.where(root > 0, root, 1.0), 0.0)
    unit = tl.max(tl.abs(ratio), 1) / 127
    steps = tl.where(unit[:, None] > 0, ratio / tl.where(unit > 0, unit, 1.0)[:, None], 0.0)
    steps = tl.floor(steps + ((x >> 8) & 1023).to(tl.float32) * (2.0**-10))
    tl.store(ratio_ptr + at, tl.minimum(tl.maximum(steps, -127.0), 127.0).to(tl.int8), here)
    tl.store(unit_ptr + block, unit, blocks_here)
