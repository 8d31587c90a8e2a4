"""The ppo job as a process: stopped by a signal it can be started again, and publishes what the
contract says.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.__main__ import run_unit
from jobs.ppo import STOPPED
from sarm.config import UserError, parse_config, set_key
from sarm.config.reads import changed as changed_keys
from sarm.evaluation.verdict import rule_sha256
from sarm.records import KeptPolicies, RatedLatent, read_training_log
from sarm.run import RunDir
from tests.ranks import PlantedReward, join_ranks, start_job
from tests.runs import features, publish, readings
from tests.test_models import template
from tests.tiny import tiny_config

UNIT = "random-seed0"


def test_each_arm_is_charged_for_its_own_latents_alone() -> None:
    from jobs.ppo import arm_penalty, reward_of

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


def a_run(tmp_path: Path, name: str = "run", **settings: Any) -> RunDir:
    """Select's and calibrate's output, made up, and nothing else."""
    standard = {"ppo.steps": 40, "ppo.checkpoint_every": 5, "ppo.log_to": "tensorboard"}
    run = RunDir.create(tmp_path / name, tiny_config(tmp_path, **standard | settings))
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


def start(run: RunDir) -> BaseProcess:
    return start_job("ppo", "--run", str(run.path), "--unit", UNIT)


def test_stopped_by_a_signal_it_goes_on_where_it_was(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    folder = run.folder("ppo", UNIT)
    process = start(run)
    while process.is_alive() and not any(
        file.stat().st_size for file in folder.glob("metrics.*.jsonl")
    ):
        time.sleep(0.05)
    process.terminate()
    join_ranks([process], expect=STOPPED)
    assert len(list((folder / "checkpoints").iterdir())) == 1
    assert run.manifest("ppo", UNIT) is None

    join_ranks([start(run)])
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


# --- seen while it trains
# ------------------------------------------------------------------------------------------------


def logged(run: RunDir, name: str) -> list[dict[str, Any]]:
    """Without what a clock says."""
    lines = [json.loads(line) for line in run.read("ppo", UNIT).path(name).read_text().splitlines()]
    timed = ("time/", "gpu/", "eps", "tokens_per_s", "response_tokens_per_s")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


def test_held_out_evaluation_changes_nothing_and_survives_interruptions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"ppo.steps": 7, "ppo.checkpoint_every": 2, "ppo.log_to": "none"}
    held_out = {"every": 3, "prompts": 5, "completions": 2}
    without = a_run(tmp_path, "without", **settings)
    seen = a_run(tmp_path, "seen", **settings | {"ppo.held_out": held_out})
    resumed = a_run(tmp_path, "resumed", **settings | {"ppo.held_out": held_out})
    train(without, monkeypatch)
    train(seen, monkeypatch)
    train(resumed, monkeypatch, stops=(3, 2))
    weights = "policy/model.safetensors"
    made = without.read("ppo", UNIT).manifest
    assert "held_out.jsonl" not in made.outputs and made.more["held_out"] is None
    for run in (seen, resumed):
        manifest = run.read("ppo", UNIT).manifest
        assert logged(run, "metrics.jsonl") == logged(without, "metrics.jsonl")
        assert manifest.outputs[weights].sha256 == made.outputs[weights].sha256
        assert manifest.more["held_out"] == {
            "unsafe": {"part": "validation", "prompts": 5},
            "safe": {"part": "policy_eval", "prompts": 5},
        }
    lines, completions = logged(seen, "held_out.jsonl"), logged(seen, "completions.jsonl")
    assert [line["step"] for line in lines] == [0, 3, 6, 7]
    assert abs(lines[0]["held_out/kl"]) < 1e-4 < abs(lines[-1]["held_out/kl"])
    names = {f"held_out/{name}" for name in ("reward", "penalty", "length", "refused/safe")}
    names |= {f"held_out/rate/{latent}/unsafe" for latent in (1, 7)}
    assert names <= lines[0].keys()
    assert [(c["step"], c["kind"]) for c in completions] == [
        (step, kind) for step in (0, 3, 6, 7) for kind in ("unsafe", "unsafe", "safe", "safe")
    ]
    assert len({c["response"] for c in completions}) > 4
    assert logged(resumed, "held_out.jsonl") == lines
    assert logged(resumed, "completions.jsonl") == completions


# --- what is looked at and not depended on


def under(run: RunDir, **settings: Any) -> RunDir:
    """The run, its config changed."""
    tree = run.config.model_dump(mode="json")
    for dotted, value in settings.items():
        set_key(tree, f"{dotted}={json.dumps(value)}")
    return RunDir.create(run.path, parse_config(tree, "changed"))


def test_the_rule_noted_is_that_of_the_first_step_and_another_one_redoes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path, **{"ppo.steps": 3, "ppo.log_to": "none"})
    stood = rule_sha256(run.config)
    with monkeypatch.context() as patch:
        stopping_after(patch, 2)
        with pytest.raises(SystemExit):
            run_unit(run, "ppo", UNIT)
    # between two tries, when two steps can be looked at
    changed = under(run, **{"verdict.over_refusal_margin": 0.06})
    run_unit(changed, "ppo", UNIT)
    made = changed.read("ppo", UNIT).manifest
    assert made.more["rule_sha256"] == stood != rule_sha256(changed.config)
    assert made.more["steps"] == 3
    again = under(changed, **{"verdict.delta": 0.07, "evaluate.samples": 3, "seed": 5})
    assert changed_keys("ppo", made.config, again.config) == []


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("evaluate.refusal_labels", "no/such.jsonl", "evaluate.refusal_labels: there is no file"),
        ("evaluate.arms", ["prompted"], "leaves system messages out"),
    ],
)
def test_what_evaluate_would_refuse_is_refused_before_training_though_fetch_was_done_before(
    tmp_path: Path, key: str, value: Any, says: str
) -> None:
    run = a_run(tmp_path)
    template(tmp_path / "models" / "policy", "system")
    run_unit(run, "fetch", "all")
    planned = under(run, **{key: value})
    assert planned.done("fetch")
    with pytest.raises(UserError, match=says):
        run_unit(planned, "ppo", UNIT)


# --- policies kept at KL distances
# ------------------------------------------------------------------------------------------------

KEEPING = {
    "ppo.steps": 12,
    "ppo.checkpoint_every": 50,
    "ppo.learning_rate": 0.03,
    "ppo.kl_distances": [0.05, 0.3, 1.0, 500.0],
    "ppo.log_to": "none",
}


def stopping_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The next job is asked to stop at the end of that many steps."""
    asked = iter([False] * (steps - 1) + [True])

    @contextmanager
    def signals() -> Iterator[Callable[[], bool]]:
        yield lambda: next(asked)

    monkeypatch.setattr("jobs.ppo.stop_signals", signals)


def train(run: RunDir, monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...] = ()) -> None:
    """To the end, with interruptions."""
    for steps in stops:
        with monkeypatch.context() as patch:
            stopping_after(patch, steps)
            with pytest.raises(SystemExit):
                run_unit(run, "ppo", UNIT)
    run_unit(run, "ppo", UNIT)


def kept_of(run: RunDir) -> dict[float, tuple[int, float, dict[str, str]]]:
    """By distance: step, KL and the files' hashes."""
    published = run.read("ppo", UNIT)
    found = {}
    for entry in KeptPolicies.read(published.path("kept.json")).kept:
        published.directory(entry.path)
        inside = published.manifest.outputs.items()
        files = {n: o.sha256 for n, o in inside if n.startswith(entry.path + "/")}
        found[entry.distance] = (entry.step, entry.kl, files)
    return found


def test_a_policy_is_kept_when_the_mean_kl_of_five_steps_first_reaches_a_distance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path, "whole", **KEEPING)
    train(run, monkeypatch)
    published = run.read("ppo", UNIT)
    kls = [line["objective/kl"] for line in read_training_log(published.path("metrics.jsonl"))]
    means = {step: sum(kls[step - 5 : step]) / 5 for step in range(5, 13)}
    expected = {
        distance: min(step for step, mean in means.items() if mean >= distance)
        for distance in KEEPING["ppo.kl_distances"][:3]
    }
    kept = kept_of(run)
    assert {distance: step for distance, (step, *_) in kept.items()} == expected
    assert len(set(expected.values())) > 1 and max(expected.values()) < 12
    weights = []
    for distance, (step, kl, files) in kept.items():
        assert kl == pytest.approx(means[step], rel=1e-9)
        weights.append(files[f"kept/kl-{distance}/model.safetensors"])
    assert len(set(weights)) == len(set(expected.values()))
    assert published.manifest.outputs["policy/model.safetensors"].sha256 not in weights
    folder = published.directory("kept/kl-0.05")
    assert str(AutoModelForCausalLM.from_pretrained(folder).dtype) == "torch.bfloat16"
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()

    # Training ends at a distance.
    shorter = a_run(
        tmp_path, "shorter", **KEEPING | {"ppo.stop_at_kl": 1.0, "ppo.kl_distances": [1.0]}
    )
    train(shorter, monkeypatch, stops=(6,))
    manifest = shorter.read("ppo", UNIT).manifest
    step = expected[1.0]
    assert manifest.more["steps"] == step < 12
    assert f"{means[step]:.3g} nats, reached ppo.stop_at_kl 1" in manifest.more["ended_early"]
    assert published.manifest.more["ended_early"] is None
    assert kept_of(shorter) == {1.0: kept[1.0]}
    assert (
        manifest.outputs["policy/model.safetensors"].sha256
        == kept[1.0][2]["kept/kl-1.0/model.safetensors"]
    )

    # Stopped within the first window, and again between two distances.
    resumed = a_run(tmp_path, "resumed", **KEEPING)
    train(resumed, monkeypatch, stops=(3, 4))
    assert kept_of(resumed) == kept
    assert [f.name for f in resumed.folder("ppo", UNIT).glob("*kept*/")] == [
        Path(resumed.read("ppo", UNIT).manifest.outputs["kept.json"].file).stem
    ]
