"""Fetch models and data at their pinned revisions, where there is a network: `python -m jobs fetch
--config C --run R`.

Publishes `models.json`: where each model and data set lies, the SHA-256 of their files, and how
many prompts and pairs were read.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sarm.config import (
    ROOT,
    ChatModelConfig,
    Config,
    EvaluateConfig,
    JudgeConfig,
    ModelConfig,
    RefusalDetectorConfig,
    SarmConfig,
    UserError,
)
from sarm.data.datasets import load_data
from sarm.data.sources import source_files
from sarm.evaluation.early import check_labels, check_prompted
from sarm.hub import hub_commit, local_model, refuse_without_room
from sarm.pinned import Commit, at_commits, commits_in, fetched
from sarm.records import Models
from sarm.run import Attempt, RunDir, file_sha256

SMALL = ("*.json", "*.jinja", "*.model", "*.txt")
INDEX = "model.safetensors.index.json"


def run(config: Config, run: RunDir, unit: str, attempt: Attempt) -> None:
    """Download what the config names and record it: first whether every gate opens, then data, then
    models.
    """
    for model in config.models:
        model.folder()  # neither a folder nor a hub id
    for name, source in config.data.sources.items():
        if source.path is not None:
            source_files(name, source)  # what is laid by hand, before an hour of downloads
    now = at_commits(config, standing_at(config, earlier(run)))
    wanted: dict[str, ModelConfig] = {"policy": now.policy, "sarm": now.sarm, **now.classifiers}
    said = {"policy": config.policy, "sarm": config.sarm, **config.classifiers}
    refuse_without_room(
        *((m.model, m.revision) for m in wanted.values() if m.folder() is None and m.revision)
    )
    attempt.progress(0, len(wanted) + 1, "data")
    found: dict[str, Any] = {"data": fetch_data(config, now)}
    for i, (name, model) in enumerate(wanted.items(), 1):
        attempt.progress(i, len(wanted) + 1, f"model {model.model}")
        folder = local_model(model.model, model.revision, download=True)
        backbone = backbone_of(folder) if name == "sarm" else None
        if backbone is not None:
            place = local_model(backbone["model"], backbone.get("revision"), download=True)
            found["sarm_backbone"] = described(place, backbone["model"], backbone.get("revision"))
        look_over(model, folder, config.evaluate)
        found[name] = described(folder, model.model, said[name].revision)
        if isinstance(model, SarmConfig):
            found[name]["sizes"] = sizes_of(model)
    Models(**found).write(attempt.path("models.json"))
    attempt.progress(len(wanted) + 1, len(wanted) + 1, "done")
    attempt.publish()


def earlier(run: RunDir) -> Models | None:
    """What this run fetched before; None where that cannot be read, and is written anew."""
    try:
        return fetched(run)
    except UserError:
        return None


def standing_at(config: Config, before: Models | None) -> Commit:
    """The commit that each revision of the config stands at: as an earlier fetch of this run wrote
    it down, else as the hub says now, which takes a token where a model is gated.
    """
    known = {} if before is None else commits_in(before)
    data = {(s.repo, s.revision): s.files[0] for s in config.data.sources.values() if s.repo}

    def commit(at: tuple[str, str | None]) -> str | None:
        repo, revision = at
        here = repo.startswith("embedded:") or (ROOT / Path(repo).expanduser()).is_dir()
        if at in known or here:
            return known.get(at)
        if at in data:
            return hub_commit(repo, revision, data[at], "dataset")
        return hub_commit(repo, revision, "config.json")

    return commit


def fetch_data(config: Config, now: Config) -> dict[str, Any]:
    """Every source's files by hash, and what was read of them. `now` is the config at commits."""
    data = load_data(now.data, download=True)
    if find_spec("scipy") is not None:
        check_labels(config.evaluate)
    files = {name: source_files(name, source) for name, source in now.data.sources.items()}
    return {
        "files": {
            name: [
                {
                    "path": str(file),
                    "repo": config.data.sources[name].repo or config.data.sources[name].url,
                    "revision": config.data.sources[name].revision,
                    "commit": commit_of(file) or now.data.sources[name].revision,
                    "sha256": file_sha256(file),
                }
                for file in paths
            ]
            for name, paths in files.items()
        },
        "prompts": Counter(f"{p.source}/{p.part}" for p in data.prompts),
        "pairs": Counter(f"{p.source}/{p.prompt.part}" for p in data.pairs),
        "skipped": data.skipped,
    }


def sizes_of(sarm: SarmConfig) -> dict[str, int]:
    """What a card may say of a SARM's sizes; nothing where there is no torch to open it with."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        return {}
    from sarm.reward_model.weights import open_folder

    opened = open_folder(sarm.model, sarm.revision, use_topk=sarm.use_topk).config
    return {"d_sae": opened.d_sae, "k": opened.k, "layers": opened.source_layer}


def look_over(model: ModelConfig, folder: Path, planned: EvaluateConfig) -> None:
    """Raises UserError where a model would not serve as what the config names it. A login node
    without torch leaves that to the first phase that opens the model.
    """
    if find_spec("torch") is None or find_spec("transformers") is None:
        return
    from sarm.evaluation.classifiers import judge_problem, label_positions
    from sarm.models import check_judge, check_policy, read_tokenizer
    from sarm.reward_model.model import check_sarm

    if isinstance(model, SarmConfig):
        check_sarm(model)
    elif isinstance(model, ChatModelConfig):
        check_policy(folder, model.chat_template_kwargs)
        check_prompted(planned, read_tokenizer(folder, model.chat_template_kwargs))
    else:
        check_judge(folder)
        if isinstance(model, RefusalDetectorConfig):
            label_positions(model)
        elif isinstance(model, JudgeConfig) and (problem := judge_problem(model)):
            print(f"warning: harm will not be judged: {problem}", file=sys.stderr)


def backbone_of(folder: Path) -> dict[str, Any] | None:
    """The model that a SARM folder takes its decoder layers from, or None where it holds its
    own.
    """
    try:
        keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / 'config.json'} cannot be read ({error}); fetch the model again"
        ) from None
    return keys.get("backbone") if isinstance(keys, dict) else None


def described(folder: Path, model: str, revision: str | None) -> dict[str, Any]:
    """A model's place and the hashes of its files."""
    return {
        "model": model,
        "revision": revision,
        "commit": commit_of(folder),
        "path": str(folder),
        "sha256": model_hashes(folder),
    }


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


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} has no weight_map ({error}); fetch the model again") from None
