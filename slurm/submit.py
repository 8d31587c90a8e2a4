"""Submit a run's undone work as dependent Slurm jobs: `python -m slurm.submit --cluster C --config
K --run R`.

All or nothing: the first jobs go in held and are released when every sbatch has been taken; if one
is refused, those made are cancelled. Run it again at any time: what is done is skipped, what runs
or waits is attached to, and what failed or was cancelled is sent again with all that follows from
it. `--dry-run` prints every script and needs no Slurm, image or network.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import sys
import uuid
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from sarm.cli import ended
from sarm.config import PHASES, Config, UserError
from sarm.launched import now
from sarm.run import RunDir, config_of, git_commit, many
from slurm import queue
from slurm.checks import check_batches, check_card, check_named, check_token, own_run, umask
from slurm.cost import check_limit
from slurm.dag import Node, named, tasks
from slurm.display import dry_run, show_attached, show_sent
from slurm.images import check_images, images_of, make_caches, read_image
from slurm.joblogs import OUT_OF_MEMORY, complaint, logs_by_job
from slurm.journal import (
    FOLDER,
    Owned,
    clusters,
    job_name,
    jobs_of,
    journals,
    owned,
    place_of,
    record,
    unit_jobs,
)
from slurm.lock import held
from slurm.plan import Batch, plan, undone
from slurm.profile import Profile, gpus_per_job, resources
from slurm.profile_file import load_profile
from slurm.queue import QueuedJob
from slurm.script import umask_of
from slurm.sending import send
from slurm.words import cure, made


class Decision(NamedTuple):
    """What a submission would do, as things stand."""

    batches: list[Batch]
    attached: dict[Node, QueuedJob]
    """Undone units whose jobs run or wait, left alone."""
    mine: list[QueuedJob]
    """All of the run's jobs that the controller knows."""
    superseded: list[QueuedJob]
    """Jobs that still wait and would do what is sent anew: the report of a run that failed, or what
    waits for a failed job."""


def main(argv: list[str] | None = None) -> int:
    parser = arguments("slurm.submit", __doc__)
    parser.add_argument("--phase", choices=PHASES, help="this phase alone, its needs done already")
    parser.add_argument("--unit", help="this unit of every phase alone, such as penalty-seed0")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    # A dropped connection or a kill takes back what was sent, as Ctrl-C does.
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.default_int_handler)
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
    profile, config = load_profile(args.cluster), config_of(args.run, args.config, args.overrides)
    run = own_run(args.run, config)
    asked = Asked(args.phase, args.unit)
    check_limit(config, profile, run)
    check_card(config, run)
    if args.dry_run:
        dry_run(run, profile, decide(run, profile, asked, dry=True).batches)
        return 0
    refuse_live_change(run)
    warnings = check_images(profile)
    decision = decide(run, profile, asked, hashes=False)
    warnings += check_batches(profile, decision.batches, len(decision.attached))
    if any(batch.phase == "fetch" for batch in decision.batches):
        check_named(config)
        warnings += check_token()
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    make_caches()
    # what jobs read of the run nobody else may change, whatever the shell's own umask
    with umask(umask_of(profile)):
        RunDir.create(args.run, config)
        if profile.share == "group":
            run.path.chmod(0o750)
        with held(run.path / "submit.lock", f"a submission of {run.path}"):
            decision, journal = submit(run, profile, asked)
    show_attached(decision.attached, decision.superseded)
    if journal:
        show_sent(run, profile, journal)
        sent = many(len(journal["jobs"]), "submission")
        print(f"sent {sent}; {made('watch', run.path)} shows how they go")
    elif decision.attached:
        print("nothing else was submitted")
    else:
        what = " ".join(filter(None, (asked.phase, asked.unit)))
        print(f"{f'all of {what}' if what else 'everything'} in {run.path} is done")
    return 0


def refuse_live_change(run: RunDir) -> None:
    """Raises UserError where jobs of the run would go on with a config that changes under them."""
    known = journals(run)
    if known and run.change() and any(one.job.live for one in in_queue(run, known)):
        raise UserError(
            f"jobs of {run.path} still run or wait with another config; make cancel first, or use"
            " another RUN"
        )


class Asked(NamedTuple):
    """What of a run is to be sent; all of it where neither is given."""

    phase: str | None = None
    unit: str | None = None

    def of(self, config: Config) -> set[Node]:
        """Raises UserError where no unit has that name."""
        found = named(config, self.unit, self.phase)
        reports = () if self.phase else config.units("report")
        return found | {Node("report", unit) for unit in reports}


def decide(
    run: RunDir, profile: Profile, asked: Asked, *, hashes: bool = True, dry: bool = False
) -> Decision:
    """What is to be sent, what it attaches to and what it supersedes. Raises UserError where a
    unit's needs are neither done, nor running, nor sent along.
    """
    known = journals(run)
    wanted = asked.of(run.config)
    mine = [] if dry and shutil.which("squeue") is None else [*in_queue(run, known)]
    live = {node: one.job for one in mine for node in one.nodes if one.job.live}
    todo = undone(run.config, lambda node: run.done(*node, hashes=hashes))
    if dry and profile.fetch != "job":
        todo -= {node for node in todo if node.phase == "fetch"}
    sent = to_send(run.config, todo, wanted, live)
    check_needs(run.config, profile, asked, todo, sent, live)
    attached = {n: job for n, job in live.items() if n in todo & wanted and n not in sent}
    superseded = [one.job for one in mine if one.job.live and sent.intersection(one.nodes)]
    short = ran_out_of_memory(run, known, sent)
    batches = [
        batch._replace(retry=bool(short.intersection(batch.nodes)))
        for batch in plan(run.config, profile, sent, waited_for(mine, sent))
    ]
    return Decision(batches, attached, [one.job for one in mine], superseded)


def in_queue(run: RunDir, known: list[dict[str, Any]]) -> list[Owned]:
    """This run's jobs that the controller knows. Asks nothing where nothing was submitted."""
    jobs = [job for name in clusters(known) for job in queue.known_jobs(name, patient=True)]
    return owned(run, known, jobs)


def to_send(
    config: Config, todo: Collection[Node], wanted: Collection[Node], live: Mapping[Node, QueuedJob]
) -> set[Node]:
    """The wanted units that are undone and have no job, and all that follows from one that is sent,
    its jobs or not.
    """
    # What Slurm started it needs is done, though a network file system may not show it here yet.
    needs_of = {task.node: task.needs for task in tasks(config)}
    seen_done = {
        need
        for node, job in live.items()
        if job.state == "RUNNING" and node.phase != "report"
        for need in needs_of[node]
    }
    sent: set[Node] = set()
    for task in tasks(config):
        if task.node not in todo or task.node not in wanted:
            continue
        follows = any(need in sent for need in task.needs)
        if follows or (task.node not in live and task.node not in seen_done):
            sent.add(task.node)
    return sent


def check_needs(
    config: Config,
    profile: Profile,
    asked: Asked,
    todo: Collection[Node],
    sent: Collection[Node],
    live: Collection[Node],
) -> None:
    """Raises UserError where something to be sent lacks what it needs, and nothing would bring
    it.
    """
    if profile.fetch != "job" and any(node.phase == "fetch" for node in sent):
        raise UserError(
            "models and data are not fetched yet; run make fetch with the same CONFIG and RUN"
            " where there is a network, then submit again"
        )
    missing = {
        need
        for task in tasks(config)
        if task.node in sent and task.when == "afterok"
        for need in task.needs
        if need in todo and need not in sent and need not in live
    }
    if missing:
        phases = ", ".join(dict.fromkeys(node.phase for node in sorted(missing)))
        raise UserError(
            f"{asked.phase or asked.unit} needs {phases} done first; submit those, or everything"
            " with make submit-all"
        )


def waited_for(mine: Iterable[Owned], sent: set[Node]) -> dict[Node, str]:
    """The ids by which what is sent waits for what is live: an array's own where all of it is."""
    mine = [one for one in mine if one.job.live and not sent.intersection(one.nodes)]
    elements: dict[str, int] = {}
    for one in mine:
        elements[one.job.name] = elements.get(one.job.name, 0) + 1
    return {
        node: one.job.base if elements[one.job.name] == len(one.batch.elements) else one.job.id
        for one in mine
        for node in one.nodes
    }


def ran_out_of_memory(
    run: RunDir, known: Iterable[Mapping[str, Any]], sent: Collection[Node]
) -> set[Node]:
    """Those to be sent of which Slurm wrote so, of any job that they have had: the last may have
    ended otherwise, with more.
    """
    found: set[Node] = set()
    for journal in known:
        logs = logs_by_job(run.path / FOLDER / journal["id"])
        for node, job in jobs_of(run, journal).items():
            if node in sent and OUT_OF_MEMORY.search(complaint(logs.get(job.id, ()))):
                found.add(node)
    return found


def submit(
    run: RunDir, profile: Profile, asked: Asked | None = None
) -> tuple[Decision, dict[str, Any] | None]:
    """Submit what is undone and has no job; returns that decision and the submission's journal,
    None where there was nothing to send.

    Raises UserError where a phase's needs are not done, or where Slurm refuses any job: then none
    is left behind.
    """
    known = journals(run)
    take_back_unfinished(run, known)
    decision = decide(run, profile, asked or Asked())
    batches = decision.batches
    if not batches:
        return decision, None
    journal: dict[str, Any] = {
        "id": uuid.uuid4().hex[:8],
        "number": 1 + max((journal["number"] for journal in known), default=0),
        "at": now(),
        "place": place_of(run),
        "state": "submitting",
        "cluster": profile.clusters,
        "config_sha256": run.config.sha256,
        "git_commit": git_commit(),
        "images": [
            {"path": str(image.path), "sha256": image.sha256, "git_commit": image.commit}
            for image in map(read_image, images_of(profile))
        ],
        "batches": [batch._asdict() for batch in batches],
        "gpus": {batch.name: gpus_per_job(profile, batch.phase) for batch in batches},
        "time_min": {batch.name: resources(profile, batch.phase).time_min for batch in batches},
        "jobs": {},
    }
    record(run, journal)
    ids: dict[str, str] = journal["jobs"]
    try:
        for batch in batches:
            jobs = {**unit_jobs(run, known), **jobs_of(run, journal)}
            ids[batch.name] = send(run, profile, batch, journal, jobs, last=batch is batches[-1])
            record(run, journal)
        check_names(run, journal)
        queue.cancel(decision.superseded, decision.mine)
        roots = [ids[batch.name] for batch in batches if not batch.needs]
        queue.release(roots, profile.clusters)
    except BaseException as error:
        left = taken_back(run, journal)
        if not isinstance(error, (UserError, OSError, KeyboardInterrupt)):
            raise
        raise UserError(f"Slurm did not take every job ({cause(error)}); {left}") from None
    journal["state"] = "submitted"
    record(run, journal)
    return decision, journal


def check_names(run: RunDir, journal: dict[str, Any]) -> None:
    """Raises UserError where a job that sbatch's answer named bears another name; cancels what
    bears one of ours twice, as where an answer was lost and the job came to be after all.
    """
    queued = queue.known_jobs(journal["cluster"], patient=True)
    for name, id_ in journal["jobs"].items():
        bearers = {j.base for j in queued if j.name == job_name(run, name, journal["id"])}
        if bearers and id_ not in bearers:
            raise UserError(
                f"sbatch's answer for {name} named job {id_}, and its job is"
                f" {', '.join(sorted(bearers))}"
            )
    mine = owned(run, [journal], queued)
    queue.cancel(
        [one.job for one in mine if one.job.live and one.job.base not in journal["jobs"].values()]
    )


def cause(error: BaseException) -> str:
    """What stopped a submission, in sbatch's words, and what to do about it where that is known."""
    said = re.sub(r"sbatch: (error: )?", "", " ".join(str(error).split())) or "it was interrupted"
    return f"{said}; {more}" if (more := cure(said, "")) else said


def take_back_unfinished(run: RunDir, known: Iterable[dict[str, Any]]) -> None:
    """Cancel what is left of submissions that did not come to their end: whoever was submitting is
    gone, or the lock would not be ours, and their first jobs may be held for ever. Of one that was
    taken back already, a job whose sbatch was killed may have come to be since.
    """
    unfinished = [journal for journal in known if journal["state"] != "submitted"]
    left = {one.submission for one in in_queue(run, unfinished) if one.job.live}
    for journal in unfinished:
        if journal["state"] == "submitting" or journal["id"] in left:
            cancel_submission(run, journal)


def cancel_submission(run: RunDir, journal: dict[str, Any]) -> None:
    """Cancel a submission's jobs, by their names: also those whose sbatch never answered.

    Raises UserError where Slurm does not answer: the journal then still says `submitting`, and the
    next submission tries again.
    """
    queued = queue.known_jobs(journal["cluster"], patient=True)
    queue.cancel([one.job for one in owned(run, [journal], queued) if one.job.live])
    record(run, {**journal, "state": "cancelled"})


def taken_back(run: RunDir, journal: dict[str, Any]) -> str:
    """Cancel what a failed submission has sent; what to say of it."""
    try:
        cancel_submission(run, journal)
    except (UserError, OSError) as error:
        return (
            f"those it took could not be cancelled either ({error}); submit again once it answers,"
            " which takes them back first"
        )
    return "those it took were cancelled, nothing runs"


if __name__ == "__main__":
    sys.exit(main())
