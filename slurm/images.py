"""The images that jobs run in: which, their SHA-256, the commit they were built from, and what is
bound into them.

`check_images(profile)` before a submission. Beside an image, containers/build leaves its hash and
its commit.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from sarm.config import PHASES, ROOT, Phase, UserError
from sarm.run import RunDir, file_sha256, git_commit
from slurm.profile import Profile


class Image(NamedTuple):
    path: Path
    sha256: str
    commit: str | None
    """The commit it was built from; None where nothing beside it says."""


def image_of(profile: Profile, phase: Phase) -> Path | None:
    """The image of a phase's jobs; None where they run the checkout's own environment.

    The file itself where the profile names a link to it: a later `make images` is not to change
    what pending jobs run.
    """
    box = profile.container
    if box is None:
        return None
    return (
        ROOT / (box.light_image if phase == "report" and box.light_image else box.image)
    ).resolve()


def images_of(profile: Profile) -> list[Path]:
    """Every image that a run's jobs need."""
    return list(
        dict.fromkeys(image for phase in PHASES if (image := image_of(profile, phase)) is not None)
    )


def check_images(profile: Profile) -> list[str]:
    """Warnings about images. Raises UserError naming `make images` where some are missing."""
    warnings = []
    if missing := [path for path in images_of(profile) if not path.exists()]:
        names, key = ", ".join(map(str, missing)), "image" if len(missing) == 1 else "images"
        raise UserError(
            f"no {key} {names}; build with {image_target(*missing)}, or correct container in the"
            " profile"
        )
    for path in images_of(profile):
        commit = built_from(path)
        if commit and commit != (git_commit() or "").rstrip("+"):
            warnings.append(
                f"image {path.name} is of commit {commit[:12]} ({contents(path)}), the checkout of"
                f" {(git_commit() or 'none')[:12]}; manifests record both"
            )
    return warnings


def image_target(*images: Path) -> str:
    """The command that builds images of these names."""
    kinds = dict.fromkeys(
        found[1] for image in images if (found := re.match(r"sarm-(gpu|cpu|light)\b", image.name))
    )
    named = " ".join(kinds)
    return (
        f'make images KIND="{named}"'
        if len(kinds) > 1
        else f"make images KIND={named}"
        if kinds
        else "make images"
    )


def read_image(path: Path) -> Image:
    """An image's identity, for manifests. Hashes it where no note does."""
    return Image(path, image_sha256(path), built_from(path))


def image_sha256(path: Path) -> str:
    """The SIF's hash, from the note beside it where that is no older than the image: hashing
    gigabytes takes a while.
    """
    note = path.with_name(path.name + ".sha256")
    if note.exists() and note.stat().st_mtime >= path.stat().st_mtime:
        return note.read_text().split()[0]
    return _hashed(path, path.stat().st_mtime_ns)


@functools.cache
def _hashed(path: Path, changed_ns: int) -> str:
    """Once for all the jobs of a submission."""
    return file_sha256(path)


def built_from(path: Path) -> str | None:
    """The commit in the note beside an image."""
    note = path.with_name(path.name + ".commit")
    return (note.read_text().strip() or None) if note.exists() else None


def contents(path: Path) -> str:
    """Whether `make images` of this checkout would build the very same image, by the hash in its
    name.
    """
    named = re.fullmatch(r"sarm-(gpu|cpu|light)-([0-9a-f]{12})\.sif", path.name)
    if named is None:
        return "its name does not say whether it holds what one of now would"
    done = subprocess.run(
        ["bash", str(ROOT / "containers" / "build"), "--key", named.group(1)],
        capture_output=True,
        text=True,
    )
    return (
        "same contents as now"
        if done.stdout.strip() == named.group(2)
        else "other contents than now: make images builds a new one"
    )


def binds(run: RunDir, phase: Phase) -> list[str]:
    """What an image must see at its own path: checkout, run, caches, and what the config names
    outside the checkout or by a link out of it.

    Only fetch may write to the caches.
    """
    mine = {
        ROOT: "",
        run.path: "",
        **dict.fromkeys(caches(phase).values(), "" if phase == "fetch" else ":ro"),
    }
    config = run.config
    named = [
        *(source.path for source in config.data.sources.values()),
        config.steer.file,
        config.check_sarm.card,
        config.seed_report,
        config.evaluate.refusal_labels,
        config.ppo.continue_from,
        *(model.model for model in config.models),
    ]
    there = [path for name in named if name and (path := ROOT / Path(name).expanduser()).exists()]
    theirs = dict.fromkeys(
        (way for path in there for way in (path, path.resolve()) if not way.is_relative_to(ROOT)),
        ":ro",
    )
    return [
        f"{path}:{path}{mode}" if mode else str(path) for path, mode in {**theirs, **mine}.items()
    ]


def make_caches() -> None:
    """Make the cache folders, which can only be bound where they exist."""
    for path in caches("fetch").values():
        path.mkdir(parents=True, exist_ok=True)


def caches(phase: Phase) -> dict[str, Path]:
    """Cache folders by the variable that names them. Jobs that compute see the hub's downloads,
    never its token.
    """
    home = Path.home()
    hub = Path(os.environ.get("HF_HOME") or home / ".cache" / "huggingface")
    downloads = {
        "SARM_CACHE": Path(os.environ.get("SARM_CACHE") or home / ".cache" / "sarm"),
        "HF_HUB_CACHE": Path(os.environ.get("HF_HUB_CACHE") or hub / "hub"),
    }
    return {"HF_HOME": hub, **downloads} if phase == "fetch" else downloads


def token_file() -> Path:
    """Where the hub's own tools keep its token, and where a fetch job finds it."""
    return caches("fetch")["HF_HOME"] / "token"
