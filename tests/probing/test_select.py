"""What selection says and takes: six latents with values made by hand, all kept by TopK."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sarm.config import PenaltyConfig, SweepPoint, UserError
from sarm.probing import select as selecting
from sarm.probing.effects import Encoded, latent_table
from sarm.probing.monitors import MonitorCandidate
from sarm.probing.select import (
    monitor_candidates,
    monitors_lack,
    penalised_latents,
    random_candidates,
    ranked,
    refuse_unconfirmed,
    select_features,
)
from sarm.probing.siblings import by_direction, by_firing
from sarm.probing.taus import QUANTILES, suggested_taus, swept
from sarm.probing.thresholds import firing_rate, reference_rates, resolved_tau, reward_sd
from sarm.reward_model.interventions import Ranks
from tests.probing.test_probing import config_with, orthogonal, planted_world
from tests.runs import feature, features

D_SAE = 6
COUNTS = {("discovery", "chosen"): 5, ("discovery", "rejected"): 8}
COUNTS |= {("validation", "chosen"): 3, ("validation", "rejected"): 4, ("test", "rejected"): 2}


def texts(seed: int = 0) -> Encoded:
    """Values of six latents on texts of every kind, some of them zero."""
    rng = np.random.default_rng(seed)
    of = [kind for kind, n in COUNTS.items() for _ in range(n)]
    frame = pd.DataFrame(of, columns=["part", "label"])
    frame["prompt_id"] = [f"p{i % 7}" for i in range(len(of))]
    frame["reward"] = rng.normal(size=len(of))
    z = np.round(rng.uniform(0.1, 4, (len(of), D_SAE)), 2) * (rng.random((len(of), D_SAE)) < 0.7)
    indices = np.tile(np.arange(D_SAE), (len(of), 1)).astype(np.int32)
    ranks = Ranks(indices, z.astype(np.float32), D_SAE, D_SAE)
    return Encoded(frame, ranks, np.zeros((len(of), 2), np.float32), np.ones(D_SAE, np.float32))


def z_of(encoded: Encoded, part: str, label: str) -> np.ndarray:
    rows = (encoded.texts["part"] == part) & (encoded.texts["label"] == label)
    return encoded.ranks.values[rows.to_numpy()].astype(np.float64)


def rows(**changes: Any) -> pd.DataFrame:
    """Six harming candidates, of which the first four are confirmed."""
    table = {
        "latent": range(D_SAE),
        "role": "harming",
        "tested": True,
        "candidate": True,
        "discovered": [True] * 4 + [False] * 2,
        "confirmed": [True] * 4 + [False] * 2,
        "weight": [-1.0, -0.9, -0.8, -0.7, -0.6, -0.5],
        "density": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
        "effect": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        "effect_validation": [0.5, 4.0, 3.0, 2.0, 9.0, 8.0],
    }
    return pd.DataFrame(table | changes).set_index("latent", drop=False)


def entry(latent: int, tau: float, alpha: float = 0.5) -> dict[str, Any]:
    return {"latent": latent, "tau": tau, "alpha": alpha}


# Monitors


def test_monitors_may_be_confirmed_ones_that_are_not_penalised_at_a_tau_of_their_own() -> None:
    encoded = texts()
    select = config_with(select__monitors=2).select
    vectors = [[1, 0, 0], [0, 2, 0], [3, 4, 0], [0, 1, -1], [0, 0, 1], [1, 1, 1]]

    def directions(latents: Sequence[int]) -> np.ndarray:
        return np.array(vectors, np.float32)[[*latents]]

    penalised = [entry(1, 1.0), entry(0, 2.0)]
    found = monitor_candidates(rows(), penalised, encoded, select, directions)
    # of the confirmed 0 and 1 are penalised; by effect on validation 2 comes before 3
    assert [m.latent for m in found] == [2, 3]
    rejected = z_of(encoded, "discovery", "rejected")
    rate = ((rejected[:, 1] > 1.0).mean() + (rejected[:, 0] > 2.0).mean()) / 2
    every = np.concatenate(
        [z_of(encoded, part, side) for part in ("discovery", "validation") for side in SIDES]
    )
    for m, cosine in zip(found, (4 / 5, 1 / math.sqrt(2)), strict=True):
        assert isinstance(m, MonitorCandidate) and m.max_cosine == pytest.approx(cosine)
        fires = (rejected[:, m.latent] > m.tau).mean()
        assert rate - 1 / len(rejected) < fires <= rate
        known = [np.corrcoef(every[:, m.latent], every[:, p])[0, 1] for p in (1, 0)]
        assert m.max_correlation == pytest.approx(np.abs(known).max(), abs=1e-6)
    others = [entry(0, 9.0), entry(1, 9.0), entry(3, 0.0)]
    (alone,) = monitor_candidates(rows(), others, encoded, select, directions)
    assert alone.latent == 2
    nobody = monitor_candidates(rows(), [], encoded, select, directions)
    assert [m.latent for m in nobody] == [1, 2, 3, 0]
    for m in nobody:
        assert (rejected[:, m.latent] > m.tau).mean() == pytest.approx(0.5, abs=1 / 8)
    none = config_with(select__monitors=0).select
    assert monitor_candidates(rows(), penalised, encoded, none, orthogonal) == []
    assert monitor_candidates(rows(confirmed=False), penalised, encoded, select, orthogonal) == []


SIDES = ("chosen", "rejected")


def test_too_few_monitors_are_told_with_both_bounds() -> None:
    select = config_with(
        select__monitors=3, select__monitor_max_cosine=0.25, select__monitor_max_correlation=0.75
    ).select
    one = MonitorCandidate(1, 0.0, 0.1, 0.1)
    assert monitors_lack([one], [one] * 4, select) == (
        "1 candidate for 3 monitors, before calibrate asks how often they fire: of 4 confirmed"
        " harming latents that are not penalised no further one has |cos| < 0.25 and |correlation|"
        " < 0.75 with every penalised one"
    )
    assert monitors_lack([], [], select).startswith("0 candidates for 3 monitors, ")


# Random latents


def test_random_latents_are_no_discoveries_while_there_are_enough() -> None:
    encoded = texts()
    table = rows(
        confirmed=[True, False, False, False, False, False],
        discovered=[True, True, False, False, True, False],
        weight=[-1.0, -0.9, -0.8, -0.7, -0.6, 0.5],
        effect_validation=[0.5, math.nan, 3.0, 2.0, math.nan, 8.0],
    )
    penalised = [entry(0, 1.5, alpha=0.25)]

    def drawn(table: pd.DataFrame, n: int, taken: tuple[int, ...] = ()) -> list[dict[str, Any]]:
        config = config_with(select__random_candidates=n)
        return random_candidates(table, penalised, {0, *taken}, encoded, config)

    two = drawn(table, 2)
    assert {c["latent"] for c in two} <= {2, 3}, "enough: neither 1 nor 4, which are discoveries"
    rejected = z_of(encoded, "discovery", "rejected")
    rate = (rejected[:, 0] > 1.5).mean()
    for c in two:
        row = table.loc[c["latent"]]
        assert c == {
            "latent": c["latent"],
            "tau": c["tau"],
            "alpha": 0.25,
            "matched_to": 0,
            "weight": row["weight"],
            "density": row["density"],
            "effect": row["effect_validation"],
        }
        assert rate - 1 / 8 < (rejected[:, c["latent"]] > c["tau"]).mean() <= rate
    three = drawn(table, 3)
    assert {c["latent"] for c in three} == {2, 3}, "as many without discoveries, of one sign"
    more = drawn(table.assign(discovered=[True, True, False, True, True, True]), 4)
    assert {c["latent"] for c in more} == {1, 2, 3, 4}, "too few: discoveries too"
    assert {c["latent"]: c["effect"] for c in more} == {1: None, 2: 3.0, 3: 2.0, 4: None}
    assert {c["latent"] for c in drawn(table.assign(discovered=True), 4, (3,))} == {1, 2, 4}
    assert {c["latent"] for c in drawn(table.assign(tested=table["latent"] != 2), 4)} == {1, 3, 4}
    silent = table.assign(weight=[-1.0, 0.0, -0.8, -0.7, -0.6, 0.5])
    assert {c["latent"] for c in drawn(silent, 4)} == {2, 3, 4}
    nothing = random_candidates(table, [], set(), encoded, config_with())
    assert nothing == []


def test_random_latents_serve_the_penalised_by_turns_and_no_more_than_asked_for() -> None:
    encoded, _ = planted_world(2, prompts=60)
    table = rows()
    big = pd.concat([table] * 8, ignore_index=True)
    big["latent"] = range(len(big))
    big = big.set_index("latent", drop=False).assign(confirmed=False, discovered=False)
    penalised = [entry(3, 1.0, 0.1), entry(11, 2.0, 0.2), entry(20, 0.5, 0.3)]
    config = config_with(select__random_candidates=7)
    found = random_candidates(big, penalised, {3, 11, 20}, encoded, config)
    assert [(c["matched_to"], c["alpha"]) for c in found] == [
        (3, 0.1),
        (11, 0.2),
        (20, 0.3),
        (3, 0.1),
        (11, 0.2),
        (20, 0.3),
        (3, 0.1),
    ]
    other = config_with(select__random_candidates=7).model_copy(update={"seed": 5})
    assert random_candidates(big, penalised, {3, 11, 20}, encoded, other) != found


# The penalised


def test_the_penalised_are_the_first_confirmed_with_their_numbers() -> None:
    encoded, warnings = texts(), list[str]()
    penalty = {"tau": None, "tau_quantile": 0.75, "alpha": 2.0, "alpha_unit": "reward_sd"}
    config = config_with(select__penalised=3, ppo__penalty=penalty)
    found = penalised_latents(rows(), encoded, config, warnings)
    sd = encoded.texts["reward"][:13].std()
    rejected = z_of(encoded, "discovery", "rejected")
    assert found == [
        {
            "latent": latent,
            "tau": pytest.approx(np.quantile(rejected[:, latent], 0.75)),
            "alpha": pytest.approx(2 * sd),
            "role": "harming",
            "confirmed": True,
        }
        for latent in (1, 2, 3)
    ]
    assert warnings == []
    reward = config_with(ppo__penalty={"tau": 0.25, "alpha": 2.0, "alpha_unit": "reward"})
    one = penalised_latents(rows(), encoded, reward, warnings)[0]
    assert (one["tau"], one["alpha"]) == (0.25, 2.0) and warnings == []


def test_what_is_penalised_in_want_of_better_is_told() -> None:
    encoded, warnings = texts(), list[str]()
    more = config_with(select__penalised=5)
    assert len(penalised_latents(rows(), encoded, more, warnings)) == 4
    assert warnings == [
        "4 harming latents are penalised, where 5 were asked for: no other confirmed one costs"
        " reward (harming) or fires on unsafe text and is paid for (misleading)"
    ]
    warnings.clear()
    none = rows(confirmed=False)
    found = penalised_latents(none, encoded, config_with(select__penalised=2), warnings)
    assert [p["latent"] for p in found] == [5, 4] and not any(p["confirmed"] for p in found)
    told = "latent is confirmed on validation; those to penalise are the first unconfirmed"
    assert warnings == [f"no harming {told} candidates: 5, 4"]
    warnings.clear()
    untrained = config_with(select__penalise="both", ppo__arms=["no_penalty"])
    assert penalised_latents(rows(candidate=False), encoded, untrained, warnings) == []
    assert warnings == [f"no harming or misleading {told} candidates: none"]
    wanted = config_with(select__penalise="misleading", probe__min_prompts_active=6)
    with pytest.raises(UserError) as refused:
        penalised_latents(rows(), encoded, wanted, warnings)
    assert str(refused.value) == (
        "no misleading latent was found to penalise: none of those active on 6 discovery prompts"
        " has the weight and fires on the side of that role, and moves the margin its way; give"
        " more pairs to discovery, lower probe.min_prompts_active, or set ppo.arms=[no_penalty]"
    )


def test_a_threshold_that_nothing_reaches_is_told_or_refused() -> None:
    encoded = texts()
    rejected = z_of(encoded, "discovery", "rejected")
    tau = 0.5 * (rejected[:, 1].max() + rejected[:, 2].max())
    silent, loud = (1, 2) if rejected[:, 1].max() < tau else (2, 1)
    said = (
        f"ppo.penalty.tau={tau:g} never triggers on discovery's rejected texts for latents"
        f" {silent}, whose largest value there is {rejected[:, silent].max():.3g}"
    )
    config = config_with(select__penalised=2, ppo__penalty={"tau": float(tau)})
    warnings: list[str] = []
    assert len(penalised_latents(rows(), encoded, config, warnings)) == 2
    assert warnings == [said] and loud != silent
    config = config_with(select__penalised=2, ppo__penalty={"tau": 50.0})
    with pytest.raises(UserError) as refused:
        penalised_latents(rows(), encoded, config, warnings)
    largest = rejected[:, [1, 2]].max()
    told = (
        "ppo.penalty.tau=50 never triggers on discovery's rejected texts for latents 1, 2, whose"
        f" largest value there is {largest:.3g}"
    )
    assert str(refused.value) == (
        f"{told}; set ppo.penalty.tau below that, or ppo.penalty.tau=null with"
        " ppo.penalty.tau_quantile=0.8"
    )
    untrained = config_with(
        select__penalised=2, ppo__penalty={"tau": 50.0}, ppo__arms=["no_penalty"]
    )
    warnings.clear()
    penalised_latents(rows(), encoded, untrained, warnings)
    assert warnings == [told]
    quantile = config_with(select__penalised=2, ppo__penalty={"tau": None, "tau_quantile": 1.0})
    with pytest.raises(UserError, match=r"ppo\.penalty\.tau_quantile=1 never triggers"):
        penalised_latents(rows(), encoded, quantile, warnings)
    density = config_with(select__penalised=2, ppo__penalty={"kind": "density"})
    assert len(penalised_latents(rows(), encoded, density, warnings)) == 2


def test_training_against_the_unconfirmed_is_refused_by_name() -> None:
    stop = config_with(select__unconfirmed="stop").select
    none = [{**entry(i, 1.0), "confirmed": False} for i in (4, 2)]
    with pytest.raises(UserError) as refused:
        refuse_unconfirmed(features(penalised=none), stop)
    assert str(refused.value) == (
        "none of the latents to penalise (4, 2) is confirmed on data that took no part in finding"
        " it, so training against them would show nothing of harm; give more pairs to discovery and"
        " validation, or set select.unconfirmed=allow"
    )


# All of it


def test_what_selection_warns_of_to_the_letter() -> None:
    encoded, contrasts = planted_world(2, prompts=200)
    config = config_with(select__monitors=9, probe__permutations=50, select__listed=2)
    table = latent_table(encoded, contrasts, 0, 64, config)
    found = select_features(table, encoded, config, orthogonal)
    tested, needed = found["n_tested"], found["permutations"]["needed"]
    assert found["permutations"] == {"configured": 50, "needed": needed, "used": needed}
    assert needed > 50 and 0 < found["n_confirmed"] <= found["n_discoveries"] < tested <= 64
    n = len(found["monitors"])
    free = len(found["monitor_features"])
    assert found["warnings"] == [
        f"probe.permutations=50 is too few for {tested} tested latents at fdr 0.1, whose smallest"
        f" threshold needs {needed}: latents that chance had matched fewer than {selecting.ENOUGH}"
        f" times got {needed}",
        "fewer than two sources for a conjunction: discovery reads one data set, so latents may"
        " stand for its style",
        f"{n} candidate{'s' * (n != 1)} for 9 monitors, before calibrate asks how often they fire:"
        f" of {free} confirmed harming latents that are not penalised no further one has |cos| <"
        " 0.3 and |correlation| < 0.5 with every penalised one",
    ]
    assert (found["d_sae"], found["k"], found["effect"]) == (64, 12, "reselected")
    assert [len(found[role]) for role in ("promoting", "harming", "misleading")] == [2, 2, 2]
    assert found["steering_file"] == {str(f["latent"]): ["*", 0.0] for f in found["harming"]}
    watched = {c["latent"] for c in found["random_candidates"]}
    watched |= {p["latent"] for p in found["penalised"]}
    watched |= {m["latent"] for m in found["monitor_features"]}
    assert set(found["reference_rates"]) == {str(i) for i in watched}
    by_number = selecting.judged(table, config.select)
    for m in found["monitor_features"]:
        row = by_number.loc[m["latent"]]
        assert m["effect"] == row["effect_validation"] and {"tau", "max_cosine"} <= set(m)
    enough = config_with(probe__permutations=needed, select__monitors=0, select__listed=2)
    again = select_features(table, encoded, enough, orthogonal)
    assert len(again["warnings"]) == 1 and again["permutations"]["used"] == needed
    assert again["monitors"] == []


def test_ties_go_by_the_latent_s_number() -> None:
    table = rows(effect_validation=[1.0, -3.0, 3.0, 2.0, 0.0, 0.0], effect=[0, 0, 0, 0, 5.0, -5.0])
    assert ranked(table.iloc[::-1], "harming")["latent"].tolist() == [1, 2, 3, 0, 4, 5]


# Thresholds


def test_thresholds_and_rates_are_of_the_part_and_side_that_they_say() -> None:
    encoded = texts()
    rejected, chosen = (z_of(encoded, "discovery", label) for label in ("rejected", "chosen"))
    quantile = PenaltyConfig(tau=None, tau_quantile=0.6)
    for latent in range(D_SAE):
        z = rejected[:, latent]
        assert resolved_tau(latent, encoded, quantile) == pytest.approx(np.quantile(z, 0.6))
        assert resolved_tau(latent, encoded, PenaltyConfig(tau=0.125)) == 0.125
        value = float(z[z > 0].min())
        assert firing_rate(encoded, latent, value) == (z > value).mean()
    # one half is added to either count
    assert reference_rates(encoded, [4, 0]) == {
        str(i): pytest.approx(((chosen[:, i] > 0).sum() + 0.5) / 6) for i in (4, 0)
    }
    rewards = encoded.texts.loc[encoded.texts["part"] == "discovery", "reward"]
    assert reward_sd(encoded) == pytest.approx(rewards.std())
    few = encoded._replace(texts=encoded.texts.assign(part=["discovery"] + ["test"] * 21))
    with pytest.raises(UserError) as refused:
        reward_sd(few)
    assert str(refused.value) == (
        "discovery has 1 texts, too few to select latents on; give it a larger share in"
        " data.sources"
    )


def test_suggested_thresholds_are_quantiles_with_what_they_would_penalise() -> None:
    encoded = texts()
    rejected, chosen = (z_of(encoded, "discovery", label) for label in ("rejected", "chosen"))
    found = suggested_taus(encoded, [5, 2], [0.8, 0.6])
    assert [(s["latent"], s["quantile"]) for s in found] == [
        (latent, q) for latent in (5, 2) for q in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    ]
    for s in found:
        tau = np.quantile(rejected[:, s["latent"]], s["quantile"])
        assert s == {
            "latent": s["latent"],
            "quantile": s["quantile"],
            "tau": pytest.approx(tau),
            "rate_rejected": (rejected[:, s["latent"]] > s["tau"]).mean(),
            "rate_chosen": (chosen[:, s["latent"]] > s["tau"]).mean(),
        }
    low = encoded._replace(ranks=encoded.ranks._replace(values=encoded.ranks.values - 10))
    assert {s["tau"] for s in suggested_taus(low, [5])} == {0.0}
    alone = encoded.texts.assign(label="rejected")
    found = suggested_taus(encoded._replace(texts=alone), [5])
    assert [s["quantile"] for s in found] == list(QUANTILES)
    assert {s["rate_chosen"] for s in found} == {None}


def test_a_point_of_a_sweep_has_its_own_threshold_and_weight() -> None:
    found = features(
        penalised=[
            {"latent": 7, "tau": 3.0, "alpha": 0.1, "confirmed": True},
            {"latent": 9, "tau": 2.0, "alpha": 0.1, "confirmed": True},
        ],
        monitors=[],
        harming=[feature(7, "harming")],
        tau_suggestions=[
            {
                "latent": latent,
                "quantile": q,
                "tau": latent + q,
                "rate_rejected": 0.1,
                "rate_chosen": None,
            }
            for latent in (7, 9)
            for q in (0.5, 0.75)
        ],
        reward_sd=0.5,
    )

    def of(point: SweepPoint, unit: str = "reward") -> list[tuple[int, float, float]]:
        made = swept(found, point, PenaltyConfig(alpha_unit=unit))  # type: ignore[arg-type]
        assert made.harming == found.harming
        return [(p.latent, p.tau, p.alpha) for p in made.penalised]

    fixed = SweepPoint(tau=1.5, alpha=0.25, is_quantile=False)
    assert of(fixed) == [(7, 1.5, 0.25), (9, 1.5, 0.25)]
    assert of(fixed, "reward_sd") == [(7, 1.5, 0.125), (9, 1.5, 0.125)]
    quantile = SweepPoint(tau=0.75, alpha=0.25, is_quantile=True)
    assert of(quantile) == [(7, 7.75, 0.25), (9, 9.75, 0.25)]
    with pytest.raises(UserError) as refused:
        of(quantile._replace(tau=0.9))
    assert str(refused.value) == (
        "features.json has no tau of latent 7 at quantile 0.9; run select again"
    )


# Siblings


def test_siblings_by_direction_are_the_largest_cosines_of_either_sign() -> None:
    half = math.sqrt(0.5)
    directions = np.array(
        [[1, 0], [0, 1], [half, half], [-0.8, 0.6], [0, -1], [0.6, 0.8]], np.float32
    )
    found = by_direction([0, 4], directions, most=3)
    assert [(s["latent"], round(s["cosine"], 3)) for s in found[0]] == [
        (3, -0.8),
        (2, 0.707),
        (5, 0.6),
    ]
    assert [(s["latent"], round(s["cosine"], 3)) for s in found[4]] == [
        (1, -1.0),
        (5, -0.8),
        (2, -0.707),
    ]
    assert [s["latent"] for s in by_direction([0], directions)[0]] == [3, 2, 5], (
        "not at a right angle"
    )


def test_siblings_by_firing_are_the_largest_phi_with_the_texts_of_both() -> None:
    fires = np.array(
        [[1, 1, 0, 0, 1], [1, 1, 0, 0, 1], [1, 0, 1, 0, 1], [0, 0, 1, 0, 1], [0, 1, 0, 0, 1]], bool
    )
    fires = np.concatenate([fires, [[0, 0, 0, 0, 1]]])
    values = np.where(fires, 2.0, -1.0).astype(np.float32)
    values = np.concatenate([values, np.full((6, 1), 9, np.float32)], axis=1)  # a rank beyond k
    indices = np.tile([0, 1, 2, 3, 4, 3], (6, 1)).astype(np.int32)
    found = by_firing([0, 2], Ranks(indices, values, 5, 5), most=1)
    phi = np.corrcoef(fires[:, 0], fires[:, 1])[0, 1]
    assert found[0] == [{"latent": 1, "phi": pytest.approx(phi), "both": 2}]
    assert found[2] == [], "0 fires on one of its texts, as often as chance would have it"
    both = by_firing([0], Ranks(indices, values, 5, 5))[0]
    assert [s["latent"] for s in both] == [1], "none that fires on all texts, or on none"
