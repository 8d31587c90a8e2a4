"""The machinery of training behind four calls; the algorithm in `sarm/ppo/trainer.py` makes them.

    rollout = learner.sample(prompts, keys, step)  # responses
    read = learner.forward(rollout)  # read() gives old and reference logprobs, and values
    sums = learner.forward_backward(rollout, rows, loss_fn, per_token)  # gradients over some rows
    norm = learner.optim_step(lr)  # clip, step, clear

Each is a collective: every rank calls it, and holds the whole batch before and after. Behind them
are the ranks, micro-batches, ZeRO, the offloaded reference, recorded CUDA graphs, and the first
forward pass, which is the update's too where a step makes one update of one micro-batch a rank.
`python -m pytest tests/ppo/test_trainer.py` compares gradients with the obvious ones whatever the
ranks, micro-batches and ZeRO stage. Long, as it is one class: the calls share models, ranks, the
recorded pass and what one forward pass leaves to the next call.

Notation: B sequences of a step, t response positions, n response tokens of a micro-batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sarm.config import PpoConfig, UserError
from sarm.llama.decoders import CacheDecoder, Decoder, decoder_for
from sarm.llama.generate import EXACT, Rollout, Steps, forced, generate
from sarm.llama.weights import LlamaWeights
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
from sarm.ppo.learner.micro_batches import micro_batches, scatter
from sarm.ppo.learner.reference import Reference
from sarm.ppo.learner.shards import engine_pieces, restore_engine
from sarm.ppo.learner.shared_rows import forced_shared
from sarm.ppo.losses import Loss, Sums

FP8_CAPABILITY = (8, 9)
"""Of the first GPUs that compute with fp8."""

PerToken = TypeVar("PerToken", bound=NamedTuple)
LossFn = Callable[[Forward, PerToken], Loss]
"""The loss, summed over the n response tokens of a micro-batch: of what the policy now gives, with
gradient, and of what the caller holds for each token, both (n,).
"""


class Logprobs(NamedTuple):
    """Of the whole batch at the sampling temperature, (B, t) float32, 0 at padding."""

    old: Tensor
    """Of the policy with the weights that it sampled with, or whose quantised copy did."""
    ref: Tensor
    values: Tensor | None
    """None without a critic."""


class NotFinite(Exception):
    """A number that is NaN or infinite. `updated`: weights of this step have already changed."""

    def __init__(self, what: str, updated: bool) -> None:
        super().__init__(what)
        self.updated = updated


class _Kept(NamedTuple):
    """A forward pass with its graph, for the update of the same rollout."""

    rollout: Rollout
    outputs: Forward


class Learner:
    """A policy in training, with its reference, optimizer and sampler.

    `longest_prompt` in tokens and `reward_bytes`, what the reward model takes of a GPU, are for the
    plan. Raises UserError where the model does not fit or cannot be trained as configured.
    """

    def __init__(
        self,
        ppo: PpoConfig,
        policy: PreTrainedModel,
        *,
        stops: Sequence[int],
        pad_id: int,
        longest_prompt: int,
        reward_bytes: int,
        seed: int,
        world: World,
    ) -> None:
        self.seed, self.world, self.stops, self.pad_id = seed, world, tuple(stops), pad_id
        self.longest_prompt = longest_prompt
        if ppo.batch_size < world.size:
            raise UserError(
                f"ppo.batch_size {ppo.batch_size} is smaller than the number of ranks,"
                f" {world.size}; raise it or use fewer GPUs"
            )
        if ppo.rollout_dtype is not None:
            _refuse_quantised(policy, world.device)
        self.plan = self._planned(ppo, policy, reward_bytes)
        self.ppo = ppo = self.plan.applied(ppo)
        policy.to(world.device)  # type: ignore[arg-type]
        if world.device.type == "cpu":
            # On short texts its backward pass takes a fifth of the time of SDPA's.
            policy.set_attn_implementation("eager")
        self.reference = None if ppo.lora else Reference(policy, self.plan.offloaded_layers)
        cuda = world.device.type == "cuda"
        if cuda:
            # What is left to the CPU is small, and torch would index even that by all cores: on a
            # busy host each waits for the last.
            torch.set_num_threads(1)
        layers.lay_side_by_side(policy)
        # ZeRO 3 gathers a module's weights when it is called, which the fused layers do not.
        self.actor = make_actor(
            policy,
            ppo,
            seed,
            fused=self.plan.zero_stage < 3,
            checkpointed=self.plan.checkpointed_layers,
        ).to(world.device)
        self.engine = start_engine(self.actor, ppo, seed, world)
        self.recorded = self._recorded() if self.plan.recorded else None
        self.decoder: Decoder = decoder_for(
            self.actor.policy, quantised=ppo.rollout_dtype is not None
        )
        if isinstance(self.decoder, CacheDecoder) and self.engine.zero_stage == 3:
            # Its forward would gather weights at every token, and ranks decode for different
            # numbers of tokens.
            raise UserError(
                "ZeRO 3 samples from Llama models only, and the policy is a"
                f" {policy.config.model_type}; set ppo.zero_stage=2"
            )
        self.clock, self.busy = Clock(world.device), BusyGpu(world.device)
        self.started = time.perf_counter()
        self.updates = 0
        """Optimizer steps since the last `sample`."""
        self.kept: _Kept | None = None

    def _planned(self, ppo: PpoConfig, policy: PreTrainedModel, reward_bytes: int) -> Plan:
        """What the config leaves open, by the memory of the smallest GPU."""
        device = self.world.device
        if (
            device.type != "cuda"
            or policy.dtype != torch.bfloat16
            or not LlamaWeights.knows(policy)
        ):
            return unplanned(
                ppo,
                int(getattr(policy.config, "num_hidden_layers", 1)) if device.type == "cuda" else 0,
            )
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        gib = min(float(text) for text in self.world.gather_texts(str(total)))
        gpus = Gpus(self.world.size, gib)
        if ppo.gpu_gib is not None:  # others train on the same card
            share = gpus.shared(ppo).usable_gib / total
            torch.cuda.set_per_process_memory_fraction(share, device)
        as_long = ppo.model_copy(update={"max_prompt_tokens": self.longest_prompt})
        shape = shape_of(policy.config.to_dict())
        return make_plan(as_long, shape, reward_bytes, gpus)

    def _recorded(self) -> Recorded:
        reference = [] if self.reference is None else [self.reference.model]
        read = [t for m in (self.actor, *reference) for t in (*m.parameters(), *m.buffers())]
        return Recorded(self._pass, self.actor.trainable(), read)

    # The four calls

    def sample(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[str],
        step: int,
        *,
        seed: int | None = None,
        forward_follows: bool = True,
    ) -> Rollout:
        """A response to each prompt, whose noise hangs on its key, the step and the seed (the
        run's by default). The times of a step begin here. Raises NotFinite.

        `forward_follows`: meanwhile an offloaded reference is copied back.
        """
        self.clock, self.started = Clock(self.world.device), time.perf_counter()
        self.busy.share()
        self.kept, self.updates = None, 0
        self.clock.mark("rollout")
        if self.reference is not None and forward_follows:
            self.reference.fetch()
        shares = scatter([len(ids) for ids in prompts], self.world.size)
        mine = shares[self.world.rank]
        own = generate(
            self.decoder,
            [prompts[i] for i in mine],
            keys=[keys[i] for i in mine],
            max_new_tokens=self.ppo.max_new_tokens,
            temperature=self.ppo.temperature,
            top_p=self.ppo.top_p,
            seed=self.seed if seed is None else seed,
            step=step,
            eos_ids=self.stops,
            pad_id=self.pad_id,
            max_rows=self.plan.decode_rows,
        )
        room = self.ppo.max_new_tokens - own.responses.shape[1]
        responses = self.world.gather(F.pad(own.responses, (0, room), value=self.pad_id), shares)
        mask = self.world.gather(F.pad(own.mask, (0, room)), shares)
        logprobs = self.world.gather(F.pad(own.logprobs, (0, room)), shares)
        truncated = self.world.gather(own.truncated, shares)
        if not bool(torch.isfinite(logprobs).all()):
            raise NotFinite("a sampled token's log-probability", updated=False)
        longest = int(mask.sum(1).max())
        return Rollout(
            [list(ids) for ids in prompts],
            responses[:, :longest],
            mask[:, :longest],
            logprobs[:, :longest],
            truncated,
        )

    def forward(self, rollout: Rollout, *, update_follows: bool = True) -> Callable[[], Logprobs]:
        """Start the teacher-forced pass under policy and reference; the function returned waits
        for it, so that something else can be done meanwhile.

        `update_follows`: of this rollout, which may then use the same pass; otherwise no graph is
        kept, and recorded passes stay as they are.
        """
        lengths = rollout.lengths()
        every = range(len(lengths))
        batches = micro_batches(every, lengths, self.plan.micro_batch_tokens, self.world.size)
        updates = self.ppo.num_ppo_epochs * self.ppo.num_mini_batches
        # ZeRO 3 lets go of the weights between a forward and a backward pass in an order that it
        # has learnt.
        once = (
            update_follows and updates == 1 and len(batches[0]) == 1 and self.engine.zero_stage < 3
        )
        recorded = self.recorded if update_follows else None
        run: Callable[..., tuple[Tensor, ...]] = self._pass if recorded is None else recorded
        self.engine.train(once)
        parts, outputs = [], None
        for rows in batches[self.world.rank]:
            # A mark cannot be recorded, so of a recorded pass the reference's share is not told
            # apart.
            self.clock.mark("reference" if self.recorded is None else "forward")
            with torch.set_grad_enabled(once):  # where the pass is recorded it is the update's
                ref, *found = run(*self._forced(rollout, rows))
            tokens = int(rollout.mask[rows or [0]].sum())
            outputs = Forward(*(out[:tokens] for out in found))
            if rows:
                values = [] if outputs.values is None else [outputs.values]
                parts.append(torch.stack([outputs.logprobs, ref[:tokens], *values]).detach())
        self.kept = _Kept(rollout, outputs) if once and outputs is not None else None
        shares = [[row for rows in own for row in rows] for own in batches]
        mine = shares[self.world.rank]
        later = read_later(torch.cat(parts, 1)) if mine else None

        def read() -> Logprobs:
            self.clock.mark("advantages")
            found = torch.zeros(2 + self.ppo.critic, len(mine), rollout.mask.shape[1])
            if later is not None:
                found[:, rollout.mask[mine]] = later()
            old, ref, *values = (self.world.gather(of_rows, shares) for of_rows in found)
            return Logprobs(old, ref, values[0] if values else None)

        return read

    def forward_backward(
        self, rollout: Rollout, rows: Sequence[int], loss_fn: LossFn[PerToken], per_token: PerToken
    ) -> Sums:
        """Gradients of `loss_fn`'s mean over the response tokens of `rows`; its sums over all of
        them, with their number as `tokens`. Raises NotFinite.

        `per_token` is a NamedTuple of (B, t) tensors or None, of which loss_fn gets a micro-batch.
        """
        lengths, ranks = rollout.lengths(), self.world.size
        batches = micro_batches(rows, lengths, self.plan.micro_batch_tokens, ranks)[self.world.rank]
        self.clock.mark("update")
        self.engine.train()
        tokens = int(rollout.mask[list(rows)].sum())
        parts: list[Sums] = []
        for at, micro in enumerate(batches):
            outputs = self._outputs(rollout, micro)
            loss = loss_fn(outputs, self._of_tokens(per_token, rollout, micro))
            if not micro:  # the first row again, so that this rank takes part, for nothing
                loss = Loss(0 * loss.total, {name: 0 * x for name, x in loss.sums.items()})
            parts.append(loss.sums | {"loss": loss.total.detach().double()})
            last = at == len(batches) - 1
            if last:
                sums = self._added_up(parts)
                total = read_later(sums["loss"])
            self.engine.backward(loss.total / tokens, last)
        if not math.isfinite(float(total())):
            raise NotFinite("the loss", updated=self.updates > 0)
        return sums | {"tokens": torch.full_like(sums.pop("loss"), tokens)}

    def optim_step(self, lr: float, value_lr: float | None = None) -> Tensor:
        """Step with the gradients so far; their norm before clipping, (), not waited for.
        `value_lr` is the value head's where it has one of its own.
        """
        self.clock.mark("optimizer")
        groups = self.engine.optimizer.param_groups
        for group, rate in zip(groups, (lr, lr if value_lr is None else value_lr), strict=False):
            group["lr"] = rate
        self.updates += 1
        return self.engine.step()

    # What goes with them

    def sync_sampler(self) -> None:
        """Let `sample` use the weights as they now are."""
        self.clock.mark("sync")
        self.decoder.refresh()

    def map_rows(
        self, rollout: Rollout, of_rows: Callable[[list[int]], Sequence[Tensor]]
    ) -> list[Tensor]:
        """The tensors (B, ...) of the whole batch, of which `of_rows` makes those of some rows:
        every rank makes a share.
        """
        self.clock.mark("score")
        shares = scatter(rollout.lengths(), self.world.size)
        return [self.world.gather(t, shares) for t in of_rows(shares[self.world.rank])]

    def pace(self, rollout: Rollout) -> dict[str, float]:
        """Seconds since `sample` began, by phase, tokens a second, and the GPU's memory and load.
        Waits for the device.
        """
        phases = self.clock.seconds()
        seconds = time.perf_counter() - self.started
        responses = int(rollout.mask.sum())
        return {
            "eps": len(rollout.prompts) / seconds,
            "tokens_per_s": (sum(map(len, rollout.prompts)) + responses) / seconds,
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
        planned = self.plan.peak_gib if self.plan.persistent_gib else math.nan
        return {"gpu/reserved_peak_gib": peak, "gpu/planned_peak_gib": planned} | (
            {} if busy is None else {"gpu/busy": busy}
        )

    def out_of_memory(self, scoring_tokens: int) -> str:
        """What ran out of memory, how large it was, and what would fit; `scoring_tokens` are those
        of a batch of the reward model.
        """
        phase = self.clock.marks[-1][0]
        rows = -(-self.ppo.batch_size // self.world.size)
        longest = self.longest_prompt + self.ppo.max_new_tokens
        half = max(self.plan.micro_batch_tokens // 2, longest)
        remedy = {
            "rollout": (
                f"set ppo.batch_size={max(self.ppo.batch_size // 2, self.world.size)} or a smaller"
                " ppo.max_new_tokens"
            ),
            "score": f"set sarm.tokens_per_batch={max(scoring_tokens // 2, 1)}",
            "optimizer": "set ppo.lora or use more GPUs",
        }.get(phase, f"set ppo.gradient_checkpointing=true and ppo.micro_batch_tokens={half}")
        sizes = (
            f"{rows} sequences of at most {longest} tokens a GPU, micro-batches of"
            f" {self.plan.micro_batch_tokens} tokens"
        )
        if self.world.device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(self.world.device) / 2**30
            sizes += f", {reserved:.1f} GiB reserved" + (
                f" where {self.plan.peak_gib:.1f} were planned" if self.plan.persistent_gib else ""
            )
        return f"the GPU ran out of memory in phase {phase} ({sizes}); {remedy}"

    def pieces(self) -> Iterator[Piece]:
        """This rank's part of the weights and the optimizer's state, and its random number
        generators, for a checkpoint.
        """
        yield from engine_pieces(self.engine)
        yield Piece(f"generator.cpu.{self.world.rank}", 0, torch.get_rng_state())
        if self.world.device.type == "cuda":
            yield Piece(
                f"generator.cuda.{self.world.rank}", 0, torch.cuda.get_rng_state(self.world.device)
            )

    def restore(self, loaded: Loaded) -> None:
        """Put `pieces` back.

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

    # One pass over a micro-batch

    def _pass(self, *inputs: Any) -> tuple[Tensor, ...]:
        """The reference's log-probabilities (n,), and what `Forward` holds."""
        with torch.no_grad():
            ref = self._reference_logprobs(*inputs)
        if self.recorded is None:
            self.clock.mark("forward")
        return ref, *self.engine(*inputs, self.ppo.temperature)

    def _reference_logprobs(self, rows: layers.Rows, predicts: Tensor, labels: Tensor) -> Tensor:
        """(n,)."""
        if self.reference is None:
            with self.actor.policy.disable_adapter():
                return self.engine(rows, predicts, labels, self.ppo.temperature)[0]
        return self.reference.logprobs(rows, predicts, labels, self.ppo.temperature)

    def _outputs(self, rollout: Rollout, rows: Sequence[int]) -> Forward:
        """With gradient: of the pass kept by `forward`, once, or of a new one."""
        kept, self.kept = self.kept, None
        if kept is not None and kept.rollout is rollout:
            return kept.outputs
        found = self.engine(*self._forced(rollout, rows), self.ppo.temperature)
        tokens = int(rollout.mask[list(rows) or [0]].sum())
        return Forward(*(out[:tokens] for out in found))

    def _forced(self, rollout: Rollout, rows: Sequence[int]) -> tuple[layers.Rows, Tensor, Tensor]:
        """Some rows as one batch for teacher forcing: on a CPU without padding, else rounded up
        where the pass is recorded. The first row where there are none, its result to be thrown
        away.
        """
        rows, device = rows or [0], self.world.device
        prompts, responses = [rollout.prompts[i] for i in rows], [rollout.ids(i) for i in rows]
        if device.type == "cpu" and self.actor.fused and self.recorded is None:
            return forced_shared(prompts, responses, device)
        steps = Steps(RECORDED_POSITIONS, RECORDED_TOKENS) if self.recorded is not None else EXACT
        return forced(prompts, responses, self.pad_id, device, steps)

    def _of_tokens(self, per_token: PerToken, rollout: Rollout, rows: Sequence[int]) -> PerToken:
        """The fields (B, t) of `per_token` at the rows' response tokens, (n,) on the device."""
        at = list(rows) or [0]
        fields = {name: field for name, field in per_token._asdict().items() if field is not None}
        cut = torch.stack(list(fields.values()))[:, at][:, rollout.mask[at]].to(self.world.device)
        return per_token._replace(**dict(zip(fields, cut, strict=True)))

    def _added_up(self, parts: Sequence[Sums]) -> Sums:
        """Over micro-batches and ranks."""
        names = list(parts[0])
        stacked = torch.stack([torch.stack([part[name] for name in names]) for part in parts])
        return dict(zip(names, self.world.sum(stacked.sum(0)), strict=True))


def _refuse_quantised(policy: PreTrainedModel, device: torch.device) -> None:
    """Raises UserError where rollouts in fp8 cannot be sampled."""
    if not LlamaWeights.knows(policy):
        raise UserError(
            "ppo.rollout_dtype=fp8 samples from Llama models only, and the policy is a"
            f" {policy.config.model_type}; leave it out"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise UserError(
            f"ppo.rollout_dtype=fp8 needs a GPU with fp8, of compute capability 8.9 or more, and"
            f" {torch.cuda.get_device_name(device)} has none; leave it out"
        )
