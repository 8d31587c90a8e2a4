"""What is checked before anything is submitted: the run directory, what Slurm would refuse, limits,
data and tokens. Shared by submit and doctor; each check raises UserError or returns warnings.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sarm.config import ROOT, Config, Phase, UserError
from sarm.pinned import fetched
from sarm.records import SarmCard
from sarm.run import RunDir
from slurm import queue
from slurm.images import token_file
from slurm.plan import Batch
from slurm.profile import Profile, flags, resources
from slurm.script import sbatch_line
from slurm.words import cure

MISREAD = re.compile(r"[\x00-\x1f\x7f:,%\\'\"`$]")
"""In paths: `%` begins a pattern of sbatch's file names, `:` and `,` part a bind's fields, and the
rest is no good in scripts.
"""


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """What is written meanwhile lacks these permissions too, and those that the shell's lacks."""
    before = os.umask(mask)
    os.umask(before | mask)
    try:
        yield
    finally:
        os.umask(before)


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
        for bit, who, cure_ in (
            (stat.S_IWOTH, "everybody", "o-w"),
            (stat.S_IWGRP, "its group", "g-w"),
        ):
            if state.st_mode & bit:
                raise UserError(
                    f"{run.path} is writable by {who}, who could then run code as you;"
                    f" chmod {cure_} it"
                )
    if (run.path / "config.yaml").exists():
        run.change()  # refuses a config of another name
    return run


def check_batches(profile: Profile, batches: list[Batch], queued: int = 0) -> list[str]:
    """Warnings about what Slurm cannot say beforehand. Raises UserError where the profile's limit,
    counting what is `queued` already, or Slurm would refuse a job.
    """
    if problem := over_limit(profile, batches, queued):
        raise UserError(problem)
    for reason, kinds in refusals(profile, batches).items():
        raise UserError(
            f"Slurm would refuse the {', '.join(kinds)} jobs: {reason}; nothing was submitted"
        )
    unlooked = unchecked(profile, batches)
    return [unlooked] if unlooked else []


def over_limit(profile: Profile, batches: list[Batch], queued: int = 0) -> str | None:
    """That these are more jobs than the profile's submit_limit allows, and what to do."""
    jobs = sum(len(batch.elements) for batch in batches) + queued
    if profile.submit_limit is None or jobs <= profile.submit_limit:
        return None
    return (
        f"{jobs} jobs are more than this cluster's submit_limit of {profile.submit_limit};"
        " use fewer encode.shards or probe.shards, or raise pack"
    )


def refusals(profile: Profile, batches: list[Batch]) -> dict[str, list[Phase]]:
    """Why Slurm would refuse jobs and what to do about it, and the phases it is true of. Raises
    UserError where there is no Slurm.

    Asks `sbatch --test-only` once for each kind of job, with its longest array and without
    dependencies.
    """
    refused: dict[str, list[Phase]] = {}
    for phase in dict.fromkeys(batch.phase for batch in batches):
        longest = max(len(batch.elements) for batch in batches if batch.phase == phase)
        try:
            queue.test_only(header(profile, phase, longest), profile.clusters)
        except queue.Refused as error:
            refused.setdefault(f"{error}; {cure(str(error))}", []).append(phase)
    return refused


def unchecked(profile: Profile, batches: list[Batch]) -> str | None:
    """What Slurm takes without looking at it where it enforces no accounting."""
    named = [f"account {profile.account}"] if profile.account else []
    named += dict.fromkeys(
        f"QOS {qos}" for batch in batches if (qos := resources(profile, batch.phase).qos)
    )
    return (
        f"Slurm here enforces no accounting, so {', '.join(named)} went unchecked"
        if named and not queue.accounting_enforced(profile.clusters)
        else None
    )


def header(profile: Profile, phase: Phase, elements: int = 1) -> str:
    """A script with a phase's flags that does nothing, for `sbatch --test-only`."""
    asked = [sbatch_line(flag, value) for flag, value in flags(profile, phase).items()]
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


def check_card(config: Config, run: RunDir) -> None:
    """Raises UserError where the SARM that was fetched has other sizes than its card: check_sarm
    would stop there, after waiting for a GPU.
    """
    models = fetched(run)
    if models is None or config.check_sarm.card is None or config.check_sarm.off != "stop":
        return
    own = config.check_sarm.card == "own"
    file = Path(models.sarm.path) / "card.json" if own else ROOT / config.check_sarm.card
    if own and not file.is_file():
        return
    if not file.is_file():
        raise UserError(f"check_sarm.card: there is no file {file}; correct it")
    card = SarmCard.read(file)
    for name, found in models.sarm.sizes.items():
        said = getattr(card, name)
        if said is not None and said != found:
            raise UserError(
                f"{models.sarm.model} has {name} {found} where {card.source} says {said}, so it is"
                " another SARM; correct sarm.model or check_sarm.card, or set check_sarm.off=warn"
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
