"""Where a step's time goes: seconds by phase on the device's own clock, and how busy the GPU was.

clock = Clock(device) clock.mark("rollout"); ...; clock.mark("update"); ... clock.seconds()  #
{"rollout": ..., "update": ...}: every moment since the first mark belongs to a phase
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Clock:
    """Phases follow each other without a gap. On a GPU marks are events in its queue: none makes
    the host wait.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """`phase` begins; the one before it ends."""
        self.marks.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """By phase, up to now, in the order of their first marks. Waits for the device."""
        ends = [*(at for _, at in self.marks[1:]), self._now()]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = {}
        for (phase, start), end in zip(self.marks, ends, strict=True):
            found[phase] = found.get(phase, 0.0) + (
                start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
            )
        return found

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def read_later(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying to the CPU; the function returned waits for this copy, not for what was queued
    after it.
    """
    if tensor.device.type != "cuda":
        return lambda: tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor.detach(), non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def read() -> Tensor:
        copied.synchronize()
        return copy

    return read


class BusyGpu:
    """The share of time in which the GPU ran any kernel, by NVML, whose own samples cover a sixth
    of a second to a second.
    """

    PERIOD_S = 0.1

    def __init__(self, device: torch.device) -> None:
        self.read = _utilisation_reader(device) if device.type == "cuda" else None
        self.samples: list[int] = []
        if self.read is not None:
            threading.Thread(target=self._sample, daemon=True).start()

    def share(self) -> float | None:
        """The mean since the last call; None where there is no NVML."""
        samples, self.samples = self.samples, []
        return sum(samples) / len(samples) / 100 if samples else None

    def _sample(self) -> None:
        while self.read is not None:
            self.samples.append(self.read())
            time.sleep(self.PERIOD_S)


class _Utilisation(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


def _utilisation_reader(device: torch.device) -> Callable[[], int] | None:
    """A function that gives the device's utilisation in percent; None where NVML does not
    answer.
    """
    try:
        nvml, handle = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
            return None
    except (OSError, AttributeError):
        return None

    def read() -> int:
        rates = _Utilisation()
        nvml.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(rates))
        return int(rates.gpu)

    return read
