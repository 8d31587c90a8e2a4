"""One undisturbed run of configs/tiny.yaml for a whole session of cluster tests."""

from __future__ import annotations

import subprocess
import sys

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
