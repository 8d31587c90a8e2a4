"""Rollouts sampled from fp8 weights: importance weights by hand, who is refused, when it stops.

What a step then learns is written out in test_steps_by_hand.py; what is sampled, in test_fp8.py.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from sarm.config import UserError
from sarm.llama import fp8
from sarm.llama.generate import Rollout
from sarm.ppo import losses, metrics, objective
from sarm.ppo.learner.distributed import World
from sarm.ppo.learner.learner import Learner, Logprobs
from sarm.ppo.trainer import Trainer
from tests.ranks import PlantedReward, some_prompts, tiny_ppo, tiny_trainer
from tests.tiny import tiny_tokenizer

T = torch.tensor


def rollout_of(sampled: torch.Tensor, mask: torch.Tensor) -> Rollout:
    ended = torch.zeros(len(mask), dtype=torch.bool)
    return Rollout([[1]] * len(mask), mask.long(), mask, sampled, ended)


def test_importance_weights_and_their_metrics_by_hand() -> None:
    mask = T([[True, True, True], [True, False, False]])
    sampled = T([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]])
    exact = sampled + T([[1.1, 3.0, 0.5], [1.5, 999.0, 999.0]]).log()
    weights = objective.importance_weights(exact, sampled, 1.4)
    torch.testing.assert_close(weights[mask], T([1.1, 1.4, 0.5, 1.4]))
    rollout, logprobs = rollout_of(sampled, mask), Logprobs(exact, exact, None)
    assert metrics.importance_metrics(rollout, logprobs, 1.4) == pytest.approx(
        {
            "rollout/importance_avg": (1.1 + 1.4 + 0.5 + 1.4) / 4,
            "rollout/importance_max": 3.0,
            "rollout/importance_capped": 0.5,
        }
    )


def test_a_token_that_the_policy_itself_never_says_weighs_nothing() -> None:
    exact, sampled = T([-500.0, 0.0]), T([0.0, -500.0])
    assert objective.importance_weights(exact, sampled, 2.0).tolist() == [0.0, 2.0]


def test_losses_are_weighed_by_hand() -> None:
    """After clipping and the dual clip; what is logged of ratios is not weighed."""
    settings = {"cliprange_low": 0.1, "cliprange_high": 0.3, "dual_clip": 2.5, "log_ratio_max": 9.0}
    old = T([-1.0, -2.0, -0.5])
    new = (old + T([1.5, 0.8, 4.0]).log()).requires_grad_()
    weights = T([0.5, 1.7, 0.25])
    loss = losses.policy_loss(new, old, T([2.0, 1.0, -3.0]), **settings, importance=weights)
    by_hand = [-2 * 1.3 * 0.5, -0.8 * 1.7, 3 * 2.5 * 0.25]
    assert loss.total.item() == pytest.approx(sum(by_hand))
    assert float(loss.sums["loss/policy_avg"]) == pytest.approx(sum(by_hand))
    assert float(loss.sums["policy/approxkl_avg"]) == pytest.approx(
        sum(math.log(r) ** 2 / 2 for r in (1.5, 0.8, 4.0))
    )
    loss.total.backward()
    assert new.grad.tolist() == pytest.approx([0.0, -0.8 * 1.7, 0.0])

    ref = T([-1.5, -2.5, -0.25])
    kl = losses.kl_loss(old, ref, estimator="k2", log_ratio_max=9.0, importance=weights)
    assert float(kl.total) == pytest.approx(
        0.5 * 0.5**2 * 0.5 + 1.7 * 0.5**2 * 0.5 + 0.25 * 0.25**2 / 2
    )
    assert float(kl.sums["loss/kl_avg"]) == pytest.approx(float(kl.total))


@pytest.mark.parametrize("nats, stops", [(0.29, False), (0.31, True)])
def test_a_mean_mismatch_above_the_bound_stops(nats: float, stops: bool) -> None:
    mask = T([[True, True, False], [True, False, False]])
    sampled = T([[-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0]])
    # off by 0, 2 and 1 times `nats`, to either side
    exact = sampled + nats * T([[0.0, 2.0, 99.0], [-1.0, 99.0, 0.0]])
    ppo = tiny_ppo(rollout_dtype="fp8", rollout_mismatch_max=0.3)
    words = (
        r"^step 7: the policy and its fp8 copy, which samples, differ by 0\.31 nats per token on"
        r" average, more than ppo\.rollout_mismatch_max 0\.3: leave ppo\.rollout_dtype out, or"
        r" raise that bound$"
    )
    with pytest.raises(UserError, match=words) if stops else nullcontext():
        metrics.refuse_quantised(ppo, 7, rollout_of(sampled, mask), Logprobs(exact, exact, None))
    unknown = exact * math.nan
    with pytest.raises(UserError, match="nan nats"):
        metrics.refuse_quantised(
            ppo, 7, rollout_of(sampled, mask), Logprobs(unknown, unknown, None)
        )


def quantised_trainer(policy: Path, **changes: Any) -> Trainer:
    ppo = tiny_ppo(rollout_dtype="fp8", **changes)
    return tiny_trainer(World(), policy, PlantedReward(worth=0.5), ppo)


def test_it_stops_before_any_update_at_whatever_step(tiny_policy: Path) -> None:
    trainer = quantised_trainer(tiny_policy, rollout_mismatch_max=1.0)
    first = trainer.run_step()["rollout/logprob_mismatch"]
    assert 1e-3 < first < 1.0
    weight = trainer.learner.actor.policy.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():  # which the sampler is not told of
        weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in trainer.learner.actor.parameters()]
    with pytest.raises(UserError, match=r"^step 1: .* differ by \d\.?\d* nats per token"):
        trainer.run_step()
    after = trainer.learner.actor.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert trainer.progress.step == 1


def test_each_update_is_quantised_and_sampled_from(tiny_policy: Path) -> None:
    """After every step the sampler holds the policy's weights of now, rounded; what is learnt is
    not.
    """
    trainer = quantised_trainer(tiny_policy, rollout_mismatch_max=9.0, learning_rate=0.02)
    seen = []
    for _ in range(3):
        trainer.run_step()
        policy = trainer.learner.actor.policy
        own = policy.model.layers[0].self_attn.o_proj.weight
        held = trainer.learner.decoder.weights.layers[0].o
        assert torch.equal(
            fp8.dequantised(held, own.dtype), fp8.dequantised(fp8.quantised(own), own.dtype)
        )
        assert not torch.equal(fp8.dequantised(held, own.dtype), own)
        seen.append(held.values.float().clone())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_without_it_no_token_is_weighed(tiny_policy: Path) -> None:
    """And nothing is logged of weights."""
    trainer = tiny_trainer(World(), tiny_policy, PlantedReward(worth=0.5), tiny_ppo())
    seen = []
    loss = trainer.loss
    trainer.loss = lambda new, old: seen.append(old.importance) or loss(new, old)
    found = trainer.run_step()
    assert seen and all(importance is None for importance in seen)
    assert not any("importance" in name for name in found)
    assert found["rollout/logprob_mismatch"] < 1e-5


def test_another_architecture_is_refused(tiny_policy: Path) -> None:
    config = GPTNeoXConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    words = "samples from Llama models only, and the policy is a gpt_neox; leave it out"
    with pytest.raises(UserError, match=words):
        Trainer(
            tiny_ppo(rollout_dtype="fp8"),
            GPTNeoXForCausalLM(config),
            tiny_tokenizer(),
            PlantedReward(),
            some_prompts(),
            seed=0,
            world=World(),
        )


def test_a_gpu_without_fp8_is_refused(tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An A100")
    with pytest.raises(
        UserError, match=r"of compute capability 8\.9 or more, and An A100 has none"
    ):
        Learner(
            tiny_ppo(rollout_dtype="fp8"),
            AutoModelForCausalLM.from_pretrained(tiny_policy),
            stops=(3,),
            pad_id=4,
            longest_prompt=9,
            reward_bytes=0,
            seed=0,
            world=World(device=torch.device("cuda")),
        )
