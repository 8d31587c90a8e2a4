"""What tests of whole runs on the development cluster share: `from tests.cluster.harness import
ClusterRun`.

A fault is done to a copy of an undisturbed run, which is submitted again and must end with the same
figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sarm.config import ROOT, load_config
from sarm.run import RunDir
from slurm.dag import tasks
from slurm.journal import journals

HERE = Path(__file__).parent
STATE = Path(os.environ.get("SARM_CLUSTER", "/var/tmp/sarm-cluster"))
RUNS = STATE / "home" / "runs"
CONFIG = "configs/tiny.yaml"
PATIENCE_S = 900.0
"""For anything awaited. A slow machine is no fault."""

VOLATILE = {
    "date",
    "provenance",
    "cost",
    "phases",
    "sources",
    "outputs",
    "seconds",
    "training_s",
    "tokens_per_s",
}
"""Keys of report.json that say when, where and how fast, not what came out."""


def inside(
    *command: str, root: bool = False, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command in the cluster, in the checkout."""
    words = [str(HERE / "in-cluster"), *(["--root"] if root else []), *command]
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, timeout=PATIENCE_S)
    if check and done.returncode:
        raise AssertionError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        )
    return done


def until(what: str, true: Callable[[], Any], every_s: float = 0.5) -> Any:
    """The first true value of `true()`. AssertionError where it takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := true()):
        if time.monotonic() > deadline:
            raise AssertionError(
                f"{what} did not come about in {PATIENCE_S:.0f}"
                f" s\n{inside('squeue', check=False).stdout}"
            )
        time.sleep(every_s)
    return found


def stand_alone(name: str) -> str:
    """The path of a phase's script as the development cluster's profile has it."""
    inside(
        "python", "-m", "slurm.sbatch", "--cluster", "development", "--out", str(RUNS / "scripts")
    )
    return str(RUNS / "scripts" / name)


class ClusterRun:
    """A run on the development cluster, driven as its user would."""

    def __init__(self, name: str) -> None:
        self.path = RUNS / name
        self.dir = RunDir(self.path, load_config(ROOT / CONFIG))
        self.before: dict[str, str] = {}
        """Of a copy, its attempts when it was made."""

    def make(self, target: str, *more: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return inside(
            "make",
            "--no-print-directory",
            target,
            "CLUSTER=development",
            f"CONFIG={CONFIG}",
            f"RUN={self.path}",
            *more,
            check=check,
        )

    def submit(self) -> str:
        return self.make("submit-all").stdout

    def copy(self, name: str, *undone: str) -> ClusterRun:
        """Another run where this one stands but for the `undone` units, such as
        `probe/shard-0000-of-0002`.
        """
        other = ClusterRun(name)
        inside("cp", "-a", str(self.path), str(other.path))
        for folder in ("submissions", *undone):
            inside("rm", "-r", str(other.path / folder))
        other.before = other.attempts()
        return other

    @property
    def jobs(self) -> dict[str, str]:
        """The ids of all submissions' jobs, by batch, the newest of each."""
        found = {}
        for journal in journals(self.dir):
            found |= journal["jobs"]
        return found

    def queued(self) -> list[str]:
        ids = {id_ for journal in journals(self.dir) for id_ in journal["jobs"].values()}
        return [
            id_
            for id_ in inside("squeue", "--noheader", "--format=%A").stdout.split()
            if id_ in ids
        ]

    def wait(self) -> ClusterRun:
        until(f"the end of {self.path.name}", lambda: not self.queued(), every_s=2.0)
        return self

    def attempts(self) -> dict[str, str]:
        """Which attempt each unit's manifest names; `undone` where it has none."""
        found = {task.node: self.dir.manifest(*task.node) for task in tasks(self.dir.config)}
        return {
            str(node): manifest.attempt if manifest else "undone"
            for node, manifest in found.items()
        }

    def redone(self) -> set[str]:
        """Units whose manifest is another attempt's than `before`; the report, which is always
        written anew, left out.
        """
        return {
            unit for unit, attempt in self.attempts().items() if attempt != self.before[unit]
        } - {"report"}

    def figures(self) -> Any:
        """All that report.json says of results."""
        return settled(json.loads((self.path / "report.json").read_text()))

    def report(self) -> str:
        """The newest: one that lacks what the standing one has is written beside it."""
        lacking = self.path / "final_report.incomplete.txt"
        return (lacking if lacking.exists() else self.path / "final_report.txt").read_text()

    def status(self, *path: str) -> str:
        words = ["env", f"PATH={':'.join(path)}:{os.environ['PATH']}"] if path else ["env"]
        return inside(
            *words, "make", "--no-print-directory", "status", f"RUN={self.path}", check=False
        ).stdout

    def signal_phase(self, name: str, phase: str, unit: str, *, every: bool = False) -> None:
        """Send a signal to the process that does a unit, as soon as there is one; `every` sends it
        to all its ranks.
        """
        # The entry's child alone has `-m jobs` in its command line.
        pattern = f"-m jobs {phase} --run {self.path} --unit {unit}"
        how = ["pkill", f"-{name}", *([] if every else ["--oldest"]), "-f", "--", pattern]
        until(
            f"{phase}/{unit} to run",
            lambda: inside(*how, root=True, check=False).returncode == 0,
            every_s=0.1,
        )

    def steps(self, unit: str, attempt_of: str = "") -> list[str]:
        """The steps that an attempt at a policy has logged, a line each, its times among them; of
        several the longest.
        """
        logs = [
            file.read_text().splitlines()
            for file in (self.path / "ppo" / unit).glob(f"metrics.{attempt_of}*.jsonl")
        ]
        return max(logs, key=len, default=[])

    def stop_in_training(self, unit: str, *, checkpointed: bool = False) -> None:
        """Freeze every rank of a policy's training between its first steps, or when it has just
        written a checkpoint.
        """
        if checkpointed:
            until(
                f"a checkpoint of {unit}",
                lambda: list((self.path / "ppo" / unit).glob("checkpoints/step-*/manifest.json")),
                every_s=0.005,
            )
        until(f"a step of {unit}", lambda: self.steps(unit), every_s=0.005)
        self.signal_phase("STOP", "ppo", unit, every=True)
        assert self.dir.manifest("ppo", unit) is None, (
            "training was over before it could be disturbed"
        )

    def processes(self, phase: str, unit: str = "") -> list[str]:
        """Pids of what does a unit, or any unit of a phase, on any node."""
        pattern = f"-m jobs {phase} --run {self.path}{f' --unit {unit}' if unit else ' '}"
        return inside("pgrep", "-f", "--", pattern, root=True, check=False).stdout.split()


def settled(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: settled(value) for key, value in tree.items() if key not in VOLATILE}
    if isinstance(tree, list):
        return [settled(value) for value in tree]
    return tree.replace(str(RUNS), "") if isinstance(tree, str) else tree


def flip_a_bit(path: Path) -> None:
    """Size and modification time stay."""
    times = path.stat()
    with open(path, "r+b") as file:
        file.seek(times.st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
