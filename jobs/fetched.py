"""Whether models and data are still those that fetch recorded: `refuse_changed(run, "ppo")`, which
`python -m jobs` calls before each phase that reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sarm.config import UserError
from sarm.config.reads import is_read
from sarm.data.sources import source_files
from sarm.hub import local_model
from sarm.pinned import pinned
from sarm.records import FetchedModel, Models
from sarm.run import RunDir, file_sha256, patience_s


def refuse_changed(run: RunDir, phase: str) -> None:
    """Raises UserError naming the first file that is another one than fetch recorded. A run that
    was never fetched has nothing to compare with.
    """
    if run.manifest("fetch") is None:
        return
    fetched = run.read("fetch", patience_s=patience_s())
    if "models.json" not in fetched.manifest.outputs:
        return
    models = Models.read(fetched.path("models.json"))
    for name, model in _models(models, phase):
        _compare_model(name, model)
    if is_read(phase, "data"):
        for name, source in pinned(run).data.sources.items():
            _compare_data(name, source_files(name, source), models)


def _models(models: Models, phase: str) -> Iterator[tuple[str, FetchedModel]]:
    named = (
        ("policy", "policy.model", models.policy),
        ("SARM", "sarm.model", models.sarm),
        ("SARM's backbone", "sarm.model", models.sarm_backbone),
        ("judge", "evaluate.judge", models.judge),
        ("refusal detector", "evaluate.refusal_detector", models.refusal_detector),
    )
    for name, key, model in named:
        if model is not None and is_read(phase, key):
            yield name, model


def _compare_model(name: str, model: FetchedModel) -> None:
    folder = local_model(model.model, model.commit or model.revision)
    for file, sha256 in model.sha256.items():
        path = folder / file
        if not path.is_file() or file_sha256(path) != sha256:
            raise _changed(f"{path} of the {name}")


def _compare_data(name: str, paths: list[Path], models: Models) -> None:
    recorded = [file.sha256 for file in models.data.files.get(name, [])]
    for path in paths:
        sha256 = file_sha256(path)
        if sha256 not in recorded:
            raise _changed(f"{path} of the data source {name}")
        recorded.remove(sha256)
    if recorded:
        raise _changed(f"the data source {name}, which lacks a file,")


def _changed(what: str) -> UserError:
    return UserError(
        f"{what} is not what fetch recorded, and what is done of this run was made with; put it"
        " back, or start another RUN (python -m jobs fetch --run RUN --force takes it as it is,"
        " and what read the old one is done again)"
    )
