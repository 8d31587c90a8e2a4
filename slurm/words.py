"""Slurm's refusals and its reasons for a job to wait, in words that say what to do: `cure(reason)`,
`waits_for(reason)`; and the command that helps, `made("status", run)`.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

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
    r"cluster": "set clusters in the profile to one that sacctmgr show clusters lists",
    r"gres|gpu|node configuration|cpu count|memory": (
        "ask for what a node of that partition has: gpus, gpu_type, cpus_per_task, mem_gb in the"
        " profile"
    ),
}

REASONS = {
    r"JobHeldAdmin": "held by the site's administrators; ask them",
    r"JobHeldUser": "held: scontrol release lets it go, make cancel ends it",
    r"BadConstraints|PartitionNodeLimit|PartitionTimeLimit|PartitionConfig": (
        "asks for what its partition never has; correct the profile, make cancel and submit again"
    ),
    r"DependencyNeverSatisfied": "what it waits for failed; submit again",
    r"Dependency": "",
    r"QOS.*Limit|QOSMax|QOSGrp|QOSNotAllowed|Assoc.*Limit|AssocGrp|AssocMax|MaxJobs": (
        "over a limit of your account or QOS; it starts as your other jobs end, or ask your site"
    ),
    r"ReqNodeNotAvail|UnavailableNodes|NodeDown": "the nodes it could use are down or reserved",
    r"Reservation": "waits for its reservation to begin",
    r"Licenses": "waits for a licence",
    r"BeginTime": "waits for its start time, or for its requeue",
    r"launch failed requeued held": (
        "failed to launch and is held; scontrol release, or ask your site"
    ),
}


def made(target: str, run: Path) -> str:
    """A make command for a run as a shell takes it, whatever the run's name holds."""
    return f"make {target} RUN={shlex.quote(str(run))}"


def report_of(run: Path) -> str:
    """The line that a run ends in that went well."""
    return f"done; the report, with report.html beside it: {run / 'final_report.txt'}"


def cure(reason: str, unknown: str = "correct the cluster profile") -> str:
    """What to change in the profile for a refusal of Slurm's."""
    return next(
        (said for pattern, said in CURES.items() if re.search(pattern, reason, re.IGNORECASE)),
        unknown,
    )


def waits_for(reason: str) -> str:
    """Slurm's reason for a job to wait, with words where it may not end by itself."""
    words = next((said for pattern, said in REASONS.items() if re.search(pattern, reason)), "")
    return f"{reason} ({words})" if words else reason
