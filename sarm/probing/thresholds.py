"""Thresholds and the rates at which latents exceed them, on discovery's texts:
`resolved_tau(latent, encoded, config.ppo.penalty)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sarm.config import PenaltyConfig, UserError
from sarm.probing.effects import Encoded, values_on


def resolved_tau(latent: int, encoded: Encoded, penalty: PenaltyConfig) -> float:
    """The fixed tau, or the quantile of z over discovery's rejected texts, but no less than 0, the
    z of a latent that is off.
    """
    if penalty.tau is not None:
        return penalty.tau
    assert penalty.tau_quantile is not None
    z = values_on(encoded, "discovery", "rejected", [latent])[:, 0]
    return max(float(np.quantile(z, penalty.tau_quantile)), 0.0)


def firing_rate(encoded: Encoded, latent: int, tau: float) -> float:
    """P(z > tau) on discovery's rejected texts."""
    return float((values_on(encoded, "discovery", "rejected", [latent]) > tau).mean())


def reference_rates(encoded: Encoded, latents: Sequence[int]) -> dict[str, float]:
    """How often each latent fires on discovery's chosen texts, one half added to either count."""
    fires = values_on(encoded, "discovery", "chosen", latents) > 0
    return {
        str(latent): float((n + 0.5) / (len(fires) + 1))
        for latent, n in zip(latents, fires.sum(axis=0), strict=True)
    }


def reward_sd(encoded: Encoded) -> float:
    """Standard deviation of the reward over discovery's texts. Raises UserError where there are
    fewer than two.
    """
    rewards = encoded.texts.loc[encoded.texts["part"] == "discovery", "reward"].to_numpy(
        dtype=np.float64
    )
    if len(rewards) < 2:
        raise UserError(
            f"discovery has {len(rewards)} texts, too few to select latents on; give it a larger"
            " share in data.sources"
        )
    return float(rewards.std(ddof=1))
