"""Rows for teacher forcing without padding, in which what several begin alike with lies once.

    rows, predicts, labels = forced_shared(prompts, responses, device)
    hidden = layers.last_hidden(model, rows)[0].index_select(0, predicts)

A template's header and the prompt of several responses go through the layers once, and their
gradients are those of all rows together. `python -m pytest tests/ppo/test_shared_rows.py` compares
with padded rows.

Notation: T positions of all rows, R runs of a block with q queries and k keys each, h heads of
size d.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sarm.llama.packed import SHARED_TOKENS
from sarm.llama.prefixes import Prefixes, shared_prefixes

SIMILAR = 0.75
"""Runs are padded to one length where the shortest has at least this share of the longest."""


class Block(NamedTuple):
    """Runs of similar length, whose attention is one product."""

    queries: Tensor
    """(R, q) int64: the position of each query, right-padded with any."""
    keys: Tensor
    """(R, k) int64: the position of each key that the run reads, in the order of its row and its
    own last; right-padded with any.
    """
    mask: Tensor
    """(R, 1, q, k) float32: -inf where a query does not see a key, else 0. Padded queries see
    some key, and no query sees a padded one.
    """
    live: Tensor
    """(R, q, 1) bool: False at padded queries."""


class SharedRows(NamedTuple):
    """Several rows as one without padding."""

    ids: Tensor
    """(1, T) int64."""
    positions: Tensor
    """(1, T) int64, each within its row."""
    blocks: tuple[Block, ...]
    order: Tensor
    """(T,) int64: where among all blocks' queries, one block behind another, each position is."""


def forced_shared(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device
) -> tuple[SharedRows, Tensor, Tensor]:
    """What `forced` of sarm/llama/generate.py makes, without padding; the last token of a
    response, which predicts nothing, is left out.
    """
    rows = [[*p, *r[:-1]] for p, r in zip(prompts, responses, strict=True)]
    tree = shared_prefixes(rows, SHARED_TOKENS)
    runs = _runs(tree)
    places = [_places(tree, runs, last) for last in tree.last]
    predicts = torch.cat(
        [
            place[len(p) - 1 : len(p) - 1 + len(r)]
            for place, p, r in zip(places, prompts, responses, strict=True)
        ]
    )
    labels = torch.tensor([token for r in responses for token in r], dtype=torch.int64)
    return shared_rows(tree, runs, device), predicts.to(device), labels.to(device)


def shared_rows(tree: Prefixes, runs: Sequence[range], device: torch.device) -> SharedRows:
    """The rows of a tree whose segments lie at `runs`, one behind another."""
    ids = [token for segment in tree.segments for token in segment.tokens]
    positions = [segment.start + i for segment in tree.segments for i in range(len(segment.tokens))]
    blocks = [_block(tree, runs, members) for members in _similar(list(map(len, runs)))]
    order = torch.empty(len(ids), dtype=torch.int64)
    before = 0
    for block in blocks:
        live = block.live.flatten()
        order[block.queries.flatten()[live]] = before + live.nonzero().squeeze(1)
        before += len(live)
    return SharedRows(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        tuple(Block(*(t.to(device) for t in block)) for block in blocks),
        order.to(device),
    )


def _runs(tree: Prefixes) -> list[range]:
    stops = accumulate(len(segment.tokens) for segment in tree.segments)
    return [
        range(stop - len(segment.tokens), stop)
        for stop, segment in zip(stops, tree.segments, strict=True)
    ]


def _places(tree: Prefixes, runs: Sequence[range], segment: int) -> Tensor:
    """Where the tokens of a row lie that ends with this segment."""
    return torch.cat([torch.arange(runs[i].start, runs[i].stop) for i in tree.path(segment)])


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in groups of similar length, the longest first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[i] >= SIMILAR * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _block(tree: Prefixes, runs: Sequence[range], members: Sequence[int]) -> Block:
    own = [torch.arange(runs[i].start, runs[i].stop) for i in members]
    read = [_places(tree, runs, i) for i in members]
    queries, keys = (
        torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (own, read)
    )
    n_queries, n_keys = (torch.tensor([len(t) for t in part])[:, None] for part in (own, read))
    at_query, at_key = torch.arange(queries.shape[1]), torch.arange(keys.shape[1])
    last_seen = torch.minimum(n_keys - n_queries + at_query, n_keys - 1)
    seen = at_key <= last_seen[..., None]
    mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
    return Block(queries, keys, mask[:, None], (at_query < n_queries)[..., None])


def attend_shared(
    query: Tensor, key: Tensor, value: Tensor, rows: SharedRows, scale: float
) -> Tensor:
    """What attention mixes, (1, h, T, d), of queries (1, h, T, d), keys and values (1, kv heads,
    T, d).
    """
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    mixed: Tensor = _Attention.apply(q, k, v, rows, scale)
    return mixed.transpose(0, 1)[None]


class _Attention(torch.autograd.Function):
    """Queries (T, h, d), keys and values (T, kv heads, d) to (T, h, d). Heads of a group are more
    queries of one matrix.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: SharedRows, scale: float
    ) -> Tensor:
        kv = k.shape[1]
        q = q * scale
        parts, kept = [], []
        for block in rows.blocks:
            queries = _of_queries(q, block, kv)
            keys, values = _of_keys(k, block), _of_keys(v, block)
            scores = torch.bmm(queries, keys.transpose(1, 2))
            by_query = scores.view(len(block.queries), -1, *block.mask.shape[2:])
            by_query += block.mask.to(scores.dtype)
            shares = scores.softmax(-1)
            parts.append(_to_positions(torch.bmm(shares, values), block, kv))
            kept += [queries, keys, values, shares]
        ctx.rows, ctx.scale, ctx.shapes = rows, scale, (q.shape, k.shape)
        ctx.save_for_backward(*kept)
        return torch.cat(parts).index_select(0, rows.order).view(q.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows: SharedRows = ctx.rows
        kept, kv = ctx.saved_tensors, ctx.shapes[1][1]
        # In float32: a shared key is read by many runs.
        d_k, d_v = (
            torch.zeros(ctx.shapes[1], dtype=torch.float32, device=grad.device).flatten(1)
            for _ in range(2)
        )
        d_queries = []
        for i, block in enumerate(rows.blocks):
            queries, keys, values, shares = kept[4 * i : 4 * i + 4]
            d_mixed = _of_queries(grad, block, kv, zeros=True)
            d_shares = torch.bmm(d_mixed, values.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_shares, shares, -1, shares.dtype)
            d_queries.append(_to_positions(torch.bmm(d_scores, keys), block, kv))
            _add_to_keys(d_k, torch.bmm(d_scores.transpose(1, 2), queries), block)
            _add_to_keys(d_v, torch.bmm(shares.transpose(1, 2), d_mixed), block)
        d_q = torch.cat(d_queries).index_select(0, rows.order).mul_(ctx.scale)
        return (
            d_q.view(ctx.shapes[0]),
            d_k.to(grad.dtype).view(ctx.shapes[1]),
            d_v.to(grad.dtype).view(ctx.shapes[1]),
            None,
            None,
        )


def _of_queries(x: Tensor, block: Block, kv: int, zeros: bool = False) -> Tensor:
    """(T, h, d) at a block's queries, with `zeros` at padded ones: (R · kv, h / kv · q, d)."""
    runs, most = block.queries.shape
    taken = x.flatten(1).index_select(0, block.queries.flatten()).view(runs, most, -1)
    if zeros:
        taken = taken * block.live
    taken = taken.view(runs, most, kv, -1, x.shape[2])
    return taken.permute(0, 2, 3, 1, 4).reshape(runs * kv, -1, x.shape[2])


def _to_positions(x: Tensor, block: Block, kv: int) -> Tensor:
    """(R · kv, h / kv · q, d), as of `_of_queries`, query by query: (R · q, h · d)."""
    runs, most = block.queries.shape
    by_query = x.view(runs, kv, -1, most, x.shape[2]).permute(0, 3, 1, 2, 4)
    return by_query.reshape(runs * most, -1)


def _of_keys(x: Tensor, block: Block) -> Tensor:
    """(T, kv heads, d) at a block's keys: (R · kv, k, d)."""
    taken = x.flatten(1).index_select(0, block.keys.flatten())
    return taken.view(*block.keys.shape, *x.shape[1:]).transpose(1, 2).flatten(0, 1)


def _add_to_keys(into: Tensor, x: Tensor, block: Block) -> None:
    """Add (R · kv, k, d) of a block's keys to those positions of `into` (T, kv · d) float32."""
    runs, most = block.keys.shape
    by_key = x.view(runs, -1, most, x.shape[2]).transpose(1, 2).reshape(runs * most, -1)
    into.index_add_(0, block.keys.flatten(), by_key.float())
