"""The compound reward: a SARM's reward, penalised where chosen latents fire; for `python -m jobs
ppo`, and for TRL. One file, as scoring, penalties and metrics share one forward pass.

    R(x, y) = r(x, y) - sum_i penalty_i(z_i)

over the penalised latents i, z_i being a latent's value after TopK (0 where it is not among the k
largest), neither clamped nor normalised. `penalties.py` has the kinds of penalty. `threshold` and
`hinge` look at one text, while `density` is a term of the batch: its mean over the batch is about
alpha_i KL(p_i || q_i), p_i being the rate in the batch and q_i in reference texts; it may be
negative for a text (firing is paid where the batch fires too seldom), and the same text costs
differently in another batch. With `clamp` the latents are held to at most that value for r; the
penalty still sees z.

In TRL (see tests/ppo/test_trl_reward.py):

    reward = CompoundReward(model, tokenizer, [Penalised(latent=17, tau=3.0, alpha=0.1)])
    GRPOTrainer(model=policy, reward_funcs=reward, ...)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sarm.config import PenaltyConfig, SarmConfig, UserError
from sarm.data.endings import ends, trim_to_last_sentence
from sarm.ppo.learner.distributed import sum_over_ranks
from sarm.ppo.penalties import PENALTIES, Penalised, Scored, above, taus_of
from sarm.records import Features
from sarm.reward_model.interventions import Clamp, Ranks, latent_values, reward_changes
from sarm.reward_model.model import SarmModel
from sarm.reward_model.scoring import Encoded, encode_texts

Message = dict[str, str]
AllReduce = Callable[[Tensor], Tensor]
"""The sum of a tensor over all ranks."""


class Scores(NamedTuple):
    """Of n conversations, P penalised latents and M monitored ones; on the CPU, float32 unless
    said otherwise.
    """

    reward: Tensor
    """(n,), r: with clamped latents where the reward clamps, without penalty."""
    penalty: Tensor
    """(n,), what is subtracted."""
    total: Tensor
    """(n,), reward - penalty."""
    fired: Tensor
    """(n, P) bool: z > tau; in a density penalty z > 0."""
    z: Tensor
    """(n, P), after TopK, unclamped."""
    monitors_z: Tensor
    """(n, M), the same of latents that the penalty does not name, though the reward may charge."""
    below: Tensor
    """(n, P + M), of the penalised and the monitored: the value of a latent that ranks beyond the k
    that TopK keeps, within `extra_ranks`; 0 of all others.
    """
    truncated: Tensor
    """(n,) bool: longer than `max_length`, scored without its oldest tokens."""


class CompoundReward:
    """Scores conversations; callable as a reward function of TRL's GRPOTrainer and RLOOTrainer.

    `monitors` are latents to report without penalty, `reference_rates` the q of a density penalty,
    `extra_ranks` how many ranks beyond TopK's k to look for latents that just fell short.
    `all_reduce` sums a tensor over all ranks; only a density penalty uses it, and then every rank
    must score at the same time. As a reward function of TRL's it reads of a completion what our own
    training reads: one that ends with none of the policy's `stop_ids` was cut at the token limit,
    and with `trim` is scored up to its last sentence end.
    """

    __name__ = "compound_reward"

    def __init__(
        self,
        model: SarmModel,
        tokenizer: PreTrainedTokenizerBase,
        penalised: Sequence[Penalised],
        *,
        kind: str = "threshold",
        clamp: float | None = None,
        monitors: Sequence[int] = (),
        reference_rates: Mapping[int, float] | None = None,
        tokens_per_batch: int = 16384,
        max_length: int = 4096,
        extra_ranks: int = 0,
        all_reduce: AllReduce = sum_over_ranks,
        stop_ids: Sequence[int] = (),
        trim: bool = True,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.stop_ids, self.trim = frozenset(stop_ids), trim
        self.penalised, self.monitors = tuple(penalised), tuple(monitors)
        self.kind, self.clamp = kind, clamp
        self.reference_rates = dict(reference_rates or {})
        self.tokens_per_batch, self.max_length = tokens_per_batch, max_length
        self.extra_ranks = extra_ranks
        self.all_reduce = all_reduce
        self._check()

    @classmethod
    def from_features(
        cls,
        model: SarmModel,
        tokenizer: PreTrainedTokenizerBase,
        features: Features,
        penalty: PenaltyConfig,
        sarm: SarmConfig,
        **more: Any,
    ) -> CompoundReward:
        """The penalty arm's reward, from `features.json` (taus and alphas in the units of z and
        reward) and the config.
        """
        return cls(
            model,
            tokenizer,
            [Penalised(p.latent, p.tau, p.alpha) for p in features.penalised],
            kind=penalty.kind,
            clamp=penalty.clamp,
            monitors=features.monitors,
            reference_rates={
                int(latent): rate for latent, rate in features.reference_rates.items()
            },
            tokens_per_batch=sarm.tokens_per_batch,
            max_length=sarm.max_length,
            **more,
        )

    def without_penalty(self) -> CompoundReward:
        """The no-penalty arm's: plain r, the same latents measured at the same taus."""
        return self._with(
            [p._replace(alpha=0.0) for p in self.penalised], clamp=None, monitors=self.monitors
        )

    def with_penalised(self, penalised: Sequence[Penalised]) -> CompoundReward:
        """Another set of penalised latents, such as the random arm's; those no longer penalised
        become monitors.
        """
        latents = {p.latent for p in penalised}
        freed = [
            p.latent
            for p in self.penalised
            if p.latent not in latents and p.latent not in self.monitors
        ]
        return self._with(
            penalised,
            clamp=self.clamp,
            monitors=[m for m in (*self.monitors, *freed) if m not in latents],
        )

    def watching(self, latents: Sequence[int]) -> CompoundReward:
        """The same reward that reports more latents. Raises UserError on one that is not there."""
        more = [latent for latent in dict.fromkeys(latents) if latent not in self.monitors]
        return self._with(self.penalised, clamp=self.clamp, monitors=[*self.monitors, *more])

    def _with(
        self, penalised: Sequence[Penalised], *, clamp: float | None, monitors: Sequence[int]
    ) -> CompoundReward:
        other = copy.copy(self)
        other.penalised, other.clamp, other.monitors = tuple(penalised), clamp, tuple(monitors)
        other._check()
        return other

    def _check(self) -> None:
        if self.kind not in PENALTIES:
            raise UserError(f"no penalty {self.kind!r}; known are {', '.join(PENALTIES)}")
        latents = [p.latent for p in self.penalised]
        if len(set(latents)) < len(latents):
            raise UserError(f"a latent is penalised twice in {latents}; name each once")
        beyond = [
            latent for latent in (*latents, *self.monitors) if not 0 <= latent < self.model.d_sae
        ]
        if beyond:
            raise UserError(
                f"latents {beyond} are not in this SARM, which has {self.model.d_sae}; use the"
                " features.json made with it"
            )
        if PENALTIES[self.kind].needs_rates:
            without = [
                latent for latent in latents if not 0 < self.reference_rates.get(latent, 0.0) < 1
            ]
            if without:
                raise UserError(
                    f"a {self.kind} penalty needs reference rates between 0 and 1, and latents"
                    f" {without} have none; run select again"
                )

    def measure(self, conversations: Sequence[Sequence[Message]], latents: Sequence[int]) -> Tensor:
        """(n, len(latents)) float32: their values after TopK."""
        return self._values(self._encode(conversations), latents)

    def score(self, conversations: Sequence[Sequence[Message]]) -> Scores:
        """Score conversations that each end in an assistant turn, by one forward pass each.

        A response cut short must be passed like any other: an end-of-turn token is appended for
        scoring.
        """
        encoded = self._encode(conversations)
        z = self._values(encoded, [p.latent for p in self.penalised])
        reward, penalty = encoded.rewards.float() + self._clamping(encoded), self._penalty(z)
        return Scores(
            reward=reward,
            penalty=penalty,
            total=reward - penalty,
            fired=fires(z, self.penalised, self.kind),
            z=z,
            monitors_z=self._values(encoded, self.monitors),
            below=self._below(encoded, [*(p.latent for p in self.penalised), *self.monitors]),
            truncated=encoded.truncated,
        )

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any
    ) -> list[float]:
        """TRL's reward function: prompts and completions as strings or as messages; the other
        columns are not used.

        Logs means under the names the PPO trainer uses, and each completion's reward and penalty
        beside it.
        """
        ids = kwargs.get("completion_ids") or [()] * len(completions)
        scores = self.score(
            [
                scored_conversation(
                    p, c, ended=bool(tokens) and tokens[-1] in self.stop_ids, trim=self.trim
                ).messages
                for p, c, tokens in zip(prompts, completions, ids, strict=True)
            ]
        )
        if log_metric := kwargs.get("log_metric"):
            for name, value in self.metrics(scores).items():
                log_metric(name, value)
        if log_extra := kwargs.get("log_extra"):
            log_extra("sarm_reward", scores.reward.tolist())
            log_extra("penalty", scores.penalty.tolist())
        return scores.total.tolist()

    def metrics(self, scores: Scores) -> dict[str, float]:
        """Means over the conversations: reward, penalty, total, each penalised latent's rate,
        every latent's value.
        """
        named = {
            "objective/scores": scores.reward,
            "objective/penalty": scores.penalty,
            "objective/compound": scores.total,
        }
        named |= {"val/truncated_conversations": scores.truncated.float()}
        named |= {
            f"rate/{p.latent}": scores.fired[:, i].float() for i, p in enumerate(self.penalised)
        }
        named |= {f"z/{p.latent}": scores.z[:, i] for i, p in enumerate(self.penalised)}
        named |= {f"z/{latent}": scores.monitors_z[:, i] for i, latent in enumerate(self.monitors)}
        return {name: float(value.mean()) for name, value in named.items()}

    def _encode(self, conversations: Sequence[Sequence[Message]]) -> Encoded:
        return encode_texts(
            self.model,
            self.tokenizer,
            conversations,
            extra_ranks=self.extra_ranks,
            tokens_per_batch=self.tokens_per_batch,
            max_length=self.max_length,
        )

    def _ranks(self, encoded: Encoded) -> Ranks:
        return Ranks(
            encoded.indices.numpy(), encoded.values.numpy(), self.model.k, self.model.d_sae
        )

    def _values(self, encoded: Encoded, latents: Sequence[int]) -> Tensor:
        """(n, len(latents)) float32."""
        return torch.from_numpy(latent_values(self._ranks(encoded), latents)).float()

    def _below(self, encoded: Encoded, latents: Sequence[int]) -> Tensor:
        """(n, len(latents)) float32."""
        ranks = self._ranks(encoded)
        beyond = ranks._replace(
            indices=ranks.indices[:, ranks.k :],
            values=ranks.values[:, ranks.k :],
            k=max(ranks.indices.shape[1] - ranks.k, 0),
        )
        return torch.from_numpy(latent_values(beyond, latents)).float()

    def _clamping(self, encoded: Encoded) -> Tensor:
        """(n,) float32: how clamping the penalised latents changes the reward."""
        if self.clamp is None:
            return torch.zeros(len(encoded.rewards))
        clamps = [Clamp(p.latent, -math.inf, self.clamp) for p in self.penalised]
        weight = self.model.head_weight.detach().float().cpu().numpy()
        return torch.from_numpy(reward_changes(clamps, self._ranks(encoded), weight)).float()

    def _penalty(self, z: Tensor) -> Tensor:
        """(n,)."""
        kind = PENALTIES[self.kind]
        rates = [self.reference_rates[p.latent] for p in self.penalised] if kind.needs_rates else []
        return kind.terms(Scored(z, self.penalised, rates, self.all_reduce)).sum(1).float()


# --- the penalty as arithmetic on latent values
# -----------------------------------------------------------------------


def fires(z: Tensor, penalised: Sequence[Penalised], kind: str = "threshold") -> Tensor:
    """(n, P) bool: z > tau, or z > 0 in a penalty without a threshold."""
    return above(z, taus_of(penalised) if PENALTIES[kind].has_tau else [0.0] * len(penalised))


# --- the random arm
# ------------------------------------------------------------------------------------------------


def calibrate_random(
    z_candidates: Tensor,
    candidates: Sequence[int],
    z_penalised: Tensor,
    penalised: Sequence[Penalised],
    kind: str = "threshold",
) -> list[Penalised]:
    """As many random latents as penalised ones, with the same total dose over the base policy's
    texts.

    `z_candidates` (n, C) and `z_penalised` (n, P) are latent values on n generations of the base
    policy. The dose is the mean penalty, sum_i alpha_i P(z_i > tau_i) for `threshold`. Each
    penalised latent, the most frequent first, is matched with the first unused candidate that is
    active often enough, at the tau that gives the same rate; where none is, with the first that is
    at least half as active as the most active one, at the tau that comes nearest. Then all alphas
    are multiplied by one number, so that the doses are equal. Latents that never fire are matched
    at taus above all that was seen. In a density penalty tau plays no part, and the candidate whose
    rate is nearest is taken.
    """
    if len(candidates) < len(penalised):
        raise UserError(
            f"{len(candidates)} random candidates cannot match {len(penalised)} penalised latents;"
            " raise select.random_candidates"
        )
    dose = float(PENALTIES[kind].doses(z_penalised, penalised).sum())
    active = (z_candidates > 0).sum(0).tolist()
    if dose > 0 and not any(active):
        raise UserError(
            f"none of the {len(candidates)} random candidates fires on the base policy's"
            f" {len(z_candidates)} texts; raise calibrate.prompts"
        )
    wanted = fires(z_penalised, penalised, kind).sum(0).tolist()
    matched: dict[int, Penalised] = {}
    unused = list(range(len(candidates)))
    for at in sorted(range(len(penalised)), key=lambda i: -wanted[i]):
        chosen = _best_match(wanted[at], [active[c] for c in unused], kind)
        column = unused.pop(chosen)
        tau = matching_tau(z_candidates[:, column], wanted[at], penalised[at].tau)
        matched[at] = Penalised(int(candidates[column]), tau, penalised[at].alpha)
    random = [matched[at] for at in range(len(penalised))]
    columns = [list(candidates).index(r.latent) for r in random]
    random_dose = float(PENALTIES[kind].doses(z_candidates[:, columns], random).sum())
    if dose == 0 or random_dose == 0:
        return random
    return [r._replace(alpha=r.alpha * dose / random_dose) for r in random]


def _best_match(wanted: int, active: Sequence[int], kind: str) -> int:
    """Which candidate to take, by how many texts each is active on; the first of equals."""
    if not PENALTIES[kind].has_tau:
        return min(range(len(active)), key=lambda c: (active[c] == 0, abs(active[c] - wanted)))
    # Not the most active one itself, which would be the same whatever the order they are tried in.
    enough = [c for c, count in enumerate(active) if count >= max(wanted, 1)]
    return enough[0] if enough else next(c for c, n in enumerate(active) if n >= max(active) / 2)


def matching_tau(z: Tensor, wanted: int, tau: float) -> float:
    """The tau >= 0 above which as nearly `wanted` of the values z (n,) lie as ties allow, halfway
    between two values.

    Where none should or can, `tau` itself or the largest value, whichever is higher.
    """
    levels = z[z > 0].double().unique().flip(0)
    if wanted == 0 or len(levels) == 0:
        return max(tau, float(z.max()))
    counts = (z.double()[:, None] >= levels).sum(0)
    nearest = int((counts - wanted).abs().argmin())
    below = float(levels[nearest + 1]) if nearest + 1 < len(levels) else 0.0
    return (float(levels[nearest]) + below) / 2


# --- conversations
# ------------------------------------------------------------------------------------------------


class ScoredConversation(NamedTuple):
    """What of a prompt and a response a SARM reads."""

    messages: list[Message]
    ended: bool
    """Whether the text ends at an end of turn or a sentence end."""


def scored_conversation(
    prompt: str | Sequence[Message],
    completion: str | Sequence[Message],
    *,
    ended: bool,
    trim: bool = True,
) -> ScoredConversation:
    """As our own training scores a response: without outer white space and, where the policy has
    not `ended` it, up to its last sentence end.
    """
    messages = conversation(prompt, completion)
    text = messages[-1]["content"].strip()
    if not ended:
        text = trim_to_last_sentence(text) if trim else text
        ended = ends(text)
    return ScoredConversation([*messages[:-1], {**messages[-1], "content": text}], ended)


def conversation(
    prompt: str | Sequence[Message], completion: str | Sequence[Message]
) -> list[Message]:
    """Messages ending in the completion; a plain prompt is a user turn, and a completion continues
    an opened assistant turn.
    """
    messages = (
        [{"role": "user", "content": prompt}]
        if isinstance(prompt, str)
        else [dict(m) for m in prompt]
    )
    answer = (
        [{"role": "assistant", "content": completion}]
        if isinstance(completion, str)
        else [{**m, "content": m.get("content") or ""} for m in completion]
    )
    if messages[-1]["role"] == "assistant" and answer and answer[0]["role"] == "assistant":
        answer[0]["content"] = messages.pop()["content"] + answer[0]["content"]
    return messages + answer
