"""PPO: a policy rewarded by a `CompoundReward`, a step at a time.

`python -m jobs ppo --run R --unit penalty-seed0` trains one arm. `Trainer.run_step` is the
algorithm: draw prompts, sample, score, take log-probabilities, rewards, advantages, update. What
carries it out (ranks, micro-batches, memory) is behind `learner/learner.py`.

What a step computes depends neither on the number of ranks nor on micro-batches, up to rounding:
every rank holds the whole batch and computes the same advantages, and losses are sums over tokens
divided by the response tokens of the whole optimizer step.

Notation: B sequences of a step, t response positions, n response tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sarm.config import PpoConfig
from sarm.data.conversations import response_text, stop_ids
from sarm.data.datasets import Prompt
from sarm.data.endings import Ending, ending
from sarm.llama.generate import Rollout
from sarm.ppo import losses, metrics, objective
from sarm.ppo.advantages import ADVANTAGES, Episodes
from sarm.ppo.batching import fitting_prompts, mini_batches, mix_of, rows_of_step
from sarm.ppo.drift import Drift
from sarm.ppo.kl import kl_per_token, next_kl_coef
from sarm.ppo.learner.learner import Learner, Logprobs, NotFinite
from sarm.ppo.reward import CompoundReward, Penalised, Scores, conversation


class Drawn(NamedTuple):
    """One sequence to be sampled: a prompt, its tokens, and the key of its noise."""

    prompt: Prompt
    ids: list[int]
    key: str


class Rewards(NamedTuple):
    """What a step pays."""

    tokens: Tensor
    """(B, t)."""
    kl: Tensor
    """(B, t), to the reference, estimated by `ppo.kl_estimator`."""
    sd: float
    """What scores were divided by."""
    running: objective.RunningSd
    """With this step's rewards."""


class Experience(NamedTuple):
    """What the updates of one step learn from; all (B, t), and in a loss (n,)."""

    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    old_values: Tensor | None
    """None without a critic, as the next."""
    returns: Tensor | None
    importance: Tensor | None
    """What each token weighs in the losses; None where the policy itself sampled."""


class Progress(NamedTuple):
    """What a checkpoint needs beside tensors; replaced when a step has ended well."""

    step: int
    """Steps done, so the index of the next."""
    kl_coef: float
    running: objective.RunningSd
    training_s: float
    drift: Drift = Drift()


class Trainer:
    """One arm's training: everything a step needs, and its progress."""

    def __init__(
        self,
        ppo: PpoConfig,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reward: CompoundReward,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        world: Any,
        trim: bool = False,
        base_reward_sd: float = 1.0,
    ) -> None:
        """`trim`: what a response that was cut holds after its last sentence end is neither scored
        nor learnt from. `base_reward_sd`: of the reward of the base policy's responses.
        """
        self.trim, self.base_reward_sd = trim, base_reward_sd
        self.ppo, self.tokenizer, self.reward, self.seed = ppo, tokenizer, reward, seed
        self.tracked: tuple[Penalised, ...] = reward.penalised
        """Latents whose rates are logged in every arm; those that the reward penalises are logged
        besides.
        """
        context = getattr(policy.config, "max_position_embeddings", None)
        self.prompts, self.prompt_ids, self.long_prompts = fitting_prompts(
            ppo, prompts, tokenizer, context
        )
        self.mix = mix_of(ppo, self.prompts)
        stops = stop_ids(policy, tokenizer)
        pad_id = stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        scorer = (*reward.model.parameters(), *reward.model.buffers())
        self.learner = Learner(
            ppo,
            policy,
            stops=stops,
            pad_id=int(pad_id),
            longest_prompt=max(map(len, self.prompt_ids)),
            reward_bytes=sum(t.nbytes for t in scorer),
            seed=seed,
            world=world,
        )
        self.estimate = ADVANTAGES[ppo.advantage]
        self.progress = Progress(0, ppo.kl_coef, objective.RunningSd(), 0.0)

    def run_step(self) -> dict[str, float]:
        """One PPO step; its metrics. Raises NotFinite, and UserError where the first finds that
        sampler and trainer disagree, or any that they do by more than `rollout_mismatch_max` where
        the sampler is quantised.
        """
        drawn = self.draw(self.rows(self.progress.step))
        sampled = self.sample(drawn, self.progress.step)
        endings = self.endings(sampled)
        rollout = sampled.first([e.tokens for e in endings])
        read_logprobs = self.learner.forward(rollout)  # computed while texts are scored
        scores = self.score(drawn, rollout, [e.text for e in endings])
        logprobs = read_logprobs()
        if self.ppo.rollout_dtype is not None:
            metrics.refuse_quantised(self.ppo, self.progress.step, rollout, logprobs)
        elif self.progress.step == 0:
            metrics.refuse_mismatch(rollout, logprobs)
        rewards = self.rewards(rollout, scores, logprobs)
        experience = self.experience(rollout, rewards, logprobs)
        read_updates = self.update(rollout, experience)
        found = self.metrics(rollout, scores, logprobs, rewards, experience) | read_updates()
        found |= metrics.ending_metrics(sampled, endings, self.reward.tokenizer)
        pace = self.learner.pace(rollout)
        self.progress = Progress(
            self.progress.step + 1,
            self.next_kl_coef(found["objective/kl"]),
            rewards.running,
            self.progress.training_s + pace["time/step"],
            self.progress.drift.after(found["objective/kl"]),
        )
        return found | pace

    def rows(self, step: int) -> list[int]:
        """Which prompts the step draws, the samples of each side by side."""
        ids = [p.id for p in self.prompts]
        ppo = self.ppo
        return rows_of_step(ids, self.seed, step, ppo.batch_size, ppo.samples_per_prompt, self.mix)

    def draw(self, rows: Sequence[int]) -> list[Drawn]:
        """The sequences to sample; a prompt drawn twice has two keys."""
        drawn: list[Drawn] = []
        for at, row in enumerate(rows):
            again = sum(other == row for other in rows[:at])
            drawn.append(
                Drawn(self.prompts[row], self.prompt_ids[row], f"{self.prompts[row].id}#{again}")
            )
        return drawn

    def sample(self, drawn: Sequence[Drawn], step: int, **how: Any) -> Rollout:
        """A response to each; `how` as in `Learner.sample`."""
        return self.learner.sample([d.ids for d in drawn], [d.key for d in drawn], step, **how)

    def endings(self, rollout: Rollout) -> list[Ending]:
        """How much of each response is scored and learnt from."""
        return [
            ending(
                lambda ids: response_text(self.tokenizer, ids),
                rollout.ids(row),
                cut=cut,
                trim=self.trim,
            )
            for row, cut in enumerate(rollout.truncated.tolist())
        ]

    def score(self, drawn: Sequence[Drawn], rollout: Rollout, texts: Sequence[str]) -> Scores:
        """Each response's reward, penalty and latents, read off its text. Raises NotFinite."""
        conversations = [
            conversation(d.prompt.messages, text) for d, text in zip(drawn, texts, strict=True)
        ]
        scores = Scores(
            *self.learner.map_rows(
                rollout, lambda rows: self.reward.score([conversations[row] for row in rows])
            )
        )
        if not bool(torch.isfinite(scores.total).all()):
            raise NotFinite("a reward", updated=False)
        return scores

    def rewards(self, rollout: Rollout, scores: Scores, logprobs: Logprobs) -> Rewards:
        """A response's score at its last token, scaled, and the KL's cost at every token."""
        ppo = self.ppo
        kl = kl_per_token(logprobs.old, logprobs.ref, ppo.kl_estimator, ppo.log_ratio_max)
        ended = ~rollout.truncated
        paid = objective.penalise_missing_eos(scores.total, ended, ppo.missing_eos_penalty)
        running = self.progress.running.updated(paid)
        scales = {"none": 1.0, "running_sd": running.sd, "base_sd": self.base_reward_sd}
        sd = scales[ppo.reward_scale]
        scaled = objective.scaled_rewards(paid, sd, ppo.reward_clip)
        coef = self.progress.kl_coef if ppo.kl_in == "reward" else 0.0
        return Rewards(objective.token_rewards(scaled, kl, rollout.mask, coef), kl, sd, running)

    def experience(self, rollout: Rollout, rewards: Rewards, logprobs: Logprobs) -> Experience:
        """What to learn from: advantages, by `ppo.advantage`, and what the losses compare with."""
        ppo, values, mask = self.ppo, logprobs.values, rollout.mask
        advantages, returns = self.estimate(
            Episodes(rewards.tokens, values, mask, ppo.samples_per_prompt, ppo.gamma, ppo.lam)
        )
        if ppo.whiten:
            advantages = objective.whiten(advantages, mask)
        importance = None
        if ppo.rollout_dtype is not None:
            importance = objective.importance_weights(
                logprobs.old, rollout.logprobs, ppo.rollout_weight_cap
            )
        return Experience(logprobs.old, logprobs.ref, advantages, values, returns, importance)

    def update(self, rollout: Rollout, experience: Experience) -> Callable[[], dict[str, float]]:
        """Start the optimizer steps over one batch; a function that waits for them and gives
        metrics over all of them. Both raise NotFinite.
        """
        ppo, step = self.ppo, self.progress.step
        lr, value_lr = self.learning_rates(step)
        sums: list[losses.Sums] = []
        norms: list[Tensor] = []
        stopped = False
        for epoch in range(ppo.num_ppo_epochs):
            for rows in mini_batches(
                len(rollout.prompts), ppo.num_mini_batches, self.seed, step, epoch
            ):
                if stopped:
                    break
                sums.append(self.learner.forward_backward(rollout, rows, self.loss, experience))
                norms.append(self.learner.optim_step(lr, value_lr))
                stopped = losses.kl_exceeds(sums[-1], ppo.kl_stop)
        self.learner.sync_sampler()

        def updated() -> dict[str, float]:
            found = losses.means(sums)
            found["loss/total"] = self.total_loss(found)
            norm = float(torch.stack(norms).mean())
            if not math.isfinite(norm):
                raise NotFinite("the gradient", updated=True)
            return found | {
                "lr": lr,
                "policy/grad_norm": norm,
                "policy/updates": float(len(norms)),
                "policy/kl_stopped": float(stopped),
            }

        return updated

    def loss(self, new: Any, old: Experience) -> losses.Loss:
        """Of the response tokens of a micro-batch: what the policy now says of them, and what it
        learns from. The whole objective; see `losses.py` for its terms.
        """
        ppo = self.ppo
        loss = losses.policy_loss(
            new.logprobs,
            old.old_logprobs,
            old.advantages,
            cliprange_low=ppo.cliprange_low,
            cliprange_high=ppo.cliprange_high,
            dual_clip=ppo.dual_clip,
            log_ratio_max=ppo.log_ratio_max,
            importance=old.importance,
        )
        if old.old_values is not None and old.returns is not None:
            value = losses.value_loss(
                new.values, old.old_values, old.returns, cliprange_value=ppo.cliprange_value
            )
            loss = loss.plus(value, ppo.vf_coef)
        if ppo.kl_in == "loss":
            kl = losses.kl_loss(
                new.logprobs,
                old.ref_logprobs,
                estimator=ppo.kl_estimator,
                log_ratio_max=ppo.log_ratio_max,
                importance=old.importance,
            )
            loss = loss.plus(kl, self.progress.kl_coef)
        return loss.plus(losses.entropy_bonus(new.entropy), -ppo.entropy_coef)

    def total_loss(self, found: dict[str, float]) -> float:
        """The mean of `loss`, from the means of its terms."""
        weights = {
            "loss/policy_avg": 1.0,
            "loss/value_avg": self.ppo.vf_coef,
            "loss/kl_avg": self.progress.kl_coef,
            "policy/entropy_avg": -self.ppo.entropy_coef,
        }
        return sum(weight * found[term] for term, weight in weights.items() if term in found)

    def learning_rates(self, step: int) -> tuple[float, float]:
        """(of the policy, of the value head)."""
        ppo, warmup = self.ppo, self.ppo.value_warmup_steps

        def rate(peak: float, step: int, steps: int) -> float:
            return objective.learning_rate(
                step,
                steps=steps,
                peak=peak,
                schedule=ppo.lr_schedule,
                warmup_steps=ppo.warmup_steps,
            )

        peak = ppo.peak_learning_rate
        value_peak = peak if ppo.value_learning_rate is None else ppo.value_learning_rate
        of_policy = rate(peak, step - warmup, ppo.steps - warmup) if step >= warmup else 0.0
        return of_policy, rate(value_peak, step, ppo.steps)

    def next_kl_coef(self, kl: float) -> float:
        ppo = self.ppo
        return next_kl_coef(
            self.progress.kl_coef,
            kl,
            ppo.batch_size,
            ppo.kl_controller,
            ppo.kl_target,
            ppo.kl_horizon,
        )

    def metrics(
        self,
        rollout: Rollout,
        scores: Scores,
        logprobs: Logprobs,
        rewards: Rewards,
        experience: Experience,
    ) -> dict[str, float]:
        """Means over the batch, as it was before the updates."""
        coef, mask = self.progress.kl_coef, rollout.mask
        cost = -coef * rewards.kl
        of_importance = (
            {}
            if experience.importance is None
            else metrics.importance_metrics(rollout, logprobs, self.ppo.rollout_weight_cap)
        )
        return (
            metrics.rollout_metrics(rollout, logprobs)
            | of_importance
            | metrics.critic_metrics(logprobs.values, experience.returns, mask)
            | metrics.score_metrics(self.reward, scores, self.tracked)
            | {
                "episode": float((self.progress.step + 1) * self.ppo.batch_size),
                "objective/non_score_reward": metrics.per_sequence(cost, mask),
                "objective/rlhf_reward": metrics.per_sequence(rewards.tokens, mask),
                "objective/kl_coef": coef,
                "objective/reward_sd": rewards.sd,
                "prompts/too_long": float(self.long_prompts),
            }
        )

    # Checkpoints

    def state(self) -> dict[str, Any]:
        """JSON that, with the learner's pieces, says all that the next steps depend on."""
        progress = self.progress
        return progress._asdict() | {
            "running": progress.running._asdict(),
            "drift": progress.drift._asdict(),
        }

    def restore(self, state: dict[str, Any], loaded: Any) -> None:
        """Go on as if never interrupted, from a checkpoint's state and tensors."""
        self.learner.restore(loaded)
        drift = Drift(tuple(state["drift"]["recent"]), state["drift"]["farthest"])
        running = objective.RunningSd(**state["running"])
        self.progress = Progress(**(state | {"running": running, "drift": drift}))
