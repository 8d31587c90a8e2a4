"""Two steps of the real trainer against the algorithm written out once more, token by token, in
float64 and numpy, with every setting away from its default: one run with a critic and LoRA, one
without and in full, each in the penalty and the no-penalty arm, and one sampled from fp8 weights.
Only the responses are taken over, and what their sampler said of their tokens.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from sarm.config import PpoConfig
from sarm.llama.generate import Rollout
from sarm.ppo.learner.distributed import World
from sarm.ppo.trainer import Trainer
from tests.ranks import PlantedReward, some_prompts
from tests.tiny import tiny_tokenizer

SEED, ALPHA, WORTH = 3, 0.6, 0.25
PROJECTIONS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
COMMON: dict[str, Any] = {
    "steps": 5,
    "batch_size": 8,
    "max_new_tokens": 7,
    "micro_batch_tokens": 70,
    "temperature": 0.7,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "learning_rate": 5e-4,
    "warmup_steps": 1,
    "weight_decay": 0.1,
    "max_grad_norm": 0.2,
    "cliprange_low": 0.02,
    "cliprange_high": 0.05,
    "kl_controller": "adaptive",
    "kl_coef": 0.3,
    "kl_target": 0.2,
    "kl_horizon": 20,
    "missing_eos_penalty": 0.3,
    "entropy_coef": 0.02,
}
CRITIC = COMMON | {
    "lora": {"rank": 2, "alpha": 6},
    "learning_rate": 4e-3,
    "lr_schedule": "cosine",
    "warmup_steps": 0,
    "kl_estimator": "k3",
    "gamma": 0.9,
    "lam": 0.6,
    "dual_clip": 1.01,
    "cliprange_value": 0.01,
    "vf_coef": 0.4,
    "value_learning_rate": 2e-2,
    "value_max_grad_norm": 0.05,
    "reward_scale": "running_sd",
    "reward_clip": 1.1,
    "whiten_advantages": False,
}
BASE_SD = 0.6
FREE = COMMON | {
    "lora": None,
    "lr_schedule": "constant",
    "advantage": "rloo",
    "samples_per_prompt": 2,
    "kl_in": "loss",
    "kl_estimator": "k2",
    "reward_scale": "none",
    "reward_clip": 0.25,
    "dual_clip": None,
    "whiten_advantages": True,
}
WHITENED = CRITIC | {
    "whiten_advantages": True,
    "reward_scale": "base_sd",
    "reward_clip": None,
    "lora": None,
    "lr_schedule": "linear",
    "learning_rate": 5e-4,
    "value_learning_rate": None,
    "value_max_grad_norm": None,
}


QUANTISED = FREE | {"rollout_dtype": "fp8", "rollout_weight_cap": 1.02, "rollout_mismatch_max": 3.0}


class Run(NamedTuple):
    """What the trainer did."""

    rollouts: list[Rollout]
    metrics: list[dict[str, float]]
    start: dict[str, Tensor]
    """The trainable parameters before."""
    end: dict[str, Tensor]


def trained(policy: Path, ppo: PpoConfig, penalty: bool) -> Run:
    # With dropout in its file, which training must turn off.
    model = AutoModelForCausalLM.from_pretrained(policy, attention_dropout=0.5)
    reward = PlantedReward(alpha=ALPHA, worth=WORTH)
    trainer = Trainer(
        ppo,
        model,
        tiny_tokenizer(),
        reward if penalty else reward.without_penalty(),
        some_prompts(8 // ppo.samples_per_prompt),
        seed=SEED,
        world=World(),
        base_reward_sd=BASE_SD,
    )
    rollouts: list[Rollout] = []
    sample = trainer.learner.sample

    def kept(*args: Any, **how: Any) -> Rollout:
        rollouts.append(sample(*args, **how))
        return rollouts[-1]

    trainer.learner.sample = kept  # type: ignore[method-assign]
    weights = lambda: {  # noqa: E731
        name: p.detach().double().clone()
        for name, p in trainer.learner.actor.named_parameters()
        if p.requires_grad
    }
    start = weights()
    metrics = [trainer.run_step() for _ in range(2)]
    return Run(rollouts, metrics, start, weights())


class Token(NamedTuple):
    """Of one response token: with gradient where the parameters have it."""

    logprob: Tensor
    entropy: Tensor
    value: Tensor


class Hand:
    """The algorithm once more."""

    def __init__(self, policy: Path, ppo: PpoConfig, run: Run, penalty: bool) -> None:
        self.ppo, self.run, self.penalty = ppo, run, penalty
        self.model = AutoModelForCausalLM.from_pretrained(
            policy, dtype=torch.float64, attn_implementation="eager"
        )
        self.base = {name: p.detach() for name, p in self.model.named_parameters()}
        self.critic = ppo.advantage == "gae"
        self.weights = {name: p.clone().requires_grad_() for name, p in run.start.items()}
        self.moments = {name: [np.zeros(p.shape)] * 2 for name, p in run.start.items()}
        self.updates, self.seen, self.kl_coef = 0, [], ppo.kl_coef
        layers = range(self.model.config.num_hidden_layers)
        modules = [f"model.layers.{i}.{name}" for i in layers for name in PROJECTIONS]
        self.adapted = {
            f"{m}.weight": [f"policy.base_model.model.{m}.lora_{ab}.default.weight" for ab in "BA"]
            for m in modules
        }
        expected = {name for pair in self.adapted.values() for name in pair}
        if ppo.lora is None:
            expected = {f"policy.{name}" for name in self.base}
        heads = {"value_head.weight", "value_head.bias"} if self.critic else set()
        assert self.weights.keys() == expected | heads

    def policy(self) -> dict[str, Tensor]:
        """The policy's weights under the names of a plain model."""
        if self.ppo.lora is None:
            return {name: self.weights[f"policy.{name}"] for name in self.base}
        scaling = self.ppo.lora.alpha / self.ppo.lora.rank
        return self.base | {
            name: self.base[name] + scaling * self.weights[b] @ self.weights[a]
            for name, (b, a) in self.adapted.items()
        }

    def tokens(self, weights: dict[str, Tensor], rollout: Rollout, row: int) -> list[Token]:
        prompt, response = rollout.prompts[row], rollout.ids(row)
        ids = torch.tensor([prompt + response])
        out = functional_call(self.model, weights, (ids,), {"output_hidden_states": True})
        found = []
        for t, token in enumerate(response):
            at = len(prompt) - 1 + t
            log_p = torch.log_softmax(out.logits[0, at] / 0.7, -1)
            value = torch.zeros((), dtype=torch.float64)
            if self.critic:
                head, bias = self.weights["value_head.weight"][0], self.weights["value_head.bias"]
                value = out.hidden_states[-1][0, at] @ head + bias[0]
            found.append(Token(log_p[token], -(log_p.exp() * log_p).sum(), value))
        return found

    def score(self, rollout: Rollout, row: int) -> tuple[float, float]:
        """(reward, penalty): the planted latent fires on texts with an e."""
        text = tiny_tokenizer().decode(rollout.ids(row), skip_special_tokens=True).strip()
        fires = float("e" in text)
        return WORTH * fires + len(text) / 100, ALPHA * fires * self.penalty

    def step(self, at: int) -> dict[str, float]:
        ppo, rollout = self.ppo, self.run.rollouts[at]
        rows = range(len(rollout.prompts))
        with torch.no_grad():
            old = [self.tokens(self.policy(), rollout, row) for row in rows]
            ref = [[float(t.logprob) for t in self.tokens(self.base, rollout, row)] for row in rows]
        logprobs = [[float(t.logprob) for t in of_row] for of_row in old]
        values = [[float(t.value) for t in of_row] for of_row in old]
        scores = [self.score(rollout, row) for row in rows]
        paid = [
            r - p - (0.3 if rollout.truncated[row] else 0.0) for row, (r, p) in enumerate(scores)
        ]
        sd = BASE_SD if ppo.reward_scale == "base_sd" else 1.0
        if ppo.reward_scale == "running_sd":
            self.seen += paid
            sd = float(np.std(self.seen, ddof=1))
        limit = math.inf if ppo.reward_clip is None else ppo.reward_clip
        scaled = [min(max(r / sd, -limit), limit) for r in paid]
        kl = [
            [self.estimate(p - q) for p, q in zip(*pair, strict=True)]
            for pair in zip(logprobs, ref, strict=True)
        ]
        in_reward = self.kl_coef if ppo.kl_in == "reward" else 0.0
        rewards = [[-in_reward * k for k in of_row] for of_row in kl]
        for row in rows:
            rewards[row][-1] += scaled[row]
        advantages, returns = self.advantages(rewards, values)
        if ppo.whiten:
            every = np.concatenate(advantages)
            advantages = [(a - every.mean()) / math.sqrt(every.var() + 1e-8) for a in advantages]

        lr, value_lr = self.rates(at)
        updates = []
        for epoch in range(ppo.num_ppo_epochs):
            digest = hashlib.sha256(f"{SEED}/{at}/{epoch}".encode()).digest()[:6]
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
            order = torch.randperm(8, generator=generator).tolist()
            for part in (order[:4], order[4:]):
                updates.append(
                    self.update(
                        rollout, part, logprobs, ref, values, advantages, returns, lr, value_lr
                    )
                )
        per_row = lambda lists: float(np.mean([sum(x) for x in lists]))  # noqa: E731
        drift = [
            [p - q for p, q in zip(*pair, strict=True)] for pair in zip(logprobs, ref, strict=True)
        ]
        metrics = {
            "objective/kl": per_row(drift),
            "objective/entropy": -per_row(logprobs),
            "objective/non_score_reward": -self.kl_coef * per_row(kl),
            "objective/rlhf_reward": per_row(rewards),
            "objective/kl_coef": self.kl_coef,
            "objective/reward_sd": sd,
            "objective/scores": float(np.mean([r for r, _ in scores])),
            "objective/penalty": float(np.mean([p for _, p in scores])),
            "val/num_eos_tokens": float(8 - sum(rollout.truncated.tolist())),
            "lr": lr,
            "policy/updates": 4.0,
            "policy/grad_norm": float(np.mean([u.pop("norm") for u in updates])),
        }
        if ppo.rollout_dtype:
            apart = [
                math.exp(p - float(q))
                for row in rows
                for p, q in zip(logprobs[row], rollout.logprobs[row], strict=False)
            ]
            metrics["rollout/importance_avg"] = float(np.mean([min(w, 1.02) for w in apart]))
            metrics["rollout/importance_max"] = max(apart)
            metrics["rollout/importance_capped"] = float(np.mean([w > 1.02 for w in apart]))
        if self.critic:
            errors = np.concatenate(returns) - np.concatenate(values)
            spread = np.concatenate(returns).var()
            metrics["val/explained_variance"] = 1 - errors.var() / spread
        tokens = sum(u["tokens"] for u in updates)
        metrics |= {k: sum(u[k] for u in updates) / tokens for k in updates[0] if k != "tokens"}
        metrics["loss/total"] = (
            metrics["loss/policy_avg"]
            - 0.02 * metrics["policy/entropy_avg"]
            + (0.4 * metrics["loss/value_avg"] if self.critic else 0)
            + (self.kl_coef * metrics["loss/kl_avg"] if ppo.kl_in == "loss" else 0)
        )
        error = min(max(metrics["objective/kl"] / 0.2 - 1, -0.2), 0.2)
        self.kl_coef *= 1 + error * 8 / 20
        return metrics

    def estimate(self, log_ratio: float) -> float:
        if self.ppo.kl_estimator == "k2":
            return log_ratio**2 / 2
        return math.exp(-log_ratio) - 1 + log_ratio

    def advantages(
        self, rewards: list[list[float]], values: list[list[float]]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        if not self.critic:
            totals = [sum(of_row) for of_row in rewards]
            # two responses to a prompt: each other's baseline
            own = [totals[row] - totals[row ^ 1] for row in range(8)]
            return [np.full(len(r), a) for r, a in zip(rewards, own, strict=True)], []
        found, returns = [], []
        for r, v in zip(rewards, values, strict=True):
            after = [*v[1:], 0.0]
            deltas = [r[t] + 0.9 * after[t] - v[t] for t in range(len(r))]
            each = [
                sum((0.9 * 0.6) ** (s - t) * deltas[s] for s in range(t, len(r)))
                for t in range(len(r))
            ]
            found.append(np.array(each))
            returns.append(np.array(each) + np.array(v))
        return found, returns

    def rates(self, at: int) -> tuple[float, float]:
        """Of five steps; without a critic the first is warm-up, and the rate then stays."""
        share = {
            "constant": (0.5, 1.0),
            "linear": (1.0, 0.8),
            "cosine": (1.0, (1 + math.cos(math.pi / 5)) / 2),
        }[self.ppo.lr_schedule][at]
        peak = 4e-3 if self.ppo.lora else 5e-4
        return peak * share, (2e-2 if self.ppo.lora else peak) * share

    def update(
        self,
        rollout: Rollout,
        part: list[int],
        old: list[list[float]],
        ref: list[list[float]],
        old_values: list[list[float]],
        advantages: list[np.ndarray],
        returns: list[np.ndarray],
        lr: float,
        value_lr: float,
    ) -> dict[str, float]:
        ppo, sums = self.ppo, dict[str, float]()
        loss = torch.zeros((), dtype=torch.float64)

        def add(name: str, value: Any) -> None:
            sums[name] = sums.get(name, 0.0) + float(value)

        for row in part:
            for t, new in enumerate(self.tokens(self.policy(), rollout, row)):
                advantage = float(advantages[row][t])
                ratio = (new.logprob - old[row][t]).exp()
                plain, clipped = -advantage * ratio, -advantage * ratio.clamp(0.98, 1.05)
                term = torch.maximum(plain, clipped)
                held = ppo.dual_clip is not None and advantage < 0 and term > -advantage * 1.01
                if held:
                    term = torch.tensor(-advantage * 1.01, dtype=torch.float64)
                weight = 1.0
                if ppo.rollout_dtype:
                    weight = min(math.exp(old[row][t] - float(rollout.logprobs[row, t])), 1.02)
                term = term * weight
                loss = loss + term - 0.02 * new.entropy
                add("tokens", 1)
                add("loss/policy_avg", term.detach())
                add("policy/entropy_avg", new.entropy.detach())
                add("policy/approxkl_avg", (new.logprob.detach() - old[row][t]) ** 2 / 2)
                add("policy/clipfrac_avg", clipped > plain)
                add("policy/clipfrac_lower_avg", held)
                add("val/ratio", ratio.detach())
                if ppo.kl_in == "loss":
                    kl = weight * (new.logprob - ref[row][t]) ** 2 / 2
                    loss = loss + self.kl_coef * kl
                    add("loss/kl_avg", kl.detach())
                if self.critic:
                    before, target = old_values[row][t], float(returns[row][t])
                    near = new.value.clamp(before - 0.01, before + 0.01)
                    plain, clipped = (new.value - target) ** 2, (near - target) ** 2
                    error = torch.maximum(plain, clipped) / 2
                    loss = loss + 0.4 * error
                    add("loss/value_avg", error.detach())
                    add("val/clipfrac_avg", clipped > plain)
        for weight in self.weights.values():
            weight.grad = None
        (loss / sums["tokens"]).backward()
        heads = [name for name in self.weights if name.startswith("value_head")]
        others = [name for name in self.weights if name not in heads]
        self.updates += 1
        apart = ppo.value_max_grad_norm is not None
        sums["norm"] = self.clip(others if apart else others + heads, 0.2)
        if apart:
            self.clip(heads, 0.05)
        self.adam(others, lr)
        self.adam(heads, value_lr)
        return sums

    def clip(self, names: list[str], most: float) -> float:
        grads = [self.weights[name].grad for name in names]
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
        for grad in grads:
            grad *= min(1.0, most / (norm + 1e-6))
        return norm

    def adam(self, names: list[str], lr: float) -> None:
        for name in names:
            grad = self.weights[name].grad.numpy()
            first, second = self.moments[name]
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
            self.moments[name] = [first, second]
            step = (first / (1 - 0.9**self.updates)) / (
                np.sqrt(second / (1 - 0.999**self.updates)) + 1e-8
            )
            with torch.no_grad():
                self.weights[name] *= 1 - lr * 0.1
                self.weights[name] -= lr * torch.from_numpy(step)


@pytest.mark.parametrize("penalty", [True, False])
@pytest.mark.parametrize(
    "settings", [CRITIC, FREE, WHITENED, QUANTISED], ids=["critic", "free", "whitened", "quantised"]
)
def test_two_steps_are_those_written_out(
    tiny_policy: Path, settings: dict[str, Any], penalty: bool
) -> None:
    if settings in (WHITENED, QUANTISED) and not penalty:
        pytest.skip("the arms differ in the reward alone")
    ppo = PpoConfig.model_validate(settings)
    run = trained(tiny_policy, ppo, penalty)
    hand = Hand(tiny_policy, ppo, run, penalty)
    for at in range(2):
        want = hand.step(at)
        got = {name: run.metrics[at][name] for name in want}
        assert got == pytest.approx(want, rel=1e-5, abs=4e-6), at
    for name, weight in run.end.items():
        # Adam makes a whole step of a gradient that is nearly rounding: all but a few, then.
        apart = (weight - hand.weights[name].detach()).abs().flatten()
        assert float(apart.quantile(0.97)) < 1e-6 and float(apart.max()) < 2e-4, name
        assert not torch.equal(weight, run.start[name])
    # What was to be seen was there.
    second = run.metrics[1]
    assert second["policy/clipfrac_avg"] > 0 and abs(second["objective/kl"]) > 1e-3
    assert (second["objective/penalty"] > 0) == penalty
    assert second["policy/grad_norm"] > 0.2
    if settings is QUANTISED:
        assert 0.05 < second["rollout/importance_capped"] < 0.95
        assert second["rollout/logprob_mismatch"] > 5e-3
    if settings is CRITIC:
        assert second["val/clipfrac_avg"] > 0


def test_each_step_draws_other_noise(tiny_policy: Path) -> None:
    """The same prompts and, at learning rate 0, the same policy."""
    still = COMMON | {"learning_rate": 0.0, "weight_decay": 0.0, "num_ppo_epochs": 1}
    run = trained(tiny_policy, PpoConfig.model_validate(still | {"lora": None}), True)
    first, second = (
        dict(zip(map(tuple, r.prompts), r.responses.tolist(), strict=True)) for r in run.rollouts
    )
    assert first.keys() == second.keys()
    assert all(first[prompt] != second[prompt] for prompt in first)


def test_in_the_value_heads_warm_up_the_policy_stays(tiny_policy: Path) -> None:
    settings = COMMON | {"lora": None, "warmup_steps": 0, "value_warmup_steps": 1}
    ppo = PpoConfig.model_validate(settings)
    trainer = Trainer(
        ppo,
        AutoModelForCausalLM.from_pretrained(tiny_policy),
        tiny_tokenizer(),
        PlantedReward(),
        some_prompts(),
        seed=0,
        world=World(),
    )
    actor = trainer.learner.actor
    before = {name: p.detach().clone() for name, p in actor.named_parameters()}
    lrs = []
    for moved in (False, True):
        lrs.append(trainer.run_step()["lr"])
        assert not torch.equal(actor.value_head.weight, before["value_head.weight"])
        for name, p in actor.policy.named_parameters():
            assert torch.equal(p, before[f"policy.{name}"]) != moved
    # The policy's schedule begins after the warm-up.
    assert lrs == pytest.approx([0.0, 5e-4])
