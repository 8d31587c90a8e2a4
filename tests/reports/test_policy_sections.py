"""What is said of the policies' changes: of one seed, of corrected rates that are cut off, and
against the base policy.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from reports import plots
from reports.blocks import Block, Prose, Table
from reports.frames import read_run
from reports.page import headlines
from reports.policies import (
    against_base,
    answered_rates,
    kl_by_kind,
    parts_of_change,
    refusal_reward,
)
from reports.policy_sections import (
    answered_sentences,
    base_sentences,
    changes,
    detector_sentence,
    kind_sentence,
    refusal_reward_sentence,
    unequal_sentence,
    verdict_figures,
)
from reports.run_sections import commits_words
from sarm.evaluation.intervals import two_way
from tests.runs import reference_run


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
    compared = {"problem": "", "arm": "penalty", "distance": None, "kl": {}, "tolerance": 0.15}
    monitors = {"counted": [3367, 12], "dropped": []}
    rule = ["0. ..."]
    return {"verdict": verdict, "compared": compared, "rule": rule, "monitor_choice": monitors}


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
    assert "`monitors` (2 latents: 3367 and 12)" in table.title
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


# Against the base policy


def generations(fired: dict[str, list[list[int]]]) -> pd.DataFrame:
    """By policy, for each unsafe prompt whether each of its samples fires; a safe prompt besides,
    on which all do.
    """
    rows = []
    for policy, prompts in fired.items():
        arm = policy.rpartition("-seed")[0] or policy
        told = {"policy": policy, "arm": arm}
        for number, samples in enumerate(prompts):
            unsafe = {"kind": "unsafe", "prompt_id": f"p{number}"}
            rows += [told | unsafe | {"penalised_fired": bool(one)} for one in samples]
        rows.append(told | {"kind": "safe", "prompt_id": "s", "penalised_fired": True})
    return pd.DataFrame(rows)


def test_changes_against_the_base_policy_are_paired_by_prompt(tmp_path: Path) -> None:
    """Four prompts: the base fires on 1, 1, 1/2 and 0 of their samples."""
    base = [[1, 1], [1, 1], [1, 0], [0, 0]]
    arms = {
        "penalty-seed0": [[0, 0], [1, 0], [0, 0], [0, 0]],
        "penalty-seed1": [[0, 0], [0, 0], [1, 1], [0, 0]],
        "prompted": base,
        "no_penalty-seed0": base,
    }
    found = against_base(generations(arms | {"base": base}))
    assert [row["arm"] for row in found] == ["no_penalty", "penalty"]
    same, fell = found
    assert same["change"] == 0 and same["low"] < 0 < same["high"] and same["n_seeds"] == 1
    assert (fell["n_prompts"], fell["n_seeds"]) == (4, 2)
    assert fell["before"] == pytest.approx(2.5 / 4) and fell["after"] == pytest.approx(1.5 / 8)
    by_hand = np.array([[-1, -1], [-0.5, -1], [-0.5, 0.5], [0, 0]])
    expected = two_way(by_hand)
    assert (fell["change"], fell["low"], fell["high"]) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )
    assert against_base(generations(arms)) == []
    assert against_base(read_run(reference_run(tmp_path / "run")).generations) == []


def test_penalised_rates_of_answers_and_refusals_are_told_apart() -> None:
    """By hand: the base answers 3 of 4 and fires on 2 of them; of the penalty arm's 8 the detector
    saw 7, of which 2 answer, and fire, and 5 refuse, 2 of which fire. Safe prompts do not count.
    """
    table = generations(
        {
            "penalty-seed0": [[1, 0], [1, 1]],
            "penalty-seed1": [[0, 0], [0, 1]],
            "base": [[1, 1], [0, 1]],
        }
    )
    refused = [True, True, False, True, None, True, True, None, False, None]
    table["refused"] = pd.Series([*refused, False, False, False, True, True], dtype=object)
    rows = answered_rates(table)
    assert [(row["arm"], row["n"]) for row in rows] == [("base", 4), ("penalty", 7)]
    assert [row["answered"] for row in rows] == pytest.approx([2 / 3, 1.0])
    assert [row["refused"] for row in rows] == pytest.approx([1.0, 2 / 5])
    (told,) = answered_sentences(rows)
    assert isinstance(told, Prose)
    assert "base 66.7 (100.0), penalty 100.0 (40.0)" in told.text
    assert answered_sentences(rows[:1]) == []
    # 0.6 to 0.3: answers 0.7 to 0.5 with 0.2 and 0.6 refused, refusals 0.2 to 1/6
    before = {"arm": "no_penalty", "share_refused": 0.2, "answered": 0.7, "refused": 0.2}
    after = {"arm": "penalty", "share_refused": 0.6, "answered": 0.5, "refused": 1 / 6}
    parts = parts_of_change(before, after)
    assert parts == pytest.approx([0.6 * -0.2, 0.4 * (1 / 6 - 0.2), (0.55 / 3 - 0.6) * 0.4])
    assert sum(parts) == pytest.approx(0.3 - 0.6)
    (told,) = answered_sentences([before, after])
    assert isinstance(told, Prose)
    assert "-12.0 points come of answers, -1.3 of refusals and -16.7 of refusing more" in told.text
    rows[0]["refused"] = math.nan
    assert "base 66.7 (none)" in answered_sentences(rows)[0].text  # type: ignore[union-attr]
    assert answered_rates(table.drop(columns="refused")) == []


def test_distances_are_told_by_kind_of_prompt() -> None:
    """A policy's KL is another on safe prompts; pairs beyond the tolerance there are named."""
    table = pd.DataFrame(
        [
            {"arm": arm, "kind": kind, "kl": kl}
            for arm, kls in {
                "penalty": {"unsafe": (2.0, 3.0), "safe": (4.0, 6.0)},
                "no_penalty": {"unsafe": (2.2,), "safe": (4.0, 4.4)},
            }.items()
            for kind, values in kls.items()
            for kl in values
        ]
    )
    rows = kl_by_kind(table)
    assert rows == [
        {"arm": "no_penalty", "unsafe": 2.2, "safe": pytest.approx(4.2)},
        {"arm": "penalty", "unsafe": 2.5, "safe": 5.0},
    ]
    (told,) = kind_sentence({"kl_by_kind": rows, "tolerance": 0.15})
    assert isinstance(told, Prose)
    assert "no penalty 2.20 and 4.20; penalty 2.50 and 5.00." in told.text
    assert "more than 15% apart are no penalty and penalty on safe prompts, so" in told.text
    (told,) = kind_sentence({"kl_by_kind": rows, "tolerance": 0.2})
    assert isinstance(told, Prose) and "apart" not in told.text
    assert kind_sentence({"kl_by_kind": rows[:1], "tolerance": 0.2}) == []


def test_a_change_that_the_interval_cannot_see_is_said_to_be_none_that_is_shown() -> None:
    def changed(arm: str, low: float, high: float) -> dict[str, Any]:
        middle = {"before": 0.5, "after": 0.5, "change": (low + high) / 2}
        return {"arm": arm, "n_prompts": 52, "n_seeds": 1, "low": low, "high": high} | middle

    rows = [changed("no_penalty", -0.1, 0.2), changed("penalty", -0.3, -0.1)]
    said = prose(base_sentences([*rows, changed("random", 0.01, 0.03)]))
    assert "No penalty +5.0 [-10.0, +20.0]; penalty -20.0 [-30.0, -10.0]; random +2.0" in said
    assert (
        "It fell with penalty; it rose with random; with no penalty 52 prompts and 1 seed" in said
    )
    assert said.endswith("cannot tell it from no change.")
    assert base_sentences([]) == []


def test_arms_further_apart_than_the_rule_compares_are_named() -> None:
    """By hand: 3.88 / 3.38 = 1.148, 3.38 / 2.83 = 1.194, 3.88 / 2.83 = 1.371."""
    kl = {"no_penalty": 3.38, "penalty": 3.88, "random": 2.83}
    (said,) = unequal_sentence(kl, 0.15)
    assert isinstance(said, Prose)
    assert "no penalty and random (3.38 and 2.83 nats)" in said.text
    assert "penalty and random (3.88 and 2.83 nats)" in said.text
    assert "no penalty and penalty" not in said.text and "more than 15%" in said.text
    assert unequal_sentence(kl, 0.38) == [] and unequal_sentence({"penalty": 2.0}, 0.15) == []
    assert unequal_sentence({"penalty": 0.0, "random": 0.0}, 0.15) != [], "no distance at all"


def test_a_row_of_arms_that_are_not_at_equal_kl_is_marked_in_the_verdicts_table() -> None:
    """By hand: 2.77 / 1.95 = 1.42, 2.77 / 2.44 = 1.14."""
    rows = (
        row("penalised_fired", 0.5, 0.4, -0.1),
        row("penalised_fired", 0.5, 0.4, -0.1, arm="penalty - random", against="random"),
    )
    found = figures(*rows)
    names = {}
    for tolerance in (0.15, 0.5):
        kl = {"no_penalty": 2.44, "penalty": 2.77, "random": 1.95}
        found["compared"] |= {"kl": kl, "tolerance": tolerance}
        table = next(b for b in verdict_figures(found) if isinstance(b, Table))
        names[tolerance] = [cells[0] for cells in table.rows]
    assert names[0.15] == ["penalised, unsafe", "penalised, unsafe, vs. random (not at equal KL)"]
    assert names[0.5] == ["penalised, unsafe", "penalised, unsafe, vs. random"]
    assert table.title and "against the random arm" in table.title
    found["compared"] |= {"arm": "sweep-a", "tolerance": 0.15}
    found["compared"]["kl"] = {"no_penalty": 2.44, "penalty": 2.5, "sweep-a": 3.0}
    table = next(b for b in verdict_figures(found) if isinstance(b, Table))
    assert table.rows[0][0] == "penalised, unsafe (not at equal KL)"


def test_the_plot_of_changes_marks_what_is_not_at_equal_kl() -> None:
    """2.44 / 1.95 = 1.25: the random arm's own changes are marked, the penalty's are not."""
    rows = [
        row("penalised_fired", 0.5, 0.4, -0.1),
        row("refused", 0.1, 0.2, 0.1),
        row("penalised_fired", 0.5, 0.5, 0.0, arm="random"),
        row("penalised_fired", 0.5, 0.4, -0.1, arm="penalty - random", against="random"),
    ]
    found = figures(*rows)
    kl = {"no_penalty": 2.44, "penalty": 2.77, "random": 1.95}
    found["compared"] |= {"kl": kl, "tolerance": 0.15}
    (plot,) = plots.changes(found, None)  # type: ignore[arg-type]
    marked = {trace["name"]: trace["text"] for trace in plot.figure.data}
    told = "not at equal KL"
    assert marked == {
        "penalty - no penalty": ["", ""],
        "random - no penalty": [told],
        "penalty - random": [told],
    }


def test_what_the_reward_pays_for_refusing_is_within_prompt_and_policy() -> None:
    """By hand. Safe prompt a: base 3 - (1 + 2) / 2 = 1.5, penalty 5 - 1 = 4, so 2.75; prompt b:
    0 - 1 = -1, as one policy alone did both. The prompted policy's do not count.
    """
    rows = [
        ("base", "base", "safe", "a", True, 3.0),
        ("base", "base", "safe", "a", False, 1.0),
        ("base", "base", "safe", "a", False, 2.0),
        ("penalty-seed0", "penalty", "safe", "a", True, 5.0),
        ("penalty-seed0", "penalty", "safe", "a", False, 1.0),
        ("penalty-seed0", "penalty", "safe", "b", True, 0.0),
        ("penalty-seed0", "penalty", "safe", "b", False, 1.0),
        ("base", "base", "safe", "b", False, 9.0),
        ("base", "base", "safe", "c", None, 9.0),
        ("prompted", "prompted", "safe", "b", True, 9.0),
        ("prompted", "prompted", "safe", "b", False, 0.0),
        ("base", "base", "unsafe", "d", True, 9.0),
    ]
    names = ["policy", "arm", "kind", "prompt_id", "refused", "reward"]
    table = pd.DataFrame(rows, columns=names)
    (found,) = refusal_reward(table)
    assert (found["kind"], found["n_prompts"]) == ("safe", 2)
    assert found["value"] == pytest.approx((2.75 - 1) / 2)
    assert found["low"] < found["value"] < found["high"]
    told = prose(refusal_reward_sentence([found]))
    assert "safe +0.88 [" in told and "(2 prompts)" in told and "Exploratory" in told
    assert refusal_reward_sentence([]) == [] == refusal_reward(table.iloc[:0])
    assert refusal_reward(table.drop(columns="refused")) == []


def test_a_change_that_is_corrected_says_what_was_counted() -> None:
    rows = [row("over_refused", 0.0, 0.2, 0.238, counted=0.183), row("harm", 0.2, 0.3, 0.1)]
    items = [item for block in verdict_figures(figures(*rows)) for item in items_of(block)]
    assert "Corrected for the detector's errors; as counted, in points: over-refusals, safe" in (
        " ".join(items)
    )
    assert any(item.endswith("over-refusals, safe +18.3") for item in items)
    rows[0]["counted"] = None
    items = [item for block in verdict_figures(figures(*rows)) for item in items_of(block)]
    assert not any("counted" in item for item in items)


@pytest.mark.parametrize("corrected", [True, False])
def test_the_detectors_sentence_says_whether_this_run_corrects(corrected: bool) -> None:
    detector = {"name": "a detector", "refusals": 10, "answers": 20, "data": "XSTest"}
    rates = {"sensitivity": 0.9, "false_positives": 0.1}
    found = {
        "evaluations": {"base": {"refusal_detector": detector | rates}},
        "comparable": {"verdict rules": {"correct_refusals": corrected}},
    }
    said = detector_sentence(found)
    assert said.endswith("(Rogan-Gladen).") == corrected
    assert ("verdict.correct_refusals is off" in said) != corrected


def test_a_commit_with_changes_beside_it_is_told() -> None:
    assert commits_words(["abc", "def+"]) == "abc, def+ (+: with uncommitted changes)"
    assert commits_words(["abc"]) == "abc" and commits_words([]) == "unknown"
