"""The arms of a run, known here alone: which there are, how a report calls them, in which order.

`ppo.arms` names the trained ones, `evaluate.arms` those that use the base policy as it is. What an
arm does is in `jobs/ppo.py` (its reward) or `sarm/evaluation/evaluate.py` (its responses).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Arm = Literal["penalty", "no_penalty", "random"]
UntrainedArm = Literal["prompted", "best_of_n"]


class ArmKind(NamedTuple):
    """One arm."""

    words: str
    trained: bool
    """Whether PPO trains it, once a seed. An untrained one is evaluated once, in a unit of its
    name: there are no trainings to differ, and the ladder compares trained arms alone.
    """


ARMS = {
    "base": ArmKind("base", trained=False),
    "prompted": ArmKind("prompted", trained=False),
    "best_of_n": ArmKind("best of n", trained=False),
    "no_penalty": ArmKind("no penalty", trained=True),
    "penalty": ArmKind("penalty", trained=True),
    "random": ArmKind("random", trained=True),
}
"""In the order in which reports list them."""


def arm_and_seed(unit: str) -> tuple[str, int]:
    """`penalty-seed0` as `("penalty", 0)`; an untrained policy as that of seed 0."""
    if unit in ARMS and not ARMS[unit].trained:
        return unit, 0
    arm, _, seed = unit.rpartition("-seed")
    return arm, int(seed)
