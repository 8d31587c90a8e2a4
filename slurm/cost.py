"""What a run takes of disk and GPU time, phase by phase, from its config, its models' sizes and a
profile's time limits.

`print(table(config, profile, run))`. Needs no network, image or Slurm: sizes are those of `make
plan`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from sarm.config import PHASES, ROOT, Config, Phase, UserError
from sarm.ppo.learner.memory_plan import Sarm, Shape, find_shape
from sarm.records import Models
from sarm.run import RunDir
from slurm.plan import Batch
from slurm.profile import Profile, gpu_hours


class Disk(NamedTuple):
    """Bytes of one phase, all its units together."""

    phase: Phase
    what: str
    stays: float | None
    """None where it depends on data that this machine has not seen."""
    passing: float = 0.0
    """On top, while the phase runs."""


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
    policy, sarm = shapes(config)
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
    manifest = run.manifest("fetch")
    try:
        if manifest is None:
            return None
        file = manifest.outputs["models.json"].file
        pairs = Models.read(run.folder("fetch") / file).data.pairs
    except (OSError, KeyError):
        return None
    return 2 * sum(
        n
        for key, n in pairs.items()
        if key.rpartition("/")[2] in ("discovery", "validation", "test")
    )


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
    unknown = [
        model.model
        for model, shape in zip((config.policy, config.sarm), shapes(config), strict=True)
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
