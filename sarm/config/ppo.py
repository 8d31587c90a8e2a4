"""The settings of PPO, of its penalty, and of a sweep over penalties."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sarm.config.arms import Arm
from sarm.config.base import STORED, Count, Fraction, FromList, Nonnegative, Positive, Strict
from sarm.ppo.advantages import ADVANTAGES
from sarm.ppo.penalties import PENALTIES

PositiveFloat = Annotated[float, Field(gt=0)]


class PenaltyConfig(Strict):
    """The penalty of the compound reward; see `sarm/ppo/reward.py`."""

    kind: str = "threshold"
    """threshold, hinge or density; see `sarm/ppo/penalties.py`."""
    tau: float | None = 3.0
    tau_quantile: Fraction | None = None
    """Set tau per latent at this quantile of its value over `tau_from`, zeros included."""
    tau_from: Literal["rejected", "policy"] = "rejected"
    """Discovery's rejected texts, or the base policy's own responses."""
    alpha: Nonnegative = 0.1
    alpha_unit: Literal["reward", "reward_sd"] = "reward"
    clamp: Nonnegative | None = None
    """Clamp the penalised latents to at most this before scoring."""

    @property
    def has_tau(self) -> bool:
        return PENALTIES[self.kind].has_tau

    @property
    def words(self) -> str:
        """How the report names the kind; empty for the plain one."""
        return PENALTIES[self.kind].words

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        if kind not in PENALTIES:
            raise ValueError(f"no penalty {kind!r}; known are {', '.join(PENALTIES)}")
        return kind

    @model_validator(mode="after")
    def _one_tau(self) -> PenaltyConfig:
        if (self.tau is None) == (self.tau_quantile is None):
            raise ValueError("give either tau or tau_quantile")
        return self


LORA_LEARNING_RATE, FULL_LEARNING_RATE = 1e-4, 1e-6
"""What `ppo.learning_rate` is where it is not set. An adapter starts at 0 and has a hundredth of
the weights: at full fine-tuning's rate a hundred steps hardly move it, and the bf16 export of the
merged weights rounds nearly all of that away.
"""
CRITIC_SETTINGS = (
    "gamma",
    "lam",
    "cliprange_value",
    "vf_coef",
    "value_learning_rate",
    "value_max_grad_norm",
    "value_warmup_steps",
)
"""What only an advantage with a critic reads."""
ROLLOUT_SETTINGS = ("rollout_weight_cap", "rollout_mismatch_max")
"""What is read only where rollouts are sampled from another dtype than the policy's."""


class LoraConfig(Strict):
    rank: Positive = 16
    alpha: Positive = 32


class HeldOutConfig(Strict):
    """Evaluation on prompts that training never draws, while it goes on; see
    `sarm/evaluation/held_out.py`.
    """

    every: Count = 0
    """Steps from one to the next, the first before any and the last after all; never where 0."""
    prompts: Positive = 16
    """Of each kind, unsafe and safe."""
    completions: Count = 4
    """Of each kind, responses that are logged with their scores; none where 0. What `log_to` shows
    of them and their prompts follows `report.texts`.
    """


class PpoConfig(Strict):
    """PPO; names as TRL's where TRL has one. Batches count sequences over all ranks."""

    arms: Annotated[tuple[Arm, ...], FromList] = ("penalty", "no_penalty", "random")
    seeds: Annotated[tuple[int, ...], FromList] = (0,)
    steps: Positive = 100
    batch_size: Positive = 32
    samples_per_prompt: Positive = 1
    """Responses to each prompt of a batch, whose `batch_size` counts them all."""
    num_mini_batches: Positive = 1
    num_ppo_epochs: Positive = 1
    micro_batch_tokens: Positive | None = None
    """Padded tokens in one forward and backward of one rank. Where unset, as `make plan` has it;
    so the next one, `zero_stage` and `weights`.
    """
    gpu_gib: PositiveFloat | None = None
    """Of each GPU's memory, what one arm may use, so that several small ones can be trained on a
    card; where unset, all of it.
    """
    gradient_checkpointing: bool | None = None
    """Compute each layer again in the backward pass instead of keeping what it left."""
    safe_share: Fraction | None = None
    """Of the prompts that are drawn, how many are safe ones, which should be answered; where unset,
    as part ppo of the data has them.
    """
    max_prompt_tokens: Positive = 512
    long_prompts: Literal["skip", "truncate", "refuse"] = "skip"
    """Prompts beyond `max_prompt_tokens`: leave them out, keep their first token and their newest
    ones, or stop. They are counted.
    """
    max_new_tokens: Positive = 128
    temperature: Nonnegative = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    rollout_dtype: Literal["fp8"] | None = None
    """`fp8`: rollouts are sampled from the policy with its layers in 8 bits, quantised after each
    update; where unset, from the policy itself. Losses weigh each token by how much likelier the
    policy itself makes it. For Llama policies; see docs/training.md.
    """
    rollout_weight_cap: Annotated[float, Field(ge=1)] = 2.0
    """With `rollout_dtype`: such a weight is at most this."""
    rollout_mismatch_max: PositiveFloat = 0.3
    """With `rollout_dtype`: nats a token, on average over a batch, by which the policy and what
    samples for it may differ; training stops where they differ by more.
    """
    lora: LoraConfig | None = LoraConfig()
    zero_stage: Literal[0, 1, 2, 3] | None = None
    weights: Literal["float32_master", "compact"] | None = None
    """How full fine-tuning in bf16 keeps updates smaller than a bf16 step: 18 bytes per parameter,
    or 8; see `sarm/ppo/learner/optimizer.py`.
    """
    learning_rate: Nonnegative | None = None
    """Of the policy; where unset, 1e-4 with LoRA and 1e-6 in full (`peak_learning_rate`)."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: Count = 0
    weight_decay: Nonnegative = 0.0
    max_grad_norm: PositiveFloat = 1.0
    advantage: str = "gae"
    """gae, rloo or grpo; see `sarm/ppo/advantages.py`."""
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    cliprange_low: Nonnegative = 0.2
    cliprange_high: Nonnegative = 0.2
    cliprange_value: Nonnegative = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    log_ratio_max: PositiveFloat = 20.0
    vf_coef: Nonnegative = 0.1
    value_learning_rate: Nonnegative | None = None
    """Of the value head; where unset, the policy's. So the next one."""
    value_max_grad_norm: PositiveFloat | None = None
    """The value head's gradient is then clipped by its own norm, apart from the policy's."""
    value_warmup_steps: Count = 0
    """First steps in which the value head alone learns; the policy's schedule begins after them."""
    entropy_coef: Nonnegative = 0.0
    """Of the policy's entropy at response tokens, which is added to what is maximised."""
    whiten_advantages: bool | None = None
    """Over the batch; where unset, as the advantage has it: gae yes, rloo and grpo no."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether `kl_coef` times the KL to the reference is taken off the reward at each token, or is
    a term of the loss.
    """
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    kl_coef: Nonnegative = 0.05
    kl_target: PositiveFloat = 6.0
    kl_horizon: Positive = 10_000
    kl_stop: PositiveFloat | None = None
    """Stop a step's remaining updates when the approximate KL to the rollout policy exceeds this.
    """
    kl_distances: Annotated[tuple[PositiveFloat, ...], FromList] = ()
    """In nats, ascending: a policy is kept when the KL to the reference, as a mean over five steps,
    first reaches each, so that arms can be compared at equal KL.
    """
    stop_at_kl: PositiveFloat | None = None
    """In nats: training ends when the same mean reaches it, though steps are left."""
    missing_eos_penalty: Nonnegative = 0.0
    reward_scale: Literal["none", "running_sd", "base_sd"] = "base_sd"
    """Divide rewards, penalty and all, by the standard deviation of the reward of the base policy's
    responses, as calibrate found it: alike in all arms, which then weigh reward against KL alike.
    `running_sd` is that of the arm's own rewards with their penalty so far.
    """
    reward_clip: PositiveFloat | None = 10.0
    penalty: PenaltyConfig = PenaltyConfig()
    unreadable: Literal["stop", "warn"] = "stop"
    """What to do where calibrate finds that the SARM does not read the policy's responses."""
    continue_from: str | None = None
    """A finished run, by its folder, whose unit of the same name training goes on from: its
    weights, optimizer state and steps, which `steps` counts too. With more steps or another
    learning rate; see `sarm/ppo/parent.py`.
    """
    keep_state: bool | None = None
    """Whether a finished unit keeps what `continue_from` needs; where unset, with LoRA, whose
    optimizer state is small.
    """
    checkpoint_every: Positive = 10
    keep_last: Positive = 1
    held_out: HeldOutConfig = HeldOutConfig()
    log_to: Literal["none", "tensorboard", "wandb"] = "none"

    @property
    def keeps_state(self) -> bool:
        """`keep_state`, resolved."""
        return self.lora is not None if self.keep_state is None else self.keep_state

    @property
    def critic(self) -> bool:
        """Whether the policy has a value head."""
        return ADVANTAGES[self.advantage].critic

    @property
    def whiten(self) -> bool:
        """`whiten_advantages`, resolved."""
        of_advantage = ADVANTAGES[self.advantage].whiten
        return of_advantage if self.whiten_advantages is None else self.whiten_advantages

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, resolved."""
        if self.learning_rate is not None:
            return self.learning_rate
        return FULL_LEARNING_RATE if self.lora is None else LORA_LEARNING_RATE

    @field_validator("advantage")
    @classmethod
    def _known_advantage(cls, advantage: str) -> str:
        if advantage not in ADVANTAGES:
            raise ValueError(f"no advantage {advantage!r}; known are {', '.join(ADVANTAGES)}")
        return advantage

    @model_validator(mode="after")
    def _advantage_and_batch(self, info: ValidationInfo) -> PpoConfig:
        least = ADVANTAGES[self.advantage].min_samples
        if self.samples_per_prompt < least:
            raise ValueError(
                f"advantage {self.advantage} compares the responses to one prompt; set"
                f" samples_per_prompt to {least} or more"
            )
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of samples_per_prompt"
                f" {self.samples_per_prompt}"
            )
        if not self.critic and (name := self._set_among(CRITIC_SETTINGS, info)):
            raise ValueError(
                f"{name} is for a critic, which advantage {self.advantage} has not; leave it out"
                " or set advantage=gae"
            )
        if self.value_warmup_steps >= self.steps:
            raise ValueError(
                f"value_warmup_steps {self.value_warmup_steps} leaves none of the {self.steps}"
                " steps for the policy"
            )
        if self.value_max_grad_norm is not None and self.zero_stage:
            raise ValueError(
                "value_max_grad_norm needs zero_stage 0: ZeRO clips by the norm of all gradients"
            )
        return self

    @model_validator(mode="after")
    def _kl_with_the_right_gradient(self) -> PpoConfig:
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator k1 as a loss has a gradient of mean 0; set kl_estimator to k2 or k3,"
                " or kl_in=reward"
            )
        if self.kl_in == "reward" and self.kl_estimator == "k2":
            raise ValueError(
                "kl_estimator k2 in the reward is biased, and its gradient is not the KL's; set"
                " kl_estimator to k1 or k3, or kl_in=loss"
            )
        return self

    def _set_among(self, names: tuple[str, ...], info: ValidationInfo) -> str | None:
        """The first of these settings that is not at its default. None of a run's own config, which
        states every setting: what it says may be an earlier version's default.
        """
        if info.context == STORED:
            return None
        defaults = {name: type(self).model_fields[name].default for name in names}
        return next((name for name in names if getattr(self, name) != defaults[name]), None)

    @field_validator("kl_distances")
    @classmethod
    def _ascending(cls, distances: tuple[float, ...]) -> tuple[float, ...]:
        if any(later <= earlier for earlier, later in itertools.pairwise(distances)):
            raise ValueError(
                f"{list(distances)} is not ascending; list each distance once, the smallest first"
            )
        return distances

    @model_validator(mode="after")
    def _within_reach(self) -> PpoConfig:
        if self.stop_at_kl is not None and self.kl_distances[-1:] > (self.stop_at_kl,):
            raise ValueError(
                f"kl_distances goes up to {self.kl_distances[-1]}, and training ends at stop_at_kl"
                f" {self.stop_at_kl}; raise stop_at_kl or leave those distances out"
            )
        return self

    @model_validator(mode="after")
    def _trainable(self, info: ValidationInfo) -> PpoConfig:
        if self.temperature == 0:
            samples = self.samples_per_prompt
            raise ValueError(
                "training at temperature 0 is refused: nothing would be explored"
                + (f", and the {samples} samples of a prompt would be one" if samples > 1 else "")
                + "; set a temperature above 0"
            )
        if self.rollout_dtype is None and (name := self._set_among(ROLLOUT_SETTINGS, info)):
            raise ValueError(
                f"{name} is for rollouts in another dtype than the policy's; leave it out or set"
                " rollout_dtype=fp8"
            )
        if self.top_p < 1:
            raise ValueError(
                "training with top_p < 1 is refused: old log-probabilities would not be the"
                " sampler's; set ppo.top_p=1"
            )
        if self.weights == "compact" and (self.lora or self.zero_stage):
            raise ValueError(
                "weights=compact is for full fine-tuning without ZeRO, whose optimizers keep"
                " float32 copies; set lora=null and zero_stage=0"
            )
        if self.batch_size % self.num_mini_batches:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of num_mini_batches"
                f" {self.num_mini_batches}"
            )
        if not self.arms or not self.seeds:
            raise ValueError("name at least one arm and one seed")
        if len(set(self.arms)) < len(self.arms) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("an arm or seed is named twice")
        return self


class SweepConfig(Strict):
    """PPO under a grid of penalties beside the arms, every tau with every alpha; off where no
    alpha is named.

    The latents are the penalty arm's, and so is all else.
    """

    tau: Annotated[tuple[Nonnegative, ...], FromList] = ()
    tau_quantile: Annotated[tuple[Fraction, ...], FromList] = ()
    """In place of `tau`; per latent, as `ppo.penalty.tau_quantile`."""
    alpha: Annotated[tuple[Nonnegative, ...], FromList] = ()
    """In ppo.penalty.alpha_unit."""
    seeds: Annotated[tuple[int, ...], FromList] = (0,)

    @model_validator(mode="after")
    def _whole_grid(self) -> SweepConfig:
        if self.tau and self.tau_quantile:
            raise ValueError("give either tau or tau_quantile")
        if bool(self.tau or self.tau_quantile) != bool(self.alpha) or (
            self.alpha and not self.seeds
        ):
            raise ValueError("a sweep needs taus (tau or tau_quantile), alphas and seeds")
        if any(
            len(set(values)) < len(values)
            for values in (self.tau, self.tau_quantile, self.alpha, self.seeds)
        ):
            raise ValueError("a value is named twice")
        return self


class SweepPoint(NamedTuple):
    """The penalty of one unit of a sweep."""

    tau: float
    is_quantile: bool
    alpha: float
