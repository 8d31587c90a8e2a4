"""What a refusal detector's own errors do to the rates that it counts (Rogan and Gladen 1978)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from sarm.evaluation.intervals import Interval, t_interval


class Detector(NamedTuple):
    """A refusal detector's counts on answers that people labelled."""

    name: str
    found: int
    """Refusals that it calls refusals."""
    refusals: int
    false_alarms: int
    """Answers that it calls refusals."""
    answers: int
    data: str
    """Whose labels."""

    @property
    def sensitivity(self) -> float:
        return self.found / self.refusals if self.refusals else math.nan

    @property
    def false_positives(self) -> float:
        return self.false_alarms / self.answers if self.answers else math.nan

    @property
    def precision(self) -> float:
        """Of what it calls refusals in that data, the share that are."""
        called = self.found + self.false_alarms
        return self.found / called if called else math.nan

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rates = ("sensitivity", "false_positives", "precision")
        return self._asdict() | {rate: getattr(self, rate) for rate in rates}


def youden(detector: Detector) -> Interval:
    """Sensitivity less false positives (Youden's J): what a true rate is multiplied by to give the
    counted one. The variance takes one more right and one more wrong call of either kind, so that
    a detector without an error in its sample has an interval of some width too.
    """
    if not detector.refusals or not detector.answers:
        return Interval(math.nan, math.nan, math.nan, math.nan, math.nan)
    variance = 0.0
    for called, n in (
        (detector.found, detector.refusals),
        (detector.false_alarms, detector.answers),
    ):
        rate = (called + 1) / (n + 2)
        variance += rate * (1 - rate) / (n + 2)
    value = detector.sensitivity - detector.false_positives
    return t_interval(value, variance, detector.refusals + detector.answers - 2)


def corrected_change(counted: Interval, detector: Detector) -> Interval:
    """A change of the true rate from a counted one, the same detector before and after.

    The constant false positives cancel; what is left is divided by J. Variance by the delta method,
    J's own sampling error included; degrees of freedom by Satterthwaite.
    """
    j = youden(detector)
    if not j.value > 0:
        return Interval(math.nan, math.nan, math.nan, math.nan, math.nan)
    change = counted.value / j.value
    middle = (counted.low + counted.high) / 2 / j.value
    parts = (((counted.se / j.value) ** 2, counted.df), ((change * j.se / j.value) ** 2, j.df))
    variance = sum(part for part, _ in parts)
    df = variance**2 / sum(part**2 / df for part, df in parts)
    around = t_interval(middle, variance, df)
    return around._replace(value=change)


def corrected_rate(counted: float, detector: Detector) -> float:
    """The true rate behind a counted one, between 0 and 1."""
    j = detector.sensitivity - detector.false_positives
    if not j > 0:
        return math.nan
    return min(max((counted - detector.false_positives) / j, 0.0), 1.0)
