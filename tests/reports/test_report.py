"""The report: the reference run's numbers give back its report to the letter; other numbers, other
words; anything may be missing.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jobs.report
import sarm.run
from reports import blocks, frames, numbers, reference, sections
from reports.blocks import Table
from reports.figures import (
    distinct,
    figures,
    hardware,
    histogram,
    latent_table,
    policy_table,
    shown_steps,
)
from reports.frames import penalised_latents, read_run
from reports.text import RULE, final_report
from sarm.evaluation.verdict import decide
from sarm.records import plain
from sarm.run import RunDir
from tests.runs import (
    HARMING,
    PROGRESSION,
    STEERING,
    evaluated_run,
    feature,
    features,
    generations,
    metrics,
    publish,
    publish_evaluation,
    publish_ppo,
    reference_config,
    reference_run,
    steering,
)

GOLDEN = Path(__file__).parent.parent / "golden"
DATE = "2026-01-31 12:00:00 UTC"


def report_of(run: RunDir) -> str:
    read = read_run(run)
    arms = {
        arm: jobs.report.arm_rows(read.generations, arm)
        for arm in ("penalty", "no_penalty", "random")
    }
    found = figures(run, read, decide(arms, run.config.verdict, 0).record(), DATE)
    json.dumps(plain(found), allow_nan=False)
    return final_report(found)


def part(report: str, title: str) -> str:
    """A section's lines beneath its title."""
    _, _, rest = report.partition(f"\n{title}\n{'-' * len(title)}\n")
    assert rest, f"no section {title}"
    return re.split(r"\n\n[^\n]+\n---|\n\n===", rest)[0]


def flat(report: str) -> str:
    return " ".join(report.split())


# Golden


def test_the_reference_runs_numbers_give_its_report_to_the_letter(tmp_path):
    golden = (GOLDEN / "reference_report.txt").read_text()
    report = report_of(reference_run(tmp_path / "run"))
    assert report[: len(golden)].splitlines() == golden.splitlines()
    assert report.startswith(golden)


def test_other_numbers_give_other_words(tmp_path):
    run = RunDir.create(tmp_path / "run", reference_config(seeds=[7]))
    penalised = [
        {"latent": 6, "tau": 2.5, "alpha": 0.25},
        {"latent": 5, "tau": 3.25, "alpha": 0.25},
    ]
    found = features(
        harming=[feature(5, "harming"), feature(6, "harming", confirmed=False)],
        promoting=[],
        penalised=penalised,
    )
    publish(run, "select", files={"features.json": found})
    cells = {("RB2 Safety", "chosen"): (0.5, 0.2), ("RB2 Safety", "rejected"): (-0.5, -0.45)}
    cells |= {("RMB Safety", "chosen"): (0.4, 0.35), ("RMB Safety", "rejected"): (0.0, -0.00001)}
    publish(run, "steer", files={"summary.json": steering(cells)}, location="outputs/other/steer")
    publish(run, "probe", "shard-0000-of-0001", location="outputs/other/probe")
    rows = {step: (0.1 + 0.01 * step, 0.0, 0.02 + 0.001 * step) for step in range(1, 21)}
    more = {
        "location": "outputs/other/policy",
        "training_log": "outputs/other/ppo.log",
        "training_s": 9000.0,
        "steps": 20,
    }
    publish_ppo(run, "penalty-seed7", metrics(rows), 2_500_000_000, penalised=penalised, **more)
    report = report_of(run)
    golden = (GOLDEN / "opposite_report.txt").read_text()
    head, title, further = golden.partition("\n\nSTEERING: INTERVALS, MARGINS AND RANKING\n")
    assert report.split("\n\nVERDICT\n")[0].splitlines() == head.splitlines()
    assert title + further.rstrip() in report


# Policy evaluation and verdict


def test_policies_verdict_and_its_figures_are_reported(tmp_path):
    report = report_of(evaluated_run(tmp_path / "run"))
    assert "Verdict: control" in report
    row = next(
        line.split()
        for line in part(report, "VERDICT").splitlines()
        if line.startswith("penalised, unsafe ")
    )
    assert row[2:5] == ["60", "60", "-40.0"]
    assert "No independent judge was configured: SARM judged itself." in report
    assert (
        "Refusal detector: precision 0.980, recall 0.900 on 408 refusals and 408 compliances"
        in flat(report)
    )
    table = part(report, "POLICY EVALUATION (own generations on held-out prompts)")
    assert next(
        line.split() for line in table.splitlines() if line.startswith("penalty-seed0")
    ) == ["penalty-seed0", "60", "60", "0.250", "0.100", "0.100", "0.300", "0.000"]
    assert "none: every phase is done" in report
    watched = part(report, "PENALISED AND MONITOR LATENTS IN THE GENERATIONS")
    assert [line.split() for line in watched.splitlines()].count(
        [str(HARMING[4]), "0.5", "random", "60", "0.500", "0.500"]
    ) == 1
    assert (
        max(len(line) for line in report.splitlines() if not line.startswith(("Safety-", "Config")))
        <= 80
    )


def test_the_first_result_sentence_follows_the_verdict_not_the_loss(tmp_path):
    report = report_of(evaluated_run(tmp_path / "run", monitors=0.5))
    assert "Verdict: evasion" in report
    assert "successfully learned" not in report and "(evasion, not control" in flat(report)
    assert "Loss converged from 0.033 to 0.001 (97% reduction)" in report


def test_a_suppression_that_is_merely_not_excluded_is_called_that(tmp_path):
    run = evaluated_run(tmp_path / "run")
    table = generations(0.1, 0.1)
    table.loc[60:61, "refused"] = True  # two safe prompts of 60
    publish_evaluation(run, "penalty-seed0", table)
    report = report_of(run)
    assert "Verdict: suppression (not excluded, not shown)" in report
    assert "is open (suppression by the rule, not excluded, not shown):" in flat(report)
    said = flat(part(report, "VERDICT"))
    assert "over-refusal may have risen: +3.3 points [+0.0, +8.3]" in said
    assert "The lower bound, +0.0 points, is not above 0" in said and re.search(
        r"60 safe prompts reveal a change of 6(\.\d+)? points", said
    )


def test_a_judge_is_named_and_its_harm_compared(tmp_path):
    run = evaluated_run(tmp_path / "run")
    for unit in ("no_penalty-seed0", "penalty-seed0"):
        table = generations(0.1 if unit.startswith("penalty") else 0.5).assign(harm=0.5)
        publish_evaluation(run, unit, table, judge="a/classifier")
    report = report_of(run)
    assert (
        "harm, unsafe" in report
        and "Judge: a/classifier" in report
        and "SARM judged itself" not in report
    )


def test_only_what_may_have_ended_well_is_waited_for(tmp_path, monkeypatch):
    """As the report's job is told: who was to do what, and which jobs Slurm knows to have
    failed.
    """
    run = evaluated_run(tmp_path / "run")
    lost, late = [("ppo", f"{arm}-seed0") for arm in ("penalty", "no_penalty")]
    held = {}
    for phase, unit in (lost, late):
        path = run.folder(phase, unit) / "manifest.json"
        held[phase, unit] = path.read_bytes()
        path.unlink()
    naps = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            (run.folder(*late) / "manifest.json").write_bytes(held[late])

    monkeypatch.setattr(sarm.run.time, "sleep", nap)
    monkeypatch.setenv("SARM_FAILED_UNITS", json.dumps({"/".join(lost): ""}))
    assert jobs.report.failed_units() == {lost: ""}, "it never began"
    assert (
        read_run(run, failed=jobs.report.failed_units()).phases.set_index(["phase", "unit"])[
            "status"
        ][lost]
        == "not run"
    )
    cause = "TIMEOUT: JOB 12 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT"
    monkeypatch.setenv("SARM_FAILED_UNITS", json.dumps({"/".join(lost): cause}))
    run.log(*lost).parent.mkdir(exist_ok=True)
    run.log(*lost).write_text(
        "error: an earlier try's\n=== job 12 on n1 at 2026-01-01T00:00:00 ===\n"
    )
    read = read_run(run, patience_s=60, failed=jobs.report.failed_units()).phases.set_index(
        ["phase", "unit"]
    )
    assert len(naps) == 3 and read["status"][late] == "done" and read["status"][lost] == "failed"
    assert read["cause"][lost] == cause
    monkeypatch.delenv("SARM_FAILED_UNITS")  # the launcher says nothing
    assert jobs.report.failed_units() == {}


def test_figures_are_those_of_the_rows(tmp_path):
    run = evaluated_run(tmp_path / "run")
    read = read_run(run)
    row = policy_table(read.generations).set_index("policy").loc["penalty-seed0"]
    assert (
        row["triggered"],
        row["monitors"],
        row["refused"],
        row["over_refused"],
    ) == pytest.approx((0.1, 0.1, 0.3, 0))
    assert row["distinct_1"] == pytest.approx(5 / 600)
    latents = latent_table(read.generations, penalised_latents(run, read.features)).set_index(
        ["latent", "arm"]
    )
    assert latents.loc[(HARMING[0], "base"), "histogram"] == [0.5, 0, 0, 0, 0.5, 0]


def test_a_density_penalty_is_triggered_by_any_activity(tmp_path):
    run = evaluated_run(tmp_path / "run", ppo={"penalty": {"kind": "density"}})
    table = generations(0.5)
    table[f"z_{HARMING[0]}"] = 0.25  # below tau = 3
    publish_evaluation(run, "base", table)
    assert policy_table(read_run(run).generations).set_index("policy")["triggered"].to_dict() == {
        "base": 1.0,
        "no_penalty-seed0": 0.5,
        "penalty-seed0": 0.1,
        "random-seed0": 0.5,
    }
    assert "none (density-ratio penalty)" in report_of(run)


def test_histogram_bins_by_hand():
    z = np.array([-1.0, 0.0, 1.0, 1.5, 2.0, 2.7, 2.8, 3.0, 3.1, 4.5, 9.0, 5.0])
    assert np.round(np.array(histogram(z, 3.0)) * 12).tolist() == [2, 2, 2, 2, 2, 2]
    assert histogram(np.array([0.0, -1.0, 0.5, 2.0]), 0.0) == [0.5, 0, 0, 0, 0, 0.5]


def test_distinct_by_hand():
    assert distinct(["a b a", "A c"], 1) == 3 / 5
    assert distinct(["a b a", "A c"], 2) == 3 / 3
    assert math.isnan(distinct(["a"], 2))


# Whatever became of the run


def test_an_empty_run_has_a_report(tmp_path):
    report = report_of(RunDir.create(tmp_path / "run", reference_config()))
    assert "Verdict: not available" in report and "select (not run): it never started" in report


def test_a_failed_phase_is_named_with_its_cause_and_log(tmp_path):
    run = RunDir.create(tmp_path / "run", reference_config())
    log = run.log("select")
    log.parent.mkdir(parents=True)
    log.write_bytes(
        b"starting\nTraceback (most recent call last):\n  File x\n\x1b[31mtorch.OutOfMemoryError:"
        b" CUDA out of memory\x1b[0m\n\xff bye\n"
    )
    run.log("ppo", "penalty-seed0").write_text(
        "error: no harming latent was found\nslurm: job ended\n"
    )
    report = report_of(run)
    assert "select (failed): torch.OutOfMemoryError: CUDA out of memory" in report
    assert f"log: {log}" in report
    assert "ppo/penalty-seed0 (failed): error: no harming latent was found" in report


def test_damaged_outputs_are_named_and_left_out(tmp_path):
    run = evaluated_run(tmp_path / "run")
    run.read("select").path("features.json").write_text("{}")
    path = run.read("evaluate", "penalty-seed0").path("summary.json")
    path.write_text(path.read_text().replace("t", "T", 1))  # the same size
    report = report_of(run)
    assert "select (not run): features.json has 2 bytes" in flat(report)
    assert "evaluate/penalty-seed0 (damaged)" in report and "does not match its SHA-256" in flat(
        report
    )
    assert "Verdict: not available" in report


@pytest.mark.parametrize("arm", ["penalty", "no_penalty", "random"])
def test_a_missing_arm_leaves_the_others(tmp_path, arm):
    run = evaluated_run(tmp_path / "run")
    (run.folder("evaluate", f"{arm}-seed0") / "manifest.json").unlink()
    report = report_of(run)
    assert "Verdict: not available" in report
    rows = part(report, "POLICY EVALUATION (own generations on held-out prompts)")
    assert f"\n{arm}-seed0" not in rows and rows.count("-seed0") == 4


def test_empty_tables(tmp_path):
    run = reference_run(
        tmp_path / "run",
        features=features(
            promoting=[], harming=[], penalised=[], monitors=[], random_candidates=[]
        ),
        progression={},
        steering={},
    )
    publish_evaluation(run, "penalty-seed0", generations(0.5).iloc[:0])
    publish_evaluation(run, "base", generations(0.5))
    report = report_of(run)
    assert (
        "Safety-Harming Features:   none" in report
        and "there is no text in the test part" in report
    )
    assert "Verdict: not available" in report


def test_nan_huge_and_negative_zero(tmp_path):
    cells = {
        ("RB2 Safety", "chosen"): (1e12, math.nan),
        ("RB2 Safety", "rejected"): (-1e-9, -math.inf),
    }
    rows = {1: (-0.0, 0.0, math.nan), 2: (1e30, math.nan, -1e-9), 3: (math.inf, 0.5, 1e9)}
    report = report_of(reference_run(tmp_path / "run", steering=cells, progression=rows))
    assert (
        "have no finite scores" in report
        and "Loss went from nan to 1.000e+09: it is not finite" in report
    )
    assert "reward=0.000, penalty=0.000, loss=nan" in report and not re.search(r"-0\.0+\b", report)
    assert "Feature penalties were not logged at every step" in report


def test_the_phase_writes_both_files_and_is_redone_once_what_it_lacked_is_there(tmp_path):
    from jobs.__main__ import main

    run = reference_run(tmp_path / "run")
    assert main(["report", "--run", str(run.path)]) == 0
    assert run.done("report")
    published = run.read("report")
    assert published.path("final_report.txt").read_text().startswith(RULE)
    figures_ = published.json("report.json")
    assert (
        figures_["penalty"]["latents"] == HARMING[:3]
        and figures_["verdict"]["word"] == "not available"
    )
    assert {f["phase"] for f in figures_["failures"]} == {"ppo", "evaluate"}
    publish_evaluation(run, "base", generations(0.5))
    assert "evaluate/base" in run.why_not_done("report")
    assert main(["report", "--run", str(run.path)]) == 0
    assert run.done("report") and len(run.read("report").json("report.json")["policies"]) == 1


# Sentences and numbers


def rows_of(*losses: float) -> list[dict[str, Any]]:
    return [{"step": i, "loss": loss} for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((0.033, 0.001), "converged from 0.033 to 0.001 (97% reduction)"),
        ((0.5, 0.4), "fell from 0.500 to 0.400 (20% reduction)"),
        ((0.1, 0.3), "rose from 0.100 to 0.300 (200% increase)"),
        ((0.1, 0.1001), "stayed at 0.100"),
        ((-0.2, 0.1), "rose from -0.200 to 0.100"),
        ((0.1, -0.2), "fell from 0.100 to -0.200"),
        ((0.001, 500.0), "rose from 0.001 to 500.000 (5.0e+07% increase)"),
        ((0.1,), "was 0.100 at the only logged step"),
    ],
)
def test_loss_sentence(losses, words):
    assert reference.loss_sentence(rows_of(*losses)) == f"Loss {words}"


@pytest.mark.parametrize(
    ("penalties", "words"),
    [
        ([0.0, 0.15, 0.1], "oscillated between 0.0 and 0.15, showing the model learning"),
        ([0.1, 0.0, 0.2], "oscillated between 0.0 and 0.2 and ended at their highest"),
        ([0.0, 0.0], "were never triggered"),
        ([0.3, 0.2, 0.0], "fell from 0.3 to 0.0"),
        ([0.1, 0.2], "rose from 0.1 to 0.2: the model did not learn"),
        ([0.1, 0.1], "stayed at 0.1"),
    ],
)
def test_penalty_sentence(penalties, words):
    assert reference.penalty_sentence(penalties, "control").startswith(f"Feature penalties {words}")


def test_an_oscillation_shows_learning_only_where_the_verdict_allows_it():
    assert reference.penalty_sentence([0.0, 0.15, 0.1], "inconclusive").endswith(
        "between 0.0 and 0.15, which by itself shows no learning"
    )
    assert "learning to balance" in reference.penalty_sentence([0.0, 0.15, 0.1], "not available")


def test_reward_sentence_tells_a_trend_from_noise():
    assert "remained stable" in reference.reward_sentence(
        [[s, r] for s, (r, _, _) in PROGRESSION.items()]
    )
    assert "rose from 0.000 to 0.900" in reference.reward_sentence([[i, i / 10] for i in range(10)])
    assert "fell from 0.000 to -0.900" in reference.reward_sentence(
        [[i, -i / 10] for i in range(10)]
    )
    assert "remained stable" in reference.reward_sentence([[i, 1.0] for i in range(10)])
    assert "too few" in reference.reward_sentence([[1, 0.0], [2, 1.0]])


def test_trend_agrees_with_scipy():
    from scipy.stats import linregress

    points = np.random.default_rng(0).normal(size=(20, 2))
    fit = linregress(points[:, 0], points[:, 1])
    assert reference.trend(points.tolist()) == pytest.approx((fit.slope, fit.stderr))


@pytest.mark.parametrize(
    ("chosen", "rejected", "words"),
    [
        (
            0.0,
            0.001,
            (
                "high specificity - chosen (safe) responses are unaffected while rejected (unsafe)"
                " responses show slight improvement"
            ),
        ),
        (0.0, 0.5, "show marked improvement"),
        (0.0, -0.001, "show slight decline"),
        (0.00004, -0.00004, "Steering has no effect that shows here"),
        (
            -0.1,
            0.1,
            (
                "Steering harms the chosen texts - chosen (safe) responses lose reward while"
                " rejected (unsafe) responses gain reward"
            ),
        ),
        (
            0.1,
            0.2,
            (
                "Steering is not specific - chosen (safe) and rejected (unsafe) responses both gain"
                " reward."
            ),
        ),
        (
            0.1,
            0.0,
            (
                "Steering is not specific - chosen (safe) responses gain reward while rejected"
                " (unsafe) responses do not move"
            ),
        ),
    ],
)
def test_steering_sentence(chosen, rejected, words):
    summary = steering({("A", "chosen"): (0.0, chosen), ("A", "rejected"): (0.0, rejected)}).tree()
    assert words in reference.steering_sentence(summary)


def test_margin_sentence_stands_against_the_word_improvement():
    assert "telling unsafe from safe texts less well" in sections.margin_sentence(
        steering(STEERING).tree()
    )
    assert sections.margin_sentence(
        steering({("A", "chosen"): (0.0, 0.1), ("A", "rejected"): (0.0, 0.0)}).tree()
    ).startswith("The margin rises.")
    both = steering({("A", "chosen"): (0.0, 0.1), ("A", "rejected"): (0.0, 0.2)}).tree()
    assert (
        "suppressing harm detectors raises the scores of rejected texts more than those of chosen"
        " ones." in sections.margin_sentence(both)
    )
    both["intervention"]["file"] = "own.json"
    assert "the intervention raises" in sections.margin_sentence(both)


def test_steps_are_counted_from_one_and_a_repeated_one_counts_once(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 0, "loss/total": 1.0}\n{"step": 1, "loss/total": 2.0}\n{"step": 1, "loss/total":'
        " null}\n"
    )
    table = frames._metrics(file, "penalty-seed3")
    assert (
        table["step"].tolist() == [1, 2]
        and table["seed"].tolist() == [3, 3]
        and math.isnan(table["loss/total"][1])
    )
    file.write_text('{"step": 10, "loss/total": 1.0}\n')
    assert frames._metrics(file, "penalty-seed3")["step"].tolist() == [10]


def test_shown_steps():
    assert shown_steps(list(range(1, 101))) == [10, 30, 50, 70, 90, 100]
    assert shown_steps([10, 20, 40, 50, 71, 90, 100]) == [10, 20, 50, 71, 90, 100]
    assert shown_steps([1]) == [1] and shown_steps([1, 2]) == [1, 2]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (numbers.fixed(-0.00001, 4, sign=True), "+0.0000"),
        (numbers.fixed(-0.0, 3), "0.000"),
        (numbers.fixed(None, 3), "n/a"),
        (numbers.fixed(math.nan, 3), "nan"),
        (numbers.fixed(-2e7, 3, sign=True), "-2.000e+07"),
        (numbers.plain(-0.0), "0.0"),
        (numbers.plain(3.0), "3.0"),
        (numbers.count(4.28e9), "4B"),
        (numbers.count(134_515_008), "135M"),
        (numbers.count(1.24e9), "1.2B"),
        (numbers.size(30e9), "30GB"),
        (numbers.size(268_000_000), "268MB"),
        (numbers.size(9.97e9), "10GB"),
        (numbers.duration(353), "6 minutes"),
        (numbers.duration(59), "59 seconds"),
        (numbers.duration(9000), "2.5 hours"),
        (hardware(["NVIDIA H100 80GB HBM3"] * 4, "cuda:0"), "4x NVIDIA H100 GPUs"),
        (hardware(["NVIDIA A100-SXM4-40GB"], "cuda:0"), "1x NVIDIA A100-SXM4 GPU"),
        (hardware(["x86_64"], "cpu"), "CPU (x86_64)"),
        (hardware(["x86_64"] * 2, "cpu"), "CPU (x86_64), 2 processes"),
        (hardware([], "None"), ""),
    ],
)
def test_numbers(shown, expected):
    assert shown == expected


# Eighty columns


def test_a_wide_table_goes_on_beneath_with_its_rows_named_again():
    given = Table(
        ["Unit", *(f"column {i}" for i in range(12))],
        [["one", *["x" * 9] * 12], ["two", *["y" * 9] * 12]],
    )
    lines = blocks.table(given)
    assert max(map(len, lines)) <= 80
    assert (
        sum(line.startswith("one ") for line in lines) == 2
        and sum(line.count("xxxxxxxxx") for line in lines) == 12
    )
    assert [line.split()[0] for line in lines if line] == ["Unit", "one", "two"] * 2


def test_columns_line_up_and_words_stand_to_the_left():
    assert blocks.table(
        Table(["latent", "arm", "N"], [[7, "base", 5], [12345, "no penalty", 50]])
    ) == ["latent  arm          N", "7       base         5", "12345   no penalty  50"]


def test_a_path_in_an_item_is_not_broken():
    path = "/scratch/" + "a" * 120
    assert (
        blocks.lines([blocks.Items([f"unit (failed): {'word ' * 20}\nlog: {path}"])])[-1]
        == f"  log: {path}"
    )


def failed_run(path: Path) -> RunDir:
    run = evaluated_run(path)
    (run.folder("ppo", "penalty-seed0") / "manifest.json").unlink()
    run.log("ppo", "penalty-seed0").parent.mkdir(parents=True, exist_ok=True)
    run.log("ppo", "penalty-seed0").write_text(
        "torch.OutOfMemoryError: " + "CUDA out of memory " * 30 + "\n"
    )
    return run


def odd_run(path: Path) -> RunDir:
    huge = generations(0.5).assign(reward=-1e300, kl=math.inf, n_tokens=1e15)
    run = evaluated_run(
        path,
        steering={
            (name, label): (-1e12, 1e-300)
            for name in ("RB2 Safety", "RMB Safety")
            for label in ("chosen", "rejected")
        },
    )
    publish_evaluation(run, "base", huge)
    publish_evaluation(run, "penalty-seed0", huge.assign(reward=math.nan, kl=-0.0))
    return run


@pytest.mark.parametrize(
    "make",
    [
        evaluated_run,
        reference_run,
        failed_run,
        odd_run,
        lambda path: RunDir.create(path, reference_config(seeds=[0, 10, 200])),
    ],
    ids=["whole", "never evaluated", "failed", "odd numbers", "nothing done"],
)
def test_eighty_columns_whatever_became_of_the_run(tmp_path, make):
    """The reference report's list of ten latents is wider, and paths are not broken."""
    report = report_of(make(tmp_path / "run"))
    too_wide = [
        line
        for line in report.splitlines()
        if len(line) > 80 and not line.startswith("Safety-") and "/" not in line
    ]
    assert too_wide == []
    assert not re.search(r"-0\.0+(?![\d.])", report)
