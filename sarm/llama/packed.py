"""A Llama's forward for the state at each row's end: `end_states(llama, pack(rows, device))`.

Rows of different lengths lie one after another without padding, and what several rows begin alike
with (a template's header, the prompt of several responses) lies there once. Every position goes
through the linear layers once; attention gives each its own row's keys. On a GPU, where no gradient
is asked for, what lies between the products is fused (`sarm.llama.elementwise`), and attention is
the varlen kernel of FlashAttention-2 that torch carries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sarm.llama.elementwise import rotate
from sarm.llama.inference import (
    Layer,
    after_attention,
    gated_mlp,
    in_parts,
    product_with,
    run_layers,
)
from sarm.llama.prefixes import shared_prefixes
from sarm.llama.weights import side_by_side

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


class Heads(NamedTuple):
    """How a projected position divides into heads."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: LlamaConfig) -> Heads:
        head_dim = getattr(config, "head_dim", None)
        return cls(
            config.num_attention_heads,
            config.num_key_value_heads or config.num_attention_heads,
            head_dim or config.hidden_size // config.num_attention_heads,
        )

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def turned(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, all heads * head_dim) as projected to rotated queries (n, heads, head_dim), rotated
        keys and values (n, kv heads, head_dim).
        """
        together = qkv.unflatten(-1, (-1, self.head_dim))
        turning, values = together.split([self.heads + self.kv_heads, self.kv_heads], 1)
        queries, keys = rotate(turning, cos, sin).split([self.heads, self.kv_heads], 1)
        return queries, keys, values


def end_states(llama: LlamaModel, packed: Packed) -> Tensor:
    """The residual stream after the last layer at each row's end, (B, d_in) in the trunk's dtype;
    the final norm is not applied.
    """
    modules = cast("list[LlamaDecoderLayer]", list(llama.layers))
    last = modules[-1].self_attn

    def last_heads(normed: Tensor) -> tuple[Tensor, ...]:
        at_ends = last.q_proj(normed[packed.ends])
        return at_ends, last.k_proj(normed), last.v_proj(normed)

    x = llama.embed_tokens(packed.ids)
    return run_packed(
        [_layer_of(module) for module in modules],
        x,
        llama.rotary_emb(x, packed.positions.unsqueeze(0)),
        packed,
        Heads.of(llama.config),
        llama.config.rms_norm_eps,
        last_heads,
    )


def run_packed(
    layers: Sequence[Layer],
    x: Tensor,
    rope: tuple[Tensor, Tensor],
    packed: Packed,
    heads: Heads,
    eps: float,
    last_heads: Callable[[Tensor], tuple[Tensor, ...]],
    keep: Callable[[int, Tensor, Tensor], None] = lambda i, keys, values: None,
) -> Tensor:
    """`end_states` of embedded tokens (T, d_in), over any layers.

    `rope` is cos and sin (1, T, head_dim). Of the last layer one position a row is wanted, the
    others serve as keys and values alone: `last_heads` projects its normed input (T, d_in) to
    queries (B, heads * head_dim), keys and values (T, kv heads * head_dim). `keep` is given each
    layer's number, rotated keys and values (T, kv heads, head_dim).
    """
    cos, sin = (t[0] for t in rope)

    def attend(i: int, qkv: Tensor) -> Tensor:
        queries, keys, values = heads.turned(qkv, cos, sin)
        keep(i, keys, values)
        return attend_packed(queries, keys, values, packed.everywhere, heads.scale)

    *before, last = layers
    normed, x = run_layers(before, x, eps, attend, last.input_norm)
    ends = packed.ends
    queries, keys, values = (
        part.unflatten(-1, (-1, heads.head_dim)) for part in last_heads(normed)
    )
    queries, keys = rotate(queries, cos[ends], sin[ends]), rotate(keys, cos, sin)
    keep(len(before), keys, values)
    mixed = attend_packed(queries, keys, values, packed.at_ends, heads.scale)
    added, x = after_attention(last, mixed, x[ends], eps)
    return x + added


def _layer_of(module: LlamaDecoderLayer) -> Layer:
    """Over the module's weights where they lie side by side, else over its own modules."""
    attention, mlp = module.self_attn, module.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    joined = _joined(*projections)
    gate_up = (
        _joined(mlp.gate_proj, mlp.up_proj) if mlp.config.hidden_act in ("silu", "swish") else None
    )
    return Layer(
        cast(Tensor, module.input_layernorm.weight),
        (lambda x: torch.cat([projection(x) for projection in projections], -1))
        if joined is None
        else product_with(joined),
        attention.o_proj,
        cast(Tensor, module.post_attention_layernorm.weight),
        in_parts(mlp) if gate_up is None else gated_mlp(product_with(gate_up), mlp.down_proj),
    )


def _joined(*linears: nn.Module) -> Tensor | None:
    """One (all outputs, inputs) view of plain linear layers' weights; None where they do not lie
    side by side or a gradient is asked for.
    """
    if torch.is_grad_enabled() or not all(
        type(linear) is nn.Linear and linear.bias is None for linear in linears
    ):
        return None
    return side_by_side([cast(nn.Linear, linear).weight for linear in linears])


def attend_packed(
    queries: Tensor, keys: Tensor, values: Tensor, reads: Reads, scale: float
) -> Tensor:
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
