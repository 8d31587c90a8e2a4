"""The GPU kernels of one decoding step, in Triton: attention over a cache, drawing a token, moving
the rows on.

`TRITON_INTERPRET=1 python -m pytest tests/llama/test_graph_decoder.py` runs them on a CPU against
plain torch. Everything else of a step is a matrix product or one of `sarm/llama/elementwise.py`.

Notation: b rows, g query heads a key head, d the head dimension, n cached positions, v the
vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sarm.philox_triton import uniform

CHUNK = 4096
"""Logits that one program of `draw` adds up."""


@triton.jit
def _attend(
    qkv,
    keys,
    values,
    cos,
    sin,
    positions,
    out,
    scale,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One row and key head: rotate its queries and its new key, append key and value, attend to
    all there are.

    Everything runs in halves of the head dimension, since rotation mixes position j with j + d/2.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    group: tl.constexpr = HEADS // KV
    half: tl.constexpr = D // 2
    dtype = qkv.dtype.element_ty
    position = tl.load(positions + row)
    g, h = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_H)
    ok_h = h < half
    ok = (g < group)[:, None] & ok_h[None, :]
    c = tl.load(cos + position * D + h, mask=ok_h, other=0.0).to(tl.float32)
    s = tl.load(sin + position * D + h, mask=ok_h, other=0.0).to(tl.float32)
    own = qkv + row * (HEADS + 2 * KV) * D
    at_q = own + (head * group + g)[:, None] * D + h[None, :]
    q1, q2 = (
        tl.load(at_q, mask=ok, other=0.0).to(tl.float32),
        tl.load(at_q + half, mask=ok, other=0.0).to(tl.float32),
    )
    rotated1, rotated2 = (q1 * c - q2 * s).to(dtype), (q2 * c + q1 * s).to(dtype)
    at_k = own + (HEADS + head) * D + h
    k1, k2 = (
        tl.load(at_k, mask=ok_h, other=0.0).to(tl.float32),
        tl.load(at_k + half, mask=ok_h, other=0.0).to(tl.float32),
    )
    new1, new2 = (k1 * c - k2 * s).to(dtype), (k2 * c + k1 * s).to(dtype)
    at_v = own + (HEADS + KV + head) * D + h
    v1, v2 = tl.load(at_v, mask=ok_h, other=0.0), tl.load(at_v + half, mask=ok_h, other=0.0)
    cache = (row.to(tl.int64) * KV + head) * CAPACITY * D
    here = cache + position * D + h
    tl.store(keys + here, new1, mask=ok_h)
    tl.store(keys + here + half, new2, mask=ok_h)
    tl.store(values + here, v1, mask=ok_h)
    tl.store(values + here + half, v2, mask=ok_h)

    # The new position from registers; what this program has just stored is not read back.
    score = tl.sum(rotated1.to(tl.float32) * new1.to(tl.float32)[None, :], 1) + tl.sum(
        rotated2.to(tl.float32) * new2.to(tl.float32)[None, :], 1
    )
    top = score * scale
    total = tl.full([BLOCK_G], 1.0, tl.float32)
    sum1 = tl.zeros([BLOCK_G, BLOCK_H], tl.float32) + v1.to(tl.float32)[None, :]
    sum2 = tl.zeros([BLOCK_G, BLOCK_H], tl.float32) + v2.to(tl.float32)[None, :]
    for start in range(0, position, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        seen = n < position
        # (h, n): keys come in transposed, ready for the product
        at = cache + n[None, :] * D + h[:, None]
        inside = seen[None, :] & ok_h[:, None]
        scores = tl.dot(
            rotated1, tl.load(keys + at, mask=inside, other=0.0), input_precision=PRECISION
        )
        scores += tl.dot(
            rotated2, tl.load(keys + at + half, mask=inside, other=0.0), input_precision=PRECISION
        )
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p, shrink = tl.exp(scores - higher[:, None]), tl.exp(top - higher)
        total = total * shrink + tl.sum(p, 1)
        at = cache + n[:, None] * D + h[None, :]
        inside = seen[:, None] & ok_h[None, :]
        sum1 = sum1 * shrink[:, None] + tl.dot(
            p.to(dtype), tl.load(values + at, mask=inside, other=0.0), input_precision=PRECISION
        )
        sum2 = sum2 * shrink[:, None] + tl.dot(
            p.to(dtype),
            tl.load(values + at + half, mask=inside, other=0.0),
            input_precision=PRECISION,
        )
        top = higher
    at = out + (row * HEADS + head * group + g)[:, None] * D + h[None, :]
    tl.store(at, (sum1 / total[:, None]).to(dtype), mask=ok)
    tl.store(at + half, (sum2 / total[:, None]).to(dtype), mask=ok)


def attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    scale: float,
) -> Tensor:
    """(b, heads * d): each row's new token, at `positions` (b,) int32, attends to itself and to
    all before it.

    `qkv` (b, (heads + 2 kv) * d) as the fused projection leaves it; the rotated key and the value
    are put in `keys` and `values` (b, kv, capacity, d) at the row's position. `cos` and `sin`
    (capacity, d) hold each frequency twice.
    """
    b, kv, capacity, d = keys.shape
    heads = qkv.shape[1] // d - 2 * kv
    out = torch.empty(b, heads * d, dtype=qkv.dtype, device=qkv.device)
    group, half = (
        max(16, triton.next_power_of_2(heads // kv)),
        max(16, triton.next_power_of_2(d // 2)),
    )
    precision = "ieee" if qkv.dtype == torch.float32 else "tf32"  # of no meaning to bf16
    _attend[(b, kv)](
        qkv,
        keys,
        values,
        cos,
        sin,
        positions,
        out,
        scale,
        heads,
        kv,
        d,
        capacity,
        group,
        half,
        64,
        precision,
        num_warps=4,
    )
    return out


# --- drawing a token


@triton.jit
def _add_up(logits, tops, sums, v, temperature, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Of one row and chunk: the largest scaled logit, and the sum of exp(scaled logit - largest)
    in float64.
    """
    row, chunk = tl.program_id(0), tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x = (
        tl.load(logits + row.to(tl.int64) * v + at, mask=at < v, other=float("-inf")).to(tl.float32)
        / temperature
    )
    top = tl.max(x, 0)
    # A chunk of nothing but -inf weighs nothing.
    e = tl.where(x == float("-inf"), 0.0, tl.exp(x - top))
    tl.store(tops + row * CHUNKS + chunk, top)
    tl.store(sums + row * CHUNKS + chunk, tl.sum(e.to(tl.float64), 0))


@triton.jit
def _pick(
    logits,
    tops,
    sums,
    noise,
    counts,
    tokens,
    logprobs,
    v,
    temperature,
    CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One row: the chunk in which the cumulative sum passes u, then the token within it."""
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    of_chunk = tl.load(tops + row * CHUNKS + c, mask=c < CHUNKS, other=float("-inf"))
    top = tl.max(of_chunk, 0)
    weight = tl.load(sums + row * CHUNKS + c, mask=c < CHUNKS, other=0.0)
    weight = tl.where(weight == 0.0, 0.0, weight * tl.exp(of_chunk - top).to(tl.float64))
    total = tl.sum(weight, 0)
    target = uniform(tl.load(noise + row), tl.load(counts + row)) * total
    passed = (tl.cumsum(weight, 0) <= target) & (c < CHUNKS)
    chunk = tl.minimum(tl.sum(passed.to(tl.int32), 0), CHUNKS - 1)
    before = tl.sum(tl.where(c < chunk, weight, 0.0), 0)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x = (
        tl.load(logits + row.to(tl.int64) * v + at, mask=at < v, other=float("-inf")).to(tl.float32)
        / temperature
    )
    # Weighed as in `_add_up`, so that the chunk's tokens add up to the chunk.
    own = tl.sum(tl.where(c == chunk, of_chunk, 0.0), 0)
    e = tl.where(x == float("-inf"), 0.0, tl.exp(x - own)).to(tl.float64) * tl.exp(own - top).to(
        tl.float64
    )
    within = tl.sum((before + tl.cumsum(e, 0) <= target).to(tl.int32), 0)
    # where rounding has the sums end below u
    last = tl.max(tl.where(e > 0, tl.arange(0, CHUNK), 0), 0)
    token = chunk * CHUNK + tl.minimum(within, last)
    chosen = tl.load(logits + row.to(tl.int64) * v + token).to(tl.float32) / temperature
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, ((chosen - top).to(tl.float64) - tl.log(total)).to(tl.float32))


def draw(
    logits: Tensor, noise: Tensor, counts: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Tokens (b,) int64 and their log-probabilities (b,) float32, as `sampling.sample` without
    top-p draws them.

    `logits` (b, v); `noise` (b,) int64 keys and `counts` (b,) int32, how many tokens each row has
    drawn.
    """
    b, v = logits.shape
    chunks = triton.cdiv(v, CHUNK)
    tops = torch.empty(b, chunks, dtype=torch.float32, device=logits.device)
    sums = torch.empty(b, chunks, dtype=torch.float64, device=logits.device)
    tokens, logprobs = (
        torch.empty(b, dtype=torch.int64, device=logits.device),
        torch.empty(b, dtype=torch.float32, device=logits.device),
    )
    _add_up[(b, chunks)](logits, tops, sums, v, temperature, chunks, CHUNK, num_warps=8)
    _pick[(b,)](
        logits,
        tops,
        sums,
        noise,
        counts,
        tokens,
        logprobs,
        v,
        temperature,
        chunks,
        triton.next_power_of_2(chunks),
        CHUNK,
        num_warps=8,
    )
    return tokens, logprobs


@triton.jit
def _advance(
    drawn,
    drawn_logprobs,
    stops,
    limit,
    tokens,
    positions,
    counts,
    alive,
    responses,
    logprobs,
    WIDTH: tl.constexpr,
    STOPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    lives = tl.load(alive + row) != 0
    token, count = tl.load(drawn + row), tl.load(counts + row)
    tl.store(responses + row * WIDTH + count, token, mask=lives)
    tl.store(logprobs + row * WIDTH + count, tl.load(drawn_logprobs + row), mask=lives)
    tl.store(tokens + row, token, mask=lives)
    tl.store(positions + row, tl.load(positions + row) + 1, mask=lives)
    tl.store(counts + row, count + 1, mask=lives)
    s = tl.arange(0, BLOCK)
    is_stop = (
        tl.sum(
            ((tl.load(stops + s, mask=s < STOPS, other=-1) == token) & (s < STOPS)).to(tl.int32), 0
        )
        > 0
    )
    ends = is_stop | (count + 1 >= tl.load(limit))
    tl.store(alive + row, 0, mask=lives & ends)


def advance(
    drawn: Tensor,
    drawn_logprobs: Tensor,
    stops: Tensor,
    limit: Tensor,
    tokens: Tensor,
    positions: Tensor,
    counts: Tensor,
    alive: Tensor,
    responses: Tensor,
    logprobs: Tensor,
) -> None:
    """Append each living row's drawn token and move it on, in place; a row ends at a stop token or
    at `limit` tokens.

    Per row (b,): `tokens` int64 (the next input), `positions`, `counts`, `alive` int32; `responses`
    and `logprobs` (b, width).
    """
    block = triton.next_power_of_2(max(1, len(stops)))
    _advance[(len(tokens),)](
        drawn,
        drawn_logprobs,
        stops,
        limit,
        tokens,
        positions,
        counts,
        alive,
        responses,
        logprobs,
        responses.shape[1],
        len(stops),
        block,
        num_warps=1,
    )
