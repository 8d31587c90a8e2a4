"""Choose latents from the probe's table: lists, penalty, monitors and random controls ->
features.json.

    features = select_features(table, encoded, config, directions)

Selection reads discovery, confirmation and every quoted effect read validation, and all of it is
fixed before training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sarm.config import Config, PenaltyConfig, SelectConfig, UserError
from sarm.probing.effects import Encoded, values_on
from sarm.probing.permutation import permutations_needed
from sarm.probing.stats import benjamini_hochberg, holm, matched_at_random
from sarm.probing.taus import suggested_taus
from sarm.reward_model.interventions import Scale, steering_file

CONFIRMED_P = 0.05
"""Family-wise error rate of confirmation on validation."""

MONITOR_QUANTILE = 0.5
"""Of a monitor's values over rejected texts, its threshold where the penalty names no quantile."""

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
            f" latents that chance had matched fewer than 10 times got {needed}"
        )
    harming = ranked(table, "harming")
    penalised = penalised_latents(harming, encoded, config, warnings)
    chosen = [p["latent"] for p in penalised]
    monitors, cosines = monitor_latents(harming, chosen, config.select, directions)
    if len(monitors) < config.select.monitors:
        limit = config.select.monitor_max_cosine
        warnings.append(
            f"{len(monitors)} of {config.select.monitors} monitors found: no further harming latent"
            f" has |cos| < {limit:g} with the penalised"
        )
    quantile = config.ppo.penalty.tau_quantile or MONITOR_QUANTILE
    suggested = suggested_taus(encoded, monitors, [quantile])
    taus = {s["latent"]: s["tau"] for s in suggested if s["quantile"] == quantile}
    random = random_candidates(table, penalised, monitors, encoded, config)
    listed = {
        role: listed_features(table, role, config.select)
        for role in ("promoting", "harming", "misleading")
    }
    watched = [*chosen, *monitors, *(c["latent"] for c in random)]
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
        "monitors": monitors,
        "monitor_features": [
            feature(row, config.select)
            | {"max_cosine": cosines[row["latent"]], "tau": taus[row["latent"]]}
            for _, row in harming.loc[monitors].iterrows()
        ],
        "random_candidates": random,
        "reward_sd": reward_sd(encoded),
        "n_prompts": in_part,
        "n_tested": n_tested,
        "n_discoveries": n_discoveries,
        "n_confirmed": int(table["confirmed"].sum()),
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
    """The table, a row a latent by its number, with `effect` and `effect_validation` (the
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
    return [feature(row, select) for _, row in ranked(table, role).head(select.listed).iterrows()]


def feature(row: pd.Series, select: SelectConfig) -> dict[str, Any]:
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
        "density": density(row),
    }
    known = {name: None if math.isnan(value) else float(value) for name, value in numbers.items()}
    return {
        "latent": int(row["latent"]),
        "role": row["role"],
        "confirmed": bool(row["confirmed"]),
        **known,
    }


def monitor_latents(
    harming: pd.DataFrame, penalised: Sequence[int], select: SelectConfig, directions: Directions
) -> tuple[list[int], dict[int, float]]:
    """Harming latents to watch but never penalise, and the largest |cos| of each with a penalised
    one.

    The confirmed first, else the best remaining; each less than `monitor_max_cosine` from every
    penalised latent, so that it does not fall merely because it reads the same direction.
    """
    others = [int(latent) for latent in harming.index if latent not in penalised]
    if not others or select.monitors == 0:
        return [], {}
    unit = {}
    for latent, direction in zip(
        [*penalised, *others], directions([*penalised, *others]).astype(np.float64), strict=True
    ):
        unit[latent] = direction / max(float(np.linalg.norm(direction)), 1e-12)
    cosines = {
        latent: max((abs(float(unit[latent] @ unit[p])) for p in penalised), default=0.0)
        for latent in others
    }
    monitors = [latent for latent in others if cosines[latent] < select.monitor_max_cosine][
        : select.monitors
    ]
    return monitors, {latent: cosines[latent] for latent in monitors}


def random_candidates(
    table: pd.DataFrame,
    penalised: Sequence[dict[str, Any]],
    monitors: Sequence[int],
    encoded: Encoded,
    config: Config,
) -> list[dict[str, Any]]:
    """Latents matched at random to the penalised on activity and |weight|: those for the first,
    second, ... in turn.

    Drawn from the tested latents that are no discovery, or, where those are too few, from all
    tested ones that are neither penalised nor monitors. Each one's tau makes it fire as often on
    discovery's rejected texts as its match does.
    """
    targets = np.array([p["latent"] for p in penalised], dtype=np.int64)
    each = math.ceil(config.select.random_candidates / max(len(targets), 1))
    free = table[
        table["tested"] & (table["weight"] != 0) & ~table.index.isin([*targets, *monitors])
    ]
    null = free[~free["discovered"]]
    pool = null if len(null) >= each * len(targets) else free
    tiny = 1e-9
    matched_on = np.stack(
        [np.log(density(table).to_numpy() + tiny), np.log(table["weight"].abs().to_numpy() + tiny)],
        axis=1,
    )
    drawn = matched_at_random(
        targets, pool.index.to_numpy(dtype=np.int64), matched_on, each, config.seed
    )
    rates = [firing_rate(encoded, p["latent"], p["tau"]) for p in penalised]
    candidates = []
    for turn in range(each):
        for target, latents, rate in zip(penalised, drawn, rates, strict=True):
            if turn < len(latents):
                z = values_on(encoded, "discovery", "rejected", [latents[turn]])[:, 0]
                row: Any = table.loc[latents[turn]]
                effect = (
                    None
                    if math.isnan(row["effect_validation"])
                    else float(row["effect_validation"])
                )
                candidates.append(
                    {
                        "latent": latents[turn],
                        "tau": max(float(np.quantile(z, 1 - rate)), 0.0),
                        "alpha": target["alpha"],
                        "matched_to": target["latent"],
                        "weight": float(row["weight"]),
                        "density": float(density(row)),
                        "effect": effect,
                    }
                )
    return candidates[: config.select.random_candidates]


def density(table: Any) -> Any:
    """How often a latent fires on discovery, chosen and rejected texts counting alike."""
    return (table["density_chosen"] + table["density_rejected"]) / 2


def _by_size(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """By absolute effect, largest first; ties by the latent's number."""
    return table.iloc[np.lexsort([table["latent"].to_numpy(), -table[column].abs().to_numpy()])]


# What penalising them means


def penalised_latents(
    harming: pd.DataFrame, encoded: Encoded, config: Config, warnings: list[str]
) -> list[dict[str, Any]]:
    """The first `select.penalised` harming latents with tau and alpha as numbers. Raises UserError
    where no penalty comes of it.
    """
    wanted, penalty = config.select.penalised, config.ppo.penalty
    trains = [arm for arm in config.ppo.arms if arm != "no_penalty"]
    latents = [int(latent) for latent in harming.index[:wanted]]
    if not latents and trains:
        raise UserError(
            "no harming latent was found to penalise: none of those active on"
            f" {config.probe.min_prompts_active} discovery prompts has a negative weight, fires"
            " more on rejected texts and raises the margin; give more pairs to discovery, lower"
            " probe.min_prompts_active, or set ppo.arms=[no_penalty]"
        )
    if len(latents) < wanted:
        warnings.append(f"{len(latents)} of {wanted} latents to penalise found")
    unconfirmed = [latent for latent in latents if not harming.loc[latent, "confirmed"]]
    if unconfirmed:
        warnings.append(
            f"penalised latents not confirmed on validation: {', '.join(map(str, unconfirmed))}"
        )
    alpha = penalty.alpha * (reward_sd(encoded) if penalty.alpha_unit == "reward_sd" else 1.0)
    entries = [
        {"latent": latent, "tau": resolved_tau(latent, encoded, penalty), "alpha": alpha}
        for latent in latents
    ]
    if penalty.kind != "density":
        _refuse_silent(entries, encoded, penalty, bool(trains), warnings)
    return entries


def resolved_tau(latent: int, encoded: Encoded, penalty: PenaltyConfig) -> float:
    """The fixed tau, or the quantile of z over discovery's rejected texts, but no less than 0, the
    z of a latent that is off.
    """
    if penalty.tau is not None:
        return penalty.tau
    assert penalty.tau_quantile is not None
    z = values_on(encoded, "discovery", "rejected", [latent])[:, 0]
    return max(float(np.quantile(z, penalty.tau_quantile)), 0.0)


def firing_rate(encoded: Encoded, latent: int, tau: float) -> float:
    """P(z > tau) on discovery's rejected texts."""
    return float((values_on(encoded, "discovery", "rejected", [latent]) > tau).mean())


def reference_rates(encoded: Encoded, latents: Sequence[int]) -> dict[str, float]:
    """How often each latent fires on discovery's chosen texts, one half added to either count."""
    fires = values_on(encoded, "discovery", "chosen", latents) > 0
    return {
        str(latent): float((n + 0.5) / (len(fires) + 1))
        for latent, n in zip(latents, fires.sum(axis=0), strict=True)
    }


def reward_sd(encoded: Encoded) -> float:
    """Standard deviation of the reward over discovery's texts. Raises UserError where there are
    fewer than two.
    """
    rewards = encoded.texts.loc[encoded.texts["part"] == "discovery", "reward"].to_numpy(
        dtype=np.float64
    )
    if len(rewards) < 2:
        raise UserError(
            f"discovery has {len(rewards)} texts, too few to select latents on; give it a larger"
            " share in data.sources"
        )
    return float(rewards.std(ddof=1))


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
