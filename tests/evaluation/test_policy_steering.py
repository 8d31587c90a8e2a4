"""Steering the policy: the push against arithmetic on states, its summary by hand, and the whole
unit on tiny models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs.__main__ import main, run_unit
from sarm.config import SteerPolicyConfig
from sarm.evaluation.policy_steering import Push, pushed, pushes, steered_summary
from sarm.run import RunDir
from slurm.dag import Node, tasks
from tests.runs import feature, features
from tests.tiny import D_IN, tiny_config, write_tiny_policy


def test_push_moves_what_the_layer_puts_out(tiny_policy: Path) -> None:
    """hidden_states after the pushed layer: h + c std(h) d, the unbiased deviation; before it
    nothing moves.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32).eval()
    ids, d = (
        torch.randint(5, 300, (2, 7), generator=torch.Generator().manual_seed(0)),
        torch.nn.functional.normalize(torch.randn(D_IN), dim=0),
    )
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        plain = model(ids, output_hidden_states=True)
        with pushed(model.model.layers[0], Push("latent", 3, "harming", 1.5, d)):
            handle = model.model.layers[1].register_forward_pre_hook(
                lambda _, inputs: seen.update(h=inputs[0])
            )
            logits = model(ids).logits
            handle.remove()
        again = model(ids).logits
    h = plain.hidden_states[1]
    torch.testing.assert_close(seen["h"], h + 1.5 * h.std(-1, keepdim=True) * d)
    assert not torch.allclose(logits, plain.logits) and torch.equal(again, plain.logits)


def test_conditions_are_every_strength_of_latents_and_of_random_directions() -> None:
    found = features(
        harming=[feature(9, "harming"), feature(4, "harming")], promoting=[feature(7, "promoting")]
    )
    config = SteerPolicyConfig(latents=1, random=2, strengths=(-1.0, 2.0))
    made = pushes(config, found, lambda latents: torch.eye(16)[latents], 16, 0)
    assert [(p.kind, p.name, p.role, p.c) for p in made[:5]] == [
        ("none", -1, "none", 0.0),
        ("latent", 9, "harming", -1.0),
        ("latent", 9, "harming", 2.0),
        ("latent", 7, "promoting", -1.0),
        ("latent", 7, "promoting", 2.0),
    ]
    assert [(p.kind, p.name) for p in made[5:]] == [
        ("random", 0),
        ("random", 0),
        ("random", 1),
        ("random", 1),
    ]
    assert all(
        p.direction is not None and float(p.direction.norm()) == pytest.approx(1) for p in made[1:]
    )
    assert (
        made[5].direction is not None
        and made[7].direction is not None
        and not torch.equal(made[5].direction, made[7].direction)
    )


def test_summary_by_hand() -> None:
    """Two unsafe prompts and a safe one; the latent adds 1, 2 and 3, the random direction takes 1
    off each.
    """

    def rows(
        kind: str, name: int, c: float, rewards: list[float], refusals: list[bool], z: float
    ) -> list[dict[str, Any]]:
        ask = zip("abc", ("unsafe", "unsafe", "safe"), rewards, refusals, strict=True)
        what = {"kind": kind, "name": name, "role": kind, "c": c, "n_tokens": 5, "z_9": z}
        return [
            {**what, "prompt_id": id_, "ask": asked, "reward": reward, "refused": no}
            for id_, asked, reward, no in ask
        ]

    table = pd.DataFrame(
        rows("none", -1, 0.0, [0.0, 0.0, 0.0], [False, True, False], 0.5)
        + rows("latent", 9, 4.0, [1.0, 2.0, 3.0], [True, True, True], 2.0)[::-1]
        + rows("random", 0, 4.0, [-1.0, -1.0, -1.0], [False, False, False], 0.5)
    )
    latent, random = steered_summary(table, 200, 0)
    assert latent["reward"] == 2.0 and latent["reward_low"] >= 1.0 and latent["reward_high"] <= 3.0
    assert (latent["refused"], latent["over_refused"], latent["z"], latent["n_tokens"]) == (
        0.5,
        1.0,
        1.5,
        0.0,
    )
    assert (random["reward"], random["refused"], random["over_refused"]) == (-1.0, -0.5, 0.0)
    assert latent["beyond_random"] is True and random["beyond_random"] is None


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("steered")
    small = {
        "ppo.arms": ["no_penalty"],
        "ppo.steps": 1,
        "evaluate.prompts": 4,
        "steer.policy": {"latents": 1, "random": 2, "strengths": [-30.0, 30.0]},
    }
    run = RunDir.create(folder / "run", tiny_config(folder, **small))
    for task in tasks(run.config):
        run_unit(run, *task.node)
    return run


def test_the_unit_needs_no_training(steered: RunDir) -> None:
    """Nor the other evaluations: only what calibrate says of the latents."""
    needs = {task.node: task.needs for task in tasks(steered.config)}
    assert needs[Node("evaluate", "steered")] == (Node("calibrate", "all"),)
    assert Node("evaluate", "steered") in needs[Node("report", "all")]


def test_no_push_says_what_base_says_and_pushes_change_it(steered: RunDir) -> None:
    table = pd.read_parquet(steered.read("evaluate", "steered").path("generations.parquet"))
    base = pd.read_parquet(steered.read("evaluate", "base").path("generations.parquet")).set_index(
        "prompt_id"
    )
    none = table[table["kind"] == "none"].set_index("prompt_id")
    assert none["response"].to_dict() == base["response"].to_dict(), (
        "the same noise, whichever decoder"
    )
    np.testing.assert_allclose(none["reward"], base.loc[none.index, "reward"], atol=1e-4)
    latent = table[table["kind"] == "latent"].set_index("prompt_id")
    assert (latent["response"] != none["response"].reindex(latent.index)).mean() > 0.5
    assert len(table) == len(none) * (1 + 2 * 2 + 2 * 2)


def test_the_report_says_that_it_is_approximate(steered: RunDir) -> None:
    text, found = (
        (steered.path / "final_report.txt").read_text(),
        json.loads((steered.path / "report.json").read_text()),
    )
    assert "STEERING THE POLICY (approximate)" in text and "random directions" in text
    assert [p["policy"] for p in found["policies"]] == ["base", "no_penalty-seed0"], (
        "steered generations are no policy's"
    )
    assert len(found["steered"]["rows"]) == 8


def test_a_policy_of_another_width_is_refused(
    tmp_path: Path, steered: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaForCausalLM

    from tests.tiny import llama_config

    other = write_tiny_policy(tmp_path / "other")
    LlamaForCausalLM(llama_config(hidden_size=16)).save_pretrained(other)
    config = steered.config.model_copy(
        update={"policy": steered.config.policy.model_copy(update={"model": str(other)})}
    )
    run = RunDir.create(tmp_path / "run", config)
    for task in tasks(config):
        if task.node.phase in ("fetch", "encode", "probe", "select", "calibrate"):
            run_unit(run, *task.node)
    assert main(["evaluate", "--run", str(run.path), "--unit", "steered"]) == 2
    assert "of width 16" in capsys.readouterr().err
