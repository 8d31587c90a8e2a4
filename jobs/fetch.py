"""Fetch models and data at their pinned revisions, where there is a network: `python -m jobs fetch
--config C --run R`.

Publishes `models.json`: where each model and data set lies, the SHA-256 of their files, and how
many prompts and pairs were read.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from sarm.config import Config
from sarm.data.datasets import load_data, source_files
from sarm.hub import local_model
from sarm.records import Models
from sarm.run import Attempt, RunDir, file_sha256


def run(config: Config, run: RunDir, unit: str, attempt: Attempt) -> None:
    """Download what the config names and record it."""
    wanted = [
        ("policy", config.policy.model, config.policy.revision),
        ("sarm", config.sarm.model, config.sarm.revision),
    ]
    wanted += [(name, given.model, given.revision) for name, given in config.classifiers.items()]
    found: dict[str, Any] = {}
    for i, (name, model, revision) in enumerate(wanted):
        attempt.progress(i, len(wanted) + 1, f"model {model}")
        folder = local_model(model, revision, download=True)
        found[name] = described(folder, model, revision)
        backbone = backbone_of(folder)
        if backbone is not None:
            place = local_model(backbone["model"], backbone.get("revision"), download=True)
            found["sarm_backbone"] = described(place, backbone["model"], backbone.get("revision"))
    attempt.progress(len(wanted), len(wanted) + 1, "data")
    data = load_data(config.data, download=True)
    files = {name: source_files(name, source) for name, source in config.data.sources.items()}
    found["data"] = {
        "files": {
            name: [
                {"path": str(file), "commit": commit_of(file), "sha256": file_sha256(file)}
                for file in paths
            ]
            for name, paths in files.items()
        },
        "prompts": Counter(f"{p.source}/{p.part}" for p in data.prompts),
        "pairs": Counter(f"{p.source}/{p.prompt.part}" for p in data.pairs),
        "skipped": data.skipped,
    }
    Models(**found).write(attempt.path("models.json"))
    attempt.progress(len(wanted) + 1, len(wanted) + 1, "done")
    attempt.publish()


def backbone_of(folder: Path) -> dict[str, Any] | None:
    """The model that a SARM folder takes its decoder layers from, or None where it holds its
    own.
    """
    backbone: dict[str, Any] | None = json.loads(
        (folder / "config.json").read_text(encoding="utf-8")
    ).get("backbone")
    return backbone


def described(folder: Path, model: str, revision: str | None) -> dict[str, Any]:
    """A model's place and the hashes of its config and weights."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    sha256 = {file.name: file_sha256(file) for file in files}
    return {
        "model": model,
        "revision": revision,
        "commit": commit_of(folder),
        "path": str(folder),
        "sha256": sha256,
    }


def commit_of(path: Path) -> str | None:
    """The commit of a file or folder in the hub's cache, `.../snapshots/COMMIT/...`; None for what
    is not from there.
    """
    _, snapshots, after = path.as_posix().rpartition("/snapshots/")
    return after.partition("/")[0] if snapshots else None
