"""Checkpoints of a training run: one safetensors file a rank, complete only once a manifest names
them all.

    save(folder, 10, state, pieces, world=world, made_with=..., attempt=..., keep_last=1)
    loaded = load(folder, world=world, made_with=...)
    with loaded.tensors as tensors:
        tensors.read("policy.lm_head.weight/exp_avg", start=0, length=100)

What is kept are whole tensors, named by what they are and seen flat. A rank writes the pieces that
it holds, so another number of ranks, which needs other pieces, finds them whoever wrote them.

An attempt writes folders of its own (`step-00000010.<attempt>`), each rank its own file, and rank 0
publishes `manifest.json` last, with every file's size and SHA-256. A folder without a manifest,
with a file that does not match it, or made with another config or other inputs (`made_with`), is
never chosen. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sarm.config import UserError
from sarm.ppo.learner.distributed import World
from sarm.run import damage, file_sha256, fsync_dir, heed_umask, write_atomic

SCHEMA = 3
MANIFEST = "manifest.json"


class Piece(NamedTuple):
    """Elements `start`, `start + 1` ... of a tensor."""

    name: str
    start: int
    values: Tensor
    """(n,)."""


class Tensors:
    """A checkpoint's tensors; within `with`, read from the files piece by piece."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self._stack = ExitStack()
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}

    def __enter__(self) -> Tensors:
        for path in self.files:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            for key in file.keys():  # noqa: SIM118
                name, _, start = key.rpartition("@")
                part = file.get_slice(key)
                self._pieces.setdefault(name, []).append(
                    (int(start), int(start) + part.get_shape()[0], part)
                )
        for parts in self._pieces.values():
            parts.sort(key=lambda part: part[:2])
        return self

    def __exit__(self, *error: object) -> None:
        # Open files of a folder on NFS would keep it from being removed.
        self._pieces.clear()
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def names(self) -> list[str]:
        return list(self._pieces)

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        """(length,) elements from `start` on, all without `length`, on the CPU. Raises UserError
        where they are not there.
        """
        parts = self._pieces.get(name, [])
        stop = max((end for _, end, _ in parts), default=-1) if length is None else start + length
        found: list[Tensor] = []
        at = start
        for begin, end, part in parts:
            if begin <= at and (at < min(end, stop) or (at == stop and not found)):
                found.append(part[at - begin : min(end, stop) - begin])
                at = min(end, stop)
        if at != stop or not found:
            raise UserError(
                f"{self.files[0].parent} does not hold elements {at} to {stop} of {name}: another"
                " version wrote it; remove the folder"
            )
        return torch.cat(found) if len(found) > 1 else found[0]


class Loaded(NamedTuple):
    folder: Path
    step: int
    ranks: int
    """How many wrote it."""
    state: dict[str, Any]
    """What all ranks share, as `save` was given it."""
    tensors: Tensors


# --- folders
# ------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    step: int,
    state: dict[str, Any],
    pieces: Iterable[Piece],
    *,
    world: World,
    made_with: str,
    attempt: str,
    keep_last: int,
) -> Path:
    """Write and publish a checkpoint in a folder of its own, then remove what it makes superfluous;
    `attempt` is rank 0's. A collective, as `write`.
    """
    target = folder / f"step-{step:08d}.{world.broadcast_text(attempt)}"
    return write(target, step, state, pieces, world=world, made_with=made_with, keep_last=keep_last)


def write(
    target: Path,
    step: int,
    state: dict[str, Any],
    pieces: Iterable[Piece],
    *,
    world: World,
    made_with: str,
    keep_last: int | None = None,
) -> Path:
    """Write and publish a checkpoint in this folder; with `keep_last`, then `prune` those beside
    it. A collective.

    `state` (JSON) is rank 0's, `pieces` each rank's own. Raises OSError on every rank where one
    could not write.
    """
    entry, error = "", None
    try:
        entry = _write_rank(target, world.rank, pieces)
    except OSError as caught:
        error = caught
    entries = world.gather_texts(entry)
    if not all(entries):
        raise error or OSError(f"rank {entries.index('')} could not write its part of {target}")
    try:
        if world.rank == 0:
            _publish(target, step, state, entries, made_with)
            if keep_last is not None:
                prune(target.parent, keep_last)
    except OSError as caught:
        error = caught
    if world.any(error is not None):
        raise error or OSError(f"rank 0 could not publish {target}")
    return target


def load(folder: Path, *, world: World, made_with: str) -> Loaded | None:
    """The newest complete checkpoint, or None. A collective: rank 0 proposes, and the ranks share
    the files out to be verified.

    Called before anything is saved: what is unfinished is swept away. Raises UserError where all
    there is has another schema.
    """
    found: list[Path] = []
    foreign = False
    if world.rank == 0:
        sweep(folder)
        found = complete(folder, made_with)
        foreign = not found and any(_manifest(path) is None for path in folder.glob("step-*"))
    if world.any(foreign):
        raise UserError(
            f"the checkpoints in {folder} are of another version of this code; go on with that"
            " version, or remove the folder to begin anew"
        )
    proposals = iter([path.name for path in found])
    while name := world.broadcast_text(next(proposals, "")):
        path = folder / name
        manifest = _manifest(path)
        files = list(manifest["files"].items()) if manifest else []
        broken = any(
            damage(path / file, entry) is not None
            for file, entry in files[world.rank :: world.size]
        )
        if not world.any(broken or manifest is None):
            return opened(path)
    return None


def opened(path: Path) -> Loaded:
    """A published checkpoint, unverified. Raises UserError where it is of another schema."""
    manifest = _manifest(path)
    if manifest is None:
        raise UserError(f"{path} is no checkpoint of this version of the code")
    files = [path / name for name in manifest["files"]]
    return Loaded(path, manifest["step"], manifest["ranks"], manifest["state"], Tensors(files))


def complete(folder: Path, made_with: str) -> list[Path]:
    """The published checkpoints made with the same whose files are all there in full size, the
    newest first.
    """
    good = []
    for path in folder.glob("step-*"):
        manifest = _manifest(path)
        if manifest is None or manifest["made_with"] != made_with:
            continue
        if not any(
            damage(path / name, entry, hashes=False) for name, entry in manifest["files"].items()
        ):
            good.append((manifest["step"], path.name, path))
    return [path for _, _, path in sorted(good, reverse=True)]


def prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` published checkpoints. Unfinished ones are left:
    another attempt may be at work.
    """
    steps = {
        path: manifest["step"] for path in folder.glob("step-*") if (manifest := _manifest(path))
    }
    for path in sorted(steps, key=lambda path: (steps[path], path.name), reverse=True)[keep_last:]:
        # first, so that what is half removed counts as unfinished
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what earlier attempts left unfinished. One of them that still lives, on a lost node,
    fails at its next write.
    """
    for path in folder.glob("step-*"):
        if not _is_json(path / MANIFEST):
            shutil.rmtree(path, ignore_errors=True)


def _write_rank(target: Path, rank: int, pieces: Iterable[Piece]) -> str:
    """`bytes sha256` of this rank's file, once it is on the disk."""
    target.mkdir(parents=True, exist_ok=True)
    path = target / _rank_file(rank)
    # A copy each: optimizer states may be views of one buffer, which safetensors refuses.
    try:
        save_file(
            {
                f"{name}@{start}": values.detach().to("cpu", copy=True)
                for name, start, values in pieces
            },
            path,
        )
    except SafetensorError as error:  # a full disk, among others
        raise OSError(f"{path}: {error}") from error
    heed_umask(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return f"{path.stat().st_size} {file_sha256(path)}"


def _publish(
    target: Path, step: int, state: dict[str, Any], entries: list[str], made_with: str
) -> None:
    sizes_and_hashes = (entry.split() for entry in entries)
    files = {
        _rank_file(rank): {"bytes": int(size), "sha256": sha256}
        for rank, (size, sha256) in enumerate(sizes_and_hashes)
    }
    manifest = {
        "schema": SCHEMA,
        "step": step,
        "ranks": len(entries),
        "made_with": made_with,
        "files": files,
        "state": state,
    }
    fsync_dir(target)
    write_atomic(target / MANIFEST, json.dumps(manifest).encode())
    fsync_dir(target.parent)


def _manifest(path: Path) -> Any:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("schema") == SCHEMA else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return True


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
