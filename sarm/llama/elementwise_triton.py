"""The Triton side of `sarm.llama.elementwise`, imported only where it runs; `TRITON_INTERPRET=1`
runs it on a CPU (tests/llama/test_elementwise.py).

Notation as there. Each launcher takes what its namesake takes, in any float dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDE = 2048
"""Elements of an MLP row that one program takes."""


@triton.jit
def _rms_norm(x, weight, normed, stride, d, eps, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < d
    h = tl.load(x + row * stride + at, mask=inside, other=0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, 0) / d + eps)
    w = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    tl.store(normed + row * d + at, (h * scale * w).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _add_rms_norm(
    x, residual, weight, normed, total, x_stride, residual_stride, d, eps, BLOCK: tl.constexpr
):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < d
    h = tl.load(x + row * x_stride + at, mask=inside, other=0).to(tl.float32)
    h += tl.load(residual + row * residual_stride + at, mask=inside, other=0).to(tl.float32)
    rounded = h.to(total.dtype.element_ty)
    tl.store(total + row * d + at, rounded, mask=inside)
    h = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, 0) / d + eps)
    w = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    tl.store(normed + row * d + at, (h * scale * w).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul(gate_up, out, stride, f, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < f
    gate = tl.load(gate_up + row * stride + at, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + row * stride + f + at, mask=inside, other=0).to(tl.float32)
    tl.store(
        out + row * f + at, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside
    )


@triton.jit
def _silu_mul_gradient(grad, gate_up, out, f, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < f
    d = tl.load(grad + row * f + at, inside, 0).to(tl.float32)
    gate_up += row * 2 * f + at
    g, u = (
        tl.load(gate_up, inside, 0).to(tl.float32),
        tl.load(gate_up + f, inside, 0).to(tl.float32),
    )
    share = 1 / (1 + tl.exp(-g))
    out += row * 2 * f + at
    tl.store(out, (d * u * share * (1 + g * (1 - share))).to(out.dtype.element_ty), inside)
    tl.store(out + f, (d * g * share).to(out.dtype.element_ty), inside)


@triton.jit
def _rotate(
    x,
    cos,
    sin,
    out,
    row_stride,
    head_stride,
    out_stride,
    out_head,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, head, at = (
        tl.program_id(0).to(tl.int64),
        tl.arange(0, BLOCK_H)[:, None],
        tl.arange(0, BLOCK_D)[None, :],
    )
    inside = (head < HEADS) & (at < HALF)
    read = x + row * row_stride + head * head_stride + at
    low, high = (
        tl.load(read, mask=inside, other=0).to(tl.float32),
        tl.load(read + HALF, mask=inside, other=0).to(tl.float32),
    )
    angle = row * 2 * HALF + at
    cos_low, sin_low = (
        tl.load(cos + angle, mask=at < HALF, other=0).to(tl.float32),
        tl.load(sin + angle, mask=at < HALF, other=0).to(tl.float32),
    )
    angle += HALF
    cos_high, sin_high = (
        tl.load(cos + angle, mask=at < HALF, other=0).to(tl.float32),
        tl.load(sin + angle, mask=at < HALF, other=0).to(tl.float32),
    )
    write = out + row * out_stride + head * out_head + at
    tl.store(write, (low * cos_low - high * sin_low).to(out.dtype.element_ty), mask=inside)
    tl.store(write + HALF, (high * cos_high + low * sin_high).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = _rows(x)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d = x.shape[-1]
    _rms_norm[(len(rows),)](
        rows, weight, normed, rows.stride(0), d, eps, triton.next_power_of_2(d), num_warps=_warps(d)
    )
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, others = _rows(x), _rows(residual)
    normed, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    d = x.shape[-1]
    block = triton.next_power_of_2(d)
    _add_rms_norm[(len(rows),)](
        rows,
        others,
        weight,
        normed,
        total,
        rows.stride(0),
        others.stride(0),
        d,
        eps,
        block,
        num_warps=_warps(d),
    )
    return normed, total


def silu_mul(gate_up: Tensor) -> Tensor:
    rows, f = _rows(gate_up), gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], f, dtype=gate_up.dtype, device=gate_up.device)
    block = min(WIDE, triton.next_power_of_2(f))
    _silu_mul[(len(rows), triton.cdiv(f, block))](
        rows, out, rows.stride(0), f, block, num_warps=_warps(block)
    )
    return out


def silu_mul_gradient(grad: Tensor, gate_up: Tensor) -> Tensor:
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    n, f = grad.shape
    out = torch.empty_like(gate_up)
    block = min(WIDE, triton.next_power_of_2(f))
    _silu_mul_gradient[(n, triton.cdiv(f, block))](grad, gate_up, out, f, block)
    return out


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, into: Tensor | None = None) -> Tensor:
    n, count, d = heads.shape
    if heads.stride(2) != 1:
        heads = heads.contiguous()
    out = torch.empty(n, count, d, dtype=heads.dtype, device=heads.device) if into is None else into
    strides = (heads.stride(0), heads.stride(1), out.stride(0), out.stride(1))
    blocks = triton.next_power_of_2(count), triton.next_power_of_2(d // 2)
    _rotate[(n,)](
        heads,
        cos.contiguous(),
        sin.contiguous(),
        out,
        *strides,
        count,
        d // 2,
        *blocks,
        num_warps=4,
    )
    return out


def _rows(x: Tensor) -> Tensor:
    """(n, width), each row contiguous; rows may lie apart."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _warps(width: int) -> int:
    """So that a thread has 16 bytes of bf16 at a time, up to 16 warps."""
    return min(16, max(1, triton.next_power_of_2(width) // 256))
