"""Advantages against numbers worked by hand, the definition, and TRL."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sarm.config import ROOT, PpoConfig
from sarm.ppo import advantages
from sarm.ppo.advantages import ADVANTAGES, Advantages, Episodes

T = torch.tensor


def mask_of(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) < T(lengths)[:, None]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Advantages:
    return ADVANTAGES["gae"](Episodes(rewards, values, mask, 1, gamma, lam))


def without_critic(name: str, rewards: Tensor, mask: Tensor, samples: int) -> Advantages:
    return ADVANTAGES[name](Episodes(rewards, None, mask, samples, 1.0, 0.95))


def test_gae_by_hand_ignores_padding() -> None:
    nan = math.nan
    rewards, values = T([[1.0, 2.0, 3.0], [5.0, nan, nan]]), T([[0.5, 1.0, 1.5], [2.0, nan, nan]])
    got = gae(rewards, values, mask_of(3, 1), 0.9, 0.8)
    # delta = (1.4, 2.35, 1.5); A3 = 1.5, A2 = 2.35 + 0.72 * 1.5, A1 = 1.4 + 0.72 * A2
    torch.testing.assert_close(got.advantages, T([[3.8696, 3.43, 1.5], [3.0, 0.0, 0.0]]))
    torch.testing.assert_close(got.returns, T([[4.3696, 4.43, 3.0], [5.0, 0.0, 0.0]]))


def test_gae_equals_the_double_sum_of_its_definition_row_by_row() -> None:
    torch.manual_seed(0)
    gamma, lam, mask = 0.97, 0.9, mask_of(7, 1, 4, 0)
    rewards, values = torch.randn(4, 7).double(), torch.randn(4, 7).double()
    got = gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(mask.sum(1).tolist()):
        v = [*values[row, :length].tolist(), 0.0]
        deltas = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        want = [
            sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, length))
            for t in range(length)
        ]
        assert got.advantages[row].tolist() == pytest.approx(want + [0.0] * (7 - length))
    alone_row = gae(rewards[2:3], values[2:3], mask[2:3], gamma, lam)
    torch.testing.assert_close(alone_row.advantages[0], got.advantages[2], rtol=0, atol=0)


# Two prompts, three responses each, of 2, 1, 3, 1, 2 and 2 tokens; returns 3, 1, 8 and 2, 2, 5.
LENGTHS = (2, 1, 3, 1, 2, 2)
REWARDS = T(
    [
        [1.0, 2.0, 0.0],
        [1.0, 0.0, 0.0],
        [-1.0, 0.0, 9.0],
        [2.0, 0.0, 0.0],
        [-0.5, 2.5, 0.0],
        [0.0, 5.0, 0.0],
    ]
)


def at_tokens(*of_responses: float) -> Tensor:
    return T(of_responses)[:, None] * mask_of(*LENGTHS)


def test_leave_one_out_by_hand() -> None:
    got = without_critic("rloo", REWARDS, mask_of(*LENGTHS), 3)
    # 3 - (1 + 8) / 2, 1 - (3 + 8) / 2, ...
    want = at_tokens(-1.5, -4.5, 6.0, -1.5, -1.5, 3.0)
    torch.testing.assert_close(got.advantages, want)
    assert got.returns is None


def test_group_normalised_by_hand() -> None:
    got = without_critic("grpo", REWARDS, mask_of(*LENGTHS), 3)
    # means 4 and 3; sample variances (1 + 9 + 16) / 2 and (1 + 1 + 4) / 2
    first, second = math.sqrt(13) + 1e-4, math.sqrt(3) + 1e-4
    want = at_tokens(-1 / first, -3 / first, 4 / first, -1 / second, -1 / second, 2 / second)
    torch.testing.assert_close(got.advantages, want)
    assert got.returns is None


def test_responses_that_are_all_alike_teach_nothing() -> None:
    same = torch.ones(4, 2)
    for name in ("rloo", "grpo"):
        got = without_critic(name, same, mask_of(2, 2, 2, 2), 2)
        assert got.advantages.abs().max() == 0


def test_leave_one_out_is_the_mean_difference_to_each_other_response() -> None:
    """The definition, response by response; a response's own return is not in its baseline."""
    torch.manual_seed(0)
    rewards, mask = torch.randn(8, 3), mask_of(3, 1, 2, 3, 2, 2, 1, 3)
    rewards = torch.where(mask, rewards, 0.0)
    got = without_critic("rloo", rewards, mask, 4).advantages
    totals = rewards.sum(1).tolist()
    for row, total in enumerate(totals):
        first = row // 4 * 4
        others = [totals[i] for i in range(first, first + 4) if i != row]
        assert got[row, 0].item() == pytest.approx(sum(total - o for o in others) / 3, abs=1e-5)


def test_what_each_advantage_needs() -> None:
    assert {name: (a.critic, a.min_samples, a.whiten) for name, a in ADVANTAGES.items()} == {
        "gae": (True, 1, True),
        "rloo": (False, 2, False),
        "grpo": (False, 2, False),
    }
    rloo = PpoConfig(advantage="rloo", samples_per_prompt=2)
    assert not rloo.critic and not rloo.whiten
    assert PpoConfig(advantage="rloo", samples_per_prompt=2, whiten_advantages=True).whiten
    assert PpoConfig().critic and PpoConfig().whiten
    assert not PpoConfig(whiten_advantages=False).whiten


def test_the_page_on_adding_one_adds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code, put where it says; one response of four tokens, one of one."""
    monkeypatch.setattr(advantages, "ADVANTAGES", advantages.ADVANTAGES)
    monkeypatch.setitem(advantages.ADVANTAGES, "length_scaled", None)
    page = (ROOT / "docs" / "adding-an-advantage.md").read_text(encoding="utf-8")
    exec(page.split("```python")[1].split("```")[0], vars(advantages))
    assert not PpoConfig(advantage="length_scaled", samples_per_prompt=4).critic
    mask = mask_of(4, 1)
    rewards = torch.where(mask, T([[1.0, 0.0, 0.0, 2.0], [1.0, 0.0, 0.0, 0.0]]), 0.0)
    got = without_critic("length_scaled", rewards, mask, 2).advantages
    torch.testing.assert_close(got, T([[1.0] * 4, [-2.0, 0.0, 0.0, 0.0]]))
