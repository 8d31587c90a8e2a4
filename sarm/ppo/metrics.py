"""What a step logs of its batch: means as pure functions of what the step computed, under TRL's
names where TRL has one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sarm.llama.generate import Rollout
from sarm.ppo import objective
from sarm.ppo.learner.learner import Logprobs
from sarm.ppo.reward import CompoundReward, Penalised, Scores, fires


def rollout_metrics(rollout: Rollout, logprobs: Logprobs) -> dict[str, float]:
    """Of the responses, and of how well sampler and trainer agree."""
    mask = rollout.mask
    mismatch = (logprobs.old - rollout.logprobs)[mask].abs()
    return {
        "objective/kl": per_sequence(logprobs.old - logprobs.ref, mask),
        "objective/entropy": per_sequence(-logprobs.old, mask),
        "val/num_eos_tokens": float((~rollout.truncated).sum()),
        "response/length": float(mask.sum(1).float().mean()),
        "response/truncated": float(rollout.truncated.float().mean()),
        "rollout/logprob_mismatch": float(mismatch.mean()),
        "rollout/logprob_mismatch_max": float(mismatch.max()),
    }


def critic_metrics(values: Tensor | None, returns: Tensor | None, mask: Tensor) -> dict[str, float]:
    """Of values and returns (B, t); nothing without a critic."""
    if values is None or returns is None:
        return {}
    return {"val/explained_variance": objective.explained_variance(values, returns, mask)}


def score_metrics(
    reward: CompoundReward, scores: Scores, tracked: Sequence[Penalised]
) -> dict[str, float]:
    """What the reward says of its scores, and the rates of tracked latents that it does not
    penalise.
    """
    metrics = reward.metrics(scores)
    monitored = [m for m in tracked if m.latent in reward.monitors]
    if monitored:
        z = scores.monitors_z[:, [reward.monitors.index(m.latent) for m in monitored]]
        rates = fires(z, monitored, reward.kind).float().mean(0).tolist()
        metrics |= {f"rate/{m.latent}": rate for m, rate in zip(monitored, rates, strict=True)}
    return metrics


def per_sequence(of_tokens: Tensor, mask: Tensor) -> float:
    """The mean over sequences of the sum over response tokens of (B, t)."""
    return float(torch.where(mask, of_tokens, 0.0).sum(1).mean())
