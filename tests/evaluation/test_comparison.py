"""Arms side by side on rows of one's own: tables, pairing, which prompts a measure is about."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sarm.config import VerdictConfig
from sarm.evaluation.comparison import (
    Change,
    Rows,
    aligned,
    change,
    compare,
    fall_beyond,
    grid,
    means_of,
    paired,
    points,
    signed,
)
from sarm.evaluation.detector import Detector, corrected_change, corrected_rate
from sarm.evaluation.intervals import UNKNOWN, two_way

COLUMNS = Rows._fields[3:]


def rows(seeds=(0, 1), seed: int = 0, samples: int = 1, prompts: int = 12) -> Rows:
    """Made-up rows of `prompts` prompts, a third of them safe, that differ in every column."""
    rng = np.random.default_rng(seed)
    ids = np.array([f"p{i}" for i in range(prompts) for _ in seeds for _ in range(samples)])
    of_seed = np.array([s for _ in range(prompts) for s in seeds for _ in range(samples)])
    unsafe = np.array([int(i[1:]) % 3 > 0 for i in ids])
    return Rows(ids, of_seed, unsafe, *(rng.uniform(size=len(ids)) for _ in COLUMNS))


def shuffled(table: Rows, seed: int = 1) -> Rows:
    order = np.random.default_rng(seed).permutation(len(table.seed))
    return Rows(*(column[order] for column in table))


def test_a_cell_is_the_mean_of_its_samples_in_any_order():
    table = rows(samples=3)
    found = grid(shuffled(table))
    for column in COLUMNS:
        values = getattr(table, column)
        for i, prompt in enumerate(found.prompts):
            for j, seed in enumerate(found.seeds):
                mine = (table.prompt_id == prompt) & (table.seed == seed)
                assert found.values[column][i, j] == pytest.approx(values[mine].mean())
                assert mine.sum() == 3
    assert found.unsafe.tolist() == [int(p[1:]) % 3 > 0 for p in found.prompts]


def test_a_cell_without_rows_or_with_a_missing_value_is_nan():
    table = rows()
    table.harm[3] = math.nan
    whole = grid(Rows(*(column[1:] for column in table)))
    assert math.isnan(whole.values["refused"][0, 0])
    last = grid(Rows(*(column[:-1] for column in table)))
    assert np.argwhere(np.isnan(last.values["refused"])).tolist() == [[3, 1]], "p11 is the fourth"
    assert np.isnan(grid(table).values["harm"]).sum() == 1


def test_arms_are_compared_on_the_prompts_and_seeds_that_both_have():
    before, after = rows(seeds=(0, 1, 2)), shuffled(rows(seeds=(1, 2, 5), seed=7, prompts=9))
    one, other = aligned(grid(before), grid(after))
    assert one.seeds.tolist() == other.seeds.tolist() == [1, 2]
    assert one.prompts.tolist() == other.prompts.tolist() == [f"p{i}" for i in range(9)]
    x, y = paired(one, other, "refused")
    for i, prompt in enumerate(p for p in one.prompts if int(p[1:]) % 3):
        for j, seed in enumerate((1, 2)):
            for table, values in ((before, x), (after, y)):
                at = (table.prompt_id == prompt) & (table.seed == seed)
                assert values[i, j] == table.refused[at][0]


@pytest.mark.parametrize(
    ("measure", "column", "about"),
    [
        ("penalised_fired", "penalised_fired", "unsafe"),
        ("penalised_fired_safe", "penalised_fired", "safe"),
        ("monitors_fired", "monitors_fired", "unsafe"),
        ("monitors_fired_safe", "monitors_fired", "safe"),
        ("harm", "harm", "unsafe"),
        ("refused", "refused", "unsafe"),
        ("over_refused", "refused", "safe"),
        ("n_tokens", "n_tokens", "all"),
    ],
)
def test_each_measure_is_about_its_own_prompts(measure, column, about):
    before, after = grid(rows()), grid(rows(seed=3))
    found = change(before, after, measure, "penalty", "no_penalty")
    kept = {"unsafe": before.unsafe, "safe": ~before.unsafe, "all": before.unsafe | True}[about]
    x, y = before.values[column][kept], after.values[column][kept]
    assert (found.before, found.after) == pytest.approx((x.mean(), y.mean()))
    assert (found.n_prompts, found.n_seeds) == x.shape
    scale = max(x.max(), y.max(), 1.0) if measure == "n_tokens" else 1.0
    expected = two_way(y - x, scale)
    assert (found.change, found.low, found.high, found.se) == pytest.approx(expected[:4])


def test_a_prompt_without_a_value_in_some_seed_is_left_out():
    table = rows()
    table.harm[(table.prompt_id == "p1") & (table.seed == 1)] = math.nan
    before, after = grid(table), grid(rows(seed=3))
    assert change(before, after, "harm", "a", "b").n_prompts == 7
    assert change(before, after, "refused", "a", "b").n_prompts == 8


def test_one_seed_detects_no_size_as_nothing_is_known_of_other_trainings():
    one, two = (
        change(grid(rows(seeds)), grid(rows(seeds, seed=3)), "refused", "a", "b")
        for seeds in ((0,), (0, 1))
    )
    assert math.isnan(one.detectable) and math.isfinite(one.low)
    assert two.detectable > 0


def test_without_a_common_prompt_there_is_no_change():
    other = rows()._replace(prompt_id=np.array([f"q{i}" for i in range(24)]))
    found = change(*aligned(grid(rows()), grid(other)), "refused", "a", "b")
    assert found[:5] == ("refused", "a", "b", 0, 2) and found.counted is None
    assert all(map(math.isnan, found[5:-1]))
    means = means_of({"a": grid(rows()), "b": grid(other)}, "kl", ("a", "b"))
    assert list(means) == ["a", "b"] and all(map(math.isnan, means.values()))
    assert fall_beyond({"no_penalty": grid(rows()), "penalty": grid(other)}, 0.5) is UNKNOWN


def test_refusal_rates_alone_are_corrected_where_the_rule_says_so():
    grids = {"no_penalty": grid(rows()), "penalty": grid(rows(seed=3))}
    detector = Detector("d", 80, 100, 30, 300, "labels")
    plain, corrected = (
        {c.measure: c for c in compare(grids, detector, VerdictConfig(correct_refusals=on))}
        for on in (False, True)
    )
    for measure in plain:
        factor = 1 / 0.7 if measure in ("refused", "over_refused") else 1.0
        assert corrected[measure].change == pytest.approx(plain[measure].change * factor)
    assert corrected["over_refused"].se > plain["over_refused"].se / 0.7


def test_every_arm_is_compared_with_no_penalty_and_the_penalty_with_random():
    grids = {arm: grid(rows(seed=i)) for i, arm in enumerate(("no_penalty", "penalty", "random"))}
    found = {(c.measure, c.arm, c.against) for c in compare(grids, None, VerdictConfig())}
    assert len(found) == 17
    assert ("penalised_fired", "penalty - random", "random") in found
    versus = next(c for c in compare(grids, None, VerdictConfig()) if c.arm == "penalty - random")
    unsafe = grids["penalty"].unsafe
    expected = [grids[a].values["penalised_fired"][unsafe].mean() for a in ("random", "penalty")]
    assert (versus.before, versus.after) == pytest.approx(expected)


def test_means_are_over_what_the_named_arms_share():
    grids = {"a": grid(rows(seeds=(0, 1))), "b": grid(rows(seeds=(1, 2), seed=4))}
    table = rows(seeds=(0, 1))
    assert means_of(grids, "kl", ("a", "b"))["a"] == pytest.approx(table.kl[table.seed == 1].mean())
    assert means_of(grids, "kl", ("a",))["a"] == pytest.approx(table.kl.mean())


def test_monitors_beyond_a_share_of_the_penalised_by_hand_and_by_resampling():
    n, seeds = 1500, (0,)  # so many that the added prompts weigh little
    before, after = rows(seeds=seeds, prompts=n), rows(seeds=seeds, seed=5, prompts=n)
    after = after._replace(
        monitors_fired=after.monitors_fired * 0.8, penalised_fired=after.penalised_fired * 0.4
    )
    grids = {"no_penalty": grid(before), "penalty": grid(after)}
    found = fall_beyond(grids, 0.5)

    def statistic(x: Rows, y: Rows) -> float:
        u = x.unsafe
        fall = [1 - getattr(y, c)[u].mean() / getattr(x, c)[u].mean() for c in COLUMNS[:2]]
        return fall[1] - 0.5 * fall[0]

    assert found.value == pytest.approx(statistic(before, after))
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(300):
        ids = rng.integers(0, n, n)
        draws.append(statistic(*(Rows(*(c[ids] for c in t)) for t in (before, after))))
    assert found.se == pytest.approx(np.std(draws), rel=0.15)


def test_scales_are_the_largest_differences_possible():
    """Of lengths the longest mean of either arm, of falls one over each rate, weighed."""
    before, after = rows(seeds=(0, 1, 2)), rows(seeds=(0, 1, 2), seed=4)
    longer = after._replace(n_tokens=after.n_tokens * 70)
    tables = grid(before), grid(longer)
    x, y = paired(*tables, "n_tokens")
    found, want = change(*tables, "n_tokens", "a", "b"), two_way(y - x, float(y.max()))
    assert (found.low, found.high) == pytest.approx((want.low, want.high))
    found = change(tables[1], tables[0], "n_tokens", "a", "b")
    assert (found.low, found.high) == pytest.approx((-want.high, -want.low))
    m, p = (paired(*map(grid, (before, after)), c) for c in ("monitors_fired", "penalised_fired"))
    terms = [-w * (b - b.mean() / a.mean() * a) / a.mean() for w, (a, b) in ((1, m), (-0.3, p))]
    error = two_way(terms[0] + terms[1], 1 / m[0].mean() + 0.3 / p[0].mean())
    value = 1 - m[1].mean() / m[0].mean() - 0.3 * (1 - p[1].mean() / p[0].mean())
    beyond = fall_beyond({"no_penalty": grid(before), "penalty": grid(after)}, 0.3)
    assert beyond[:3] == pytest.approx((value, value + error.low, value + error.high))


def test_monitors_that_never_fire_say_nothing():
    before = rows()._replace(monitors_fired=np.zeros(24))
    grids = {"no_penalty": grid(before), "penalty": grid(rows(seed=2))}
    assert fall_beyond(grids, 0.5) is UNKNOWN
    silent = rows()._replace(penalised_fired=np.zeros(24))
    assert fall_beyond({**grids, "no_penalty": grid(silent)}, 0.5) is UNKNOWN
    assert fall_beyond({**grids, "no_penalty": grid(rows())}, 0.5) is not UNKNOWN


@pytest.mark.parametrize("column", ["monitors_fired", "penalised_fired"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_prompt_that_one_rate_lacks_is_left_out_of_both_falls(column: str, side: int) -> None:
    """On one side, in one seed."""
    tables = [rows(), rows(seed=3)]
    getattr(tables[side], column)[(tables[side].prompt_id == "p1") & (tables[side].seed == 1)] = (
        math.nan
    )
    found = fall_beyond(dict(zip(("no_penalty", "penalty"), map(grid, tables), strict=True)), 0.25)
    others = [Rows(*(c[t.prompt_id != "p1"] for c in t)) for t in (rows(), rows(seed=3))]
    want = fall_beyond(dict(zip(("no_penalty", "penalty"), map(grid, others), strict=True)), 0.25)
    assert tuple(found) == pytest.approx(tuple(want))


def test_a_corrected_change_in_whole():
    before, after = grid(rows()), grid(rows(seed=3))
    detector = Detector("d", 80, 100, 30, 300, "labels")
    x, y = paired(before, after, "over_refused")
    counted = two_way(y - x, 1.0)
    corrected = corrected_change(counted, detector)
    found = change(before, after, "over_refused", "random", "no_penalty", detector)
    want = Change(
        "over_refused",
        "random",
        "no_penalty",
        4,
        2,
        corrected_rate(x.mean(), detector),
        corrected_rate(y.mean(), detector),
        corrected.value,
        corrected.low,
        corrected.high,
        corrected.se,
        corrected.detectable,
        counted.value,
    )
    assert found == want and found.before != x.mean() and math.isfinite(found.detectable)
    assert found.record() == dict(zip(Change._fields, want, strict=True))
    assert list(found.record())[-2:] == ["detectable", "counted"]
    assert found._replace(change=0.05, counted=0.0354, low=-0.1, high=0.2).words() == (
        "+5.0 points (corrected; counted +3.5), 95 % CI -10.0 to +20.0"
    )


def test_a_change_in_words():
    before, after = grid(rows()), grid(rows(seed=3))
    found = change(before, after, "harm", "penalty", "no_penalty")._replace(
        change=0.017, low=-0.05, high=0.083, detectable=0.0949
    )
    assert found.words() == "+1.7 points, 95 % CI -5.0 to +8.3"
    assert found.power_words() == (
        "minimum detectable effect (80 % power) of 8 prompts and 2 seeds: 9.49 points"
    )
    assert found._replace(n_prompts=1, n_seeds=1).power_words() == (
        "minimum detectable effect (80 % power) of 1 prompt and 1 seed: 9.49 points"
    )
    assert (signed(-0.0125), points(0.05)) == ("-1.2 points", "5 points")
