"""Checkpoints of a training run: one safetensors file a rank, complete only once a manifest names them all.

    save(folder, 10, state, tensors, world=world, made_with=..., attempt=..., keep_last=1)
    loaded = load(folder, world=world, made_with=...)

An attempt writes folders of its own (`step-00000010.<attempt>`), each rank its own file, and rank 0 publishes
`manifest.json` last, with every file's size and SHA-256. A folder without a manifest, with a file that does not match
it, made with another config or other inputs (`made_with`), or by another number of ranks, is never chosen. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from sarm.config import UserError
from sarm.ppo.world import World
from sarm.run import damage, file_sha256, fsync_dir, write_atomic

SCHEMA = 1
MANIFEST = "manifest.json"


class Loaded(NamedTuple):
    folder: Path
    step: int
    state: dict[str, Any]
    """What all ranks share, as `save` was given it."""
    tensors: dict[str, Tensor]
    """This rank's, on the CPU."""


# --- folders ----------------------------------------------------------------------------------------------------------


def save(folder: Path, step: int, state: dict[str, Any], tensors: dict[str, Tensor], *, world: World, made_with: str, attempt: str, keep_last: int) -> Path:
    """Write and publish a checkpoint, then remove what it makes superfluous. A collective.

    `state` (JSON) and `attempt` are rank 0's. Raises OSError on every rank where one could not write.
    """
    target = folder / f"step-{step:08d}.{world.broadcast_text(attempt)}"
    entry, error = "", None
    try:
        entry = _write_rank(target, world.rank, tensors)
    except OSError as caught:
        error = caught
    entries = world.gather_texts(entry)
    if not all(entries):
        raise error or OSError(f"rank {entries.index('')} could not write its part of {target}")
    try:
        if world.rank == 0:
            _publish(target, step, state, entries, made_with)
            prune(folder, keep_last)
    except OSError as caught:
        error = caught
    if world.any(error is not None):
        raise error or OSError(f"rank 0 could not publish {target}")
    return target


def load(folder: Path, *, world: World, made_with: str) -> Loaded | None:
    """The newest complete checkpoint, or None. A collective: rank 0 proposes, and every rank verifies its own file.

    Called before anything is saved: what is unfinished is swept away.
    Raises UserError where all there is was written by another number of ranks.
    """
    found = []
    if world.rank == 0:
        sweep(folder)
        found = complete(folder, made_with)
    fitting = [path for path in found if _manifest(path)["ranks"] == world.size]
    if world.any(bool(found) and not fitting):
        ranks = f"{_manifest(found[0])['ranks']} ranks" if found else "another number of ranks"
        raise UserError(f"the checkpoints in {folder} were written by {ranks}, and this job has {world.size}; run with as many, or remove the folder")
    proposals = iter([path.name for path in fitting])
    while name := world.broadcast_text(next(proposals, "")):
        path = folder / name
        manifest = _manifest(path)
        file = _rank_file(world.rank)
        broken = manifest is None or damage(path / file, manifest["files"][file]) is not None
        if not world.any(broken):
            return Loaded(path, manifest["step"], manifest["state"], load_file(path / file))
    return None


def complete(folder: Path, made_with: str) -> list[Path]:
    """The published checkpoints made with the same whose files are all there in full size, the newest first."""
    good = []
    for path in folder.glob("step-*"):
        manifest = _manifest(path)
        if manifest is None or manifest["made_with"] != made_with:
            continue
        if not any(damage(path / name, entry, hashes=False) for name, entry in manifest["files"].items()):
            good.append((manifest["step"], path.name, path))
    return [path for _, _, path in sorted(good, reverse=True)]


def prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` published checkpoints. Unfinished ones are left: another attempt may be at work."""
    steps = {path: manifest["step"] for path in folder.glob("step-*") if (manifest := _manifest(path))}
    for path in sorted(steps, key=lambda path: (steps[path], path.name), reverse=True)[keep_last:]:
        (path / MANIFEST).unlink(missing_ok=True)  # first, so that what is half removed counts as unfinished
        shutil.rmtree(path, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what earlier attempts left unfinished. One of them that still lives, on a lost node, fails at its next write."""
    for path in folder.glob("step-*"):
        if _manifest(path) is None:
            shutil.rmtree(path, ignore_errors=True)


def _write_rank(target: Path, rank: int, tensors: dict[str, Tensor]) -> str:
    """`bytes sha256` of this rank's file, once it is on the disk."""
    target.mkdir(parents=True, exist_ok=True)
    path = target / _rank_file(rank)
    # A copy each: optimizer states may be views of one buffer, which safetensors refuses.
    save_file({name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}, path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return f"{path.stat().st_size} {file_sha256(path)}"


def _publish(target: Path, step: int, state: dict[str, Any], entries: list[str], made_with: str) -> None:
    sizes_and_hashes = (entry.split() for entry in entries)
    files = {_rank_file(rank): {"bytes": int(size), "sha256": sha256} for rank, (size, sha256) in enumerate(sizes_and_hashes)}
    manifest = {"schema": SCHEMA, "step": step, "ranks": len(entries), "made_with": made_with, "files": files, "state": state}
    fsync_dir(target)
    write_atomic(target / MANIFEST, json.dumps(manifest).encode())
    fsync_dir(target.parent)


def _manifest(path: Path) -> Any:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("schema") == SCHEMA else None


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


# --- what a DeepSpeed engine holds ------------------------------------------------------------------------------------


def engine_tensors(engine: Any) -> dict[str, Tensor]:
    """This rank's weights as the optimizer steps them, and the optimizer's state for them."""
    tensors: dict[str, Tensor] = {}
    for i, weight in enumerate(stepped_weights(engine)):
        tensors[f"weight.{i}"] = weight
        for name, value in engine.basic_optimizer.state.get(weight, {}).items():
            tensors[f"{name}.{i}"] = torch.as_tensor(value)
    return tensors


@torch.no_grad()
def restore_engine(engine: Any, tensors: dict[str, Tensor]) -> None:
    """Put `engine_tensors` back, and the model's weights in step with them. A collective."""
    # Adam counts its steps on the CPU, but in its fused form where the weight lies.
    fused = any(group.get("fused") for group in engine.basic_optimizer.param_groups)
    for i, weight in enumerate(stepped_weights(engine)):
        weight.copy_(tensors[f"weight.{i}"])
        state = {name.removesuffix(f".{i}"): value for name, value in tensors.items() if name.endswith(f".{i}") and name != f"weight.{i}"}
        engine.basic_optimizer.state[weight] = {name: value.to(weight.device if value.ndim or fused else "cpu", copy=True) for name, value in state.items()}
    _spread_weights(engine)


def stepped_weights(engine: Any) -> list[Tensor]:
    """The tensors the inner optimizer steps: the parameters themselves, or this rank's float32 partitions of them."""
    zero = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):  # ZeRO 3; 1 and 2; 1 in bf16
        if hasattr(zero, name):
            return list(getattr(zero, name))
    return [p for group in zero.param_groups for p in group["params"]]


def _spread_weights(engine: Any) -> None:
    """The model's weights from the stepped ones, as at the end of ZeRO's own step."""
    zero = engine.optimizer
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        for stepped, flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, zero.fp16_partitioned_groups, strict=True):
            flat.copy_(stepped)
            for parameter, part in zip(parameters, zero.unflatten(flat, parameters), strict=True):
                parameter.data = part.data
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        return
    partitions = getattr(zero, "parallel_partitioned_bit16_groups", None) or getattr(zero, "bf16_partitioned_groups", None)
    if partitions is None:
        return
    for stepped, parts in zip(stepped_weights(engine), partitions, strict=True):
        parts[dist.get_rank()].copy_(stepped)
        for rank, part in enumerate(parts):
            if len(parts) > 1:
                dist.broadcast(part, rank)
