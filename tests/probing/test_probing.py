"""Effects, statistics and selection on arrays: against brute force, hand-computed figures and
planted truths.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import scipy.stats

from sarm.config import PenaltyConfig, UserError, parse_config
from sarm.data.datasets import Pair, Prompt, text_id
from sarm.probing.contrast import Contrast, permuted_labels
from sarm.probing.effects import (
    Encoded,
    contrast_of,
    latent_contributions,
    latent_effects,
    latent_table,
    roles,
    values_on,
)
from sarm.probing.monitors import tau_at_rate
from sarm.probing.select import feature, judged, ranked, select_features
from sarm.probing.stats import (
    benjamini_hochberg,
    bootstrap_intervals,
    holm,
    matched_at_random,
    prompt_effects,
)
from sarm.probing.thresholds import firing_rate, reference_rates, resolved_tau, reward_sd
from sarm.reward_model.interventions import Ranks

HARMING, PROMOTING, MISLEADING = (3, 11, 20), (5, 14, 33), (40, 50)


def config_with(**overrides: Any):  # type: ignore[no-untyped-def]
    tree: dict[str, Any] = {
        "name": "planted",
        "policy": {"model": "none"},
        "sarm": {"model": "none"},
        "data": {
            "sources": {
                "none": {
                    "format": "jsonl",
                    "label": "none",
                    "path": "none",
                    "split": {"discovery": 1.0},
                }
            }
        },
        "probe": {"permutations": 2000, "bootstrap": 200, "min_prompts_active": 8},
        "select": {"listed": 3, "penalised": 2, "monitors": 1, "random_candidates": 6},
        "ppo": {"penalty": {"tau": 1.0}},
    }
    for dotted, value in overrides.items():
        section, key = dotted.split("__")
        tree[section] = {**tree[section], key: value}
    return parse_config(tree, "test")


def planted_world(
    seed: int,
    prompts: int = 120,
    rejected: int = 1,
    d_sae: int = 64,
    k: int = 12,
    planted: bool = True,
) -> tuple[Encoded, dict[str, Contrast]]:
    """Texts whose planted latents rise on the rejected or chosen response; half the prompts are
    discovery, half validation.
    """
    rng = np.random.default_rng(seed)
    weight = rng.choice([-1, 1], d_sae) * rng.uniform(0.2, 1.0, d_sae)
    weight[list(HARMING)], weight[list(PROMOTING)] = -0.8, 0.8
    weight[list(MISLEADING)] = 0.8, -0.8
    rows, texts, contrasts = [], [], {}
    for prompt in range(prompts):
        part = "discovery" if prompt % 2 else "validation"
        topic = rng.normal(size=d_sae)
        for response in range(1 + rejected):
            a = topic + rng.normal(size=d_sae) + 0.5
            if planted and response == 0:
                a[[*PROMOTING, MISLEADING[1]]] += 2
            if planted and response > 0:
                a[[*HARMING, MISLEADING[0]]] += 2
            rows.append(a)
            label = "chosen" if response == 0 else "rejected"
            texts.append(
                {
                    "text_id": f"{len(texts)}",
                    "prompt_id": f"{prompt}",
                    "source": "s",
                    "part": part,
                    "label": label,
                    "n_tokens": 9,
                }
            )
    a = np.stack(rows)
    order = np.argsort(-a, axis=1)[:, : k + 4]
    ranks = Ranks(
        order.astype(np.int32), np.take_along_axis(a, order, 1).astype(np.float32), k, d_sae
    )
    frame = pd.DataFrame(texts)
    frame["reward"] = (weight[ranks.indices[:, :k]] * ranks.values[:, :k]).sum(1)
    for part in ("discovery", "validation"):
        mine = np.flatnonzero((frame["part"] == part).to_numpy())
        chosen = (frame["label"] == "chosen").to_numpy()[mine].astype(float)
        number = np.repeat(np.arange(len(mine) // (1 + rejected)), 1 + rejected)
        contrasts[part] = Contrast(
            mine, number, chosen, (1 - chosen) / rejected, len(mine) // (1 + rejected)
        )
    return (
        Encoded(frame, ranks, np.zeros((len(a), 4), np.float32), weight.astype(np.float32)),
        contrasts,
    )


def orthogonal(latents):  # type: ignore[no-untyped-def]
    return np.eye(64, dtype=np.float32)[list(latents)]


# Effects


def test_effects_of_a_pair_by_hand() -> None:
    # k = 2 of 4 latents; chosen keeps 0 (3.0) and 1 (2.0), runner-up 2 (1.0); rejected keeps 1
    # (4.0) and 3 (1.0), runner-up 0 (0.5).
    ranks = Ranks(
        np.array([[0, 1, 2], [1, 3, 0]], np.int32),
        np.array([[3, 2, 1], [4, 1, 0.5]], np.float32),
        2,
        4,
    )
    weight = np.array([1.0, -0.5, 0.25, 2.0], np.float32)
    contrast = Contrast(
        np.array([0, 1]), np.array([0, 0]), np.array([1.0, 0.0]), np.array([0.0, 1.0]), 1
    )
    table = latent_effects(ranks, weight, contrast, 0, 4)
    assert table["delta_z"].tolist() == [3.0, -2.0, 0.0, -1.0]
    assert table["effect_head"].tolist() == [3.0, 1.0, 0.0, -2.0]
    # chosen: runner-up adds 0.25; rejected: runner-up adds 0.5.
    assert table["effect_reselected"].tolist() == [
        3.0 - 0.25,
        (-1.0 - 0.25) - (-2.0 - 0.5),
        0.0,
        -(2.0 - 0.5),
    ]
    assert table["n_prompts_active"].tolist() == [1, 1, 0, 1]
    assert roles(weight.astype(float), table["delta_z"].to_numpy()).tolist() == [
        "promoting",
        "harming",
        "none",
        "misleading",
    ]


def test_contrast_weighs_prompts_alike_and_joins_a_response_of_both_labels() -> None:
    def pair(name: str, chosen: str, rejected: str) -> Pair:
        prompt = Prompt(name, ({"role": "user", "content": name},), "s", "unsafe", "", "discovery")
        return Pair(f"{name}{chosen}{rejected}", prompt, "s", chosen, rejected)

    def row_of(prompt: str, response: str, label: str) -> str:
        return (
            text_id(
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            )
            + f"-{label}"
        )

    pairs = [pair("p", "a", "b"), pair("p", "b", "c"), pair("q", "x", "y")]
    encoded = [
        ("p", "a", "c"),
        ("p", "b", "r"),
        ("p", "b", "c"),
        ("p", "c", "r"),
        ("q", "x", "c"),
        ("q", "y", "r"),
    ]
    rows = {row_of(*text): row for row, text in enumerate(encoded)}
    contrast = contrast_of(pairs, rows)
    assert contrast.rows.tolist() == [0, 2, 3, 4, 5]
    assert contrast.prompts.tolist() == [0, 0, 0, 1, 1]
    assert contrast.labels.tolist() == [0.5, 0.0, -0.5, 1.0, -1.0]
    with pytest.raises(UserError, match="encode has not seen"):
        contrast_of([pair("p", "new", "b")], rows)


@pytest.mark.parametrize("reselected", [False, True])
def test_table_equals_a_plain_loop(reselected: bool) -> None:
    encoded, contrasts = planted_world(0, prompts=12, rejected=3)
    table = latent_effects(encoded.ranks, encoded.head_weight, contrasts["discovery"], 0, 64)
    w, k = encoded.head_weight.astype(float), encoded.ranks.k

    def reward_without(row: int, latent: int) -> float:
        kept = [
            (i, v)
            for i, v in zip(
                encoded.ranks.indices[row], encoded.ranks.values[row].astype(float), strict=True
            )
        ]
        if reselected:
            return sum(w[i] * v for i, v in [x for x in kept if x[0] != latent][:k])
        return sum(w[i] * v for i, v in kept[:k] if i != latent)

    contrast = contrasts["discovery"]
    for latent in range(64):
        margins = []
        for prompt in range(contrast.n_prompts):
            rows = contrast.rows[contrast.prompts == prompt]
            change = [reward_without(r, -1) - reward_without(r, latent) for r in rows]
            margins.append(change[0] - np.mean(change[1:]))
        assert table[f"effect_{'reselected' if reselected else 'head'}"][latent] == pytest.approx(
            np.mean(margins), abs=1e-12
        )


def test_any_partition_gives_the_same_table_to_the_bit() -> None:
    encoded, contrasts = planted_world(1)
    config = config_with()
    whole = latent_table(encoded, contrasts, 0, 64, config)
    for edges in ([0, 1, 2, 31, 32, 64], [0, 40, 64], [0, 7, 7, 64], list(range(65))):
        parts = [
            latent_table(encoded, contrasts, a, b, config) for a, b in itertools.pairwise(edges)
        ]
        pd.testing.assert_frame_equal(
            pd.concat(parts, ignore_index=True), whole, check_exact=True, check_dtype=True
        )


# Statistics


@pytest.mark.parametrize("rejected", [1, 3])
def test_p_is_calibrated_where_responses_are_alike(rejected: int) -> None:
    p = []
    for seed in range(8):
        encoded, contrasts = planted_world(100 + seed, rejected=rejected, planted=False)
        table = latent_table(encoded, contrasts, 0, 64, config_with(probe__permutations=500))
        p += table.loc[table["tested"], "p"].tolist()
    p = np.array(p)
    assert len(p) > 400
    for level in (0.05, 0.2, 0.5):
        assert (p <= level).mean() < level + 3 * np.sqrt(level * (1 - level) / len(p))


def test_bootstrap_resamples_prompts() -> None:
    rng = np.random.default_rng(0)
    effects = rng.normal(1.0, 2.0, size=(1, 400))
    low, high = bootstrap_intervals(scipy.sparse.csr_array(effects), 4000, 0)
    half = 1.96 * effects.std(ddof=1) / 20
    assert low[0] == pytest.approx(effects.mean() - half, abs=0.03)
    assert high[0] == pytest.approx(effects.mean() + half, abs=0.03)
    one = bootstrap_intervals(scipy.sparse.csr_array(effects[:, :1]), 100, 0)
    assert np.isnan(one).all()


def test_prompt_effects_average_pairs_first() -> None:
    contrast = Contrast(
        np.arange(6),
        np.array([0, 0, 0, 0, 1, 1]),
        np.array([1.0, 0, 0, 0, 1, 0]),
        np.array([0, 1 / 3, 1 / 3, 1 / 3, 0, 1]),
        2,
    )
    effects = prompt_effects(scipy.sparse.csr_array(np.array([[4.0, 1, 2, 3, 0, 5]])), contrast)
    assert effects.toarray()[0] == pytest.approx([2.0, -5.0])


def test_multiple_testing_equals_scipy_and_hand() -> None:
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.005])
    assert holm(p)[[0, 1, 3, 4]] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    tested = ~np.isnan(p)
    assert benjamini_hochberg(p)[tested] == pytest.approx(
        scipy.stats.false_discovery_control(p[tested])
    )
    assert np.isnan(benjamini_hochberg(p)[2]) and np.isnan(holm(p)[2])
    assert len(holm(np.array([]))) == len(benjamini_hochberg(np.array([]))) == 0


def test_matched_latents_are_near_and_drawn_once() -> None:
    features = np.stack([np.arange(40.0), np.zeros(40)], axis=1)
    drawn = matched_at_random(
        np.array([0, 20]), np.array([*range(1, 20), *range(21, 40)]), features, 4, 0
    )
    assert all(len(d) == 4 for d in drawn) and len({*drawn[0], *drawn[1]}) == 8
    assert max(drawn[0]) <= 8 and all(abs(latent - 20) <= 8 for latent in drawn[1])
    few = matched_at_random(np.array([0, 1]), np.array([2, 3]), features, 5, 0)
    assert sorted(latent for d in few for latent in d) == [2, 3]


# Planted latents, and none


@pytest.mark.parametrize("rejected", [1, 3])
def test_planted_latents_are_all_found_and_confirmed(rejected: int) -> None:
    encoded, contrasts = planted_world(2, prompts=200, rejected=rejected)
    config = config_with(select__listed=10)
    features = select_features(
        latent_table(encoded, contrasts, 0, 64, config), encoded, config, orthogonal
    )
    for role, planted in (
        ("harming", HARMING),
        ("promoting", PROMOTING),
        ("misleading", MISLEADING),
    ):
        confirmed = {f["latent"] for f in features[role] if f["confirmed"]}
        assert confirmed >= set(planted), role
        assert len(confirmed - set(planted)) <= 1
        effects = [abs(f["effect"]) for f in features[role] if f["confirmed"]]
        assert effects == sorted(effects, reverse=True)
    assert {p["latent"] for p in features["penalised"]} < set(HARMING)
    assert set(features["monitors"]) | {p["latent"] for p in features["penalised"]} == set(HARMING)
    assert features["steering_file"] == {str(f["latent"]): ["*", 0.0] for f in features["harming"]}
    candidates = [c["latent"] for c in features["random_candidates"]]
    assert len(candidates) == 6 and not {*candidates} & {*HARMING, *PROMOTING, *MISLEADING}
    json.dumps(features, allow_nan=False)


@pytest.mark.parametrize("rejected", [1, 3])
def test_shuffled_labels_give_few_discoveries_over_repeated_draws(rejected: int) -> None:
    # With no true effect any discovery is false, so the share of draws with one estimates the false
    # discovery rate.
    encoded, contrasts = planted_world(4, prompts=120, rejected=rejected)
    contrast, draws, found, confirmed = contrasts["discovery"], 60, 0, 0
    config = config_with(probe__permutations=1000, probe__bootstrap=2, select__fdr=0.1)
    shuffled = {part: next(permuted_labels(c, draws, 5)) for part, c in contrasts.items()}
    for draw in range(draws):
        drawn = {}
        for part, contrast in contrasts.items():
            labels = shuffled[part][:, draw]
            drawn[part] = contrast._replace(
                chosen=np.maximum(labels, 0), rejected=np.maximum(-labels, 0)
            )
        table = latent_table(encoded, drawn, 0, 64, config)
        q = benjamini_hochberg(table["p"].to_numpy())
        found += bool((q <= 0.1).any())
        p = holm(table["p_validation"].where(q <= 0.1).to_numpy())
        confirmed += bool((p < 0.05).any())
    assert found / draws <= 0.1 + 2 * np.sqrt(0.1 * 0.9 / draws)
    assert confirmed / draws <= 0.05


# Selection


def test_roles_and_order_when_few_are_confirmed() -> None:
    encoded, contrasts = planted_world(2, prompts=200)
    config = config_with(select__listed=8)
    features = select_features(
        latent_table(encoded, contrasts, 0, 64, config), encoded, config, orthogonal
    )
    flags = [f["confirmed"] for f in features["harming"]]
    assert flags == sorted(flags, reverse=True) and not all(flags)
    unconfirmed = [f["effect_discovery"] for f in features["harming"] if not f["confirmed"]]
    assert unconfirmed == sorted(unconfirmed, reverse=True)
    for f in features["harming"]:
        assert f["weight"] < 0 and f["effect_discovery"] > 0


def test_effects_are_quoted_from_validation() -> None:
    encoded, contrasts = planted_world(2, prompts=200)
    config = config_with()
    table = latent_table(encoded, contrasts, 0, 64, config)
    first = select_features(table, encoded, config, orthogonal)["harming"][0]
    row = table.loc[first["latent"]]
    assert (
        first["effect"]
        == row["effect_reselected_validation"]
        != row["effect_reselected"]
        == first["effect_discovery"]
    )
    assert (
        first["effect_low"] == row["effect_low_validation"] < first["effect"] < first["effect_high"]
    )


def test_monitors_keep_away_from_the_penalised() -> None:
    encoded, contrasts = planted_world(2, prompts=200)
    config = config_with(select__penalised=1)
    table = latent_table(encoded, contrasts, 0, 64, config)
    penalised = select_features(table, encoded, config, orthogonal)["penalised"][0]["latent"]
    near, far = sorted(set(HARMING) - {penalised})

    def directions(latents):  # type: ignore[no-untyped-def]
        vectors = np.eye(64, dtype=np.float32)
        vectors[near] = -0.6 * vectors[penalised] + 0.8 * vectors[near]
        return 5 * vectors[list(latents)]

    assert (
        near
        not in select_features(
            table, encoded, config_with(select__penalised=1, select__monitors=4), directions
        )["monitors"]
    )
    loose = select_features(
        table,
        encoded,
        config_with(select__penalised=1, select__monitors=2, select__monitor_max_cosine=0.61),
        directions,
    )
    assert set(loose["monitors"]) == {near, far}
    assert {round(f["max_cosine"], 3) for f in loose["monitor_features"]} == {0.6, 0.0}


def test_tau_and_alpha_are_resolved_to_numbers() -> None:
    encoded, contrasts = planted_world(2, prompts=200)
    penalty = {"tau": None, "tau_quantile": 0.8, "alpha": 2.0, "alpha_unit": "reward_sd"}
    config = config_with(ppo__penalty=penalty | {"clamp": 3.5})
    features = select_features(
        latent_table(encoded, contrasts, 0, 64, config), encoded, config, orthogonal
    )
    texts = encoded.texts
    assert features["clamp"] == 3.5
    assert features["n_prompts"] == {"discovery": 100, "validation": 100, "test": 0}
    sd = texts.loc[texts["part"] == "discovery", "reward"].std()
    rejected = np.flatnonzero(
        ((texts["part"] == "discovery") & (texts["label"] == "rejected")).to_numpy()
    )
    chosen = np.flatnonzero(
        ((texts["part"] == "discovery") & (texts["label"] == "chosen")).to_numpy()
    )
    texts_of_both = [*rejected, *chosen]
    for entry in features["penalised"]:
        z = np.array(
            [
                dict(
                    zip(*(part[row, :12].tolist() for part in encoded.ranks[:2]), strict=True)
                ).get(entry["latent"], 0.0)
                for row in texts_of_both
            ]
        )
        assert entry["tau"] == pytest.approx(np.quantile(z[: len(rejected)], 0.8))
        assert entry["alpha"] == pytest.approx(2 * sd)
        assert features["reference_rates"][str(entry["latent"])] == pytest.approx(
            ((z[len(rejected) :] > 0).sum() + 0.5) / (len(chosen) + 1)
        )
        assert 0.1 < features["discovery_rates"][str(entry["latent"])] <= 0.2


def test_a_feature_is_its_row_of_the_table() -> None:
    columns = (
        "weight delta_z_validation effect_validation effect_low_validation effect_high_validation"
        " effect effect_head_validation effect_reselected_validation effect_chosen_validation"
        " effect_rejected_validation p q p_validation density"
    ).split()
    row = pd.Series({name: 0.5 + i for i, name in enumerate(columns)}, dtype=object)
    row["p_validation"], row["latent"] = math.nan, 7
    row["role"], row["confirmed"] = "misleading", np.bool_(True)
    names = (
        "weight delta_z effect effect_low effect_high effect_discovery effect_head"
        " effect_reselected effect_chosen effect_rejected p q p_validation density"
    ).split()
    assert feature(row) == {
        "latent": 7,
        "role": "misleading",
        "confirmed": True,
        **{name: 0.5 + i for i, name in enumerate(names)},
        "p_validation": None,
    }


def test_random_candidates_say_what_they_are_matched_to() -> None:
    encoded, contrasts = planted_world(2, prompts=200)
    config = config_with(select__random_candidates=5)
    table = latent_table(encoded, contrasts, 0, 64, config)
    features = select_features(table, encoded, config, orthogonal)
    by_number, found = judged(table, config.select), features["random_candidates"]
    targets = {p["latent"]: p for p in features["penalised"]}
    assert [c["matched_to"] for c in found] == [*targets, *targets, next(iter(targets))]
    for candidate in found:
        row = by_number.loc[candidate["latent"]]
        assert candidate["alpha"] == targets[candidate["matched_to"]]["alpha"]
        assert candidate["weight"] == row["weight"] and candidate["density"] == row["density"]
        assert candidate["effect"] == row["effect_validation"]
        target = targets[candidate["matched_to"]]
        z, of_target = (
            values_on(encoded, "discovery", "rejected", [latent])[:, 0]
            for latent in (candidate["latent"], target["latent"])
        )
        rate = float((of_target > target["tau"]).mean())
        assert candidate["tau"] == tau_at_rate(z, rate) and 0 < rate < 1
    many = config_with(select__random_candidates=50, select__listed=12)
    features = select_features(table, encoded, many, orthogonal)
    roles_ = ("promoting", "harming", "misleading")
    listed = {f["latent"] for role in roles_ for f in features[role]}
    assert len(listed) > 12 and not listed & {c["latent"] for c in features["random_candidates"]}


@pytest.mark.parametrize("effect", ["head", "reselected"])
def test_contributions_are_of_the_configured_effect(effect: str) -> None:
    encoded, contrasts = planted_world(2, prompts=20)
    ranks, w = encoded.ranks, encoded.head_weight.astype(float)
    found = latent_contributions(
        encoded, contrasts["discovery"], config_with(select__effect=effect), 3, 40
    ).toarray()
    for at, row in enumerate(contrasts["discovery"].rows.tolist()):
        values = dict(zip(ranks.indices[row].tolist(), ranks.values[row].tolist(), strict=True))
        kept = ranks.indices[row, : ranks.k].tolist()
        up = int(ranks.indices[row, ranks.k])
        less = w[up] * values[up] if effect == "reselected" else 0.0
        want = [w[i] * values[i] - less if i in kept else 0.0 for i in range(3, 40)]
        assert found[:, at] == pytest.approx(want)


def test_a_contrast_of_nothing_has_integers_all_the_same() -> None:
    nothing = contrast_of([], {})
    assert nothing.rows.dtype == nothing.prompts.dtype == np.int64 and nothing.n_prompts == 0


def test_rates_and_the_rewards_deviation_by_hand() -> None:
    # k = 2 of 4 latents and a runner-up; three chosen texts and one rejected of discovery, and one
    # chosen text of validation
    ranks = Ranks(
        np.array([[0, 1, 2], [1, 0, 3], [2, 3, 0], [0, 2, 1], [0, 2, 1]], np.int32),
        np.array([[3, 2, 1], [4, 0.5, 0.2], [2, 1, 0.9], [5, 4, 3], [7, 6, 5]], np.float32),
        2,
        4,
    )
    rewards = np.array([10000.1, 10000.3, 10000.75, 9999.5, 0], np.float32)
    parts = ["discovery"] * 4 + ["validation"]
    labels = ["chosen", "chosen", "chosen", "rejected", "chosen"]
    texts = pd.DataFrame({"part": parts, "label": labels, "reward": rewards})
    encoded = Encoded(texts, ranks, np.zeros((5, 4), np.float32), np.ones(4, np.float32))
    assert reference_rates(encoded, [3, 0]) == {"3": 1.5 / 4, "0": 2.5 / 4}
    mean = sum(rewards[:4].tolist()) / 4
    variance = sum((r - mean) ** 2 for r in rewards[:4].tolist()) / 3
    assert reward_sd(encoded) == pytest.approx(variance**0.5, rel=1e-9)
    two = encoded._replace(texts=texts.assign(part=["discovery"] * 2 + ["validation"] * 3))
    assert reward_sd(two) == pytest.approx(abs(float(rewards[1] - rewards[0])) / 2**0.5)
    one = encoded._replace(texts=texts.assign(part=["discovery"] + ["validation"] * 4))
    says = "discovery has 1 texts, too few to select latents on; give it a larger share in data"
    with pytest.raises(UserError, match=f"^{says}.sources$"):
        reward_sd(one)


def test_a_quantile_below_the_zeros_fires_whenever_the_latent_does() -> None:
    encoded, contrasts = planted_world(2, prompts=200)
    config = config_with(ppo__penalty={"tau": None, "tau_quantile": 0.0})
    features = select_features(
        latent_table(encoded, contrasts, 0, 64, config), encoded, config, orthogonal
    )
    assert all(
        p["tau"] >= 0 and features["discovery_rates"][str(p["latent"])] > 0.3
        for p in features["penalised"]
    )


@pytest.mark.parametrize("penalty", [{"tau": 1000.0}, {"tau": None, "tau_quantile": 1.0}])
def test_a_penalty_that_never_triggers_is_refused(penalty: dict[str, Any]) -> None:
    encoded, contrasts = planted_world(2, prompts=200)
    config = config_with(ppo__penalty=penalty)
    table = latent_table(encoded, contrasts, 0, 64, config)
    with pytest.raises(UserError, match="never triggers on discovery's rejected texts"):
        select_features(table, encoded, config, orthogonal)
    allowed = config_with(ppo__penalty=penalty, ppo__arms=["no_penalty"])
    assert any(
        "never triggers" in warning
        for warning in select_features(table, encoded, allowed, orthogonal)["warnings"]
    )


def test_too_few_permutations_are_made_up_for_and_told() -> None:
    encoded, contrasts = planted_world(2, prompts=200)
    config = config_with(probe__permutations=100)
    features = select_features(
        latent_table(encoded, contrasts, 0, 64, config), encoded, config, orthogonal
    )
    assert features["permutations"] == {
        "configured": 100,
        "needed": features["n_tested"] * 20,
        "used": features["n_tested"] * 20,
    }
    assert any("probe.permutations=100 is too few" in warning for warning in features["warnings"])
    assert {f["latent"] for f in features["harming"] if f["confirmed"]} == set(HARMING)


def test_one_prompt_tests_nothing_and_no_validation_confirms_nothing() -> None:
    encoded, contrasts = planted_world(0, prompts=2)
    assert contrasts["discovery"].n_prompts == 1
    table = latent_table(encoded, contrasts, 0, 64, config_with())
    assert (
        not table["tested"].any() and table["p"].isna().all() and table["effect_low"].isna().all()
    )
    with pytest.raises(UserError, match="no harming latent was found"):
        select_features(table, encoded, config_with(), orthogonal)
    encoded, contrasts = planted_world(2, prompts=200)
    nobody = Contrast(*(np.zeros(0, t) for t in (int, int, float, float)), 0)
    table = latent_table(encoded, {**contrasts, "validation": nobody}, 0, 64, config_with())
    features = select_features(table, encoded, config_with(), orthogonal)
    assert features["n_discoveries"] >= 8 and features["n_confirmed"] == 0
    assert all(f["effect"] is None and not f["confirmed"] for f in features["harming"])
    json.dumps(features, allow_nan=False)


def test_tau_is_never_below_a_latent_that_is_off() -> None:
    # Kept values can be negative, as nothing clamps them; a tau below 0 would fire on every text
    # that lacks the latent.
    ranks = Ranks(
        np.array([[0], [0], [1], [1]], np.int32),
        np.array([[-2.0], [-1.0], [3.0], [1.0]], np.float32),
        1,
        2,
    )
    frame = pd.DataFrame({"part": "discovery", "label": "rejected"}, index=range(4))
    encoded = Encoded(frame, ranks, np.zeros((4, 1), np.float32), np.ones(2, np.float32))
    assert resolved_tau(0, encoded, PenaltyConfig(tau=None, tau_quantile=0.2)) == 0.0
    assert resolved_tau(1, encoded, PenaltyConfig(tau=None, tau_quantile=0.5)) == 0.5
    assert resolved_tau(0, encoded, PenaltyConfig(tau=-1.5)) == -1.5
    assert [
        firing_rate(encoded, 0, 0.0),
        firing_rate(encoded, 1, 0.5),
        firing_rate(encoded, 0, -1.5),
    ] == [0.0, 0.5, 0.75]


def test_confirmed_means_discovered_same_sign_and_holm() -> None:
    table = pd.DataFrame(
        {
            "latent": range(6),
            "tested": [True, True, True, True, True, False],
            "role": ["harming", "harming", "promoting", "misleading", "harming", "harming"],
            "p": [0.001, 0.001, 0.001, 0.001, 0.9, np.nan],
            "effect_head": [1.0, 1.0, 1.0, -1.0, 1.0, 1.0],
            "effect_head_validation": [1.0, 1.0, 1.0, -1.0, 1.0, 1.0],
            # Holm over the four discoveries: 0.004, 0.06, 0.06 and 0.004.
            "p_validation": [0.001, 0.03, 0.03, 0.001, 0.001, np.nan],
        }
    )
    select = config_with(select__effect="head").select
    result = judged(table, select)
    assert result["discovered"].tolist() == [True, True, True, True, False, False]
    assert result["p_holm"].tolist()[:4] == [0.004, 0.06, 0.06, 0.004]
    assert result["confirmed"].tolist() == [True, False, False, True, False, False]
    assert result["candidate"].tolist() == [True, True, True, True, True, False]
    turned = judged(table.assign(effect_head_validation=-table["effect_head_validation"]), select)
    assert not turned["confirmed"].any(), "of the other sign on validation"
    assert not judged(table.assign(effect_head=-table["effect_head"]), select)["candidate"].any()


def test_ranked_puts_the_confirmed_first() -> None:
    table = pd.DataFrame(
        {
            "latent": [0, 1, 2, 3],
            "role": "harming",
            "candidate": True,
            "confirmed": [False, True, True, False],
        }
    )
    table["effect"], table["effect_validation"] = [9.0, 1.0, 5.0, 3.0], [0.0, 4.0, 2.0, 8.0]
    assert ranked(table, "harming")["latent"].tolist() == [1, 2, 0, 3]
