"""Runs side by side: their figures as their reports have them; runs that are about different
things are refused.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from jobs.__main__ import main as jobs_main
from reports import evidence
from reports.compare import main
from sarm.config import parse_config
from sarm.run import RunDir
from tests import runs
from tests.reports.test_report_page import Outline, visible
from tests.runs import evaluated_run, generations, publish_evaluation


@pytest.fixture(scope="module", autouse=True)
def calibrated():
    """An instrument that works, as a calibration would have found it."""
    found = evidence.instrument
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            evidence, "instrument", lambda *args: found(*args)._replace(**runs.CALIBRATED)
        )
        yield


@pytest.fixture(scope="module")
def whole(calibrated, tmp_path_factory):
    """A finished run with its report; read only."""
    return reported(tmp_path_factory.mktemp("whole") / "run")


def linked(run: Path, path: Path) -> Path:
    """A copy by hard links: its policy, of thirty gigabytes, is one only by its size."""
    return shutil.copytree(run, path, symlinks=True, copy_function=os.link)


@pytest.fixture
def one(whole, tmp_path):
    return linked(whole, tmp_path / "one")


def reported(path: Path, changes: dict | None = None, monkeypatch=None, **more) -> Path:
    """A finished run with its report; `changes` are dotted keys of the config."""
    if changes:
        reference = runs.reference_config

        def changed(**ppo):
            tree = reference(**ppo).model_dump(mode="json")
            for dotted, value in changes.items():
                *parents, leaf = dotted.split(".")
                section = tree
                for key in parents:
                    section = section[key]
                section[leaf] = value
            return parse_config(tree, "test")

        with monkeypatch.context() as patched:
            patched.setattr(runs, "reference_config", changed)
            run = evaluated_run(path, **more)
    else:
        run = evaluated_run(path, **more)
    assert jobs_main(["report", "--run", str(run.path)]) == 0
    return run.path


def test_figures_are_those_of_the_reports(one, tmp_path, capsys, monkeypatch):
    two = reported(
        tmp_path / "two", {"ppo.learning_rate": 0.5}, monkeypatch, penalty={"monitors": 0.45}
    )
    capsys.readouterr()
    assert main([str(one), str(two), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "compare.txt").read_text()
    assert capsys.readouterr().out.startswith(text)
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    assert "- one: control. Fell: penalised" in words and "- two: evasion. Fell:" in words
    assert re.search(r"ppo\.learning_rate +null +0\.5", text)
    change = next(
        c
        for c in json.loads((two / "report.json").read_text())["verdict"]["changes"]
        if (c["measure"], c["arm"]) == ("monitors_fired", "penalty")
    )
    shown = re.escape(f"{100 * change['change']:+.1f}")
    assert re.search(rf"^two +120 +45\.1 +45\.1 +{shown} ", text, re.MULTILINE)
    page = (tmp_path / "out" / "compare.html").read_text()
    assert Outline(page).open == [] and "evasion" in visible(page)


def test_different_penalised_latents_are_pointed_out(one, tmp_path, capsys):
    found = runs.features(
        penalised=[{"latent": i, "tau": 2.0, "alpha": 0.1} for i in runs.HARMING[:3]]
    )
    alike, out = linked(one, tmp_path / "alike"), str(tmp_path / "out")
    assert main([str(one), str(alike), "--out", out]) == 0
    assert "its own measure" not in capsys.readouterr().out
    other = evaluated_run(tmp_path / "c", features=found)
    runs.publish_ppo(
        other, "penalty-seed0", runs.metrics(runs.PROGRESSION), penalised=found.tree()["penalised"]
    )
    assert jobs_main(["report", "--run", str(other.path)]) == 0
    assert main([str(one), str(other.path), "--out", out]) == 0
    assert "its own measure" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        (
            "sarm.model",
            "another/SARM",
            "reward model: model Schrieffer/Llama-SARM-4B and another/SARM",
        ),
        ("data.salt", "other", "data split: salt sarm and other"),
        ("verdict.delta", 0.2, "verdict rules: delta 0.1 and 0.2"),
        ("evaluate.max_new_tokens", 7, "evaluation: max_new_tokens 128 and 7"),
        (
            "policy.model",
            "another/policy",
            "policy: model meta-llama/Llama-3.1-8B-Instruct and another/policy",
        ),
    ],
)
def test_runs_about_different_things_are_refused_by_name(
    one, tmp_path, capsys, monkeypatch, key, value, named
):
    two = reported(tmp_path / "two", {key: value}, monkeypatch)
    capsys.readouterr()
    assert main([str(one), str(two), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and f"one and two differ in {named}" in said.err
    assert not (tmp_path / "out").exists()


def test_the_same_names_with_other_files_are_refused(tmp_path, capsys):
    paths = []
    for name, digest in (("one", "aa"), ("two", "bb")):
        run = evaluated_run(tmp_path / name)
        runs.publish(run, "fetch", files={"models.json": runs.fetched(digest)})
        assert jobs_main(["report", "--run", str(run.path)]) == 0
        paths.append(str(run.path))
    capsys.readouterr()
    assert main([*paths, "--out", str(tmp_path / "out")]) == 2
    assert "reward model's files: model.safetensors aa and bb" in capsys.readouterr().err


def test_a_run_without_a_report_that_stands_is_refused_with_the_command(one, tmp_path, capsys):
    bare = evaluated_run(tmp_path / "bare").path
    assert main([str(one), str(bare)]) == 2
    assert f"make report RUN={bare}" in capsys.readouterr().err
    run = RunDir.open(one)
    publish_evaluation(run, "base", generations())  # newer than the report
    assert main([str(one), str(bare)]) == 2
    assert f"{one} has no report that stands" in capsys.readouterr().err
    assert main([str(one), str(one)]) == 2
    assert "name two or more" in capsys.readouterr().err
