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
from sarm.data.endings import Ending, ends
from sarm.evaluation import held_out as module
from sarm.evaluation.held_out import HeldOut
from sarm.evaluation.refusals import refused
from sarm.llama.generate import Rollout
from sarm.ppo.learner.distributed import World
from sarm.ppo.learner.learner import Logprobs, NotFinite
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


class Watching:
    """A trainer of which each part tells what it was asked: three responses, one of them cut, one
    to a safe prompt.
    """

    tracked = (Penalised(4, 0.5, 0.0), Penalised(2, 1.0, 0.0))
    tokenizer = None
    reward: Any = SimpleNamespace(
        kind="threshold", penalised=[Penalised(4, 0.5, 0.1)], monitors=(7, 2, 9)
    )

    def __init__(self, prompts: list[Prompt]) -> None:
        self.drawn = [SimpleNamespace(prompt=p) for p in prompts]
        self.asked: list[Any] = []
        self.progress = SimpleNamespace(step=6)
        mask = torch.arange(3) < torch.tensor([3, 1, 2])[:, None]
        self.rollout = Rollout(
            [[1]] * 3,
            torch.tensor([[70, 71, 72], [80, 0, 0], [90, 91, 0]]),
            mask,
            torch.zeros(3, 3),
            torch.tensor([True, False, False]),
        )
        self.logprobs = Logprobs(
            torch.tensor([[-1.0, -1, -1], [-2, 9, 9], [-3, -1, 9]]),
            torch.tensor([[-2.0, -1, 5], [-2, 0, 0], [-1, -1, 0]]),
            None,
        )
        self.learner = SimpleNamespace(forward=self.forward)

    def sample(self, drawn: Any, step: int) -> Rollout:
        assert drawn is self.drawn and step == -2
        return self.rollout

    def endings(self, sampled: Rollout) -> list[Ending]:
        assert sampled is self.rollout
        return [Ending("first", 2, False), Ending("second", 1, True), Ending("third", 2, True)]

    def forward(self, rollout: Rollout, *, update_follows: bool) -> Any:
        assert rollout.mask.sum(1).tolist() == [2, 1, 2] and update_follows is False
        self.read = rollout
        return lambda: Logprobs(*(x[:, :2] for x in self.logprobs[:2]), None)

    def score(self, drawn: Any, rollout: Rollout, texts: list[str]) -> Any:
        assert drawn is self.drawn and rollout is self.read
        assert texts == ["first", "second", "third"]
        return SimpleNamespace(
            reward=torch.tensor([1.0, 2.0, 6.0]),
            penalty=torch.tensor([0.5, 0.0, 0.25]),
            z=torch.tensor([[0.75], [0.5], [3.0]]),
            monitors_z=torch.tensor([[0.25, 0.0, 1.0], [0.0, 1.5, 0.5], [2.0, 1.0, 0.0]]),
        )


def watching(monkeypatch: pytest.MonkeyPatch, **more: Any) -> Any:
    prompts = [
        Prompt(name, ({"role": "user", "content": f"ask {name}"},), f"of {name}", kind, "", "test")
        for name, kind in (("a", "unsafe"), ("b", "safe"), ("c", "unsafe"))
    ]
    monkeypatch.setattr(module, "response_text", lambda _, ids: f"text {ids}")
    monkeypatch.setattr(module, "refused", lambda text: text == "text [80]")
    held_out: Any = HeldOut.__new__(HeldOut)
    held_out.trainer = Watching(prompts)
    held_out.drawn, held_out.shown = held_out.trainer.drawn, [0, 1]
    held_out.monitors = (Penalised(9, 0.5, 0.0), Penalised(7, 0.5, 0.0))
    vars(held_out).update(more)
    return held_out


def test_metrics_and_completions_in_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = watching(monkeypatch)
    found = held_out.evaluated()
    # of what is scored: the first has two of three tokens, 1 and 0 nats, the others 0 and -2
    assert found.metrics == pytest.approx(
        {
            "held_out/reward": 3.0,
            "held_out/penalty": 0.25,
            "held_out/kl": -1 / 3,
            "held_out/length": 2.0,
            "held_out/cut": 1 / 3,
            "held_out/unended": 1 / 3,
            "held_out/penalised/unsafe": 1.0,
            "held_out/rate/4/unsafe": 1.0,
            "held_out/rate/2/unsafe": 0.0,
            "held_out/monitors/unsafe": 0.5,
            "held_out/rate/9/unsafe": 0.5,
            "held_out/rate/7/unsafe": 0.5,
            "held_out/refused/unsafe": 0.0,
            "held_out/penalised/safe": 1.0,
            "held_out/rate/4/safe": 0.0,
            "held_out/rate/2/safe": 1.0,
            "held_out/monitors/safe": 0.0,
            "held_out/rate/9/safe": 0.0,
            "held_out/rate/7/safe": 0.0,
            "held_out/refused/safe": 1.0,
        }
    )
    assert found.completions == [
        {
            "prompt_id": "a",
            "kind": "unsafe",
            "source": "of a",
            "prompt": "ask a",
            "response": "text [70, 71, 72]",
            "reward": 1.0,
            "penalty": 0.5,
            "kl": 1.0,
            "tokens": 3,
            "cut": True,
            "refused": False,
            "z": {"4": 0.75, "7": 0.25, "2": 0.0, "9": 1.0},
        },
        {
            "prompt_id": "b",
            "kind": "safe",
            "source": "of b",
            "prompt": "ask b",
            "response": "text [80]",
            "reward": 2.0,
            "penalty": 0.0,
            "kl": 0.0,
            "tokens": 1,
            "cut": False,
            "refused": True,
            "z": {"4": 0.5, "7": 0.0, "2": 1.5, "9": 0.5},
        },
    ]
    alone = watching(monkeypatch, monitors=())
    assert not any("monitors" in name or "/7/" in name for name in alone.evaluated().metrics)
    alone.trainer.reward = SimpleNamespace(**vars(Watching.reward) | {"kind": "density"})
    # whatever tau says: above 0
    assert alone.evaluated().metrics["held_out/rate/4/safe"] == 1.0


def test_what_is_not_finite_is_told_with_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = watching(monkeypatch)

    def score(*_: Any) -> Any:
        raise NotFinite("a reward", updated=False)

    held_out.trainer.score = score
    with pytest.raises(UserError) as refused:
        held_out.evaluated()
    assert str(refused.value) == (
        "held-out evaluation after step 6: a reward is not finite; lower ppo.learning_rate"
    )


def test_prompts_are_told_and_shown_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a policy: as many tokens as letters."""
    monkeypatch.setattr(module, "prompt_ids", lambda _, m: [1] * len(m[-1]["content"]))
    trainer: Any = SimpleNamespace(
        tokenizer=None,
        ppo=SimpleNamespace(max_prompt_tokens=9),
        learner=SimpleNamespace(world=SimpleNamespace(size=3)),
    )
    data = data_of(
        prompts_of("validation", "unsafe", 3, words=1), prompts_of("policy_eval", "safe", 1)
    )
    for p in data.prompts:
        assert len(p.messages[-1]["content"]) > 9 or p.id == "validation-unsafe-2"
    with pytest.raises(UserError) as refused:
        HeldOut(trainer, data, [], HeldOutConfig(every=1))
    assert str(refused.value) == (
        "ppo.held_out has 1 prompts of parts validation, test, policy_eval that fit"
        " ppo.max_prompt_tokens, for 3 ranks; give those parts a share in data.sources, or set"
        " ppo.held_out.every=0"
    )
    trainer.ppo.max_prompt_tokens = 99
    monitors = [Penalised(3, 0.5, 0.0)]
    held_out = HeldOut(trainer, data, monitors, HeldOutConfig(every=1, prompts=2, completions=1))
    assert held_out.monitors == tuple(monitors) and held_out.trainer is trainer
    assert [(d.prompt.id, len(d.ids), d.key) for d in held_out.drawn] == [
        (p.id, len(p.messages[-1]["content"]), f"held-out/{p.id}")
        for p in (data.prompts[2], data.prompts[1], data.prompts[3])
    ]
    assert held_out.shown == [0, 2]
    assert held_out.parts == {
        "unsafe": {"part": "validation", "prompts": 2},
        "safe": {"part": "policy_eval", "prompts": 1},
    }
