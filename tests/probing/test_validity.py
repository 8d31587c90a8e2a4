"""Nulls, replication, baselines and sensitivity, on planted truths in two sources."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import scipy.stats

from reports.blocks import lines
from reports.probe_sections import rankings
from reports.validity_sections import trust
from sarm.config import parse_config
from sarm.data.datasets import Data, Pair, Prompt, text_id
from sarm.probing import rediscovery
from sarm.probing import replication as replication_module
from sarm.probing import validity as validity_module
from sarm.probing.baselines import baselines, bradley_terry, pair_rows, words_alone
from sarm.probing.contrast import Contrast
from sarm.probing.effects import Encoded, contrasts_of, latent_contributions, latent_table
from sarm.probing.nulls import shuffled_labels
from sarm.probing.permutation import permutation_p, permutations_needed
from sarm.probing.rediscovery import Found, discover, joined, of_prompts, rank_correlation
from sarm.probing.replication import (
    confirmed_replication,
    feature_replication,
    power_of,
    replication,
    unread,
)
from sarm.probing.select import judged
from sarm.probing.stats import holm
from sarm.probing.upstream import compared_rankings
from sarm.probing.validity import sensitivity, validity
from sarm.reward_model.interventions import Ranks
from sarm.training.heads import fit_head

D_SAE, K, D_IN = 64, 12, 10
BOTH, ONLY_A, TURNED = (3, 11), (20, 21), 30
"""Latents that fire on rejected texts of both sources, of a alone, and of a but on b's chosen
texts.
"""


def two_sources(
    seed: int = 0, prompts: int = 90, b_is_read: bool = False
) -> tuple[Encoded, Data, Any]:
    """Source a in discovery and validation, source b all in test, or like a where it is read; one
    chosen against two rejected.
    """
    rng = np.random.default_rng(seed)
    weight = rng.choice([-1, 1], D_SAE) * rng.uniform(0.2, 1.0, D_SAE)
    weight[[*BOTH, *ONLY_A, TURNED]] = -0.8
    axis, pairs, texts, rows, states = rng.normal(size=D_IN), [], [], [], []
    for number in range(2 * prompts):
        source = "a" if number < prompts else "b"
        part: Any = "validation" if number % 3 == 0 else "discovery"
        part = part if source == "a" or b_is_read else "test"
        message = {"role": "user", "content": f"{source}{number}"}
        prompt = Prompt(f"{source}{number}", (message,), source, "unsafe", "", part)
        topic = rng.normal(size=D_SAE)
        for response in ("chosen", "rejected 1", "rejected 2"):
            a = topic + rng.normal(size=D_SAE) + 0.5
            bad = response != "chosen"
            a[list(BOTH)] += 2 * bad
            if source == "a":
                a[[*ONLY_A, TURNED]] += 2 * bad
            else:
                a[TURNED] += 2 * (not bad)
            rows.append(a)
            states.append(rng.normal(size=D_IN) + (0 if bad else 1.5) * axis)
            label = "rejected" if bad else "chosen"
            id_ = text_id((message, {"role": "assistant", "content": response})) + f"-{label[0]}"
            texts.append(
                {
                    "text_id": id_,
                    "prompt_id": prompt.id,
                    "source": source,
                    "part": part,
                    "label": label,
                    "n_tokens": 9,
                }
            )
        pairs += [
            Pair(f"{prompt.id}-{r}", prompt, source, "chosen", f"rejected {r}") for r in (1, 2)
        ]
    order = np.argsort(-np.stack(rows), axis=1)[:, : K + 2]
    ranks = Ranks(
        order.astype(np.int32),
        np.take_along_axis(np.stack(rows), order, 1).astype(np.float32),
        K,
        D_SAE,
    )
    source = {"format": "jsonl", "path": "none"}
    tree: dict[str, Any] = {
        "name": "two",
        "policy": {"model": "none"},
        "sarm": {"model": "none"},
        "data": {
            "sources": {
                "a": {**source, "label": "A", "split": {"discovery": 0.7, "validation": 0.3}},
                "b": {**source, "label": "B", "split": {"test": 1.0}},
            }
        },
        "probe": {"permutations": 500, "bootstrap": 50},
        "select": {"stability_repeats": 2, "effect": "head"},
    }
    if b_is_read:
        tree["data"]["sources"]["b"]["split"] = tree["data"]["sources"]["a"]["split"]
    frame = pd.DataFrame(texts)
    frame["reward"] = np.random.default_rng(9).normal(size=len(frame))
    prompts_of = [p.prompt for p in pairs[::2]]
    return (
        Encoded(frame, ranks, np.stack(states).astype(np.float32), weight.astype(np.float32)),
        Data(prompts_of, pairs, {}),
        parse_config(tree, "test"),
    )


@pytest.fixture(scope="module")
def world() -> tuple[Encoded, Data, Any, pd.DataFrame]:
    encoded, data, config = two_sources()
    return (
        encoded,
        data,
        config,
        judged(
            latent_table(encoded, contrasts_of(data, encoded, ()), 0, D_SAE, config), config.select
        ),
    )


def test_what_holds_in_one_source_alone_does_not_replicate(world) -> None:  # type: ignore[no-untyped-def]
    encoded, data, config, _ = world
    there, back = replication(encoded, data, config, "cpu")
    assert (there["from"], there["to"], back["from"]) == ("A", "B", "B")
    assert set(there["not_replicated"]) >= {*ONLY_A, TURNED} and not set(BOTH) & set(
        there["not_replicated"]
    )
    assert (
        there["replicated"] >= 2
        and there["replicated"] + len(there["not_replicated"]) == there["discovered"]
    )
    assert there["opposite_and_significant"] >= 1 and TURNED in back["not_replicated"]
    assert there["prompts"] == 90 and -1 <= there["rank_correlation"] < 1


def test_latents_of_the_one_source_are_counted_by_sign_and_p_on_the_other(
    world,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Holm's p of the five are 0.005, 0.008, 0.012, 0.05 and 0.05, the last two not below 0.05."""
    encoded, data, config, _ = world
    latents = np.array([2, 5, 7, 11, 13])
    effect = np.zeros(D_SAE)
    effect[latents] = [0.5, -0.4, 0.3, 0.2, -0.1]
    chosen = np.isin(np.arange(D_SAE), latents)
    found = Found(chosen, effect, np.zeros(D_SAE), chosen)
    again = np.array([0.1, -0.3, -0.2, 0.4, 0.5]), np.array([0.001, 0.002, 0.004, 0.025, 0.05])
    monkeypatch.setattr(replication_module, "discover", lambda *_: found)
    monkeypatch.setattr(replication_module, "tested_again", lambda *_: again)
    there, back = replication(encoded, data, config, "cpu")
    assert there == {
        "from": "A",
        "to": "B",
        "prompts": 90,
        "discovered": 5,
        "replicated": 2,
        "same_sign": 3,
        "opposite_and_significant": 1,
        "rank_correlation": pytest.approx(1.0),
        "latents_in_both": 5,
        "rank_correlation_discovered": pytest.approx(0.1),
        "not_replicated": [7, 11, 13],
    }
    assert back == there | {"from": "B", "to": "A"}


def test_a_prompt_in_both_sources_is_not_tried_again(world) -> None:  # type: ignore[no-untyped-def]
    encoded, data, config, _ = world
    shared = [
        pair._replace(source="b") if pair.prompt.id in ("a0", "a3") else pair for pair in data.pairs
    ]
    shared += [pair for pair in data.pairs if pair.prompt.id in ("a0", "a3")]
    there = replication(encoded, data._replace(pairs=shared), config, "cpu")[0]
    assert there["prompts"] == 90, "b has 92 prompts by now, two of them a's"


def test_listed_latents_are_tried_on_sources_that_selection_never_read(world) -> None:  # type: ignore[no-untyped-def]
    encoded, data, config, table = world
    listed = [
        {"latent": latent, "effect_discovery": float(table.loc[latent, "effect"])}
        for latent in (*BOTH, *ONLY_A, TURNED)
    ]
    found = feature_replication(listed, encoded, data, config, "cpu")
    states = {latent: rows[0]["replicates"] for latent, rows in found.items()}
    assert states == dict.fromkeys(BOTH, True) | dict.fromkeys((*ONLY_A, TURNED), False)
    assert {row["source"] for rows in found.values() for row in rows} == {"B"}
    p = {latent: rows[0]["p"] for latent, rows in found.items()}
    assert [found[i][0]["p_holm"] for i in p] == pytest.approx(holm(np.array(list(p.values()))))
    row = found[3][0]
    assert row["effect_low"] < row["effect"] < row["effect_high"]


def test_shuffled_labels_find_next_to_nothing(world) -> None:  # type: ignore[no-untyped-def]
    encoded, data, config, table = world
    rows = shuffled_labels(encoded, contrasts_of(data, encoded, ()), config, "cpu")
    assert len(rows) == 2 and all(
        row["confirmed"] <= row["discoveries"] < table["discovered"].sum() for row in rows
    )


def test_repeating_the_selection(world) -> None:  # type: ignore[no-untyped-def]
    encoded, data, config, table = world
    rows = sensitivity(table, encoded, data, config, "cpu")
    by_what = {
        what: [r for r in rows if r["what"] == what]
        for what in ("seed", "split", "25% of the prompts", "75% of the prompts")
    }
    assert all(len(mine) == 2 for mine in by_what.values())
    assert all(r["overlap"] > 0.6 for r in by_what["seed"])
    assert {r["prompts"] for r in by_what["25% of the prompts"]} == {15}
    assert np.mean([r["again"] for r in by_what["75% of the prompts"]]) >= np.mean(
        [r["again"] for r in by_what["25% of the prompts"]]
    )


def test_a_split_is_confirmed_on_the_prompts_that_it_did_not_discover_on(
    world,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded, data, config, table = world
    nothing = np.zeros(D_SAE, bool)
    mine: list[set[int]] = []
    rest: list[set[int]] = []

    def found(encoded: Any, contrasts: Any, *_: Any) -> Found:
        mine.append({int(row) for contrast in contrasts for row in contrast.rows})
        return Found(nothing, np.zeros(D_SAE), np.ones(D_SAE), nothing)

    def confirmed(encoded: Any, found: Any, contrast: Contrast, *_: Any) -> Any:
        rest.append(mine[-1] | {-1} if mine[-1] & set(contrast.rows) else set(contrast.rows))
        return nothing

    monkeypatch.setattr(validity_module, "discover", found)
    monkeypatch.setattr(validity_module, "confirm", confirmed)
    sensitivity(table, encoded, data, config, "cpu")
    read = encoded.texts["part"].isin(["discovery", "validation"]).to_numpy()
    splits = mine[2:4]
    assert len(rest) == 2 and splits[0] != splits[1]
    for one, other in zip(splits, rest, strict=True):
        assert (len(one), len(other)) == (180, 90)
        assert sorted(one | other) == np.flatnonzero(read).tolist()


def test_tested_again_are_twenty_times_the_permutations_that_are_needed(world) -> None:  # type: ignore[no-untyped-def]
    encoded, data, config, _ = world
    ((_, contrast),) = unread(encoded, data, config)
    latents = np.array([*BOTH, 5])
    effect, p = rediscovery.tested_again(encoded, latents, contrast, config, "cpu")
    drawn = 20 * permutations_needed(3, 0.05)
    assert drawn > 1000 and p[:2].tolist() == [2 / (drawn + 1)] * 2, "no deal matched these"
    values = latent_contributions(encoded, contrast, config)
    assert effect == pytest.approx((values[latents] @ contrast.labels) / contrast.n_prompts)


def test_dense_probes_see_what_is_planted_in_the_states(world) -> None:  # type: ignore[no-untyped-def]
    encoded, data, config, table = world
    found = validity(table, encoded, data, config)
    accuracy = {(row["on"], row["score"].split(" confirmed")[0]): row for row in found["baselines"]}
    assert (
        accuracy["B, test", "logistic probe"]["accuracy"] > 0.85
        and accuracy["B, test", "difference in means"]["accuracy"] > 0.85
    )
    assert (
        accuracy["validation", "SARM reward"]["pairs"] == 60
        and accuracy["validation", "SARM reward"]["prompts"] == 30
    )
    whole, without = (
        accuracy["validation", "SARM reward"]["accuracy"],
        accuracy["validation", "SARM reward without them"]["accuracy"],
    )
    assert whole > without
    json.dumps(found, allow_nan=False)


def test_a_source_that_gave_discovery_or_validation_is_not_unread(world) -> None:  # type: ignore[no-untyped-def]
    encoded, data, config, _ = world
    assert [label for label, _ in unread(encoded, data, config)] == ["B"]
    for part in ("discovery", "validation"):
        tree = config.model_dump(mode="json")
        tree["data"]["sources"]["b"]["split"] = {part: 0.1, "test": 0.9}
        assert list(unread(encoded, data, parse_config(tree, "test"))) == []


def test_all_confirmed_latents_are_tried_on_unread_sources(world) -> None:  # type: ignore[no-untyped-def]
    encoded, data, config, table = world
    (row,) = confirmed_replication(table, encoded, data, config, "cpu")
    confirmed = set(table.index[table["confirmed"]])
    assert row["source"] == "B" and row["prompts"] == 90 and row["confirmed"] == len(confirmed)
    missing = set(row["not_replicated"])
    assert {*ONLY_A, TURNED} & confirmed <= missing <= confirmed and not missing & set(BOTH)
    assert row["replicated"] == len(confirmed) - len(missing)
    assert row["low"] < row["replicated"] / row["confirmed"] < row["high"]
    assert row["replicated"] <= row["expected"] <= row["confirmed"] + 1e-9, "as large as on A"
    assert confirmed_replication(table.assign(confirmed=False), encoded, data, config, "cpu") == []


def test_power_is_how_often_normal_effects_reach_holm_s_first_threshold() -> None:
    rng = np.random.default_rng(0)
    noise = np.array([[1.0], [2.0], [0.0]]) * rng.normal(size=(3, 70))
    known = np.array([[0.5], [-0.5], [0.0]]) + noise
    power = power_of(known, 40)
    for latent in (0, 1):
        error = known[latent].std(ddof=1) / 40**0.5
        drawn = known[latent].mean() + error * rng.normal(size=200_000)
        p = 2 * scipy.stats.norm.sf(np.abs(drawn) / error)
        assert power[latent] == pytest.approx((p < 0.05 / 3).mean(), abs=0.005)
    assert power[0] > power[1] > power[2] == 0
    assert power_of(known, 400)[1] > power[1], "more prompts see more"


def test_probes_and_words_are_fitted_on_discovery_alone(world) -> None:  # type: ignore[no-untyped-def]
    """Validation's and b's labels are turned round: what is fitted on discovery is then wrong."""
    encoded, data, config, table = world
    turned = [
        p._replace(chosen=p.rejected, rejected=p.chosen) if p.prompt.part != "discovery" else p
        for p in data.pairs
    ]
    rows = baselines(table, encoded, data._replace(pairs=turned), config)
    fitted = ("difference in means", "logistic probe", "TF-IDF of the words")
    accuracy = {(r["on"], r["score"]): r["accuracy"] for r in rows if r["score"] in fitted}
    assert len(accuracy) == 6 and max(accuracy.values()) < 0.2
    right = baselines(table, encoded, data, config)
    assert min(r["accuracy"] for r in right if r["score"] in fitted) > 0.8


def test_what_is_confirmed_nowhere_has_no_accuracy(world) -> None:  # type: ignore[no-untyped-def]
    encoded, data, config, table = world
    scores = {
        confirmed: {row["score"] for row in baselines(shown, encoded, data, config)}
        for confirmed, shown in ((True, table), (False, table.assign(confirmed=False)))
    }
    n = int(table["confirmed"].sum())
    parts = {f"its {n} confirmed latents", "SARM reward without them"}
    assert scores[True] - scores[False] == parts and scores[False] < scores[True]


def test_a_sentence_says_where_words_alone_do_as_well() -> None:
    def rows(behind: float, error: float) -> list[dict[str, Any]]:
        sarm = {"on": "validation", "score": "SARM reward", "accuracy": 0.91}
        words = {"on": "validation", "score": "TF-IDF of the words", "accuracy": 0.91 - behind}
        return [sarm, words | {"behind": behind, "behind_error": error}]

    told = words_alone(rows(0.05, 0.04))
    assert told is not None and "not shown to tell chosen from rejected less well" in told
    assert "(pair accuracy 0.86 against 0.91 on validation, -0.05, 95 % CI -0.13 to +0.03)" in told
    ahead = words_alone(rows(-0.05, 0.01))
    assert ahead is not None and "better than the SARM does (pair accuracy 0.96" in ahead
    assert "+0.05, 95 % CI +0.03 to +0.07)" in ahead
    undecided = words_alone(rows(-0.05, 0.03))
    assert undecided is not None and "not shown" in undecided and "better" not in undecided
    assert words_alone(rows(0.05, 0.02)) is None
    assert words_alone([]) is None


def test_the_report_names_what_does_not_replicate(world) -> None:  # type: ignore[no-untyped-def]
    encoded, data, config, table = world
    harming = [
        {"latent": i, "effect_discovery": float(table.loc[i, "effect"]), "confirmed": i == 3}
        for i in (3, 20)
    ]
    replicated = feature_replication(harming, encoded, data, config, "cpu")
    features = {
        "conjunction": [],
        "n_prompts": {"discovery": 90, "validation": 60, "test": 30},
        "n_discoveries": 17,
        "n_confirmed": 5,
        "validity": validity(table, encoded, data, config),
        "penalised": [],
        "monitors": [],
        "promoting": [],
        "misleading": [],
        "directions": [],
    }
    features["harming"] = [f | {"replication": replicated[f["latent"]]} for f in harming]
    text = " ".join("\n".join(lines(trust({"features": features}))).split())
    there, back = features["validity"]["replication"]
    for row, names in ((there, "A, B"), (back, "B, A")):
        counts = (row[c] for c in ("discovered", "replicated", "opposite_and_significant"))
        assert (
            f"{names} 90 {' '.join(map(str, counts))} {row['rank_correlation_discovered']:+.2f}"
            in text
        )
    assert (
        "Of the 2 listed latents, 1 of them confirmed, 1 replicate on B, which neither discovery"
        " nor validation read; these do not: 20." in text
    )
    assert "beside 17 (5) with the labels as they are" in text
    assert "labels shuffled" in text and "logistic probe" in text and "75% of the prompts" in text
    assert lines(trust({"features": None})) == ["not available"]


def test_the_rankings_fit_beside_one_another(world) -> None:  # type: ignore[no-untyped-def]
    *_, table = world
    rows = compared_rankings(table.assign(upstream_s=0.5, delta_z=0.0), 10)
    features = {"rankings": rows, "n_prompts": {"discovery": 90, "validation": 60}}
    text = lines(rankings({"features": features}))
    (header,) = [line for line in text if line.startswith("Ranking")]
    assert header.split()[-6:] == ["shared", "tested", "of", "role", "confirmed", "effect"]
    weighed = next(r for r in rows if (r["ranking"], r["role"]) == ("weight", "harming"))
    (line,) = [line for line in text if line.split()[:2] == ["weight", "harming"]]
    assert line.split()[2:5] == [
        str(n) for n in (10, weighed["shared_with_effect"], weighed["tested"])
    ]
    assert weighed["tested"] != weighed["shared_with_effect"]


@pytest.mark.parametrize(("pairs", "d"), [(40, 6), (8, 30)])
def test_bradley_terry_is_at_its_minimum(pairs: int, d: int) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(pairs, d)) + 0.3, rng.uniform(0.5, 1.5, pairs) / pairs
    ours = bradley_terry(x, weight, 1e-3)
    # scales the weights to add up to one
    theirs = fit_head(scipy.sparse.csr_array(x), weight, 1e-3, max_steps=2000)
    assert ours == pytest.approx(
        bradley_terry(x, weight / weight.sum(), 1e-3 / weight.sum()), rel=1e-6
    )
    assert bradley_terry(x, weight / weight.sum(), 1e-3) == pytest.approx(
        theirs, abs=1e-3 * np.abs(theirs).max()
    )


# Parts of contrasts


def test_contrasts_can_be_cut_and_joined() -> None:
    contrast = Contrast(
        np.arange(6),
        np.array([0, 0, 0, 1, 1, 2]),
        np.array([1.0, 0, 0, 1, 0, 0.5]),
        np.array([0, 0.5, 0.5, 0, 1, 0.5]),
        3,
    )
    cut = of_prompts(contrast, np.array([True, False, True]))
    assert (
        cut.rows.tolist() == [0, 1, 2, 5]
        and cut.prompts.tolist() == [0, 0, 0, 1]
        and cut.n_prompts == 2
    )
    both = joined(cut, of_prompts(contrast, np.array([False, True, False])))
    assert (
        both.n_prompts == 3
        and both.rows.tolist() == [0, 1, 2, 5, 3, 4]
        and both.prompts.tolist() == [0, 0, 0, 1, 2, 2]
    )
    assert both.labels.tolist() == [1, -0.5, -0.5, 0, 1, -1]


def test_rank_correlation_where_there_is_none() -> None:
    assert rank_correlation(np.array([1.0, 2]), np.array([1.0, 2])) is None
    assert rank_correlation(np.ones(5), np.arange(5.0)) is None
    assert rank_correlation(np.arange(5.0), -(np.arange(5.0) ** 3)) == pytest.approx(-1)


def test_discovery_here_is_the_probe_s(world) -> None:  # type: ignore[no-untyped-def]
    encoded, data, config, table = world
    contrast = contrasts_of(data, encoded, ())["discovery"]
    found = discover(encoded, [contrast], config, config.seed * 2, "cpu")
    assert found.effect == pytest.approx(table["effect"].to_numpy())
    assert (found.tested == table["tested"]).all()
    values = latent_contributions(encoded, contrast, config)[[3]]
    assert permutation_p(values, contrast, 1000, 1280, 0)[0] == found.p[3]


def test_the_effect_on_two_contrasts_is_that_of_all_their_prompts(world) -> None:  # type: ignore[no-untyped-def]
    encoded, data, config, _ = world
    whole = contrasts_of(data, encoded, ())["discovery"]
    few = np.arange(whole.n_prompts) < 7
    parts = [of_prompts(whole, few), of_prompts(whole, ~few)]
    both = discover(encoded, parts, config, 0, "cpu").effect
    assert both == pytest.approx(discover(encoded, [whole], config, 0, "cpu").effect)


def test_pairs_weigh_prompts_alike(world) -> None:  # type: ignore[no-untyped-def]
    encoded, data, _, _ = world
    rows = pair_rows(data.pairs[:3], {id_: row for row, id_ in enumerate(encoded.texts["text_id"])})
    assert rows.chosen.tolist() == [0, 0, 3] and rows.rejected.tolist() == [1, 2, 4]
    assert rows.weight.tolist() == [0.25, 0.25, 0.5]
    assert pair_rows([], {}).chosen.dtype == np.int64
