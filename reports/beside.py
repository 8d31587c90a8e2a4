"""The run beside what others say: the SARM beside its card, and the run beside the seed report."""

from __future__ import annotations

from typing import Any

from reports.blocks import NOT_AVAILABLE, Block, Items, Prose, Table
from reports.numbers import plain


def opened(figures: dict[str, Any]) -> list[Block]:
    """Whether the SARM does what its card says."""
    found = figures["check_sarm"]
    if found is None:
        return (
            list(NOT_AVAILABLE)
            if figures["has_card"]
            else [Prose("Not run; set check_sarm.card to the card.json of this SARM.")]
        )
    words = {
        "as published": f"The SARM does what {found['source']} says of it.",
        "off": f"The SARM does NOT do what {found['source']} says of it.",
        "nothing to compare": "No data source holds what the card's figures are of.",
        "no card": "The SARM has no card.json to compare with.",
        "measured": "Measured without a card to compare with.",
    }
    rows = [
        [
            row["what"],
            plain(float(f"{row['published']:.4g}")),
            plain(float(f"{row['found']:.4g}")),
            plain(float(f"{row['tolerance']:.2g}")),
            "OFF" if row["off"] else "",
        ]
        for row in found["rows"]
    ]
    blocks: list[Block] = [Prose(words[found["verdict"]])]
    if rows:
        blocks.append(Table(["Figure", "published", "here", "may differ by", ""], rows))
    if found["causes"]:
        blocks.append(Items([f"Likely: {cause}" for cause in found["causes"]]))
    if found["missing"]:
        blocks.append(
            Prose(f"Not compared, as no source holds them: {', '.join(found['missing'])}.")
        )
    return blocks
