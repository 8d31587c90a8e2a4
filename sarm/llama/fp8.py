"""Weights in fp8, from which rollouts are sampled where `ppo.rollout_dtype` asks for it: half the
bytes of bf16, and a decoded token costs little but reading them.

    weight = quantised(w)            # (out, in) e4m3, a scale for each output channel
    y = product(x, weight)           # x wᵀ of the rounded weights; activations stay as they are
    dequantised(weight, x.dtype)     # the same weights, plainly

Scales are powers of two, so what is rounded is e4m3's three bits of mantissa and nothing else: the
quantised policy is a bf16 (or float32) policy whose weights are `dequantised`, exactly, and can be
computed as one anywhere. `python -m pytest tests/llama/test_fp8.py` compares it with float64.

Notation: b rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 448.0
"""Of e4m3."""
FEW_ROWS = 256
"""Up to so many rows go through a kernel of ours, which reads the weights for each 64 of them and
is bound by that; more through a bf16 copy of the weight.
"""
ROW_BLOCK, CHANNEL_BLOCK = 64, 64
"""Rows and output channels of one of the kernel's tiles."""


class Fp8(NamedTuple):
    """A quantised weight."""

    values: Tensor
    """(out, in) float8_e4m3fn."""
    scales: Tensor
    """(out,) float32, powers of two."""
    tickets: Tensor
    """int32, one for each of the kernel's tiles of the output: how many of those who add up the
    tile's parts are done; zeros between calls.
    """

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + self.tickets.nbytes


Weight = Tensor | Fp8


def tensors_of(weight: Weight) -> tuple[Tensor, ...]:
    return (weight,) if isinstance(weight, Tensor) else tuple(weight)


def empty_like(weight: Tensor) -> Fp8:
    """Room for `weight` (out, in) in fp8."""
    out, device = len(weight), weight.device
    tiles = (FEW_ROWS // ROW_BLOCK) * -(-out // CHANNEL_BLOCK)
    return Fp8(
        torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=device),
        torch.empty(out, dtype=torch.float32, device=device),
        torch.zeros(tiles, dtype=torch.int32, device=device),
    )


@torch.no_grad()
def quantise(weight: Tensor, into: Fp8) -> None:
    """Write `weight` (out, in) of any float dtype over `into`, each number rounded to the nearest,
    ties to even.
    """
    if weight.is_cuda:
        from sarm.llama import fp8_kernels

        return fp8_kernels.quantise(weight, into)
    wide = weight.float()
    into.scales.copy_(scales_of(wide.abs().amax(1)))
    into.values.copy_(wide / into.scales[:, None])


def quantised(weight: Tensor) -> Fp8:
    """`weight` (out, in) in memory of its own."""
    found = empty_like(weight)
    quantise(weight, found)
    return found


def scales_of(largest: Tensor) -> Tensor:
    """The smallest power of two by which each of `largest` (float32, not negative) can be divided
    without passing `LARGEST`; no smaller than float32's smallest normal number.

    From the bits: 448 is 1.75 · 2⁸, so a mantissa beyond 1.75 takes one power more.
    """
    bits = largest.view(torch.int32)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).int()
    return (exponent.clamp(min=1) << 23).view(torch.float32)


def dequantised(weight: Fp8, dtype: torch.dtype) -> Tensor:
    """(out, in), exact in bf16 and in float32."""
    return weight.values.to(dtype) * weight.scales.to(dtype)[:, None]


def plain(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight as a tensor: itself where it is one."""
    return weight if isinstance(weight, Tensor) else dequantised(weight, dtype)


def product(x: Tensor, weight: Fp8) -> Tensor:
    """x (b, in), each row contiguous, to (b, out) in x's dtype."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        from sarm.llama import fp8_kernels, fp8_wide

        if len(x) > FEW_ROWS:
            return F.linear(x, fp8_kernels.widened(weight))
        if tiling := fp8_wide.tiling_for(x, weight):
            return fp8_wide.product(x, weight, tiling)
        return fp8_kernels.product(x, weight)
    # The scales, powers of two, may be multiplied in afterwards: no other number comes out.
    return F.linear(x, weight.values.to(x.dtype)) * weight.scales.to(x.dtype)
