"""What cluster tests share: an undisturbed run of configs/tiny.yaml, and one of the reference."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from sarm.config import ROOT
from tests.cluster.harness import RUNS, STATE, ClusterRun, inside


@pytest.fixture(scope="session")
def tiny_models() -> None:
    """The models that configs/tiny.yaml names, where the cluster's user can read them."""
    words = [sys.executable, "-m", "tests.tiny", "outputs/tiny"]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["chmod", "-R", "a+rX", ROOT / "outputs" / "tiny"], check=True)


@pytest.fixture(scope="session")
def no_runs() -> None:
    """An empty folder of runs on a cluster that is up."""
    if not (STATE / "pid").exists():
        pytest.skip("no cluster is up; make test-cluster")
    inside("rm", "-rf", str(RUNS))
    inside("mkdir", "-p", str(RUNS))


@pytest.fixture(scope="session")
def undisturbed(tiny_models: None, no_runs: None) -> ClusterRun:
    """The tiny configuration through `make submit-all`, every phase in its image, PPO on four
    ranks.
    """
    run = ClusterRun("undisturbed")
    run.submit()
    return run.wait()


@pytest.fixture(scope="session")
def reference_run(no_runs: None) -> Iterator[Any]:
    """The reference run in small, not begun, and its hub, which stays up until the last test."""
    from tests import reference
    from tests.cluster.reference_run import ReferenceRun
    from tests.fakes.hub import Hub

    with Hub() as hub:
        reference.publish(hub)
        yield ReferenceRun(hub, "reference")
