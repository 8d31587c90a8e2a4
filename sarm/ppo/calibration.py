"""How often latents fire in the untrained policy's responses, which sets the random arm's dose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from sarm.ppo.reward import Penalised, calibrate_random, fires
from sarm.ppo.trainer import Trainer


class Rated(NamedTuple):
    """A penalised latent and how often it fires in the untrained policy's responses."""

    latent: int
    tau: float
    alpha: float
    base_rate: float


class Calibration(NamedTuple):
    n: int
    """Responses of the untrained policy."""
    harming: list[Rated]
    """The latents that the penalty arm penalises."""
    random: list[Rated]
    """Those matched to them for the random arm; none where there were no candidates."""


def calibrate(trainer: Trainer, n: int, candidates: Sequence[int], seed: int) -> Calibration:
    """Latents on `n` responses of the untrained policy; the same for every arm and seed of a run.
    A collective.
    """
    drawn = trainer.draw([row % len(trainer.prompts) for row in range(n)])
    rollout = trainer.sample(drawn, step=-1, seed=seed, forward_follows=False)
    tracked, reward = trainer.tracked, trainer.reward
    latents = [*(p.latent for p in tracked), *candidates]
    (z,) = trainer.learner.map_rows(
        rollout, lambda rows: [reward.measure(trainer.conversations(drawn, rollout, rows), latents)]
    )
    z_penalised, z_candidates = z[:, : len(tracked)], z[:, len(tracked) :]
    random = (
        calibrate_random(z_candidates, candidates, z_penalised, tracked, reward.kind)
        if len(candidates)
        else []
    )
    columns = [latents.index(r.latent, len(tracked)) for r in random]
    return Calibration(
        n, _rated(tracked, z_penalised, reward.kind), _rated(random, z[:, columns], reward.kind)
    )


def _rated(penalised: Sequence[Penalised], z: Tensor, kind: str) -> list[Rated]:
    rates = fires(z, penalised, kind).double().mean(0).tolist()
    return [Rated(*p, rate) for p, rate in zip(penalised, rates, strict=True)]
