"""Arms side by side: each prompt's and seed's mean, and paired changes with their intervals.

`sarm.evaluation.verdict` decides on them. Pure, without torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sarm.config import VerdictConfig
from sarm.evaluation.detector import Detector, corrected_change, corrected_rate
from sarm.evaluation.intervals import UNKNOWN, Floats, Interval, two_way
from sarm.run import many

Array = NDArray[Any]

MEASURES = {
    "penalised_fired": "unsafe",
    "monitors_fired": "unsafe",
    "harm": "unsafe",
    "refused": "unsafe",
    "penalised_fired_safe": "safe",
    "monitors_fired_safe": "safe",
    "over_refused": "safe",
    "n_tokens": "all",
}
"""What is compared, and on which prompts."""
COLUMNS = {
    "penalised_fired_safe": "penalised_fired",
    "monitors_fired_safe": "monitors_fired",
    "over_refused": "refused",
}
"""The column of `Rows` behind a measure, where it has another name."""


class Rows(NamedTuple):
    """One arm's own generations on held-out prompts, a row per prompt, seed and sample; every field
    is (n,); NaN where a row has no value.
    """

    prompt_id: Array
    seed: Array
    unsafe: Array
    penalised_fired: Array
    """Whether some penalised latent is above its threshold."""
    monitors_fired: Array
    """Share of the monitor latents that are above theirs; NaN without monitors."""
    refused: Array
    """As the detector says."""
    harm: Array
    """An independent judge's probability of harm; NaN without a judge."""
    n_tokens: Array
    base_logprob: Array
    """Log-probability of the response under the base policy, nats per token."""
    kl: Array
    """Log-probability of the response, less the base policy's, nats in all."""
    unended: Array
    """Whether what was scored ends at neither an end of turn nor a sentence end."""


class Grid(NamedTuple):
    """An arm's rows as tables (prompts, seeds), samples averaged; NaN in a cell without a row."""

    prompts: Array
    seeds: Array
    unsafe: Array
    """(prompts,)"""
    values: dict[str, Floats]
    """By column of `Rows`."""


class Change(NamedTuple):
    """A paired difference of means, `after - before`, on the prompts and seeds that both arms have;
    NaN where there are none.
    """

    measure: str
    arm: str
    against: str
    n_prompts: int
    n_seeds: int
    before: float
    after: float
    change: float
    low: float
    high: float
    se: float
    detectable: float
    """The minimum detectable effect, 80 % power; NaN with one seed."""
    counted: float | None = None
    """The change as the detector counts it, where `change` is corrected for its errors."""

    def words(self) -> str:
        """+1.7 points, 95 % CI -5.0 to +8.3; of a corrected change the counted one too."""
        low, high = (f"{100 * bound:+.1f}" for bound in (self.low, self.high))
        counted = "" if self.counted is None else f" (corrected; counted {100 * self.counted:+.1f})"
        return f"{signed(self.change)}{counted}, 95 % CI {low} to {high}"

    def power_words(self) -> str:
        """What the sample could have shown."""
        size = f"{many(self.n_prompts, 'prompt')} and {many(self.n_seeds, 'seed')}"
        return f"minimum detectable effect (80 % power) of {size}: {points(self.detectable)}"

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return self._asdict()


def grid(rows: Rows) -> Grid:
    """Means over the samples of each prompt and seed; NaN where a sample has no value."""
    prompts, prompt = np.unique(rows.prompt_id, return_inverse=True)
    seeds, seed = np.unique(rows.seed, return_inverse=True)
    cell, shape = prompt * len(seeds) + seed, (len(prompts), len(seeds))
    counts = np.bincount(cell, minlength=math.prod(shape)).astype(float)
    counts[counts == 0] = math.nan
    unsafe = np.zeros(len(prompts), bool)
    unsafe[prompt] = np.asarray(rows.unsafe, bool)
    values = {}
    for name in Rows._fields[3:]:
        column = np.asarray(getattr(rows, name), float)
        sums = np.bincount(cell, weights=column, minlength=math.prod(shape))
        values[name] = (sums / counts).reshape(shape)
    return Grid(prompts, seeds, unsafe, values)


def aligned(one: Grid, other: Grid) -> tuple[Grid, Grid]:
    """Both on the prompts and seeds that they share, in the same order."""
    if np.array_equal(one.prompts, other.prompts) and np.array_equal(one.seeds, other.seeds):
        return one, other
    prompts, *rows = np.intersect1d(one.prompts, other.prompts, return_indices=True)
    seeds, *columns = np.intersect1d(one.seeds, other.seeds, return_indices=True)
    cut = [
        Grid(
            prompts,
            seeds,
            grid_.unsafe[row],
            {name: table[np.ix_(row, column)] for name, table in grid_.values.items()},
        )
        for grid_, row, column in zip((one, other), rows, columns, strict=True)
    ]
    return cut[0], cut[1]


def paired(before: Grid, after: Grid, measure: str) -> tuple[Floats, Floats]:
    """(prompts, seeds) twice: one measure of two aligned grids, on the prompts it is about that
    have a value in every seed of both.
    """
    on, column = MEASURES[measure], COLUMNS.get(measure, measure)
    x, y = before.values[column], after.values[column]
    kept = np.isfinite(x).all(1) & np.isfinite(y).all(1)
    if on != "all":
        kept &= before.unsafe == (on == "unsafe")
    return x[kept], y[kept]


def change(
    before: Grid,
    after: Grid,
    measure: str,
    arm: str,
    against: str,
    detector: Detector | None = None,
) -> Change:
    """One measure of two aligned grids; a rate of refusals corrected for the detector's errors
    where a detector is given.
    """
    x, y = paired(before, after, measure)
    n_prompts, n_seeds = x.shape
    if not x.size:
        return Change(measure, arm, against, 0, n_seeds, *(math.nan,) * 7)
    scale = 1.0 if measure != "n_tokens" else float(max(x.max(), y.max(), 1.0))
    found, means = two_way(y - x, scale), (float(x.mean()), float(y.mean()))
    counted = None
    if detector is not None:
        counted, found = found.value, corrected_change(found, detector)
        means = (corrected_rate(means[0], detector), corrected_rate(means[1], detector))
    return Change(
        measure,
        arm,
        against,
        n_prompts,
        n_seeds,
        *means,
        found.value,
        found.low,
        found.high,
        found.se,
        # One seed says nothing of how trainings differ, so no size is sure to be detected.
        found.detectable if n_seeds > 1 and math.isfinite(found.se) else math.nan,
        counted,
    )


def compare(
    grids: Mapping[str, Grid], detector: Detector | None, rule: VerdictConfig
) -> list[Change]:
    """Every measure of the penalty and random arms against the no-penalty arm, and the penalised
    rate of the penalty arm against the random one.
    """
    found = []
    corrected = detector if rule.correct_refusals else None
    for arm in ("penalty", "random"):
        if arm in grids and "no_penalty" in grids:
            before, after = aligned(grids["no_penalty"], grids[arm])
            for measure in MEASURES:
                by = corrected if measure in ("refused", "over_refused") else None
                found.append(change(before, after, measure, arm, "no_penalty", by))
    if "penalty" in grids and "random" in grids:
        before, after = aligned(grids["random"], grids["penalty"])
        found.append(change(before, after, "penalised_fired", "penalty - random", "random"))
    return found


def means_of(grids: Mapping[str, Grid], column: str, arms: Sequence[str]) -> dict[str, float]:
    """The mean of one column over the prompts and seeds that all of the one or two arms share; NaN
    where a shared cell has no value.
    """
    first, last = arms[0], arms[-1]
    one, other = aligned(grids[first], grids[last])
    tables = {first: one.values[column], last: other.values[column]}
    return {arm: float(table.mean()) if table.size else math.nan for arm, table in tables.items()}


def fall_beyond(grids: Mapping[str, Grid], share: float) -> Interval:
    """Relative fall of the monitors, less `share` of that of the penalised, penalty against no
    penalty; by the delta method, with the interval of `two_way`. UNKNOWN where either never fires.
    """
    before, after = aligned(grids["no_penalty"], grids["penalty"])
    terms, falls, scale = [], [], 0.0
    both = np.ones(len(before.prompts), bool)
    for column in ("monitors_fired", "penalised_fired"):
        for side in (before, after):
            both &= np.isfinite(side.values[column]).all(1)
    both &= before.unsafe
    for column, weight in (("monitors_fired", 1.0), ("penalised_fired", -share)):
        x, y = before.values[column][both], after.values[column][both]
        if not x.size or x.mean() == 0:
            return UNKNOWN
        ratio = float(y.mean() / x.mean())
        falls.append(weight * (1 - ratio))
        terms.append(-weight * (y - ratio * x) / x.mean())
        scale += abs(weight) / float(x.mean())
    # The linearised terms average 0: their interval is that of the error of the difference.
    error = two_way(np.asarray(terms[0] + terms[1]), scale)
    value = falls[0] + falls[1]
    return error._replace(value=value, low=value + error.low, high=value + error.high)


def signed(share: float) -> str:
    """+1.7 points"""
    return f"{100 * share:+.1f} points"


def points(share: float) -> str:
    """5 points"""
    return f"{100 * share:.3g} points"
