"""What a latent costs a text: a class each, chosen by `ppo.penalty.kind`.

`python -m pytest tests/ppo/test_reward.py` checks each by hand. A new one is a class here and its
place in `PENALTIES`; see docs/adding-a-penalty.md. The config reads the names and what each needs,
so importing this module imports no torch.

Notation: n texts, P penalised latents, z (n, P) their values after TopK, float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Penalised(NamedTuple):
    """A latent that costs reward; a penalty without a threshold does not look at `tau`."""

    latent: int
    tau: float
    alpha: float


class Scored(NamedTuple):
    """The texts of one batch on one rank."""

    z: Tensor
    """(n, P)."""
    penalised: Sequence[Penalised]
    reference_rates: Sequence[float]
    """P shares of reference texts on which each latent fires; empty where the penalty needs
    none.
    """
    all_reduce: Callable[[Tensor], Tensor]
    """Sums a tensor over all ranks: a collective."""


class Penalty(Protocol):
    """One kind of penalty."""

    has_tau: bool
    """Whether a latent fires above its tau; otherwise above 0."""
    needs_rates: bool
    """Whether it compares with the rates of reference texts."""
    words: str
    """In the report, after the weight; empty for the plain one."""

    def terms(self, scored: Scored) -> Tensor:
        """(n, P) float64, what each latent costs each text."""
        ...

    def doses(self, z: Tensor, penalised: Sequence[Penalised]) -> Tensor:
        """(P,) float64, what each latent costs the texts on average: the random arm is matched on
        it.
        """
        ...


class Threshold:
    """alpha * 1[z > tau]"""

    has_tau, needs_rates, words = True, False, ""

    def terms(self, scored: Scored) -> Tensor:
        return alphas_of(scored.z, scored.penalised) * above(scored.z, taus_of(scored.penalised))

    def doses(self, z: Tensor, penalised: Sequence[Penalised]) -> Tensor:
        return self.terms(Scored(z, penalised, (), lambda x: x)).mean(0)


class Hinge:
    """alpha * max(0, z - tau)"""

    has_tau, needs_rates, words = True, False, "hinge"

    def terms(self, scored: Scored) -> Tensor:
        over = scored.z.double() - _row(scored.z, taus_of(scored.penalised))
        return alphas_of(scored.z, scored.penalised) * over.clamp(min=0)

    def doses(self, z: Tensor, penalised: Sequence[Penalised]) -> Tensor:
        return self.terms(Scored(z, penalised, (), lambda x: x)).mean(0)


class Density:
    """alpha * (b log(p / q) + (1 - b) log((1 - p) / (1 - q))), b = 1[z > 0], with p the rate in the
    batch over all ranks and q that of reference texts. Its own mean may be 0, so a dose is alpha
    times the rate.
    """

    has_tau, needs_rates, words = False, True, "density-ratio"

    def terms(self, scored: Scored) -> Tensor:
        p = batch_rates(scored.z, scored.all_reduce)
        return density_terms(
            scored.z, [x.alpha for x in scored.penalised], p, _row(scored.z, scored.reference_rates)
        )

    def doses(self, z: Tensor, penalised: Sequence[Penalised]) -> Tensor:
        return alphas_of(z, penalised) * (z > 0).double().mean(0)


PENALTIES: dict[str, Penalty] = {"threshold": Threshold(), "hinge": Hinge(), "density": Density()}


def above(z: Tensor, taus: Sequence[float]) -> Tensor:
    """(n, P) bool. In float64, so that a tau between two float32 values stays between them."""
    return z.double() > _row(z, taus)


def taus_of(penalised: Sequence[Penalised]) -> list[float]:
    return [p.tau for p in penalised]


def alphas_of(z: Tensor, penalised: Sequence[Penalised]) -> Tensor:
    """(P,) float64, where z is."""
    return _row(z, [p.alpha for p in penalised])


def batch_rates(z: Tensor, all_reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """(P,) float64: (texts on all ranks where z > 0, plus 1/2) / (texts + 1). A collective."""
    fired = (z > 0).double().sum(0).tolist()
    counts = all_reduce(_row(z, [*fired, float(len(z))]))
    return (counts[:-1] + 0.5) / (counts[-1] + 1)


def density_terms(z: Tensor, alphas: Sequence[float], p: Tensor, q: Tensor) -> Tensor:
    """(n, P) float64: alpha (b log(p/q) + (1 - b) log((1-p)/(1-q))), b = 1[z > 0]."""
    on, off = (p / q).log(), ((1 - p) / (1 - q)).log()
    return _row(z, alphas) * on.where(z > 0, off)


def _row(z: Tensor, numbers: Sequence[float]) -> Tensor:
    """(P,) float64, where z is."""
    return z.double().new_tensor(list(numbers))
