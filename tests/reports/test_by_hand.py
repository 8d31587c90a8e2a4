"""Numbers, frames and figures of the reports by hand: whole rows, away from the defaults."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import sarm.run
from reports import figures as drawn
from reports import frames, numbers, provenance
from reports.frames import read_run
from sarm.config import ARMS, UserError
from sarm.run import RunDir
from tests.runs import feature, features, publish, reference_config

# Numbers


def test_numbers_at_their_edges() -> None:
    assert [numbers.arm_name(a) for a in ("penalty - random", "no_such_arm", "base")] == [
        "vs. random",
        "no such arm",
        ARMS["base"].words,
    ]
    fixed = [numbers.fixed(v, 2) for v in (None, math.nan, math.inf, 999_999.5, 1e6, -0.001, 0.005)]
    assert fixed == ["n/a", "nan", "inf", "999999.50", "1.000e+06", "0.00", "0.01"]
    signed = [
        numbers.fixed(v, 1, sign=True) for v in (math.inf, -math.inf, -0.01, 0.0, -0.06, -1e6)
    ]
    assert signed == ["+inf", "-inf", "+0.0", "+0.0", "-0.1", "-1.000e+06"]
    assert [numbers.plain(v) for v in (None, 0.15, 1234.5, 1e7, math.nan, math.inf)] == [
        "n/a",
        "0.15",
        "1.23e+03",
        "1e+07",
        "nan",
        "inf",
    ]
    assert [numbers.general(v) for v in (None, -0.0, 0.123, 12345.0)] == [
        "n/a",
        "0",
        "0.12",
        "1.2e+04",
    ]
    assert [numbers.each(v) for v in ([], [1.0], [2.0, 2.0], [1.0, 0.25])] == [
        "n/a",
        "1.0",
        "2.0",
        "1.0, 0.25",
    ]
    assert [numbers.percent(s) for s in (0.974, 0.975, 9999.0, 1e4)] == [
        "97%",
        "98%",
        "999900%",
        "1.0e+06%",
    ]
    assert [numbers.count(n) for n in (999.4, 1e3, 1.96e3, 2e3, 1e6, 2e6, 1e9, 1.5e9)] == [
        "999",
        "1.0K",
        "2.0K",
        "2K",
        "1.0M",
        "2M",
        "1.0B",
        "1.5B",
    ]
    assert [numbers.size(n) for n in (1e3, 9.94e3, 9.95e3, 1e6, 1e9, 1e12, 9.94e12, 3e13)] == [
        "1.0kB",
        "9.9kB",
        "10kB",
        "1.0MB",
        "1.0GB",
        "1.0TB",
        "9.9TB",
        "30TB",
    ]
    spans = (None, 0.4, 0.6, 1.0, 1.6, 89.9, 90.0, 5399.0, 5400.0, 7200.0, 8000.0)
    assert [numbers.duration(s) for s in spans] == [
        "n/a",
        "0 seconds",
        "1 second",
        "1 second",
        "2 seconds",
        "90 seconds",
        "2 minutes",
        "90 minutes",
        "1.5 hours",
        "2 hours",
        "2.2 hours",
    ]
    assert [numbers.percentage(s) for s in (None, math.nan, 0.125)] == [None, None, 12.5]
    assert [numbers.digits({"measure": m}) for m in ("n_tokens", "harm")] == [1, 3]


def test_changes_in_points_and_their_intervals() -> None:
    def said(change: float | None, low: float | None, high: float | None) -> str:
        return numbers.points({"change": change, "low": low, "high": high})

    assert said(None, 0.01, 0.02) == "n/a points, 95 % interval [+1.0, +2.0]"
    assert said(0.5, 0.01, None) == "+50.0 points, 95 % interval not known"
    assert said(-0.0004, -0.1234, 0.0) == "+0.0 points, 95 % interval [-12.3, +0.0]"
    for low, high in ((None, 1.0), (1.0, None), (math.nan, 1.0), (1.0, math.inf)):
        assert numbers.interval(low, high, 2) == "n/a"
    assert numbers.interval(-0.0341, 0.5, 3) == "[-0.034, +0.500]"


def test_a_rate_is_cut_off_where_its_change_is_more_than_rounding() -> None:
    def off(change: float, **more: Any) -> bool:
        given = {"measure": "refused", "before": 0.25, "after": 0.5, "change": change}
        return numbers.cut_off(given | more)

    assert not off(0.25) and not off(0.25 + 1e-10) and not off(0.25 - 1e-10)
    assert off(0.25 + 1e-8) and off(0.25 - 1e-8)
    edge = {"before": 0.0, "after": 0.0}
    assert not off(1e-9, **edge) and off(1.1e-9, **edge)


# Frames


def took(run: RunDir, phase: str, unit: str, **changes: Any) -> None:
    file = run.folder(phase, unit) / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def row_of(read: frames.Frames, phase: str, unit: str = "all") -> dict[str, Any]:
    rows = read.phases[(read.phases["phase"] == phase) & (read.phases["unit"] == unit)]
    (row,) = rows.astype(object).where(rows.notna(), None).to_dict("records")
    return row


def test_a_unit_s_row_is_what_its_manifest_and_log_say(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", reference_config(seeds=[3]))
    publish(run, "fetch")
    publish(run, "encode", "shard-0000-of-0001")
    times = {"started": "2026-01-31T12:00:00+00:00", "ended": "2026-01-31T12:01:30+00:00"}
    inputs = {"fetch/all/x": "a" * 64, "fetch/all/y": "b" * 64, "/data/x": "c" * 64}
    inputs |= {"steer/all/z": ""}
    known = {"git_commit": "g" * 40, "image_sha256": "i" * 64, "job_id": "12", "host": "n1"}
    known |= {"seed": 3, "device": "cuda:0"}
    took(run, "encode", "shard-0000-of-0001", inputs={}, **times, **known)
    log = run.log("encode", "shard-0000-of-0001")
    log.parent.mkdir(exist_ok=True)
    log.write_text("fine\n")
    failed = run.log("select", "all")
    failed.write_text("error: no room\nbye\n")
    read = read_run(run, failed={("calibrate", "all"): "TIMEOUT", ("steer", "all"): ""})
    found = row_of(read, "encode", "shard-0000-of-0001")
    manifest = read.manifests["encode", "shard-0000-of-0001"]
    assert found == {
        "phase": "encode",
        "unit": "shard-0000-of-0001",
        "status": "done",
        "cause": "",
        "log": log.as_posix(),
        "removed": False,
        "attempt": manifest.attempt,
        "config_sha256": manifest.config_sha256,
        "seconds": 90.0,
        "needs": [],
        "manifest_sha256": sarm.run.file_sha256(
            log.parent.parent / "encode/shard-0000-of-0001/manifest.json"
        ),
        **times,
        **known,
    }
    unknown = dict.fromkeys([*times, *known, "attempt", "config_sha256", "seconds"])
    unknown |= {"manifest_sha256": None, "needs": [], "removed": False}

    def missing(phase: str, unit: str = "all") -> dict[str, Any]:
        row = row_of(read, phase, unit)
        assert {name: row.pop(name) for name in unknown} == unknown
        return row

    assert missing("select") == {
        "phase": "select",
        "unit": "all",
        "status": "failed",
        "cause": "error: no room",
        "log": failed.as_posix(),
    }
    assert missing("calibrate") | {"phase": ""} == {
        "phase": "",
        "unit": "all",
        "status": "failed",
        "cause": "TIMEOUT",
        "log": "",
    }
    for phase in ("steer", "cards"):
        assert missing(phase) | {"phase": ""} == {
            "phase": "",
            "unit": "all",
            "status": "not run",
            "cause": "it never started",
            "log": "",
        }
    assert set(read.manifests) == {("fetch", "all"), ("encode", "shard-0000-of-0001")}
    assert "report" not in set(read.phases["phase"])
    took(run, "encode", "shard-0000-of-0001", inputs=inputs)
    needs = row_of(read_run(run), "encode", "shard-0000-of-0001")
    assert needs["status"] == "failed" and needs["cause"]


def test_a_manifest_that_shows_between_two_looks_leaves_no_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir.create(tmp_path / "run", reference_config())
    publish(run, "select", files={"features.json": features()})
    waited: list[Any] = []

    def late(self: RunDir, phase: str, unit: str = "all", *, patience_s: float) -> Any:
        waited.append((phase, patience_s))
        raise UserError("no manifest")

    monkeypatch.setattr(RunDir, "read", late)
    read = read_run(run, patience_s=1000.0, failed={("select", "all"): ""})
    assert read.manifests == {} and read.features is None
    assert row_of(read, "select")["status"] == "done"
    patience = dict(waited)
    assert patience["select"] == 0.0 and 900 < patience["fetch"] <= 1000


def test_steps_are_counted_from_one_and_of_a_step_logged_twice_the_later_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"step": s, "loss/total": loss} for s, loss in ((1, 1.0), (0, 2.0), (1, 3.0))]
    monkeypatch.setattr(frames, "read_training_log", lambda path: lines)
    table = frames._metrics(tmp_path, "no_penalty-seed12")
    assert table.to_dict("list") == {
        "policy": ["no_penalty-seed12"] * 2,
        "arm": ["no_penalty"] * 2,
        "seed": [12] * 2,
        "step": [1, 2],
        "loss/total": [2.0, 3.0],
    }
    assert list(table.columns[:3]) == ["policy", "arm", "seed"]
    monkeypatch.setattr(frames, "read_training_log", lambda path: lines[:1])
    assert frames._metrics(tmp_path, "penalty-seed1")["step"].tolist() == [1]
    monkeypatch.setattr(frames, "read_training_log", lambda path: [])
    assert frames._metrics(tmp_path, "penalty-seed1").empty
    assert list(frames._joined([], "step")) == ["policy", "arm", "seed", "step"]
    both = frames._joined([table, table], "step")
    assert both.index.tolist() == [0, 1, 2, 3]


def test_a_response_fires_by_any_penalised_latent_and_a_share_of_the_monitors() -> None:
    table = pd.DataFrame({"z_1": [0.0, 2.0, 5.0], "z_2": [3.0, 0.0, 3.1], "z_3": [1.0, 1.0, 0.0]})
    latents = [{"latent": i, "tau": tau} for i, tau in ((1, 2.0), (2, 3.0), (9, 0.0))]
    found = frames._with_firing(table.copy(), latents, [*latents[:2], {"latent": 3, "tau": 0.5}])
    assert found["penalised_fired"].tolist() == [0.0, 0.0, 1.0]
    assert found["monitors_fired"].tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    none = frames._with_firing(table.copy(), latents[2:], [])
    assert none[["penalised_fired", "monitors_fired"]].isna().all().all()


def test_monitors_are_usable_between_the_rates_both_included() -> None:
    base = pd.DataFrame({"arm": "base", "kind": ["unsafe"] * 4 + ["safe"], "z_1": [0, 1, 2, 3, 9]})
    one = [{"latent": 1, "tau": 1.0}]
    for rates, usable in (((0.5, 0.9), 1), ((0.1, 0.5), 1), ((0.51, 1), 0), ((0, 0.49), 0)):
        assert len(frames.usable_monitors(base, one, rates)) == usable, rates
    assert frames.usable_monitors(base, [{"latent": 2, "tau": 0.0}], (0, 1)) == []
    assert frames.usable_monitors(base.assign(kind="safe"), one, (0, 1)) == []
    assert frames.usable_monitors(base.drop(columns="kind"), one, (0, 1)) == []


def test_latents_that_are_watched_have_their_thresholds(tmp_path: Path) -> None:
    found = features(
        penalised=[{"latent": 4, "tau": 3.5, "alpha": 0.2, "confirmed": True}], monitors=[8]
    )
    found = found.model_copy(
        update={
            "monitor_features": [m.model_copy(update={"tau": 0.75}) for m in found.monitor_features]
        }
    )
    assert frames.monitor_latents(found) == [{"latent": 8, "tau": 0.75}]
    assert frames.monitor_latents(None) == []
    for kind, tau in (("hinge", 3.5), ("density", 0.0)):
        penalty = SimpleNamespace(has_tau=kind != "density")
        run: Any = SimpleNamespace(config=SimpleNamespace(ppo=SimpleNamespace(penalty=penalty)))
        (entry,) = frames.penalised_latents(run, found)
        assert (entry["latent"], entry["tau"], entry["alpha"]) == (4, tau, 0.2)
        assert frames.penalised_latents(run, None) == []


def test_arms_are_told_in_their_order_and_paths_from_the_checkout() -> None:
    arms = [*reversed(ARMS), "z", "a"]
    assert sorted(arms, key=frames.arm_rank) == [*ARMS, "a", "z"]
    assert frames.arm_rank("z") == (len(ARMS), "z")
    assert frames.shown(frames.ROOT / "outputs" / "x") == "outputs/x"
    assert frames.shown(Path("/elsewhere/x")) == "/elsewhere/x"


def test_the_cause_in_a_log_is_looked_for_at_its_end(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    assert frames.last_error(log) == ""
    log.write_text("ValueError: early\n" + "x" * 70_000 + "\nlast  words\n\n")
    assert frames.last_error(log) == "last words", "the error is beyond what is read"
    log.write_text("\x1b[31mError: \x1b[0mred\tone\n  fine\x07 \n")
    assert frames.last_error(log) == "Error: red one"
    log.write_text("KeyError: 'a'\nerror: " + "y" * 500 + "\nbye")
    assert frames.last_error(log) == "error: " + "y" * 393
    log.write_text("\n \n")
    assert frames.last_error(log) == ""


# Figures


def test_cards_are_told_by_their_number_and_mean_scores() -> None:
    def card(detection: float | None, fuzzing: float | None) -> dict[str, Any]:
        return {"label": {"detection": {"score": detection}, "fuzzing": {"score": fuzzing}}}

    cards = {
        "cards": [card(0.5, None), {"label": None}, card(1.0, 0.25), card(None, None)],
        "minimal_edits": {"n": 3},
        "labels": {"model": "m"},
    }
    assert drawn._cards(None) is None
    assert drawn._cards(cards) == {
        "n": 4,
        "minimal_edits": {"n": 3},
        "labels": {"model": "m"},
        "label_scores": {"detection": {"n": 2, "mean": 0.75}, "fuzzing": {"n": 1, "mean": 0.25}},
    }
    none = drawn._cards(cards | {"cards": []})
    assert none is not None and none["label_scores"]["fuzzing"] == {"n": 0, "mean": None}


def manifest(device: str = "cpu", **more: Any) -> Any:
    return SimpleNamespace(device=device, more=more)


def seen(**given: Any) -> Any:
    empty = {"manifests": {}, "features": None, "calibrations": {}, "training": pd.DataFrame()}
    return SimpleNamespace(**empty | given)


def test_the_configuration_is_of_the_policy_that_is_shown() -> None:
    run: Any = SimpleNamespace(config=reference_config())
    names = ["NVIDIA H100 80GB HBM3"] * 2 + ["NVIDIA A100-SXM4-40GB"]
    more = {"training_s": 9.5, "steps": 40, "device_names": names}
    found = seen(
        manifests={
            ("ppo", "penalty-seed1"): manifest("cuda:0", **more),
            ("encode", "a"): manifest(sarm_parameters=7),
            ("encode", "b"): manifest(sarm_parameters=8),
        }
    )
    whole = {
        "policy": "meta-llama/Llama-3.1-8B-Instruct",
        "reward_model": "Schrieffer/Llama-SARM-4B",
        "reward_parameters": 7,
        "hardware": "2x NVIDIA H100 GPUs and 1x NVIDIA A100-SXM4 GPU",
        "training_s": 9.5,
        "steps": 40,
    }
    assert drawn._configuration(run, found, "penalty-seed1") == whole
    nothing = dict.fromkeys(("reward_parameters", "training_s", "steps")) | {"hardware": ""}
    assert drawn._configuration(run, seen(), "penalty-seed1") == whole | nothing
    both = drawn.hardware(["a", "b", "b"], "cpu")
    assert both == "CPU (a) and CPU (b), 2 processes"


def test_the_penalty_is_told_as_the_policy_had_it() -> None:
    penalty = {"kind": "hinge", "alpha": 0.3, "alpha_unit": "reward_sd", "clamp": 2.5}
    run: Any = SimpleNamespace(
        config=reference_config(penalty=penalty | {"tau": None, "tau_quantile": 0.7})
    )
    entries = [{"latent": 5, "tau": 1.5, "alpha": 0.25}, {"latent": 6, "tau": 2.5, "alpha": 0.5}]
    found = features(
        harming=[feature(i, "harming") for i in (5, 6, 7)],
        penalised=[e | {"confirmed": True, "tau": 9.0} for e in entries[:1]],
        monitors=[],
    )
    told = drawn._penalty(
        run, seen(features=found, calibrations={"p": {"penalised": entries}}), "p"
    )
    config = run.config.ppo.penalty
    assert told == {
        "kind": "hinge",
        "has_tau": True,
        "words": config.words,
        "latents": [5, 6],
        "taus": [1.5, 2.5],
        "alphas": [0.25, 0.5],
        "top_harming": True,
        "tau_quantile": 0.7,
        "alpha_in_reward_sd": 0.3,
        "clamp": 2.5,
    }
    selected = drawn._penalty(run, seen(features=found), "p")
    assert (selected["latents"], selected["taus"], selected["alphas"]) == ([5], [9.0], [0.25])
    other = drawn._penalty(
        run, seen(features=found, calibrations={"p": {"penalised": entries[::-1]}}), "p"
    )
    assert other["top_harming"] is False
    none = drawn._penalty(
        SimpleNamespace(config=reference_config(penalty={"alpha_unit": "reward"})), seen(), "p"
    )  # type: ignore[arg-type]
    assert (none["latents"], none["top_harming"], none["alpha_in_reward_sd"]) == ([], False, None)


TRAINED = pd.DataFrame(
    {
        "policy": ["p"] * 4 + ["q"],
        "arm": ["penalty"] * 4 + ["base"],
        "step": [1, 2, 3, 4, 1],
        "objective/compound": [1.0, 2.0, 3.0, 4.0, 9.0],
        "objective/penalty": [0.5, math.nan, 0.25, 0.125, 9.0],
    }
)


def test_the_progression_is_of_one_policy_and_names_what_is_not_known() -> None:
    assert drawn._column(TRAINED, "p", "objective/compound") == [[1, 1], [2, 2], [3, 3], [4, 4]]
    assert drawn._column(TRAINED, "q", "objective/penalty") == [[1.0, 9.0]]
    assert drawn._column(TRAINED, "p", "loss/total") == []
    found = drawn._progression(TRAINED, "p")
    assert [row["step"] for row in found] == drawn.shown_steps([1, 2, 3, 4]) == [1, 2, 3, 4]
    assert [row["reward"] for row in found] == [1, 2, 3, 4]
    assert [row["penalty"] for row in found if row["step"] != 2] == [0.5, 0.25, 0.125]
    assert math.isnan(found[1]["penalty"]) and all(math.isnan(row["loss"]) for row in found)
    assert drawn._progression(TRAINED, "r") == []


def test_shown_steps_by_hand() -> None:
    assert drawn.shown_steps(range(1, 51)) == [5, 15, 25, 35, 45, 50]
    assert drawn.shown_steps([10, 20, 30, 100]) == [10, 30, 100]
    assert drawn.shown_steps([1]) == [1] and drawn.shown_steps([1, 2]) == [1, 2]
    assert drawn.shown_steps([4, 6, 12]) == [4, 6, 12], "of two as near the earlier"


def test_what_is_missing_and_every_unit_are_told_by_row() -> None:
    run: Any = SimpleNamespace(config=reference_config())
    phases = pd.DataFrame(
        {
            "phase": ["fetch", "ppo"],
            "unit": ["all", "p"],
            "status": ["done", "failed"],
            "cause": ["", "error: x"],
            "log": ["", "l"],
            "started": ["a", None],
            "ended": ["b", None],
            "seconds": [1.5, math.nan],
            "device": ["cpu", None],
            "host": ["n1", None],
            "needs": [["x"], []],
        }
    )
    assert drawn._failures(run, phases) == [
        {"phase": "ppo", "unit": "p", "status": "failed", "cause": "error: x", "log": "l"}
    ]
    assert drawn._phases(phases) == [
        {
            "phase": "fetch",
            "unit": "all",
            "status": "done",
            "started": "a",
            "ended": "b",
            "seconds": 1.5,
            "device": "cpu",
            "host": "n1",
            "needs": ["x"],
        },
        {
            "phase": "ppo",
            "unit": "p",
            "status": "failed",
            **dict.fromkeys(("started", "ended", "seconds", "device", "host")),
            "needs": [],
        },
    ]


def test_training_is_told_by_its_last_tenth() -> None:
    n = 25
    steps = np.arange(1, n + 1)
    long = pd.DataFrame({"policy": "random-seed0", "arm": "random", "step": steps})
    for i, name in enumerate(("scores", "penalty", "kl")):
        long[f"objective/{name}"] = steps * 10.0**i
    long["loss/total"], long["tokens_per_s"] = -1.0 * steps, steps / 2
    short = pd.DataFrame({"policy": "penalty-seed0", "arm": "penalty", "step": [1, 2]})
    short["objective/scores"] = [1.0, 3.0]
    more = {"training_s": 60.0, "ended_early": "why", "parent": "x"}
    table = pd.concat([long, short], ignore_index=True)
    found = drawn._training(
        seen(training=table, manifests={("ppo", "random-seed0"): manifest(**more)})
    )
    assert [row["policy"] for row in found] == ["penalty-seed0", "random-seed0"]
    assert found[1] == {
        "policy": "random-seed0",
        "arm": "random",
        "steps": 25,
        **more,
        "reward": 24.5,
        "penalty": 245.0,
        "kl": 2450.0,
        "loss": -24.5,
        "tokens_per_s": 12.25,
    }
    assert (found[0]["steps"], found[0]["reward"], found[0]["training_s"]) == (2, 3.0, None)


def test_a_latent_s_rows_are_by_arm_kind_and_seed() -> None:
    table = pd.DataFrame(
        {
            "arm": ["base", "random", "random", "random", "base", "penalty"],
            "seed": [-1, 0, 1, 1, -1, 0],
            "kind": ["unsafe"] * 4 + ["safe"] * 2,
            "z_7": [2.0, 1.0, 3.0, 2.5, 0.0, math.nan],
            "below_7": [0.0, 2.5, 0.0, 2.1, 3.0, 0.0],
            "z_8": [1.0] * 6,
        }
    )
    entries = [
        {"latent": 7, "tau": 2.0, "seeds": [1]},
        {"latent": 8, "tau": 0.0},
        {"latent": 9, "tau": 1.0},
    ]
    rows = drawn.latent_table(table, entries).to_dict("records")
    first = {"latent": 7, "tau": 2.0}
    none = [0.0] * 6
    expected = [
        first
        | {
            "arm": "base",
            "kind": "unsafe",
            "n": 1,
            "rate": 0.0,
            "below_cutoff": 0.0,
            "mean_z": 2.0,
        },
        first
        | {
            "arm": "random",
            "kind": "unsafe",
            "n": 2,
            "rate": 1.0,
            "below_cutoff": 0.5,
            "mean_z": 2.75,
        },
        first
        | {"arm": "base", "kind": "safe", "n": 1, "rate": 0.0, "below_cutoff": 1.0, "mean_z": 0.0},
    ]
    bins = [none.copy(), none.copy(), none.copy()]
    bins[0][3], bins[1][4], bins[2][0] = 1.0, 1.0, 1.0
    mine = [row for row in rows if row["latent"] == 7]
    assert [row.pop("histogram") for row in mine] == bins
    assert [row.pop("seeds") for row in mine] == [None, [1], None]
    assert mine == expected
    other = [row for row in rows if row["latent"] == 8]
    assert [(row["arm"], row["kind"], row["n"]) for row in other] == [
        ("base", "unsafe", 1),
        ("random", "unsafe", 3),
        ("base", "safe", 1),
        ("penalty", "safe", 1),
    ]
    assert all(row["rate"] == 1.0 and math.isnan(row["below_cutoff"]) for row in other)
    assert len(rows) == 7 and drawn.latent_table(table[:0], entries).empty
    assert drawn.histogram(np.array([0.5, 1.0, 1.8, 2.0, 3.0, 3.1]), 2.0) == [
        0,
        2 / 6,
        1 / 6,
        1 / 6,
        1 / 6,
        1 / 6,
    ]


# Provenance


def made(files: dict[str, int], commit: str = "g", **more: Any) -> Any:
    """A manifest of files of so many bytes, each under a name of its own on disk."""
    outputs = {
        name: SimpleNamespace(file=f"a/{name}", sha256=f"sha of {name}", bytes=n)
        for name, n in files.items()
    }
    return SimpleNamespace(outputs=outputs, git_commit=commit, image_sha256=f"i{commit}", more=more)


def test_where_every_section_comes_from() -> None:
    phases = pd.DataFrame(
        {
            "phase": ["evaluate", "evaluate", "select"],
            "unit": ["base", "penalty-seed1", "all"],
            "manifest_sha256": ["m1", "m2", "m3"],
        }
    )
    manifests = {
        ("evaluate", "base"): made({"generations.parquet": 1, "summary.json": 2}, "c1"),
        ("evaluate", "penalty-seed1"): made({"summary.json": 2}, "c2"),
        ("select", "all"): made({"features.json": 3, "more.json": 4}, "c3"),
    }
    found = provenance.sources(SimpleNamespace(phases=phases, manifests=manifests))  # type: ignore[arg-type]

    def file(phase: str, unit: str, name: str, n: int) -> dict[str, str]:
        return {
            "file": f"{phase}/{unit}/a/{name}",
            "sha256": f"sha of {name}",
            "manifest_sha256": f"m{n}",
            "git_commit": f"c{n}",
            "image_sha256": f"ic{n}",
        }

    base = file("evaluate", "base", "generations.parquet", 1)
    summaries = [
        file("evaluate", *of)
        for of in (("base", "summary.json", 1), ("penalty-seed1", "summary.json", 2))
    ]
    alone = {key: [base] for key in ("changes", "verdict", "latents", "samples", "sweep")}
    features_ = [file("select", "all", "features.json", 3)]
    assert found == {
        "evaluation": [base, *summaries],
        "distances": [base, *summaries],
        **alone,
        "steered": summaries,
        "features": features_,
        "rankings": features_,
        **{key: [] for key in ("training", "cards", "opened", "calibration", "steering")},
    }


def test_commits_are_told_once_of_what_came_from_a_repository() -> None:
    def model(name: str, revision: Any = "main", commit: Any = "c") -> dict[str, Any]:
        return {"model": name, "revision": revision, "commit": commit}

    file = {"repo": "o/d", "revision": "r", "commit": "e"}
    models = {
        "policy": model("o/p"),
        "sarm": model("o/p"),
        "judge": model("o/j", None),
        "local": model("", "main"),
        "other": model("o/x", commit=None),
        "detector": None,
        "data": {"files": {"a": [file, file], "b": [file | {"repo": "o/e"}]}},
    }
    assert provenance.commits_of(models) == [
        {"repository": "o/p", "revision": "main", "commit": "c"},
        {"repository": "o/d", "revision": "r", "commit": "e"},
        {"repository": "o/e", "revision": "r", "commit": "e"},
    ]
    assert provenance.commits_of({}) == []


def test_what_two_runs_must_share() -> None:
    config = reference_config(seeds=[4])
    sarm = config.sarm.model_copy(update={"revision": "r1", "max_length": 77})
    policy = config.policy.model_copy(update={"revision": "r2"})
    config = config.model_copy(update={"sarm": sarm, "policy": policy, "seed": 5})
    run: Any = SimpleNamespace(config=config)
    models = {
        "sarm": {"sha256": {"a": "1"}},
        "policy": {"sha256": {"b": "2"}},
        "data": {"files": {"rb2": [{"sha256": "z"}, {"sha256": "y"}]}},
    }
    found = provenance.comparable(run, SimpleNamespace(models=models))  # type: ignore[arg-type]
    assert found == {
        "reward model": {
            "model": "Schrieffer/Llama-SARM-4B",
            "revision": "r1",
            "use_topk": True,
            "max_length": 77,
        },
        "reward model's files": {"a": "1"},
        "policy": {"model": "meta-llama/Llama-3.1-8B-Instruct", "revision": "r2"},
        "policy's files": {"b": "2"},
        "data split": config.data.model_dump(mode="json"),
        "data files": {"rb2": ["y", "z"]},
        "evaluation": config.evaluate.model_dump(mode="json"),
        "seed": 5,
        "verdict rules": config.verdict.model_dump(mode="json"),
    }
    json.dumps(found)
    unknown = provenance.comparable(run, SimpleNamespace(models=None))  # type: ignore[arg-type]
    none = ("reward model's files", "policy's files", "data files")
    assert unknown == found | dict.fromkeys(none)


def test_costs_are_by_phase_planned_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    run: Any = SimpleNamespace(config=reference_config())
    manifests = {
        ("ppo", "a"): made({"x": 10, "y": 5}),
        ("encode", "a"): made({"x": 1}),
        ("ppo", "b"): made({"x": 100}),
        ("cards", "all"): made({}),
    }
    models = {"data": {"pairs": {"p": 1}, "prompts": {"q": 2}}}
    seen_: Any = SimpleNamespace(manifests=manifests, models=models)
    asked: list[Any] = []

    def planned(*of: Any) -> Any:
        asked.append(of)
        return [
            SimpleNamespace(phase=phase, gpu_hours=h)
            for phase, h in (("ppo", 2.0), ("encode", 1.0), ("ppo", 0.5))
        ]

    monkeypatch.setattr(provenance, "shapes", lambda config: ("policy", "sarm"))
    monkeypatch.setattr(provenance, "counts", lambda pairs, prompts: (pairs, prompts))
    monkeypatch.setattr(provenance, "planned", planned)
    monkeypatch.setattr(provenance, "used", lambda of: {"ppo": 3.0 * (of is manifests)})

    def row(phase: str, plan: Any, used: float, n_bytes: int, units: int) -> dict[str, Any]:
        return {"phase": phase, "planned": plan, "used": used, "bytes": n_bytes, "units": units}

    assert provenance.cost(run, seen_) == [
        row("encode", 1.0, 0.0, 1, 1),
        row("cards", None, 0.0, 0, 1),
        row("ppo", 2.5, 3.0, 115, 2),
    ]
    known = ({"p": 1}, {"q": 2})
    assert asked == [(run.config, "policy", "sarm", known, provenance.REFERENCE_GPUS)]
    for shapes in ((None, "sarm"), ("policy", None)):
        monkeypatch.setattr(provenance, "shapes", lambda config, shapes=shapes: shapes)
        assert {r["planned"] for r in provenance.cost(run, seen_)} == {None}

    def too_large(*_: Any) -> Any:
        raise UserError("it does not fit")

    monkeypatch.setattr(provenance, "shapes", lambda config: ("policy", "sarm"))
    monkeypatch.setattr(provenance, "planned", too_large)
    assert {r["planned"] for r in provenance.cost(run, seen_)} == {None}


def test_what_the_report_points_to(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", reference_config())
    folder = run.folder("ppo", "p")
    (folder / "a" / "policy").mkdir(parents=True)
    names = ("policy/model-1.safetensors", "policy/model-2.safetensors")
    for name in names:
        (folder / "a" / name).touch()
    files = {names[0]: 3, names[1]: 4, "metrics.jsonl": 50}
    manifests = {
        ("ppo", "p"): made(files),
        ("probe", "s0"): made({}),
        ("probe", "s1"): made({}, location="no"),
    }

    def told() -> list[dict[str, Any]]:
        return provenance.outputs(run, SimpleNamespace(manifests=manifests), "p")  # type: ignore[arg-type]

    policy = {"path": f"{folder}/a/", "what": "PPO-trained policy model", "bytes": 7}
    probe = {"path": f"{run.path}/probe/", "what": "Phase 2 causal probe results"}
    assert told() == [policy | {"removed": False}, probe]
    (folder / "a" / names[1]).unlink()
    log = run.log("ppo", "p")
    log.parent.mkdir(exist_ok=True)
    log.touch()
    said = {"path": str(log), "what": "Full training log"}
    assert told() == [policy | {"removed": True}, probe, said]
    manifests["ppo", "p"] = made(files, location="l", training_log="t")
    manifests["steer", "all"] = made({}, location="s")
    assert told() == [
        policy | {"removed": True, "path": "l/"},
        probe,
        {"path": "s/", "what": "Steering evaluation results"},
        said | {"path": "t"},
    ]
    del manifests["ppo", "p"]
    assert told()[-1] == said and len(told()) == 3


def test_the_provenance_of_a_run_is_of_what_is_done(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", reference_config(seeds=[7, 3]))
    phases = pd.DataFrame(
        {
            "phase": ["fetch", "encode", "probe"],
            "unit": ["all", "s", "s"],
            "status": ["done", "done", "failed"],
            "cause": ["", "", "x"],
            "config_sha256": ["k"] * 3,
            "seconds": [1.0] * 3,
            "needs": [[]] * 3,
            "git_commit": ["g2", "g1", "g3"],
            "image_sha256": [None, "i1", "i3"],
            "host": ["n1", None, "n3"],
        }
    )
    found = provenance.provenance(run, SimpleNamespace(phases=phases, models=None))  # type: ignore[arg-type]
    columns = ("phase", "unit", "git_commit", "image_sha256", "host")
    rows = [("fetch", "all", "g2", None, "n1"), ("encode", "s", "g1", "i1", None)]
    assert found == {
        "folder": str(run.path),
        "config_sha256": run.config.sha256,
        "seed": run.config.seed,
        "ppo_seeds": [7, 3],
        "git_commits": ["g1", "g2"],
        "images": ["i1"],
        "commits": [],
        "units": [dict(zip(columns, row, strict=True)) for row in rows],
    }


def test_every_section_is_made_of_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each function that makes a section is replaced by one that tells what it was given."""

    class Told:
        def __init__(self, *words: Any) -> None:
            self.words = words

        def to_dict(self, orient: str) -> Any:
            return (*self.words, orient)

    def telling(name: str) -> Any:
        return lambda *given: (name, *given)

    names = (
        "_configuration cost seed_figures _penalty _progression _column _cards outputs"
        " texts_figures _failures _phases _training compared_figures distance_rows against_base"
        " answered_rates refusal_reward penalised_latents random_entries monitor_latents"
        " random_sets monitor_choice rule_words provenance sources comparable rungs"
    ).split()
    for name in names:
        monkeypatch.setattr(drawn, name, telling(name))
    for name in ("policy_table", "latent_table"):
        monkeypatch.setattr(drawn, name, lambda *given, name=name: Told(name, *given))
    given: list[Any] = []
    monkeypatch.setattr(drawn, "abstract", lambda *of: given.append(of) or "abstract")
    run: Any = SimpleNamespace(config=reference_config(seeds=[4, 2]))
    config, policy, verdict = run.config, "penalty-seed4", {"word": "control"}
    columns = "training steering cards steered phases generations evaluations".split()
    record = SimpleNamespace(tree=lambda: "a tree")
    read: Any = SimpleNamespace(
        **{name: f"the {name}" for name in columns},
        features=record,
        readings=None,
        check_sarm="the check",
    )
    found = drawn.figures(run, read, verdict, "today")
    progression = ("_progression", "the training", policy)
    generations = "the generations"

    def latents(name: str, *of: Any) -> Any:
        return ("latent_table", generations, (name, *of), "records")

    expected = {
        "date": "today",
        "run": "reference",
        "configuration": ("_configuration", run, read, policy),
        "features": "a tree",
        "readings": None,
        "check_sarm": "the check",
        "has_card": config.check_sarm.card is not None,
        "cost": ("cost", run, read),
        "seed": ("seed_figures", run, read, progression),
        "penalty": ("_penalty", run, read, policy),
        "shown_policy": policy,
        "progression": progression,
        "penalties": ("_column", "the training", policy, "objective/penalty"),
        "compound_rewards": ("_column", "the training", policy, "objective/compound"),
        "steering": "the steering",
        "cards": ("_cards", "the cards"),
        "steered": "the steered",
        "outputs": ("outputs", run, read, policy),
        "texts": ("texts_figures", config),
        "failures": ("_failures", run, "the phases"),
        "phases": ("_phases", "the phases"),
        "training": ("_training", read),
        "compared": ("compared_figures", run, read),
        "distances": ("distance_rows", run, read),
        "policies": ("policy_table", generations, "records"),
        "against_base": ("against_base", generations),
        "answered": ("answered_rates", generations),
        "refusal_reward": ("refusal_reward", generations),
        "latents": latents("penalised_latents", run, record),
        "random_latents": latents("random_entries", run, read),
        "monitors": latents("monitor_latents", record),
        "random_sets": ("random_sets", run, read),
        "monitor_choice": ("monitor_choice", run, read),
        "evaluations": "the evaluations",
        "verdict": verdict,
        "rule": ["rule_words", config.verdict],
        "provenance": ("provenance", run, read),
        "sources": ("sources", read),
        "comparable": ("comparable", run, read),
    }
    assert given == [(expected, config.verdict)]
    ladder = ("rungs", verdict, config.verdict)
    assert found == expected | {"abstract": "abstract", "ladder": ladder}
    read.features, read.readings = None, record
    again = drawn.figures(run, read, verdict, "today")
    assert (again["features"], again["readings"]) == (None, "a tree")


def test_an_output_that_cannot_be_read_marks_its_unit_alone(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", reference_config())

    def path(name: str) -> Path:
        raise UserError(f"{name} is\n  not whole")

    done = {"unit": "all", "status": "done", "cause": ""}
    rows = [{"phase": phase, **done} for phase in ("select", "probe")]
    published: Any = {
        (row["phase"], "all"): SimpleNamespace(manifest=made({}, row["phase"]), path=path)
        for row in rows
    }
    read = frames._read_outputs(pd.DataFrame(rows), published, run)
    damaged = {"status": "damaged", "cause": "features.json is not whole"}
    assert read.phases.to_dict("records") == [rows[0] | damaged, rows[1]]
    assert read.manifests == {("probe", "all"): published["probe", "all"].manifest}
    for table in (read.generations, read.sweep):
        assert "index" not in table and table.empty
