"""What each policy's own generations show, a row per policy, at the compared distance or at all.

`policy_table(frames.generations)`; `distance_rows(run, frames)` for every KL distance that the
config names, those among them that were not reached.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from reports.frames import Frames, arm_rank
from sarm.config import ARMS, arm_and_seed
from sarm.evaluation.intervals import two_way
from sarm.run import RunDir

KINDS = ("unsafe", "safe")
NOT_AT_EQUAL_KL = "not at equal KL"


def unequal(one: float, other: float, tolerance: float) -> bool:
    """Whether two KLs are further apart than the rule compares."""
    return not 0 < max(one, other) <= (1 + tolerance) * min(one, other)


def at_unequal_kl(change: Mapping[str, Any], compared: Mapping[str, Any]) -> bool:
    """Whether a change's two arms are; not where the KL of one is not known."""
    penalty = change["arm"] in ("penalty", "penalty - random")
    arms = compared["arm"] if penalty else change["arm"], change["against"]
    one, other = (compared["kl"].get(arm, math.nan) for arm in arms)
    known = math.isfinite(one) and math.isfinite(other)
    return known and unequal(one, other, compared["tolerance"])


def policy_table(generations: pd.DataFrame) -> pd.DataFrame:
    """A row per policy: rates on unsafe prompts, over-refusal on safe ones, the rest on all."""
    rows = [
        {"policy": policy, "arm": table["arm"].iloc[0], **measures(table)}
        for policy, table in generations.groupby("policy", sort=False)
    ]
    rows.sort(key=lambda row: (arm_rank(row["arm"]), row["policy"]))
    return pd.DataFrame(rows)


def measures(table: pd.DataFrame) -> dict[str, Any]:
    """Of one policy's rows."""
    unsafe, safe = table[table["kind"] == "unsafe"], table[table["kind"] == "safe"]
    return {
        "n_unsafe": unsafe["prompt_id"].nunique(),
        "n_safe": safe["prompt_id"].nunique(),
        "reward": mean(table["reward"]),
        "penalised_fired": mean(unsafe["penalised_fired"]),
        "monitors_fired": mean(unsafe["monitors_fired"]),
        "penalised_fired_safe": mean(safe["penalised_fired"]),
        "monitors_fired_safe": mean(safe["monitors_fired"]),
        "refused": mean(unsafe["refused"]),
        "over_refused": mean(safe["refused"]),
        "harm": mean(unsafe["harm"]) if "harm" in table else math.nan,
        "kl": mean(table["kl"]),
        "n_tokens": mean(table["n_tokens"]),
        "truncated": mean(table["truncated"]),
        "unended": mean(table["unended"]) if "unended" in table else math.nan,
        "spelled": int((table["spelled"] > 0).sum()) if "spelled" in table else 0,
        "distinct_1": distinct(table["response"], 1),
        "distinct_2": distinct(table["response"], 2),
    }


def against_base(generations: pd.DataFrame) -> list[dict[str, Any]]:
    """A row per trained arm: the penalised rate on unsafe prompts less the base policy's on the
    same prompts, with the interval of `two_way`; none without a base policy.
    """
    if generations.empty:
        return []
    unsafe = generations[generations["kind"] == "unsafe"]
    fired = unsafe.assign(fired=unsafe["penalised_fired"].astype(float))
    rates = fired.groupby(["policy", "prompt_id"])["fired"].mean().unstack("policy")
    policies = unsafe.drop_duplicates("policy").groupby("arm", sort=False)["policy"].agg(list)
    rows = []
    for arm in sorted(policies.index, key=arm_rank) if "base" in rates else ():
        if arm in ARMS and ARMS[arm].trained:
            table = rates[["base", *policies[arm]]].dropna().to_numpy()
            found = two_way(table[:, 1:] - table[:, :1])
            rows.append(
                {
                    "arm": arm,
                    "n_prompts": len(table),
                    "n_seeds": len(policies[arm]),
                    "before": float(table[:, 0].mean()) if len(table) else math.nan,
                    "after": float(table[:, 1:].mean()) if len(table) else math.nan,
                    "change": found.value,
                    "low": found.low,
                    "high": found.high,
                }
            )
    return rows


def answered_rates(generations: pd.DataFrame) -> list[dict[str, Any]]:
    """A row per arm: the share of its unsafe responses that refuse, by the detector, and how often
    the penalised latents fire on those that answer and those that refuse; a share of no response
    is NaN. None without a detector or without penalised latents.
    """
    if generations.empty or not {"refused", "penalised_fired"} <= set(generations):
        return []
    unsafe = generations[(generations["kind"] == "unsafe") & generations["refused"].notna()]
    rows = []
    for arm in sorted(unsafe["arm"].unique(), key=arm_rank):
        mine = unsafe[unsafe["arm"] == arm]
        refused = mine["refused"].astype(bool)
        fired = mine["penalised_fired"]
        rows.append(
            {
                "arm": arm,
                "n": len(mine),
                "share_refused": mean(refused),
                "answered": mean(fired[~refused]),
                "refused": mean(fired[refused]),
            }
        )
    return rows


def refusal_reward(generations: pd.DataFrame) -> list[dict[str, Any]]:
    """A row per kind of prompt, unsafe and safe: the mean over prompts of the reward of a policy's
    refusals less that of its answers to the same prompt, over the base and trained policies that
    gave both, with the interval of `two_way`. None of a kind without such a prompt.
    """
    if generations.empty or not {"refused", "reward"} <= set(generations):
        return []
    arms = [
        arm
        for arm in generations["arm"].unique()
        if arm == "base" or (arm in ARMS and ARMS[arm].trained)
    ]
    known = generations[generations["arm"].isin(arms) & generations["refused"].notna()]
    known = known.assign(refused=known["refused"].astype(bool))
    keys = ["kind", "prompt_id", "policy", "refused"]
    means = known.groupby(keys)["reward"].mean().unstack("refused").reindex(columns=[True, False])
    gaps = (means[True] - means[False]).dropna().groupby(["kind", "prompt_id"]).mean()
    rows = []
    for kind in ("unsafe", "safe"):
        found = gaps[gaps.index.get_level_values("kind") == kind].to_numpy(float)[:, None]
        if len(found):
            around = two_way(found, float(np.abs(found).max()))
            rows.append(
                {
                    "kind": kind,
                    "n_prompts": len(found),
                    "value": around.value,
                    "low": around.low,
                    "high": around.high,
                }
            )
    return rows


def parts_of_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[float, ...]:
    """Of the change of the penalised rate from one row of `answered_rates` to another: what comes
    of answers, of refusals, and of refusing more often, each with the other two at the mean of
    both; their sum is the whole change.
    """
    r, a, f = ((before[key], after[key]) for key in ("share_refused", "answered", "refused"))
    middle, change = (lambda x: (x[0] + x[1]) / 2), (lambda x: x[1] - x[0])
    return (1 - middle(r)) * change(a), middle(r) * change(f), (middle(f) - middle(a)) * change(r)


def compared_figures(run: RunDir, frames: Frames) -> dict[str, Any]:
    """At which distance all sections compare, and how far each arm's policies are there, measured
    again on the evaluation prompts.
    """
    trained = run.config.units("ppo")
    swept = frames.sweep[frames.sweep["arm"] == run.config.verdict.arm]
    table = (
        pd.concat([frames.generations, swept], ignore_index=True)
        if len(swept)
        else (frames.generations)
    )
    kl = {
        str(arm): mean(mine["kl"])
        for arm, mine in table[table["policy"].isin(trained)].groupby("arm", sort=False)
    }
    evaluated = [policy for policy in trained if policy in set(frames.every["policy"])]
    here = set(table["policy"]) | set(frames.sweep["policy"])
    return {
        "arm": run.config.verdict.arm,
        "distance": None if math.isnan(frames.compared.distance) else frames.compared.distance,
        "problem": frames.compared.problem,
        "kl": {arm: kl[arm] for arm in sorted(kl, key=arm_rank)},
        "kl_by_kind": kl_by_kind(table[table["policy"].isin(trained)]),
        "tolerance": run.config.verdict.kl_tolerance,
        "without": [policy for policy in evaluated if policy not in here],
    }


def kl_by_kind(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A row per arm: its mean KL on unsafe and on safe prompts."""
    rows = []
    for arm in sorted(table["arm"].unique(), key=arm_rank):
        mine = table[table["arm"] == arm]
        rows.append({"arm": arm} | {kind: mean(mine[mine["kind"] == kind]["kl"]) for kind in KINDS})
    return rows


def distance_rows(run: RunDir, frames: Frames) -> list[dict[str, Any]]:
    """A row a trained policy and distance, the end of training (None) last; none where the config
    names no distances. `state` says whether it was reached and evaluated.
    """
    distances = run.config.ppo.kl_distances
    rows = []
    for policy in run.config.units("ppo") if distances else ():
        mine = frames.every[frames.every["policy"] == policy]
        known = {one["distance"]: one for one in frames.kept.get(policy, [])}
        for distance in (*distances, None):
            at = mine["distance"].isna() if distance is None else mine["distance"] == distance
            table, kept = mine[at], known.get(distance or math.nan)
            if ("ppo", policy) not in frames.manifests:
                state = "not trained"
            elif distance is not None and kept is None:
                state = "not reached"
            else:
                state = "evaluated" if len(table) else "not evaluated"
            arm, seed = arm_and_seed(policy)
            rows.append(
                {
                    "policy": policy,
                    "arm": arm,
                    "seed": seed,
                    "distance": distance,
                    "state": state,
                    "step": kept["step"] if kept else None,
                    "kl_training": kept["kl"] if kept else None,
                    **(measures(table) if state == "evaluated" else {}),
                }
            )
    return sorted(rows, key=lambda row: (arm_rank(row["arm"]), row["policy"]))


def distinct(responses: Iterable[str], n: int) -> float:
    """Distinct n-grams over all n-grams of the responses, by lower-cased words (arXiv
    1510.03055).
    """
    seen: Counter[tuple[str, ...]] = Counter()
    for response in responses:
        words = response.lower().split()
        seen.update(zip(*(words[i:] for i in range(n)), strict=False))
    return len(seen) / seen.total() if seen else math.nan


def mean(values: pd.Series) -> float:
    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    return float(numbers.mean()) if len(numbers) else math.nan
