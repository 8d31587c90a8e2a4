"""Where the figures of a table come from, and why one is n/a: what the page says on hover."""

from __future__ import annotations

from typing import Any

from sarm.run import many

GENERATIONS = "evaluate/*/generations.parquet"
RATES = {
    "penalised": "penalised_fired (z above tau)",
    "monitors": "monitors_fired (z above tau)",
    "refused": "refused",
    "over-ref.": "refused, safe prompts",
    "reward": "reward",
    "KL": "kl",
    "tokens": "n_tokens",
    "cut": "truncated",
    "unended": "unended",
    "distinct-1": "response",
    "distinct-2": "response",
    "harm": "harm, unsafe prompts",
}
"""By column of a table of policies: the column of the generations, whose mean it is."""
ORIGINS = {name: f"{GENERATIONS}: {column}" for name, column in RATES.items()}
CHANGES = dict.fromkeys(
    ("before", "after", "change", "95 % interval", "detectable"),
    f"{GENERATIONS}: the measure's column, paired by prompt and seed",
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
}
"""By column: why a figure is n/a."""


LATENTS = {
    "above tau": f"{GENERATIONS}: z_LATENT above tau",
    "below cutoff": f"{GENERATIONS}: below_LATENT above tau",
    "mean z": f"{GENERATIONS}: z_LATENT",
}
TRAINING = {
    "time": "ppo/*/manifest.json: training_s",
    "reward": "ppo/*/metrics.jsonl: objective/scores",
    "penalty": "ppo/*/metrics.jsonl: objective/penalty",
    "KL": "ppo/*/metrics.jsonl: objective/kl",
    "loss": "ppo/*/metrics.jsonl: loss/total",
    "tokens/s": "ppo/*/metrics.jsonl: tokens_per_s",
}


def count_of(change: dict[str, Any]) -> str:
    return f"{many(change['n_prompts'], 'prompt')}, {many(change['n_seeds'], 'seed')}"
