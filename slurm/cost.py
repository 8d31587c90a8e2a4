"""What a run takes of disk and GPU time, phase by phase, from its config, its models' sizes and a
profile's time limits.

`print(table(config, profile, run))`. Needs no network, image or Slurm: sizes are those of `make
plan`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from sarm.config import PHASES, ROOT, Config, Phase, UserError
from sarm.cost import Cost, cost_lines, counts, planned, refuse_beyond, shapes, wall_seconds
from sarm.pinned import fetched, pinned
from sarm.ppo.learner.memory_plan import Gpus, Sarm
from sarm.run import RunDir
from slurm.plan import Batch
from slurm.profile import Profile, gpu_hours, resources


class Disk(NamedTuple):
    """Bytes of one phase, all its units together."""

    phase: Phase
    what: str
    stays: float | None
    """None where it depends on data that this machine has not seen."""
    passing: float = 0.0
    """On top, while the phase runs."""


def kept_latents(config: Config, sarm: Sarm) -> int:
    """k: from the SARM's folder, else upstream's share of its width."""
    try:
        keys = json.loads(
            (ROOT / Path(config.sarm.model).expanduser() / "config.json").read_text(
                encoding="utf-8"
            )
        )
    except (OSError, ValueError):
        keys = {}
    return int(keys.get("k") or 3 * sarm.trunk.hidden // 64)


def disk(config: Config, run: RunDir) -> list[Disk]:
    """Bytes a phase leaves, and those it needs on top while it runs."""
    policy, sarm = shapes(pinned(run))
    texts, ppo, trained = count_texts(run), config.ppo, len(config.units("ppo"))
    found = []
    if policy and sarm:
        trunk = sarm.trunk.layers * sarm.trunk.layer + sarm.trunk.embedding
        found.append(
            Disk(
                "fetch",
                "models, in the cache",
                2.0 * policy.parameters + 2.0 * trunk + 4.0 * sarm.d_sae * sarm.trunk.hidden,
            )
        )
    if sarm:
        # Each text keeps its state, and the index and value of every rank, all of four bytes.
        text = 4.0 * sarm.trunk.hidden + 8.0 * (
            kept_latents(config, sarm) + config.encode.extra_ranks
        )
        found.append(Disk("encode", "encoded states", None if texts is None else text * texts))
        # A row per latent: some forty columns of effects and statistics.
        found.append(Disk("probe", "tables of effects", 320.0 * sarm.d_sae))
    if policy:
        # As sarm.ppo.learner.memory_plan counts it: Adam's moments and the weights they step; of
        # adapters, their gradients too.
        full = policy.parameters * (5.0 if ppo.weights == "compact" else 12.0)
        checkpoint = 16.0 * policy.lora(ppo.lora.rank) if ppo.lora else full
        passing = checkpoint * (ppo.keep_last + 1) * trained
        policies = trained * (1 + len(ppo.kl_distances))
        size = 2.0 * policy.parameters * policies + checkpoint * trained * ppo.keeps_state
        found.append(Disk("ppo", f"{policies} policies", size, passing))
    return found


def count_texts(run: RunDir) -> int | None:
    """Texts that encode takes, as fetch counted the pairs; None before that."""
    found = fetched(run)
    return None if found is None else counts(found.data.pairs, found.data.prompts).texts


def plan_costs(config: Config, profile: Profile, run: RunDir) -> list[Cost] | None:
    """By phase and arm; None where the models' sizes are not known here. Raises UserError where PPO
    does not fit.
    """
    policy, sarm = shapes(pinned(run))
    if policy is None or sarm is None:
        return None
    found = fetched(run)
    data = counts(found.data.pairs, found.data.prompts) if found else counts(None, None)
    ppo = resources(profile, "ppo")
    gpus = Gpus(max(1, ppo.gpus) * ppo.nodes, 80, ppo.nodes)
    return planned(config, policy, sarm, data, gpus)


def check_limit(config: Config, profile: Profile, run: RunDir) -> None:
    """Raises UserError where the plan is larger than `limits.gpu_hours`, or not known."""
    if config.limits.gpu_hours is None:
        return
    costs = plan_costs(config, profile, run)
    if costs is None:
        raise UserError(
            "limits.gpu_hours is set, and what the run takes is not known before make fetch has"
            " brought its models; fetch first, or leave the limit out"
        )
    refuse_beyond(config, costs)


def needed_bytes(config: Config, run: RunDir) -> float:
    """What the run directory has to hold at most, as far as it is known."""
    return sum(
        (part.stays or 0.0) + part.passing for part in disk(config, run) if part.phase != "fetch"
    )


def gigabytes(size: float | None) -> str:
    if size is None:
        return "?"
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def table(config: Config, profile: Profile, run: RunDir, batches: list[Batch]) -> str:
    """A line per phase: jobs, GPU-hours by their time limits, disk that stays and that passes; and
    the totals.
    """
    parts = {part.phase: part for part in disk(config, run)}
    lines, total = [], 0.0
    for phase in PHASES:
        jobs = sum(len(batch.elements) for batch in batches if batch.phase == phase)
        hours, part = gpu_hours(profile, phase, jobs), parts.get(phase)
        total += hours
        if jobs or part:
            stays = f"{gigabytes(part.stays)} {part.what}" if part else ""
            passing = (
                f", and {gigabytes(part.passing)} of checkpoints while it runs"
                if part and part.passing
                else ""
            )
            gpu = f"{hours:8.1f} GPU-hours at most"
            lines.append(f"### {phase:9}{jobs:4} jobs {gpu}  {stays}{passing}".rstrip())
    try:
        costs = plan_costs(config, profile, run)
    except UserError as error:  # it does not fit: of no matter to a look at what would be sent
        lines.append(f"### {error}")
        costs = None
    if costs:
        models = parts["fetch"].stays if "fetch" in parts else None
        wall_s = wall_seconds(costs, models or 0.0)
        known = fetched(run) is not None
        lines += [f"### {line}" for line in cost_lines(costs, wall_s, known)]
    unknown = [
        model.model
        for model, shape in zip((config.policy, config.sarm), shapes(pinned(run)), strict=True)
        if shape is None
    ]
    if unknown:
        lines.append(
            f"### disk of what {', '.join(unknown)} makes is not known here before make fetch"
        )
    if "encode" in parts and parts["encode"].stays is None:
        lines.append("### encoded states depend on the data, which make fetch counts")
    lines.append(
        f"### in all {total:.0f} GPU-hours by the time limits,"
        f" {gigabytes(needed_bytes(config, run))} in the run directory at most"
    )
    return "\n".join(lines)
