"""A Llama's layers for inference, the one definition that packed scoring, the reading of prompts
and both decoders share.

    normed, x = run_layers(layers, x, eps, attend, following=weights.norm)

What differs between them, the keys that a position sees and where they lie, is `attend`. Where the
projections carry gradients, so does the result; the learner's layers, which write their gradients
out, are apart (sarm/ppo/learner/layers.py).

Notation: n positions of all rows, d the model's width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sarm.llama.elementwise import add_rms_norm, rms_norm, silu_mul
from sarm.llama.fp8 import Weight, product
from sarm.llama.weights import LlamaLayer

MLP_TOKENS = 16384
"""Positions that go through an MLP at once: its wide middle sets the peak of memory."""

Linear = Callable[[Tensor], Tensor]
"""(n, in) to (n, out)."""
Attend = Callable[[int, Tensor], Tensor]
"""The layer's number, and queries, keys and values (n, (heads + 2 kv) * head_dim) as projected, to
what attention mixes, (n, heads * head_dim).
"""


class Layer(NamedTuple):
    input_norm: Tensor
    qkv: Linear
    o: Linear
    post_norm: Tensor
    mlp: Linear


def layer_of(weights: LlamaLayer) -> Layer:
    return Layer(
        weights.input_norm,
        product_with(weights.qkv),
        product_with(weights.o),
        weights.post_norm,
        gated_mlp(product_with(weights.gate_up), product_with(weights.down)),
    )


def product_with(weight: Weight) -> Linear:
    if isinstance(weight, Tensor):
        return partial(F.linear, weight=weight)
    return partial(product, weight=weight)


def gated_mlp(gate_up: Linear, down: Linear) -> Linear:
    return in_parts(lambda x: down(silu_mul(gate_up(x))))


def in_parts(mlp: Linear) -> Linear:
    """The same, for some positions at a time."""

    def whole(x: Tensor) -> Tensor:
        if len(x) <= MLP_TOKENS:
            return mlp(x)
        return torch.cat([mlp(part) for part in x.split(MLP_TOKENS)])

    return whole


def run_layers(
    layers: Sequence[Layer], x: Tensor, eps: float, attend: Attend, following: Tensor
) -> tuple[Tensor, Tensor]:
    """The residual stream (n, d) through the layers: (normed by `following`, the weight of the
    next norm; as it is).
    """
    norms = [*(layer.input_norm for layer in layers), following]
    normed = rms_norm(x, norms[0], eps)
    for i, (layer, (_, after)) in enumerate(zip(layers, pairwise(norms), strict=True)):
        mixed = attend(i, layer.qkv(normed))
        normed, x = add_rms_norm(*after_attention(layer, mixed, x, eps), after, eps)
    return normed, x


def after_attention(layer: Layer, mixed: Tensor, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(what the MLP adds, the residual stream to which it adds that), of what attention mixed and
    the residual stream before it.
    """
    normed, x = add_rms_norm(layer.o(mixed), x, layer.post_norm, eps)
    return layer.mlp(normed), x
