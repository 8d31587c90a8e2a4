"""The reference report's sections: its labels, column widths and number formats, its sentences
computed.

Each takes figures and gives lines. A sentence says something else where the figures do.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import Any

from reports.blocks import WIDTH, wrap
from reports.numbers import count, duration, each, fixed, percent, plain, size

LIST_WIDTH = 96
"""Ten latents of five digits stand on one line in the reference report."""
PATH_WIDTH = 26
ALL_STEPS = "over all steps"
"""Said of what is not of the steps shown alone; the reference's own sentences do not say it."""


def configuration(c: dict[str, Any]) -> list[str]:
    size = f" ({count(c['reward_parameters'])} parameters)" if c["reward_parameters"] else ""
    took = (
        f"~{duration(c['training_s'])} ({c['steps']} steps)"
        if c["training_s"] is not None
        else "n/a"
    )
    return [
        f"Policy Model: {c['policy']}",
        f"Reward Model: {c['reward_model']}{size}",
        f"Hardware: {c['hardware'] or 'n/a'}",
        f"Training Time: {took}",
    ]


def discovery(features: dict[str, Any] | None) -> list[str]:
    if features is None:
        return ["not available: no latents were selected (see FAILED AND MISSING PARTS)"]
    lines: list[str] = []
    for label, role in (
        ("Safety-Promoting Features: ", "promoting"),
        ("Safety-Harming Features:   ", "harming"),
    ):
        names = [f"{f['latent']}{'' if f['confirmed'] else '*'}" for f in features[role]]
        lines += textwrap.wrap(
            label + (", ".join(names) or "none"),
            LIST_WIDTH,
            subsequent_indent=" " * len(label),
            drop_whitespace=True,
        )
    if not all(f["confirmed"] for role in ("promoting", "harming") for f in features[role]):
        lines.append("(* not confirmed on validation prompts)")
    return lines


def controls(figures: dict[str, Any]) -> list[str]:
    penalty, rows = figures["penalty"], figures["progression"]
    latents = ", ".join(str(latent) for latent in penalty["latents"]) or "none"
    top = f" (top {len(penalty['latents'])} safety-harming)" if penalty["top_harming"] else ""
    lines = [f"Features Penalized: {latents}{top}"]
    if not penalty["has_tau"]:
        lines += [
            f"Penalty Threshold (tau): none ({penalty['words']} penalty)",
            f"Penalty Weight (lambda): {each(penalty['alphas'])}",
        ]
    else:
        quantile = (
            f" (quantile {plain(penalty['tau_quantile'])} of rejected texts)"
            if penalty["tau_quantile"] is not None
            else ""
        )
        unit = (
            f" ({plain(penalty['alpha_in_reward_sd'])} reward SD)"
            if penalty["alpha_in_reward_sd"] is not None
            else ""
        )
        words = f", {penalty['words']}" if penalty["words"] else ""
        lines += [
            f"Penalty Threshold (tau): {each(penalty['taus'])}{quantile}",
            f"Penalty Weight (alpha): {each(penalty['alphas'])} per feature{unit}{words}",
        ]
    if penalty["clamp"] is not None:
        lines.append(f"Latents clamped for scoring at: {plain(penalty['clamp'])}")
    lines += ["", "Training Progression:"]
    if not rows:
        return [*lines, f"  not available: {figures['shown_policy']} left no metrics"]
    names = [f"Step {row['step']}:" for row in rows]
    width = max(len(name) for name in names)
    for name, row in zip(names, rows, strict=True):
        reward, penalised, loss = (
            fixed(row[column], 3) for column in ("reward", "penalty", "loss")
        )
        lines.append(f"  {name:<{width}} reward={reward}, penalty={penalised}, loss={loss}")
    return lines


def results(figures: dict[str, Any]) -> list[str]:
    """What the verdict says, and what the training log holds; only the former interprets."""
    verdict, rows = figures["verdict"], figures["progression"]
    lead = wrap(verdict["lead"])
    if not rows:
        return [*lead, *wrap(f"- Training log: not available, {figures['shown_policy']} left none")]
    penalties = [value for _, value in figures["penalties"]]
    sentences = [
        loss_sentence(rows),
        penalty_sentence(penalties, verdict["word"]),
        reward_sentence(figures["compound_rewards"]),
    ]
    return [*lead, *(line for s in sentences for line in wrap(f"- {s}", "  "))]


def loss_sentence(rows: list[dict[str, Any]]) -> str:
    first, last = rows[0]["loss"], rows[-1]["loss"]
    ends = f"from {fixed(first, 3)} to {fixed(last, 3)}"
    if not (math.isfinite(first) and math.isfinite(last)):
        return f"Loss went {ends}: it is not finite"
    if len(rows) == 1:
        return f"Loss was {fixed(last, 3)} at the only logged step"
    if fixed(first, 3) == fixed(last, 3):
        return f"Loss stayed at {fixed(first, 3)}"
    fell = last < first
    between = [row["loss"] for row in rows]
    if min(between) < last if fell else max(between) > last:
        low, high = fixed(min(between), 3), fixed(max(between), 3)
        return f"Loss went {ends}, between {low} and {high} at the steps shown"
    if first <= 0 or last < 0:
        return f"Loss {'fell' if fell else 'rose'} {ends}"
    share = abs(last - first) / first
    verb = ("converged" if share >= 0.5 else "fell") if fell else "rose"
    return f"Loss {verb} {ends} ({percent(share)} {'reduction' if fell else 'increase'})"


def penalty_sentence(penalties: list[float], verdict: str) -> str:
    """About all logged steps, not only those shown. That an oscillation shows learning is said
    where the verdict is control, and nowhere else.
    """
    if not penalties or not all(math.isfinite(p) for p in penalties):
        return "Feature penalties were not logged at every step"
    low, high = min(penalties), max(penalties)
    if low == high == 0:
        return (
            "Feature penalties were never triggered (0.0 at every step), so they had no effect on"
            " the training"
        )
    if plain(low) == plain(high):
        return f"Feature penalties stayed at {plain(low)}"
    steps = [b - a for a, b in itertools.pairwise(penalties)]
    ends = f"from {plain(penalties[0])} to {plain(penalties[-1])}"
    if all(step <= 0 for step in steps):
        return f"Feature penalties fell {ends} {ALL_STEPS}"
    if all(step >= 0 for step in steps):
        return f"Feature penalties rose {ends} {ALL_STEPS}"
    between = f"Feature penalties oscillated between {plain(low)} and {plain(high)}"
    if penalties[-1] == high:
        return f"{between} {ALL_STEPS} and ended at their highest"
    if verdict != "control":
        slope, error = trend(list(enumerate(penalties))) if len(penalties) > 2 else (0.0, 0.0)
        if abs(slope) <= 3 * error:
            return f"{between} {ALL_STEPS}"
        verb = "fell" if slope < 0 else "rose"
        return (
            f"Feature penalties {verb} {ends} {ALL_STEPS}, between {plain(low)} and {plain(high)}"
        )
    return (
        f"{between}, showing the model learning to balance reward optimization with feature"
        " constraints"
    )


def reward_sentence(rewards: list[list[float]]) -> str:
    """Stable unless the least-squares trend over the logged steps exceeds three of its standard
    errors.
    """
    name = "The compound reward (RM score - penalties)"
    if not rewards or not all(math.isfinite(reward) for _, reward in rewards):
        return f"{name} is not finite at every step"
    ends = f"from {fixed(rewards[0][1], 3)} to {fixed(rewards[-1][1], 3)}"
    if len(rewards) < 3:
        return f"{name} went {ends}: too few logged steps to tell a trend"
    slope, error = trend(rewards)
    if abs(slope) <= 3 * error:
        return f"{name} remained stable"
    return f"{name} {'rose' if slope > 0 else 'fell'} {ends} {ALL_STEPS}"


def trend(points: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Least-squares slope and its standard error."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    sxx = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sxx
    residual = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    return slope, math.sqrt(residual / (n - 2) / sxx)


def steering(summary: dict[str, Any] | None) -> list[str]:
    if summary is None or not summary["texts"]:
        return [
            "not available: "
            + (
                "there is no text in the test part"
                if summary
                else "steering did not run (see FAILED AND MISSING PARTS)"
            )
        ]
    labels = [f"{t['source']} {t['label'].capitalize()}" for t in summary["texts"]]
    width = max(24, *(len(label) + 1 for label in labels))
    lines = [f"{'Dataset':<{width}}{'Before':>13}{'After':>13}{'Delta':>11}"]
    for label, t in zip(labels, summary["texts"], strict=True):
        before, after = (f"{fixed(t[side], 4):>13}" for side in ("before", "after"))
        lines.append(f"{label:<{width}}{before}{after}{fixed(t['delta'], 4, sign=True):>11}")
    return [*lines, "", *wrap(f"Interpretation: {steering_sentence(summary)}")]


def steering_sentence(summary: dict[str, Any]) -> str:
    """Words for the printed Deltas: `slight` is less than a tenth of the reward's standard
    deviation.
    """
    moved = {label: moves(summary, label) for label in ("chosen", "rejected")}
    largest = max(
        (
            abs(t["delta"])
            for t in summary["texts"]
            if t["label"] == "rejected" and t["delta"] is not None
        ),
        default=0.0,
    )
    size = "slight" if largest < 0.1 * (summary["reward_sd"] or 0) else "marked"
    if moved == {"chosen": "none", "rejected": "none"}:
        return (
            "Steering has no effect that shows here - neither chosen (safe) nor rejected (unsafe)"
            " responses move."
        )
    if moved["chosen"] == "none" and moved["rejected"] in ("up", "down"):
        change = "improvement" if moved["rejected"] == "up" else "decline"
        return (
            "Steering shows high specificity - chosen (safe) responses are unaffected while"
            f" rejected (unsafe) responses show {size} {change}."
        )
    words = {
        "up": "gain reward",
        "down": "lose reward",
        "both": "move both ways",
        "none": "do not move",
        "unknown": "have no finite scores",
    }
    lead = (
        "Steering harms the chosen texts"
        if moved["chosen"] == "down"
        else "Steering is not specific"
    )
    if moved["chosen"] == moved["rejected"]:
        return (
            f"{lead} - chosen (safe) and rejected (unsafe) responses both {words[moved['chosen']]}."
        )
    return (
        f"{lead} - chosen (safe) responses {words[moved['chosen']]} while rejected (unsafe)"
        f" responses {words[moved['rejected']]}."
    )


def moves(summary: dict[str, Any], label: str) -> str:
    """Which way the printed Deltas of the chosen or the rejected texts go, over all data sets."""
    return direction([t["delta"] for t in summary["texts"] if t["label"] == label])


def direction(deltas: Sequence[float | None]) -> str:
    """Where the printed Deltas point: up, down, both, none or unknown."""
    known = [d for d in deltas if d is not None and math.isfinite(d)]
    if len(known) < len(deltas) or not known:
        return "unknown"
    signs = {0 if float(fixed(d, 4)) == 0 else math.copysign(1, d) for d in known} - {0}
    return (
        "none" if not signs else "both" if len(signs) == 2 else "up" if signs == {1.0} else "down"
    )


def output_files(outputs: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for o in outputs:
        gone = ", since removed" if o.get("removed") else ""
        what = o["what"] + (f" ({size(o['bytes'])}{gone})" if "bytes" in o else "")
        line = f"- {o['path']:<{PATH_WIDTH}} : {what}"
        lines += [line] if len(line) <= WIDTH else [f"- {o['path']}", f"    : {what}"]
    return lines or ["none"]
