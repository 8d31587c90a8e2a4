"""Every other fault that a run is to outlive, on a real Slurm in real images: `make test-faults`.

docs/how-it-is-tested.md holds the table of what was seen.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.harness import RUNS, STATE, ClusterRun, inside, stand_alone, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
PPO = "penalty-seed0"
TRAINED = {f"ppo/{PPO}", f"evaluate/{PPO}"}
"""A policy trained again has another training log, with its times, and so is evaluated again."""
SHARD = "probe/shard-0000-of-0002"
needs_accounting = pytest.mark.skipif(
    not (STATE / "accounting").exists() or (STATE / "accounting").read_text().strip() == "0",
    reason="needs a cluster with ACCOUNTING=1",
)


@contextmanager
def closed(partition: str) -> Iterator[None]:
    """A partition that starts nothing, so that a job can be changed before it runs."""
    inside("scontrol", "update", f"PartitionName={partition}", "State=DOWN", root=True)
    try:
        yield
    finally:
        inside("scontrol", "update", f"PartitionName={partition}", "State=UP", root=True)


def flat(text: str) -> str:
    return " ".join(text.split())


def repaired(run: ClusterRun, undisturbed: ClusterRun, damaged: set[str]) -> None:
    """Submitted again it redoes what was damaged alone, and ends with the undisturbed figures."""
    run.submit()
    run.wait()
    assert run.redone() == damaged
    assert run.figures() == undisturbed.figures()


def test_a_shard_out_of_memory_is_named(undisturbed: ClusterRun) -> None:
    run = undisturbed.copy("memory", SHARD)
    with closed("cpu"):
        run.submit()
        inside("scontrol", "update", f"JobId={run.jobs['probe']}", "MinMemoryNode=60", root=True)
    run.wait()
    assert run.attempts()[SHARD] == "undone"
    said = r"exceeded memory limit \(\d+ > 62914560\)"
    assert re.search(rf"{SHARD} \(failed\): FAILED: .*{said}", flat(run.report()))
    assert re.search(rf"{SHARD} .*{said}", run.status())
    repaired(run, undisturbed, {SHARD})


def test_a_shard_past_its_time_limit_is_named(undisturbed: ClusterRun) -> None:
    run = undisturbed.copy("time", SHARD)
    run.submit()
    job = run.jobs["probe"]
    run.signal_phase("STOP", "probe", "shard-0000-of-0002")
    inside("scontrol", "update", f"JobId={job}", "TimeLimit=1", root=True)

    def over() -> bool:
        # Slurm wakes it when it tells of the limit, and again to end it.
        inside(
            "pkill", "-STOP", "-f", "--", f"-m jobs probe --run {run.path}", root=True, check=False
        )
        return job not in run.queued()

    until("the time limit", over)
    assert "JobState=TIMEOUT" in inside("scontrol", "show", "job", job).stdout
    assert run.processes("probe") == [], "the shard outlived its job"
    run.wait()
    assert run.attempts()[SHARD] == "undone"
    assert re.search(rf"{SHARD} \(failed\): TIMEOUT", flat(run.report()))
    assert re.search(rf"{SHARD} .*TIMEOUT", run.status())
    repaired(run, undisturbed, {SHARD})


def test_a_cancelled_run_stays_cancelled_and_goes_on_when_submitted_again(
    undisturbed: ClusterRun,
) -> None:
    run = undisturbed.copy("cancelled", f"ppo/{PPO}")
    run.submit()
    job = run.jobs[f"ppo.{PPO}"]
    run.stop_in_training(PPO)
    assert "cancelled" in run.make("cancel").stdout
    run.signal_phase("CONT", "ppo", PPO, every=True)
    run.wait()
    assert run.attempts()[f"ppo/{PPO}"] == "undone", "a cancelled job was requeued"
    assert re.search(rf"evaluate/{PPO} +\d+ +not run: needs ppo/{PPO}\b", run.status())
    # on a pseudo-terminal
    watched = inside("script", "-qec", f"make watch RUN={run.path}", "/dev/null", check=False)
    assert (
        watched.returncode != 0
        and "not done are" in watched.stdout
        and f"ppo/{PPO}" in watched.stdout
    )
    repaired(run, undisturbed, TRAINED)
    assert not run.attempts()[f"ppo/{PPO}"].startswith(f"{job}-")


def test_a_killed_rank_ends_its_job_within_a_minute_and_is_named(undisturbed: ClusterRun) -> None:
    """The others are frozen, as in a collective that never ends: neither srun's SIGTERM nor a
    closed connection moves them.
    """
    run = undisturbed.copy("rank", f"ppo/{PPO}")
    run.submit()
    job = run.jobs[f"ppo.{PPO}"]
    run.stop_in_training(PPO)
    run.signal_phase("KILL", "ppo", PPO)
    killed = time.monotonic()
    until(
        "the job's end",
        lambda: (
            job
            not in inside("squeue", "--noheader", "--states=RUNNING", "--format=%A").stdout.split()
        ),
    )
    assert time.monotonic() - killed < 60
    run.wait()
    assert run.attempts()[f"ppo/{PPO}"] == "undone"
    for text in ((run.path / "logs" / f"ppo.{PPO}.log").read_text(), run.report()):
        assert re.search(r"rank \d of 4 on \S+ was killed by SIGKILL", flat(text))
    repaired(run, undisturbed, TRAINED)


def test_a_preemption_by_an_urgent_job_checkpoints_and_goes_on(undisturbed: ClusterRun) -> None:
    run = undisturbed.copy("urgent", f"ppo/{PPO}")
    run.submit()
    job = run.jobs[f"ppo.{PPO}"]
    run.stop_in_training(PPO)
    node = inside("squeue", "--noheader", f"--jobs={job}", "--format=%N").stdout.strip()
    inside(
        "sbatch",
        "--partition=urgent",
        f"--nodelist={node}",
        "--gres=gpu:4",
        "--output=/dev/null",
        "--wrap",
        "sleep 5",
    )
    until(
        "the preemption's signal",
        lambda: list(run.path.glob(f"submissions/*/signalled.{job}.0")),
        every_s=0.005,
    )
    # Slurm wakes the ranks with it; a step that takes a while yet is what its grace is for.
    run.signal_phase("STOP", "ppo", PPO, every=True)
    time.sleep(4)
    run.signal_phase("CONT", "ppo", PPO, every=True)
    run.wait()
    attempt = run.attempts()[f"ppo/{PPO}"]
    assert attempt.startswith(f"{job}-") and not attempt.startswith(f"{job}-0-")
    stopped, went_on = run.steps(PPO, f"{job}-0-"), run.steps(PPO, "-".join(attempt.split("-")[:2]))
    assert 0 < len(stopped) < len(went_on) == run.dir.config.ppo.steps
    assert went_on[: len(stopped)] == stopped, (
        "it began anew instead of going on from its checkpoint"
    )
    # What counts against max_requeues is tries, where Slurm may count a restart twice. A third
    # finds all done: Slurm may requeue a job that was preempted even when it has ended well.
    tries = next(run.path.glob(f"submissions/*/tries.{job}")).read_text().count("\n")
    assert tries == (run.path / "logs" / f"ppo.{PPO}.log").read_text().count(
        f"=== job {job} "
    ) and tries in (2, 3)
    assert run.redone() == TRAINED
    assert run.figures() == undisturbed.figures()


def test_a_lost_node_with_its_ranks_still_writing_spoils_nothing(undisturbed: ClusterRun) -> None:
    run = undisturbed.copy("lost", f"ppo/{PPO}")
    run.submit()
    job = run.jobs[f"ppo.{PPO}"]
    run.stop_in_training(PPO, checkpointed=True)
    old_ranks, saved = set(run.processes("ppo", PPO)), run.steps(PPO, f"{job}-0-")
    assert len(old_ranks) == 4
    node = inside("squeue", "--noheader", f"--jobs={job}", "--format=%N").stdout.strip()
    try:
        inside("bash", "-c", f"kill -KILL $(cat /run/slurmd-{node}.pid)", root=True)
        until(
            "the requeue",
            lambda: (
                inside(
                    "squeue", "--noheader", f"--jobs={job}", "--states=RUNNING", "--format=%N"
                ).stdout.strip()
                not in ("", node)
            ),
        )
        assert "down" in inside("sinfo", "--noheader", f"--nodes={node}", "--format=%T").stdout
        until("the new ranks' going on", lambda: run.steps(PPO, f"{job}-1-"), every_s=0.05)
        # Both write at once for a while; then the old ranks come last, when all others have read
        # what stands.
        inside("kill", "-CONT", *old_ranks, root=True)
        until(
            "a step of the old ranks'",
            lambda: len(run.steps(PPO, f"{job}-0-")) > len(saved),
            every_s=0.005,
        )
        inside("kill", "-STOP", *old_ranks, root=True)
        run.wait()
        assert run.attempts()[f"ppo/{PPO}"].startswith(f"{job}-1-") and old_ranks <= set(
            run.processes("ppo")
        ), "they had ended before"
        inside("kill", "-CONT", *old_ranks, root=True)
        until("the old ranks' end", lambda: not old_ranks & set(run.processes("ppo")))
    finally:
        inside("slurmd", "-N", node, root=True)
        until(
            f"{node}'s return",
            lambda: (
                "idle" in inside("sinfo", "--noheader", f"--nodes={node}", "--format=%T").stdout
            ),
        )
    late, went_on = run.steps(PPO, f"{job}-0-"), run.steps(PPO, f"{job}-1-")
    assert len(late) == len(went_on) == run.dir.config.ppo.steps, (
        "the old ranks did not go on writing"
    )
    kept = min(len(saved), run.dir.config.ppo.checkpoint_every)
    assert went_on[:kept] == late[:kept] and went_on[kept:] != late[kept:], (
        "the new ranks did not go on from the checkpoint"
    )
    assert run.redone() == TRAINED
    assert run.figures() == undisturbed.figures()
    assert run.make("verify", check=False).returncode == 0


def test_a_full_disk_is_named_and_leaves_nothing_half_written(undisturbed: ClusterRun) -> None:
    unit = "encode/shard-0001-of-0002"
    run = undisturbed.copy("full", unit)
    inside("mkdir", str(run.path / unit))
    inside(
        "mount", "-t", "tmpfs", "-o", "size=16k,mode=777", "full", str(run.path / unit), root=True
    )
    try:
        run.submit()
        run.wait()
        assert not inside("ls", str(run.path / unit)).stdout.count("manifest.json")
    finally:
        inside("umount", str(run.path / unit), root=True)
    assert "no room left" in (run.path / "logs" / "encode.shard-0001-of-0002.log").read_text()
    assert re.search(rf"{unit} \(failed\): [^/]*error: .*no room left", flat(run.report()))
    repaired(run, undisturbed, {unit})


def test_a_truncated_shard_is_done_again_alone(undisturbed: ClusterRun) -> None:
    run = undisturbed.copy("truncated")
    victim = max((run.path / SHARD).glob("*.parquet"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-100])
    assert SHARD in run.status()
    repaired(run, undisturbed, {SHARD})


def test_what_waits_for_a_cancelled_job_goes_with_it_and_the_report_says_why(
    undisturbed: ClusterRun,
) -> None:
    run = undisturbed.copy("upstream", "select/all")
    run.submit()
    run.signal_phase("STOP", "select", "all")
    inside("scancel", run.jobs["select"])
    run.wait()
    assert run.attempts()["select"] == "undone" and "select" in run.report()
    assert len(inside("squeue", "--noheader").stdout.split()) == 0
    repaired(run, undisturbed, {"select"})


def test_a_job_whose_answer_of_sbatch_is_lost_is_found(undisturbed: ClusterRun) -> None:
    run = undisturbed.copy("answer", "select/all")
    folder = RUNS / "bin"
    inside("mkdir", "-p", str(folder))
    real = inside("which", "sbatch").stdout.strip()
    wrapper = folder / "sbatch"
    script = f"""#!/bin/bash
        [[ $* == *--test-only* ]] && exec {real} "$@"
        echo . >>{folder}/calls
        [[ $(wc -l <{folder}/calls) == 3 ]] || exec {real} "$@"
        {real} "$@" >/dev/null
        said='Batch job submission failed: Socket timed out on send/recv operation'
        echo "sbatch: error: $said" >&2
        exit 1
    """
    wrapper.write_text(script)
    wrapper.chmod(0o755)
    (folder / "calls").touch()
    (folder / "calls").chmod(0o666)
    path = inside("bash", "-c", "echo $PATH").stdout.strip()
    words = [
        "env",
        f"PATH={folder}:{path}",
        "make",
        "submit-all",
        "CLUSTER=development",
        "CONFIG=configs/tiny.yaml",
        f"RUN={run.path}",
    ]
    inside(*words)
    jobs = run.jobs
    assert (folder / "calls").read_text().count(".") == len(jobs), "none was sent twice"
    run.wait()
    assert run.redone() == {"select"} and run.figures() == undisturbed.figures()


def test_a_deleted_log_and_shifted_times_change_nothing(undisturbed: ClusterRun) -> None:
    run = undisturbed.copy("clock")
    inside("bash", "-c", f"rm {run.path}/logs/ppo.{PPO}.log")
    for shift in ("-1 hour", "+1 hour"):
        inside("find", str(run.path), "-exec", "touch", "-d", shift, "{}", "+")
        assert run.status().count(" done ") == len(run.attempts())
        assert "is done" in run.submit()
    assert run.figures() == undisturbed.figures()


@needs_accounting
def test_status_with_accounting_without_it_and_with_everything_purged(
    undisturbed: ClusterRun,
) -> None:
    run = undisturbed.copy("status", SHARD)
    run.submit()
    run.signal_phase("KILL", "probe", "shard-0000-of-0002")
    until("the failure", lambda: run.jobs["probe"] not in run.queued())
    with_accounting = run.status()
    assert re.search(rf"{SHARD} +{run.jobs['probe']} +FAILED: ended by SIGKILL", with_accounting), (
        with_accounting
    )
    run.wait()
    assert re.search(rf"select +\d+ +not run: needs {SHARD}", run.status())
    # Without sacct: a command of that name that fails, first on PATH.
    folder = RUNS / "nosacct"
    inside("mkdir", "-p", str(folder))
    (folder / "sacct").write_text(
        "#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2\nexit 1\n"
    )
    (folder / "sacct").chmod(0o755)
    path = inside("bash", "-c", "echo $PATH").stdout.strip()
    status = ["env", f"PATH={folder}:{path}", "make", "status", f"RUN={run.path}"]
    assert re.search(rf"{SHARD} +\d+ +FAILED", inside(*status, check=False).stdout), (
        "the queue knows it for a while"
    )
    # Purged from the controller too.
    inside(
        "bash",
        "-c",
        "sed -i s/MinJobAge=.*/MinJobAge=5/ /etc/slurm/slurm.conf; scontrol reconfigure",
        root=True,
    )
    try:
        until(
            "the purge",
            lambda: (
                inside("scontrol", "show", "job", run.jobs["probe"], check=False).returncode != 0
            ),
        )
        shown = inside(*status, check=False).stdout
        assert re.search(rf"{SHARD} +\d+ +failed: no manifest", shown), shown
        # the shard, select, and the report, of which the standing one was made with both
        assert len(re.findall(r"^\S+ +\d\S* +done ", shown, re.MULTILINE)) == len(run.before) - 3
        assert re.search(rf"select +\d+ +not run: needs {SHARD}", shown), shown
        assert re.search(rf"report +\d+ +failed: its input {SHARD} is not done", shown), shown
        repaired(run, undisturbed, {SHARD})
    finally:
        inside(
            "bash",
            "-c",
            "sed -i s/MinJobAge=.*/MinJobAge=300/ /etc/slurm/slurm.conf; scontrol reconfigure",
            root=True,
        )
    assert inside(*status).stdout.count(" done ") == len(run.before)
    assert re.search(rf"{SHARD} +\d+ +done .* \d+%", run.status()), (
        "no efficiency where there is accounting"
    )


def test_the_submitting_shells_secrets_reach_no_job(undisturbed: ClusterRun) -> None:
    run = undisturbed.copy("canary", "steer/all")
    canary = "hf_canaryCANARYcanary"
    words = [
        "env",
        f"HF_TOKEN={canary}",
        "SBATCH_EXPORT=ALL",
        "make",
        "submit-all",
        "CLUSTER=development",
        "CONFIG=configs/tiny.yaml",
        f"RUN={run.path}",
    ]
    inside(*words)
    run.signal_phase("STOP", "steer", "all")
    pid = inside("pgrep", "-f", "--", f"-m jobs steer --run {run.path}", root=True).stdout.split()[
        0
    ]
    environment = inside("cat", f"/proc/{pid}/environ", root=True).stdout
    run.signal_phase("CONT", "steer", "all")
    assert "SLURM_JOB_ID" in environment and canary not in environment
    run.wait()
    assert (
        subprocess.run(["grep", "-rlF", canary, str(run.path)], capture_output=True).returncode == 1
    )
    assert run.figures() == undisturbed.figures()


def test_a_script_by_hand_runs_its_phase(undisturbed: ClusterRun) -> None:
    run = undisturbed.copy("byhand", "steer/all")
    words = [
        "sbatch",
        "--parsable",
        f"--output={run.path}/byhand.log",
        f"--export=ALL,CONFIG=configs/tiny.yaml,RUN={run.path}",
        stand_alone("steer.sbatch"),
    ]
    job = inside(*words).stdout.strip()
    until(
        "its end",
        lambda: not inside("squeue", "--noheader", f"--jobs={job}", check=False).stdout.strip(),
    )
    assert run.attempts()["steer"].startswith(f"{job}-"), (run.path / "byhand.log").read_text()


def test_ppo_by_hand_told_before_its_time_limit_checkpoints_requeues_and_goes_on(
    undisturbed: ClusterRun,
) -> None:
    run = undisturbed.copy("byhandppo", f"ppo/{PPO}")
    log = run.path / "byhand.log"
    export = f"--export=ALL,CONFIG=configs/tiny.yaml,RUN={run.path},UNIT={PPO}"
    job = inside(
        "sbatch", "--parsable", f"--output={log}", export, stand_alone("ppo.sbatch")
    ).stdout.strip()
    until("a step", lambda: run.steps(PPO), every_s=0.005)
    inside("scancel", "--signal=USR2", job)  # as --signal does: to the tasks, not to the script
    until(
        "its end",
        lambda: not inside("squeue", "--noheader", f"--jobs={job}", check=False).stdout.strip(),
    )
    attempt = run.attempts()[f"ppo/{PPO}"]
    assert attempt.startswith(f"{job}-1-"), log.read_text()
    stopped, went_on = run.steps(PPO, f"{job}-0-"), run.steps(PPO, f"{job}-1-")
    assert 0 < len(stopped) < len(went_on) == run.dir.config.ppo.steps
    assert went_on[: len(stopped)] == stopped, (
        "it began anew instead of going on from its checkpoint"
    )
    run.submit()
    run.wait()
    assert run.figures() == undisturbed.figures()
