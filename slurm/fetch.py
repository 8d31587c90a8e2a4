"""Fetch a run's models and data as the cluster's profile says: `python -m slurm.fetch --cluster C
--config K --run R`.

`login` downloads here, in the profile's image where it is built; `job` submits a job to the
networked partition; `by-hand` downloads nothing, says what to bring and where, and records it once
it is there. HF_TOKEN is read by this phase alone.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from sarm.cli import ended
from sarm.config import ROOT, Config, UserError
from sarm.data.sources import file_url, repository_folder
from sarm.run import RunDir, config_of
from slurm import submit
from slurm.checks import own_run, umask
from slurm.environment import isolated
from slurm.images import binds, caches, image_of, image_target, make_caches, read_image
from slurm.profile import Profile
from slurm.profile_file import load_profile
from slurm.script import python_command


def main(argv: list[str] | None = None) -> int:
    args = submit.arguments("slurm.fetch", __doc__).parse_args(argv)
    return ended(lambda: fetch(args), args.run)


def fetch(args: argparse.Namespace) -> int:
    """The exit code of the fetch, or of its submission."""
    profile, config = load_profile(args.cluster), config_of(args.run, args.config, args.overrides)
    if profile.fetch == "job":
        return submit.main(
            [
                "--cluster",
                args.cluster,
                *(["--config", args.config] if args.config else []),
                "--run",
                args.run,
                "--phase",
                "fetch",
                *args.overrides,
            ]
        )
    run = own_run(args.run, config)
    make_caches()
    python = python_here(profile, run)
    by_hand = profile.fetch == "by-hand"
    env = {
        **isolated(os.environ),
        **{name: str(path) for name, path in caches("fetch").items()},
        **identity(profile),
        **({"HF_HUB_OFFLINE": "1"} if by_hand else {}),
    }
    # downloads may be a group's to read, but nobody's to change
    with umask(0o022):
        RunDir.create(args.run, config)
        words = [*python, "-m", "jobs", "fetch", "--run", str(run.path)]
        code = subprocess.run(words, cwd=ROOT, env=env).returncode
    if code and by_hand:
        print(to_bring(config), file=sys.stderr)
    return code


def image_here(profile: Profile) -> Path | None:
    """The image that fetch runs in on this machine; None where there is none, or nothing to run it
    with.
    """
    box, image = profile.container, image_of(profile, "fetch")
    if box is None or image is None or not image.exists() or shutil.which(box.command) is None:
        return None
    return image


def identity(profile: Profile) -> dict[str, str]:
    """The variables by which the manifest records that image."""
    path = image_here(profile)
    if path is None:
        return {}
    image = read_image(path)
    return {"SARM_IMAGE_SHA256": image.sha256, "SARM_IMAGE_COMMIT": image.commit or "unknown"}


def python_here(profile: Profile, run: RunDir) -> list[str]:
    """The words that start Python on this machine: in the image where there is one, else this
    Python where it has what fetch needs.
    """
    box, image = profile.container, image_of(profile, "fetch")
    if (here := image_here(profile)) is not None:
        return shlex.split(
            python_command(profile, "fetch", here, binds(run, "fetch"), sys.executable)
        )
    if find_spec("huggingface_hub") and find_spec("pyarrow"):
        return [sys.executable]
    if box is None:
        missing = "nothing here that can fetch; make setup"
    elif image is not None and not image.exists():
        missing = f"no image {image}; {image_target(image)}, or make setup"
    else:
        missing = f"no {box.command} here to run the image; load its module, or make setup"
    raise UserError(f"there is {missing} for an environment that fetches without an image")


def to_bring(config: Config) -> str:
    """What a machine with a network has to download, and where it goes here."""
    hub = [
        f"hf download {m.model} --revision {m.revision}"
        for m in config.models
        if m.folder() is None and not m.model.startswith("embedded:")
    ]
    for source in config.data.sources.values():
        if source.repo:
            hub.append(
                f"hf download --repo-type dataset {source.repo} {' '.join(source.files)} --revision"
                f" {source.revision}"
            )
    other = [
        f"{source.path}  (data of {source.label})"
        for source in config.data.sources.values()
        if source.path and not (ROOT / source.path).exists()
    ]
    for source in config.data.sources.values():
        if source.url:
            lay = f"as {repository_folder(source)}/FILE (data of {source.label})"
            other += [f"{file_url(source, file)}  {lay}" for file in source.sha256]
    other += [
        f"{m.model}: make fetch there, then bring SARM_CACHE to {caches('fetch')['SARM_CACHE']}"
        for m in config.models
        if m.model.startswith("embedded:")
    ]
    return "\n".join(
        [
            "this profile fetches by hand; where there is a network, run",
            *(f"  HF_HUB_CACHE=hub {line}" for line in dict.fromkeys(hub)),
            f"bring the folder hub here as {caches('fetch')['HF_HUB_CACHE']}, and",
            *(f"  {line}" for line in dict.fromkeys(other)),
            "then run make fetch again, which verifies and records it",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
