"""The latent cards as a page: `cards_page(cards, run_name)` -> cards.html, whole in itself and
without scripts.

The texts may be harmful: each is folded behind a click, and everything is escaped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from reports.numbers import fixed, general, percent

TEMPLATES = Path(__file__).parent / "templates"


def cards_page(cards: dict[str, Any], run_name: str, texts: str = "") -> str:
    """The page of what the cards phase published as cards.json; `texts` says whose it shows."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "general": general,
        "fixed": fixed,
        "percent": lambda share: "n/a" if share is None else percent(share),
    }
    return environment.get_template("cards.html").render(
        cards=cards, run_name=run_name, texts=texts, bars=bars
    )


def bars(histogram: dict[str, Any]) -> list[dict[str, Any]]:
    """A bar a bin: its range, its counts, and their heights in percent of the tallest bar."""
    tallest = (
        max(
            [c + r for c, r in zip(histogram["chosen"], histogram["rejected"], strict=True)],
            default=0,
        )
        or 1
    )
    return [
        {
            "low": low,
            "high": high,
            "chosen": c,
            "rejected": r,
            "chosen_height": 100 * c / tallest,
            "rejected_height": 100 * r / tallest,
        }
        for low, high, c, r in zip(
            histogram["edges"],
            histogram["edges"][1:],
            histogram["chosen"],
            histogram["rejected"],
            strict=False,
        )
    ]
