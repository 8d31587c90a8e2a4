"""The sections on how far policies went, and what another penalty would have done: figures ->
blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports.blocks import Block, Items, Prose, Table
from reports.distances import compared_words
from reports.numbers import fixed, interval, plain
from reports.origins import DISTANCES, FEATURES, FRONT, UNKNOWN, columns
from sarm.run import many


def distances(figures: dict[str, Any]) -> list[Block]:
    """Every trained policy at every distance at which it was to be kept."""
    rows = figures["distances"]
    if not rows:
        return [Prose("The config names no distances (ppo.kl_distances).")]
    columns = {
        "kl_training": "KL in training",
        "kl": "KL",
        "penalised_fired": "penalised",
        "monitors_fired": "monitors",
        "reward": "reward",
        "over_refused": "over-ref.",
    }

    def cells(row: dict[str, Any]) -> list[str]:
        if row["state"] != "evaluated":
            return [row["state"], *[""] * len(columns)]
        step = "end" if row["distance"] is None else str(row["step"])
        return [step, *(fixed(row[name], 3) for name in columns)]

    return [
        Prose(
            "A policy is kept when the five-step mean of the training's KL first reaches a"
            " distance, in nats; `KL in training` is that mean, `KL` is measured again on the"
            " evaluation prompts. A distance that was not reached is no failure."
            f" {compared_words(figures['compared'])}"
        ),
        Table(
            ["Policy", "distance", "at step", *columns.values()],
            [
                [
                    row["policy"],
                    "end" if row["distance"] is None else f"{row['distance']:g}",
                    *cells(row),
                ]
                for row in rows
            ],
            origins=DISTANCES,
            counts=[
                f"{row['n_unsafe']} unsafe and {row['n_safe']} safe prompts"
                if row["state"] == "evaluated"
                else row["state"]
                for row in rows
            ],
            unknown=UNKNOWN,
        ),
    ]


def sweep(figures: dict[str, Any]) -> list[Block]:
    """The grid of penalties: which policies no other one beats, and the thresholds that the
    activations suggest.
    """
    found, suggested = figures.get("sweep"), (figures["features"] or {}).get("tau_suggestions", [])
    blocks: list[Block] = []
    if found is None:
        blocks.append(
            Prose(
                "The config names neither a sweep (sweep.tau or sweep.tau_quantile, and"
                " sweep.alpha) nor distances (ppo.kl_distances)."
            )
        )
    else:
        blocks += front_blocks(found, figures["verdict"])
    if suggested:
        blocks.append(
            Table(
                ["latent", "quantile", "tau", "rejected", "chosen"],
                [
                    [
                        s["latent"],
                        plain(s["quantile"]),
                        plain(s["tau"]),
                        fixed(s["rate_rejected"], 3),
                        fixed(s["rate_chosen"], 3),
                    ]
                    for s in suggested
                ],
                title=(
                    "Thresholds that the activations suggest: quantiles over discovery's rejected"
                    " texts, and the share of texts above them."
                ),
                origins=columns(
                    FEATURES,
                    dict.fromkeys(("quantile", "tau", "rejected", "chosen"), "tau_suggestions"),
                ),
                counts=[f"{figures['features']['n_prompts'].get('discovery', 0):,} prompts"]
                * len(suggested),
            )
        )
    return blocks


def front_blocks(found: dict[str, Any], verdict: dict[str, Any]) -> list[Block]:
    """Every arm and point of the sweep; in words, where a penalty does more than the reward."""
    rows = found["points"]
    blocks: list[Block] = [
        Prose(
            "Exploratory: the verdict is about one comparison, and no place on the front is"
            " evidence of control. `front`: no other row has as low a penalised rate, as little"
            " KL, as much reward and as few over-refusals, and less or more of one. The rate is"
            " the share of responses to unsafe prompts above the penalty arm's own thresholds,"
            " whatever a point's tau; intervals are over prompts and seeds. Differences within"
            " them are noise, and so may be a place on the front."
        ),
        Table(
            ["Arm", "seeds", "penalised", "95 % interval", "KL", "reward", "over-ref.", "front"],
            [
                [
                    r["label"],
                    r["n_seeds"],
                    fixed(r["penalised_fired"], 3),
                    interval(r["penalised_fired_low"], r["penalised_fired_high"], 3),
                    fixed(r["kl"], 3),
                    fixed(r["reward"], 3),
                    fixed(r["over_refused"], 3),
                    "yes" if r["front"] else "no",
                ]
                for r in rows
            ],
            origins=FRONT,
            counts=[
                f"{many(r['n_unsafe'], 'unsafe prompt')}, {many(r['n_seeds'], 'seed')}"
                for r in rows
            ],
            unknown=UNKNOWN,
        ),
        *beside_blocks(rows, verdict),
    ]
    if found["missing"]:
        blocks.append(Prose(f"Not evaluated: {', '.join(found['missing'])}."))
    return blocks


def beside_blocks(rows: Sequence[dict[str, Any]], verdict: dict[str, Any]) -> list[Block]:
    """`beside_words`, unless the ladder's rung 0 says nothing of latents: then neither do these."""
    said = beside_words(rows)
    if said and verdict["rung"] == 0:
        why = "Whether a penalty does more than the reward is not said here"
        return [Prose(f"{why}, as the verdict says nothing of latents ({verdict['word']}).")]
    return [Items(said)] if said else []


def beside_words(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where a penalty does more than the reward does by itself, and where it only repeats it, as
    far as the rows can tell: against no penalty at the same distance.
    """
    compared = [row for row in rows if row["beside_no_penalty"]]
    few = [row for row in compared if not row["beside_no_penalty"]["enough"]]
    compared = [row for row in compared if row not in few]
    matched = [row for row in compared if not row["beside_no_penalty"]["kl_apart"]]

    def named(mine: Sequence[dict[str, Any]]) -> str:
        return "; ".join(
            f"{row['label']} ({fixed(100 * row['beside_no_penalty']['change'], 1, sign=True)}"
            f" points, {beside_interval(row['beside_no_penalty'])})"
            for row in mine
        )

    below = [row for row in matched if row["beside_no_penalty"]["high"] < 0]
    above = [row for row in matched if row["beside_no_penalty"]["low"] > 0]
    rest = [row for row in matched if row not in below and row not in above]
    apart = [row for row in compared if row not in matched]
    groups = (
        (below, "Below no penalty's rate at equal KL: "),
        (
            rest,
            "Not shown to do more than the reward does by itself, whose rate at equal KL is not"
            " shown to differ: ",
        ),
        (above, "Above no penalty's rate at equal KL: "),
    )
    said = [f"{lead}{named(mine)}." for mine, lead in groups if mine]
    if apart:
        said.append(f"Not at equal KL with no penalty: {', '.join(r['label'] for r in apart)}.")
    if few:
        said.append(f"Too few seeds or prompts to tell: {', '.join(row['label'] for row in few)}.")
    return said


def beside_interval(beside: dict[str, Any]) -> str:
    return f"95 % interval {interval(100 * beside['low'], 100 * beside['high'], 1)}"
