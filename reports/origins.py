"""Where the figures of a table come from, and why one is n/a: what the page says on hover."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sarm.run import many


def columns(file: str, names: Mapping[str | int, str]) -> dict[str | int, str]:
    """By column of a table, its name or place: the file, and the column of that."""
    return {column: f"{file}: {name}" for column, name in names.items()}


GENERATIONS = "evaluate/*/generations.parquet"
FEATURES = "select/all/features.json"
STEER = "steer/all/summary.json"
READINGS = "calibrate/all/readings.json"
MANIFEST = "PHASE/UNIT/manifest.json"

ORIGINS = columns(
    GENERATIONS,
    {
        "unsafe": "prompt_id of kind unsafe",
        "safe": "prompt_id of kind safe",
        "penalised": "penalised_fired (z above tau)",
        "monitors": "monitors_fired (z above tau)",
        "refused": "refused, unsafe prompts",
        "over-ref.": "refused, safe prompts",
        "reward": "reward",
        "KL": "kl",
        "tokens": "n_tokens",
        "cut": "truncated",
        "unended": "unended",
        "distinct-1": "response",
        "distinct-2": "response",
        "harm": "harm, unsafe prompts",
    },
)
"""By column of a table of policies: the column of the generations, whose mean it is."""
CHANGES = columns(
    GENERATIONS,
    dict.fromkeys(
        ("prompts", "seeds", "before", "after", "change", "95 % interval", "detectable"),
        "the measure's column, paired by prompt and seed",
    ),
)
DISTANCES = ORIGINS | columns(
    "ppo/*/kept.json", {"distance": "distance", "KL in training": "kl", "at step": "step"}
)
FRONT = ORIGINS | columns(
    GENERATIONS, {"seeds": "seed", "95 % interval": "penalised_fired, over prompts and seeds"}
)
UNKNOWN = {
    "monitors": "no monitor latent qualifies",
    "harm": "no independent judge (evaluate.judge)",
    "unended": "this evaluation did not record it",
    "over-ref.": "no safe prompts",
    "detectable": "with one seed nothing is known of the spread between seeds, or nothing varies",
    "95 % interval": "too few prompts or seeds for an interval",
    "within prompts": "the latent fires on all responses or on none, so nothing varies",
    "below cutoff": "evaluate did not look below the cutoff",
    "rank corr.": "fewer than three found, or all alike",
    "q": "not tested: it fires on too few prompts, or on nearly all texts",
    "effect": "it fires on no text of that part",
    "estimate": "nothing varies, so there is nothing to compare",
    "here": "not in this run",
    "by size": "it fires on no text",
    "confirmed": "not tested",
    "commit": "not from a git checkout",
    "image": "not in a container",
    "job": "no queue gave it one",
    "device": "it left no manifest",
    "host": "it left no manifest",
    "began": "it left no manifest",
    "took": "it left no manifest",
    "ended": "it left no manifest",
    "GPU-hours planned": "the models' sizes are not known here",
}
"""By column: why a figure is n/a."""


LATENTS = columns(
    GENERATIONS,
    {
        "N": "rows",
        "above tau": "z_LATENT above tau",
        "below cutoff": "below_LATENT above tau",
        "mean z": "z_LATENT",
    },
) | columns(READINGS, {"tau": "penalised, monitors and random"})
TRAINING = columns(
    "ppo/*/metrics.jsonl",
    {
        "steps": "step",
        "reward": "objective/scores",
        "penalty": "objective/penalty",
        "KL": "objective/kl",
        "loss": "loss/total",
        "tokens/s": "tokens_per_s",
    },
) | columns("ppo/*/manifest.json", {"time": "training_s"})
SELECTED = columns(
    FEATURES,
    {
        "weight": "weight, of the reward head",
        "delta z": "delta_z, on discovery",
        "effect": "effect, on validation",
        "95 % interval": "effect_low and effect_high, over validation's prompts",
        "q": "q, on discovery",
    },
)
UNITS = columns(
    MANIFEST,
    {
        "took": "started to ended",
        "began": "started",
        "device": "device",
        "host": "host",
        "manifest": "the file's SHA-256",
        "commit": "git_commit",
        "image": "image_sha256",
        "job": "job_id",
        "ended": "ended",
    },
)


def count_of(change: dict[str, Any]) -> str:
    return f"{many(change['n_prompts'], 'prompt')}, {many(change['n_seeds'], 'seed')}"


def on_prompts(n: Mapping[str, int], *parts: str) -> str:
    """`225 discovery and 112 validation prompts`."""
    return f"{' and '.join(f'{n.get(part, 0):,} {part}' for part in parts)} prompts"
