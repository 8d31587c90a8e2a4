"""PPO on a DeepSpeed engine: a policy with a value head, rewarded by a `CompoundReward`.

`python -m jobs ppo --run R --unit penalty-seed0` trains one arm. One step, in `Trainer.run_step`: draw prompts, roll
out, score, judge (old and reference log-probabilities, values), assign credit, update.

What a step computes depends neither on the number of ranks nor on micro-batches, up to rounding: samples follow
`rollout.py`, rollouts and scores are gathered, so every rank holds the whole batch and computes the same advantages,
and losses are sums over tokens divided by the response tokens of the whole optimizer step on all ranks.

Notation: B sequences of a step, b of a micro-batch, t response positions, n response tokens of a micro-batch.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sarm.config import PpoConfig, UserError
from sarm.datasets import Prompt
from sarm.ppo import objective
from sarm.ppo.checkpoint import engine_tensors, restore_engine
from sarm.ppo.decoders import CacheDecoder, Decoder, base_model, decoder_for, gathered, merged_weight
from sarm.ppo.optimizer import StochasticAdamW
from sarm.ppo.reward import CompoundReward, Penalised, Scores, calibrate_random, fires
from sarm.ppo.rollout import Rollout, forced, generate, packs, prompt_ids, response_text, stop_ids
from sarm.ppo.world import World


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


class Forward(NamedTuple):
    """The actor's outputs for one micro-batch, each (n,) float32."""

    logprobs: Tensor
    entropy: Tensor
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


class Progress(NamedTuple):
    """What a checkpoint needs beside tensors; replaced when a step has ended well."""

    step: int
    """Steps done, so the index of the next."""
    kl_coef: float
    running: objective.RunningSd
    training_s: float


class NotFinite(Exception):
    """A loss or reward that is NaN or infinite. `updated`: weights of this step have already changed."""

    def __init__(self, what: str, updated: bool) -> None:
        super().__init__(what)
        self.updated = updated


class Clock:
    """Seconds by phase."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


# --- the model --------------------------------------------------------------------------------------------------------


class ValueHead(nn.Module):
    """A linear map from the trunk's last state to a value, in float32; it starts at 0 everywhere."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(1, d_model)), nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class Actor(nn.Module):
    """A policy and a value head on its trunk. With LoRA, the reference is the policy with its adapter off."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        self.value_head = ValueHead(base_model(policy).config.hidden_size)
        self.mixed = len({p.dtype for p in policy.parameters()}) > 1
        """Float32 LoRA on a bf16 model: multiplied in bf16."""

    def forward(self, ids: Tensor, predicts: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """What `Forward` holds; the arguments are `rollout.forced`'s."""
        base = base_model(self.policy)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.mixed):
            hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state[predicts]
        of_labels = objective.logprobs_from_hidden(hidden, base.lm_head, labels, temperature)
        return of_labels.logprobs, of_labels.entropy, self.value_head(hidden)

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]


def make_actor(policy: Any, ppo: PpoConfig, seed: int) -> Actor:
    """Wrap a policy for training: LoRA where configured, in float32, and no dropout anywhere."""
    if ppo.lora is not None:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        policy = get_peft_model(policy, LoraConfig(r=ppo.lora.rank, lora_alpha=ppo.lora.alpha, target_modules="all-linear"))
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
        if hasattr(module, "cast_input_dtype_enabled"):  # peft's copy of each input to float32; autocast does without
            module.cast_input_dtype_enabled = False
    return Actor(policy)


def start_engine(actor: Actor, ppo: PpoConfig, seed: int, world: World) -> Any:
    """A DeepSpeed engine around the actor.

    Trainable float32 weights (LoRA, or a float32 model) are stepped as they are. A bf16 model trained in full keeps
    float32 master weights in ZeRO's optimizer, of stage 1 at least, or has its weights rounded stochastically.
    """
    import deepspeed

    low_precision = any(p.dtype == torch.bfloat16 for p in actor.trainable())
    stochastic = low_precision and ppo.weights == "stochastic_rounding"
    stage = max(ppo.zero_stage, 1) if low_precision and not stochastic else ppo.zero_stage
    cuda = world.device.type == "cuda"
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # boundaries are set by hand, and losses scaled by hand
        "gradient_clipping": ppo.max_grad_norm,
        "steps_per_print": 1_000_000_000,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "overlap_comm": cuda, "contiguous_gradients": cuda},
    }
    if low_precision and stage > 0:
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if stochastic:
        optimizer: torch.optim.Optimizer = StochasticAdamW(
            actor.trainable(), lr=ppo.learning_rate, weight_decay=ppo.weight_decay, seed=seed * 1009 + world.rank
        )
    else:
        optimizer = torch.optim.AdamW(actor.trainable(), lr=ppo.learning_rate, weight_decay=ppo.weight_decay, fused=cuda)
    if cuda:
        base_model(actor.policy).gradient_checkpointing_enable({"use_reentrant": False})
    engine, *_ = deepspeed.initialize(model=actor, optimizer=optimizer, model_parameters=actor.trainable(), config=settings, dist_init_required=False)
    if stage == 3:
        # The log-probabilities read the head's weight without calling its module.
        deepspeed.zero.register_external_parameter(actor, base_model(actor.policy).lm_head.weight)
    return engine


# --- which prompts, which rows, which rank ----------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _epoch_order(ids: tuple[str, ...], seed: int, epoch: int) -> list[int]:
    return sorted(range(len(ids)), key=lambda i: hashlib.sha256(f"{seed}/{epoch}/{ids[i]}".encode()).digest())


def rows_of_step(ids: Sequence[str], seed: int, step: int, batch_size: int) -> list[int]:
    """Which prompts step `step` draws: pass after pass over all of them, each pass in an order of its own."""
    drawn = range(step * batch_size, (step + 1) * batch_size)
    return [_epoch_order(tuple(ids), seed, at // len(ids))[at % len(ids)] for at in drawn]


def deal(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Rows for each rank, about as many tokens each: the longest first, back and forth over the ranks."""
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for at, row in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))):
        turn, seat = divmod(at, ranks)
        hands[seat if turn % 2 == 0 else ranks - 1 - seat].append(row)
    return hands


def micro_batches(rows: Sequence[int], lengths: Sequence[int], tokens: int, ranks: int) -> list[list[list[int]]]:
    """For each rank its micro-batches of `rows`, as many on every rank: ZeRO needs every rank at every backward pass.

    Those that fill up the count are empty. `lengths` are those of all rows.
    """
    hands = [[rows[i] for i in hand] for hand in deal([lengths[row] for row in rows], ranks)]
    batches = [[[hand[i] for i in pack] for pack in packs([lengths[row] for row in hand], tokens)] for hand in hands]
    most = max(map(len, batches))
    return [own + [[]] * (most - len(own)) for own in batches]


def mini_batches(n: int, parts: int, seed: int, step: int, epoch: int) -> list[list[int]]:
    """`n` rows in `parts` equal random parts; as they are where there is one part."""
    if parts == 1:
        return [list(range(n))]
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{step}/{epoch}".encode()).digest()[:6], "little"))
    order = torch.randperm(n, generator=generator).tolist()
    return [order[part * n // parts : (part + 1) * n // parts] for part in range(parts)]


# --- the trainer ------------------------------------------------------------------------------------------------------


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
        self.ppo, self.tokenizer, self.reward, self.seed, self.world = ppo, tokenizer, reward, seed, world
        self.tracked: tuple[Penalised, ...] = reward.penalised
        """Latents whose rates are logged in every arm; those that the reward penalises are logged besides."""
        if ppo.batch_size < world.size:
            raise UserError(f"ppo.batch_size {ppo.batch_size} is smaller than the number of ranks, {world.size}; raise it or use fewer GPUs")
        self.stops = stop_ids(policy, tokenizer)
        self.pad_id = int(self.stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
        self.prompts, self.prompt_ids = self._short_prompts(prompts)
        policy.to(world.device)  # type: ignore[arg-type]
        if world.device.type == "cpu":
            # On short texts its backward pass takes a fifth of the time of SDPA's.
            policy.set_attn_implementation("eager")
        self.reference = None if ppo.lora else _frozen_copy(policy)
        self.actor = make_actor(policy, ppo, seed)
        self.engine = start_engine(self.actor, ppo, seed, world)
        self.decoder: Decoder = decoder_for(self.actor.policy)
        if isinstance(self.decoder, CacheDecoder) and self.engine.zero_optimization_stage() == 3:
            # Its forward would gather weights at every token, and ranks decode for different numbers of tokens.
            raise UserError(f"ZeRO 3 samples from Llama models only, and the policy is a {policy.config.model_type}; set ppo.zero_stage=2")
        self.progress = Progress(0, ppo.kl_coef, objective.RunningSd(), 0.0)

    def _short_prompts(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[list[int]]]:
        found = [(p, prompt_ids(self.tokenizer, p.messages)) for p in prompts]
        short = [(p, ids) for p, ids in found if len(ids) <= self.ppo.max_prompt_tokens]
        if not short:
            limit = self.ppo.max_prompt_tokens
            raise UserError(f"none of the {len(prompts)} ppo prompts has at most {limit} tokens; raise ppo.max_prompt_tokens or give part ppo other data")
        return [p for p, _ in short], [ids for _, ids in short]

    # One step

    def run_step(self) -> dict[str, float]:
        """One PPO step; its metrics. Raises NotFinite."""
        clock, started = Clock(self.world.device), time.perf_counter()
        step = self.progress.step
        drawn = self.draw(rows_of_step([p.id for p in self.prompts], self.seed, step, self.ppo.batch_size))
        with clock("rollout"):
            rollout = self.roll_out(drawn, step)
        with clock("score"):
            scores = self.score(drawn, rollout)
        with clock("judge"):
            judged, forward = self.judge(rollout)
        with clock("credit"):
            experience, running, metrics = self.credit(rollout, scores, judged)
        with clock("update"):
            metrics |= self.update(experience, step, forward)
        with clock("sync"):
            self.decoder.refresh()
        kl_coef = objective.next_kl_coef(
            self.progress.kl_coef, metrics["objective/kl"], len(drawn), self.ppo.kl_controller, self.ppo.kl_target, self.ppo.kl_horizon
        )
        seconds = time.perf_counter() - started
        self.progress = Progress(step + 1, kl_coef, running, self.progress.training_s + seconds)
        return metrics | self._pace(rollout, clock, seconds)

    def draw(self, rows: Sequence[int]) -> list[Drawn]:
        """The sequences to sample; a prompt drawn twice has two keys."""
        drawn: list[Drawn] = []
        for at, row in enumerate(rows):
            again = sum(other == row for other in rows[:at])
            drawn.append(Drawn(self.prompts[row], self.prompt_ids[row], f"{self.prompts[row].id}#{again}"))
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
        return Rollout([d.ids for d in drawn], responses[:, :longest], mask[:, :longest], logprobs[:, :longest], truncated)

    def score(self, drawn: Sequence[Drawn], rollout: Rollout) -> Scores:
        """Each response's reward, penalty and latents, scored by all ranks and gathered on each. Raises NotFinite."""
        hands = self._hands(rollout)
        scores = self.reward.score([self.conversation(drawn[i], rollout.ids(i)) for i in hands[self.world.rank]])
        whole = Scores(*(self.world.gather(field, hands) for field in scores))
        if not bool(torch.isfinite(whole.total).all()):
            raise NotFinite("a reward", updated=False)
        return whole

    def conversation(self, drawn: Drawn, ids: Sequence[int]) -> list[dict[str, str]]:
        return [*drawn.prompt.messages, {"role": "assistant", "content": response_text(self.tokenizer, ids)}]

    def _hands(self, rollout: Rollout) -> list[list[int]]:
        return deal([len(p) + int(n) for p, n in zip(rollout.prompts, rollout.mask.sum(1), strict=True)], self.world.size)

    def judge(self, rollout: Rollout) -> tuple[Judged, Forward | None]:
        """Teacher-forced log-probabilities under policy and reference at the sampling temperature, and values.

        Where the step makes one update of one micro-batch a rank, the policy's forward pass is that update's too: it is
        returned with its graph, so as not to be done twice.
        """
        lengths = [len(p) + int(n) for p, n in zip(rollout.prompts, rollout.mask.sum(1), strict=True)]
        batches = micro_batches(range(len(lengths)), lengths, self.ppo.micro_batch_tokens, self.world.size)
        updates = self.ppo.num_ppo_epochs * self.ppo.num_mini_batches
        # ZeRO 3 lets go of the weights between a forward and a backward pass in an order that it has learnt.
        once = updates == 1 and len(batches[0]) == 1 and self.engine.zero_optimization_stage() < 3
        self.engine.train(once)
        found, forward = torch.zeros(3, *rollout.mask.shape), None
        for rows in batches[self.world.rank]:
            inputs = self._forced(rollout.prompts, rollout.responses, rollout.mask, rows)
            with torch.no_grad():
                ref_logprobs = self._reference_logprobs(inputs)
            with torch.set_grad_enabled(once):
                forward = Forward(*self.engine(*inputs, self.ppo.temperature))
            if rows:
                part = torch.zeros(3, *rollout.mask[rows].shape)
                part[:, rollout.mask[rows]] = torch.stack([forward.logprobs, ref_logprobs, forward.values]).detach().cpu()
                found[:, rows] = part
        hands = [[row for rows in own for row in rows] for own in batches]
        judged = Judged(*(self.world.gather(found[i, hands[self.world.rank]], hands) for i in range(3)))
        return judged, forward if once else None

    def _reference_logprobs(self, forward: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """(n,)."""
        if self.reference is None:
            with self.actor.policy.disable_adapter():
                return self.engine(*forward, self.ppo.temperature)[0]
        ids, predicts, labels = forward
        hidden = self.reference.model(input_ids=ids, use_cache=False).last_hidden_state[predicts]
        return objective.logprobs_from_hidden(hidden, self.reference.lm_head, labels, self.ppo.temperature).logprobs

    def _forced(self, prompts: Sequence[list[int]], responses: Tensor, mask: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """`rollout.forced` of some rows; of the first row where there are none, its result to be thrown away."""
        rows = rows or [0]
        return forced([prompts[i] for i in rows], [responses[i][mask[i]].tolist() for i in rows], self.pad_id, self.world.device)

    def credit(self, rollout: Rollout, scores: Scores, judged: Judged) -> tuple[Experience, objective.RunningSd, dict[str, float]]:
        """Token rewards and advantages, the same on every rank; the running statistics and metrics that go with them."""
        ppo, mask = self.ppo, rollout.mask
        kl = objective.kl_per_token(judged.old_logprobs, judged.ref_logprobs, ppo.kl_estimator, ppo.log_ratio_max)
        docked = objective.dock_missing_eos(scores.total, ~rollout.truncated, ppo.missing_eos_penalty)
        running = self.progress.running
        if ppo.reward_scale == "running_sd":
            running = running.updated(docked, _alone)
        scaled = objective.scaled_rewards(docked, running.sd if ppo.reward_scale == "running_sd" else 1.0, ppo.reward_clip)
        rewards = objective.token_rewards(scaled, kl, mask, self.progress.kl_coef)
        advantages, returns = objective.gae(rewards, judged.values, mask, ppo.gamma, ppo.lam)
        if ppo.whiten_advantages:
            advantages = objective.whiten(advantages, mask, _alone)
        experience = Experience(rollout.prompts, rollout.responses, mask, judged.old_logprobs, judged.values, advantages, returns)
        per_sequence = lambda x: float(torch.where(mask, x, 0.0).sum(1).mean())  # noqa: E731
        drift = (judged.old_logprobs - rollout.logprobs)[mask]
        metrics = {
            "objective/kl": per_sequence(judged.old_logprobs - judged.ref_logprobs),
            "objective/entropy": per_sequence(-judged.old_logprobs),
            "objective/non_score_reward": per_sequence(-self.progress.kl_coef * kl),
            "objective/rlhf_reward": per_sequence(rewards),
            "objective/kl_coef": self.progress.kl_coef,
            "objective/reward_sd": running.sd,
            "val/explained_variance": objective.explained_variance(judged.values, returns, mask, _alone),
            "val/num_eos_tokens": float((~rollout.truncated).sum()),
            "response/length": float(mask.sum(1).float().mean()),
            "response/truncated": float(rollout.truncated.float().mean()),
            "rollout/logprob_mismatch": float(drift.abs().mean()),
            "rollout/logprob_mismatch_max": float(drift.abs().max()),
        }
        return experience, running, metrics | self._score_metrics(scores)

    def _score_metrics(self, scores: Scores) -> dict[str, float]:
        metrics = self.reward.metrics(scores)
        monitored = [m for m in self.tracked if m.latent in self.reward.monitors]
        if monitored:
            z = scores.monitors_z[:, [self.reward.monitors.index(m.latent) for m in monitored]]
            rates = fires(z, monitored, self.reward.kind).float().mean(0).tolist()
            metrics |= {f"rate/{m.latent}": rate for m, rate in zip(monitored, rates, strict=True)}
        return metrics

    def update(self, experience: Experience, step: int, forward: Forward | None = None) -> dict[str, float]:
        """The optimizer steps over one batch; metrics over all of them. `forward` is `judge`'s. Raises NotFinite."""
        ppo = self.ppo
        self.engine.train()
        lr = objective.learning_rate(step, steps=ppo.steps, peak=ppo.learning_rate, schedule=ppo.lr_schedule, warmup_steps=ppo.warmup_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        sums: list[tuple[objective.PolicySums, objective.ValueSums]] = []
        norms: list[float] = []
        stopped = False
        for epoch in range(ppo.num_ppo_epochs):
            for rows in mini_batches(len(experience.prompts), ppo.num_mini_batches, self.seed, step, epoch):
                if stopped:
                    break
                sums.append(self.accumulate(experience, rows, updated=bool(norms), forward=forward))
                norms.append(self.optimizer_step())
                stopped = objective.kl_stop(sums[-1][0], ppo.kl_stop, _alone)
        metrics = objective.policy_means(objective.total_sums([p for p, _ in sums], _alone)) | objective.value_means(
            objective.total_sums([v for _, v in sums], _alone)
        )
        metrics["loss/total"] = metrics["loss/policy_avg"] + ppo.vf_coef * metrics["loss/value_avg"]
        return metrics | {"lr": lr, "policy/grad_norm": sum(norms) / len(norms), "policy/updates": float(len(norms)), "policy/kl_stopped": float(stopped)}

    def optimizer_step(self) -> float:
        """Clip, step, clear; the norm of the gradient before clipping."""
        plain = [p.grad for p in self.actor.trainable() if p.grad is not None] if self.engine.zero_optimization_stage() == 0 else []
        norm = torch.nn.utils.get_total_norm(plain) if plain else None  # which DeepSpeed tells of ZeRO only
        self.engine.step()
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def accumulate(
        self, experience: Experience, rows: Sequence[int], *, updated: bool, forward: Forward | None = None
    ) -> tuple[objective.PolicySums, objective.ValueSums]:
        """Gradients of one optimizer step over `rows` of the batch; sums over all ranks. Raises NotFinite."""
        lengths = [experience.length(row) for row in range(len(experience.prompts))]
        batches = micro_batches(rows, lengths, self.ppo.micro_batch_tokens, self.world.size)[self.world.rank]
        tokens = int(experience.mask[list(rows)].sum())
        parts = []
        for at, micro in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(at == len(batches) - 1)
            loss, policy_sums, value_sums = self.loss(experience, micro, forward)
            parts.append((policy_sums, value_sums))
            # The engine averages over ranks; every rank's tokens shall count alike.
            self.engine.backward(loss * (self.world.size / tokens), scale_wrt_gas=False)
        policy_sums = objective.total_sums([p for p, _ in parts], self.world.sum)
        value_sums = objective.total_sums([v for _, v in parts], self.world.sum)
        if not math.isfinite(float(policy_sums.loss + value_sums.loss)):
            raise NotFinite("the loss", updated)
        return policy_sums, value_sums

    def loss(self, experience: Experience, rows: Sequence[int], forward: Forward | None = None) -> tuple[Tensor, objective.PolicySums, objective.ValueSums]:
        """The summed loss of a micro-batch; of weight 0 where it has no rows."""
        ppo = self.ppo
        logprobs, entropy, values = forward or self.engine(*self._forced(experience.prompts, experience.responses, experience.mask, rows), ppo.temperature)
        at = rows or [0]
        mask = experience.mask[at]
        old_logprobs, old_values, advantages, returns = (
            field[at][mask].to(logprobs.device) for field in (experience.old_logprobs, experience.old_values, experience.advantages, experience.returns)
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
        value = objective.value_loss(values, old_values, returns, counts, cliprange_value=ppo.cliprange_value)
        return policy.loss + ppo.vf_coef * value.loss, policy.sums, value.sums

    def _pace(self, rollout: Rollout, clock: Clock, seconds: float) -> dict[str, float]:
        responses = int(rollout.mask.sum())
        tokens = sum(map(len, rollout.prompts)) + responses
        return {
            "episode": float(self.progress.step * self.ppo.batch_size),
            "eps": len(rollout.prompts) / seconds,
            "tokens_per_s": tokens / seconds,
            "response_tokens_per_s": responses / seconds,
            **{f"time/{phase}": s for phase, s in clock.seconds.items()},
            "time/step": seconds,
        }

    # Calibration, checkpoints, export

    def calibrate(self, n: int, candidates: Sequence[int], seed: int) -> Calibration:
        """Latents on `n` responses of the untrained policy; the same for every arm and seed of a run. A collective."""
        drawn = self.draw([row % len(self.prompts) for row in range(n)])
        rollout = self.roll_out(drawn, step=-1, seed=seed)
        hands = self._hands(rollout)
        conversations = [self.conversation(drawn[i], rollout.ids(i)) for i in hands[self.world.rank]]
        latents = [*(p.latent for p in self.tracked), *candidates]
        z = self.world.gather(self.reward.measure(conversations, latents), hands)
        z_penalised, z_candidates = z[:, : len(self.tracked)], z[:, len(self.tracked) :]
        random = calibrate_random(z_candidates, candidates, z_penalised, self.tracked, self.reward.kind) if len(candidates) else []
        columns = [latents.index(r.latent, len(self.tracked)) for r in random]
        return Calibration(
            n,
            [Rated(*p, rate) for p, rate in zip(self.tracked, self._rates(z_penalised, self.tracked), strict=True)],
            [Rated(*r, rate) for r, rate in zip(random, self._rates(z[:, columns], random), strict=True)],
        )

    def _rates(self, z: Tensor, penalised: Sequence[Penalised]) -> list[float]:
        return [float(rate) for rate in fires(z, penalised, self.reward.kind).double().mean(0)]

    def state(self) -> dict[str, Any]:
        """JSON that, with `tensors`, says all that the next steps depend on."""
        return self.progress._asdict() | {"running": self.progress.running._asdict()}

    def tensors(self) -> dict[str, Tensor]:
        """This rank's weights, optimizer state and random number generators."""
        rng = {"rng.cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            rng["rng.cuda"] = torch.cuda.get_rng_state(self.world.device)
        return engine_tensors(self.engine) | rng

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on as if never interrupted. A collective."""
        restore_engine(self.engine, {name: tensor for name, tensor in tensors.items() if not name.startswith("rng.")})
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.world.device)
        self.decoder.refresh()
        self.progress = Progress(**(state | {"running": objective.RunningSd(**state["running"])}))

    @torch.no_grad()
    def policy_weights(self) -> dict[str, Tensor]:
        """The policy's weights under the names of a plain model, LoRA merged, in bf16 on rank 0's CPU. A collective."""
        weights: dict[str, Tensor] = {}
        for name, module in base_model(self.actor.policy).named_modules():
            if ".lora_" in name or name.endswith(".base_layer"):
                continue
            own = {"weight": None} if hasattr(module, "get_delta_weight") else dict(module.named_parameters(recurse=False))
            with gathered(module) if own else nullcontext():
                for leaf, parameter in own.items():
                    whole = merged_weight(module, torch.bfloat16) if parameter is None else parameter
                    if self.world.rank == 0:
                        weights[f"{name}.{leaf}"] = whole.detach().to("cpu", torch.bfloat16, copy=True)
        return weights


class Rated(NamedTuple):
    """A penalised latent and how often it fires in the untrained policy's responses."""

    latent: int
    tau: float
    alpha: float
    base_rate: float


class Calibration(NamedTuple):
    n: int
    """Responses of the untrained policy."""
    harming: list[Rated]
    """The latents that the penalty arm penalises."""
    random: list[Rated]
    """Those matched to them for the random arm; none where there were no candidates."""


def save_policy(source: Path, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A bf16 model that AutoModelForCausalLM opens: the source's architecture and settings, these weights."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    if unexpected or set(missing) - tied:
        raise RuntimeError(f"trained weights do not fit the model: missing {missing}, unexpected {unexpected}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(trainer: Trainer, *, save: Callable[[], Path], log: Callable[[dict[str, Any]], None], stop_requested: Callable[[], bool]) -> bool:
    """Run the steps that are left; False where it was asked to stop, after a checkpoint.

    A collective: ranks stop together. Raises UserError, after a checkpoint, where a loss or reward is not finite.
    """
    ppo, world = trainer.ppo, trainer.world
    while trainer.progress.step < ppo.steps:
        step = trainer.progress.step
        try:
            metrics = trainer.run_step()
        except NotFinite as error:
            kept = f"the state before it is in {save()}" if not error.updated else "its first updates were made, so the newest checkpoint is an earlier one"
            ids = sorted({trainer.prompts[row].id for row in rows_of_step([p.id for p in trainer.prompts], trainer.seed, step, ppo.batch_size)})
            raise UserError(f"step {step}: {error} is not finite, {kept}; look at the batch's prompts ({', '.join(ids)}) or lower ppo.learning_rate") from error
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


def _frozen_copy(policy: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(policy).requires_grad_(False).eval()
