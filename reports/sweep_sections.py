"""The sections on how far policies went, and what another penalty would have done: figures ->
blocks.
"""

from __future__ import annotations

from typing import Any

from reports.blocks import Block, Prose, Table
from reports.distances import compared_words
from reports.numbers import fixed, interval, plain


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
            Prose("The config names no sweep (sweep.tau or sweep.tau_quantile, and sweep.alpha).")
        )
    else:
        seeds = "one seed" if found["n_seeds"] == 1 else f"{found['n_seeds']} seeds"
        blocks.append(
            Prose(
                "Exploratory: the verdict is about another comparison, and no place on the front is"
                " evidence of control. Each tau with each alpha, and the arms. `front`: no other"
                " policy has as low a penalised rate, as little KL and as much reward, and less or"
                " more of one."
                " Penalised is the share of unsafe prompts above the penalty arm's own thresholds,"
                f" whatever a point's tau. With {seeds} a point, differences within the intervals"
                " are noise, and so may be a place on the front."
            )
        )
        rows = [
            [
                r["policy"],
                *(
                    (
                        "n/a"
                        if r[m] is None
                        else f"q{plain(r[m])}"
                        if m == "tau" and r["is_quantile"]
                        else plain(r[m])
                    )
                    for m in ("tau", "alpha")
                ),
                r["n_unsafe"],
                fixed(r["penalised_fired"], 3),
                interval(r["penalised_fired_low"], r["penalised_fired_high"], 3),
                fixed(r["kl"], 3),
                fixed(r["reward"], 3),
                "yes" if r["front"] else "no",
            ]
            for r in found["points"]
        ]
        blocks.append(
            Table(
                [
                    "Policy",
                    "tau",
                    "alpha",
                    "unsafe",
                    "penalised",
                    "95 % interval",
                    "KL",
                    "reward",
                    "front",
                ],
                rows,
            )
        )
        if found["missing"]:
            blocks.append(Prose(f"Not evaluated: {', '.join(found['missing'])}."))
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
            )
        )
    return blocks
