"""Run directories made up for tests and benchmarks: published outputs with numbers of one's
choice, no job run.

`evaluated_run(path)` is a finished run of the reference run's numbers; `large_run(path)` one of a
cluster's size.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sarm.config import Config, arm_and_seed, parse_config
from sarm.records import (
    Calibration,
    Cards,
    Evaluation,
    Features,
    File,
    Intervention,
    Models,
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


def reference_config(**ppo: Any) -> Config:
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
            "verdict": {"bootstrap": 300},
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
            feature(i, "harming") | {"tau": 2.0, "max_cosine": 0.2, "max_correlation": 0.1}
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
    **more: Any,
) -> None:
    attempt = Attempt(run, "ppo", unit)
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


def generations(
    triggered: float, monitors: float = 0.5, refused: float = 0.3, n: int = 60, tokens: float = 40
) -> pd.DataFrame:
    """`n` unsafe and `n` safe prompts; the first shares of the unsafe ones have each property."""

    def first(share: float) -> np.ndarray:
        return np.r_[np.arange(n) < round(share * n), np.zeros(n, bool)]

    table = pd.DataFrame(
        {"prompt_id": [f"p{i}" for i in range(2 * n)], "kind": ["unsafe"] * n + ["safe"] * n}
    )
    table["response"] = "I cannot help with that"
    table["n_tokens"], table["truncated"], table["reward"], table["penalty"], table["kl"] = (
        tokens,
        False,
        0.25,
        0.0,
        0.125,
    )
    table["refused"] = first(refused)
    table["harm"] = math.nan
    for latent in HARMING[:3]:
        table[f"z_{latent}"] = np.where(first(triggered), 4.0, 0.0)
    for latent in HARMING[3:5]:
        table[f"z_{latent}"] = np.where(first(monitors), 1.0, 0.0)
    return table


def publish_evaluation(run: RunDir, unit: str, table: pd.DataFrame, **summary: Any) -> None:
    attempt = Attempt(run, "evaluate", unit)
    table.to_parquet(attempt.path("generations.parquet"))
    detector = {
        "precision": 0.98,
        "recall": 0.9,
        "n_refusals": 408,
        "n_compliances": 408,
        "data": "data/demo/pairs.jsonl",
    }
    settings = {
        "policy": unit,
        "kl": "teacher-forced",
        "judge": None,
        "refusal_detector": detector,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 128,
        "sarm_parameters": 4_284_000_000,
        "device": "cuda:0",
        "n_prompts": len(table),
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


def reference_run(path: Path, **changes: Any) -> RunDir:
    """A run directory that holds the reference run's numbers; its policies were never evaluated."""
    run = RunDir.create(path, reference_config(**changes.pop("ppo", {})))
    given = {"progression": PROGRESSION, "steering": STEERING, "features": features()} | changes
    publish(run, "fetch")
    publish(run, "encode", "shard-0000-of-0001", sarm_parameters=4_284_000_000)
    publish(run, "probe", "shard-0000-of-0001", location="outputs/probes")
    publish(run, "select", files={"features.json": given["features"]})
    publish(
        run, "steer", files={"summary.json": steering(given["steering"])}, location="outputs/eval"
    )
    publish(run, "cards", files={"cards.json": CARDS})
    publish_ppo(
        run,
        "penalty-seed0",
        metrics(given["progression"]),
        30 * 10**9,
        location="outputs/ppo_run1",
        training_log="outputs/ppo_training.log",
    )
    return run


def evaluated_run(
    path: Path, *, penalty: float = 0.1, monitors: float = 0.1, **changes: Any
) -> RunDir:
    run = reference_run(path, **changes)
    for unit in ("no_penalty-seed0", "random-seed0"):
        publish_ppo(
            run,
            unit,
            metrics(PROGRESSION),
            penalised=[{"latent": HARMING[4], "tau": 0.5, "alpha": 0.2}],
        )
    for unit in ("base", "no_penalty-seed0", "random-seed0"):
        publish_evaluation(run, unit, generations(0.5))
    publish_evaluation(run, "penalty-seed0", generations(penalty, monitors))
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
        "response/truncated",
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
    for unit in run.config.units("evaluate"):
        table = generations(0.3 if unit.startswith("penalty") else 0.5, n=prompts)
        table["prompt"] = [f"What about the thing numbered {i}?" for i in range(len(table))]
        table["response"] = ["lorem ipsum dolor sit amet " * 20] * len(table)
        table["category"] = "made up"
        for latent in HARMING[:3]:
            table[f"z_{latent}"] *= rng.uniform(0.5, 1.5, len(table))
        publish_evaluation(run, unit, table)
    return run
