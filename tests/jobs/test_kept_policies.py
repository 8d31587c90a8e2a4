"""What training keeps at KL distances is what evaluation finds and the report compares."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from jobs.__main__ import run_unit
from sarm.run import RunDir


def test_a_policy_kept_in_training_is_evaluated_and_one_not_reached_is_a_row(
    selected_run: RunDir, tmp_path: Path
) -> None:
    shutil.copytree(selected_run.path, tmp_path / "run")
    before = selected_run.config
    ppo = before.ppo.model_copy(update={"steps": 7, "kl_distances": (1e-4, 50.0)})
    run = RunDir.create(tmp_path / "run", before.model_copy(update={"ppo": ppo}))
    unit = "no_penalty-seed0"
    run_unit(run, "calibrate", "all")
    run_unit(run, "ppo", unit)
    for policy in ("base", unit):
        run_unit(run, "evaluate", policy)
    table = pd.read_parquet(run.read("evaluate", unit).path("generations.parquet"))
    base = pd.read_parquet(run.read("evaluate", "base").path("generations.parquet"))
    assert table["distance"].dropna().unique().tolist() == [1e-4]
    assert len(table) == 2 * len(base)
    run_unit(run, "report", "all")
    found = json.loads((run.path / "report.json").read_text())
    states = {(r["policy"], r["distance"]): r["state"] for r in found["distances"]}
    assert states[unit, 1e-4] == states[unit, None] == "evaluated"
    assert states[unit, 50.0] == "not reached"
    assert states["penalty-seed0", 1e-4] == "not trained"
    assert found["compared"]["distance"] == 1e-4
    (row,) = [p for p in found["policies"] if p["policy"] == unit]
    kept = table[table["distance"] == 1e-4]
    assert row["kl"] == pytest.approx(kept["kl"].mean())
