"""NVIDIA's Multi-Process Service (MPS) for tasks that share a GPU on this machine, whose kernels
then run at once instead of in turns: `with served() as env: ...start tasks with env...`

The service ends with the block. `env` is empty where one runs already, which tasks then find by
themselves, and where none can be had, so that they take turns. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"
TIMEOUT_S = 60.0
"""For the service to answer, and for a first task to reach its GPU through it."""
PATIENCE_S = 10
"""How long the service waits for tasks that still use it before it ends them."""
USUAL_PIPES = Path("/tmp/nvidia-mps")
"""Where a service that an administrator started listens."""
TRIAL = """
import ctypes, sys
cuda, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
code = cuda.cuInit(0) or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
sys.exit(f"CUDA's error {code}" if code else 0)
"""
"""Ends well where CUDA can be used."""


@contextlib.contextmanager
def served(environ: Mapping[str, str] = os.environ) -> Iterator[dict[str, str]]:
    """What to add to the environment of tasks that are to share GPUs."""
    if not shutil.which(CONTROL) or runs(environ):
        yield {}
        return
    # a Unix socket's path holds no more than 107 bytes, which a run's folder may exceed
    with tempfile.TemporaryDirectory(prefix="mps-", ignore_cleanup_errors=True) as folder:
        own = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        try:
            said = start(environ, own)
            if said:
                print(f"no MPS, so tasks take turns on a GPU: {said}", file=sys.stderr)
            yield {} if said else own
        finally:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                called([CONTROL], {**environ, **own}, f"quit -t {PATIENCE_S}\n")


def runs(environ: Mapping[str, str]) -> bool:
    """Whether a service is there that tasks find by themselves, or tasks are told where to look."""
    return "CUDA_MPS_PIPE_DIRECTORY" in environ or (USUAL_PIPES / "control").exists()


def start(environ: Mapping[str, str], own: Mapping[str, str]) -> str:
    """Start the service and try it; what went wrong, empty where nothing did."""
    # A service that sees only some GPUs renumbers them, while tasks use this process's numbers: so
    # it sees all.
    shown = {name: value for name, value in environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        done = called([CONTROL, "-d"], {**shown, **own})
        if done.returncode == 0:
            done = called([sys.executable, "-c", TRIAL], {**environ, **own})
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
    return "" if done.returncode == 0 else said[-1]


def called(
    command: list[str], env: Mapping[str, str], heard: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=env, input=heard, capture_output=True, text=True, timeout=TIMEOUT_S
    )
