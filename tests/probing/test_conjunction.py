"""Effects asked for in two sources at once, the density ceiling, and which latents are
penalised.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from reports.validity_sections import conjunction_sentence
from sarm.config import Config, UserError, parse_config
from sarm.data.datasets import Data
from sarm.probing import effects
from sarm.probing.contrast import Contrast
from sarm.probing.effects import (
    Encoded,
    blind_weights,
    contrasts_of,
    discovery_contrasts,
    latent_effects,
    latent_table,
)
from sarm.probing.nulls import shuffled_labels
from sarm.probing.rediscovery import discover
from sarm.probing.select import (
    judged,
    penalisable,
    random_candidates,
    refuse_unconfirmed,
    select_features,
)
from sarm.probing.stats import partial_conjunction
from sarm.probing.validity import sensitivity
from sarm.records import Features
from sarm.reward_model.interventions import Ranks
from tests.probing.test_probing import HARMING, config_with, orthogonal, planted_world
from tests.probing.test_validity import BOTH, D_SAE, ONLY_A, TURNED, two_sources
from tests.runs import features as recorded

# The rule


def test_the_larger_p_stands_and_only_where_signs_agree() -> None:
    first = np.array([0.01, 0.2, 0.01, 0.01, np.nan])
    second = np.array([0.04, 0.001, 0.04, np.nan, 0.5])
    same = np.array([True, True, False, True, False])
    p = partial_conjunction(first, second, same)
    assert p[:3].tolist() == [0.04, 0.2, 1.0] and np.isnan(p[3:]).all()


@pytest.fixture(scope="module")
def world() -> tuple[Encoded, Data, Config, pd.DataFrame]:
    encoded, data, config = two_sources(b_is_read=True)
    contrasts = contrasts_of(data, encoded, config.conjunction)
    return (
        encoded,
        data,
        config,
        judged(latent_table(encoded, contrasts, 0, D_SAE, config), config.select),
    )


def test_what_holds_in_one_source_alone_is_no_discovery(world) -> None:  # type: ignore[no-untyped-def]
    encoded, data, config, table = world
    assert config.conjunction == ("a", "b")
    assert table.loc[list(BOTH), "confirmed"].all()
    one = [*ONLY_A, TURNED]
    assert not table.loc[one, "discovered"].any() and table.loc[TURNED, "p"] == 1.0
    assert (table.loc[one, "p_first"] < 0.005).all()
    # Pooled, as without the rule, they are found.
    pooled = parse_config(config.model_dump(mode="json"), "test")
    contrasts = contrasts_of(data, encoded, ())
    old = judged(latent_table(encoded, contrasts, 0, D_SAE, pooled), config.select)
    assert old.loc[list(ONLY_A), "discovered"].all()


def test_p_and_effects_are_of_either_source_and_pooled(world) -> None:  # type: ignore[no-untyped-def]
    encoded, data, config, table = world
    contrasts = contrasts_of(data, encoded, config.conjunction)
    assert [c.n_prompts for c in discovery_contrasts(contrasts)] == [60, 60]
    assert contrasts["discovery"].n_prompts == 120 and contrasts["validation"].n_prompts == 60
    columns = table[["p_first", "p_second"]]
    same = np.sign(table["effect_head_first"]) == np.sign(table["effect_head_second"])
    known = table["tested"]
    assert (table["p"] == columns.max(axis=1).where(same, 1.0))[known].all()
    pooled = (table["effect_head_first"] + table["effect_head_second"]) / 2
    assert table["effect"].to_numpy() == pytest.approx(pooled.to_numpy())
    found = discover(encoded, discovery_contrasts(contrasts), config, 3, "cpu")
    assert found.effect == pytest.approx(table["effect"].to_numpy())
    assert set(BOTH) <= set(np.flatnonzero(found.discovered))
    assert not set(np.flatnonzero(found.discovered)) & {*ONLY_A, TURNED}


def test_a_prompt_of_both_sources_counts_for_the_first(world) -> None:  # type: ignore[no-untyped-def]
    encoded, data, config, _ = world
    shared = [p._replace(source="b") for p in data.pairs if p.prompt.id in ("a1", "a4")]
    more = data._replace(pairs=[*data.pairs, *shared])
    contrasts = contrasts_of(more, encoded, config.conjunction)
    assert [c.n_prompts for c in discovery_contrasts(contrasts)] == [60, 60]


def test_the_rule_s_sources_are_named_where_there_are_more() -> None:
    tree = config_with().model_dump(mode="json")
    one = tree["data"]["sources"]["none"]
    tree["data"]["sources"] = {name: one for name in "abc"}
    with pytest.raises(UserError, match=r"select\.sources: name two of .*\(a, b, c\)"):
        parse_config(tree, "test")
    tree["select"]["sources"] = ["c", "a"]
    assert parse_config(tree, "test").conjunction == ("c", "a")
    for wrong in (["a"], ["a", "a"], ["a", "d"], ["a", "b", "c"]):
        tree["select"]["sources"] = wrong
        with pytest.raises(UserError, match=r"select\.sources: name two of"):
            parse_config(tree, "test")
    assert config_with().conjunction == ()


def test_repeats_and_shuffles_go_by_the_same_rule(world) -> None:  # type: ignore[no-untyped-def]
    encoded, data, config, table = world
    rows = sensitivity(table, encoded, data, config, "cpu")
    assert {r["prompts"] for r in rows if r["what"] in ("seed", "split")} == {120}
    assert {r["prompts"] for r in rows if r["what"] == "25% of the prompts"} == {30}
    assert np.mean([r["again"] for r in rows if r["what"] == "split"]) > 0.5
    contrasts = contrasts_of(data, encoded, config.conjunction)
    shuffled = shuffled_labels(encoded, contrasts, config, "cpu")
    assert len(shuffled) == 2 and sum(r["discoveries"] for r in shuffled) <= 1


def test_features_and_report_say_what_was_asked_for(world) -> None:  # type: ignore[no-untyped-def]
    encoded, data, config, _ = world
    contrasts = contrasts_of(data, encoded, config.conjunction)
    raw = latent_table(encoded, contrasts, 0, D_SAE, config)
    found = select_features(raw, encoded, config, orthogonal)
    assert found["conjunction"] == ["A", "B"] and "in A and in B" in conjunction_sentence(
        ["A", "B"]
    )
    assert not any("fewer than two sources" in w for w in found["warnings"])
    assert {p["latent"] for p in found["penalised"]} <= {*BOTH}
    encoded, contrasts = planted_world(2, prompts=200)
    alone = select_features(
        latent_table(encoded, contrasts, 0, 64, config_with()), encoded, config_with(), orthogonal
    )
    told = [w for w in alone["warnings"] if "fewer than two sources for a conjunction" in w]
    assert len(told) == 1 and alone["conjunction"] == []
    assert "fewer than two sources for a conjunction" in conjunction_sentence([])


# The density ceiling


def test_density_is_blind_to_labels_and_alike_for_prompts() -> None:
    """Latent 0 fires on every rejected response and latent 1 on every chosen one: of three rejected
    to one chosen and of one to one.
    """
    labels = np.array([1, 0, 0, 0, 1, 0])
    first = np.where(labels, 1, 0).astype(np.int32)
    values = np.tile([1.0, -1.0], (6, 1)).astype(np.float32)
    ranks = Ranks(np.stack([first, 1 - first], axis=1), values, 1, 2)
    prompts = np.array([0, 0, 0, 0, 1, 1])
    chosen = labels.astype(float)
    rejected = (1 - chosen) / np.array([3, 3, 3, 3, 1, 1])
    contrast = Contrast(np.arange(6), prompts, chosen, rejected, 2)
    assert blind_weights(contrast).sum() == pytest.approx(1)
    table = latent_effects(ranks, np.ones(2, np.float32), contrast, 0, 2)
    assert table["density"].tolist() == pytest.approx([(3 / 4 + 1 / 2) / 2, (1 / 4 + 1 / 2) / 2])
    assert table["density_rejected"].tolist() == [1, 0] and table["density_chosen"].tolist() == [
        0,
        1,
    ]

    def tested(ceiling: float) -> list[bool]:
        config = config_with(select__max_density=ceiling, probe__min_prompts_active=2)
        return effects.tested_latents(ranks, [contrast], 0, 2, config).tolist()

    assert tested(0.6) == [False, True] and tested(0.63) == [True, True]
    swapped = contrast._replace(chosen=rejected, rejected=chosen)
    assert latent_effects(ranks, np.ones(2), swapped, 0, 2)["density"].tolist() == (
        table["density"].tolist()
    )


def test_a_latent_that_nearly_always_fires_is_not_tested() -> None:
    encoded, contrasts = planted_world(2, prompts=200)
    table = latent_table(encoded, contrasts, 0, 64, config_with())
    ceiling = float(table["density"].quantile(0.8))
    under = latent_table(encoded, contrasts, 0, 64, config_with(select__max_density=ceiling))
    assert (under["tested"] == (table["tested"] & (table["density"] <= ceiling))).all()
    assert 0 < under["tested"].sum() < table["tested"].sum()


# Which latents are penalised


def rows_of_roles() -> pd.DataFrame:
    """Candidates of three roles; the misleading ones fire on unsafe text (w > 0) but for 5."""
    return pd.DataFrame(
        {
            "latent": range(7),
            "role": [
                "harming",
                "harming",
                "misleading",
                "misleading",
                "promoting",
                "misleading",
                "harming",
            ],
            "weight": [-1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0],
            "confirmed": [True, False, True, False, True, True, True],
            "candidate": True,
            "effect": [1.0, 9.0, -2.0, -8.0, 5.0, -7.0, 4.0],
            "effect_validation": [1.0, 9.0, -2.0, -8.0, 5.0, -7.0, 0.5],
        }
    )


@pytest.mark.parametrize(
    ("penalise", "expected"),
    [("harming", [0, 6, 1]), ("misleading", [2, 3]), ("both", [2, 0, 6, 1, 3])],
)
def test_a_penalty_is_put_on_the_roles_asked_for(penalise: str, expected: list[int]) -> None:
    assert penalisable(rows_of_roles(), penalise)["latent"].tolist() == expected


def selected(**changes: Any) -> dict[str, Any]:
    encoded, contrasts = planted_world(2, prompts=200)
    config = config_with(**changes)
    table = latent_table(encoded, contrasts, 0, 64, config)
    return select_features(table, encoded, config, orthogonal)


def test_with_fewer_confirmed_than_asked_for_those_are_penalised() -> None:
    found = selected(select__penalised=5)
    assert [p["confirmed"] for p in found["penalised"]] == [True] * 3
    told = "3 harming latents are penalised, where 5 were asked for"
    assert any(told in w for w in found["warnings"])
    paid = selected(select__penalise="misleading", select__penalised=2)
    assert {p["latent"] for p in paid["penalised"]} == {40} and paid["penalised"][0][
        "role"
    ] == "misleading"


def test_with_none_confirmed_fillers_are_marked_and_ppo_stops_unless_allowed() -> None:
    encoded, contrasts = planted_world(2, prompts=200)
    nobody = Contrast(*(np.zeros(0, t) for t in (int, int, float, float)), 0)
    table = latent_table(encoded, {**contrasts, "validation": nobody}, 0, 64, config_with())
    found = select_features(table, encoded, config_with(), orthogonal)
    assert found["n_confirmed"] == 0 and [p["confirmed"] for p in found["penalised"]] == [False] * 2
    assert any("no harming latent is confirmed" in w for w in found["warnings"])
    assert found["monitors"] == found["monitor_features"] == []
    for role in ("promoting", "harming"):
        assert found[role] and not any(f["confirmed"] for f in found[role])
    json.dumps(found, allow_nan=False)
    stop, allow = (config_with(select__unconfirmed=how).select for how in ("stop", "allow"))
    record = recorded(penalised=found["penalised"])
    with pytest.raises(UserError, match=r"none of the latents to penalise .* is confirmed"):
        refuse_unconfirmed(record, stop)
    refuse_unconfirmed(record, allow)
    some = recorded(
        penalised=[{**p, "confirmed": i == 1} for i, p in enumerate(found["penalised"])]
    )
    refuse_unconfirmed(some, stop)
    with pytest.raises(UserError, match=r"\(none\)"):
        refuse_unconfirmed(recorded(penalised=[]), stop)
    assert isinstance(some, Features)


def test_monitors_and_random_latents_are_what_they_are_called() -> None:
    found = selected(select__penalised=1, select__monitors=2, select__listed=4)
    (target,) = found["penalised"]
    encoded, contrasts = planted_world(2, prompts=200)
    table = judged(latent_table(encoded, contrasts, 0, 64, config_with()), config_with().select)
    assert len(found["monitors"]) == 2
    monitors = [f["latent"] for f in found["monitor_features"]]
    assert (
        table.loc[monitors, "confirmed"].all() and (table.loc[monitors, "role"] == "harming").all()
    )
    assert target["latent"] not in monitors
    texts = encoded.texts
    rejected = ((texts["part"] == "discovery") & (texts["label"] == "rejected")).to_numpy()
    for f in found["monitor_features"]:
        kept = encoded.ranks.indices[rejected, :12] == f["latent"]
        z = np.where(kept, encoded.ranks.values[rejected, :12], 0).sum(axis=1)
        rate = found["discovery_rates"][str(target["latent"])]
        assert rate - 1.5 / len(z) <= (z > f["tau"]).mean() <= rate
    listed = {f["latent"] for role in ("promoting", "harming", "misleading") for f in found[role]}
    assert any(not f["confirmed"] for f in found["harming"]), "some listed are only fillers"
    random = [c["latent"] for c in found["random_candidates"]]
    assert len(random) == 6 and not {*random} & {*listed, *monitors, target["latent"]}
    assert (table.loc[random, "weight"] < 0).all() and not table.loc[random, "confirmed"].any()


def test_where_few_latents_are_free_the_random_ones_are_still_neither_taken_nor_confirmed() -> None:
    encoded, contrasts = planted_world(2, prompts=200)
    config = config_with(select__random_candidates=40)
    table = judged(latent_table(encoded, contrasts, 0, 64, config), config.select)
    table["discovered"] = True  # so that the pool is all that is free
    found = select_features(
        latent_table(encoded, contrasts, 0, 64, config), encoded, config, orthogonal
    )
    taken = [i for i in table.index[table["weight"] < 0] if i % 3 == 0]
    random = random_candidates(table, found["penalised"], taken, encoded, config)
    latents = {c["latent"] for c in random}
    assert not latents & {*taken, *HARMING} and not table.loc[list(latents), "confirmed"].any()
    free = (table["weight"] < 0) & table["tested"] & ~table["confirmed"]
    assert latents == set(table.index[free]) - set(taken)
