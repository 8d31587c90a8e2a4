"""Look over a cluster and a run before anything is submitted: `python -m slurm.doctor --cluster C
--config K --run R`.

Every check is one sentence: `ok`, `unchecked` where it cannot be known from here, or `wrong` with
what to do. Submits nothing but one question to a node that is free at once (srun), writes nothing.
Exit code 2 where anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from sarm.cli import ended
from sarm.config import ROOT, Config, UserError
from sarm.run import RunDir, config_of
from slurm.checks import check_card, check_named, own_run
from slurm.cost import gigabytes, needed_bytes
from slurm.images import check_images, images_of, token_file
from slurm.profile import Profile, resources
from slurm.profile_file import load_profile
from slurm.site_checks import (
    Finding,
    ask_node,
    check_accounting,
    check_gpus,
    check_limits,
    check_queue,
    check_slurm,
)
from slurm.submit import arguments

MIN_DRIVER = {"12": 525, "13": 580}
"""The oldest NVIDIA driver that each CUDA generation of torch's wheels runs on (NVIDIA's
compatibility table).
"""
NETWORK_S = 8.0


def main(argv: list[str] | None = None) -> int:
    args = arguments("slurm.doctor", __doc__).parse_args(argv)
    return ended(lambda: doctor(args), args.run)


def doctor(args: argparse.Namespace) -> int:
    """0 where nothing is wrong, else 2."""
    profile, config = load_profile(args.cluster), config_of(args.run, args.config, args.overrides)
    console, wrong = Console(), 0
    for finding in findings(profile, config, args.run):
        wrong += finding.state == "wrong"
        colour = {"ok": "green", "unchecked": "yellow", "wrong": "bold red"}[finding.state]
        console.print(
            Text.assemble((f"{finding.state:10}", colour), f"{finding.about}: {finding.says}"),
            soft_wrap=True,
        )
    if wrong:
        print(
            f"error: {wrong} problem{'s' if wrong > 1 else ''} to fix before make submit-all"
            f" CLUSTER={shlex.quote(args.cluster)}",
            file=sys.stderr,
        )
    else:
        print(
            f"nothing to fix; next: make submit-all CLUSTER={shlex.quote(args.cluster)}, with the"
            " same CONFIG and RUN"
        )
    return 2 if wrong else 0


def findings(profile: Profile, config: Config, path: str) -> Iterator[Finding]:
    """Every check in the order in which a submission would meet it; one that breaks is itself a
    finding.
    """
    run = RunDir(path, config)
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("run directory", lambda: check_run(path, config)),
        ("images", lambda: check_all_images(profile)),
        ("models and data", lambda: check_fetched(profile, config, run)),
        ("Slurm", lambda: check_slurm(profile, config)),
        ("limits", lambda: check_limits(profile, config)),
        ("accounting", lambda: check_accounting(profile)),
        ("queue", lambda: check_queue(run)),
        ("node", lambda: ask_node(profile)),
        ("GPUs", lambda: check_gpus(profile)),
        ("disk", lambda: check_disk(config, run)),
        ("driver", lambda: check_driver(profile)),
    ]
    for about, check in checks:
        try:
            yield from check()
        except UserError as error:
            yield Finding("wrong", about, str(error))


def check_run(path: str, config: Config) -> Iterator[Finding]:
    """Whose it is, whether its config is this one, and whether jobs could write there."""
    run = own_run(path, config)
    place = existing(run.path)
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"you may not write in {place}; use a RUN where you can")
    yield Finding("ok", "run directory", f"{run.path} is or can be yours")


def check_all_images(profile: Profile) -> Iterator[Finding]:
    box = profile.container
    if box is None:
        yield Finding(
            "unchecked",
            "images",
            "the profile names none, so jobs run this checkout's environment, which every node"
            " must see",
        )
        return
    for warning in check_images(profile):
        yield Finding("unchecked", "images", warning)
    if shutil.which(box.command) is None and not profile.modules:
        yield Finding(
            "unchecked",
            "images",
            f"{box.command} is not on PATH here; where nodes get it from a module, name it under"
            " modules in the profile",
        )
    yield Finding("ok", "images", ", ".join(path.name for path in images_of(profile)))


def check_fetched(profile: Profile, config: Config, run: RunDir) -> Iterator[Finding]:
    """Fetched already, or could be: a network where the profile wants one, and a token where a
    model is gated.
    """
    if run.done("fetch", hashes=False):
        check_card(config, run)
        yield Finding("ok", "models and data", "fetched")
        return
    if profile.fetch == "by-hand":
        yield Finding(
            "wrong",
            "models and data",
            "not fetched, and the profile says by-hand; make fetch says what to bring",
        )
        return
    check_named(config)
    networked = None
    for model in config.models:
        if model.folder() is not None or model.model.startswith("embedded:"):
            continue
        gate = gated(model.model)
        networked = gate is not None
        if (
            gate
            and not (os.environ.get("HF_TOKEN") if profile.fetch == "login" else None)
            and not token_file().exists()
        ):
            how = (
                f"set HF_TOKEN for make fetch, or put the token into {token_file()}"
                if profile.fetch == "login"
                else f"put it into {token_file()}"
            )
            raise UserError(
                f"{model.model} is gated and there is no token; accept its licence on the hub, then"
                f" {how}"
            )
    if networked is False:
        if profile.fetch == "login":
            raise UserError(
                "the hub cannot be reached from here; fetch elsewhere (fetch: job or by-hand in the"
                " profile), or set HTTPS_PROXY or HF_ENDPOINT"
            )
        where = resources(profile, "fetch").partition or "the default partition"
        yield Finding(
            "unchecked",
            "network",
            f"the hub cannot be reached from here; whether nodes of {where} reach it shows when"
            " fetch runs",
        )
    if profile.fetch == "job":
        yield Finding(
            "ok",
            "models and data",
            "will be fetched by a job; the rest of the nodes need no network",
        )
    else:
        yield Finding(
            "wrong",
            "models and data",
            "not fetched yet; run make fetch here with the same CLUSTER, CONFIG and RUN",
        )


def gated(model: str) -> bool | None:
    """Whether the hub gates a model; None where the hub does not answer."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        with urllib.request.urlopen(f"{endpoint}/api/models/{model}", timeout=NETWORK_S) as answer:
            return bool(json.load(answer).get("gated"))
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)  # private to those with a token
    except (OSError, ValueError):
        return None


def check_disk(config: Config, run: RunDir) -> Iterator[Finding]:
    """Room on the run's file system, and the caller's quota where `quota` tells, against what the
    run needs at most.
    """
    need, place = needed_bytes(config, run), existing(run.path)
    quota = quota_left(place)
    free = min(float(shutil.disk_usage(place).free), float("inf") if quota is None else quota)
    if quota is not None and quota <= 0:
        raise UserError(
            f"your quota on the file system of {place} is used up; free some room, or use a RUN on"
            " another"
        )
    if free < need:
        more = "use a RUN on a larger file system, or fewer ppo.seeds"
        raise UserError(
            f"{place} has {gigabytes(free)} left for you and the run may need {gigabytes(need)};"
            f" {more}"
        )
    yield Finding("ok", "disk", f"{gigabytes(free)} left for up to {gigabytes(need)}")
    if quota is None:
        yield Finding(
            "unchecked",
            "disk",
            "whether you have a quota there: `quota` does not tell; ask your site's own command",
        )


def quota_left(place: Path) -> float | None:
    """Bytes left to the caller on the file system of `place`, as `quota` tells; None where it
    tells nothing of it.
    """
    try:
        shown = subprocess.run(
            ["quota", "-w", "-p"], capture_output=True, text=True, timeout=NETWORK_S
        ).stdout
        source = (
            subprocess.run(
                ["df", "--output=source", str(place)],
                capture_output=True,
                text=True,
                timeout=NETWORK_S,
            )
            .stdout.splitlines()[-1]
            .strip()
        )
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return None
    for line in shown.splitlines():
        words = line.split()
        if len(words) >= 4 and words[0] == source and words[1].rstrip("*").isdigit():
            used, soft, hard = (int(word.rstrip("*")) * 1024 for word in words[1:4])
            limit = hard or soft
            return float(limit - used) if limit else None
    return None


def check_driver(profile: Profile) -> Iterator[Finding]:
    """The NVIDIA driver against torch's CUDA; login nodes seldom have one, and then a job says
    it.
    """
    want = MIN_DRIVER[cuda_generation()]
    try:
        shown = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=NETWORK_S,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        shown = ""
    found = re.match(r"(\d+)\.", shown)
    if found is None:
        yield Finding(
            "unchecked",
            "driver",
            f"no nvidia-smi here; GPU nodes need driver {want} or newer, which a job checks before"
            " it begins",
        )
    elif int(found.group(1)) < want:
        raise UserError(
            f"the NVIDIA driver here is {shown.split()[0]} and the image's torch needs {want} or"
            " newer; ask your site, or lock an older torch"
        )
    else:
        yield Finding("ok", "driver", f"{shown.split()[0]}, {want} or newer is needed")


def cuda_generation() -> str:
    """`13` from the CUDA wheels that the image's lock names."""
    names = re.findall(
        r"^(?:nvidia-cuda-runtime)(?:-cu(\d+))?==(\d+)\.",
        (ROOT / "requirements" / "cuda.lock").read_text(),
        re.MULTILINE,
    )
    return next((named or version for named, version in names), "13")


def existing(path: Path) -> Path:
    """The nearest folder upwards that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


if __name__ == "__main__":
    sys.exit(main())
