"""What a submission would send: batches of units, and the text of each sbatch script. Pure:
touches no disk, no Slurm.

`plan(config, profile, todo)` groups the DAG's undone tasks; `script(...)` renders a phase's
stand-alone sbatch file.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from sarm.config import ROOT, Config, Phase
from slurm.dag import Node, tasks
from slurm.profile import Profile, flags, requeues, resources, tasks_per_job

REQUEUE_S = 10
"""Of the time between signal and end, what the batch script keeps for itself to requeue."""

BY_HAND = '"$RUN"/submissions/by-hand'
"""Where a job of a stand-alone script, which has no submission, keeps what a submission's folder
holds.
"""

EXIT_TOLD_EARLY = 128 + 12
"""What srun returns where that signal, SIGUSR2, came before Python was up to catch it."""

NO_TOKEN = "unset HF_TOKEN HUGGING_FACE_HUB_TOKEN HF_TOKEN_PATH"

FAILED_JOBS = (
    'SARM_FAILED_JOBS="$(timeout 30 squeue --me --noheader --array --format="%i %T"'
    ' --states=BF,CA,DL,F,NF,OOM,PR,TO)" || true; export SARM_FAILED_JOBS'
)
"""Asks Slurm, where it still knows, which jobs ended without success: the report waits for no
manifest of theirs, and says how they ended.
"""


class Batch(NamedTuple):
    """One sbatch: a job, or an array with an element for each tuple of units."""

    name: str
    phase: Phase
    elements: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...]
    """Names of the batches it waits for."""
    when: str
    """afterok, afterany, or aftercorr: each element waits for its like in the one array needed."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(Node(self.phase, unit) for element in self.elements for unit in element)


def undone(config: Config, done: Callable[[Node], bool]) -> set[Node]:
    """Tasks to do: those without a valid manifest, and everything downstream of them."""
    todo: set[Node] = set()
    for task in tasks(config):
        if not done(task.node) or any(need in todo for need in task.needs):
            todo.add(task.node)
    return todo


def plan(config: Config, profile: Profile, todo: Iterable[Node]) -> list[Batch]:
    """The batches that do `todo`, each after those it needs. What is done already is not waited
    for.

    Shards go into arrays of at most `max_array_size` elements, `pack` units an element; a dependent
    waits for every chunk. Policies are jobs of their own, so that each is evaluated as soon as its
    own training has ended; those of a sweep are an array, and each is evaluated by the element of
    another array that waits for it alone (aftercorr).
    """
    todo = set(todo)
    batch_of: dict[Node, str] = {}
    batches: list[Batch] = []
    needs_of = {task.node: task.needs for task in tasks(config)}
    when_of = {task.node: task.when for task in tasks(config)}
    for name, phase, elements in _groups(config, profile, todo):
        nodes = [Node(phase, unit) for element in elements for unit in element]
        needs = dict.fromkeys(
            batch_of[need] for node in nodes for need in needs_of[node] if need in todo
        )
        when: str = when_of[nodes[0]]
        if len(needs) == 1 and len(elements) > 1:
            needed = next(batch for batch in batches if batch.name in needs)
            if [
                tuple(need for unit in element for need in needs_of[Node(phase, unit)])
                for element in elements
            ] == [
                tuple(Node(needed.phase, unit) for unit in element) for element in needed.elements
            ]:
                when = "aftercorr"
        batches.append(Batch(name, phase, elements, tuple(needs), when))
        batch_of.update({node: name for node in nodes})
    return batches


def _groups(
    config: Config, profile: Profile, todo: set[Node]
) -> list[tuple[str, Phase, tuple[tuple[str, ...], ...]]]:
    phases = dict.fromkeys(task.node.phase for task in tasks(config))
    groups: list[tuple[str, Phase, tuple[tuple[str, ...], ...]]] = []
    for phase in phases:
        units = [unit for unit in config.units(phase) if Node(phase, unit) in todo]
        if phase in ("ppo", "evaluate"):
            sweep = config.sweep_points()
            groups += [
                (f"{phase}.{unit}", phase, ((unit,),)) for unit in units if unit not in sweep
            ]
            # What is trained in this submission is evaluated element by element, what was trained
            # before at once.
            trains = [unit for unit in units if unit in sweep and Node("ppo", unit) in todo]
            trained = [unit for unit in units if unit in sweep and Node("ppo", unit) not in todo]
            for name, mine in ((f"{phase}.sweep", trains), (f"{phase}.swept", trained)):
                groups += _arrays(name, phase, [(unit,) for unit in mine], profile)
            continue
        pack = tasks_per_job(profile, phase)
        elements = [tuple(units[i : i + pack]) for i in range(0, len(units), pack)]
        groups += _arrays(phase, phase, elements, profile)
    return groups


def _arrays(
    name: str, phase: Phase, elements: Sequence[tuple[str, ...]], profile: Profile
) -> list[tuple[str, Phase, tuple[tuple[str, ...], ...]]]:
    """Elements in arrays of at most `max_array_size`, numbered where there are several."""
    chunks = [
        tuple(elements[i : i + profile.max_array_size])
        for i in range(0, len(elements), profile.max_array_size)
    ]
    return [
        (name if len(chunks) == 1 else f"{name}.{n}", phase, chunk)
        for n, chunk in enumerate(chunks)
    ]


def environment(profile: Profile, phase: Phase, outside: dict[str, str]) -> dict[str, str]:
    """All that a job's environment holds beyond Slurm's own: nothing of the submitting shell comes
    along.

    Only fetch may use a network. `outside` gives the few host values that are passed by name (cache
    folders, the image's hash).
    """
    fixed = {
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
        "PYTHONPATH": str(ROOT),
        "PYTHONNOUSERSITE": "1",
        **({} if phase == "fetch" else {"HF_HUB_OFFLINE": "1"}),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**fixed, **outside, **profile.environment}


def setup_lines(profile: Profile, phase: Phase, outside: dict[str, str], folder: Path) -> list[str]:
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
        *bound_lines(profile, shlex.quote(str(folder))),
        *secrets,
        *exports,
        *module_lines(profile),
        *scratch_lines(profile),
        *asks,
    ]
    return ["set -eo pipefail", "umask 077", *lines, "set +e"]


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
    /tmp is neither trusted nor in the way.
    """
    parent = profile.scratch or "${TMPDIR:-/tmp}"
    binds = (
        "SINGULARITY_BIND"
        if profile.container and Path(profile.container.command).name == "singularity"
        else "APPTAINER_BIND"
    )
    return [
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
    """Host-side lines after srun: requeue a job that was told to checkpoint and has not finished,
    or told before it could hear; hand on its exit code.

    scontrol runs here because images hold none; a requeue from the running script keeps dependents
    waiting. In `folder`, a word for the shell, `slurm.entry` leaves a file when the signal comes.
    The exit code alone says less: srun returns the highest of all ranks, and kills the others when
    the first has ended.
    """
    lines = ["rc=$?"]
    told = f'{folder}/told."$SLURM_JOB_ID"."${{SLURM_RESTART_COUNT:-0}}"'
    if profile.max_requeues:
        early = f'[ "$rc" -eq {EXIT_TOLD_EARLY} ]'
        asked = f'[ "$rc" -ne 0 ] && [ -e {told} ]'
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
    return [f"--cpus-per-task={resources(profile, phase).cpus_per_task}", "--export=ALL", *together]


def script(profile: Profile, phase: Phase, cluster: str) -> str:
    """A phase's stand-alone sbatch file: needs nothing but Slurm and the image, CONFIG and RUN
    from the environment.

    One shard an array element: several in one job are the launcher's.
    """
    profile = profile.model_copy(update={"pack": 1})
    lines = [
        "#!/bin/bash",
        (
            f"# {phase}, as the profile {cluster} has it; made by `make sbatch CLUSTER={cluster}`,"
            " do not edit."
        ),
        (
            "# sbatch"
            f" --export=ALL,CONFIG=configs/llama31-8b.yaml,RUN=outputs/llama31-8b{_array_hint(phase)}"
            f" slurm/{phase}.sbatch"
        ),
        f"#SBATCH --job-name=sarm-{phase}",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output=%x-%{'A_%a' if phase in ('encode', 'probe') else 'j'}.log",
    ]
    for flag, value in flags(profile, phase).items():
        if flag != "export":  # the command line exports CONFIG and RUN
            lines.append(f"#SBATCH --{flag}" if value is True else f"#SBATCH --{flag}={value}")
    lines += [
        "",
        'cd "${SLURM_SUBMIT_DIR:?submit from the checkout}"',
        (
            ': "${CONFIG:?give --export=ALL,CONFIG=...,RUN=...}" "${RUN:?give'
            ' --export=ALL,CONFIG=...,RUN=...}"'
        ),
        "umask 077",
        f"mkdir -p {BY_HAND}",
        *bound_lines(profile, BY_HAND),
        *module_lines(profile),
        *(f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()),
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
    box = profile.container
    if box is None:
        python = ".venv/bin/python"
    else:
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
        lines += [
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


def _array_hint(phase: Phase) -> str:
    return {
        "encode": " --array=0-3",
        "probe": " --array=0-15",
        "ppo": ",UNIT=penalty-seed0",
        "evaluate": ",UNIT=base",
    }.get(phase, "")
