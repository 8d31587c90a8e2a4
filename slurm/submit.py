"""Submit a run's undone work as dependent Slurm jobs: `python -m slurm.submit --cluster C --config
K --run R`.

All or nothing: the first jobs go in held and are released when every sbatch has been taken; if one
is refused, those made are cancelled. Run it again at any time: what is done is skipped, a live
submission is attached to. `--dry-run` prints every script and needs no Slurm, image or network.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import stat
import sys
import uuid
from pathlib import Path
from typing import Any

import submitit
from rich.console import Console
from rich.table import Table
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm import slurm as submitit_slurm

from sarm.cli import ended
from sarm.config import PHASES, ROOT, Config, Phase, UserError
from sarm.run import RunDir, config_of, git_commit, now, write_atomic
from slurm import queue
from slurm.cost import table as cost_table
from slurm.dag import Node
from slurm.entry import run_spec
from slurm.images import (
    binds,
    caches,
    check_images,
    image_of,
    images_of,
    make_caches,
    read_image,
    token_file,
)
from slurm.lock import held
from slurm.plan import (
    Batch,
    grace_s,
    plan,
    python_command,
    setup_lines,
    srun_args,
    teardown_lines,
    undone,
)
from slurm.profile import Profile, flags, load_profile, resources, tasks_per_job

MISREAD = re.compile(r"[\x00-\x1f\x7f:,%\\'\"`$]")
"""In paths: `%` begins a pattern of sbatch's file names, `:` and `,` part a bind's fields, and the
rest is no good in scripts.
"""

SECRET = re.compile(r"(?i)\b(\w*(?:token(?!izers)|secret|password|api_?key)\w*)=\S+")


def main(argv: list[str] | None = None) -> int:
    parser = arguments("slurm.submit", __doc__)
    parser.add_argument("--phase", choices=PHASES, help="this phase alone, its needs done already")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    return ended(lambda: submit_or_show(args), args.run)


def arguments(module: str, doc: str | None) -> argparse.ArgumentParser:
    """What every command takes that brings a cluster, a config and a run together."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc)
    parser.add_argument(
        "--cluster", default="generic", help="a profile in slurm/clusters/, or a path"
    )
    parser.add_argument("--config", help="YAML; where left out, the run's own")
    parser.add_argument("--run", required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def submit_or_show(args: argparse.Namespace) -> int:
    """All checks first, the run directory only then: what is refused leaves nothing behind."""
    queue.forget_overrides()
    profile, config = load_profile(args.cluster), config_of(args.run, args.config, args.overrides)
    run = own_run(args.run, config)
    if args.dry_run:
        dry_run(run, profile, args.phase)
        return 0
    refuse_live_change(run)
    warnings = check_images(profile)
    todo = undone(config, lambda node: run.done(*node, hashes=False))
    batches = chosen(config, profile, todo, args.phase)
    warnings += check_batches(profile, batches)
    if any(batch.phase == "fetch" for batch in batches):
        check_named(config)
        warnings += check_token()
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    RunDir.create(args.run, config)
    make_caches()
    with held(run.path / "submit.lock", f"a submission of {run.path}"):
        journal = submit(run, profile, args.phase)
    show(run, profile, journal, args.phase)
    return 0


def refuse_live_change(run: RunDir) -> None:
    """Raises UserError where jobs of the run would go on with a config that changes under them."""
    journal = last_journal(run)
    if journal is None or not run.change():
        return
    if queue.live_jobs(journal["jobs"].values()):
        raise UserError(
            f"submission {journal['id']} still runs with another config; make cancel first, or use"
            " another RUN"
        )


def submit(run: RunDir, profile: Profile, phase: str | None = None) -> dict[str, Any]:
    """Submit what is undone and return the journal of the submission, or of the live one it
    attaches to.

    Raises UserError where a phase's needs are not done, where a live submission lacks what is asked
    for, or where Slurm refuses any job: then none is left behind.
    """
    before = last_journal(run)
    if before is not None and before["state"] == "submitting":
        # Whoever was submitting is gone, or the lock would not be ours; its first jobs may be held
        # for ever.
        cancel_all(run, before)
    elif before is not None:
        alive = queue.live_jobs(before["jobs"].values())
        reports = {before["jobs"].get("report")}
        # A job that completes has ended, or is being cancelled: neither is worth waiting for.
        if {job.id.partition("_")[0] for job in alive if job.state != "COMPLETING"} - reports:
            asked = {
                node
                for node in undone(run.config, lambda node: run.done(*node, hashes=False))
                if phase in (None, node.phase)
            }
            if more := asked - unit_ids(before).keys():
                lacks = ", ".join(
                    dict.fromkeys(
                        node.phase
                        for node in sorted(more, key=lambda node: PHASES.index(node.phase))
                    )
                )
                raise UserError(
                    f"submission {before['id']} still runs, without {lacks}; submit again when it"
                    " has ended (make watch), or make cancel first"
                )
            return {**before, "attached": True}
        # Only the report of a run that failed still waits: what is resubmitted ends with a report
        # of its own.
        queue.cancel(job.id for job in alive)
    batches = chosen(run.config, profile, undone(run.config, lambda node: run.done(*node)), phase)
    journal: dict[str, Any] = {
        "id": uuid.uuid4().hex[:8],
        "at": now(),
        "state": "submitting",
        "config_sha256": run.config.sha256,
        "git_commit": git_commit(),
        "images": [
            {"path": str(image.path), "sha256": image.sha256, "git_commit": image.commit}
            for image in map(read_image, images_of(profile))
        ],
        "batches": [batch._asdict() for batch in batches],
        "jobs": {},
    }
    if not batches:
        return {**journal, "state": "nothing to do"}
    folder = run.path / "submissions" / journal["id"]
    record(run, journal)
    folder.mkdir(mode=0o700)
    ids: dict[str, str] = journal["jobs"]
    try:
        for batch in batches:
            ids[batch.name] = send(run, profile, batch, journal, folder)
            record(run, journal)
        roots = [ids[batch.name] for batch in batches if not batch.needs]
        queue.release(roots)
    except BaseException as error:
        left = taken_back(run, journal)
        if not isinstance(
            error, (UserError, FailedJobError, FailedSubmissionError, OSError, KeyboardInterrupt)
        ):
            raise
        raise UserError(f"Slurm did not take every job ({cause(error)}); {left}") from None
    journal["state"] = "submitted"
    record(run, journal)
    return journal


def chosen(config: Config, profile: Profile, todo: set[Node], phase: str | None) -> list[Batch]:
    """The batches to submit: all, or one phase's, whose needs must then be done. Raises UserError
    where they are not.
    """
    if phase is None:
        missing = sorted({str(node) for node in todo if node.phase == "fetch"})
        if missing and profile.fetch != "job":
            raise UserError(
                "models and data are not fetched yet; run make fetch with the same CONFIG and RUN"
                " where there is a network, then submit again"
            )
        return plan(config, profile, todo)
    batches = [batch for batch in plan(config, profile, todo) if batch.phase == phase]
    waiting = sorted({need for batch in batches for need in batch.needs})
    if waiting and phase != "report":
        raise UserError(
            f"{phase} needs {', '.join(waiting)} done first; submit those, or everything with make"
            " submit-all"
        )
    return [batch._replace(needs=()) for batch in batches]


def send(run: RunDir, profile: Profile, batch: Batch, journal: dict[str, Any], folder: Path) -> str:
    """One sbatch through submitit; returns the job id. Roots go in held."""
    python = python_command(
        profile,
        batch.phase,
        image_of(profile, batch.phase),
        binds(run, batch.phase),
        sys.executable,
    )
    executor = submitit.SlurmExecutor(folder, python=python)
    executor.update_parameters(
        **parameters(run, profile, batch, journal["jobs"], journal["id"], folder)
    )
    # The report is told which job was to do each unit; its script asks Slurm which jobs failed
    # (plan.FAILED_JOBS).
    env = (
        {
            "SARM_JOBS": json.dumps(
                {f"{node.phase}/{node.unit}": id_ for node, id_ in unit_ids(journal).items()}
            )
        }
        if batch.phase == "report"
        else {}
    )
    for node in batch.nodes:
        run.progress_file(*node).unlink(missing_ok=True)  # an earlier job's
    specs = [
        str(write_spec(run, profile, batch, element, folder, env)) for element in batch.elements
    ]
    # A map over one element would not be an array; submitted alone it is no array either.
    # on a failure submitit prints what its error says too
    with contextlib.redirect_stderr(io.StringIO()):
        jobs = (
            executor.map_array(run_spec, specs)
            if len(specs) > 1
            else [executor.submit(run_spec, specs[0])]
        )
    return jobs[0].job_id.partition("_")[0]


def cause(error: BaseException) -> str:
    """What stopped a submission, in sbatch's words, and what to do about it where that is known."""
    said = re.sub(r"sbatch: (error: )?", "", " ".join(str(error).split())) or "it was interrupted"
    return f"{said}; {cure}" if (cure := queue.cure(said, "")) else said


def parameters(
    run: RunDir, profile: Profile, batch: Batch, ids: dict[str, str], submission: str, folder: Path
) -> dict[str, Any]:
    """submitit's parameters for a batch. Every sbatch flag comes from `slurm.profile.flags`."""
    more: dict[str, Any] = {
        flag.replace("-", "_"): value for flag, value in flags(profile, batch.phase).items()
    }
    # submitit counts tasks itself, and names a wckey of its own unless told None.
    counts = {"nodes": int(more.pop("nodes")), "ntasks_per_node": int(more.pop("ntasks_per_node"))}
    more.setdefault("wckey", None)
    if batch.needs:
        more["dependency"] = f"{batch.when}:" + ":".join(ids[need] for need in batch.needs)
    else:
        more["hold"] = True
    more["comment"] = f"sarm:{batch.phase}"
    named: dict[str, Any] = {
        key: more.pop(key) for key in ("wckey", "dependency", "comment", "time") if key in more
    }
    return {
        **counts,
        **named,
        "job_name": job_name(run, batch.name, submission),
        "additional_parameters": more,
        "array_parallelism": profile.array_throttle,
        "stderr_to_stdout": True,
        "setup": setup_lines(profile, batch.phase, outside(profile, batch.phase), folder),
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
    commands = [
        {
            "argv": [
                "-m",
                "jobs",
                batch.phase,
                "--run",
                str(run.path),
                "--unit",
                unit,
                *(["--force"] if batch.when == "afterany" else []),
            ],
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
    write_atomic(path, json.dumps(spec).encode())
    return path


def job_name(run: RunDir, batch: str, submission: str) -> str:
    """Unique to a submission, so that a job whose sbatch answer was lost can be found by it."""
    return f"{run.config.name}-{hashlib.sha256(str(run.path).encode()).hexdigest()[:6]}-{submission}.{batch}"


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


# Checks before anything is submitted


def own_run(path: str, config: Config) -> RunDir:
    """The run, not yet made where it is new: private to its owner, since submitit unpickles what
    lies in it, and of this config.

    Raises UserError where it is not.
    """
    # jobs in an image see the folder itself, not a link that leads there
    run = RunDir(Path(path).resolve(), config)
    for place in (run.path, ROOT):
        if found := MISREAD.search(str(place)):
            raise UserError(
                f"{str(place)!r} holds {found.group()!r}, which Slurm or Apptainer misreads in a"
                " path; use another place"
            )
    if run.path.exists():
        state = run.path.stat()
        if state.st_uid != os.getuid():
            raise UserError(
                f"{run.path} belongs to another user (uid {state.st_uid}); use a RUN of your own"
            )
        if state.st_mode & stat.S_IWOTH:
            raise UserError(
                f"{run.path} is writable by everybody, who could then run code as you; chmod o-w it"
            )
    if (run.path / "config.yaml").exists():
        run.change()  # refuses a config of another name
    return run


def check_batches(profile: Profile, batches: list[Batch]) -> list[str]:
    """Warnings about what Slurm cannot say beforehand. Raises UserError where the profile's limit
    or Slurm would refuse a job.
    """
    elements = sum(len(batch.elements) for batch in batches)
    if profile.submit_limit is not None and elements > profile.submit_limit:
        raise UserError(
            f"{elements} jobs are more than this cluster's submit_limit of {profile.submit_limit};"
            " use fewer encode.shards or probe.shards, or raise pack"
        )
    for reason, kinds in refusals(profile, batches).items():
        raise UserError(
            f"Slurm would refuse the {', '.join(kinds)} jobs: {reason}; nothing was submitted"
        )
    unlooked = unchecked(profile, batches)
    return [unlooked] if unlooked else []


def refusals(profile: Profile, batches: list[Batch]) -> dict[str, list[Phase]]:
    """Why Slurm would refuse jobs and what to do about it, and the phases it is true of. Raises
    UserError where there is no Slurm.

    Asks `sbatch --test-only` once for each kind of job, with its longest array and without
    dependencies.
    """
    refused: dict[str, list[Phase]] = {}
    for phase in dict.fromkeys(batch.phase for batch in batches):
        try:
            queue.test_only(
                header(
                    profile,
                    phase,
                    max(len(batch.elements) for batch in batches if batch.phase == phase),
                )
            )
        except queue.Refused as error:
            refused.setdefault(f"{error}; {queue.cure(str(error))}", []).append(phase)
    return refused


def unchecked(profile: Profile, batches: list[Batch]) -> str | None:
    """What Slurm takes without looking at it where it enforces no accounting."""
    named = [f"account {profile.account}"] if profile.account else []
    named += dict.fromkeys(
        f"QOS {qos}" for batch in batches if (qos := resources(profile, batch.phase).qos)
    )
    return (
        f"Slurm here enforces no accounting, so {', '.join(named)} went unchecked"
        if named and not queue.accounting_enforced()
        else None
    )


def header(profile: Profile, phase: Phase, elements: int = 1) -> str:
    """A script with a phase's flags that does nothing, for `sbatch --test-only`."""
    asked = [
        f"#SBATCH --{flag}" if value is True else f"#SBATCH --{flag}={value}"
        for flag, value in flags(profile, phase).items()
    ]
    array = [f"#SBATCH --array=0-{elements - 1}"] if elements > 1 else []
    return "\n".join(["#!/bin/bash", *asked, *array, "true"]) + "\n"


def check_named(config: Config) -> None:
    """Raises UserError where the config names a model or data that fetch could not bring, or would
    not find: a job would say so much later.
    """
    for model in config.models:
        model.folder()
    for name, source in config.data.sources.items():
        if source.path and not (ROOT / source.path).exists():
            raise UserError(
                f"data source {name}: {ROOT / source.path} does not exist; correct"
                f" data.sources.{name}.path"
            )


def check_token() -> list[str]:
    """Warnings about the hub's token, which a fetch job reads from its file: Slurm would store an
    environment it was handed.
    """
    path = token_file()
    if not path.exists():
        return (
            [
                f"HF_TOKEN is not given to jobs; a gated model needs it in {path}, where `hf auth"
                " login` puts it"
            ]
            if "HF_TOKEN" in os.environ
            else []
        )
    return [f"{path} can be read by others; chmod 600 it"] if path.stat().st_mode & 0o077 else []


# The journal: written before and after each sbatch, it says which jobs are this run's


def record(run: RunDir, journal: dict[str, Any]) -> None:
    folder = run.path / "submissions"
    folder.mkdir(exist_ok=True, mode=0o700)
    write_atomic(folder / "last.json", json.dumps(journal, indent=1).encode())


def last_journal(run: RunDir) -> dict[str, Any] | None:
    try:
        return json.loads((run.path / "submissions" / "last.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def unit_ids(journal: dict[str, Any]) -> dict[Node, str]:
    """Each unit's job id as squeue shows it: `123`, or `123_4` for an element of an array."""
    found: dict[Node, str] = {}
    for entry in journal["batches"]:
        batch = Batch(**{**entry, "elements": tuple(tuple(e) for e in entry["elements"])})
        id_ = journal["jobs"].get(batch.name)
        for index, element in enumerate(batch.elements):
            for unit in element:
                if id_ is not None:
                    found[Node(batch.phase, unit)] = (
                        f"{id_}_{index}" if len(batch.elements) > 1 else id_
                    )
    return found


def cancel_all(run: RunDir, journal: dict[str, Any]) -> None:
    """Cancel a submission: the jobs it knows, and those, found by name, whose sbatch answer it
    never heard.

    Raises UserError where Slurm does not answer: the journal then still says `submitting`, and the
    next submission tries again.
    """
    ids = journal["jobs"]
    names = [
        job_name(run, entry["name"], journal["id"])
        for entry in journal["batches"]
        if entry["name"] not in ids
    ]
    queue.cancel([*ids.values(), *queue.ids_by_name(names)])
    record(run, {**journal, "state": "cancelled"})


def taken_back(run: RunDir, journal: dict[str, Any]) -> str:
    """Cancel what a failed submission has sent; what to say of it."""
    try:
        cancel_all(run, journal)
    except (UserError, OSError) as error:
        return (
            f"those it took could not be cancelled either ({error}); submit again once it answers,"
            " which takes them back first"
        )
    return "those it took were cancelled, nothing runs"


# What is shown


def dry_run(run: RunDir, profile: Profile, phase: str | None) -> None:
    """Print every sbatch script as it would be, and what it may cost."""
    todo = undone(run.config, lambda node: run.done(*node))
    todo -= {node for node in todo if node.phase == "fetch" and profile.fetch != "job"}
    batches = chosen(run.config, profile, todo, phase)
    ids = {batch.name: f"id-of-{batch.name}" for batch in batches}
    folder = run.path / "submissions" / "dry-run"
    for batch in batches:
        given = parameters(run, profile, batch, ids, "dry-run", folder)
        python = python_command(
            profile,
            batch.phase,
            image_of(profile, batch.phase),
            binds(run, batch.phase),
            sys.executable,
        )
        command = f"{python} -u -m submitit.core._submit {shlex.quote(str(folder))}"
        array: dict[str, Any] = (
            {"map_count": len(batch.elements)} if len(batch.elements) > 1 else {}
        )
        text = submitit_slurm._make_sbatch_string(command=command, folder=folder, **given, **array)
        print(
            f"### {batch.name}: {', '.join(unit for element in batch.elements for unit in element)}"
        )
        print(SECRET.sub(r"\1=***", text))
    print(f"### {len(batches)} submissions, {sum(len(batch.elements) for batch in batches)} jobs")
    print(cost_table(run.config, profile, run, batches))


def show(run: RunDir, profile: Profile, journal: dict[str, Any], phase: str | None = None) -> None:
    """The table of what was submitted, of `phase` alone where one was asked for."""
    if journal["state"] == "nothing to do":
        print(f"{f'all of {phase}' if phase else 'everything'} in {run.path} is done")
        return
    if journal.get("attached"):
        print(
            f"submission {journal['id']} of {journal['at']} is still running; attached to it,"
            " nothing was submitted"
        )
    table = Table(box=None, header_style="bold")
    for column in ("phase", "job id", "depends on", "resources", "log"):
        table.add_column(column, overflow="fold")
    for batch in journal["batches"]:
        want, tasks = resources(profile, batch["phase"]), tasks_per_job(profile, batch["phase"])
        shape = f"{len(batch['elements'])}x " if len(batch["elements"]) > 1 else ""
        log = run.log(
            batch["phase"], batch["elements"][0][0] if len(batch["elements"]) == 1 else "*"
        )
        table.add_row(
            batch["name"],
            journal["jobs"].get(batch["name"], ""),
            (
                ":".join(
                    [batch["when"], *(journal["jobs"].get(need, "") for need in batch["needs"])]
                )
                if batch["needs"]
                else ""
            ),
            f"{shape}{tasks} tasks, {want.gpus} GPUs, {want.cpus_per_task} CPUs a task,"
            f" {want.mem_gb} GB, {want.time_min} min",
            str(log.relative_to(run.path)),
        )
    console = Console()
    if not console.is_terminal:  # a file or a pipe: no lines broken at a width that nobody has
        console = Console(width=200)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
