"""What of the weights and the optimizer's state each rank holds, by parameter: what a checkpoint
keeps, and how it is put back.

    pieces = engine_pieces(engine)      # on each rank its own; together everything
    restore_engine(engine, tensors)     # on any number of ranks

A checkpoint names `<parameter>/weight` and `<parameter>/<field of the optimizer's state>`, without
ZeRO's padding and order. ZeRO 1 and 2 lay parameters end to end and cut the whole in equal parts;
ZeRO 3 cuts every parameter by itself; without ZeRO every rank has all of it and writes a part.
Weights kept in halves with 8-bit moments (`compact`) and float32 masters are made into each other,
for a plan for more GPUs may want the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sarm.ppo.learner.checkpoint import Piece, Tensors
from sarm.ppo.learner.engine import Engine
from sarm.ppo.learner.optimizer import BLOCK, CompactAdamW, State, compacted, expanded


class Segment(NamedTuple):
    """Elements `start` to `start + length` of a parameter, which lie at `at` in the tensor that
    the optimizer steps; all flat.
    """

    parameter: str
    start: int
    length: int
    at: int


class Shard(NamedTuple):
    """A tensor that the optimizer steps, and what it is made of: all its parameters, of some of
    them perhaps nothing.
    """

    weight: Tensor
    segments: list[Segment]


def flat_segments(
    sizes: dict[str, int], offsets: list[int], first: int, length: int
) -> list[Segment]:
    """Of parameters that begin at `offsets` of one flat tensor, what lies in its elements from
    `first` on.
    """
    found = []
    for (name, size), offset in zip(sizes.items(), offsets, strict=True):
        start = min(max(first - offset, 0), size)
        stop = min(max(first + length - offset, 0), size)
        found.append(
            Segment(name, start, stop - start, offset + start - first if stop > start else 0)
        )
    return found


def cut_segments(sizes: dict[str, int], rank: int, ranks: int) -> list[Segment]:
    """Of parameters each padded to a multiple of `ranks` and cut in as many parts, end to end,
    those of one rank.
    """
    found, at = [], 0
    for name, size in sizes.items():
        start, stop = share(size, rank, ranks)
        found.append(Segment(name, start, stop - start, at))
        at += -(-size // ranks)
    return found


def share(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """(start, stop) of a rank's part of `size` elements; the last parts may be shorter or empty."""
    part = -(-size // ranks)
    return min(rank * part, size), min((rank + 1) * part, size)


def shards(engine: Engine) -> list[Shard]:
    """What this rank steps."""
    names = {
        parameter: name
        for name, parameter in engine.actor.named_parameters()
        if parameter.requires_grad
    }
    zero, rank, ranks = engine.optimizer, dist.get_rank(), dist.get_world_size()
    if engine.zero_stage == 0:
        return [Shard(p, [Segment(name, 0, p.numel(), 0)]) for p, name in names.items()]
    if engine.zero_stage == 3:
        groups = [{names[p]: p.ds_numel for p in group} for group in zero.fp16_groups]
        return [
            Shard(weight, cut_segments(sizes, rank, ranks))
            for weight, sizes in zip(zero.fp32_partitioned_groups_flat, groups, strict=True)
        ]
    if hasattr(zero, "bf16_groups"):  # stage 1 of a bf16 model has an optimizer of its own
        groups = [{names[p]: p.numel() for p in group} for group in zero.bf16_groups]
        offsets = [_ends(sizes) for sizes in groups]
        weights = zero.fp32_groups_flat_partition
    else:
        groups = [{names[p]: p.numel() for p in group} for group in zero.round_robin_bit16_groups]
        offsets = zero.round_robin_bit16_offsets
        weights = zero.single_partition_of_fp32_groups
    return [
        Shard(w, flat_segments(sizes, at, rank * len(w), len(w)))
        for w, sizes, at in zip(weights, groups, offsets, strict=True)
    ]


def _ends(sizes: dict[str, int]) -> list[int]:
    """Where each begins that lies right after the one before."""
    found = [0]
    for size in sizes.values():
        found.append(found[-1] + size)
    return found[:-1]


# --- to a checkpoint
# ------------------------------------------------------------------------------------------------


def engine_pieces(engine: Engine) -> Iterator[Piece]:
    """This rank's part of the weights as the optimizer steps them, and of the optimizer's state."""
    for weight, segments in shards(engine):
        state = {"weight": weight, **engine.basic_optimizer.state.get(weight, {})}
        for field, value in ((field, torch.as_tensor(value)) for field, value in state.items()):
            if engine.zero_stage == 0:
                start, stop = share(value.numel(), dist.get_rank(), dist.get_world_size())
                if start < stop or dist.get_rank() == 0:  # an empty tensor is a tensor too
                    yield Piece(
                        f"{segments[0].parameter}/{field}", start, value.flatten()[start:stop]
                    )
                continue
            for parameter, start, length, at in segments:
                # The count of steps, one for all, goes with a parameter's beginning.
                if value.ndim == 0 and start == 0 and length:
                    yield Piece(f"{parameter}/{field}", 0, value.reshape(1))
                elif value.ndim and length:
                    yield Piece(f"{parameter}/{field}", start, value[at : at + length])


# --- from a checkpoint
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def restore_engine(engine: Engine, tensors: Tensors) -> None:
    """Put `engine_pieces` back, whatever engine and number of ranks they come from. A
    collective.
    """
    fields: dict[str, list[str]] = {}
    for name in tensors.names():
        parameter, _, field = name.rpartition("/")
        fields.setdefault(parameter, []).append(field)
    for shard in shards(engine):
        kept = set(fields.get(shard.segments[0].parameter, ())) - {"weight"}
        restored = (
            _restored_compact if isinstance(engine.basic_optimizer, CompactAdamW) else _restored
        )
        state = restored(shard, tensors, kept)
        if kept:
            # Adam counts its steps on the CPU, but in its fused form where the weight lies.
            fused = any(group.get("fused") for group in engine.basic_optimizer.param_groups)
            state["step"] = tensors.read(f"{shard.segments[0].parameter}/step")[0].to(
                shard.weight.device if fused else "cpu", copy=True
            )
        engine.basic_optimizer.state[shard.weight] = state
    _spread_weights(engine)


def _restored(shard: Shard, tensors: Tensors, kept: set[str]) -> dict[str, Tensor]:
    """The weight's state but for its count of steps, the weight restored in place: both float32."""
    weight, segments = shard
    compact = "low" in kept
    state = {
        field: torch.zeros_like(weight)
        for field in (("exp_avg", "exp_avg_sq") if compact else sorted(kept - {"step"}))
    }
    whole = {"weight": weight, **state}
    for parameter, start, length, at in (segment for segment in segments if segment.length):
        if compact:
            parts = _expanded(tensors, parameter, start, length)
        else:
            parts = {field: tensors.read(f"{parameter}/{field}", start, length) for field in whole}
        for field, values in parts.items():
            whole[field].view(-1)[at : at + length] = values
    return state


def _restored_compact(shard: Shard, tensors: Tensors, kept: set[str]) -> dict[str, Tensor]:
    """The same of a weight kept in halves, which every rank has whole."""
    weight, parameter = shard.weight, shard.segments[0].parameter
    read = lambda field: tensors.read(f"{parameter}/{field}").to(weight.device)  # noqa: E731
    if not kept or "low" in kept:
        weight.copy_(read("weight").view_as(weight))
        return {field: read(field) for field in State._fields} if kept else {}
    upper, state = compacted(read("weight"), read("exp_avg"), read("exp_avg_sq"), weight.dtype)
    weight.copy_(upper.view_as(weight))
    return state._asdict()


def _expanded(tensors: Tensors, parameter: str, start: int, length: int) -> dict[str, Tensor]:
    """Elements of a parameter that was kept in halves: its float32 weight and moments."""
    first = start // BLOCK * BLOCK
    blocks = -(-(start + length) // BLOCK) - first // BLOCK
    element = lambda field: tensors.read(f"{parameter}/{field}", first, start + length - first)  # noqa: E731
    block = lambda field: tensors.read(f"{parameter}/{field}", first // BLOCK, blocks)  # noqa: E731
    weight = element("weight")
    low = element("low") if weight.dtype == torch.bfloat16 else torch.empty(0, dtype=torch.int16)
    found = expanded(
        weight,
        State(
            low,
            element("exp_avg_ratio"),
            block("exp_avg_scale"),
            element("exp_avg_sq"),
            block("exp_avg_sq_top"),
        ),
    )
    return {field: values[start - first :] for field, values in found._asdict().items()}


def _spread_weights(engine: Engine) -> None:
    """The model's weights from the stepped ones, as at the end of ZeRO's own step."""
    zero: Any = engine.optimizer
    if engine.zero_stage == 3:
        for stepped, flat, parameters in zip(
            zero.fp32_partitioned_groups_flat,
            zero.fp16_partitioned_groups_flat,
            zero.fp16_partitioned_groups,
            strict=True,
        ):
            flat.copy_(stepped)
            for parameter, part in zip(parameters, zero.unflatten(flat, parameters), strict=True):
                parameter.data = part.data
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    elif engine.zero_stage:
        partitions = (
            zero.bf16_partitioned_groups
            if hasattr(zero, "bf16_groups")
            else zero.parallel_partitioned_bit16_groups
        )
        for (stepped, _), parts in zip(shards(engine), partitions, strict=True):
            parts[dist.get_rank()].copy_(stepped)
            for rank, part in enumerate(parts):
                if len(parts) > 1:
                    dist.broadcast(part, rank)
