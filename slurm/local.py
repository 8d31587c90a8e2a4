"""Run a whole pipeline on this machine, in dependency order: `python -m slurm.local --config C --run R`.

Jobs go through submitit's local executor, each with a log of its own. What is done is skipped; Ctrl-C leaves a
run that the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from rich.console import Console
from rich.live import Live
from rich.table import Table

from sarm.config import ROOT, UserError, load_config
from sarm.run import RunDir, write_atomic
from slurm.dag import Node, Task, tasks
from slurm.entry import GRACE_S, run_spec
from slurm.lock import held

POLL_S = 0.2
PLAIN_EVERY_S = 20.0


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
    parser.add_argument("--config", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="tasks side by side (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    # A dropped connection or a kill stops jobs as Ctrl-C does.
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.default_int_handler)
    try:
        run = RunDir.create(args.run, load_config(args.config, args.overrides))
        with held(run.path / "run.lock", f"a run in {run.path}"):
            state = run_all(run, workers=args.workers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from here, logs are in {Path(args.run) / 'logs'}", file=sys.stderr)
        return 130
    failed = [node for node, word in state.word.items() if word == "failed"]
    for node in failed:
        print(f"error: {node} failed; its log is {run.log(*node)}: {last_line(run.log(*node))}", file=sys.stderr)
    report = Node("report", "all")
    if state.well(report):
        print(run.path / "final_report.txt")
    return 1 if failed else 0


def run_all(run: RunDir, *, workers: int) -> State:
    """Run every task that is not done; returns what became of each. On Ctrl-C tells the jobs to stop, then raises."""
    plan = tasks(run.config)
    state = State({task.node: "waiting" for task in plan})
    jobs: dict[Node, Any] = {}
    folder = run.path / "submitit" / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    # A folder of its own for every launch: submitit's local results are named by pid, and pids come round again.
    folder.mkdir(parents=True, mode=0o700)
    show = Display(run, plan, state)
    try:
        with show:
            while not all(state.ended(task.node) for task in plan):
                _settle(run, jobs, state)
                ready = [task for task in plan if state.word[task.node] == "waiting" and all(state.ended(need) for need in task.needs)]
                for task in ready:
                    if task.when == "afterok" and not all(state.well(need) for need in task.needs):
                        state.word[task.node] = "not run"
                    elif run.done(*task.node) and (task.when == "afterok" or not any(n in state.took for n in task.needs)):
                        state.word[task.node] = "skipped"
                    elif len(jobs) < workers:
                        # Threads of two jobs on one core wait for each other in spins: each job gets cores of its own.
                        threads = max(1, (os.cpu_count() or 1) // workers)
                        jobs[task.node] = _submit(run, task, folder, threads)
                        state.word[task.node], state.began[task.node] = "running", time.monotonic()
                show.update()
                if jobs:
                    time.sleep(POLL_S)
    except KeyboardInterrupt:
        _stop(jobs)
        raise
    return state


def _submit(run: RunDir, task: Task, folder: Path, threads: int) -> Any:
    phase, unit = task.node
    force = ["--force"] if task.when == "afterany" else []
    # submitit's local executor hides all GPUs from what it starts; jobs are to see those this launcher sees.
    env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES")}
    if phase != "fetch":
        env |= {"HF_HUB_OFFLINE": "1", "HF_TOKEN": None, "HUGGING_FACE_HUB_TOKEN": None}
    command = {"argv": ["-m", "jobs", phase, "--run", str(run.path), "--unit", unit, *force], "log": str(run.log(phase, unit))}
    spec = {"commands": [command], "cwd": str(ROOT), "env": env, "ranks": False}
    path = folder / f"{phase}.{unit}.json"
    write_atomic(path, json.dumps(spec).encode())
    executor = submitit.LocalExecutor(folder)
    executor.update_parameters(timeout_min=7 * 24 * 60, stderr_to_stdout=True)
    # A terminal's Ctrl-C reaches the whole process group; jobs are to hear of it from `_stop` alone, which lets them
    # checkpoint. An ignored signal stays ignored in what is started here.
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


class Display:
    """Progress: a live table on a terminal, otherwise a line a change and now and then where things stand."""

    def __init__(self, run: RunDir, plan: list[Task], state: State) -> None:
        self.run, self.plan, self.state = run, plan, state
        self.console = Console()
        self.live = Live(console=self.console, refresh_per_second=4, transient=True) if self.console.is_terminal else None
        self.seen: dict[Node, str] = {}
        self.spoke = time.monotonic()

    def __enter__(self) -> Display:
        if self.live:
            self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.update()
        if self.live:
            self.live.__exit__(*error)

    def update(self) -> None:
        say: Callable[[str], None] = self.console.print if self.live else lambda line: print(line, flush=True)
        for node, word in self.state.word.items():
            if self.seen.get(node, "waiting") != word:
                self.seen[node] = word
                took = f" in {self.state.took[node]:.0f} s" if node in self.state.took else ""
                note = {"skipped": "already done, skipped", "done": f"done{took}", "failed": f"FAILED{took}, see {self.run.log(*node)}"}.get(word, word)
                say(f"{node!s:28} {note}")
        if self.live:
            self.live.update(self._table())
        elif time.monotonic() - self.spoke > PLAIN_EVERY_S:
            self.spoke = time.monotonic()
            for node in (n for n, word in self.state.word.items() if word == "running"):
                say(f"{node!s:28} {progress_text(self.run, node, self.state.began[node])}")

    def _table(self) -> Table:
        table = Table(box=None, header_style="bold")
        for column in ("phase", "state", "progress"):
            table.add_column(column)
        for node, word in self.state.word.items():
            table.add_row(str(node), word, progress_text(self.run, node, self.state.began[node]) if word == "running" else "")
        return table


def progress_text(run: RunDir, node: Node, began: float) -> str:
    """`step 12/100, 40 s left`, from what the job last wrote; empty where it has written nothing yet."""
    elapsed = time.monotonic() - began
    try:
        told = json.loads(run.progress_file(*node).read_text())
    except (FileNotFoundError, ValueError):
        return f"{elapsed:.0f} s"
    if not told["done"]:
        return f"{told['what']}, {elapsed:.0f} s"
    more = "".join(f", {key} {told[key]:.3f}" for key in ("reward", "penalty") if isinstance(told.get(key), (int, float)))
    return f"{told['what']} {told['done']}/{told['total']}{more}, {elapsed * (told['total'] - told['done']) / told['done']:.0f} s left"


def last_line(log: Path) -> str:
    """The last non-empty line of a log, where causes stand."""
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except FileNotFoundError:
        return "no log"
    return lines[-1].strip() if lines else "empty log"


if __name__ == "__main__":
    sys.exit(main())
