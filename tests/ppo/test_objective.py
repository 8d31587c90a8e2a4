"""Rewards by token, statistics and schedules against numbers worked by hand."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from sarm.ppo import objective as o

T = torch.tensor


def mask_of(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) < T(lengths)[:, None]


def test_token_rewards_by_hand() -> None:
    kl = T([[1.0, 2.0, math.nan], [4.0, 5.0, 6.0], [math.nan, math.nan, math.nan]])
    got = o.token_rewards(T([10.0, 20.0, 30.0]), kl, mask_of(2, 3, 0), 0.1)
    torch.testing.assert_close(got, T([[-0.1, 9.8, 0.0], [-0.4, -0.5, 19.4], [0.0, 0.0, 0.0]]))


def test_missing_eos_costs_only_unended_responses() -> None:
    assert o.penalise_missing_eos(T([1.0, 2.0]), T([True, False]), 0.5).tolist() == [1.0, 1.5]


def test_whiten_by_hand() -> None:
    values, mask = T([[1.0, 3.0, 999.0], [5.0, 7.0, 9.0]]), mask_of(2, 3)  # mean 5, variance 8
    want = T([[-4.0, -2.0, 0.0], [0.0, 2.0, 4.0]]) / math.sqrt(8)
    torch.testing.assert_close(o.whiten(values, mask), want)


def test_whitened_values_have_mean_0_and_variance_1_whatever_their_mean() -> None:
    torch.manual_seed(0)
    values, mask = 1000 + torch.randn(6, 5), mask_of(5, 2, 4, 1, 0, 0)
    got = o.whiten(values, mask)[mask]
    assert got.mean().abs() < 1e-5 and got.std(correction=0) == pytest.approx(1, abs=1e-5)


def test_whitening_equal_values_gives_zeros() -> None:
    assert o.whiten(torch.full((2, 3), 7.0), mask_of(3, 2)).abs().max() == 0


def test_explained_variance_by_hand() -> None:
    returns, mask = T([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 2, dtype=torch.bool)
    assert o.explained_variance(returns, returns, mask) == 1
    assert o.explained_variance(torch.zeros(2, 2), returns, mask) == 0
    values = T([[1.0, 2.0], [3.0, 2.0]])  # errors 0, 0, 0, 2: variance 0.75; returns: 1.25
    assert o.explained_variance(values, returns, mask) == pytest.approx(0.4)
    assert math.isnan(o.explained_variance(values, torch.ones(2, 2), mask))
    # of the first row alone: errors 0, 0.2: variance 0.01; returns: 0.04
    first, small = T([[True, True], [False, False]]), T([[0.1, 0.5], [9.0, -9.0]])
    assert o.explained_variance(T([[0.1, 0.3], [0.0, 5.0]]), small, first) == pytest.approx(0.75)


def rates(schedule: Any, warmup: int | None = None, steps: int = 5) -> list[float]:
    given = {} if warmup is None else {"warmup_steps": warmup}
    return [
        o.learning_rate(s, steps=steps, peak=1.0, schedule=schedule, **given) for s in range(steps)
    ]


def test_learning_rates_by_hand() -> None:
    assert rates("constant") == [1.0] * 5
    assert rates("linear") == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates("linear", warmup=2) == pytest.approx([1 / 3, 2 / 3, 1.0, 2 / 3, 1 / 3])
    assert rates("cosine", steps=4) == pytest.approx(
        [1.0, 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4]
    )
    assert rates("linear", warmup=1, steps=2) == [0.5, 1.0]
    # beyond the last step, as where a run goes on: no lower than 0
    assert o.learning_rate(1, steps=1, peak=1.0, schedule="linear") == 0.0
    assert rates("linear", warmup=9) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_running_sd_equals_that_of_all_values_at_once_and_survives_json() -> None:
    values = (1e6 + torch.randn(100, dtype=torch.float64)).tolist()
    running = o.RunningSd()
    for start, stop in ((0, 1), (1, 40), (40, 40), (40, 100)):
        running = running.updated(T(values[start:stop], dtype=torch.float64))
        running = o.RunningSd(**json.loads(json.dumps(running._asdict())))
    assert running.sd == pytest.approx(statistics.stdev(values), rel=1e-9) and running.n == 100


def test_running_sd_is_one_until_values_differ_and_scaled_rewards_are_cut() -> None:
    assert (
        o.RunningSd().sd
        == o.RunningSd().updated(T([3.0])).sd
        == o.RunningSd().updated(T([3.0, 3.0])).sd
        == 1.0
    )
    assert o.scaled_rewards(T([1.0, -30.0, 24.0]), 2.0, 10.0).tolist() == [0.5, -10.0, 10.0]
    assert o.scaled_rewards(T([1.0, -30.0]), 2.0, None).tolist() == [0.5, -15.0]
