"""Slurm's command line, read and driven: squeue, sacct, scancel, scontrol, sbatch --test-only.

Every call has a time limit and says which command failed and how. `live_jobs(ids)` and
`history(ids)` feed status.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sarm.config import UserError

TIMEOUT_S = 60.0
SHORT_S = 10
"""Below it the CPU time of a job over its whole seconds is left out: it says more of the rounding.
"""
SIGNALS = (
    signal.SIGILL,
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGKILL,
    signal.SIGSEGV,
    signal.SIGUSR2,
    signal.SIGTERM,
)
"""What ends jobs; none of them is an exit code of this suite's."""


class Refused(UserError):
    """A Slurm command that said no, in its own words."""


class QueuedJob(NamedTuple):
    """One job or array element as squeue shows it."""

    id: str
    """`123` or `123_4`."""
    name: str
    state: str
    elapsed_s: float
    """Of this try; 0 where it waits."""
    reason: str


class PastJob(NamedTuple):
    """One job or array element as accounting has it."""

    id: str
    state: str
    exit_code: str
    elapsed_s: int
    cpu_efficiency: float | None
    """CPU time over elapsed time times CPUs; None where that is too short for sacct's whole
    seconds.
    """
    memory_share: float | None
    """Memory at its highest, of all tasks together, over what was asked for; None where either was
    not recorded.
    """

    @property
    def ended(self) -> bool:
        """Whether the shares are whole: of a job that runs accounting knows only in part."""
        return self.state not in ("PENDING", "RUNNING", "REQUEUED", "SUSPENDED")

    @property
    def exit(self) -> str:
        """`exit code 1`, `ended by SIGKILL`, or empty where the state says all there is."""
        code, _, signum = self.exit_code.partition(":")
        # sacct takes 128 off an exit code above it, which is how a shell tells of a signal.
        number = int(signum or 0) or (int(code or 0) if int(code or 0) in SIGNALS else 0)
        if number in SIGNALS:
            return f"ended by {signal.Signals(number).name}"
        return f"exit code {code}" if code not in ("", "0") else ""


def forget_overrides() -> None:
    """Drop from this process what would overrule the scripts' own flags: SBATCH_*
    (SBATCH_EXPORT=ALL would hand every secret of this shell to the jobs), the filters of squeue and
    sacct, and, inside a job, that job's SLURM_*.
    """
    for name in [
        name
        for name in os.environ
        if name.startswith(("SBATCH_", "SLURM_", "SQUEUE_", "SACCT_", "SCANCEL_"))
        and name != "SLURM_CONF"
    ]:
        del os.environ[name]


def call(words: Sequence[str], *, stdin: str | None = None) -> str:
    """Standard output of a Slurm command. Raises UserError where it is not there or does not
    answer, Refused with its last error line.
    """
    try:
        done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S)
    except FileNotFoundError:
        raise UserError(
            f"{words[0]} is not on PATH; run this on a login node of the cluster, or give DRY_RUN=1"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{words[0]} gave no answer in {TIMEOUT_S:.0f} s; the controller may be down, try again"
            " later"
        ) from None
    if done.returncode:
        # After an unknown option sbatch ends by pointing to its help.
        lines = [
            line
            for line in done.stderr.splitlines()
            if line.strip() and not line.startswith("Try ")
        ] or [f"exit code {done.returncode}"]
        reason = (
            f"{words[0]} failed:"
            f" {lines[-1].strip().removeprefix(f'{words[0]}: ').removeprefix('error: ')}"
        )
        if re.search(
            r"contact slurm controller|timed out|connection refused", reason, re.IGNORECASE
        ):
            raise UserError(f"{reason}; the controller may be down, try again later")
        raise Refused(reason)
    return done.stdout


def live_jobs(ids: Iterable[str]) -> list[QueuedJob]:
    """Those of the jobs that are still in the queue, array elements one by one. Purged ids are not
    an error.
    """
    wanted = set(ids)
    if not wanted:
        return []
    # One user's whole queue and a filter here: squeue refuses a list that holds a purged id.
    text = call(["squeue", "--me", "--noheader", "--array", "--format=%i|%j|%T|%M|%r"])
    lines = [line.strip().split("|", 4) for line in text.splitlines() if line.count("|") >= 4]
    jobs = [
        QueuedJob(id_, name, state, _seconds(elapsed), reason)
        for id_, name, state, elapsed, reason in lines
    ]
    return [job for job in jobs if job.id.partition("_")[0] in wanted]


def ids_by_name(names: Sequence[str]) -> list[str]:
    """Ids of queued jobs with these very names: finds jobs whose sbatch answer was lost."""
    if not names:
        return []
    # %F, not %A: of an array that has begun to run, %A gives each element's own.
    text = call(["squeue", "--me", "--noheader", f"--name={','.join(names)}", "--format=%F"])
    return sorted(set(text.split()))


def history(ids: Iterable[str]) -> dict[str, PastJob]:
    """What accounting knows of the jobs; empty where there is no accounting or it does not
    answer.
    """
    wanted = ",".join(sorted(set(ids)))
    if not wanted:
        return {}
    fields = "JobID,State,ExitCode,ElapsedRaw,TotalCPU,NCPUS,ReqMem,MaxRSS,NTasks"
    try:
        text = call(
            [
                "sacct",
                "--noheader",
                "--parsable2",
                "--duplicates",
                "--jobs",
                wanted,
                f"--format={fields}",
            ]
        )
    except UserError:
        return {}
    lines = [line.split("|") for line in text.splitlines() if line.count("|") == 8]
    used: dict[str, float] = {}
    for id_, *_, rss, tasks in lines:
        job, dot, _ = id_.partition(".")
        if dot:
            used[job] = max(used.get(job, 0.0), _bytes(rss) * int(tasks or 1))
    found: dict[str, PastJob] = {}
    for id_, state, code, elapsed, cpu, cpus, asked, _, _ in lines:
        if "." in id_:
            continue
        took, memory = int(elapsed or 0), _bytes(asked)
        efficiency = (
            _seconds(cpu) / (took * int(cpus)) if took >= SHORT_S and int(cpus or 0) else None
        )
        share = used[id_] / memory if used.get(id_) and memory else None
        found[id_] = PastJob(id_, state.split()[0], code, took, efficiency, share)
    return found


def cancel(ids: Iterable[str]) -> None:
    """Cancel jobs; ids that are gone are passed over. Raises UserError where some are still there
    and Slurm does not cancel them.
    """
    ids = list(ids)
    if not ids:
        return
    try:
        call(["scancel", "--quiet", *ids])
    except UserError:
        # Some versions take an id that is gone for a failure.
        if live_jobs(id_.partition("_")[0] for id_ in ids):
            raise


def release(ids: Iterable[str]) -> None:
    call(["scontrol", "release", ",".join(ids)])


def test_only(text: str) -> None:
    """Ask Slurm whether it would take this script, without submitting it. Raises UserError with
    its reason.
    """
    call(["sbatch", "--test-only"], stdin=text)


CURES = {
    r"submit.?limit|MaxSubmit": (
        "your site bounds how many jobs you may have queued: use fewer encode.shards or"
        " probe.shards, or raise pack in the profile"
    ),
    r"array": "lower max_array_size in the profile",
    r"account": (
        "set account in the profile to one of yours (sacctmgr show assoc user=$USER format=account)"
    ),
    r"partition": "set partition in the profile to one that sinfo shows",
    r"qos": "set qos in the profile to one that your account has",
    r"time limit": "lower time_min of that phase in the profile",
    r"reservation": (
        "set reservation in the profile to one that scontrol show reservation lists for you"
    ),
    r"licen[sc]e": "set licenses in the profile to what scontrol show licenses lists",
    r"feature": "set constraint in the profile to a feature that sinfo --format=%f shows",
    r"node name": "correct exclude in the profile",
    r"gres|gpu|node configuration|cpu count|memory": (
        "ask for what a node of that partition has: gpus, gpu_type, cpus_per_task, mem_gb in the"
        " profile"
    ),
}


def cure(reason: str, unknown: str = "correct the cluster profile") -> str:
    """What to change in the profile for a reason of Slurm's."""
    return next(
        (said for pattern, said in CURES.items() if re.search(pattern, reason, re.IGNORECASE)),
        unknown,
    )


def accounting_enforced() -> bool:
    """Whether Slurm checks accounts and QOS at submission; otherwise nobody does until the job is
    looked at.
    """
    try:
        text = call(["scontrol", "show", "config"])
    except UserError:
        return False
    line = next(
        (line for line in text.splitlines() if line.startswith("AccountingStorageEnforce")), ""
    )
    return any(word in line for word in ("associations", "limits", "qos", "safe"))


def _seconds(clock: str) -> float:
    """`1-02:03:04` or `03:04.5` as seconds; 0 for what is no time, such as squeue's INVALID."""
    days, _, rest = clock.rpartition("-")
    total = 0.0
    try:
        for part in rest.split(":"):
            total = total * 60 + float(part or 0)
    except ValueError:
        return 0.0
    return total + 86400 * int(days or 0)


def _bytes(size: str) -> float:
    """`512000K`, `2G` or, of old, `2Gn` as bytes; 0 where there is nothing."""
    number = size.strip().rstrip("nc")
    scale = {"K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}.get(number[-1:], 1)
    try:
        return float(number.rstrip("KMGT")) * scale
    except ValueError:
        return 0.0
