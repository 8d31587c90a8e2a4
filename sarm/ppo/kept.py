"""Policies kept on the way, at the distances of `ppo.kl_distances`: a folder a distance, of the
same files as the policy at the end, and kept.json, which says when each was reached.

An attempt writes each under a name of its own, whole or not at all. What a checkpoint knows of them
(`state`) lets the attempt that goes on from it link them into its own folder; those kept after that
checkpoint are kept again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sarm.config import UserError
from sarm.records import KeptPolicies, KeptPolicy
from sarm.run import Attempt, damage, fsync_dir

FOLDER = "kept"


class Kept:
    """The policies that an attempt has kept so far; `found` is the `state` of a checkpoint that it
    goes on from, whose policies lie in the unit's folder or are copied from another's.

    Raises UserError where a policy that the checkpoint names is not there as it was.
    """

    def __init__(
        self,
        attempt: Attempt,
        found: Sequence[dict[str, Any]] = (),
        copied_from: Path | None = None,
    ) -> None:
        self.attempt = attempt
        self.state: list[dict[str, Any]] = []
        """JSON."""
        for known in found:
            earlier = (copied_from or attempt.folder) / known["folder"]
            for name, size in known["bytes"].items():
                if problem := damage(earlier / name, {"bytes": size}, hashes=False):
                    raise UserError(
                        f"{earlier / name}, a policy kept at a KL distance, {problem}; remove the"
                        f" folder checkpoints in {attempt.folder} to train from the beginning"
                    )
            self._add(
                KeptPolicy(**known["entry"]), partial(copy_tree, earlier, link=copied_from is None)
            )

    def add(self, distance: float, *, step: int, kl: float, write: Callable[[Path], None]) -> None:
        """Keep what `write` puts into a folder. Raises OSError where it could not be written."""
        path = f"{FOLDER}/kl-{distance!r}"
        self._add(KeptPolicy(distance=distance, step=step, kl=kl, path=path), write)

    def _add(self, entry: KeptPolicy, write: Callable[[Path], None]) -> None:
        parent = self.attempt.directory(FOLDER)
        folder = parent / Path(entry.path).name
        unfinished = parent.with_name(f".{parent.name}.{folder.name}.tmp")
        unfinished.mkdir()
        write(unfinished)
        files = sorted(file for file in unfinished.rglob("*") if file.is_file())
        for file in files:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        sizes = {file.relative_to(unfinished).as_posix(): file.stat().st_size for file in files}
        fsync_dir(unfinished)
        unfinished.rename(folder)
        fsync_dir(parent)
        at = folder.relative_to(self.attempt.folder).as_posix()
        self.state.append({"entry": entry.tree(), "folder": at, "bytes": sizes})

    def publish(self) -> None:
        """Write kept.json."""
        entries: dict[str, Any] = {"kept": [KeptPolicy(**known["entry"]) for known in self.state]}
        KeptPolicies(**entries).write(self.attempt.path("kept.json"))


def copy_tree(source: Path, target: Path, *, link: bool) -> None:
    """The same files at another place; with `link` they share their disk where the file system
    can.
    """

    def link_or_copy(file: str, place: str) -> None:
        try:
            os.link(file, place)
        except OSError:
            shutil.copy2(file, place)

    how = link_or_copy if link else shutil.copy2
    shutil.copytree(source, target, copy_function=how, dirs_exist_ok=True)


def remove_others(unit: Path, attempt: str) -> None:
    """Remove what attempts other than the published one have kept in a unit's folder."""
    for folder in (*unit.glob(f"{FOLDER}.*/"), *unit.glob(f".{FOLDER}.*/")):
        if folder.name != f"{FOLDER}.{attempt}":
            shutil.rmtree(folder, ignore_errors=True)
