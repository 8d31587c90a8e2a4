"""The pages on adding a penalty, an intervention and a phase, followed to the letter in a copy of
the repository: their tests pass there, and fail before the first step.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sarm.config import ROOT

FENCE = r"\n```python\n(?P<code>.*?)```"
STEPS = re.compile(
    rf"In `(?P<into>[\w./]+)`, (?P<where>before|after) the line `(?P<line>[^\n]+)`:\n{FENCE}"
    rf"|[Nn]ew file `(?P<new>[\w./]+)`:\n{FENCE.replace('code', 'whole')}"
    r"|In `(?P<edited>[\w./]+)`, `(?P<old>[^`\n]+)` becomes `(?P<now>[^`\n]+)`",
    re.DOTALL,
)


def copy_of_the_repository(folder: Path) -> Path:
    copy = folder / "copy"
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors", "golden")
    for name in ("sarm", "jobs", "slurm", "reports", "tests", "configs", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    (copy / "data").mkdir()
    shutil.copytree(ROOT / "data" / "demo", copy / "data" / "demo")
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def follow(page: str, copy: Path) -> list[str]:
    """Do what a page says; the files that it made."""
    made = []
    steps = list(STEPS.finditer((ROOT / "docs" / page).read_text(encoding="utf-8")))
    for step in steps:
        if step["new"]:
            assert not (copy / step["new"]).exists()
            (copy / step["new"]).write_text(step["whole"], encoding="utf-8")
            made.append(step["new"])
            continue
        file = copy / (step["into"] or step["edited"])
        text = file.read_text(encoding="utf-8")
        if step["edited"]:
            assert step["old"] in text, f"{page}: {step['old']} is not in {file}"
            text = text.replace(step["old"], step["now"], 1)
        else:
            at = re.search(f"^{re.escape(step['line'])}.*\n", text, re.MULTILINE)
            assert at, f"{page}: no line of {file} begins with {step['line']}"
            place = at.start() if step["where"] == "before" else at.end()
            text = text[:place] + step["code"] + text[place:]
        file.write_text(text, encoding="utf-8")
    assert len(steps) >= 3, page
    return made


def run_in(copy: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "page",
    ["adding-an-intervention.md", pytest.param("adding-a-penalty.md", marks=pytest.mark.slow)],
)
def test_a_page_followed_to_the_letter_gives_what_its_test_says(page: str, tmp_path: Path) -> None:
    copy = copy_of_the_repository(tmp_path)
    tests = follow(page, copy)
    done = run_in(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    bare = copy_of_the_repository(tmp_path / "bare")
    for name in tests:
        shutil.copy(copy / name, bare / name)
    assert run_in(bare, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests).returncode != 0


@pytest.mark.slow
def test_a_phase_added_by_the_page_runs_is_skipped_and_is_redone(tmp_path: Path) -> None:
    copy = copy_of_the_repository(tmp_path)
    follow("adding-a-phase.md", copy)
    assert run_in(copy, "-m", "tests.tiny", "outputs/tiny").returncode == 0
    for phase in ("fetch", "encode", "lengths"):
        done = run_in(copy, "-m", "jobs", phase, "--config", "configs/tiny.yaml", "--run", "r")
        assert done.returncode == 0, done.stdout + done.stderr
    again = run_in(copy, "-m", "jobs", "lengths", "--run", "r")
    assert "lengths/all: already done, skipped" in again.stdout
    other = run_in(copy, "-m", "jobs", "lengths", "--run", "r", "ppo.penalty.alpha=0.25")
    assert "already done, skipped" in other.stdout, "it reads nothing of that"
    status = run_in(copy, "-m", "slurm.status", "--run", "r")
    assert re.search(r"^ ?lengths +.*done", status.stdout, re.MULTILINE), status.stdout
    assert '"chosen": ' in next((copy / "r/lengths/all").glob("lengths.*.json")).read_text()
