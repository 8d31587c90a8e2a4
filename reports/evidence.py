"""What a run's verdict rests on: generations, manifests and features as `decide` takes them.

verdict = judgement(run, read_run(run))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from reports.frames import Frames
from sarm.config import arm_and_seed
from sarm.evaluation.comparison import Rows
from sarm.evaluation.detector import Detector
from sarm.evaluation.verdict import Instrument, Verdict, decide, rule_sha256
from sarm.pinned import pinned
from sarm.records import Features
from sarm.run import RunDir

COLUMNS = {field: field for field in Rows._fields[3:]}
"""Of the generations, by field of `Rows`."""


def judgement(run: RunDir, frames: Frames) -> Verdict:
    """The verdict on the one comparison that the config names."""
    return decide(compared_arms(run, frames), run.config.verdict, instrument(run, frames))


def compared_arms(run: RunDir, frames: Frames) -> dict[str, Rows | None]:
    """The arms of that comparison at the distance that is compared, under the names that `decide`
    has for them.
    """
    table = pd.concat([frames.generations, frames.sweep], ignore_index=True)
    return {
        "penalty": arm_rows(table, run.config.verdict.arm),
        "no_penalty": arm_rows(table, "no_penalty"),
        "random": arm_rows(table, "random"),
    }


def arm_rows(generations: pd.DataFrame, arm: str) -> Rows | None:
    """An arm's generations of all seeds, or None where it was not evaluated. A column that
    evaluate did not write is NaN.
    """
    mine = generations[generations["arm"] == arm]
    if mine.empty:
        return None
    columns = {
        field: pd.to_numeric(mine[name]).to_numpy(float)
        if name in mine
        else np.full(len(mine), np.nan)
        for field, name in COLUMNS.items()
    }
    return Rows(
        prompt_id=mine["prompt_id"].to_numpy(str),
        seed=mine["seed"].to_numpy(int),
        unsafe=(mine["kind"] == "unsafe").to_numpy(),
        **columns,
    )


def instrument(run: RunDir, frames: Frames) -> Instrument:
    """What the run knows of its own measuring. Stability and positive control are those of the
    calibration, where there is one.
    """
    readings = frames.readings
    control = readings.positive_control if readings else None
    return Instrument(
        kappa=readings.kappa if readings else None,
        penalised_control=control.penalised if control else None,
        monitors_control=control.monitors if control else None,
        detector=shared_detector(frames.evaluations),
        confirmed=confirmed(frames.features),
        rule_problem=rule_problem(run, frames),
        kl_problem=frames.compared.problem,
    )


def shared_detector(evaluations: Mapping[str, Mapping[str, Any]]) -> Detector | None:
    """The refusal detector's errors; None where they are unknown, or policies were evaluated with
    different detectors.
    """
    records = [evaluation.get("refusal_detector") for evaluation in evaluations.values()]
    found = {
        Detector(**{field: record[field] for field in Detector._fields}) if record else None
        for record in records
    }
    return found.pop() if len(found) == 1 else None


def confirmed(features: Features | None) -> bool:
    """Whether there are penalised latents and each is listed as confirmed."""
    if features is None:
        return False
    listed = {f.latent for f in (*features.harming, *features.misleading) if f.confirmed}
    penalised = {entry.latent for entry in features.penalised}
    return bool(penalised) and penalised <= listed


def rule_problem(run: RunDir, frames: Frames) -> str:
    """Why the rule cannot be said to be the one that stood before training; empty where it can."""
    arms = {run.config.verdict.arm, "no_penalty", "random"}
    recorded = {
        unit: manifest.more.get("rule_sha256")
        for (phase, unit), manifest in frames.manifests.items()
        if phase == "ppo" and arm_and_seed(unit)[0] in arms
    }
    # training read the config with branches at the commits they stood at
    stands = {rule_sha256(run.config), rule_sha256(pinned(run))}
    if changed := [u for u, h in recorded.items() if h and h not in stands]:
        return f"rule changed after training ({', '.join(changed)})"
    if silent := [unit for unit, found in recorded.items() if not found]:
        return f"the rule was not recorded before training ({', '.join(silent)})"
    return ""
