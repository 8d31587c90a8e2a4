"""What Slurm itself wrote of a job, in a submission's folder, and the line of it that says why the
job ended.

`complaint(job_logs(run / "submissions" / "1a2b3c4d", "12_3"))`. Imports nothing heavy: jobs use it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

COMPLAINT = re.compile(
    r"(?i)exceeded.*limit \(|oom.?kill|task \d+: out of memory|due to (time limit|node"
    r" fail|preempt)|^FATAL|No such file or directory$"
)
"""Lines of a job's own output that say why it was ended; srun's other lines only count exit codes.
"""
KILLED = re.compile(r"^srun: error: \S+: tasks? [\d,-]+: (Killed|Out Of Memory)$")
"""The same where nothing else says it: of a node's processes, killed all at once."""
OUT_OF_MEMORY = re.compile(r"(?i)exceeded memory limit|oom.?kill|out of memory|OUT_OF_ME")


def job_logs(folder: Path, job: str) -> list[Path]:
    """What Slurm wrote of a job, `12`, or `12_3` for an element of an array, in the folder of its
    submission: the same id may come again in another. Empty where it never began.
    """
    return sorted(folder.glob(f"{job}_*_log.out"))


def logs_by_job(folder: Path) -> dict[str, list[Path]]:
    """The same of every job of a submission, from one look into its folder."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*_log.out")):
        job = path.name.removesuffix("_log.out").rstrip("0123456789").rstrip("_")
        found.setdefault(job, []).append(path)
    return found


def complaint(logs: Iterable[Path]) -> str:
    """Why Slurm ended a job, or its container did not start, by the last line of theirs that says
    so; else empty.
    """
    said = killed = ""
    for log in logs:
        try:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        said = next((line for line in reversed(lines) if COMPLAINT.search(line)), said)
        killed = next((line for line in reversed(lines) if KILLED.search(line)), killed)
    said = said or killed
    return " ".join(
        re.sub(r"^(slurmstepd[^:]*|srun): error: ", "", said).replace("*", " ").split()
    )[:300]
