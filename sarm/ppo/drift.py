"""How far a policy has come from its reference, by the KL's mean over five steps: pure functions.

A step's KL is an estimate from its batch, which is noisy: by one step alone arms would be kept at
distances that are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

WINDOW = 5
"""Steps."""


class Drift(NamedTuple):
    """Of the steps so far."""

    recent: tuple[float, ...] = ()
    """KL of the newest steps, at most `WINDOW`, in nats per response; the newest last."""
    farthest: float = 0.0
    """The largest mean that there was."""

    @property
    def mean(self) -> float | None:
        """Over the newest `WINDOW` steps; None before there are as many."""
        return sum(self.recent) / WINDOW if len(self.recent) == WINDOW else None

    def after(self, kl: float) -> Drift:
        """With one more step."""
        recent = Drift((*self.recent, kl)[-WINDOW:])
        return recent._replace(farthest=max(self.farthest, recent.mean or 0.0))

    def passed(self, before: Drift, distances: Sequence[float]) -> list[float]:
        """Which of the distances, in nats, have been reached since `before` for the first time."""
        return [d for d in distances if before.farthest < d <= self.farthest]
