"""Hashes recorded by fetch are hashes compared: a phase refuses models and
data that changed since.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jobs.__main__ import main
from sarm.config import ROOT
from sarm.run import RunDir
from tests.tiny import tiny_config, write_tiny_policy, write_tiny_sarm


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Fetched and encoded, from models and a data file of its own."""
    lines = (ROOT / "data/demo/pairs.jsonl").read_text().splitlines()[:60]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    data = {"data.sources.demo.path": str(tmp_path / "pairs.jsonl"), "encode.shards": 1}
    run = RunDir.create(tmp_path / "run", tiny_config(tmp_path, **data))
    assert main(["fetch", "--run", str(run.path)]) == 0
    assert main(["encode", "--run", str(run.path)]) == 0
    return run


def refused(run: RunDir, phase: str, capfd: pytest.CaptureFixture[str], unit: str = "") -> str:
    """What a phase says that is to end with one sentence."""
    capfd.readouterr()
    words = [phase, "--run", str(run.path), *(["--unit", unit] if unit else [])]
    assert main(words) == 2
    (told,) = capfd.readouterr().err.splitlines()
    return told


def test_labels_mended_in_mid_run_are_refused(
    run: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    file = run.path.parent / "pairs.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    before = file.read_bytes()
    swapped = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    file.write_text("\n".join(map(json.dumps, swapped)) + "\n")
    for phase in ("probe", "select", "steer", "cards", "export"):
        told = refused(run, phase, capfd)
        assert f"{file} of the data source demo is not what fetch recorded" in told
    assert run.done("encode", "shard-0000-of-0001"), "encode's own output is as it was"
    file.write_bytes(before)
    assert main(["probe", "--run", str(run.path), "--unit", "0"]) == 0


def test_taken_as_it_is_by_fetch_what_read_the_old_data_is_done_again(run: RunDir) -> None:
    file = run.path.parent / "pairs.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[:40]) + "\n")
    assert main(["fetch", "--run", str(run.path), "--force"]) == 0
    told = run.why_not_done("encode", "shard-0000-of-0001")
    assert told == "its input fetch/all/models.json has changed"


@pytest.mark.parametrize(
    ("name", "phase", "unit"),
    [
        ("policy", "ppo", "penalty-seed0"),
        ("policy", "evaluate", "base"),
        ("sarm", "probe", "0"),
        ("sarm", "ppo", "no_penalty-seed0"),
    ],
)
def test_models_replaced_after_fetch_are_refused(
    name: str, phase: str, unit: str, run: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = run.path.parent / "models" / name
    shutil.rmtree(folder)
    {"policy": write_tiny_policy, "sarm": write_tiny_sarm}[name](folder, seed=9)
    told = refused(run, phase, capfd, unit)
    assert f"{folder}/model.safetensors of the" in told and "not what fetch recorded" in told


def test_a_model_that_a_phase_does_not_read_is_not_its_matter(run: RunDir) -> None:
    write_tiny_policy(run.path.parent / "models" / "policy", seed=9)
    assert main(["probe", "--run", str(run.path), "--unit", "0"]) == 0
