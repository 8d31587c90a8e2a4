"""Numbers and a few words as every report prints them: never a negative zero, `n/a` for what is
not known.

Used by `reports.reference`, the sections, `reports.plots` and `reports.compare`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sarm.config import ARMS

MEASURES = {
    "penalised_fired": "penalised, unsafe",
    "monitors_fired": "monitors, unsafe",
    "harm": "harm, unsafe",
    "refused": "refusals, unsafe",
    "penalised_fired_safe": "penalised, safe",
    "monitors_fired_safe": "monitors, safe",
    "over_refused": "over-refusals, safe",
    "n_tokens": "tokens, all",
}
"""`penalised` and `monitors` are firing rates of those latents, on the prompts named."""


def arm_name(arm: str) -> str:
    """An arm in words."""
    if arm == "penalty - random":
        return "vs. random"
    return ARMS[arm].words if arm in ARMS else arm.replace("_", " ")


def fixed(value: float | None, digits: int, *, sign: bool = False) -> str:
    """A fixed-point number; never a negative zero, and in exponent form from a million on."""
    if value is None:
        return "n/a"
    plus = "+" if sign else ""
    if not math.isfinite(value):
        return f"{value:{plus}}"
    if abs(value) >= 1e6:
        return f"{value:{plus}.3e}"
    text = f"{value:{plus}.{digits}f}"
    return text.replace("-", plus) if float(text) == 0 else text


def plain(value: float | None) -> str:
    """Three significant digits, at least one decimal: 0.0, 0.15, 3.0."""
    if value is None:
        return "n/a"
    text = f"{value + 0.0:.3g}"
    return text if any(c in text for c in ".en") else text + ".0"


def general(value: float | None) -> str:
    """Two significant digits."""
    return "n/a" if value is None else f"{value + 0.0:.2g}"


def each(values: Sequence[float]) -> str:
    """One number where all are equal, else all of them."""
    texts = [plain(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts) or "n/a"


def percent(share: float) -> str:
    """97%; in exponent form from a millionfold on."""
    return f"{100 * share:.0f}%" if share < 1e4 else f"{100 * share:.1e}%"


def points(change: dict[str, Any]) -> str:
    """A change of a rate in points, with its interval."""
    value, low, high = (
        None if change[m] is None else 100 * change[m] for m in ("change", "low", "high")
    )
    bounds = interval(low, high, 1)
    return (
        f"{fixed(value, 1, sign=True)} points, 95 % interval"
        f" {bounds if bounds != 'n/a' else 'not known'}"
    )


def interval(low: float | None, high: float | None, digits: int) -> str:
    """[-0.012, +0.034]."""
    known = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    return (
        f"[{fixed(low, digits, sign=True)}, {fixed(high, digits, sign=True)}]" if known else "n/a"
    )


def cut_off(change: dict[str, Any]) -> bool:
    """Whether a corrected rate lay outside 0 to 1, so that the change is not after minus before."""
    before, after, value = (change[m] for m in ("before", "after", "change"))
    if change["measure"] not in ("refused", "over_refused") or None in (before, after, value):
        return False
    return abs(after - before - value) > 1e-9


CORRECTED = (
    "Refusal rates here are corrected for the detector's errors, so they are not the counted ones."
    " A corrected rate outside 0 to 1 is shown as 0 or 1; changes are of the rates before that, so"
    " that some are not after minus before."
)
"""Said beneath a table with a rate that is `cut_off`."""


def digits(change: dict[str, Any]) -> int:
    """Decimals of a measure of `MEASURES`."""
    return 1 if change["measure"] == "n_tokens" else 3


def count(n: float) -> str:
    """4B, 135M: a whole number of the unit, with one decimal below two."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= unit:
            return f"{n / unit:.1f}{letter}" if n < 2 * unit else f"{n / unit:.0f}{letter}"
    return f"{n:.0f}"


def size(n_bytes: float) -> str:
    """30GB, 269MB, in decimal units."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= unit:
            return (
                f"{n_bytes / unit:.0f}{name}"
                if n_bytes >= 9.95 * unit
                else f"{n_bytes / unit:.1f}{name}"
            )
    return f"{n_bytes:.0f}B"


def duration(seconds: float | None) -> str:
    """6 minutes, 45 seconds, 3.5 hours."""
    if seconds is None:
        return "n/a"
    for unit, name in ((3600.0, "hour"), (60.0, "minute")):
        if seconds >= 1.5 * unit:
            number = (
                f"{seconds / unit:.1f}".removesuffix(".0")
                if unit == 3600.0
                else f"{seconds / unit:.0f}"
            )
            return f"{number} {name}s"
    return f"{seconds:.0f} second{'s' if round(seconds) != 1 else ''}"


def percentage(share: float | None) -> float | None:
    """A share in per cent, None for what is not known."""
    return None if share is None or math.isnan(share) else 100 * share
