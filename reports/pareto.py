"""Arms and penalties of a sweep, over their seeds and at each KL distance, between four aims: few
penalised latents, much reward, little KL, few over-refusals.

`sweep_figures(run, frames)` -> figures["sweep"]; `reports.sweep_sections` and `reports.plots` show
it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from reports.evidence import arm_rows
from reports.frames import Frames, arm_rank
from reports.numbers import arm_name
from reports.policies import mean
from sarm.config import ARMS, VerdictConfig, arm_and_seed
from sarm.evaluation.comparison import Grid, aligned, change, grid, means_of
from sarm.evaluation.intervals import two_way
from sarm.run import RunDir


def sweep_figures(run: RunDir, frames: Frames) -> dict[str, Any] | None:
    """A row an arm or point of the sweep, and distance, over its seeds, and which rows are on the
    front; None where the config names neither a sweep nor distances.

    The penalised rate is by the penalty arm's own thresholds for all, so that one yardstick serves
    all taus.
    """
    points = run.config.sweep_points()
    if not points and not run.config.ppo.kl_distances:
        return None
    of_arm = {arm_and_seed(unit)[0]: point for unit, point in points.items()}
    order = sorted({*frames.every["arm"]} - of_arm.keys(), key=arm_rank)
    rows = []
    for distance in (*run.config.ppo.kl_distances, None):
        at = frames.every["distance"]
        here = frames.every[at.isna() if distance is None else at == distance]
        plain = grid_of(here, "no_penalty")
        for arm in (*order, *of_arm):
            mine = here[here["arm"] == arm]
            if mine.empty:
                continue
            point = of_arm.get(arm)
            trained = arm not in ARMS or ARMS[arm].trained
            rows.append(
                {
                    "arm": arm,
                    "label": label(arm, distance, run) if trained else arm_name(arm),
                    "tau": point.tau if point else None,
                    "is_quantile": bool(point and point.is_quantile),
                    "alpha": point.alpha if point else None,
                    "distance": distance,
                    **numbers(mine, arm),
                    "beside_no_penalty": (
                        beside(plain, grid_of(mine, arm), arm, run.config.verdict)
                        if trained and arm != "no_penalty"
                        else None
                    ),
                }
            )
    rows.sort(key=lambda row: [*order, *of_arm].index(row["arm"]))
    refusals = any(not math.isnan(row["over_refused"]) for row in rows)
    on_front = front(
        [
            (row["penalised_fired"], row["kl"], -row["reward"])
            + ((row["over_refused"],) if refusals else ())
            for row in rows
        ]
    )
    for row, best in zip(rows, on_front, strict=True):
        row["front"] = best
    evaluated = set(frames.every["policy"])
    return {"points": rows, "missing": [unit for unit in points if unit not in evaluated]}


def label(arm: str, distance: float | None, run: RunDir) -> str:
    """An arm or point at a distance, as a row is named."""
    if not run.config.ppo.kl_distances:
        return arm_name(arm)
    return f"{arm_name(arm)} at {'the end' if distance is None else f'{distance:g}'}"


def grid_of(generations: pd.DataFrame, arm: str) -> Grid | None:
    rows = arm_rows(generations, arm)
    return None if rows is None else grid(rows)


def numbers(mine: pd.DataFrame, arm: str) -> dict[str, Any]:
    """Means over prompts and seeds, and the interval of the penalised rate."""
    unsafe, safe = mine[mine["kind"] == "unsafe"], mine[mine["kind"] == "safe"]
    low, high = rate_interval(grid_of(mine, arm))
    return {
        "n_seeds": mine["seed"].nunique(),
        "n_unsafe": unsafe["prompt_id"].nunique(),
        "penalised_fired": mean(unsafe["penalised_fired"]),
        "penalised_fired_low": low,
        "penalised_fired_high": high,
        "monitors_fired": mean(unsafe["monitors_fired"]),
        "refused": mean(unsafe["refused"]),
        "over_refused": mean(safe["refused"]),
        "reward": mean(mine["reward"]),
        "kl": mean(mine["kl"]),
        "n_tokens": mean(mine["n_tokens"]),
    }


def rate_interval(arm: Grid | None) -> tuple[float, float]:
    """95 % interval of the penalised rate on unsafe prompts, over prompts and seeds: that of its
    difference from one half.
    """
    if arm is None:
        return math.nan, math.nan
    rates = arm.values["penalised_fired"][arm.unsafe]
    found = two_way(rates[np.isfinite(rates).all(1)] - 0.5, 0.5)
    return found.low + 0.5, found.high + 0.5


def beside(
    no_penalty: Grid | None, arm: Grid | None, name: str, rule: VerdictConfig
) -> dict[str, Any] | None:
    """The change of the penalised rate against no penalty at the same distance, whether the two are
    too far apart in KL to be compared, and whether they share as many seeds and prompts as the rule
    asks for; None where one is missing.
    """
    if no_penalty is None or arm is None:
        return None
    before, after = aligned(no_penalty, arm)
    found = change(before, after, "penalised_fired", name, "no_penalty")
    kl = means_of({"no_penalty": no_penalty, name: arm}, "kl", ("no_penalty", name)).values()
    return {
        "change": found.change,
        "low": found.low,
        "high": found.high,
        "kl_apart": not (min(kl) > 0 and max(kl) <= (1 + rule.kl_tolerance) * min(kl)),
        "enough": found.n_seeds >= rule.min_seeds and found.n_prompts >= rule.min_unsafe,
    }


def front(costs: Sequence[Sequence[float]]) -> list[bool]:
    """Which points no other point beats: none is as good in every cost and better in one. A point
    with a NaN is not on it.
    """

    def beaten(mine: Sequence[float]) -> bool:
        return any(
            all(a <= b for a, b in zip(other, mine, strict=True))
            and any(a < b for a, b in zip(other, mine, strict=True))
            for other in costs
        )

    return [not any(math.isnan(c) for c in cost) and not beaten(cost) for cost in costs]
