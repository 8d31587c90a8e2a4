"""What of a run is done, what runs, and why the rest is not: `python -m slurm.status --run R
[--hashes]`.

Manifests are the truth: a purged queue or a missing accounting takes nothing from it but colour.
`--cancel` cancels the run's jobs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sarm.cli import ended
from sarm.config import NON_PHASE_JOBS, UserError
from sarm.run import RunDir, slurm_complaint, write_atomic
from slurm import queue
from slurm.dag import Node, tasks
from slurm.lock import at_work
from slurm.submit import last_journal, unit_ids
from slurm.view import Unit, last_lines, read_progress, span

GOOD_ENDS = ("COMPLETED", "PENDING", "RUNNING", "REQUEUED")
LOCAL_STATES = "local.json"
WIDE = 120
"""Columns from which on a table has room for the names of logs."""


class Row(NamedTuple):
    """One unit's line."""

    unit: Unit
    job: str
    progress: str
    took: str
    efficiency: str
    log: str


class Slurm(NamedTuple):
    """What the queue and the accounting say of a run's jobs, by unit; each may be empty."""

    live: dict[Node, queue.QueuedJob]
    past: dict[Node, queue.PastJob]
    ids: Mapping[Node, str] = MappingProxyType({})
    """The job that the last submission has for each unit."""
    heard: bool = True
    """False where the queue did not answer, so that an empty `live` means nothing."""


def main(argv: list[str] | None = None) -> int:
    """0 where everything is done, 1 where something is not, 2 where this is no run."""
    parser = argparse.ArgumentParser(prog="python -m slurm.status", description=__doc__)
    parser.add_argument("--run", required=True)
    parser.add_argument(
        "--hashes", action="store_true", help="hash every published file instead of comparing sizes"
    )
    parser.add_argument("--cancel", action="store_true", help="cancel the run's jobs")
    args = parser.parse_args(argv)
    return ended(lambda: status(args), args.run)


def status(args: argparse.Namespace) -> int:
    run = RunDir.open(args.run)
    if args.cancel:
        print(cancel(run))
        return 0
    slurm, local = ask_slurm(run), local_states(run)
    if not slurm.heard:
        print("warning: the queue gave no answer; showing manifests alone", file=sys.stderr)
    nodes = [*(task.node for task in tasks(run.config)), *beside(run)]
    rows = [row(run, node, slurm, local, hashes=args.hashes) for node in nodes]
    console = Console()
    if not console.is_terminal:  # a file or a pipe: no lines broken at a width that nobody has
        console = Console(width=1000)
    columns = [
        "phase",
        "job",
        "state",
        "progress",
        "took",
        "CPU, memory",
        *(["log"] if console.width >= WIDE else []),
    ]
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("phase", "job", "took"))
    for line in rows:
        state = (
            f"{line.unit.state}: {line.unit.note}"
            if line.unit.note and line.unit.kind != "done"
            else line.unit.state
        )
        cells = (str(line.unit.node), line.job, state, *line[2:])
        table.add_row(*map(Text, cells[: len(columns)]))
    console.print(table)
    say_causes(run, [line.unit for line in rows], slurm, console)
    if (
        slurm.heard
        and not slurm.live
        and not local
        and (undone := [line.unit for line in rows if line.unit.kind != "done"])
    ):
        print(
            f"nothing of {run.path} is in the queue, {len(undone)} of {len(rows)} are not done;"
            " make submit-all or make run goes on from what is done"
        )
    return 0 if all(line.unit.state == "done" for line in rows) else 1


def beside(run: RunDir) -> list[Node]:
    """Jobs that are no phase and were published in this run: exports and trained SARMs."""
    published = run.published()
    return [Node(phase, "all") for phase in NON_PHASE_JOBS if (phase, "all") in published]  # type: ignore[arg-type]


def say_causes(run: RunDir, units: Iterable[Unit], slurm: Slurm, console: Console) -> None:
    """The ends of the logs of what failed: the unit's own, or its job's where it never came so far
    as to have one.
    """
    for unit in units:
        if unit.kind != "failed":
            continue
        logs = [
            run.log(*unit.node),
            *(run.slurm_logs(slurm.ids[unit.node]) if unit.node in slurm.ids else []),
        ]
        lines, log = next(
            ((lines, log) for log in logs if (lines := last_lines(log, 3))), ([], None)
        )
        console.print(Text(f"{unit.node}: {log or 'no log says why'}", "bold"), soft_wrap=True)
        for line in lines:
            console.print(Text(f"  {line}", "dim"), soft_wrap=True)


def row(run: RunDir, node: Node, slurm: Slurm, local: Mapping[Node, str], *, hashes: bool) -> Row:
    """A unit's line."""
    unit, past, log = (
        unit_state(run, node, slurm, local, hashes=hashes),
        slurm.past.get(node),
        run.log(*node),
    )
    shown = (
        "" if unit.kind in ("done", "pending", "waiting") else str(read_progress(run, node) or "")
    )
    shares = (
        (past.cpu_efficiency, past.memory_share)
        if past is not None and past.ended
        else (None, None)
    )
    efficiency = (
        ""
        if shares == (None, None)
        else ", ".join("-" if share is None else f"{share:.0%}" for share in shares)
    )
    running = slurm.live.get(node) if unit.kind == "running" else None
    took = (
        duration(run, node)
        if unit.kind == "done"
        else f"{span(running.elapsed_s)} so far"
        if running
        else ""
    )
    job = slurm.ids.get(node) or (published_by(run, node) if unit.kind == "done" else "")
    return Row(
        unit, job, shown, took, efficiency, str(log.relative_to(run.path)) if log.exists() else ""
    )


def unit_state(
    run: RunDir, node: Node, slurm: Slurm, local: Mapping[Node, str], *, hashes: bool
) -> Unit:
    """A unit as it stands: done by its manifest, else as the queue, a local launcher or the
    accounting has it, else why it is not done.
    """
    why = run.undone_because(*node, hashes=hashes)
    past = slurm.past.get(node)
    # A report is made anew with every submission: one that stands may be an earlier one's.
    if node in slurm.live and (why is not None or node.phase == "report"):
        job = slurm.live[node]
        if job.state == "PENDING":
            return Unit(node, "pending", job.reason)
        return Unit(node, "running", "" if job.state == "RUNNING" else job.state.lower())
    if why is None:
        return Unit(node, "done", duration(run, node))
    if node in local:
        return Unit(node, local[node])
    task = next((task for task in tasks(run.config) if task.node == node), None)
    needs = [need for need in (task.needs if task else ()) if not run.done(*need, hashes=False)]
    counts = Counter(need.phase for need in needs)
    lacks = ", ".join(
        dict.fromkeys(
            str(need) if counts[need.phase] == 1 else f"{counts[need.phase]} of {need.phase}"
            for need in needs
        )
    )
    job_logs = run.slurm_logs(slurm.ids[node]) if node in slurm.ids else []
    if past is not None and past.state not in GOOD_ENDS and (job_logs or past.state != "CANCELLED"):
        return Unit(
            node, past.state, "; ".join(filter(None, (past.exit, slurm_complaint(job_logs))))
        )
    if slurm.heard and node in slurm.ids and not job_logs:
        # A report is written whatever became of the rest: nothing that it lacks keeps it from being
        # run.
        return Unit(
            node,
            "not run",
            (
                f"needs {lacks}"
                if needs and task and task.when == "afterok"
                else "its job was cancelled before it began"
            ),
        )
    if not slurm.heard:
        return Unit(node, "not done", why)
    if job_logs or (run.log(*node).exists() and not needs):
        return Unit(node, "failed", slurm_complaint(job_logs) or why)
    return Unit(node, "waiting", f"for {lacks}" if needs else why)


def tell_local_states(run: RunDir, words: Mapping[Node, str]) -> None:
    """Leave a local launcher's word on every unit where `local_states` finds it."""
    told = json.dumps({str(node): word for node, word in words.items()}).encode()
    path = run.path / LOCAL_STATES
    if not path.exists() or path.read_bytes() != told:
        write_atomic(path, told, durable=False)


def local_states(run: RunDir) -> dict[Node, str]:
    """What a launcher at work in this run says of each unit; empty where none is at work."""
    if not at_work(run.path / "run.lock"):
        return {}
    try:
        words = json.loads((run.path / LOCAL_STATES).read_text())
    except (OSError, ValueError):
        return {}
    return {
        task.node: words[str(task.node)] for task in tasks(run.config) if str(task.node) in words
    }


def ask_slurm(run: RunDir) -> Slurm:
    """The queue's and the accounting's word on the last submission's units, and on what was done
    before; empty without Slurm.
    """
    if shutil.which("squeue") is None:
        return Slurm({}, {})
    journal, heard = last_journal(run), True
    try:
        live = {job.id: job for job in queue.live_jobs(journal["jobs"].values())} if journal else {}
    except UserError:
        live, heard = {}, False
    ids = unit_ids(journal) if journal else {}
    known = {
        task.node: id_
        for task in tasks(run.config)
        if (id_ := ids.get(task.node) or published_by(run, task.node))
    }
    past = queue.history(known.values())
    return Slurm(
        {n: live[i] for n, i in ids.items() if i in live},
        {n: past[i] for n, i in known.items() if i in past},
        ids,
        heard,
    )


def published_by(run: RunDir, node: Node) -> str:
    """The job that the standing manifest names; empty where there is none."""
    manifest = run.manifest(*node)
    return (manifest.job_id or "") if manifest else ""


def cancel(run: RunDir) -> str:
    """Cancel the last submission's jobs; says how many were in the queue. Raises UserError where
    nothing was submitted.
    """
    journal = last_journal(run)
    if journal is None:
        raise UserError(f"nothing was submitted for {run.path}; a local run is stopped with Ctrl-C")
    alive = [job for job in queue.live_jobs(journal["jobs"].values()) if job.state != "COMPLETING"]
    if not alive:
        return f"nothing of submission {journal['id']} is in the queue any more"
    queue.cancel(journal["jobs"].values())
    return (
        f"cancelled {len(alive)} job{'s' if len(alive) > 1 else ''} of submission {journal['id']};"
        " make submit-all goes on from what is done"
    )


def duration(run: RunDir, node: Node) -> str:
    """How long the published attempt took, or an empty string."""
    manifest = run.manifest(*node)
    if manifest is None:
        return ""
    seconds = (
        datetime.fromisoformat(manifest.ended) - datetime.fromisoformat(manifest.started)
    ).total_seconds()
    return span(seconds)


if __name__ == "__main__":
    sys.exit(main())
