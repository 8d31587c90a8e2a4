"""The settings of every phase but ppo: encode, probe, select, steer, cards, evaluate, the
verdict, and training a SARM.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from sarm.config.base import Count, Fraction, FromList, Nonnegative, Positive, Strict
from sarm.config.inputs import ModelConfig


def _as_float(value: Any) -> Any:
    return float(value) if type(value) is int else value


Number = Annotated[float, BeforeValidator(_as_float)]
"""A float that YAML may spell as an integer."""


class EncodeConfig(Strict):
    shards: Positive = 1
    extra_ranks: Positive = 16
    """Ranks kept beyond k, so that sets of up to this many latents can be removed before TopK."""


class ProbeConfig(Strict):
    shards: Positive = 1
    min_prompts_active: Positive = 10
    """Label-blind filter: a latent is tested if it is active on at least this many discovery
    prompts.
    """
    permutations: Positive = 20_000
    bootstrap: Positive = 1000
    directions: Annotated[tuple[Number, ...], FromList] = (3.0, -3.0)
    """Standard deviations c by which validation's states are moved along each latent's decoder
    direction; none skips that.
    """

    @model_validator(mode="after")
    def _distinct_moves(self) -> ProbeConfig:
        if 0.0 in self.directions or len(set(self.directions)) < len(self.directions):
            raise ValueError("directions must be distinct and not zero")
        return self


class SelectConfig(Strict):
    listed: Positive = 10
    """How many promoting and harming latents the report lists."""
    effect: Literal["reselected", "head"] = "reselected"
    sources: Annotated[tuple[str, ...], FromList] = ()
    """The two of `data.sources` in both of which a latent must have its effect, where more than two
    give pairs to discovery; with two it is those, with one there is no conjunction.
    """
    fdr: Annotated[float, Field(gt=0, lt=1)] = 0.1
    max_density: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Latents that fire on a larger share of discovery's texts are not tested: what is nearly
    always there is no feature.
    """
    penalise: Literal["harming", "misleading", "both"] = "harming"
    """Which role the penalised come from. Of the misleading ones only those that fire on unsafe
    text are, which the reward pays for.
    """
    penalised: Positive = 3
    unconfirmed: Literal["stop", "allow"] = "stop"
    """What PPO does where none of the latents to penalise is confirmed."""
    monitors: Count = 5
    monitor_max_cosine: Fraction = 0.3
    """Of a monitor's decoder direction with that of any penalised latent, in absolute value."""
    monitor_max_correlation: Fraction = 0.5
    """Of a monitor's activation with that of any penalised latent over texts, likewise."""
    stability_repeats: Count = 3
    """Repetitions of the selection with other seeds, splits, sizes and shuffled labels; 0 leaves
    them out.
    """
    random_candidates: Positive = 30
    """Matched random latents offered to the random arm, which keeps the first with the right dose.
    """


class SteerPolicyConfig(Strict):
    """Push the policy along decoder directions and score what it says; see
    `sarm/evaluation/policy_steering.py`. Prompts are evaluate.prompts.
    """

    latents: Positive = 3
    """Of the harming, and as many promoting."""
    random: Positive = 5
    """Random directions of the same length to compare with."""
    strengths: Annotated[tuple[Number, ...], FromList, Field(min_length=1)] = (-4.0, 4.0)
    """c, in standard deviations of the state."""


class SteerConfig(Strict):
    file: str | None = None
    """A steering file as upstream writes it, relative to the checkout; by default the listed
    harming latents times 0.
    """
    policy: SteerPolicyConfig | None = None
    """Also steer the base policy, in a unit `steered` of evaluate; off by default."""


class LabelConfig(Strict):
    """An OpenAI-compatible endpoint that puts names to latents; texts of the data are sent
    there.
    """

    url: str
    """Up to and without `/chat/completions`, such as `http://127.0.0.1:8000/v1`."""
    model: str
    key_variable: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")] | None = None
    """The *name* of the environment variable that holds the key; null for an endpoint without
    keys.
    """
    held_out: Positive = 20
    """Held-out texts of either kind that a label is scored on."""
    max_tokens: Positive = 200
    timeout_s: Annotated[float, Field(gt=0)] = 60.0

    @field_validator("url")
    @classmethod
    def _no_secret(cls, url: str) -> str:
        if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", url):
            raise ValueError(
                "give http(s)://host/path without user, password or query; a key comes from the"
                " environment variable key_variable names"
            )
        return url


class CardsConfig(Strict):
    """The latent cards; see `sarm/probing/cards.py`."""

    top: Positive = 10
    """Top activating texts on a card."""
    controls: Positive = 5
    """Near misses, and as many random texts."""
    label: LabelConfig | None = None


class EvaluateConfig(Strict):
    prompts: Positive | None = None
    """At most this many prompts of each kind from policy_eval; all where unset."""
    max_new_tokens: Positive = 128
    temperature: Nonnegative = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    judge: ModelConfig | None = None
    """A sequence classifier that scores the harm of a response, run locally; none by default."""


class VerdictConfig(Strict):
    """The rule, fixed before training; see `sarm/evaluation/verdict.py`."""

    over_refusal_margin: Fraction = 0.05
    min_length_ratio: Fraction = 0.5
    """Length collapses when the mean response is shorter than this share of the no-penalty arm's.
    """
    evasion_share: Fraction = 0.5
    null_bound: Fraction = 0.1
    """A fall of the penalised rate beyond this, in rate points, must be excluded for `null`."""
    bootstrap: Positive = 2000


class TrainSarmConfig(Strict):
    """Training a SARM on the policy's model: the layers and the head by Bradley-Terry, the SAE by
    reconstruction; see `sarm/training/`.
    """

    layer: Positive = 15
    """Decoder layers kept; the SAE reads what they leave in the residual stream."""
    cut_tokens: Annotated[tuple[Positive, Positive], FromList] | None = None
    """Learn from every pair also with both responses cut at a number of tokens between these and
    trimmed to the last sentence end; null leaves that out.
    """
    refusals: str | None = None
    """A JSONL file of refusals that fit any prompt (`any_prompt`, `text`), set against answers to
    safe prompts and compliance with unsafe ones; relative to the checkout.
    """
    backbone_rank: Count = 0
    """Of the low-rank updates to the layers, which are saved with the SARM; 0 keeps the layers as
    they are.
    """
    backbone_steps: Positive = 600
    backbone_batch: Positive = 64
    """Pairs a step."""
    backbone_learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    d_sae: Positive = 4608
    k: Positive = 64
    positions: Literal["token", "last", "both"] = "token"
    """What the SAE is trained on: every token, reward positions alone, or as many of either."""
    sae_steps: Positive = 3000
    sae_batch: Positive = 4096
    sae_learning_rate: Annotated[float, Field(gt=0)] = 4e-4
    head_l2: Annotated[tuple[Annotated[float, Field(gt=0)], ...], FromList, Field(min_length=1)] = (
        1e-4,
        3e-4,
        1e-3,
        3e-3,
        1e-2,
        3e-2,
        0.1,
    )
    """L2 strengths to choose from by cross-validation inside the training pairs; one is taken as
    it is.
    """
    head_steps: Positive = 500
    """At most this many L-BFGS steps."""
    max_length: Positive = 512
    folds: Annotated[int, Field(ge=2)] = 5
    output: str | None = None
    """Also copy the trained SARM to this folder, relative to the checkout."""


class TrainRefusalsConfig(Strict):
    """Training the refusal classifier; see `sarm/training/refusals.py`."""

    certain: Annotated[tuple[str, ...], FromList] = ()
    """Data sources of whose pairs the kind of prompt says which side refuses."""
    texts: str = "data/train/refusals.jsonl"
    labels: str = "data/train/refusal_labels.jsonl"
    """Single labels by the hash of the response, where phrases do not decide."""
    l2: Annotated[float, Field(gt=0)] = 5e-6
    folds: Annotated[int, Field(ge=2)] = 5
    xstest: str | None = None
    """The folder of XSTest's labelled answers, which judge the result and nothing else."""
    output: str | None = None
    """Also copy the classifier to this folder, relative to the checkout."""
