"""Sharing a GPU through MPS, with a pretended `nvidia-cuda-mps-control`; benchmarks/ppo.py --beside
uses the real one.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slurm import local, mps

CONTROL = """#!/bin/sh
word=$(test "$1" = -d && echo -d || cat)
echo "$word|$CUDA_MPS_PIPE_DIRECTORY|$CUDA_MPS_LOG_DIRECTORY|${CUDA_VISIBLE_DEVICES-unset}" >> CALLS
test "$1" != -d || test ! -e REFUSES || { echo "first line"; cat REFUSES; exit 1; }
"""


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where the control program notes its `calls`, and finds what it `refuses` with."""
    text = CONTROL.replace("CALLS", str(tmp_path / "calls"))
    program = tmp_path / "bin" / mps.CONTROL
    program.parent.mkdir()
    program.write_text(text.replace("REFUSES", str(tmp_path / "refuses")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(mps, "USUAL_PIPES", tmp_path / "usual")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    # what a task of this launcher sees, as the trial does
    seen = f"import os; open({str(tmp_path / 'trial')!r}, 'w').write(repr(dict(os.environ)))"
    monkeypatch.setattr(mps, "TRIAL", seen)
    return tmp_path


def calls(control: Path) -> list[list[str]]:
    path = control / "calls"
    return [line.split("|") for line in path.read_text().splitlines()] if path.exists() else []


def test_the_service_lasts_as_long_as_the_block_and_is_shown_all_gpus(control: Path) -> None:
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "3"}
    with mps.served(environ) as given:
        folder = given["CUDA_MPS_PIPE_DIRECTORY"]
        assert given == dict.fromkeys(("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"), folder)
        assert Path(folder).stat().st_mode & 0o777 == 0o700
        assert calls(control) == [["-d", folder, folder, "unset"]]
        trial = eval((control / "trial").read_text())
        assert trial["CUDA_VISIBLE_DEVICES"] == "3", "GPUs are named as tasks name them"
        assert trial["CUDA_MPS_PIPE_DIRECTORY"] == folder
        with pytest.raises(RuntimeError), mps.served(environ) as other:
            assert other["CUDA_MPS_PIPE_DIRECTORY"] != folder, "of another run of the same user"
            raise RuntimeError
    assert [call[0] for call in calls(control)] == ["-d", "-d", "quit -t 10", "quit -t 10"]
    assert calls(control)[-1][1] == folder and not Path(folder).exists()


@pytest.mark.parametrize(
    ("refuses", "trial", "said"),
    [
        ("cannot open device", "", "cannot open device"),
        (None, "import sys; sys.exit('CUDA error 805')", "CUDA error 805"),
        (None, "import os; os._exit(7)", "exit code 7"),
        (None, "import time; time.sleep(60)", "timed out"),
    ],
    ids=["it does not start", "CUDA refuses", "no words", "nothing answers"],
)
def test_where_it_does_not_work_tasks_take_turns(
    control: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    refuses: str | None,
    trial: str,
    said: str,
) -> None:
    if refuses:
        (control / "refuses").write_text(refuses)
    monkeypatch.setattr(mps, "TRIAL", trial)
    monkeypatch.setattr(mps, "TIMEOUT_S", 5.0 if "sleep" not in trial else 0.5)
    with mps.served() as given:
        assert given == {}
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith("no MPS, so tasks take turns on a GPU: ") and said in told
    assert [call[0] for call in calls(control)] == ["-d", "quit -t 10"], "no service is left behind"


def test_another_service_is_left_alone(control: Path) -> None:
    for name in ("/srv/mps", "", "/nowhere"):
        with mps.served({**os.environ, "CUDA_MPS_PIPE_DIRECTORY": name}) as given:
            assert given == {}
    (control / "usual").mkdir()
    (control / "usual" / "control").touch()
    with mps.served() as given:
        assert given == {}
    assert not calls(control)


def test_without_the_program_nothing_is_said(
    control: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(control))
    with mps.served() as given:
        assert given == {}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("gpus", "workers", "shared"),
    [("0", 2, True), ("0", 1, False), ("0,1", 2, False), ("GPU-a,GPU-b", 3, True), ("", 8, False)],
)
def test_it_is_for_tasks_that_share_a_gpu(
    control: Path, monkeypatch: pytest.MonkeyPatch, gpus: str, workers: int, shared: bool
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    with local.shared_gpus(workers) as given:
        assert bool(given) == shared
    assert bool(calls(control)) == shared
