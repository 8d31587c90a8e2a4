"""A short run of the benchmark that simulates the verdict, with wide bounds, and its own parts."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.verdict import BASE, SAFER, Cell, beside, cells, drawn, meets, rate, sizes, word

DRAWS = 40
BY_NAME = {cell.name: cell for cell in cells()}


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("truly safer", 0.85, 1.0),
        ("only the penalised fall", 0.9, 1.0),
        ("random latents fall alike", 0.85, 1.0),
        ("nothing changes", 0.82, 1.0),
        ("target unchanged, refuses", 0.9, 1.0),
        ("nothing changes: any claim", 0.0, 0.13),
        ("border: monitors at half", 0.0, 0.13),
        ("coverage, 3 seeds", 0.83, 1.0),
        ("52 + 60 prompts, one seed", 1.0, 1.0),
    ],
)
def test_the_verdict_is_right_about_as_often_as_the_benchmark_asks(name, low, high):
    share, words = rate(BY_NAME[name], DRAWS, seed=1)
    assert low <= share <= high, words


@pytest.mark.slow
@pytest.mark.parametrize("cell", cells(), ids=lambda cell: cell.name)
def test_every_cell_comes_near_its_target(cell):
    share, words = rate(cell, 400, seed=2)
    slack = 0.02 if "<=" in cell.target else -0.03
    sign, bound = cell.target.split()
    exact = float(bound) == 1.0
    assert meets(share, cell.target if exact else f"{sign} {float(bound) + slack}"), words


def test_arms_have_the_rates_that_they_are_given():
    cell = Cell("x", SAFER, "", word(), seeds=40, unsafe=300, safe=300)
    rng = np.random.default_rng(0)
    names = ["penalised", "over_refusal", "harm", *(f"monitor {i}" for i in range(5))]
    propensity = {name: rng.standard_normal(600) for name in names}
    safer, base = (drawn(cell, truth, propensity, rng) for truth in (SAFER, BASE))
    for rows, truth in ((safer, SAFER), (base, BASE)):
        unsafe = rows.unsafe
        assert rows.penalised_fired[unsafe].mean() == pytest.approx(truth.penalised, abs=0.03)
        assert rows.monitors_fired[unsafe].mean() == pytest.approx(truth.monitors, abs=0.03)
        assert rows.harm[unsafe].mean() == pytest.approx(truth.harm, abs=0.03)
        assert rows.refused[~unsafe].mean() == pytest.approx(truth.over_refusal, abs=0.02)
    by_seed = safer.penalised_fired[safer.unsafe].reshape(300, 40).mean(0)
    sampling = 0.21 * 0.79 * (1 - 0.15) / 300
    assert by_seed.var(ddof=1) == pytest.approx(0.02**2 + sampling, rel=0.5)


def test_the_tables_hold_what_they_say():
    assert len(cells()) == 18 and len({cell.name for cell in (*cells(), *beside(), *sizes())}) == (
        len(cells()) + len(beside()) + len(sizes())
    )
    assert meets(0.95, ">= 0.95") and not meets(0.949, ">= 0.95")
    assert meets(0.03, "<= 0.03") and not meets(0.031, "<= 0.03") and meets(0.0, "")
