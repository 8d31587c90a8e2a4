"""Which latents resemble one another: by the cosine of their decoder directions, and by how often
they fire on the same texts. Pure.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sarm.reward_model.interventions import Ranks

MOST = 5


def by_direction(
    latents: list[int], directions: NDArray[np.float32], most: int = MOST
) -> dict[int, list[dict[str, Any]]]:
    """The latents whose unit directions (d_sae, d_in) have the largest |cosine| with each."""
    cosines = directions[latents] @ directions.T
    found = {}
    for latent, row in zip(latents, cosines, strict=True):
        row[latent] = 0.0
        nearest = np.argsort(-np.abs(row), kind="stable")[:most]
        found[latent] = [{"latent": int(i), "cosine": float(row[i])} for i in nearest if row[i]]
    return found


def by_firing(
    latents: list[int], ranks: Ranks, most: int = MOST
) -> dict[int, list[dict[str, Any]]]:
    """The latents that fire (z > 0) on the same texts as each: the largest phi, which is the
    correlation of the two indicators, with the number of texts on which both fire.
    """
    n, k, d_sae = len(ranks.indices), ranks.k, ranks.d_sae
    indices = np.where(ranks.values[:, :k] > 0, ranks.indices[:, :k], d_sae)
    counts = np.bincount(indices.ravel(), minlength=d_sae + 1)[:d_sae].astype(float)
    found = {}
    for latent in latents:
        mine = (indices == latent).any(1)
        m = float(mine.sum())
        both = np.bincount(indices[mine].ravel(), minlength=d_sae + 1)[:d_sae].astype(float)
        spread = np.sqrt(m * (n - m) * counts * (n - counts))
        phi = np.divide(n * both - m * counts, spread, out=np.zeros(d_sae), where=spread > 0)
        phi[latent] = 0.0
        nearest = np.argsort(-phi, kind="stable")[:most]
        found[latent] = [
            {"latent": int(i), "phi": float(phi[i]), "both": int(both[i])}
            for i in nearest
            if phi[i] > 0
        ]
    return found
