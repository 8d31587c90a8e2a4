"""PPO: a policy with a value head, rewarded by a `CompoundReward`.

`python -m jobs ppo --run R --unit penalty-seed0` trains one arm. One step, in `Trainer.run_step`:
draw prompts, roll out, judge (old and reference log-probabilities, values), score, assign credit,
update.

What a step computes depends neither on the number of ranks nor on micro-batches, up to rounding:
samples follow `generate.py`, rollouts and scores are gathered, so every rank holds the whole batch
and computes the same advantages, and losses are sums over tokens divided by the response tokens of
the whole optimizer step on all ranks.

Notation: B sequences of a step, b of a micro-batch, t response positions, n response tokens of a
micro-batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sarm.config import PpoConfig, UserError
from sarm.data.conversations import prompt_ids, response_text, stop_ids
from sarm.data.datasets import Prompt
from sarm.llama.decoders import CacheDecoder, Decoder, LlamaWeights, decoder_for
from sarm.llama.generate import EXACT, Rollout, Steps, forced, generate
from sarm.ppo import objective
from sarm.ppo.batching import deal, micro_batches, mini_batches, rows_of_step
from sarm.ppo.learner import layers
from sarm.ppo.learner.actor import Forward, make_actor
from sarm.ppo.learner.checkpoint import Loaded, Piece
from sarm.ppo.learner.clock import BusyGpu, Clock, read_later
from sarm.ppo.learner.cuda_graphs import Recorded
from sarm.ppo.learner.distributed import World
from sarm.ppo.learner.engine import start_engine
from sarm.ppo.learner.memory_plan import (
    RECORDED_POSITIONS,
    RECORDED_TOKENS,
    Gpus,
    Plan,
    make_plan,
    shape_of,
    unplanned,
)
from sarm.ppo.learner.reference import Reference
from sarm.ppo.learner.shards import engine_pieces, restore_engine
from sarm.ppo.reward import CompoundReward, Penalised, Scores, fires


class Drawn(NamedTuple):
    """One sequence to be sampled: a prompt, its tokens, and the key of its noise."""

    prompt: Prompt
    ids: list[int]
    key: str


class Judged(NamedTuple):
    """Of the whole batch, (B, t) float32, 0 at padding."""

    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor


class Experience(NamedTuple):
    """What the updates of one step learn from, whole on every rank; all but the prompts (B, t)."""

    prompts: list[list[int]]
    responses: Tensor
    mask: Tensor
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor

    def length(self, row: int) -> int:
        return len(self.prompts[row]) + int(self.mask[row].sum())


class Credit(NamedTuple):
    """What `credit` finds."""

    experience: Experience
    running: objective.RunningSd
    """With this step's rewards."""
    judged: Judged
    kl: Tensor
    """(B, t), to the reference."""
    rewards: Tensor
    """(B, t)."""


class Progress(NamedTuple):
    """What a checkpoint needs beside tensors; replaced when a step has ended well."""

    step: int
    """Steps done, so the index of the next."""
    kl_coef: float
    running: objective.RunningSd
    training_s: float


class NotFinite(Exception):
    """A loss or reward that is NaN or infinite. `updated`: weights of this step have already
    changed.
    """

    def __init__(self, what: str, updated: bool) -> None:
        super().__init__(what)
        self.updated = updated


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
        world: World,
    ) -> None:
        self.tokenizer, self.reward, self.seed, self.world = tokenizer, reward, seed, world
        self.tracked: tuple[Penalised, ...] = reward.penalised
        """Latents whose rates are logged in every arm; those that the reward penalises are logged
        besides.
        """
        if ppo.batch_size < world.size:
            raise UserError(
                f"ppo.batch_size {ppo.batch_size} is smaller than the number of ranks,"
                f" {world.size}; raise it or use fewer GPUs"
            )
        self.stops = stop_ids(policy, tokenizer)
        self.pad_id = int(
            self.stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
        self.ppo = ppo
        self.prompts, self.prompt_ids, self.long_prompts = self._fitting_prompts(prompts, policy)
        self.plan = self._planned(policy)
        self.ppo = ppo = self.plan.applied(ppo)
        policy.to(world.device)  # type: ignore[arg-type]
        if world.device.type == "cpu":
            # On short texts its backward pass takes a fifth of the time of SDPA's.
            policy.set_attn_implementation("eager")
        self.reference = None if ppo.lora else Reference(policy, self.plan.visiting_layers)
        cuda = world.device.type == "cuda"
        if cuda:
            # What is left to the CPU is small, and torch would index even that by all cores: on a
            # busy host each waits for the last.
            torch.set_num_threads(1)
            layers.lay_side_by_side(policy)
        # ZeRO 3 gathers a module's weights when it is called, which the lean forward does not.
        self.actor = make_actor(
            policy,
            ppo,
            seed,
            lean=cuda and self.plan.zero_stage < 3,
            recompute=self.plan.recompute_layers,
        ).to(world.device)
        self.engine = start_engine(self.actor, ppo, seed, world)
        self.recorded: Recorded | None = None
        if self.plan.recorded:
            frozen = (
                []
                if self.reference is None
                else [*self.reference.model.parameters(), *self.reference.model.buffers()]
            )
            self.recorded = Recorded(
                self._judged,
                self.actor.trainable(),
                [*self.actor.parameters(), *self.actor.buffers(), *frozen],
            )
        self.decoder: Decoder = decoder_for(self.actor.policy)
        if isinstance(self.decoder, CacheDecoder) and self.engine.zero_stage == 3:
            # Its forward would gather weights at every token, and ranks decode for different
            # numbers of tokens.
            raise UserError(
                "ZeRO 3 samples from Llama models only, and the policy is a"
                f" {policy.config.model_type}; set ppo.zero_stage=2"
            )
        self.clock, self.busy = Clock(world.device), BusyGpu(world.device)
        self.progress = Progress(0, ppo.kl_coef, objective.RunningSd(), 0.0)

    def _fitting_prompts(
        self, prompts: Sequence[Prompt], policy: PreTrainedModel
    ) -> tuple[list[Prompt], list[list[int]], int]:
        """Those to train on, their tokens, and how many were too long. Raises UserError where none
        is left or one too long is refused.
        """
        limit, way = self.ppo.max_prompt_tokens, self.ppo.long_prompts
        context = getattr(policy.config, "max_position_embeddings", None)
        if context is not None and limit + self.ppo.max_new_tokens > context:
            raise UserError(
                f"ppo.max_prompt_tokens {limit} and max_new_tokens {self.ppo.max_new_tokens} exceed"
                f" the policy's context of {context}; lower one"
            )
        found = [(p, prompt_ids(self.tokenizer, p.messages)) for p in prompts]
        too_long = [p.id for p, ids in found if len(ids) > limit]
        if too_long and way == "refuse":
            raise UserError(
                f"{len(too_long)} of the {len(prompts)} ppo prompts have more than"
                f" ppo.max_prompt_tokens={limit} tokens ({', '.join(too_long[:5])} ...); raise it"
                " or set ppo.long_prompts to skip or truncate"
            )
        if way == "truncate":
            found = [
                (p, ids if len(ids) <= limit else [*ids[:1], *ids[len(ids) - limit + 1 :]])
                for p, ids in found
            ]
        found = [(p, ids) for p, ids in found if len(ids) <= limit]
        if not found:
            raise UserError(
                f"none of the {len(prompts)} ppo prompts has at most {limit} tokens; raise"
                " ppo.max_prompt_tokens or give part ppo other data"
            )
        return [p for p, _ in found], [ids for _, ids in found], len(too_long)

    def _planned(self, policy: PreTrainedModel) -> Plan:
        """What the config leaves open, by the memory of the smallest GPU. Raises UserError where
        it does not fit.
        """
        device, lean = self.world.device, LlamaWeights.knows(policy)
        if device.type != "cuda" or policy.dtype != torch.bfloat16 or not lean:
            return unplanned(
                self.ppo,
                int(getattr(policy.config, "num_hidden_layers", 1)) if device.type == "cuda" else 0,
            )
        gib = min(
            float(text)
            for text in self.world.gather_texts(
                str(torch.cuda.get_device_properties(device).total_memory / 2**30)
            )
        )
        sarm_bytes = sum(
            t.nbytes for t in (*self.reward.model.parameters(), *self.reward.model.buffers())
        )
        as_long = self.ppo.model_copy(update={"max_prompt_tokens": max(map(len, self.prompt_ids))})
        return make_plan(
            as_long, shape_of(policy.config.to_dict()), sarm_bytes, Gpus(self.world.size, gib)
        )

    # One step

    def run_step(self) -> dict[str, float]:
        """One PPO step; its metrics. Raises NotFinite."""
        self.clock, started = Clock(self.world.device), time.perf_counter()
        self.busy.share()
        step = self.progress.step
        self.clock.mark("rollout")
        drawn = self.draw(
            rows_of_step([p.id for p in self.prompts], self.seed, step, self.ppo.batch_size)
        )
        if self.reference is not None:
            self.reference.fetch()
        rollout = self.roll_out(drawn, step)
        judged, forward = self.judge(rollout)
        # While the GPU judges, texts are made and tokenised for scoring.
        self.clock.mark("score")
        scores = self.score(drawn, rollout)
        self.clock.mark("credit")
        credit = self.credit(rollout, scores, judged())
        updated = self.update(credit.experience, step, forward)
        self.clock.mark("refresh")
        self.decoder.refresh()
        # While the GPU updates, what is only to be logged is added up.
        metrics = self.credit_metrics(rollout, scores, credit) | updated()
        kl_coef = objective.next_kl_coef(
            self.progress.kl_coef,
            metrics["objective/kl"],
            len(drawn),
            self.ppo.kl_controller,
            self.ppo.kl_target,
            self.ppo.kl_horizon,
        )
        phases = self.clock.seconds()
        seconds = time.perf_counter() - started
        self.progress = Progress(
            step + 1, kl_coef, credit.running, self.progress.training_s + seconds
        )
        return metrics | self._pace(rollout, phases, seconds)

    def draw(self, rows: Sequence[int]) -> list[Drawn]:
        """The sequences to sample; a prompt drawn twice has two keys."""
        drawn: list[Drawn] = []
        for at, row in enumerate(rows):
            again = sum(other == row for other in rows[:at])
            drawn.append(
                Drawn(self.prompts[row], self.prompt_ids[row], f"{self.prompts[row].id}#{again}")
            )
        return drawn

    def roll_out(self, drawn: Sequence[Drawn], step: int, seed: int | None = None) -> Rollout:
        """A response to each, sampled by all ranks and gathered on each. Raises NotFinite."""
        hands = deal([len(d.ids) for d in drawn], self.world.size)
        mine = [drawn[i] for i in hands[self.world.rank]]
        own = generate(
            self.decoder,
            [d.ids for d in mine],
            keys=[d.key for d in mine],
            max_new_tokens=self.ppo.max_new_tokens,
            temperature=self.ppo.temperature,
            top_p=self.ppo.top_p,
            seed=self.seed if seed is None else seed,
            step=step,
            eos_ids=self.stops,
            pad_id=self.pad_id,
        )
        room = self.ppo.max_new_tokens - own.responses.shape[1]
        responses = self.world.gather(F.pad(own.responses, (0, room), value=self.pad_id), hands)
        mask = self.world.gather(F.pad(own.mask, (0, room)), hands)
        logprobs = self.world.gather(F.pad(own.logprobs, (0, room)), hands)
        truncated = self.world.gather(own.truncated, hands)
        if not bool(torch.isfinite(logprobs).all()):
            raise NotFinite("a sampled token's log-probability", updated=False)
        longest = int(mask.sum(1).max())
        return Rollout(
            [d.ids for d in drawn],
            responses[:, :longest],
            mask[:, :longest],
            logprobs[:, :longest],
            truncated,
        )

    def score(self, drawn: Sequence[Drawn], rollout: Rollout) -> Scores:
        """Each response's reward, penalty and latents, scored by all ranks and gathered on each.
        Raises NotFinite.
        """
        hands = self.hands(rollout)
        scores = self.reward.score(
            [self.conversation(drawn[i], rollout.ids(i)) for i in hands[self.world.rank]]
        )
        whole = Scores(*(self.world.gather(field, hands) for field in scores))
        if not bool(torch.isfinite(whole.total).all()):
            raise NotFinite("a reward", updated=False)
        return whole

    def conversation(self, drawn: Drawn, ids: Sequence[int]) -> list[dict[str, str]]:
        return [
            *drawn.prompt.messages,
            {"role": "assistant", "content": response_text(self.tokenizer, ids)},
        ]

    def hands(self, rollout: Rollout) -> list[list[int]]:
        return deal(rollout.lengths(), self.world.size)

    def judge(self, rollout: Rollout) -> tuple[Callable[[], Judged], Forward | None]:
        """A function that waits for teacher-forced log-probabilities under policy and reference,
        at the sampling temperature, and values.

        Where the step makes one update of one micro-batch a rank, the policy's forward pass is that
        update's too: it is returned with its graph, so as not to be done twice.
        """
        lengths = rollout.lengths()
        batches = micro_batches(
            range(len(lengths)), lengths, self.plan.micro_batch_tokens, self.world.size
        )
        updates = self.ppo.num_ppo_epochs * self.ppo.num_mini_batches
        # ZeRO 3 lets go of the weights between a forward and a backward pass in an order that it
        # has learnt.
        once = updates == 1 and len(batches[0]) == 1 and self.engine.zero_stage < 3
        self.engine.train(once)
        parts, forward = [], None
        for rows in batches[self.world.rank]:
            # A mark cannot be recorded, so of a recorded pass the reference's share is not told
            # apart.
            self.clock.mark("reference" if self.recorded is None else "judge")
            inputs = self._forced(rollout.prompts, rollout.responses, rollout.mask, rows)
            with torch.set_grad_enabled(once):
                # where the pass is recorded it is the update's
                found = (self.recorded or self._judged)(*inputs)
            tokens = int(rollout.mask[rows or [0]].sum())
            ref_logprobs, forward = found[0][:tokens], Forward(*(out[:tokens] for out in found[1:]))
            if rows:
                parts.append(torch.stack([forward.logprobs, ref_logprobs, forward.values]).detach())
        hands = [[row for rows in own for row in rows] for own in batches]
        mine = hands[self.world.rank]
        read = read_later(torch.cat(parts, 1)) if mine else None

        def judged() -> Judged:
            found = torch.zeros(3, len(mine), rollout.mask.shape[1])
            if read is not None:
                found[:, rollout.mask[mine]] = read()
            return Judged(*(self.world.gather(values, hands) for values in found))

        return judged, forward if once else None

    def _judged(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The reference's log-probabilities (n,), and what `Forward` holds."""
        with torch.no_grad():
            ref_logprobs = self._reference_logprobs(*inputs)
        if self.recorded is None:
            self.clock.mark("judge")
        return ref_logprobs, *self.engine(*inputs, self.ppo.temperature)

    def _reference_logprobs(self, ids: Tensor, predicts: Tensor, labels: Tensor) -> Tensor:
        """(n,)."""
        if self.reference is None:
            with self.actor.policy.disable_adapter():
                return self.engine(ids, predicts, labels, self.ppo.temperature)[0]
        return self.reference.logprobs(ids, predicts, labels, self.ppo.temperature)

    def _forced(
        self, prompts: Sequence[list[int]], responses: Tensor, mask: Tensor, rows: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`rollout.forced` of some rows, rounded up where the pass is recorded; of the first row
        where there are none, its result to be thrown away.
        """
        rows = rows or [0]
        steps = Steps(RECORDED_POSITIONS, RECORDED_TOKENS) if self.recorded is not None else EXACT
        return forced(
            [prompts[i] for i in rows],
            [responses[i][mask[i]].tolist() for i in rows],
            self.pad_id,
            self.world.device,
            steps,
        )

    def credit(self, rollout: Rollout, scores: Scores, judged: Judged) -> Credit:
        """Token rewards and advantages, the same on every rank."""
        ppo, mask = self.ppo, rollout.mask
        kl = objective.kl_per_token(
            judged.old_logprobs, judged.ref_logprobs, ppo.kl_estimator, ppo.log_ratio_max
        )
        docked = objective.dock_missing_eos(
            scores.total, ~rollout.truncated, ppo.missing_eos_penalty
        )
        running = self.progress.running
        if ppo.reward_scale == "running_sd":
            running = running.updated(docked, _alone)
        scaled = objective.scaled_rewards(
            docked, running.sd if ppo.reward_scale == "running_sd" else 1.0, ppo.reward_clip
        )
        rewards = objective.token_rewards(scaled, kl, mask, self.progress.kl_coef)
        advantages, returns = objective.gae(rewards, judged.values, mask, ppo.gamma, ppo.lam)
        if ppo.whiten_advantages:
            advantages = objective.whiten(advantages, mask, _alone)
        experience = Experience(
            rollout.prompts,
            rollout.responses,
            mask,
            judged.old_logprobs,
            judged.values,
            advantages,
            returns,
        )
        return Credit(experience, running, judged, kl, rewards)

    def credit_metrics(self, rollout: Rollout, scores: Scores, credit: Credit) -> dict[str, float]:
        """Means over the batch of what `credit` was given and found."""
        mask, judged = rollout.mask, credit.judged
        per_sequence = lambda x: float(torch.where(mask, x, 0.0).sum(1).mean())  # noqa: E731
        drift = (judged.old_logprobs - rollout.logprobs)[mask]
        return {
            "objective/kl": per_sequence(judged.old_logprobs - judged.ref_logprobs),
            "objective/entropy": per_sequence(-judged.old_logprobs),
            "objective/non_score_reward": per_sequence(-self.progress.kl_coef * credit.kl),
            "objective/rlhf_reward": per_sequence(credit.rewards),
            "objective/kl_coef": self.progress.kl_coef,
            "objective/reward_sd": credit.running.sd,
            "val/explained_variance": objective.explained_variance(
                judged.values, credit.experience.returns, mask, _alone
            ),
            "val/num_eos_tokens": float((~rollout.truncated).sum()),
            "response/length": float(mask.sum(1).float().mean()),
            "response/truncated": float(rollout.truncated.float().mean()),
            "prompts/too_long": float(self.long_prompts),
            "rollout/logprob_mismatch": float(drift.abs().mean()),
            "rollout/logprob_mismatch_max": float(drift.abs().max()),
        } | self._score_metrics(scores)

    def _score_metrics(self, scores: Scores) -> dict[str, float]:
        metrics = self.reward.metrics(scores)
        monitored = [m for m in self.tracked if m.latent in self.reward.monitors]
        if monitored:
            z = scores.monitors_z[:, [self.reward.monitors.index(m.latent) for m in monitored]]
            rates = fires(z, monitored, self.reward.kind).float().mean(0).tolist()
            metrics |= {f"rate/{m.latent}": rate for m, rate in zip(monitored, rates, strict=True)}
        return metrics

    def update(
        self, experience: Experience, step: int, forward: Forward | None = None
    ) -> Callable[[], dict[str, float]]:
        """Start the optimizer steps over one batch; a function that waits for them and gives
        metrics over all of them.

        `forward` is `judge`'s. Both raise NotFinite.
        """
        ppo = self.ppo
        self.engine.train()
        lr = objective.learning_rate(
            step,
            steps=ppo.steps,
            peak=ppo.learning_rate,
            schedule=ppo.lr_schedule,
            warmup_steps=ppo.warmup_steps,
        )
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        sums: list[tuple[objective.PolicySums, objective.ValueSums]] = []
        norms: list[Tensor] = []
        stopped = False
        for epoch in range(ppo.num_ppo_epochs):
            for rows in mini_batches(
                len(experience.prompts), ppo.num_mini_batches, self.seed, step, epoch
            ):
                if stopped:
                    break
                sums.append(self.accumulate(experience, rows, updated=bool(norms), forward=forward))
                norms.append(self.optimizer_step())
                stopped = objective.kl_stop(sums[-1][0], ppo.kl_stop, _alone)

        def updated() -> dict[str, float]:
            metrics = objective.policy_means(objective.total_sums([p for p, _ in sums], _alone))
            metrics |= objective.value_means(objective.total_sums([v for _, v in sums], _alone))
            norm = float(torch.stack(norms).mean())
            if not math.isfinite(norm):
                raise NotFinite("the gradient", updated=True)
            metrics["loss/total"] = (
                metrics["loss/policy_avg"] + ppo.vf_coef * metrics["loss/value_avg"]
            )
            return metrics | {
                "lr": lr,
                "policy/grad_norm": norm,
                "policy/updates": float(len(norms)),
                "policy/kl_stopped": float(stopped),
            }

        return updated

    def optimizer_step(self) -> Tensor:
        """The norm of the gradient before clipping."""
        self.clock.mark("optimizer")
        return self.engine.step()

    def accumulate(
        self,
        experience: Experience,
        rows: Sequence[int],
        *,
        updated: bool,
        forward: Forward | None = None,
    ) -> tuple[objective.PolicySums, objective.ValueSums]:
        """Gradients of one optimizer step over `rows` of the batch; sums over all ranks. Raises
        NotFinite.
        """
        lengths = [experience.length(row) for row in range(len(experience.prompts))]
        batches = micro_batches(rows, lengths, self.plan.micro_batch_tokens, self.world.size)[
            self.world.rank
        ]
        self.clock.mark("update")
        tokens = int(experience.mask[list(rows)].sum())
        parts = []
        for at, micro in enumerate(batches):
            loss, policy, value = self.loss(experience, micro, forward)
            parts.append((policy, value))
            last = at == len(batches) - 1
            if last:
                policy_sums = objective.total_sums([p for p, _ in parts], self.world.sum)
                value_sums = objective.total_sums([v for _, v in parts], self.world.sum)
                total = read_later(policy_sums.loss + value_sums.loss)
            self.engine.backward(loss / tokens, last)
        if not math.isfinite(float(total())):
            raise NotFinite("the loss", updated)
        return policy_sums, value_sums

    def loss(
        self, experience: Experience, rows: Sequence[int], forward: Forward | None = None
    ) -> tuple[Tensor, objective.PolicySums, objective.ValueSums]:
        """The summed loss of a micro-batch; of weight 0 where it has no rows."""
        ppo = self.ppo
        logprobs, entropy, values = forward or self.engine(
            *self._forced(experience.prompts, experience.responses, experience.mask, rows),
            ppo.temperature,
        )
        at = rows or [0]
        fields = torch.stack(
            [
                experience.old_logprobs,
                experience.old_values,
                experience.advantages,
                experience.returns,
            ]
        )
        old_logprobs, old_values, advantages, returns = fields[:, at][:, experience.mask[at]].to(
            logprobs.device
        )
        counts = torch.full_like(logprobs, bool(rows), dtype=torch.bool)
        policy = objective.policy_loss(
            logprobs,
            old_logprobs,
            advantages,
            counts,
            cliprange_low=ppo.cliprange_low,
            cliprange_high=ppo.cliprange_high,
            dual_clip=ppo.dual_clip,
            log_ratio_max=ppo.log_ratio_max,
            entropy=entropy,
        )
        value = objective.value_loss(
            values, old_values, returns, counts, cliprange_value=ppo.cliprange_value
        )
        return policy.loss + ppo.vf_coef * value.loss, policy.sums, value.sums

    def _pace(self, rollout: Rollout, phases: dict[str, float], seconds: float) -> dict[str, float]:
        responses = int(rollout.mask.sum())
        tokens = sum(map(len, rollout.prompts)) + responses
        return {
            "episode": float(self.progress.step * self.ppo.batch_size),
            "eps": len(rollout.prompts) / seconds,
            "tokens_per_s": tokens / seconds,
            "response_tokens_per_s": responses / seconds,
            **{f"time/{phase}": s for phase, s in phases.items()},
            "time/step": seconds,
            "time/unnamed": seconds - sum(phases.values()),
        } | self._gpu()

    def _gpu(self) -> dict[str, float]:
        if self.world.device.type != "cuda":
            return {}
        busy = self.busy.share()
        peak = torch.cuda.max_memory_reserved(self.world.device) / 2**30
        planned = self.plan.peak_gib if self.plan.stays else math.nan
        return {"gpu/reserved_peak_gib": peak, "gpu/planned_peak_gib": planned} | (
            {} if busy is None else {"gpu/busy": busy}
        )

    def out_of_memory(self) -> str:
        """What ran out of memory, how large it was, and what would fit."""
        phase = self.clock.marks[-1][0]
        rows, longest = (
            -(-self.ppo.batch_size // self.world.size),
            max(map(len, self.prompt_ids)) + self.ppo.max_new_tokens,
        )
        half = max(self.plan.micro_batch_tokens // 2, longest)
        remedy = {
            "rollout": (
                f"set ppo.batch_size={max(self.ppo.batch_size // 2, self.world.size)} or a smaller"
                " ppo.max_new_tokens"
            ),
            "score": f"set sarm.tokens_per_batch={max(self.reward.tokens_per_batch // 2, 1)}",
            "optimizer": "set ppo.lora or use more GPUs",
        }.get(phase, f"set ppo.gradient_checkpointing=true and ppo.micro_batch_tokens={half}")
        sizes = (
            f"{rows} sequences of at most {longest} tokens a GPU, micro-batches of"
            f" {self.plan.micro_batch_tokens} tokens"
        )
        if self.world.device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(self.world.device) / 2**30
            sizes += f", {reserved:.1f} GiB reserved" + (
                f" where {self.plan.peak_gib:.1f} were planned" if self.plan.stays else ""
            )
        return f"the GPU ran out of memory in phase {phase} ({sizes}); {remedy}"

    # Checkpoints

    def state(self) -> dict[str, Any]:
        """JSON that, with `pieces`, says all that the next steps depend on."""
        return self.progress._asdict() | {"running": self.progress.running._asdict()}

    def pieces(self) -> Iterator[Piece]:
        """This rank's part of the weights and the optimizer's state, and its random number
        generators.
        """
        yield from engine_pieces(self.engine)
        yield Piece(f"generator.cpu.{self.world.rank}", 0, torch.get_rng_state())
        if self.world.device.type == "cuda":
            yield Piece(
                f"generator.cuda.{self.world.rank}", 0, torch.cuda.get_rng_state(self.world.device)
            )

    def restore(self, state: dict[str, Any], loaded: Loaded) -> None:
        """Go on as if never interrupted. A collective.

        On another number of ranks a step is the same up to rounding: what it draws hangs on seed,
        step and prompt, and nothing on torch's generators, of which new ranks then take those of
        old ones.
        """
        with loaded.tensors as tensors:
            restore_engine(self.engine, tensors)
            rank = self.world.rank % loaded.ranks
            torch.set_rng_state(tensors.read(f"generator.cpu.{rank}"))
            if f"generator.cuda.{rank}" in tensors and self.world.device.type == "cuda":
                torch.cuda.set_rng_state(tensors.read(f"generator.cuda.{rank}"), self.world.device)
        self.decoder.refresh()
        self.progress = Progress(**(state | {"running": objective.RunningSd(**state["running"])}))


def train(
    trainer: Trainer,
    *,
    save: Callable[[], Path],
    log: Callable[[dict[str, Any]], None],
    stop_requested: Callable[[], bool],
) -> bool:
    """Run the steps that are left; False where it was asked to stop, after a checkpoint.

    A collective: ranks stop together. Raises UserError, after a checkpoint, where a loss or reward
    is not finite.
    """
    ppo, world = trainer.ppo, trainer.world
    while trainer.progress.step < ppo.steps:
        step = trainer.progress.step
        try:
            metrics = trainer.run_step()
        except NotFinite as error:
            kept = (
                f"the state before it is in {save()}"
                if not error.updated
                else "its first updates were made, so the newest checkpoint is an earlier one"
            )
            ids = sorted(
                {
                    trainer.prompts[row].id
                    for row in rows_of_step(
                        [p.id for p in trainer.prompts], trainer.seed, step, ppo.batch_size
                    )
                }
            )
            raise UserError(
                f"step {step}: {error} is not finite, {kept}; look at the batch's prompts"
                f" ({', '.join(ids)}) or lower ppo.learning_rate"
            ) from error
        except torch.OutOfMemoryError as error:
            raise UserError(f"step {step}: {trainer.out_of_memory()}") from error
        log({"step": step, **metrics})
        done = trainer.progress.step
        stop = world.any(stop_requested())
        if stop or (done % ppo.checkpoint_every == 0 and done < ppo.steps):
            save()
        if stop and done < ppo.steps:
            return False
    return True


def _alone(tensor: Tensor) -> Tensor:
    """The sum over ranks of what every rank holds whole."""
    return tensor
