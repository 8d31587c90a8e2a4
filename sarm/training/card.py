"""The model card of a trained SARM, from its config and metrics."""

from __future__ import annotations

import math
from typing import Any

from sarm.config import Config


def accuracy_table(config: Config, metrics: dict[str, Any]) -> str:
    """Pair accuracy by source, as Markdown."""
    lines = [
        (
            f"| source | trained on | {config.train_sarm.folds} prompt folds | dense states | pairs"
            " / prompts | shipped head, held-out prompts | pairs / prompts |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for source, folds in metrics["cross_validated"].items():
        dense, held = metrics["cross_validated_dense"][source], metrics["held_out"].get(source)
        trained = "yes" if metrics["pairs"].get(f"{source}/sarm_train") else "no"
        cells = [
            source_label(config, source),
            trained,
            figure(folds),
            figure(dense),
            f"{folds['pairs']:,} / {folds['prompts']:,}",
            figure(held) if held else "",
            f"{held['pairs']:,} / {held['prompts']:,}" if held else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def source_label(config: Config, source: str) -> str:
    """A source's name in tables, also of pairs that were made of a source's."""
    for name, settings in config.data.sources.items():
        if source == name or source.startswith(f"{name} "):
            return settings.label + source.removeprefix(name)
    return source


def figure(accuracy: dict[str, Any]) -> str:
    """`0.912 ± 0.013`; of one prompt there is no standard error."""
    error = accuracy["standard_error"]
    return f"{accuracy['mean']:.3f} ± " + (f"{error:.3f}" if math.isfinite(error) else "n/a")


def model_card(config: Config, metrics: dict[str, Any]) -> str:
    """What was trained on what, how, and how good it is."""
    t = config.train_sarm
    revision = f" at {config.policy.revision}" if config.policy.revision else ""
    trained = ", ".join(
        f"{n:,} of {key.split('/')[0]}"
        for key, n in sorted(metrics["pairs"].items())
        if key.endswith("/sarm_train")
    )
    quality = ((name.replace("_", " "), q) for name, q in metrics["sae"].items())
    rows = [
        f"| {name} | {q['fvu']:.3f} | {q['l0']:.1f} | {q['never_active']:,} | {q['negative']:.2%} |"
        for name, q in quality
    ]
    layers = (
        f"trained by low-rank updates of rank {t.backbone_rank} ({t.backbone_steps:,} steps of"
        f" {t.backbone_batch} pairs, learning rate {t.backbone_learning_rate:g}, Bradley-Terry),"
        " which are in this folder in bfloat16 and are merged on opening"
        if t.backbone_rank
        else "frozen"
    )
    return f"""# SARM on {config.policy.model}

The first {t.layer} decoder layers of {config.policy.model}{revision}, {layers}; a TopK SAE of
{t.d_sae:,} latents (k {t.k}, no ReLU) and a linear head. This folder holds the SAE (matrices in
float16) and the head (float32); the layers are read from that model.

Command: `python -m jobs train_sarm --config configs/{config.name}.yaml --run outputs/{config.name}`
Seed {config.seed}, {metrics["device"]}, {metrics["date"]}.

## Training
- Pairs: {trained}. Prompts of other parts and sources only evaluate.
- SAE: SAELens's TopK loss and schedule, {t.sae_steps:,} Adam steps of {t.sae_batch:,} states,
  positions: {t.positions}, of conversations of at most {t.max_length} tokens under the model's own
  chat template.
- Head: Bradley-Terry on SARM's own z (no ReLU); sources count alike, prompts alike within a source;
  L2 strength {metrics["l2"]:g} by cross-validation inside the training pairs.

## Pair accuracy
Mean ± standard error over prompt folds: a fold is judged by layers, SAE and head that saw none of
its prompts. "Dense states": a head of the same kind on the states themselves, for what the SAE
costs. The shipped head is judged on the prompts outside `sarm_train`, its standard error clustered
by prompt.

{accuracy_table(config, metrics)}

## SAE
| states | FVU | L0 | latents never active there | states with a kept value below zero |
|---|---|---|---|---|
{chr(10).join(rows)}
"""
