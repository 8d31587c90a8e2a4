"""The text of sbatch scripts: what runs on the host before and after srun, and a phase's whole
stand-alone file. Pure: touches no disk, no Slurm.

`script(profile, phase, cluster)` renders what `make sbatch` writes; `setup_lines`, `srun_args` and
`teardown_lines` are a submitted job's.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from sarm.config import ROOT, Phase
from slurm.environment import ISOLATE
from slurm.profile import Profile, flags, requeues, resources, tasks_per_node

REQUEUE_S = 10
"""Of the time between signal and end, what the batch script keeps for itself to requeue."""

FORGET_ALLOCATION = (
    "for name in ${!SLURM_@}; do case $name in SLURM_JOB_ID|SLURM_JOBID|SLURM_ARRAY_*|"
    "SLURM_RESTART_COUNT|SLURM_SUBMIT_DIR|SLURM_CONF|SLURM_*NODELIST|SLURM_NNODES|"
    'SLURM_JOB_NUM_NODES|SLURM_CLUSTER_NAME) ;; *) unset "$name" ;; esac; done'
)
"""Sent from inside an salloc, --export=ALL brings that allocation's sizes, which srun would take
for this job's; it gets its own on its command line.
"""

IN_CHECKOUT = (
    'cd "${SLURM_SUBMIT_DIR:?submit from the checkout}"',
    '[ -e slurm/entry.py ] || { echo "$PWD is not the checkout; submit from there" >&2; exit 2; }',
)
"""A stand-alone script begins where it was submitted."""
BY_HAND = '"$RUN"/submissions/by-hand'
"""Where a job of a stand-alone script, which has no submission, keeps what a submission's folder
holds.
"""

EXIT_SIGNALLED_EARLY = 128 + 12
"""What srun returns where that signal, SIGUSR2, came before Python was up to catch it."""

NO_TOKEN = "unset HF_TOKEN HUGGING_FACE_HUB_TOKEN HF_TOKEN_PATH"

FAILED_JOBS = (
    'SARM_FAILED_JOBS="$(timeout 30 squeue --me --noheader --array --format="%i %T %j"'
    ' --states=BF,CA,DL,F,NF,OOM,PR,TO)" || true; export SARM_FAILED_JOBS'
)
"""Asks Slurm, where it still knows, which jobs ended without success: the report waits for no
manifest of theirs, and says how they ended.
"""


def environment(profile: Profile, phase: Phase, outside: dict[str, str]) -> dict[str, str]:
    """All that a job's environment holds beyond Slurm's own and what its login files export:
    nothing of the submitting shell comes along.

    Only fetch may use a network. `outside` gives the few host values that are passed by name (cache
    folders, the image's hash).
    """
    fixed = {
        "PYTHONPATH": str(ROOT),
        "PYTHONNOUSERSITE": "1",
        **({} if phase == "fetch" else {"HF_HUB_OFFLINE": "1"}),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**fixed, **outside, **of_profile(profile, phase)}


def of_profile(profile: Profile, phase: Phase) -> dict[str, str]:
    """The profile's variables, PATH apart, and the network interface of training on several
    nodes.
    """
    named = {name: value for name, value in profile.environment.items() if name != "PATH"}
    several = profile.interface is not None and resources(profile, phase).nodes > 1
    both = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    return {**(dict.fromkeys(both, profile.interface or "") if several else {}), **named}


def path_line(profile: Profile, slurm_folder: str | None) -> str:
    """PATH as the node's login files leave it, then where Slurm's commands were found on the login
    node, then the usual folders; the profile's own alone where it has one, in which `$PATH` is the
    node's.
    """
    if own := profile.environment.get("PATH"):
        folders = [one if one == "$PATH" else shlex.quote(one) for one in own.split(":")]
        return f"export PATH={':'.join(folders)}"
    usual = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin".split(":")
    more = dict.fromkeys([*([slurm_folder] if slurm_folder else []), *usual])
    return f"export PATH={':'.join(['$PATH', *map(shlex.quote, more)])}"


def setup_lines(
    profile: Profile,
    phase: Phase,
    outside: dict[str, str],
    folder: Path,
    slurm_folder: str | None = None,
) -> list[str]:
    """Host-side lines before srun. Any that fails ends the job; afterwards a failing srun must
    reach the teardown. `folder` is the submission's.
    """
    exports = [
        f"export {name}={shlex.quote(value)}"
        for name, value in environment(profile, phase, outside).items()
    ]
    # A login's start-up files may set one, whatever --export says.
    secrets = [] if phase == "fetch" else [NO_TOKEN]
    asks = [FAILED_JOBS] if phase == "report" else []
    lines = [
        own_line(folder),
        *bound_lines(profile, shlex.quote(str(folder))),
        *secrets,
        *no_devices(profile, phase),
        path_line(profile, slurm_folder),
        *module_lines(profile),
        ISOLATE,
        *exports,
        *scratch_lines(profile),
        *asks,
    ]
    return ["set -eo pipefail", umask_line(profile), *lines, "set +e"]


def no_devices(profile: Profile, phase: Phase) -> list[str]:
    """What a user's login files say of GPUs is no GPU of a job that asked for none."""
    return [] if resources(profile, phase).gpus else ["unset CUDA_VISIBLE_DEVICES"]


def own_line(folder: Path) -> str:
    """What is unpickled is the user's own: where a folder above may be renamed by others, another
    could have been put in its place since.
    """
    said = shlex.quote(
        f"error: {folder} is not yours, and jobs would run code from it; use a RUN"
        " where nobody else may write"
    )
    return f"[ -O {shlex.quote(str(folder))} ] || {{ echo {said} >&2; exit 1; }}"


def umask_of(profile: Profile) -> int:
    """What is written is the owner's alone, or the group may read it."""
    return 0o027 if profile.share == "group" else 0o077


def umask_line(profile: Profile) -> str:
    """The same for a job."""
    return f"umask {umask_of(profile):03o}"


def grace_s(profile: Profile) -> int:
    """What ranks have from the signal to the end of their checkpoint."""
    return profile.signal_lead_s - REQUEUE_S


def bound_lines(profile: Profile, folder: str) -> list[str]:
    """Slurm itself requeues what a lost node or a preemption ended, without a bound: a job that
    fells every node would go round for ever.

    Leaves in `tries` which try of the job this is. They are counted in a file of `folder`, a word
    for the shell: a preempted job that requeues itself is one restart to us and two to Slurm.
    """
    count = [
        f'echo >>{folder}/tries."$SLURM_JOB_ID"',
        f'tries=$(wc -l <{folder}/tries."$SLURM_JOB_ID")',
    ]
    given_up = f'echo "requeued more than {profile.max_requeues} times, given up" >&2; exit 1'
    return [*count, f'[ "$tries" -le {profile.max_requeues + 1} ] || {{ {given_up}; }}']


def scratch_lines(profile: Profile) -> list[str]:
    """A folder of the job's own for temporary files, seen in the image too. What others left in
    /tmp is neither trusted nor in the way. A $TMPDIR that this node lacks was another's.
    """
    parent = profile.scratch or "$TMPDIR"
    there = [] if profile.scratch else ['[ -w "${TMPDIR:-}" ] || TMPDIR=/tmp']
    binds = (
        "SINGULARITY_BIND"
        if profile.container and Path(profile.container.command).name == "singularity"
        else "APPTAINER_BIND"
    )
    return [
        *there,
        f'TMPDIR=$(mktemp -d "{parent}/sarm-XXXXXX") || exit 1',
        "trap 'rm -rf \"$TMPDIR\"' EXIT",
        f'export TMPDIR TRITON_CACHE_DIR="$TMPDIR/triton" {binds}="${{{binds}:+${binds},}}$TMPDIR"',
    ]


def module_lines(profile: Profile) -> list[str]:
    """After PATH is set, which modules add to; a batch shell is no login shell, so `module` may
    not be there yet.
    """
    if not profile.modules:
        return []
    # After `||` no failing line of the site's profile ends the job.
    return [
        "command -v module >/dev/null || . /etc/profile || true",
        *(f"module load {module}" for module in profile.modules),
    ]


def teardown_lines(profile: Profile, phase: Phase, folder: str) -> list[str]:
    """Host-side lines after srun: requeue a job that was signalled to checkpoint and has not
    finished, or before it could hear; hand on its exit code.

    scontrol runs here because images hold none; a requeue from the running script keeps dependents
    waiting. In `folder`, a word for the shell, `slurm.entry` leaves a file when the signal comes.
    The exit code alone says less: srun returns the highest of all ranks, and kills the others when
    the first has ended.
    """
    lines = ["rc=$?"]
    signalled = f'{folder}/signalled."$SLURM_JOB_ID"."${{SLURM_RESTART_COUNT:-0}}"'
    if profile.max_requeues:
        early = f'[ "$rc" -eq {EXIT_SIGNALLED_EARLY} ]'
        asked = f'[ "$rc" -ne 0 ] && [ -e {signalled} ]'
        lines += [
            (
                f'if {f"{{ {asked} || {early}; }}" if requeues(phase) else early} && [ "$tries" -le'
                f" {profile.max_requeues} ]; then"
            ),
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
        ]
    return [*lines, "exit $rc"]


def python_command(
    profile: Profile, phase: Phase, image: Path | None, binds: Iterable[str], own_python: str
) -> str:
    """The shell words that start Python for a job: inside the image, or the checkout's own where
    there is none.
    """
    box = profile.container
    if box is None or image is None:
        return shlex.quote(own_python)
    bound = dict.fromkeys([*binds, *box.binds])
    words = [
        box.command,
        "exec",
        *(["--nv"] if box.nv and resources(profile, phase).gpus else []),
        "--no-home",
        "--pwd",
        str(ROOT),
    ]
    words += [word for bind in bound for word in ("--bind", bind)]
    return shlex.join([*words, str(image), box.python])


def srun_args(profile: Profile, phase: Phase) -> list[str]:
    """srun does not always inherit these. A rank that fails takes the others with it, which would
    wait for it; a packed shard does not.
    """
    together = ["--kill-on-bad-exit=1"] if phase == "ppo" else ["--kill-on-bad-exit=0", "--wait=0"]
    want = resources(profile, phase)
    size = [f"--nodes={want.nodes}", f"--ntasks={want.nodes * tasks_per_node(profile, phase)}"]
    return [*size, f"--cpus-per-task={want.cpus_per_task}", "--export=ALL", *together]


def sbatch_line(flag: str, value: str | bool) -> str:
    """`#SBATCH --gres=gpu:4`; sbatch takes quotes off as a shell would."""
    return f"#SBATCH --{flag}" if value is True else f"#SBATCH --{flag}={shlex.quote(str(value))}"


def script(profile: Profile, phase: Phase, cluster: str) -> str:
    """A phase's stand-alone sbatch file: needs nothing but Slurm and the image, CONFIG and RUN
    from the environment.

    One shard an array element: several in one job are the launcher's.
    """
    profile = profile.model_copy(update={"pack": 1})
    cluster = shlex.quote(" ".join(cluster.split()))
    hint = "--export=ALL,CONFIG=configs/llama31-8b.yaml,RUN=outputs/llama31-8b"
    lines = [
        "#!/bin/bash",
        (
            f"# {phase}, as the profile {cluster} has it; made by `make sbatch CLUSTER={cluster}`,"
            " do not edit."
        ),
        f"# sbatch {hint}{_array_hint(phase)} {phase}.sbatch",
        f"#SBATCH --job-name={phase}.by-hand",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output=%x-%{'A_%a' if phase in ('encode', 'probe') else 'j'}.log",
    ]
    for flag, value in flags(profile, phase).items():
        if flag != "export":  # the command line exports CONFIG and RUN
            lines.append(sbatch_line(flag, value))
    lines += [
        "",
        *IN_CHECKOUT,
        (
            ': "${CONFIG:?give --export=ALL,CONFIG=...,RUN=...}" "${RUN:?give'
            ' --export=ALL,CONFIG=...,RUN=...}"'
        ),
        f"(umask 077; mkdir -p {BY_HAND})",
        umask_line(profile),
        FORGET_ALLOCATION,
        *bound_lines(profile, BY_HAND),
        "UNIT=${UNIT:-$SLURM_ARRAY_TASK_ID}",  # an element of an array does the shard of its index
        *surrounding_lines(profile, phase),
    ]
    entering, python = image_lines(profile, phase)
    lines += entering
    unit = ' ${UNIT:+--unit "$UNIT"}'
    words = (
        f'{python} -m slurm.entry {BY_HAND} {grace_s(profile)} {phase} --config "$CONFIG" --run'
        f' "$RUN"{unit}'
    )
    lines += [
        f"srun {' '.join(srun_args(profile, phase))} {words}",
        *teardown_lines(profile, phase, BY_HAND),
    ]
    return "\n".join(lines) + "\n"


def surrounding_lines(profile: Profile, phase: Phase) -> list[str]:
    """PATH, modules, variables, scratch and caches of a stand-alone script."""
    return [
        path_line(profile, None),
        *module_lines(profile),
        ISOLATE,
        *no_devices(profile, phase),
        *(
            f"export {name}={shlex.quote(value)}"
            for name, value in of_profile(profile, phase).items()
        ),
        *scratch_lines(profile),
        "export PYTHONPATH=$PWD PYTHONNOUSERSITE=1 TOKENIZERS_PARALLELISM=false",
        (
            "if commit=$(git describe --always --abbrev=40 --exclude='*' --dirty=+ 2>/dev/null);"
            " then export SARM_GIT_COMMIT=$commit; fi"
        ),
        (
            "export SARM_CACHE=${SARM_CACHE:-$HOME/.cache/sarm}"
            " HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}"
        ),
        "export HF_HUB_CACHE=${HF_HUB_CACHE:-$HF_HOME/hub}",
        *([] if phase == "fetch" else ["export HF_HUB_OFFLINE=1", NO_TOKEN]),
        'mkdir -p "$SARM_CACHE" "$HF_HUB_CACHE"',
    ]


def image_lines(profile: Profile, phase: Phase) -> tuple[list[str], str]:
    """(lines that find the image, the shell words that start Python in it) of a stand-alone
    script.
    """
    box = profile.container
    if box is None:
        return [], ".venv/bin/python"
    image = box.light_image if phase == "report" and box.light_image else box.image
    nv = " --nv" if box.nv and resources(profile, phase).gpus else ""
    binds = "".join(f" --bind {bind}" for bind in box.binds)
    writable = ' --bind "$SARM_CACHE" --bind "$HF_HOME" --bind "$HF_HUB_CACHE"'
    caches = (
        writable
        if phase == "fetch"
        else ' --bind "$SARM_CACHE:$SARM_CACHE:ro" --bind "$HF_HUB_CACHE:$HF_HUB_CACHE:ro"'
    )
    python = (
        f'{box.command} exec{nv} --no-home --pwd "$PWD" --bind "$PWD" --bind "$(realpath'
        f' "$RUN")"{caches}{binds} "$image" {box.python}'
    )
    lines = [
        (
            f'image=$(realpath -e {image}) || {{ echo "there is no image {image}; make images"'
            " >&2; exit 2; }"
        ),
        # The note is trusted only where the image is no younger.
        (
            'if [ "$image.sha256" -ot "$image" ]; then SARM_IMAGE_SHA256=$(sha256sum "$image");'
            ' else SARM_IMAGE_SHA256=$(cat "$image.sha256"); fi'
        ),
        "export SARM_IMAGE_SHA256=${SARM_IMAGE_SHA256%% *}",
        (
            'if [ -e "$image.commit" ]; then SARM_IMAGE_COMMIT=$(cat "$image.commit"); export'
            " SARM_IMAGE_COMMIT; fi"
        ),
    ]
    return lines, python


def _array_hint(phase: Phase) -> str:
    return {
        "encode": " --array=0-3",
        "probe": " --array=0-15",
        "ppo": ",UNIT=penalty-seed0",
        "evaluate": ",UNIT=base",
    }.get(phase, "")
