"""What speaks for and against a selection: nulls, replication, baselines, sensitivity.

    features["validity"] = validity(table, encoded, data, config, device)

All of it is computed after the selection and changes nothing in it. Each part returns plain rows
for features.json.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sarm.config import Config
from sarm.data.datasets import Data, pairs_in
from sarm.probing.baselines import baselines, words_alone
from sarm.probing.effects import Encoded, contrast_of, contrasts_of
from sarm.probing.nulls import held_out_effects, matched_null, shuffled_labels
from sarm.probing.rediscovery import Found, confirm, discover, joined, of_prompts
from sarm.probing.replication import confirmed_replication, replication

SIZES = (0.25, 0.5, 0.75)


def validity(
    table: pd.DataFrame, encoded: Encoded, data: Data, config: Config, device: str = "cpu"
) -> dict[str, Any]:
    """`table` as `sarm.probing.select.judged` gives it, a row per latent."""
    contrasts = contrasts_of(data, encoded, config.conjunction)
    rows = baselines(table, encoded, data, config)
    return {
        "matched_null": matched_null(table, *held_out_effects(encoded, data, config), config),
        "shuffled_labels": shuffled_labels(encoded, contrasts, config, device),
        "replication": replication(encoded, data, config, device),
        "confirmed_replication": confirmed_replication(table, encoded, data, config, device),
        "baselines": rows,
        "words_alone": words_alone(rows),
        "sensitivity": sensitivity(table, encoded, data, config, device),
    }


def sensitivity(
    table: pd.DataFrame, encoded: Encoded, data: Data, config: Config, device: str
) -> list[dict[str, Any]]:
    """How the discoveries move with the permutations' seed, with the split and with the number of
    prompts, within each source where the selection needs two.

    `overlap` is shared discoveries over all of either (Jaccard) with the selection's; `again` the
    share of the selection's confirmed latents that are discovered anew, or confirmed anew where the
    split is. Effects are not compared: under another seed they are the same, elsewhere most prompts
    are.
    """
    draws = config.select.stability_repeats
    rows_of = {id_: row for row, id_ in enumerate(encoded.texts["text_id"])}
    discovery, validation = (
        [contrast_of(pairs_in(data, part, s), rows_of) for s in config.conjunction or (None,)]
        for part in ("discovery", "validation")
    )
    prompts = sum(contrast.n_prompts for contrast in discovery)
    if not draws or not prompts:
        return []
    chosen, confirmed = table["discovered"].to_numpy(), table["confirmed"].to_numpy()
    rows = []

    def row(what: str, found: Found, prompts: int, again: NDArray[np.bool_]) -> None:
        either = int((found.discovered | chosen).sum())
        rows.append(
            {
                "what": what,
                "prompts": prompts,
                "discoveries": int(found.discovered.sum()),
                "overlap": int((found.discovered & chosen).sum()) / either if either else None,
                "again": (
                    int((again & confirmed).sum()) / int(confirmed.sum())
                    if confirmed.any()
                    else None
                ),
            }
        )

    for draw in range(1, draws + 1):
        found = discover(encoded, discovery, config, config.seed + 1000 * draw, device)
        row("seed", found, prompts, found.discovered)
    rng = np.random.default_rng([config.seed, 5])
    together = [joined(a, b) for a, b in zip(discovery, validation, strict=True)]
    for _ in range(draws if any(contrast.n_prompts for contrast in validation) else 0):
        mine = [
            rng.permutation(both.n_prompts) < part.n_prompts
            for both, part in zip(together, discovery, strict=True)
        ]
        found = discover(
            encoded, list(map(of_prompts, together, mine)), config, config.seed, device
        )
        rest = functools.reduce(
            joined, (of_prompts(b, ~m) for b, m in zip(together, mine, strict=True))
        )
        row("split", found, prompts, confirm(encoded, found, rest, config, device))
    for size in SIZES:
        for _ in range(draws):
            some = [
                of_prompts(part, rng.permutation(part.n_prompts) < round(size * part.n_prompts))
                for part in discovery
            ]
            found = discover(encoded, some, config, config.seed, device)
            row(
                f"{size:.0%} of the prompts",
                found,
                sum(part.n_prompts for part in some),
                found.discovered,
            )
    return rows
