"""Upstream's selection score by hand and by brute force, and the rankings compared on planted
latents.
"""

from __future__ import annotations

import numpy as np
import pytest

from sarm.probing.effects import latent_table
from sarm.probing.select import judged, ranked
from sarm.probing.upstream import compared_rankings, selection_scores, summed_latents
from tests.probing.test_probing import HARMING, PROMOTING, config_with, planted_world


def test_selection_scores_by_hand() -> None:
    """c + j is 4, 6 and 2, so C = 4: (3 - 1) / 8, (0 - 6) / 10, (1 - 1) / 6."""
    np.testing.assert_allclose(
        selection_scores(np.array([3, 0, 1]), np.array([1, 6, 1])), [0.25, -0.6, 0.0]
    )
    np.testing.assert_array_equal(selection_scores(np.zeros(2), np.zeros(2)), [0.0, 0.0])


def test_the_number_of_prompts_does_not_matter() -> None:
    c, j = np.random.default_rng(0).random((2, 9))
    np.testing.assert_allclose(selection_scores(7 * c, 7 * j), selection_scores(c, j))


def test_summed_latents_are_sums_over_texts() -> None:
    """One chosen against three rejected, whose sum counts a third: dense arithmetic over every
    text.
    """
    encoded, contrasts = planted_world(0, prompts=30, rejected=3)
    z = np.zeros((len(encoded.texts), 64))
    np.put_along_axis(
        z,
        encoded.ranks.indices[:, : encoded.ranks.k],
        encoded.ranks.values[:, : encoded.ranks.k],
        1,
    )
    discovery, label = (encoded.texts[column].to_numpy() for column in ("part", "label"))
    c, j = summed_latents(encoded.ranks, contrasts["discovery"])
    np.testing.assert_allclose(c, z[(discovery == "discovery") & (label == "chosen")].sum(0))
    np.testing.assert_allclose(j, z[(discovery == "discovery") & (label == "rejected")].sum(0) / 3)


def test_rankings_on_planted_latents() -> None:
    """Weight knows nothing of the texts; s and the activity difference find what tells them apart,
    misleading latents too.
    """
    encoded, contrasts = planted_world(1)
    config = config_with()
    table = latent_table(encoded, contrasts, 0, 64, config)
    table["upstream_s"] = selection_scores(*summed_latents(encoded.ranks, contrasts["discovery"]))
    judged_table = judged(table, config.select)
    rows = {(row["ranking"], row["role"]): row for row in compared_rankings(judged_table, 3)}
    assert set(rows["effect", "promoting"]["latents"]) == set(PROMOTING) and set(
        rows["effect", "harming"]["latents"]
    ) == set(HARMING)
    assert (
        rows["effect", "harming"]["confirmed"]
        == rows["effect", "harming"]["shared_with_effect"]
        == 3
    )
    # Latents 50 and 40 fire with the safe and the unsafe text as much as the planted ones do, and
    # carry the wrong weight.
    assert set(rows["upstream_s", "promoting"]["latents"]) <= {*PROMOTING, 50}
    assert set(rows["upstream_s", "harming"]["latents"]) <= {*HARMING, 40}
    by_weight = rows["weight", "harming"]["latents"]
    assert by_weight == table.sort_values("weight")["latent"].head(3).tolist()
    effects = judged_table.loc[by_weight, "effect_validation"]
    assert rows["weight", "harming"]["mean_effect_validation"] == pytest.approx(effects.mean())
    assert (
        rows["effect", "harming"]["mean_effect_validation"]
        > rows["weight", "harming"]["mean_effect_validation"]
    )
    assert set(ranked(judged_table, "harming").head(3)["latent"]) == set(HARMING)
