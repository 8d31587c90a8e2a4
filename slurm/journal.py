"""The journals of a run's submissions: which jobs are this run's, written before and after each
sbatch in `submissions/ID/journal.json`.

`owned(journals(run), known_jobs())` is the one answer to whose a job is: by its name, in which the
run, the submission and the batch stand, and never by its number, which comes again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sarm.run import RunDir, write_atomic
from slurm.dag import Node
from slurm.plan import Batch
from slurm.queue import QueuedJob

FOLDER = "submissions"


class Job(NamedTuple):
    """The job that a submission has for a unit."""

    id: str
    """As squeue shows it: `123`, or `123_4` for an element of an array."""
    name: str
    submission: str
    cluster: str | None


class Owned(NamedTuple):
    """A job of the queue's that a submission of this run made."""

    job: QueuedJob
    submission: str
    batch: Batch
    nodes: tuple[Node, ...]


def job_name(run: RunDir, batch: str, submission: str, place: str | None = None) -> str:
    """The phase first, where a narrow squeue still shows it; unique to the submission, whose
    journal knows the `place`.
    """
    name = run.config.name.replace(".", "_")
    return f"{batch}.{name}-{place or place_of(run)}-{submission}"


def place_of(run: RunDir) -> str:
    """Where a run lies, in six characters, by whichever link it was reached."""
    return hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:6]


def record(run: RunDir, journal: dict[str, Any]) -> None:
    """Write a journal down. The folders are the owner's alone: jobs unpickle what lies there."""
    for folder in (run.path / FOLDER, run.path / FOLDER / journal["id"]):
        folder.mkdir(exist_ok=True, mode=0o700)
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
    folder = run.path / FOLDER / journal["id"]
    text = json.dumps({**journal, "inode": folder.stat().st_ino}, indent=1)
    write_atomic(folder / "journal.json", text.encode())


def journals(run: RunDir) -> list[dict[str, Any]]:
    """Those of all submissions, the oldest first. One that cannot be parsed is passed over, and so
    is one that came along in a copy of another run, whose jobs are that run's: it lies at another
    place, and is another folder. The same folder at another place was moved, or is seen from a
    host that mounts it elsewhere.
    """
    found, here = [], place_of(run)
    for path in (run.path / FOLDER).glob("*/journal.json"):
        try:
            journal = json.loads(path.read_text())
            if here == journal["place"] or path.parent.stat().st_ino == journal["inode"]:
                found.append(journal)
        except (FileNotFoundError, ValueError, KeyError):
            continue
    return sorted(found, key=lambda journal: (journal["number"], journal["id"]))


def batches_of(journal: Mapping[str, Any]) -> list[Batch]:
    return [
        Batch(
            **{
                **entry,
                "elements": tuple(tuple(element) for element in entry["elements"]),
                "needs": tuple(entry["needs"]),
                "after": tuple(entry["after"]),
            }
        )
        for entry in journal["batches"]
    ]


def jobs_of(run: RunDir, journal: Mapping[str, Any]) -> dict[Node, Job]:
    """Each unit's job, as far as its sbatch has answered."""
    found: dict[Node, Job] = {}
    for batch in batches_of(journal):
        id_ = journal["jobs"].get(batch.name)
        name = job_name(run, batch.name, journal["id"], journal["place"])
        for index, element in enumerate(batch.elements):
            for unit in element if id_ is not None else ():
                shown = f"{id_}_{index}" if len(batch.elements) > 1 else id_
                found[Node(batch.phase, unit)] = Job(
                    shown, name, journal["id"], journal.get("cluster")
                )
    return found


def unit_jobs(run: RunDir, known: Iterable[Mapping[str, Any]]) -> dict[Node, Job]:
    """Each unit's newest job."""
    return {node: job for journal in known for node, job in jobs_of(run, journal).items()}


def clusters(known: Iterable[Mapping[str, Any]]) -> list[str | None]:
    """The clusters that a run's jobs went to; None is the login node's own."""
    return list(dict.fromkeys(journal.get("cluster") for journal in known))


def owned(
    run: RunDir, known: Iterable[Mapping[str, Any]], queue: Iterable[QueuedJob]
) -> list[Owned]:
    """Those of the queue's jobs that this run's submissions made, the oldest submission's first."""
    by_name = {
        job_name(run, batch.name, journal["id"], journal["place"]): (position, journal, batch)
        for position, journal in enumerate(known)
        for batch in batches_of(journal)
    }
    found: list[tuple[int, Owned]] = []
    for job in queue:
        position, journal, batch = by_name.get(job.name, (0, None, None))
        if journal is None or batch is None or job.cluster != journal.get("cluster"):
            continue
        _, underscore, index = job.id.partition("_")
        elements = (
            [batch.elements[int(index)]] if underscore and index.isdigit() else batch.elements
        )
        nodes = tuple(Node(batch.phase, unit) for element in elements for unit in element)
        found.append((position, Owned(job, journal["id"], batch, nodes)))
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]
