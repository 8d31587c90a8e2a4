"""What else PPO computes, as pure functions: rewards by token, statistics, the learning rate.

`python -m pytest tests/ppo/test_objective.py` checks each against numbers worked by hand.

Notation: b sequences, t response positions (right-padded). A `mask` is boolean and marks response
tokens, the end-of-turn token among them.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# --- rewards
# ------------------------------------------------------------------------------------------------


def penalise_missing_eos(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """(b,): scores less `penalty` where the response did not end in an end-of-turn token; `ended`
    (b,) bool.
    """
    return torch.where(ended, scores, scores - penalty)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """(b, t): -kl_coef * kl at every response token, and the sequence's score (b,) at its last one
    besides; 0 elsewhere.

    A sequence without response tokens gets its score nowhere.
    """
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    return rewards + torch.where(last_tokens(mask), scores[:, None].to(rewards.dtype), 0.0)


def last_tokens(mask: Tensor) -> Tensor:
    """(b, t) bool: True at each row's last marked position."""
    after = mask.flip(1).cumsum(1).flip(1)
    return mask & (after == 1)


# --- rollouts of another policy than the one that learns
# ------------------------------------------------------------------------------------------------


def importance_weights(logprobs: Tensor, sampled_logprobs: Tensor, cap: float) -> Tensor:
    """exp(logprobs - sampled_logprobs), at most `cap`: how much likelier the policy that learns
    makes a token than the one that sampled it, truncated so that no token outweighs a batch
    (Ionides 2008). All of one shape.
    """
    return (logprobs - sampled_logprobs).exp().clamp(max=cap)


# --- statistics
# ------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Of the marked values, in float64."""

    n: Tensor
    mean: Tensor
    squares: Tensor
    """The sum of squared deviations from the mean."""


def moments(values: Tensor, mask: Tensor) -> Moments:
    """In two passes, so that a large mean costs no digits."""
    marked = values.detach().double()[mask]
    n = marked.new_tensor(float(marked.numel()))
    mean = marked.sum() / n.clamp(min=1)
    return Moments(n, mean, (marked - mean).square().sum())


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """(b, t): the marked values to mean 0 and (population) variance 1; 0 outside the mask."""
    m = moments(values, mask)
    whitened = (values.double() - m.mean) * torch.rsqrt(m.squares / m.n.clamp(min=1) + 1e-8)
    return torch.where(mask, whitened.to(values.dtype), 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over marked positions; NaN where returns do not
    vary.
    """
    of_returns = moments(returns, mask).squares
    of_errors = moments(returns - values, mask).squares
    return float(1 - of_errors / of_returns) if of_returns > 0 else math.nan


class RunningSd(NamedTuple):
    """Mean and standard deviation of all values seen, by the parallel form of Welford's algorithm
    (Chan et al. 1979).

    Plain floats: `_asdict()` is its checkpoint and `RunningSd(**state)` reads it back to the bit.
    """

    n: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """The sum of squared deviations from the mean."""

    def merged(self, other: RunningSd) -> RunningSd:
        n = self.n + other.n
        if n == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * other.n / n
        return RunningSd(
            n, mean, self.squares + other.squares + delta * delta * self.n * other.n / n
        )

    def updated(self, values: Tensor) -> RunningSd:
        """With `values` added."""
        m = moments(values, torch.ones_like(values, dtype=torch.bool))
        return self.merged(RunningSd(float(m.n), float(m.mean), float(m.squares)))

    @property
    def sd(self) -> float:
        """The sample standard deviation; 1 until two different values have been seen, so that
        dividing by it is safe.
        """
        return math.sqrt(self.squares / (self.n - 1)) if self.n > 1 and self.squares > 0 else 1.0


def scaled_rewards(rewards: Tensor, sd: float, clip: float | None) -> Tensor:
    """(b,): rewards / sd, not centred, then cut at ±clip."""
    scaled = rewards / sd
    return scaled if clip is None else scaled.clamp(-clip, clip)


# --- the learning rate
# ------------------------------------------------------------------------------------------------


def learning_rate(
    step: int,
    *,
    steps: int,
    peak: float,
    schedule: Literal["constant", "linear", "cosine"],
    warmup_steps: int = 0,
) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`. Never 0: the first and last steps
    count too.

    Linear warm-up over `warmup_steps`, then constant, linear or cosine decay that would reach 0 at
    `steps`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    left = 1 - (step - warmup_steps) / max(steps - warmup_steps, 1)
    if schedule == "constant":
        return peak
    return peak * left if schedule == "linear" else peak * 0.5 * (1 - math.cos(math.pi * left))
