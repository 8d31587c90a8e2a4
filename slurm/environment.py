"""Which variables of a shell reach what the suite starts: Slurm's clients, jobs, and containers.

`client_environment(os.environ)` is the one environment of every Slurm command that is called from
here; `ISOLATE` is the line by which a job's script forgets what would change Python, Apptainer or
Slurm's clients in it, and `isolated(os.environ)` the same for what is started on a login node.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

CLIENTS = ("SLURM SBATCH_ SQUEUE_ SACCT_ SACCTMGR_ SCANCEL_ SCONTROL_ SINFO_ SALLOC_ SRUN_").split()
"""How the variables begin by which a user's shell changes what Slurm's commands do: filters,
formats, defaults and, inside a job, that job's own."""
KEPT_FOR_CLIENTS = ("SLURM_CONF", "SLURM_JWT")
"""Where the site's configuration is, and who the caller is."""

FORGOTTEN_IN_JOBS = "PYTHON APPTAINER SINGULARITY SQUEUE_ SACCT_ SCANCEL_ SBATCH_ SRUN_".split()
KEPT_IN_CONTAINERS = (
    "APPTAINER_BIND APPTAINER_BINDPATH APPTAINER_MOUNT APPTAINER_TMPDIR APPTAINER_CACHEDIR"
    " APPTAINER_CONFIGDIR"
).split()
"""A site's own binds and places. What it sets inside containers (APPTAINERENV_*) is kept too, but
for PATH and Python's variables."""


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
        return found.group(1) == "PATH" or found.group(1).startswith("PYTHON")
    return name.startswith(tuple(FORGOTTEN_IN_JOBS))


def isolated(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without what is `forgotten`."""
    return {name: value for name, value in env.items() if not forgotten(name)}


ISOLATE = (
    f"for name in {' '.join(f'${{!{prefix}@}}' for prefix in FORGOTTEN_IN_JOBS)}; do case $name in"
    f" {'|'.join(KEPT_IN_CONTAINERS)}|"
    + "|".join(name.replace("APPTAINER", "SINGULARITY") for name in KEPT_IN_CONTAINERS)
    + ") ;;"
    " APPTAINERENV_PATH|SINGULARITYENV_PATH|APPTAINERENV_PYTHON*|SINGULARITYENV_PYTHON*)"
    ' unset "$name" ;; APPTAINERENV_*|SINGULARITYENV_*) ;; *) unset "$name" ;; esac; done'
)
"""The same for bash: `--export=NONE` still brings what the login files export."""
