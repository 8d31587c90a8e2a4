"""How each unit of a run stands: by its manifest first, then the queue, a local launcher, the
accounting and the logs.

`units(Look(run), ask_slurm(look), local_states(run))`. A `Look` reads every file of the run at most
once.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from sarm.config import Phase, UserError
from sarm.records import Manifest
from sarm.run import RunDir, write_atomic
from slurm import queue
from slurm.dag import Node, Task, tasks
from slurm.joblogs import complaint, logs_by_job
from slurm.journal import FOLDER, Job, clusters, jobs_of, journals, owned
from slurm.lock import at_work
from slurm.view import Unit, span
from slurm.words import waits_for

GOOD_ENDS = ("COMPLETED", "COMPLETING", "PENDING", "RUNNING", "REQUEUED")
LOCAL_STATES = "local.json"


class Look(RunDir):
    """A run as it is seen once: manifests, verdicts on them, journals and logs are kept."""

    def __init__(self, run: RunDir, *, hashes: bool = False) -> None:
        super().__init__(run.path, run.config)
        self.hashes = hashes
        self.tasks = tasks(run.config)
        self.journals = journals(run)
        self.jobs = {
            n: job for journal in self.journals for n, job in jobs_of(run, journal).items()
        }
        self._manifests: dict[tuple[str, str], Manifest | None] = {}
        self._undone: dict[tuple[str, str, bool, bool], str | None] = {}
        self._logs: dict[str, dict[str, list[Path]]] = {}

    def manifest(self, phase: Phase | str, unit: str = "all") -> Manifest | None:
        if (phase, unit) not in self._manifests:
            self._manifests[phase, unit] = super().manifest(phase, unit)
        return self._manifests[phase, unit]

    def why_not_done(
        self, phase: Phase | str, unit: str = "all", *, hashes: bool = True, tensors: bool = True
    ) -> str | None:
        key = (phase, unit, hashes, tensors)
        if key not in self._undone:
            self._undone[key] = super().why_not_done(phase, unit, hashes=hashes, tensors=tensors)
        return self._undone[key]

    def job_logs(self, node: Node) -> list[Path]:
        """What Slurm wrote of a unit's newest job; empty where it never began."""
        job = self.jobs.get(node)
        if job is None:
            return []
        if job.submission not in self._logs:
            self._logs[job.submission] = logs_by_job(self.path / FOLDER / job.submission)
        return self._logs[job.submission].get(job.id, [])


class Slurm(NamedTuple):
    """What the queue and the accounting say of a run's jobs, by unit; each may be empty."""

    live: dict[Node, queue.QueuedJob]
    past: dict[Node, queue.PastJob]
    ids: Mapping[Node, str] = MappingProxyType({})
    """The job that the newest submission of each unit has for it."""
    heard: bool = True
    """False where the queue did not answer, so that an empty `live` means nothing."""
    ends: Mapping[Node, str] = MappingProxyType({})
    """The state of jobs that ended a short while ago, which the queue still knows."""


def ask_slurm(look: Look) -> Slurm:
    """The queue's and the accounting's word on the units' jobs; empty without Slurm. A job is the
    run's own by its name alone.
    """
    if shutil.which("squeue") is None:
        return Slurm({}, {})
    known, heard = [], True
    try:
        known = [job for name in clusters(look.journals) for job in queue.known_jobs(name)]
    except UserError:
        heard = False
    live: dict[Node, queue.QueuedJob] = {}
    ends: dict[Node, str] = {}
    for one in owned(look, look.journals, known):
        for node in one.nodes:
            newest = look.jobs.get(node)
            if one.job.live or one.job.state == "COMPLETING":
                live[node] = one.job
            elif newest is None or newest.name == one.job.name:
                ends[node] = one.job.state
    ids = {node: job.id for node, job in look.jobs.items()}
    return Slurm(live, past_jobs(look), ids, heard, ends)


def past_jobs(look: Look) -> dict[Node, queue.PastJob]:
    """What accounting says of the job that did each unit, else of its newest."""
    every: dict[Node, list[Job]] = {}
    for journal in look.journals:
        for node, job in jobs_of(look, journal).items():
            every.setdefault(node, []).append(job)
    asked: dict[Node, Job] = {}
    for node, jobs in every.items():
        publisher = published_by(look, node)
        asked[node] = next((job for job in reversed(jobs) if job.id == publisher), jobs[-1])
    found: dict[Node, queue.PastJob] = {}
    for cluster in {job.cluster for job in asked.values()}:
        ids = [job.id for job in asked.values() if job.cluster == cluster]
        past = {(job.id, job.name): job for job in queue.history(ids, cluster)}
        found |= {
            node: past[job.id, job.name]
            for node, job in asked.items()
            if job.cluster == cluster and (job.id, job.name) in past
        }
    return found


def units(look: Look, slurm: Slurm, local: Mapping[Node, str]) -> list[Unit]:
    """Every unit of the run as it stands."""
    return [unit_state(look, task, slurm, local) for task in look.tasks]


def unit_state(look: Look, task: Task, slurm: Slurm, local: Mapping[Node, str]) -> Unit:
    """A unit as it stands: done by its manifest, else as the queue, a local launcher or the
    accounting has it, else why it is not done.
    """
    node = task.node
    why = look.why_not_done(*node, hashes=look.hashes)
    # A report is made anew with every submission: one that stands may be an earlier one's.
    if node in slurm.live and (why is not None or node.phase == "report"):
        job = slurm.live[node]
        if job.state == "PENDING":
            return Unit(node, "pending", waits_for(job.reason))
        return Unit(node, "running", "" if job.state == "RUNNING" else job.state.lower())
    if why is None:
        return Unit(node, "done", duration(look, node))
    if node in local:
        return Unit(node, local[node])
    needs = [need for need in task.needs if not look.done(*need, hashes=False)]
    if ended := ended_badly(look, node, slurm):
        return ended
    if slurm.heard and node in slurm.ids and not look.job_logs(node):
        # A report is written whatever became of the rest: nothing that it lacks keeps it from being
        # run.
        if needs and task.when == "afterok":
            return Unit(node, "not run", f"needs {lacking(needs)}")
        if was_cancelled(look, node, slurm):
            return Unit(node, "not run", "its job was cancelled before it began")
        return Unit(
            node,
            "failed",
            "its job left the queue without a log, and Slurm no longer says why; could it write in"
            f" {look.path / FOLDER}?",
        )
    if not slurm.heard:
        return Unit(node, "not done", why)
    if look.job_logs(node) or (look.log(*node).exists() and not needs):
        return Unit(node, "failed", complaint(look.job_logs(node)) or why)
    return Unit(node, "waiting", f"for {lacking(needs)}" if needs else why)


def ended_badly(look: Look, node: Node, slurm: Slurm) -> Unit | None:
    """A unit whose job ended without success, by accounting's word or the queue's."""
    past, logs = slurm.past.get(node), look.job_logs(node)
    if past is not None and past.id != slurm.ids.get(node, past.id):
        past = None  # of the job that did it once, when another was to do it since
    state = past.state if past is not None else slurm.ends.get(node, "COMPLETED")
    if state in GOOD_ENDS or (state.startswith("CANCELLED") and not logs):
        return None
    said = [past.exit if past is not None else "", complaint(logs)]
    if not logs:
        said.append(f"it left no log; could it write in {look.path / FOLDER}?")
    return Unit(node, state, "; ".join(filter(None, said)))


def was_cancelled(look: Look, node: Node, slurm: Slurm) -> bool:
    """Whether a unit's newest job was cancelled, by Slurm's word or by `make cancel` here."""
    past = slurm.past.get(node)
    states = [slurm.ends.get(node, ""), past.state if past is not None else ""]
    if any(state.startswith("CANCELLED") for state in states):
        return True
    job = look.jobs.get(node)
    journal = next((j for j in look.journals if job and j["id"] == job.submission), None)
    return journal is not None and (
        journal["state"] == "cancelled" or str(node) in journal.get("cancelled", ())
    )


def lacking(needs: list[Node]) -> str:
    """`select, 3 of probe`."""
    counts = Counter(need.phase for need in needs)
    words = (
        str(need) if counts[need.phase] == 1 else f"{counts[need.phase]} of {need.phase}"
        for need in needs
    )
    return ", ".join(dict.fromkeys(words))


def write_local_states(run: RunDir, words: Mapping[Node, str], workers: int = 1) -> None:
    """Leave a local launcher's word on every unit where `local_states` finds it, and how many it
    runs side by side.
    """
    states = {str(node): word for node, word in words.items()}
    text = json.dumps({"workers": workers, "states": states}).encode()
    path = run.path / LOCAL_STATES
    if not path.exists() or path.read_bytes() != text:
        write_atomic(path, text, durable=False)


def local_states(run: RunDir) -> dict[Node, str]:
    """What a launcher at work in this run says of each unit; empty where none is at work."""
    if not at_work(run.path / "run.lock"):
        return {}
    words = _local(run).get("states", {})
    return {
        task.node: words[str(task.node)] for task in tasks(run.config) if str(task.node) in words
    }


def local_workers(run: RunDir) -> int:
    """How many units a local launcher runs side by side."""
    return int(_local(run).get("workers", 1))


def _local(run: RunDir) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((run.path / LOCAL_STATES).read_text())
    except (OSError, ValueError):
        return {}
    return found


def published_by(run: RunDir, node: Node) -> str:
    """The job that the standing manifest names; empty where there is none."""
    manifest = readable(run, node)
    return (manifest.job_id or "") if manifest else ""


def readable(run: RunDir, node: Node) -> Manifest | None:
    """A unit's manifest; None also where it is of a version that this one does not read."""
    try:
        return run.manifest(*node)
    except UserError:
        return None


def seconds(run: RunDir, node: Node) -> float | None:
    """How long the published attempt took."""
    manifest = readable(run, node)
    if manifest is None:
        return None
    start, end = (datetime.fromisoformat(at) for at in (manifest.started, manifest.ended))
    return (end - start).total_seconds()


def duration(run: RunDir, node: Node) -> str:
    """The same in words, or an empty string."""
    took = seconds(run, node)
    return "" if took is None else span(took)
