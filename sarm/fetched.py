"""What fetch recorded of models and data, and whether it still stands: `check_unchanged(config,
models, phase)` before a phase that reads them. Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path

from sarm.config import Config, UserError
from sarm.data.datasets import source_files
from sarm.hub import local_model
from sarm.records import FetchedModel, Models
from sarm.run import file_sha256

READS: dict[str, tuple[str, ...]] = {
    "encode": ("sarm", "sarm_backbone"),
    "probe": ("sarm",),
    "select": ("sarm",),
    "steer": (),
    "cards": (),
    "calibrate": ("policy", "sarm", "sarm_backbone"),
    "ppo": ("policy", "sarm", "sarm_backbone"),
    "evaluate": ("policy", "sarm", "sarm_backbone", "judge"),
    "export": ("sarm",),
}
"""The models that a phase reads, beside the data, which all of these read."""
SMALL = ("*.json", "*.jinja", "*.model", "*.txt")
INDEX = "model.safetensors.index.json"


def model_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 by name of the files that a model is opened from: config, tokenizer, weights. Raises
    UserError where one cannot be read.
    """
    names = {file.name for pattern in SMALL for file in folder.glob(pattern)}
    whole = folder / "model.safetensors"
    if whole.exists() or whole.is_symlink():
        names = (names | {whole.name}) - {INDEX}
    elif (folder / INDEX).exists():
        names |= set(_shards(folder / INDEX))
    try:
        return {name: file_sha256(folder / name) for name in sorted(names)}
    except OSError as error:
        raise UserError(f"{folder}: {error}; fetch the model again") from None


def commit_of(path: Path) -> str | None:
    """The commit of a file or folder in the hub's cache, `.../snapshots/COMMIT/...`; None for what
    is not from there.
    """
    _, snapshots, after = path.as_posix().rpartition("/snapshots/")
    return after.partition("/")[0] if snapshots else None


def check_unchanged(config: Config, models: Models, phase: str) -> None:
    """Raises UserError where a model or data that `phase` reads are not those that fetch recorded.

    A model in the hub's cache is known by its commit, one in a folder by the hashes of its files.
    """
    for name in READS[phase]:
        recorded = getattr(models, name)
        if recorded is not None:
            _check_model(name, recorded)
    for name, source in config.data.sources.items():
        now = [file_sha256(file) for file in source_files(name, source)]
        then = [file.sha256 for file in models.data.files.get(name, [])]
        if now != then:
            raise UserError(
                f"the files of data source {name} are not those that fetch recorded, and what was"
                " done since was done with those; bring them back, or begin a new run"
            )


def _check_model(name: str, recorded: FetchedModel) -> None:
    folder = local_model(recorded.model, recorded.revision)
    cure = "bring it back, or begin a new run"
    commit = commit_of(folder)
    if commit is not None and commit == recorded.commit:
        return
    if recorded.commit is not None:
        raise UserError(
            f"{name} {recorded.model} at {recorded.revision} is now commit {commit}, and fetch"
            f" recorded {recorded.commit}; {cure}, with that commit as its revision"
        )
    now = model_hashes(folder)
    other = sorted(
        file for file in now.keys() | recorded.sha256 if now.get(file) != recorded.sha256.get(file)
    )
    if other:
        raise UserError(
            f"{', '.join(other[:3])} of {name} {recorded.model} is not what fetch recorded, and"
            f" what was done since was done with that; {cure}"
        )


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} has no weight_map ({error}); fetch the model again") from None
