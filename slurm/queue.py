"""Slurm's command line, read and driven: squeue, sacct, scancel, scontrol, sbatch.

Every call goes through `call`: with an environment that the caller's shell has no say in, a time
limit, and an error that says which command failed and how. `retried` outlasts what passes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from sarm.config import UserError
from slurm.environment import client_environment

TIMEOUT_S = 60.0
TRIES = 5
"""How often a command is given whose refusal may pass."""
FIRST_WAIT_S = 1.0
"""Before the second try; doubled each time."""
SHORT_S = 10
"""Below it the CPU time of a job over its whole seconds is left out: it says more of the rounding.
"""
PASSING = re.compile(
    r"contact slurm controller|timed out|connection (refused|reset|failure)|temporarily un"
    r"|try again|in standby mode|zero bytes were transmitted|transport endpoint|unable to connect",
    re.IGNORECASE,
)
"""Refusals of a controller that is busy, restarting or not to be reached."""
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


class Unreachable(UserError):
    """A Slurm command that got no answer, or one that may be another in a while."""


class QueuedJob(NamedTuple):
    """One job or array element as squeue shows it, also of those that ended a while ago."""

    id: str
    """`123` or `123_4`."""
    name: str
    state: str
    elapsed_s: float
    """Of this try; 0 where it waits."""
    reason: str
    cluster: str | None = None

    @property
    def base(self) -> str:
        """The id of the whole array."""
        return self.id.partition("_")[0]

    @property
    def live(self) -> bool:
        """Whether it waits or runs. One that completes has ended, or is being cancelled."""
        return self.state in LIVE


LIVE = (
    "PENDING RUNNING SUSPENDED CONFIGURING REQUEUED REQUEUE_HOLD REQUEUE_FED RESIZING SIGNALING"
    " STAGE_OUT STOPPED SPECIAL_EXIT RESV_DEL_HOLD"
).split()


class PastJob(NamedTuple):
    """One job or array element as accounting has it."""

    id: str
    name: str
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


def call(words: Sequence[str], *, stdin: str | None = None, timeout_s: float = TIMEOUT_S) -> str:
    """Standard output of a Slurm command. Raises UserError where it is not there, Unreachable
    where it does not answer or may answer otherwise in a while, Refused with its last error line.
    """
    try:
        done = subprocess.run(
            words,
            input=None if stdin is None else stdin.encode(),
            capture_output=True,
            timeout=timeout_s,
            env=client_environment(os.environ),
        )
    except FileNotFoundError:
        raise UserError(
            f"{words[0]} is not on PATH; run this on a login node of the cluster, or give DRY_RUN=1"
        ) from None
    except subprocess.TimeoutExpired:
        raise Unreachable(
            f"{words[0]} gave no answer in {timeout_s:.0f} s; the controller may be down, try again"
            " later"
        ) from None
    if done.returncode:
        # After an unknown option sbatch ends by pointing to its help.
        lines = [
            line
            for line in done.stderr.decode(errors="replace").splitlines()
            if line.strip() and not line.startswith("Try ")
        ] or [f"exit code {done.returncode}"]
        reason = (
            f"{words[0]} failed:"
            f" {lines[-1].strip().removeprefix(f'{words[0]}: ').removeprefix('error: ')}"
        )
        if PASSING.search(reason):
            raise Unreachable(f"{reason}; the controller may be down, try again later")
        raise Refused(reason)
    # other users' and other programs' job names may be in any encoding
    return done.stdout.decode(errors="replace")


def retried(words: Sequence[str], *, stdin: str | None = None, found: str | None = None) -> str:
    """`call`, at most TRIES times with longer waits while the refusal may pass.

    `found` is the name of a job that the command submits: where one of that name is in the queue
    though the answer was lost, its id is the answer.
    """
    for attempt in range(TRIES):
        try:
            return call(words, stdin=stdin)
        except Unreachable:
            if attempt == TRIES - 1:
                raise
            time.sleep(FIRST_WAIT_S * 2**attempt)
            cluster = next(
                (w.partition("=")[2] for w in words if w.startswith("--clusters=")), None
            )
            try:
                if found and (jobs := [j for j in known_jobs(cluster) if j.name == found]):
                    return jobs[0].base
            except Unreachable:
                continue
    raise AssertionError("unreachable")


def of_cluster(cluster: str | None) -> list[str]:
    """The words that send a command to another cluster than the login node's own."""
    return [f"--clusters={cluster}"] if cluster else []


def known_jobs(cluster: str | None = None, *, patient: bool = False) -> list[QueuedJob]:
    """The user's jobs that the controller knows, array elements one by one: those in the queue and,
    for MinJobAge, those that ended.

    Raises Unreachable where it does not answer, after TRIES where `patient`.
    """
    words = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%M|%r|%j"]
    text = (retried if patient else call)([*words, *of_cluster(cluster)])
    lines = [line.strip().split("|", 4) for line in text.splitlines() if line.count("|") >= 4]
    return [
        QueuedJob(id_, name, state, _seconds(elapsed), reason, cluster)
        for id_, state, elapsed, reason, name in lines
    ]


def history(ids: Iterable[str], cluster: str | None = None) -> list[PastJob]:
    """What accounting knows of the jobs of these numbers, whosever they are; empty where there is
    no accounting or it does not answer.
    """
    wanted = ",".join(sorted({id_.partition("_")[0] for id_ in ids}))
    if not wanted:
        return []
    fields = "JobID,State,ExitCode,ElapsedRaw,TotalCPU,NCPUS,ReqMem,MaxRSS,NTasks,JobName"
    words = ["sacct", "--noheader", "--parsable2", "--duplicates", "--jobs", wanted]
    try:
        text = call([*words, *of_cluster(cluster), f"--format={fields}"])
    except UserError:
        return []
    lines = [line.split("|", 9) for line in text.splitlines() if line.count("|") >= 9]
    used: dict[str, float] = {}
    for id_, *_, rss, tasks, _ in lines:
        job, dot, _ = id_.partition(".")
        if dot:
            used[job] = max(used.get(job, 0.0), _bytes(rss) * int(tasks or 1))
    found = []
    for id_, state, code, elapsed, cpu, cpus, asked, _, _, name in lines:
        if "." in id_:
            continue
        took, memory = int(elapsed or 0), _bytes(asked)
        efficiency = (
            _seconds(cpu) / (took * int(cpus)) if took >= SHORT_S and int(cpus or 0) else None
        )
        share = used[id_] / memory if used.get(id_) and memory else None
        found.append(PastJob(id_, name, state.split()[0], code, took, efficiency, share))
    return found


def sbatch(script: Path, name: str, cluster: str | None = None) -> str:
    """Submit a script whose job bears this name, which no other has; returns its id, also where the
    answer was lost, or is in words of a site's own. Raises Refused where it names no job, and none
    of that name is in the queue.
    """
    answer = retried(["sbatch", *of_cluster(cluster), str(script)], found=name)
    try:
        return submitted_id(answer)
    except Refused:
        bearers = [job.base for job in known_jobs(cluster, patient=True) if job.name == name]
        if not bearers:
            raise
        return bearers[0]


def submitted_id(answer: str) -> str:
    """The job's id in sbatch's answer, `Submitted batch job 12 on cluster a`, or `12;a` as
    `--parsable` has it. A site's wrapper may say other things before, of other jobs too.
    """
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    for line in reversed(lines):
        if found := re.fullmatch(r"Submitted batch job (\d+)(?: on cluster \S+)?", line):
            return found.group(1)
    if lines and (found := re.fullmatch(r"(\d+)(?:;\S*)?", lines[-1])):
        return found.group(1)
    raise Refused(f"sbatch's answer names no job: {' '.join(answer.split())[:200] or 'nothing'}")


def cancel(jobs: Iterable[QueuedJob], among: Iterable[QueuedJob] | None = None) -> None:
    """Cancel jobs that are known to be this suite's, `among` all that it has: an array of which
    every live element is to go is cancelled at once. Raises UserError where some are still there
    and Slurm does not cancel them.
    """
    jobs = list(jobs)
    kept = {job.base for job in among or () if job.live and job not in jobs}
    for cluster in {job.cluster for job in jobs}:
        mine = [job for job in jobs if job.cluster == cluster]
        ids = list(dict.fromkeys(job.id if job.base in kept else job.base for job in mine))
        try:
            retried(["scancel", "--quiet", *of_cluster(cluster), *ids])
        except Refused:
            # Some versions take an id that is gone for a failure.
            wanted = {(job.id, job.name) for job in jobs}
            if any((j.id, j.name) in wanted and j.live for j in known_jobs(cluster, patient=True)):
                raise


def release(ids: Iterable[str], cluster: str | None = None) -> None:
    retried(["scontrol", *of_cluster(cluster), "release", ",".join(ids)])


def test_only(text: str, cluster: str | None = None) -> None:
    """Ask Slurm whether it would take this script, without submitting it. Raises UserError with
    its reason.
    """
    retried(["sbatch", "--test-only", *of_cluster(cluster)], stdin=text)


def setting(name: str, cluster: str | None = None) -> str:
    """A setting of a cluster's slurm.conf; empty where Slurm does not tell it."""
    try:
        text = call(["scontrol", *of_cluster(cluster), "show", "config"])
    except UserError:
        return ""
    found = re.search(rf"^{name} *= *(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def accounting_enforced(cluster: str | None = None) -> bool:
    """Whether Slurm checks accounts and QOS at submission; otherwise nobody does until the job is
    looked at.
    """
    enforced = setting("AccountingStorageEnforce", cluster)
    return any(word in enforced for word in ("associations", "limits", "qos", "safe"))


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
