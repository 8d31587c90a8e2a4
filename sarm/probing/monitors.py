"""Latents to watch and latents to compare with: monitors, and the random arm's.

    monitors = choose_monitors(candidates, rates, config.select)  # rates on the policy's responses
    order = drawn_for(random_candidates, seed)                    # another draw for every seed

Pure functions of what select found; the rates come later, from the base policy's own responses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from sarm.config import MONITOR_RATES, SelectConfig
from sarm.probing.contrast import Floats
from sarm.probing.stats import matched_at_random


class MonitorCandidate(NamedTuple):
    """A confirmed harming latent that is not penalised."""

    latent: int
    tau: float
    """Its own threshold."""
    max_cosine: float
    """The largest |cos| of its direction with that of a penalised latent."""
    max_correlation: float
    """The largest |correlation| of its activation with that of a penalised latent."""


class _Monitored(Protocol):
    """What `choose_monitors` reads: a `MonitorCandidate`, or its record."""

    @property
    def latent(self) -> int: ...
    @property
    def max_cosine(self) -> float: ...
    @property
    def max_correlation(self) -> float: ...


M = TypeVar("M", bound=_Monitored)


def choose_monitors(
    candidates: Sequence[M],
    rates: Mapping[int, float] | None,
    select: SelectConfig,
    correlations: Mapping[int, float] | None = None,
) -> list[M]:
    """The first `select.monitors` candidates that read something else than every penalised latent
    and, where rates at tau on a policy's responses are given, that neither never nor always fire.

    Of a pair of latents that read one direction, or that fire together, one cannot tell whether the
    policy evades the other. `correlations` are the largest with a penalised latent where they were
    measured anew, by latent. Raises KeyError where a candidate has no rate or correlation.
    """
    low, high = MONITOR_RATES
    fit = [
        c
        for c in candidates
        if c.max_cosine < select.monitor_max_cosine
        and (c.max_correlation if correlations is None else correlations[c.latent])
        < select.monitor_max_correlation
        and (rates is None or low <= rates[c.latent] <= high)
    ]
    return fit[: select.monitors]


def largest_cosines(candidates: Floats, penalised: Floats) -> Floats:
    """For each candidate's direction (c, d_in) the largest |cos| with any penalised one (p, d_in);
    0 where there is none.
    """
    a, b = (
        x / np.maximum(np.linalg.norm(x, axis=1), 1e-12)[:, None] for x in (candidates, penalised)
    )
    return np.abs(a @ b.T).max(axis=1, initial=0.0)


def largest_correlations(candidates: Floats, penalised: Floats) -> Floats:
    """For each candidate's values z (texts, c) the largest |Pearson correlation| over texts with
    any penalised latent's (texts, p). A latent that is the same on all texts goes with none: 0.
    """
    centred = [x - x.mean(axis=0) for x in (candidates, penalised)]
    a, b = (x / np.maximum(np.linalg.norm(x, axis=0), 1e-12) for x in centred)
    return np.abs(a.T @ b).max(axis=1, initial=0.0)


# The random arm


class _Candidate(Protocol):
    """What `drawn_for` reads of a random candidate."""

    @property
    def latent(self) -> int: ...
    @property
    def matched_to(self) -> int: ...


def random_pool(
    targets: Sequence[int],
    weight: Floats,
    density: Floats,
    eligible: Sequence[int],
    each: int,
    seed: int,
) -> list[list[int]]:
    """For each target up to `each` of the eligible latents whose weight has its sign, matched at
    random on activity and |weight| (d_sae,); none twice.

    A latent of the other sign would be paid for where the target is charged: no control.
    """
    tiny = 1e-9
    matched_on = np.log(np.stack([density, np.abs(weight)], axis=1) + tiny)
    drawn: dict[int, list[int]] = {}
    for sign in (-1.0, 1.0):
        mine = np.array([t for t in targets if np.sign(weight[t]) == sign], dtype=np.int64)
        pool = np.array([e for e in eligible if np.sign(weight[e]) == sign], dtype=np.int64)
        found = matched_at_random(mine, pool, matched_on, each, seed)
        drawn |= dict(zip(mine.tolist(), found, strict=True))
    return [drawn.get(int(target), []) for target in targets]


def drawn_for(candidates: Sequence[_Candidate], seed: int) -> list[int]:
    """The random candidates in the order in which the arm of this seed tries them: drawn anew for
    every seed, those of each penalised latent in turn. Of few candidates seeds may share some.

    Whoever sets the dose takes the first that fire often enough on the base policy's responses.
    """
    rng = np.random.default_rng([seed, 6])
    groups: dict[int, list[int]] = {}
    for c in candidates:
        groups.setdefault(c.matched_to, []).append(c.latent)
    shuffled = [[group[i] for i in rng.permutation(len(group))] for group in groups.values()]
    longest = max(map(len, shuffled), default=0)
    return [group[turn] for turn in range(longest) for group in shuffled if turn < len(group)]


def tau_at_rate(z: Floats, rate: float) -> float:
    """The threshold >= 0 that values z (n,) exceed as nearly as ties allow at this rate, and never
    more often.
    """
    above = math.floor(rate * len(z) + 1e-9)
    return max(float(np.sort(z)[::-1][above]) if above < len(z) else 0.0, 0.0)
