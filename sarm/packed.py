"""A Llama's forward on rows of different lengths, one after another without padding, for the state at each row's end: `end_states`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaModel, LlamaRMSNorm, rotate_half

MLP_TOKENS = 4096
"""Positions that go through an MLP at once."""


def end_states(llama: LlamaModel, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """The residual stream after the last layer at each row's end, (B, d_in) in the trunk's dtype.

    `ids` (T,) are the rows' tokens one after another; `lengths` sum to T. The model's final norm is not applied.
    """
    packed = _pack(lengths, ids.device)
    h = llama.embed_tokens(ids)
    cos, sin = (t[0] for t in llama.rotary_emb(h, packed.positions.unsqueeze(0)))
    *layers, last = cast("list[LlamaDecoderLayer]", list(llama.layers))
    for layer in layers:
        h = _add_mlp(layer, h + _attention(layer.self_attn, _norm(layer.input_layernorm, h), cos, sin, packed))
    # Of the last layer one position a row is wanted; the others serve as keys and values alone.
    mixed = _attention_at_ends(last.self_attn, _norm(last.input_layernorm, h), cos, sin, packed)
    return _add_mlp(last, h[packed.ends] + mixed)


class _Packed(NamedTuple):
    """Where rows of different lengths lie one after another: everything but attention runs on real positions alone."""

    positions: Tensor
    """(T,) within its row"""
    rows: Tensor
    """(T,)"""
    ends: Tensor
    """(B,) packed index of each row's last position"""
    padded: Tensor
    """(B, L) packed index of each position; behind a row's end, its last: no causal query there is ever read"""


def _pack(lengths: Sequence[int], device: torch.device) -> _Packed:
    counts = torch.tensor(lengths)
    starts = counts.cumsum(0) - counts
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    positions = torch.arange(len(rows)) - starts[rows]
    padded = starts.unsqueeze(1) + torch.minimum(torch.arange(int(counts.max())), counts.unsqueeze(1) - 1)
    return _Packed(*(t.to(device, non_blocking=True) for t in (positions, rows, starts + counts - 1, padded)))


def _norm(norm: LlamaRMSNorm, h: Tensor) -> Tensor:
    """LlamaRMSNorm by the fused kernel; on the CPU the same to the bit."""
    return nn.functional.rms_norm(h, h.shape[-1:], norm.weight, norm.variance_epsilon)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (N, heads, head_dim) by (N, head_dim) each."""
    return heads * cos.unsqueeze(1) + rotate_half(heads) * sin.unsqueeze(1)


def _attention(attention: LlamaAttention, normed: Tensor, cos: Tensor, sin: Tensor, packed: _Packed) -> Tensor:
    """Causal attention within each row, (T, d_in) to (T, d_in)."""
    heads = (normed.shape[0], -1, attention.head_dim)
    queries = _rotate(attention.q_proj(normed).view(heads), cos, sin)[packed.padded].transpose(1, 2)
    keys = _rotate(attention.k_proj(normed).view(heads), cos, sin)[packed.padded].transpose(1, 2)
    values = attention.v_proj(normed).view(heads)[packed.padded].transpose(1, 2)
    mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=attention.scaling, enable_gqa=True)
    return attention.o_proj(mixed.transpose(1, 2)[packed.rows, packed.positions].flatten(1))


def _attention_at_ends(attention: LlamaAttention, normed: Tensor, cos: Tensor, sin: Tensor, packed: _Packed) -> Tensor:
    """What `_attention` gives at each row's end, (T, d_in) to (B, d_in)."""
    heads, ends = (normed.shape[0], -1, attention.head_dim), packed.ends
    keys = _rotate(attention.k_proj(normed).view(heads), cos, sin)[packed.padded].transpose(1, 2)
    values = attention.v_proj(normed).view(heads)[packed.padded].transpose(1, 2)
    queries = _rotate(attention.q_proj(normed[ends]).view(len(ends), -1, attention.head_dim), cos[ends], sin[ends])
    # The heads that share keys and values stand where the queries of several positions would.
    queries = queries.view(len(ends), keys.shape[1], -1, attention.head_dim)
    seen = torch.arange(keys.shape[2], device=ends.device) <= packed.positions[ends].unsqueeze(1)
    mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=seen[:, None, None, :], scale=attention.scaling)
    return attention.o_proj(mixed.flatten(1))


def _add_mlp(layer: LlamaDecoderLayer, h: Tensor) -> Tensor:
    """The second half of a decoder layer, some positions at a time: its wide middle would else set the peak of memory."""
    return h + torch.cat([layer.mlp(_norm(layer.post_attention_layernorm, part)) for part in h.split(MLP_TOKENS)])
