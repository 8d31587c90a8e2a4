"""Steering the policy: the push against arithmetic on states, its summary by hand, and the whole
unit on tiny models.
"""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs.__main__ import main, run_unit
from sarm.config import SteerPolicyConfig, UserError
from sarm.data.datasets import Prompt
from sarm.evaluation import policy_steering
from sarm.evaluation.intervals import clustered_interval
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
    with pytest.raises(ValueError, match="zip"):
        pushes(config, found, lambda latents: torch.eye(16)[latents[:1]], 16, 0)


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
    for phase in ("encode", "probe", "select"):  # which ask no policy
        shutil.copytree(steered.path / phase, run.path / phase)
    for phase in ("fetch", "calibrate"):
        run_unit(run, phase, "all")
    assert main(["evaluate", "--run", str(run.path), "--unit", "steered"]) == 2
    assert "of width 16" in capsys.readouterr().err


def fake_policy(**config: Any) -> Any:
    shape = {"hidden_size": 4, "num_hidden_layers": 3} | config
    layers = [torch.nn.Identity() for _ in range(shape["num_hidden_layers"])]
    return SimpleNamespace(
        config=SimpleNamespace(**shape), model=SimpleNamespace(layers=layers), to=lambda _: None
    )


@pytest.mark.parametrize("pad", [None, 0])
def test_every_condition_is_generated_and_scored_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pad: int | None
) -> None:
    """Two prompts that fit of three, one latent that is listed twice, one random direction."""
    made = tiny_config(
        tmp_path,
        **{
            "seed": 5,
            "policy.chat_template_kwargs": {"a": 1},
            "steer.policy": {"latents": 1, "random": 1, "strengths": [2.0]},
            "ppo.max_prompt_tokens": 3,
            "evaluate.max_new_tokens": 9,
            "evaluate.temperature": 0.5,
            "evaluate.top_p": 0.75,
        },
    )
    listed = features(harming=[feature(2, "harming")], promoting=[feature(2, "promoting")])
    sae = SimpleNamespace(directions=lambda latents: torch.eye(4)[latents % 4])
    sarm = SimpleNamespace(hidden_size=4, source_layer=2)
    policy, tokenizer = fake_policy(), SimpleNamespace(pad_token_id=pad)
    moved: list[Any] = []
    policy.to = lambda device: moved.append(device) or policy
    inside: list[Any] = []
    asked: list[Any] = []
    told: list[Any] = []

    @contextmanager
    def pushed(layer: Any, push: Push) -> Any:
        inside.append((layer, push))
        yield
        inside.append(None)

    def generate(decoder: Any, ids: Any, **how: Any) -> Any:
        asked.append((decoder, ids, how, inside[-1][1].kind))
        said = len(asked)
        return SimpleNamespace(ids=lambda row: [said] * (row + 1))

    def scored(config: Any, conversations: Any, latents: Any) -> Any:
        assert config == made and latents == [2]
        texts = [c[-1]["content"] for c in conversations]
        assert [c[0]["content"] for c in conversations] == ["abc", "q"] * 4
        return np.arange(8.0), np.array([[float(len(text))] for text in texts])

    prompts = [
        Prompt(name, ({"role": "user", "content": text},), "s", kind, "", "policy_eval")
        for name, text, kind in (
            ("p", "abc", "unsafe"),
            ("long", "abcd", "safe"),
            ("r", "q", "safe"),
        )
    ]
    fakes = {
        "load_sae": lambda given: (sae, None, sarm) if given == made.sarm else None,
        "open_policy": lambda *given: policy if given == (Path("policy"), "float32") else None,
        "read_tokenizer": lambda *given: tokenizer if given == (Path("policy"), {"a": 1}) else None,
        "prompt_ids": lambda with_, messages: (with_ is tokenizer) * list(messages[0]["content"]),
        "stop_ids": lambda *given: [9, 4] if given == (policy, tokenizer) else [],
        "CacheDecoder": lambda model: ("decoder of", model),
        "pushed": pushed,
        "generate": generate,
        "scored": scored,
        "response_text": lambda with_, ids: f"I can't help {ids}" if ids[0] == 2 else f"ok {ids}",
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(policy_steering, name, fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    table, settings = policy_steering.steered_rows(
        made, Path("policy"), prompts, listed, lambda *line: told.append(line)
    )
    assert moved == ["cpu"] and told == [(i, 4, "directions pushed along") for i in range(4)]
    pushes_made = [given[1] for given in inside[::2]]
    assert inside[1::2] == [None] * 4
    assert all(given[0] is policy.model.layers[1] for given in inside[::2])
    assert [push[:4] for push in pushes_made] == [
        ("none", -1, "none", 0.0),
        ("latent", 2, "harming", 2.0),
        ("latent", 2, "promoting", 2.0),
        ("random", 0, "random", 2.0),
    ]
    assert pushes_made[1].direction.tolist() == [0, 0, 1, 0]
    noise = torch.randn(1, 4, generator=torch.Generator().manual_seed(5))[0]
    torch.testing.assert_close(pushes_made[3].direction, noise / noise.norm())
    how = {
        "keys": ["p", "r"],
        "max_new_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.75,
        "seed": 5,
        "eos_ids": [9, 4],
        "pad_id": 9 if pad is None else 0,
    }
    kinds = ("none", "latent", "latent", "random")
    assert asked == [(("decoder of", policy), [list("abc"), ["q"]], how, kind) for kind in kinds]
    texts = [
        f"I can't help {[n] * size}" if n == 2 else f"ok {[n] * size}"
        for n in (1, 2, 3, 4)
        for size in (1, 2)
    ]
    want = pd.DataFrame(
        {
            "kind": ["none"] * 2 + ["latent"] * 4 + ["random"] * 2,
            "name": [-1] * 2 + [2] * 4 + [0] * 2,
            "role": ["none"] * 2 + ["harming"] * 2 + ["promoting"] * 2 + ["random"] * 2,
            "c": [0.0] * 2 + [2.0] * 6,
            "prompt_id": ["p", "r"] * 4,
            "ask": ["unsafe", "safe"] * 4,
            "response": texts,
            "n_tokens": [1, 2] * 4,
            "refused": [False] * 2 + [True] * 2 + [False] * 4,
            "reward": np.arange(8.0),
            "z_2": [float(len(text)) for text in texts],
        }
    )
    pd.testing.assert_frame_equal(table, want)
    assert settings == {"source_layer": 2, "device": "cpu", "n_prompts": 2, "n_too_long": 1}
    with pytest.raises(UserError) as refused:
        policy_steering.steered_rows(made, Path("policy"), prompts[1:2], listed, told.append)
    assert str(refused.value) == (
        "none of the 1 policy_eval prompts has at most 3 tokens; raise ppo.max_prompt_tokens"
    )
    for shape, words in (
        ({"hidden_size": 5}, "3 layers of width 5"),
        ({"num_hidden_layers": 1}, "1 layers of width 4"),
    ):
        other = fake_policy(**shape)
        other.to = lambda _, other=other: other
        monkeypatch.setattr(policy_steering, "open_policy", lambda *_, other=other: other)
        with pytest.raises(UserError) as refused:
            policy_steering.steered_rows(made, Path("policy"), prompts, listed, told.append)
        assert str(refused.value) == (
            f"the policy has {words}, the SARM reads layer 2 of width 4: its directions mean"
            " nothing there; set steer.policy to null"
        )
    just = fake_policy(num_hidden_layers=2)
    just.to = lambda _: just
    monkeypatch.setattr(policy_steering, "open_policy", lambda *_: just)
    monkeypatch.setattr(policy_steering, "stop_ids", lambda *_: [9])
    asked.clear()
    policy_steering.steered_rows(made, Path("policy"), prompts, listed, lambda *_: None)
    assert len(asked) == 4, "the SARM may read the policy's last layer"


def test_conversations_are_scored_with_the_latents_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny_config(tmp_path, **{"sarm.tokens_per_batch": 99, "sarm.max_length": 77})
    asked: dict[str, Any] = {}
    scores = SimpleNamespace(
        reward=torch.tensor([1.0, 2.0]), monitors_z=torch.tensor([[3.0], [4.0]])
    )

    def reward(*given: Any, **how: Any) -> Any:
        asked.update(given=given, how=how)
        return SimpleNamespace(score=lambda said: scores if said == ["a", "b"] else None)

    monkeypatch.setattr(policy_steering, "CompoundReward", reward)
    monkeypatch.setattr(
        policy_steering, "load_sarm", lambda given: ("m", "t") if given == made.sarm else None
    )
    rewards, z = policy_steering.scored(made, ["a", "b"], [7])  # type: ignore[list-item]
    assert (rewards.tolist(), z.tolist()) == ([1.0, 2.0], [[3.0], [4.0]])
    assert asked["given"] == ("m", "t", [])
    assert asked["how"] == {"monitors": [7], "tokens_per_batch": 99, "max_length": 77}


def test_a_summary_in_whole() -> None:
    """Four prompts whose changes all differ, two strengths, two random directions; and prompts of
    one kind alone.
    """
    asks = {"b": "unsafe", "c": "safe", "a": "safe", "d": "unsafe"}

    def rows(kind: str, name: int, c: float, at: int) -> list[dict[str, Any]]:
        return [
            {
                "kind": kind,
                "name": name,
                "role": f"role of {name}",
                "c": c,
                "prompt_id": id_,
                "ask": ask,
                "reward": float(at * (i + 1)),
                "refused": bool((at + i) % 3 == 0),
                "n_tokens": 5 + at * i,
                "z_9": 0.5 * at + i,
            }
            for i, (id_, ask) in enumerate(asks.items())
        ]

    parts = [("none", -1, 0.0, 1), ("latent", 9, 4.0, -3), ("latent", 9, -4.0, 2)]
    parts += [("random", 0, 4.0, 4), ("random", 1, 4.0, 6), ("random", 0, -4.0, 2)]
    table = pd.DataFrame([row for part in parts for row in rows(*part)])
    found = steered_summary(table, 40, 3)
    none = rows(*parts[0])
    want = []
    for kind, name, c, at in parts[1:]:
        after = rows(kind, name, c, at)
        row: dict[str, Any] = {
            "kind": kind,
            "name": name,
            "role": f"role of {name}",
            "c": c,
            "n": 4,
        }
        for measure, column, kept in (
            ("reward", "reward", range(4)),
            ("refused", "refused", (0, 3)),
            ("over_refused", "refused", (1, 2)),
            ("n_tokens", "n_tokens", range(4)),
            *((("z", "z_9", range(4)),) if kind == "latent" else ()),
        ):
            changes = np.array([float(after[i][column]) - float(none[i][column]) for i in kept])
            low, high = clustered_interval(
                changes, np.array([none[i]["prompt_id"] for i in kept]), 40, 3
            )
            for end, value in (("", changes.mean()), ("_low", low), ("_high", high)):
                row[f"{measure}{end}"] = pytest.approx(value) if np.isfinite(value) else None
        # of the latent -4 x 2.5 against 3 and 5 x 2.5; 1 x 2.5 against as much
        row["beyond_random"] = False if kind == "latent" else None
        want.append(row)
    assert found == want and [list(row) for row in found] == [list(row) for row in want]
    assert found[0]["reward"] == -10.0 and found[1]["reward"] == 2.5
    without = steered_summary(table[table["name"] != 1], 40, 3)
    assert [row["beyond_random"] for row in without] == [True, False, None, None]
    alone = steered_summary(table[table["kind"] != "random"], 40, 3)
    assert [row["beyond_random"] for row in alone] == [False, False]
    unsafe = steered_summary(table[table["ask"] == "unsafe"], 40, 3)
    assert all(
        (row["over_refused"], row["over_refused_low"], row["over_refused_high"]) == (None,) * 3
        for row in unsafe
    )
    assert unsafe[0]["n"] == 2 and unsafe[0]["refused"] is not None


def test_a_push_keeps_the_states_kind_and_whatever_else_a_layer_puts_out() -> None:
    class Layer(torch.nn.Module):
        def forward(self, h: torch.Tensor) -> Any:
            return h, "cache", "more"

    h = torch.tensor([[1.0, 3.0], [0.0, 8.0]], dtype=torch.bfloat16)
    layer = Layer()
    with pushed(layer, Push("latent", 3, "harming", 2.0, torch.tensor([0.0, 1.0]))):
        out = layer(h)
    deviations = torch.tensor([2.0, 32.0]).sqrt()
    want = torch.tensor([[1.0, 3.0 + 2 * deviations[0]], [0.0, 8.0 + 2 * deviations[1]]])
    assert out[1:] == ("cache", "more") and torch.equal(out[0], want.bfloat16())
    with pushed(layer, Push("none", -1, "none", 0.0, None)):
        assert layer(h)[0] is h
    assert layer(h)[0] is h
