"""A sweep: its units, its penalties against arithmetic by hand, its arrays, a whole tiny run, and
the front by brute force.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from jobs.__main__ import run_unit
from reports.pareto import front, rate_interval
from sarm.config import (
    Config,
    PenaltyConfig,
    SweepPoint,
    UserError,
    arm_and_seed,
    load_config,
    parse_config,
)
from sarm.evaluation.comparison import Grid
from sarm.probing.effects import read_encoded, values_on
from sarm.probing.taus import suggested_taus, swept
from sarm.records import Features, Readings
from sarm.run import RunDir
from slurm.dag import Node, tasks
from slurm.plan import plan, undone
from slurm.profile_file import load_profile
from tests.runs import features
from tests.slurm.test_submit import RAW
from tests.tiny import tiny_config

GRID = {"sweep": {"tau": [0.5, 1.0], "alpha": [0.1, 2.0], "seeds": [3]}}
UNITS = (
    "sweep-tau0.5-alpha0.1-seed3",
    "sweep-tau0.5-alpha2.0-seed3",
    "sweep-tau1.0-alpha0.1-seed3",
    "sweep-tau1.0-alpha2.0-seed3",
)


def swept_config(**more: Any) -> Config:
    return parse_config(json.loads(json.dumps({**RAW, **GRID, **more})), "test")


# Config


def test_units_of_a_grid() -> None:
    config = swept_config()
    assert tuple(config.sweep_points()) == UNITS and config.sweep_points()[UNITS[1]] == SweepPoint(
        0.5, False, 2.0
    )
    assert config.units("ppo")[-4:] == UNITS == config.units("evaluate")[-4:]
    assert arm_and_seed(UNITS[2]) == ("sweep-tau1.0-alpha0.1", 3)
    assert load_config("configs/smollm2.yaml").sweep_points() == {}


@pytest.mark.parametrize(
    "sweep",
    [
        {"tau": [1.0]},
        {"alpha": [1.0]},
        {"tau": [1.0], "tau_quantile": [0.5], "alpha": [1.0]},
        {"tau": [1.0, 1.0], "alpha": [1.0]},
        {"tau": [-1.0], "alpha": [1.0]},
    ],
)
def test_half_a_grid_is_refused(sweep: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="sweep"):
        swept_config(sweep=sweep)


def test_a_density_penalty_has_no_tau_to_sweep() -> None:
    with pytest.raises(UserError, match="density"):
        swept_config(ppo={"penalty": {"kind": "density"}})


# Thresholds


def test_suggested_taus_are_quantiles(selected_run: RunDir) -> None:
    encoded, features = (
        read_encoded(selected_run.read_shards("encode")),
        selected_run.read("select").json("features.json"),
    )
    latent = features["penalised"][0]["latent"]
    z = values_on(encoded, "discovery", "rejected", [latent])[:, 0]
    rows = {row["quantile"]: row for row in suggested_taus(encoded, [latent], [0.33])}
    assert sorted(rows) == [0.33, 0.5, 0.7, 0.8, 0.9, 0.95]
    for quantile, row in rows.items():
        assert row["tau"] == max(float(np.quantile(z, quantile)), 0.0) and row[
            "rate_rejected"
        ] == np.mean([v > row["tau"] for v in z])
    assert (
        rows[0.95]["rate_rejected"] <= 0.05 + 1 / len(z)
        and features["tau_suggestions"][0]["latent"] == latent
    )


def test_swept_penalty_by_hand() -> None:
    rates = {"rate_rejected": 0.1, "rate_chosen": None}
    found = features(
        reward_sd=0.5,
        penalised=[
            {"latent": 4, "tau": 3.0, "alpha": 0.1},
            {"latent": 7, "tau": 3.0, "alpha": 0.1},
        ],
        tau_suggestions=[
            {"latent": 4, "quantile": 0.9, "tau": 1.5, **rates},
            {"latent": 7, "quantile": 0.9, "tau": 0.25, **rates},
            {"latent": 4, "quantile": 0.5, "tau": 0.0, **rates},
        ],
    )
    reward, sd = PenaltyConfig(), PenaltyConfig(alpha_unit="reward_sd")
    assert [
        (p.latent, p.tau, p.alpha)
        for p in swept(found, SweepPoint(2.0, False, 0.4), reward).penalised
    ] == [(4, 2.0, 0.4), (7, 2.0, 0.4)]
    assert [
        (p.latent, p.tau, p.alpha) for p in swept(found, SweepPoint(0.9, True, 0.4), sd).penalised
    ] == [(4, 1.5, 0.2), (7, 0.25, 0.2)]
    assert found.penalised[0].tau == 3.0, "the given features stay as they are"
    with pytest.raises(UserError, match=r"latent 7 at quantile 0\.5"):
        swept(found, SweepPoint(0.5, True, 0.4), reward)


# Slurm


def test_a_sweep_is_an_array_and_each_point_is_evaluated_after_its_own_training() -> None:
    config, profile = swept_config(), load_profile("generic")
    batches = {
        batch.name: batch for batch in plan(config, profile, {task.node for task in tasks(config)})
    }
    assert (
        batches["ppo.sweep"].elements
        == tuple((unit,) for unit in UNITS)
        == batches["evaluate.sweep"].elements
    )
    assert (batches["ppo.sweep"].needs, batches["ppo.sweep"].when) == (("calibrate",), "afterok")
    assert (batches["evaluate.sweep"].needs, batches["evaluate.sweep"].when) == (
        ("ppo.sweep",),
        "aftercorr",
    )
    assert {"ppo.sweep", "evaluate.sweep"} <= set(batches["report"].needs) and batches[
        "report"
    ].when == "afterany"
    assert all(
        batch.when != "aftercorr" for name, batch in batches.items() if name != "evaluate.sweep"
    )


def test_what_is_trained_already_is_evaluated_at_once() -> None:
    config, profile = swept_config(), load_profile("generic")
    redo = {Node("ppo", UNITS[0]), Node("ppo", UNITS[2]), Node("evaluate", UNITS[1])}
    todo = undone(config, lambda node: node not in redo)
    batches = {batch.name: batch for batch in plan(config, profile, todo)}
    assert (
        batches["evaluate.sweep"].elements
        == ((UNITS[0],), (UNITS[2],))
        == batches["ppo.sweep"].elements
    )
    assert batches["evaluate.sweep"].when == "aftercorr"
    assert (
        batches["evaluate.swept"].elements == ((UNITS[1],),)
        and batches["evaluate.swept"].needs == ()
    )


def test_chunks_and_single_points_keep_to_their_own_training() -> None:
    config, profile = (
        swept_config(),
        load_profile("generic").model_copy(update={"max_array_size": 3}),
    )
    batches = {
        batch.name: batch for batch in plan(config, profile, {task.node for task in tasks(config)})
    }
    assert [len(batches[f"ppo.sweep.{n}"].elements) for n in (0, 1)] == [3, 1]
    assert (batches["evaluate.sweep.0"].needs, batches["evaluate.sweep.0"].when) == (
        ("ppo.sweep.0",),
        "aftercorr",
    )
    assert (batches["evaluate.sweep.1"].needs, batches["evaluate.sweep.1"].when) == (
        ("ppo.sweep.1",),
        "afterok",
    ), "one job is no array"


# The front


def test_front_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    costs = [tuple(row) for row in rng.integers(0, 4, (60, 3)).astype(float)]
    for cost, best in zip(costs, front(costs), strict=True):
        worse = [
            o
            for o in costs
            if o != cost and o[0] <= cost[0] and o[1] <= cost[1] and o[2] <= cost[2]
        ]
        assert best == (not worse)
    assert front([(math.nan, 0.0, 0.0), (1.0, 1.0, 1.0)]) == [False, True] and front([]) == []


def arm_grid(rates: list[list[float]], unsafe: list[bool]) -> Grid:
    values = {"penalised_fired": np.array(rates)}
    n, seeds = values["penalised_fired"].shape
    return Grid(np.arange(n).astype(str), np.arange(seeds), np.array(unsafe), values)


def test_the_rates_interval_by_hand() -> None:
    # Five unsafe prompts, one seed: rates less a half, and the two added prompts' three values.
    rates = [1.0, 0.0, 0.5, 1.0, 1.0]
    found = rate_interval(arm_grid([[r] for r in [*rates, 0.0, 0.0]], [True] * 5 + [False] * 2))
    centre = sum(r - 0.5 for r in rates) / 7
    squares = sum((r - 0.5 - centre) ** 2 for r in rates) + centre**2
    squares += 0.5 * (0.5 - centre) ** 2 + 0.5 * (0.5 + centre) ** 2
    half = scipy.stats.t.ppf(0.975, 6) * math.sqrt(squares / 6 / 7)
    assert found == pytest.approx((centre - half + 0.5, min(centre + half + 0.5, 1.0)), abs=1e-9)
    # A prompt that some seed has not is left out; equal rates have width; nothing is unknown.
    holes = rate_interval(arm_grid([[1.0, 1.0], [1.0, math.nan], [1.0, 1.0]], [True] * 3))
    assert holes == rate_interval(arm_grid([[1.0, 1.0], [1.0, 1.0]], [True] * 2))
    assert holes[0] < 0.9 and holes[1] == 1.0
    assert all(math.isnan(bound) for bound in rate_interval(None))


# A whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder: Path = tmp_path_factory.mktemp("sweep")
    small = {
        "ppo.arms": ["no_penalty"],
        "ppo.steps": 1,
        "evaluate.prompts": 4,
        "sweep.tau_quantile": [0.5, 0.9],
        "sweep.alpha": [0.5, 50.0],
    }
    run = RunDir.create(folder / "run", tiny_config(folder, **small))
    for task in tasks(run.config):
        run_unit(run, *task.node)
    return run


def test_a_point_trains_with_its_own_penalty(finished: RunDir) -> None:
    selected = Features.read(finished.read("select").path("features.json"))
    readings = Readings.read(finished.read("calibrate").path("readings.json"))
    features = readings.applied(selected).tree()
    for unit, point in finished.config.sweep_points().items():
        penalised = finished.read("ppo", unit).json("calibration.json")["penalised"]
        taus = {
            s["latent"]: s["tau"] for s in features["tau_suggestions"] if s["quantile"] == point.tau
        }
        assert [(p["latent"], p["tau"]) for p in penalised] == [
            (p["latent"], taus[p["latent"]]) for p in features["penalised"]
        ]
        assert all(
            p["alpha"] == pytest.approx(point.alpha * features["reward_sd"]) for p in penalised
        )


def test_the_report_shows_the_front_and_keeps_the_sweep_out_of_the_arms(finished: RunDir) -> None:
    found = json.loads((finished.path / "report.json").read_text())
    points = found["sweep"]["points"]
    grid_arms = [arm_and_seed(unit)[0] for unit in finished.config.sweep_points()]
    assert [p["arm"] for p in points] == ["base", "no_penalty", *grid_arms]
    assert [p["distance"] for p in points] == [None] * 6
    costs = [(p["penalised_fired"], p["kl"], -p["reward"], p["over_refused"]) for p in points]
    assert [p["front"] for p in points] == front(costs) and any(p["front"] for p in points)
    assert [p["policy"] for p in found["policies"]] == ["base", "no_penalty-seed0"] and found[
        "sweep"
    ]["missing"] == []
    assert {row["policy"] for row in found["training"]} == {"no_penalty-seed0"}
    text = (finished.path / "final_report.txt").read_text()
    section = text.partition("PENALISED RATE AGAINST REWARD, KL AND OVER-REFUSAL")[2]
    assert (
        all(arm in section for arm in grid_arms)
        and "Thresholds that the activations suggest" in section
    )
    assert 'id="sweep"' in (finished.path / "report.html").read_text()


def test_grid_order_is_seeds_then_taus_then_alphas() -> None:
    config = swept_config(sweep={"tau_quantile": [0.5, 0.9], "alpha": [1.0, 2.0], "seeds": [0, 1]})
    names = [
        f"sweep-quantile{t}-alpha{a}-seed{s}"
        for s, t, a in itertools.product((0, 1), (0.5, 0.9), (1.0, 2.0))
    ]
    assert list(config.sweep_points()) == names
