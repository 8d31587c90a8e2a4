"""A Llama's forward for the state at each row's end: `end_states(llama, pack(rows, device))`.

Rows of different lengths lie one after another without padding, and what several rows begin alike
with (a template's header, the prompt of several responses) lies there once. Every position goes
through the linear layers once; attention gives each its own row's keys. On a GPU, where no gradient
is asked for, what lies between the products is fused (`sarm.llama.elementwise`), and attention is
the varlen kernel of FlashAttention-2 that torch carries.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
)

from sarm.llama.elementwise import add_rms_norm, rms_norm, rotate, silu_mul
from sarm.llama.prefixes import shared_prefixes

MLP_TOKENS = 16384
"""Positions that go through an MLP at once: its wide middle sets the peak of memory."""
SHARED_TOKENS = 16
"""Fewer tokens than this are computed again rather than shared: each shared run is one more piece
of attention.
"""


class Reads(NamedTuple):
    """Runs of queries, and the packed positions whose keys each run reads: the last of these are
    its own, causally.
    """

    queries: list[slice]
    keys: list[list[slice]]
    """In the order of the row; one slice where nothing is shared"""
    query_ends: Tensor
    """(runs + 1,) int32, cumulative, on the device"""
    key_ends: Tensor
    """(runs + 1,) int32, cumulative, on the device"""
    key_index: Tensor
    """(all keys,) packed position of each, run after run; empty where that is every position in
    order
    """

    @property
    def longest(self) -> tuple[int, int]:
        """Queries and keys of the longest run of each."""
        return max(map(_length, self.queries)), max(sum(map(_length, spans)) for spans in self.keys)


class Packed(NamedTuple):
    """Rows one after another, on a device."""

    ids: Tensor
    """(T,)"""
    positions: Tensor
    """(T,) within its row"""
    ends: Tensor
    """(B,) packed index of each row's last position"""
    everywhere: Reads
    """What every position reads."""
    at_ends: Reads
    """What each row's last position reads."""


def pack(rows: Sequence[Sequence[int]], device: torch.device | str) -> Packed:
    """Rows of token ids, none empty, ready for `end_states`. They are sent to a GPU without
    waiting for what it does.
    """
    tree = shared_prefixes(rows, SHARED_TOKENS)
    stops = accumulate(len(segment.tokens) for segment in tree.segments)
    runs = [
        slice(stop - len(segment.tokens), stop)
        for stop, segment in zip(stops, tree.segments, strict=True)
    ]
    paths = [[runs[i] for i in tree.path(segment)] for segment in range(len(runs))]
    rows_runs, rows_paths = (
        [slice(row, row + 1) for row in range(len(rows))],
        [paths[last] for last in tree.last],
    )
    ids = np.concatenate([np.asarray(segment.tokens, dtype=np.int64) for segment in tree.segments])
    positions = np.concatenate(
        [np.arange(segment.start, segment.start + len(segment.tokens)) for segment in tree.segments]
    )
    ends = np.array([path[-1].stop - 1 for path in rows_paths])
    sent = _send(
        [
            ids,
            positions,
            ends,
            *_offsets(runs, paths, len(ids)),
            *_offsets(rows_runs, rows_paths, len(ids)),
        ],
        torch.device(device),
    )
    everywhere, at_ends = (
        Reads(q, k, a.int(), b.int(), c)
        for q, k, (a, b, c) in ((runs, paths, sent[3:6]), (rows_runs, rows_paths, sent[6:9]))
    )
    return Packed(sent[0], sent[1], sent[2], everywhere, at_ends)


def _offsets(
    queries: Sequence[slice], keys: Sequence[Sequence[slice]], n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tensors of `Reads`, over n packed positions."""
    query_ends = np.cumsum([0, *map(_length, queries)])
    key_ends = np.cumsum([0, *(sum(map(_length, spans)) for spans in keys)])
    index = np.concatenate([np.arange(span.start, span.stop) for spans in keys for span in spans])
    return query_ends, key_ends, index[:0] if np.array_equal(index, np.arange(n)) else index


def _length(span: slice) -> int:
    return span.stop - span.start


def _send(arrays: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, ...]:
    """Whole numbers, in one copy: from pinned memory, as any other copy to a GPU waits until the
    GPU is done.
    """
    whole = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        whole = whole.pin_memory().to(device, non_blocking=True)
    return whole.split([len(array) for array in arrays])


def end_states(llama: LlamaModel, packed: Packed) -> Tensor:
    """The residual stream after the last layer at each row's end, (B, d_in) in the trunk's dtype;
    the final norm is not applied.
    """
    layers = cast("list[LlamaDecoderLayer]", list(llama.layers))
    h = llama.embed_tokens(packed.ids)
    cos, sin = (t[0] for t in llama.rotary_emb(h, packed.positions.unsqueeze(0)))
    normed = rms_norm(
        h, layers[0].input_layernorm.weight, layers[0].input_layernorm.variance_epsilon
    )
    for layer, following in pairwise(layers):
        queries, keys, values = _project(layer.self_attn, normed)
        mixed = _attend(
            rotate(queries, cos, sin),
            rotate(keys, cos, sin),
            values,
            packed.everywhere,
            layer.self_attn.scaling,
        )
        normed, h = _add_norm(layer.self_attn.o_proj(mixed), h, layer.post_attention_layernorm)
        normed, h = _add_norm(_mlp(layer.mlp, normed), h, following.input_layernorm)
    # Of the last layer one position a row is wanted; the others serve as keys and values alone.
    last, ends = layers[-1], packed.ends
    projected = (
        last.self_attn.q_proj(normed[ends]),
        last.self_attn.k_proj(normed),
        last.self_attn.v_proj(normed),
    )
    queries, keys, values = (
        part.unflatten(-1, (-1, last.self_attn.head_dim)) for part in projected
    )
    mixed = _attend(
        rotate(queries, cos[ends], sin[ends]),
        rotate(keys, cos, sin),
        values,
        packed.at_ends,
        last.self_attn.scaling,
    )
    normed, h = _add_norm(last.self_attn.o_proj(mixed), h[ends], last.post_attention_layernorm)
    return h + _mlp(last.mlp, normed)


def _add_norm(x: Tensor, residual: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    return add_rms_norm(x, residual, cast(Tensor, norm.weight), cast(float, norm.variance_epsilon))


def _project(attention: LlamaAttention, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (T, heads, head_dim), keys and values (T, kv heads, head_dim)."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    joined = _joined(*projections)
    if joined is None:
        parts = [projection(normed) for projection in projections]
    else:
        parts = list(
            nn.functional.linear(normed, joined).split(
                [p.weight.shape[0] for p in projections], dim=-1
            )
        )
    queries, keys, values = (part.unflatten(-1, (-1, attention.head_dim)) for part in parts)
    return queries, keys, values


def _mlp(mlp: LlamaMLP, normed: Tensor) -> Tensor:
    """Some positions at a time."""
    joined = (
        _joined(mlp.gate_proj, mlp.up_proj) if mlp.config.hidden_act in ("silu", "swish") else None
    )
    if joined is None:
        parts = [mlp(part) for part in normed.split(MLP_TOKENS)]
    else:
        parts = [
            mlp.down_proj(silu_mul(nn.functional.linear(part, joined)))
            for part in normed.split(MLP_TOKENS)
        ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, reads: Reads, scale: float) -> Tensor:
    """Queries (N, heads, head_dim) over keys and values (T, kv heads, head_dim) to (N, heads ·
    head_dim).
    """
    if queries.is_cuda and queries.dtype in (torch.bfloat16, torch.float16):
        if len(reads.key_index):
            keys, values = keys[reads.key_index], values[reads.key_index]
        # What `torch.nn.attention.varlen` calls; in torch 2.11 its own signature knows no grouped
        # heads. Where a run has fewer queries than keys, its last query sees all keys.
        mixed = torch.ops.aten._flash_attention_forward(
            queries,
            keys,
            values,
            reads.query_ends,
            reads.key_ends,
            *reads.longest,
            0.0,
            True,
            False,
            scale=scale,
        )[0]
        return mixed.flatten(1)
    return torch.cat(
        [
            _attend_run(queries[run], keys, values, spans, scale)
            for run, spans in zip(reads.queries, reads.keys, strict=True)
        ]
    )


def _attend_run(
    queries: Tensor, keys: Tensor, values: Tensor, spans: Sequence[slice], scale: float
) -> Tensor:
    """One run of queries (n, heads, head_dim) over the keys in the spans, its own the last of
    them; (n, heads · head_dim).
    """
    keys, values = (
        t[spans[0]] if len(spans) == 1 else torch.cat([t[span] for span in spans])
        for t in (keys, values)
    )
    n, seen = len(queries), len(keys)
    mask = (
        None
        if n in (1, seen)
        else torch.ones(n, seen, dtype=torch.bool, device=keys.device).tril(seen - n)
    )
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (queries, keys, values))
    mixed = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=n == seen and n > 1, scale=scale, enable_gqa=True
    )
    return mixed[0].transpose(0, 1).flatten(1)


# Products over joined weights


def join_projections(llama: LlamaModel) -> None:
    """Lay the weights that read the same input side by side in memory, so that one product serves
    them; their values stay.

    Of modules with LoRA, the weights beneath. Each layer's are copied once. Moved to another device
    later they fall apart again, which costs speed alone.
    """
    with torch.inference_mode(False), torch.no_grad():
        for layer in cast("list[LlamaDecoderLayer]", list(llama.layers)):
            attention, mlp = layer.self_attn, layer.mlp
            for modules in (
                (attention.q_proj, attention.k_proj, attention.v_proj),
                (mlp.gate_proj, mlp.up_proj),
            ):
                weights = [getattr(module, "base_layer", module).weight for module in modules]
                together = torch.cat([weight.data for weight in weights])
                for weight, part in zip(
                    weights, together.split([len(w) for w in weights]), strict=True
                ):
                    weight.data = part


def side_by_side(weights: Sequence[Tensor]) -> Tensor | None:
    """One view over weights that lie one behind another in one storage; None where they do not."""
    first = weights[0].detach()
    at, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for w in weights:
        if not w.is_contiguous() or w.data_ptr() != at or w.untyped_storage().data_ptr() != storage:
            return None
        at += w.numel() * w.element_size()
    return first.as_strided((sum(len(w) for w in weights), *first.shape[1:]), first.stride())


def _joined(*linears: nn.Module) -> Tensor | None:
    """One (all outputs, inputs) view of plain linear layers' weights; None where they do not lie
    side by side or a gradient is asked for.
    """
    if torch.is_grad_enabled() or not all(
        type(linear) is nn.Linear and linear.bias is None for linear in linears
    ):
        return None
    return side_by_side([cast(nn.Linear, linear).weight for linear in linears])
