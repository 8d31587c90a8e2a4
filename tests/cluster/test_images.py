"""The images that are built say what they are, pass their own tests, and are named in manifests:
`pytest -m cluster tests/cluster/test_images.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from sarm.config import ROOT
from tests.cluster.test_cluster import STATE, ended, folder, inside, pytestmark  # noqa: F401

IMAGES = ROOT / "outputs/images"


@pytest.fixture(params=["light", "cpu", "gpu"])
def image(request: pytest.FixtureRequest) -> Path:
    path = IMAGES / f"sarm-{request.param}.sif"
    if inside("test", "-e", str(path), check=False).returncode:
        pytest.skip(f"no {request.param} image; make images KIND={request.param}")
    return path


def test_an_image_passes_its_own_test(image: Path) -> None:
    done = inside("apptainer", "test", str(image), check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_image_says_what_it_is(image: Path) -> None:
    labels = dict(
        re.findall(
            r"^(sarm\.[\w-]+): (.+)$",
            inside("apptainer", "inspect", str(image)).stdout,
            re.MULTILINE,
        )
    )
    assert labels["sarm.kind"] == image.stem.removeprefix("sarm-")
    assert re.fullmatch(r"[0-9a-f]{40}", labels["sarm.git-commit"])
    assert all(
        re.fullmatch(r"[0-9a-f]{64}", labels[name])
        for name in ("sarm.lock-sha256", "sarm.packages-sha256")
    )
    assert "bind the checkout" in inside("apptainer", "inspect", "--helpfile", str(image)).stdout
    packages = inside("apptainer", "exec", str(image), "cat", "/opt/sarm/packages.txt").stdout
    assert hashlib.sha256(packages.encode()).hexdigest() == labels["sarm.packages-sha256"]


def test_an_image_runs_a_phase_when_run(image: Path) -> None:
    shown = inside(
        "apptainer",
        "run",
        "--no-home",
        "--bind",
        str(ROOT),
        "--pwd",
        str(ROOT),
        str(image),
        "--help",
    ).stdout
    assert "python -m jobs" in shown


def test_a_manifest_names_the_image_its_job_ran_in(folder: Path) -> None:  # noqa: F811
    image = IMAGES / "sarm-light.sif"
    if inside("test", "-e", str(image), check=False).returncode:
        pytest.skip("no light image; make images KIND=light")
    inside("python", "-m", "slurm.sbatch", "--cluster", "development", "--out", f"{folder}/sbatch")
    run = folder / "run"
    job = inside(
        "sbatch",
        "--parsable",
        f"--export=ALL,CONFIG=configs/tiny.yaml,RUN={run}",
        f"--output={folder}/log",
        f"{folder}/sbatch/report.sbatch",
    ).stdout.strip()
    assert ended(job) == ["COMPLETED"], (folder / "log").read_text()
    manifest = json.loads((run / "report/all/manifest.json").read_text())
    assert manifest["image_sha256"] == inside("sha256sum", str(image)).stdout.split()[0]
    assert manifest["job_id"] == job and re.match(r"[0-9a-f]{40}", manifest["git_commit"])
