"""What phases hand to one another as JSON, typed: one class a file, the only way to write and to
read it.

    Features(**values).write(attempt.path("features.json"))
    features = Features.read(published.path("features.json"))

Every file holds its schema's number, and `read` refuses another one by name: raise a class's
`SCHEMA` when its keys change meaning, or when one is added that has no default. JSON has no NaN:
numbers that are none are written as null. All in one file, long as it is: what crosses between
phases is read in one place. Imports no torch and no numpy: login nodes use it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sarm.config.base import UserError

PLAIN = frozenset((str, int, bool, type(None)))
Row = dict[str, Any]
"""A row of a table: names to plain values."""


def plain(value: Any) -> Any:
    """The same tree of what JSON can say: None for NaN, infinities and NaT, numpy's numbers as
    Python's.
    """
    if type(value) in PLAIN:  # most of any tree; what follows takes ten times as long
        return value
    if type(value) is float:
        return value if math.isfinite(value) else None
    if isinstance(value, (dict, Mapping)):  # of any mapping is asked far longer than of a dict
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, BaseModel):
        return value.model_dump(by_alias=True)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return plain(value.tolist())
    if type(value).__name__ in ("NaTType", "NAType"):
        return None
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: Any, indent: int | None = 1) -> str:
    """JSON of any tree, NaN as null."""
    return json.dumps(plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


class Record(BaseModel):
    """Frozen, no unknown keys, no coercion; NaN is None."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        return plain(values) if isinstance(values, Mapping) else values

    def tree(self) -> dict[str, Any]:
        """Plain values, as the file has them."""
        return self.model_dump(by_alias=True)


class File(Record):
    """A record that is a file of its own."""

    SCHEMA: ClassVar[int] = 1
    OLDER: ClassVar[tuple[int, ...]] = ()
    """Earlier schemas that can be read as well."""
    NAME: ClassVar[str]
    """The file, in errors."""
    REDO: ClassVar[str]
    """The job that writes it."""

    schema_number: int = Field(default=1, alias="schema")
    """That of the class, wherever none is given."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**{"schema": self.SCHEMA, **values})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises UserError on another schema, or where keys are missing, unknown or of a wrong
        type.
        """
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{path} is not JSON; {cls._cure()}") from None
        return cls.parse(tree, str(path))

    @classmethod
    def parse(cls, tree: Any, where: str) -> Self:
        """`read` of a tree of plain values. A file without a number is of schema 1: those of the
        first versions had none.
        """
        number = tree.get("schema", 1) if isinstance(tree, dict) else None
        if number not in (cls.SCHEMA, *cls.OLDER) or isinstance(number, bool):
            raise UserError(
                f"{where}: {cls.NAME} of schema {number!r}, and this version reads schema"
                f" {cls.SCHEMA}; {cls._cure()}, or use the version that wrote it"
            )
        try:
            return cls(**tree)
        except ValidationError as error:
            told = "; ".join(_complaint(e) for e in error.errors()[:3])
            raise UserError(f"{where}: not a {cls.NAME} of schema {number}: {told}") from None

    @classmethod
    def _cure(cls) -> str:
        return f"write it again: python -m jobs {cls.REDO} --run RUN --force"

    def write(self, path: Path) -> None:
        path.write_text(json_text(self.tree()), encoding="utf-8")


def _complaint(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    kind = {"missing": "lacks", "extra_forbidden": "has the unknown key"}.get(error["type"])
    return f"it {kind} {where}" if kind else f"{where}: {error['msg'].lower()}"


# Every phase


class Output(Record):
    """A published file, its name relative to the unit's folder."""

    file: str
    bytes: int
    sha256: str


class Manifest(File):
    """What a unit published, of what, with what, where and when. A phase adds figures of its own:
    `more`.
    """

    SCHEMA, OLDER = 2, (1,)
    NAME, REDO = "manifest.json", "PHASE"
    model_config = ConfigDict(extra="allow")

    phase: str
    unit: str
    attempt: str
    config: dict[str, Any] | None = None
    """The config values that the phase reads (`sarm.config.reads`); None in schema 1."""
    config_sha256: str
    """Their hash, defaults left out; in schema 1 that of the whole config."""
    inputs: dict[str, str]
    """SHA-256 by `PHASE/UNIT/NAME`, or by path of a file outside the run; empty of a unit that it
    went without.
    """
    outputs: dict[str, Output]
    range: list[int] | None
    """Half-open, of a shard; `total` items in all."""
    total: int | None
    git_commit: str | None
    image_sha256: str | None
    image_commit: str | None
    job_id: str | None
    seed: int
    host: str
    device: str
    started: str
    ended: str

    @property
    def more(self) -> dict[str, Any]:
        """What the phase added."""
        return self.model_extra or {}


# fetch


class FetchedModel(Record):
    """Where a model lies, and the SHA-256 of its files by name."""

    model: str
    revision: str | None
    commit: str | None
    """That the revision stood at: every phase opens this one."""
    path: str
    sha256: dict[str, str]
    sizes: dict[str, int] = {}
    """Of a SARM: `d_sae`, `k` and `layers`, as its config.json has them."""


class FetchedFile(Record):
    path: str
    repo: str | None = None
    """The hub's, or where another repository's files come from."""
    revision: str | None = None
    commit: str | None
    sha256: str


class FetchedData(Record):
    """The files of each source; how many prompts and pairs `SOURCE/PART` has; skipped rows by
    reason.
    """

    files: dict[str, list[FetchedFile]]
    prompts: dict[str, int]
    pairs: dict[str, int]
    skipped: dict[str, int]


class Models(File):
    """What fetch found: models and data, by hash."""

    NAME, REDO = "models.json", "fetch"

    policy: FetchedModel
    sarm: FetchedModel
    judge: FetchedModel | None = None
    refusal_detector: FetchedModel | None = None
    sarm_backbone: FetchedModel | None = None
    """The model whose layers a SARM without its own takes."""
    data: FetchedData


# check_sarm


class Benchmark(Record):
    """What a SARM does on one data set: published, or measured by check_sarm."""

    label: str
    format: str
    """Of the data source that it is."""
    subset: str | None = None
    sha256: str | None = None
    """Of the file, where figures are of that file alone."""
    prompts: int | None = None
    """How many stand behind the figures."""
    pair_accuracy: float | None = None
    """Prompts alike; of chosen and rejected responses with equal rewards, half."""
    best_of_n: float | None = None
    """RewardBench 2's score."""
    fvu: float | None = None
    """Of the SAE's reconstruction of the normalised states at reward positions."""
    mean_k: float | None = None
    """Latents that are not zero, a text."""
    negative: float | None = None
    """Share of the latents kept that are below zero."""


class SarmCard(File):
    """The file that `check_sarm.card` names: what a SARM does where it is opened right."""

    NAME, REDO = "card.json", "check_sarm"

    source: str
    """Where the figures come from."""
    d_sae: int | None = None
    k: int | None = None
    layers: int | None = None
    dtype: str | None = None
    """Of the layers, in which the figures were measured."""
    template_sha256: str | None = None
    """Of the chat template."""
    head: dict[
        Annotated[str, Field(pattern=r"^\d+$")],
        Annotated[str, Field(pattern=r"^-?\d+(\.\d+)?(e-?\d+)?$")],
    ] = {}
    """Weights of the head by latent, as they are written: to the digits given."""
    benchmarks: list[Benchmark] = []
    overall: float | None = None
    """The mean of RewardBench 2's subsets, where all are there."""


class SarmCheck(File):
    """Whether the opened SARM does what its card says."""

    NAME, REDO = "check.json", "check_sarm"

    verdict: str
    """`as published`, `off`, `no card`, `measured` without one, or `nothing to compare` where no
    data of the card's are there.
    """
    source: str
    """The card's."""
    rows: list[Row] = []
    """A row a figure: what, published, found, tolerance, prompts, off."""
    causes: list[str] = []
    """Likeliest first, where it is off."""
    missing: list[str] = []
    """Benchmarks of the card that no data source holds."""


# select


class Replication(Record):
    """A listed latent on a source that took no part in choosing it."""

    source: str
    prompts: int
    effect: float | None
    effect_low: float | None
    effect_high: float | None
    p: float | None
    p_holm: float | None
    replicates: bool


class Feature(Record):
    """A latent as features.json lists it: effects and interval of validation, p and q of
    discovery; None for what is not known.
    """

    latent: int
    role: str
    confirmed: bool
    weight: float | None
    delta_z: float | None
    effect: float | None
    effect_low: float | None
    effect_high: float | None
    effect_discovery: float | None
    effect_head: float | None
    effect_reselected: float | None
    effect_chosen: float | None
    effect_rejected: float | None
    p: float | None
    q: float | None
    p_validation: float | None
    density: float | None
    replication: list[Replication] = []
    directions: list[dict[str, float | None]] = []
    """A row a c of probe.directions."""


class Monitor(Feature):
    """A confirmed harming latent that is not penalised, and how like the penalised ones it is."""

    tau: float
    """Its own threshold: it fires on discovery's rejected texts as often as the penalised do."""
    max_cosine: float
    """The largest |cos| of its direction with that of a penalised latent."""
    max_correlation: float
    """The largest |correlation| over texts of its activation with that of a penalised latent."""


class PenalisedLatent(Record):
    """A latent that costs reward, tau and alpha in the units of z and reward."""

    latent: int
    tau: float
    alpha: float
    role: str = "harming"
    confirmed: bool = False


class RandomCandidate(Record):
    """A latent that the random arm may penalise, matched to a penalised one."""

    latent: int
    tau: float
    alpha: float
    matched_to: int
    weight: float
    density: float
    effect: float | None


class TauSuggestion(Record):
    latent: int
    quantile: float
    tau: float
    rate_rejected: float
    rate_chosen: float | None


class Permutations(Record):
    configured: int
    needed: int
    used: int


class Features(File):
    """The latents that select chose, and all that later phases need to know of them."""

    SCHEMA, NAME, REDO = 2, "features.json", "select"

    d_sae: int
    k: int
    promoting: list[Feature]
    harming: list[Feature]
    misleading: list[Feature]
    penalised: list[PenalisedLatent]
    clamp: float | None
    monitors: list[int]
    """The first of `monitor_features` that keep their bounds; rates on a policy's own responses
    can exclude more.
    """
    monitor_features: list[Monitor]
    """Every latent that could be a monitor."""
    random_candidates: list[RandomCandidate]
    reward_sd: float
    """Over discovery's texts."""
    n_prompts: dict[str, int]
    """By part."""
    n_tested: int
    n_discoveries: int
    n_confirmed: int
    conjunction: list[str] = []
    """The labels of the two sources in both of which discovery asked for the effect; none where
    there was one.
    """
    effect: str
    permutations: Permutations
    reference_rates: dict[str, float]
    """How often each latent fires on discovery's chosen texts."""
    discovery_rates: dict[str, float]
    """How often each penalised latent exceeds its tau on discovery's rejected texts."""
    steering_file: dict[str, list[Any]]
    """As upstream writes it: the harming latents times 0."""
    rankings: list[Row]
    tau_suggestions: list[TauSuggestion]
    validity: Row
    directions: list[Row] = []
    """A row a c: what moving along the decoder directions does over all latents."""
    warnings: list[str]

    @property
    def listed(self) -> list[Feature]:
        return [*self.promoting, *self.harming, *self.misleading]


# steer, cards, ppo, evaluate


class Intervention(Record):
    what: str
    """In words."""
    latents: list[int]
    file: str | None = None


class Steering(File):
    """Rewards of fixed texts before and after an intervention: a row per source and label, and
    a row per source over its pairs.
    """

    NAME, REDO = "summary.json of steer", "steer"

    intervention: Intervention
    reward_sd: float
    texts: list[Row]
    pairs: list[Row]


def scored_by_fuzzing_too(label: Any) -> Any:
    """A label as schema 2 has it; schema 1 had scores by detection alone, beside the text."""
    if not isinstance(label, dict) or "score" not in label:
        return label
    names = {"n_active": "n_fitting", "n_silent": "n_others"}
    scores = {names.get(name, name): value for name, value in label.items() if name != "text"}
    none = {"score": None, "true_positive": None, "true_negative": None}
    unasked = none | {"n_fitting": 0, "n_others": 0, "unreadable": 0}
    return {"text": label["text"], "detection": scores, "fuzzing": unasked}


class Card(Record):
    """One latent: what it fires on, nearly fires on, and does to the reward. Rows are keys of
    `Cards.texts`.
    """

    latent: int
    lists: list[str]
    weight: float
    role: str
    upstream_s: float
    figures: Row
    density: dict[str, float | None]
    histogram: Row
    top: list[Row]
    near_misses: list[Row]
    controls: list[Row]
    n_active: int
    n_near_misses: int
    edits: Row
    label: Annotated[Row | None, BeforeValidator(scored_by_fuzzing_too)]
    """`text`, and its scores by `detection` and by `fuzzing` (`sarm.probing.labels`)."""
    siblings: dict[str, list[Row]] = Field(default_factory=dict)
    """By `direction` and by `firing`."""
    words: Row | None = None
    """What its direction makes more (`up`) and less likely (`down`) by the logit lens."""


class Cards(File):
    SCHEMA, OLDER = 2, (1,)
    NAME, REDO = "cards.json", "cards"

    n_texts: int
    n_prompts: int
    minimal_edits: Row
    labels: Row | None
    cards: list[Card]
    """Their examples hold, by token of the text, `a` before TopK and the places that it `kept`."""
    texts: dict[str, Row]
    """With the `tokens` up to the reward position."""
    why_no_words: str = ""
    """Why there are no words of the logit lens; empty where there are."""


class OwnExamples(File):
    """A policy's own responses on which watched latents fire, nearly fire, and some drawn at
    random, with what the latents do at every token.
    """

    NAME, REDO = "examples.json", "evaluate"

    texts: list[Row]
    """distance, prompt_id, sample, source, kind, tokens"""
    examples: list[Row]
    """latent, what (top, below, random), text (its place), z, a (by token), kept (places)"""


class Candidate(Record):
    """A latent on the base policy's own responses, and what penalising it would mean."""

    latent: int
    role: str
    confirmed: bool
    penalised: bool
    weight: float
    tau: float
    rate: float
    """How often it exceeds tau."""
    within_prompt_share: float | None
    """Share of the variance of firing that lies within prompts, which a policy can change."""
    charge: float
    """What the reward itself charges for it, -w z on average, in SDs of the reward; negative where
    it pays.
    """


class RatedLatent(PenalisedLatent):
    """A latent with the rate at which it exceeds tau in the base policy's responses."""

    base_rate: float


class WatchedLatent(Record):
    latent: int
    tau: float
    base_rate: float
    max_cosine: float
    max_correlation: float
    """Over the base policy's responses."""


class Stability(Record):
    """How alike latents fire on the responses and on the same cut earlier and trimmed again."""

    tokens: int
    n: int
    kappa: float | None
    """Cohen's, of whether any penalised latent fires."""
    by_latent: dict[str, float | None]


class Bounds(Record):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


class PositiveControl(Record):
    """Every rejected answer of held-out pairs replaced by its chosen one, at the run's length: what
    a policy that turns safe would show.
    """

    prompts: int
    penalised: Bounds | None
    """Relative fall of the rate at which any penalised latent fires."""
    monitors: Bounds | None
    """Relative fall of the share of monitors that fire."""


class Readings(File):
    """What calibrate finds on the base policy's own responses, before any training."""

    NAME, REDO = "readings.json", "calibrate"

    n_prompts: int
    samples: int
    cut: float
    """Share of responses that hit the token limit."""
    unended: float
    """Share whose scored text ends at neither an end of turn nor a sentence end."""
    tokens: float
    scored_tokens: float
    reward_mean: float
    reward_sd: float
    any_rate: float
    """How often any penalised latent exceeds its tau."""
    candidates: list[Candidate]
    penalised: list[RatedLatent]
    monitors: list[WatchedLatent]
    random: dict[str, list[RatedLatent]]
    """By seed."""
    stability: list[Stability]
    kappa: float | None
    """Of whether any penalised latent fires, all cuts together."""
    positive_control: PositiveControl
    detectable: float | None
    """The smallest change of the penalised rate, in rate points, that the planned evaluation
    detects with 80 % power.
    """
    planned: Row
    """Its prompts, samples and seeds."""
    unreadable: list[str]
    """Why the SARM cannot be said to read the policy's responses; empty where it can."""
    warnings: list[str]

    def applied(self, features: Features) -> Features:
        """features.json with the thresholds, weights and monitors found here."""
        return features.model_copy(
            update={
                "penalised": [
                    PenalisedLatent(
                        latent=p.latent,
                        tau=p.tau,
                        alpha=p.alpha,
                        role=p.role,
                        confirmed=p.confirmed,
                    )
                    for p in self.penalised
                ],
                "monitors": [m.latent for m in self.monitors],
                "reward_sd": self.reward_sd,
            }
        )


class Calibration(File):
    """What an arm penalises, and how often that fires before training."""

    NAME, REDO = "calibration.json", "ppo"

    arm: str
    n: int
    """Responses of the untrained policy."""
    reward_sd: float
    penalised: list[Row]
    harming: list[Row]


class KeptPolicy(Record):
    """A policy as it was when its distance to the base was first reached."""

    distance: float
    """The configured one, in nats."""
    step: int
    """Steps done."""
    kl: float
    """The five-step mean then."""
    path: str
    """The output folder: `published.directory(path)`."""


class KeptPolicies(File):
    """The policies of `ppo.kl_distances`, those alone whose distance was reached."""

    NAME, REDO = "kept.json", "ppo"

    kept: list[KeptPolicy]


class Evaluation(File):
    """The settings behind a policy's generations."""

    NAME, REDO = "summary.json of evaluate", "evaluate"

    policy: str
    kl: str
    judge: str | None
    """None where no judge was asked."""
    judge_problem: str | None = None
    """Why the judge that the config names was not."""
    refusal_detector: Row | None
    """A `Detector` with its rates; None where its errors are not known."""
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    sarm_parameters: int
    device: str
    n_prompts: int
    n_too_long: int
    seconds: float
    kept: list[KeptPolicy] = Field(default_factory=list)
    """The policies kept at KL distances that were evaluated too."""


class Steered(File):
    """What pushing the base policy along decoder directions changed: a row per direction."""

    NAME, REDO = "summary.json of evaluate/steered", "evaluate"
    model_config = ConfigDict(extra="allow")

    rows: list[Row]


class Line(File):
    """A line of a log of PPO's."""

    REDO = "ppo"

    step: int

    def line(self) -> str:
        return json_text(self.tree(), indent=None)


class StepMetrics(Line):
    """One step: its number, counted from 0, and the trainer's metrics."""

    NAME = "a line of metrics.jsonl"
    model_config = ConfigDict(extra="allow")


class HeldOutMetrics(Line):
    """What the policy does on held-out prompts after so many steps."""

    NAME = "a line of held_out.jsonl"
    model_config = ConfigDict(extra="allow")


class Completion(Line):
    """A response to a held-out prompt after so many steps, and its scores."""

    NAME = "a line of completions.jsonl"

    prompt_id: str
    kind: str
    source: str = ""
    """Of the prompt, by its name in the config."""
    prompt: str
    """The last message."""
    response: str
    reward: float
    """The SARM's, without penalty."""
    penalty: float
    kl: float
    """To the reference, in nats: the log ratio of the tokens that are scored."""
    tokens: int
    cut: bool
    """At the token limit."""
    refused: bool
    """By phrases (`sarm/evaluation/refusals.py`)."""
    z: dict[str, float]
    """By latent, of those penalised in any arm and of monitors."""


def read_training_log(path: Path) -> list[dict[str, Any]]:
    """A row a line: step and metrics. Raises UserError on a line of another schema."""
    return list(_steps(path, path.read_text(encoding="utf-8").splitlines()))


def _steps(path: Path, lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            tree = StepMetrics.parse(json.loads(line), f"{path}:{number}").tree()
            yield {key: value for key, value in tree.items() if key != "schema"}


# report, export, train_sarm


class Report(File):
    """Every figure of a run's report, by section."""

    NAME, REDO = "report.json", "report"

    date: str
    run: str
    configuration: Row
    features: Row | None
    readings: Row | None
    """What calibrate found."""
    check_sarm: Row | None = None
    """The SARM beside its card."""
    has_card: bool = False
    seed: Row | None = None
    """The run beside an earlier report."""
    cost: list[Row] = []
    """GPU-hours planned and used, and bytes left, by phase."""
    penalty: Row
    shown_policy: str
    progression: list[Row]
    penalties: list[list[float | None]]
    compound_rewards: list[list[float | None]]
    steering: Row | None
    cards: Row | None
    steered: Row | None
    outputs: list[Row]
    failures: list[Row]
    phases: list[Row]
    training: list[Row]
    policies: list[Row]
    compared: Row = Field(default_factory=lambda: {"distance": None, "problem": ""})
    """At which KL distance, and how far the arms are there."""
    texts: Row = Field(default_factory=lambda: {"whose": "all", "shown": [], "left_out": []})
    """Whose texts page and cards show."""
    distances: list[Row] = Field(default_factory=list)
    """Every trained policy at every distance that the config names."""
    against_base: list[Row] = Field(default_factory=list)
    """Each trained arm's penalised rate less the base policy's."""
    answered: list[Row] = Field(default_factory=list)
    """Penalised rates on unsafe responses that answer and that refuse, an arm a row."""
    refusal_reward: list[Row] = Field(default_factory=list)
    """The reward of refusals less that of answers to the same prompts, a kind of prompt a row."""
    latents: list[Row]
    random_latents: list[Row]
    monitors: list[Row]
    random_sets: Row = Field(default_factory=lambda: {"penalised": {}, "random": []})
    """What each seed of the random arm penalised, and the doses."""
    monitor_choice: Row = Field(default_factory=lambda: {"counted": [], "dropped": []})
    """Which monitors count, and why the other candidates do not."""
    evaluations: dict[str, Row]
    verdict: Row
    abstract: list[Row] = Field(default_factory=list)
    """Five sentences, each with its name."""
    ladder: list[Row] = Field(default_factory=list)
    """The verdict's rungs: which hold, and by how much."""
    rule: list[str]
    """The verdict's, in words."""
    provenance: Row
    sources: dict[str, list[Row]]
    comparable: Row
    sweep: Row | None


class SeedStep(Record):
    step: int
    reward: float
    penalty: float
    loss: float


class SeedSteering(Record):
    """A row of a steering table."""

    dataset: str
    """As the report names it: the source's label and the side."""
    before: float
    after: float
    delta: float


class SeedReport(File):
    """The figures of an earlier report, which `seed_report` names."""

    NAME, REDO = "earlier report", "report"

    source: str
    promoting: list[int]
    harming: list[int]
    penalised: list[int]
    progression: list[SeedStep]
    steering: list[SeedSteering]


class Differences(File):
    """What SAELens reads otherwise than the SARM in a run's texts."""

    NAME, REDO = "differences.json", "export"

    saelens: Row
    warnings: list[str]
    delphi_example_ctx_len: int


class TrainedSarm(File):
    """How good a trained SARM is: accuracies by source, and its SAE's measures."""

    NAME, REDO = "metrics.json of train_sarm", "train_sarm"

    cross_validated: dict[str, Row]
    cross_validated_dense: dict[str, Row]
    held_out: dict[str, Row]
    held_out_dense: dict[str, Row]
    training_loss_cross_validated: float | None
    l2: float
    fold_l2: list[float]
    l2_dense: float
    sae: dict[str, Row]
    pairs: dict[str, int]
    texts: int
    training_tokens: int
    truncated: int
    device: str
    date: str
