"""The ranks of a training job: how they find each other, and the few things they tell each other.

`world = start_world()` reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun
and the Slurm launcher set them; without them it is a world of one, which needs no port or network.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sarm.config import UserError

TEXT_BYTES = 256


class Place(NamedTuple):
    """Where this process stands in its job."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int


def place(env: Mapping[str, str]) -> Place:
    """From torch's variables. Raises UserError where several ranks have no address or port to meet
    at.
    """
    rank, size = int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))
    local, address = int(env.get("LOCAL_RANK", "0")), env.get("MASTER_ADDR", "")
    port = int(env.get("MASTER_PORT", "0"))
    if size > 1 and not (address and port):
        raise UserError(
            f"rank {rank} of {size} does not know where to meet the others; set MASTER_ADDR and"
            " MASTER_PORT"
        )
    return Place(rank, size, local, address, port)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all ranks, a new tensor where `tensor` was; without
    torch.distributed, its copy.
    """
    total = tensor.detach().clone()
    if not (dist.is_available() and dist.is_initialized()):
        return total
    if dist.get_backend() == "nccl":  # which knows no CPU tensors
        total = total.cuda()
    dist.all_reduce(total)
    return total.to(tensor.device)


class World:
    """All ranks, and the device of this one. Each method is a collective: every rank must call
    it.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)

    def sum(self, tensor: Tensor) -> Tensor:
        """A new tensor, the sum over ranks, where `tensor` was."""
        total = tensor.detach().to(self.device, copy=True)
        if self.size > 1:
            dist.all_reduce(total)
        return total.to(tensor.device)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return bool(self.sum(torch.tensor(float(flag))) > 0)

    def gather(self, values: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
        """(B, ...): rank r's `values` (len(rows[r]), ...) put at `rows[r]`, which together are 0
        ... B-1.
        """
        total, most = sum(map(len, rows)), max(map(len, rows))
        whole = values.new_zeros(total, *values.shape[1:])
        if self.size == 1:
            whole[list(rows[0])] = values
            return whole
        padded = values.new_zeros(most, *values.shape[1:]).to(self.device)
        padded[: len(values)] = values.to(self.device)
        # NCCL knows no bool
        sent = padded.to(torch.uint8) if padded.dtype == torch.bool else padded
        parts = [torch.empty_like(sent) for _ in rows]
        dist.all_gather(parts, sent)
        for part, at in zip(parts, rows, strict=True):
            whole[list(at)] = part[: len(at)].to(whole)
        return whole

    def gather_texts(self, text: str) -> list[str]:
        """Every rank's text of at most 255 bytes, in order of rank."""
        sent = torch.zeros(1, TEXT_BYTES, dtype=torch.uint8)
        data = text.encode()
        if len(data) >= TEXT_BYTES:
            raise ValueError(f"{len(data)} bytes do not fit in {TEXT_BYTES}")
        sent[0, : len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        return [
            bytes(row.tolist()).rstrip(b"\0").decode()
            for row in self.gather(sent, [[rank] for rank in range(self.size)])
        ]

    def broadcast_text(self, text: str) -> str:
        """Rank 0's."""
        return self.gather_texts(text if self.rank == 0 else "")[0]

    def barrier(self) -> None:
        self.sum(torch.zeros(1))


def start_world() -> World:
    """Join the process group (NCCL with a GPU, gloo without) and tell DeepSpeed of it. Once a
    process.
    """
    # Before anything is allocated: segments that grow leave no gaps between phases of different
    # sizes.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # which DeepSpeed would find, with a warning
    import deepspeed

    here = place(os.environ)
    # srun may show each rank one GPU only
    index = here.local_rank % torch.cuda.device_count() if cuda else 0
    if cuda:
        torch.cuda.set_device(index)
    os.environ["LOCAL_RANK"] = str(index)  # the device that DeepSpeed takes
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if here.size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            store = dist.TCPStore(here.address, here.port, here.size, here.rank == 0)
            dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.size)
    # DeepSpeed would compile its shared-memory all-reduce for the CPU, which training does not use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        dist_init_required=False,
    )
    return World(here.rank, here.size, torch.device("cuda", index) if cuda else "cpu")
