"""Interventions on SARM latents and their exact effect on the reward: one definition for probe,
steer and PPO.

    ranks = Ranks(indices, values, k, d_sae)                       # from one forward a text
    reward_changes([Scale(48659, 0.0)], ranks, head_weight)        # exact, no further forward
    reward_changes(parse_steering({"48659": ["*", 0.0], "891": ["+", 1.0]}), ranks, head_weight)

The reward is r = w . z with z the k largest pre-activations and 0 elsewhere, so all but `Direction`
have a closed form.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sarm.config import UserError

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]


class Ranks(NamedTuple):
    """The largest pre-activations of n texts, descending: the first k are what TopK keeps, the
    rest its runners-up.
    """

    indices: NDArray[np.int32]
    """(n, k + extra) latents"""
    values: NDArray[np.float32]
    """(n, k + extra) their pre-activations"""
    k: int
    d_sae: int


class Ablate(NamedTuple):
    """Remove latents: after TopK they become 0; before TopK the runners-up take their places."""

    latents: tuple[int, ...]
    before_topk: bool = False


class Scale(NamedTuple):
    """z_i becomes v z_i."""

    latent: int
    factor: float

    def applied(self, z: Any) -> Any:
        return z * self.factor

    @property
    def words(self) -> str:
        return f"times {self.factor:g}"


class Add(NamedTuple):
    """z_i becomes z_i + v whether the latent is active or not, as upstream's steering does."""

    latent: int
    amount: float

    def applied(self, z: Any) -> Any:
        return z + self.amount

    @property
    def words(self) -> str:
        return f"plus {self.amount:g}"


class Clamp(NamedTuple):
    """z_i is brought into [low, high], the 0 of an inactive latent too; low = high sets a value."""

    latent: int
    low: float
    high: float

    def applied(self, z: Any) -> Any:
        return z.clip(self.low, self.high)

    @property
    def words(self) -> str:
        return f"clamped to [{self.low:g}, {self.high:g}]"


class Direction(NamedTuple):
    """h becomes h + c std(h) d_i at the reward position, d_i the latent's unit decoder
    direction.
    """

    latent: int
    c: float


class AfterTopK(Protocol):
    """A change of one latent's value after TopK."""

    @property
    def latent(self) -> int: ...

    def applied(self, z: Any) -> Any:
        """The value (n,) that z (n,) becomes, numpy's or torch's, the 0 of a latent that is off
        among them.
        """
        ...

    @property
    def words(self) -> str:
        """As the report says it, after the latent's number."""
        ...


Intervention = Ablate | AfterTopK

IN_STEERING_FILES: dict[str, type[Any]] = {"*": Scale, "+": Add}
"""By the symbol in a steering file, `{"48659": ["*", 0.0]}`: classes made of a latent and one
number. See docs/adding-an-intervention.md.
"""


# Closed forms


def latent_values(ranks: Ranks, latents: Sequence[int]) -> Floats:
    """z of some latents, (n, len(latents)): 0 where TopK does not keep them."""
    kept, values = ranks.indices[:, : ranks.k], ranks.values[:, : ranks.k].astype(np.float64)
    columns = [np.where(kept == latent, values, 0.0).sum(axis=1) for latent in latents]
    return np.stack(columns, axis=1) if columns else np.zeros((len(kept), 0))


def rewards_of(ranks: Ranks, weight: NDArray[Any]) -> Floats:
    """r = w . z in float64, (n,)."""
    w = np.asarray(weight, dtype=np.float64)
    return (w[ranks.indices[:, : ranks.k]] * ranks.values[:, : ranks.k]).sum(axis=1)


def contributions(ranks: Ranks, weight: NDArray[Any], *, reselected: bool) -> Floats:
    """What each latent that TopK keeps adds to the reward: the reward less the reward with that
    latent ablated, (n, k).

    Column j belongs to latent `ranks.indices[:, j]`; every other latent adds nothing. After TopK
    that is w_i z_i; before TopK (`reselected`) it is w_i z_i - w_m a_m, m the runner-up.
    """
    w = np.asarray(weight, dtype=np.float64)
    head = w[ranks.indices[:, : ranks.k]] * ranks.values[:, : ranks.k]
    if not reselected or ranks.k >= ranks.d_sae:
        return head
    if ranks.indices.shape[1] <= ranks.k:
        raise ValueError("re-selected effects need the runner-up: keep at least k + 1 ranks")
    return head - (w[ranks.indices[:, ranks.k]] * ranks.values[:, ranks.k])[:, None]


def without(ranks: Ranks, removed: Iterable[int]) -> Ranks:
    """What TopK keeps where latents are removed before it: k ranks, no runners-up.

    Exact while the ranks kept reach deep enough, k + |removed| always does. Raises UserError where
    they do not.
    """
    gone = np.isin(ranks.indices, list(removed))
    order = np.argsort(gone, axis=1, kind="stable")[:, : ranks.k]
    values = np.take_along_axis(np.where(gone, np.float32(0), ranks.values), order, axis=1)
    depth = ranks.indices.shape[1]
    short = int((gone.sum(axis=1) > depth - ranks.k).sum())
    if short and depth < ranks.d_sae:
        raise UserError(
            f"removing {len(set(removed))} latents before TopK leaves {short} texts with fewer than"
            f" k = {ranks.k} known ranks, as encode kept {depth - ranks.k} beyond k; raise"
            " encode.extra_ranks to the size of the set"
        )
    return Ranks(np.take_along_axis(ranks.indices, order, axis=1), values, ranks.k, ranks.d_sae)


def reward_changes(
    interventions: Sequence[Intervention], ranks: Ranks, weight: NDArray[Any]
) -> Floats:
    """The exact change of each text's reward under all interventions together, (n,).

    Removals before TopK come first, then the others in their order. Raises UserError on a latent
    the SARM does not have.
    """
    removed: set[int] = set()
    later: dict[int, list[AfterTopK]] = {}
    for step in interventions:
        if isinstance(step, Ablate) and step.before_topk:
            removed.update(step.latents)
        elif isinstance(step, Ablate):
            for latent in step.latents:
                later.setdefault(latent, []).append(Scale(latent, 0.0))
        else:
            later.setdefault(step.latent, []).append(step)
    for latent in {*removed, *later}:
        if not 0 <= latent < ranks.d_sae:
            raise UserError(
                f"latent {latent} does not exist: this SARM has latents 0 to {ranks.d_sae - 1}"
            )
    changes = np.zeros(len(ranks.indices))
    selected = ranks
    if removed:
        selected = without(ranks, removed)
        changes = rewards_of(selected, weight) - rewards_of(ranks, weight)
    for latent, steps in later.items():
        z = latent_values(selected, [latent])[:, 0]
        steered = z
        for step in steps:
            steered = step.applied(steered)
        changes = changes + float(weight[latent]) * (steered - z)
    return changes


# No closed form


def direction_changes(
    sae: Any, weight: torch.Tensor, states: torch.Tensor, k: int, step: Direction
) -> torch.Tensor:
    """The change of each text's reward under a `Direction`, (n,): all that comes after the state
    is computed again.

    The reference implementation, one latent at a time. `states` (n, d_in) are those at the reward
    position; `sae` is a `sarm.reward_model.sae.TopKSae`, `weight` the head's (d_sae,).
    """
    import torch  # the closed forms need none, so neither do the jobs that use only those

    with torch.no_grad():
        direction = sae.directions(torch.tensor([step.latent], device=states.device))[0]
        moved = states + step.c * states.std(dim=-1, keepdim=True) * direction
        return state_rewards(sae, weight, moved, k) - state_rewards(sae, weight, states, k)


def state_rewards(sae: Any, weight: torch.Tensor, states: torch.Tensor, k: int) -> torch.Tensor:
    """Rewards (n,) from states (n, d_in): normalise, encode, TopK, head."""
    top = sae.topk(sae.preactivations(states), k)
    return (weight[top.indices] * top.values).sum(dim=-1)


# Upstream's steering files


def parse_steering(steering: str | Path | Mapping[str, Any]) -> list[AfterTopK]:
    """Read upstream's steering file, `{"48659": ["*", 0.0], "891": ["+", 1.0]}`. Raises UserError
    naming the entry.
    """
    where = "steering"
    if isinstance(steering, (str, Path)):
        where = f"steering file {steering}"
        try:
            steering = json.loads(Path(steering).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{where} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from None
    form = 'it must look like {"48659": ["*", 0.0], "891": ["+", 1.0]}'
    if not isinstance(steering, Mapping):
        raise UserError(f"{where} is not a mapping of latents; {form}")
    steps: dict[int, AfterTopK] = {}
    for key, entry in steering.items():
        if not str(key).isdecimal():
            raise UserError(f"{where}: {key!r} is not the number of a latent; {form}")
        latent = int(key)
        if latent in steps:
            raise UserError(f"{where}: latent {latent} is named twice; keep one entry")
        if not isinstance(entry, (list, tuple)) or len(entry) != 2:
            raise UserError(f"{where}: latent {latent} has {entry!r}; {form}")
        if not isinstance(entry[0], str) or entry[0] not in IN_STEERING_FILES:
            raise UserError(
                f"{where}: latent {latent} has the symbol {entry[0]!r}; known are"
                f" {', '.join(IN_STEERING_FILES)}; {form}"
            )
        action, value = entry
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            raise UserError(
                f"{where}: latent {latent} has the value {value!r}, which is no finite number;"
                f" {form}"
            )
        steps[latent] = IN_STEERING_FILES[action](latent, float(value))
    return list(steps.values())


def steering_file(steps: Iterable[Any]) -> dict[str, list[Any]]:
    """Interventions of `IN_STEERING_FILES` in upstream's format."""
    symbols = {kind: symbol for symbol, kind in IN_STEERING_FILES.items()}
    return {str(step.latent): [symbols[type(step)], step[1]] for step in steps}
