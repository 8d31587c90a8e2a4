"""The commands of README and docs are run, on a tiny run in place of the one they name: `make
test-docs`. What needs a GPU, a cluster, a network or an hour is looked over by
`tests/test_docs.py` instead.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.__main__ import run_unit
from sarm.config import ROOT
from sarm.run import RunDir
from tests.test_docs import COMMANDS, recipe
from tests.tiny import tiny_config

pytestmark = pytest.mark.docs
JOBS = ("encode", "steer", "cards", "report", "export")
"""What runs on the tiny run. Its SARM has no card, which check_sarm compares with."""


def job_lines() -> list[tuple[str, list[str]]]:
    """(documented command, arguments of `python -m jobs`) of those that can be run here."""
    found = []
    for _, command in COMMANDS:
        words = shlex.split(command)
        if words[0] not in ("make", "python"):
            continue
        for line in recipe(command) if words[0] == "make" else [command]:
            at = re.search(r"-m jobs (.*)", line)
            if at and shlex.split(at.group(1))[0] in JOBS:
                found.append((command, shlex.split(at.group(1))))
    return found


LINES = job_lines()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("docs")
    run = RunDir.create(folder / "run", tiny_config(folder))
    for phase in ("fetch", "encode", "probe", "select"):
        for unit in run.config.units(phase):  # type: ignore[arg-type]
            run_unit(run, phase, unit)
    return run


def ran(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_there_are_commands_of_several_phases():
    assert {arguments[0] for _, arguments in LINES} >= {"encode", "steer", "cards", "report"}


@pytest.mark.parametrize(("command", "arguments"), LINES, ids=[command for command, _ in LINES])
def test_a_documented_command_runs_and_says_what_came_of_it(tiny, command, arguments):
    mine = [
        str(tiny.path) if before == "--run" else word
        for before, word in zip(["", *arguments], arguments, strict=False)
    ]
    if "--config" in mine:
        at = mine.index("--config")
        mine[at : at + 2] = []
    done = ran(["jobs", *mine])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), f"{command} ends in silence"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["jobs", "export", "--run", "RUN"], "saelens"),
        (["slurm.status", "--run", "RUN"], "select"),
        (["sarm.ppo.learner.memory_plan", "--config", "configs/smollm2.yaml"], "GiB"),
    ],
)
def test_what_the_docs_name_in_passing_runs_too(tiny, arguments, said):
    done = ran([str(tiny.path) if word == "RUN" else word for word in arguments])
    assert done.returncode in (0, 1, 3) and said in done.stdout, done.stderr


def test_the_readme_says_how_long_the_demo_takes_and_what_it_cannot_say():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = readme[readme.index("`make demo` takes about") :].split("\n\n")[0]
    assert re.search(r"\d+ unsafe prompts|no verdict", told) and "ten minutes" in told
    assert Path(ROOT / "configs/smollm2-gpu.yaml").is_file()
