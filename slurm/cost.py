"""What a run takes of disk and GPU time, phase by phase, from its config, its models' sizes and a profile's time limits.

`print(table(config, profile, run))`. Needs no network, image or Slurm: sizes come from a model's own folder, the hub's cache,
or `KNOWN`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sarm.config import PHASES, ROOT, Config, ModelConfig, Phase
from sarm.run import RunDir
from slurm.images import caches
from slurm.plan import Batch
from slurm.profile import Profile, gpu_hours


class Sizes(NamedTuple):
    """Of a Llama; of a SARM, whose layers are those it keeps, also its SAE's."""

    parameters: int
    projections: int
    """Inputs and outputs of every projection added up, over all layers: what a rank of LoRA adapters has."""
    hidden: int
    latents: int = 0
    k: int = 0


class Disk(NamedTuple):
    """Bytes of one phase, all its units together."""

    phase: Phase
    what: str
    stays: float | None
    """None where it depends on data that this machine has not seen."""
    passing: float = 0.0
    """On top, while the phase runs."""


def llama(keys: Mapping[str, Any]) -> Sizes:
    """From the keys of a config.json, upstream's SARM keys included."""
    d, f, heads = keys["hidden_size"], keys["intermediate_size"], keys["num_attention_heads"]
    width = keys.get("head_dim") or d // heads
    q, kv = heads * width, (keys.get("num_key_value_heads") or heads) * width
    nested = keys.get("sarm_param") or {}
    latents = keys.get("d_sae") or nested.get("sae_latent_size") or keys.get("sae_latent_size") or 0
    kept = nested.get("sae_source_layer") or keys.get("sae_hidden_state_source_layer") if latents else None
    layers = kept or keys["num_hidden_layers"]
    layer = 2 * d * q + 2 * d * kv + 3 * d * f + 2 * d
    embeddings = keys["vocab_size"] * d * (1 if keys.get("tie_word_embeddings") or latents else 2)
    k = keys.get("k") or nested.get("sae_k") or keys.get("sae_k") or 0
    sae = 2 * latents * d + 2 * latents + d if latents else 0
    return Sizes(layers * layer + embeddings + d + sae, layers * (2 * (d + q) + 2 * (d + kv) + 3 * (d + f)), d, latents, k)


_LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
}
KNOWN: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "Schrieffer/Llama-SARM-4B": {**_LLAMA_8B, "num_hidden_layers": 16, "d_sae": 65536, "k": 192},
    "embedded:smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
"""Of models that need not lie on this machine."""


def sizes(model: ModelConfig) -> Sizes | None:
    """A model's sizes, or None where this machine does not know them."""
    if model.model in KNOWN:
        return llama(KNOWN[model.model])
    snapshots = caches("fetch")["HF_HUB_CACHE"] / f"models--{model.model.replace('/', '--')}" / "snapshots"
    for path in (ROOT / Path(model.model).expanduser() / "config.json", *sorted(snapshots.glob("*/config.json"))):
        try:
            return llama(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError):
            continue
    return None


def disk(config: Config, run: RunDir) -> list[Disk]:
    """Bytes a phase leaves, and those it needs on top while it runs."""
    policy, sarm = sizes(config.policy), sizes(config.sarm)
    texts, ppo, trained = count_texts(run), config.ppo, len(config.units("ppo"))
    found = []
    if policy and sarm:
        found.append(Disk("fetch", "models, in the cache", 2.0 * policy.parameters + 2.0 * sarm.parameters))
    if sarm:
        # Each text keeps its state, and the index and value of every rank, all of four bytes.
        text = 4.0 * sarm.hidden + 8.0 * (sarm.k + config.encode.extra_ranks)
        found.append(Disk("encode", "encoded states", None if texts is None else text * texts))
        # A row a latent: some forty columns of effects and statistics.
        found.append(Disk("probe", "tables of effects", 320.0 * sarm.latents))
    if policy:
        # Adam's two moments and the weights they step, in float32; and the gradients of adapters.
        checkpoint = 16.0 * policy.projections * ppo.lora.rank if ppo.lora else 12.0 * policy.parameters
        passing = checkpoint * (ppo.keep_last + 1) * trained
        found.append(Disk("ppo", f"{trained} policies", 2.0 * policy.parameters * trained, passing))
    return found


def count_texts(run: RunDir) -> int | None:
    """Texts that encode takes, as fetch counted the pairs; None before that."""
    manifest = run.manifest("fetch")
    try:
        path = run.folder("fetch") / manifest["outputs"]["models.json"]["file"] if manifest else None
        pairs = json.loads(path.read_text())["data"]["pairs"] if path else None
    except (OSError, ValueError, KeyError):
        return None
    if pairs is None:
        return None
    return 2 * sum(n for key, n in pairs.items() if key.rpartition("/")[2] in ("discovery", "validation", "test"))


def needed_bytes(config: Config, run: RunDir) -> float:
    """What the run directory has to hold at most, as far as it is known."""
    return sum((part.stays or 0.0) + part.passing for part in disk(config, run) if part.phase != "fetch")


def gigabytes(size: float | None) -> str:
    if size is None:
        return "?"
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def table(config: Config, profile: Profile, run: RunDir, batches: list[Batch]) -> str:
    """A line a phase: jobs, GPU-hours by their time limits, disk that stays and that passes; and the totals."""
    parts = {part.phase: part for part in disk(config, run)}
    lines, total = [], 0.0
    for phase in PHASES:
        jobs = sum(len(batch.elements) for batch in batches if batch.phase == phase)
        hours, part = gpu_hours(profile, phase, jobs), parts.get(phase)
        total += hours
        if jobs or part:
            stays = f"{gigabytes(part.stays)} {part.what}" if part else ""
            passing = f", and {gigabytes(part.passing)} of checkpoints while it runs" if part and part.passing else ""
            lines.append(f"### {phase:9}{jobs:4} jobs {hours:8.1f} GPU-hours at most  {stays}{passing}".rstrip())
    unknown = [model.model for model in (config.policy, config.sarm) if sizes(model) is None]
    if unknown:
        lines.append(f"### disk of what {', '.join(unknown)} makes is not known here before make fetch")
    if "encode" in parts and parts["encode"].stays is None:
        lines.append("### encoded states depend on the data, which make fetch counts")
    lines.append(f"### in all {total:.0f} GPU-hours by the time limits, {gigabytes(needed_bytes(config, run))} in the run directory at most")
    return "\n".join(lines)
