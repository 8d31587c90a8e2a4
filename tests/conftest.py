"""Fixtures every test may use: the tiny models, written once a session.

Imports no torch: a test file of light modules is collected in a second.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

from sarm.threads import VARIABLES

if "OMP_NUM_THREADS" not in os.environ:
    # Threads of models so small only wait for each other. Read when numpy or torch is imported.
    os.environ.update(dict.fromkeys(VARIABLES, "1"))
if not os.path.exists("/dev/nvidiactl"):
    # read when triton is imported, which torch may do: kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Read when hypothesis is imported, which then looks at the metadata of all that is installed.
os.environ.setdefault("HYPOTHESIS_NO_PLUGINS", "1")

import pytest

from sarm.config import ROOT, load_config
from sarm.run import RunDir
from tests.fakes.site import Site

# torch and transformers are a million objects: looked over as often as Python does by itself, they
# take a tenth of all tests' time.
gc.set_threshold(20_000, 20, 50)


def pytest_collection_finish() -> None:
    """What is imported by now stays, and is looked over no more."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """At its end Python lets go of what it knows of; else triton's bindings complain of leaks."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _nothing_flushed() -> Iterator[None]:
    """No test pulls a plug: what is published is not waited for until a disk has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny policy; read only."""
    from tests.tiny import write_tiny_policy

    return write_tiny_policy(tmp_path_factory.mktemp("models") / "policy")


@pytest.fixture(scope="session")
def tiny_sarm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny SARM in upstream's layout; read only."""
    from tests.tiny import write_tiny_sarm

    return write_tiny_sarm(tmp_path_factory.mktemp("models") / "sarm")


@pytest.fixture(scope="session")
def tiny_tokenizer():  # type: ignore[no-untyped-def]
    """The tokenizer of both tiny models."""
    from tests.tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real preference data, outside the repository; skips where absent."""
    folder = Path(os.environ.get("SARM_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set SARM_TEST_DATA")
    return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A pretended Slurm and a run whose models and data are fetched."""
    site = Site(tmp_path, monkeypatch)
    RunDir.create(site.path, load_config(site.config))
    site.do("fetch")
    return site


@pytest.fixture(scope="session")
def selected_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A tiny run with encode, probe and select done; read only."""
    from jobs.__main__ import run_unit
    from tests.tiny import tiny_config

    folder = tmp_path_factory.mktemp("selected")
    run = RunDir.create(folder / "run", tiny_config(folder))
    for phase in ("fetch", "encode", "probe", "select"):
        for unit in run.config.units(phase):  # type: ignore[arg-type]
            run_unit(run, phase, unit)
    return run
