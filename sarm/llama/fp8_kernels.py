"""The Triton side of `sarm.llama.fp8`, imported only where it runs; `TRITON_INTERPRET=1 python -m
pytest tests/llama/test_fp8.py` runs it on a CPU.

A product with few rows is bound by reading the weight. It is read once, as the 8 bits it has, and
becomes bf16 in registers on its way to the tensor cores, as their left side: output channels, of
which there are many, are the tile's rows, and the batch's rows its columns. Where there are too few
tiles to fill the GPU, several programs share one, each a part of the sum; the last to end adds the
parts up, in their order, so that the result is the same to the bit whoever is last.

Notation: b rows, n output channels, k input channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sarm.llama.fp8 import CHANNEL_BLOCK, ROW_BLOCK, Fp8


class Tiling(NamedTuple):
    """How the product is cut."""

    inputs: int
    """Input channels of a step."""
    stages: int
    """Steps on their way from memory at a time."""
    warps: int
    programs: int
    """At least as many are wanted, one for each of an H100's multiprocessors."""
    least_steps: int
    """A program makes at least so many: fewer are over before memory is busy."""


WIDE = Tiling(inputs=128, stages=4, warps=4, programs=132, least_steps=4)
"""For weights with more tiles of output channels than two for each multiprocessor."""
NARROW = WIDE._replace(inputs=256)
"""For the others. Of nine tilings these took least time at the shapes of an 8B policy and 32 rows
(docs/experiments.md).
"""


@triton.jit
def _product(
    x,
    values,
    scales,
    parts,
    tickets,
    out,
    b,
    n,
    k,
    x_stride,
    steps,
    count,
    WHOLE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of one tile (BLOCK_N, BLOCK_B) of the transposed output, one of `count` parts of the sum over
    k: `steps` blocks of it.
    """
    row_block, channel_block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = row_block * BLOCK_B + tl.arange(0, BLOCK_B)
    channel = channel_block * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the last, the first again: read, never written.
    of_channel = values + (channel % n).to(tl.int64)[:, None] * k
    of_row = x + (row % b)[None, :] * x_stride
    total = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    first = part * steps * BLOCK_K
    for at in range(first, min(first + steps * BLOCK_K, k), BLOCK_K):
        c = at + tl.arange(0, BLOCK_K)
        if WHOLE:
            weight, inputs = tl.load(of_channel + c[None, :]), tl.load(of_row + c[:, None])
        else:
            weight = tl.load(of_channel + c[None, :], mask=c[None, :] < k, other=0.0)
            inputs = tl.load(of_row + c[:, None], mask=c[:, None] < k, other=0.0)
        # Straight to bf16 is an instruction of a quarter the rate for each number.
        exact = weight.to(tl.float16).to(tl.float32).to(inputs.dtype)
        total = tl.dot(exact, inputs, total, input_precision=PRECISION)
    scale = tl.load(scales + channel % n)[:, None]
    at_out = out + row[None, :].to(tl.int64) * n + channel[:, None]
    inside = (row < b)[None, :] & (channel < n)[:, None]
    if not SPLIT:
        tl.store(at_out, (total * scale).to(out.dtype.element_ty), mask=inside)
    else:
        tile = channel_block * tl.num_programs(0) + row_block
        tiles = tl.num_programs(0) * tl.num_programs(1)
        within = tl.arange(0, BLOCK_N)[:, None] * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
        size: tl.constexpr = BLOCK_N * BLOCK_B
        tl.store(parts + (part * tiles + tile) * size + within, total)
        tl.debug_barrier()  # every thread's part is written before one thread says so
        done = tl.atomic_add(tickets + tile, 1, sem="acq_rel")
        if done == count - 1:
            whole = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
            for other in range(count):
                whole += tl.load(
                    parts + (other * tiles + tile) * size + within, cache_modifier=".cg"
                )
            tl.store(at_out, (whole * scale).to(out.dtype.element_ty), mask=inside)
            tl.store(tickets + tile, 0)


def product(x: Tensor, weight: Fp8, tiling: Tiling | None = None) -> Tensor:
    """`fp8.product` for at most `fp8.FEW_ROWS` rows; by default cut as the weight's width asks."""
    (b, k), n = x.shape, len(weight.values)
    out = torch.empty(b, n, dtype=x.dtype, device=x.device)
    row_block = min(ROW_BLOCK, max(16, triton.next_power_of_2(b)))
    tiles = triton.cdiv(b, row_block), triton.cdiv(n, CHANNEL_BLOCK)
    if tiling is None:
        tiling = WIDE if tiles[1] > 2 * WIDE.programs else NARROW
    all_steps = triton.cdiv(k, tiling.inputs)
    wanted = min(tiling.programs // (tiles[0] * tiles[1]), all_steps // tiling.least_steps)
    steps = triton.cdiv(all_steps, max(wanted, 1))
    parts = triton.cdiv(all_steps, steps)
    room = torch.empty(
        parts * tiles[0] * tiles[1] * CHANNEL_BLOCK * row_block if parts > 1 else 0,
        dtype=torch.float32,
        device=x.device,
    )
    _product[(*tiles, parts)](
        x,
        weight.values,
        weight.scales,
        room,
        weight.tickets,
        out,
        b,
        n,
        k,
        x.stride(0),
        steps,
        parts,
        k % tiling.inputs == 0,
        parts > 1,
        row_block,
        CHANNEL_BLOCK,
        tiling.inputs,
        "ieee" if x.dtype == torch.float32 else "tf32",  # of no meaning to bf16
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return out


@triton.jit
def _quantise(weight, values, scales, stride, k, BLOCK: tl.constexpr):
    """One output channel; the bits of its scale as in `fp8.scales_of`."""
    channel = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.float32)
    for at in range(0, k, BLOCK):
        w = tl.load(weight + channel * stride + at + c, mask=at + c < k, other=0.0)
        most = tl.maximum(most, tl.abs(w.to(tl.float32)))
    bits = tl.max(most, 0).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    exponent = tl.maximum(exponent, 1)
    tl.store(scales + channel, (exponent << 23).to(tl.float32, bitcast=True))
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    for at in range(0, k, BLOCK):
        w = tl.load(weight + channel * stride + at + c, mask=at + c < k, other=0.0)
        rounded = (w.to(tl.float32) * inverse).to(values.dtype.element_ty)
        tl.store(values + channel * k + at + c, rounded, mask=at + c < k)


def quantise(weight: Tensor, into: Fp8) -> None:
    """`fp8.quantise`; each row of `weight` contiguous."""
    n, k = weight.shape
    block = min(4096, triton.next_power_of_2(k))
    _quantise[(n,)](weight, into.values, into.scales, weight.stride(0), k, block, num_warps=8)


@triton.jit
def _widen(values, scales, out, k, BLOCK: tl.constexpr):
    """One output channel."""
    channel = tl.program_id(0).to(tl.int64)
    scale = tl.load(scales + channel)
    for at in range(0, k, BLOCK):
        c = at + tl.arange(0, BLOCK)
        weight = tl.load(values + channel * k + c, mask=c < k, other=0.0)
        wide = weight.to(tl.float16).to(tl.float32) * scale
        tl.store(out + channel * k + c, wide.to(out.dtype.element_ty), mask=c < k)


def widened(weight: Fp8) -> Tensor:
    """`fp8.dequantised` to bf16, each number read and written once."""
    n, k = weight.values.shape
    out = torch.empty(n, k, dtype=torch.bfloat16, device=weight.values.device)
    block = min(4096, triton.next_power_of_2(k))
    _widen[(n,)](weight.values, weight.scales, out, k, block)
    return out
