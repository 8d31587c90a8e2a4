"""Train a SARM on a frozen Llama-family model: the SAE by SAELens, the head by Bradley-Terry
(arXiv 2508.08746).

    python -m jobs train_sarm --config configs/train-smollm2.yaml --run outputs/train-smollm2

Pairs of the `sarm_train` part train; all others only evaluate. Prompts are dealt into folds, and
the head that judges a fold has seen none of its prompts, in whatever source they stand.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.special import expit
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sarm.config import TrainSarmConfig, UserError
from sarm.data.conversations import tokenize_conversation
from sarm.data.datasets import Data, Pair
from sarm.reward_model.model import SarmModel
from sarm.reward_model.sae import TopKSae

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

KEPT_BYTES = 4 * 2**30
"""Activations up to this size are kept after the first pass over the texts; beyond it they are
computed anew in each.
"""

BUFFERED_BATCHES = 64
"""Batches' worth of activations among which SAELens's buffer shuffles."""


Progress = Callable[[int, int], None]
"""Hears of (done, total)."""


class Texts(NamedTuple):
    """The distinct conversations of some pairs, and which of them each pair compares."""

    messages: list[tuple[dict[str, str], ...]]
    chosen: Tensor
    """(n_pairs,) rows of `messages`"""
    rejected: Tensor
    """(n_pairs,)"""


class Latents(NamedTuple):
    """Sparse latents of n texts, on the CPU."""

    indices: Tensor
    """(n, k) int64"""
    values: Tensor
    """(n, k) float64"""


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


class Accuracy(NamedTuple):
    """Pair accuracy, half a point for a tie."""

    mean: float
    standard_error: float
    pairs: int
    prompts: int
    folds: tuple[float, ...]
    """Of every fold, where it is a mean over folds."""


class Folds(NamedTuple):
    """Two independent ways to deal the pairs' prompts out."""

    outer: Ints
    """(n_pairs,) who judges a pair"""
    inner: Ints
    """(n_pairs,) for choosing the L2 strength among training pairs"""


def distinct_texts(pairs: Sequence[Pair]) -> Texts:
    """Each (prompt, response) once, in order of first appearance."""
    rows: dict[tuple[str, str], int] = {}
    messages: list[tuple[dict[str, str], ...]] = []
    sides: tuple[list[int], list[int]] = ([], [])
    for pair in pairs:
        for side, response in zip(sides, (pair.chosen, pair.rejected), strict=True):
            key = (pair.prompt.id, response)
            if key not in rows:
                rows[key] = len(messages)
                messages.append((*pair.prompt.messages, {"role": "assistant", "content": response}))
            side.append(rows[key])
    return Texts(messages, torch.tensor(sides[0]), torch.tensor(sides[1]))


def prompt_folds(data: Data, pairs: Sequence[Pair], folds: int) -> Folds:
    """The folds of every pair's prompt: within a source prompts are dealt out evenly, in the order
    of a hash.
    """
    by_source: dict[str, list[str]] = defaultdict(list)
    for prompt in data.prompts:
        by_source[prompt.source].append(prompt.id)

    def dealt(salt: str) -> Ints:
        fold: dict[str, int] = {}
        for ids in by_source.values():
            ids.sort(key=lambda id_: hashlib.sha256(f"{salt}:{id_}".encode()).hexdigest())
            fold |= {id_: rank % folds for rank, id_ in enumerate(ids)}
        return np.array([fold[pair.prompt.id] for pair in pairs])

    return Folds(dealt("fold"), dealt("inner fold"))


# Activations


def token_states(
    model: SarmModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict[str, str]]],
    config: TrainSarmConfig,
    tokens_per_batch: int,
) -> Iterator[Tensor]:
    """Raw states after the source layer in float32, (tokens, d_in) a batch of conversations, once
    through all of them.

    `config.positions` says which tokens: every one, the reward position alone, or as many of the
    one kind as of the other.
    """
    ids = [
        tokenize_conversation(tokenizer, messages, config.max_length).ids
        for messages in conversations
    ]
    batches = list(length_batches([len(i) for i in ids], tokens_per_batch))
    for batch in torch.randperm(len(batches)).tolist():
        rows = [torch.tensor(ids[row]) for row in batches[batch]]
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        real = torch.arange(padded.shape[1], device=model.device) < lengths.unsqueeze(1)
        with torch.no_grad():
            # The model's final norm is the identity, so this is the bare residual stream; padding
            # lies behind what is read.
            h = model.model(
                input_ids=padded, attention_mask=real, use_cache=False
            ).last_hidden_state.float()
        last = h[torch.arange(len(rows), device=h.device), lengths - 1]
        if config.positions == "last":
            yield last
        elif config.positions == "token":
            yield h[real]
        else:
            every = h[real]
            yield torch.cat(
                [every, last.repeat(math.ceil(len(every) / len(last)), 1)[: len(every)]]
            )


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


# The SAE


def train_sae(
    states: Iterator[Tensor],
    d_in: int,
    config: TrainSarmConfig,
    *,
    device: str,
    seed: int,
    progress: Progress | None = None,
) -> TopKSae:
    """Train a TopK SAE through SAELens on normalised states (any, d_in), and take it over with
    unit decoder rows.

    SAELens clamps kept values at zero, which this project's SAE, like upstream's, does not: see
    `SaeQuality.negative`.
    """
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.mixing_buffer import mixing_buffer
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    batches = mixing_buffer(BUFFERED_BATCHES * config.sae_batch, config.sae_batch, states)
    # States come normalised as SARM does it, whose epsilon is not SAELens's; SAELens is to leave
    # them as they are.
    shape = TopKTrainingSAEConfig(
        d_in=d_in,
        d_sae=config.d_sae,
        k=config.k,
        device=device,
        normalize_activations="none",
        apply_b_dec_to_input=True,
    )
    sae = TopKTrainingSAE(shape)
    first = next(batches)
    with torch.no_grad():
        sae.b_dec.copy_(first.mean(0))

    def counted() -> Iterator[Tensor]:
        yield first
        for step, batch in enumerate(batches, 2):
            if progress is not None:
                progress(min(step, config.sae_steps), config.sae_steps)
            yield batch

    settings = SAETrainerConfig(
        total_training_samples=config.sae_steps * config.sae_batch,
        train_batch_size_samples=config.sae_batch,
        lr=config.sae_learning_rate,
        lr_end=config.sae_learning_rate / 10,
        lr_warm_up_steps=config.sae_steps // 20,
        lr_decay_steps=config.sae_steps // 5,
        # A latent is revived once it has been silent for a tenth of the training.
        dead_feature_window=max(config.sae_steps // 10, 1),
        device=device,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trained = SAETrainer(cfg=settings, sae=sae, data_provider=counted()).fit()
    trained.fold_W_dec_norm()
    ours = TopKSae(d_in, config.d_sae, config.k)
    ours.load_state_dict(
        {
            "pre_bias": trained.b_dec.detach().cpu(),
            "latent_bias": trained.b_enc.detach().cpu(),
            "encoder.weight": trained.W_enc.detach().T.contiguous().cpu(),
            "decoder.weight": trained.W_dec.detach().T.contiguous().cpu(),
        }
    )
    return ours


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


# The head


def differences(latents: Latents, texts: Texts, d_sae: int) -> csr_array:
    """z(chosen) - z(rejected) of every pair, (n_pairs, d_sae) sparse in float64: a head's margins
    are this times its weight.
    """
    n, k = latents.indices.shape
    rows = csr_array(
        (
            latents.values.numpy().ravel(),
            latents.indices.numpy().ravel(),
            np.arange(0, n * k + 1, k),
        ),
        shape=(n, d_sae),
    )
    return rows[texts.chosen.numpy()] - rows[texts.rejected.numpy()]


def pair_weights(pairs: Sequence[Pair]) -> Floats:
    """What each pair counts in the loss, (n_pairs,), adding up to one: sources count alike, and
    prompts within a source.

    So neither the largest source decides, nor the prompts with the most answers.
    """
    per_prompt = Counter((pair.source, pair.prompt.id) for pair in pairs)
    prompts = Counter(source for source, _ in per_prompt)
    return np.array(
        [1 / (len(prompts) * prompts[p.source] * per_prompt[p.source, p.prompt.id]) for p in pairs]
    )


def fit_head(
    differences: csr_array,
    pair_weight: Floats,
    l2: float,
    *,
    max_steps: int,
    start: Floats | None = None,
) -> Floats:
    """The head w, (d_sae,), that minimises `sum_p weight_p softplus(-margin_p) + l2/2 |w|^2`,
    weights scaled to add up to one.

    Convex, so neither `start` nor a seed matters. Pairs of weight zero are left out.
    """
    used = pair_weight > 0
    d, weight = differences[used], pair_weight[used] / pair_weight[used].sum()

    def loss_and_gradient(w: Floats) -> tuple[float, Floats]:
        margin = d @ w
        return float(weight @ np.logaddexp(0, -margin) + l2 / 2 * (w @ w)), l2 * w - d.T @ (
            weight * expit(-margin)
        )

    first = np.zeros(d.shape[1]) if start is None else start
    found = minimize(
        loss_and_gradient,
        first,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_steps, "ftol": 1e-12, "gtol": 1e-7},
    )
    return np.asarray(found.x)


def cross_validated_losses(
    differences: csr_array,
    pair_weight: Floats,
    folds: Ints,
    grid: Sequence[float],
    *,
    max_steps: int,
) -> Floats:
    """The weighted loss of every L2 strength on pairs of weight above zero, each judged by a head
    without its fold, (len(grid),).
    """
    losses = np.zeros(len(grid))
    for fold in np.unique(folds[pair_weight > 0]):
        judged, weight = np.where(folds == fold, pair_weight, 0.0), None
        # From the strongest on: each solution is a good start for the next.
        for i in np.argsort(grid)[::-1]:
            weight = fit_head(
                differences, pair_weight - judged, grid[i], max_steps=max_steps, start=weight
            )
            losses[i] += judged @ np.logaddexp(0, -(differences @ weight))
    return losses / pair_weight.sum()


class Head(NamedTuple):
    """A head and how it was regularised."""

    weight: Floats
    """(d_sae,)"""
    l2: float
    loss: float
    """Cross-validated, at this L2 strength, inside the training pairs."""


def train_head(
    differences: csr_array, pair_weight: Floats, folds: Ints, config: TrainSarmConfig
) -> Head:
    """A head on the pairs of weight above zero, its L2 strength chosen by cross-validation among
    them.
    """
    losses = cross_validated_losses(
        differences, pair_weight, folds, config.head_l2, max_steps=config.head_steps
    )
    l2 = config.head_l2[int(losses.argmin())]
    return Head(
        fit_head(differences, pair_weight, l2, max_steps=config.head_steps), l2, float(losses.min())
    )


class Heads(NamedTuple):
    """The head trained on every training pair, and one a fold that has seen no prompt of it."""

    shipped: Head
    by_fold: list[Head]


def train_heads(
    differences: csr_array,
    pair_weight: Floats,
    folds: Folds,
    config: TrainSarmConfig,
    progress: Progress | None = None,
) -> Heads:
    """`pair_weight` (n_pairs,) is zero for pairs that do not train.

    Raises UserError where a fold leaves nothing to train on.
    """
    heads: list[Head] = []
    for fold in range(-1, config.folds):
        training = np.where(folds.outer == fold, 0.0, pair_weight)
        if len(np.unique(folds.inner[training > 0])) < 2:
            raise UserError(
                f"too few pairs are left to train on outside fold {fold}; give sarm_train more"
                " prompts or lower train_sarm.folds"
            )
        heads.append(train_head(differences, training, folds.inner, config))
        if progress is not None:
            progress(fold + 2, config.folds + 1)
    return Heads(heads[0], heads[1:])


# Accuracy


def pair_points(margin: Floats) -> Floats:
    """1 where the chosen text scores higher, 1/2 on a tie, 0 otherwise."""
    return (np.sign(margin) + 1) / 2


def cross_validated_points(differences: csr_array, heads: Heads, folds: Ints) -> Floats:
    """Every pair's points by the head of its prompt's fold, (n_pairs,)."""
    points = np.stack([pair_points(differences @ head.weight) for head in heads.by_fold])
    return points[folds, np.arange(len(folds))]


def fold_accuracy(points: Floats, folds: Ints, prompts: Sequence[str]) -> Accuracy:
    """Mean and standard error over folds of the mean points of a fold's pairs."""
    means = [float(points[folds == fold].mean()) for fold in np.unique(folds)]
    error = float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan
    return Accuracy(float(np.mean(means)), error, len(points), len(set(prompts)), tuple(means))


def clustered_accuracy(points: Floats, prompts: Sequence[str]) -> Accuracy:
    """Mean points with a standard error clustered by prompt."""
    mean = float(points.mean())
    off: dict[str, float] = defaultdict(float)
    for prompt, point in zip(prompts, points.tolist(), strict=True):
        off[prompt] += point - mean
    return Accuracy(
        mean, math.sqrt(sum(o * o for o in off.values())) / len(points), len(points), len(off), ()
    )
