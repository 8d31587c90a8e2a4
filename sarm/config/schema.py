"""One run as a whole: its config, and the units of work that each phase has."""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from sarm.config.base import Count, Strict
from sarm.config.inputs import ChatModelConfig, DataConfig, ModelConfig, SarmConfig
from sarm.config.phases import (
    CalibrateConfig,
    CardsConfig,
    CheckSarmConfig,
    EncodeConfig,
    EvaluateConfig,
    LimitsConfig,
    ProbeConfig,
    ReportConfig,
    ResponsesConfig,
    SelectConfig,
    ServeConfig,
    SteerConfig,
    TrainRefusalsConfig,
    TrainSarmConfig,
    VerdictConfig,
)
from sarm.config.ppo import PpoConfig, SweepConfig, SweepPoint

Phase = Literal[
    "fetch",
    "check_sarm",
    "encode",
    "probe",
    "select",
    "steer",
    "cards",
    "calibrate",
    "ppo",
    "evaluate",
    "report",
]
PHASES: tuple[Phase, ...] = get_args(Phase)


NON_PHASE_JOBS = ("train_sarm", "train_refusals", "export")
"""Jobs that are no phase of a run: started by hand."""


class Config(Strict):
    """One run. `Config.sha256` names it in every manifest."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,49}$")]
    seed: Count = 0
    policy: ChatModelConfig
    sarm: SarmConfig
    data: DataConfig
    limits: LimitsConfig = LimitsConfig()
    check_sarm: CheckSarmConfig = CheckSarmConfig()
    encode: EncodeConfig = EncodeConfig()
    probe: ProbeConfig = ProbeConfig()
    select: SelectConfig = SelectConfig()
    steer: SteerConfig = SteerConfig()
    cards: CardsConfig = CardsConfig()
    calibrate: CalibrateConfig = CalibrateConfig()
    responses: ResponsesConfig = ResponsesConfig()
    ppo: PpoConfig = PpoConfig()
    sweep: SweepConfig = SweepConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    verdict: VerdictConfig = VerdictConfig()
    report: ReportConfig = ReportConfig()
    train_sarm: TrainSarmConfig = TrainSarmConfig()
    train_refusals: TrainRefusalsConfig = TrainRefusalsConfig()
    serve: ServeConfig = ServeConfig()
    seed_report: str | None = None
    """The figures of an earlier report, relative to the checkout: the report sets this run's beside
    them.
    """

    @property
    def sha256(self) -> str:
        """Hash of the resolved config, independent of key order and YAML spelling."""
        return hashlib.sha256(
            json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()
        ).hexdigest()

    @property
    def models(self) -> tuple[ModelConfig, ...]:
        """Every model that a run reads."""
        return (self.policy, self.sarm, *self.classifiers.values())

    @property
    def classifiers(self) -> dict[str, ModelConfig]:
        """The judge of harm and the detector of refusals, where they are models."""
        named = {"judge": self.evaluate.judge, "refusal_detector": self.evaluate.refusal_detector}
        return {name: model for name, model in named.items() if isinstance(model, ModelConfig)}

    def units(self, phase: Phase) -> tuple[str, ...]:
        """The units of work of a phase: shards, trained policies, evaluated policies, or `all`."""
        if phase == "check_sarm" and not (self.check_sarm.card or self.check_sarm.measure):
            return ()
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
            steered = ("steered",) if self.steer.policy else ()
            return ("base", *self.evaluate.arms, *self.units("ppo"), *steered)
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

    @property
    def conjunction(self) -> tuple[str, ...]:
        """The two sources in both of which a latent must have its effect; none where one alone
        gives pairs to discovery.
        """
        if self.select.sources:
            return self.select.sources
        return mine if len(mine := self._in_discovery()) == 2 else ()

    def _in_discovery(self) -> tuple[str, ...]:
        sources = self.data.sources.items()
        return tuple(name for name, source in sources if source.split.get("discovery"))

    @model_validator(mode="after")
    def _two_sources(self) -> Config:
        known, named = self._in_discovery(), self.select.sources
        if (named and (len(set(named)) != 2 or not set(named) <= set(known))) or (
            not named and len(known) > 2
        ):
            raise ValueError(
                f"select.sources: name two of the sources that have a discovery share"
                f" ({', '.join(known) or 'none has'}), in both of which a latent must have its"
                " effect"
            )
        return self

    @model_validator(mode="after")
    def _own_sources(self) -> Config:
        if unknown := [name for name in self.report.own if name not in self.data.sources]:
            raise ValueError(
                f"report.own: {', '.join(unknown)} is none of data.sources"
                f" ({', '.join(self.data.sources)})"
            )
        return self

    @model_validator(mode="after")
    def _kept_where_compared(self) -> Config:
        kl, distances = self.verdict.kl, self.ppo.kl_distances
        if kl is not None and kl not in distances:
            raise ValueError(
                f"verdict.kl: {kl:g} is none of ppo.kl_distances"
                f" ({', '.join(f'{d:g}' for d in distances) or 'there are none'}); name one of"
                " them, or leave it out for the largest that every arm and seed reaches"
            )
        return self

    @model_validator(mode="after")
    def _sweepable(self) -> Config:
        if self.sweep.alpha and not self.ppo.penalty.has_tau:
            raise ValueError(
                f"sweep: a {self.ppo.penalty.kind} penalty has no tau to sweep over; use another"
                " kind"
            )
        if self.sweep.tau_quantile and self.ppo.penalty.tau_from == "policy":
            raise ValueError(
                "sweep.tau_quantile is over rejected texts, and ppo.penalty.tau_from is policy;"
                " give sweep.tau, or set tau_from=rejected"
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
