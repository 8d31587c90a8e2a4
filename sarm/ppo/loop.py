"""A run of PPO's steps, and what happens between them: the log, policies kept, checkpoints.

`python -m jobs ppo` calls `train`; a step is `Trainer.run_step`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sarm.config import PpoConfig, UserError
from sarm.ppo.learner.learner import NotFinite
from sarm.ppo.trainer import Progress, Trainer


def why_ended(ppo: PpoConfig, progress: Progress) -> str:
    """Why training is over, in words; empty while steps are left."""
    mean = progress.drift.mean
    if ppo.stop_at_kl is not None and mean is not None and mean >= ppo.stop_at_kl:
        return (
            f"the mean KL of five steps, {mean:.3g} nats, reached ppo.stop_at_kl {ppo.stop_at_kl:g}"
        )
    return f"all {ppo.steps} steps were made" if progress.step >= ppo.steps else ""


def train(
    trainer: Trainer,
    *,
    save: Callable[[], Path],
    log: Callable[[dict[str, Any]], None],
    stop_requested: Callable[[], bool],
    keep: Callable[[list[float]], None] = lambda distances: None,
    evaluate: Callable[[], None] | None = None,
) -> bool:
    """Run the steps that are left; False where it was asked to stop, after a checkpoint.

    `keep` is called with the distances of `ppo.kl_distances` that a step has reached; `evaluate`
    every `ppo.held_out.every` steps, the first time before any and the last time after all.
    `stop_requested` says the same on every rank. Raises UserError, after a checkpoint, where a loss
    or reward is not finite.
    """
    ppo = trainer.ppo
    while not why_ended(ppo, trainer.progress):
        step, before = trainer.progress.step, trainer.progress.drift
        if evaluate and step % ppo.held_out.every == 0:
            evaluate()
        try:
            found = trainer.run_step()
        except NotFinite as error:
            kept = (
                f"the state before it is in {save()}"
                if not error.updated
                else "its first updates were made, so the newest checkpoint is an earlier one"
            )
            ids = sorted({trainer.prompts[row].id for row in trainer.rows(step)})
            raise UserError(
                f"step {step}: {error} is not finite, {kept}; look at the batch's prompts"
                f" ({', '.join(ids)}) or lower ppo.learning_rate"
            ) from error
        except torch.OutOfMemoryError as error:
            told = trainer.learner.out_of_memory(trainer.reward.tokens_per_batch)
            raise UserError(f"step {step}: {told}") from error
        log({"step": step, **found})
        if reached := trainer.progress.drift.passed(before, ppo.kl_distances):
            keep(reached)
        done = trainer.progress.step
        stop, ended = stop_requested(), why_ended(ppo, trainer.progress)
        if stop or (done % ppo.checkpoint_every == 0 and not ended):
            save()
        if stop and not ended:
            return False
    if evaluate:
        evaluate()
    return True
