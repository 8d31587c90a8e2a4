"""Effects and statistics of a range of latents: `python -m jobs probe --config C --run R --unit
shard-0000-of-0001`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from sarm.config import Config, UserError, shard_range
from sarm.data.datasets import load_data
from sarm.probing.contrast import Contrast
from sarm.probing.direction import Moved, baseline, check, direction_changes, load_sae
from sarm.probing.effects import (
    Encoded,
    contrasts_of,
    direction_table,
    discovery_contrasts,
    latent_table,
    read_encoded,
)
from sarm.run import Attempt, RunDir

CHECKED = 16
"""Latents, spread over all, whose moved rewards are computed again from the states."""


def run(config: Config, run: RunDir, unit: str, attempt: Attempt) -> None:
    """One row per latent of this shard's range, from what encode left."""
    encoded = read_encoded(attempt.read_shards("encode"))
    contrasts = contrasts_of(load_data(config.data), encoded, config.conjunction)
    for name, contrast in zip(
        config.conjunction or ("",), discovery_contrasts(contrasts), strict=True
    ):
        if contrast.n_prompts == 0:
            raise UserError(
                f"discovery has no pairs {f'of source {name} ' if name else ''}to find latents on;"
                " give it a share in data.sources.NAME.split"
            )
    start, stop = shard_range(unit, encoded.ranks.d_sae)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attempt.progress(0, stop - start, "latents")
    table = latent_table(encoded, contrasts, start, stop, config, device)
    table.to_parquet(attempt.path("table.parquet"), index=False)
    moved = (
        move_along_directions(config, encoded, contrasts, range(start, stop), device, attempt)
        if config.probe.directions
        else {}
    )
    attempt.progress(stop - start, stop - start, "latents")
    attempt.publish(
        range_=(start, stop),
        total=encoded.ranks.d_sae,
        n_tested=int(table["tested"].sum()),
        device=device,
        directions=moved,
    )


def move_along_directions(
    config: Config,
    encoded: Encoded,
    contrasts: Mapping[str, Contrast],
    latents: range,
    device: str,
    attempt: Attempt,
) -> dict[str, Any]:
    """Write directions.parquet for these latents on validation's texts, or discovery's where it
    has none; tell how exact it is.
    """
    part = "validation" if contrasts["validation"].n_prompts else "discovery"
    contrast, cs = contrasts[part], config.probe.directions
    sae, weight = load_sae(config.sarm, device)
    states = torch.from_numpy(encoded.states[contrast.rows]).to(device)
    base = baseline(sae, weight, states, encoded.ranks.k)
    some = np.unique(np.linspace(0, encoded.ranks.d_sae - 1, CHECKED).astype(int)).tolist()
    counts = {c: {"sorted_out": 0, "checked": 0, "mismatches": 0, "worst": 0.0} for c in cs}

    def counted() -> Iterator[Mapping[float, Moved]]:
        for tile in direction_changes(base, sae, latents, cs):
            for c, moved in tile.items():
                mine = [latent for latent in some if latent in moved.latents]
                off = check(
                    sae,
                    base,
                    states,
                    moved.change[[latent - moved.latents.start for latent in mine]],
                    mine,
                    c,
                )
                old = counts[c]
                counts[c] = {
                    "sorted_out": old["sorted_out"] + moved.sorted_out,
                    "checked": old["checked"] + off.pairs,
                    "mismatches": old["mismatches"] + off.mismatches,
                    "worst": max(old["worst"], off.worst),
                }
            attempt.progress(moved.latents.stop - latents.start, len(latents), "latents")
            yield tile

    table = direction_table(counted(), contrast, config.probe.bootstrap, config.seed)
    table.to_parquet(attempt.path("directions.parquet"), index=False)
    return {
        "part": part,
        "texts": len(contrast.rows),
        "c": {f"{c:g}": counted_c for c, counted_c in counts.items()},
    }
