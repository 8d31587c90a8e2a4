"""The probe's discovery and confirmation again, on other labels, prompts or sources.

    found = discover(encoded, [contrast], config, seed, device)     # or of two sources together
    confirmed = confirm(encoded, found, other, config, device)

What stands beside a selection goes by this: nulls, replication, sensitivity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from sarm.config import Config
from sarm.probing.contrast import Contrast, Floats, Ints
from sarm.probing.effects import Encoded, latent_contributions, tested_latents
from sarm.probing.permutation import FIRST, permutation_p, permutations_needed
from sarm.probing.stats import benjamini_hochberg, holm, partial_conjunction

REPLICATED_P = 0.05


class Found(NamedTuple):
    """One run of the discovery on one contrast; all (d_sae,)."""

    tested: NDArray[np.bool_]
    effect: Floats
    p: Floats
    """NaN where not tested"""
    discovered: NDArray[np.bool_]


def discover(
    encoded: Encoded, contrasts: Sequence[Contrast], config: Config, seed: int, device: str
) -> Found:
    """What the probe does for discovery, on one contrast or on two of which both must show the
    effect; latents that chance matches stop after `FIRST` permutations.
    """
    d_sae = encoded.ranks.d_sae
    tested = tested_latents(encoded.ranks, contrasts, 0, d_sae, config)
    needed = permutations_needed(int(tested.sum()), config.select.fdr)
    effects: list[Floats] = []
    ps: list[Floats] = []
    for contrast in contrasts:
        values = latent_contributions(encoded, contrast, config)
        p = np.full(d_sae, np.nan)
        if tested.any():
            mine = values[np.flatnonzero(tested)]
            p[tested] = permutation_p(mine, contrast, FIRST, needed, seed + len(ps), device)
        effects.append(np.asarray(values @ contrast.labels) / max(contrast.n_prompts, 1))
        ps.append(p)
    p = ps[0]
    if len(ps) == 2:
        p = partial_conjunction(ps[0], ps[1], np.sign(effects[0]) == np.sign(effects[1]))
    prompts = [max(contrast.n_prompts, 1) for contrast in contrasts]
    effect = np.average(effects, axis=0, weights=prompts)
    return Found(tested, effect, p, benjamini_hochberg(p) <= config.select.fdr)


def confirm(
    encoded: Encoded, found: Found, contrast: Contrast, config: Config, device: str
) -> NDArray[np.bool_]:
    """Which discoveries have the same sign and Holm p < 0.05 on another contrast, (d_sae,)."""
    effect, p = tested_again(encoded, np.flatnonzero(found.discovered), contrast, config, device)
    confirmed = np.zeros(len(found.tested), bool)
    confirmed[found.discovered] = (holm(p) < REPLICATED_P) & (
        np.sign(effect) == np.sign(found.effect[found.discovered])
    )
    return confirmed


def tested_again(
    encoded: Encoded, latents: Ints, contrast: Contrast, config: Config, device: str
) -> tuple[Floats, Floats]:
    """Effect and p of some latents on another contrast. One that never fires there has an effect
    of 0 and p 1.
    """
    values = latent_contributions(encoded, contrast, config)[latents]
    effect = np.asarray(values @ contrast.labels) / max(contrast.n_prompts, 1)
    needed = permutations_needed(max(len(latents), 1), REPLICATED_P)
    return effect, permutation_p(values, contrast, FIRST, 20 * needed, config.seed + 7, device)


def rank_correlation(x: Floats, y: Floats) -> float | None:
    """Spearman's; None where it is not defined."""
    if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
        return None
    return float(scipy.stats.spearmanr(x, y).statistic)


def joined(a: Contrast, b: Contrast) -> Contrast:
    """Two contrasts as one; they share no prompt."""
    rows, prompts = (
        np.concatenate([a.rows, b.rows]),
        np.concatenate([a.prompts, b.prompts + a.n_prompts]),
    )
    chosen, rejected = (
        np.concatenate([a.chosen, b.chosen]),
        np.concatenate([a.rejected, b.rejected]),
    )
    return Contrast(rows, prompts, chosen, rejected, a.n_prompts + b.n_prompts)


def of_prompts(contrast: Contrast, some: NDArray[np.bool_]) -> Contrast:
    """The contrast on some of its prompts, (n_prompts,) of bool."""
    mine = some[contrast.prompts]
    number = np.cumsum(some) - 1
    return Contrast(
        contrast.rows[mine],
        number[contrast.prompts[mine]],
        contrast.chosen[mine],
        contrast.rejected[mine],
        int(some.sum()),
    )
