"""SwiGLU both ways as Triton kernels, imported only where they run; `TRITON_INTERPRET=1` runs them on a CPU (tests/test_trunk.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048
"""Of one program."""


@triton.jit
def _forward(gate, up, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g, u = tl.load(gate + at, inside, 0).to(tl.float32), tl.load(up + at, inside, 0).to(tl.float32)
    tl.store(out + at, (g / (1 + tl.exp(-g)) * u).to(out.dtype.element_ty), inside)


@triton.jit
def _backward(grad, gate, up, d_gate, d_up, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    d = tl.load(grad + at, inside, 0).to(tl.float32)
    g, u = tl.load(gate + at, inside, 0).to(tl.float32), tl.load(up + at, inside, 0).to(tl.float32)
    share = 1 / (1 + tl.exp(-g))
    tl.store(d_gate + at, (d * u * share * (1 + g * (1 - share))).to(d_gate.dtype.element_ty), inside)
    tl.store(d_up + at, (d * g * share).to(d_up.dtype.element_ty), inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _forward[(triton.cdiv(gate.numel(), ELEMENTS),)](gate, up, out, gate.numel(), ELEMENTS)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    _backward[(triton.cdiv(gate.numel(), ELEMENTS),)](grad, gate, up, d_gate, d_up, gate.numel(), ELEMENTS)
    return d_gate, d_up
