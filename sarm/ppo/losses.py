"""PPO's losses: clipped policy loss, value loss, entropy bonus, KL to the reference.

`python -m pytest tests/ppo/test_losses.py` checks each by hand. Each is a sum over response tokens,
with sums of what is to be logged beside it: the learner divides by the response tokens of the whole
optimizer step, so that neither the number of ranks nor the micro-batch changes the gradient.

Notation: n response tokens of some sequences, one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sarm.ppo.kl import kl_per_token

Sums = dict[str, Tensor]
"""Sums over tokens by metric, each () float64 without gradient. The learner adds those of all
micro-batches and ranks, and counts `tokens`; `means` divides.
"""


class Loss(NamedTuple):
    total: Tensor
    """(), the sum over tokens, with gradient."""
    sums: Sums

    def plus(self, other: Loss, weight: float) -> Loss:
        """This loss and `weight` times the other, whose sums stay as they are."""
        return Loss(self.total + weight * other.total, self.sums | other.sums)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    cliprange_low: float,
    cliprange_high: float,
    dual_clip: float | None,
    log_ratio_max: float,
    importance: Tensor | None = None,
) -> Loss:
    """The clipped surrogate of PPO (arXiv 1707.06347); all tensors (n,).

    A token's loss is max(-A·ratio, -A·clip(ratio, 1 - low, 1 + high)); with a dual clip c (arXiv
    1912.09729) it is at most -A·c where A < 0. Log-ratios beyond ±log_ratio_max are cut there and
    pass no gradient. Last it is multiplied by the token's `importance`, where there is one. Its
    sums go under TRL's metric names.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-log_ratio_max, log_ratio_max)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange_low, 1 + cliprange_high)
    loss = torch.maximum(plain, clipped)
    held = torch.zeros_like(loss, dtype=torch.bool)
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        held = (advantages < 0) & (loss > ceiling)
        loss = torch.where(held, ceiling, loss)
    if importance is not None:
        loss = loss * importance
    return Loss(
        loss.sum(),
        {
            "loss/policy_avg": _sum(loss),
            "policy/approxkl_avg": _sum(0.5 * log_ratio.square()),
            "policy/clipfrac_avg": _sum(clipped > plain),
            "policy/clipfrac_lower_avg": _sum(held),
            "val/ratio": _sum(torch.expm1(log_ratio)),
            "val/ratio_var": _sum(torch.expm1(log_ratio).square()),
        },
    )


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange_value: float
) -> Loss:
    """½·max((v - R)², (clip(v, v_old ± range) - R)²); all tensors (n,)."""
    clipped = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    plain_error, clipped_error = (values - returns).square(), (clipped - returns).square()
    loss = 0.5 * torch.maximum(plain_error, clipped_error)
    return Loss(
        loss.sum(),
        {"loss/value_avg": _sum(loss), "val/clipfrac_avg": _sum(clipped_error > plain_error)},
    )


def entropy_bonus(entropy: Tensor) -> Loss:
    """The tokens' entropies (n,), to be taken with a negative weight."""
    return Loss(entropy.sum(), {"policy/entropy_avg": _sum(entropy)})


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    estimator: Literal["k1", "k2", "k3"],
    log_ratio_max: float,
    importance: Tensor | None = None,
) -> Loss:
    """The KL of the policy that is trained to the reference, weighed by the tokens' `importance`
    where there is one; all (n,).
    """
    kl = kl_per_token(logprobs, ref_logprobs, estimator, log_ratio_max)
    if importance is not None:
        kl = kl * importance
    return Loss(kl.sum(), {"loss/kl_avg": _sum(kl)})


def means(sums: Sequence[Sums]) -> dict[str, float]:
    """Over the tokens of all of one or more `sums`. `val/ratio_var` is over tokens (TRL's is over
    minibatch means).
    """
    names = list(sums[0])
    totals = torch.stack([torch.stack([each[name] for name in names]) for each in sums]).sum(0)
    found = dict(zip(names, totals.tolist(), strict=True))
    tokens = max(found.pop("tokens"), 1.0)
    found = {name: total / tokens for name, total in found.items()}
    found["val/ratio_var"] = max(found["val/ratio_var"] - found["val/ratio"] ** 2, 0.0)
    found["val/ratio"] += 1
    return found


def kl_exceeds(sums: Sums, limit: float | None) -> bool:
    """Whether an update has drifted further than `limit` from the policy that sampled, by
    approxkl.
    """
    if limit is None:
        return False
    return bool(sums["policy/approxkl_avg"] > limit * sums["tokens"])


def _sum(x: Tensor) -> Tensor:
    return x.detach().double().sum()
