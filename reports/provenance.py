"""Where a report's numbers come from, whether another run's may be set beside them, and what they
cost: `provenance(run, frames)` and its like, for `reports.figures`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reports.frames import Frames, shown
from sarm.config import PHASES, UserError
from sarm.cost import REFERENCE_GPUS, counts, planned, shapes, used
from sarm.run import RunDir


def provenance(run: RunDir, frames: Frames) -> dict[str, Any]:
    done = frames.phases[frames.phases["status"] == "done"].drop(
        columns=["status", "cause", "config_sha256", "seconds", "needs"]
    )
    return {
        "folder": shown(run.path),
        "config_sha256": run.config.sha256,
        "seed": run.config.seed,
        "ppo_seeds": list(run.config.ppo.seeds),
        "git_commits": sorted({c for c in done["git_commit"] if isinstance(c, str)}),
        "images": sorted({i for i in done["image_sha256"] if isinstance(i, str)}),
        "commits": commits_of(frames.models or {}),
        "units": done.astype(object).where(done.notna(), None).to_dict("records"),
    }


def commits_of(models: Mapping[str, Any]) -> list[dict[str, str]]:
    """Each model's and data set's repository, the revision in the config and the commit it stood
    at when it was fetched; what came from no repository is left out.
    """
    files = models.get("data", {}).get("files", {})
    found = [
        (entry["model"], entry["revision"], entry["commit"])
        for name, entry in models.items()
        if isinstance(entry, dict) and name != "data"
    ] + [(file["repo"], file["revision"], file["commit"]) for one in files.values() for file in one]
    return [
        {"repository": repository, "revision": revision, "commit": commit}
        for repository, revision, commit in dict.fromkeys(found)
        if repository and revision and commit
    ]


SOURCES = {
    "evaluation": ("evaluate", ("generations.parquet", "summary.json")),
    "changes": ("evaluate", ("generations.parquet",)),
    "distances": ("evaluate", ("generations.parquet", "summary.json")),
    "verdict": ("evaluate", ("generations.parquet",)),
    "latents": ("evaluate", ("generations.parquet",)),
    "samples": ("evaluate", ("generations.parquet",)),
    "training": ("ppo", ("metrics.jsonl",)),
    "sweep": ("evaluate", ("generations.parquet",)),
    "features": ("select", ("features.json", "table.parquet")),
    "rankings": ("select", ("features.json",)),
    "cards": ("cards", ("cards.json",)),
    "opened": ("check_sarm", ("check.json",)),
    "calibration": ("calibrate", ("readings.json",)),
    "steered": ("evaluate", ("summary.json",)),
    "steering": ("steer", ("summary.json",)),
}
"""The job outputs that each section is made of."""


def sources(frames: Frames) -> dict[str, list[dict[str, Any]]]:
    """By section, the published files behind it: path within the run, their SHA-256, and who wrote
    them.
    """
    units = frames.phases.set_index(["phase", "unit"])
    found: dict[str, list[dict[str, Any]]] = {}
    for section, (phase, names) in SOURCES.items():
        found[section] = [
            {
                "file": f"{phase}/{unit}/{manifest.outputs[name].file}",
                "sha256": manifest.outputs[name].sha256,
                "manifest_sha256": units.at[(phase, unit), "manifest_sha256"],
                "git_commit": manifest.git_commit,
                "image_sha256": manifest.image_sha256,
            }
            for (its_phase, unit), manifest in frames.manifests.items()
            if its_phase == phase
            for name in names
            if name in manifest.outputs
        ]
    return found


def comparable(run: RunDir, frames: Frames) -> dict[str, Any]:
    """What has to be the same in two runs for their figures to be set side by side; see
    `reports.compare`.
    """
    config, models = run.config, frames.models or {}
    data = models.get("data", {}).get("files", {})
    return {
        "reward model": {
            "model": config.sarm.model,
            "revision": config.sarm.revision,
            "use_topk": config.sarm.use_topk,
            "max_length": config.sarm.max_length,
        },
        "reward model's files": models.get("sarm", {}).get("sha256"),
        "policy": {"model": config.policy.model, "revision": config.policy.revision},
        "policy's files": models.get("policy", {}).get("sha256"),
        "data split": config.data.model_dump(mode="json"),
        "data files": (
            {name: sorted(file["sha256"] for file in files) for name, files in data.items()} or None
        ),
        "evaluation": config.evaluate.model_dump(mode="json"),
        "seed": config.seed,
        "verdict rules": config.verdict.model_dump(mode="json"),
    }


def cost(run: RunDir, frames: Frames) -> list[dict[str, Any]]:
    """GPU-hours by phase, planned for the reference's GPUs (None where sizes are not known here)
    and used, and the bytes that each phase left.
    """
    config, data = run.config, (frames.models or {}).get("data", {})
    plan: dict[str, float] = {}
    try:
        policy, sarm = shapes(config)
        if policy is not None and sarm is not None:
            known = counts(data.get("pairs"), data.get("prompts"))
            for cost in planned(config, policy, sarm, known, REFERENCE_GPUS):
                plan[cost.phase] = plan.get(cost.phase, 0.0) + cost.gpu_hours
    except UserError:  # it does not fit those GPUs
        plan = {}
    took = used(frames.manifests)
    left: dict[str, int] = {}
    n_units = Counter(phase for phase, _ in frames.manifests)
    for (phase, _), made in frames.manifests.items():
        left[phase] = left.get(phase, 0) + sum(output.bytes for output in made.outputs.values())
    return [
        {
            "phase": phase,
            "planned": plan.get(phase) if plan else None,
            "used": took.get(phase, 0.0),
            "bytes": left[phase],
            "units": n_units[phase],
        }
        for phase in PHASES
        if phase in left
    ]


def outputs(run: RunDir, frames: Frames, policy: str) -> list[dict[str, Any]]:
    """What the report points to. A manifest may name a `location` or a `training_log` of its own,
    where a run was brought from elsewhere.
    """
    found = []
    ppo = frames.manifests.get(("ppo", policy))
    if ppo is not None:
        weights = {
            name: output for name, output in ppo.outputs.items() if name.startswith("policy/")
        }
        folder = shown(run.folder("ppo", policy)) + "".join(
            f"/{Path(output.file).parts[0]}" for output in list(weights.values())[:1]
        )
        n_bytes = sum(output.bytes for output in weights.values())
        found.append(
            {
                "path": ppo.more.get("location", folder) + "/",
                "what": "PPO-trained policy model",
                "bytes": n_bytes,
                "removed": any(
                    not (run.folder("ppo", policy) / output.file).is_file()
                    for output in weights.values()
                ),
            }
        )
    for phase, what in (
        ("probe", "Phase 2 causal probe results"),
        ("steer", "Steering evaluation results"),
    ):
        units = [manifest for (name, _), manifest in frames.manifests.items() if name == phase]
        if units:
            found.append(
                {"path": units[0].more.get("location", shown(run.path / phase)) + "/", "what": what}
            )
    log = run.log("ppo", policy)
    if ppo is not None and "training_log" in ppo.more:
        found.append({"path": ppo.more["training_log"], "what": "Full training log"})
    elif log.is_file():
        found.append({"path": shown(log), "what": "Full training log"})
    return found
