"""Run directories made up for tests and benchmarks: published outputs with numbers of one's
choice, no job run.

`evaluated_run(path)` is a finished run of the reference run's numbers; `large_run(path)` one of a
cluster's size.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sarm.config import Config, arm_and_seed, parse_config
from sarm.evaluation.detector import Detector
from sarm.evaluation.verdict import rule_sha256
from sarm.records import (
    Bounds,
    Calibration,
    Cards,
    Evaluation,
    Features,
    File,
    Intervention,
    KeptPolicies,
    KeptPolicy,
    Models,
    Readings,
    Steering,
    StepMetrics,
)
from sarm.run import Attempt, RunDir

PROMOTING = [23303, 891, 29909, 13159, 18401, 37073, 18583, 40747, 60628, 12021]
HARMING = [48659, 28879, 26446, 46231, 25241, 53027, 23067, 53670, 12653, 2754]
PROGRESSION = {
    10: (-0.102, 0.0, 0.033),
    30: (-0.326, 0.15, 0.039),
    50: (-0.262, 0.1, 0.048),
    70: (-0.132, 0.0, 0.039),
    90: (-0.266, 0.1, 0.006),
    100: (-0.256, 0.1, 0.001),
}
# Unrounded, so that the last Delta is not the difference of the printed means.
STEERING = {
    ("RB2 Safety", "chosen"): (-0.0228, -0.0228),
    ("RB2 Safety", "rejected"): (-0.1065, -0.1057),
    ("RMB Safety", "chosen"): (-0.0238, -0.02381),
    ("RMB Safety", "rejected"): (-0.13088, -0.12964),
}


def reference_config(*, sections: dict[str, Any] | None = None, **ppo: Any) -> Config:
    """The reference run's, with other settings of PPO, or whole sections beside them."""
    part = {"path": "data/x", "split": {"test": 1.0}}
    return parse_config(
        {
            "name": "reference",
            "policy": {"model": "meta-llama/Llama-3.1-8B-Instruct"},
            "sarm": {"model": "Schrieffer/Llama-SARM-4B", "use_topk": True},
            "data": {
                "sources": {
                    "rb2": {"format": "jsonl", "label": "RB2 Safety", **part},
                    "rmb": {"format": "rmb_pairs", "label": "RMB Safety", **part},
                }
            },
            "ppo": {"arms": ["penalty", "no_penalty", "random"], **ppo},
            "steer": {"bootstrap": 300},
            **(sections or {}),
        },
        "test",
    )


def feature(latent: int, role: str, confirmed: bool = True) -> dict[str, Any]:
    return {
        "latent": latent,
        "role": role,
        "confirmed": confirmed,
        "weight": -8e-4,
        "delta_z": -1.2,
        "effect": 0.0012,
        "effect_low": 0.0008,
        "effect_high": 0.0016,
        "effect_discovery": 0.0014,
        "effect_head": 0.0013,
        "effect_reselected": 0.0012,
        "effect_chosen": 0.0002,
        "effect_rejected": -0.001,
        "p": 1e-5,
        "q": 0.001,
        "p_validation": 2e-4,
        "density": 0.25,
    }


def candidate(latent: int) -> dict[str, Any]:
    """A random candidate."""
    numbers = {"tau": 0.1, "alpha": 0.1, "weight": 8e-4, "density": 0.25, "effect": None}
    return {"latent": latent, "matched_to": HARMING[0], **numbers}


def fetched(sarm_sha256: str, pairs: dict[str, int] | None = None) -> Models:
    """Fetch's result with this hash of the SARM's weights, and these pairs by source and part."""
    where = {"model": "m", "revision": None, "commit": None, "path": "/m"}
    return Models(
        policy={**where, "sha256": {"model.safetensors": "0" * 64}},
        sarm={**where, "sha256": {"model.safetensors": sarm_sha256}},
        data={"files": {}, "prompts": {}, "pairs": pairs or {}, "skipped": {}},
    )


def features(**changes: Any) -> Features:
    """Select's result with numbers of one's choice; the rest is that of the reference run."""
    found: dict[str, Any] = {
        "d_sae": 65536,
        "k": 192,
        "promoting": [feature(i, "promoting") for i in PROMOTING],
        "harming": [feature(i, "harming") for i in HARMING],
        "misleading": [],
        "penalised": [
            {"latent": i, "tau": 3.0, "alpha": 0.1, "confirmed": True} for i in HARMING[:3]
        ],
        "clamp": None,
        "monitors": HARMING[3:5],
        "random_candidates": [],
        "reward_sd": 0.1,
        "n_prompts": {"discovery": 225, "validation": 112, "test": 113},
        "n_tested": 900,
        "n_discoveries": 60,
        "n_confirmed": 24,
        "effect": "reselected",
        "permutations": {"configured": 20_000, "needed": 9000, "used": 20_000},
        "rankings": [],
        "tau_suggestions": [],
        "validity": {},
        "warnings": [],
    } | changes
    latents = [entry["latent"] for entry in found["penalised"]]
    implied = {
        "monitor_features": [
            feature(i, "harming")
            | {"tau": MONITOR_TAUS.get(i, 0.0), "max_cosine": 0.2, "max_correlation": 0.1}
            for i in found["monitors"]
        ],
        "reference_rates": {str(i): 0.2 for i in (*latents, *found["monitors"])},
        "discovery_rates": {str(i): 0.4 for i in latents},
        "steering_file": {str(f["latent"]): ["*", 0.0] for f in found["harming"]},
    }
    return Features(**implied | found)


def steering(cells: dict[tuple[str, str], tuple[float, float]], reward_sd: float = 0.1) -> Steering:
    texts, pairs = [], []
    for (source, label), (before, after) in cells.items():
        delta = after - before
        bounds = {
            "delta_low": delta - 0.0001,
            "delta_high": delta + 0.0001,
            "delta_reselected": delta,
        }
        texts.append(
            {
                "source": source,
                "label": label,
                "n": 113,
                "n_prompts": 113,
                "before": before,
                "after": after,
                "delta": delta,
                **bounds,
            }
        )
    for source in dict.fromkeys(source for source, _ in cells):
        margins = [cells[source, "chosen"][i] - cells[source, "rejected"][i] for i in (0, 1)]
        delta = margins[1] - margins[0]
        pairs.append(
            {
                "source": source,
                "n": 339,
                "n_prompts": 113,
                "margin_before": margins[0],
                "margin_after": margins[1],
                "margin_delta": delta,
                "margin_delta_low": delta - 0.0001,
                "margin_delta_high": delta + 0.0001,
                "accuracy_before": 0.91,
                "accuracy_after": 0.9,
                "to_wrong": 4,
                "to_right": 1,
            }
        )
    return Steering(
        intervention=Intervention(what="times 0 after TopK", latents=HARMING),
        reward_sd=reward_sd,
        texts=texts,
        pairs=pairs,
    )


def publish(
    run: RunDir, phase: str, unit: str = "all", files: dict[str, Any] | None = None, **more: Any
) -> Attempt:
    """A unit with these files: text, or a record."""
    attempt = Attempt(run, phase, unit)
    for name, content in (files or {"done": ""}).items():
        if isinstance(content, File):
            content.write(attempt.path(name))
        else:
            attempt.path(name).write_text(content)
    attempt.publish(**more)
    return attempt


def metrics(rows: dict[int, tuple[float, float, float]]) -> list[dict[str, float]]:
    return [
        {
            "step": s,
            "objective/compound": r,
            "objective/scores": r + p,
            "objective/penalty": p,
            "loss/total": loss,
        }
        for s, (r, p, loss) in rows.items()
    ]


def publish_ppo(
    run: RunDir,
    unit: str,
    lines: Sequence[dict[str, float]],
    policy_bytes: int = 1000,
    *,
    penalised: Any = None,
    kept: Sequence[dict[str, Any]] = (),
    **more: Any,
) -> None:
    attempt = Attempt(run, "ppo", unit)
    if kept:
        KeptPolicies(kept=[KeptPolicy(**one) for one in kept]).write(attempt.path("kept.json"))
    logged = "\n".join(StepMetrics(**line).line() for line in lines)
    attempt.path("metrics.jsonl").write_text(logged)
    Calibration(
        arm=arm_and_seed(unit)[0],
        n=64,
        reward_sd=0.1,
        penalised=penalised or [entry.tree() for entry in features().penalised],
        harming=[],
    ).write(attempt.path("calibration.json"))
    weights = attempt.directory("policy") / "model.safetensors"
    weights.write_bytes(b"")
    attempt.publish(
        **(
            {
                "training_s": 353.0,
                "steps": 100,
                "device": "cuda:0",
                "device_names": ["NVIDIA H100 80GB HBM3"] * 4,
                "rule_sha256": rule_sha256(run.config),
            }
            | more
        )
    )
    # A sparse file, and its size in the manifest: nobody hashes 30 GB for the sake of a number.
    os.truncate(weights, policy_bytes)
    manifest = run.folder("ppo", unit) / "manifest.json"
    tree = json.loads(manifest.read_text())
    tree["outputs"]["policy/model.safetensors"]["bytes"] = policy_bytes
    manifest.write_text(json.dumps(tree))


BASE = {
    "penalised": 0.5,
    "monitors": 0.45,
    "refused": 0.3,
    "over_refused": 0.06,
    "harm": 0.35,
    "tokens": 40.0,
    "kl": 2.0,
    "base_logprob": -1.25,
    "unended": 0.04,
    "cut": 0.12,
}
"""Of a policy trained without penalty. Every rate differs from every other, so that formulas that
take one for another disagree."""
SAFER = BASE | {
    "penalised": 0.12,
    "monitors": 0.15,
    "refused": 0.41,
    "over_refused": 0.07,
    "harm": 0.14,
    "tokens": 36.0,
    "kl": 2.1,
    "base_logprob": -1.5,
    "unended": 0.07,
    "cut": 0.2,
}
ALIKE = BASE | {"penalised": 0.47, "tokens": 38.0, "kl": 2.05, "unended": 0.05}
"""Of one trained with a penalty on random latents."""
MONITOR_TAUS = {HARMING[3]: 0.75, HARMING[4]: 1.5}
RANDOM_LATENT = {"latent": 777, "tau": 0.5, "alpha": 0.2}


def generations(
    rates: dict[str, float] | None = None,
    *,
    seed: int = 0,
    n: int = 120,
    n_safe: int = 90,
    samples: int = 1,
    **changes: float,
) -> pd.DataFrame:
    """Responses of one policy and seed to `n` unsafe and `n_safe` safe prompts, of which the given
    shares have each property, a point more or less by seed.

    A prompt that has a property at some rate has it at every higher one. On safe prompts latents
    fire half as often.
    """
    rates = (rates or BASE) | changes
    return _generations(tuple(rates.items()), seed, n, n_safe, samples).copy()


@lru_cache(maxsize=64)
def _generations(
    shares: tuple[tuple[str, float], ...], seed: int, n: int, n_safe: int, samples: int
) -> pd.DataFrame:
    rates = dict(shares)
    wobble = 0.005 * ((2 * seed) % 5 - 2)
    total = (n + n_safe) * samples
    unsafe = np.repeat(np.arange(n + n_safe) < n, samples)
    names = [f"u{i}" for i in range(n)] + [f"s{i}" for i in range(n_safe)]
    table = pd.DataFrame({"prompt_id": np.repeat(names, samples)})
    table["sample"] = np.tile(np.arange(samples), n + n_safe)
    table["kind"] = np.where(unsafe, "unsafe", "safe")

    def ranks(number: int) -> np.ndarray:
        """Each row's place among those of its kind, between 0 and 1."""
        rng = np.random.default_rng(number)
        parts = [rng.permutation(size * samples) + 0.5 for size in (n, n_safe)]
        return np.concatenate([part / max(len(part), 1) for part in parts])

    def share(name: str) -> np.ndarray:
        return np.where(unsafe, rates[name] + wobble, 0.5 * rates[name])

    table["response"] = [f"I cannot help with item {i % 7}." for i in range(total)]
    table["n_tokens"] = np.round(rates["tokens"] * np.where(unsafe, 1.25, 0.75) + seed % 3)
    table["truncated"] = ranks(1) < rates["cut"]
    table["unended"] = ranks(1) < rates["unended"]
    table["reward"] = 0.25 + np.where(unsafe, -0.125, 0.125)
    table["penalty"] = 0.0
    table["kl"] = rates["kl"] * np.where(unsafe, 1.1, 0.9)
    table["base_logprob"] = rates["base_logprob"]
    rising = np.where(unsafe, rates["refused"] + wobble, rates["over_refused"] - wobble / 2)
    table["refused"] = ranks(2) < rising
    table["harm"] = np.where(ranks(3) < share("harm"), 0.9, 0.05) if rates["harm"] >= 0 else np.nan
    place, fired = ranks(4), share("penalised")
    # The first fires alone on some, the others on parts of the rest: their union has the rate.
    for i, (low, high) in enumerate(((0.0, 0.6), (0.3, 0.8), (0.7, 1.0))):
        mine = (place >= low * fired) & (place < high * fired)
        table[f"z_{HARMING[i]}"] = np.where(mine, 3.5 + i, np.where(place < 0.9, 2.8, 0.0))
        table[f"below_{HARMING[i]}"] = np.where((place > 0.9) & (i == 0), 3.25, 0.0)
    for i, (latent, tau) in enumerate(MONITOR_TAUS.items()):
        place = ranks(5 + i)
        above = place < share("monitors") * (0.9 + 0.2 * i)
        table[f"z_{latent}"] = np.where(above, tau + 1, np.where(place < 0.97, tau / 2, 0.0))
    table["z_777"] = np.where(ranks(9) < 0.3, 0.8, 0.25)
    return table


def publish_evaluation(run: RunDir, unit: str, table: pd.DataFrame, **summary: Any) -> None:
    attempt = Attempt(run, "evaluate", unit)
    table.to_parquet(attempt.path("generations.parquet"))
    settings = {
        "policy": unit,
        "kl": "teacher-forced",
        "judge": None,
        "refusal_detector": Detector("a detector", 940, 1000, 30, 1000, "labels").record(),
        "samples": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 128,
        "sarm_parameters": 4_284_000_000,
        "device": "cuda:0",
        "n_prompts": table["prompt_id"].nunique(),
        "n_too_long": 0,
        "seconds": 60.0,
    }
    Evaluation(**settings | summary).write(attempt.path("summary.json"))
    attempt.publish()


CARDS = Cards(
    n_texts=0,
    n_prompts=0,
    minimal_edits={"n": 3, "enough": False, "needed": 20},
    labels=None,
    cards=[],
    texts={},
)


def readings(features: Features, **changes: Any) -> Readings:
    """What calibrate finds of an instrument that works, with the thresholds that select chose."""
    fall = {"value": 0.5, "low": 0.4, "high": 0.6}
    follows = {"value": 0.4, "low": 0.25, "high": 0.55}
    monitors = [m for m in features.monitor_features if m.latent in features.monitors]
    values: dict[str, Any] = {
        "n_prompts": 60,
        "samples": 2,
        "cut": 0.35,
        "unended": 0.05,
        "tokens": 101.5,
        "scored_tokens": 94.25,
        "reward_mean": -0.2,
        "reward_sd": features.reward_sd,
        "any_rate": 0.42,
        "candidates": [
            {
                "latent": f.latent,
                "role": f.role,
                "confirmed": f.confirmed,
                "penalised": any(p.latent == f.latent for p in features.penalised),
                "weight": f.weight or 0.0,
                "tau": 3.0,
                "rate": 0.05 * (i + 1),
                "within_prompt_share": None if i == 1 else 0.9 - 0.1 * i,
                "charge": 0.125 - 0.03 * i,
            }
            for i, f in enumerate(features.harming[:5])
        ],
        "penalised": [
            p.tree() | {"base_rate": 0.1 * (i + 1)} for i, p in enumerate(features.penalised)
        ],
        "monitors": [
            {
                "latent": m.latent,
                "tau": m.tau,
                "base_rate": 0.3,
                "max_cosine": m.max_cosine,
                "max_correlation": m.max_correlation,
            }
            for m in monitors
        ],
        "random": {},
        "stability": [{"tokens": 2, "n": 118, "kappa": 0.75, "by_latent": {}}],
        "kappa": 0.7,
        "positive_control": {
            "prompts": 80,
            "penalised": fall,
            "monitors": follows if monitors else None,
        },
        "detectable": 0.072,
        "planned": {"prompts": 120, "samples": 1, "seeds": 5},
        "unreadable": [],
        "warnings": [],
    }
    return Readings(**values | changes)


def reference_run(path: Path, **changes: Any) -> RunDir:
    """A run directory that holds the reference run's numbers; its policies were never evaluated."""
    config = reference_config(sections=changes.pop("sections", None), **changes.pop("ppo", {}))
    run = RunDir.create(path, config)
    given = {"progression": PROGRESSION, "steering": STEERING, "features": features()} | changes
    publish(run, "fetch")
    publish(run, "encode", "shard-0000-of-0001", sarm_parameters=4_284_000_000)
    publish(run, "probe", "shard-0000-of-0001", location="outputs/probes")
    publish(run, "select", files={"features.json": given["features"]})
    publish(
        run, "steer", files={"summary.json": steering(given["steering"])}, location="outputs/eval"
    )
    publish(run, "cards", files={"cards.json": CARDS})
    found = given.get("readings") or readings(given["features"])
    publish(run, "calibrate", files={"readings.json": found})
    publish_ppo(
        run,
        "penalty-seed0",
        metrics(given["progression"]),
        30 * 10**9,
        location="outputs/ppo_run1",
        training_log="outputs/ppo_training.log",
    )
    return run


CALIBRATED = {
    "kappa": 0.7,
    "penalised_control": Bounds(value=0.5, low=0.4, high=0.6),
    "monitors_control": Bounds(value=0.4, low=0.25, high=0.55),
}
"""What a calibration finds of an instrument that works."""


def evaluated_run(
    path: Path,
    *,
    penalty: dict[str, float] | None = None,
    no_penalty: dict[str, float] | None = None,
    random: dict[str, float] | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    n: int = 120,
    n_safe: int = 90,
    judge: str | None = "a/judge",
    **changes: Any,
) -> RunDir:
    """The reference run with policies of every arm and seed evaluated; each arm's rates are those
    that reach control, but for the changes given.
    """
    run = _with_base(path, seeds=seeds, n=n, n_safe=n_safe, judge=judge, **changes)
    arms = {
        "penalty": SAFER | (penalty or {}),
        "no_penalty": BASE | (no_penalty or {}),
        "random": ALIKE | (random or {}),
    }
    for unit in run.config.units("ppo"):
        arm, seed = arm_and_seed(unit)
        if unit != "penalty-seed0" and arm in arms:
            penalised = [RANDOM_LATENT] if arm == "random" else None
            publish_ppo(run, unit, metrics(PROGRESSION), penalised=penalised)
        if arm in arms:
            table = generations(arms[arm], seed=seed, n=n, n_safe=n_safe)
            publish_evaluation(run, unit, table, judge=judge)
    return run


def _with_base(
    path: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    n: int = 120,
    n_safe: int = 90,
    judge: str | None = "a/judge",
    **changes: Any,
) -> RunDir:
    """The reference run with these seeds and the base policy evaluated."""
    ppo = {"seeds": list(seeds)} | changes.pop("ppo", {})
    run = reference_run(path, ppo=ppo, **changes)
    base = BASE | {"kl": 0.0, "penalised": 0.55, "tokens": 44.0}
    publish_evaluation(run, "base", generations(base, n=n, n_safe=n_safe), judge=judge)
    return run


DISTANCES = (0.5, 1.0, 2.0)


def run_kept_at_distances(
    path: Path,
    *,
    rates: Mapping[tuple[str, float], dict[str, float]] | None = None,
    reached: Mapping[str, Sequence[float]] | None = None,
    **changes: Any,
) -> RunDir:
    """`evaluated_run` whose trained policies were kept at `DISTANCES`, or at those that `reached`
    names of a unit. Rates differ between distances: those of control are reached at 1 nat alone, at
    2 the penalty arm is too far away, at 0.5 nothing has happened. `rates` are changes to an arm's
    at a distance.
    """
    reached, rates = reached or {}, rates or {}
    ppo = {"kl_distances": list(DISTANCES)} | changes.pop("ppo", {})
    run = _with_base(path, ppo=ppo, **changes)
    arms = {"penalty": SAFER, "no_penalty": BASE, "random": ALIKE}
    at = {
        0.5: {"penalised": 0.52, "monitors": 0.44, "refused": 0.3, "over_refused": 0.06, "kl": 0.6},
        1.0: {"kl": 1.1},
        2.0: {"penalised": 0.2, "monitors": 0.2},
    }
    for unit in run.config.units("ppo"):
        arm, seed = arm_and_seed(unit)
        distances = reached.get(unit, DISTANCES)
        kept = [
            {"distance": d, "step": int(10 * d) + seed, "kl": d + 0.01, "path": f"kept/kl-{d!r}"}
            for d in distances
        ]
        penalised = [RANDOM_LATENT] if arm == "random" else None
        publish_ppo(run, unit, metrics(PROGRESSION), penalised=penalised, kept=kept)
        end = generations(arms.get(arm, SAFER), seed=seed)
        tables = [end.assign(distance=math.nan, kl=4.0)]
        for d in distances:
            found = arms.get(arm, SAFER) | at[d] | rates.get((arm, d), {})
            if (arm, d) == ("penalty", 2.0):
                found |= {"kl": 3.0}
            tables.append(generations(found, seed=seed).assign(distance=d))
        publish_evaluation(run, unit, pd.concat(tables, ignore_index=True), kept=kept)
    return run


def probe_table(n: int, found: Features, seed: int = 0) -> pd.DataFrame:
    """A made-up table of select: `n` latents, all of which fire and are tested; those that `found`
    lists have its numbers.
    """
    rng = np.random.default_rng(seed)
    effect = rng.normal(scale=3e-4, size=n)
    table = pd.DataFrame(
        {
            "latent": np.arange(n),
            "weight": rng.normal(scale=1e-3, size=n),
            "role": rng.choice(["promoting", "harming", "misleading"], n),
        }
    )
    table["tested"] = True
    table["density_chosen"] = 10 ** rng.uniform(-3, 0, n)
    table["density_rejected"] = table["density_chosen"]
    table["effect"], table["effect_validation"], table["q"] = (
        effect,
        effect + rng.normal(scale=1e-4, size=n),
        rng.uniform(size=n),
    )
    for role in ("promoting", "harming", "misleading"):
        for listed in getattr(found, role):
            if listed.latent < n:
                table.loc[listed.latent, ["effect", "effect_validation", "q"]] = [
                    listed.effect,
                    listed.effect,
                    listed.q,
                ]
    return table


def publish_select(run: RunDir, found: Features, d_sae: int) -> None:
    attempt = Attempt(run, "select")
    found.write(attempt.path("features.json"))
    probe_table(d_sae, found).to_parquet(attempt.path("table.parquet"))
    attempt.publish()


def training_curves(steps: int, arm: str, seed: int) -> list[dict[str, float]]:
    """A made-up log of the trainer's: noisy, one metric like another."""
    rng = np.random.default_rng([seed, *map(ord, arm)])
    names = [
        "objective/scores",
        "objective/penalty",
        "objective/compound",
        "objective/kl",
        "objective/entropy",
        "loss/total",
        "loss/policy_avg",
    ]
    names += [
        "loss/value_avg",
        "response/length",
        "response/cut",
        *(f"rate/{latent}" for latent in HARMING[:5]),
    ]
    drift = np.linspace(0, 1, steps)[:, None] + rng.normal(scale=0.2, size=(steps, len(names)))
    return [
        {"step": i, **dict(zip(names, map(float, row), strict=True))} for i, row in enumerate(drift)
    ]


def large_run(
    path: Path,
    *,
    d_sae: int = 65_536,
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 500,
    prompts: int = 500,
) -> RunDir:
    """Base and three trained arms with every seed, `prompts` prompts of each kind; all figures are
    made up.
    """
    run = RunDir.create(path, reference_config(seeds=list(seeds), steps=steps))
    found = features(misleading=[feature(i, "misleading") for i in (7, 8, 9)])
    publish(run, "fetch")
    publish(run, "encode", "shard-0000-of-0001", sarm_parameters=4_284_000_000)
    publish(run, "probe", "shard-0000-of-0001")
    publish_select(run, found, d_sae)
    publish(run, "steer", files={"summary.json": steering(STEERING)})
    publish(run, "cards", files={"cards.json": CARDS})
    for unit in run.config.units("ppo"):
        arm, _, seed = unit.rpartition("-seed")
        publish_ppo(run, unit, training_curves(steps, arm, int(seed)), steps=steps)
    rng = np.random.default_rng(0)
    words = np.array(["".join(map(chr, rng.integers(97, 123, 5))) for _ in range(4000)])
    for unit in run.config.units("evaluate"):
        rates = SAFER if unit.startswith("penalty") else BASE
        table = generations(rates, n=prompts, n_safe=prompts)
        table["prompt"] = [f"What about the thing numbered {i}?" for i in range(len(table))]
        table["response"] = [" ".join(words[rng.integers(0, 4000, 100)]) for _ in table.index]
        table["category"] = "made up"
        for latent in HARMING[:3]:
            table[f"z_{latent}"] *= rng.uniform(0.5, 1.5, len(table))
        publish_evaluation(run, unit, table)
    return run
