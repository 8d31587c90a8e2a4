"""Upstream SARM's own selection score, and rankings of latents side by side; `python -m jobs
select` writes both.

    # (d_sae,), near 1 on chosen texts alone, near -1 on rejected
    s = selection_scores(*summed_latents(ranks, contrast))
    # effect, weight, activity difference and s, each one's top n
    rows = compared_rankings(judged_table)

s = (c - j) / (c + j + C), c and j a latent's values summed over chosen and rejected texts, C the
mean of c + j over all latents (https://github.com/schrieffer-z/sarm, steering/). It looks at no
weight: it finds what tells the texts apart, not what is rewarded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sarm.probing.contrast import Contrast
from sarm.probing.effects import by_latent
from sarm.reward_model.interventions import Ranks

Floats = NDArray[np.float64]


def selection_scores(chosen: NDArray[Any], rejected: NDArray[Any]) -> Floats:
    """s of every latent from its values summed over chosen and over rejected texts, (d_sae,) each.

    Give all latents of a SARM: C is their mean. Sums that are all multiplied by one number give the
    same s. Zeros where nothing fires at all.
    """
    c, j = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    smoothing = float((c + j).mean()) if len(c) else 0.0
    below = c + j + smoothing
    return np.divide(c - j, below, out=np.zeros_like(c), where=below != 0)


def summed_latents(ranks: Ranks, contrast: Contrast) -> tuple[Floats, Floats]:
    """(c, j), (d_sae,) each: values summed over a contrast's chosen and rejected texts, every
    prompt counting once.
    """
    z = by_latent(ranks, ranks.values[:, : ranks.k], contrast.rows, 0, ranks.d_sae)
    return z @ contrast.chosen, z @ contrast.rejected


RANKINGS = {
    "effect": "effect on the margin",
    "weight": "weight",
    "difference": "activity difference",
    "upstream_s": "upstream's s",
}
"""What latents are ranked by, and its name in tables."""


def compared_rankings(table: pd.DataFrame, listed: int) -> list[dict[str, Any]]:
    """The first `listed` promoting and harming latents by each of `RANKINGS`: how many of them
    hold up on validation.

    `table` is `sarm.probing.select.judged`'s with a column `upstream_s`. The effect ranks the
    tested candidates of a role, as selection does, on discovery alone; the others rank all latents
    by their own figure, largest for promoting and smallest for harming. `mean_effect_validation` is
    what ablating one of them takes off the validation margin on average.
    """
    by_effect = {
        role: _order(table[table["candidate"] & (table["role"] == role)], "effect", largest=True)
        for role in ("promoting", "harming")
    }
    rows = []
    for ranking in RANKINGS:
        for role in ("promoting", "harming"):
            if ranking == "effect":
                mine = by_effect[role].head(listed)
            else:
                column = {"difference": "delta_z"}.get(ranking, ranking)
                mine = _order(table, column, largest=role == "promoting").head(listed)
            rows.append(
                {
                    "ranking": ranking,
                    "role": role,
                    "latents": [int(latent) for latent in mine["latent"]],
                    "shared_with_effect": int(
                        mine["latent"].isin(by_effect[role].head(listed)["latent"]).sum()
                    ),
                    "tested": int(mine["tested"].sum()),
                    "of_role": int((mine["role"] == role).sum()),
                    "confirmed": int((mine["confirmed"] & (mine["role"] == role)).sum()),
                    "mean_effect_validation": (
                        float(mine["effect_validation"].mean())
                        if mine["effect_validation"].notna().any()
                        else None
                    ),
                }
            )
    return rows


def _order(table: pd.DataFrame, column: str, *, largest: bool) -> pd.DataFrame:
    """Rows by a column, ties by the latent's number."""
    values = table[column].to_numpy(np.float64)
    return table.iloc[np.lexsort([table["latent"].to_numpy(), -values if largest else values])]
