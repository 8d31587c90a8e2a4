"""The rehearsal of the real shapes, at tiny ones: every phase runs on the folders it writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sarm.config import ROOT
from sarm.run import RunDir


@pytest.mark.slow
def test_every_phase_is_run_and_told_beside_its_plan(tmp_path: Path) -> None:
    words = ["benchmarks/rehearsal.py", "--folder", str(tmp_path), "--tiny"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    head, *rows = done.stdout.splitlines()[-10:]
    assert head.split()[:2] == ["phase", "s"]
    told = {row.split()[0]: row.split()[1:] for row in rows}
    run = RunDir.open(tmp_path / "run")
    assert list(told) == [
        *("fetch", "encode", "probe", "select", "steer", "calibrate", "ppo", "evaluate", "report")
    ]
    assert all(run.done(phase) for phase in ("select", "calibrate", "report"))
    assert {phase for phase, row in told.items() if len(row) > 1} == {
        *("encode", "probe", "calibrate", "ppo", "evaluate")
    }
    assert run.config.policy.model == str(tmp_path / "policy") and run.config.ppo.steps == 3
    assert (tmp_path / "policy" / "model-00005-of-00005.safetensors").exists(), "a file a layer"
