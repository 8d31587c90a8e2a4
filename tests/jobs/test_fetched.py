"""What fetch records of a model is what it is opened from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.__main__ import run_unit
from jobs.fetch import commit_of, model_hashes
from jobs.fetched import refuse_changed
from sarm.config import UserError
from sarm.run import RunDir
from tests.evaluation.test_classifiers import write_classifier
from tests.tiny import tiny_config


def test_another_template_is_another_model_and_a_stray_file_is_none(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", tiny_config(tmp_path))
    run_unit(run, "fetch", "all")
    models = tmp_path / "models"
    (models / "sarm" / "model_old.safetensors").write_bytes(b"a copy")
    refuse_changed(run, "encode")
    refuse_changed(run, "evaluate")
    file = models / "policy" / "chat_template.jinja"
    file.write_text(file.read_text() + " ")
    refuse_changed(run, "encode")
    with pytest.raises(UserError, match=r"chat_template\.jinja of the policy"):
        refuse_changed(run, "evaluate")


def test_a_detector_that_is_another_one_than_was_fetched_is_refused(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "detector", ["refusal", "answer"])
    given = {"model": str(folder), "labels": {"refusal": "refusal", "answer": "answer"}}
    run = RunDir.create(
        tmp_path / "run", tiny_config(tmp_path, **{"evaluate.refusal_detector": given})
    )
    run_unit(run, "fetch", "all")
    refuse_changed(run, "evaluate")
    write_classifier(folder, ["answer", "refusal"])
    refuse_changed(run, "ppo")
    with pytest.raises(UserError, match=r"config\.json of the refusal detector is not what fetch"):
        refuse_changed(run, "evaluate")


def test_labels_that_cannot_be_read_are_found_by_fetch_and_not_after_training(
    tmp_path: Path,
) -> None:
    (tmp_path / "labels.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    given = {"evaluate.refusal_labels": str(tmp_path / "labels.jsonl")}
    run = RunDir.create(tmp_path / "run", tiny_config(tmp_path, **given))
    with pytest.raises(UserError, match=r"labels\.jsonl, line 1: not UTF-8"):
        run_unit(run, "fetch", "all")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("policy.model", "no/such/folder", "'no/such/folder' is no folder here"),
        ("policy.model", "owner/name", "a pinned revision in the config"),
        (
            "data.sources.demo",
            {
                "format": "jsonl",
                "label": "Demo",
                "repo": "a/b/c",
                "revision": "main",
                "files": ["d.jsonl"],
                "split": {"test": 1.0},
            },
            "a/b/c at revision main could not be fetched: Repo id must be",
        ),
    ],
)
def test_a_place_that_is_none_is_a_sentence(
    tmp_path: Path, key: str, value: object, says: str
) -> None:
    run = RunDir.create(tmp_path / "run", tiny_config(tmp_path, **{key: value}))
    with pytest.raises(UserError, match=says):
        run_unit(run, "fetch", "all")


def test_data_laid_in_another_folder_are_missed_before_a_model_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"data.sources.demo.path": str(tmp_path / "rmb")}
    run = RunDir.create(tmp_path / "run", tiny_config(tmp_path, **given))
    monkeypatch.setattr("jobs.fetch.local_model", lambda *_, **__: pytest.fail("downloading"))
    with pytest.raises(
        UserError, match=r"demo: .*/rmb does not exist; correct data\.sources\.demo"
    ):
        run_unit(run, "fetch", "all")
    (tmp_path / "rmb").mkdir()
    (tmp_path / "rmb" / "README.md").write_text("not here")
    with pytest.raises(UserError, match="holds no file that ends in"):
        run_unit(run, "fetch", "all")


def test_a_commit_is_that_of_the_hubs_cache() -> None:
    assert commit_of(Path(f"/c/snapshots/{'a' * 40}/model.safetensors")) == "a" * 40
    assert commit_of(Path("/c/model")) is None


def test_the_files_hashed_are_those_read(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors", "old.safetensors", "config.json", "x.bin"):
        (tmp_path / name).write_text(name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"t": "b.safetensors", "u": "a.safetensors"}}))
    assert set(model_hashes(tmp_path)) == {
        "a.safetensors",
        "b.safetensors",
        "config.json",
        index.name,
    }
    (tmp_path / "model.safetensors").write_text("whole")
    assert set(model_hashes(tmp_path)) == {"config.json", "model.safetensors"}
