"""Which variables of a shell reach what the suite starts: Slurm's clients, jobs, and containers.

`client_environment(os.environ)` is the one environment of every Slurm command that is called from
here; `ISOLATE` is the line by which a job's script forgets what would change Python, Apptainer or
Slurm's clients in it, and `isolated(os.environ)` the same for what is started on a login node.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

CLIENTS = ("SLURM SBATCH_ SQUEUE_ SACCT_ SACCTMGR_ SCANCEL_ SCONTROL_ SINFO_ SALLOC_ SRUN_").split()
"""How the variables begin by which a user's shell changes what Slurm's commands do: filters,
formats, defaults and, inside a job, that job's own."""
KEPT_FOR_CLIENTS = ("SLURM_CONF", "SLURM_JWT")
"""Where the site's configuration is, and who the caller is."""

FORGOTTEN_IN_JOBS = (
    "PYTHON APPTAINER SINGULARITY SQUEUE_ SACCT_ SCANCEL_ SCONTROL_ SBATCH_ SRUN_ SLURM_CLUSTERS"
).split()
KEPT_IN_CONTAINERS = (
    "APPTAINER_BIND APPTAINER_BINDPATH APPTAINER_MOUNT APPTAINER_TMPDIR APPTAINER_CACHEDIR"
    " APPTAINER_CONFIGDIR APPTAINERENV_HF_ENDPOINT"
).split()
"""A site's own binds and places, and its mirror of the hub."""
OVERRULE_IN_CONTAINERS = "PATH PYTHON* HF_* HUGGING* SARM_* SLURM_* TMPDIR TRITON_CACHE_DIR".split()
"""What a site sets inside containers (APPTAINERENV_*) is kept too, but for these, which would
overrule what a job has set for itself, or bring it the hub's token."""


def client_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a Slurm command: the caller's without what would filter, reformat or
    overrule (SBATCH_EXPORT=ALL would hand every secret of the shell to the jobs), in the C locale.
    """
    kept = {
        name: value
        for name, value in env.items()
        if name in KEPT_FOR_CLIENTS
        or not (name.startswith(tuple(CLIENTS)) or name.startswith("LC_") or name == "LANGUAGE")
    }
    return {**kept, "LANG": "C", "LC_ALL": "C"}


def forgotten(name: str) -> bool:
    """Whether a variable of the login files or the shell is kept from jobs and containers."""
    if name.replace("SINGULARITY", "APPTAINER", 1) in KEPT_IN_CONTAINERS:
        return False
    if found := re.fullmatch(r"(?:APPTAINER|SINGULARITY)ENV_(.*)", name):
        return any(fnmatchcase(found.group(1), pattern) for pattern in OVERRULE_IN_CONTAINERS)
    return name.startswith(tuple(FORGOTTEN_IN_JOBS))


def isolated(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without what is `forgotten`."""
    return {name: value for name, value in env.items() if not forgotten(name)}


def _both(names: Collection[str]) -> str:
    """A pattern of bash's `case`, for Apptainer's names and for those of its predecessor."""
    both = [
        name.replace("APPTAINER", box) for box in ("APPTAINER", "SINGULARITY") for name in names
    ]
    return "|".join(both)


ISOLATE = (
    f"for name in {' '.join(f'${{!{prefix}@}}' for prefix in FORGOTTEN_IN_JOBS)}; do case $name in"
    f" {_both(KEPT_IN_CONTAINERS)}) ;;"
    f" {_both([f'APPTAINERENV_{pattern}' for pattern in OVERRULE_IN_CONTAINERS])})"
    f' unset "$name" ;; {_both(["APPTAINERENV_*"])}) ;; *) unset "$name" ;; esac; done'
)
"""The same for bash: `--export=NONE` still brings what the login files export."""
