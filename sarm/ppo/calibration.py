"""How often latents fire in the untrained policy's responses, which sets the random arm's dose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from sarm.ppo.reward import Kind, Penalised, calibrate_random, fires
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
    rollout = trainer.roll_out(drawn, step=-1, seed=seed)
    hands = trainer.hands(rollout)
    conversations = [
        trainer.conversation(drawn[i], rollout.ids(i)) for i in hands[trainer.world.rank]
    ]
    tracked, kind = trainer.tracked, trainer.reward.kind
    latents = [*(p.latent for p in tracked), *candidates]
    z = trainer.world.gather(trainer.reward.measure(conversations, latents), hands)
    z_penalised, z_candidates = z[:, : len(tracked)], z[:, len(tracked) :]
    random = (
        calibrate_random(z_candidates, candidates, z_penalised, tracked, kind)
        if len(candidates)
        else []
    )
    columns = [latents.index(r.latent, len(tracked)) for r in random]
    return Calibration(n, _rated(tracked, z_penalised, kind), _rated(random, z[:, columns], kind))


def _rated(penalised: Sequence[Penalised], z: Tensor, kind: Kind) -> list[Rated]:
    rates = fires(z, penalised, kind).double().mean(0).tolist()
    return [Rated(*p, rate) for p, rate in zip(penalised, rates, strict=True)]
