"""The development cluster itself behaves as a site's: `make cluster-up && pytest -m cluster
tests/cluster/test_cluster.py`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
import uuid
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STATE = Path(os.environ.get("SARM_CLUSTER", "/var/tmp/sarm-cluster"))
LIGHT = ROOT / "outputs/images/sarm-light.sif"

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not (STATE / "pid").exists(), reason="no cluster is up; make cluster-up"),
]


def inside(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in the cluster as its user."""
    return subprocess.run(
        [HERE / "in-cluster", *command], text=True, capture_output=True, check=check, timeout=240
    )


def sbatch(folder: Path, script: str, *options: str, check: bool = True) -> str:
    """Submit a script with logs in `folder`; the job's id."""
    return inside(
        "sbatch",
        "--parsable",
        "--export=NONE",
        f"--output={folder}/%A_%a.log",
        *options,
        "--wrap",
        script,
        check=check,
    ).stdout.strip()


def ended(job: str) -> list[str]:
    """The states of a job's tasks once all have ended."""
    for _ in range(200):
        shown = inside("scontrol", "show", "job", job).stdout
        states = [
            word.removeprefix("JobState=") for word in shown.split() if word.startswith("JobState=")
        ]
        if not {"PENDING", "RUNNING", "COMPLETING"} & set(states):
            return states
        time.sleep(0.5)
    raise AssertionError(f"job {job} did not end:\n{shown}")


@pytest.fixture
def folder() -> Path:
    path = STATE / "home" / "runs" / f"test-{uuid.uuid4().hex[:8]}"
    inside("mkdir", "-p", str(path))
    return path


def exec_light(code: str) -> str:
    return (
        f"apptainer exec --nv --no-home --bind {ROOT} --pwd {ROOT} {LIGHT} python -c"
        f" {shlex.quote(code)}"
    )


def test_a_container_job_with_four_gpus_then_an_array_depending_on_it(folder: Path) -> None:
    if inside("test", "-e", str(LIGHT), check=False).returncode:
        pytest.skip("no light image; make images KIND=light")
    code = (
        "import os; print('rank', os.environ['SLURM_PROCID'], os.environ['CUDA_VISIBLE_DEVICES'],"
        " os.path.exists('/dev/fakegpu3'))"
    )
    four = sbatch(
        folder,
        "srun --export=ALL " + exec_light(code),
        "--partition=gpu",
        "--gpus-per-node=4",
        "--ntasks-per-node=4",
    )
    array = sbatch(
        folder,
        exec_light("import jobs.report, os; print('task', os.environ['SLURM_ARRAY_TASK_ID'])"),
        "--array=0-3",
        f"--dependency=afterok:{four}",
    )
    assert ended(four) == ["COMPLETED"]
    assert ended(array) == ["COMPLETED"] * 4
    logs = "".join(log.read_text() for log in folder.glob("*.log"))
    assert all(f"rank {rank} 0,1,2,3 True" in logs for rank in range(4))
    assert all(f"task {task}\n" in logs for task in range(4))


def test_a_job_over_its_memory_is_killed(folder: Path) -> None:
    job = sbatch(
        folder, "python3 -c 'import time; x = bytearray(300_000_000); time.sleep(60)'", "--mem=50"
    )
    assert ended(job) == ["FAILED"]
    assert "ExitCode=0:9" in inside("scontrol", "show", "job", job).stdout
    assert "exceeded memory limit" in next(folder.glob("*.log")).read_text()


def test_a_job_that_requeues_itself_runs_again_and_its_dependent_waits(folder: Path) -> None:
    script = (
        'echo "restart ${SLURM_RESTART_COUNT:-0}"; [ -n "$SLURM_RESTART_COUNT" ] || { scontrol'
        " requeue $SLURM_JOB_ID; sleep 60; }"
    )
    job = sbatch(folder, script, "--requeue", "--open-mode=append")
    after = sbatch(folder, "true", f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
    assert ended(after) == ["COMPLETED"]
    assert ended(job) == ["COMPLETED"]
    log = (folder / f"{job}_4294967294.log").read_text()
    assert "restart 0" in log
    assert "restart 1" in log


def test_accounting_is_enforced_where_it_is_on(folder: Path) -> None:
    if (STATE / "accounting").read_text().strip() == "0":
        assert "disabled" in inside("sacct", check=False).stderr
        return
    refused = inside("sbatch", "--account=nobody", "--wrap", "true", check=False)
    assert refused.returncode != 0
    assert "Invalid account" in refused.stderr
    job = sbatch(folder, "true")
    assert ended(job) == ["COMPLETED"]
    assert (
        inside("sacct", "-nXP", "-j", job, "--format=account,state").stdout.strip()
        == "sarm|COMPLETED"
    )


def test_the_callers_environment_stays_outside() -> None:
    env = {**os.environ, "CANARY": "tweet", "SARM_TOLD": "yes"}
    shown = subprocess.run(
        [HERE / "in-cluster", "env"], env=env, text=True, capture_output=True, check=True
    ).stdout
    assert "tweet" not in shown
    assert "SARM_TOLD=yes" in shown
