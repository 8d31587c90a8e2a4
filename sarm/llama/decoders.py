"""Decoders: a policy, its cache, and the loop that appends one token after another.

    decoder = decoder_for(policy)
    decoded = decoder.decode(prompts, noise, Sampling(max_new_tokens=64, temperature=1.0, top_p=1.0, stops=(2,)), rows=64)

`CacheDecoder` takes any causal model of transformers, `LlamaDecoder` Llama anywhere,
`graph_decoder.GraphDecoder` Llama on a GPU. `python -m pytest tests/llama/test_generate.py`
compares each with `generate` of transformers.

Notation: b rows, s positions of one forward, t response positions, v the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

from sarm.llama.packed import side_by_side
from sarm.llama.sampling import Sampled, sample
from sarm.philox import uniforms

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
        rows: int,
        progress: Progress | None = None,
    ) -> Decoded:
        """A response to each prompt, at most `rows` at once; `noise` (n,) int64 keys as of
        `sampling.row_keys`.
        """

    def refresh(self) -> None:
        """Take over the model's present weights. A collective under ZeRO-3."""


def decoder_for(model: nn.Module) -> Decoder:
    """The quickest decoder that knows the model."""
    if LlamaWeights.knows(model):
        if next(model.parameters()).device.type == "cuda":
            # Triton's, which a machine without GPUs need not have
            from sarm.llama.graph_decoder import GraphDecoder

            return GraphDecoder(model)
        return LlamaDecoder(model)
    return CacheDecoder(model)


# --- one forward a token, on any device
# -------------------------------------------------------------------------------


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
        rows: int,
        progress: Progress | None = None,
    ) -> Decoded:
        """`Decoder.decode`: rows of similar length at a time."""
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
# ------------------------------------------------------------------------------------------------------------


class LlamaLayer(NamedTuple):
    """One decoder layer's weights; projections that read the same input are one."""

    input_norm: Tensor
    qkv: Tensor
    o: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


class LlamaWeights:
    """A Llama's weights as decoding wants them: the model's own storage wherever that will do,
    else copies.

    Copies are made of what LoRA changes (merged here, the model is left alone), of what ZeRO-3
    partitions, and of projections to be fused whose weights do not lie side by side. `refresh`
    writes to the same addresses again, so that a CUDA graph which reads them stays true.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = base_model(model)
        self.config = self.model.config
        self._copies: dict[str, Tensor] = {}
        self._lay: list[int] = []
        self.refresh()

    @staticmethod
    def knows(model: nn.Module) -> bool:
        """Whether this is a Llama, with LoRA or without, that is computed as here and in
        `layers.py`.
        """
        base: Any = base_model(model)
        if type(base) is not LlamaForCausalLM:
            return False
        config = base.config
        turning = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
        # Dynamic rotation looks at each batch's length on the host, and depends on what came
        # before.
        return (
            config.hidden_act == "silu"
            and not config.attention_bias
            and not config.mlp_bias
            and turning != "dynamic"
        )

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.config.num_key_value_heads

    @property
    def head_dim(self) -> int:
        return (
            getattr(self.config, "head_dim", None)
            or self.config.hidden_size // self.config.num_attention_heads
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def addresses(self) -> tuple[int, ...]:
        """Where every weight lies: a graph captured at other addresses reads stale ones."""
        return tuple(
            w.data_ptr()
            for w in (
                self.embedding,
                self.norm,
                self.lm_head,
                *(w for layer in self.layers for w in layer),
            )
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the copies up to date. A collective under ZeRO-3, whose partitions it gathers
        layer by layer.
        """
        lie = [p.data_ptr() for p in self.model.parameters()]
        if lie == self._lay and not self._copies:
            return  # the model's own weights, where they were
        self._lay = lie
        trunk = self.model.model
        self.layers = [self._layer(f"{i}", layer) for i, layer in enumerate(trunk.layers)]
        with gathered(trunk.norm, trunk.embed_tokens, self.model.lm_head):
            self.norm, self.embedding = (
                self._joined("norm", trunk.norm),
                self._joined("embedding", trunk.embed_tokens),
            )
            tied = self.model.lm_head.weight is trunk.embed_tokens.weight
            self.lm_head = self.embedding if tied else self._joined("lm_head", self.model.lm_head)

    def _layer(self, name: str, layer: Any) -> LlamaLayer:
        attention, mlp = layer.self_attn, layer.mlp
        with gathered(layer):
            return LlamaLayer(
                self._joined(f"{name}.input_norm", layer.input_layernorm),
                self._joined(f"{name}.qkv", attention.q_proj, attention.k_proj, attention.v_proj),
                self._joined(f"{name}.o", attention.o_proj),
                self._joined(f"{name}.post_norm", layer.post_attention_layernorm),
                self._joined(f"{name}.gate_up", mlp.gate_proj, mlp.up_proj),
                self._joined(f"{name}.down", mlp.down_proj),
            )

    def _joined(self, name: str, *modules: Any) -> Tensor:
        """The modules' weights one below another."""
        weights = [_base_weight(m) for m in modules]
        if not any(
            hasattr(w, "ds_id") or _adapters(m) for m, w in zip(modules, weights, strict=True)
        ):
            view = side_by_side(weights)
            if view is not None:
                return view
        rows = sum(w.shape[0] for w in weights)
        if name not in self._copies:
            self._copies[name] = torch.empty(
                rows, *weights[0].shape[1:], dtype=weights[0].dtype, device=weights[0].device
            )
        copy = self._copies[name]
        for part, module, weight in zip(
            copy.split([w.shape[0] for w in weights]), modules, weights, strict=True
        ):
            _merge(part, module, weight)
        return copy


def _base_weight(module: Any) -> Tensor:
    return (module.base_layer if hasattr(module, "get_delta_weight") else module).weight


def _adapters(module: Any) -> list[str]:
    """The LoRA adapters that are on."""
    return (
        []
        if not hasattr(module, "get_delta_weight") or module.disable_adapters
        else list(module.active_adapters)
    )


def _merge(into: Tensor, module: Any, weight: Tensor) -> None:
    """W + scaling·B·A, one matrix product an adapter, added up in float32 inside it."""
    into.copy_(weight)
    for name in _adapters(module):
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        into.addmm_(b.to(into.dtype), a.to(into.dtype), alpha=module.scaling[name])


class LlamaDecoder(StepDecoder):
    """Llama with fused projections and a preallocated cache.

    On two CPU cores and a 135M model it takes two thirds of the time of the model's own forward,
    most of which is Python between small kernels.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights = LlamaWeights(model)
        self.device = next(model.parameters()).device

    def refresh(self) -> None:
        self.weights.refresh()

    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Tensor:
        w = self.weights
        ids, attention = left_padded(prompts, self.device)
        b, s = ids.shape
        self.at, self.padding = 0, s - attention.sum(1)
        self.key_mask = F.pad(attention.bool(), (0, max_new_tokens), value=True)
        shape = (len(w.layers), b, w.kv_heads, s + max_new_tokens, w.head_dim)
        self.keys, self.values = (
            torch.zeros(shape, dtype=w.dtype, device=self.device) for _ in range(2)
        )
        return self._forward(ids)

    def step(self, tokens: Tensor) -> Tensor:
        return self._forward(tokens[:, None])

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.padding, self.key_mask = self.padding[rows], self.key_mask[rows]

    def _forward(self, ids: Tensor) -> Tensor:
        """Append `ids` (b, s); (b, v) logits after the last."""
        w, s, eps = self.weights, ids.shape[1], self.weights.config.rms_norm_eps
        positions = torch.arange(self.at, self.at + s, device=self.device)
        x = F.embedding(ids, w.embedding)
        cos, sin = rotary(w, (positions[None] - self.padding[:, None]).clamp(min=0))
        mask = self._mask(positions)
        for i, layer in enumerate(w.layers):
            x = x + F.linear(
                self._attend(
                    i, F.linear(rms_norm(x, layer.input_norm, eps), layer.qkv), cos, sin, mask
                ),
                layer.o,
            )
            gate, up = F.linear(rms_norm(x, layer.post_norm, eps), layer.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        self.at += s
        return F.linear(rms_norm(x[:, -1], w.norm, eps), w.lm_head)

    def _mask(self, positions: Tensor) -> Tensor:
        """(b, 1, s, keys) bool. A padded position sees itself: a row that sees nothing would be
        NaN.
        """
        end = self.at + len(positions)
        columns = torch.arange(end, device=self.device)
        causal = columns <= positions[:, None]
        return (causal & self.key_mask[:, None, None, :end]) | (columns == positions[:, None])

    def _attend(self, i: int, qkv: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """(b, s, heads * head_dim), and the new keys and values put in layer i's cache."""
        b, s, _ = qkv.shape
        heads, kv, d = self.weights.heads, self.weights.kv_heads, self.weights.head_dim
        qkv = qkv.view(b, s, heads + 2 * kv, d).transpose(1, 2)
        qk = rotated(qkv[:, : heads + kv], cos[:, None], sin[:, None])
        end = self.at + s
        self.keys[i, :, :, self.at : end], self.values[i, :, :, self.at : end] = (
            qk[:, heads:],
            qkv[:, heads + kv :],
        )
        keys, values = self.keys[i, :, :, :end], self.values[i, :, :, :end]
        if s == 1:  # a group's heads as its queries: no copy of keys and values for each head
            out = F.scaled_dot_product_attention(
                qk[:, :heads].reshape(b, kv, heads // kv, d), keys, values, attn_mask=mask
            )
            return out.reshape(b, 1, heads * d)
        out = F.scaled_dot_product_attention(
            qk[:, :heads], keys, values, attn_mask=mask, enable_gqa=heads != kv
        )
        return out.transpose(1, 2).reshape(b, s, heads * d)


def rotary(weights: LlamaWeights, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (..., s, head_dim) at `positions` (..., s), in the weights' dtype."""
    # Past the module's hooks: ZeRO 3 would record calls whose number differs from rank to rank.
    return weights.model.model.rotary_emb.forward(weights.embedding, positions)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


# --- a model's weights, however they are kept
# --------------------------------------------------------------------------


def merged_weight(linear: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A projection's weight with its active LoRA adapters merged; added up in float32, in `dtype`
    or the weight's own.
    """
    weight = _base_weight(linear)
    if not _adapters(linear):
        return weight
    return (weight.float() + sum(linear.get_delta_weight(a).float() for a in _adapters(linear))).to(
        dtype or weight.dtype
    )


def gathered(*modules: nn.Module) -> AbstractContextManager[Any]:
    """Within, the modules' parameters are whole; of use under ZeRO-3, where each rank keeps a
    part. A collective.
    """
    sharded = [p for m in modules for p in m.parameters() if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(b, s) ids with zeros on the left, and the attention mask, int64."""
    s = max(map(len, prompts))
    ids = torch.tensor([[0] * (s - len(p)) + list(p) for p in prompts], device=device)
    attention = torch.tensor([[0] * (s - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, attention


def base_model(model: Any) -> Any:
    """Without peft's wrapping; its layers stay wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
