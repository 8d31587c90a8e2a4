"""A pretended cluster with a run on it: tests take it as the fixture `site`, its models and data
fetched already.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from sarm.run import Attempt, RunDir
from slurm import queue
from slurm import submit as submitting
from slurm.dag import tasks
from tests.fakes import slurm as fake

CONFIG = """
name: dag
policy: {model: p}
sarm: {model: s}
data:
  sources: {demo: {format: jsonl, label: Demo, path: data/demo/pairs.jsonl, split: {test: 1.0}}}
encode: {shards: 2}
probe: {shards: 5}
ppo: {arms: [penalty, no_penalty], seeds: [1]}
"""
PROFILE = """
description: test
partition: main
max_array_size: 2
gpu_type: h100
"""
CANARY = "hf_canaryCANARYcanary"


def batch_of(job: dict[str, Any]) -> str:
    """`probe.0` of a pretended job, from its name."""
    return str(job["name"]).rpartition(".")[0]


class Site:
    """A pretended cluster, a run on it and the ways to call the launcher."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = tmp_path / "slurm"
        self.home.mkdir()
        self.config, self.profile, self.path = (
            tmp_path / "config.yaml",
            tmp_path / "site.yaml",
            tmp_path / "run",
        )
        self.config.write_text(CONFIG)
        self.profile.write_text(PROFILE)
        monkeypatch.setenv("FAKE_SLURM", str(self.home))
        monkeypatch.setenv("PATH", f"{fake.install(tmp_path / 'bin')}:{os.environ['PATH']}")
        monkeypatch.setenv("HF_TOKEN", CANARY)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setattr(queue, "FIRST_WAIT_S", 0.001)
        monkeypatch.setenv("SARM_CACHE", str(tmp_path / "cache"))

    def submit(self, *more: str) -> int:
        return submitting.main(
            [
                "--cluster",
                str(self.profile),
                "--config",
                str(self.config),
                "--run",
                str(self.path),
                *more,
            ]
        )

    def fault(self, **faults: Any) -> None:
        fake.write(self.home, "faults", faults)

    @property
    def state(self) -> dict[str, Any]:
        """All that the pretended Slurm remembers."""
        return fake.read(self.home, "state", {"jobs": {}})

    @property
    def jobs(self) -> dict[str, dict[str, Any]]:
        return self.state["jobs"]

    def remember(self, state: dict[str, Any]) -> None:
        """Have the pretended Slurm remember this and nothing else."""
        fake.write(self.home, "state", state)

    def set_state(self, word: str, only: str = "") -> None:
        """As Slurm would, with the output files of jobs that begin."""
        with open(self.home / "lock", "w") as lock:  # a command may be at work
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._set_state(word, only)

    def _set_state(self, word: str, only: str) -> None:
        state = fake.read(self.home, "state")
        for id_, job in state["jobs"].items():
            if batch_of(job).startswith(only):
                job["state"], job["states"] = word, {}
                for element in [f"{id_}_{n}" for n in range(job["elements"])] or [id_]:
                    if word not in ("PENDING", "CANCELLED"):
                        submission = job["name"].rpartition("-")[2]
                        log = self.path / "submissions" / submission / f"{element}_0_log.out"
                        log.touch()
        fake.write(self.home, "state", state)

    @property
    def run(self) -> RunDir:
        return RunDir.open(self.path)

    def do(self, *phases: str, but: tuple[str, ...] = ()) -> None:
        """Publish every unit of these phases but some."""
        for task in tasks(self.run.config):
            if task.node.phase in phases and str(task.node) not in but:
                attempt = Attempt(self.run, *task.node)
                for need in task.needs:
                    attempt.note(self.run.read(*need))
                attempt.path("x.json").write_text("{}")
                attempt.publish()
