"""Rates corrected for a detector's errors: by hand, and by simulation of detector and labels."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sarm.evaluation.detector import Detector, corrected_change, corrected_rate, youden
from sarm.evaluation.intervals import t_interval

D = Detector("d", 80, 100, 30, 300, "labels")


def test_rates_by_hand():
    assert (D.sensitivity, D.false_positives, D.precision) == (0.8, 0.1, 80 / 110)
    assert corrected_rate(0.1, D) == 0.0 and corrected_rate(0.45, D) == pytest.approx(0.5)
    assert corrected_rate(0.05, D) == 0.0 and corrected_rate(0.9, D) == 1.0
    assert D.record()["sensitivity"] == 0.8 and D.record()["found"] == 80


def test_youden_and_its_error_by_hand():
    s, f = 81 / 102, 31 / 302
    assert youden(D).value == pytest.approx(0.7)
    assert youden(D).se == pytest.approx(math.sqrt(s * (1 - s) / 102 + f * (1 - f) / 302))
    assert youden(Detector("p", 9, 9, 0, 9, "few")).se > 0.1
    assert all(map(math.isnan, youden(Detector("n", 0, 0, 0, 0, "none"))))
    assert all(map(math.isnan, youden(Detector("n", 0, 0, 2, 9, "answers alone"))))


def test_a_corrected_change_is_larger_and_its_interval_holds_the_detectors_error_too():
    counted = t_interval(0.07, 0.01**2, 50)
    found = corrected_change(counted, D)
    assert found.value == pytest.approx(0.1)
    by_detector = 0.1 * youden(D).se / 0.7
    assert found.se == pytest.approx(math.hypot(0.01 / 0.7, by_detector))
    assert found.low < 0.1 < found.high
    surer = D._replace(found=8000, refusals=10_000, false_alarms=3000, answers=30_000)
    assert corrected_change(counted, surer).se == pytest.approx(0.01 / 0.7, rel=0.02)


def test_a_detector_that_calls_at_random_corrects_nothing():
    blind = Detector("blind", 10, 100, 40, 400, "labels")
    assert math.isnan(corrected_change(t_interval(0.1, 1e-4, 9), blind).low)
    assert math.isnan(corrected_rate(0.5, blind))


def test_the_interval_covers_the_true_change():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        detector = Detector("d", rng.binomial(60, 0.75), 60, rng.binomial(80, 0.1), 80, "s")
        called = rng.binomial(400, 0.1 + 0.65 * np.array([0.10, 0.25])) / 400
        variance = (called * (1 - called) / 400).sum()
        found = corrected_change(t_interval(called[1] - called[0], variance, 798), detector)
        hits += found.low <= 0.15 <= found.high
    assert hits / 2000 > 0.93


def test_every_number_of_a_correction_by_hand():
    """Degrees of freedom too; of a detector that is worse than chance nothing is known."""
    s, f = 81 / 102, 31 / 302
    variance = s * (1 - s) / 102 + f * (1 - f) / 302
    j = youden(D)
    assert tuple(j) == pytest.approx(tuple(t_interval(0.7, variance, 398)))
    counted = t_interval(0.07, 0.01**2, 50)._replace(low=0.05, high=0.1)
    of_counts, of_detector = (0.01 / 0.7) ** 2, (0.1 * j.se / 0.7) ** 2
    total = of_counts + of_detector
    df = total**2 / (of_counts**2 / 50 + of_detector**2 / 398)
    want = t_interval(0.075 / 0.7, total, df)._replace(value=0.1)
    assert tuple(corrected_change(counted, D)) == pytest.approx(tuple(want))
    worse = Detector("worse", 1, 10, 20, 100, "labels")
    nothing = corrected_change(counted, worse)
    assert len(nothing) == 5 and all(map(math.isnan, nothing))
    assert math.isnan(corrected_rate(0.5, worse))


def test_a_record_in_whole_and_what_is_not_known():
    assert D.record() == {
        "name": "d",
        "found": 80,
        "refusals": 100,
        "false_alarms": 30,
        "answers": 300,
        "data": "labels",
        "sensitivity": 0.8,
        "false_positives": 0.1,
        "precision": 80 / 110,
    }
    none = Detector("n", 0, 0, 0, 0, "none").record()
    rates = ("sensitivity", "false_positives", "precision")
    assert all(math.isnan(none[rate]) for rate in rates)
    one = Detector("n", 0, 1, 1, 1, "few")
    assert (one.sensitivity, one.false_positives, one.precision) == (0.0, 1.0, 0.0)
    found = youden(Detector("n", 1, 1, 0, 1, "few"))
    assert (found.value, found.df) == (1.0, 1.0), "two answers have no degree to spare"
    assert len(youden(Detector("n", 0, 0, 2, 9, "x"))) == 5
