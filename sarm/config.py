"""The schema of a run: strict, frozen, read from YAML; unknown keys are refused by name.

Load with `load_config("configs/smollm2.yaml", ["ppo.steps=20"])`. Imports no torch: login nodes use
it.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: relative paths in a config are relative to it."""

Part = Literal["sarm_train", "discovery", "validation", "test", "ppo", "policy_eval"]
PARTS: tuple[Part, ...] = ("sarm_train", "discovery", "validation", "test", "ppo", "policy_eval")

Phase = Literal["fetch", "encode", "probe", "select", "steer", "cards", "ppo", "evaluate", "report"]
PHASES: tuple[Phase, ...] = (
    "fetch",
    "encode",
    "probe",
    "select",
    "steer",
    "cards",
    "ppo",
    "evaluate",
    "report",
)

Arm = Literal["penalty", "no_penalty", "random"]


class UserError(Exception):
    """A failure a user can mend: one sentence with what, where and what to do. Exit code 2."""


class Strict(BaseModel):
    """Frozen, no unknown keys, no coercion from strings, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Nonnegative = Annotated[float, Field(ge=0.0)]
Dtype = Literal["float32", "bfloat16"]


class ModelConfig(Strict):
    """Where a model comes from: a folder, a hub id with a pinned revision, or
    `embedded:smollm2`.
    """

    model: str
    revision: str | None = None
    dtype: Dtype = "bfloat16"

    def folder(self) -> Path | None:
        """The folder here that it names; None where it is embedded or on the hub. Raises UserError
        where it can be neither.
        """
        if self.model.startswith("embedded:"):
            return None
        folder = ROOT / Path(self.model).expanduser()
        if folder.is_dir():
            return folder
        if self.revision is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", self.model):
            raise UserError(
                f"model {self.model!r} is no folder here; a hub model needs an id such as"
                " owner/name and a pinned revision in the config"
            )
        return None


class SarmConfig(ModelConfig):
    """The reward model. `use_topk` settles a checkpoint whose config does not say."""

    use_topk: bool | None = None
    tokens_per_batch: Positive = 16384
    """Tokens in one scoring batch; what texts share counts as often as they hold it."""
    max_length: Positive = 4096
    """Longest conversation in tokens; a longer one loses its oldest tokens, and is counted."""


class SourceConfig(Strict):
    """One data set and what part of its prompts goes where.

    `split` maps a part to the fraction of this source's prompts; what is left over is unused.
    """

    format: Literal[
        "jsonl", "prompts", "rewardbench2", "rewardbench2_sarm", "rmb_pairs", "rmb_bon", "hh_rlhf"
    ]
    label: str
    """The name in report tables, such as `RB2 Safety`."""
    path: str | None = None
    """A file or folder; relative to the checkout."""
    repo: str | None = None
    """A hub data set, used where there is no path; needs `revision` and `files`."""
    revision: str | None = None
    files: tuple[str, ...] = ()
    """The files to read of a hub data set, or of a folder; a folder is read whole where this is
    empty.
    """
    subset: str | None = None
    """Keep only rows of this RewardBench 2 subset, such as `Safety`."""
    kind: Literal["unsafe", "safe"] = "unsafe"
    """What the prompts ask for; `safe` ones are look-alikes that should be answered."""
    split: dict[Part, Fraction]
    limit: Positive | None = None
    """Keep at most this many prompts, those with the smallest hash."""

    @field_validator("files", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_place_and_a_split(self) -> SourceConfig:
        if (self.path is None) == (self.repo is None):
            raise ValueError("give either path or repo")
        if self.repo is not None and (self.revision is None or not self.files):
            raise ValueError("a hub data set needs a pinned revision and its files")
        if self.path is not None and self.revision is not None:
            raise ValueError("revision goes with repo; a path has none")
        if self.subset is not None and self.format != "rewardbench2":
            raise ValueError(f"only format rewardbench2 has subsets, not {self.format}")
        if self.format == "prompts" and not set(self.split) <= {"ppo", "policy_eval"}:
            raise ValueError("prompts without answers can only go to ppo and policy_eval")
        if sum(self.split.values()) > 1 + 1e-9:
            raise ValueError(f"split fractions add up to {sum(self.split.values()):g}, more than 1")
        return self


class DataConfig(Strict):
    """All data of a run. A prompt found in two sources follows the first that lists it."""

    salt: str = "sarm"
    """Changes which prompts fall in which part."""
    sources: Annotated[dict[str, SourceConfig], Field(min_length=1)]


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
    directions: tuple[float, ...] = (3.0, -3.0)
    """Standard deviations c by which validation's states are moved along each latent's decoder
    direction; none skips that.
    """

    @field_validator("directions", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return (
            tuple(float(c) if isinstance(c, int) and not isinstance(c, bool) else c for c in value)
            if isinstance(value, (list, tuple))
            else value
        )

    @model_validator(mode="after")
    def _distinct_moves(self) -> ProbeConfig:
        if 0.0 in self.directions or len(set(self.directions)) < len(self.directions):
            raise ValueError("directions must be distinct and not zero")
        return self


class SelectConfig(Strict):
    listed: Positive = 10
    """How many promoting and harming latents the report lists."""
    effect: Literal["reselected", "head"] = "reselected"
    fdr: Annotated[float, Field(gt=0, lt=1)] = 0.1
    penalised: Positive = 3
    monitors: Count = 5
    monitor_max_cosine: Fraction = 0.5
    redraws: Count = 3
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
    strengths: Annotated[tuple[float, ...], Field(min_length=1)] = (-4.0, 4.0)
    """c, in standard deviations of the state."""

    @field_validator("strengths", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


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


class PenaltyConfig(Strict):
    """The penalty of the compound reward; see `sarm/ppo/reward.py`."""

    kind: Literal["count", "hinge", "density"] = "count"
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

    arms: tuple[Arm, ...] = ("penalty", "no_penalty", "random")
    seeds: tuple[int, ...] = (0,)
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

    @field_validator("arms", "seeds", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

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

    tau: tuple[Nonnegative, ...] = ()
    tau_quantile: tuple[Fraction, ...] = ()
    """In place of `tau`; per latent, as `ppo.penalty.tau_quantile`."""
    alpha: tuple[Nonnegative, ...] = ()
    """In ppo.penalty.alpha_unit."""
    seeds: tuple[int, ...] = (0,)

    @field_validator("tau", "tau_quantile", "alpha", "seeds", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

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
    """Training a SARM on the policy's model: the SAE by SAELens, the head by Bradley-Terry."""

    layer: Positive = 15
    """Decoder layers kept; the SAE reads what they leave in the residual stream."""
    d_sae: Positive = 4608
    k: Positive = 64
    positions: Literal["token", "last", "both"] = "token"
    """What the SAE is trained on: every token, reward positions alone, or as many of either."""
    sae_steps: Positive = 3000
    sae_batch: Positive = 4096
    sae_learning_rate: Annotated[float, Field(gt=0)] = 4e-4
    head_l2: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (
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

    @field_validator("head_l2", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Config(Strict):
    """One run. `Config.sha256` names it in every manifest."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,49}$")]
    seed: Count = 0
    policy: ModelConfig
    sarm: SarmConfig
    data: DataConfig
    encode: EncodeConfig = EncodeConfig()
    probe: ProbeConfig = ProbeConfig()
    select: SelectConfig = SelectConfig()
    steer: SteerConfig = SteerConfig()
    cards: CardsConfig = CardsConfig()
    ppo: PpoConfig = PpoConfig()
    sweep: SweepConfig = SweepConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    verdict: VerdictConfig = VerdictConfig()
    train_sarm: TrainSarmConfig = TrainSarmConfig()
    hardware: str = ""
    """Shown in the report; where empty, what the PPO job found."""

    @property
    def sha256(self) -> str:
        """Hash of the resolved config, independent of key order and YAML spelling."""
        return hashlib.sha256(
            json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()
        ).hexdigest()

    @property
    def models(self) -> tuple[ModelConfig, ...]:
        """Every model that a run reads."""
        return (self.policy, self.sarm, *([self.evaluate.judge] if self.evaluate.judge else []))

    def units(self, phase: Phase) -> tuple[str, ...]:
        """The units of work of a phase: shards, trained policies, evaluated policies, or `all`."""
        if phase == "encode":
            return shard_names(self.encode.shards)
        if phase == "probe":
            return shard_names(self.probe.shards)
        if phase == "ppo":
            return (
                *(f"{arm}-seed{seed}" for seed in self.ppo.seeds for arm in self.ppo.arms),
                *self.sweep_points(),
            )
        if phase == "evaluate":
            return ("base", *self.units("ppo"), *(("steered",) if self.steer.policy else ()))
        return ("all",)

    def sweep_points(self) -> dict[str, SweepPoint]:
        """The units that a sweep adds to ppo and evaluate, such as `sweep-tau0.5-alpha1-seed0` or
        `sweep-quantile0.5-alpha1-seed0`.
        """
        sweep = self.sweep
        name, taus = ("quantile", sweep.tau_quantile) if sweep.tau_quantile else ("tau", sweep.tau)
        grid = itertools.product(sweep.seeds, taus, sweep.alpha)
        return {
            f"sweep-{name}{tau!r}-alpha{alpha!r}-seed{seed}": SweepPoint(
                tau, bool(sweep.tau_quantile), alpha
            )
            for seed, tau, alpha in grid
        }

    @model_validator(mode="after")
    def _sweepable(self) -> Config:
        if self.sweep.alpha and self.ppo.penalty.kind == "density":
            raise ValueError(
                "sweep: a density penalty has no tau to sweep over; use kind count or hinge"
            )
        return self


def shard_names(shards: int) -> tuple[str, ...]:
    """`shard-0000-of-0004` and its sisters."""
    return tuple(f"shard-{i:04d}-of-{shards:04d}" for i in range(shards))


def shard_range(unit: str, total: int) -> tuple[int, int]:
    """The half-open range of `total` items that a unit named by `shard_names` works on; sizes
    differ by at most one.
    """
    _, index, _, shards = unit.split("-")
    i, n = int(index), int(shards)
    return total * i // n, total * (i + 1) // n


def arm_and_seed(unit: str) -> tuple[str, int]:
    """`penalty-seed0` as `("penalty", 0)`."""
    arm, _, seed = unit.rpartition("-seed")
    return arm, int(seed)


class Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-6 is a number, which YAML 1.1 denies, and a key given twice is
    an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `Loader` would read as numbers."""


for _class in (Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def config_yaml(config: Config) -> str:
    """The whole config as YAML that `load_config` reads back to the same."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `dotted.key=value` overrides, values being YAML.

    Raises UserError naming the file and every key that is unknown, of a wrong type or out of range.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise UserError(f"config {path} does not exist; the shipped ones are in configs/") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"config {path} is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"config {path} is empty or not a mapping of keys")
    for override in overrides:
        set_key(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], where: str) -> Config:
    """Validate a tree of plain values; `where` names it in errors. Raises UserError."""
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        raise UserError(
            f"config {where}: " + "; ".join(_complaint(e) for e in error.errors())
        ) from None


def set_key(tree: dict[str, Any], override: str) -> None:
    """Apply one `dotted.key=value` to a tree in place. Raises UserError where it has no `=`."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override {override!r} is not of the form key=value, such as ppo.steps=20")
    *parents, leaf = dotted.split(".")
    for key in parents:
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {key} is a value, not a section")
        tree = child
    try:
        tree[leaf] = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise UserError(
            f"override {override!r} is not valid YAML: {' '.join(str(error).split())}"
        ) from None


def _complaint(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"] if part != "[key]")
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"][:-1])
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"unknown key {where} ({hint})"
    value = error.get("input")
    shown = (
        "" if isinstance(value, (dict, list)) or error["type"] == "missing" else f" (got {value!r})"
    )
    if isinstance(value, float) and not math.isfinite(value):
        return f"{where} must be a finite number{shown}"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}{shown}"


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    """The keys of the section at `loc`; empty where it is none."""
    section: Any = Config
    for part in loc:
        if get_origin(section) is dict:
            section = get_args(section)[1]
        elif _is_model(section):
            field = section.model_fields.get(str(part))
            section = field.annotation if field else None
        # The section of `LoraConfig | None` is LoraConfig.
        section = next(
            (
                option
                for option in get_args(section)
                if get_origin(section) is not dict and _is_model(option)
            ),
            section,
        )
    return sorted(section.model_fields) if _is_model(section) else []


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
