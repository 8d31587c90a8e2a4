"""What a launcher and the jobs that it starts tell one another: variables, and lines of a log.

Imports nothing but Python's own: `slurm.entry` stands beside each rank of each job, and starts in a
tenth of the time that the config takes.
"""

from __future__ import annotations

from datetime import UTC, datetime

JOB, ATTEMPT, PATIENCE = "SARM_JOB", "SARM_ATTEMPT", "SARM_PATIENCE_S"
"""Variables by which a launcher says which job this is (`12`, or `12_3` of an array's element),
how the names of its files begin (job, try and rank), and how long a finished unit's manifest may
lag behind on a network file system.
"""
BEGAN = "=== job "
"""How the line begins with which a submitted job opens its part of a unit's log."""


def latest(lines: list[str]) -> list[str]:
    """Of a log's lines those of the last job that wrote there; all, where none says that it
    began.
    """
    began = max((i for i, line in enumerate(lines) if line.startswith(BEGAN)), default=-1)
    return lines[began + 1 :]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
