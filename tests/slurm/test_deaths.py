"""A rank that dies takes the others with it, and rank 0's log ends with the cause: `slurm.entry`
as srun's tasks would run it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from reports.frames import last_error
from sarm.config import ROOT
from sarm.run import RunDir
from slurm.ranks import Death
from tests.jobs.test_ppo import UNIT, a_run

WITHIN_S = 60
SPEC = "import sys; from slurm.entry import run_spec; run_spec(sys.argv[1])"


def start_job(
    folder: Path, argv: list[str], log: Path, ranks: int, job: str = "7"
) -> list[subprocess.Popen[bytes]]:
    """An entry for each rank, with what srun would set."""
    spec = folder / f"spec.{job}.json"
    spec.write_text(
        json.dumps(
            {
                "commands": [{"argv": argv, "log": str(log)}],
                "cwd": str(ROOT),
                "env": {"OMP_NUM_THREADS": "1"},
                "grace_s": 60,
                "ranks": True,
            }
        )
    )
    shared = os.environ | {
        "SLURM_JOB_ID": job,
        "SLURM_NTASKS": str(ranks),
        "SLURMD_NODENAME": "node7",
    }
    alone = [
        shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(ranks)
    ]
    return [
        subprocess.Popen([sys.executable, "-c", SPEC, str(spec)], cwd=ROOT, env=env)
        for env in alone
    ]


def rank_logs(log: Path, ranks: int) -> list[Path]:
    return [log, *(log.with_name(f"{log.name}.rank{rank}") for rank in range(1, ranks))]


def until_all_say(logs: list[Path], text: str) -> None:
    while not all(log.exists() and text in log.read_text() for log in logs):
        time.sleep(0.05)


def ends(entries: list[subprocess.Popen[bytes]]) -> list[int]:
    try:
        return [entry.wait(WITHIN_S) for entry in entries]
    finally:
        for entry in entries:
            entry.kill()


HANGS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), "up", flush=True)
if os.environ["RANK"] in {failing!r}:
    while not os.path.exists({go!r}): time.sleep(0.01)
    print({words!r}); sys.exit(2)
time.sleep(600)
"""


def fake_job(
    tmp_path: Path, failing: tuple[str, ...] = (), words: str = ""
) -> list[subprocess.Popen[bytes]]:
    """Three ranks that hang, as in a collective, and do not end when told; `failing` ones end once
    `tmp_path/go` is there.
    """
    code = HANGS.format(failing=failing, words=words, go=str(tmp_path / "go"))
    entries = start_job(tmp_path, ["-c", code], tmp_path / "log", 3)
    until_all_say(rank_logs(tmp_path / "log", 3), "up")
    return entries


@pytest.mark.parametrize("victim", [0, 2])
def test_one_killed_ends_the_rest_which_hang_and_is_named(tmp_path: Path, victim: int) -> None:
    entries = fake_job(tmp_path)
    os.kill(
        int(rank_logs(tmp_path / "log", 3)[victim].read_text().splitlines()[1].split()[0]),
        signal.SIGKILL,
    )
    assert ends(entries) == [128 + signal.SIGKILL] * 3
    assert last_error(tmp_path / "log").startswith(
        f"error: rank {victim} of 3 on node7 was killed by SIGKILL, as the kernel does where memory"
        " runs out"
    )


def test_a_failure_of_another_rank_is_told_in_the_log_of_rank_0(tmp_path: Path) -> None:
    entries = fake_job(tmp_path, failing=("1",), words="error: no room on the moon; use another")
    (tmp_path / "go").touch()
    assert ends(entries)[1] == 2
    assert (
        last_error(tmp_path / "log")
        == "error: rank 1 of 3 on node7 ended with exit code 2, and the others with it: error: no"
        " room on the moon; use another (log.rank1)"
    )


def test_a_failure_of_all_is_told_once(tmp_path: Path) -> None:
    entries = fake_job(tmp_path, failing=("0", "1", "2"), words="error: no such prompt; give one")
    (tmp_path / "go").touch()
    assert ends(entries) == [2, 2, 2]
    assert (tmp_path / "log").read_text().splitlines()[2:] == ["error: no such prompt; give one"]


def test_a_cancelled_job_blames_no_rank(tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), 'up', flush=True); time.sleep(600)"
    entries = start_job(tmp_path, ["-c", code], tmp_path / "log", 3)
    until_all_say(rank_logs(tmp_path / "log", 3), "up")
    for entry in entries:
        entry.send_signal(signal.SIGTERM)
    assert ends(entries) == [128 + signal.SIGTERM] * 3
    assert "rank" not in (tmp_path / "log").read_text() and not list(tmp_path.glob("died.*"))


def test_a_signal_from_outside_is_likelier_the_cause_than_what_it_brought_about() -> None:
    def dead(rank: int, returncode: int) -> Death:
        return Death(rank, 4, "node7", returncode, "log", "")

    ends_of = [dead(0, 1), dead(1, -signal.SIGABRT), dead(2, 2), dead(3, -signal.SIGKILL)]
    assert [death.rank for death in sorted(ends_of, key=lambda death: death.order)] == [3, 2, 0, 1]


def on_two_nodes(
    tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch
) -> list[subprocess.Popen[bytes]]:
    """Ranks 0 and 1 on node7, 2 and 3 on node8."""
    monkeypatch.setenv("SLURM_NNODES", "2")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[7-8]")
    spec = tmp_path / "spec.json"
    commands = [{"argv": ["-c", code], "log": str(tmp_path / "log")}]
    more = {"cwd": str(ROOT), "env": {}, "grace_s": 60, "ranks": True}
    spec.write_text(json.dumps({"commands": commands, **more}))
    short = "import sys, slurm.ranks as r; r.BEAT_S, r.SILENT_S = 0.5, 3.0; "
    words = [sys.executable, "-c", short + SPEC.removeprefix("import sys; "), str(spec)]
    entries = []
    for rank in range(4):
        env = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": str(rank)}
        env |= {"SLURM_LOCALID": str(rank % 2), "SLURMD_NODENAME": f"node{7 + rank // 2}"}
        entries.append(subprocess.Popen(words, cwd=ROOT, env={**os.environ, **env}))
    until_all_say(rank_logs(tmp_path / "log", 4), "up")
    while len(list(tmp_path.glob("alive.*"))) < 4:
        time.sleep(0.05)
    time.sleep(2.5)  # rank 0 has heard of all
    return entries


def end_node(tmp_path: Path, entries: list[subprocess.Popen[bytes]]) -> None:
    """As when node8 loses its power: its ranks and their entries are gone at once."""
    for rank in (2, 3):
        entries[rank].kill()
        pid = rank_logs(tmp_path / "log", 4)[rank].read_text().split(" up")[0].split()[-1]
        os.kill(int(pid), signal.SIGKILL)


def test_a_node_that_dies_is_named_when_slurm_ends_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait in a collective, until Slurm sees what has become of the node."""
    code = "import os, time; print(os.getpid(), 'up', flush=True); time.sleep(600)"
    entries = on_two_nodes(tmp_path, code, monkeypatch)
    end_node(tmp_path, entries)
    time.sleep(5)
    for entry in entries[:2]:
        entry.send_signal(signal.SIGTERM)
    assert ends(entries)[:2] == [128 + signal.SIGTERM] * 2
    said = last_error(tmp_path / "log")
    assert "no sign of life from node node8 (ranks 2, 3)" in said


def test_a_silent_node_is_named_before_ranks_that_hear_nothing_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ranks in a collective, which Slurm kills a few seconds later with their entries."""
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    code = f"import os, signal, time; {deaf}; print(os.getpid(), 'up', flush=True); time.sleep(600)"
    entries = on_two_nodes(tmp_path, code, monkeypatch)
    for entry in entries[2:]:
        entry.send_signal(signal.SIGSTOP)
    for entry in entries[:2]:
        entry.send_signal(signal.SIGTERM)
    log = tmp_path / "log"
    while "no sign of life from node node8 (ranks 2, 3)" not in log.read_text():
        assert entries[0].poll() is None, log.read_text()
        time.sleep(0.05)
    assert entries[0].poll() is None
    pids = [int(path.read_text().split(" up")[0].split()[-1]) for path in rank_logs(log, 4)]
    for pid in [*pids, *(entry.pid for entry in entries)]:
        os.kill(pid, signal.SIGKILL)
    assert log.read_text().count("no sign of life") == 1


def test_a_node_that_dies_is_named_when_its_connections_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others fail at once, with words of a peer's that say nothing of the node."""
    code = f"""
import os, sys, time
print(os.getpid(), 'up', flush=True)
while not os.path.exists({str(tmp_path / "go")!r}): time.sleep(0.01)
print("RuntimeError: Connection closed by peer"); sys.exit(1)
"""
    entries = on_two_nodes(tmp_path, code, monkeypatch)
    end_node(tmp_path, entries)
    (tmp_path / "go").touch()
    assert ends(entries)[:2] == [1, 1]
    assert "no sign of life from node node8 (ranks 2, 3)" in last_error(tmp_path / "log")


def test_a_cancelled_job_on_two_nodes_blames_no_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 writes its checkpoint for longer than the others, which have ended, are silent."""
    code = """
import os, signal, sys, time
def end(*_):
    time.sleep(6 if os.environ["RANK"] == "0" else 0)
    sys.exit(128 + signal.SIGTERM)
signal.signal(signal.SIGTERM, end)
print(os.getpid(), 'up', flush=True)
time.sleep(600)
"""
    entries = on_two_nodes(tmp_path, code, monkeypatch)
    for entry in entries:
        entry.send_signal(signal.SIGTERM)
    assert ends(entries) == [128 + signal.SIGTERM] * 4
    assert "node8" not in (tmp_path / "log").read_text()


def killed_in_a_step(tmp_path: Path, ranks: int, victim: int) -> tuple[RunDir, list[str]]:
    """A run whose PPO on so many ranks lost one after its first checkpoint, and its command."""
    run = a_run(tmp_path, **{"ppo.log_to": "none"})
    argv = ["-m", "jobs", "ppo", "--run", str(run.path), "--unit", UNIT]
    log, folder = tmp_path / "log", run.folder("ppo", UNIT)
    entries = start_job(tmp_path, argv, log, ranks)
    while not list(folder.glob("checkpoints/*/manifest.json")):
        assert entries[0].poll() is None, log.read_text()
        time.sleep(0.05)
    found = subprocess.run(
        ["pgrep", "-P", str(entries[victim].pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(found[0]), signal.SIGKILL)
    assert all(ends(entries))
    assert last_error(log).startswith(
        f"error: rank {victim} of {ranks} on node7 was killed by SIGKILL"
    )
    assert run.manifest("ppo", UNIT) is None
    return run, argv


def goes_on(tmp_path: Path, run: RunDir, argv: list[str], ranks: int) -> None:
    """To its end, every step logged once."""
    entries = start_job(tmp_path, argv, tmp_path / "log", ranks, job="8")
    assert [entry.wait(600) for entry in entries] == [0] * ranks
    lines = [
        json.loads(line)
        for line in run.read("ppo", UNIT).path("metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(40))
    assert run.read("ppo", UNIT).manifest.more["ranks"] == ranks


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ppo_on_four_ranks_ends_when_one_is_killed_in_a_step_and_goes_on_on_two(
    tmp_path: Path,
) -> None:
    goes_on(tmp_path, *killed_in_a_step(tmp_path, 4, 2), 2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", [0, 1])
def test_ppo_on_two_gpus_ends_when_one_is_killed_in_a_step_and_goes_on_on_the_other(
    tmp_path: Path, victim: int
) -> None:
    """Under NCCL, where the other waits in a collective for ten minutes."""
    goes_on(tmp_path, *killed_in_a_step(tmp_path, 2, victim), 1)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("old, victim", [(4, 2), (2, 1)])
def test_ppo_on_four_gpus_goes_on_from_where_four_or_two_lost_one(
    tmp_path: Path, old: int, victim: int
) -> None:
    goes_on(tmp_path, *killed_in_a_step(tmp_path, old, victim), 4)
