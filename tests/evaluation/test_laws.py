"""Laws of what evaluation concludes, on any numbers: intervals nest in their level, arms mirror one
another, and neither the order of rows nor the names of prompts and seeds decide anything.

`python -m pytest tests/evaluation/test_laws.py`
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sarm.config import VerdictConfig
from sarm.evaluation import instrument, intervals
from sarm.evaluation.comparison import MEASURES, Rows, aligned, change, fall_beyond, grid
from sarm.evaluation.detector import Detector, corrected_change, corrected_rate, youden
from sarm.evaluation.instrument import (
    cohens_kappa,
    detectable_difference,
    relative_fall,
    within_prompt_share,
)
from sarm.evaluation.intervals import (
    Interval,
    bootstrap_means,
    clustered_interval,
    detectable_effect,
    satterthwaite,
    t_interval,
    two_way,
    two_way_variance,
)
from sarm.evaluation.rewardbench2 import Item, credit, ties_score
from sarm.evaluation.verdict import Verdict, decide
from tests.evaluation.test_verdict import ALIKE, BASE, DETECTOR, SAFER, SOUND, arm

LAWS = settings(max_examples=60, deadline=None)
SEEDS = st.integers(0, 2**32)
FACTORS = st.sampled_from([0.125, 0.5, 2.0, 8.0])
LEVELS = st.lists(st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99]), min_size=2, max_size=2, unique=True)


@contextmanager
def level_of(level: float) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (intervals, instrument):
            patch.setattr(module, "LEVEL", level)
        yield


def differences(seed: int, prompts: int, seeds: int) -> np.ndarray:
    """(prompts, seeds) in [-1, 1] that vary over both."""
    rng = np.random.default_rng(seed)
    table = rng.normal(0.1, 0.2, (prompts, seeds)) + rng.normal(0, 0.2, seeds)
    return np.clip(table + rng.normal(0, 0.3, (prompts, 1)), -1, 1)


SHAPES = st.tuples(SEEDS, st.integers(1, 9), st.integers(1, 4))
TABLES = SHAPES.map(lambda shape: differences(*shape))


def mirrored(found: Interval) -> Interval:
    return found._replace(value=-found.value, low=-found.high, high=-found.low)


# --- intervals
# ------------------------------------------------------------------------------------------------


@LAWS
@given(TABLES, FACTORS, st.data())
def test_differences_the_other_way_round_mirror_and_others_scale(
    table: np.ndarray, factor: float, data: Any
) -> None:
    found = two_way(table)
    assert two_way(-table) == pytest.approx(mirrored(found))
    scaled = two_way(factor * table, factor)
    assert scaled == pytest.approx((*(factor * x for x in found[:4]), found.df))
    rows, columns = (data.draw(st.permutations(range(n))) for n in table.shape)
    assert two_way(table[np.ix_(rows, columns)]) == pytest.approx(found)


@LAWS
@given(TABLES)
def test_what_might_differ_by_more_is_known_less_well(table: np.ndarray) -> None:
    variances = [two_way_variance(table, scale)[0] for scale in (1.0, 1.5, 4.0)]
    assert variances == sorted(variances)
    # Prompts seen again as they were are no news of seeds: theirs is the least that is left.
    seeds = table.shape[1]
    if seeds > 1:
        many, _ = two_way_variance(np.tile(table, (4000, 1)), 1.0)
        assert many == pytest.approx(table.mean(0).var(ddof=1) / seeds, rel=0.1, abs=1e-4)
    else:
        assert variances[0] < variances[1] < variances[2]


@LAWS
@given(TABLES, LEVELS, SEEDS)
def test_a_surer_interval_holds_a_less_sure_one(
    table: np.ndarray, levels: list[float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values, clusters = rng.normal(2, 3, 24), rng.integers(0, 5, 24).astype(str)
    before = (rng.random(24) < 0.8).astype(float)
    after = before * (rng.random(24) < 0.5)
    assume(len(set(clusters)) > 1)

    def found() -> list[tuple[float, float]]:
        counted = t_interval(0.1, 0.002, 3.5)
        fall = relative_fall(before, after)
        return [
            counted[1:3],
            two_way(table)[1:3],
            clustered_interval(values, clusters, 200, 5),
            youden(DETECTOR)[1:3],
            corrected_change(counted, DETECTOR)[1:3],
            (fall.low, fall.high) if fall else (-math.inf, math.inf),
        ]

    wide, narrow, detectable = [], [], []
    for level, into in zip(sorted(levels), (narrow, wide), strict=True):
        with level_of(level):
            into += found()
            detectable.append(detectable_effect(0.1, 7.0))
    assert detectable[0] < detectable[1]
    for (low, high), (inner_low, inner_high) in zip(wide, narrow, strict=True):
        assert low < inner_low or low == inner_low in (-1, -math.inf), "no further than can be"
        assert inner_low < inner_high
        assert inner_high < high or inner_high == high in (1, math.inf)


@LAWS
@given(st.floats(0.01, 3), st.floats(0.01, 3), st.floats(1, 60), st.floats(0.5, 60), FACTORS)
def test_more_spread_and_fewer_degrees_hide_more(
    se: float, more: float, df: float, further: float, factor: float
) -> None:
    found = t_interval(-0.4, se**2, df)
    assert found.detectable == pytest.approx(detectable_effect(se, df))
    assert detectable_effect(se + more, df) > found.detectable > found.high - found.value
    assert detectable_effect(se, df + further) < found.detectable
    assert detectable_effect(factor * se, df) == pytest.approx(factor * found.detectable)
    wider, surer = t_interval(-0.4, (se + more) ** 2, df), t_interval(-0.4, se**2, df + further)
    assert wider.low < found.low < surer.low and surer.high < found.high < wider.high


@LAWS
@given(st.lists(st.tuples(st.floats(0.01, 9), st.integers(1, 40)), min_size=1, max_size=4), FACTORS)
def test_degrees_of_freedom_lie_between_the_least_and_the_sum(
    parts: list[tuple[float, int]], factor: float
) -> None:
    variance = sum(part for part, _ in parts)
    df = satterthwaite(variance, parts)
    assert min(d for _, d in parts) - 1e-9 <= df <= sum(d for _, d in parts) + 1e-9
    assert satterthwaite(variance, parts[::-1]) == pytest.approx(df)
    larger = [(factor * part, d) for part, d in parts]
    assert satterthwaite(factor * variance, larger) == pytest.approx(df)


@LAWS
@given(SEEDS, st.integers(2, 6), FACTORS, st.integers(-9, 9), st.data())
def test_a_bootstrap_goes_by_the_order_of_names_and_neither_rows_nor_unit_nor_zero(
    seed: int, n_clusters: int, factor: float, shift: int, data: Any
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(1, 2, 20)
    clusters = np.array([f"p{i}" for i in [*range(n_clusters), *rng.integers(0, n_clusters, 20)]])
    clusters = clusters[:20]
    means = bootstrap_means(values[None], clusters, 30, 4)
    order = list(data.draw(st.permutations(range(20))))
    again = bootstrap_means(values[None, order], clusters[order], 30, 4)
    np.testing.assert_allclose(again, means)
    moved = bootstrap_means(factor * values[None] + shift, clusters, 30, 4)
    np.testing.assert_allclose(moved, factor * means + shift, atol=1e-9)
    renamed = np.char.replace(clusters, "p", "prompt ")
    np.testing.assert_array_equal(bootstrap_means(values[None], renamed, 30, 4), means)
    assert means.min() >= values.min() and means.max() <= values.max()


# --- arms
# ------------------------------------------------------------------------------------------------


def made_up(seed: int, prompts: int, seeds: int, samples: int) -> Rows:
    """Rows that differ in every column, some of them of safe prompts."""
    rng = np.random.default_rng(seed)
    shape = (prompts, seeds, samples)
    prompt, of_seed, _ = (x.ravel() for x in np.indices(shape))
    ids = np.array([f"p{i}" for i in range(prompts)])[prompt]
    unsafe = prompt % 3 > 0
    columns = {
        name: rng.uniform(0.2, 1, len(prompt)) * (40 if name == "n_tokens" else 1)
        for name in Rows._fields[3:]
    }
    return Rows(ids, of_seed, unsafe, **columns)


def reordered(rows: Rows, order: Any) -> Rows:
    return Rows(*(column[order] for column in rows))


def renamed(rows: Rows, prompts: dict[str, str], seeds: dict[int, int]) -> Rows:
    return rows._replace(
        prompt_id=np.array([prompts[str(p)] for p in rows.prompt_id]),
        seed=np.array([seeds[int(s)] for s in rows.seed]),
    )


@LAWS
@given(SEEDS, st.integers(4, 9), st.integers(1, 3), st.integers(1, 3), st.data())
def test_two_arms_mirror_one_another_whatever_their_rows_prompts_and_seeds_are_called(
    seed: int, prompts: int, seeds: int, samples: int, data: Any
) -> None:
    before, after = (made_up(seed + i, prompts, seeds, samples) for i in (0, 1))
    names = {f"p{i}": f"q{j}" for i, j in enumerate(data.draw(st.permutations(range(prompts))))}
    numbers = dict(enumerate(data.draw(st.permutations(range(3, 3 + seeds)))))
    order = data.draw(st.permutations(range(len(before.seed))))
    twins = [renamed(reordered(rows, order), names, numbers) for rows in (before, after)]
    one, other = aligned(grid(before), grid(after))
    for measure in MEASURES:
        found = change(one, other, measure, "a", "b", DETECTOR)
        back = change(other, one, measure, "a", "b", DETECTOR)
        assert (found.before, found.after) == (back.after, back.before)
        assert found.change == pytest.approx(-back.change)
        assert (found.low, found.high) == pytest.approx((-back.high, -back.low))
        assert (found.se, found.detectable) == pytest.approx(
            (back.se, back.detectable), nan_ok=seeds == 1
        )
        named = change(*aligned(*map(grid, twins)), measure, "a", "b", DETECTOR)
        assert named.n_prompts == found.n_prompts and named.n_seeds == seeds
        assert named[5:11] == pytest.approx(found[5:11])
    falls = [
        fall_beyond({"no_penalty": grid(a), "penalty": grid(b)}, 0.3)
        for a, b in ((before, after), twins)
    ]
    assert falls[0] == pytest.approx(falls[1])


@LAWS
@given(SEEDS, st.integers(4, 9), st.integers(2, 3), FACTORS)
def test_prompts_and_seeds_of_one_arm_alone_and_the_unit_of_rates_change_no_fall(
    seed: int, prompts: int, seeds: int, factor: float
) -> None:
    """A relative fall is one of rates counted in any unit."""
    before, after = made_up(seed, prompts, seeds, 1), made_up(seed + 1, prompts + 3, seeds + 1, 1)
    shared = reordered(after, np.isin(after.prompt_id, before.prompt_id) & (after.seed < seeds))
    for measure in MEASURES:
        found, want = (
            change(*aligned(grid(before), grid(rows)), measure, "a", "b")
            for rows in (after, shared)
        )
        assert found == pytest.approx(want)
    grids = {"no_penalty": grid(before), "penalty": grid(shared)}
    halved = {
        arm_: grid(rows._replace(monitors_fired=factor * rows.monitors_fired))
        for arm_, rows in (("no_penalty", before), ("penalty", after))
    }
    assert fall_beyond(halved, 0.6).value == pytest.approx(fall_beyond(grids, 0.6).value)


def figures(verdict: Verdict) -> list[Any]:
    return [
        *(verdict.word, verdict.rung, verdict.side, verdict.gaps),
        *(verdict.delta, verdict.length_ratio, verdict.logprob_drop, verdict.joint),
        *(x for c in verdict.changes for x in c[3:12]),
    ]


@settings(LAWS, max_examples=25)
@given(st.sampled_from([0.17, 0.255, 0.33, 0.36]), st.sampled_from([0.05, 0.097, 0.16]), st.data())
def test_a_verdict_knows_no_names_and_no_order(
    monitors: float, over_refused: float, data: Any
) -> None:
    rates = {
        "penalty": SAFER | {"monitors_fired": monitors, "over_refused": over_refused},
        "no_penalty": BASE,
        "random": ALIKE,
    }
    arms = {
        name: arm(of, seeds=(0, 1, 2, 3, 4), n_unsafe=70, n_safe=90) for name, of in rates.items()
    }
    rng = np.random.default_rng(data.draw(SEEDS))
    ids = sorted(set(arms["penalty"].prompt_id))
    names = {p: f"{rng.integers(10**9)}-{n}" for n, p in enumerate(ids)}
    numbers = {n: int(s) for n, s in enumerate(rng.permutation(50)[:5])}
    twins = {
        name: renamed(reordered(rows, rng.permutation(len(rows.seed))), names, numbers)
        for name, rows in arms.items()
    }
    rule = VerdictConfig(monitor_share=0.4, over_refusal_margin=0.07, delta=0.08)
    one, other = (figures(decide(a, rule, SOUND)) for a in (arms, twins))
    for a, b in zip(one, other, strict=True):
        assert a == (b if b is None or isinstance(b, str) else pytest.approx(b))


# --- the instrument
# ------------------------------------------------------------------------------------------------


@LAWS
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20), st.data())
def test_agreement_has_no_first_reading_and_no_side(
    pairs: list[tuple[bool, bool]], data: Any
) -> None:
    first, second = np.array(pairs).T
    kappa = cohens_kappa(first, second)
    order = list(data.draw(st.permutations(range(len(pairs)))))
    same = {
        "swapped": (second, first),
        "denied": (~first, ~second),
        "reordered": (first[order], second[order]),
        "twice": (np.tile(first, 2), np.tile(second, 2)),
    }
    for why, readings in same.items():
        assert cohens_kappa(*readings) == (kappa if kappa is None else pytest.approx(kappa)), why
    assert kappa is None or -1 - 1e-9 <= kappa <= 1 + 1e-9
    assert kappa is None or (kappa == pytest.approx(1)) == (first == second).all()


@LAWS
@given(SEEDS, st.integers(2, 7), st.integers(2, 5), st.data())
def test_a_share_within_prompts_knows_neither_order_nor_side(
    seed: int, prompts: int, samples: int, data: Any
) -> None:
    rng = np.random.default_rng(seed)
    fired = rng.random((prompts, samples)) < rng.random((prompts, 1))
    share = within_prompt_share(fired)
    want = share if share is None else pytest.approx(share)
    within = np.stack([rng.permutation(row) for row in fired])
    assert within_prompt_share(within[data.draw(st.permutations(range(prompts)))]) == want
    assert within_prompt_share(~fired) == want
    assert share is None or 0 <= share <= 1


@LAWS
@given(SEEDS, st.integers(3, 30), st.data())
def test_a_fall_excludes_0_just_where_the_difference_does(seed: int, n: int, data: Any) -> None:
    """And is that of the pairs in any order."""
    rng = np.random.default_rng(seed)
    before = (rng.random(n) < 0.9).astype(float)
    after = (rng.random(n) < rng.random()).astype(float)
    found = relative_fall(before, after)
    order = list(data.draw(st.permutations(range(n))))
    again = relative_fall(before[order], after[order])
    assert (found is None) == (again is None)
    if found is None or again is None:
        return
    assert again.model_dump() == pytest.approx(found.model_dump())
    d = before - after
    squares = ((d - d.mean()) ** 2).sum() + 1
    t = d.mean() / math.sqrt(squares / (n + 2) / n)
    edge = t_interval(0.0, 1.0, n - 1).high
    assume(abs(abs(t) - edge) > 1e-6)
    assert (found.low > 0, found.high < 0) == (t > edge, t < -edge)
    assert found.low <= found.value <= found.high


@LAWS
@given(
    st.floats(0.05, 0.95),
    st.integers(2, 300),
    st.integers(1, 8),
    st.integers(2, 9),
    st.floats(0, 1),
)
def test_a_planned_evaluation_knows_no_side_and_detects_less_with_less(
    rate: float, prompts: int, samples: int, seeds: int, share: float
) -> None:
    """Where seeds are alike: otherwise more prompts leave seeds alone, and fewer degrees."""
    plan = {"prompts": prompts, "samples": samples, "seeds": seeds, "within_share": share}

    def detects(rate: float = rate, seed_sd: float = 0.0, **more: Any) -> float:
        return detectable_difference(rate, **(plan | more), seed_sd=seed_sd)

    found = detects()
    assert 0 < found <= 1
    for sd in (0.0, 0.03):
        assert detects(1 - rate, sd) == pytest.approx(detects(rate, sd))
    for better in (
        {"prompts": prompts + 1},
        {"samples": samples + 1},
        {"seeds": seeds + 1},
        {"within_share": share / 2},
        {"rate": rate / 2 if rate <= 0.5 else (1 + rate) / 2},
    ):
        assert detects(**better) <= found + 1e-12, better


# --- the detector
# ------------------------------------------------------------------------------------------------


@LAWS
@given(st.integers(51, 100), st.integers(0, 49), st.floats(0, 1), st.floats(-0.5, 0.5))
def test_a_correction_undoes_what_the_detector_does(
    found: int, alarms: int, rate: float, moved: float
) -> None:
    detector = Detector("d", found, 100, alarms, 100, "labels")
    counted = rate * found / 100 + (1 - rate) * alarms / 100
    assert corrected_rate(counted, detector) == pytest.approx(rate, abs=1e-9)
    j = (found - alarms) / 100
    change = t_interval(moved * j, 0.002, 12.0)
    corrected = corrected_change(change, detector)
    assert corrected.value == pytest.approx(moved)
    assert corrected_change(mirrored(change), detector) == pytest.approx(mirrored(corrected))
    assert corrected.se >= change.se / j * (1 - 1e-9)
    # Whose calls are swapped, and so are what they are called, is as good.
    swapped = Detector("d", 100 - alarms, 100, 100 - found, 100, "labels")
    assert youden(swapped) == pytest.approx(youden(detector))


# --- RewardBench 2
# ------------------------------------------------------------------------------------------------

REWARDS = st.lists(st.integers(-3, 3).map(float), min_size=4, max_size=4)


@LAWS
@given(REWARDS, st.integers(1, 3), FACTORS, st.integers(-5, 5), st.data())
def test_credit_goes_by_order_of_rewards_alone_and_adds_up_to_one(
    rewards: list[float], right: int, factor: float, shift: int, data: Any
) -> None:
    def item(right: int) -> Item:
        return Item("ref:0", (), tuple("abcd"), right)

    found = credit(item(right), rewards)
    assert credit(item(right), [factor * r + shift for r in rewards]) == found
    mine = data.draw(st.permutations(rewards[:right]))
    others = data.draw(st.permutations(rewards[right:]))
    assert credit(item(right), [*mine, *others]) == found
    alone = [credit(item(1), [rewards[i], *rewards[:i], *rewards[i + 1 :]]) for i in range(4)]
    assert sum(alone) == pytest.approx(1)


@LAWS
@given(st.lists(st.tuples(REWARDS, REWARDS), min_size=1, max_size=5), FACTORS, st.data())
def test_ties_know_neither_unit_nor_zero_nor_order_nor_names(
    drawn: list[tuple[list[float], list[float]]], factor: float, data: Any
) -> None:
    """Whole numbers tie often; only how far right answers are apart counts, in units of that."""
    kinds = {"ref": 1, "tied": 2}
    rows = [
        (Item(f"{kind}:{n}", (), tuple("abcd"), right), rewards)
        for n, both in enumerate(drawn)
        for (kind, right), rewards in zip(kinds.items(), both, strict=True)
    ]
    found = ties_score(*zip(*rows, strict=True))
    numbers = data.draw(st.permutations(range(10, 10 + len(drawn))))
    twins = [
        (item._replace(id=f"{kind}:{numbers[int(n)]}"), [factor * r + 1 for r in rewards])
        for item, rewards in data.draw(st.permutations(rows))
        for kind, _, n in [item.id.partition(":")]
    ]
    assert ties_score(*zip(*twins, strict=True)) == pytest.approx(found)
    assert 0 - 0.01 <= found <= 1.01
