"""The gradient of SwiGLU as a Triton kernel, imported only where it runs; `TRITON_INTERPRET=1` runs it on a CPU (tests/test_trunk.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDE = 2048
"""Elements of a row that one program takes."""


@triton.jit
def _silu_mul_gradient(grad, gate_up, out, f, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < f
    d = tl.load(grad + row * f + at, inside, 0).to(tl.float32)
    gate_up += row * 2 * f + at
    g, u = tl.load(gate_up, inside, 0).to(tl.float32), tl.load(gate_up + f, inside, 0).to(tl.float32)
    share = 1 / (1 + tl.exp(-g))
    out += row * 2 * f + at
    tl.store(out, (d * u * share * (1 + g * (1 - share))).to(out.dtype.element_ty), inside)
    tl.store(out + f, (d * g * share).to(out.dtype.element_ty), inside)


def silu_mul_gradient(grad: Tensor, gate_up: Tensor) -> Tensor:
    """(n, 2 f): of gate and up side by side; grad (n, f)."""
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    n, f = grad.shape
    out = torch.empty_like(gate_up)
    block = min(WIDE, triton.next_power_of_2(f))
    _silu_mul_gradient[(n, triton.cdiv(f, block))](grad, gate_up, out, f, block)
    return out
