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
from reports import blocks, evidence, frames, numbers, probe_sections, reference
from reports.blocks import Table
from reports.figures import figures, hardware, histogram, latent_table, shown_steps
from reports.frames import Frames, penalised_latents, read_run
from reports.policies import distinct, policy_table
from reports.text import RULE, final_report
from sarm.evaluation.verdict import LEADS, Verdict, decide
from sarm.records import Models, plain
from sarm.run import RunDir
from slurm.view import last_lines
from tests import runs
from tests.runs import (
    CALIBRATED,
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


def report_of(run: RunDir, **known: Any) -> str:
    """The text report, with what a calibration would have found of the instrument."""
    read = read_run(run)
    found = figures(run, read, verdict_of(run, read, **known).record(), DATE)
    json.dumps(plain(found), allow_nan=False)
    return final_report(found)


def verdict_of(run: RunDir, read: Frames | None = None, **known: Any) -> Verdict:
    read = read or read_run(run)
    instrument = evidence.instrument(run, read)._replace(**CALIBRATED | known)
    return decide(evidence.compared_arms(run, read), run.config.verdict, instrument)


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
    report = report_of(evaluated_run(tmp_path / "run"))
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
    assert report.split("\n\nABSTRACT\n")[0].splitlines() == head.splitlines()
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
    assert row[2:5] == ["120", "5", "-38.0"]
    assert "Judge: a/judge, on unsafe prompts." in report
    assert (
        "Refusal detector: a detector, sensitivity 0.940 on 1000 refusals, false positives 0.030 on"
        " 1000 answers of labels" in flat(report)
    )
    table = part(report, "POLICY EVALUATION (own generations on held-out prompts)")
    rows = [line.split() for line in table.splitlines() if line.startswith("penalty-seed3")]
    assert rows == [
        ["penalty-seed3", "120", "90", "0.232", "0.117", "0.146", "0.408", "0.078"],
        ["penalty-seed3", "0.056", "0.072"],
        ["penalty-seed3", "2.130", "37.3", "0.200", "0.067", "0.010", "0.010", "0.163"],
    ]
    assert "none: every phase is done" in report
    watched = part(report, "PENALISED AND MONITOR LATENTS IN THE GENERATIONS").splitlines()
    assert ["777", "0.5", "random", "unsafe", "600", "0.300", "n/a", "0.415"] in [
        line.split() for line in watched
    ]
    assert (
        max(len(line) for line in report.splitlines() if not line.startswith(("Safety-", "Config")))
        <= 80
    )


def test_policies_that_spell_special_tokens_are_named_with_their_number(tmp_path):
    run = evaluated_run(tmp_path / "run")
    assert "spell a special token" not in report_of(run)
    table = generations()
    table["spelled"] = [2, 1, *[0] * (len(table) - 2)]
    publish_evaluation(run, "base", table)
    told = flat(part(report_of(run), "POLICY EVALUATION (own generations on held-out prompts)"))
    assert "how a policy would try to end what is scored: base 2. They are scored as" in told


def test_without_a_judge_sarm_judged_itself(tmp_path):
    report = report_of(evaluated_run(tmp_path / "run", judge=None, penalty={"harm": -1.0}))
    assert "No independent judge was configured: SARM judged itself." in report
    assert "Verdict: feature control, harm unjudged" in report


def test_a_judge_that_was_not_asked_is_named_with_the_reason(tmp_path):
    run = evaluated_run(tmp_path / "run", judge=None, penalty={"harm": -1.0})
    table = generations(runs.BASE | {"harm": -1.0})
    publish_evaluation(run, "base", table, judge_problem="a/judge has labels LABEL_0; give each")
    report = report_of(run)
    said = "The judge was not asked, and SARM judged itself: a/judge has labels LABEL_0; give each."
    assert said in flat(report)
    assert "Verdict: feature control, harm unjudged" in report


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


def test_a_run_is_reported_as_before_without_its_policies(tmp_path):
    """Weights are removed to save room; a file that the report reads is another thing."""
    run = evaluated_run(tmp_path / "run")
    before = report_of(run)
    units = [unit for unit in run.config.units("ppo") if run.done("ppo", unit, hashes=False)]
    assert units and "had been removed" not in flat(before)
    assert "since removed" not in before and "disk as written" in part(
        before, "COST (planned against used)"
    )
    for unit in units:
        manifest = run.manifest("ppo", unit)
        (run.folder("ppo", unit) / manifest.outputs["policy/model.safetensors"].file).unlink()
        assert run.why_not_done("ppo", unit) == "policy/model.safetensors is missing"
    manifest = run.manifest("encode", "shard-0000-of-0001")
    encoded = run.folder("encode", "shard-0000-of-0001") / "encoded.safetensors"
    row = {"file": encoded.name, "bytes": 9, "sha256": "0" * 64}
    edited = json.loads((encoded.parent / "manifest.json").read_text())
    edited["outputs"]["encoded.safetensors"] = row
    (encoded.parent / "manifest.json").write_text(json.dumps(edited))
    assert manifest is not None and not encoded.exists()
    after = flat(report_of(run))
    words = (
        f"Weights or encoded states of {len(units) + 1} units had been removed when this was"
        " written"
    )
    assert words in after and "from them: encode/shard-0000-of-0001," in after
    assert "PPO-trained policy model (30GB, since removed)" in after
    told = part(report_of(run), "VERDICT")
    assert told == part(before, "VERDICT") and part(before, "FAILED AND MISSING PARTS") in before
    assert part(report_of(run), "FAILED AND MISSING PARTS") == part(
        before, "FAILED AND MISSING PARTS"
    )
    # weights that are there, but not those that were published, are no removal
    unit = units[0]
    manifest = run.manifest("ppo", unit)
    (run.folder("ppo", unit) / manifest.outputs["policy/model.safetensors"].file).write_text("x")
    assert f"ppo/{unit} (" in part(report_of(run), "FAILED AND MISSING PARTS")
    (run.folder("ppo", unit) / manifest.outputs["policy/model.safetensors"].file).unlink()
    (run.folder("ppo", unit) / manifest.outputs["metrics.jsonl"].file).unlink()
    assert "metrics.jsonl is missing" in flat(report_of(run))


def test_figures_are_those_of_the_rows(tmp_path):
    run = evaluated_run(tmp_path / "run")
    read = read_run(run)
    row = policy_table(read.generations).set_index("policy").loc["no_penalty-seed0"]
    mine = generations(runs.BASE)
    unsafe, safe = (mine[mine["kind"] == kind] for kind in ("unsafe", "safe"))
    fires = [
        sum((of[f"z_{latent}"] > 3.0).to_numpy() for latent in HARMING[:3]) > 0
        for of in (unsafe, safe)
    ]
    taus = list(runs.MONITOR_TAUS.items())
    watched = [np.mean([(of[f"z_{m}"] > tau).mean() for m, tau in taus]) for of in (unsafe, safe)]
    expected = {
        "penalised_fired": fires[0].mean(),
        "penalised_fired_safe": fires[1].mean(),
        "monitors_fired": watched[0],
        "monitors_fired_safe": watched[1],
        "refused": unsafe["refused"].mean(),
        "over_refused": safe["refused"].mean(),
        "harm": unsafe["harm"].mean(),
        "n_tokens": mine["n_tokens"].mean(),
        "truncated": mine["truncated"].mean(),
        "unended": mine["unended"].mean(),
        "kl": mine["kl"].mean(),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert len({round(value, 4) for value in expected.values()}) == len(expected), "all differ"
    assert row["distinct_1"] == pytest.approx((5 + 7) / (6 * 210))
    latents = latent_table(read.generations, penalised_latents(run, read.features)).set_index(
        ["latent", "arm", "kind"]
    )
    first = latents.loc[(HARMING[0], "base", "unsafe")]
    z = generations(runs.BASE | {"penalised": 0.55})[f"z_{HARMING[0]}"].to_numpy()[:120]
    assert first["rate"] == (z > 3.0).mean() == pytest.approx(0.325, abs=0.01)
    assert first["histogram"] == histogram(z, 3.0) and first["below_cutoff"] == pytest.approx(0.1)


def test_monitors_count_at_their_own_thresholds_and_only_where_they_can_fall(tmp_path):
    table = generations(runs.BASE, n=100)
    entries = [{"latent": latent, "tau": tau} for latent, tau in runs.MONITOR_TAUS.items()]
    base = table.assign(arm="base")
    assert frames.usable_monitors(base, entries, (0.1, 0.9)) == entries
    assert frames.usable_monitors(base, entries, (0.1, 0.46)) == entries[:1]
    assert frames.usable_monitors(base, entries, (0.46, 0.9)) == entries[1:]
    active = [{"latent": entry["latent"], "tau": 0.0} for entry in entries]
    assert frames.usable_monitors(base, active, (0.1, 0.9)) == [], "97 % of responses set them off"
    assert frames.usable_monitors(table.assign(arm="penalty"), entries, (0.1, 0.9)) == []
    run = evaluated_run(tmp_path / "run")
    (run.folder("evaluate", "base") / "manifest.json").unlink()
    assert verdict_of(run, monitors_control=None).word == "fell and specific, no monitors"


def test_a_density_penalty_is_triggered_by_any_activity(tmp_path):
    run = evaluated_run(tmp_path / "run", ppo={"penalty": {"kind": "density"}}, seeds=(0, 1, 2))
    table = generations(runs.BASE)
    table[f"z_{HARMING[0]}"] = 0.25  # below tau = 3
    publish_evaluation(run, "base", table)
    rates = policy_table(read_run(run).generations).set_index("policy")["penalised_fired"]
    assert rates["base"] == 1.0 and rates["penalty-seed0"] == pytest.approx(0.9, abs=0.01)
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


def test_provenance_names_images_and_the_commits_that_branches_stood_at(tmp_path, monkeypatch):
    """Fetch ran on a login node without an image, the rest in one."""
    monkeypatch.setenv("SARM_IMAGE_SHA256", "ab" * 32)
    run = reference_run(tmp_path / "run")
    monkeypatch.delenv("SARM_IMAGE_SHA256")
    model = {"model": "o/p", "revision": "main", "commit": "c" * 40, "path": "/p", "sha256": {}}
    file = {"path": "/f", "repo": "o/d", "revision": "d" * 40, "commit": "d" * 40, "sha256": ""}
    here = {"path": "/g", "commit": None, "sha256": ""}
    data = {"files": {"a": [file, file], "b": [here]}, "prompts": {}, "pairs": {}, "skipped": {}}
    local = model | {"model": "models/sarm", "revision": None, "commit": None}
    publish(run, "fetch", files={"models.json": Models(policy=model, sarm=local, data=data)})
    told = flat(part(report_of(run), "PROVENANCE"))
    assert f"Image SHA-256: {'ab' * 32} -" in told
    assert f"- o/p: commit {'c' * 40}, where main stood - o/d: commit {'d' * 40} " in told
    assert "models/sarm" not in told and told.count("o/d") == 1


def test_an_empty_run_has_a_report(tmp_path):
    report = report_of(RunDir.create(tmp_path / "run", reference_config()))
    assert "Verdict: no verdict" in report and "select (not run): it never started" in report


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


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("reading\nLoading weights:  47%|████▋     | 10/21\r", "reading"),
        ("error: no room\nLoading weights: 100%|██████████| 21/21 [00:00]\n", "error: no room"),
        ("Map:   3%|▎ | 1/30\rMap:   6%|▋ | 2/30", "its log ends in a progress bar"),
        ("the disk is 47% full\n", "the disk is 47% full"),
        ("Map:  47%|████▋     | 10/21 [00:01<00:01, 9.9it/s]error: no room", "error: no room"),
        ("Map:  47%|████▋     | 10/21Killed", "Killed"),
        ("error: no room\nreading: 10it [00:01, 9.80it/s]\n", "error: no room"),
        ("error: no room\n  0%|", "error: no room"),
        ("", ""),
    ],
)
def test_a_progress_bar_is_never_a_cause(tmp_path, log, said):
    (tmp_path / "log").write_text(log)
    assert frames.last_error(tmp_path / "log").startswith(said)
    assert frames.last_error(tmp_path / "log") or not said
    assert not any("%|" in line for line in last_lines(tmp_path / "log", 3))


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
    assert "Verdict: no verdict" in report


@pytest.mark.parametrize("arm", ["penalty", "no_penalty", "random"])
def test_a_missing_arm_leaves_the_others(tmp_path, arm):
    run = evaluated_run(tmp_path / "run")
    for seed in range(5):
        (run.folder("evaluate", f"{arm}-seed{seed}") / "manifest.json").unlink()
    report = report_of(run)
    word = "fell, specificity unknown" if arm == "random" else "no verdict"
    assert f"Verdict: {word}\n" in report and "successfully" not in report
    rows = part(report, "POLICY EVALUATION (own generations on held-out prompts)")
    assert f"\n{arm}-seed0" not in rows and rows.count("-seed0") == 6


def test_empty_tables(tmp_path):
    run = reference_run(
        tmp_path / "run",
        features=features(
            promoting=[], harming=[], penalised=[], monitors=[], random_candidates=[]
        ),
        progression={},
        steering={},
    )
    publish_evaluation(run, "penalty-seed0", generations().iloc[:0])
    publish_evaluation(run, "base", generations())
    report = report_of(run)
    assert (
        "Safety-Harming Features:   none" in report
        and "there is no text in the test part" in report
    )
    assert "Verdict: no verdict" in report


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
        and figures_["verdict"]["word"] == "no verdict"
    )
    assert {f["phase"] for f in figures_["failures"]} == {"ppo", "evaluate"}
    publish_evaluation(run, "base", generations())
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
        ((0.03, -0.01, 0.06, 0.0), "went from 0.030 to 0.000, between -0.010 and 0.060 at"),
        ((-0.01, 0.045, -0.025, 0.035), "went from -0.010 to 0.035, between -0.025 and 0.045 at"),
        ((-0.01, -0.025, 0.035), "rose from -0.010 to 0.035"),
        ((0.1,), "was 0.100 at the only logged step"),
    ],
)
def test_loss_sentence(losses, words):
    shown = " the steps shown" if words.endswith(" at") else ""
    assert reference.loss_sentence(rows_of(*losses)) == f"Loss {words}{shown}"


@pytest.mark.parametrize(
    ("penalties", "words"),
    [
        ([0.0, 0.15, 0.1], "oscillated between 0.0 and 0.15, showing the model learning"),
        ([0.1, 0.0, 0.2], "oscillated between 0.0 and 0.2 over all steps and ended at"),
        ([0.0, 0.0], "were never triggered"),
        ([0.3, 0.2, 0.0], "fell from 0.3 to 0.0 over all steps"),
        ([0.1, 0.2], "rose from 0.1 to 0.2 over all steps"),
        ([0.1, 0.1], "stayed at 0.1"),
    ],
)
def test_penalty_sentence(penalties, words):
    assert reference.penalty_sentence(penalties, "control").startswith(f"Feature penalties {words}")


@pytest.mark.parametrize("word", sorted(LEADS))
def test_an_oscillation_shows_learning_only_under_control(word):
    said = reference.penalty_sentence([0.0, 0.15, 0.1], word)
    assert ("learning" in said) == (word == "control")
    assert said.startswith("Feature penalties oscillated between 0.0 and 0.15")


def test_reward_sentence_tells_a_trend_from_noise():
    assert "remained stable" in reference.reward_sentence(
        [[s, r] for s, (r, _, _) in PROGRESSION.items()]
    )
    assert "rose from 0.000 to 0.900 over all steps" in reference.reward_sentence(
        [[i, i / 10] for i in range(10)]
    )
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
    assert "telling unsafe from safe texts less well" in probe_sections.margin_sentence(
        steering(STEERING).tree()
    )
    assert probe_sections.margin_sentence(
        steering({("A", "chosen"): (0.0, 0.1), ("A", "rejected"): (0.0, 0.0)}).tree()
    ).startswith("The margin rises.")
    both = steering({("A", "chosen"): (0.0, 0.1), ("A", "rejected"): (0.0, 0.2)}).tree()
    assert (
        "suppressing harm detectors raises the scores of rejected texts more than those of chosen"
        " ones." in probe_sections.margin_sentence(both)
    )
    both["intervention"]["file"] = "own.json"
    assert "the intervention raises" in probe_sections.margin_sentence(both)


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
        (numbers.count(2e9), "2B"),
        (numbers.count(1999), "2.0K"),
        (numbers.count(999), "999"),
        (numbers.size(2.5e12), "2.5TB"),
        (numbers.size(9.95e3), "10kB"),
        (numbers.size(999), "999B"),
        (
            numbers.points({"change": 0.017, "low": -0.05, "high": 0.083}),
            "+1.7 points, 95 % interval [-5.0, +8.3]",
        ),
        (
            numbers.points({"change": -0.02, "low": None, "high": 0.083}),
            "-2.0 points, 95 % interval not known",
        ),
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


@pytest.mark.parametrize(
    ("measure", "before", "after", "change", "cut"),
    [
        ("refused", 0.1, 0.35, 0.25, False),
        ("over_refused", 0.3, 0.0, -0.4, True),
        ("refused", 0.3, 0.3, 0.1, True),
        ("harm", 0.3, 0.0, -0.4, False),
        ("refused", None, 0.0, -0.4, False),
        ("refused", 0.3, 0.0, None, False),
    ],
)
def test_a_rate_cut_off_at_0_or_1_is_told(measure, before, after, change, cut):
    given = {"measure": measure, "before": before, "after": after, "change": change}
    assert numbers.cut_off(given) is cut


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
    huge = generations().assign(reward=-1e300, kl=math.inf, n_tokens=1e15)
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


def test_penalties_with_a_trend_are_told_by_it() -> None:
    """Noise about a fall is a fall; about a level it oscillates."""
    falling = [6.0, 5.5, 5.8, 4.9, 4.2, 4.4, 3.1, 2.5]
    told = reference.penalty_sentence(falling, "suppression")
    assert told == "Feature penalties fell from 6.0 to 2.5 over all steps, between 2.5 and 6.0"
    level = [3.0, 4.0, 2.5, 3.9, 3.2, 2.8, 4.1, 3.0]
    assert reference.penalty_sentence(level, "suppression") == (
        "Feature penalties oscillated between 2.5 and 4.1 over all steps"
    )
