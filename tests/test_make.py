"""Every make target ends in a line that says what came of it: its last command is one that says so,
or is followed by one that does.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from sarm.config import ROOT

ENDS = {
    r"echo ": "a line of the Makefile's own",
    r"\S*python\S* -m pytest ": "pytest's summary",
    r"\S*python\S* tests/mutants.py ": "its row of all modules: tests/test_mutants.py",
    r"\S*python\S* -m jobs ": "`PHASE/UNIT: done, in FOLDER`: tests/test_docs_run.py",
    r"\S*python\S* -m slurm\.(local|watch|status) ": "the report's path, or what helps",
    r"\S*python\S* -m slurm\.fetch ": "the job's own line",
    r"\S*python\S* -m slurm\.doctor ": "nothing to fix, or how many problems: test_doctor.py",
    r"\S*python\S* -m slurm\.submit ": "what was sent: test_submit.py",
    r"\S*python\S* -m slurm\.sbatch ": "how many files in which folder",
    r"\S*python\S* -m slurm\.lock ": "what was removed",
    r"\S*python\S* -m sarm\.ppo\.learner\.memory_plan ": "GPU-hours in all",
    r"\S*python\S* -m reports\.compare ": "the path of the page",
    r"\S*python\S* -m serving ": "the address, and at its end `stopped`",
    r"(tests/cluster/with-cluster|ACCOUNTING=1) .* -m pytest ": "pytest's summary",
    r"for kind in .* containers/build ": "the image's path and hash",
    r"data=.* -m jobs \$phase ": "the report's line",
}
"""By the beginning of a target's last command: the line that it ends in."""
INTERACTIVE = {"cluster-shell"}


def targets() -> list[str]:
    text = "".join((ROOT / f).read_text() for f in ("Makefile", "tests/cluster/cluster.mk"))
    named = re.findall(r"^([a-z][a-z-]*):.*## ", text, re.MULTILINE)
    phases = re.search(r"^PHASES := (.*)$", text, re.MULTILINE)
    assert phases
    return sorted({*named, *phases[1].split(), *(f"submit-{p}" for p in phases[1].split())})


@pytest.mark.parametrize("target", sorted(set(targets()) - INTERACTIVE))
def test_a_target_ends_in_a_line(target: str) -> None:
    words = [target, "RUN=outputs/x", "RUNS=outputs/x", "DATA=data", f"PYTHON={sys.executable}"]
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    commands = done.stdout.replace("\\\n", " ").strip().splitlines()
    assert any(re.match(start, commands[-1].strip()) for start in ENDS), commands[-1]


def test_every_way_to_end_is_one_that_a_target_takes() -> None:
    said = subprocess.run(
        ["make", "-n", *sorted(set(targets()) - INTERACTIVE), "RUN=x", "RUNS=x", "DATA=data"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.replace("\\\n", " ")
    for start in ENDS:
        assert re.search(rf"^\s*{start}", said, re.MULTILINE), start


def test_setup_speaks_only_where_it_was_asked_for() -> None:
    def said(target: str) -> str:
        words = ["make", "-n", target]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout

    assert "installed: " in said("setup") and "next: make demo" in said("setup")
    assert "next: make demo" not in said("demo")
