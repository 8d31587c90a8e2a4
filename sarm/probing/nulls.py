"""What a selection would find where there is nothing: matched latents and shuffled labels.

rows = matched_null(table, encoded, data, config)
rows = shuffled_labels(encoded, contrasts, config, device)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sarm.config import Config
from sarm.data.datasets import Data, pairs_in
from sarm.probing.contrast import Contrast, Floats, Ints, permuted_labels
from sarm.probing.effects import PARTS, Encoded, contrast_of, latent_contributions
from sarm.probing.rediscovery import confirm, discover

NULL_DRAWS = 1000
NEAREST = 20
"""Matched latents to draw from, for each confirmed latent."""
FEWEST = 10
"""Prompts in the test part below which no null is compared."""


def held_out_effects(encoded: Encoded, data: Data, config: Config) -> tuple[Floats, int]:
    """The effect of every latent on the test pairs of all sources, (d_sae,), and their prompts."""
    rows = {id_: row for row, id_ in enumerate(encoded.texts["text_id"])}
    contrast = contrast_of(pairs_in(data, "test"), rows)
    values = latent_contributions(encoded, contrast, config)
    return np.asarray(values @ contrast.labels) / max(contrast.n_prompts, 1), contrast.n_prompts


def matched_null(
    table: pd.DataFrame, effect: Floats, prompts: int, config: Config
) -> list[dict[str, Any]]:
    """The confirmed latents of each role against as many others: mean effect (d_sae,) on the test
    part, which neither was chosen by.

    The others pass the same selection but for its significance: tested, candidates of the role, and
    of that sign on validation too; of those the ones most like in activity and |w|. On the texts by
    which the confirmed were chosen they would be ahead even if all effects were noise.
    """
    if prompts < FEWEST:
        return []
    rows, tiny = [], 1e-9
    matched_on = np.log(np.stack([table["density"], table["weight"].abs()], axis=1) + tiny)
    for role in ("promoting", "harming", "misleading"):
        passed = table[table["candidate"] & (table["role"] == role)]
        passed = passed[np.sign(passed["effect_validation"]) == np.sign(passed["effect"])]
        mine = passed.index[passed["confirmed"]].to_numpy(np.int64)
        pool = passed.index[~passed["confirmed"]].to_numpy(np.int64)
        if not len(mine) or len(pool) < len(mine):
            continue
        rng = np.random.default_rng([config.seed, 4])
        observed, nearest = float(effect[mine].mean()), _nearest(mine, pool, matched_on)
        null = np.array([effect[_one_each(nearest, rng)].mean() for _ in range(NULL_DRAWS)])
        low, high = np.quantile(null, [0.025, 0.975])
        sign = np.sign(passed["effect"].iloc[0])
        rows.append(
            {
                "role": role,
                "latents": len(mine),
                "prompts": prompts,
                "effect": observed,
                "null": float(null.mean()),
                "null_low": float(low),
                "null_high": float(high),
                "p": (1 + int((sign * null >= sign * observed).sum())) / (1 + NULL_DRAWS),
            }
        )
    return rows


def _nearest(targets: Ints, pool: Ints, features: Floats) -> list[list[int]]:
    """For each target the `NEAREST` of the pool most like it, every feature in units of its
    spread.
    """
    scaled = features / np.maximum(features[[*targets, *pool]].std(axis=0), 1e-12)
    return [
        pool[
            np.argsort(np.square(scaled[pool] - scaled[target]).sum(axis=1), kind="stable")[
                :NEAREST
            ]
        ].tolist()
        for target in targets
    ]


def _one_each(nearest: Sequence[list[int]], rng: np.random.Generator) -> list[int]:
    """One latent for each target, none twice while there are others."""
    drawn: list[int] = []
    for latents in nearest:
        free = [latent for latent in latents if latent not in drawn] or latents
        drawn.append(free[rng.integers(len(free))])
    return drawn


def shuffled_labels(
    encoded: Encoded, contrasts: Mapping[str, Contrast], config: Config, device: str
) -> list[dict[str, Any]]:
    """Discoveries, and confirmations of them, when chosen and rejected are dealt anew within
    prompts: all of them false.
    """
    draws = config.select.stability_repeats
    sources = [part for part in PARTS[2:] if part in contrasts] or ["discovery"]
    if not draws or not all(contrasts[part].n_prompts for part in sources):
        return []
    dealt = {
        part: next(permuted_labels(contrasts[part], draws, config.seed + 101 + number))
        for number, part in enumerate((*sources, "validation"))
        if contrasts[part].n_prompts
    }
    rows = []
    for draw in range(draws):
        shuffled = {
            part: _relabelled(contrasts[part], labels[:, draw]) for part, labels in dealt.items()
        }
        found = discover(encoded, [shuffled[s] for s in sources], config, config.seed, device)
        confirmed = (
            confirm(encoded, found, shuffled["validation"], config, device)
            if "validation" in shuffled
            else found.discovered & False
        )
        rows.append({"discoveries": int(found.discovered.sum()), "confirmed": int(confirmed.sum())})
    return rows


def _relabelled(contrast: Contrast, labels: Floats) -> Contrast:
    return contrast._replace(chosen=np.maximum(labels, 0), rejected=np.maximum(-labels, 0))
