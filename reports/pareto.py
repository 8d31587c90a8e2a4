"""The sweep's policies and arms between three aims: few penalised latents, little KL, much reward.

`sweep_figures(run, frames)` -> figures["sweep"]; `reports.sections` and `reports.plots` show it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from reports.frames import Frames
from reports.policies import policy_table
from sarm.config import arm_and_seed
from sarm.run import RunDir


def sweep_figures(run: RunDir, frames: Frames) -> dict[str, Any] | None:
    """The points and which of them are on the front; None where the config names no sweep.

    The penalised rate is by the penalty arm's own thresholds for every policy, so that one
    yardstick serves all taus.
    """
    points = run.config.sweep_points()
    if not points:
        return None
    rows = []
    for table in (frames.generations, frames.sweep):
        for row in policy_table(table).to_dict("records") if len(table) else []:
            point = points.get(row["policy"])
            low, high = wilson(row["penalised_fired"], row["n_unsafe"])
            _, seed = arm_and_seed(row["policy"])
            numbers = {
                name: row[name]
                for name in (
                    "reward",
                    "kl",
                    "penalised_fired",
                    "monitors_fired",
                    "refused",
                    "over_refused",
                    "n_tokens",
                    "n_unsafe",
                )
            }
            setting = (
                {"tau": point.tau, "is_quantile": point.is_quantile, "alpha": point.alpha}
                if point
                else {"tau": None, "is_quantile": False, "alpha": None}
            )
            rows.append(
                {
                    "policy": row["policy"],
                    "seed": seed,
                    **setting,
                    **numbers,
                    "penalised_fired_low": low,
                    "penalised_fired_high": high,
                }
            )
    on_front = front([(row["penalised_fired"], row["kl"], -row["reward"]) for row in rows])
    for row, best in zip(rows, on_front, strict=True):
        row["front"] = best
    missing = [unit for unit in points if unit not in {row["policy"] for row in rows}]
    return {"points": rows, "missing": missing, "n_seeds": len(run.config.sweep.seeds)}


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


def wilson(rate: float, n: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927); one generation a prompt, so the prompts are
    the sample.
    """
    if not n or math.isnan(rate):
        return math.nan, math.nan
    z = 1.959964
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)
