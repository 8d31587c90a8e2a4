"""The KL to the reference policy: its estimators, and the controller of its coefficient.

`python -m pytest tests/ppo/test_kl.py` checks both by hand. Where `ppo.kl_in` is `reward`, the
estimate is a cost at each token; where it is `loss`, a term of the loss, with gradient. What is
estimated well and what has the right gradient differ (arXiv 2510.01555), so two pairs are refused
by the config: k1 as a loss, whose gradient has mean 0, and k2 in the reward, which is biased there.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ERROR_CLIP = 0.2
"""Ziegler et al. 2019 (arXiv 1909.08593) clip the controller's proportional error at this."""


def kl_per_token(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: Literal["k1", "k2", "k3"],
    log_ratio_max: float = 20.0,
) -> Tensor:
    """An estimate at each token of KL(policy || reference), from tokens the policy sampled; all of
    one shape.

    k1 = log(pi / ref), which may be negative; k2 = ½ k1², biased, but as a loss its gradient is
    the KL's; k3 = ref / pi - 1 + log(pi / ref), which is not negative (Schulman, "Approximating KL
    divergence"). `log_ratio_max` keeps k3's exponential finite.
    """
    log_ratio = (logprobs - ref_logprobs).clamp(-log_ratio_max, log_ratio_max)
    if estimator == "k1":
        return log_ratio
    return 0.5 * log_ratio.square() if estimator == "k2" else torch.expm1(-log_ratio) + log_ratio


def next_kl_coef(
    coef: float,
    kl: float,
    sequences: int,
    controller: Literal["fixed", "adaptive"],
    target: float,
    horizon: int,
) -> float:
    """The KL coefficient for the next step.

    `kl` is the mean over this step's `sequences` (all ranks) of the KL summed over the response.
    The adaptive controller is that of Ziegler et al. 2019: coef * (1 + clip(kl / target - 1, ±0.2)
    * sequences / horizon).
    """
    if controller == "fixed":
        return coef
    error = min(max(kl / target - 1, -ERROR_CLIP), ERROR_CLIP)
    return coef * (1 + error * sequences / horizon)
