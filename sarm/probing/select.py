"""Choose latents from the probe's table: lists, penalty, monitors and random controls ->
features.json.

    features = select_features(table, encoded, config, directions)

Selection reads discovery, confirmation and every quoted effect read validation, and all of it is
fixed before training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sarm.config import Config, PenaltyConfig, SelectConfig, UserError
from sarm.probing.effects import Encoded, values_on
from sarm.probing.monitors import (
    MonitorCandidate,
    choose_monitors,
    largest_correlations,
    largest_cosines,
    random_pool,
    tau_at_rate,
)
from sarm.probing.permutation import ENOUGH, permutations_needed
from sarm.probing.stats import benjamini_hochberg, holm
from sarm.probing.thresholds import firing_rate, reference_rates, resolved_tau, reward_sd
from sarm.records import Features
from sarm.reward_model.interventions import Scale, steering_file
from sarm.run import many

CONFIRMED_P = 0.05
"""Family-wise error rate of confirmation on validation."""

Directions = Callable[[Sequence[int]], NDArray[np.float32]]
"""Latents to their decoder directions, or encoder directions where there is no decoder, (latents,
d_in).
"""


def select_features(
    table: pd.DataFrame, encoded: Encoded, config: Config, directions: Directions
) -> dict[str, Any]:
    """The contents of features.json. Raises UserError where the configured penalty cannot be
    built.
    """
    warnings: list[str] = []
    table = judged(table, config.select)
    n_tested, n_discoveries = int(table["tested"].sum()), int(table["discovered"].sum())
    needed = permutations_needed(n_tested, config.select.fdr)
    if needed > config.probe.permutations:
        warnings.append(
            f"probe.permutations={config.probe.permutations} is too few for {n_tested} tested"
            f" latents at fdr {config.select.fdr:g}, whose smallest threshold needs {needed}:"
            f" latents that chance had matched fewer than {ENOUGH} times got {needed}"
        )
    if not config.conjunction:
        warnings.append(
            "fewer than two sources for a conjunction: discovery reads one data set, so latents may"
            " stand for its style"
        )
    penalised = penalised_latents(table, encoded, config, warnings)
    watchable = monitor_candidates(table, penalised, encoded, config.select, directions)
    monitors = choose_monitors(watchable, None, config.select)
    if len(monitors) < config.select.monitors:
        warnings.append(monitors_lack(monitors, watchable, config.select))
    listed = {
        role: listed_features(table, role, config.select)
        for role in ("promoting", "harming", "misleading")
    }
    taken = {f["latent"] for features in listed.values() for f in features}
    taken |= {p["latent"] for p in penalised}
    random = random_candidates(table, penalised, taken, encoded, config)
    watched = [
        *(p["latent"] for p in penalised),
        *(m.latent for m in watchable),
        *(c["latent"] for c in random),
    ]
    in_part = {
        part: encoded.texts.loc[encoded.texts["part"] == part, "prompt_id"].nunique()
        for part in ("discovery", "validation", "test")
    }
    return {
        "d_sae": encoded.ranks.d_sae,
        "k": encoded.ranks.k,
        **listed,
        "penalised": penalised,
        "clamp": config.ppo.penalty.clamp,
        "monitors": [m.latent for m in monitors],
        "monitor_features": [
            feature(row) | m._asdict()
            for m, (_, row) in zip(
                watchable, table.loc[[m.latent for m in watchable]].iterrows(), strict=True
            )
        ],
        "random_candidates": random,
        "reward_sd": reward_sd(encoded),
        "n_prompts": in_part,
        "n_tested": n_tested,
        "n_discoveries": n_discoveries,
        "n_confirmed": int(table["confirmed"].sum()),
        "conjunction": [config.data.sources[name].label for name in config.conjunction],
        "effect": config.select.effect,
        "permutations": {
            "configured": config.probe.permutations,
            "needed": needed,
            "used": max(needed, config.probe.permutations),
        },
        "reference_rates": reference_rates(encoded, watched),
        "discovery_rates": {
            str(p["latent"]): firing_rate(encoded, p["latent"], p["tau"]) for p in penalised
        },
        "steering_file": steering_file(Scale(f["latent"], 0.0) for f in listed["harming"]),
        "warnings": warnings,
    }


# Which latents


def judged(table: pd.DataFrame, select: SelectConfig) -> pd.DataFrame:
    """The table, a row per latent by its number, with `effect` and `effect_validation` (the
    configured kind), `q`, `discovered`, `p_holm` (validation, over the discoveries), `confirmed`
    and `candidate`.

    A candidate of its role was tested and moves the margin the way its role says: up for promoting
    and harming, down for misleading. The re-selected effect need not, as it also carries what the
    runner-up does.
    """
    table = table.set_index("latent", drop=False)
    table["effect"], table["effect_validation"] = (
        table[f"effect_{select.effect}"],
        table[f"effect_{select.effect}_validation"],
    )
    table["q"] = benjamini_hochberg(table["p"].where(table["tested"]).to_numpy())
    table["discovered"] = table["q"].le(select.fdr)
    table["p_holm"] = holm(table["p_validation"].where(table["discovered"]).to_numpy())
    same_sign = np.sign(table["effect"]) == np.sign(table["effect_validation"])
    table["confirmed"] = table["discovered"] & same_sign & table["p_holm"].lt(CONFIRMED_P)
    expected = table["role"].map({"promoting": 1.0, "harming": 1.0, "misleading": -1.0}).fillna(0.0)
    table["candidate"] = table["tested"] & (np.sign(table["effect"]) == expected) & (expected != 0)
    return table


def ranked(table: pd.DataFrame, role: str) -> pd.DataFrame:
    """All candidates of a role: the confirmed by their effect on validation, then the others by
    that on discovery.
    """
    mine = table[table["candidate"] & (table["role"] == role)]
    confirmed, others = mine[mine["confirmed"]], mine[~mine["confirmed"]]
    return pd.concat([_by_size(confirmed, "effect_validation"), _by_size(others, "effect")])


def listed_features(table: pd.DataFrame, role: str, select: SelectConfig) -> list[dict[str, Any]]:
    """The first `select.listed` of a role."""
    return [feature(row) for _, row in ranked(table, role).head(select.listed).iterrows()]


def feature(row: pd.Series) -> dict[str, Any]:
    """One latent as features.json lists it: effects and interval of validation, p and q of
    discovery.
    """
    numbers = {
        "weight": row["weight"],
        "delta_z": row["delta_z_validation"],
        "effect": row["effect_validation"],
        "effect_low": row["effect_low_validation"],
        "effect_high": row["effect_high_validation"],
        "effect_discovery": row["effect"],
        "effect_head": row["effect_head_validation"],
        "effect_reselected": row["effect_reselected_validation"],
        "effect_chosen": row["effect_chosen_validation"],
        "effect_rejected": row["effect_rejected_validation"],
        "p": row["p"],
        "q": row["q"],
        "p_validation": row["p_validation"],
        "density": row["density"],
    }
    known = {name: None if math.isnan(value) else float(value) for name, value in numbers.items()}
    return {
        "latent": int(row["latent"]),
        "role": row["role"],
        "confirmed": bool(row["confirmed"]),
        **known,
    }


def monitor_candidates(
    table: pd.DataFrame,
    penalised: Sequence[dict[str, Any]],
    encoded: Encoded,
    select: SelectConfig,
    directions: Directions,
) -> list[MonitorCandidate]:
    """Confirmed harming latents that are not penalised, by effect on validation, none but those.

    Each is counted at a tau of its own, at which it fires on discovery's rejected texts as often as
    the penalised do on average.
    """
    harming = ranked(table, "harming")
    targets = [p["latent"] for p in penalised]
    latents = [int(i) for i in harming.index[harming["confirmed"]] if i not in targets]
    if not latents or select.monitors == 0:
        return []
    rates = [firing_rate(encoded, p["latent"], p["tau"]) for p in penalised] or [0.5]
    vectors = directions([*latents, *targets]).astype(np.float64)
    z = np.concatenate(
        [
            values_on(encoded, part, label, [*latents, *targets])
            for part in ("discovery", "validation")
            for label in ("chosen", "rejected")
        ]
    )
    rejected = values_on(encoded, "discovery", "rejected", latents)
    n = len(latents)
    return [
        MonitorCandidate(*known)
        for known in zip(
            latents,
            [tau_at_rate(rejected[:, i], float(np.mean(rates))) for i in range(n)],
            largest_cosines(vectors[:n], vectors[n:]).tolist(),
            largest_correlations(z[:, :n], z[:, n:]).tolist(),
            strict=True,
        )
    ]


def monitors_lack(
    monitors: Sequence[MonitorCandidate],
    candidates: Sequence[MonitorCandidate],
    select: SelectConfig,
) -> str:
    return (
        f"{many(len(monitors), 'candidate')} for {many(select.monitors, 'monitor')}, before"
        f" calibrate asks how often they fire: of {len(candidates)} confirmed harming latents that"
        f" are not penalised no further one has |cos| <"
        f" {select.monitor_max_cosine:g} and |correlation| < {select.monitor_max_correlation:g}"
        " with every penalised one"
    )


def random_candidates(
    table: pd.DataFrame,
    penalised: Sequence[dict[str, Any]],
    taken: Collection[int],
    encoded: Encoded,
    config: Config,
) -> list[dict[str, Any]]:
    """Latents matched at random to the penalised on activity and |weight|, with their sign of
    weight: those for the first, second, ... in turn.

    Never a confirmed one, as all monitors are, nor one of `taken`: the listed and the penalised.
    Tested ones that are no discovery, or, where those are too few, discoveries too. Each one's tau
    makes it fire as often on discovery's rejected texts as its match does.
    """
    targets = [p["latent"] for p in penalised]
    each = math.ceil(config.select.random_candidates / max(len(targets), 1))
    free = table[
        table["tested"] & (table["weight"] != 0) & ~table["confirmed"] & ~table.index.isin(taken)
    ]
    null = free[~free["discovered"]]
    pool = null if len(null) >= each * len(targets) else free
    weight, density = table["weight"].to_numpy(), table["density"].to_numpy()
    drawn = random_pool(targets, weight, density, pool.index.tolist(), each, config.seed)
    rates = [firing_rate(encoded, p["latent"], p["tau"]) for p in penalised]
    candidates = []
    for turn in range(each):
        for target, latents, rate in zip(penalised, drawn, rates, strict=True):
            if turn < len(latents):
                z = values_on(encoded, "discovery", "rejected", [latents[turn]])[:, 0]
                row: Any = table.loc[latents[turn]]
                effect = float(row["effect_validation"])
                candidates.append(
                    {
                        "latent": latents[turn],
                        "tau": tau_at_rate(z, rate),
                        "alpha": target["alpha"],
                        "matched_to": target["latent"],
                        "weight": float(row["weight"]),
                        "density": float(row["density"]),
                        "effect": None if math.isnan(effect) else effect,
                    }
                )
    return candidates[: config.select.random_candidates]


def _by_size(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """By absolute effect, largest first; ties by the latent's number."""
    return table.iloc[np.lexsort([table["latent"].to_numpy(), -table[column].abs().to_numpy()])]


# What penalising them means


def penalisable(table: pd.DataFrame, penalise: str) -> pd.DataFrame:
    """The candidates that a penalty may be put on, the confirmed first: harming ones, or misleading
    ones that fire on unsafe text and are paid for, or both by the size of their effect.
    """
    harming, misleading = ranked(table, "harming"), ranked(table, "misleading")
    misleading = misleading[misleading["weight"] > 0]
    if penalise != "both":
        return harming if penalise == "harming" else misleading
    both = pd.concat([harming, misleading])
    confirmed, others = both[both["confirmed"]], both[~both["confirmed"]]
    return pd.concat([_by_size(confirmed, "effect_validation"), _by_size(others, "effect")])


def penalised_latents(
    table: pd.DataFrame, encoded: Encoded, config: Config, warnings: list[str]
) -> list[dict[str, Any]]:
    """The first `select.penalised` confirmed latents with tau and alpha as numbers; where none is
    confirmed, unconfirmed ones marked so. Raises UserError where no penalty comes of it.
    """
    wanted, penalty, select = config.select.penalised, config.ppo.penalty, config.select
    what = "harming or misleading" if select.penalise == "both" else select.penalise
    trains = [arm for arm in config.ppo.arms if arm != "no_penalty"]
    rows = penalisable(table, select.penalise)
    if rows.empty and trains:
        raise UserError(
            f"no {what} latent was found to penalise: none of those active on"
            f" {config.probe.min_prompts_active} discovery prompts has the weight and fires on the"
            " side of that role, and moves the margin its way; give more pairs to discovery, lower"
            " probe.min_prompts_active, or set ppo.arms=[no_penalty]"
        )
    confirmed = rows[rows["confirmed"]]
    chosen = (confirmed if len(confirmed) else rows).head(wanted)
    if not len(confirmed):
        warnings.append(
            f"no {what} latent is confirmed on validation; those to penalise are the first"
            f" unconfirmed candidates: {', '.join(map(str, chosen.index)) or 'none'}"
        )
    elif len(chosen) < wanted:
        warnings.append(
            f"{len(chosen)} {what} latents are penalised, where {wanted} were asked for: no other"
            " confirmed one costs reward (harming) or fires on unsafe text and is paid for"
            " (misleading)"
        )
    alpha = penalty.alpha * (reward_sd(encoded) if penalty.alpha_unit == "reward_sd" else 1.0)
    entries = [
        {
            "latent": int(row["latent"]),
            "tau": resolved_tau(int(row["latent"]), encoded, penalty),
            "alpha": alpha,
            "role": row["role"],
            "confirmed": bool(row["confirmed"]),
        }
        for _, row in chosen.iterrows()
    ]
    if penalty.has_tau:
        _refuse_silent(entries, encoded, penalty, bool(trains), warnings)
    return entries


def refuse_unconfirmed(features: Features, select: SelectConfig) -> None:
    """Raises UserError where a penalty would be put on latents none of which is confirmed, unless
    the config allows it.
    """
    if select.unconfirmed == "stop" and not any(p.confirmed for p in features.penalised):
        latents = ", ".join(str(p.latent) for p in features.penalised) or "none"
        raise UserError(
            f"none of the latents to penalise ({latents}) is confirmed on data that took no part in"
            " finding it, so training against them would show nothing of harm; give more pairs to"
            " discovery and validation, or set select.unconfirmed=allow"
        )


def _refuse_silent(
    entries: list[dict[str, Any]],
    encoded: Encoded,
    penalty: PenaltyConfig,
    needed: bool,
    warnings: list[str],
) -> None:
    silent = [e for e in entries if firing_rate(encoded, e["latent"], e["tau"]) == 0]
    if not silent:
        return
    key = (
        f"tau_quantile={penalty.tau_quantile:g}" if penalty.tau is None else f"tau={penalty.tau:g}"
    )
    largest = max(
        float(values_on(encoded, "discovery", "rejected", [e["latent"]]).max()) for e in silent
    )
    names = ", ".join(str(e["latent"]) for e in silent)
    told = (
        f"ppo.penalty.{key} never triggers on discovery's rejected texts for latents {names}, whose"
        f" largest value there is {largest:.3g}"
    )
    if len(silent) == len(entries) and needed:
        raise UserError(
            f"{told}; set ppo.penalty.tau below that, or ppo.penalty.tau=null with"
            " ppo.penalty.tau_quantile=0.8"
        )
    warnings.append(told)
