"""The abstract and the ladder: a golden text for every word that the ladder can say, and how far
each rung's bound is from its limit, by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reports import abstract, ladder
from reports.figures import figures
from reports.frames import read_run
from reports.text import final_report
from sarm.config import VerdictConfig
from sarm.evaluation.verdict import GAPS, LEADS, Verdict
from tests.evaluation.test_verdict import CASES, arm, verdict_of
from tests.runs import evaluated_run, reference_run

GOLDEN = Path(__file__).parent.parent / "golden" / "abstracts.txt"
RULE = VerdictConfig()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    run = evaluated_run(tmp_path_factory.mktemp("abstract") / "run", seeds=(0, 1, 2), n=60)
    return figures(run, read_run(run), verdict_of().record(), "2026-01-31")


def told(found: dict[str, Any], verdict: Verdict) -> str:
    """The ladder of a run of which this is the verdict, and what of the abstract depends on it."""
    record = verdict.record()
    made = found | {"verdict": record, "ladder": ladder.rungs(record, RULE)}
    (_, _, *said) = abstract.abstract(made, RULE)
    return "\n".join(abstract.lines(made | {"abstract": said}))


def test_every_word_and_every_gap_has_a_next_step():
    assert set(CASES) == set(LEADS)
    assert set(abstract.NEXT) | {"no verdict", "no verdict on latents"} == set(LEADS)
    assert set(abstract.REMEDIES) == set(GAPS)


def test_question_and_set_up_are_the_runs(found):
    said = {one["name"]: one["said"] for one in found["abstract"]}
    assert list(said) == ["Question", "Set-up", "Result", "Trust", "Next"]
    assert said["Question"] == (
        "Does penalising latents 48659, 28879 and 26446 of Schrieffer/Llama-SARM-4B in PPO make"
        " meta-llama/Llama-3.1-8B-Instruct less harmful, or does it evade the penalty or refuse"
        " more?"
    )
    assert said["Set-up"] == (
        "PPO trained the arms no penalty, penalty and random in 3 seeds each for 100 steps; 9"
        " trained policies and 1 untrained answered 60 unsafe and 90 safe held-out prompts, trained"
        " ones at the end of training."
    )


def test_the_abstract_of_every_word_is_the_golden_one(found):
    golden = dict(
        part.split("\n", 1) for part in GOLDEN.read_text(encoding="utf-8").split("\n\n=== ")[1:]
    )
    assert list(golden) == list(CASES)
    for word, make in CASES.items():
        verdict = make()
        assert verdict.word == word
        text = told(found, verdict)
        assert text == golden[word].rstrip("\n"), word
        assert max(map(len, text.splitlines())) <= 80


def test_a_rungs_slack_is_the_deciding_bounds_way_to_its_limit():
    verdict = verdict_of(arm(monitors_fired=0.33))
    rows = ladder.rungs(verdict.record(), VerdictConfig(over_refusal_margin=0.07))
    by = {(c.measure, c.arm): c for c in verdict.changes}
    assert rows[1]["slack"] == pytest.approx(-100 * by["penalised_fired", "penalty"].high)
    assert rows[2]["slack"] == pytest.approx(7 - 100 * by["over_refused", "penalty"].high)
    assert rows[4]["slack"] == pytest.approx(100 * verdict.joint.low) and rows[4]["slack"] < 0
    assert [row["state"] for row in rows] == ["holds"] * 4 + ["fails", "not asked"]
    assert rows[5]["value"] is None


def test_a_rung_is_drawn_on_a_scale_that_holds_zero_and_its_limit():
    row = {"value": 4.0, "low": 2.0, "high": 10.0, "limit": 5.0}
    at = ladder.drawn(row)  # 0 to 10, and a twentieth on either side
    assert at == {"low": 22.73, "value": 40.91, "high": 95.45, "limit": 50.0}
    assert ladder.drawn(row | {"value": None}) is None


@pytest.mark.parametrize(
    ("changes", "said"), [({"kl": 3.0}, "KL not matched"), ({"unended": 0.5}, "end at neither")]
)
def test_what_rung_0_lacks_is_what_to_do_next(changes, said):
    verdict = verdict_of(arm(**changes))
    (gap,) = verdict.gaps
    assert said in verdict.reason
    step = abstract.next_step({"verdict": verdict.record()}, RULE)
    assert step.lower().startswith(abstract.REMEDIES[gap][:20].lower())


def test_what_calibration_found_wanting_is_named_and_to_be_done_next_too(found):
    verdict = verdict_of(arm(kl=3.0)).record()
    low = {"value": 0.17, "low": -0.03, "high": 0.35}
    short = found["readings"] | {
        "unended": 0.21,
        "unreadable": ["21% end nowhere"],
        "positive_control": found["readings"]["positive_control"] | {"penalised": low},
    }
    step = abstract.next_step({"verdict": verdict, "readings": short}, RULE)
    wanted = [abstract.REMEDIES[gap] for gap in ("kl", "unended", "control")]
    assert step.lower() == "; ".join(wanted).lower() + "."
    said = abstract.instrument(short, verdict["gaps"], RULE)
    assert "(21% of the base policy's responses unended, stability kappa 0.70" in said
    assert "unended" not in abstract.instrument(found["readings"], verdict["gaps"], RULE)


def suppressed(safe: float, unsafe: float, *pays: dict[str, Any]) -> str:
    """The next step of a run whose base policy fires so often."""
    base = {"policy": "base", "penalised_fired_safe": safe, "penalised_fired": unsafe}
    made = {"policies": [base], "refusal_reward": pays}
    return abstract.next_step(
        made | {"verdict": verdict_of(arm(over_refused=0.5)).record()}, RULE
    ).lower()


def test_other_latents_are_advised_only_where_those_penalised_fire_more_on_safe_prompts() -> None:
    more, less = suppressed(0.736, 0.635), suppressed(0.275, 0.55)
    assert more.startswith("penalise latents that fire less on safe responses than on unsafe")
    assert "73.6% of the base policy's safe responses, 63.5% of its unsafe ones" in more
    assert less.startswith("raise `ppo.safe_share`") and "fire less on safe prompts already" in less
    assert "penalise latents that" not in less
    unknown = suppressed(float("nan"), 0.5)
    assert unknown == "raise `ppo.safe_share`, or compare at fewer nats (`ppo.kl_distances`)."


def test_another_reward_is_advised_only_where_this_one_pays_for_refusing_safe_prompts() -> None:
    pays = {"kind": "safe", "value": 0.352, "low": 0.1, "high": 0.6}
    assert "pays 0.35 more for refusing a safe prompt" in suppressed(0.2, 0.5, pays)
    for other in (pays | {"low": -0.1}, pays | {"kind": "unsafe"}):
        assert "reward" not in suppressed(0.2, 0.5, other)


def test_it_stands_right_after_the_references_block(tmp_path):
    run = reference_run(tmp_path / "run")
    read = read_run(run)
    text = final_report(figures(run, read, verdict_of().record(), "2026-01-31"))
    head, _, rest = text.partition("\n\nABSTRACT\n--------\nQuestion: ")
    assert head.endswith("=" * 70) and "OUTPUT FILES" in head and "CALIBRATION" in rest


def test_without_any_policy_it_says_so(tmp_path):
    run = reference_run(tmp_path / "run")
    (run.folder("ppo", "penalty-seed0") / "manifest.json").unlink()
    made = figures(run, read_run(run), verdict_of().record(), "2026-01-31")
    assert abstract.set_up(made) == "No policy was trained or evaluated."


@pytest.mark.parametrize(
    ("confirmed", "said"),
    [
        ([True, True], []),
        ([False, False, False], ["none of the 3 penalised latents confirmed on held-out prompts"]),
        ([True, False, False], ["1 of the 3 penalised latents confirmed on held-out prompts"]),
        ([], []),
    ],
)
def test_a_penalty_on_unconfirmed_latents_is_told(confirmed: list[bool], said: list[str]) -> None:
    assert abstract.unconfirmed({"penalised": [{"confirmed": c} for c in confirmed]}) == said
    assert abstract.unconfirmed(None) == []


def test_arms_of_different_numbers_of_seeds_are_told_apart():
    rows = [{"arm": "penalty", "steps": 40}] * 2 + [{"arm": "no_penalty", "steps": 50}]
    said = abstract.set_up({"training": rows, "policies": []})
    assert said == (
        "PPO trained the arms penalty and no penalty in 2 and 1 seeds each for 40–50 steps; no"
        " policy was evaluated."
    )


def test_policies_whose_training_left_nothing_are_told_by_their_evaluation():
    rows = [
        {"arm": arm, "policy": policy, "n_unsafe": 50 + i, "n_safe": 60}
        for i, (arm, policy) in enumerate((("base", "base"), ("penalty", "penalty-seed1")))
    ]
    made = {"training": [], "policies": rows, "compared": {"distance": 0.5}}
    assert abstract.set_up(made) == (
        "PPO trained the arm penalty in 1 seed; 1 trained policy and 1 untrained answered 50 to"
        " 51 unsafe and 60 safe held-out prompts, trained ones as they were where training's KL"
        " first reached 0.5 nats."
    )


def test_policies_that_answered_are_told_by_how_they_came_to_be() -> None:
    assert abstract.answering(12, 15, 3) == "12 of 15 trained policies and 3 untrained"
    assert abstract.answering(1, 1, 0) == "1 trained policy"
    assert abstract.answering(1, 2, 1) == "1 of 2 trained policies and 1 untrained"
    assert abstract.answering(0, 4, 1) == "1 untrained policy"


def test_what_is_shown_to_fail_is_told_by_the_bound_that_shows_it() -> None:
    """By hand: suppression is decided by the lower bound, a fall by the upper one."""
    verdict = verdict_of(arm(over_refused=0.5)).record()
    over = next(c for c in verdict["changes"] if c["measure"] == "over_refused")
    row = ladder.rungs(verdict, RULE)[2]
    low = 100 * over["low"]
    assert verdict["side"] == "suppression" and low > 5
    assert f"the lower bound is {low - 5:.1f} points above the limit of 5" in row["said"]
    fell = ladder.rungs(verdict, RULE)[1]
    assert "the upper bound is" in fell["said"] and "points below the limit of 0" in fell["said"]
