"""The run beside an earlier report of the same two models: `seed_report` in the config names its
figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports.blocks import Block, Items, Prose, Table
from reports.frames import Frames
from reports.numbers import fixed, general
from reports.origins import FEATURES, STEER, UNKNOWN, columns, on_prompts
from sarm.config import ROOT, UserError
from sarm.records import SeedReport
from sarm.run import RunDir, many

EARLIER = "seed_report of config.yaml: the earlier report's own figure"
ROLES = ("promoting", "harming", "misleading")
WHY = (
    "Which texts, split and statistic chose its latents is not published, nor what it calls"
    " harming: the sign of a weight alone, or a latent that fires on unsafe text.",
    "Its rewards may have been read with another number of BOS tokens, template or precision:"
    " check_sarm says how this run's compare with the published accuracy.",
    "One run of PPO is one draw: a reward or loss at one step differs between seeds, learning rates"
    " and batch orders. Its penalty is a multiple of alpha: how many latents fired, over a batch.",
    "Its steering table is on fixed texts, and no policy: here the test part of each data set.",
)


def seed_figures(
    run: RunDir, frames: Frames, progression: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """Rows of both, side by side; None where the config names no earlier report."""
    if run.config.seed_report is None:
        return None
    try:
        seed = SeedReport.read(ROOT / run.config.seed_report)
    except (UserError, OSError) as error:
        return {"problem": " ".join(str(error).split())}
    steps = {row["step"]: row for row in progression}
    return {
        "problem": None,
        "source": seed.source,
        "latents": latent_rows(seed, frames),
        "penalised": {
            "seed": seed.penalised,
            "run": [p.latent for p in frames.features.penalised] if frames.features else None,
        },
        "progression": [
            {"step": theirs.step, "seed": theirs.tree(), "run": steps.get(theirs.step)}
            for theirs in seed.progression
        ],
        "steering": steering_rows(seed, frames.steering),
    }


def latent_rows(seed: SeedReport, frames: Frames) -> list[dict[str, Any]]:
    """A row a latent of the earlier report: its list and rank there, and all of it here."""
    found, table = frames.features, frames.probe
    if "latent" in table:
        table = table.set_index("latent", drop=False)
        order = table["effect"].abs().rank(ascending=False, method="min")
    rows = []
    for role, latents in (("promoting", seed.promoting), ("harming", seed.harming)):
        for place, latent in enumerate(latents, 1):
            row: dict[str, Any] = {
                "latent": latent,
                "seed_role": role,
                "seed_rank": place,
                "list": None,
                "rank": None,
                "role": None,
                "effect": None,
                "confirmed": None,
                "overall": None,
            }
            for mine in ROLES if found else ():
                for at, feature in enumerate(getattr(found, mine), 1):
                    if feature.latent == latent:
                        row |= {"list": mine, "rank": at, "confirmed": feature.confirmed}
            if "latent" in table and latent in table.index:
                here: Any = table.loc[latent]
                row |= {"role": str(here["role"]), "effect": float(here["effect"])}
                row["overall"] = int(order[latent]) if order[latent] == order[latent] else None
                if row["confirmed"] is None and "confirmed" in table:
                    row["confirmed"] = bool(here["confirmed"])
            rows.append(row)
    return rows


def steering_rows(seed: SeedReport, summary: dict[str, Any] | None) -> list[dict[str, Any]]:
    here = {f"{t['source']} {t['label'].capitalize()}": t for t in (summary or {}).get("texts", [])}
    return [
        {"dataset": row.dataset, "seed": row.tree(), "run": here.get(row.dataset)}
        for row in seed.steering
    ]


def beside_seed(figures: dict[str, Any]) -> list[Block]:
    """The earlier report's twenty latents, penalised ones, training and steering, beside this
    run's.
    """
    found = figures["seed"]
    if found is None:
        return [Prose("Not run; set seed_report to the figures of an earlier report.")]
    if found["problem"]:
        return [Prose(f"not available: {found['problem']}")]
    latents = found["latents"]
    same = sum(row["list"] == row["seed_role"] for row in latents)
    confirmed = sum(bool(row["confirmed"]) for row in latents)
    n = (figures.get("features") or {}).get("n_prompts", {})
    said_of = on_prompts(n, "discovery", "validation")
    theirs, ours = found["penalised"]["seed"], found["penalised"]["run"] or []
    return [
        Prose(
            f"{found['source']}. Of its {len(latents)} latents {same} stand in the same list here"
            f" and {confirmed} are confirmed here; of its {len(theirs)} penalised ones"
            f" {len(set(theirs) & set(ours))} are penalised here"
            f" ({', '.join(map(str, ours)) or 'none'})."
        ),
        Table(
            ["Latent", "there", "here", "role here", "effect", "by size", "confirmed"],
            [
                [
                    row["latent"],
                    f"{row['seed_role']} {row['seed_rank']}",
                    f"{row['list']} {row['rank']}" if row["list"] else "not listed",
                    row["role"] or "n/a",
                    general(row["effect"]),
                    "n/a" if row["overall"] is None else f"{row['overall']:,}",
                    {None: "n/a", True: "yes", False: "no"}[row["confirmed"]],
                ]
                for row in latents
            ],
            origins=columns(
                "select/all/table.parquet",
                {"effect": "effect", "by size": "rank of |effect| among all latents"},
            )
            | {"there": EARLIER}
            | columns(FEATURES, {"here": "list and rank", "confirmed": "confirmed"}),
            counts=[said_of] * len(latents),
            unknown=UNKNOWN,
        ),
        Table(
            ["Step", "reward there", "here", "penalty there", "here", "loss there", "here"],
            [
                [
                    row["step"],
                    *(
                        cell
                        for name in ("reward", "penalty", "loss")
                        for cell in pair(row, name, 3)
                    ),
                ]
                for row in found["progression"]
            ],
            origins=beside("ppo/PENALTY-SEED/metrics.jsonl", ("compound", "penalty", "loss/total")),
            counts=[f"step {row['step']}" for row in found["progression"]],
            unknown=UNKNOWN,
        ),
        Table(
            ["Steering", "before there", "here", "after there", "here", "delta there", "here"],
            [
                [
                    row["dataset"],
                    *(cell for name in ("before", "after", "delta") for cell in pair(row, name, 4)),
                ]
                for row in found["steering"]
            ],
            origins=beside(STEER, ("texts, before", "texts, after", "texts, delta")),
            counts=[
                f"here {many(row['run']['n'], 'text')}" if row["run"] else "not in this run"
                for row in found["steering"]
            ],
            unknown=UNKNOWN,
        ),
        Prose("Why they may differ:"),
        Items(WHY),
    ]


def beside(file: str, names: Sequence[str]) -> dict[str | int, str]:
    """Where the columns of a table come from in which theirs and ours alternate."""
    ours = columns(file, {2 * i + 2: name for i, name in enumerate(names)})
    return ours | {2 * i + 1: EARLIER for i in range(len(names))}


def pair(row: dict[str, Any], name: str, digits: int) -> tuple[str, str]:
    """Their number and ours."""
    mine = (row["run"] or {}).get(name)
    return fixed(row["seed"][name], digits), "n/a" if mine is None else fixed(mine, digits)
