"""A cluster's profile: what one site wants of its jobs. `slurm/clusters/*.yaml`, one a site,
strictly checked.

`resources(profile, phase)` and `flags(profile, phase, ...)` are the one source of every sbatch
line.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from sarm.config import PHASES, Count, Phase, Positive, Strict


def _plain(value: str) -> str:
    """Values end up in shell scripts: no control characters, no shell metacharacters, not even
    quoted ones.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.,:=+@%/\[\]~^-]+", value):
        raise ValueError("only letters, digits and _ . , : = + @ % / [ ] ~ ^ - are allowed here")
    return value


Plain = Annotated[str, AfterValidator(_plain)]


def _value(value: str) -> str:
    """Of a variable; that `$PATH` stands in PATH alone is seen to where the names are."""
    _plain(value.replace("$PATH", "PATH"))
    return value


def _constraint(value: str) -> str:
    """Features as sbatch takes them, `a100|h100`, `[a*2&b]`; always quoted in scripts."""
    if not re.fullmatch(r"[A-Za-z0-9_.,:=+@%/~^|&*!()\[\]-]+", value):
        raise ValueError(
            "only features joined by | & * ! ( ) [ ] and letters, digits and _ . , : = + @ % / ~ ^"
            " - are allowed here"
        )
    return value


Constraint = Annotated[str, AfterValidator(_constraint)]
Plains = Annotated[
    tuple[Plain, ...],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]

MANAGED = frozenset(
    """
    job-name array dependency hold export output error open-mode signal requeue no-requeue
    kill-on-invalid-dep ntasks ntasks-per-node gpus gpus-per-task comment parsable test-only wrap
    chdir quiet wait export-file propagate
    """.split()
)
"""Flags that the launcher sets by itself, or that would keep it from reading sbatch's answer."""

KEYS = {
    "time": "phases.PHASE.time_min",
    "nodes": "phases.ppo.nodes",
    "cpus-per-task": "phases.PHASE.cpus_per_task",
    **dict.fromkeys(("mem", "mem-per-cpu", "mem-per-gpu"), "memory and phases.PHASE.mem_gb"),
    "gpus-per-node": "gpu_request, gpu_type and phases.PHASE.gpus",
    "gres": "gpu_type and phases.PHASE.gpus, or more_gres for what is no GPU",
    **{flag: flag for flag in "partition account qos constraint reservation licenses".split()},
    **{flag: flag for flag in "exclude exclusive wckey clusters".split()},
    "mail-user": "mail_user",
    "mail-type": "mail_type",
}
"""Flags of sbatch that have a key of their own.

`extra` may not override them, nor an abbreviation of one: sbatch takes `--part` for `--partition`.
"""


class Resources(Strict):
    """What one job, or one array element, of a phase asks for."""

    time_min: Positive
    cpus_per_task: Positive = 4
    mem_gb: Positive = 32
    """Of the whole node share; divided where the profile asks by CPU or GPU."""
    gpus: Count = 0
    """A node."""
    nodes: Positive = 1
    """More than one for PPO alone."""
    gpu_type: Plain | None = None
    throttle: Positive | None = None
    """Jobs at a time, of PPO's or evaluate's policies."""
    retry_mem_gb: Positive | None = None
    """Instead of mem_gb, once the same unit has run out of memory."""
    partition: Plain | None = None
    qos: Plain | None = None
    constraint: Constraint | None = None


class Override(Strict):
    """The keys of `Resources` that a site changes for one phase."""

    time_min: Positive | None = None
    cpus_per_task: Positive | None = None
    mem_gb: Positive | None = None
    gpus: Count | None = None
    nodes: Positive | None = None
    gpu_type: Plain | None = None
    throttle: Positive | None = None
    retry_mem_gb: Positive | None = None
    partition: Plain | None = None
    qos: Plain | None = None
    constraint: Constraint | None = None


GENERIC: dict[Phase, Resources] = {
    "fetch": Resources(time_min=240, cpus_per_task=2, mem_gb=16),
    "check_sarm": Resources(time_min=30, cpus_per_task=8, mem_gb=64, gpus=1),
    "encode": Resources(time_min=60, cpus_per_task=8, mem_gb=64, gpus=1),
    "probe": Resources(time_min=60, cpus_per_task=8, mem_gb=64, gpus=1),
    "select": Resources(time_min=30, cpus_per_task=8, mem_gb=64),
    "steer": Resources(time_min=30, cpus_per_task=4, mem_gb=32),
    "cards": Resources(time_min=60, cpus_per_task=8, mem_gb=64, gpus=1),
    "calibrate": Resources(time_min=60, cpus_per_task=12, mem_gb=120, gpus=1),
    "ppo": Resources(time_min=240, cpus_per_task=12, mem_gb=480, gpus=4),
    "evaluate": Resources(time_min=120, cpus_per_task=12, mem_gb=120, gpus=1),
    "report": Resources(time_min=20, cpus_per_task=2, mem_gb=16),
}


class Container(Strict):
    """How jobs enter an image. The checkout, the run and the caches are bound at their own
    paths.
    """

    command: Plain = "apptainer"
    image: Plain
    """SIF with torch; relative to the checkout."""
    light_image: Plain | None = None
    """SIF without torch for the report; the other one where unset."""
    nv: bool = True
    binds: Plains = ()
    python: Plain = "python3"


class Profile(Strict):
    description: str
    clusters: Plain | None = None
    """Another cluster than the login node's own, by name, where a site has several."""
    partition: Plain | None = None
    account: Plain | None = None
    qos: Plain | None = None
    constraint: Constraint | None = None
    reservation: Plain | None = None
    licenses: Plain | None = None
    exclude: Plain | None = None
    exclusive: bool = False
    """Ask for whole nodes."""
    pack: Positive = 1
    """Shards of encode and probe side by side in one job, one a GPU: for sites that lend whole
    nodes.
    """
    gpu_request: Literal["gres", "gpus-per-node"] = "gres"
    gres: Plain = "gpu"
    """The name of the generic resource, where it is not gpu."""
    more_gres: Plain | None = None
    """Other generic resources of every job, `lscratch:100`."""
    gpu_type: Plain | None = None
    memory: Literal["mem", "mem-per-cpu", "mem-per-gpu", "none"] = "mem"
    phases: dict[Phase, Override] = Field(default_factory=dict)
    array_throttle: Positive = 64
    max_array_size: Positive = 1000
    """Elements in one array; Slurm's MaxArraySize caps the highest index, 1000 by default."""
    submit_limit: Positive | None = None
    """Jobs that a user may have in the queue, array elements counted; refused before anything is
    submitted.
    """
    mail_user: Plain | None = None
    """Gets one mail when a run has ended, by its last job."""
    mail_type: Plain = "END,FAIL"
    wckey: Plain | None = None
    max_requeues: Count = 3
    signal_lead_s: Annotated[int, Field(ge=30)] = 120
    """How long before its time limit a job is signalled to checkpoint."""
    modules: Plains = ()
    interface: Plain | None = None
    """The network interface over which the ranks of several nodes talk, `ib0`."""
    share: Literal["none", "group"] = "none"
    """Whether the group of the run's folder may read its results; never what jobs unpickle."""
    scratch: Plain | None = None
    """A folder of every node in which a job makes one of its own for temporary files, removed at
    its end; $TMPDIR or /tmp where unset.
    """
    environment: dict[str, Annotated[str, AfterValidator(_value)]] = Field(default_factory=dict)
    container: Container | None = None
    """None runs the checkout's own environment: for development."""
    fetch: Literal["login", "job", "by-hand"] = "login"
    """Where there is a network: on the login node, in a job of the `fetch` phase, or nowhere near.
    """
    extra: dict[str, Plain | bool] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names(self) -> Profile:
        for name, value in self.environment.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"environment: {name!r} is no variable name")
            if "$" in value and name != "PATH":
                raise ValueError(f"environment.{name}: only PATH may hold $PATH, the node's own")
            if re.search(r"TOKEN|SECRET|PASSWORD|API_?KEY", name, re.IGNORECASE):
                raise ValueError(
                    f"environment: {name} looks like a secret; profiles are stored and printed,"
                    " give it to make fetch instead"
                )
            if re.search(r"//[^/@]*:[^/@]*@", value):
                raise ValueError(
                    f"environment: {name} holds a password; profiles are stored and printed, leave"
                    " it out"
                )
        for flag in self.extra:
            start = flag.lstrip("-") or "-"
            # the flag itself before one that only begins so
            close = sorted((n for n in MANAGED | KEYS.keys() if n.startswith(start)), key=len)
            if close:
                key = KEYS.get(close[0])
                what = f"use {key}" if key else "no profile may change it"
                raise ValueError(
                    f"extra: {flag} is sbatch's --{close[0]}, which the launcher manages; {what}"
                )
            if not re.fullmatch(r"[a-z][a-z0-9-]*", flag):
                raise ValueError(f"extra: {flag!r} is no long sbatch flag")
        for name, kind in [
            ("gpu_type", self.gpu_type),
            *((f"phases.{p}.gpu_type", over.gpu_type) for p, over in self.phases.items()),
        ]:
            if kind and re.search("[:,=]", kind):
                raise ValueError(
                    f"{name}: {kind} holds more than a type; write h100 or a100_3g.20gb, how many"
                    " as gpus of the phase, and other resources as more_gres"
                )
        if re.search("[:,=]", self.gres):
            raise ValueError(
                f"gres: {self.gres} holds more than a name; write gpu, the type as gpu_type, how"
                " many as gpus of the phase, and other resources as more_gres"
            )
        if self.clusters and ("," in self.clusters or self.clusters == "all"):
            raise ValueError(
                f"clusters: {self.clusters} names several, and jobs can wait for one another on one"
                " cluster alone; name one"
            )
        for phase, over in self.phases.items():
            if phase != "ppo" and (over.nodes or 1) > 1:
                raise ValueError(f"phases.{phase}.nodes: only ppo works on several nodes")
            if phase not in ("ppo", "evaluate") and over.throttle:
                raise ValueError(
                    f"phases.{phase}.throttle: for ppo and evaluate; shards have array_throttle"
                )
            want = resources(self, phase)
            if want.retry_mem_gb and want.retry_mem_gb <= want.mem_gb:
                raise ValueError(
                    f"phases.{phase}.retry_mem_gb: {want.retry_mem_gb} is no more than mem_gb,"
                    f" {want.mem_gb}"
                )
        limit_s = 60 * resources(self, "ppo").time_min
        if self.signal_lead_s > limit_s // 2:
            raise ValueError(
                f"signal_lead_s: {self.signal_lead_s} s is over half of ppo's time limit of"
                f" {limit_s} s; lower it, or raise time_min of ppo"
            )
        return self


def resources(profile: Profile, phase: Phase) -> Resources:
    """The generic resources of a phase under the profile's overrides."""
    override = profile.phases.get(phase, Override()).model_dump(exclude_none=True)
    site = {
        key: getattr(profile, key)
        for key in ("partition", "qos", "constraint", "gpu_type")
        if getattr(profile, key)
    }
    return Resources.model_validate({**GENERIC[phase].model_dump(), **site, **override})


def packed(profile: Profile, phase: Phase) -> int:
    """Units side by side in one job."""
    return profile.pack if phase in ("encode", "probe") else 1


def tasks_per_node(profile: Profile, phase: Phase) -> int:
    """One task per GPU for PPO, one a packed shard, otherwise one."""
    return max(1, resources(profile, phase).gpus) if phase == "ppo" else packed(profile, phase)


def gpus_per_node(profile: Profile, phase: Phase) -> int:
    """A node's ranks' together, or every packed shard's own."""
    return resources(profile, phase).gpus * packed(profile, phase)


def gpus_per_job(profile: Profile, phase: Phase) -> int:
    """Those of one job or array element, on all its nodes."""
    return gpus_per_node(profile, phase) * resources(profile, phase).nodes


def throttle(profile: Profile, phase: Phase) -> int | None:
    """How many of PPO's or evaluate's jobs may run at a time; None where the profile says
    nothing.
    """
    return resources(profile, phase).throttle


def flags(
    profile: Profile, phase: Phase, *, mail: bool = True, retry: bool = False
) -> dict[str, str | bool]:
    """sbatch's long flags and their values for a phase; True for a flag without one. The same for
    every launcher. `mail` says whether this job's end is mailed, `retry` that its unit ran out of
    memory before.
    """
    want, tasks, gpus = (
        resources(profile, phase),
        tasks_per_node(profile, phase),
        gpus_per_node(profile, phase),
    )
    memory_gb = (want.retry_mem_gb if retry and want.retry_mem_gb else want.mem_gb) * packed(
        profile, phase
    )
    mailed = mail and profile.mail_user is not None
    found: dict[str, str | bool | None] = {
        "account": profile.account,
        "constraint": want.constraint,
        "cpus-per-task": str(want.cpus_per_task),
        "exclude": profile.exclude,
        "exclusive": profile.exclusive or None,
        "export": "NONE",
        "kill-on-invalid-dep": "yes",
        "licenses": profile.licenses,
        "clusters": profile.clusters,
        "mail-type": profile.mail_type if mailed else None,
        "mail-user": profile.mail_user if mailed else None,
        "nodes": str(want.nodes),
        # the login node's limits (ulimit) are not a job's
        "propagate": "NONE",
        "ntasks-per-node": str(tasks),
        "partition": want.partition,
        "qos": want.qos,
        "requeue": True if profile.max_requeues else None,
        "no-requeue": None if profile.max_requeues else True,
        "reservation": profile.reservation,
        "signal": f"USR2@{profile.signal_lead_s}",
        "time": str(want.time_min),
        "wckey": profile.wckey,
    }
    kind = f"{want.gpu_type}:" if want.gpu_type else ""
    resource = f"{profile.gres}:{kind}{gpus}" if gpus and profile.gpu_request == "gres" else None
    found["gres"] = ",".join(filter(None, (resource, profile.more_gres))) or None
    if gpus and profile.gpu_request == "gpus-per-node":
        found["gpus-per-node"] = f"{kind}{gpus}"
    if profile.memory == "mem":
        found["mem"] = f"{memory_gb}G"
    elif profile.memory == "mem-per-cpu" or (profile.memory == "mem-per-gpu" and not gpus):
        found["mem-per-cpu"] = f"{max(1, memory_gb * 1024 // (want.cpus_per_task * tasks))}M"
    elif profile.memory == "mem-per-gpu":
        found["mem-per-gpu"] = f"{memory_gb * 1024 // gpus}M"
    found.update(profile.extra)
    return {
        flag: value
        for flag, value in sorted(found.items())
        if value is not None and value is not False
    }


def requeues(phase: Phase) -> bool:
    """Only PPO has checkpoints worth a requeue on the signal."""
    return phase == "ppo"


def gpu_hours(profile: Profile, phase: Phase, jobs: int) -> float:
    """The most GPU-hours that so many jobs of a phase can take: their time limit."""
    return gpus_per_job(profile, phase) * jobs * resources(profile, phase).time_min / 60


assert set(GENERIC) == set(PHASES)
