"""What a Llama does between its matrix products, each in one pass over its data: norm, residual,
rotation, SiLU.

Plain torch on a CPU and wherever a gradient may be asked for; else the kernels of
`sarm.llama.elementwise_triton`, which differ by rounding alone: they compute in float32 and round
once.

Notation: n positions, d the model's width, f the MLP's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean x² + eps) · weight` along the last dimension: (n, d) to (n, d)."""
    if _on_gpu(x):
        from sarm.llama import elementwise_triton

        return elementwise_triton.rms_norm(x, weight, eps)
    return nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(`rms_norm` of the sum, the sum), of (n, d) and (n, d). The sum is rounded to their dtype
    before it is normed.
    """
    if _on_gpu(x):
        from sarm.llama import elementwise_triton

        return elementwise_triton.add_rms_norm(x, residual, weight, eps)
    total = x + residual
    return nn.functional.rms_norm(total, x.shape[-1:], weight, eps), total


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) · up`, of gate and up side by side: (n, 2 f) to (n, f)."""
    if _on_gpu(gate_up):
        from sarm.llama import elementwise_triton

        return elementwise_triton.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def silu_mul_gradient(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Of `silu_mul`, (n, 2 f); grad (n, f)."""
    if _on_gpu(gate_up):
        from sarm.llama import elementwise_triton

        return elementwise_triton.silu_mul_gradient(grad, gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    found = torch.empty_like(gate_up)
    of_gate, of_up = found.chunk(2, dim=-1)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
    torch.mul(grad, nn.functional.silu(gate), out=of_up)
    return found


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, into: Tensor | None = None) -> Tensor:
    """Rotary embedding: dimension j of a head turns with j + half; (n, heads, head_dim) by (n,
    head_dim) each.

    Rows and heads may lie apart, in `heads` and in `into`, where the result goes if it is given;
    the two may be one.
    """
    if _on_gpu(heads):
        from sarm.llama import elementwise_triton

        return elementwise_triton.rotate(heads, cos, sin, into)
    low, high = heads.chunk(2, dim=-1)
    turned = heads * cos.unsqueeze(1) + torch.cat((-high, low), dim=-1) * sin.unsqueeze(1)
    return turned if into is None else into.copy_(turned)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and not torch.is_grad_enabled()
