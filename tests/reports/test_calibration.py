"""The section on what calibrate found, word by word from a record of made-up figures."""

from __future__ import annotations

from typing import Any

import pytest

from reports.blocks import Items, Prose, Table
from reports.calibration import (
    calibration,
    detects,
    evaluated,
    responses,
    verdict_on_the_instrument,
)

FOUND: dict[str, Any] = {
    "n_prompts": 30,
    "samples": 4,
    "tokens": 41.2,
    "scored_tokens": 32.7,
    "cut": 0.75,
    "unended": 0.125,
    "any_rate": 0.42,
    "kappa": 0.614,
    "stability": [{"tokens": 2, "n": 118}, {"tokens": 5, "n": 116}],
    "positive_control": {
        "prompts": 80,
        "penalised": {"value": 0.36, "low": 0.11, "high": 0.58},
        "monitors": None,
    },
    "planned": {"prompts": 150, "samples": 2, "seeds": 5},
    "detectable": 0.0934,
    "candidates": [
        {
            "latent": 17,
            "role": "harming",
            "confirmed": True,
            "penalised": True,
            "tau": 1.23456,
            "rate": 0.375,
            "within_prompt_share": 0.831,
            "charge": -0.0456,
        },
        {
            "latent": 4,
            "role": "misleading",
            "confirmed": False,
            "penalised": False,
            "tau": 0.0,
            "rate": 0.0,
            "within_prompt_share": None,
            "charge": 0.0,
        },
    ],
    "unreadable": [],
    "warnings": ["no monitor qualifies"],
}


def test_the_section_says_what_was_found_and_n_a_where_nothing_was() -> None:
    blocks = calibration({"readings": FOUND, "policies": [], "evaluations": {}})
    readings, candidates = (b for b in blocks if isinstance(b, Table))
    assert readings.rows == [
        ["kappa, cut 2, 5 tokens earlier", "0.61", ""],
        ["positive control, fall of penalised rate", "36%", "11% to 58%"],
        ["positive control, fall of monitors", "n/a", ""],
    ]
    assert candidates.rows == [
        [17, "harming", "1.24", "0.38", "0.83", "-0.046", "yes"],
        [4, "misleading, unconfirmed", "0.0", "0.00", "n/a", "+0.000", ""],
    ]
    assert [b.items for b in blocks if isinstance(b, Items)] == [["Warning: no monitor qualifies"]]
    assert calibration({"readings": None}) == [Prose("not available")]


def test_the_responses_are_counted_and_trimming_said_where_there_was_some() -> None:
    assert responses(FOUND) == (
        "120 responses of the base policy to 30 unsafe prompts, 41 tokens on average: 75% hit the"
        " token limit and were trimmed to their last sentence end, where they have one (33 tokens"
        " scored); 12% of the scored texts end at neither an end of turn nor a sentence end. Some"
        " penalised latent fires on 42%."
    )
    whole = responses(FOUND | {"scored_tokens": 41.2})
    assert "75% hit the token limit; 12% of" in whole and "trimmed" not in whole


@pytest.mark.parametrize(
    ("detectable", "says"),
    [(0.0934, "9.3 points of the penalised rate, with 80 % power"), (None, "unknown")],
)
def test_the_plan_is_named_with_what_it_detects(detectable: float | None, says: str) -> None:
    text = detects(FOUND | {"detectable": detectable})
    assert "(150 unsafe prompts, 2 samples, 5 seeds)" in text and says in text


def test_prompts_that_were_planned_and_not_evaluated_are_told_with_the_reason() -> None:
    def said(*counts: int, long: int) -> str:
        rows = [{"n_unsafe": n} for n in counts]
        found = {"readings": FOUND, "policies": rows, "evaluations": {"base": {"n_too_long": long}}}
        return evaluated(found)

    assert said(127, 127, long=24) == (
        "Evaluated were 127 of these, as 24 prompts of the part, safe ones counted, have more"
        " tokens than ppo.max_prompt_tokens."
    )
    assert said(120, 127, long=1).startswith("Evaluated were 120 to 127 of these, as 1 prompt of")
    assert said(127, long=0) == "Evaluated were 127 of these."
    assert said(150, long=3) == "" == said(long=3)
    whole = {"policies": [{"n_unsafe": 127}], "evaluations": {"base": {"n_too_long": 24}}}
    told = [b.text for b in calibration({"readings": FOUND} | whole) if isinstance(b, Prose)]
    assert any("80 % power. Evaluated were 127 of these, as 24" in text for text in told)


def test_an_instrument_that_does_not_read_says_why() -> None:
    assert "reads this policy's responses" in verdict_on_the_instrument(FOUND)
    text = verdict_on_the_instrument(FOUND | {"unreadable": ["kappa is low", "too short"]})
    assert "not shown to read" in text and text.endswith("kappa is low; too short.")
