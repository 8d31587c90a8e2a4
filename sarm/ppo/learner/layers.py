"""A Llama's layers for training, on the modules of transformers: a layer is two functions with
their gradients written out.

    hidden = last_hidden(model, ids, checkpointed=8)  # (b, s, d_model), 8 layers checkpointed

Between them lies torch's attention, or that of rows without padding (`shared_rows.py`). Projections
that read one input are one product, both ways, over weights that lie side by side
(`lay_side_by_side`), and what is between the products is one pass each. Per token and layer half is
kept for the backward pass of what transformers' own forward keeps, a LoRA adapter adds its part in
place, and there are fewer calls, which are what bounds small models. Same results, up to rounding
(tests/ppo/test_layers.py). Right-padded rows need no mask: no real position looks ahead.

Notation: b rows, s positions, n = b s, d the model's width, f the MLP's, r the rank of LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sarm.llama import elementwise
from sarm.llama.weights import LlamaWeights, base_model, join_projections, side_by_side
from sarm.ppo.learner.shared_rows import SharedRows, attend_shared


def lay_side_by_side(policy: Any) -> None:
    """`join_projections` of a Llama; anything else is left alone. ZeRO lays its parameters out by
    itself, so call this before.
    """
    if LlamaWeights.knows(policy):
        join_projections(base_model(policy).model)


Rows = Tensor | SharedRows
"""What goes through the layers: (b, s) ids, right-padded, or rows without padding, b being 1."""


def last_hidden(
    model: Any, rows: Rows, checkpointed: int = 0, layers: Iterable[Any] | None = None
) -> Tensor:
    """(b, s, d), normed, of the `LlamaModel`; the first `checkpointed` of its layers keep their
    input alone for the backward pass.

    `layers` gives the model's own one by one.
    """
    if isinstance(rows, SharedRows):
        shared, ids, positions = rows, rows.ids, rows.positions
    else:
        shared, ids = None, rows
        positions = torch.arange(ids.shape[1], device=ids.device)[None].expand_as(ids)
    h = model.embed_tokens(ids)
    cos, sin = (t.flatten(0, 1).contiguous() for t in model.rotary_emb(h, positions))
    for i, layer in enumerate(model.layers if layers is None else layers):
        if i < checkpointed and torch.is_grad_enabled():
            h = checkpoint(
                _layer, layer, h, cos, sin, shared, use_reentrant=False, preserve_rng_state=False
            )
        else:
            h = _layer(layer, h, cos, sin, shared)
    return F.rms_norm(h, h.shape[-1:], model.norm.weight, model.norm.variance_epsilon)


def _layer(layer: Any, h: Tensor, cos: Tensor, sin: Tensor, shared: SharedRows | None) -> Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, o = joined(attention.q_proj, attention.k_proj, attention.v_proj), joined(attention.o_proj)
    gate_up, down = joined(mlp.gate_proj, mlp.up_proj), joined(mlp.down_proj)
    before, after = _norm_of(layer.input_layernorm), _norm_of(layer.post_attention_layernorm)
    query, key, value = _BeforeAttention.apply(
        h, cos, sin, attention.head_dim, before, qkv, before.weight, *qkv.parameters()
    )
    if shared is None:
        grouped = query.shape[1] != key.shape[1]
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=attention.scaling, enable_gqa=grouped
        )
    else:
        mixed = attend_shared(query, key, value, shared, attention.scaling)
    parameters = (*o.parameters(), *gate_up.parameters(), *down.parameters())
    out: Tensor = _AfterAttention.apply(
        h, mixed, after, o, gate_up, down, after.weight, *parameters
    )
    return out


class _BeforeAttention(torch.autograd.Function):
    """(b, s, d) to queries, keys and values (b, heads, s, head_dim): norm, projections,
    rotation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        head_dim: int,
        norm: _Norm,
        qkv: Projections,
        *_: Tensor,
    ) -> tuple[Tensor, ...]:
        rows = h.flatten(0, 1)
        x, scale = normed(rows, norm)
        out, kept = qkv.product(x)
        heads = out.unflatten(-1, (-1, head_dim))
        of_values = qkv.weights[-1].shape[0] // head_dim
        turning = heads[:, :-of_values]
        elementwise.rotate(turning, cos, sin, into=turning)
        ctx.norm, ctx.qkv, ctx.of_values = norm, qkv, of_values
        ctx.save_for_backward(rows, scale, x, cos, sin, *kept)
        return (
            heads.unflatten(0, h.shape[:2])
            .transpose(1, 2)
            .split([heads.shape[1] - 2 * of_values, of_values, of_values], 1)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, scale, x, cos, sin, *kept = ctx.saved_tensors
        d_heads = torch.cat([grad.transpose(1, 2) for grad in grads], 2).flatten(0, 1)
        turning = d_heads[:, : -ctx.of_values]
        elementwise.rotate(turning, cos, -sin, into=turning)
        want = ctx.needs_input_grad[0]
        d_x, d_parameters = ctx.qkv.gradients(
            d_heads.flatten(1), x, kept, want or ctx.norm.weight.requires_grad
        )
        d_rows, d_weight = (
            norm_gradients(d_x, rows, scale, ctx.norm) if d_x is not None else (None, None)
        )
        batch, positions = grads[0].shape[0], grads[0].shape[2]
        return (
            d_rows.unflatten(0, (batch, positions)) if want and d_rows is not None else None,
            None,
            None,
            None,
            None,
            None,
            d_weight,
            *d_parameters,
        )


class _AfterAttention(torch.autograd.Function):
    """h (b, s, d) and what attention mixed (b, heads, s, head_dim) to the layer's output:
    projection, residual, norm, MLP, residual.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        mixed: Tensor,
        norm: _Norm,
        o: Projections,
        gate_up: Projections,
        down: Projections,
        *_: Tensor,
    ) -> Tensor:
        values = mixed.transpose(1, 2).flatten(0, 1).flatten(1)
        total, kept_o = o.product(values)
        total += h.flatten(0, 1)
        x, scale = normed(total, norm)
        pair, kept_pair = gate_up.product(x)
        active = elementwise.silu_mul(pair)
        out, kept_down = down.product(active)
        out += total
        ctx.norm, ctx.projections, ctx.heads, ctx.counts = (
            norm,
            (o, gate_up, down),
            mixed.shape[1],
            (len(kept_o), len(kept_pair)),
        )
        ctx.save_for_backward(
            values, total, scale, x, pair, active, *kept_o, *kept_pair, *kept_down
        )
        return out.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, total, scale, x, pair, active, *kept = ctx.saved_tensors
        o, gate_up, down = ctx.projections
        first, second = ctx.counts[0], sum(ctx.counts)
        d_out = grad.flatten(0, 1)
        d_active, of_down = down.gradients(d_out, active, kept[second:], True)
        d_pair = elementwise.silu_mul_gradient(d_active, pair)
        d_x, of_pair = gate_up.gradients(d_pair, x, kept[first:second], True)
        d_total, d_weight = norm_gradients(d_x, total, scale, ctx.norm)
        d_total += d_out
        d_values, of_o = o.gradients(d_total, values, kept[:first], True)
        d_mixed = d_values.view(*grad.shape[:2], ctx.heads, -1).transpose(1, 2)
        return (
            d_total.view_as(grad),
            d_mixed,
            None,
            None,
            None,
            None,
            d_weight,
            *of_o,
            *of_pair,
            *of_down,
        )


# --- projections that read one input
# ----------------------------------------------------------------------------------


class Adapter(NamedTuple):
    """LoRA's addition of scaling · B·A to a weight."""

    a: Tensor
    """(r, in) float32."""
    b: Tensor
    """(out, r) float32."""
    scaling: float


class Projections(NamedTuple):
    """One product x Wᵀ + scaling · (x Aᵀ) Bᵀ of one input with several weights, whose outputs lie
    one after another.
    """

    weights: tuple[Tensor, ...]
    adapters: tuple[Adapter, ...]
    """One a weight, or none at all; the weights are frozen where there are any."""

    def parameters(self) -> tuple[Tensor, ...]:
        """What has a gradient, in the order of `gradients`."""
        return (
            tuple(t for adapter in self.adapters for t in adapter[:2])
            if self.adapters
            else self.weights
        )

    def product(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (n, in) to (n, all outputs), and what `gradients` wants kept. Adapters, of float32,
        are multiplied in x's dtype.
        """
        whole = side_by_side(self.weights)
        out = (
            F.linear(x, whole)
            if whole is not None
            else torch.cat([F.linear(x, w) for w in self.weights], -1)
        )
        if not self.adapters:
            return out, ()
        a = torch.cat([adapter.a for adapter in self.adapters]).to(x.dtype)
        bs = [(adapter.b * adapter.scaling).to(x.dtype) for adapter in self.adapters]
        inner = F.linear(x, a)
        for part, low, b in zip(
            out.split([len(w) for w in self.weights], -1),
            inner.split([b.shape[1] for b in bs], -1),
            bs,
            strict=True,
        ):
            part.addmm_(low, b.T)
        return out, (inner, a, *bs)

    def gradients(
        self, d_out: Tensor, x: Tensor, kept: Sequence[Tensor], want_x: bool
    ) -> tuple[Any, tuple[Tensor | None, ...]]:
        """(of x or None, of each of `parameters`)."""
        sizes = [len(w) for w in self.weights]
        if not self.adapters:
            d_x = self._d_input(d_out) if want_x else None
            trained = self.weights[0].requires_grad
            return d_x, (d_out.T @ x).split(sizes) if trained else (None,) * len(sizes)
        inner, a, *bs = kept
        ranks = [b.shape[1] for b in bs]
        parts = d_out.split(sizes, -1)
        d_inner = torch.cat([part @ b for part, b in zip(parts, bs, strict=True)], -1)
        d_as = (d_inner.T @ x).float().split(ranks)
        d_bs = [
            (part.T @ low).float() * adapter.scaling
            for part, low, adapter in zip(parts, inner.split(ranks, -1), self.adapters, strict=True)
        ]
        d_x = self._d_input(d_out).addmm_(d_inner, a) if want_x else None
        return d_x, tuple(grad for pair in zip(d_as, d_bs, strict=True) for grad in pair)

    def _d_input(self, d_out: Tensor) -> Tensor:
        whole = side_by_side(self.weights)
        if whole is not None:
            return d_out @ whole
        d_x, *others = (
            part @ w
            for part, w in zip(
                d_out.split([len(w) for w in self.weights], -1), self.weights, strict=True
            )
        )
        for other in others:
            d_x += other
        return d_x


def joined(*modules: Any) -> Projections:
    """Of linear modules without bias that read one input, their active LoRA adapters included."""
    if not hasattr(modules[0], "base_layer"):
        return Projections(tuple(m.weight for m in modules), ())
    weights = tuple(m.base_layer.weight for m in modules)
    if modules[0].disable_adapters:
        return Projections(weights, ())
    (name,) = modules[0].active_adapters
    return Projections(
        weights,
        tuple(
            Adapter(m.lora_A[name].weight, m.lora_B[name].weight, m.scaling[name]) for m in modules
        ),
    )


# --- what lies between, with its gradient
# -----------------------------------------------------------------------------


class _Norm(NamedTuple):
    weight: Tensor
    eps: float


def _norm_of(module: Any) -> _Norm:
    return _Norm(module.weight, module.variance_epsilon)


def normed(x: Tensor, norm: _Norm) -> tuple[Tensor, Tensor]:
    """x (n, d) normed, and what each row was multiplied by, (n, 1) float32."""
    if x.is_cuda:
        found: tuple[Tensor, Tensor] = torch.ops.aten._fused_rms_norm(
            x, x.shape[-1:], norm.weight, norm.eps
        )
        return found
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norm.eps)
    return (x * scale * norm.weight).to(x.dtype), scale


def norm_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, norm: _Norm
) -> tuple[Tensor, Tensor | None]:
    """(of x, of the norm's weight, None where that is frozen)."""
    trained = norm.weight.requires_grad
    if x.is_cuda:
        found: tuple[Tensor, Tensor | None] = torch.ops.aten._fused_rms_norm_backward(
            grad, x, x.shape[-1:], scale, norm.weight, [True, trained]
        )
        return found
    unit, d_unit = x * scale, grad * norm.weight
    d_x = scale * (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True))
    return d_x.to(x.dtype), (grad * unit).sum(0).to(norm.weight.dtype) if trained else None
