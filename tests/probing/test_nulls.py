"""Matched nulls: what is compared with what, and that noise is not called ahead."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from sarm.probing import nulls
from sarm.probing.contrast import Contrast
from sarm.probing.nulls import matched_null
from tests.probing.test_probing import config_with, planted_world

LATENTS = 300


def table(seed: int = 0, confirmed: int = 12, role: str = "harming") -> pd.DataFrame:
    """Candidates of one role, of which the first are confirmed; all pass the rest of the
    selection.
    """
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "latent": range(LATENTS),
            "tested": True,
            "candidate": True,
            "role": role,
            "confirmed": np.arange(LATENTS) < confirmed,
            "density": rng.uniform(0.05, 0.5, LATENTS),
            "weight": rng.uniform(-1, -0.1, LATENTS),
            "effect": rng.uniform(0.1, 1, LATENTS),
            "effect_validation": rng.uniform(0.1, 1, LATENTS),
        }
    )


def found(t: pd.DataFrame, effect: Any, prompts: int = 50) -> dict[str, Any]:
    (row,) = matched_null(t, np.asarray(effect, dtype=np.float64), prompts, config_with())
    return row


def test_effects_are_compared_on_the_test_part_which_chose_nothing() -> None:
    """Validation's effects, by which the confirmed were chosen, enter nowhere."""
    t = table()
    t.loc[t["confirmed"], "effect_validation"] += 5
    same = found(t, np.full(LATENTS, 0.3))
    assert [same[key] for key in ("effect", "null", "null_high")] == pytest.approx([0.3] * 3)
    ahead = found(t, np.where(t["confirmed"], 0.9, 0.3))
    assert ahead["effect"] == pytest.approx(0.9) and ahead["null_high"] == pytest.approx(0.3)
    assert ahead["p"] == 1 / (1 + nulls.NULL_DRAWS)


def test_where_effects_are_noise_p_is_small_as_seldom_as_it_should_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Effects on the test part independent of what was chosen: p <= 0.05 in some 5 % of draws."""
    monkeypatch.setattr(nulls, "NULL_DRAWS", 99)  # of which 0.05 is a whole number
    rng = np.random.default_rng(0)
    p = [found(table(seed), rng.normal(size=LATENTS))["p"] for seed in range(150)]
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / 150)
    assert 0.35 < np.mean(p) < 0.65


def test_the_null_passes_the_same_selection_and_holds_none_of_the_confirmed() -> None:
    """Of every kind that the selection refuses, and of the confirmed, the null takes none."""
    t = table()
    refused = np.arange(LATENTS) >= 60
    for number, (column, value) in enumerate(
        {"candidate": False, "role": "promoting", "effect_validation": -1.0}.items()
    ):
        mine = refused & (np.arange(LATENTS) % 3 == number)
        t.loc[mine, column] = value
    effect = np.where(refused, 100.0, np.where(t["confirmed"], 7.0, 1.0))
    row = found(t.assign(candidate=t["candidate"] & (t["role"] == "harming")), effect)
    assert row["null"] == row["null_low"] == row["null_high"] == 1.0 and row["effect"] == 7.0


def test_the_null_is_like_the_confirmed_in_activity_and_weight() -> None:
    t = table(confirmed=4)
    like = np.abs(t["weight"] + 0.5) < 0.2
    t.loc[:3, ["weight", "density"]] = [-0.5, 0.3]
    close = like & (np.abs(t["density"] - 0.3) < 0.15)
    assert found(t, np.where(close, 1.0, 50.0))["null_high"] < 2.0


def test_a_role_that_lowers_the_margin_is_ahead_where_it_lowers_it_more() -> None:
    t = table(role="misleading")
    t["effect"], t["effect_validation"] = -t["effect"], -t["effect_validation"]
    assert found(t, np.where(t["confirmed"], -0.9, -0.3))["p"] < 0.01
    assert found(t, np.where(t["confirmed"], -0.1, -0.3))["p"] == 1.0


def test_the_null_is_the_same_under_the_same_seed() -> None:
    effect = np.random.default_rng(1).normal(size=LATENTS)
    one, again = found(table(), effect), found(table(), effect)
    assert one == again and one["null_low"] < one["null_high"]


def test_shuffled_labels_are_dealt_to_both_sides_and_nothing_is_confirmed_without_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded, contrasts = planted_world(2, prompts=100)
    labels = -contrasts["discovery"].labels
    assert (nulls._relabelled(contrasts["discovery"], labels).labels == labels).all()
    config = config_with(select__stability_repeats=3, select__fdr=0.9)
    none = Contrast(*(x[:0] for x in contrasts["validation"][:4]), 0)
    rows = nulls.shuffled_labels(encoded, contrasts | {"validation": none}, config, "cpu")
    assert max(row["discoveries"] for row in rows) > 0 and len(rows) == 3
    assert [row["confirmed"] for row in rows] == [0] * 3
    given: list[Any] = []

    def confirm(*arguments: Any) -> Any:
        given.append(arguments[2:])
        return np.arange(64) < 5

    monkeypatch.setattr(nulls, "confirm", confirm)
    rows = nulls.shuffled_labels(encoded, contrasts, config, "cpu")
    assert [row["confirmed"] for row in rows] == [5] * 3
    assert [one[1:] for one in given] == [(config, "cpu")] * 3
    for (contrast, *_), before in zip(given, [contrasts["validation"]] * 3, strict=True):
        assert (contrast.rows == before.rows).all() and (contrast.labels != before.labels).any()


def test_too_little_to_compare_with_gives_no_row() -> None:
    effect = np.ones(LATENTS)
    assert matched_null(table(confirmed=0), effect, 50, config_with()) == []
    assert matched_null(table(confirmed=200), effect, 50, config_with()) == []
    assert matched_null(table(), effect, nulls.FEWEST - 1, config_with()) == []


def test_of_latents_as_near_the_first_of_the_pool_are_taken() -> None:
    """Two heaps a target may come from, each of equal latents in every other place of the pool."""
    features = np.zeros((402, 2))
    features[2::2], features[1] = [3.0, -5.0], [3.0, -5.0]
    targets, pool = np.array([0, 1]), np.arange(401, 1, -1)
    near, other = nulls._nearest(targets, pool, features)
    assert near == list(range(401, 401 - 2 * nulls.NEAREST, -2))
    assert other == list(range(400, 400 - 2 * nulls.NEAREST, -2))
