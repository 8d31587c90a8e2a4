"""The product of few rows with a weight in fp8 on Hopper, in CUDA C++ (`fp8_wide.cu`).

Such a product is bound by reading the weight, but every tile of channels reads the rows too: 64
channels and 32 rows are as many bytes of rows as of weights. So there is one program for each
multiprocessor, all of them at once, each with as many channels as that gives it: 224 of an 8B
policy's gate and up. Tiles of weights come to shared memory as the 8 bits they have, several steps
ahead, and become bf16 in registers on their way to the tensor cores. Where a program would have
fewer than 48 channels, two share a tile of more, each half of k, and add up through each other's
shared memory. Every sum is taken in one order, so results are the same to the bit from run to run.

Compiled once for a tiling, by NVRTC through the cuda.bindings that torch's CUDA builds come with.

Notation: b rows, n output channels, k input channels.
"""

from __future__ import annotations

from ctypes import c_int, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sarm.llama.fp8 import Fp8

SOURCE = Path(__file__).with_name("fp8_wide.cu")
MOST_ROWS = 48
"""With 64 an 8B policy's layers took 4.5 ms, 3.6 by the other kernel; with 48 3.5 and 3.6."""
LEAST_CHANNELS = 48
"""Of a program. With 32 an 8B policy's `down` took 29 µs, in two parts of 64 it took 24."""
LEAST_BUSY = 0.75
"""Of the multiprocessors: a tiling that leaves more of them idle is none."""
MOST_SUMS = 256
"""Tiles of 16 channels and 8 rows whose sums all warps together keep: half of the registers."""
SHARED_BYTES = 227 * 1024
"""Of a program that has its multiprocessor alone."""
ARGUMENTS = (c_void_p,) * 4 + (c_int,) * 4


class Tiling(NamedTuple):
    """How the product is cut: what the source is compiled with."""

    row_tiles: int
    """Of 8 rows."""
    channel_tiles: int
    """Of 16 channels, for each warp."""
    channel_warps: int
    input_warps: int
    """Of a step, each has 64 inputs."""
    parts: int
    """Programs that share a tile, each a part of k."""
    stages: int
    """Steps whose bytes are in shared memory or on their way."""

    @property
    def channels(self) -> int:
        return 16 * self.channel_tiles * self.channel_warps

    @property
    def inputs(self) -> int:
        """Of a step."""
        return 64 * self.input_warps

    @property
    def shared_bytes(self) -> int:
        """For the stages, then for the sums of each of `input_warps`."""
        rows = 8 * self.row_tiles
        of_stage = (self.channels + 2 * rows) * self.inputs
        return max(self.stages * of_stage, self.input_warps * rows * (self.channels + 4) * 4)


@cache
def cut(b: int, n: int, k: int, multiprocessors: int) -> Tiling | None:
    """The tiling with most programs of those that run all at once, in one part if it is as good.
    None for widths that do not come out even.
    """
    best, most = None, LEAST_BUSY * multiprocessors
    for parts in (1, 2):
        widths = range(LEAST_CHANNELS, n + 1, 16)
        fitting = (c for c in widths if n % c == 0 and n // c * parts <= multiprocessors)
        channels = next(fitting, 0)
        tiling = _among_warps(b, channels, parts) if channels else None
        if tiling and k % (parts * tiling.inputs) == 0 and n // channels * parts > most:
            best, most = tiling, n // channels * parts
    return best


def _among_warps(b: int, channels: int, parts: int) -> Tiling | None:
    """A program's tile for at least eight warps, in as many stages as there is room for, up to
    six; with two, memory would wait for each step to end.
    """
    row_tiles = -(-b // 8)
    for channel_warps, input_warps in ((2, 4), (1, 8), (7, 2)):
        tiles, left = divmod(channels // 16, channel_warps)
        sums = row_tiles * tiles * channel_warps * input_warps
        if not left and sums <= MOST_SUMS:
            for stages in (6, 5, 4, 3):
                found = Tiling(row_tiles, tiles, channel_warps, input_warps, parts, stages)
                if found.shared_bytes <= SHARED_BYTES:
                    return found
    return None


def tiling_for(x: Tensor, weight: Fp8) -> Tiling | None:
    """None where the product is left to the other kernel, which takes everything: on another GPU
    than Hopper, without cuda.bindings, for more rows, and for rows or widths that do not come out
    even.
    """
    b, k = x.shape
    if not 0 < b <= MOST_ROWS or x.stride(0) % 8 or x.data_ptr() % 16:
        return None
    return cut(b, len(weight.values), k, multiprocessors(x.device))


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU that the kernel runs on, else 0."""
    try:
        import cuda.bindings.driver
        import cuda.bindings.nvrtc  # noqa: F401
    except ImportError:
        return 0
    of = torch.cuda.get_device_properties(device)
    return of.multi_processor_count if (of.major, of.minor) == (9, 0) else 0


def product(x: Tensor, weight: Fp8, tiling: Tiling) -> Tensor:
    """`fp8.product` of bf16 rows, on the current stream."""
    from cuda.bindings import driver

    (b, k), n = x.shape, len(weight.values)
    out = torch.empty(b, n, dtype=x.dtype, device=x.device)
    at = (t.data_ptr() for t in (x, weight.values, weight.scales, out))
    with torch.cuda.device(x.device):
        _checked(
            driver.cuLaunchKernel(
                _kernel(tiling, x.device),
                *(tiling.parts, n // tiling.channels, 1),
                *(32 * tiling.channel_warps * tiling.input_warps, 1, 1),
                tiling.shared_bytes,
                torch.cuda.current_stream().cuda_stream,
                ((*at, b, n, k, x.stride(0)), ARGUMENTS),
                0,
            )
        )
    return out


@cache
def _kernel(tiling: Tiling, device: torch.device) -> Any:
    """In the current context, which is of `device`."""
    from cuda.bindings import driver

    module = _checked(driver.cuModuleLoadData(_compiled(tiling)))
    kernel = _checked(driver.cuModuleGetFunction(module, b"wide"))
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(kernel, most, tiling.shared_bytes))
    return kernel


@cache
def _compiled(tiling: Tiling) -> bytes:
    from cuda.bindings import nvrtc

    defined = [f"-D{name.upper()}={value}" for name, value in tiling._asdict().items()]
    options = [option.encode() for option in ("-arch=sm_90", "-std=c++17", *defined)]
    program = _checked(
        nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), SOURCE.name.encode(), 0, [], [])
    )
    try:
        _checked(nvrtc.nvrtcCompileProgram(program, len(options), options))
    except RuntimeError as error:
        log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(log.rstrip(b"\0").decode()) from error
    binary = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))  # written over it
    return binary


def _checked(returned: tuple[Any, ...]) -> Any:
    """What a call of cuda.bindings returns after its error code."""
    error, *found = returned
    if error:
        raise RuntimeError(f"CUDA: {error!r}")
    return found[0] if found else None
