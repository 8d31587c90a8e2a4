"""Readings of the instrument against numbers worked by hand, and against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sarm.evaluation.instrument import (
    cohens_kappa,
    detectable_difference,
    relative_fall,
    within_prompt_share,
)


def bools(text: str) -> np.ndarray:
    return np.array([c == "1" for c in text])


def test_kappa_by_hand() -> None:
    # Both 1 on 3, only the first on 2, only the second on 1, neither on 4: observed 0.7, rates 0.5
    # and 0.4, so 0.5 expected.
    first, second = bools("1111100000"), bools("1110010000")
    assert cohens_kappa(first, second) == pytest.approx((0.7 - 0.5) / 0.5)
    assert cohens_kappa(first, first) == 1.0
    assert cohens_kappa(first, ~first) == pytest.approx(-1.0)


def test_kappa_of_constant_readings_is_unknown() -> None:
    assert cohens_kappa(bools("000"), bools("000")) is None
    assert cohens_kappa(bools(""), bools("")) is None
    assert cohens_kappa(bools("000"), bools("100")) == pytest.approx(0), "one of them varies"


def test_variance_within_prompts_by_hand() -> None:
    # Means 1, 1/3, 0 (grand mean 4/9) of three samples; between mean square
    # 3 * (25 + 1 + 16) / 81 / 2 = 7/9, within (2/3) / 6 = 1/9, ICC (7/9 - 1/9) / (7/9 + 2/9) = 2/3.
    fired = np.array([bools("111"), bools("100"), bools("000")])
    assert within_prompt_share(fired) == pytest.approx(1 / 3)
    assert within_prompt_share(np.array([bools("111"), bools("000")])) == 0.0
    assert within_prompt_share(np.array([bools("10"), bools("01")])) == 1.0, "clipped"
    assert within_prompt_share(np.array([bools("1"), bools("0")])) is None
    assert within_prompt_share(np.zeros((4, 3), dtype=bool)) is None


def test_relative_fall_by_hand() -> None:
    before, after = np.array([1.0, 1, 0, 1, 1, 0, 1, 1]), np.array([0.0, 1, 0, 0, 0, 1, 0, 1])
    found = relative_fall(before, after)
    assert found is not None and found.value == pytest.approx(1 - 0.375 / 0.75)
    # At both ends the difference after - x before is as many standard errors from 0 as t says, the
    # variance being that of ten pairs, of which two are added.
    for fall in (found.low, found.high):
        d = after - (1 - fall) * before
        error = math.sqrt((((d - d.mean()) ** 2).sum() + 1) / 10 / 8)
        assert abs(d.mean()) / error == pytest.approx(stats.t.ppf(0.975, 7))
    assert found.low < found.value < found.high


def test_equal_pairs_have_an_interval_of_some_width() -> None:
    found = relative_fall(np.ones(5), np.zeros(5))
    assert found is not None and found.value == 1 and found.low < 0.6
    assert relative_fall(np.zeros(5), np.ones(5)) is None, "nothing fires before"
    assert relative_fall(np.ones(1), np.zeros(1)) is None
    assert relative_fall(np.ones(2), np.zeros(2)) is not None


def test_a_fall_where_nothing_changes_is_seldom_seen() -> None:
    rng = np.random.default_rng(3)
    seen = 0
    for _ in range(400):
        rate = rng.beta(2, 3, size=60)
        before, after = (rng.random((2, 60)) < rate).astype(float)
        found = relative_fall(before, after)
        assert found is not None
        seen += found.low > 0
    assert seen / 400 < 0.05


def test_the_detectable_difference_is_detected_four_times_in_five() -> None:
    """Two arms simulated with that difference, tested by the same two-way standard error."""
    rng = np.random.default_rng(5)
    prompts, samples, seeds, sd, rate = 150, 2, 5, 0.02, 0.4
    size = detectable_difference(
        rate, prompts=prompts, samples=samples, seeds=seeds, within_share=0.8, seed_sd=sd
    )
    found = 0
    draws = 300
    for _ in range(draws):
        # Beta prompts whose variance is a fifth of the whole.
        base = rng.beta(rate * 4, (1 - rate) * 4, size=(prompts, 1))
        arms = []
        for shift in (0.0, -size):
            p = np.clip(base + shift + rng.normal(0, sd, size=(1, seeds)), 0, 1)
            arms.append(rng.binomial(samples, p) / samples)
        d = arms[1] - arms[0]
        by_prompt, by_seed = d.mean(1).var(ddof=1) / prompts, d.mean(0).var(ddof=1) / seeds
        error = math.sqrt(by_prompt + max(by_seed - d.var(ddof=1) / (prompts * seeds), 0))
        found += d.mean() + stats.t.ppf(0.975, 2 * seeds) * error < 0
    assert 0.6 < found / draws < 0.97
    assert size == pytest.approx(0.065, abs=0.02)


def test_more_of_anything_detects_less() -> None:
    plan = dict(prompts=100, samples=1, seeds=3, within_share=0.7, seed_sd=0.02)
    size = detectable_difference(0.3, **plan)
    for more in ({"prompts": 400}, {"samples": 4}, {"seeds": 6}, {"within_share": 0.3}):
        assert detectable_difference(0.3, **(plan | more)) < size
    assert detectable_difference(0.3, **(plan | {"seeds": 1})) == 1.0, "one seed shows nothing"
    assert detectable_difference(0.3, **(plan | {"seed_sd": 0.05})) > size


def test_the_detectable_difference_by_hand() -> None:
    planned = {"samples": 2, "seeds": 4, "within_share": 0.5}
    found = detectable_difference(0.3, prompts=30, seed_sd=0.02, **planned)
    by_prompts = (2 * 0.3 * 0.7 * 0.5 / 8 + 1 / 32) / 30
    by_seeds = 2 * 0.02**2 / 4
    variance = by_prompts + by_seeds
    df = variance**2 / (by_prompts**2 / 29 + by_seeds**2 / 3)
    want = (stats.t.ppf(0.975, df) + stats.t.ppf(0.8, df)) * math.sqrt(variance)
    assert found == pytest.approx(want) and 0.05 < found < 0.5
    by_two = 2 * 0.02**2 / 2
    by_prompts = (2 * 0.3 * 0.7 * 0.5 / 4 + 1 / 302) / 300
    df = (by_prompts + by_two) ** 2 / (by_prompts**2 / 299 + by_two**2)
    factor = stats.t.ppf(0.975, df) + stats.t.ppf(0.8, df)
    assert detectable_difference(
        0.3, prompts=300, seed_sd=0.02, **planned | {"seeds": 2}
    ) == pytest.approx(factor * math.sqrt(by_prompts + by_two))
    assert detectable_difference(0.3, prompts=30, seed_sd=0.02, **planned | {"seeds": 1}) == 1.0
    assert detectable_difference(0.3, prompts=1, seed_sd=0.02, **planned) == 1.0
