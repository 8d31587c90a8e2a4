"""The five-step mean KL, and when it first reaches a distance: by hand."""

from __future__ import annotations

import pytest

from sarm.ppo.drift import Drift


def test_there_is_no_mean_before_the_fifth_step() -> None:
    drift = Drift()
    for kl in (9.0, 9.0, 9.0, 9.0):
        drift = drift.after(kl)
    assert (drift.mean, drift.farthest) == (None, 0.0)
    drift = drift.after(4.0)
    assert drift.mean == drift.farthest == 8.0


def test_the_mean_is_of_the_newest_five_and_the_farthest_stays() -> None:
    drift = Drift()
    for kl in (10.0, 1.0, 2.0, 3.0, 4.0, 5.0):
        drift = drift.after(kl)
    assert drift.recent == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert (drift.mean, drift.farthest) == (3.0, 4.0)


def test_a_distance_is_passed_once_and_several_may_be_at_a_time() -> None:
    distances = (0.5, 1.0, 2.0, 3.0)
    # Means from the fifth step on: 0.4, 0.5, 0.6, 2.6, 2.6, 0.6, 2.6.
    kls = (0.4, 0.4, 0.4, 0.4, 0.4, 0.9, 0.9, 10.4, 0.4, -9.6, 10.9)
    passed, drift = [], Drift()
    for kl in kls:
        before, drift = drift, drift.after(kl)
        passed.append(drift.passed(before, distances))
    assert passed == [[]] * 5 + [[0.5], [], [1.0, 2.0], [], [], []]
    assert drift.farthest == pytest.approx(2.6)
