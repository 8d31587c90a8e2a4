"""Held-out evaluation in training: its numbers against the obvious ones, and whose prompts it
takes.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sarm.config import HeldOutConfig, UserError
from sarm.data.datasets import Data, Prompt
from sarm.data.endings import ends
from sarm.evaluation.held_out import HeldOut
from sarm.evaluation.refusals import refused
from sarm.llama.generate import Rollout
from sarm.ppo.learner.distributed import World
from sarm.ppo.reward import Penalised
from tests.ranks import PlantedReward, join_ranks, start_ranks, tiny_ppo, tiny_trainer


def prompts_of(part: str, kind: str, n: int, words: int = 2) -> list[Prompt]:
    return [
        Prompt(
            f"{part}-{kind}-{i}",
            ({"role": "user", "content": " ".join(["help", "people", "make"][i % 3 :] * words)},),
            "test",
            kind,
            "",
            part,  # type: ignore[arg-type]
        )
        for i in range(n)
    ]


def data_of(*prompts: list[Prompt]) -> Data:
    return Data([p for some in prompts for p in some], [], {})


def held_out_of(
    policy: Path, data: Data, ppo: dict[str, Any], world: World | None = None, **config: Any
) -> HeldOut:
    reward = PlantedReward(alpha=0.7, worth=0.2)
    trainer = tiny_trainer(world or World(), policy, reward, tiny_ppo(**ppo))
    monitors = [Penalised(1, 0.2, 0.0)]
    return HeldOut(trainer, data, monitors, HeldOutConfig(every=1, **config))


def test_its_numbers_are_the_obvious_ones(tiny_policy: Path, monkeypatch: Any) -> None:
    # Random text refuses nothing; so that rows differ, an a counts as a refusal.
    monkeypatch.setattr("sarm.evaluation.held_out.refused", lambda text: "a" in text)
    data = data_of(prompts_of("validation", "unsafe", 5), prompts_of("test", "safe", 3))
    settings = {"temperature": 0.7, "learning_rate": 1e-2, "max_new_tokens": 20}
    held_out = held_out_of(tiny_policy, data, settings, prompts=4, completions=9)
    trainer = held_out.trainer
    for _ in range(2):
        trainer.run_step()
    rollouts: list[Rollout] = []
    sample = trainer.learner.sample

    def noted(*args: Any, **how: Any) -> Rollout:
        rollouts.append(sample(*args, **how))
        return rollouts[-1]

    trainer.learner.sample = noted
    metrics, completions = held_out.evaluated()

    base = AutoModelForCausalLM.from_pretrained(tiny_policy)
    trained, (rollout,) = trainer.learner.actor.policy, rollouts
    expected = []
    for row, d in enumerate(held_out.drawn):
        ids = rollout.ids(row)
        logprobs = [0.0, 0.0]
        for i, model in enumerate((trained, base)):
            with torch.no_grad():
                logits = model(torch.tensor([d.ids + ids])).logits[0, len(d.ids) - 1 : -1]
            of_ids = torch.log_softmax(logits.double() / 0.7, -1)[range(len(ids)), ids]
            logprobs[i] = float(of_ids.sum())
        text = trainer.tokenizer.decode(ids, skip_special_tokens=True).strip()
        fires = float("e" in text)
        expected.append(
            {
                "kind": d.prompt.kind,
                "response": text,
                "reward": 0.2 * fires + len(text) / 100,
                "penalty": 0.7 * fires,
                "kl": logprobs[0] - logprobs[1],
                "tokens": len(ids),
                "cut": trainer.tokenizer.eos_token_id not in ids,
                "refused": "a" in text,
                "z": {"0": fires, "1": len(text) / 100},
            }
        )
    assert [c["kind"] for c in completions] == ["unsafe"] * 4 + ["safe"] * 3
    for found, want in zip(completions, expected, strict=True):
        for name, value in want.items():
            assert found[name] == (
                pytest.approx(value, abs=1e-3)
                if name in ("kl", "reward", "z", "penalty")
                else value
            ), name

    def mean(of: Any, kind: str = "") -> Any:
        rows = [float(of(e)) for e in expected if kind in ("", e["kind"])]
        return pytest.approx(sum(rows) / len(rows), abs=1e-3)

    for name in ("reward", "penalty", "kl", "cut"):
        assert metrics[f"held_out/{name}"] == mean(lambda e, name=name: e[name]), name
    assert metrics["held_out/length"] == mean(lambda e: e["tokens"])
    for kind in ("unsafe", "safe"):
        assert metrics[f"held_out/penalised/{kind}"] == mean(lambda e: e["z"]["0"] > 0.5, kind)
        assert metrics[f"held_out/rate/0/{kind}"] == mean(lambda e: e["z"]["0"] > 0.5, kind)
        assert metrics[f"held_out/rate/1/{kind}"] == mean(lambda e: e["z"]["1"] > 0.2, kind)
        assert metrics[f"held_out/monitors/{kind}"] == mean(lambda e: e["z"]["1"] > 0.2, kind)
        assert metrics[f"held_out/refused/{kind}"] == mean(lambda e: e["refused"], kind)
    assert 0 < metrics["held_out/rate/1/unsafe"] < 1 and abs(metrics["held_out/kl"]) > 0.01
    assert 0 < sum(e["refused"] for e in expected) < 7
    unended = [e["cut"] and not ends(e["response"]) for e in expected]
    assert metrics["held_out/unended"] == pytest.approx(sum(unended) / 7) != 0.5
    # Whatever happened since: the same noise.
    assert held_out.evaluated() == (metrics, completions)

    # Of several latents, any counts.
    trainer.tracked = (*trainer.tracked, Penalised(1, 0.15, 0.0))
    several = held_out.evaluated().metrics
    for kind in ("unsafe", "safe"):
        either = mean(lambda e: e["z"]["0"] > 0.5 or e["z"]["1"] > 0.15, kind)
        assert several[f"held_out/penalised/{kind}"] == either
    assert any((e["z"]["0"] > 0.5) != (e["z"]["1"] > 0.15) for e in expected)


def on_ranks(world: World, policy: Path, out: Path) -> None:
    """Between two steps, as `python -m jobs ppo` does."""
    data = data_of(prompts_of("validation", "unsafe", 3), prompts_of("test", "safe", 2))
    held_out = held_out_of(policy, data, {"learning_rate": 1e-2}, world=world, completions=9)
    lines = []
    for _ in range(2):
        held_out.trainer.run_step()
        lines.append(held_out.evaluated()._asdict())
    if world.rank == 0:
        (out / f"{world.size}.json").write_text(json.dumps(lines))


def test_two_ranks_find_what_one_does(tiny_policy: Path, tmp_path: Path) -> None:
    for group in [start_ranks(on_ranks, size, tiny_policy, tmp_path) for size in (1, 2)]:
        join_ranks(group)
    one, two = (json.loads((tmp_path / f"{size}.json").read_text()) for size in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a["metrics"] == pytest.approx(b["metrics"], abs=1e-4)
        assert [c["response"] for c in a["completions"]] == [
            c["response"] for c in b["completions"]
        ]
    assert one[0]["metrics"] != one[1]["metrics"]


def test_prompts_come_from_a_part_that_neither_training_nor_evaluation_reads(
    tiny_policy: Path,
) -> None:
    long = prompts_of("validation", "unsafe", 1, words=40)
    data = data_of(
        long,
        prompts_of("ppo", "unsafe", 3),
        prompts_of("ppo", "safe", 3),
        prompts_of("test", "unsafe", 3),
        prompts_of("policy_eval", "unsafe", 9),
        prompts_of("policy_eval", "safe", 9),
    )
    held_out = held_out_of(tiny_policy, data, {"max_prompt_tokens": 40}, prompts=2, completions=1)
    assert held_out.parts == {
        "unsafe": {"part": "test", "prompts": 2},
        "safe": {"part": "policy_eval", "prompts": 2},
    }
    # Evaluation reads the first of policy_eval, so the last are taken.
    assert [d.prompt.id for d in held_out.drawn] == [
        "test-unsafe-2",
        "test-unsafe-1",
        "policy_eval-safe-8",
        "policy_eval-safe-7",
    ]
    assert [c["prompt_id"] for c in held_out.evaluated().completions] == [
        "test-unsafe-2",
        "policy_eval-safe-8",
    ]


def test_without_prompts_it_is_refused(tiny_policy: Path) -> None:
    with pytest.raises(UserError, match=r"ppo.held_out has 0 prompts .* ppo.held_out.every=0"):
        held_out_of(tiny_policy, data_of(prompts_of("ppo", "unsafe", 3)), {})


def test_prompts_of_just_the_most_tokens_fit_and_every_rank_needs_one(tiny_policy: Path) -> None:
    data = data_of(prompts_of("validation", "unsafe", 2))
    held_out = held_out_of(tiny_policy, data, {"max_prompt_tokens": 64})
    trainer = held_out.trainer
    longest = max(len(d.ids) for d in held_out.drawn)
    trainer.ppo = trainer.ppo.model_copy(update={"max_prompt_tokens": longest})
    assert len(HeldOut(trainer, data, [], HeldOutConfig(every=1)).drawn) == 2
    trainer.learner.world = SimpleNamespace(size=3)
    with pytest.raises(UserError, match=r"has 2 prompts .*, for 3 ranks"):
        HeldOut(trainer, data, [], HeldOutConfig(every=1))


def test_refusals_are_told_by_phrases() -> None:
    from sarm.evaluation import held_out

    assert held_out.refused is refused
