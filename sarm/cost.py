"""What a run takes of GPU time, by phase and arm, before it is begun: arithmetic at the rates that
an H100 was measured to reach, so an estimate.

    costs = planned(config, policy, sarm, counts, Gpus(4, 80))
    total = sum(cost.gpu_hours for cost in costs)

`make plan` and `make submit-all DRY_RUN=1` print it, `limits.gpu_hours` is compared with it, and
the report sets what was used beside it. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from sarm.cache_size import rows_at_once
from sarm.config import PHASES, Config, UserError
from sarm.ppo.learner.memory_plan import (
    H100,
    Gpus,
    Sarm,
    Shape,
    find_shape,
    make_plan,
    sampling_parts,
    score_time,
)
from sarm.records import Manifest

START_S, MODEL_S_BYTE = 18.0, 1.7e-9
"""To start a job's Python, and for each byte of a model that it opens or writes; as five phases of
benchmarks/rehearsal.py took on an H200's host with the models in the file cache.
"""
WRITES = 6
"""How often a training opens or writes its policy: to train, as reference, the trial save and its
reopening, the export and its reopening.
"""
EXAMPLES_S = 28.0
"""Of evaluate beside its models, answers and scores: latents at every token of its examples, and
refusals. Measured once, as what was left.
"""
TEXT_TOKENS = 400
"""Of a preference text, as those of RewardBench 2, RMB and HH have on average."""
DIRECTION_S = 0.85
"""One c over 65,536 latents and 256 texts of hidden size 4,096; see docs/experiments.md."""
BENCHMARK_TEXTS = 8977
"""Responses in RewardBench 2."""
FETCH_BYTES_S = 100e6
REFERENCE_GPUS = Gpus(4, 80)
"""One node of the reference run."""
LIGHT_S = {"fetch": 60.0, "select": 180.0, "steer": 60.0, "cards": 120.0, "report": 60.0}
"""Wall time of what needs no GPU."""


class Counts(NamedTuple):
    """What there is of data."""

    texts: int
    """That encode reads."""
    validation: int
    """Of them, in the part whose states are moved."""
    policy_eval: int
    """Prompts."""
    known: bool


ASSUMED = Counts(texts=4000, validation=1000, policy_eval=500, known=False)
"""Where fetch has not counted yet."""


class Cost(NamedTuple):
    """Of a phase, or of one arm's jobs in it."""

    phase: str
    arm: str
    """Empty where a phase knows no arms."""
    jobs: int
    gpus: int
    """A job."""
    seconds: float
    """A job."""

    @property
    def gpu_hours(self) -> float:
        return self.jobs * self.gpus * self.seconds / 3600


def shapes(config: Config) -> tuple[Shape | None, Sarm | None]:
    """The policy's sizes and the SARM's, each None where this machine does not know them."""
    found: list[Any] = []
    for model, kind in ((config.policy, Shape), (config.sarm, Sarm)):
        try:
            shape = find_shape(model.model, model.revision)
        # a login node has no huggingface_hub to look with
        except (UserError, ImportError, OSError, KeyError, ValueError):
            shape = None
        found.append(shape if isinstance(shape, kind) else None)
    return found[0], found[1]


def counts(pairs: Mapping[str, int] | None, prompts: Mapping[str, int] | None) -> Counts:
    """From what fetch counted by `SOURCE/PART`; assumed where it has not."""
    if pairs is None or prompts is None:
        return ASSUMED

    def of(tree: Mapping[str, int], *parts: str) -> int:
        return sum(n for key, n in tree.items() if key.rpartition("/")[2] in parts)

    return Counts(
        2 * of(pairs, "discovery", "validation", "test"),
        2 * of(pairs, "validation"),
        of(prompts, "policy_eval"),
        known=True,
    )


def planned(config: Config, policy: Shape, sarm: Sarm, data: Counts, gpus: Gpus) -> list[Cost]:
    """Every phase that takes a GPU; `gpus` are those of one PPO job."""
    found = [
        Cost("encode", "", config.encode.shards, 1, encode_s(config, sarm, data)),
        Cost("probe", "", config.probe.shards, 1, probe_s(config, sarm, data)),
        Cost("calibrate", "", 1, 1, calibrate_s(config, policy, sarm)),
    ]
    if config.units("check_sarm"):
        most = config.check_sarm.prompts
        texts = BENCHMARK_TEXTS if most is None else min(BENCHMARK_TEXTS, 24 * most)
        found.insert(0, Cost("check_sarm", "", 1, 1, start_s(sarm.bytes) + scoring_s(sarm, texts)))
    step_s = step_seconds(config, policy, sarm, gpus)
    written = sarm.bytes + 2 * policy.parameters * (WRITES + len(config.ppo.kl_distances))
    training_s = start_s(written) + config.ppo.steps * step_s
    seeds = len(config.ppo.seeds)
    found += [Cost("ppo", arm, seeds, gpus.number, training_s) for arm in config.ppo.arms]
    if points := len(config.sweep_points()):
        found.append(Cost("ppo", "sweep", points, gpus.number, training_s))
    for arm, jobs in evaluated(config).items():
        found.append(Cost("evaluate", arm, jobs, 1, evaluate_s(config, policy, sarm, data, arm)))
    return sorted(found, key=lambda cost: PHASES.index(cost.phase))


def evaluated(config: Config) -> dict[str, int]:
    """How many policies of each arm are evaluated."""
    trained = {arm: len(config.ppo.seeds) for arm in config.ppo.arms}
    untrained = {"base": 1} | dict.fromkeys(config.evaluate.arms, 1)
    sweep = {"sweep": len(config.sweep_points())} if config.sweep_points() else {}
    return untrained | trained | sweep | ({"steered": 1} if config.steer.policy else {})


def wall_seconds(costs: list[Cost], fetched_bytes: float) -> float:
    """From fetch to report where no job waits for a GPU: each phase's longest job, those side by
    side counted once.
    """
    longest: dict[str, float] = dict(LIGHT_S)
    for cost in costs:
        longest[cost.phase] = max(longest.get(cost.phase, 0.0), cost.seconds)
    beside = max(longest.pop("check_sarm", 0.0), longest.pop("encode", 0.0))
    # steer and cards run beside calibrate and training
    longest.pop("steer"), longest.pop("cards")
    return beside + sum(longest.values()) + fetched_bytes / FETCH_BYTES_S


def start_s(model_bytes: float) -> float:
    """To start a job that opens or writes so much of models."""
    return START_S + MODEL_S_BYTE * model_bytes


def encode_s(config: Config, sarm: Sarm, data: Counts) -> float:
    """One shard."""
    return start_s(sarm.bytes) + scoring_s(sarm, data.texts) / config.encode.shards


def scoring_s(sarm: Sarm, texts: float, tokens: float = TEXT_TOKENS) -> float:
    """The SARM over so many texts."""
    return 2 * sarm.trunk.layers * sarm.trunk.layer * texts * tokens / H100.score


def sampling_s(policy: Shape, responses: int, prompt_tokens: int, tokens: int) -> float:
    """Of a phase that samples as many rows at once as suit the decoder."""
    at_once = min(responses, rows_at_once(prompt_tokens + tokens))
    parts = sampling_parts(policy, responses, at_once, prompt_tokens, tokens, H100)
    return sum(parts.values())


def reading_s(policy: Shape, tokens: float) -> float:
    """The policy over so many tokens at once."""
    return 2 * policy.parameters * tokens / H100.train


def probe_s(config: Config, sarm: Sarm, data: Counts) -> float:
    """One shard: its share of every c, over validation's texts."""
    width = (sarm.d_sae / 65536) ** 2 * sarm.trunk.hidden / 4096
    moves = len(config.probe.directions) * DIRECTION_S * width * data.validation / 256
    return start_s(sarm.bytes) + moves / config.probe.shards


def calibrate_s(config: Config, policy: Shape, sarm: Sarm) -> float:
    settings, tokens = config.calibrate, config.ppo.max_new_tokens
    responses = settings.prompts * settings.samples
    read = responses * (1 + len(settings.cut_tokens)) + 2 * settings.control_pairs
    scored = scoring_s(sarm, read, config.ppo.max_prompt_tokens + tokens)
    sampled = sampling_s(policy, responses, config.ppo.max_prompt_tokens, tokens)
    return start_s(sarm.bytes + 2 * policy.parameters) + sampled + scored


def evaluate_s(config: Config, policy: Shape, sarm: Sarm, data: Counts, arm: str) -> float:
    """One policy, at every KL distance at which it was kept."""
    settings = config.evaluate
    prompts = (
        data.policy_eval
        if settings.prompts is None
        else min(data.policy_eval, 2 * settings.prompts)
    )
    n = prompts * settings.samples * (settings.best_of if arm == "best_of_n" else 1)
    tokens = n * (config.ppo.max_prompt_tokens + settings.max_new_tokens)
    once = sampling_s(policy, n, config.ppo.max_prompt_tokens, settings.max_new_tokens)
    once += scoring_s(sarm, 1, tokens)
    once += 2 * reading_s(policy, tokens)
    trained = arm in (*config.ppo.arms, "sweep")
    policies = 1 + len(config.ppo.kl_distances) * trained
    opened = sarm.bytes + 2 * policy.parameters * (policies + trained)
    return start_s(opened) + EXAMPLES_S + once * policies


def step_seconds(config: Config, policy: Shape, sarm: Sarm, gpus: Gpus) -> float:
    """One step of PPO. Raises UserError where it does not fit."""
    plan = make_plan(config.ppo, policy, sarm.bytes, gpus)
    return plan.rollout_s + score_time(config.ppo, sarm, gpus) + plan.train_s


def cost_lines(costs: list[Cost], wall_s: float, known: bool) -> list[str]:
    """A line a phase and arm, and the sum."""
    lines = [
        f"  {cost.phase + ' ' + cost.arm:24}{cost.jobs:4} x {cost.gpus} GPU,"
        f" {cost.seconds / 60:6.1f} min each{cost.gpu_hours:9.2f} GPU-hours"
        for cost in costs
    ]
    total = sum(cost.gpu_hours for cost in costs)
    assumed = "" if known else "; data as assumed until make fetch has counted them"
    return [
        "by phase, at an H100's rates",
        *lines,
        f"in all {total:.1f} GPU-hours, {wall_s / 3600:.1f} h from fetch to report where no job"
        f" waits{assumed}",
    ]


def table(config: Config, gpus: Gpus) -> str:
    """For `make plan`, before anything is fetched. Raises UserError where models are unknown."""
    policy, sarm = shapes(config)
    if policy is None or sarm is None:
        raise UserError(
            f"the sizes of {config.policy.model} or {config.sarm.model} are not known here; run"
            " make fetch first"
        )
    costs = planned(config, policy, sarm, counts(None, None), gpus)
    trunk = sarm.trunk.layers * sarm.trunk.layer + sarm.trunk.embedding
    models = 2.0 * policy.parameters + 2.0 * trunk + 4.0 * sarm.d_sae * sarm.trunk.hidden
    lines = cost_lines(costs, wall_seconds(costs, models), known=False)
    limit = config.limits.gpu_hours
    return "\n".join([*lines, *([f"limits.gpu_hours is {limit:g}"] if limit else [])])


def used(manifests: Mapping[tuple[str, str], Manifest]) -> dict[str, float]:
    """GPU-hours by phase, from when units began and ended and on how many GPUs."""
    found: dict[str, float] = {}
    for (phase, _), made in manifests.items():
        gpus = int(made.more.get("ranks") or 1) if made.device.startswith("cuda") else 0
        took = datetime.fromisoformat(made.ended) - datetime.fromisoformat(made.started)
        found[phase] = found.get(phase, 0.0) + gpus * took.total_seconds() / 3600
    return found


def refuse_beyond(config: Config, costs: list[Cost]) -> None:
    """Raises UserError where the plan is larger than `limits.gpu_hours`."""
    limit, total = config.limits.gpu_hours, sum(cost.gpu_hours for cost in costs)
    if limit is None or total <= limit:
        return
    most = max(costs, key=lambda cost: cost.gpu_hours)
    raise UserError(
        f"the run is planned to take {total:.1f} GPU-hours, and limits.gpu_hours is {limit:g}; most"
        f" of it is {most.phase} {most.arm or 'in all'} ({most.gpu_hours:.1f}): lower ppo.seeds,"
        " ppo.steps or evaluate.prompts, or raise the limit"
    )
