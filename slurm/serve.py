"""The sbatch file that serves a run's reward beside a trainer's job: `make sbatch CLUSTER=...`
writes it as serve.sbatch; see docs/other-trainers.md.

No phase: it ends when it is cancelled or its time is up. Pure: touches no disk, no Slurm.
"""

from __future__ import annotations

from sarm.config import Phase
from slurm.profile import Profile, flags, resources
from slurm.script import (
    FORGET_ALLOCATION,
    IN_CHECKOUT,
    image_lines,
    sbatch_line,
    srun_args,
    surrounding_lines,
    umask_line,
)

LIKE: Phase = "evaluate"
"""The phase whose GPUs, memory and partition it asks for: it scores and no more."""
GRACE_S = 60
"""Before its time limit it is told to stop."""


def serve_script(profile: Profile, cluster: str) -> str:
    """The whole file. In RUN/serving it leaves `url` while it can be asked, and `token`, which it
    makes where SARM_REWARD_TOKEN gives none; both are the owner's alone.
    """
    mine = flags(profile, LIKE) | {
        "signal": f"TERM@{GRACE_S}",
        "time": str(resources(profile, "ppo").time_min),
    }
    entering, python = image_lines(profile, LIKE)
    lines = [
        "#!/bin/bash",
        (
            f"# The reward over HTTP, as the profile {' '.join(cluster.split())} has it; made by"
            f" `make sbatch CLUSTER={' '.join(cluster.split())}`, do not edit."
        ),
        "# sbatch --export=ALL,RUN=outputs/llama31-8b serve.sbatch",
        "# A job beside it: export SARM_REWARD_URL=$(cat $RUN/serving/url)"
        " SARM_REWARD_TOKEN=$(cat $RUN/serving/token)",
        "#SBATCH --job-name=serve.by-hand",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=%x-%j.log",
        *(sbatch_line(flag, value) for flag, value in mine.items() if flag != "export"),
        "",
        *IN_CHECKOUT,
        ': "${RUN:?give --export=ALL,RUN=... or --export=ALL,CONFIG=...,RUN=...}"',
        '(umask 077; mkdir -p "$RUN"/serving)',
        umask_line(profile),
        FORGET_ALLOCATION,
        'given=(${CONFIG:+--config "$CONFIG"})',
        '[ ! -e "$RUN"/config.yaml ] || given+=(--run "$RUN")',
        # no word of it in a command line, which others on the node can read
        (
            '[ -n "$SARM_REWARD_TOKEN" ] || SARM_REWARD_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr'
            " -d ' \\n')"
        ),
        # a new file of ours, whatever stood or was linked there
        'export SARM_REWARD_TOKEN; (umask 077; set -C; rm -f "$RUN"/serving/token'
        ' "$RUN"/serving/url; printf "%s\\n" "$SARM_REWARD_TOKEN" >"$RUN"/serving/token) || exit 1',
        *surrounding_lines(profile, LIKE),
        *entering,
        (
            f"srun {' '.join(srun_args(profile, LIKE))} {python} -m serving"
            ' --address-file "$RUN"/serving/url "${given[@]}" serve.host=0.0.0.0 serve.port=0'
        ),
        "rc=$?",
        'rm -f "$RUN"/serving/token',
        "exit $rc",
    ]
    return "\n".join(lines) + "\n"
