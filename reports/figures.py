"""Data frames -> every figure of the reports, as plain values by section: `figures(run,
read_run(run), verdict, date)`.

Only this package aggregates: jobs leave one row per example. `reports.text` and `reports.page` turn
figures into reports.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from reports.abstract import abstract
from reports.doses import random_entries, random_sets
from reports.frames import Frames, arm_rank, monitor_latents, penalised_latents
from reports.ladder import rungs
from reports.monitors import monitor_choice
from reports.policies import (
    against_base,
    answered_rates,
    compared_figures,
    distance_rows,
    mean,
    policy_table,
    refusal_reward,
)
from reports.provenance import comparable, cost, outputs, provenance, sources
from reports.seed import seed_figures
from reports.texts import shown_cause, texts_figures
from sarm.evaluation.verdict import rule_words
from sarm.run import RunDir

SHOWN_STEPS = 5
"""The training progression shows the middle of each fifth of the steps, and the last step."""
HISTOGRAM = ("off", "to tau/2", "to 0.9 tau", "to tau", "to 1.5 tau", "beyond")
"""Where a latent's value lies; the fourth is the mass just below the threshold."""


def figures(run: RunDir, frames: Frames, verdict: dict[str, Any], date: str) -> dict[str, Any]:
    """Every figure of the report as plain values, by section; `verdict` is the record of the
    rule's outcome.
    """
    config = run.config
    shown_policy = f"penalty-seed{config.ppo.seeds[0]}"
    found = {
        "date": date,
        "run": config.name,
        "configuration": _configuration(run, frames, shown_policy),
        "features": frames.features.tree() if frames.features else None,
        "readings": frames.readings.tree() if frames.readings else None,
        "check_sarm": frames.check_sarm,
        "has_card": config.check_sarm.card is not None,
        "cost": cost(run, frames),
        "seed": seed_figures(run, frames, _progression(frames.training, shown_policy)),
        "penalty": _penalty(run, frames, shown_policy),
        "shown_policy": shown_policy,
        "progression": _progression(frames.training, shown_policy),
        "penalties": _column(frames.training, shown_policy, "objective/penalty"),
        "compound_rewards": _column(frames.training, shown_policy, "objective/compound"),
        "steering": frames.steering,
        "cards": _cards(frames.cards),
        "steered": frames.steered,
        "outputs": outputs(run, frames, shown_policy),
        "texts": texts_figures(config),
        "failures": _failures(run, frames.phases),
        "phases": _phases(frames.phases),
        "training": _training(frames),
        "compared": compared_figures(run, frames),
        "distances": distance_rows(run, frames),
        "policies": policy_table(frames.generations).to_dict("records"),
        "against_base": against_base(frames.generations),
        "answered": answered_rates(frames.generations),
        "refusal_reward": refusal_reward(frames.generations),
        "latents": (
            latent_table(frames.generations, penalised_latents(run, frames.features)).to_dict(
                "records"
            )
        ),
        "random_latents": (
            latent_table(frames.generations, random_entries(run, frames)).to_dict("records")
        ),
        "monitors": (
            latent_table(frames.generations, monitor_latents(frames.features)).to_dict("records")
        ),
        "random_sets": random_sets(run, frames),
        "monitor_choice": monitor_choice(run, frames),
        "evaluations": frames.evaluations,
        "verdict": verdict,
        "rule": list(rule_words(config.verdict)),
        "provenance": provenance(run, frames),
        "sources": sources(frames),
        "comparable": comparable(run, frames),
    }
    return found | {
        "abstract": abstract(found, config.verdict),
        "ladder": rungs(verdict, config.verdict),
    }


def _cards(cards: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the report says of the cards; the cards themselves are a page of their own."""
    if cards is None:
        return None
    scores = {
        how: [
            card["label"][how]["score"]
            for card in cards["cards"]
            if card["label"] and card["label"][how]["score"] is not None
        ]
        for how in ("detection", "fuzzing")
    }
    return {
        "n": len(cards["cards"]),
        "minimal_edits": cards["minimal_edits"],
        "labels": cards["labels"],
        "label_scores": {
            how: {"n": len(of), "mean": sum(of) / len(of) if of else None}
            for how, of in scores.items()
        },
    }


def _configuration(run: RunDir, frames: Frames, policy: str) -> dict[str, Any]:
    manifest = frames.manifests.get(("ppo", policy))
    more = manifest.more if manifest else {}
    parameters = [
        m.more["sarm_parameters"] for m in frames.manifests.values() if "sarm_parameters" in m.more
    ]
    return {
        "policy": run.config.policy.model,
        "reward_model": run.config.sarm.model,
        "reward_parameters": parameters[0] if parameters else None,
        "hardware": hardware(more.get("device_names", []), manifest.device if manifest else "None"),
        "training_s": more.get("training_s"),
        "steps": more.get("steps"),
    }


def hardware(device_names: Sequence[str], device: str) -> str:
    """`4x NVIDIA H100 GPUs` from what each rank ran on; the memory size in a device's name is left
    out.
    """
    counts = Counter(re.sub(r"[ -]+\d+ ?GB\b.*$", "", name).strip() for name in device_names)
    if device.startswith("cuda"):
        return " and ".join(f"{n}x {name} GPU{'s' if n > 1 else ''}" for name, n in counts.items())
    return " and ".join(
        f"CPU ({name})" if n == 1 else f"CPU ({name}), {n} processes" for name, n in counts.items()
    )


def _penalty(run: RunDir, frames: Frames, policy: str) -> dict[str, Any]:
    config, features = run.config.ppo.penalty, frames.features
    entries = frames.calibrations.get(policy, {}).get("penalised") or (
        [entry.tree() for entry in features.penalised] if features else []
    )
    latents = [entry["latent"] for entry in entries]
    listed = [f.latent for f in features.harming] if features else []
    return {
        "kind": config.kind,
        "has_tau": config.has_tau,
        "words": config.words,
        "latents": latents,
        "taus": [entry["tau"] for entry in entries],
        "alphas": [entry["alpha"] for entry in entries],
        "top_harming": bool(latents) and latents == listed[: len(latents)],
        "tau_quantile": config.tau_quantile,
        "alpha_in_reward_sd": config.alpha if config.alpha_unit == "reward_sd" else None,
        "clamp": config.clamp,
    }


def _column(training: pd.DataFrame, policy: str, name: str) -> list[list[float]]:
    """One metric of one policy as (step, value) pairs."""
    mine = training[training["policy"] == policy]
    return mine[["step", name]].astype(float).to_numpy().tolist() if name in mine else []


def _progression(training: pd.DataFrame, policy: str) -> list[dict[str, Any]]:
    """The steps that the report shows: reward is the compound reward, loss the trainer's total."""
    mine = training[training["policy"] == policy]
    if mine.empty:
        return []
    names = {"reward": "objective/compound", "penalty": "objective/penalty", "loss": "loss/total"}
    rows = mine.set_index("step")
    return [
        {
            "step": step,
            **{
                short: (
                    float(value)
                    if name in rows and pd.notna(value := rows[name].loc[step])
                    else math.nan
                )
                for short, name in names.items()
            },
        }
        for step in shown_steps([int(s) for s in mine["step"]])
    ]


def shown_steps(steps: Sequence[int]) -> list[int]:
    """Of the logged steps, those nearest the middle of each fifth, and the last: 10, 30, 50, 70,
    90, 100 of 100.
    """
    last = steps[-1]
    stride = max(1, round(last / SHOWN_STEPS))
    wanted = [*range(max(1, round(stride / 2)), last, stride), last]
    return sorted({min(steps, key=lambda step: (abs(step - at), step)) for at in wanted})


def _failures(run: RunDir, phases: pd.DataFrame) -> list[dict[str, Any]]:
    missing = phases[phases["status"] != "done"]
    told = [shown_cause(cause, run.config.report) for cause in missing["cause"]]
    missing = missing.assign(cause=told)
    return missing[["phase", "unit", "status", "cause", "log"]].to_dict("records")  # type: ignore[return-value]


def _phases(phases: pd.DataFrame) -> list[dict[str, Any]]:
    """A row per unit: what became of it, when, on what, and the units whose outputs it read."""
    names = ["phase", "unit", "status", "started", "ended", "seconds", "device", "host", "needs"]
    return phases[names].astype(object).where(phases[names].notna(), None).to_dict("records")  # type: ignore[return-value]


def _training(frames: Frames) -> list[dict[str, Any]]:
    """A row a trained policy: its metrics averaged over the last tenth of its steps, and what it
    took.
    """
    names = {
        "reward": "objective/scores",
        "penalty": "objective/penalty",
        "kl": "objective/kl",
        "loss": "loss/total",
        "tokens_per_s": "tokens_per_s",
    }
    rows = []
    for policy, table in frames.training.groupby("policy", sort=False):
        trained = frames.manifests.get(("ppo", str(policy)))
        more = trained.more if trained else {}
        end = table.tail(max(1, len(table) // 10))
        means = {short: mean(end[name]) if name in end else None for short, name in names.items()}
        rows.append(
            {
                "policy": policy,
                "arm": table["arm"].iloc[0],
                "steps": int(table["step"].max()),
                "training_s": more.get("training_s"),
                "ended_early": more.get("ended_early"),
                "parent": more.get("parent"),
                **means,
            }
        )
    return sorted(rows, key=lambda row: (arm_rank(row["arm"]), row["policy"]))


def latent_table(generations: pd.DataFrame, entries: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A row per latent, arm and kind of prompt: the rate above tau, that of values above tau that
    rank just below TopK's cutoff, mean z, and the histogram about tau. Of an entry with `seeds`,
    which the random arm penalised in those alone, that arm's rows are of those seeds.
    """
    if generations.empty:
        return pd.DataFrame()
    rows = []
    for entry in entries:
        tau, column, below = entry["tau"], f"z_{entry['latent']}", f"below_{entry['latent']}"
        for kind in ("unsafe", "safe"):
            of_kind = generations[generations["kind"] == kind]
            for arm in sorted(of_kind["arm"].unique(), key=arm_rank):
                mine = of_kind[of_kind["arm"] == arm]
                seeds = entry.get("seeds") if arm == "random" else None
                if seeds is not None:
                    mine = mine[mine["seed"].isin(seeds)]
                z = mine[column].dropna().to_numpy(float) if column in mine else np.array([])
                if not len(z):
                    continue
                passed = float((mine[below] > tau).mean()) if below in mine else None
                rows.append(
                    {
                        "latent": entry["latent"],
                        "tau": tau,
                        "arm": arm,
                        "seeds": seeds,
                        "kind": kind,
                        "n": len(z),
                        "rate": float((z > tau).mean()),
                        "below_cutoff": passed,
                        "mean_z": float(z.mean()),
                        "histogram": histogram(z, tau),
                    }
                )
    return pd.DataFrame(rows)


def histogram(z: np.ndarray, tau: float) -> list[float]:
    """Shares of values in the bins of `HISTOGRAM`; with tau = 0 a value is either off or beyond."""
    edges = np.array([0.0, tau / 2, 0.9 * tau, tau, 1.5 * tau]) if tau > 0 else np.array([tau] * 5)
    bins = np.searchsorted(edges, z, side="left")
    return [float((bins == i).mean()) for i in range(len(HISTOGRAM))]
