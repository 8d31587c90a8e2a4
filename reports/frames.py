"""A run directory -> data frames: `read_run(run)` reads what is there and names what is not."""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from reports.distances import Compared, compared_distance, rows_at
from sarm.config import ARMS, PHASES, ROOT, Phase, UserError, arm_and_seed
from sarm.records import (
    Calibration,
    Cards,
    Evaluation,
    Features,
    KeptPolicies,
    Manifest,
    Models,
    OwnExamples,
    Readings,
    SarmCheck,
    Steered,
    Steering,
    read_training_log,
)
from sarm.run import Published, RunDir, holds_tensors, latest, without_progress

LOG_TAIL_BYTES = 65_536
ERROR_LINE = re.compile(
    r"^(error:|slurmstepd: error|[\w.]*(Error|Exception|Interrupt)\b|.*\b(Killed|CANCELLED|TIME"
    r" LIMIT|out of memory)\b)",
    re.IGNORECASE,
)


class Frames(NamedTuple):
    """What a run left. Missing phases leave empty frames and dicts."""

    phases: pd.DataFrame
    """A row per unit: phase, unit, status, cause, log, and what its manifest says."""
    manifests: dict[tuple[str, str], Manifest]
    features: Features | None
    readings: Readings | None
    """What calibrate found on the base policy's responses; `features` has its thresholds and
    monitors.
    """
    calibrations: dict[str, dict[str, Any]]
    """By trained policy: the latents its reward penalised, with tau and alpha in the reward's
    unit.
    """
    training: pd.DataFrame
    """A row per policy and step: policy, arm, seed, step, and the trainer's metrics."""
    steering: dict[str, Any] | None
    evaluations: dict[str, dict[str, Any]]
    generations: pd.DataFrame
    """A row per policy and response: policy, arm, seed, and the columns that evaluate wrote. Of the
    trained policies as they were at the distance that is compared (`compared`).
    """
    probe: pd.DataFrame
    """A row per latent: what the probe measured of it."""
    models: dict[str, Any] | None
    """What fetch recorded: where models and data lie, and their hashes."""
    cards: dict[str, Any] | None
    sweep: pd.DataFrame
    """As `generations`, of the policies of a sweep, which stand in no other frame but `every`."""
    steered: dict[str, Any] | None
    """What pushing the base policy along decoder directions changed."""
    compared: Compared
    """At which KL distance policies are compared."""
    every: pd.DataFrame
    """`generations` and `sweep` at every distance at which policies were kept, and at the end."""
    kept: dict[str, list[dict[str, Any]]]
    """By trained policy, when it reached which distance."""
    examples: dict[str, dict[str, Any]]
    """By policy, what watched latents do at every token of some of its responses."""
    check_sarm: dict[str, Any] | None
    """The SARM beside its card."""


def read_run(
    run: RunDir,
    *,
    patience_s: float = 0.0,
    failed: Mapping[tuple[str, str], str] = MappingProxyType({}),
) -> Frames:
    """Read every finished unit; a missing or damaged one is a row of `phases` with its cause.

    `patience_s` is how long, in all, to look for manifests that a network file system may not show
    yet; not for those of the units that are known to have `failed`, by how their jobs ended: empty
    where one never began.
    """
    deadline = time.monotonic() + patience_s
    published: dict[tuple[str, str], Published] = {}
    rows = []
    for phase in PHASES:
        for unit in run.config.units(phase):
            if phase == "report":
                continue
            try:
                left_s = 0.0 if (phase, unit) in failed else max(0.0, deadline - time.monotonic())
                found = run.read(phase, unit, patience_s=left_s)
            except UserError:
                found = None
            # A report reads no weights: a run can be kept, and reported, without them.
            problem = run.why_not_done(phase, unit, hashes=False, tensors=False)
            if found is not None and problem is None:
                published[phase, unit] = found
            rows.append(_phase_row(run, phase, unit, found, problem, failed.get((phase, unit))))
    return _read_outputs(pd.DataFrame(rows), published, run)


def _read_outputs(
    phases: pd.DataFrame, published: dict[tuple[str, str], Published], run: RunDir
) -> Frames:
    """Frames of published outputs; an output that is damaged marks its unit as failed."""
    manifests = {key: p.manifest for key, p in published.items()}
    features, readings, steering, models, cards, steered = None, None, None, None, None, None
    check_sarm = None
    calibrations, evaluations, kept, examples = {}, {}, {}, {}
    training, generations, sweep = [], [], []
    points = run.config.sweep_points()
    probe = pd.DataFrame()
    for (phase, unit), unit_files in published.items():
        try:
            if phase == "ppo" and "kept.json" in unit_files.manifest.outputs:
                kept[unit] = KeptPolicies.read(unit_files.path("kept.json")).tree()["kept"]
            if phase == "fetch":
                if "models.json" in unit_files.manifest.outputs:
                    models = Models.read(unit_files.path("models.json")).tree()
            elif phase == "check_sarm":
                check_sarm = SarmCheck.read(unit_files.path("check.json")).tree()
            elif phase == "select":
                features = Features.read(unit_files.path("features.json"))
                if "table.parquet" in unit_files.manifest.outputs:
                    probe = pd.read_parquet(unit_files.path("table.parquet"))
            elif phase == "calibrate":
                readings = Readings.read(unit_files.path("readings.json"))
            elif phase == "steer":
                steering = Steering.read(unit_files.path("summary.json")).tree()
            elif phase == "cards":
                cards = Cards.read(unit_files.path("cards.json")).tree()
            elif unit == "steered":
                steered = Steered.read(unit_files.path("summary.json")).tree()
            elif unit in points:
                if phase == "evaluate":
                    sweep.append(
                        _with_policy(pd.read_parquet(unit_files.path("generations.parquet")), unit)
                    )
            elif phase == "ppo":
                training.append(_metrics(unit_files.path("metrics.jsonl"), unit))
                calibrations[unit] = Calibration.read(unit_files.path("calibration.json")).tree()
            elif phase == "evaluate":
                summary = Evaluation.read(unit_files.path("summary.json")).tree()
                rows = pd.read_parquet(unit_files.path("generations.parquet"))
                if "examples.json" in unit_files.manifest.outputs:
                    examples[unit] = OwnExamples.read(unit_files.path("examples.json")).tree()
                generations.append(_with_policy(rows, unit))
                evaluations[unit] = summary
        except (UserError, ValueError, OSError) as error:
            at = (phases["phase"] == phase) & (phases["unit"] == unit)
            phases.loc[at, ["status", "cause"]] = ["damaged", " ".join(str(error).split())]
            manifests.pop((phase, unit))
    if features is not None and readings is not None:
        features = readings.applied(features)
    penalised = penalised_latents(run, features)
    every = _joined([*generations, *sweep], "prompt_id")
    if "distance" not in every:  # of runs before policies were kept
        every["distance"] = math.nan
    monitors = usable_monitors(every, monitor_latents(features), run.config.verdict.monitor_rates)
    every = _with_firing(every, penalised, monitors)
    compared = compared_distance(run.config, every)
    here = rows_at(every, compared.distance)
    swept = here["policy"].isin(list(points))
    return Frames(
        phases=phases,
        manifests=manifests,
        features=features,
        readings=readings,
        steering=steering,
        calibrations=calibrations,
        evaluations=evaluations,
        training=_joined(training, "step"),
        generations=here[~swept].reset_index(drop=True),
        probe=probe,
        models=models,
        cards=cards,
        steered=steered,
        sweep=here[swept].reset_index(drop=True),
        compared=compared,
        every=every,
        kept=kept,
        examples=examples,
        check_sarm=check_sarm,
    )


def _phase_row(
    run: RunDir,
    phase: Phase,
    unit: str,
    found: Published | None,
    problem: str | None,
    end: str | None,
) -> dict[str, Any]:
    """`end` is how the unit's job ended, where that is known."""
    log = run.log(phase, unit)
    row: dict[str, Any] = {
        "phase": phase,
        "unit": unit,
        "status": "done",
        "cause": "",
        "log": shown(log) if log.is_file() else "",
    }
    if problem is not None:
        began = log.is_file() if end is None else end != ""
        row["status"] = "failed" if began else "not run"
        row["log"] = row["log"] if began else ""
        causes = [
            end,
            last_error(log) if began else "",
            "" if problem == "no manifest" else problem,
        ]
        row["cause"] = "; ".join(filter(None, causes)) or "it never started"
    manifest = found.manifest if found is not None and problem is None else None
    row["removed"] = manifest is not None and any(
        holds_tensors(name) and not (run.folder(phase, unit) / output.file).is_file()
        for name, output in manifest.outputs.items()
    )
    for name in (
        "attempt",
        "git_commit",
        "image_sha256",
        "config_sha256",
        "job_id",
        "seed",
        "host",
        "device",
        "started",
        "ended",
    ):
        row[name] = getattr(manifest, name, None)
    row["seconds"] = (
        (
            datetime.fromisoformat(manifest.ended) - datetime.fromisoformat(manifest.started)
        ).total_seconds()
        if manifest
        else None
    )
    row["needs"] = sorted(
        {
            "/".join(key.split("/")[:2])
            for key, sha256 in (manifest.inputs if manifest else {}).items()
            if sha256 and not key.startswith("/")
        }
    )
    row["manifest_sha256"] = (
        hashlib.sha256((run.folder(phase, unit) / "manifest.json").read_bytes()).hexdigest()
        if manifest
        else None
    )
    return row


def last_error(log: Path) -> str:
    """The last line of a log that names an error, else its last line that is no progress bar;
    empty where its last job wrote none.
    """
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = [
        line
        for line in (
            re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[^\S\n ]|[\x00-\x08\x0b-\x1f]", " ", raw).strip()
            for raw in text.splitlines()
        )
        if line
    ]
    lines = latest(lines)
    if lines and not without_progress(lines):
        return "its log ends in a progress bar, without a word why"
    lines = without_progress(lines)
    named = [line for line in lines if ERROR_LINE.search(line)]
    return " ".join((named or lines or [""])[-1].split())[:400]


def _metrics(path: Path, unit: str) -> pd.DataFrame:
    """The trainer's log, one row per step; of a step logged twice the later line counts. People
    count steps from 1.
    """
    table = pd.DataFrame(read_training_log(path))
    if table.empty:
        table = pd.DataFrame(columns=["step"])
    table = table.drop_duplicates("step", keep="last").sort_values("step")
    table["step"] += int((table["step"] == 0).any())
    return _with_policy(table, unit)


def _with_policy(table: pd.DataFrame, unit: str) -> pd.DataFrame:
    arm, seed = arm_and_seed(unit)
    table = table.reset_index(drop=True)
    added: dict[str, Any] = {"policy": unit, "arm": arm, "seed": seed}
    for position, (name, value) in enumerate(added.items()):
        table.insert(position, name, value)
    return table


def _joined(tables: list[pd.DataFrame], key: str) -> pd.DataFrame:
    return (
        pd.concat(tables, ignore_index=True)
        if tables
        else pd.DataFrame(columns=["policy", "arm", "seed", key])
    )


def penalised_latents(run: RunDir, features: Features | None) -> list[dict[str, Any]]:
    """The harming latents that the penalty is about; a density penalty looks at no threshold but
    0.
    """
    entries = [entry.tree() for entry in features.penalised] if features else []
    if not run.config.ppo.penalty.has_tau:
        return [entry | {"tau": 0.0} for entry in entries]
    return entries


def monitor_latents(features: Features | None) -> list[dict[str, Any]]:
    """The monitors with the thresholds above which they count as firing."""
    if features is None:
        return []
    taus = {candidate.latent: candidate.tau for candidate in features.monitor_features}
    return [{"latent": latent, "tau": taus[latent]} for latent in features.monitors]


def usable_monitors(
    generations: pd.DataFrame, monitors: Sequence[dict[str, Any]], rates: tuple[float, float]
) -> list[dict[str, Any]]:
    """The monitors whose rate on the base policy's responses to unsafe prompts lies between
    `rates`: one that fires on nothing, or on everything, can show no fall.
    """
    at = (generations["arm"] == "base") & (generations.get("kind") == "unsafe")
    base = generations[at]
    return [
        m
        for m in monitors
        if len(base)
        and f"z_{m['latent']}" in base
        and rates[0] <= (base[f"z_{m['latent']}"] > m["tau"]).mean() <= rates[1]
    ]


def _with_firing(
    generations: pd.DataFrame,
    penalised: Sequence[dict[str, Any]],
    monitors: Sequence[dict[str, Any]],
) -> pd.DataFrame:
    """Generations with `penalised_fired` (some penalised latent above its tau) and
    `monitors_fired` (share of the monitors above theirs).
    """

    def above(entries: Sequence[dict[str, Any]]) -> list[pd.Series]:
        columns = [(f"z_{entry['latent']}", entry["tau"]) for entry in entries]
        return [generations[name] > tau for name, tau in columns if name in generations]

    fired, active = above(penalised), above(monitors)
    generations["penalised_fired"] = (
        np.logical_or.reduce(fired).astype(float) if fired else math.nan
    )
    generations["monitors_fired"] = np.mean(active, axis=0) if active else math.nan
    return generations


def shown(path: Path) -> str:
    """A path as people see it: relative to the checkout where it lies in it."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()


def arm_rank(arm: str) -> tuple[int, str]:
    """Sorts arms by the order of `ARMS`; one that is not named there comes after these."""
    return (list(ARMS).index(arm) if arm in ARMS else len(ARMS), arm)
