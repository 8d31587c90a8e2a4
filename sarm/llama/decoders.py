"""Decoders: a policy, its cache, and the loop that appends one token after another.

    decoder = decoder_for(policy)
    sampling = Sampling(max_new_tokens=64, temperature=1.0, top_p=1.0, stops=(2,))
    decoded = decoder.decode(prompts, noise, sampling, rows=None)

`CacheDecoder` takes any causal model of transformers, `LlamaDecoder` Llama anywhere,
`graph_decoder.GraphDecoder` Llama on a GPU. `python -m pytest tests/llama/test_generate.py`
compares each with `generate` of transformers.

Notation: b rows, s positions of one forward, t response positions, v the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from sarm.llama.elementwise import rms_norm
from sarm.llama.fp8 import plain
from sarm.llama.inference import Layer, Linear, in_parts, layer_of, product_with, run_layers
from sarm.llama.packed import Heads, Packed, pack, run_packed
from sarm.llama.sampling import Sampled, sample
from sarm.llama.weights import LlamaLayer, LlamaWeights, base_model, rotary
from sarm.philox import uniforms

ROWS = 64
"""Rows at once where nobody says."""
KEEP_SHARE = 0.75
"""Finished rows are dropped once no more than this share is alive: dropping copies the cache."""


Progress = Callable[[int, int], None]
"""Told of (responses done, responses)."""


class Sampling(NamedTuple):
    """How responses are drawn and when they end."""

    max_new_tokens: int
    temperature: float
    top_p: float
    stops: tuple[int, ...]


class Decoded(NamedTuple):
    """Responses to n prompts, in the order given; on the CPU."""

    responses: Tensor
    """(n, max_new_tokens) int64, of no meaning behind a row's length."""
    logprobs: Tensor
    """(n, max_new_tokens) float32."""
    lengths: Tensor
    """(n,) int64, a stop token counted."""


class Decoder(Protocol):
    """What sampling needs of a model."""

    device: torch.device

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        noise: Tensor,
        sampling: Sampling,
        rows: int | None,
        progress: Progress | None = None,
    ) -> Decoded:
        """A response to each prompt, at most `rows` at once, or as many as suit the decoder;
        `noise` (n,) int64 keys as of `sampling.row_keys`.
        """

    def refresh(self) -> None:
        """Take over the model's present weights. A collective under ZeRO-3."""


def decoder_for(model: nn.Module, *, quantised: bool = False) -> Decoder:
    """The quickest decoder that knows the model; `quantised`, of a Llama, samples from its weights
    in fp8 (`LlamaWeights`).
    """
    if LlamaWeights.knows(model):
        if next(model.parameters()).device.type == "cuda":
            # Triton's, which a machine without GPUs need not have
            from sarm.llama.graph_decoder import GraphDecoder

            return GraphDecoder(model, quantised=quantised)
        return LlamaDecoder(model, quantised=quantised)
    return CacheDecoder(model)


# --- one forward a token, on any device


class StepDecoder:
    """The loop over a forward a token; a subclass holds one batch's cache at a time."""

    device: torch.device

    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Tensor:
        """Read the prompts; (b, v) logits of each one's first response token."""
        raise NotImplementedError

    def step(self, tokens: Tensor) -> Tensor:
        """Append `tokens` (b,); (b, v) logits of the next ones."""
        raise NotImplementedError

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (int64) only."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Nothing to do where the model itself is asked."""

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        noise: Tensor,
        sampling: Sampling,
        rows: int | None,
        progress: Progress | None = None,
    ) -> Decoded:
        """`Decoder.decode`: rows of similar length at a time."""
        rows = ROWS if rows is None else rows
        found = empty_decoded(len(prompts), sampling.max_new_tokens)
        stops = torch.tensor(list(sampling.stops), device=self.device)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for at in range(0, len(order), rows):
            batch = torch.tensor(order[at : at + rows])
            for t, live, sampled in self._tokens(
                [prompts[i] for i in batch.tolist()], noise[batch].to(self.device), stops, sampling
            ):
                here = batch[live.cpu()]
                found.responses[here, t], found.logprobs[here, t] = (
                    sampled.tokens.cpu(),
                    sampled.logprobs.cpu(),
                )
                found.lengths[here] = t + 1
            if progress:
                progress(min(at + rows, len(order)), len(order))
        return found

    def _tokens(
        self, prompts: Sequence[Sequence[int]], noise: Tensor, stops: Tensor, sampling: Sampling
    ) -> Iterator[tuple[int, Tensor, Sampled]]:
        """(position, which rows are alive, their tokens), until the last row stops; dead rows
        leave the batch in bulk.
        """
        rows = torch.arange(len(prompts), device=self.device)
        alive = torch.ones_like(rows, dtype=torch.bool)
        u = uniforms(noise[:, None], torch.arange(sampling.max_new_tokens, device=self.device))
        logits = self.start(prompts, sampling.max_new_tokens)
        for t in range(sampling.max_new_tokens):
            sampled = sample(logits, u[rows, t], sampling.temperature, sampling.top_p)
            yield t, rows[alive], Sampled(sampled.tokens[alive], sampled.logprobs[alive])
            alive = alive & ~torch.isin(sampled.tokens, stops)
            living = int(alive.sum())
            if living == 0 or t + 1 == sampling.max_new_tokens:
                return
            tokens = sampled.tokens
            if living <= KEEP_SHARE * len(rows):
                kept = alive.nonzero().squeeze(1)
                self.keep(kept)
                rows, alive, tokens = rows[kept], alive[kept], tokens[kept]
            logits = self.step(tokens)


def empty_decoded(n: int, max_new_tokens: int) -> Decoded:
    return Decoded(
        torch.zeros(n, max_new_tokens, dtype=torch.int64),
        torch.zeros(n, max_new_tokens),
        torch.zeros(n, dtype=torch.int64),
    )


class CacheDecoder(StepDecoder):
    """Any causal model of transformers, through its own forward."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.device = next(model.parameters()).device

    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Tensor:
        ids, self.attention = left_padded(prompts, self.device)
        self.cache = DynamicCache(config=base_model(self.model).config)
        return self._forward(ids, (self.attention.cumsum(1) - 1).clamp(min=0))

    def step(self, tokens: Tensor) -> Tensor:
        self.attention = F.pad(self.attention, (0, 1), value=1)
        return self._forward(tokens[:, None], self.attention.sum(1, keepdim=True) - 1)

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.attention = self.attention[rows]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids,
            attention_mask=self.attention,
            position_ids=positions,
            cache=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]


# --- Llama


class LlamaDecoder(StepDecoder):
    """Llama over a static cache, in which all rows append at the same column.

    Attention goes over the whole cache, with columns that are yet to come masked, once half of it
    is full: a product with a part of a cache copies that part first. What several prompts begin
    with, or are, is read once. On a CPU bf16 weights are held a second
    time, laid out in the blocks that oneDNN multiplies, which saves it that work in every step.
    Weights in fp8 are multiplied as the numbers that they stand for.
    """

    def __init__(self, model: nn.Module, *, quantised: bool = False) -> None:
        self.weights = LlamaWeights(model, quantised=quantised)
        self.device = next(model.parameters()).device
        self.heads = Heads.of(self.weights.config)
        self._head: tuple[object, Linear] = (None, F.relu)
        self._lay_out()

    def refresh(self) -> None:
        self.weights.refresh()
        self._lay_out()

    def _lay_out(self) -> None:
        w, head = self.weights, self.weights.model.lm_head
        self.layers = [laid_out(layer, w.dtype) for layer in w.layers]
        # A frozen head, as beside LoRA, is laid out once.
        frozen = not any(p.requires_grad for p in head.parameters())
        made_of = (w.lm_head.data_ptr(), w.lm_head._version) if frozen else None
        if made_of is None or made_of != self._head[0]:
            self._head = (made_of, product_of(w.lm_head))

    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Tensor:
        w, packed = self.weights, pack(prompts, self.device)
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        s = int(lengths.max())
        at, self.padding = packed_places(packed, lengths)
        kv, d, room = w.kv_heads, w.head_dim, s + max_new_tokens
        shape = (len(w.layers), len(prompts), kv, room, d)
        self.keys, self.values = (
            torch.zeros(shape, dtype=w.dtype, device=self.device) for _ in range(2)
        )
        self.at = s
        self.cos, self.sin = (t[0] for t in rotary(w, torch.arange(room, device=self.device)[None]))
        self.mask = self._mask(s, room)

        def keep(i: int, keys: Tensor, values: Tensor) -> None:
            self.keys[i, :, :, :s] = keys[at].transpose(1, 2)
            self.values[i, :, :, :s] = values[at].transpose(1, 2)

        def last_heads(normed: Tensor) -> tuple[Tensor, ...]:
            queries, keys, values = (
                self.layers[-1].qkv(normed).split([w.heads * d, kv * d, kv * d], -1)
            )
            return queries[packed.ends], keys, values

        states = run_packed(
            self.layers,
            F.embedding(packed.ids, w.embedding),
            rotary(w, packed.positions[None]),
            packed,
            self.heads,
            w.config.rms_norm_eps,
            last_heads,
            keep,
        )
        return self._head[1](rms_norm(states, w.norm, w.config.rms_norm_eps))

    def step(self, tokens: Tensor) -> Tensor:
        w = self.weights
        position = self.at - self.padding
        self.mask[..., self.at] = 0
        cos, sin = self.cos[position], self.sin[position]
        normed, _ = run_layers(
            self.layers,
            F.embedding(tokens, w.embedding),
            w.config.rms_norm_eps,
            lambda i, qkv: self._attend(i, qkv, cos, sin),
            w.norm,
        )
        self.at += 1
        return self._head[1](normed)

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.padding = self.padding[rows]
        self.mask = self.mask[rows]

    def _mask(self, s: int, room: int) -> Tensor:
        """(b, 1, 1, room), what is added to the scores of each row's columns: of `s` for the
        prompts, padding is hidden, and so are all others.
        """
        column = torch.arange(room, device=self.device)
        hidden = (column < self.padding[:, None]) | (column >= s)
        mask = torch.zeros(hidden.shape, dtype=self.weights.dtype, device=self.device)
        return mask.masked_fill_(hidden, float("-inf"))[:, None, None]

    def _attend(self, i: int, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(b, heads * head_dim), and the new keys and values put in layer i's cache."""
        b, w, room = len(qkv), self.weights, self.keys.shape[3]
        end = self.at + 1 if 2 * (self.at + 1) < room else room
        queries, keys, values = self.heads.turned(qkv, cos, sin)
        self.keys[i, :, :, self.at], self.values[i, :, :, self.at] = keys, values
        # A group's heads are its queries: no copy of keys and values for each head.
        grouped = queries.reshape(b, w.kv_heads, w.heads // w.kv_heads, w.head_dim)
        scores = (grouped * self.heads.scale) @ self.keys[i, :, :, :end].transpose(-1, -2)
        scores += self.mask[..., :end]
        mixed = scores.softmax(-1) @ self.values[i, :, :, :end]
        return mixed.view(b, -1)


def packed_places(packed: Packed, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """((b, s) where each row's positions lie in the pack, right-aligned and 0 at padding; (b,) its
    padding).
    """
    rows = [
        torch.cat([torch.arange(span.start, span.stop) for span in spans])
        for spans in packed.at_ends.keys
    ]
    s = int(lengths.max())
    places = torch.stack([F.pad(row, (s - len(row), 0)) for row in rows])
    return places.to(lengths.device), s - lengths


def laid_out(weights: LlamaLayer, dtype: torch.dtype) -> Layer:
    """A layer over copies of its weights in oneDNN's own layout, where it multiplies bf16 on this
    CPU: a third faster for few rows. Elsewhere over the weights themselves, in `dtype` where they
    are quantised.
    """
    qkv, o, pair, of_down = (
        plain(weight, dtype) for weight in (weights.qkv, weights.o, weights.gate_up, weights.down)
    )
    if not lays_out(qkv):
        return layer_of(weights._replace(qkv=qkv, o=o, gate_up=pair, down=of_down))
    gate, up = (blocks_of(part) for part in pair.chunk(2))
    down, product = product_of(of_down), torch.ops.mkldnn._linear_pointwise

    def mlp(x: Tensor) -> Tensor:
        active = product(x, gate, None, "swish", [1.0], "")
        return down(product.binary(x, active, up, None, "mul"))

    return Layer(
        weights.input_norm, product_of(qkv), product_of(o), weights.post_norm, in_parts(mlp)
    )


def lays_out(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def product_of(weight: Tensor) -> Linear:
    """Multiplication with `weight` (out, in), over a copy where `lays_out`."""
    if not lays_out(weight):
        return product_with(weight)
    blocks = blocks_of(weight)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, blocks, None, "none", [], "")


def blocks_of(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(b, s) ids with zeros on the left, and the attention mask, int64."""
    s = max(map(len, prompts))
    ids = torch.tensor([[0] * (s - len(p)) + list(p) for p in prompts], device=device)
    attention = torch.tensor([[0] * (s - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, attention
