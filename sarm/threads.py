"""How many threads a phase may use: as many as the CPUs it was given, `bound_threads(os.environ)`.

The mathematics libraries start a thread for every core of the machine, also where Slurm, a
container or `taskset` left a process four of them; several such processes then wait for each other.
They read these variables when they are loaded, so call it before numpy or torch is imported.
No torch.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def bound_threads(environ: MutableMapping[str, str]) -> int:
    """Set each of VARIABLES that is not set, to OMP_NUM_THREADS where that is, else to
    `given_cpus`; the number of threads.
    """
    wanted = environ.get("OMP_NUM_THREADS", "").split(",")[0]
    threads = int(wanted) if wanted.isdecimal() and int(wanted) > 0 else given_cpus(environ)
    for name in VARIABLES:
        environ.setdefault(name, str(threads))
    return threads


def given_cpus(
    environ: Mapping[str, str], cgroups: Path = CGROUPS, own_cgroup: Path = OWN_CGROUP
) -> int:
    """The least of what Slurm gave the task, the cgroup's quota, rounded up, and the cores that
    the process may run on; 1 at least.
    """
    bounds = [
        slurm_cpus(environ),
        quota_cpus(cgroups, own_cgroup),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    ]
    return max(1, math.ceil(min(bound for bound in bounds if bound is not None)))


def slurm_cpus(environ: Mapping[str, str]) -> int | None:
    """CPUs of this Slurm task: as asked for a task, else its share of the job's on this node; None
    outside Slurm.
    """
    per_task = environ.get("SLURM_CPUS_PER_TASK", "")
    if per_task.isdecimal():
        return int(per_task)
    on_node = environ.get("SLURM_CPUS_ON_NODE", "")
    if not on_node.isdecimal():
        return None
    tasks = _tasks_per_node(
        environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "1")
    )
    node = int(environ.get("SLURM_NODEID", "0"))
    return max(1, int(on_node) // (tasks[node] if node < len(tasks) else 1))


def _tasks_per_node(text: str) -> list[int]:
    """ "4(x2),3" to [4, 4, 3]."""
    found: list[int] = []
    for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        found += [int(count)] * int(repeated or 1)
    return found


def quota_cpus(cgroups: Path = CGROUPS, own_cgroup: Path = OWN_CGROUP) -> float | None:
    """CPUs' worth of time that the process's cgroup, or one above it, may use; None where none
    bounds it. Versions 1 and 2.
    """
    try:
        lines = own_cgroup.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    quotas = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / "cpu" if controllers else cgroups
        for folder in (root / path.lstrip("/"), *(root / path.lstrip("/")).parents):
            if not folder.is_relative_to(root):
                break
            quotas.append(_quota_v1(folder) if controllers else _quota_v2(folder))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_v2(folder: Path) -> float | None:
    quota, period = ([*_words(folder / "cpu.max"), "", ""])[:2]
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def _quota_v1(folder: Path) -> float | None:
    quota, period = (
        "".join(_words(folder / name)) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    )
    # -1 where nothing bounds it
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split()
    except OSError:
        return []
