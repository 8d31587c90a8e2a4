"""The run beside what was said of it: the SARM beside its card, GPU-hours used beside planned."""

from __future__ import annotations

from typing import Any

from reports.blocks import NOT_AVAILABLE, Block, Items, Prose, Table
from reports.numbers import fixed
from reports.origins import MANIFEST, UNKNOWN, columns
from sarm.run import many


def opened(figures: dict[str, Any]) -> list[Block]:
    """Whether the SARM does what its card says."""
    found = figures["check_sarm"]
    if found is None:
        return (
            list(NOT_AVAILABLE)
            if figures["has_card"]
            else [Prose("Not run; set check_sarm.card to the card.json of this SARM.")]
        )
    card = (found["source"] or "").partition(": ")[0]  # what follows says how it came to be
    words = {
        "as published": f"Every figure compared is within its tolerance of what {card} says.",
        "off": f"The SARM does NOT do what {card} says of it.",
        "nothing to compare": "No data source holds what the card's figures are of.",
        "no card": "The SARM has no card.json to compare with.",
        "measured": "Measured without a card to compare with.",
    }
    rows = [
        [
            row["what"],
            f"{row['published']:.4g}",
            f"{row['found']:.4g}",
            f"{row['tolerance']:.2g}",
            "OFF" if row["off"] else "",
        ]
        for row in found["rows"]
    ]
    blocks: list[Block] = [Prose(words[found["verdict"]])]
    if rows:
        blocks.append(
            Table(
                ["Figure", "published", "here", "may differ by", ""],
                rows,
                origins=columns(
                    "check_sarm/all/check.json",
                    {"published": "published", "here": "found", "may differ by": "tolerance"},
                ),
                counts=[
                    many(row["prompts"], "prompt") if row.get("prompts") else ""
                    for row in found["rows"]
                ],
            )
        )
    if found["causes"]:
        blocks.append(Items([f"Likely: {cause}" for cause in found["causes"]]))
    if found["missing"]:
        blocks.append(
            Prose(f"Not compared, as no source holds them: {', '.join(found['missing'])}.")
        )
    return blocks


def cost(figures: dict[str, Any]) -> list[Block]:
    """What was used beside what was planned."""
    rows = figures["cost"]
    if not rows:
        return list(NOT_AVAILABLE)
    planned = [row["planned"] or 0.0 for row in rows]
    units = [row["units"] for row in rows]
    known = any(row["planned"] is not None for row in rows)
    return [
        Table(
            ["Phase", "GPU-hours planned", "used", "disk as written"],
            [
                *(
                    [
                        row["phase"],
                        "n/a" if row["planned"] is None else fixed(row["planned"], 2),
                        fixed(row["used"], 2),
                        gigabytes(row["bytes"]),
                    ]
                    for row in rows
                ),
                [
                    "in all",
                    fixed(sum(planned), 2) if known else "n/a",
                    fixed(sum(row["used"] for row in rows), 2),
                    gigabytes(sum(row["bytes"] for row in rows)),
                ],
            ],
            origins={
                "GPU-hours planned": "config.yaml and fetch/all/models.json: sizes, at an H100's"
                " rates",
                **columns(
                    MANIFEST,
                    {
                        "used": "started to ended, times its GPUs",
                        "disk as written": "outputs' bytes",
                    },
                ),
            },
            counts=[many(n, "unit") for n in (*units, sum(units))],
            unknown=UNKNOWN,
        ),
        Prose(
            "Planned: for 80 GB H100s, four of them in training, at the rates measured there. Used:"
            " from when each finished unit began to when it ended, times its GPUs; units that"
            " shared a GPU count in full each, and attempts that failed, and time on a CPU, are not"
            " in it. Disk as written: what was removed since counts too."
        ),
    ]


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"
