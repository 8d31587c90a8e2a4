"""What the random arm penalised in each of its seeds, and how much that costs the base policy
beside the penalty arm's latents: `random_sets(run, frames)`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from reports.blocks import Block, Prose
from reports.frames import Frames, penalised_latents
from reports.numbers import fixed
from sarm.run import RunDir, listed

Entries = Sequence[Mapping[str, Any]]
DOSES: dict[str, Callable[[pd.Series, float], pd.Series]] = {
    "threshold": lambda z, tau: z > tau,
    "hinge": lambda z, tau: (z - tau).clip(lower=0),
    "density": lambda z, _: z > 0,
}
"""By kind of penalty, of a latent's values: as `doses` of `sarm.ppo.penalties`, which needs torch,
has it for the random arm's matching. What a density ratio costs may be 0 on average.
"""


def random_sets(run: RunDir, frames: Frames) -> dict[str, Any]:
    """`penalised`: the dose of the penalty arm. `random`: of each trained seed of the random arm
    its latents and dose. A dose, unsafe and safe, is the sum of alpha times the mean of `DOSES`
    over the base policy's responses to the evaluation's prompts; NaN where that is not known.
    """
    base = frames.generations[frames.generations["arm"] == "base"]
    kind = run.config.ppo.penalty.kind
    penalised = penalised_latents(run, frames.features)
    sets = []
    for seed in run.config.ppo.seeds:
        entries = frames.calibrations.get(f"random-seed{seed}", {}).get("penalised", [])
        if entries:
            latents = [entry["latent"] for entry in entries]
            sets.append({"seed": seed, "latents": latents, **doses(base, entries, kind)})
    return {"penalised": doses(base, penalised, kind), "random": sets}


def doses(base: pd.DataFrame, entries: Entries, penalty: str) -> dict[str, float]:
    """By kind of prompt."""
    parts = {kind: base[base["kind"] == kind] if len(base) else base for kind in ("unsafe", "safe")}
    return {kind: dose(rows, entries, penalty) for kind, rows in parts.items()}


def dose(rows: pd.DataFrame, entries: Entries, penalty: str) -> float:
    """sum of alpha x mean over the rows; NaN without rows or latents, where a latent was not
    watched, and of a penalty that `DOSES` does not name.
    """
    watched = all(f"z_{e['latent']}" in rows for e in entries)
    if not len(rows) or not entries or not watched or penalty not in DOSES:
        return math.nan
    of = DOSES[penalty]
    # in float64, as there: a tau between two float32 values stays between them
    values = (rows[f"z_{e['latent']}"].astype(float) for e in entries)
    return float(
        sum(e["alpha"] * of(z, e["tau"]).mean() for z, e in zip(values, entries, strict=True))
    )


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
                "Dose, on which the random arm is matched, in the base policy's responses to these"
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
