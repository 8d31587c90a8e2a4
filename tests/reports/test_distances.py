"""Policies kept at KL distances: which distance is compared, and that every section is of it."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from jobs.__main__ import main as jobs_main
from reports.compare import compare_text, opened
from reports.distances import rows_at
from reports.evidence import judgement
from reports.explorer import explorer_data
from reports.figures import figures
from reports.frames import Frames, read_run
from reports.page import page
from reports.pareto import sweep_figures
from reports.sweep_sections import beside_blocks, beside_words
from reports.text import final_report
from sarm.config import UserError
from sarm.evaluation.verdict import Verdict
from sarm.run import RunDir
from tests.reports.test_report import flat, part
from tests.reports.test_report_page import visible
from tests.runs import DISTANCES, reference_config, run_kept_at_distances

SECTIONS = (
    "VERDICT",
    "POLICY EVALUATION (own generations on held-out prompts)",
    "CHANGES AGAINST THE NO-PENALTY ARM",
    "POLICIES BY KL DISTANCE",
    "PENALISED AND MONITOR LATENTS IN THE GENERATIONS",
)
"""All that compare policies."""


def read(run: RunDir) -> tuple[dict[str, Any], Frames, Verdict]:
    frames = read_run(run)
    verdict = judgement(run, frames)
    return figures(run, frames, verdict.record(), "2026-01-31 12:00:00 UTC"), frames, verdict


@pytest.fixture(scope="module")
def reached_one(tmp_path_factory):
    """A run one of whose policies stopped short of 2 nats."""
    run = run_kept_at_distances(
        tmp_path_factory.mktemp("distances") / "run", reached={"random-seed1": (0.5, 1.0)}
    )
    return (run, *read(run))


def test_the_largest_distance_that_all_reached_is_compared(reached_one):
    _, found, frames, verdict = reached_one
    assert frames.compared.distance == 1.0 and verdict.word == "control"
    assert found["compared"]["distance"] == 1.0 and found["compared"]["without"] == []
    # 120 unsafe and 90 safe prompts, on which KL is 1.1 and 0.9 of the arm's
    kl = 1.1 * (120 * 1.1 + 90 * 0.9) / 210
    assert found["compared"]["kl"] == pytest.approx({"no_penalty": kl, "penalty": kl, "random": kl})


def test_every_section_is_of_that_distance_and_says_so(reached_one):
    _, found, frames, _ = reached_one
    text, html = final_report(found), visible(page(found, frames))
    said = "Trained policies are compared at the KL distance 1 nats"
    for title in SECTIONS:
        assert said in flat(part(text, title)), title
    assert html.count(said) == len(SECTIONS) + 1, "the headline too"
    assert all(math.isnan(d) or d == 1.0 for d in frames.generations["distance"])
    for row in found["policies"]:
        wanted = {"penalty": 0.12, "no_penalty": 0.5, "random": 0.47, "base": 0.55}[row["arm"]]
        assert row["penalised_fired"] == pytest.approx(wanted, abs=0.02)
    target = found["verdict"]["changes"][0]
    assert target["measure"] == "penalised_fired"
    assert target["after"] - target["before"] == pytest.approx(-0.38, abs=0.02)
    n = {row["policy"]: row["n_unsafe"] for row in found["policies"]}
    assert set(n.values()) == {120}, "each prompt once"
    latent = next(r for r in found["latents"] if r["arm"] == "penalty" and r["kind"] == "unsafe")
    assert latent["n"] == 5 * 120
    shown = explorer_data(frames.generations, [])
    assert all(len(prompt["answers"]) == 16 for prompt in shown["prompts"])


def test_a_distance_that_was_not_reached_is_a_row(reached_one):
    _, found, _, _ = reached_one
    rows = {(row["policy"], row["distance"]): row for row in found["distances"]}
    assert len(rows) == 15 * (len(DISTANCES) + 1)
    assert rows["random-seed1", 2.0]["state"] == "not reached"
    assert [key for key, row in rows.items() if row["state"] != "evaluated"] == [
        ("random-seed1", 2.0)
    ]
    other = rows["penalty-seed3", 2.0]
    assert (other["step"], other["kl_training"]) == (23, 2.01)
    assert other["kl"] == pytest.approx(3.0 * (120 * 1.1 + 90 * 0.9) / 210)
    assert rows["penalty-seed3", None]["kl"] == pytest.approx(4.0)
    assert not found["failures"] or all(f["phase"] != "evaluate" for f in found["failures"])
    table = part(final_report(found), "POLICIES BY KL DISTANCE")
    assert any(
        line.split() == ["random-seed1", "2", "not", "reached"] for line in table.splitlines()
    )
    assert any(line.split()[:3] == ["random-seed1", "end", "end"] for line in table.splitlines())


def test_the_config_names_another_distance(tmp_path):
    run = run_kept_at_distances(tmp_path, sections={"verdict": {"kl": 0.5}})
    found, frames, verdict = read(run)
    assert frames.compared.distance == 0.5 and verdict.word == "no effect"
    assert "KL distance 0.5 nats" in flat(final_report(found))


def test_a_policy_that_stopped_short_of_the_named_distance_is_left_out_and_named(tmp_path):
    run = run_kept_at_distances(
        tmp_path, sections={"verdict": {"kl": 1.0}}, reached={"penalty-seed1": (0.5,)}
    )
    found, _, verdict = read(run)
    assert found["compared"]["without"] == ["penalty-seed1"]
    assert "Not reached by penalty-seed1." in flat(final_report(found))
    assert {c.n_seeds for c in verdict.changes if c.arm == "penalty"} == {4}
    assert verdict.word == "too few seeds for control"


def test_where_none_is_common_there_is_no_verdict(tmp_path):
    run = run_kept_at_distances(tmp_path, reached={"no_penalty-seed2": ()})
    found, frames, verdict = read(run)
    why = "no KL distance was reached by every compared arm and seed; no_penalty-seed2 reached none"
    assert verdict.word == "no verdict" and why in verdict.reason
    assert math.isnan(frames.compared.distance)
    text = flat(final_report(found))
    assert f"Policies at the end of training, not at equal KL: {why}." in text
    assert "successfully learned" not in text
    assert all(row["kl"] == pytest.approx(4.0) for row in found["policies"] if row["arm"] != "base")


def test_a_named_distance_that_nobody_reached(tmp_path):
    run = run_kept_at_distances(
        tmp_path,
        seeds=(0, 1, 2),
        sections={"verdict": {"kl": 2.0}},
        reached={
            f"{arm}-seed{s}": (0.5,)
            for arm in ("penalty", "no_penalty", "random")
            for s in range(3)
        },
    )
    _, _, verdict = read(run)
    assert "no compared arm reached 2 nats (verdict.kl)" in verdict.reason


def test_arms_further_apart_than_the_rule_allows_give_no_verdict(tmp_path):
    # 1.1 * 1.15 = 1.265
    for kl, word in ((1.26, "control"), (1.28, "no verdict")):
        run = run_kept_at_distances(
            tmp_path / word.replace(" ", "-"),
            rates={("penalty", 1.0): {"kl": kl}},
            sections={"verdict": {"kl": 1.0}},
        )
        _, _, verdict = read(run)
        assert verdict.word == word
    assert "KL not matched: penalty 1.30, no penalty 1.12 nats" in verdict.reason


def test_a_unit_that_is_missing_is_no_distance_that_was_not_reached(tmp_path):
    run = run_kept_at_distances(tmp_path, seeds=(0, 1, 2, 3))
    (run.folder("ppo", "penalty-seed3") / "manifest.json").unlink()
    (run.folder("evaluate", "penalty-seed3") / "manifest.json").unlink()
    (run.folder("evaluate", "random-seed0") / "manifest.json").unlink()
    found, frames, _ = read(run)
    state = {(row["policy"], row["distance"]): row["state"] for row in found["distances"]}
    assert state["penalty-seed3", 1.0] == "not trained"
    assert state["random-seed0", 1.0] == "not evaluated"
    assert frames.compared.distance == 2.0


def test_runs_at_different_distances_say_so_side_by_side(tmp_path):
    paths = []
    for name, reached in (("one", {"penalty-seed0": (0.5, 1.0)}), ("two", {})):
        run = run_kept_at_distances(tmp_path / name, seeds=(0, 1, 2), reached=reached)
        assert jobs_main(["report", "--run", str(run.path)]) == 0
        paths.append(str(run.path))
    text = flat(compare_text(opened(paths)))
    assert "one: Trained policies are compared at the KL distance 1 nats" in text
    assert "two: Trained policies are compared at the KL distance 2 nats" in text


def test_the_front_is_over_seeds_at_each_distance(tmp_path):
    weak, strong = "sweep-tau1.0-alpha0.5", "sweep-tau1.0-alpha2.0"
    run = run_kept_at_distances(
        tmp_path,
        seeds=(0, 1, 2),
        sections={"sweep": {"tau": [1.0], "alpha": [0.5, 2.0], "seeds": [0, 1, 2]}},
        rates={
            (weak, 1.0): {"penalised": 0.5, "kl": 1.15},
            ("random", 1.0): {"penalised": 0.8, "kl": 1.0},
            ("penalty", 0.5): {"kl": 0.75},
        },
        reached={f"{strong}-seed1": (0.5,)},
    )
    (run.folder("evaluate", f"{weak}-seed2") / "manifest.json").unlink()
    frames = read_run(run)
    made = sweep_figures(run, frames)
    rows = {(row["arm"], row["distance"]): row for row in made["points"]}
    assert made["missing"] == [f"{weak}-seed2"]
    assert len(rows) == 1 + 5 * 4  # base once; the others at three distances and the end
    assert rows[weak, 1.0]["n_seeds"] == 2 and rows[strong, 1.0]["n_seeds"] == 2
    assert rows[strong, 0.5]["n_seeds"] == 3
    assert (rows[weak, 1.0]["tau"], rows[weak, 1.0]["alpha"]) == (1.0, 0.5)
    assert rows["penalty", 1.0]["tau"] is None
    every = frames.every
    for (arm, distance), row in rows.items():
        at = every["distance"].isna() if distance is None else every["distance"] == distance
        mine = every[(every["arm"] == arm) & at]
        unsafe = mine[mine["kind"] == "unsafe"]
        assert row["penalised_fired"] == pytest.approx(unsafe["penalised_fired"].mean())
        assert row["over_refused"] == pytest.approx(mine[mine["kind"] == "safe"]["refused"].mean())
        assert row["kl"] == pytest.approx(mine["kl"].mean())
        assert row["penalised_fired_low"] < row["penalised_fired"] < row["penalised_fired_high"]
    beside = rows["penalty", 1.0]["beside_no_penalty"]
    target = next(
        c
        for c in judgement(run, frames).changes
        if (c.measure, c.arm) == ("penalised_fired", "penalty")
    )
    assert frames.compared.distance == 2.0
    at_two = rows["penalty", 2.0]["beside_no_penalty"]
    assert (at_two["change"], at_two["low"]) == pytest.approx((target.change, target.low))
    assert at_two["kl_apart"] and not beside["kl_apart"]
    assert rows["no_penalty", 1.0]["beside_no_penalty"] is None
    assert rows["base", None]["beside_no_penalty"] is None
    said = [re.sub(r" \([^)]*\)", "", words) for words in beside_words(made["points"])]
    assert said == [
        f"Below no penalty's rate at equal KL: penalty at 1; penalty at the end; {strong} at the"
        " end.",
        "Not shown to do more than the reward does by itself, whose rate at equal KL is not shown"
        f" to differ: random at 0.5; random at 2; random at the end; {strong} at 0.5.",
        "Above no penalty's rate at equal KL: random at 1.",
        "Not at equal KL with no penalty: penalty at 0.5, penalty at 2.",
        f"Too few seeds or prompts to tell: {weak} at 0.5, {weak} at 1, {weak} at 2,"
        f" {weak} at the end, {strong} at 1, {strong} at 2.",
    ]
    (loud,) = beside_blocks(made["points"], {"rung": 1, "word": "no effect"})
    assert loud.items == beside_words(made["points"])
    (silent,) = beside_blocks(made["points"], {"rung": 0, "word": "no verdict on latents"})
    assert "not said here" in silent.text and "(no verdict on latents)" in silent.text
    assert beside_blocks(made["points"][:1], {"rung": 0, "word": "no verdict"}) == []


def test_rows_at_a_distance_keep_the_policies_that_have_none(reached_one):
    _, _, frames, _ = reached_one
    arms = rows_at(frames.every, 2.0).groupby("arm")["seed"].nunique().to_dict()
    assert arms == {"base": 1, "no_penalty": 5, "penalty": 5, "random": 4}


def test_a_distance_at_which_nothing_is_kept_is_refused():
    for distances, told in (([], "there are none"), ([0.5, 2.0], "0.5, 2")):
        with pytest.raises(UserError, match=rf"verdict.kl: 1 is none of.*{told}"):
            reference_config(sections={"verdict": {"kl": 1.0}}, kl_distances=distances)
