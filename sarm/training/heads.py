"""Bradley-Terry heads on sparse or dense features, their L2 strength by cross-validation, and the
accuracy of pairs judged by heads that have seen none of their prompts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.special import expit
from torch import Tensor

from sarm.config import TrainSarmConfig
from sarm.training.pairs import Floats, Ints, Texts


class Latents(NamedTuple):
    """Sparse latents of n texts, on the CPU."""

    indices: Tensor
    """(n, k) int64"""
    values: Tensor
    """(n, k) float64"""


class Accuracy(NamedTuple):
    """Pair accuracy, half a point for a tie."""

    mean: float
    standard_error: float
    pairs: int
    prompts: int
    folds: tuple[float, ...]
    """Of every fold, where it is a mean over folds."""


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


# Accuracy


def pair_points(margin: Floats) -> Floats:
    """1 where the chosen text scores higher, 1/2 on a tie, 0 otherwise."""
    return (np.sign(margin) + 1) / 2


def fold_accuracy(points: Floats, folds: Ints, prompts: Sequence[str]) -> Accuracy:
    """Mean and standard error over folds of the mean points of a fold's pairs."""
    means = [float(points[folds == fold].mean()) for fold in np.unique(folds)]
    error = float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan
    return Accuracy(float(np.mean(means)), error, len(points), len(set(prompts)), tuple(means))


def clustered_accuracy(
    points: Floats, prompts: Sequence[str], ends: tuple[float, float] = (0.0, 1.0)
) -> Accuracy:
    """Mean points with a standard error clustered by prompt, which is that of half a prompt more at
    either of `ends`, between which points lie: where all agree, few of them are not certain.
    """
    mean, prompt_size = float(points.mean()), len(points) / len(set(prompts))
    count = len(points) + prompt_size
    center = (float(points.sum()) + prompt_size * sum(ends) / 2) / count
    off: dict[str, float] = defaultdict(float)
    for prompt, point in zip(prompts, points.tolist(), strict=True):
        off[prompt] += point - center
    squares = sum(o * o for o in off.values())
    squares += sum((prompt_size * (end - center)) ** 2 for end in ends) / 2
    return Accuracy(mean, math.sqrt(squares) / count, len(points), len(off), ())
