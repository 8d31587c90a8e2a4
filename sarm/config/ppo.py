"""The settings of PPO, of its penalty, and of a sweep over penalties."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from sarm.config.base import Count, Fraction, FromList, Nonnegative, Positive, Strict

Arm = Literal["penalty", "no_penalty", "random"]


class PenaltyConfig(Strict):
    """The penalty of the compound reward; see `sarm/ppo/reward.py`."""

    kind: Literal["threshold", "hinge", "density"] = "threshold"
    tau: float | None = 3.0
    tau_quantile: Fraction | None = None
    """Set tau per latent at this quantile of its value over discovery's rejected texts, zeros
    included.
    """
    alpha: Nonnegative = 0.1
    alpha_unit: Literal["reward", "reward_sd"] = "reward"
    clamp: Nonnegative | None = None
    """Clamp the penalised latents to at most this before scoring."""

    @model_validator(mode="after")
    def _one_tau(self) -> PenaltyConfig:
        if (self.tau is None) == (self.tau_quantile is None):
            raise ValueError("give either tau or tau_quantile")
        return self


class LoraConfig(Strict):
    rank: Positive = 16
    alpha: Positive = 32


class PpoConfig(Strict):
    """PPO; names as TRL's where TRL has one. Batches count sequences over all ranks."""

    arms: Annotated[tuple[Arm, ...], FromList] = ("penalty", "no_penalty", "random")
    seeds: Annotated[tuple[int, ...], FromList] = (0,)
    steps: Positive = 100
    batch_size: Positive = 32
    num_mini_batches: Positive = 1
    num_ppo_epochs: Positive = 1
    micro_batch_tokens: Positive | None = None
    """Padded tokens in one forward and backward of one rank. Where unset, as `make plan` has it;
    so the next one, `zero_stage` and `weights`.
    """
    gradient_checkpointing: bool | None = None
    """Compute each layer again in the backward pass instead of keeping what it left."""
    max_prompt_tokens: Positive = 512
    long_prompts: Literal["skip", "truncate", "refuse"] = "skip"
    """Prompts beyond `max_prompt_tokens`: leave them out, keep their first token and their newest
    ones, or stop. They are counted.
    """
    max_new_tokens: Positive = 128
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    lora: LoraConfig | None = LoraConfig()
    zero_stage: Literal[0, 1, 2, 3] | None = None
    weights: Literal["float32_master", "compact"] | None = None
    """How full fine-tuning in bf16 keeps updates smaller than a bf16 step: 18 bytes a parameter,
    or 8; see `sarm/ppo/learner/optimizer.py`.
    """
    learning_rate: Nonnegative = 1e-6
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: Count = 0
    weight_decay: Nonnegative = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    cliprange_low: Nonnegative = 0.2
    cliprange_high: Nonnegative = 0.2
    cliprange_value: Nonnegative = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    log_ratio_max: Annotated[float, Field(gt=0)] = 20.0
    vf_coef: Nonnegative = 0.1
    whiten_advantages: bool = True
    kl_estimator: Literal["k1", "k3"] = "k1"
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    kl_coef: Nonnegative = 0.05
    kl_target: Annotated[float, Field(gt=0)] = 6.0
    kl_horizon: Positive = 10_000
    kl_stop: Annotated[float, Field(gt=0)] | None = None
    """Stop a step's remaining updates when the approximate KL to the rollout policy exceeds this.
    """
    missing_eos_penalty: Nonnegative = 0.0
    reward_scale: Literal["none", "running_sd"] = "running_sd"
    """Divide rewards by their running standard deviation, after the penalty."""
    reward_clip: Annotated[float, Field(gt=0)] | None = 10.0
    penalty: PenaltyConfig = PenaltyConfig()
    calibration_prompts: Positive = 64
    """Generations of the untrained policy that set the random arm's dose."""
    checkpoint_every: Positive = 10
    keep_last: Positive = 1
    log_to: Literal["none", "tensorboard", "wandb"] = "none"

    @model_validator(mode="after")
    def _trainable(self) -> PpoConfig:
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
