"""Which monitors the verdict counts, and why the other candidates do not: `monitor_choice(run,
frames)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reports.frames import Frames, monitor_latents, usable_monitors
from sarm.config import MONITOR_RATES, SelectConfig
from sarm.records import Monitor
from sarm.run import RunDir, many


def monitor_choice(run: RunDir, frames: Frames) -> dict[str, Any]:
    """`counted`: the monitors behind every rate of monitors. `dropped`: each other candidate of
    select's, and why.
    """
    features = frames.features
    chosen = monitor_latents(features)
    counted = [
        m["latent"] for m in usable_monitors(frames.every, chosen, run.config.verdict.monitor_rates)
    ]
    # Without any response of the base policy's nothing was counted, nor dropped for its rate.
    evaluated = bool((frames.every["arm"] == "base").any())
    readings = frames.readings
    known = {c.latent: (c.tau, c.rate) for c in readings.candidates} if readings else {}
    dropped = []
    for candidate in features.monitor_features if features else ():
        assert features is not None
        if candidate.latent in counted:
            continue
        if candidate.latent not in features.monitors:
            full = not readings or len(chosen) >= run.config.select.monitors
            why = left_out(candidate, run.config.select, known, full=full)
        elif evaluated:
            why = f"rate in the evaluation outside {_range(run.config.verdict.monitor_rates)}"
        else:
            continue
        dropped.append({"latent": candidate.latent, "why": why})
    return {"counted": counted if evaluated else [m["latent"] for m in chosen], "dropped": dropped}


def left_out(
    candidate: Monitor,
    select: SelectConfig,
    rates: Mapping[int, tuple[float, float]],
    *,
    full: bool,
) -> str:
    """Why select or calibrate did not take a candidate; `full` where nothing but their number need
    have kept it out. `rates` are (tau, rate on the base policy's
    responses) of listed latents: above a tau as high a latent fires at most as often.
    """
    if candidate.max_cosine >= select.monitor_max_cosine:
        return f"|cos| with a penalised one {candidate.max_cosine:.2f}"
    if candidate.max_correlation >= select.monitor_max_correlation:
        return f"|correlation| with a penalised one {candidate.max_correlation:.2f}"
    tau, rate = rates.get(candidate.latent, (candidate.tau + 1, 1.0))
    if tau <= candidate.tau and rate < MONITOR_RATES[0]:
        least = "" if tau == candidate.tau else "at most "
        return f"base rate {least}{rate:.2f}, outside {_range(MONITOR_RATES)}"
    if full:
        return f"beyond the first {select.monitors}"
    return (
        f"on the base policy's responses a rate outside {_range(MONITOR_RATES)}, or |correlation|"
        f" with a penalised one of at least {select.monitor_max_correlation:g}"
    )


def _range(rates: tuple[float, float]) -> str:
    return f"{rates[0]:g} to {rates[1]:g}"


def monitors_sentence(choice: Mapping[str, Any]) -> str:
    """How many count, which, and why the others do not; empty where there were no candidates."""
    counted, dropped = choice["counted"], choice["dropped"]
    if not counted and not dropped:
        return ""
    names = ", ".join(map(str, counted))
    said = f"{many(len(counted), 'monitor')} count{'s' * (len(counted) == 1)}"
    said += f": {names}." if counted else "."
    by_reason: dict[str, list[str]] = {}
    for row in dropped:
        by_reason.setdefault(row["why"], []).append(str(row["latent"]))
    why = "; ".join(f"{', '.join(latents)} ({reason})" for reason, latents in by_reason.items())
    return f"{said} Of the candidates left out: {why}." if why else said
