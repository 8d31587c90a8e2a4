"""How a policy in training does on prompts that it never trains on: `ppo.held_out`.

    held_out = HeldOut(trainer, data, monitors, config)
    metrics, completions = held_out.evaluated()  # a collective, between two steps

The prompts are those of part validation, else of test; of policy_eval, which the evaluation after
training reads, only where a kind of prompt is in no other, and then those that it reads last. Each
is sampled once, every time with the same noise, so that what changes is the policy. Training draws
its noise by step and prompt, and none from a generator that this would move on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sarm.config import HeldOutConfig, Part, UserError
from sarm.data.conversations import prompt_ids, response_text
from sarm.data.datasets import Data, prompts_in
from sarm.evaluation.refusals import refused
from sarm.llama.generate import Rollout
from sarm.ppo.learner.learner import Logprobs, NotFinite
from sarm.ppo.reward import CompoundReward, Penalised, Scores, fires
from sarm.ppo.trainer import Drawn, Trainer

PARTS: tuple[Part, ...] = ("validation", "test", "policy_eval")
NOISE = -2
"""The step whose noise the samples take: none that training or calibrate takes."""


class Evaluated(NamedTuple):
    metrics: dict[str, float]
    completions: list[dict[str, Any]]
    """As `sarm.records.Completion`, without the step."""


class HeldOut:
    """Evaluates the policy of a trainer; `monitors` are counted at their own thresholds.

    Raises UserError where no held-out prompt fits, or fewer than there are ranks.
    """

    def __init__(
        self, trainer: Trainer, data: Data, monitors: Sequence[Penalised], config: HeldOutConfig
    ) -> None:
        self.trainer, self.monitors = trainer, tuple(monitors)
        self.drawn: list[Drawn] = []
        self.shown: list[int] = []
        """Rows whose completions are logged."""
        self.parts: dict[str, dict[str, Any]] = {}
        """By kind, the part that the prompts are of, and how many they are."""
        for kind in ("unsafe", "safe"):
            part, drawn = self._drawn_of(kind, data, config.prompts)
            if drawn:
                self.shown += range(len(self.drawn), len(self.drawn) + len(drawn))[
                    : config.completions
                ]
                self.drawn += drawn
                self.parts[kind] = {"part": part, "prompts": len(drawn)}
        if len(self.drawn) < trainer.learner.world.size:
            raise UserError(
                f"ppo.held_out has {len(self.drawn)} prompts of parts {', '.join(PARTS)} that fit"
                f" ppo.max_prompt_tokens, for {trainer.learner.world.size} ranks; give those parts"
                " a share in data.sources, or set ppo.held_out.every=0"
            )

    def _drawn_of(self, kind: str, data: Data, most: int) -> tuple[str, list[Drawn]]:
        """(the part, at most so many of its prompts); none where no part has one that fits."""
        trainer = self.trainer
        for part in PARTS:
            prompts = prompts_in(data, part, kind)
            tokenized = ((p, prompt_ids(trainer.tokenizer, p.messages)) for p in reversed(prompts))
            drawn = [
                Drawn(p, ids, f"held-out/{p.id}")
                for p, ids in tokenized
                if len(ids) <= trainer.ppo.max_prompt_tokens
            ]
            if drawn:
                return part, drawn[:most]
        return "", []

    def evaluated(self) -> Evaluated:
        """Of the policy as it is; metrics are named `held_out/...`. Raises UserError where a number
        is not finite.
        """
        trainer, drawn = self.trainer, self.drawn
        try:
            sampled = trainer.sample(drawn, NOISE)
            endings = trainer.endings(sampled)
            rollout = sampled.first([e.tokens for e in endings])
            read = trainer.learner.forward(rollout, update_follows=False)
            scores = trainer.score(drawn, rollout, [e.text for e in endings])
        except NotFinite as error:
            raise UserError(
                f"held-out evaluation after step {trainer.progress.step}: {error} is not finite;"
                " lower ppo.learning_rate"
            ) from error
        kl = log_ratios(rollout, read())
        texts = [
            response_text(trainer.tokenizer, sampled.ids(row)) for row in range(len(self.drawn))
        ]
        refusals = torch.tensor([refused(text) for text in texts])
        safe = torch.tensor([d.prompt.kind == "safe" for d in drawn])
        z = values_of(trainer.reward, scores)
        metrics = {
            "reward": _mean(scores.reward),
            "penalty": _mean(scores.penalty),
            "kl": _mean(kl),
            "length": _mean(sampled.mask.sum(1)),
            "cut": _mean(sampled.truncated),
            "unended": _mean(torch.tensor([not e.ended for e in endings])),
        }
        for kind, rows in (("unsafe", ~safe), ("safe", safe)):
            if rows.any():
                metrics |= self._rates(kind, {latent: of[rows] for latent, of in z.items()})
                metrics[f"refused/{kind}"] = _mean(refusals[rows])
        completions = [
            {
                "prompt_id": drawn[row].prompt.id,
                "kind": drawn[row].prompt.kind,
                "source": drawn[row].prompt.source,
                "prompt": drawn[row].prompt.messages[-1]["content"],
                "response": texts[row],
                "reward": float(scores.reward[row]),
                "penalty": float(scores.penalty[row]),
                "kl": float(kl[row]),
                "tokens": int(sampled.mask[row].sum()),
                "cut": bool(sampled.truncated[row]),
                "refused": bool(refusals[row]),
                "z": {str(latent): float(of[row]) for latent, of in z.items()},
            }
            for row in self.shown
        ]
        return Evaluated({f"held_out/{k}": v for k, v in metrics.items()}, completions)

    def _rates(self, kind: str, z: dict[int, Tensor]) -> dict[str, float]:
        """How often each latent fires, and any of the penalty arm's and the share of monitors."""
        tracked = fires(
            torch.stack([z[p.latent] for p in self.trainer.tracked], 1),
            self.trainer.tracked,
            self.trainer.reward.kind,
        )
        rates = {f"penalised/{kind}": _mean(tracked.any(1))}
        rates |= {
            f"rate/{p.latent}/{kind}": _mean(tracked[:, i])
            for i, p in enumerate(self.trainer.tracked)
        }
        if self.monitors:
            fired = torch.stack([z[m.latent] > m.tau for m in self.monitors], 1)
            rates[f"monitors/{kind}"] = _mean(fired)
            rates |= {
                f"rate/{m.latent}/{kind}": _mean(fired[:, i]) for i, m in enumerate(self.monitors)
            }
        return rates


def log_ratios(rollout: Rollout, logprobs: Logprobs) -> Tensor:
    """(B,) nats, whose mean estimates the KL of the policy to the reference."""
    return torch.where(rollout.mask, logprobs.old - logprobs.ref, 0.0).sum(1)


def values_of(reward: CompoundReward, scores: Scores) -> dict[int, Tensor]:
    """(B,) by latent, of all that the reward penalises or monitors."""
    penalised = {p.latent: scores.z[:, i] for i, p in enumerate(reward.penalised)}
    return penalised | {latent: scores.monitors_z[:, i] for i, latent in enumerate(reward.monitors)}


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
