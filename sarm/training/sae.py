"""Fit a TopK SAE to a model's states: `train_sae(states, d_in, settings, ...)`.

The loss, its revival of dead latents, the optimizer and its schedule are SAELens's
`TopKTrainingSAE` and `SAETrainer` (6.54), with which `tests/training/test_sae.py` compares it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sarm.config import TrainSarmConfig
from sarm.reward_model.model import SarmModel
from sarm.reward_model.sae import TopKSae

KEPT_BYTES = 4 * 2**30
"""Activations up to this size are kept after the first pass over the texts; beyond it they are
computed anew in each.
"""

BUFFERED_BATCHES = 64
"""Batches' worth of activations among which a batch is drawn."""

DECODER_INIT_NORM = 0.1

Progress = Callable[[int, int], None]
"""Hears of (done, total)."""


class SaeQuality(NamedTuple):
    """How well the SAE does on states that it was not trained on."""

    fvu: float
    """Squared reconstruction error over squared distance from the mean."""
    l0: float
    """Mean number of latents that are not zero."""
    never_active: int
    """Latents that none of these states activates."""
    negative: float
    """Share of states that keep a value below zero, where SAELens's ReLU would give another code.
    """


# States


def token_states(
    model: SarmModel, ids: Sequence[Sequence[int]], positions: str, tokens_per_batch: int
) -> Iterator[Tensor]:
    """Raw states after the source layer in float32, (tokens, d_in) a batch of conversations, once
    through all of them, in random order.

    `positions` says which tokens: every one ("token"), the reward position alone ("last"), or as
    many of the one kind as of the other ("both").
    """
    batches = list(length_batches([len(i) for i in ids], tokens_per_batch))
    for batch in torch.randperm(len(batches)).tolist():
        h, lengths = padded_states(model, [ids[row] for row in batches[batch]])
        last = h[torch.arange(len(h), device=h.device), lengths - 1]
        if positions == "last":
            yield last
            continue
        every = h[torch.arange(h.shape[1], device=h.device) < lengths.unsqueeze(1)]
        if positions == "token":
            yield every
        else:
            repeated = last.repeat(math.ceil(len(every) / len(last)), 1)[: len(every)]
            yield torch.cat([every, repeated])


@torch.no_grad()
def end_states(model: SarmModel, ids: Sequence[Sequence[int]], tokens_per_batch: int) -> Tensor:
    """The raw states at the end of each row, (n, d_in) float32 on the CPU, in the order given."""
    found = torch.empty(len(ids), model.config.hidden_size)
    for rows in length_batches([len(i) for i in ids], tokens_per_batch):
        h, lengths = padded_states(model, [ids[row] for row in rows])
        found[rows] = h[torch.arange(len(h), device=h.device), lengths - 1].cpu()
    return found


@torch.no_grad()
def padded_states(model: SarmModel, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The bare residual stream after the source layer, (n, longest, d_in) float32, and the rows'
    lengths (n,).

    On a GPU in bfloat16 arithmetic. Padding lies behind what is read, so causal attention needs no
    mask.
    """
    device = model.device
    padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        # The model's final norm is the identity.
        h = model.model(input_ids=padded.to(device), use_cache=False).last_hidden_state
    return h.float(), torch.tensor([len(row) for row in rows], device=device)


def length_batches(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Rows in batches of like length, longest first, each padded to at most `tokens_per_batch`
    tokens or of one row.
    """
    rows: list[int] = []
    # Longest first: what does not fit in memory fails at once.
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if rows and lengths[rows[0]] * (len(rows) + 1) > tokens_per_batch:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def endless_states(
    one_pass: Callable[[], Iterator[Tensor]], normalise: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """Normalised states of pass after pass, kept on the device after the first where they fit in
    `KEPT_BYTES`.
    """
    kept: list[Tensor] | None = []
    for states in one_pass():
        states = normalise(states)
        if kept is not None:
            kept.append(states)
            if sum(s.numel() * s.element_size() for s in kept) > KEPT_BYTES:
                kept = None
        yield states
    while True:
        if kept is None:
            for states in one_pass():
                yield normalise(states)
        else:
            for i in torch.randperm(len(kept)).tolist():
                yield kept[i]


def mixed_batches(states: Iterator[Tensor], batch: int, buffered: int) -> Iterator[Tensor]:
    """Batches (batch, d) drawn from a buffer of `buffered` batches that is refilled when half of
    it is used, so that neighbours in a text seldom meet.
    """
    held: list[Tensor] = []
    n = 0
    for piece in states:
        held.append(piece)
        n += len(piece)
        if n < batch * buffered:
            continue
        pool = torch.cat(held)
        pool = pool[torch.randperm(len(pool), device=pool.device)]
        used = batch * max(buffered // 2, 1)
        yield from pool[:used].split(batch)
        held, n = [pool[used:]], len(pool) - used


# The SAE


class Trained(NamedTuple):
    """Parameters while training, with SAELens's shapes."""

    w_enc: Tensor
    """(d_in, d_sae)"""
    b_enc: Tensor
    """(d_sae,)"""
    w_dec: Tensor
    """(d_sae, d_in), rows of any length: a latent counts by its value times its row's length"""
    b_dec: Tensor
    """(d_in,)"""


def sae_loss(weights: Trained, k: int, x: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a batch x (n, d_in), and which latents fired, (d_sae,) bool.

    Squared error, and beside it the dead latents' best guess at the error: `k_aux = d_in / 2` of
    them, counted less where fewer are dead (arXiv 2406.04093, A.2).
    """
    norm = weights.w_dec.norm(dim=-1)
    pre = ((x - weights.b_dec) @ weights.w_enc + weights.b_enc) * norm
    top = pre.topk(k, dim=-1, sorted=False)
    acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    out = (acts / norm) @ weights.w_dec + weights.b_dec
    loss = (out - x).pow(2).sum(-1).mean()
    n_dead = int(dead.sum())
    if n_dead:
        k_aux = min(x.shape[-1] // 2, n_dead)
        silent = torch.where(dead, pre, -torch.inf).topk(k_aux, dim=-1, sorted=False)
        guess = torch.zeros_like(pre).scatter(-1, silent.indices, silent.values)
        error = ((guess / norm) @ weights.w_dec - (x - out).detach()).pow(2).sum(-1).mean()
        loss = loss + min(n_dead / (x.shape[-1] // 2), 1.0) * error
    return loss, (acts != 0).any(0)


def learning_rate_factor(step: int, steps: int) -> float:
    """What step 0, 1, ... has of the full rate: it warms up over a twentieth of the steps, and
    falls to zero over the last fifth.
    """
    warm, decay = steps // 20, steps // 5
    if step < warm:
        return (step + 1) / warm
    return 1 - max(step - (steps - decay), 0) / max(decay, 1)


def train_sae(
    states: Iterator[Tensor],
    d_in: int,
    config: TrainSarmConfig,
    *,
    device: torch.device | str,
    seed: int,
    progress: Progress | None = None,
) -> TopKSae:
    """A TopK SAE fitted to normalised states (any, d_in), with unit decoder rows.

    Kept values are clamped at zero while it trains, as in SAELens, and not afterwards, as in SARM:
    see `SaeQuality.negative`.
    """
    torch.manual_seed(seed)
    batches = mixed_batches(states, config.sae_batch, BUFFERED_BATCHES)
    batch = next(batches)
    rows = nn.functional.normalize(torch.randn(config.d_sae, d_in), dim=-1) * DECODER_INIT_NORM
    weights = Trained(
        *(
            tensor.to(device).requires_grad_()
            for tensor in (
                rows.T.clone(),
                torch.zeros(config.d_sae),
                rows.clone(),
                batch.mean(0).float(),
            )
        )
    )
    optimizer = torch.optim.Adam(weights, lr=config.sae_learning_rate, betas=(0.9, 0.999))
    silent_for = torch.zeros(config.d_sae, device=device)
    for step in range(config.sae_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.sae_learning_rate * learning_rate_factor(step, config.sae_steps)
        # A latent is revived once it has been silent for a tenth of the training.
        dead = silent_for > max(config.sae_steps // 10, 1)
        loss, fired = sae_loss(weights, config.k, batch.to(device), dead)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        silent_for = torch.where(fired, 0.0, silent_for + 1)
        if progress is not None:
            progress(step + 1, config.sae_steps)
        if step + 1 < config.sae_steps:
            batch = next(batches)
    return as_topk_sae(weights, config.k)


@torch.no_grad()
def as_topk_sae(weights: Trained, k: int) -> TopKSae:
    """The same SAE with unit decoder rows, on the CPU in float32."""
    norm = weights.w_dec.norm(dim=-1)
    sae = TopKSae(weights.w_enc.shape[0], len(norm), k)
    sae.load_state_dict(
        {
            "pre_bias": weights.b_dec.cpu(),
            "latent_bias": (weights.b_enc * norm).cpu(),
            "encoder.weight": (weights.w_enc * norm).T.contiguous().cpu(),
            "decoder.weight": (weights.w_dec / norm.unsqueeze(-1)).T.contiguous().cpu(),
        }
    )
    return sae


@torch.no_grad()
def sae_quality(sae: TopKSae, states: Tensor) -> SaeQuality:
    """Reconstruction and sparsity on raw states (n, d_in)."""
    error = variance = active = negative = 0.0
    fired = torch.zeros(sae.encoder.weight.shape[0], dtype=torch.bool, device=states.device)
    mean = sae.normalise(states).mean(0)
    for part in states.split(4096):
        latents, target = sae.encode(part), sae.normalise(part)
        error += float((sae.decode(latents) - target).pow(2).sum())
        variance += float((target - mean).pow(2).sum())
        active += float((latents.values != 0).sum())
        negative += float((latents.values[:, -1] < 0).sum())
        fired[latents.indices[latents.values != 0]] = True
    return SaeQuality(
        error / variance, active / len(states), int((~fired).sum()), negative / len(states)
    )
