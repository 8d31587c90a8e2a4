"""What fetch recorded is compared before every phase that reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.__main__ import main, run_unit
from sarm.config import ROOT, UserError
from sarm.fetched import READS, check_unchanged, commit_of, model_hashes
from sarm.records import Models
from sarm.run import RunDir
from tests.tiny import tiny_config, write_tiny_policy, write_tiny_sarm


@pytest.fixture
def fetched(tmp_path: Path) -> tuple[RunDir, Models]:
    pairs = tmp_path / "pairs.jsonl"
    shutil.copy(ROOT / "data" / "demo" / "pairs.jsonl", pairs)
    config = tiny_config(tmp_path, **{"data.sources.demo.path": str(pairs)})
    run = RunDir.create(tmp_path / "run", config)
    run_unit(run, "fetch", "all")
    return run, Models.read(run.read("fetch").path("models.json"))


def test_what_stands_as_it_was_passes(fetched: tuple[RunDir, Models], tmp_path: Path) -> None:
    run, models = fetched
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= set(
        models.policy.sha256
    )
    (tmp_path / "models" / "sarm" / "model_old.safetensors").write_bytes(b"a copy")
    for phase in READS:
        check_unchanged(run.config, models, phase)


@pytest.mark.parametrize("who", ["policy", "sarm"])
def test_another_model_is_refused_by_the_phases_that_read_it(
    who: str, fetched: tuple[RunDir, Models], tmp_path: Path
) -> None:
    run, models = fetched
    {"policy": write_tiny_policy, "sarm": write_tiny_sarm}[who](tmp_path / "models" / who, seed=9)
    for phase, reads in READS.items():
        if who in reads:
            with pytest.raises(UserError, match=rf"^model\.safetensors of {who} .* new run"):
                check_unchanged(run.config, models, phase)
        else:
            check_unchanged(run.config, models, phase)
    phase = {"policy": "ppo", "sarm": "encode"}[who]
    assert main([phase, "--run", str(run.path)]) == 2


def test_another_template_is_another_model(fetched: tuple[RunDir, Models], tmp_path: Path) -> None:
    run, models = fetched
    file = tmp_path / "models" / "policy" / "chat_template.jinja"
    file.write_text(file.read_text() + " ")
    with pytest.raises(UserError, match=r"chat_template\.jinja of policy"):
        check_unchanged(run.config, models, "evaluate")


def test_labels_mended_after_fetch_are_refused(
    fetched: tuple[RunDir, Models], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = fetched
    file = tmp_path / "pairs.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    swapped = [r | {"chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    file.write_text("".join(json.dumps(r) + "\n" for r in swapped), encoding="utf-8")
    assert main(["probe", "--run", str(run.path)]) == 2
    assert "data source demo are not those that fetch recorded" in capsys.readouterr().err


def test_a_model_of_the_hub_is_known_by_its_commit(
    fetched: tuple[RunDir, Models], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, models = fetched
    old, new = "a" * 40, "b" * 40
    held = models.model_copy(
        update={"policy": models.policy.model_copy(update={"commit": old, "revision": "main"})}
    )

    def at(commit: str) -> Any:
        return lambda model, revision: (
            Path(f"/cache/models--o--m/snapshots/{commit}")
            if revision == "main"
            else Path(models.sarm.path)
        )

    monkeypatch.setattr("sarm.fetched.local_model", at(old))
    check_unchanged(run.config, held, "ppo")
    monkeypatch.setattr("sarm.fetched.local_model", at(new))
    with pytest.raises(UserError, match=f"at main is now commit {new}, and fetch recorded {old}"):
        check_unchanged(run.config, held, "ppo")
    assert commit_of(Path(f"/c/snapshots/{old}/model.safetensors")) == old
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
