"""Merge the probe's shards and choose latents: `python -m jobs select --config C --run R` ->
features.json, steering.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from sarm.config import Config, SarmConfig, UserError
from sarm.data.datasets import load_data
from sarm.probing.effects import contrasts_of, read_encoded
from sarm.probing.rediscovery import rank_correlation
from sarm.probing.replication import feature_replication
from sarm.probing.select import judged, select_features
from sarm.probing.taus import suggested_taus
from sarm.probing.upstream import compared_rankings, selection_scores, summed_latents
from sarm.probing.validity import validity
from sarm.records import Features
from sarm.reward_model.model import load_sae
from sarm.run import Attempt, RunDir


def run(config: Config, run: RunDir, unit: str, attempt: Attempt) -> None:
    """Features from the whole table. Raises UserError naming a shard that is missing, of another
    range, config or encoding.
    """
    encoded = read_encoded(attempt.read_shards("encode"))
    shards = attempt.read_shards("probe")
    for name in config.units("probe"):
        stale = run.why_not_done("probe", name, hashes=False)
        if stale:
            raise UserError(f"probe/{name} cannot be merged: {stale}; run it again")
    table = pd.concat(
        [pd.read_parquet(shard.path("table.parquet")) for shard in shards], ignore_index=True
    )
    data = load_data(config.data)
    discovery = contrasts_of(data, encoded, config.conjunction)["discovery"]
    table["upstream_s"] = selection_scores(*summed_latents(encoded.ranks, discovery))
    features = select_features(
        table, encoded, config, lambda latents: latent_directions(config.sarm, latents)
    )
    ranked = judged(table, config.select)
    features["rankings"] = compared_rankings(ranked, config.select.listed)
    features["tau_suggestions"] = suggested_taus(
        encoded, [p["latent"] for p in features["penalised"]], config.sweep.tau_quantile
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features["validity"] = validity(ranked, encoded, data, config, device)
    listed = [f for role in ("promoting", "harming", "misleading") for f in features[role]]
    replicated = feature_replication(listed, encoded, data, config, device)
    moves = (
        pd.concat(
            [pd.read_parquet(shard.path("directions.parquet")) for shard in shards],
            ignore_index=True,
        )
        if config.probe.directions
        else None
    )
    for f in listed:
        f["replication"] = replicated[f["latent"]]
        f["directions"] = [] if moves is None else moves_of(moves, f["latent"])
    if moves is not None:
        features["directions"] = directions_summary(
            moves, table, [shard.manifest.more["directions"] for shard in shards]
        )
        features["warnings"] += direction_warnings(features)
        moves.to_parquet(attempt.path("directions.parquet"), index=False)
    for warning in features["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    Features(**features).write(attempt.path("features.json"))
    attempt.path("steering.json").write_text(
        json.dumps(features["steering_file"]), encoding="utf-8"
    )
    ranked.to_parquet(attempt.path("table.parquet"), index=False)
    attempt.publish(n_tested=features["n_tested"], n_discoveries=features["n_discoveries"])


def moves_of(moves: pd.DataFrame, latent: int) -> list[dict[str, float | None]]:
    """A latent's rows of directions.parquet as plain numbers."""
    mine = moves[moves["latent"] == latent].drop(columns="latent")
    return [
        {str(key): None if np.isnan(value) else float(value) for key, value in row.items()}
        for row in mine.to_dict("records")
    ]


def directions_summary(
    moves: pd.DataFrame, table: pd.DataFrame, manifests: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row a c: what adding c std(h) d_i does over all latents, how it goes with the effect of
    ablating, how exact it is.
    """
    rows = []
    tested = table.set_index("latent")["tested"]
    effect = table.set_index("latent")["effect_reselected_validation"]
    for c, mine in moves.groupby("c"):
        mine = mine.set_index("latent")
        counts = [manifest["c"][f"{c:g}"] for manifest in manifests]
        rows.append(
            {
                "c": float(c),  # type: ignore[arg-type]
                "part": manifests[0]["part"],
                "texts": manifests[0]["texts"],
                "latents": len(mine),
                "swapped": float(mine["swapped"].mean()),
                "largest_effect": float(mine["effect"].abs().max()),
                "rank_correlation_with_ablation": rank_correlation(
                    mine["effect"][tested].to_numpy(), effect[tested].to_numpy()
                ),
                "sign_changed_by_reselection": float(
                    (np.sign(mine["effect"]) == -np.sign(mine["effect_frozen"])).mean()
                ),
                **{
                    key: sum(count[key] for count in counts)
                    for key in ("sorted_out", "checked", "mismatches")
                },
                "worst": max(count["worst"] for count in counts),
            }
        )
    return rows


def direction_warnings(features: dict[str, Any]) -> list[str]:
    """Penalised latents whose own direction does not move the reward the way that their weight
    says.
    """
    penalised = {p["latent"] for p in features["penalised"]}
    odd = []
    for f in features["harming"]:
        mean = [m["c"] * (m["change_chosen"] + m["change_rejected"]) for m in f["directions"]]
        if f["latent"] in penalised and mean and max(mean) >= 0:
            odd.append(str(f["latent"]))
    if not odd:
        return []
    return [
        f"adding the directions of penalised latents {', '.join(odd)} does not lower the reward:"
        " what else they move outweighs the latents themselves"
    ]


def latent_directions(sarm: SarmConfig, latents: Sequence[int]) -> NDArray[np.float32]:
    """Decoder directions of some latents, or encoder directions where the checkpoint has no
    decoder, (latents, d_in).

    Reads the SAE and not the layers.
    """
    sae, _, _ = load_sae(sarm)
    rows = sae.encoder.weight if sae.decoder is None else sae.decoder.weight.T
    return rows[list(latents)].detach().numpy()
