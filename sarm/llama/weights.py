"""A Llama's weights, however they are kept: joined, merged with LoRA, gathered from shards.

    weights = LlamaWeights(model)  # views of the model's own storage wherever that will do
    weights.refresh()              # after the model has changed

`python -m pytest tests/llama/test_generate.py tests/llama/test_graph_decoder.py` decodes with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sarm.llama import fp8
from sarm.llama.fp8 import Fp8, Weight


class LlamaLayer(NamedTuple):
    """One decoder layer's weights; projections that read the same input are one."""

    input_norm: Tensor
    qkv: Weight
    o: Weight
    post_norm: Tensor
    gate_up: Weight
    down: Weight


class LlamaWeights:
    """A Llama's weights as decoding wants them: the model's own storage wherever that will do,
    else copies.

    Copies are made of what LoRA changes (merged here, the model is left alone), of what ZeRO-3
    partitions, and of projections to be fused whose weights do not lie side by side. `refresh`
    writes to the same addresses again, so that a CUDA graph which reads them stays true.

    `quantised`: the layers' projections are copies in fp8 (`sarm/llama/fp8.py`), of the merged
    weights where there is LoRA. Norms, embedding and head are as ever: the head has a fourteenth of
    an 8B policy's weights, and in fp8 half of the variance of its log-probabilities' error.
    """

    def __init__(self, model: nn.Module, *, quantised: bool = False) -> None:
        self.model: Any = base_model(model)
        self.config, self.quantised = self.model.config, quantised
        self._copies: dict[str, Weight] = {}
        self._lay: list[int] = []
        self.refresh()

    @staticmethod
    def knows(model: nn.Module) -> bool:
        """Whether this is a Llama, with LoRA or without, that is computed as here and in
        the learner.
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
        weights = (
            self.embedding,
            self.norm,
            self.lm_head,
            *(w for layer in self.layers for w in layer),
        )
        return tuple(t.data_ptr() for w in weights for t in fp8.tensors_of(w))

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
                self._multiplied(
                    f"{name}.qkv", attention.q_proj, attention.k_proj, attention.v_proj
                ),
                self._multiplied(f"{name}.o", attention.o_proj),
                self._joined(f"{name}.post_norm", layer.post_attention_layernorm),
                self._multiplied(f"{name}.gate_up", mlp.gate_proj, mlp.up_proj),
                self._multiplied(f"{name}.down", mlp.down_proj),
            )

    def _multiplied(self, name: str, *modules: Any) -> Weight:
        """As `_joined`, in fp8 where quantised."""
        if not self.quantised:
            return self._joined(name, *modules)
        whole = _view(modules)
        if whole is None:
            whole = _room(modules)
            _merge(modules, whole)
        if name not in self._copies:
            self._copies[name] = fp8.empty_like(whole)
        copy = cast(Fp8, self._copies[name])
        fp8.quantise(whole, copy)
        return copy

    def _joined(self, name: str, *modules: Any) -> Tensor:
        """The modules' weights one below another."""
        view = _view(modules)
        if view is not None:
            return view
        if name not in self._copies:
            self._copies[name] = _room(modules)
        copy = cast(Tensor, self._copies[name])
        _merge(modules, copy)
        return copy


def _view(modules: Sequence[Any]) -> Tensor | None:
    """The modules' own weights, one below another; None where they lie elsewhere, or are to be
    merged.
    """
    weights = [_base_weight(m) for m in modules]
    if any(hasattr(w, "ds_id") or _adapters(m) for m, w in zip(modules, weights, strict=True)):
        return None
    return side_by_side(weights)


def _room(modules: Sequence[Any]) -> Tensor:
    """Of the modules' weights, one below another."""
    weights = [_base_weight(m) for m in modules]
    return weights[0].new_empty(sum(w.shape[0] for w in weights), *weights[0].shape[1:])


def _merge(modules: Sequence[Any], into: Tensor) -> None:
    """The modules' weights, one below another: W + scaling·B·A, one matrix product an adapter,
    added up in float32 inside it.
    """
    weights = [_base_weight(m) for m in modules]
    for part, module, weight in zip(
        into.split([w.shape[0] for w in weights]), modules, weights, strict=True
    ):
        part.copy_(weight)
        for name in _adapters(module):
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            part.addmm_(b.to(part.dtype), a.to(part.dtype), alpha=module.scaling[name])


def _base_weight(module: Any) -> Tensor:
    return (module.base_layer if hasattr(module, "get_delta_weight") else module).weight


def _adapters(module: Any) -> list[str]:
    """The LoRA adapters that are on."""
    return (
        []
        if not hasattr(module, "get_delta_weight") or module.disable_adapters
        else list(module.active_adapters)
    )


def rotary(weights: LlamaWeights, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (..., s, head_dim) at `positions` (..., s), in the weights' dtype."""
    # Past the module's hooks: ZeRO 3 would record calls whose number differs from rank to rank.
    return weights.model.model.rotary_emb.forward(weights.embedding, positions)


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


def base_model(model: Any) -> Any:
    """Without peft's wrapping; its layers stay wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# --- weights side by side in memory


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
