"""Nothing is replaced by less: a report that lacks what the standing one has, folders of the
user's, and damage that verify must see.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import reports.compare
import slurm.status
from jobs.__main__ import main
from sarm.config import UserError
from sarm.run import Attempt, RunDir
from tests.runs import (
    PROGRESSION,
    evaluated_run,
    features,
    metrics,
    publish,
    publish_ppo,
    readings,
    reference_config,
    reference_run,
)
from tests.test_records import republish


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """With a report of everything."""
    run = evaluated_run(tmp_path / "run")
    assert main(["report", "--run", str(run.path)]) == 0
    return run


def test_a_report_is_not_replaced_by_one_that_lacks_units(
    run: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ("final_report.txt", "report.html", "report.json")
    before = {name: (run.path / name).read_bytes() for name in names}
    assert b"48659" in before["final_report.txt"]
    taken = {}
    for phase in ("select", "steer"):
        taken[run.folder(phase) / "manifest.json"] = (
            run.folder(phase) / "manifest.json"
        ).read_bytes()
        (run.folder(phase) / "manifest.json").unlink()
    capfd.readouterr()
    assert main(["report", "--run", str(run.path)]) == 2
    told = capfd.readouterr().err
    assert "was made with select/all, steer/all, which are not done now" in told
    assert {name: (run.path / name).read_bytes() for name in names} == before
    assert run.read("report").path("final_report.txt").read_bytes() == before["final_report.txt"]
    poorer = (run.path / "final_report.incomplete.txt").read_text()
    assert "48659" not in poorer.partition("CONFIGURATION")[0] and "select" in poorer
    for path, manifest in taken.items():
        path.write_bytes(manifest)
    assert main(["report", "--run", str(run.path), "--force"]) == 0
    assert not list(run.path.glob("*.incomplete.*")), "they tell of what is there again"


def test_a_report_is_replaced_by_one_that_has_more(tmp_path: Path) -> None:
    run = reference_run(tmp_path / "run")
    assert main(["report", "--run", str(run.path)]) == 0
    before = (run.path / "final_report.txt").read_text()
    publish_ppo(run, "random-seed0", metrics(PROGRESSION))
    assert not run.done("report")
    assert main(["report", "--run", str(run.path)]) == 0
    assert (run.path / "final_report.txt").read_text() != before and run.done("report")


def test_units_taken_out_of_the_config_are_not_lost_ones(tmp_path: Path) -> None:
    run = reference_run(tmp_path / "run", ppo={"seeds": [0, 1]})
    publish_ppo(run, "penalty-seed1", metrics(PROGRESSION))
    assert main(["report", "--run", str(run.path)]) == 0
    assert "penalty-seed1" in (run.path / "final_report.txt").read_text()
    fewer = RunDir.create(run.path, reference_config(seeds=[0]))
    # calibrate draws latents for each seed, and is done again
    publish(fewer, "calibrate", files={"readings.json": readings(features())})
    assert main(["report", "--run", str(run.path)]) == 0
    assert "penalty-seed1" not in (run.path / "final_report.txt").read_text()
    assert not (run.path / "final_report.incomplete.txt").exists()


def test_verify_hashes_exports_and_trained_sarms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir.create(tmp_path / "run", reference_config())
    for phase in ("export", "train_sarm"):
        attempt = Attempt(run, phase)
        attempt.path("w.bin").write_bytes(b"good")
        attempt.publish()
    lines = verified(run, capsys)
    assert all("done" in line for line in lines[:2])
    assert lines[2] == "hashed 2 files of 2 units: all are as published"
    for phase in ("export", "train_sarm"):
        run.read(phase).path("w.bin").write_bytes(b"evil")
    lines = verified(run, capsys)
    assert all("w.bin does not match its SHA-256" in line for line in lines[:2])
    assert "not as published are train_sarm, export, of which" in lines[2] and len(lines) == 3


def verified(run: RunDir, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What `make verify` says of jobs that are no phase."""
    capsys.readouterr()
    assert slurm.status.main(["--run", str(run.path), "--hashes"]) == 1, "its phases are not done"
    told = capsys.readouterr().out.splitlines()
    return [line for line in told if line.strip().startswith(("export", "train_sarm", "hashed"))]


def test_a_report_of_another_version_is_named_by_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for name in "ab":
        run = evaluated_run(tmp_path / name)
        assert main(["report", "--run", str(run.path)]) == 0
        paths.append(str(run.path))
    republish(run, "report", "report.json", schema=9)
    assert reports.compare.main([*paths, "--out", str(tmp_path / "out")]) == 2
    assert "report.json of schema 9, and this version reads" in capsys.readouterr().err
    republish(run, "report", "report.json", schema=1)
    manifest = run.folder("report") / "manifest.json"
    file = run.folder("report") / json.loads(manifest.read_text())["outputs"]["report.json"]["file"]
    tree = json.loads(file.read_text())
    del tree["comparable"]
    file.write_text(json.dumps(tree))
    republish(run, "report", "report.json")
    assert reports.compare.main([*paths, "--out", str(tmp_path / "out")]) == 2
    assert "it lacks comparable" in capsys.readouterr().err


# Folders of the user's


def a_sarm(folder: Path, weights: str = "w") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(weights)
    return folder


def test_only_a_folder_that_train_sarm_wrote_is_replaced(tmp_path: Path) -> None:
    from sarm.training.publish import refuse_foreign, replace_folder

    target = tmp_path / "mine" / "sarm"
    replace_folder(a_sarm(tmp_path / "first"), target, "train_sarm")
    replace_folder(a_sarm(tmp_path / "second", "v"), target, "train_sarm")
    assert (target / "model.safetensors").read_text() == "v"
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["sarm"]
    (target / "notes.txt").write_text("weeks")
    with pytest.raises(UserError, match="not as train_sarm left it"):
        replace_folder(tmp_path / "first", target, "train_sarm")
    assert (target / "notes.txt").read_text() == "weeks"
    for other in (tmp_path / "mine", tmp_path / "first", tmp_path / "first" / "config.json"):
        with pytest.raises(UserError, match="not as train_sarm left it"):
            refuse_foreign(other, "train_sarm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError):
        refuse_foreign(tmp_path / "empty", "train_sarm")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError):
        refuse_foreign(tmp_path / "link", "train_sarm")
    refuse_foreign(tmp_path / "new", "train_sarm")


def test_an_output_that_is_not_ours_is_refused_before_training_begins(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.tiny import tiny_config

    mine = tmp_path / "outputs"
    (mine / "other_run").mkdir(parents=True)
    (mine / "other_run" / "final_report.txt").write_text("weeks")
    run = RunDir.create(tmp_path / "run", tiny_config(tmp_path, **{"train_sarm.output": str(mine)}))
    monkeypatch.setattr("jobs.train_sarm.load_data", lambda *_: pytest.fail("work has begun"))
    assert main(["train_sarm", "--run", str(run.path)]) == 2
    assert f"train_sarm.output={mine} is there already" in capfd.readouterr().err
    assert (mine / "other_run" / "final_report.txt").read_text() == "weeks"
