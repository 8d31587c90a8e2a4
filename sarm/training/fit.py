"""One SARM from start to end: `fit_layers_and_sae`, then `features` of all texts, then `fit_heads`.

Used once with all training pairs, for what is saved, and once a fold without its prompts, so that
layers, SAE and head that judge a prompt have never seen it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from sarm.config import TrainSarmConfig, UserError
from sarm.reward_model.model import SarmModel
from sarm.training.backbone import train_backbone
from sarm.training.heads import Head, Latents, differences, fit_head, train_head
from sarm.training.pairs import Floats, Ints, Texts
from sarm.training.sae import end_states, endless_states, token_states, train_sae

Progress = Callable[[int, int, str], None]
"""Hears of (done, total, what)."""

START_L2 = 0.01
"""Of the head that the layers' training starts from."""


class Features(NamedTuple):
    """What a model makes of all texts and pairs."""

    latents: Latents
    """Of every text."""
    pair_latents: csr_array
    """(n_pairs, d_sae) float64, chosen less rejected"""
    pair_states: csr_array
    """(n_pairs, d_in) float64 of normalised states, chosen less rejected"""


class Fitted(NamedTuple):
    """Heads, and what they say of every pair."""

    head: Head
    """On the SAE's latents."""
    dense_head: Head
    """Of the same kind on the states themselves: what the SAE costs."""
    margins: Floats
    """(n_pairs,) of the reward, chosen less rejected"""
    dense_margins: Floats
    """(n_pairs,)"""


def fit_layers_and_sae(
    model: SarmModel,
    ids: Sequence[Sequence[int]],
    texts: Texts,
    weights: Floats,
    config: TrainSarmConfig,
    *,
    tokens_per_batch: int,
    seed: int,
    progress: Progress,
) -> None:
    """Fit the model's layers (where `backbone_rank` asks for it) and its SAE in place, to the pairs
    of weight above zero, (n_pairs,). `ids` are the texts' tokens.
    """
    trains = weights > 0
    used = torch.cat([texts.chosen[trains], texts.rejected[trains]]).unique().tolist()
    mine = [ids[row] for row in used]
    if config.backbone_rank:
        before = torch.zeros(len(ids), model.config.hidden_size)
        before[used] = end_states(model, mine, tokens_per_batch)
        train_backbone(
            model,
            ids,
            texts,
            weights,
            fit_head(
                dense_differences(before, texts), weights, START_L2, max_steps=config.head_steps
            ),
            config,
            tokens_per_batch=tokens_per_batch,
            seed=seed,
            progress=lambda i, n: progress(i, n, "layers"),
        )
    states = endless_states(
        lambda: token_states(model, mine, config.positions, tokens_per_batch), model.sae.normalise
    )
    sae = train_sae(
        states,
        model.config.hidden_size,
        config,
        device=model.device,
        seed=seed,
        progress=lambda i, n: progress(i, n, "SAE"),
    )
    # Saved in float16; the head is trained on what the saved SAE gives.
    halved = {
        name: tensor.half().float() if name.endswith(".weight") else tensor
        for name, tensor in sae.state_dict().items()
    }
    model.sae.load_state_dict(halved)


def features(
    model: SarmModel, ids: Sequence[Sequence[int]], texts: Texts, d_sae: int, tokens_per_batch: int
) -> Features:
    """What the model as it is makes of all texts."""
    states = end_states(model, ids, tokens_per_batch)
    latents = sparse_latents(model, states)
    return Features(latents, differences(latents, texts, d_sae), dense_differences(states, texts))


def fit_heads(found: Features, weights: Floats, inner: Ints, config: TrainSarmConfig) -> Fitted:
    """The heads fitted to the pairs of weight above zero, their L2 strengths by cross-validation
    over the folds `inner` (n_pairs,). Raises UserError where too few pairs are left.
    """
    if len(np.unique(inner[weights > 0])) < 2:
        raise UserError(
            "too few pairs are left to train on outside a fold; give sarm_train more prompts or"
            " lower train_sarm.folds"
        )
    head = train_head(found.pair_latents, weights, inner, config)
    dense = train_head(found.pair_states, weights, inner, config)
    return Fitted(head, dense, found.pair_latents @ head.weight, found.pair_states @ dense.weight)


@torch.no_grad()
def sparse_latents(model: SarmModel, states: Tensor) -> Latents:
    """The latents of raw states (n, d_in), on the CPU."""
    parts = [model.sae.encode(part.to(model.device)) for part in states.split(4096)]
    return Latents(
        torch.cat([part.indices.cpu() for part in parts]),
        torch.cat([part.values.cpu().double() for part in parts]),
    )


def dense_differences(states: Tensor, texts: Texts) -> csr_array:
    """Normalised states of chosen texts less those of rejected ones, (n_pairs, d_in) float64."""
    h = states.double()
    h = (h - h.mean(1, keepdim=True)) / (h.std(1, keepdim=True) + 1e-6)
    return csr_array((h[texts.chosen] - h[texts.rejected]).numpy())
