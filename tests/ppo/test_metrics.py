"""What a step logs, by hand: two responses of three tokens and of one, whatever stands in the
padding.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sarm.config import UserError
from sarm.data.endings import Ending
from sarm.llama.generate import Rollout
from sarm.ppo import metrics
from sarm.ppo.learner.learner import Logprobs
from tests.ranks import tiny_ppo
from tests.tiny import tiny_tokenizer

T = torch.tensor
MASK = T([[True, True, True], [True, False, False]])
ROLLOUT = Rollout(
    [[1], [2]], MASK.long(), MASK, T([[-1.0, -2.0, -3.0], [-4.0, 7.0, 7.0]]), T([True, False])
)
LOGPROBS = Logprobs(
    old=T([[-1.5, -2.0, -2.0], [-3.75, 9.0, 9.0]]),
    ref=T([[-1.0, -4.0, -2.5], [-3.0, 5.0, 5.0]]),
    values=None,
)


def test_of_responses_and_of_how_sampler_and_trainer_agree() -> None:
    # less the reference: -0.5 + 2 + 0.5, and -0.75
    assert metrics.rollout_metrics(ROLLOUT, LOGPROBS) == pytest.approx(
        {
            "objective/kl": (2.0 - 0.75) / 2,
            "objective/entropy": (5.5 + 3.75) / 2,
            "rollout/logprob_mismatch": (0.5 + 0 + 1.0 + 0.25) / 4,
            "rollout/logprob_mismatch_max": 1.0,
        }
    )


def test_of_importance_weights() -> None:
    weights = [math.exp(d) for d in (-0.5, 0.0, 1.0, 0.25)]
    cap = weights[3]
    assert metrics.importance_metrics(ROLLOUT, LOGPROBS, cap) == pytest.approx(
        {
            "rollout/importance_avg": (weights[0] + 1 + 2 * cap) / 4,
            "rollout/importance_max": math.e,
            "rollout/importance_capped": 0.25,  # one at the cap is not beyond it
        },
        rel=1e-6,
    )


def apart(nats: float) -> Logprobs:
    return LOGPROBS._replace(old=ROLLOUT.logprobs + nats)


def test_a_quantised_sampler_that_has_left_is_told_by_how_much() -> None:
    ppo = tiny_ppo(rollout_dtype="fp8", rollout_mismatch_max=0.375)
    metrics.refuse_quantised(ppo, 7, ROLLOUT, apart(0.375))
    for nats, said in ((0.5, "0.5"), (math.nan, "nan"), (-1.23456, "1.23")):
        with pytest.raises(UserError) as refused:
            metrics.refuse_quantised(ppo, 7, ROLLOUT, apart(nats))
        assert str(refused.value) == (
            f"step 7: the policy and its fp8 copy, which samples, differ by {said} nats per token"
            " on average, more than ppo.rollout_mismatch_max 0.375: leave ppo.rollout_dtype out, or"
            " raise that bound"
        )


def test_a_sampler_that_is_another_policy_is_told_by_how_much() -> None:
    metrics.refuse_mismatch(ROLLOUT, apart(0.1))
    for nats, said in ((0.456, "0.46"), (math.nan, "nan")):
        with pytest.raises(UserError) as refused:
            metrics.refuse_mismatch(ROLLOUT, apart(nats))
        assert str(refused.value) == (
            f"before training, sampler and trainer differ by {said} nats per token on average (at"
            " most 0.2 is rounding), so the policy that samples is not the one that learns: set"
            " policy.dtype=float32, or take a family that docs/your-model.md lists"
        )


def test_of_endings() -> None:
    mask = torch.arange(4) < T([4, 1, 2])[:, None]
    sampled = Rollout([[1]] * 3, mask.long(), mask, mask.float(), T([True, False, True]))
    endings = [Ending("so.", 2, True), Ending("<|eot_id|>", 1, True), Ending("and", 2, False)]
    assert metrics.ending_metrics(sampled, endings, tiny_tokenizer()) == pytest.approx(
        {
            "val/num_eos_tokens": 1.0,
            "response/length": 7 / 3,
            "response/scored_length": 5 / 3,
            "response/cut": 2 / 3,
            "response/unended": 1 / 3,
            "response/spelled": 1 / 3,
        }
    )


def test_of_a_critic_where_there_is_one() -> None:
    values, returns = T([[1.0, 0.0, 2.0], [0.0, 9.0, 9.0]]), T([[2.0, 0.0, 4.0], [2.0, 0.0, 0.0]])
    # errors 1, 0, 2, 2: variance 11/16; returns 2, 0, 4, 2: variance 2
    assert metrics.critic_metrics(values, returns, MASK) == {
        "val/explained_variance": pytest.approx(1 - 11 / 32)
    }
    assert metrics.critic_metrics(None, returns, MASK) == {}
    assert metrics.critic_metrics(values, None, MASK) == {}


def test_of_latents_that_are_tracked_and_not_penalised() -> None:
    reward: Any = SimpleNamespace(
        metrics=lambda scores: {"z/3": float(len(scores.monitors_z))},
        monitors=(8, 3),
        kind="threshold",
    )
    scores: Any = SimpleNamespace(monitors_z=T([[0.5, 2.0], [0.0, 0.25]]))
    tracked: Any = [SimpleNamespace(latent=latent, tau=0.25) for latent in (3, 5, 8)]
    found = metrics.score_metrics(reward, scores, tracked)
    assert found == {"z/3": 2.0, "rate/3": 0.5, "rate/8": 0.5} and list(found)[1] == "rate/3"
    reward.kind = "density"  # whatever their taus: above 0
    assert metrics.score_metrics(reward, scores, tracked)["rate/3"] == 1.0


def test_a_mean_over_sequences_is_of_their_sums() -> None:
    assert metrics.per_sequence(T([[1.0, 2.0, 3.0], [4.0, math.nan, 7.0]]), MASK) == 5.0
