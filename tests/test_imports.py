"""Import rules that import-linter cannot see: what is really loaded, and that importing does
nothing.
"""

import subprocess
import sys

from sarm.config import ROOT

LIGHT = (
    "sarm.cli",
    "sarm.config",
    "sarm.records",
    "sarm.run",
    "sarm.threads",
    "sarm.data.datasets",
    "sarm.evaluation.verdict",
    "slurm.checks",
    "slurm.cost",
    "slurm.dag",
    "slurm.display",
    "slurm.doctor",
    "slurm.entry",
    "slurm.environment",
    "slurm.fetch",
    "slurm.images",
    "slurm.joblogs",
    "slurm.journal",
    "slurm.left",
    "slurm.local",
    "slurm.lock",
    "slurm.mps",
    "slurm.plan",
    "slurm.profile",
    "slurm.profile_file",
    "slurm.queue",
    "slurm.ranks",
    "slurm.sbatch",
    "slurm.script",
    "slurm.sending",
    "slurm.serve",
    "slurm.site_checks",
    "slurm.state",
    "slurm.status",
    "slurm.submit",
    "slurm.view",
    "slurm.watch",
    "slurm.words",
    "reports",
    "jobs.__main__",
    "serving.__main__",
    "serving.app",
    "serving.client",
    "serving.metrics",
    "serving.pool",
    "serving.protocol",
    "serving.worker",
)


def modules() -> list[str]:
    files = [
        path
        for folder in ("sarm", "jobs", "slurm", "reports", "serving")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in files
    ]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_a_login_node_needs_no_torch() -> None:
    """One process for all of them; what brings torch in is named."""
    code = f"""
import importlib, sys
heavy = {{'torch', 'transformers', 'deepspeed'}}
for name in {LIGHT!r}:
    importlib.import_module(name)
    assert not heavy & set(sys.modules), f'{{name}} imports {{sorted(heavy & set(sys.modules))}}'
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_the_lists_of_light_modules_are_whole() -> None:
    wanted = {m for m in modules() if m.startswith(("slurm.", "reports"))}
    assert wanted <= set(LIGHT) | {m for m in modules() if m.startswith("reports.")}


def test_importing_everything_prints_nothing_and_touches_no_gpu_or_network() -> None:
    code = f"""
import socket
def refuse(*args, **kwargs): raise AssertionError('network at import')
socket.socket.connect = refuse
import importlib
for name in {[m for m in modules() if not m.endswith("__main__")]!r}:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized()
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
