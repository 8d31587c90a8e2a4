"""What the doctor asks Slurm of a site: whether it would take the jobs, limits, accounting, what
waits, what nodes have.

Each check yields findings, or raises UserError for what is wrong.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from getpass import getuser
from pathlib import Path
from typing import Literal, NamedTuple

from sarm.config import PHASES, Config, UserError
from sarm.run import RunDir
from slurm import queue
from slurm.checks import over_limit, refusals, unchecked
from slurm.dag import tasks
from slurm.journal import clusters, journals, owned
from slurm.plan import Batch, plan
from slurm.profile import Profile, flags, gpus_per_node, resources
from slurm.script import module_lines, path_line
from slurm.words import waits_for

NODE_S = 15
"""How long a node may take to be free for a question."""


class Finding(NamedTuple):
    state: Literal["ok", "unchecked", "wrong"]
    about: str
    says: str


def check_slurm(profile: Profile, config: Config) -> Iterator[Finding]:
    """Whether Slurm would take each kind of job: partition, account, QOS, time, resources and
    arrays.
    """
    batches = all_batches(profile, config)
    refused = refusals(profile, batches)
    for reason, kinds in refused.items():
        yield Finding("wrong", "Slurm", f"it would refuse {', '.join(kinds)} jobs: {reason}")
    if not refused:
        yield Finding(
            "ok",
            "Slurm",
            f"it would take all {len({batch.phase for batch in batches})} kinds of jobs",
        )
    if unlooked := unchecked(profile, batches):
        yield Finding("unchecked", "Slurm", unlooked)


def all_batches(profile: Profile, config: Config) -> list[Batch]:
    """Those of a whole run."""
    nodes = (task.node for task in tasks(config))
    return plan(config, profile, {n for n in nodes if n.phase != "fetch" or profile.fetch == "job"})


def check_limits(profile: Profile, config: Config) -> Iterator[Finding]:
    """How many jobs a run needs in the queue, against the profile's limit and the account's."""
    batches = all_batches(profile, config)
    jobs = sum(len(batch.elements) for batch in batches)
    if problem := over_limit(profile, batches):
        raise UserError(problem)
    limits = list(accounting_limits(profile, batches))
    for asked, limit, whose in limits:
        if asked > limit:
            raise UserError(
                f"the run is {asked} jobs and {whose} may queue {limit} (MaxSubmitJobs); use fewer"
                " encode.shards or probe.shards, raise pack, or ask your site"
            )
    bound = ", ".join(f"{whose} may queue {limit}" for _, limit, whose in limits)
    yield Finding("ok", "limits", f"{jobs} jobs; {bound or 'no limit is known'}")


def accounting_limits(profile: Profile, batches: list[Batch]) -> Iterator[tuple[int, int, str]]:
    """(jobs of the run, the least bound on them, whose it is) of this user's account, and of every
    QOS that has one; nothing where accounting tells none.
    """
    where = [f"user={getuser()}"]
    where += [f"account={profile.account}"] if profile.account else []
    # one accounting may serve many clusters, each with its own limits
    if cluster := profile.clusters or queue.setting("ClusterName"):
        where.append(f"cluster={cluster}")
    of_account = accounting("assoc", where, "MaxSubmitJobs,GrpSubmitJobs,DefaultQOS")
    if bound := least(line[:2] for line in of_account):
        yield sum(len(batch.elements) for batch in batches), bound, "your account"
    usual = next((line[2] for line in of_account if len(line) > 2 and line[2]), "normal")
    jobs: Counter[str] = Counter()
    for batch in batches:
        jobs[resources(profile, batch.phase).qos or usual] += len(batch.elements)
    # the second is an account's whole, of which others have their share
    of_qos = accounting("qos", ["where", f"name={','.join(jobs)}"], "Name,MaxSubmitPU,MaxSubmitPA")
    for name, *bounds in of_qos:
        if bound := least([bounds]):
            yield jobs[name], bound, f"QOS {name}"


def accounting(what: str, where: list[str], fields: str) -> list[list[str]]:
    """sacctmgr's lines; none where there is no accounting or it does not answer."""
    words = ["sacctmgr", "--noheader", "--parsable2", "show", what, *where, f"format={fields}"]
    try:
        return [line.split("|") for line in queue.call(words).splitlines() if line.strip()]
    except UserError:
        return []


def least(lines: Iterable[Iterable[str]]) -> int | None:
    """The least number in some columns; None where there is none."""
    return min((int(word) for line in lines for word in line if word.isdigit()), default=None)


def check_accounting(profile: Profile) -> Iterator[Finding]:
    """Whether status will know how jobs ended once Slurm has forgotten them."""
    try:
        queue.call(["sacct", "--noheader", "--allocations", *queue.of_cluster(profile.clusters)])
    except UserError as error:
        yield Finding(
            "unchecked",
            "accounting",
            f"it does not answer ({error}); status then knows how a job ended from its logs, and"
            " from the queue for some minutes",
        )
        return
    yield Finding("ok", "accounting", "it answers")


def check_queue(run: RunDir) -> Iterator[Finding]:
    """Jobs of this run's that wait for what may not come by itself."""
    known = journals(run)
    jobs = [job for name in clusters(known) for job in queue.known_jobs(name)]
    waiting = [o.job for o in owned(run, known, jobs) if o.job.state == "PENDING"]
    said = {waits_for(job.reason) for job in waiting if waits_for(job.reason) != job.reason}
    for words in sorted(said):
        yield Finding("unchecked", "queue", f"jobs of this run wait: {words}")


def ask_node(profile: Profile) -> Iterator[Finding]:
    """Whether a node finds what jobs need on their PATH: asked by srun of one that is free now."""
    tools = ["srun", "scontrol", *([profile.container.command] if profile.container else [])]
    sbatch = shutil.which("sbatch")
    lines = [
        path_line(profile, str(Path(sbatch).parent) if sbatch else None),
        *module_lines(profile),
        *(f"command -v {tool} >/dev/null || echo missing {tool}" for tool in tools),
        "echo asked",
    ]
    asked = {
        f: v
        for f, v in flags(profile, "report", mail=False).items()
        if f in ("account", "partition", "qos", "reservation", "constraint", "clusters")
    }
    words = [f"--{flag}={value}" for flag, value in asked.items()]
    size = ["--time=1", "--ntasks=1", f"--immediate={NODE_S}", "--export=NONE", "--quiet"]
    try:
        said = queue.call(
            ["srun", *words, *size, "/bin/bash", "-lc", "\n".join(lines)], timeout_s=NODE_S + 20
        )
    except UserError:
        said = ""
    if "asked" not in said.split():
        yield Finding(
            "unchecked", "node", f"none was free within {NODE_S} s to say what it has on its PATH"
        )
        return
    if missing := re.findall(r"^missing (\S+)$", said, re.MULTILINE):
        raise UserError(
            f"a node does not find {', '.join(missing)} on its PATH; put the folder into PATH under"
            " environment, or the module under modules, in the profile"
        )
    yield Finding("ok", "node", f"it finds {', '.join(tools)}")


def check_gpus(profile: Profile) -> Iterator[Finding]:
    """Whether each partition that GPU jobs go to has nodes with as many GPUs as one job wants."""
    for phase in PHASES:
        gpus, want = gpus_per_node(profile, phase), resources(profile, phase)
        partition = want.partition
        if not gpus:
            continue
        try:
            most = gpus_of_a_node(profile, partition, want.gpu_type)
        except UserError as error:
            yield Finding("unchecked", "GPUs", f"sinfo does not say what nodes have ({error})")
            return
        where = f"partition {partition}" if partition else "the default partition"
        if most < gpus:
            has = f"no node there has more than {most}" if most else "no node there has any"
            kind = f"{want.gpu_type} " if want.gpu_type else ""
            raise UserError(
                f"{phase} wants {gpus} {kind}GPUs of {where}, and {has}; name a GPU partition for"
                f" {phase} under phases in the profile"
            )
    yield Finding("ok", "GPUs", "nodes have as many as jobs ask for")


def gpus_of_a_node(profile: Profile, partition: str | None, kind: str | None) -> int:
    """The most GPUs, of this type where one is named, that a node of a partition has, of the
    default one where none is named. sinfo says `gpu:h100:4(S:0-1),gpu:a100_3g.20gb:2`.
    """
    most = 0
    for line in queue.call(
        [
            "sinfo",
            *queue.of_cluster(profile.clusters),
            "--noheader",
            "--format=%R|%P|%G",
            *([f"--partition={partition}"] if partition else []),
        ]
    ).splitlines():
        _, name, gres = [*line.strip().split("|"), "", ""][:3]
        if partition is None and not name.endswith("*"):
            continue
        found = re.findall(rf"(?:^|,){re.escape(profile.gres)}(?::([^:,()]+))?:(\d+)", gres)
        most = max(most, sum(int(n) for has, n in found if kind in (None, has)))
    return most
