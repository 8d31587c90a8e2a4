"""Discovery done again, and what tells the sides apart without the SAE: whole rows and matrices by
hand, at settings away from the default.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import scipy.stats

from sarm.config import UserError
from sarm.probing import baselines as fitting
from sarm.probing import permutation, rediscovery
from sarm.probing.baselines import L2, SARM, WORDS, baselines, bradley_terry, chosen_l2, words_of
from sarm.probing.contrast import Contrast, chunks, deal_of
from sarm.probing.effects import Encoded, contrasts_of, latent_table
from sarm.probing.permutation import FIRST, permutations_needed
from sarm.probing.rediscovery import Found, confirm, discover, rank_correlation
from sarm.probing.replication import power_of
from sarm.probing.select import judged
from sarm.probing.upstream import compared_rankings
from sarm.reward_model.interventions import Ranks
from sarm.training import heads
from sarm.training.heads import clustered_accuracy, pair_points
from tests.probing.test_probing import config_with
from tests.probing.test_validity import D_SAE, two_sources

# Discovery and confirmation again


def few_texts() -> tuple[Encoded, Contrast, Contrast]:
    """Three latents on four texts: a prompt of two responses, and one of another two."""
    z = np.array([[3, 1, 0], [1, 2, 4], [0, 5, 1], [2, 2, 2]], np.float32)
    ranks = Ranks(np.tile(np.arange(3), (4, 1)).astype(np.int32), z, 3, 3)
    weight = np.array([1.0, -0.5, 0.25], np.float32)
    encoded = Encoded(pd.DataFrame({"text_id": range(4)}), ranks, np.zeros((4, 2)), weight)
    one = Contrast(np.array([0, 1]), np.array([0, 0]), np.array([1.0, 0]), np.array([0, 1.0]), 1)
    return encoded, one, one._replace(rows=np.array([2, 3]))


def counted(monkeypatch: pytest.MonkeyPatch, p: float) -> list[Any]:
    """What permutations are asked for, all of which give this p."""
    asked: list[Any] = []

    def permutation_p(values: Any, contrast: Any, *rest: Any) -> np.ndarray:
        asked.append((values.toarray().tolist(), contrast.rows.tolist(), *rest))
        return np.full(values.shape[0], p)

    monkeypatch.setattr(rediscovery, "permutation_p", permutation_p)
    return asked


def test_discovery_again_asks_for_what_the_probe_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, one, other = few_texts()
    asked = counted(monkeypatch, 0.01)
    settings = {"probe__min_prompts_active": 1, "select__effect": "head", "select__fdr": 0.2}
    config = config_with(**settings, select__max_density=0.6)
    found = discover(encoded, [one], config, 40, "a device")
    assert found.tested.tolist() == [False, False, True], "0 and 1 fire on all texts"
    needed = permutations_needed(1, 0.2)
    assert asked == [([[0.0, 1.0]], [0, 1], FIRST, needed, 40, "a device")]
    # one prompt: the effect is the difference itself
    assert found.effect.tolist() == [3 - 1, -0.5 * (1 - 2), 0.25 * (0 - 4)]
    assert (np.isnan(found.p) == ~found.tested).all() and (found.p[found.tested] == 0.01).all()
    assert (found.discovered == found.tested).all()
    asked.clear()
    both = discover(encoded, [one, other], config_with(**settings, select__max_density=1), 40, "x")
    assert both.tested.tolist() == [True, True, True]
    needed = permutations_needed(3, 0.2)
    assert [call[1:] for call in asked] == [
        ([0, 1], FIRST, needed, 40, "x"),
        ([2, 3], FIRST, needed, 41, "x"),
    ]
    assert both.p.tolist() == [1.0, 1.0, 0.01], "0 and 1 move the two margins apart"


def test_the_effect_of_two_contrasts_weighs_prompts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, one, _ = few_texts()
    counted(monkeypatch, 0.5)
    three = Contrast(
        np.array([2, 3, 2, 0, 1, 3]),
        np.array([0, 0, 1, 1, 2, 2]),
        np.array([1.0, 0, 1, 0, 1, 0]),
        np.array([0, 1.0, 0, 1, 0, 1]),
        3,
    )
    config = config_with(probe__min_prompts_active=1, select__effect="head")
    found = discover(encoded, [one, three], config, 0, "cpu")
    first = [2.0, 0.5, -1.0]
    z = encoded.ranks.values
    sums = ((z[2] - z[3]) + (z[2] - z[0]) + (z[1] - z[3])) * encoded.head_weight
    assert found.effect == pytest.approx((np.array(first) + sums) / 4)
    assert not found.discovered.any()
    nobody = Contrast(*(np.zeros(0, t) for t in (int, int, float, float)), 0)
    none = discover(encoded, [nobody], config, 0, "cpu")
    assert not none.tested.any() and none.effect.tolist() == [0, 0, 0]
    assert np.isnan(none.p).all() and not none.discovered.any()


def test_confirmation_wants_the_same_sign_and_holm_below_its_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded, one, _ = few_texts()
    asked = counted(monkeypatch, 0.02)
    config = config_with(select__effect="head").model_copy(update={"seed": 5})
    found = Found(
        np.ones(3, bool), np.array([0.5, -0.5, -2.0]), np.ones(3), np.array([True, True, False])
    )
    # 0 keeps its sign, 1 does not, 2 was not discovered; Holm doubles 0.02 to 0.04
    assert confirm(encoded, found, one, config, "a device").tolist() == [True, False, False]
    ((values, of, *rest),) = asked
    assert (values, of) == ([[3.0, 1.0], [-0.5, -1.0]], [0, 1])
    assert rest == [FIRST, 20 * permutations_needed(2, 0.05), 12, "a device"]
    counted(monkeypatch, 0.025)
    assert not confirm(encoded, found, one, config, "cpu").any(), "Holm's is 0.05, not below it"
    effect, p = rediscovery.tested_again(encoded, np.array([2, 0]), one, config, "cpu")
    assert effect.tolist() == [-1.0, 2.0] and p.tolist() == [0.025, 0.025]
    asked = counted(monkeypatch, 1.0)
    effect, p = rediscovery.tested_again(encoded, np.zeros(0, int), one, config, "cpu")
    assert (len(effect), len(p)) == (0, 0)
    assert asked[0][3] == 20 * permutations_needed(1, 0.05)


def test_ranks_of_three_have_a_correlation_and_those_of_two_have_none() -> None:
    x = np.array([1.0, 2, 3])
    assert rank_correlation(x, np.array([1.0, 5, 2])) == pytest.approx(0.5)
    assert rank_correlation(x[:2], x[:2]) is None
    assert rank_correlation(x, np.ones(3)) is None and rank_correlation(np.ones(3), x) is None


def test_power_of_what_does_not_vary_is_told_without_a_warning() -> None:
    with np.errstate(all="raise"):
        power = power_of(np.array([[0.0, 0, 0], [1.0, 1, 1], [1.0, 2, 3]]), 9)
    # a mean of 2 with a standard error of 1 / sqrt(9), against a threshold of 0.05 / 3
    reached = scipy.stats.norm.sf(scipy.stats.norm.isf(0.05 / 2 / 3) - 2 * 3)
    assert power.tolist() == [0.0, 0.0, pytest.approx(reached)]


# Fits


def test_a_fit_takes_newton_s_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the right second derivatives a dozen; a hundred are too few with others."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)) + np.array([2, 1, 0, 0, 0])
    weight = rng.uniform(0.5, 1.5, 200) / 200
    steps: list[Any] = []
    solve = np.linalg.solve

    def counting(a: Any, b: Any) -> Any:
        steps.append((a, b))
        return solve(a, b)

    monkeypatch.setattr(np.linalg, "solve", counting)
    w = bradley_terry(x, weight, 1e-2)
    assert len(steps) < 12
    hessian, gradient = steps[0]  # at zero every pair is at one half
    assert hessian == pytest.approx(1e-2 * np.eye(5) + x.T @ (0.25 * weight[:, None] * x))
    assert gradient == pytest.approx(-x.T @ (0.5 * weight))
    last = 1e-2 * w - x.T @ (weight / (1 + np.exp(x @ w)))
    assert np.abs(last).max() < 1e-7


def test_a_fit_whose_steps_are_halved_ends_at_its_minimum() -> None:
    """Two pairs that pull apart, the one a thousand times as heavy: a line search by another loss
    than the gradient's stalls on the way.
    """
    x, weight = np.array([[-2.0, 1.0], [12.0, -1.0]]), np.array([100.0, 0.1])
    w = bradley_terry(x, weight, 0.1)
    assert 0.1 * w == pytest.approx(x.T @ (weight / (1 + np.exp(x @ w))), abs=1e-6)


def test_the_strength_is_the_one_that_does_best_on_other_folds() -> None:
    """Fits by hand: strength s gives margins of best[s] on every pair left out."""
    prompts = np.array([0, 1, 2, 3, 4, 5, 5])
    difference = np.ones((7, 1))
    asked: list[Any] = []

    def fit(rows: np.ndarray, strength: float) -> np.ndarray:
        asked.append((rows.tolist(), strength))
        return np.array([{1e-2: 3.0, 1e-1: 2.0}.get(strength, 1.0)])

    assert chosen_l2(difference, np.ones(7), prompts, fit) == 1e-2
    assert len(asked) == 25 and [s for _, s in asked[:5]] == list(L2)
    assert asked[0][0] == [False, True, True, True, True, False, False], "5 is in 0's fold"
    assert chosen_l2(difference, np.ones(7), prompts[:4].repeat(2)[:7], fit) == L2[0], "four folds"

    def by_fold(rows: np.ndarray, strength: float) -> np.ndarray:
        """Strength 1 is worst on the first fold and best on the others."""
        first = not rows[0]
        return np.array([(-9.0 if first else 2.0) if strength == 1.0 else 0.5])

    assert chosen_l2(difference, np.ones(7), prompts, by_fold) == L2[0]
    light = np.array([0.01, 1, 1, 1, 1, 0.01, 0.01])  # pairs count by their weight
    assert chosen_l2(difference, light, prompts, by_fold) == 1.0


def test_words_are_weighed_as_scikit_learn_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smoothed idf and rows of length 1, over words of two letters or more and pairs of them."""
    assert words_of("I DON'T know, a thing!") == ["don", "know", "thing", "don know", "know thing"]
    _, data, _ = two_sources()
    pairs = [
        data.pairs[0]._replace(chosen="no no thanks", rejected="yes sure"),
        data.pairs[2]._replace(chosen="no", rejected="yes sure"),
        data.pairs[4]._replace(chosen="thanks sure", rejected="a b"),
    ]
    given: list[Any] = []

    def fit_head(difference: Any, weight: Any, l2: float, *, max_steps: int) -> np.ndarray:
        given.append((difference.toarray(), weight.tolist(), l2, max_steps))
        return np.arange(1.0, difference.shape[1] + 1)

    monkeypatch.setattr(heads, "fit_head", fit_head)
    weight = np.array([0.5, 0.25, 0.25])
    score = fitting.word_scores(pairs, weight, np.array([0, 1, 2]))
    texts = ["no no thanks", "no", "thanks sure", "yes sure", "a b"]
    seen = Counter(word for text in texts for word in set(words_of(text)))
    names = sorted(seen)
    assert names == ["no", "no no", "no thanks", "sure", "thanks", "thanks sure", "yes", "yes sure"]

    def row(text: str) -> np.ndarray:
        counts = Counter(words_of(text))
        raw = np.array([counts[w] * (math.log(6 / (1 + seen[w])) + 1) for w in names])
        return raw / (np.linalg.norm(raw) or 1)

    difference, weights, l2, steps = given[-1]
    assert difference == pytest.approx(np.stack([row(p.chosen) - row(p.rejected) for p in pairs]))
    assert (weights, l2, steps) == ([0.5, 0.25, 0.25], L2[0], 200), "too few prompts for folds"
    unseen = ["never seen", "sure no", "yes yes no"]
    expected = [row(text) @ np.arange(1.0, 9) for text in unseen]
    assert score(unseen) == pytest.approx(np.array(expected)) and expected[0] == 0


def test_every_row_of_the_baselines_is_its_scores_on_its_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded, data, config = two_sources(prompts=30)
    contrasts = contrasts_of(data, encoded, ())
    table = judged(latent_table(encoded, contrasts, 0, D_SAE, config), config.select)
    table["confirmed"] = table.index.isin([3, 11, 20])
    given: list[Any] = []
    axis = np.arange(encoded.states.shape[1], dtype=float)

    def probe(difference: Any, weight: Any, prompts: Any) -> Any:
        given.append((difference, weight, prompts))
        return axis

    monkeypatch.setattr(fitting, "logistic_probe", probe)
    monkeypatch.setattr(
        fitting,
        "word_scores",
        lambda pairs, weight, prompts: lambda texts: np.array([len(t) % 3 for t in texts], float),
    )
    rows = baselines(table, encoded, data, config)
    h = encoded.states.astype(np.float64)
    x = (h - h.mean(1, keepdims=True)) / (h.std(1, ddof=1, keepdims=True) + 1e-6)
    ids = {id_: i for i, id_ in enumerate(encoded.texts["text_id"])}
    discovery = [p for p in data.pairs if p.prompt.part == "discovery"]
    fit = fitting.pair_rows(discovery, ids)
    apart = x[fit.chosen] - x[fit.rejected]
    ((difference, weight, prompts),) = given
    assert difference == pytest.approx(apart)
    assert weight == pytest.approx(fit.weight) and (prompts == fit.prompts).all()
    k = encoded.ranks.k
    z = np.zeros((len(encoded.texts), D_SAE))
    np.put_along_axis(z, encoded.ranks.indices[:, :k], encoded.ranks.values[:, :k], 1)
    paid = z * encoded.head_weight
    scores = {
        SARM: paid.sum(1),
        "its 3 confirmed latents": paid[:, [3, 11, 20]].sum(1),
        "SARM reward without them": np.delete(paid, [3, 11, 20], axis=1).sum(1),
        "difference in means": x @ (fit.weight @ apart),
        "logistic probe": x @ axis,
    }
    expected = []
    for where, mine in (
        ("validation", [p for p in data.pairs if p.prompt.part == "validation"]),
        ("B, test", [p for p in data.pairs if p.source == "b"]),
    ):
        at, whose = fitting.pair_rows(mine, ids), [p.prompt.id for p in mine]
        points = {name: pair_points(s[at.chosen] - s[at.rejected]) for name, s in scores.items()}
        longer = [len(p.chosen) % 3 - len(p.rejected) % 3 for p in mine]
        points[WORDS] = pair_points(np.array(longer, float))
        for name, one in points.items():
            accuracy = clustered_accuracy(one, whose)
            behind = clustered_accuracy(points[SARM] - one, whose, (-1.0, 1.0))
            expected.append(
                {
                    "on": where,
                    "score": name,
                    "accuracy": pytest.approx(accuracy.mean),
                    "standard_error": pytest.approx(accuracy.standard_error),
                    "pairs": len(mine),
                    "prompts": len(set(whose)),
                    "behind": pytest.approx(behind.mean),
                    "behind_error": pytest.approx(behind.standard_error),
                }
            )
    assert rows == expected


def test_a_probe_is_fitted_to_the_weights_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def fit(difference: Any, weight: Any, l2: float) -> np.ndarray:
        given.append((difference.tolist(), weight.tolist(), l2))
        return np.array([1.0])

    monkeypatch.setattr(fitting, "bradley_terry", fit)
    monkeypatch.setattr(fitting, "chosen_l2", lambda d, w, p, fit: fit(p > 0, 7.0) * 0 + 0.3)
    difference, weight = np.array([[1.0], [2.0], [3.0]]), np.array([1.0, 1.0, 2.0])
    w = fitting.logistic_probe(difference, weight, np.array([0, 1, 2]))
    assert w.tolist() == [1.0]
    assert given[0] == ([[2.0], [3.0]], [1 / 3, 2 / 3], 7.0)
    assert given[1] == ([[1.0], [2.0], [3.0]], [0.25, 0.25, 0.5], 0.3)


# Permutations


def counts_of(given: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is counted, where chance matches each latent as often as given, chunk by chunk."""
    asked: list[Any] = []

    def count(latents: np.ndarray, begin: int, end: int, seed: int) -> np.ndarray:
        asked.append((latents.tolist(), begin, end, seed))
        return np.array([given[i].pop(0) for i in latents.tolist()])

    monkeypatch.setattr(permutation, "_counter_on_cpu", lambda values, design: count)
    return asked


def test_a_latent_that_chance_matches_often_stops_at_the_next_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, one, _ = few_texts()
    values = scipy.sparse.csr_array(np.ones((3, 2)))
    asked = counts_of({0: [20], 1: [19, 1, 0], 2: [0] * 5}, monkeypatch)
    p = permutation.permutation_p(values, one, 3000, 5000, 7)
    assert asked == [
        ([0, 1, 2], 0, 1000, 7),
        ([1, 2], 1000, 2024, 7),
        ([1, 2], 2024, 3000, 7),
        ([2], 3000, 4024, 7),
        ([2], 4024, 5000, 7),
    ]
    assert p.tolist() == [2 * 21 / 1001, 2 * 21 / 3001, 2 / 5001]
    asked = counts_of({i: [n] for i, n in enumerate((20, 400, 21))}, monkeypatch)
    few = permutation.permutation_p(values, one, 500, 300, 7)
    assert asked == [([0, 1, 2], 0, 500, 7)], "at most so many, but never fewer than asked for"
    assert few.tolist() == [2 * 21 / 501, 1.0, 2 * 22 / 501]
    counts_of({i: [20] for i in range(3)}, monkeypatch)
    assert permutation.permutation_p(values, one, 9000, 9000, 7).tolist() == [2 * 21 / 1001] * 3
    nobody = Contrast(*(np.zeros(0, t) for t in (int, int, float, float)), 0)
    assert permutation.permutation_p(values, nobody, 9, 9, 7).tolist() == [1.0] * 3
    assert permutation.permutation_p(values[:0], one, 9, 9, 7).tolist() == []
    assert [permutations_needed(n, 0.3) for n in (0, 1, 3)] == [0, 7, 20]


def test_a_deal_s_integers_by_hand() -> None:
    """A pair; one against three; and two chosen in three of four pairs, and a lone response."""
    labels = [1, -1, 1, -1 / 3, -1 / 3, -1 / 3, 0.75, 0.25, -1, 0]
    chosen, rejected = np.maximum(labels, 0), np.maximum(-np.array(labels), 0)
    prompts = np.array([0, 0, 1, 1, 1, 1, 2, 2, 2, 3])
    deal = deal_of(Contrast(np.arange(10), prompts, chosen, rejected, 4))
    assert deal.labels.tolist() == [1, -1, 3, -1, -1, -1, 3, 1, -4, 0]
    assert deal.denominators.tolist() == [1, 1, 3, 3, 3, 3, 4, 4, 4, 1]
    assert deal.last.tolist() == [1, 1, 5, 5, 5, 5, 8, 8, 8, 9]
    assert [g.tolist() for g in deal.groups] == [[[9]], [[0, 1]], [[6, 7, 8]], [[2, 3, 4, 5]]]
    assert chunks({3, 7}, 2) == [(0, 2), (2, 3), (3, 5), (5, 7)]
    assert chunks({4}, 9) == [(0, 4)]


# Rankings


def test_rankings_compared_are_rows_by_hand() -> None:
    table = pd.DataFrame(
        {
            "latent": [0, 1, 2, 3, 4],
            "role": ["promoting", "promoting", "harming", "harming", "none"],
            "candidate": [True, True, True, True, True],
            "tested": [True, True, True, True, False],
            "confirmed": [True, False, True, True, False],
            "effect": [1.0, 3.0, 2.0, 2.0, 9.0],
            "weight": [0.5, 0.25, -0.5, -1.0, 2.0],
            "delta_z": [0.0, 4.0, -1.0, -2.0, 1.0],
            "upstream_s": [0.9, 0.1, -0.2, 0.3, -0.9],
            "effect_validation": [1.0, math.nan, 4.0, 2.0, math.nan],
        }
    )
    columns = ("latents", "shared_with_effect", "tested", "of_role", "confirmed")
    columns += ("mean_effect_validation",)
    found = {
        (row["ranking"], row["role"]): tuple(row[c] for c in columns)
        for row in compared_rankings(table, 2)
    }
    assert found == {
        ("effect", "promoting"): ([1, 0], 2, 2, 2, 1, 1.0),
        ("effect", "harming"): ([2, 3], 2, 2, 2, 2, 3.0),
        ("weight", "promoting"): ([4, 0], 1, 1, 1, 1, 1.0),
        ("weight", "harming"): ([3, 2], 2, 2, 2, 2, 3.0),
        ("difference", "promoting"): ([1, 4], 1, 1, 1, 0, None),
        ("difference", "harming"): ([3, 2], 2, 2, 2, 2, 3.0),
        ("upstream_s", "promoting"): ([0, 3], 1, 2, 1, 1, 1.5),
        ("upstream_s", "harming"): ([4, 2], 1, 1, 1, 1, 4.0),
    }


def test_a_text_that_was_not_encoded_is_told_by_its_pair() -> None:
    encoded, data, _ = two_sources(prompts=3)
    with pytest.raises(UserError) as refused:
        contrasts_of(data, encoded._replace(texts=encoded.texts[:1]), ())
    assert str(refused.value) == (
        f"pair {next(p for p in data.pairs if p.prompt.part == 'discovery').id} has a text that"
        " encode has not seen; the data changed since: run encode again in a new run"
    )
