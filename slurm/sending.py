"""One batch sent: its specs, pickles and script in the submission's folder, and one sbatch.

`send(run, profile, batch, journal)` returns the job's id. What runs is submitit's side of a job:
it unpickles a name and a path, `slurm.entry.run_spec` of a JSON file.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission
from submitit.slurm import slurm as submitit_slurm

from sarm.config import ROOT, Phase
from sarm.run import RunDir, git_commit
from slurm import queue
from slurm.dag import Node
from slurm.entry import run_spec
from slurm.images import binds, caches, image_of, read_image
from slurm.journal import FOLDER, Job, job_name
from slurm.plan import Batch
from slurm.profile import Profile, flags, resources, throttle
from slurm.script import grace_s, python_command, setup_lines, srun_args, teardown_lines


def send(
    run: RunDir,
    profile: Profile,
    batch: Batch,
    journal: dict[str, Any],
    jobs: dict[Node, Job],
    *,
    last: bool,
) -> str:
    """One sbatch; returns the job id. What waits for nothing of this submission goes in held.
    `jobs` are all units' jobs so far, for the report to ask after; the end of the `last` one is
    mailed.
    """
    folder = run.path / FOLDER / journal["id"]
    env = {"SARM_JOBS": json.dumps(asked_after(jobs))} if batch.phase == "report" else {}
    for node in batch.nodes:
        run.progress_file(*node).unlink(missing_ok=True)  # an earlier job's
    pickles = []
    for element in batch.elements:
        spec = write_spec(run, profile, batch, element, folder, env)
        pickles.append(spec.with_suffix(".pkl"))
        call = DelayedSubmission(run_spec, str(spec))
        call.set_timeout(resources(profile, batch.phase).time_min, 0)
        call.dump(pickles[-1])
    path = folder / f"{batch.name}.sh"
    path.write_text(text(run, profile, batch, journal["jobs"], journal["id"], last=last))
    name = job_name(run, batch.name, journal["id"])
    job = queue.sbatch(path, name, profile.clusters)
    # Jobs look for these for a minute; the first ones are held until all have been sent.
    for index, pickle in enumerate(pickles):
        shown = f"{job}_{index}" if len(pickles) > 1 else job
        pickle.rename(folder / f"{shown}_submitted.pkl")
    return job


def asked_after(jobs: dict[Node, Job]) -> dict[str, tuple[str, str, str]]:
    """For the report: each unit's job, by its id, name and submission."""
    return {
        f"{node.phase}/{node.unit}": (job.id, job.name, job.submission)
        for node, job in jobs.items()
    }


def text(
    run: RunDir, profile: Profile, batch: Batch, ids: dict[str, str], submission: str, *, last: bool
) -> str:
    """The whole sbatch script; `ids` are those of the submission's batches before it."""
    folder = run.path / FOLDER / submission
    image = image_of(profile, batch.phase)
    python = python_command(profile, batch.phase, image, binds(run, batch.phase), sys.executable)
    array: dict[str, Any] = {"map_count": len(batch.elements)} if len(batch.elements) > 1 else {}
    return submitit_slurm._make_sbatch_string(
        command=f"{python} -u -m submitit.core._submit {shlex.quote(str(folder))}",
        folder=folder,
        **parameters(run, profile, batch, ids, submission, folder, last=last),
        **array,
    )


def parameters(
    run: RunDir,
    profile: Profile,
    batch: Batch,
    ids: dict[str, str],
    submission: str,
    folder: Path,
    *,
    last: bool,
) -> dict[str, Any]:
    """submitit's parameters for a batch. Every sbatch flag comes from `slurm.profile.flags`."""
    more: dict[str, Any] = {
        flag.replace("-", "_"): value
        for flag, value in flags(profile, batch.phase, mail=last, retry=batch.retry).items()
    }
    # submitit counts tasks itself, and names a wckey of its own unless told None.
    counts = {"nodes": int(more.pop("nodes")), "ntasks_per_node": int(more.pop("ntasks_per_node"))}
    more.setdefault("wckey", None)
    if after := [*(ids[need] for need in batch.needs), *batch.after]:
        more["dependency"] = f"{batch.when}:" + ":".join(after)
    if not batch.needs:
        more["hold"] = True
    more["comment"] = f"sarm:{batch.phase}"
    named: dict[str, Any] = {
        key: more.pop(key) for key in ("wckey", "dependency", "comment", "time") if key in more
    }
    sbatch = shutil.which("sbatch")
    setup = setup_lines(
        profile,
        batch.phase,
        outside(profile, batch.phase),
        folder,
        str(Path(sbatch).parent) if sbatch else None,
    )
    return {
        **counts,
        **named,
        "job_name": job_name(run, batch.name, submission),
        "additional_parameters": more,
        "array_parallelism": throttle(profile, batch.phase) or profile.array_throttle,
        "stderr_to_stdout": True,
        "setup": setup,
        "teardown": teardown_lines(profile, batch.phase, shlex.quote(str(folder))),
        "srun_args": srun_args(profile, batch.phase),
    }


def write_spec(
    run: RunDir,
    profile: Profile,
    batch: Batch,
    element: tuple[str, ...],
    folder: Path,
    env: dict[str, str],
) -> Path:
    """The JSON that `slurm.entry` runs: one command a packed shard, or the same one on every
    rank.
    """
    force = ["--force"] if batch.when == "afterany" else []
    commands = [
        {
            "argv": ["-m", "jobs", batch.phase, "--run", str(run.path), "--unit", unit, *force],
            "log": str(run.log(batch.phase, unit)),
        }
        for unit in element
    ]
    path = folder / f"{batch.phase}.{element[0]}.json"
    # Killed by the entry a little before Slurm would, the batch script still has time to requeue.
    spec = {
        "commands": commands,
        "cwd": str(ROOT),
        "env": env,
        "ranks": batch.phase == "ppo",
        "grace_s": grace_s(profile),
    }
    path.write_text(json.dumps(spec))
    return path


def outside(profile: Profile, phase: Phase) -> dict[str, str]:
    """Host values a job gets by name."""
    values = {name: str(path) for name, path in caches(phase).items()}
    path = image_of(profile, phase)
    if path is not None:
        image = read_image(path) if path.exists() else None
        values["SARM_IMAGE_SHA256"] = image.sha256 if image else "not-built"
        values["SARM_IMAGE_COMMIT"] = (image.commit if image else None) or "unknown"
    commit = git_commit()
    if commit:
        values["SARM_GIT_COMMIT"] = commit
    return values
