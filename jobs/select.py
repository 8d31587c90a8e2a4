"""Merge the probe's shards and choose latents: `python -m jobs select --config C --run R` -> features.json, steering.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors import safe_open

from sarm.config import Config, SarmConfig, UserError
from sarm.datasets import load_data
from sarm.hub import local_model
from sarm.probing.effects import contrasts_of, read_encoded
from sarm.probing.select import judged, select_features
from sarm.probing.upstream import compared_rankings, selection_scores, summed_latents
from sarm.run import Attempt, RunDir


def run(config: Config, run: RunDir, unit: str, attempt: Attempt) -> None:
    """Features from the whole table. Raises UserError naming a shard that is missing, of another range, config or encoding."""
    encoded = read_encoded(attempt.read_shards("encode"))
    shards = attempt.read_shards("probe")
    for name in config.units("probe"):
        stale = run.undone_because("probe", name, hashes=False)
        if stale:
            raise UserError(f"probe/{name} cannot be merged: {stale}; run it again")
    table = pd.concat([pd.read_parquet(shard.path("table.parquet")) for shard in shards], ignore_index=True)
    table["upstream_s"] = selection_scores(*summed_latents(encoded.ranks, contrasts_of(load_data(config.data), encoded)["discovery"]))
    features = select_features(table, encoded, config, lambda latents: latent_directions(config.sarm, latents))
    features["rankings"] = compared_rankings(judged(table, config.select), config.select.listed)
    for warning in features["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    attempt.path("features.json").write_text(json.dumps(features, indent=1, allow_nan=False), encoding="utf-8")
    attempt.path("steering.json").write_text(json.dumps(features["steering_file"]), encoding="utf-8")
    judged(table, config.select).to_parquet(attempt.path("table.parquet"), index=False)
    attempt.publish(n_tested=features["n_tested"], n_discoveries=features["n_discoveries"])


def latent_directions(sarm: SarmConfig, latents: Sequence[int]) -> NDArray[np.float32]:
    """Decoder directions of some latents, or encoder directions where the checkpoint has no decoder, (latents, d_in).

    Reads that one tensor and not the model.
    """
    folder = local_model(sarm.model, sarm.revision)
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in ("sae.decoder.weight", "sae.encoder.weight") if name in tensors.keys()}  # noqa: SIM118
    if "sae.decoder.weight" in found:
        return found["sae.decoder.weight"].T[list(latents)].float().numpy()
    if "sae.encoder.weight" in found:
        return found["sae.encoder.weight"][list(latents)].float().numpy()
    raise UserError(f"{folder} holds neither sae.decoder.weight nor sae.encoder.weight in safetensors; fetch the SARM again")
