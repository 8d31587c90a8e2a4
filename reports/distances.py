"""At which KL distance to the base policy the arms of a run are compared. Pure, on data frames.

`compared_distance(config, generations)` by the rule of DESIGN's equal KL; `rows_at` picks its rows,
and every section of a report is made of those.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pandas as pd

from sarm.config import ARMS, Config
from sarm.run import listed


class Compared(NamedTuple):
    """What is compared."""

    distance: float
    """In nats, as training measured it; NaN for the policies at the end of training."""
    problem: str
    """Why these are no policies at equal KL although the config asks for some; empty where they
    are, or it asks for none.
    """


AT_THE_END = Compared(math.nan, "")


def compared_distance(config: Config, generations: pd.DataFrame) -> Compared:
    """The distance that `verdict.kl` names, or the largest that every compared arm and seed
    reached. Where there is none, the policies at the end of training are shown, and decide nothing.
    """
    if not config.ppo.kl_distances:
        return AT_THE_END
    rule = config.verdict
    compared = generations[generations["arm"].isin([rule.arm, "no_penalty", "random"])]
    if compared.empty:
        return AT_THE_END
    reached = {
        str(policy): set(mine["distance"].dropna())
        for policy, mine in compared.groupby("policy", sort=False)
    }
    if rule.kl is not None:
        if any(rule.kl in distances for distances in reached.values()):
            return Compared(rule.kl, "")
        return Compared(math.nan, f"no compared arm reached {rule.kl:g} nats (verdict.kl)")
    if common := set.intersection(*reached.values()):
        return Compared(max(common), "")
    none = [policy for policy, distances in reached.items() if not distances]
    why = f"; {listed(none)} reached none" if none else ""
    return Compared(math.nan, f"no KL distance was reached by every compared arm and seed{why}")


def rows_at(generations: pd.DataFrame, distance: float) -> pd.DataFrame:
    """The rows of the trained policies at a distance (NaN: the end), and all of the others'."""
    at = generations["distance"]
    wanted = at.isna() if math.isnan(distance) else at == distance
    untrained = [arm for arm, kind in ARMS.items() if not kind.trained]
    return generations[wanted | generations["arm"].isin(untrained)].reset_index(drop=True)


def compared_words(compared: dict[str, Any]) -> str:
    """A sentence for each section: where on their way the policies are that it compares."""
    if compared["problem"]:
        return f"Policies at the end of training, not at equal KL: {compared['problem']}."
    if compared["distance"] is None:
        return "Trained policies are compared at the end of training."
    kl = ", ".join(
        f"{ARMS[arm].words if arm in ARMS else arm} {value:.2f}"
        for arm, value in compared["kl"].items()
    )
    without = f" Not reached by {listed(compared['without'])}." if compared["without"] else ""
    return (
        f"Trained policies are compared at the KL distance {compared['distance']:g} nats, as they"
        " were when the training's five-step mean first reached it; on the evaluation prompts:"
        f" {kl}.{without}"
    )
