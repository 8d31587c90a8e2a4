"""Whether a SARM reads the policy's text: agreement under cuts, variance a policy can move, a
positive control, and the smallest effect that a planned evaluation would detect. Numpy and
SciPy's t distribution alone.

`python -m jobs calibrate` publishes what these find; the verdict's rung 0 looks at it.
`python -m pytest tests/evaluation/test_instrument.py` checks each against numbers worked by hand.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from sarm.evaluation.intervals import LEVEL, detectable_effect, satterthwaite
from sarm.records import Bounds

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


def cohens_kappa(first: Bools, second: Bools) -> float | None:
    """Agreement of two readings (n,) beyond chance (Cohen 1960); None where a reading is constant
    in both, so that there is nothing to agree on.
    """
    if len(first) == 0:
        return None
    p, q = float(first.mean()), float(second.mean())
    expected = p * q + (1 - p) * (1 - q)
    if expected == 1.0:
        return None
    return (float((first == second).mean()) - expected) / (1 - expected)


def within_prompt_share(fired: Bools) -> float | None:
    """Share of the variance of firing (prompts, samples) that lies within prompts: 1 - ICC(1) of a
    one-way analysis of variance, 1 at most.

    What varies between responses to one prompt is what a policy can change; a latent that follows
    the prompt alone cannot be trained away. None with fewer than two prompts or samples, or where
    nothing varies.
    """
    prompts, samples = fired.shape
    if prompts < 2 or samples < 2:
        return None
    x = fired.astype(np.float64)
    means = x.mean(1)
    between = samples * float(((means - x.mean()) ** 2).sum()) / (prompts - 1)
    within = float(((x - means[:, None]) ** 2).sum()) / (prompts * (samples - 1))
    total = between + (samples - 1) * within
    if total == 0:
        return None
    return min(samples * within / total, 1.0)


def relative_fall(before: Floats, after: Floats) -> Bounds | None:
    """(mean before - mean after) / mean before of paired readings (n,), with Fieller's interval
    (1954): it excludes 0 just where the paired difference does.

    To the n pairs half a pair at +1, half at -1 and one at 0 are added for the variance of the
    difference, so that equal pairs have an interval of some width. None where nothing fires before,
    or so seldom that the interval has no end.
    """
    n, b = len(before), float(before.mean()) if len(before) else 0.0
    if n < 2 or b == 0:
        return None
    a = float(after.mean())
    (v_aa, v_ab), (_, v_bb) = np.cov(after, before) * (n - 1) / (n + 2) / n
    v_aa += 1 / (n + 2) / n
    t2 = float(stdtrit(n - 1, (1 + LEVEL) / 2)) ** 2
    # The ratios x with (a - x b)^2 <= t^2 var(a - x b), between the roots of a quadratic.
    square, half, rest = b * b - t2 * v_bb, a * b - t2 * v_ab, a * a - t2 * v_aa
    if square <= 0:
        return None
    width = math.sqrt(max(half * half - square * rest, 0.0)) / square
    middle = 1 - half / square
    return Bounds(value=1 - a / b, low=middle - width, high=middle + width)


def detectable_difference(
    rate: float, *, prompts: int, samples: int, seeds: int, within_share: float, seed_sd: float
) -> float:
    """`detectable_effect` of the planned evaluation on the difference of two arms' rates, 1 at
    most.

    Both arms answer the same prompts with as many samples and seeds; `rate` is the base policy's,
    `within_share` the share of its variance within prompts (between-prompt variance cancels in the
    paired difference), `seed_sd` the assumed SD of an arm's rate between seeds. Student's t with
    Satterthwaite's degrees for prompts and seeds.
    """
    if min(seeds, prompts) < 2:
        return 1.0
    sampling = 2 * rate * (1 - rate) * within_share / (samples * seeds)
    by_prompts = (sampling + 1 / (prompts + 2)) / prompts
    by_seeds = 2 * seed_sd**2 / seeds
    variance = by_prompts + by_seeds
    df = satterthwaite(variance, [(by_prompts, prompts - 1), (by_seeds, seeds - 1)])
    return min(1.0, detectable_effect(math.sqrt(variance), df))
