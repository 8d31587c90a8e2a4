"""Laws of what probing finds, on any numbers: prompts may come in any order and under any name,
latents in any shards, chosen and rejected may change places, and units mean nothing.

`python -m pytest tests/probing/test_laws.py`
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sarm.config import MONITOR_RATES, SelectConfig
from sarm.data.datasets import Pair, Prompt, text_id
from sarm.probing.baselines import bradley_terry, pair_rows
from sarm.probing.contrast import Contrast, deal_of
from sarm.probing.effects import contrast_of, latent_effects, prompts_active
from sarm.probing.monitors import (
    MonitorCandidate,
    choose_monitors,
    drawn_for,
    largest_correlations,
    largest_cosines,
    random_pool,
    tau_at_rate,
)
from sarm.probing.permutation import permutation_p, permutations_needed
from sarm.probing.rediscovery import joined, of_prompts
from sarm.probing.replication import power_of
from sarm.probing.siblings import by_direction, by_firing
from sarm.probing.stats import (
    benjamini_hochberg,
    bootstrap_intervals,
    holm,
    matched_at_random,
    partial_conjunction,
    prompt_effects,
)
from sarm.probing.upstream import selection_scores
from sarm.reward_model.interventions import Ranks

LAWS = settings(max_examples=60, deadline=None)
SEEDS = st.integers(0, 2**32)
FACTORS = st.sampled_from([0.125, 0.5, 2.0, 8.0])
LATENTS, K = 12, 4


def some_contrast(seed: int, prompts: int) -> Contrast:
    """Prompts of two to four responses, one or two of them chosen, or ranked."""
    rng = np.random.default_rng(seed)
    numbers, chosen, rejected = [], [], []
    for prompt in range(prompts):
        n = int(rng.integers(2, 5))
        of_chosen = int(rng.integers(1, n))
        first = np.arange(n) < of_chosen
        sides = [first / of_chosen, (1.0 - first) / (n - of_chosen)]
        if n == 3 and rng.random() < 0.4:
            sides = [np.array([2, 1, 0]) / 3, np.array([0, 1, 2]) / 3]
        order = rng.permutation(n)
        numbers += [prompt] * n
        chosen += list(sides[0][order])
        rejected += list(sides[1][order])
    rows = rng.permutation(len(numbers) + 3)[: len(numbers)]
    return Contrast(rows, np.array(numbers), np.array(chosen), np.array(rejected), prompts)


def some_values(seed: int, contrast: Contrast, latents: int = LATENTS) -> scipy.sparse.csr_array:
    """(latents, n), about half of it 0, of either sign."""
    rng = np.random.default_rng(seed)
    shape = (latents, len(contrast.rows))
    dense = rng.normal(0.2, 1, shape) * (rng.random(shape) < 0.6)
    return scipy.sparse.csr_array(dense)


def swapped(contrast: Contrast) -> Contrast:
    return contrast._replace(chosen=contrast.rejected, rejected=contrast.chosen)


def some_ranks(seed: int, n: int) -> Ranks:
    """n texts whose K largest of LATENTS are kept, and two ranks more."""
    a = np.random.default_rng(seed).normal(0.3, 1, (n, LATENTS)).astype(np.float32)
    order = np.argsort(-a, axis=1)[:, : K + 2]
    return Ranks(order.astype(np.int32), np.take_along_axis(a, order, 1), K, LATENTS)


# --- contrasts and effects
# ------------------------------------------------------------------------------------------------


def pair_of(prompt: str, chosen: str, rejected: str) -> Pair:
    messages = ({"role": "user", "content": prompt},)
    asked = Prompt(prompt, messages, "s", "unsafe", "", "discovery")
    return Pair(f"{prompt}-{chosen}-{rejected}", asked, "s", chosen, rejected)


def rows_for(pairs: list[Pair]) -> dict[str, int]:
    """A row an encoded text, a label of its own for either side."""
    found: dict[str, int] = {}
    for p in pairs:
        for label, response in (("c", p.chosen), ("r", p.rejected)):
            messages = (*p.prompt.messages, {"role": "assistant", "content": response})
            found.setdefault(f"{text_id(messages)}-{label}", len(found))
    return found


PAIRS = st.lists(
    st.tuples(st.sampled_from("pqrst"), st.sampled_from("abcd"), st.sampled_from("wxyz")),
    min_size=1,
    max_size=12,
    unique=True,
)


@LAWS
@given(PAIRS, st.data())
def test_a_contrast_weighs_prompts_alike_whatever_they_are_called_and_in_any_order(
    drawn: list[tuple[str, str, str]], data: Any
) -> None:
    pairs = [pair_of(*words) for words in drawn]
    rows = rows_for(pairs)
    found = contrast_of(pairs, rows)
    assert found.n_prompts == len({prompt for prompt, _, _ in drawn})
    for side in (found.chosen, found.rejected):
        sums = np.bincount(found.prompts, side, minlength=found.n_prompts)
        assert sums == pytest.approx(np.ones(found.n_prompts))
    assert np.abs(np.bincount(found.prompts, found.labels)).max() < 1e-12
    for mine, theirs in zip(
        found, contrast_of(data.draw(st.permutations(pairs)), rows), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=1e-12)
    # Under names that sort otherwise prompts are numbered otherwise, and no response counts more.
    names = dict(zip("pqrst", data.draw(st.permutations("pqrst")), strict=True))
    renamed = [p._replace(prompt=p.prompt._replace(id=names[p.prompt.id])) for p in pairs]
    other = contrast_of(renamed, rows)
    one, again = (np.argsort(x.rows) for x in (found, other))
    for column in ("rows", "chosen", "rejected"):
        np.testing.assert_allclose(getattr(found, column)[one], getattr(other, column)[again])


@LAWS
@given(SEEDS, st.integers(1, 8), st.data())
def test_effects_know_neither_the_order_of_prompts_nor_shards_and_change_sign_with_the_sides(
    seed: int, prompts: int, data: Any
) -> None:
    contrast = some_contrast(seed, prompts)
    ranks = some_ranks(seed, len(contrast.rows) + 3)
    weight = np.random.default_rng(seed + 1).normal(size=LATENTS).astype(np.float32)
    whole = latent_effects(ranks, weight, contrast, 0, LATENTS)
    edges = [0, *sorted(data.draw(st.lists(st.integers(0, LATENTS), max_size=3))), LATENTS]
    parts = [latent_effects(ranks, weight, contrast, a, b) for a, b in itertools.pairwise(edges)]
    pd.testing.assert_frame_equal(
        pd.concat(parts, ignore_index=True), whole, check_exact=True, check_dtype=False
    )
    order = data.draw(st.permutations(range(prompts)))
    places = [np.flatnonzero(contrast.prompts == prompt) for prompt in order]
    moved = np.concatenate(places)
    numbers = np.repeat(np.arange(prompts), [len(p) for p in places])
    other = Contrast(
        contrast.rows[moved], numbers, contrast.chosen[moved], contrast.rejected[moved], prompts
    )
    again = latent_effects(ranks, weight, other, 0, LATENTS)
    pd.testing.assert_frame_equal(again, whole, atol=1e-12)
    back = latent_effects(ranks, weight, swapped(contrast), 0, LATENTS)
    for column in ("delta_z", "effect_head", "effect_reselected"):
        np.testing.assert_allclose(back[column], -whole[column], atol=1e-12)
    np.testing.assert_array_equal(back["density"], whole["density"])
    np.testing.assert_allclose(back["density_chosen"], whole["density_rejected"])
    larger = latent_effects(ranks, 4 * weight, contrast, 0, LATENTS)
    for column, factor in (("effect_head", 4), ("effect_reselected", 4), ("delta_z", 1)):
        np.testing.assert_array_equal(larger[column], factor * whole[column])


@LAWS
@given(SEEDS, st.integers(2, 9), st.data())
def test_a_contrast_cut_by_prompts_and_joined_again_is_as_it_was(
    seed: int, prompts: int, data: Any
) -> None:
    contrast = some_contrast(seed, prompts)
    some = np.array(data.draw(st.lists(st.booleans(), min_size=prompts, max_size=prompts)))
    parts = [of_prompts(contrast, mine) for mine in (some, ~some)]
    assert [p.n_prompts for p in parts] == [some.sum(), (~some).sum()]
    values = some_values(seed, contrast)
    effects = prompt_effects(values, contrast).toarray()
    for part, mine in zip(parts, (some, ~some), strict=True):
        kept = values[:, np.flatnonzero(mine[contrast.prompts])]
        np.testing.assert_allclose(prompt_effects(kept, part).toarray(), effects[:, mine])
    whole = joined(*parts)
    order = np.argsort(~some, kind="stable")
    sizes = np.bincount(contrast.prompts)
    assert whole.n_prompts == prompts
    assert whole.prompts.tolist() == np.repeat(range(prompts), sizes[order]).tolist()
    assert whole.rows.tolist() == [r for p in order for r in contrast.rows[contrast.prompts == p]]
    fires = scipy.sparse.csr_array((values.toarray() > 0).astype(float))
    counts = [
        prompts_active(fires[:, np.flatnonzero(mine[contrast.prompts])], part)
        for part, mine in zip(parts, (some, ~some), strict=True)
    ]
    np.testing.assert_array_equal(sum(counts), prompts_active(fires, contrast))


# --- tests
# ------------------------------------------------------------------------------------------------


@settings(LAWS, max_examples=30)
@given(SEEDS, st.integers(3, 9), st.data())
def test_a_latents_p_is_the_same_to_the_bit_in_any_company_unit_and_on_either_side(
    seed: int, prompts: int, data: Any
) -> None:
    """Whatever unit and sign each latent's values have, and where the sides change places."""
    contrast = some_contrast(seed, prompts)
    values = some_values(seed, contrast)
    assume(np.all(np.abs(values @ contrast.labels) > 1e-6))
    p = permutation_p(values, contrast, 60, 150, seed=4)
    assert p.min() >= 2 / 151 and p.max() <= 1 and len(set(p)) > 1
    some = data.draw(st.permutations(range(LATENTS)))[: data.draw(st.integers(1, LATENTS))]
    np.testing.assert_array_equal(permutation_p(values[some], contrast, 60, 150, seed=4), p[some])
    units = 2.0 ** np.random.default_rng(seed).integers(-12, 12, LATENTS)
    units[::2] *= -1
    scaled = scipy.sparse.csr_array(values.toarray() * units[:, None])
    np.testing.assert_array_equal(permutation_p(scaled, contrast, 60, 150, seed=4), p)
    np.testing.assert_array_equal(permutation_p(values, swapped(contrast), 60, 150, seed=4), p)
    assert (deal_of(swapped(contrast)).labels == -deal_of(contrast).labels).all()


@LAWS
@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from([0.01, 0.05, 0.2]))
def test_permutations_suffice_for_the_smallest_threshold_and_more_tests_need_more(
    n: int, more: int, fdr: float
) -> None:
    needed = permutations_needed(n, fdr)
    assert 2 / (needed + 1) < fdr / n
    assert 2 / needed >= fdr / n or needed == -(-2 * n // fdr)
    assert permutations_needed(n + more, fdr) >= needed >= permutations_needed(n, fdr * 2)


P_VALUES = st.lists(st.none() | st.integers(1, 40), min_size=1, max_size=12)


@LAWS
@given(P_VALUES, st.integers(1, 5), st.data())
def test_adjusted_p_keep_their_order_and_know_neither_place_nor_what_was_not_tested(
    drawn: list[int | None], more: int, data: Any
) -> None:
    p = np.array([np.nan if x is None else x / 40 for x in drawn])
    order = list(data.draw(st.permutations(range(len(p)))))
    tested = ~np.isnan(p)
    q, family = benjamini_hochberg(p), holm(p)
    for adjust, found in ((benjamini_hochberg, q), (holm, family)):
        np.testing.assert_array_equal(np.isnan(found), ~tested)
        np.testing.assert_array_equal(adjust(p[order]), found[order])
        np.testing.assert_array_equal(adjust(np.r_[p, [np.nan] * more])[: len(p)], found)
        mine, theirs = p[tested], found[tested]
        assert (theirs >= mine - 1e-12).all() and (theirs <= 1).all()
        assert (np.diff(theirs[np.argsort(mine, kind="stable")]) >= 0).all()
        # A test that shows nothing makes it harder, smaller p make it easier.
        assert (adjust(np.r_[p, 1.0])[:-1][tested] >= theirs - 1e-12).all()
        assert (adjust(p / 2)[tested] <= theirs).all()
    assert (family[tested] >= q[tested] - 1e-12).all()
    if tested.any():
        smallest = np.nanmin(p)
        assert np.nanmin(family) == pytest.approx(min(1, smallest * tested.sum()))
        assert np.nanmax(q) == pytest.approx(np.nanmax(p))
    for alpha in (0.05, 0.3):  # the definition: the most that lie below their line
        ranked = np.sort(p[tested])
        below = [i + 1 for i, x in enumerate(ranked) if x <= alpha * (i + 1) / len(ranked) + 1e-12]
        assert (q[tested] <= alpha + 1e-12).sum() == max(below, default=0)


@LAWS
@given(SEEDS, st.integers(1, 9))
def test_a_conjunction_has_no_first_source_and_is_as_weak_as_the_weaker(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.uniform(size=n), np.where(rng.random(n) < 0.2, np.nan, rng.uniform(size=n))
    same = rng.random(n) < 0.7
    found = partial_conjunction(first, second, same)
    np.testing.assert_array_equal(partial_conjunction(second, first, same), found)
    known = np.isfinite(second)
    assert (found[known] >= first[known]).all() and (found[known] >= second[known]).all()
    assert (found[known & ~same] == 1).all() and np.isnan(found[~known]).all()


@LAWS
@given(SEEDS, st.integers(5, 9), FACTORS, st.data())
def test_bootstrap_intervals_nest_in_their_level_scale_and_are_each_latents_own(
    seed: int, prompts: int, factor: float, data: Any
) -> None:
    effects = some_values(seed, some_contrast(seed, prompts))
    levels = sorted(data.draw(st.lists(st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99]),
                                       min_size=2, max_size=2, unique=True)))  # fmt: skip
    (low, high), (wide_low, wide_high) = (
        bootstrap_intervals(effects, 150, 3, level) for level in levels
    )
    assert (wide_low <= low).all() and (low <= high).all() and (high <= wide_high).all()
    assert (wide_low < low).any() and (high < wide_high).any()
    default = bootstrap_intervals(effects, 150, 3)
    np.testing.assert_array_equal(default, bootstrap_intervals(effects, 150, 3, 0.95))
    scaled = bootstrap_intervals(factor * effects, 150, 3, levels[0])
    np.testing.assert_array_equal(scaled, (factor * low, factor * high))
    turned = bootstrap_intervals(-effects, 150, 3, levels[0])
    np.testing.assert_allclose(turned, (-high, -low), atol=1e-12)
    order = list(data.draw(st.permutations(range(LATENTS))))
    np.testing.assert_array_equal(
        bootstrap_intervals(effects[order], 150, 3, levels[0]), (low[order], high[order])
    )


@LAWS
@given(SEEDS, st.integers(2, 30), FACTORS)
def test_power_grows_with_prompts_and_knows_neither_unit_nor_side(
    seed: int, prompts: int, factor: float
) -> None:
    known = np.random.default_rng(seed).normal(0.4, 1, (5, 8))
    power = power_of(known, prompts)
    assert ((power > 0) & (power <= 1)).all()
    sure = power > 1 - 1e-9
    assert (sure | (power_of(known, prompts + 9) > power)).all()
    np.testing.assert_allclose(power_of(-factor * known, prompts), power)
    np.testing.assert_allclose(power_of(known[:, ::-1], prompts), power)
    of_more = power_of(np.vstack([known, known]), prompts)[:5]
    assert (sure | (of_more < power)).all(), "where more are tried"


# --- latents beside latents
# ------------------------------------------------------------------------------------------------


@LAWS
@given(SEEDS, FACTORS, st.data())
def test_likeness_knows_neither_length_nor_sign_nor_zero_nor_the_order_of_texts(
    seed: int, factor: float, data: Any
) -> None:
    rng = np.random.default_rng(seed)
    mine, others = rng.normal(size=(4, 6)), rng.normal(size=(3, 6))
    order, columns = (list(data.draw(st.permutations(range(n)))) for n in (3, 6))
    cosines = largest_cosines(mine, others)
    assert ((cosines >= 0) & (cosines <= 1 + 1e-12)).all()
    for a, b in (
        (factor * mine, -others),
        (mine, others[order] * np.array([[factor], [1], [-3]])),
        (mine[:, columns], others[:, columns]),
    ):
        np.testing.assert_allclose(largest_cosines(a, b), cosines)
    assert (largest_cosines(mine, others[:2]) <= cosines).all(), "of fewer it is no larger"
    values, penalised = mine.T, others.T  # six texts
    found = largest_correlations(values, penalised)
    for a, b in (
        (factor * values + 3, -penalised - 1),
        (values[columns], penalised[columns]),
        (values, penalised[:, order]),
    ):
        np.testing.assert_allclose(largest_correlations(a, b), found)
    assert largest_correlations(values, values) == pytest.approx(np.ones(4))


@LAWS
@given(SEEDS, FACTORS, st.data())
def test_siblings_know_neither_texts_order_nor_the_unit_of_values_and_are_mutual(
    seed: int, factor: float, data: Any
) -> None:
    ranks, latents = some_ranks(seed, 25), list(range(LATENTS))
    found = by_firing(latents, ranks, most=LATENTS)
    order = list(data.draw(st.permutations(range(25))))
    again = ranks._replace(indices=ranks.indices[order], values=factor * ranks.values[order])
    assert by_firing(latents, again, most=LATENTS) == found
    fires = np.zeros((25, LATENTS), bool)
    rows = np.repeat(np.arange(25), K)
    fires[rows, ranks.indices[:, :K].ravel()] = ranks.values[:, :K].ravel() > 0
    for latent, near in found.items():
        for one in near:
            assert one["both"] == (fires[:, latent] & fires[:, one["latent"]]).sum()
            back = {x["latent"]: x for x in found[one["latent"]]}[latent]
            assert back["phi"] == pytest.approx(one["phi"]) and back["both"] == one["both"]
    directions = np.random.default_rng(seed).normal(size=(LATENTS, 5)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    near = by_direction(latents, directions, most=3)
    turned = by_direction(latents, -directions, most=3)
    assert turned == near and all(len(x) == 3 for x in near.values())
    few = by_direction(latents, directions, most=1)
    assert all(few[i] == near[i][:1] for i in latents)


@LAWS
@given(SEEDS, FACTORS, st.integers(1, 3), st.data())
def test_matches_at_random_know_no_unit_are_drawn_once_and_are_among_the_nearest(
    seed: int, factor: float, each: int, data: Any
) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(30, 2))
    targets, pool = np.array([4, 9, 17]), np.array([i for i in range(30) if i not in (4, 9, 17)])
    pool = np.array(data.draw(st.permutations(pool.tolist())))
    found = matched_at_random(targets, pool, features, each, 5)
    in_other_units = features * [factor, 1 / factor] + [3, -1]
    assert matched_at_random(targets, pool, in_other_units, each, 5) == found
    assert matched_at_random(targets, np.sort(pool), features, each, 5) == found
    flat = [latent for mine in found for latent in mine]
    assert len(flat) == len(set(flat)) == 3 * each and set(flat) <= set(pool.tolist())
    scaled = features / features.std(axis=0)
    away = np.square(scaled[pool] - scaled[4]).sum(axis=1)
    nearest = pool[np.argsort(away)[: 2 * each]]
    assert set(found[0]) <= set(nearest.tolist()), "of the first target"
    weight = rng.normal(size=30)
    density = rng.uniform(0.01, 0.5, 30)
    pools = random_pool([4, 9, 17], weight, density, pool.tolist(), each, 5)
    turned = random_pool([4, 9, 17], -weight, density, pool.tolist(), each, 5)
    for target, mine, theirs in zip((4, 9, 17), pools, turned, strict=True):
        assert {np.sign(weight[i]) for i in (*mine, *theirs)} <= {np.sign(weight[target])}


@LAWS
@given(SEEDS, st.data())
def test_monitors_follow_their_bounds_and_a_stricter_one_takes_none_that_a_looser_leaves(
    seed: int, data: Any
) -> None:
    rng = np.random.default_rng(seed)
    candidates = [MonitorCandidate(i, 1.0, *rng.uniform(0, 1, 2)) for i in range(9)]
    rates = {i: float(rng.uniform(0, 1)) for i in range(9)}
    loose, strict = (
        SelectConfig(monitors=9, monitor_max_cosine=c, monitor_max_correlation=r)
        for c, r in ((0.7, 0.8), (0.5, 0.6))
    )
    every = choose_monitors(candidates, rates, loose)
    few = choose_monitors(candidates, rates, strict)
    assert [m for m in every if m in few] == few
    low, high = MONITOR_RATES
    for found, select in ((every, loose), (few, strict)):
        assert found == [
            c
            for c in candidates
            if c.max_cosine < select.monitor_max_cosine
            and c.max_correlation < select.monitor_max_correlation
            and low <= rates[c.latent] <= high
        ]
    assert set(every) <= set(choose_monitors(candidates, None, loose))
    order = data.draw(st.permutations(candidates))
    assert set(choose_monitors(order, rates, loose)) == set(every)
    one = loose.model_copy(update={"monitors": 1})
    assert choose_monitors(candidates, rates, one) == every[:1]


@LAWS
@given(SEEDS, st.integers(1, 25), st.floats(0, 1), FACTORS, st.data())
def test_a_threshold_at_a_rate_is_exceeded_no_oftener_and_knows_no_unit_and_no_order(
    seed: int, n: int, rate: float, factor: float, data: Any
) -> None:
    z = np.random.default_rng(seed).integers(0, 5, n) / 2  # ties
    tau = tau_at_rate(z, rate)
    order = list(data.draw(st.permutations(range(n))))
    assert tau_at_rate(z[order], rate) == tau
    assert tau_at_rate(factor * z, rate) == factor * tau
    assert tau >= 0 and (z > tau).mean() <= rate + 1e-9
    lower = z[(z < tau)]
    if len(lower):
        assert (z > lower.max()).mean() > rate - 1e-9, "a lower one would be exceeded too often"
    assert tau_at_rate(z, min(rate + 0.2, 1.0)) <= tau


class Candidate(NamedTuple):
    latent: int
    matched_to: int


@LAWS
@given(st.integers(0, 999), st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_the_random_arm_tries_every_candidate_once_and_serves_the_penalised_in_turn(
    seed: int, matched: list[int]
) -> None:
    candidates = [Candidate(latent, to) for latent, to in enumerate(matched)]
    order = drawn_for(candidates, seed)
    assert sorted(order) == list(range(len(matched)))
    served = [matched[latent] for latent in order]
    for at in range(len(order)):
        counts = {to: served[: at + 1].count(to) for to in set(matched)}
        for to, n in counts.items():
            assert n == matched.count(to) or max(counts.values()) - n <= 1


@LAWS
@given(SEEDS, FACTORS, st.data())
def test_upstreams_score_knows_no_unit_and_changes_sign_with_the_sides(
    seed: int, factor: float, data: Any
) -> None:
    chosen, rejected = np.random.default_rng(seed).uniform(0, 3, (2, LATENTS))
    s = selection_scores(chosen, rejected)
    assert (np.abs(s) < 1).all()
    np.testing.assert_array_equal(selection_scores(factor * chosen, factor * rejected), s)
    np.testing.assert_array_equal(selection_scores(rejected, chosen), -s)
    order = list(data.draw(st.permutations(range(LATENTS))))
    np.testing.assert_allclose(selection_scores(chosen[order], rejected[order]), s[order])


# --- probes
# ------------------------------------------------------------------------------------------------


@settings(LAWS, max_examples=25)
@given(SEEDS, st.integers(3, 12), FACTORS, st.data())
def test_a_probe_knows_neither_the_order_nor_the_axes_of_differences_and_turns_with_them(
    seed: int, pairs: int, factor: float, data: Any
) -> None:
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(0.2, 1, (pairs, 5)), rng.uniform(0.1, 1, pairs)
    w = bradley_terry(x, weight, 0.3)
    order = list(data.draw(st.permutations(range(pairs))))
    close = {"rtol": 1e-4, "atol": 1e-6}
    np.testing.assert_allclose(bradley_terry(x[order], weight[order], 0.3), w, **close)
    np.testing.assert_allclose(bradley_terry(-x, weight, 0.3), -w, **close)
    axes = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    np.testing.assert_allclose(bradley_terry(x @ axes, weight, 0.3), w @ axes, **close)
    np.testing.assert_allclose(bradley_terry(x, factor * weight, factor * 0.3), w, **close)
    scaled = bradley_terry(factor * x, weight, factor**2 * 0.3)
    np.testing.assert_allclose(scaled, w / factor, **close)
    twice = bradley_terry(np.vstack([x, x]), np.r_[weight, weight] / 2, 0.3)
    np.testing.assert_allclose(twice, w, **close)


@LAWS
@given(PAIRS, st.data())
def test_pairs_of_a_prompt_share_its_weight_in_any_order(
    drawn: list[tuple[str, str, str]], data: Any
) -> None:
    pairs = [pair_of(*words) for words in drawn]
    rows = rows_for(pairs)
    found = pair_rows(pairs, rows)
    assert found.weight.sum() == pytest.approx(1)
    prompts = np.array([p.prompt.id for p in pairs])
    for prompt in set(prompts):
        mine = found.weight[prompts == prompt]
        assert mine.sum() == pytest.approx(1 / len(set(prompts))) and np.ptp(mine) == 0
    order = list(data.draw(st.permutations(range(len(pairs)))))
    again = pair_rows([pairs[i] for i in order], rows)
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(one[order], other)
