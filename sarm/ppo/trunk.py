"""A Llama's layers for training, on the modules of transformers: what lies between the matrix products in one pass each.

    hidden = last_hidden(model, ids, recompute=8)  # (b, s, d_model); the first 8 layers are computed again in the backward pass

Per token and layer it keeps half of what transformers' own forward keeps for the backward pass, and a LoRA adapter adds its
part to a projection in place instead of in four tensors of the projection's size. Same results, up to rounding
(tests/test_trunk.py). Right-padded rows need no mask: no real position looks ahead.

Notation: b rows, s positions, n = b s, f the MLP's width, r the rank of LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from sarm import kernels
from sarm.ppo.decoders import base_model


def knows(policy: nn.Module) -> bool:
    """Whether this is a Llama, with LoRA or without, whose layers are computed as below."""
    base: Any = base_model(policy)
    if type(base) is not LlamaForCausalLM:
        return False
    config = base.config
    return config.hidden_act == "silu" and not config.attention_bias and not config.mlp_bias


def last_hidden(model: Any, ids: Tensor, recompute: int = 0, layers: Iterable[Any] | None = None) -> Tensor:
    """(b, s, d_model), normed, of the `LlamaModel`; `recompute` of its layers keep their input alone for the backward pass.

    `layers` gives the model's own one by one.
    """
    h = model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None].expand_as(ids)
    cos, sin = (t.flatten(0, 1).contiguous() for t in model.rotary_emb(h, positions))
    for i, layer in enumerate(model.layers if layers is None else layers):
        if i < recompute and torch.is_grad_enabled():
            h = checkpoint(_layer, layer, h, cos, sin, use_reentrant=False, preserve_rng_state=False)
        else:
            h = _layer(layer, h, cos, sin)
    return _norm(model.norm, h)


def _layer(layer: Any, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    x = _norm(layer.input_layernorm, h)
    heads = (*x.shape[:2], -1, attention.head_dim)
    query, key = (_Rotate.apply(linear(p, x).view(heads), cos, sin).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
    value = linear(attention.v_proj, x).view(heads).transpose(1, 2)
    grouped = query.shape[1] != key.shape[1]
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=attention.scaling, enable_gqa=grouped)
    h = h + linear(attention.o_proj, mixed.transpose(1, 2).flatten(2))
    x = _norm(layer.post_attention_layernorm, h)
    return h + linear(mlp.down_proj, _SwiGlu.apply(linear(mlp.gate_proj, x), linear(mlp.up_proj, x)))


def _norm(norm: Any, h: Tensor) -> Tensor:
    return F.rms_norm(h, h.shape[-1:], norm.weight, norm.variance_epsilon)


def linear(module: Any, x: Tensor) -> Tensor:
    """A projection without bias, its active LoRA adapter included."""
    if not hasattr(module, "base_layer"):
        return F.linear(x, module.weight)
    weight = module.base_layer.weight
    if module.disable_adapters:
        return F.linear(x, weight)
    (name,) = module.active_adapters
    found: Tensor = _LoraLinear.apply(x, weight, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
    return found


class _LoraLinear(torch.autograd.Function):
    """x Wᵀ + scaling · (x Aᵀ) Bᵀ with W frozen; A (r, in) and B (out, r) in float32 are multiplied in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        a, b = a.to(x.dtype), (b * scaling).to(x.dtype)
        inner = F.linear(x, a)
        out = F.linear(x, weight)
        out.view(-1, out.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), b.T)
        ctx.save_for_backward(x, inner, weight, a, b)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, a, b = ctx.saved_tensors
        flat, flat_x, flat_inner = (t.reshape(-1, t.shape[-1]) for t in (grad, x, inner))
        d_inner = flat @ b
        d_a = (d_inner.T @ flat_x).float()
        d_b = (flat.T @ flat_inner).float() * ctx.scaling
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (flat @ weight).addmm_(d_inner, a).view_as(x)
        return d_x, None, d_a, d_b, None


class _Rotate(torch.autograd.Function):
    """`kernels.rotate` of (b, s, heads, head_dim) by (n, head_dim); the way back turns by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return kernels.rotate(heads.flatten(0, 1), cos, sin).view_as(heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return kernels.rotate(grad.flatten(0, 1), cos, -sin).view_as(grad), None, None


class _SwiGlu(torch.autograd.Function):
    """silu(gate) · up of (b, s, f); keeps its two inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        if gate.is_cuda:
            from sarm.ppo import trunk_kernels

            return trunk_kernels.swiglu(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if gate.is_cuda:
            from sarm.ppo import trunk_kernels

            return trunk_kernels.swiglu_backward(grad, gate, up)
        share = torch.sigmoid(gate)
        return grad * up * share * (1 + gate * (1 - share)), grad * gate * share
