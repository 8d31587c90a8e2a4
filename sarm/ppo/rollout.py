"""Sampling from a policy: our own decoding loop, and the log-probabilities of what was sampled.

    rollout = generate(model, prompts, keys=ids, max_new_tokens=64, temperature=1.0, top_p=1.0, seed=0, eos_ids=..., pad_id=...)

The noise behind a token depends on the seed, the step, the prompt's key and the position in the response, never on the
rank, row or batch that the prompt falls in. `python -m pytest tests/test_rollout.py` compares with `generate` of
transformers and with softmax.

Notation: b rows, s positions of one forward, t response positions, v the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerBase

from sarm.ppo.objective import logprobs_from_hidden

KEEP_SHARE = 0.75
"""Finished rows are dropped once no more than this share is alive: dropping copies the cache."""


class Rollout(NamedTuple):
    """Of b prompts, in the order given; on the CPU."""

    prompts: list[list[int]]
    responses: Tensor
    """(b, t) int64, right-padded; a stop token is part of the response."""
    mask: Tensor
    """(b, t) bool, True at response tokens."""
    logprobs: Tensor
    """(b, t) float32, of the sampled tokens under softmax(logits / temperature), before top-p; 0 at padding."""
    truncated: Tensor
    """(b,) bool: no stop token within max_new_tokens."""

    def ids(self, row: int) -> list[int]:
        """A row's response tokens."""
        return self.responses[row][self.mask[row]].tolist()


# --- from messages to tokens and back ---------------------------------------------------------------------------------


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    """The prompt under the chat template, the assistant's turn opened."""
    return list(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False))


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a response: the generation config's, and the tokenizer's own."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None}))


def response_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """What the response says, special tokens left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


# --- counter-based noise ----------------------------------------------------------------------------------------------


def row_keys(seed: int, step: int, keys: Sequence[str]) -> Tensor:
    """(b,) int64: where each row's stream of random numbers begins."""
    digests = (hashlib.sha256(f"{seed}/{step}/{key}".encode()).digest() for key in keys)
    return torch.tensor([int.from_bytes(d[:8], "little", signed=True) for d in digests], dtype=torch.int64)


def uniforms(keys: Tensor, position: int) -> Tensor:
    """(b,) float64 in [0, 1): SplitMix64 (Steele et al. 2014), seeded with the key, at `position` of its stream."""
    mix1, mix2 = -4658895280553007687, -7723592293110705685  # the usual constants, as signed numbers
    z = keys + _signed(0x9E3779B97F4A7C15 * (position + 1))  # int64 wraps around, as the algorithm wants
    z = (z ^ _shift_right(z, 30)) * mix1
    z = (z ^ _shift_right(z, 27)) * mix2
    z = z ^ _shift_right(z, 31)
    # 52 bits: the largest value times any sum stays below that sum after rounding.
    return _shift_right(z, 12).double() * 2.0**-52


def _signed(x: int) -> int:
    """The number of the lower 64 bits."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


class Sampled(NamedTuple):
    tokens: Tensor
    """(b,) int64."""
    logprobs: Tensor
    """(b,) float32."""


def sample(logits: Tensor, u: Tensor, temperature: float, top_p: float) -> Sampled:
    """One token a row from `logits` (b, v) by inverse CDF at `u` (b,); greedy at temperature 0.

    The cumulative sum runs in float64, so a token's chance is its softmax probability to about 1e-7. top-p keeps the
    smallest set of most likely tokens whose probability reaches top_p, ties going to the lower id.
    """
    log_p = F.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = log_p.argmax(-1)
    else:
        p = log_p.exp().double()
        if top_p < 1:
            ordered, order = p.sort(dim=-1, descending=True, stable=True)
            p = torch.zeros_like(p).scatter(1, order, torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0))
        c = p.cumsum(-1)
        tokens = torch.searchsorted(c, (u * c[:, -1])[:, None], right=True).squeeze(1)
        tokens = tokens.clamp(max=logits.shape[1] - 1)  # beyond it where logits are NaN, which the log-probability then tells
    return Sampled(tokens, log_p.gather(1, tokens[:, None]).squeeze(1))


# --- decoders: a model and its cache, one step at a time --------------------------------------------------------------


class Decoder(Protocol):
    """What the decoding loop needs of a model. A decoder holds one batch's cache at a time."""

    device: torch.device

    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Tensor:
        """Read the prompts; (b, v) logits of each one's first response token."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append `tokens` (b,); (b, v) logits of the next ones."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (int64) only."""


def decoder_for(model: nn.Module) -> Decoder:
    """The quickest decoder that knows the model. A LlamaDecoder copies the weights: `refresh()` it when they change."""
    return LlamaDecoder(model) if LlamaDecoder.knows(model) else CacheDecoder(model)


class CacheDecoder:
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
        out = self.model(input_ids=ids, attention_mask=self.attention, position_ids=positions, cache=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]


class _Layer(NamedTuple):
    """One decoder layer's weights; projections that read the same input are fused."""

    input_norm: Tensor
    qkv: Tensor
    o: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


class LlamaDecoder:
    """Llama with fused projections and a preallocated cache; LoRA is merged into the copy, the model is left alone.

    On two CPU cores and a 135M model it takes two thirds of the time of the model's own forward, most of which is
    Python between small kernels.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = base_model(model)
        self.config = self.model.config
        self.device = next(model.parameters()).device
        self.refresh()

    @staticmethod
    def knows(model: nn.Module) -> bool:
        base: Any = base_model(model)
        return type(base) is LlamaForCausalLM and base.config.hidden_act == "silu" and not base.config.attention_bias and not base.config.mlp_bias

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's present weights. A collective under ZeRO-3, whose partitions it gathers layer by layer."""
        trunk = self.model.model
        self.layers = [self._fused(layer) for layer in trunk.layers]
        with gathered(trunk.norm, trunk.embed_tokens, self.model.lm_head):
            self.norm, self.embedding = _own(trunk.norm.weight), _own(trunk.embed_tokens.weight)
            tied = self.model.lm_head.weight is trunk.embed_tokens.weight
            self.lm_head = self.embedding if tied else _own(self.model.lm_head.weight)

    def _fused(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        with gathered(layer):
            return _Layer(
                _own(layer.input_layernorm.weight),
                torch.cat([merged_weight(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]),
                _own(merged_weight(attention.o_proj)),
                _own(layer.post_attention_layernorm.weight),
                torch.cat([merged_weight(p) for p in (mlp.gate_proj, mlp.up_proj)]),
                _own(merged_weight(mlp.down_proj)),
            )

    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Tensor:
        ids, attention = left_padded(prompts, self.device)
        b, s = ids.shape
        self.at, self.padding = 0, s - attention.sum(1)
        self.key_mask = F.pad(attention.bool(), (0, max_new_tokens), value=True)
        shape = (len(self.layers), b, self.config.num_key_value_heads, s + max_new_tokens, self._head_dim())
        self.keys, self.values = (torch.zeros(shape, dtype=self.embedding.dtype, device=self.device) for _ in range(2))
        return self._forward(ids)

    def step(self, tokens: Tensor) -> Tensor:
        return self._forward(tokens[:, None])

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.padding, self.key_mask = self.padding[rows], self.key_mask[rows]

    def _forward(self, ids: Tensor) -> Tensor:
        """Append `ids` (b, s); (b, v) logits after the last."""
        s, eps = ids.shape[1], self.config.rms_norm_eps
        positions = torch.arange(self.at, self.at + s, device=self.device)
        x = F.embedding(ids, self.embedding)
        # Past the module's hooks: ZeRO 3 would record calls whose number differs from rank to rank.
        cos, sin = self.model.model.rotary_emb.forward(x, (positions[None] - self.padding[:, None]).clamp(min=0))
        mask = self._mask(positions)
        for i, layer in enumerate(self.layers):
            x = x + F.linear(self._attend(i, F.linear(_rms_norm(x, layer.input_norm, eps), layer.qkv), cos, sin, mask), layer.o)
            gate, up = F.linear(_rms_norm(x, layer.post_norm, eps), layer.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        self.at += s
        return F.linear(_rms_norm(x[:, -1], self.norm, eps), self.lm_head)

    def _mask(self, positions: Tensor) -> Tensor:
        """(b, 1, s, keys) bool. A padded position sees itself: a row that sees nothing would be NaN."""
        end = self.at + len(positions)
        columns = torch.arange(end, device=self.device)
        causal = columns <= positions[:, None]
        return (causal & self.key_mask[:, None, None, :end]) | (columns == positions[:, None])

    def _attend(self, i: int, qkv: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """(b, s, heads * head_dim), and the new keys and values put in layer i's cache."""
        b, s, _ = qkv.shape
        heads, kv, d = self.config.num_attention_heads, self.config.num_key_value_heads, self._head_dim()
        qkv = qkv.view(b, s, heads + 2 * kv, d).transpose(1, 2)
        qk = _rotated(qkv[:, : heads + kv], cos[:, None], sin[:, None])
        end = self.at + s
        self.keys[i, :, :, self.at : end], self.values[i, :, :, self.at : end] = qk[:, heads:], qkv[:, heads + kv :]
        keys, values = self.keys[i, :, :, :end], self.values[i, :, :, :end]
        if s == 1:  # a group's heads as its queries: no copy of keys and values for each head
            out = F.scaled_dot_product_attention(qk[:, :heads].reshape(b, kv, heads // kv, d), keys, values, attn_mask=mask)
            return out.reshape(b, 1, heads * d)
        out = F.scaled_dot_product_attention(qk[:, :heads], keys, values, attn_mask=mask, enable_gqa=heads != kv)
        return out.transpose(1, 2).reshape(b, s, heads * d)

    def _head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads


def merged_weight(linear: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A projection's weight with its active LoRA adapters merged; added up in float32, in `dtype` or the weight's own."""
    if not hasattr(linear, "get_delta_weight"):  # no layer of peft's
        return linear.weight
    weight = linear.base_layer.weight
    if linear.disable_adapters or not linear.active_adapters:
        return weight
    return (weight.float() + sum(linear.get_delta_weight(a).float() for a in linear.active_adapters)).to(dtype or weight.dtype)


def gathered(*modules: nn.Module) -> AbstractContextManager[Any]:
    """Within, the modules' parameters are whole; of use under ZeRO-3, where each rank keeps a part. A collective."""
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


def _own(weight: Tensor) -> Tensor:
    return weight.detach().clone()


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


# --- the decoding loop ------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: nn.Module | Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    keys: Sequence[str],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    step: int = 0,
    eos_ids: Sequence[int],
    pad_id: int,
    max_rows: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Rollout:
    """One response to each prompt, `max_rows` of similar length at a time.

    `keys` name the rows' noise: the same key, seed and step give the same response in any batch, up to the rounding of
    the model's own arithmetic. Give two samples of one prompt two keys. `progress(done, total)` is called after each batch.
    """
    decoder: Decoder = decoder_for(model) if isinstance(model, nn.Module) else model
    if isinstance(model, nn.Module):
        model.eval()
    responses = torch.full((len(prompts), max_new_tokens), pad_id, dtype=torch.int64)
    logprobs, lengths, truncated = (
        torch.zeros(len(prompts), max_new_tokens),
        torch.zeros(len(prompts), dtype=torch.int64),
        torch.ones(len(prompts), dtype=torch.bool),
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), max_rows):
        rows = order[at : at + max_rows]
        noise = row_keys(seed, step, [keys[i] for i in rows]).to(decoder.device)
        stops = torch.tensor(list(eos_ids), device=decoder.device)
        for t, live, sampled in _decode(decoder, [prompts[i] for i in rows], noise, stops, max_new_tokens, temperature, top_p):
            here = torch.tensor(rows)[live.cpu()]
            tokens = sampled.tokens.cpu()
            responses[here, t], logprobs[here, t], lengths[here] = tokens, sampled.logprobs.cpu(), t + 1
            truncated[here] = ~torch.isin(tokens, stops.cpu())
        if progress:
            progress(min(at + max_rows, len(order)), len(order))
    longest = int(lengths.max()) if len(prompts) else 0
    mask = torch.arange(longest) < lengths[:, None]
    return Rollout([list(p) for p in prompts], responses[:, :longest], mask, logprobs[:, :longest], truncated)


def _decode(
    decoder: Decoder, prompts: Sequence[Sequence[int]], noise: Tensor, stops: Tensor, max_new_tokens: int, temperature: float, top_p: float
) -> Iterator[tuple[int, Tensor, Sampled]]:
    """(position, which rows are alive, their tokens), until the last row stops; dead rows leave the batch in bulk."""
    rows = torch.arange(len(prompts), device=noise.device)
    alive = torch.ones_like(rows, dtype=torch.bool)
    logits = decoder.start(prompts, max_new_tokens)
    for t in range(max_new_tokens):
        sampled = sample(logits, uniforms(noise[rows], t), temperature, top_p)
        yield t, rows[alive], Sampled(sampled.tokens[alive], sampled.logprobs[alive])
        alive = alive & ~torch.isin(sampled.tokens, stops)
        living = int(alive.sum())
        if living == 0 or t + 1 == max_new_tokens:
            return
        tokens = sampled.tokens
        if living <= KEEP_SHARE * len(rows):
            kept = alive.nonzero().squeeze(1)
            decoder.keep(kept)
            rows, alive, tokens = rows[kept], alive[kept], tokens[kept]
        logits = decoder.step(tokens)


# --- the log-probabilities of given responses -------------------------------------------------------------------------


def packs(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, each of at most `tokens` padded tokens or of one row."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


class Teacher(NamedTuple):
    """Prompts and their responses as one right-padded batch; what `forced` makes. Causal attention needs no mask."""

    ids: Tensor
    """(b, s) int64."""
    predicts: Tensor
    """(n,) int64: positions of `ids.flatten()` whose next token is a response token, row by row."""
    labels: Tensor
    """(n,) int64, those tokens."""


def forced(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> Teacher:
    """The batch for teacher forcing."""
    s = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.full((len(prompts), s), pad_id)
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    for row, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        ids[row, : len(p) + len(r)] = torch.tensor([*p, *r])
        predicts[row, len(p) - 1 : len(p) + len(r) - 1] = True
    labels = torch.tensor([token for r in responses for token in r], dtype=torch.int64)
    # As numbers: indexing with booleans on a GPU would wait for it to count them.
    return Teacher(ids.to(device), predicts.flatten().nonzero().squeeze(1).to(device), labels.to(device))


@torch.no_grad()
def response_logprobs(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, temperature: float, tokens_per_batch: int
) -> list[Tensor]:
    """Each response's (t,) float32 log-probabilities, on the CPU; the language-model head sees response positions only."""
    model.eval()
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    device = next(model.parameters()).device
    for batch in packs([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], tokens_per_batch):
        teacher = forced([prompts[i] for i in batch], [responses[i] for i in batch], 0, device)
        base: Any = base_model(model)
        hidden = base.model(input_ids=teacher.ids, use_cache=False).last_hidden_state.flatten(0, 1).index_select(0, teacher.predicts)
        logprobs = logprobs_from_hidden(hidden, base.lm_head, teacher.labels, temperature).logprobs.cpu()
        for i, part in zip(batch, logprobs.split([len(responses[i]) for i in batch]), strict=True):
            found[i] = part
    return found
