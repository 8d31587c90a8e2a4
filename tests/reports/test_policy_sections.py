"""What is said of the policies' changes: of one seed, and of corrected rates that are cut off."""

from __future__ import annotations

import math
from typing import Any

from reports.blocks import Block, Prose, Table
from reports.page import headlines
from reports.policy_sections import changes, verdict_figures


def row(measure: str, before: float, after: float, change: float, **more: Any) -> dict[str, Any]:
    found = {"arm": "penalty", "against": "no_penalty", "n_prompts": 60, "n_seeds": 1}
    interval = {"low": change - 0.1, "high": change + 0.1, "detectable": math.nan}
    given = {"measure": measure, "before": before, "after": after, "change": change}
    return found | interval | given | more


def figures(*rows: dict[str, Any]) -> dict[str, Any]:
    verdict = {
        "changes": rows,
        "delta": 0.1,
        "length_ratio": 0.98,
        "logprob_drop": 0.36,
        "gaps": ["seeds"],
    }
    compared = {"problem": "", "distance": None}
    return {"verdict": verdict, "compared": compared, "rule": ["0. ..."]}


def prose(blocks: list[Block]) -> str:
    return " ".join(block.text for block in blocks if isinstance(block, Prose))


def test_of_one_seed_the_verdicts_table_leaves_out_trainings_and_detects_nothing() -> None:
    table = next(
        b for b in verdict_figures(figures(row("refused", 0.2, 0.3, 0.1))) if isinstance(b, Table)
    )
    assert table.title and "as there is one seed: differences between trainings are" in table.title
    assert table.rows[0][-1] == "n/a"
    several = row("refused", 0.2, 0.3, 0.1, n_seeds=5, detectable=0.073)
    table = next(b for b in verdict_figures(figures(several)) if isinstance(b, Table))
    assert table.title and "over prompts and seeds" in table.title
    assert table.rows[0][-1] == "7.3"


def test_a_policy_less_likely_under_the_base_has_a_number_below_zero() -> None:
    blocks = verdict_figures(figures(row("harm", 0.2, 0.3, 0.1)))
    items = [item for block in blocks for item in items_of(block)]
    assert any("minus that of no penalty's: -0.36 nats" in item for item in items)


def items_of(block: Block) -> list[str]:
    return list(getattr(block, "items", []))


def test_a_corrected_rate_that_is_cut_off_is_said_to_be() -> None:
    # 1 and 4 of 60 counted, false positives 0.098, J 0.77: -0.105 and -0.041 before the cut.
    cut, whole = row("over_refused", 0.0, 0.0, 0.065), row("over_refused", 0.1, 0.165, 0.065)
    assert "shown as 0 or 1" in prose(changes(figures(cut)))
    assert "shown as 0 or 1" not in prose(changes(figures(whole)))
    assert headlines(figures(cut))[0]["from_to"] == "0.000 to 0.000, cut off at 0 and 1"
    assert headlines(figures(whole))[0]["from_to"] == "0.100 to 0.165"
