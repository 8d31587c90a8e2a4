"""Run a whole pipeline on this machine, in dependency order: `python -m slurm.local --config C
--run R`.

Jobs go through submitit's local executor, each with a log of its own and on one GPU, where there
are any: the one with fewest jobs; several on one share it through NVIDIA's MPS (`slurm/mps.py`).
What is done is skipped; Ctrl-C leaves a run that the same command resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit

from sarm.cli import ended
from sarm.config import ROOT
from sarm.run import RunDir, config_of, listed, write_atomic
from sarm.threads import given_cpus
from slurm.dag import Node, Task, tasks
from slurm.entry import GRACE_S, run_spec
from slurm.left import Rest
from slurm.lock import held
from slurm.mps import served
from slurm.state import write_local_states
from slurm.view import Unit, View, last_lines, span
from slurm.words import made, report_of

POLL_S = 0.2


@dataclass
class State:
    """What became of each task so far."""

    word: dict[Node, str] = field(default_factory=dict)
    """waiting, running, skipped, done, failed or `not run`."""
    began: dict[Node, float] = field(default_factory=dict)
    took: dict[Node, float] = field(default_factory=dict)

    def ended(self, node: Node) -> bool:
        return self.word[node] not in ("waiting", "running")

    def well(self, node: Node) -> bool:
        return self.word[node] in ("skipped", "done")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slurm.local", description=__doc__)
    parser.add_argument("--config", help="YAML; where left out, the run's own")
    parser.add_argument("--run", required=True)
    parser.add_argument(
        "--workers",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="tasks side by side (default: %(default)s)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    # A dropped connection or a kill stops jobs as Ctrl-C does.
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.default_int_handler)
    return ended(lambda: run_here(args), args.run)


def run_here(args: argparse.Namespace) -> int:
    """0 where all went well, 1 where a task failed, 130 where it was stopped."""
    run = RunDir.create(args.run, config_of(args.run, args.config, args.overrides))
    try:
        with (
            held(run.path / "run.lock", f"a run in {run.path}"),
            shared_gpus(args.workers) as given,
        ):
            state = run_all(run, workers=args.workers, given=given)
    except KeyboardInterrupt:
        print(
            f"\nstopped; the same command goes on from here, logs are in {run.path / 'logs'}",
            file=sys.stderr,
        )
        return 130
    failed = [node for node, word in state.word.items() if word == "failed"]
    for node in failed:
        print(
            f"error: {node} failed; its log is {run.log(*node)}:"
            f" {' '.join(last_lines(run.log(*node), 1)) or 'it is empty'}",
            file=sys.stderr,
        )
    undone = [str(node) for node in state.word if not state.well(node)]
    if undone:
        print(
            f"not done: {listed(undone)}; the same command goes on from what is done, and"
            f" {made('status', run.path)} says why"
        )
    else:
        print(report_of(run.path))
    return 1 if failed else 0


def shared_gpus(workers: int) -> contextlib.AbstractContextManager[Mapping[str, str]]:
    """MPS where so many tasks share a GPU; the variables that tasks need for it."""
    return served() if 0 < len(visible_gpus(os.environ)) < workers else contextlib.nullcontext({})


def run_all(run: RunDir, *, workers: int, given: Mapping[str, str] | None = None) -> State:
    """Run every task that is not done, with the variables `given`; returns what became of each. On
    Ctrl-C, or an error of its own, tells the jobs to stop, then raises.
    """
    plan = tasks(run.config)
    state, rest = State({task.node: "waiting" for task in plan}), Rest(run)
    jobs: dict[Node, Any] = {}
    gpus, gpu_of = visible_gpus(os.environ), dict[Node, str]()
    folder = run.path / "submitit" / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    # A folder of its own for every launch: submitit's local results are named by pid, and pids come
    # round again.
    folder.mkdir(parents=True, mode=0o700)
    try:
        with View(run) as view:
            while not all(state.ended(task.node) for task in plan):
                _settle(run, jobs, state)
                ready = [
                    task
                    for task in plan
                    if state.word[task.node] == "waiting"
                    and all(state.ended(need) for need in task.needs)
                ]
                for task in ready:
                    if task.when == "afterok" and not all(state.well(need) for need in task.needs):
                        state.word[task.node] = "not run"
                    elif run.done(*task.node) and (
                        task.when == "afterok" or not any(n in state.took for n in task.needs)
                    ):
                        state.word[task.node] = "skipped"
                    elif len(jobs) < workers:
                        # Threads of two jobs on one core wait for each other in spins: each job
                        # gets cores of its own.
                        threads = max(1, given_cpus(os.environ) // workers)
                        gpu = least_used(gpus, [gpu_of[node] for node in jobs if node in gpu_of])
                        if gpu is not None:
                            gpu_of[task.node] = gpu
                        env = {**(given or {}), "OMP_NUM_THREADS": str(threads)}
                        jobs[task.node] = _submit(run, task, folder, env, gpu)
                        state.word[task.node], state.began[task.node] = "running", time.monotonic()
                write_local_states(run, state.word, workers)
                shown = units_of(run, state)
                view.update(shown, str(rest.left(shown, workers) or ""))
                if jobs:
                    time.sleep(POLL_S)
    except BaseException:  # what shares a GPU, for one, ends with this call
        _stop(jobs)
        raise
    return state


def units_of(run: RunDir, state: State) -> list[Unit]:
    """The state as it is shown."""
    units = []
    for node, word in state.word.items():
        if word == "running":
            note = span(time.monotonic() - state.began[node])
        else:
            took = f"in {span(state.took[node])}" if node in state.took else ""
            note = {"skipped": "done already", "failed": f"{took}, see {run.log(*node)}"}.get(
                word, took
            )
        units.append(Unit(node, word, note))
    return units


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """The GPUs that this launcher may use, as CUDA_VISIBLE_DEVICES names them; what it says where
    it is set, else what nvidia-smi lists.
    """
    said = environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [name.strip() for name in said.split(",") if name.strip()]
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.split() if done.returncode == 0 else []


def least_used(gpus: list[str], used: list[str]) -> str | None:
    """The first of the GPUs on which fewest jobs run; None without GPUs."""
    running = Counter(used)
    return min(gpus, key=lambda gpu: running[gpu], default=None)


def _submit(run: RunDir, task: Task, folder: Path, env: Mapping[str, str], gpu: str | None) -> Any:
    """Start a task with these variables and those that every task has; submitit's job."""
    phase, unit = task.node
    run.progress_file(phase, unit).unlink(missing_ok=True)  # an earlier attempt's
    force = ["--force"] if task.when == "afterany" else []
    # submitit's local executor hides all GPUs from what it starts.
    variables: dict[str, str | None] = {
        **env,
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": gpu or os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    if phase != "fetch":
        variables |= {"HF_HUB_OFFLINE": "1", "HF_TOKEN": None, "HUGGING_FACE_HUB_TOKEN": None}
    command = {
        "argv": ["-m", "jobs", phase, "--run", str(run.path), "--unit", unit, *force],
        "log": str(run.log(phase, unit)),
    }
    spec = {
        "commands": [command],
        "cwd": str(ROOT),
        "env": variables,
        "ranks": False,
        "grace_s": GRACE_S,
    }
    path = folder / f"{phase}.{unit}.json"
    write_atomic(path, json.dumps(spec).encode())
    executor = submitit.LocalExecutor(folder)
    executor.update_parameters(timeout_min=7 * 24 * 60, stderr_to_stdout=True)
    # A terminal's Ctrl-C reaches the whole process group; jobs are to hear of it from `_stop`
    # alone, which lets them checkpoint. An ignored signal stays ignored in what is started here.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return executor.submit(run_spec, str(path))
    finally:
        signal.signal(signal.SIGINT, before)


def _settle(run: RunDir, jobs: dict[Node, Any], state: State) -> None:
    """Take ended jobs out; the manifest, not the exit code, says whether one is done."""
    for node, job in list(jobs.items()):
        if job.done():
            del jobs[node]
            state.took[node] = time.monotonic() - state.began[node]
            state.word[node] = "done" if run.done(*node) else "failed"


def _stop(jobs: dict[Node, Any]) -> None:
    """Ask every job to checkpoint and end, and wait until they have."""
    for job in jobs.values():
        os.kill(int(job.job_id), signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S + 5
    while any(not job.done() for job in jobs.values()) and time.monotonic() < deadline:
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
