"""The DAG, the launcher and its lock, on a made-up set of phases that run in a fraction of a
second.
"""

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sarm.config import ROOT, Config, UserError
from sarm.run import Attempt, RunDir
from slurm import entry, local, lock
from slurm.dag import Node, tasks
from slurm.lock import held
from slurm.status import main as status
from slurm.view import last_lines


@pytest.fixture(scope="module")
def config() -> Config:
    return Config.model_validate(
        {
            "name": "dag",
            "policy": {"model": "p"},
            "sarm": {"model": "s"},
            "data": {
                "sources": {
                    "demo": {
                        "format": "jsonl",
                        "label": "Demo",
                        "path": "data/demo/pairs.jsonl",
                        "split": {"test": 1.0},
                    }
                }
            },
            "encode": {"shards": 2},
            "probe": {"shards": 3},
            "ppo": {"arms": ["penalty", "no_penalty"], "seeds": [0, 1]},
        }
    )


# Stands in for `python -m jobs`: has a file published, or does what the run's `faults.json` says of
# the unit.
FAKE_JOBS = """
import json, os, socket, sys, time
phase, run, unit = sys.argv[1], sys.argv[3], sys.argv[5]
with open(run + "/faults.json") as faults:
    fault = json.load(faults).get(f"{{phase}}/{{unit}}")
with open(run + "/order", "a") as order:
    order.write(f"{{phase}}/{{unit}}\\n")
with open(run + "/gpus", "a") as gpus:
    gpus.write(f"{{phase}}/{{unit}} {{os.environ.get('CUDA_VISIBLE_DEVICES')}}\\n")
if fault == "fail":
    print("error: the disk of the moon is full"); sys.exit(2)
if fault == "sleep":
    time.sleep(600)
with socket.socket(socket.AF_UNIX) as publisher:
    publisher.connect({socket!r})
    publisher.sendall(json.dumps([phase, run, unit, dict(os.environ)]).encode())
    publisher.shutdown(socket.SHUT_WR)
    assert publisher.recv(1)
"""
# Publishes for them all, each in the environment of its job: to import `sarm.run` takes longer than
# all else that a job does.
PUBLISHER = """
import json, os, socket, sys
from sarm.run import Attempt, RunDir
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("up", flush=True)
while True:
    job, _ = listener.accept()
    with job:
        phase, run, unit, environment = json.load(job.makefile())
        os.environ.clear()
        os.environ.update(environment)
        attempt = Attempt(RunDir.open(run), phase, unit)
        attempt.path("final_report.txt").write_text("report")
        attempt.publish()
        job.sendall(b"1")
"""


@pytest.fixture(scope="module")
def fake_jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Jobs are FAKE_JOBS."""
    script = tmp_path_factory.mktemp("fake") / "fake_jobs.py"
    publisher = script.with_name("socket")
    script.write_text(FAKE_JOBS.format(socket=str(publisher)))
    true_write = local.write_atomic

    def redirect(path: Path, data: bytes) -> None:
        spec = json.loads(data)
        for command in spec["commands"]:
            command["argv"] = [str(script), *command["argv"][2:]]
        true_write(path, json.dumps(spec).encode())

    words = [sys.executable, "-c", PUBLISHER, str(publisher)]
    with (
        subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as process,
        pytest.MonkeyPatch.context() as patch,
    ):
        assert process.stdout and process.stdout.readline() == b"up\n"
        patch.setattr(local, "write_atomic", redirect)
        yield
        process.kill()


def new_run(path: Path, config: Config) -> RunDir:
    run = RunDir.create(path, config)
    (run.path / "faults.json").write_text("{}")
    (run.path / "order").write_text("")
    return run


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, config: Config, fake_jobs: None
) -> tuple[RunDir, local.State]:
    """A whole run of one seed, and what it said became of each task; read only."""
    one_seed = config.ppo.model_copy(update={"seeds": (0,)})
    run = new_run(
        tmp_path_factory.mktemp("finished") / "run", config.model_copy(update={"ppo": one_seed})
    )
    return run, local.run_all(run, workers=2)


@pytest.fixture
def fake_run(tmp_path: Path, finished: tuple[RunDir, local.State]) -> RunDir:
    """A finished run of the test's own."""
    shutil.copytree(finished[0].path, tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "order").write_text("")
    return RunDir.open(tmp_path / "run")


def undo(run: RunDir, *nodes: tuple[str, str]) -> None:
    for phase, unit in nodes:
        shutil.rmtree(run.folder(phase, unit))


def test_every_task_comes_after_all_that_it_needs(config: Config) -> None:
    seen: set[Node] = set()
    for task in tasks(config):
        assert set(task.needs) <= seen
        seen.add(task.node)
    assert len(seen) == 1 + 2 + 3 + 1 + 1 + 4 + 1 + 1 + 5 + 1


def test_base_is_evaluated_without_training_and_a_policy_after_its_own(config: Config) -> None:
    needs = {task.node: task.needs for task in tasks(config)}
    assert needs[Node("evaluate", "base")] == (Node("calibrate", "all"),)
    assert needs[Node("evaluate", "penalty-seed1")] == (Node("ppo", "penalty-seed1"),)
    assert len(needs[Node("probe", "shard-0000-of-0003")]) == 2
    assert len(needs[Node("report", "all")]) == 19


def test_a_run_is_done_in_order_and_a_second_one_skips_all_of_it(
    finished: tuple[RunDir, local.State], fake_run: RunDir
) -> None:
    run, first = finished
    assert set(first.word.values()) == {"done"}
    order = (run.path / "order").read_text().split()
    for task in tasks(run.config):
        for need in task.needs:
            assert order.index(f"{need.phase}/{need.unit}") < order.index(
                f"{task.node.phase}/{task.node.unit}"
            )
    second = local.run_all(fake_run, workers=2)
    assert set(second.word.values()) == {"skipped"}


def test_jobs_side_by_side_get_a_gpu_each(
    fake_run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-8a")
    assert local.visible_gpus(os.environ) == ["5", "GPU-8a"]
    (fake_run.path / "gpus").unlink(missing_ok=True)
    undo(fake_run, *[("probe", f"shard-000{n}-of-0003") for n in range(3)])
    local.run_all(fake_run, workers=3)
    given = dict(line.rsplit(" ", 1) for line in (fake_run.path / "gpus").read_text().splitlines())
    shards = [gpu for unit, gpu in given.items() if unit.startswith("probe/")]
    assert sorted(shards) == ["5", "5", "GPU-8a"]


def test_jobs_that_share_a_gpu_are_told_of_the_service_that_lets_them(
    fake_run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def served() -> contextlib.AbstractContextManager[dict[str, str]]:
        asked.append("MPS")
        return contextlib.nullcontext({"CUDA_MPS_PIPE_DIRECTORY": "/srv/mps"})

    monkeypatch.setattr(local, "served", served)
    for gpus, shared in (("5", True), ("5,6", False)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        shutil.rmtree(fake_run.path / "submitit")
        undo(fake_run, ("steer", "all"))
        assert local.main(["--run", str(fake_run.path), "--workers", "2"]) == 0
        [spec] = fake_run.path.glob("submitit/*/steer.all.json")
        env = json.loads(spec.read_text())["env"]
        assert env.get("CUDA_MPS_PIPE_DIRECTORY") == ("/srv/mps" if shared else None)
        assert env["CUDA_VISIBLE_DEVICES"] == "5" and int(env["OMP_NUM_THREADS"]) >= 1
    assert asked == ["MPS"]


def test_the_least_used_gpu_is_the_first_of_equals() -> None:
    assert local.least_used(["0", "1", "2"], ["0", "2", "0"]) == "1"
    assert local.least_used(["0", "1", "2"], ["1", "0"]) == "2"
    assert local.least_used(["0", "1"], ["1", "0"]) == "0"
    assert local.least_used([], []) is None


def test_gpus_are_those_of_the_environment_else_of_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf 'GPU-1\\nGPU-2\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert local.visible_gpus({}) == ["GPU-1", "GPU-2"]
    assert local.visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    program.write_text("#!/bin/sh\necho no driver; exit 9\n")
    assert local.visible_gpus({}) == []


def test_a_failure_stops_what_depends_on_it_but_not_the_report(
    fake_run: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    (fake_run.path / "faults.json").write_text(json.dumps({"ppo/penalty-seed0": "fail"}))
    undo(
        fake_run,
        ("ppo", "penalty-seed0"),
        ("evaluate", "penalty-seed0"),
        ("evaluate", "no_penalty-seed0"),
        ("report", "all"),
    )
    state = local.run_all(fake_run, workers=2)
    assert state.word[Node("ppo", "penalty-seed0")] == "failed"
    assert state.word[Node("evaluate", "penalty-seed0")] == "not run"
    assert state.word[Node("evaluate", "no_penalty-seed0")] == "done"
    assert state.word[Node("report", "all")] == "done"
    assert "moon" in last_lines(fake_run.log("ppo", "penalty-seed0"), 1)[0]
    (fake_run.path / "faults.json").write_text("{}")
    again = local.run_all(fake_run, workers=2)
    redone = {str(node) for node, word in again.word.items() if word == "done"}
    assert redone == {"ppo/penalty-seed0", "evaluate/penalty-seed0", "report"}


def test_a_damaged_file_alone_is_redone(fake_run: RunDir) -> None:
    victim = next(fake_run.folder("steer").glob("final_report.*.txt"))
    victim.write_text("reporT")
    again = local.run_all(fake_run, workers=2)
    assert {str(node) for node, word in again.word.items() if word == "done"} == {"steer", "report"}


def test_ctrl_c_stops_the_jobs_and_leaves_a_run_that_goes_on(fake_run: RunDir) -> None:
    (fake_run.path / "faults.json").write_text(json.dumps({"select/all": "sleep"}))
    undo(fake_run, ("select", "all"), ("report", "all"))

    def interrupt() -> None:
        while "select" not in (fake_run.path / "order").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    # Under nohup or in the background of a script SIGINT is ignored from the start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            local.run_all(fake_run, workers=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert subprocess.run(["pgrep", "-f", f"select --run {fake_run.path}"]).returncode == 1, (
        "the job outlived Ctrl-C"
    )
    (fake_run.path / "faults.json").write_text("{}")
    again = local.run_all(fake_run, workers=2)
    assert again.word[Node("probe", "shard-0000-of-0003")] == "skipped"
    assert again.word[Node("report", "all")] == "done"


def test_an_error_of_the_launchers_own_stops_the_jobs_too(
    fake_run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would go on without the service by which they share a GPU."""
    (fake_run.path / "faults.json").write_text(json.dumps({"select/all": "sleep"}))
    undo(fake_run, ("select", "all"))

    def full(*_: object) -> None:
        if "select" in (fake_run.path / "order").read_text():
            raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(local, "write_local_states", full)
    with pytest.raises(OSError, match="no space left"):
        local.run_all(fake_run, workers=2)
    assert subprocess.run(["pgrep", "-f", f"select --run {fake_run.path}"]).returncode == 1


def test_status_tells_done_from_undone(
    tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(tmp_path / "run", config)
    Attempt(run, "fetch").publish()
    assert status(["--run", str(run.path)]) == 1
    out = capsys.readouterr().out
    assert "done" in out and "no manifest" in out
    assert status(["--run", str(run.path / "nowhere")]) == 2


def test_entry_forwards_a_signal_and_returns_the_code(tmp_path: Path) -> None:
    command = {
        "argv": ["-c", "import time; print('up', flush=True); time.sleep(60)"],
        "log": str(tmp_path / "log"),
    }
    spec = {"commands": [command], "cwd": str(tmp_path), "env": {}, "ranks": False, "grace_s": 60}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from slurm.entry import run_spec; run_spec({str(tmp_path / 'spec.json')!r})",
        ],
        cwd=ROOT,
    )
    while not (tmp_path / "log").exists() or b"up" not in (tmp_path / "log").read_bytes():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert entry.GRACE_S > 0


def start_entry(
    tmp_path: Path, code: str, ranks: bool, grace_s: float = 60, **env: str
) -> subprocess.Popen[bytes]:
    """A job's entry, once its command has printed something."""
    spec = {
        "commands": [{"argv": ["-c", code], "log": str(tmp_path / "log")}],
        "cwd": str(tmp_path),
        "env": {},
        "ranks": ranks,
        "grace_s": grace_s,
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    words = [
        sys.executable,
        "-c",
        f"from slurm.entry import run_spec; run_spec({str(tmp_path / 'spec.json')!r})",
    ]
    process = subprocess.Popen(words, cwd=ROOT, env={**os.environ, **env}, process_group=0)
    while not (tmp_path / "log").exists() or b"up" not in (tmp_path / "log").read_bytes():
        time.sleep(0.02)
    return process


SLEEPS = "import time; print('up', flush=True); time.sleep(2)"
WAITS = SLEEPS.replace("2)", "300)")
"""Until it is ended."""


def test_a_shard_ignores_the_signal_for_those_that_checkpoint(tmp_path: Path) -> None:
    process = start_entry(tmp_path, SLEEPS, ranks=False)
    os.killpg(process.pid, signal.SIGUSR2)  # as slurmstepd does: to the whole group of the task
    assert process.wait(timeout=20) == 0
    assert not list(tmp_path.glob("signalled.*"))


def test_a_rank_that_is_told_says_so_and_a_cancelled_one_does_not(tmp_path: Path) -> None:
    rank = {
        "SLURM_JOB_ID": "5",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_RESTART_COUNT": "2",
    }
    process = start_entry(tmp_path, WAITS, ranks=True, **rank)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("signalled.*"))
    (tmp_path / "log").unlink()
    process = start_entry(tmp_path, WAITS, ranks=True, **rank)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=20) == 128 + signal.SIGUSR2
    assert [path.name for path in tmp_path.glob("signalled.*")] == ["signalled.5.2"]


CHECKPOINTS = """
import signal, sys, time
told = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda *_: told.append(1))
print('up', flush=True)
while not told:
    time.sleep(0.01)
time.sleep(3)
sys.exit(75)
"""


@pytest.mark.parametrize(
    ("told", "grace_s", "code"),
    [(signal.SIGUSR2, 60, 75), (signal.SIGTERM, 0, 75), (signal.SIGUSR2, 0, 137)],
)
def test_a_rank_has_all_its_grace_to_checkpoint_and_no_more(
    tmp_path: Path, told: signal.Signals, grace_s: float, code: int
) -> None:
    """It takes three seconds over its checkpoint. `grace_s` is for SIGUSR2; SIGTERM has a time of
    its own.
    """
    rank = {"SLURM_JOB_ID": "5", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}
    process = start_entry(tmp_path, CHECKPOINTS, ranks=True, grace_s=grace_s, **rank)
    process.send_signal(told)
    assert process.wait(timeout=20) == code
    assert ("error: ended by SIGKILL" in (tmp_path / "log").read_text()) == (code == 137)


def test_a_jobs_command_stays_in_the_process_group_that_slurm_kills(tmp_path: Path) -> None:
    process = start_entry(tmp_path, "import os; print('up', os.getpgrp(), flush=True)", ranks=False)
    process.wait(timeout=20)
    assert (tmp_path / "log").read_text().split()[-1] == str(process.pid)


def test_a_half_written_result_of_an_earlier_try_is_no_obstacle(tmp_path: Path) -> None:
    leftover = tmp_path / "5_0_result.pkl.save_tmp"
    leftover.touch()
    env = {
        "SLURM_JOB_ID": "5",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "1",
        "SUBMITIT_EXECUTOR": "slurm",
        "SUBMITIT_FOLDER": str(tmp_path),
    }
    assert start_entry(tmp_path, "print('up')", ranks=False, **env).wait(timeout=20) == 0
    assert not leftover.exists()


def test_ranks_of_a_requeued_job_meet_at_another_port() -> None:
    env = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "123456"}
    first, again = (
        entry.rank_environment(env),
        entry.rank_environment({**env, "SLURM_RESTART_COUNT": "1"}),
    )
    assert (
        first["MASTER_PORT"] != again["MASTER_PORT"]
        and first["WORLD_SIZE"] == "4"
        and first["LOCAL_RANK"] == "1"
    )
    assert all(20000 <= int(found["MASTER_PORT"]) < 32768 for found in (first, again))
    assert "CUDA_VISIBLE_DEVICES" not in first, "every rank sees all GPUs"


def test_jobs_of_one_id_on_two_clusters_that_share_hosts_meet_at_two_ports() -> None:
    ports = {
        entry.rendezvous_port({"SLURM_JOB_ID": job, "SLURM_CLUSTER_NAME": cluster})
        for job in ("7", "8")
        for cluster in ("dev16800", "dev17000", "gpu")
    }
    assert len(ports) == 6


def test_the_lock_refuses_a_live_owner_and_takes_over_from_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with (
        held(path, "a run"),
        pytest.raises(UserError, match=f"pid {os.getpid()}"),
        held(path, "a run"),
    ):
        pass
    assert not path.exists()
    script = (
        "import os, signal\nfrom pathlib import Path\nfrom slurm.lock import held\nwith"
        f" held(Path({str(path)!r}), 'x'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT)
    assert path.exists()
    with held(path, "a run"):
        assert json.loads((path / "owner.json").read_text())["pid"] == os.getpid()


def test_the_lock_leaves_an_owner_on_another_host_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.mkdir()
    (path / "owner.json").write_text(
        json.dumps({"host": socket.gethostname() + "-not", "pid": 1, "boot": "x", "start": "1"})
    )
    with pytest.raises(UserError, match=r"-not.*make unlock"), held(path, "a run"):
        pass
    assert lock.main(["--run", str(tmp_path)]) == 0
    with held(path, "a run"):
        pass


def test_unlock_leaves_a_live_owner_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with held(tmp_path / "submit.lock", "a submission"):
        assert lock.main(["--run", str(tmp_path)]) == 2
        assert f"pid {os.getpid()}" in capsys.readouterr().err
        assert (tmp_path / "submit.lock" / "owner.json").exists()
    assert lock.main(["--run", str(tmp_path)]) == 0
    assert "is not locked" in capsys.readouterr().out
    assert lock.main(["--run", str(tmp_path / "nowhere")]) == 2
