"""What of a run is done, what runs, and why the rest is not: `python -m slurm.status --run R
[--hashes] [--json]`.

Manifests are the truth: a purged queue or a missing accounting takes nothing from it but colour.
Ends with 0 where all is done, 1 where something runs, waits or has not been sent, 3 where something
failed, 2 where this is no run. `--cancel` cancels the run's jobs, with `--unit` those of one unit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sarm.cli import ended
from sarm.config import NON_PHASE_JOBS, UserError
from sarm.run import RunDir, listed, many
from slurm import queue
from slurm.dag import Node, named
from slurm.journal import batches_of, clusters, journals, owned, record
from slurm.lock import held
from slurm.state import Look, Slurm, ask_slurm, duration, local_states, published_by, seconds, units
from slurm.view import Unit, last_lines, read_progress, span
from slurm.words import made, report_of

WIDE = 120
"""Columns from which on a table has room for the names of logs."""
DONE, RUNNING, FAILED = 0, 1, 3


class Row(NamedTuple):
    """One unit's line."""

    unit: Unit
    job: str
    progress: str
    took: str
    efficiency: str
    log: str


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slurm.status", description=__doc__)
    parser.add_argument("--run", required=True)
    parser.add_argument(
        "--hashes", action="store_true", help="hash every published file instead of comparing sizes"
    )
    parser.add_argument("--json", action="store_true", help="for programs: one object")
    parser.add_argument("--cancel", action="store_true", help="cancel the run's jobs")
    parser.add_argument("--unit", help="cancel this unit's job alone, such as penalty-seed0")
    args = parser.parse_args(argv)
    return ended(lambda: status(args), args.run)


def status(args: argparse.Namespace) -> int:
    run = RunDir.open(args.run)
    if args.cancel:
        print(cancel(run, args.unit))
        return 0
    look = Look(run, hashes=args.hashes)
    slurm, local = ask_slurm(look), local_states(run)
    if not slurm.heard:
        print("warning: the queue gave no answer; showing manifests alone", file=sys.stderr)
    rows = [row(look, u, slurm) for u in [*units(look, slurm, local), *non_phase_units(look)]]
    shown = [line.unit for line in rows]
    code = exit_code(look, shown)
    if args.json:
        print(json.dumps(record_of(look, rows, slurm, code), indent=1))
        return code
    console = Console()
    if not console.is_terminal:  # a file or a pipe: no lines broken at a width that nobody has
        console = Console(width=1000)
    console.print(table(rows, console.width >= WIDE))
    say_causes(look, shown, console)
    if hours := gpu_hours(look, slurm):
        print(f"GPU-hours: {hours[0]:.1f} used of {hours[1]:.1f} planned")
    if args.hashes:
        print(verified_line(look, shown))
    print(help_line(look, shown, slurm, bool(local)))
    return code


def verified_line(look: Look, shown: Iterable[Unit]) -> str:
    """What came of hashing every published file."""
    found = {unit.node: look.manifest(*unit.node) for unit in shown}
    made_by = {node: manifest for node, manifest in found.items() if manifest is not None}
    files = sum(len(manifest.outputs) for manifest in made_by.values())
    damaged = [str(node) for node in made_by if look.why_not_done(*node, hashes=True)]
    said = f"hashed {many(files, 'file')} of {many(len(made_by), 'unit')}"
    if damaged:
        return f"{said}: not as published are {listed(damaged)}, of which the table says why"
    return f"{said}: all are as published"


def non_phase_units(look: Look) -> list[Unit]:
    """Jobs that are no phase and were published in this run, exports and trained SARMs: done, or
    why not, such as a damaged file.
    """
    published = look.published()
    nodes = [Node(phase, "all") for phase in NON_PHASE_JOBS if (phase, "all") in published]  # type: ignore[arg-type]
    why = {node: look.why_not_done(*node, hashes=look.hashes) for node in nodes}
    return [
        Unit(node, "done", duration(look, node))
        if why[node] is None
        else Unit(node, "not done", why[node] or "")
        for node in nodes
    ]


def exit_code(look: Look, shown: Iterable[Unit]) -> int:
    """0 done, 3 where something failed or, all of a submission having ended, was not run; else
    1.
    """
    kinds = {unit.kind for unit in shown}
    if kinds <= {"done", "skipped"}:
        return DONE
    if "failed" in kinds:
        return FAILED
    ended_early = "not" in kinds and look.journals and not kinds & {"running", "pending"}
    return FAILED if ended_early else RUNNING


def help_line(look: Look, shown: list[Unit], slurm: Slurm, local: bool) -> str:
    """What helps now, as a command."""
    left = [unit for unit in shown if unit.kind not in ("done", "skipped")]
    again = f"{made('submit-all', look.path)}, with the same CLUSTER and CONFIG"
    if not left:
        return report_of(look.path)
    if not slurm.heard:
        return f"the queue gave no answer; {made('status', look.path)} asks again"
    failed = [unit for unit in left if unit.kind == "failed"]
    if slurm.live or local:
        if failed and slurm.live:
            return f"{len(failed)} failed while others go on; sent again by {again}"
        return made("watch", look.path)
    return (
        f"nothing of {look.path} is in the queue, {len(left)} of {len(shown)} are not done;"
        f" {again}, or make run goes on from what is done"
    )


def record_of(look: Look, rows: list[Row], slurm: Slurm, code: int) -> dict[str, object]:
    """Status for programs."""
    hours = gpu_hours(look, slurm)
    return {
        "run": str(look.path),
        "state": {DONE: "done", RUNNING: "running", FAILED: "failed"}[code],
        "queue_answered": slurm.heard,
        "gpu_hours": {"used": hours[0], "planned": hours[1]} if hours else None,
        "units": [
            {
                "phase": line.unit.node.phase,
                "unit": line.unit.node.unit,
                "state": line.unit.state,
                "kind": line.unit.kind,
                "note": line.unit.note,
                "job": line.job or None,
                "progress": line.progress or None,
                "log": line.log or None,
            }
            for line in rows
        ],
    }


def table(rows: list[Row], logs: bool) -> Table:
    columns = ["phase", "job", "state", "progress", "took", "CPU, memory", *(["log"] * logs)]
    shown = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for column in columns:
        shown.add_column(column, overflow="fold", no_wrap=column in ("phase", "job", "took"))
    for line in rows:
        state = (
            f"{line.unit.state}: {line.unit.note}"
            if line.unit.note and line.unit.kind != "done"
            else line.unit.state
        )
        cells = (str(line.unit.node), line.job, state, *line[2:])
        shown.add_row(*map(Text, cells[: len(columns)]))
    return shown


def say_causes(look: Look, shown: Iterable[Unit], console: Console) -> None:
    """The ends of the logs of what failed: the unit's own, or its job's where it never came so far
    as to have one.
    """
    for unit in shown:
        if unit.kind != "failed":
            continue
        logs = [look.log(*unit.node), *look.job_logs(unit.node)]
        lines, log = next(
            ((lines, log) for log in logs if (lines := last_lines(log, 3))), ([], None)
        )
        console.print(Text(f"{unit.node}: {log or 'no log says why'}", "bold"), soft_wrap=True)
        for line in lines:
            console.print(Text(f"  {line}", "dim"), soft_wrap=True)


def row(look: Look, unit: Unit, slurm: Slurm) -> Row:
    """A unit's line."""
    node = unit.node
    past, log = slurm.past.get(node), look.log(*node)
    shown = (
        "" if unit.kind in ("done", "pending", "waiting") else str(read_progress(look, node) or "")
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
        unit.note if unit.kind == "done" else f"{span(running.elapsed_s)} so far" if running else ""
    )
    done_by = published_by(look, node) if unit.kind == "done" else ""
    live = slurm.live.get(node)
    job = done_by or (live.id if live else slurm.ids.get(node, ""))
    return Row(
        unit, job, shown, took, efficiency, str(log.relative_to(look.path)) if log.exists() else ""
    )


def gpu_hours(look: Look, slurm: Slurm) -> tuple[float, float] | None:
    """(used so far, planned by the time limits) of all submissions together; None where nothing
    asked for a GPU.
    """
    used = planned = 0.0
    for journal in look.journals:
        for batch in batches_of(journal):
            gpus = journal["gpus"][batch.name]
            planned += gpus * len(batch.elements) * journal["time_min"][batch.name] / 60
            for element in batch.elements:
                nodes = [Node(batch.phase, unit) for unit in element]
                mine = [n for n in nodes if look.jobs[n].submission == journal["id"]]
                took = max((elapsed(look, n, slurm) for n in mine), default=0.0)
                used += gpus * took / 3600
    return (used, planned) if planned else None


def elapsed(look: Look, node: Node, slurm: Slurm) -> float:
    """Seconds that a unit's job has taken: by accounting, the queue or its manifest."""
    if node in slurm.live:
        return slurm.live[node].elapsed_s
    if node in slurm.past:
        return float(slurm.past[node].elapsed_s)
    published = published_by(look, node)
    return (seconds(look, node) or 0.0) if published and published == slurm.ids.get(node) else 0.0


def cancel(run: RunDir, unit: str | None = None) -> str:
    """Cancel the jobs of this run's submissions, those of one unit where it is named; says how many
    were in the queue. Raises UserError where nothing was submitted, or no unit has that name.
    """
    known = journals(run)
    if not known:
        raise UserError(f"nothing was submitted for {run.path}; a local run is stopped with Ctrl-C")
    with held(run.path / "submit.lock", f"a submission of {run.path}"):
        queued = [job for name in clusters(known) for job in queue.known_jobs(name, patient=True)]
        mine = owned(run, known, queued)
        if unit is not None:
            named(run.config, unit)
            mine = [one for one in mine if any(unit in (n.unit, str(n)) for n in one.nodes)]
        alive = [one for one in mine if one.job.live]
        queue.cancel([one.job for one in alive], queued)
        note_cancelled(run, known, {str(n) for one in alive for n in one.nodes}, unit)
    of = f"{unit} of {run.path}" if unit else str(run.path)
    if not alive:
        return f"nothing of {of} is in the queue any more"
    return (
        f"cancelled {len(alive)} job{'s' if len(alive) > 1 else ''} of {of};"
        " make submit-all goes on from what is done"
    )


def note_cancelled(
    run: RunDir, known: Iterable[Mapping[str, object]], nodes: set[str], unit: str | None
) -> None:
    """Write down what was cancelled here, which Slurm forgets."""
    for journal in known:
        names = {str(n) for batch in batches_of(journal) for n in batch.nodes} & nodes
        whole = unit is None and journal["state"] == "submitting"
        if not names and not whole:
            continue
        before = journal.get("cancelled") or []
        assert isinstance(before, list)
        more = {"state": "cancelled"} if whole else {}
        record(run, {**journal, **more, "cancelled": sorted({*before, *names})})


if __name__ == "__main__":
    sys.exit(main())
