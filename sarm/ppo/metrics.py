"""What a step logs of its batch: means as pure functions of what the step computed, under TRL's
names where TRL has one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sarm.config import PpoConfig, UserError
from sarm.data.conversations import spelled_in
from sarm.data.endings import Ending
from sarm.llama.generate import Rollout
from sarm.ppo import objective
from sarm.ppo.learner.learner import Logprobs
from sarm.ppo.reward import CompoundReward, Penalised, Scores, fires

MOST_MISMATCH = 0.2
"""Nats between sampler and trainer, a response token, on average."""


def rollout_metrics(rollout: Rollout, logprobs: Logprobs) -> dict[str, float]:
    """Of the responses, and of how well sampler and trainer agree."""
    mask = rollout.mask
    mismatch = (logprobs.old - rollout.logprobs)[mask].abs()
    return {
        "objective/kl": per_sequence(logprobs.old - logprobs.ref, mask),
        "objective/entropy": per_sequence(-logprobs.old, mask),
        "rollout/logprob_mismatch": float(mismatch.mean()),
        "rollout/logprob_mismatch_max": float(mismatch.max()),
    }


def importance_metrics(rollout: Rollout, logprobs: Logprobs, cap: float) -> dict[str, float]:
    """Of the tokens' importance weights: their mean, which is near 1, the largest before it was
    cut at `cap`, and the share that was.
    """
    mask = rollout.mask
    whole = objective.importance_weights(logprobs.old[mask], rollout.logprobs[mask], math.inf)
    return {
        "rollout/importance_avg": float(whole.clamp(max=cap).mean()),
        "rollout/importance_max": float(whole.max()),
        "rollout/importance_capped": float((whole > cap).float().mean()),
    }


def refuse_quantised(ppo: PpoConfig, step: int, rollout: Rollout, logprobs: Logprobs) -> None:
    """Raises UserError where the quantised policy, which samples, has left the one that learns."""
    nats = rollout_metrics(rollout, logprobs)["rollout/logprob_mismatch"]
    if not nats <= ppo.rollout_mismatch_max:
        raise UserError(
            f"step {step}: the policy and its {ppo.rollout_dtype} copy, which samples, differ by"
            f" {nats:.3g} nats per token on average, more than ppo.rollout_mismatch_max"
            f" {ppo.rollout_mismatch_max:g}: leave ppo.rollout_dtype out, or raise that bound"
        )


def refuse_mismatch(rollout: Rollout, logprobs: Logprobs) -> None:
    """Raises UserError where sampler and trainer, whose weights are the same before training, say
    different things of the same tokens: importance ratios would be noise.
    """
    nats = rollout_metrics(rollout, logprobs)["rollout/logprob_mismatch"]
    if not nats <= MOST_MISMATCH:
        raise UserError(
            f"before training, sampler and trainer differ by {nats:.2f} nats per token on average"
            f" (at most {MOST_MISMATCH} is rounding), so the policy that samples is not the one"
            " that learns: set policy.dtype=float32, or take a family that docs/your-model.md lists"
        )


def ending_metrics(
    sampled: Rollout, endings: Sequence[Ending], tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Of the responses as they were sampled, and of what was scored: `response/cut` at the token
    limit, `response/unended` at neither an end of turn nor a sentence end, `response/spelled` with
    a special token of the SARM's `tokenizer` in its letters, as of a policy that feigns an end.
    """
    return {
        "val/num_eos_tokens": float((~sampled.truncated).sum()),
        "response/length": float(sampled.mask.sum(1).float().mean()),
        "response/scored_length": sum(e.tokens for e in endings) / len(endings),
        "response/cut": float(sampled.truncated.float().mean()),
        "response/unended": sum(not e.ended for e in endings) / len(endings),
        "response/spelled": sum(spelled_in(tokenizer, e.text) > 0 for e in endings) / len(endings),
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
