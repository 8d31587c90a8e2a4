"""Thresholds for a penalty from how high its latents go: `suggested_taus(encoded, latents,
quantiles)`; select lists them.

`swept(features, point, penalty)` is features.json with the thresholds and weights of one point of a
sweep.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sarm.config import PenaltyConfig, SweepPoint, UserError
from sarm.probing.effects import Encoded, values_on
from sarm.records import Features

QUANTILES = (0.5, 0.7, 0.8, 0.9, 0.95)


def suggested_taus(
    encoded: Encoded, latents: Sequence[int], quantiles: Iterable[float] = ()
) -> list[dict[str, Any]]:
    """For each latent and quantile: tau, and the share of discovery's rejected and chosen texts
    that it would penalise.

    Quantiles are of z over discovery's rejected texts, zeros included; no tau is below 0, the z of
    a latent that is off.
    """
    found = []
    for latent in latents:
        rejected, chosen = (
            values_on(encoded, "discovery", label, [latent])[:, 0]
            for label in ("rejected", "chosen")
        )
        for quantile in sorted({*QUANTILES, *quantiles}):
            tau = max(float(np.quantile(rejected, quantile)), 0.0)
            rates = {
                "rate_rejected": float((rejected > tau).mean()),
                "rate_chosen": float((chosen > tau).mean()) if len(chosen) else None,
            }
            found.append({"latent": int(latent), "quantile": quantile, "tau": tau, **rates})
    return found


def swept(features: Features, point: SweepPoint, penalty: PenaltyConfig) -> Features:
    """features.json as the penalty arm would have it with this tau and alpha. Raises UserError
    where select did not know the quantile.
    """
    alpha = point.alpha * (features.reward_sd if penalty.alpha_unit == "reward_sd" else 1.0)
    taus = (
        {s.latent: s.tau for s in features.tau_suggestions if s.quantile == point.tau}
        if point.is_quantile
        else {}
    )
    penalised = []
    for entry in features.penalised:
        if point.is_quantile and entry.latent not in taus:
            raise UserError(
                f"features.json has no tau of latent {entry.latent} at quantile {point.tau:g};"
                " run select again"
            )
        change = {"tau": taus.get(entry.latent, point.tau), "alpha": alpha}
        penalised.append(entry.model_copy(update=change))
    return features.model_copy(update={"penalised": penalised})
