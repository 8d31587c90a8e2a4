"""The run beside what was said of it: the SARM beside its card, and GPU-hours beside the plan."""

from __future__ import annotations

from typing import Any

from reports.beside import cost, opened
from reports.blocks import Items, Prose, Table


def row(what: str, published: float, found: float, off: bool) -> dict[str, Any]:
    return {"what": what, "published": published, "found": found, "tolerance": 0.039, "off": off}


def check(**changes: Any) -> dict[str, Any]:
    found = {"verdict": "as published", "source": "its card", "rows": [], "causes": []}
    return {"check_sarm": found | {"missing": []} | changes, "has_card": True}


def test_a_sarm_that_is_off_is_said_to_be_with_the_figure_and_the_cause() -> None:
    rows = [row("Safety: best of n", 0.9178, 0.61234, True), row("k", 192, 192, False)]
    said, table, causes, missing = opened(
        check(verdict="off", rows=rows, causes=["with one BOS ..."], missing=["Ties"])
    )
    assert isinstance(said, Prose) and "does NOT do what its card says" in said.text
    assert isinstance(table, Table)
    assert [line[-1] for line in table.rows] == ["OFF", ""]
    assert table.rows[0][1:4] == ["0.9178", "0.6123", "0.039"]
    assert isinstance(causes, Items) and causes.items == ["Likely: with one BOS ..."]
    assert isinstance(missing, Prose) and "Ties" in missing.text


def test_what_follows_a_cards_name_is_no_part_of_the_sentence() -> None:
    said, *_ = opened(check(source="its own card: what check_sarm measured of it"))
    assert isinstance(said, Prose)
    assert said.text == "Every figure compared is within its tolerance of what its own card says."


def test_a_run_without_a_card_says_how_to_have_one() -> None:
    (said,) = opened({"check_sarm": None, "has_card": False})
    assert isinstance(said, Prose) and "set check_sarm.card" in said.text
    (said,) = opened(check(verdict="no card"))
    assert isinstance(said, Prose) and "no card.json" in said.text


def test_used_stands_beside_planned_and_both_are_added_up() -> None:
    rows = [
        {"phase": "encode", "planned": 0.11, "used": 0.25, "bytes": 3_000_000_000, "units": 2},
        {"phase": "ppo", "planned": 0.7, "used": 0.5, "bytes": 32_000_000_000, "units": 6},
        {"phase": "report", "planned": None, "used": 0.0, "bytes": 5_000, "units": 1},
    ]
    table = cost({"cost": rows})[0]
    assert isinstance(table, Table)
    assert table.rows[0] == ["encode", "0.11", "0.25", "3.00 GB"]
    assert table.rows[2][1:] == ["n/a", "0.00", "0.01 MB"]
    assert table.rows[-1] == ["in all", "0.81", "0.75", "35.00 GB"]
