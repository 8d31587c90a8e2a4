"""How token rewards become advantages: a class each, chosen by `ppo.advantage`.

`python -m pytest tests/ppo/test_advantages.py` checks each by hand. A new one is a class here and
its place in `ADVANTAGES`; see docs/adding-an-advantage.md. The config reads the names and what each
needs, so importing this module imports no torch.

Notation: B sequences, t response positions (right-padded). The `samples` responses of one prompt
lie side by side. A `mask` is boolean and marks response tokens, the end-of-turn token among them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Episodes(NamedTuple):
    """The responses of one step."""

    rewards: Tensor
    """(B, t) float32, 0 outside the mask."""
    values: Tensor | None
    """(B, t) float32 of the critic; None without one."""
    mask: Tensor
    """(B, t) bool."""
    samples: int
    """Responses to one prompt."""
    gamma: float
    lam: float


class Advantages(NamedTuple):
    advantages: Tensor
    """(B, t), 0 outside the mask."""
    returns: Tensor | None = None
    """(B, t), what the critic learns, 0 outside the mask; None without one."""


class Advantage(Protocol):
    """One way of estimating advantages."""

    critic: bool
    """Whether it needs values: without, the policy has no value head."""
    min_samples: int
    """The least `ppo.samples_per_prompt`."""
    whiten: bool
    """Whether advantages are whitened over the batch where `ppo.whiten_advantages` is not set."""

    def __call__(self, episodes: Episodes) -> Advantages: ...


class Gae:
    """Generalised advantage estimation (arXiv 1506.02438) along time."""

    critic, min_samples, whiten = True, 1, True

    def __call__(self, episodes: Episodes) -> Advantages:
        """A response ends its episode: the value after its last token is 0. Positions outside the
        mask pass nothing on.
        """
        # In numpy, of which a call on so little takes a fifth of torch's.
        import numpy as np

        rewards, values, mask, _, gamma, lam = episodes
        assert values is not None
        r, v, live = (x.T.contiguous().cpu().numpy() for x in (rewards, values, mask))
        advantages = np.zeros_like(r)
        ahead = next_value = np.zeros_like(r[0])
        for at in reversed(range(len(r))):
            delta = r[at] + gamma * next_value - v[at]
            ahead = advantages[at] = np.where(live[at], delta + gamma * lam * ahead, 0)
            next_value = np.where(live[at], v[at], 0)
        found = rewards.new_tensor(advantages.T.copy())
        return Advantages(found, (found + values).where(mask, found.new_zeros(())))


class Rloo:
    """REINFORCE with a leave-one-out baseline (arXiv 2402.14740): a response's return, less the
    mean return of the other responses to its prompt; the same at each of its tokens.
    """

    critic, min_samples, whiten = False, 2, False

    def __call__(self, episodes: Episodes) -> Advantages:
        returns = grouped_returns(episodes)
        others = (returns.sum(1, keepdim=True) - returns) / (episodes.samples - 1)
        return at_every_token(returns - others, episodes.mask)


class Grpo:
    """Group-relative advantages (arXiv 2402.03300): a response's return, less its group's mean,
    over its group's sample standard deviation; the same at each of its tokens.
    """

    critic, min_samples, whiten = False, 2, False
    EPSILON = 1e-4
    """Added to the standard deviation, as in TRL."""

    def __call__(self, episodes: Episodes) -> Advantages:
        returns = grouped_returns(episodes)
        deviation = returns - returns.mean(1, keepdim=True)
        scaled = deviation / (returns.std(1, keepdim=True) + self.EPSILON)
        return at_every_token(scaled, episodes.mask)


def grouped_returns(episodes: Episodes) -> Tensor:
    """(prompts, samples): each response's undiscounted sum of rewards."""
    return episodes.rewards.sum(1).view(-1, episodes.samples)


def at_every_token(advantages: Tensor, mask: Tensor) -> Advantages:
    """A response's advantage (prompts, samples) at each of its tokens, (B, t)."""
    return Advantages(advantages.reshape(-1, 1) * mask)


ADVANTAGES: dict[str, Advantage] = {"gae": Gae(), "rloo": Rloo(), "grpo": Grpo()}
"""By its name in `ppo.advantage`."""
