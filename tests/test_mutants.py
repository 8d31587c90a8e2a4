"""The tool behind `make mutants`, apart from mutmut itself."""

from __future__ import annotations

from collections import Counter

import pytest

from sarm.config import ROOT
from tests import mutants
from tests.mutants import Survivor


@pytest.mark.parametrize("path", mutants.covered_files())
def test_every_covered_module_has_tests_to_be_tried_against(path: str) -> None:
    assert mutants.tests_of(path)


@pytest.mark.parametrize(
    ("path", "within"),
    [
        ("sarm/ppo/losses.py", "tests/ppo/test_losses.py"),
        ("sarm/run.py", "tests/test_run.py"),
        ("slurm/status.py", "tests/slurm/test_identity.py"),
        ("sarm/data/fields.py", "tests/data/test_formats.py"),  # which no test imports
    ],
)
def test_a_module_is_tried_against_the_tests_of_its_folder(path: str, within: str) -> None:
    tests = mutants.tests_of(path)
    assert within in tests and all((ROOT / test).is_file() for test in tests)
    assert {test.rpartition("/")[0] for test in tests} == {within.rpartition("/")[0]}


def test_listed_faults_are_of_lines_that_stand_and_have_a_reason() -> None:
    listed = mutants.listed()
    assert listed and all(listed.values())
    assert not [entry for entry in listed if not mutants.stands(entry)]
    gone = Survivor("sarm.ppo.losses.policy_loss", "held = a_line_that_is_not_there", "")
    assert not mutants.stands(gone)


def test_a_survivor_is_read_off_mutmuts_diff() -> None:
    shown = "# a: survived\n--- a.py\n+++ a.py\n@@ -1 +1 @@\n x\n-    a = 1\n+    a = 2\n"
    assert mutants.survivor("sarm.a.x_f__mutmut_3", shown) == ("sarm.a.f", "a = 1", "a = 2")
    assert mutants.survivor("sarm.a.xǁCǁg__mutmut_1", shown).function == "sarm.a.C.g"


def test_a_sample_holds_of_every_file_its_share_and_at_least_one() -> None:
    names = {"a": [f"a{i}" for i in range(90)], "b": [f"b{i}" for i in range(9)], "c": ["c0"]}
    drawn = mutants.sampled(names, 20, seed=3)
    assert [len(drawn[path]) for path in "abc"] == [18, 2, 1]
    assert drawn == mutants.sampled(names, 20, seed=3) != mutants.sampled(names, 20, seed=4)
    assert all(set(drawn[path]) <= set(names[path]) for path in names)


def test_the_kill_rate_has_wilsons_interval() -> None:
    told = mutants.row("a.py", Counter(killed=183, survived=5, **{"no tests": 2}))
    assert "96.3% (92.6% to 98.2%) of 190: 183 killed" in told  # by statsmodels
