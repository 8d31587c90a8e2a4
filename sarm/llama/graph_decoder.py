"""Decoding Llama on a GPU: one CUDA graph a token over a static cache, rows refilled as they end.

A batch has a fixed number of slots. One step takes every slot's last token, appends it to the
slot's cache, draws the next one and moves the slot on, all on the device: the step is captured once
for a shape and replayed. The host looks a step late at which slots have ended, so the GPU never
waits for it, and puts waiting prompts into them.

`python -m pytest -m gpu tests/llama/test_graph_decoder.py` compares graph, eager and transformers;
`python benchmarks/decode.py` tells milliseconds a token against the bandwidth floor. Uses what
`weights.py` says of weights.

Notation: b slots, s prompt positions, v the vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sarm.cache_size import cached_positions, power_of_two, rows_at_once
from sarm.llama.decode_kernels import advance, attend, draw
from sarm.llama.decoders import Decoded, Progress, Sampling, empty_decoded
from sarm.llama.elementwise import rotate
from sarm.llama.inference import layer_of, run_layers
from sarm.llama.sampling import sample
from sarm.llama.weights import LlamaWeights, rotary
from sarm.philox_triton import uniforms

PREFILL_TOKENS = 16384
"""Padded prompt tokens read in one forward: their wide middle sets the peak of memory."""
REFILL_SHARE = 8
"""Waiting prompts are read once one slot in this many is free: reading one alone costs as much as
reading several.
"""
KEPT_SHAPES = 4
"""Shapes whose graph is kept. Their caches are one: none outlives a batch."""


class Shape(NamedTuple):
    """What a graph is captured for. Buckets, so that batches of like size share one."""

    slots: int
    capacity: int
    """Positions in the cache."""
    width: int
    """Response tokens a slot has room for."""
    n_stops: int
    temperature: float
    top_p: float

    @classmethod
    def holding(
        cls, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: int | None
    ) -> Shape:
        longest = max(map(len, prompts)) + sampling.max_new_tokens
        slots = min(len(prompts), rows_at_once(longest) if rows is None else rows)
        return cls(
            -(-slots // 8) * 8,
            cached_positions(longest),
            power_of_two(sampling.max_new_tokens, 64),
            len(sampling.stops),
            *sampling[1:3],
        )

    def cached(self, weights: LlamaWeights) -> int:
        """Numbers in its keys and values."""
        of_position = 2 * len(weights.layers) * weights.kv_heads * weights.head_dim
        return self.slots * self.capacity * of_position


class Slots:
    """The device's state of one shape, and the step over it."""

    def __init__(self, weights: LlamaWeights, shape: Shape, cache: Tensor) -> None:
        self.weights, self.shape, self.device = weights, shape, cache.device
        device = cache.device
        self.layers = [layer_of(layer) for layer in weights.layers]
        b = shape.slots
        whole = cache[: shape.cached(weights)].view(
            2, len(weights.layers), b, weights.kv_heads, shape.capacity, weights.head_dim
        )
        self.keys, self.values = whole
        self.cos, self.sin = (
            t[0].contiguous()
            for t in rotary(weights, torch.arange(shape.capacity, device=device)[None])
        )
        self.tokens, self.noise = (
            torch.zeros(b, dtype=torch.int64, device=device) for _ in range(2)
        )
        self.positions, self.counts, self.alive = (
            torch.zeros(b, dtype=torch.int32, device=device) for _ in range(3)
        )
        self.responses = torch.zeros(b, shape.width, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(b, shape.width, device=device)
        self.stops = torch.zeros(shape.n_stops, dtype=torch.int64, device=device)
        self.limit = torch.zeros(1, dtype=torch.int32, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def capture(self) -> None:
        """Record the step. No slot is alive yet, so the runs that warm it up leave nothing
        behind.
        """
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles kernels, opens cuBLAS
                self.step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def run(self) -> None:
        """One step, by the graph where there is one."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self.step()

    def step(self) -> None:
        """Append each slot's token to its cache, draw the next, move the living slots on."""
        w = self.weights
        x, scale = F.embedding(self.tokens, w.embedding), w.head_dim**-0.5

        def mixed(i: int, qkv: Tensor) -> Tensor:
            at = (self.keys[i], self.values[i], self.cos, self.sin, self.positions)
            return attend(qkv, *at, scale)

        normed, _ = run_layers(self.layers, x, w.config.rms_norm_eps, mixed, w.norm)
        tokens, logprobs = self._draw(F.linear(normed, w.lm_head))
        advance(
            tokens,
            logprobs,
            self.stops,
            self.limit,
            self.tokens,
            self.positions,
            self.counts,
            self.alive,
            self.responses,
            self.logprobs,
        )

    def _draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self.shape.temperature > 0 and self.shape.top_p == 1:
            return draw(logits, self.noise, self.counts, self.shape.temperature)
        u = uniforms(self.noise, self.counts)
        return sample(logits, u, self.shape.temperature, self.shape.top_p)

    def begin(self, prompts: Sequence[Sequence[int]], slots: Sequence[int], noise: Tensor) -> None:
        """Put prompts into slots; the step reads each one's last token itself."""
        per_read = max(1, PREFILL_TOKENS // max(map(len, prompts)))
        for at in range(0, len(prompts), per_read):
            self._read([p[:-1] for p in prompts[at : at + per_read]], slots[at : at + per_read])
        where = _on(self.device, slots)
        self.tokens[where] = _on(self.device, [p[-1] for p in prompts])
        self.positions[where] = _on(self.device, [len(p) - 1 for p in prompts], torch.int32)
        self.counts[where] = 0
        self.noise[where] = noise
        self.alive[where] = 1

    def _read(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> None:
        """Keys and values of whole prompts, padded on the right: what padding leaves in the cache
        is overwritten before it is seen.
        """
        s = max(map(len, prompts))
        if s == 0:
            return
        w = self.weights
        run = slice(slots[0], slots[0] + len(slots))
        # a run is written without an index
        where = run if list(slots) == list(range(run.start, run.stop)) else _on(self.device, slots)
        b, heads, kv, d = len(prompts), w.heads, w.kv_heads, w.head_dim
        ids = _on(self.device, [[*p, *[0] * (s - len(p))] for p in prompts])
        cos, sin = (t[:s].repeat(b, 1) for t in (self.cos, self.sin))

        def remembered(i: int, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Queries, keys and values (b, heads, s, d), the latter two in the cache."""
            together = qkv.view(b * s, heads + 2 * kv, d)
            turning = together[:, : heads + kv]
            rotate(turning, cos, sin, into=turning)
            queries, keys, values = (
                together.view(b, s, -1, d).transpose(1, 2).split([heads, kv, kv], 1)
            )
            self.keys[i, where, :, :s], self.values[i, where, :, :s] = keys, values
            return queries, keys, values

        def mixed(i: int, qkv: Tensor) -> Tensor:
            out = F.scaled_dot_product_attention(
                *remembered(i, qkv), is_causal=True, enable_gqa=heads != kv
            )
            return out.transpose(1, 2).reshape(b * s, heads * d)

        x = F.embedding(ids, w.embedding).flatten(0, 1)
        *before, last = self.layers
        normed, _ = run_layers(before, x, w.config.rms_norm_eps, mixed, last.input_norm)
        remembered(len(before), last.qkv(normed))


class GraphDecoder:
    """Llama, a graph a shape. `graphs=False` runs the same steps uncaptured, for tests;
    `quantised` as of `LlamaWeights`.
    """

    def __init__(self, model: nn.Module, *, graphs: bool = True, quantised: bool = False) -> None:
        self.weights, self.graphs = LlamaWeights(model, quantised=quantised), graphs
        self.device = next(model.parameters()).device
        self._shapes: dict[Shape, Slots] = {}
        self._cache = torch.empty(0, dtype=self.weights.dtype, device=self.device)

    def refresh(self) -> None:
        before = self.weights.addresses()
        self.weights.refresh()
        if self.weights.addresses() != before:
            self._shapes.clear()

    def release(self) -> None:
        """Give graphs and cache back; the next batch captures anew."""
        self._shapes.clear()
        self._cache = self._cache.new_empty(0)

    @torch.no_grad()
    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        noise: Tensor,
        sampling: Sampling,
        rows: int | None,
        progress: Progress | None = None,
    ) -> Decoded:
        """`Decoder.decode`: every prompt once a slot is free, longest first."""
        n = len(prompts)
        if not n:
            return empty_decoded(0, sampling.max_new_tokens)
        slots = self._slots(Shape.holding(prompts, sampling, rows))
        slots.stops.copy_(torch.tensor(sampling.stops, dtype=torch.int64))
        slots.limit.fill_(sampling.max_new_tokens)
        noise = noise.to(self.device)
        responses = torch.zeros(n, sampling.max_new_tokens, dtype=torch.int64, device=self.device)
        logprobs, lengths = (
            torch.zeros(n, sampling.max_new_tokens, device=self.device),
            torch.zeros(n, dtype=torch.int64, device=self.device),
        )

        waiting = deque(sorted(range(n), key=lambda i: (-len(prompts[i]), i)))
        held: dict[int, int] = {}  # slot -> prompt, finished ones until the slot is taken
        free = list(range(min(slots.shape.slots, rows or n)))
        watch = _Watch(slots)

        def harvest(ended: Sequence[int]) -> None:
            """Keep what the ended slots hold."""
            at, which = (
                _on(self.device, ended),
                _on(self.device, [held.pop(slot) for slot in ended]),
            )
            responses[which] = slots.responses[at, : sampling.max_new_tokens]
            logprobs[which] = slots.logprobs[at, : sampling.max_new_tokens]
            lengths[which] = slots.counts[at].long()

        while waiting or held:
            if waiting and (
                len(free) * REFILL_SHARE >= slots.shape.slots
                or len(free) >= len(waiting)
                or not held
            ):
                taken = [
                    (free.pop(0), waiting.popleft()) for _ in range(min(len(free), len(waiting)))
                ]
                held.update(taken)
                slots.begin(
                    [prompts[i] for _, i in taken],
                    [slot for slot, _ in taken],
                    noise[_on(self.device, [i for _, i in taken])],
                )
                watch.forget()
            slots.run()
            ended = [slot for slot in watch.ended() if slot in held]
            if ended:
                harvest(ended)
                free = sorted([*free, *ended])
                if progress:
                    progress(n - len(waiting) - len(held), n)
        return Decoded(responses.cpu(), logprobs.cpu(), lengths.cpu())

    def _slots(self, shape: Shape) -> Slots:
        slots = self._shapes.pop(shape, None)
        if slots is None:
            while len(self._shapes) >= KEPT_SHAPES:
                del self._shapes[next(iter(self._shapes))]
            needed = shape.cached(self.weights)
            if len(self._cache) < needed:
                # The graphs read the one that is given back; first, so that two need no room.
                self.release()
                self._cache = self._cache.new_zeros(needed)
            slots = Slots(self.weights, shape, self._cache)
            if self.graphs:
                slots.capture()
        self._shapes[shape] = slots  # the last used last
        return slots


class _Watch:
    """Tells which slots have ended, a step late: the host never waits for the step it has just
    started.
    """

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.cuda = slots.device.type == "cuda"
        self.flags = [
            torch.ones(slots.shape.slots, dtype=torch.int32, pin_memory=self.cuda) for _ in range(2)
        ]
        self.events = [torch.cuda.Event() for _ in range(2)] if self.cuda else []
        self.seen = 0

    def forget(self) -> None:
        """Slots hold other rows now: what was seen before tells nothing of them."""
        self.seen = 0

    def ended(self) -> list[int]:
        """Call once after each step: the slots that had ended when the step before it was done."""
        now = self.seen % 2
        self.flags[now].copy_(self.slots.alive, non_blocking=True)
        if self.cuda:
            self.events[now].record()
        self.seen += 1
        if self.seen == 1:
            return []
        if self.cuda:
            self.events[1 - now].synchronize()
        return (self.flags[1 - now] == 0).nonzero().flatten().tolist()


def _on(
    device: torch.device,
    values: Sequence[int] | Sequence[Sequence[int]],
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
