"""A whole run on a real Slurm in real images, and four faults: `make test-cluster`."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from sarm.config import ROOT
from slurm.dag import tasks
from tests.cluster.harness import CONFIG, HERE, ClusterRun, flip_a_bit, inside, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
PPO = "penalty-seed0"
TRAINED = {f"ppo/{PPO}", f"evaluate/{PPO}"}
"""A policy trained again has another training log, with its times, and so is evaluated again."""


def test_the_tiny_run_ends_with_a_whole_report(undisturbed: ClusterRun) -> None:
    assert "undone" not in undisturbed.attempts().values()
    assert "none: every phase is done" in undisturbed.report()
    assert "Hardware: CPU" in undisturbed.report() and "4 processes" in undisturbed.report()
    report = json.loads((undisturbed.path / "report.json").read_text())
    assert (
        report["failures"] == [] and len(report["progression"]) == undisturbed.dir.config.ppo.steps
    )
    manifest = undisturbed.dir.manifest("ppo", PPO)
    assert manifest is not None and manifest.more["ranks"] == 4
    images = {
        str(task.node): undisturbed.dir.read(*task.node).manifest.image_sha256
        for task in tasks(undisturbed.dir.config)
    }
    assert (
        all(len(sha256 or "") == 64 for sha256 in images.values())
        and images["report"] != images["select"]
    ), images
    assert undisturbed.status().count(" done ") == len(images)


def test_a_shard_that_is_killed_is_named_and_done_again_alone(undisturbed: ClusterRun) -> None:
    shard = "probe/shard-0000-of-0002"
    run = undisturbed.copy("killed", shard)
    run.submit()
    run.signal_phase("KILL", "probe", "shard-0000-of-0002")
    run.wait()
    assert run.attempts()[shard] == "undone"
    assert shard in run.report()
    run.submit()
    run.wait()
    assert run.redone() == {shard}
    assert run.figures() == undisturbed.figures()


def test_ppo_told_to_stop_in_a_step_goes_on_from_its_checkpoint(undisturbed: ClusterRun) -> None:
    run = undisturbed.copy("preempted", f"ppo/{PPO}")
    run.submit()
    job = run.jobs[f"ppo.{PPO}"]
    run.stop_in_training(PPO)
    inside("scancel", "--signal=USR2", job)
    told = f"signalled.{job}.0"
    until("the signal", lambda: list(run.path.glob(f"submissions/*/{told}")))
    run.signal_phase("CONT", "ppo", PPO, every=True)
    run.wait()
    attempt = run.attempts()[f"ppo/{PPO}"]
    assert attempt.startswith(f"{job}-1-0-"), "it was not requeued once"
    stopped, went_on = run.steps(PPO, f"{job}-0-"), run.steps(PPO, f"{job}-1-")
    assert 0 < len(stopped) < len(went_on) == run.dir.config.ppo.steps
    assert went_on[: len(stopped)] == stopped, (
        "it began anew instead of going on from its checkpoint"
    )
    assert run.redone() == TRAINED
    assert run.figures() == undisturbed.figures()


def test_a_corrupt_shard_is_done_again_alone(undisturbed: ClusterRun) -> None:
    run = undisturbed.copy("corrupt")
    flip_a_bit(next((run.path / "encode" / "shard-0001-of-0002").glob("encoded.*.safetensors")))
    run.submit()
    run.wait()
    assert run.redone() == {"encode/shard-0001-of-0002"}
    assert run.figures() == undisturbed.figures()


def test_two_submissions_at_once_submit_once(undisturbed: ClusterRun) -> None:
    run = undisturbed.copy("twice", "evaluate/base")
    words = [
        str(HERE / "in-cluster"),
        "make",
        "submit-all",
        "CLUSTER=development",
        f"CONFIG={CONFIG}",
        f"RUN={run.path}",
    ]
    both = [
        subprocess.Popen(
            words,
            cwd=ROOT,
            env=os.environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes == [0, 0] or (codes == [0, 2] and any("under way" in text for text in said)), said
    assert len(list((run.path / "submissions").glob("*/"))) == 1
    run.wait()
    assert run.redone() == {"evaluate/base"}
    assert run.figures() == undisturbed.figures()
