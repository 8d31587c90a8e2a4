"""What a process was given, by Slurm, cgroups of both versions and affinity; what libraries make
of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sarm.config import ROOT
from sarm.threads import VARIABLES, bound_threads, given_cpus, quota_cpus, slurm_cpus


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({}, None),
        ({"SLURM_CPUS_PER_TASK": "6", "SLURM_CPUS_ON_NODE": "24"}, 6),
        ({"SLURM_CPUS_ON_NODE": "24", "SLURM_TASKS_PER_NODE": "4"}, 6),
        ({"SLURM_CPUS_ON_NODE": "24"}, 24),
        ({"SLURM_CPUS_ON_NODE": "9", "SLURM_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2"}, 3),
        ({"SLURM_CPUS_ON_NODE": "9", "SLURM_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "1"}, 2),
        (
            {
                "SLURM_CPUS_ON_NODE": "8",
                "SLURM_TASKS_PER_NODE": "8",
                "SLURM_STEP_TASKS_PER_NODE": "2",
            },
            4,
        ),
        ({"SLURM_CPUS_ON_NODE": "2", "SLURM_TASKS_PER_NODE": "5"}, 1),
    ],
)
def test_slurm_says_a_tasks_share(environ: dict[str, str], expected: int | None) -> None:
    assert slurm_cpus(environ) == expected


def cgroup(tmp_path: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        file = tmp_path / "fs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "own").write_text(own)
    return tmp_path / "fs", tmp_path / "own"


@pytest.mark.parametrize(
    "own, files, expected",
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
        # the least of all that lie above the process
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a\n", {"c/cpu.max": "100000 100000\n"}, None),
        (
            "5:memory:/m\n4:cpu,cpuacct:/slurm/7\n",
            {
                "cpu/slurm/7/cpu.cfs_quota_us": "400000\n",
                "cpu/slurm/7/cpu.cfs_period_us": "200000\n",
                "cpu/cpu.cfs_quota_us": "-1\n",
                "cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
    ],
)
def test_quotas_of_cgroups(tmp_path, own: str, files: dict[str, str], expected) -> None:
    assert quota_cpus(*cgroup(tmp_path, own, files)) == expected


def test_the_least_of_them_counts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(5)))
    free = cgroup(tmp_path / "free", "0::/\n", {"cpu.max": "max 100000\n"})
    tight = cgroup(tmp_path / "tight", "0::/\n", {"cpu.max": "250000 100000\n"})
    assert given_cpus({}, *free) == 5
    assert given_cpus({}, *tight) == 3
    assert given_cpus({"SLURM_CPUS_PER_TASK": "2"}, *tight) == 2
    assert given_cpus({"SLURM_CPUS_PER_TASK": "16"}, *free) == 5
    assert given_cpus({}, *free[:1], tmp_path / "no such file") == 5


@pytest.mark.parametrize("asked, expected", [("2", 2), ("3,1", 3), ("0", 7), ("many", 7)])
def test_a_users_own_word_is_kept(monkeypatch, asked: str, expected: int) -> None:
    monkeypatch.setattr("sarm.threads.given_cpus", lambda environ: 7)
    environ = {"OMP_NUM_THREADS": asked, "MKL_NUM_THREADS": "5"}
    assert bound_threads(environ) == expected
    assert environ["OMP_NUM_THREADS"] == asked and environ["MKL_NUM_THREADS"] == "5"
    assert environ["OPENBLAS_NUM_THREADS"] == str(expected) and set(environ) == set(VARIABLES)


def test_a_phase_computes_with_no_more_threads_than_its_task_has(tmp_path) -> None:
    """Through the entry of all phases, to what torch then uses."""
    code = """
import importlib, sys, types
import jobs.__main__ as entry
assert not {"numpy", "torch"} & set(sys.modules)
def run(*_):
    import torch
    print("threads", torch.get_num_threads())
entry.run_units = lambda args: run() or 0
entry.main(["report", "--run", sys.argv[1]])
"""
    env = {k: v for k, v in os.environ.items() if k not in VARIABLES and "SLURM" not in k}
    for slurm in ({}, {"SLURM_CPUS_PER_TASK": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            cwd=ROOT,
            env=env | slurm,
            capture_output=True,
            text=True,
        )
        expected = given_cpus(env | slurm)
        assert f"threads {expected}\n" in done.stdout, done.stdout + done.stderr
