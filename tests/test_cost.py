"""What a run is planned to cost, against sums by hand, and what it has cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sarm.config import ROOT, Config, UserError, load_config
from sarm.cost import (
    EXAMPLES_S,
    MODEL_S_BYTE,
    REFERENCE_GPUS,
    START_S,
    Counts,
    counts,
    evaluated,
    planned,
    refuse_beyond,
    shapes,
    table,
    used,
    wall_seconds,
)
from sarm.ppo.learner.memory_plan import Gpus, make_plan
from sarm.records import Manifest
from sarm.run import RunDir
from slurm.cost import check_limit
from slurm.profile import Profile
from tests.fakes.site import Site

DATA = Counts(texts=2000, validation=512, policy_eval=300, known=True)


def reference(*overrides: str) -> Config:
    return load_config(ROOT / "configs" / "llama31-8b.yaml", overrides)


def costs(config: Config, data: Counts = DATA) -> dict[tuple[str, str], Any]:
    policy, sarm = shapes(config)
    assert policy is not None and sarm is not None
    found = planned(config, policy, sarm, data, REFERENCE_GPUS)
    return {(cost.phase, cost.arm): cost for cost in found}


def test_the_reference_run_by_hand() -> None:
    config = reference("encode.shards=5", "ppo.seeds=[0, 1, 2]", "ppo.kl_distances=[1.0, 2.0]")
    found = costs(config)
    # a Llama layer of 8B has 218,112,000 weights; sixteen of them, two FLOP each, at 500 TFLOP/s
    token_s = 2 * 16 * 218_112_000 / 500e12
    # 18 s of Python, and 1.7 s a GB of models: the SARM's first layers and embedding in bf16, its
    # encoder and two biases a latent in float32
    sarm_gb = (2 * (16 * 218_112_000 + 128_256 * 4096) + 4 * 65_536 * 4098) / 1e9
    sarm_s, policy_s = 1.7 * sarm_gb, 1.7 * 2 * 8.030261248
    encode = found["encode", ""]
    assert encode.seconds == pytest.approx(18 + sarm_s + 2000 * 400 * token_s / 5, rel=1e-3)
    assert encode.gpu_hours == pytest.approx(5 * encode.seconds / 3600)
    # two c, twice 256 texts, over sixteen shards
    assert found["probe", ""].seconds == pytest.approx(18 + sarm_s + 2 * 0.85 * 2 / 16, rel=1e-3)
    check_s = 18 + sarm_s + 8977 * 400 * token_s
    assert found["check_sarm", ""].seconds == pytest.approx(check_s, rel=1e-3)
    policy, sarm = shapes(config)
    assert policy is not None and sarm is not None
    step_s = make_plan(config.ppo, policy, sarm.bytes, Gpus(4, 80)).train_s
    # every token reads the weights, and of 8 rows the keys and values of 512 + 64 positions
    weights, of_row = 2 * 8_030_261_248, (512 + 64) * 131_072
    small, read_s = 32 * 24e-6 + 1e-4, 2 * 32 * 218_112_000 * 512 / 560e12
    step_s += 128 * ((weights + 8 * of_row) / 2.94e12 + small) + 8 * (read_s + 640 * token_s)
    ppo = found["ppo", "penalty"]
    assert (ppo.jobs, ppo.gpus) == (3, 4)
    # opened twice, saved and opened for trial, saved and opened at the end, kept at two distances
    assert ppo.seconds == pytest.approx(18 + sarm_s + 8 * policy_s + 100 * step_s, rel=1e-3)
    # 300 responses in three waves of up to 128, and twice over the policy at 560 TFLOP/s
    once = 3 * 128 * ((weights + 128 * of_row) / 2.94e12 + small)
    once += 300 * (read_s + 640 * token_s)
    once += 2 * 2 * 8_030_261_248 * 300 * 640 / 560e12
    base_s = 18 + 28 + sarm_s + policy_s + once
    assert found["evaluate", "base"].seconds == pytest.approx(base_s, rel=1e-3)
    # three policies, and the base beside them
    penalty_s = 18 + 28 + sarm_s + 4 * policy_s + 3 * once
    assert found["evaluate", "penalty"].seconds == pytest.approx(penalty_s, rel=1e-3)


def test_every_unit_that_takes_a_gpu_is_planned() -> None:
    config = reference(
        "evaluate.arms=[prompted, best_of_n]",
        "ppo.seeds=[3, 4]",
        "sweep.tau=[1.0]",
        "sweep.alpha=[0.1, 0.2]",
        "steer.policy={}",
    )
    found = costs(config)
    for phase in ("check_sarm", "encode", "probe", "calibrate", "ppo", "evaluate"):
        jobs = sum(cost.jobs for (of, _), cost in found.items() if of == phase)
        assert jobs == len(config.units(phase)), phase  # type: ignore[arg-type]
    assert sum(evaluated(config).values()) == len(config.units("evaluate"))
    assert ("check_sarm", "") not in costs(reference("check_sarm.card=null"))


def test_wall_time_counts_what_runs_side_by_side_once() -> None:
    found = list(costs(reference()).values())
    of = {(c.phase, c.arm): c.seconds for c in found}
    beside = max(of["check_sarm", ""], of["encode", ""])
    longest = max(s for (phase, _), s in of.items() if phase == "evaluate")
    chain = beside + of["probe", ""] + of["calibrate", ""] + of["ppo", "penalty"] + longest
    assert wall_seconds(found, 32e9) == pytest.approx(chain + 60 + 180 + 60 + 320)


def test_counts_are_fetchs_by_part() -> None:
    pairs = {"a/discovery": 5, "b/validation": 7, "b/test": 11, "a/sarm_train": 100}
    prompts = {"a/policy_eval": 3, "b/policy_eval": 4, "a/ppo": 9}
    assert counts(pairs, prompts) == (46, 14, 7, True)
    assert not counts(None, None).known


def test_policies_that_are_asked_nothing_take_their_start_alone() -> None:
    config = reference()
    policy, sarm = shapes(config)
    assert policy is not None and sarm is not None
    costs = planned(config, policy, sarm, counts({}, {}), REFERENCE_GPUS)
    opened = sarm.bytes + 2 * policy.parameters * np.array([1, 2])  # the base beside a trained one
    expected = START_S + EXAMPLES_S + MODEL_S_BYTE * opened
    found = {c.seconds for c in costs if c.phase == "evaluate"}
    assert sorted(found) == pytest.approx(sorted(expected))


def test_a_plan_beyond_the_limit_is_refused_with_what_takes_most() -> None:
    found = list(costs(reference("limits.gpu_hours=0.5")).values())
    with pytest.raises(UserError, match=r"planned to take 1\.\d GPU-hours.*is 0\.5; most of it is"):
        refuse_beyond(reference("limits.gpu_hours=0.5"), found)
    refuse_beyond(reference("limits.gpu_hours=50"), found)
    refuse_beyond(reference("limits.gpu_hours=null"), found)


def test_a_submission_beyond_the_limit_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    profile = Profile(description="x")
    run = RunDir(tmp_path / "run", reference("limits.gpu_hours=0.5"))
    with pytest.raises(UserError, match=r"limits\.gpu_hours is 0\.5"):
        check_limit(run.config, profile, run)
    assert not run.path.exists()
    check_limit(reference(), profile, run)


def test_a_limit_on_models_that_nobody_knows_is_not_passed_over(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.submit("limits.gpu_hours=5", "--dry-run") == 2
    assert "not known before make fetch has brought its models" in capsys.readouterr().err


def test_both_shipped_configs_are_within_their_limits() -> None:
    for name in ("llama31-8b", "llama31-8b-study"):
        config = load_config(ROOT / "configs" / f"{name}.yaml")
        policy, sarm = shapes(config)
        assert policy is not None and sarm is not None and config.limits.gpu_hours
        assumed = counts(None, None)
        refuse_beyond(config, planned(config, policy, sarm, assumed, REFERENCE_GPUS))
        assert "GPU-hours" in table(config, REFERENCE_GPUS).splitlines()[-2]


def manifest(device: str, minutes: int, **more: Any) -> Manifest:
    values: dict[str, Any] = {
        "phase": "ppo",
        "unit": "u",
        "attempt": "a",
        "config_sha256": "",
        "inputs": {},
        "outputs": {},
        "range": None,
        "total": None,
        "git_commit": None,
        "image_sha256": None,
        "image_commit": None,
        "job_id": None,
        "seed": 0,
        "host": "h",
        "device": device,
        "started": "2026-01-01T10:00:00+00:00",
        "ended": f"2026-01-01T10:{minutes:02d}:00+00:00",
    }
    return Manifest(**values, **more)


def test_what_was_used_counts_every_rank_of_a_gpu_and_no_cpu() -> None:
    made = {
        ("ppo", "a"): manifest("cuda:0", 30, ranks=4),
        ("ppo", "b"): manifest("cuda:0", 15, ranks=4),
        ("encode", "0"): manifest("cuda:0", 12),
        ("report", "all"): manifest("cpu", 59),
    }
    assert used(made) == pytest.approx({"ppo": 3.0, "encode": 0.2, "report": 0.0})
