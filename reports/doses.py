"""What the random arm penalised in each of its seeds, and how much that costs the base policy
beside the penalty arm's latents: `random_sets(run, frames)`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from reports.blocks import Block, Prose
from reports.frames import Frames, penalised_latents
from reports.numbers import fixed
from sarm.run import RunDir, listed

Entries = Sequence[Mapping[str, Any]]


def random_sets(run: RunDir, frames: Frames) -> dict[str, Any]:
    """`penalised`: the dose of the penalty arm. `random`: of each trained seed of the random arm
    its latents and dose. A dose, unsafe and safe, is the sum of alpha times the latent's rate in
    the base policy's responses to the evaluation's prompts; NaN where that is not known, and in a
    penalty that no threshold sets off.
    """
    base = frames.generations[frames.generations["arm"] == "base"]
    whole = run.config.ppo.penalty.kind == "threshold"
    penalised = penalised_latents(run, frames.features)
    sets = []
    for seed in run.config.ppo.seeds:
        entries = frames.calibrations.get(f"random-seed{seed}", {}).get("penalised", [])
        if entries:
            latents = [entry["latent"] for entry in entries]
            sets.append({"seed": seed, "latents": latents, **doses(base, entries, whole)})
    return {"penalised": doses(base, penalised, whole), "random": sets}


def doses(base: pd.DataFrame, entries: Entries, whole: bool) -> dict[str, float]:
    """By kind of prompt; NaN of all kinds unless `whole`, and where a latent was not watched."""
    return {
        kind: dose(base[base["kind"] == kind], entries) if whole and len(base) else math.nan
        for kind in ("unsafe", "safe")
    }


def dose(rows: pd.DataFrame, entries: Entries) -> float:
    """sum of alpha x P(z > tau) over the rows."""
    if not len(rows) or not entries or any(f"z_{e['latent']}" not in rows for e in entries):
        return math.nan
    return float(sum(e["alpha"] * (rows[f"z_{e['latent']}"] > e["tau"]).mean() for e in entries))


def random_entries(run: RunDir, frames: Frames) -> list[dict[str, Any]]:
    """Each latent that some seed of the random arm penalised, at its tau, with those `seeds`;
    None where all seeds did.
    """
    found: dict[tuple[int, float], list[int]] = {}
    for seed in run.config.ppo.seeds:
        for entry in frames.calibrations.get(f"random-seed{seed}", {}).get("penalised", []):
            found.setdefault((entry["latent"], entry["tau"]), []).append(seed)
    every = sorted(set().union(*found.values()))
    return [
        {"latent": latent, "tau": tau, "seeds": None if sorted(seeds) == every else seeds}
        for (latent, tau), seeds in found.items()
    ]


def random_sentences(sets: Mapping[str, Any]) -> list[Block]:
    """Each seed's latents, which seeds are no independent draws, and the doses."""
    rows = sets["random"]
    if not rows:
        return []
    each = "; ".join(f"seed {r['seed']}: {', '.join(map(str, r['latents']))}" for r in rows)
    said = f"Latents that the random arm penalised, by seed: {each}."
    if alike := sharing(rows):
        said += (
            f" Seeds that share a latent are not independent draws: {listed(alike, 6)}. The"
            " intervals of this arm, over seeds, may then be too narrow for random latents in"
            " general."
        )
    blocks: list[Block] = [Prose(said)]
    kinds = [
        kind
        for kind in ("unsafe", "safe")
        if all(math.isfinite(one[kind]) for one in (sets["penalised"], *rows))
    ]
    if kinds:
        told = ", ".join(
            f"{fixed(sets['penalised'][kind], 2)} on {kind} prompts for the penalised latents and"
            f" {', '.join(fixed(r[kind], 2) for r in rows)} for those of the random arm's seeds"
            for kind in kinds
        )
        blocks.append(
            Prose(
                "Dose, the sum of alpha times the rate in the base policy's responses to these"
                f" prompts: {told}."
            )
        )
    return blocks


def sharing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """`0 and 4 (4149)`: each pair of seeds with the latents that both penalised."""
    found = []
    for one, other in itertools.combinations(rows, 2):
        both = [str(latent) for latent in one["latents"] if latent in other["latents"]]
        if both:
            found.append(f"{one['seed']} and {other['seed']} ({', '.join(both)})")
    return found
