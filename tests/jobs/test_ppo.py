"""The ppo job as a process: stopped by a signal it can be started again, and publishes what the
contract says.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.ppo import STOPPED
from sarm.config import ROOT
from sarm.records import RatedLatent
from sarm.run import RunDir
from tests.runs import features, publish, readings
from tests.tiny import tiny_config

UNIT = "random-seed0"


def test_each_arm_is_charged_for_its_own_latents_alone() -> None:
    from jobs.ppo import arm_penalty, reward_of
    from tests.ranks import PlantedReward

    reward = PlantedReward(alpha=0.7, worth=0.2)
    random = [rated(1, 0.02, 0.3, 0.4)]
    found = readings(features(), penalised=[rated(0, 0.5, 0.7, 0.6)], random={"0": random})
    # Latent 0 fires on an e; latent 1 is the length over 100.
    said = [[{"role": "assistant", "content": text}] for text in ("yes", "no", "well")]
    paid = {
        arm: reward_of(arm, reward, random).score(said).penalty.tolist()
        for arm in ("penalty", "no_penalty", "random")
    }
    assert paid["penalty"] == pytest.approx([0.7, 0.0, 0.7])
    assert paid["no_penalty"] == [0.0, 0.0, 0.0]
    assert paid["random"] == pytest.approx([0.3, 0.0, 0.3])

    rates = {}
    for arm in paid:
        published = arm_penalty(arm, reward_of(arm, reward, random), found)
        rates[arm] = [(p["latent"], p["alpha"], p["base_rate"]) for p in published.penalised]
        assert [(h["latent"], h["base_rate"]) for h in published.harming] == [(0, 0.6)]
    assert rates == {
        "penalty": [(0, 0.7, 0.6)],
        "no_penalty": [(0, 0.0, 0.6)],
        "random": [(1, 0.3, 0.4)],
    }


def rated(latent: int, tau: float, alpha: float, base_rate: float) -> RatedLatent:
    return RatedLatent(
        latent=latent, tau=tau, alpha=alpha, role="x", confirmed=False, base_rate=base_rate
    )


def a_run(tmp_path: Path, log_to: str = "tensorboard") -> RunDir:
    """Select's and calibrate's output, made up, and nothing else."""
    run = RunDir.create(
        tmp_path / "run",
        tiny_config(tmp_path, **{"ppo.steps": 40, "ppo.checkpoint_every": 5, "ppo.log_to": log_to}),
    )
    found = features(
        penalised=[
            {"latent": 1, "tau": 0.5, "alpha": 0.1},
            {"latent": 7, "tau": 0.2, "alpha": 0.1},
        ],
        monitors=[3, 4],
        reward_sd=1.0,
        reference_rates={"1": 0.1, "7": 0.2},
    )
    publish(run, "select", files={"features.json": found})
    random = {"0": [rated(10, 0.1, 0.1, 0.25), rated(20, 0.3, 0.1, 0.5)]}
    changes = {"n_prompts": 4, "samples": 2, "random": random}
    publish(run, "calibrate", files={"readings.json": readings(found, **changes)})
    return run


def start(run: RunDir) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jobs", "ppo", "--run", str(run.path), "--unit", UNIT]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_stopped_by_a_signal_it_goes_on_where_it_was(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    folder = run.folder("ppo", UNIT)
    process = start(run)
    while process.poll() is None and not any(
        file.stat().st_size for file in folder.glob("metrics.*.jsonl")
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == STOPPED
    assert len(list((folder / "checkpoints").iterdir())) == 1
    assert run.manifest("ppo", UNIT) is None

    assert start(run).wait(120) == 0
    published = run.read("ppo", UNIT)
    lines = [json.loads(line) for line in published.path("metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(40))
    names = {
        "objective/kl",
        "objective/scores",
        "objective/penalty",
        "objective/compound",
        "objective/rlhf_reward",
        "loss/policy_avg",
        "loss/value_avg",
        "loss/total",
    }
    names |= {
        "rate/1",
        "rate/7",
        "z/1",
        "z/3",
        "time/rollout",
        "time/score",
        "time/forward",
        "time/update",
        "tokens_per_s",
        "val/explained_variance",
    }
    assert names <= lines[0].keys()
    assert any((folder / "tensorboard").iterdir())
    calibration = published.json("calibration.json")
    assert calibration["arm"] == "random" and calibration["n"] == 8
    assert [
        (p["latent"], p["tau"], p["alpha"], p["base_rate"]) for p in calibration["penalised"]
    ] == [(10, 0.1, 0.1, 0.25), (20, 0.3, 0.1, 0.5)]
    assert [h["latent"] for h in calibration["harming"]] == [1, 7]
    manifest = published.manifest.more
    assert (
        manifest["steps"] == 40
        and manifest["ranks"] == 1
        and manifest["training_s"] > 0
        and len(manifest["device_names"]) == 1
    )
    policy = published.directory("policy")
    assert str(AutoModelForCausalLM.from_pretrained(policy).dtype) == "torch.bfloat16"
    assert AutoTokenizer.from_pretrained(policy).chat_template
    assert not (folder / "checkpoints").exists()
