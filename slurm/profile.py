"""A cluster's profile: what one site wants of its jobs. `slurm/clusters/*.yaml`, one a site,
strictly checked.

`resources(profile, phase)` and `flags(profile, phase, ...)` are the one source of every sbatch
line.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from sarm.config import PHASES, ROOT, Count, Loader, Phase, Positive, Strict, UserError

CLUSTERS = ROOT / "slurm" / "clusters"


def _plain(value: str) -> str:
    """Values end up in shell scripts: no control characters, no shell metacharacters, not even
    quoted ones.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.,:=+@%/\[\]~^-]+", value):
        raise ValueError("only letters, digits and _ . , : = + @ % / [ ] ~ ^ - are allowed here")
    return value


Plain = Annotated[str, AfterValidator(_plain)]
Plains = Annotated[
    tuple[Plain, ...],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]

MANAGED = frozenset(
    """
    job-name array dependency hold export output error open-mode signal requeue no-requeue kill-on-invalid-dep time nodes ntasks
    ntasks-per-node cpus-per-task mem mem-per-cpu mem-per-gpu gres gpus gpus-per-node gpus-per-task partition account qos constraint
    reservation licenses exclude exclusive mail-user mail-type wckey comment parsable test-only wrap chdir quiet wait clusters export-file
    """.split()
)
"""Flags that the launcher sets, from keys of their own or by itself, or that would keep it from
reading sbatch's answer.

`extra` may not override them, nor an abbreviation of one: sbatch takes `--part` for `--partition`.
"""


class Resources(Strict):
    """What one job, or one array element, of a phase asks for."""

    time_min: Positive
    cpus_per_task: Positive = 4
    mem_gb: Positive = 32
    """Of the whole node share; divided where the profile asks by CPU or GPU."""
    gpus: Count = 0
    partition: Plain | None = None
    qos: Plain | None = None
    constraint: Plain | None = None


class Override(Strict):
    """The keys of `Resources` that a site changes for one phase."""

    time_min: Positive | None = None
    cpus_per_task: Positive | None = None
    mem_gb: Positive | None = None
    gpus: Count | None = None
    partition: Plain | None = None
    qos: Plain | None = None
    constraint: Plain | None = None


GENERIC: dict[Phase, Resources] = {
    "fetch": Resources(time_min=240, cpus_per_task=2, mem_gb=16),
    "encode": Resources(time_min=60, cpus_per_task=8, mem_gb=64, gpus=1),
    "probe": Resources(time_min=60, cpus_per_task=8, mem_gb=64, gpus=1),
    "select": Resources(time_min=30, cpus_per_task=8, mem_gb=64),
    "steer": Resources(time_min=30, cpus_per_task=4, mem_gb=32),
    "cards": Resources(time_min=60, cpus_per_task=4, mem_gb=32),
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
    partition: Plain | None = None
    account: Plain | None = None
    qos: Plain | None = None
    constraint: Plain | None = None
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
    mail_type: Plain | None = None
    wckey: Plain | None = None
    max_requeues: Count = 3
    signal_lead_s: Annotated[int, Field(ge=30)] = 120
    """How long before its time limit a job is told to checkpoint."""
    modules: Plains = ()
    scratch: Plain | None = None
    """A folder of every node in which a job makes one of its own for temporary files, removed at
    its end; $TMPDIR or /tmp where unset.
    """
    environment: dict[str, Plain] = Field(default_factory=dict)
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
            managed = sorted(name for name in MANAGED if name.startswith(flag.lstrip("-") or "-"))
            if managed:
                raise ValueError(
                    f"extra: {flag} is sbatch's --{managed[0]}, which the launcher manages; use its"
                    " own key in the profile"
                )
            if not re.fullmatch(r"[a-z][a-z0-9-]*", flag):
                raise ValueError(f"extra: {flag!r} is no long sbatch flag")
        limit_s = 60 * resources(self, "ppo").time_min
        if self.signal_lead_s > limit_s // 2:
            raise ValueError(
                f"signal_lead_s: {self.signal_lead_s} s is over half of ppo's time limit of"
                f" {limit_s} s; lower it, or raise time_min of ppo"
            )
        return self


def load_profile(cluster: str) -> Profile:
    """A profile by name in slurm/clusters/, or by path. Raises UserError naming every bad key."""
    path = Path(cluster) if cluster.endswith((".yaml", ".yml")) else CLUSTERS / f"{cluster}.yaml"
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in CLUSTERS.glob("*.yaml")))
        raise UserError(
            f"cluster profile {path} does not exist; there are {known}; copy"
            " slurm/clusters/generic.yaml for your site"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"cluster profile {path} is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"cluster profile {path} is empty or not a mapping of keys")
    try:
        return Profile.model_validate(tree)
    except pydantic.ValidationError as error:
        complaints = dict.fromkeys(
            _complaint(e) for e in error.errors() if e["loc"][-1:] != ("bool",)
        )
        raise UserError(f"cluster profile {path}: {'; '.join(complaints)}") from None


def _complaint(error: Any) -> str:
    # Of a location, what pydantic adds to the keys themselves is left out.
    where = [
        str(part)
        for part in error["loc"]
        if part != "[key]" and not str(part).startswith("function-")
    ]
    said = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    if error["type"] == "extra_forbidden":
        sections: dict[str, Any] = {"phases": Override, "container": Container}
        known = sections.get(where[0] if len(where) > 1 else "", Profile).model_fields
        close = difflib.get_close_matches(where[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(sorted(known))}"
        said = f"unknown key ({hint})"
    elif error["type"] == "string_type":
        said = "must be text; put what YAML takes for a number or a date in quotes"
    elif error["type"] == "tuple_type":
        said = "must be a list, such as [a, b]"
    return f"{'.'.join(where)}: {said}" if where else said


def resources(profile: Profile, phase: Phase) -> Resources:
    """The generic resources of a phase under the profile's overrides."""
    override = profile.phases.get(phase, Override()).model_dump(exclude_none=True)
    site = {
        key: getattr(profile, key)
        for key in ("partition", "qos", "constraint")
        if getattr(profile, key)
    }
    return Resources.model_validate({**GENERIC[phase].model_dump(), **site, **override})


def tasks_per_job(profile: Profile, phase: Phase) -> int:
    """One task a GPU for PPO, one a packed shard, otherwise one."""
    if phase == "ppo":
        return max(1, resources(profile, phase).gpus)
    return profile.pack if phase in ("encode", "probe") else 1


def gpus_per_job(profile: Profile, phase: Phase) -> int:
    """Those of one job or array element: all ranks' together, or every packed shard's own."""
    gpus = resources(profile, phase).gpus
    return gpus if phase == "ppo" else gpus * tasks_per_job(profile, phase)


def flags(profile: Profile, phase: Phase) -> dict[str, str | bool]:
    """sbatch's long flags and their values for a phase; True for a flag without one. The same for
    every launcher.
    """
    want, tasks, gpus = (
        resources(profile, phase),
        tasks_per_job(profile, phase),
        gpus_per_job(profile, phase),
    )
    memory_gb = want.mem_gb * (tasks if phase in ("encode", "probe") else 1)
    found: dict[str, str | bool | None] = {
        "account": profile.account,
        "constraint": want.constraint,
        "cpus-per-task": str(want.cpus_per_task),
        "exclude": profile.exclude,
        "exclusive": profile.exclusive or None,
        "export": "NONE",
        "kill-on-invalid-dep": "yes",
        "licenses": profile.licenses,
        "mail-type": profile.mail_type,
        "mail-user": profile.mail_user,
        "nodes": "1",
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
    if gpus:
        kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
        found[profile.gpu_request] = (
            f"gpu:{kind}{gpus}" if profile.gpu_request == "gres" else f"{kind}{gpus}"
        )
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
