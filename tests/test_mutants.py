"""The tool behind `make mutants`, apart from mutmut itself."""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

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


def test_survivors_that_change_nothing_are_counted_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(old: str, new: str) -> str:
        return f"# a: survived\n--- a.py\n+++ a.py\n@@ -1 +1 @@\n-    {old}\n+    {new}\n"

    entry = next(iter(mutants.listed()))
    module, function = entry.function.rsplit(".", 1)
    told = {
        f"{module}.x_{function}__mutmut_1": ("survived", shown(entry.line, entry.becomes)),
        f"{module}.x_{function}__mutmut_2": ("survived", shown(entry.line, "a = 2")),
        f"{module}.x_{function}__mutmut_3": (
            "survived",
            shown('open(a, encoding="utf-8")', 'open(a, encoding="UTF-8")'),
        ),
        f"{module}.x_{function}__mutmut_4": ("no tests", shown("a = 1", "a = 3")),
        f"{module}.x_{function}__mutmut_5": ("killed", ""),
        f"{module}.x_{function}__mutmut_6": (
            "survived",
            shown('argsort(a, kind="stable")', 'argsort(a, kind="STABLE")'),
        ),
    }
    monkeypatch.setattr(mutants, "python", lambda *_: "noise\n" + json.dumps(told))
    found = mutants.told(tmp_path, "a.py", list(told), tmp_path)
    assert found.counts == {"listed": 3, "survived": 1, "no tests": 1, "killed": 1}
    assert [s.becomes for s in found.survivors] == ["a = 2", "a = 3"]


def test_a_sample_holds_of_every_file_its_share_and_at_least_one() -> None:
    names = {"a": [f"a{i}" for i in range(90)], "b": [f"b{i}" for i in range(9)], "c": ["c0"]}
    drawn = mutants.sampled(names, 20, seed=3)
    assert [len(drawn[path]) for path in "abc"] == [18, 2, 1]
    assert drawn == mutants.sampled(names, 20, seed=3) != mutants.sampled(names, 20, seed=4)
    assert all(set(drawn[path]) <= set(names[path]) for path in names)


def test_the_kill_rate_has_wilsons_interval() -> None:
    told = mutants.row("a.py", Counter(killed=183, survived=5, **{"no tests": 2}))
    assert "96.3% (92.6% to 98.2%) of 190: 183 killed" in told  # by statsmodels
    counts = Counter(killed=183, survived=5, listed=9, **{"no tests": 2, "not checked": 40})
    assert "96.3% (92.6% to 98.2%) of 190: 183 killed" in mutants.row("a.py", counts)
    assert mutants.row("a.py", Counter({"not checked": 3})).split() == ["a.py", "none", "tried"]


def test_a_file_that_cannot_be_tried_stops_no_other_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = []

    def generated(work: Path, path: str, mutmut: Path) -> list[str]:
        if path == "sarm/ppo/kl.py":
            raise mutants.NotTried("no such syntax")
        return [f"{path}{i}" for i in range(4)]

    def tried(
        folder: Path, path: str, names: Sequence[str], mutmut: Path, children: int
    ) -> mutants.Tried:
        begun.append((path, children))
        if path == "sarm/ppo/losses.py":
            raise mutants.NotTried("test_a fails without a fault")
        return mutants.Tried(path, Counter(killed=len(names)), [])

    monkeypatch.setattr(mutants, "generated", generated)
    monkeypatch.setattr(mutants, "tried", tried)
    costs = {"slurm/plan.py": 9, "sarm/ppo/losses.py": 5, "sarm/ppo/drift.py": 1}
    monkeypatch.setattr(mutants, "cost", lambda path, faults: costs[path] * faults)
    paths = ["sarm/ppo/kl.py", "sarm/ppo/drift.py", "sarm/ppo/losses.py", "slurm/plan.py"]
    monkeypatch.setattr(sys, "argv", ["mutants", "--mutmut", str(tmp_path), "--jobs", "1", *paths])
    assert mutants.main() == 1
    told = capsys.readouterr().out
    assert "error: sarm/ppo/kl.py could not be tried: no such syntax" in told
    assert "error: sarm/ppo/losses.py could not be tried: test_a fails without a fault" in told
    assert "of 8: 8 killed" in next(line for line in told.splitlines() if line[:4] == "all ")
    assert [path for path, _ in begun] == ["slurm/plan.py", "sarm/ppo/losses.py", paths[1]]
    monkeypatch.setattr(sys, "argv", [*sys.argv[:5], "sarm/ppo/drift.py", "slurm/plan.py"])
    assert mutants.main() == 0


def test_costly_files_come_first_and_have_their_share_of_the_processes() -> None:
    given = mutants.shares({"a": 10, "b": 700, "c": 290}, 8)
    assert list(given.items()) == [("b", 5), ("c", 2), ("a", 1)]
    few, many = (mutants.cost("sarm/ppo/kl.py", n) for n in (0, 30))
    tests = [ROOT / test for test in mutants.tests_of("sarm/ppo/kl.py")]
    assert ROOT / "tests/ppo/test_kl.py" in tests
    assert many == 4 * few == 40 * sum(test.stat().st_size for test in tests)


@pytest.mark.parametrize(("each", "meet"), [(2, True), (3, False)])
def test_no_more_processes_run_than_were_allowed(each: int, meet: bool) -> None:
    free, both = mutants.Processes(5), threading.Barrier(2)

    def work(path: str) -> bool:
        with free.taken(each):
            try:
                both.wait(10 if meet else 0.1)
            except threading.BrokenBarrierError:
                return False
            return True

    assert mutants.side_by_side(2, ["a", "b"], work) == ({"a": meet, "b": meet}, {})


def test_an_unpacked_archive_has_its_files_but_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, passed = ["sarm/a.py", "Makefile"], ["outputs/x", "sarm/__pycache__/a.pyc"]
    for name in kept + passed:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    assert sorted(mutants.files_of_checkout.__wrapped__()) == sorted(kept)


def test_a_survivor_meets_all_tests_of_the_files_that_reach_it(tmp_path: Path) -> None:
    """A fixture of a module calls the function in the first test alone."""
    tests = ["t/a.py::one", "t/a.py::two[x]", "t/ab.py::one", "t/c.py::one"]
    stats = {
        "tests_by_mangled_function_name": {"m.x_f": [tests[0]], "m.x_g": [tests[3]], "m.x_h": []},
        "duration_by_test": dict.fromkeys(tests, 0.5),
        "stats_time": 1.0,
    }
    file = tmp_path / "stats.json"
    file.write_text(json.dumps(stats))
    mutants.widen(file, ["m.x_f__mutmut_1", "m.x_f__mutmut_12", "m.x_h__mutmut_1"])
    found = json.loads(file.read_text())
    reached = {"m.x_f": tests[:2], "m.x_g": [tests[3]], "m.x_h": []}
    assert found == stats | {"tests_by_mangled_function_name": reached}


def test_what_was_killed_is_not_tried_again_and_what_survived_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = tmp_path / "mutants" / "a.py.meta"
    meta.parent.mkdir()
    codes = {"a.x_f__mutmut_1": 1, "a.x_f__mutmut_2": 0, "a.x_f__mutmut_3": None}
    meta.write_text(json.dumps({"exit_code_by_key": codes}))
    stats: dict[str, object] = {
        "tests_by_mangled_function_name": {"a.x_f": []},
        "duration_by_test": {},
    }
    (meta.parent / "mutmut-stats.json").write_text(json.dumps(stats))
    ran = []

    def python(folder: Path, mutmut: Path, *words: str) -> str:
        ran.append(words[1:])
        given = [word for word in words if "__mutmut_" in word]
        meta.write_text(json.dumps({"exit_code_by_key": codes | dict.fromkeys(given, 0)}))
        return "{}"

    monkeypatch.setattr(mutants, "python", python)
    mutants.tried(tmp_path, "a.py", list(codes), tmp_path, 3)
    run = ("run", "--max-children", "3")
    assert ran[0] == (*run, "a.x_f__mutmut_3")
    assert ran[1] == (*run, "a.x_f__mutmut_2", "a.x_f__mutmut_3") and len(ran) == 3


def test_functions_that_run_on_a_gpu_are_left_out() -> None:
    assert mutants.on_gpu("sarm.probing.permutation.x__counter_on_gpu__mutmut_7")
    assert not mutants.on_gpu("sarm.probing.permutation.x__counter_on_cpu__mutmut_7")
