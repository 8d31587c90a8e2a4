"""Which latents are watched and which are drawn at random: pure functions, on rows that differ."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from sarm.config import SelectConfig
from sarm.probing.monitors import (
    MonitorCandidate,
    choose_monitors,
    drawn_for,
    largest_correlations,
    largest_cosines,
    random_pool,
    tau_at_rate,
)

SELECT = SelectConfig(monitors=3, monitor_max_cosine=0.3, monitor_max_correlation=0.5)


def candidate(latent: int, cosine: float = 0.1, correlation: float = 0.2) -> MonitorCandidate:
    return MonitorCandidate(latent, 1.5, cosine, correlation)


def chosen(*candidates: MonitorCandidate, **rest: object) -> list[int]:
    return [m.latent for m in choose_monitors(candidates, select=SELECT, **{"rates": None, **rest})]  # type: ignore[arg-type]


def test_monitors_keep_every_bound_and_their_order() -> None:
    many = [
        candidate(7),
        candidate(4, cosine=0.3),
        candidate(9, correlation=0.5),
        candidate(2, cosine=0.29, correlation=0.49),
        candidate(5),
        candidate(1),
    ]
    assert chosen(*many) == [7, 2, 5]
    rates = {7: 0.05, 4: 0.5, 9: 0.5, 2: 0.1, 5: 0.95, 1: 0.9}
    assert chosen(*many, rates=rates) == [2, 1]
    anew = dict.fromkeys(rates, 0.1) | {2: 0.6, 9: 0.1}
    assert chosen(*many, rates=rates, correlations=anew) == [9, 1]
    with pytest.raises(KeyError):
        chosen(candidate(3), rates={})


def test_likeness_is_the_largest_with_any_penalised() -> None:
    penalised = np.array([[2.0, 0, 0], [0, 3.0, 0]])
    candidates = np.array([[0.6, 0, 0.8], [0, -5.0, 0], [0.1, 0.2, 0.3], [0, 0, 0]])
    norm = np.sqrt(0.14)
    expected = [0.6, 1.0, 0.2 / norm, 0.0]
    assert largest_cosines(candidates, penalised) == pytest.approx(expected)
    assert largest_cosines(candidates, penalised[:0]).tolist() == [0, 0, 0, 0]


def test_correlation_is_pearson_s_and_the_largest() -> None:
    rng = np.random.default_rng(0)
    z = rng.exponential(size=(40, 5)) * (rng.random((40, 5)) < 0.5)
    z[:, 1] -= z[:, 3]
    z[:, 2] = 0.7
    ours = largest_correlations(z[:, :3], z[:, 3:])
    table = np.corrcoef(z[:, [0, 1, 3, 4]].T)
    assert ours[:2] == pytest.approx(np.abs(table[:2, 2:]).max(axis=1))
    assert ours[2] == pytest.approx(0, abs=1e-3)
    assert ours[1] > 0.5 > np.abs(table[1, 3])


def test_a_tau_of_its_own_fires_at_the_rate_and_no_oftener() -> None:
    z = np.array([0.0, 0, 0, 1, 2, 2, 2, 5])
    assert [tau_at_rate(z, rate) for rate in (0.125, 0.5, 0.9, 1.0)] == [2.0, 1.0, 0.0, 0.0]
    for rate in (0.125, 0.3, 0.5, 0.6):
        assert (z > tau_at_rate(z, rate)).mean() <= rate
    assert tau_at_rate(np.array([-3.0, -2.0, -1.0]), 1.0) == 0.0
    assert tau_at_rate(z, 0.0) == 5.0


class Drawn(NamedTuple):
    latent: int
    matched_to: int


def test_the_random_arm_draws_anew_for_every_seed_and_serves_the_penalised_in_turn() -> None:
    candidates = [Drawn(10 * target + i, target) for i in range(6) for target in (1, 2, 3)]
    orders = [drawn_for(candidates, seed) for seed in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    assert len({tuple(sorted(order[:3])) for order in orders}) == 4, "other latents, not an order"
    for order in orders:
        assert sorted(order) == sorted(c.latent for c in candidates)
        assert [latent // 10 for latent in order] == [1, 2, 3] * 6
    assert drawn_for(candidates, 2) == orders[2]
    assert drawn_for([], 0) == []


def test_random_latents_have_the_sign_of_their_match_and_its_size() -> None:
    rng = np.random.default_rng(1)
    weight, density = rng.uniform(-1, 1, 200), rng.uniform(0.01, 0.6, 200)
    weight[[0, 1]], density[[0, 1]] = [-0.5, 0.5], [0.3, 0.3]
    eligible = [i for i in range(2, 200) if i % 7]
    first, second = random_pool([0, 1], weight, density, eligible, 8, seed=0)
    assert len(first) == len(second) == 8 and set(first) | set(second) <= set(eligible)
    assert (weight[first] < 0).all() and (weight[second] > 0).all()
    assert np.abs(np.abs(weight[[*first, *second]]) - 0.5).mean() < 0.2
    assert random_pool([0, 1], weight, density, eligible, 8, seed=1) != [first, second]
    assert random_pool([0, 1], weight, density, [3, 5], 8, 0) == [
        [i for i in (3, 5) if weight[i] < 0],
        [i for i in (3, 5) if weight[i] > 0],
    ]
    assert random_pool([0, 1], weight, density, [], 8, 0) == [[], []], "nobody to draw from"
    assert random_pool([0], weight, density, [i for i in (3, 5) if weight[i] > 0], 2, 0) == [[]]
