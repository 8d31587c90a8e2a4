"""The run beside an earlier report: latents by list, rank and role, training and steering."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from reports.blocks import Prose, Table
from reports.frames import read_run
from reports.seed import beside_seed, seed_figures
from sarm.config import ROOT
from sarm.records import SeedReport
from sarm.run import RunDir
from tests.runs import HARMING, evaluated_run

SHIPPED = ROOT / "configs" / "cards" / "seed-report.json"


def compared(tmp_path: Path, **changes: Any) -> dict[str, Any] | None:
    """The figures, under an earlier report that listed one of this run's harming latents."""
    run = evaluated_run(tmp_path / "run")
    tree = json.loads(SHIPPED.read_text()) | {"harming": [7, HARMING[1]]} | changes
    (tmp_path / "seed.json").write_text(json.dumps(tree))
    config = run.config.model_copy(update={"seed_report": str(tmp_path / "seed.json")})
    run = RunDir(run.path, config)
    probe = pd.DataFrame(
        {
            "latent": [3, 7, HARMING[1]],
            "role": ["promoting", "misleading", "harming"],
            "effect": [0.001, -0.004, 0.009],
            "confirmed": [False, True, False],
        }
    )
    frames = read_run(run)._replace(probe=probe)
    progression = [{"step": 10, "reward": 0.5, "penalty": 0.25, "loss": None}]
    return seed_figures(run, frames, progression)


def test_each_latent_has_its_place_there_and_here(tmp_path: Path) -> None:
    found = compared(tmp_path, promoting=[10**9])
    assert found is not None and found["problem"] is None
    absent, other, shared = found["latents"]
    assert (absent["latent"], absent["role"], absent["overall"]) == (10**9, None, None)
    assert (other["seed_role"], other["seed_rank"], other["list"]) == ("harming", 1, None)
    assert (other["role"], other["effect"], other["overall"]) == ("misleading", -0.004, 2)
    assert other["confirmed"] is True, "of the table, where it is not listed"
    assert (shared["seed_rank"], shared["list"], shared["rank"]) == (2, "harming", 2)
    run = RunDir.open(tmp_path / "run")
    listed = read_run(run).features
    assert listed is not None and shared["confirmed"] == listed.harming[1].confirmed


def test_training_and_steering_stand_side_by_side_where_both_have_them(tmp_path: Path) -> None:
    found = compared(tmp_path)
    said, latents, training, steering, *_ = beside_seed({"seed": found})
    assert isinstance(said, Prose) and "1 stand in the same list here" in said.text
    assert isinstance(latents, Table) and isinstance(training, Table)
    assert training.rows[0] == [10, "-0.102", "0.500", "0.000", "0.250", "0.033", "n/a"]
    assert training.rows[1] == [30, "-0.326", "n/a", "0.150", "n/a", "0.039", "n/a"]
    assert isinstance(steering, Table)
    assert [row[0] for row in steering.rows][:2] == ["RB2 Safety Chosen", "RB2 Safety Rejected"]
    assert steering.rows[1][1] == "-0.1065"


def test_an_earlier_report_that_cannot_be_read_costs_no_report(tmp_path: Path) -> None:
    found = compared(tmp_path, penalised="many")
    (said,) = beside_seed({"seed": found})
    assert isinstance(said, Prose) and "penalised" in said.text
    (said,) = beside_seed({"seed": None})
    assert isinstance(said, Prose) and "set seed_report" in said.text


def test_the_shipped_figures_are_whole() -> None:
    seed = SeedReport.read(SHIPPED)
    assert len(set(seed.promoting + seed.harming)) == 20
    assert seed.penalised == seed.harming[:3]
    # deltas are of unrounded numbers: within a unit of the last digit
    assert all(abs(row.after - row.before - row.delta) < 1.5e-4 for row in seed.steering)


def test_a_run_without_one_has_none(tmp_path: Path) -> None:
    run = evaluated_run(tmp_path / "run")
    frames = read_run(run)
    assert seed_figures(run, frames, []) is None
