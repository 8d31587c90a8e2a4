"""PPO's losses against numbers worked by hand, and TRL's."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from sarm.ppo import losses

T = torch.tensor

LOSS = {"cliprange_low": 0.2, "cliprange_high": 0.3, "dual_clip": 3.0, "log_ratio_max": 20.0}


def policy_loss_of(
    ratios: list[float], advantages: list[float], **changes: Any
) -> tuple[losses.Loss, Tensor]:
    """The loss of tokens with these ratios, and the gradient on their log-probabilities."""
    old = torch.linspace(-0.4, -1.9, len(ratios))
    new = (T(ratios).log() + old).requires_grad_()
    got = losses.policy_loss(new, old, T(advantages), **(LOSS | changes))
    got.total.backward()
    return got, new.grad


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.6, 0.0),  # clipped above at 1.3
        (0.5, 2.0, -1.0, -1.0),  # below, but the plain term is larger
        (0.5, -2.0, 1.6, 0.0),  # clipped below at 0.8
        (2.0, -2.0, 4.0, 4.0),  # above, but the plain term is larger
        (5.0, -2.0, 6.0, 0.0),  # held at 3 by the dual clip
        (5.0, 0.5, -0.65, 0.0),  # which is for negative advantages alone
    ],
)
def test_policy_loss_and_its_gradient_by_hand(
    ratio: float, advantage: float, loss: float, slope: float
) -> None:
    got, grad = policy_loss_of([ratio], [advantage])
    assert got.total.item() == pytest.approx(loss) and grad.item() == pytest.approx(slope)


def test_policy_loss_without_dual_clip_is_unbounded() -> None:
    got, grad = policy_loss_of([5.0], [-2.0], dual_clip=None)
    assert got.total.item() == pytest.approx(10) and grad.item() == pytest.approx(10)


def test_log_ratio_guard_keeps_the_loss_finite_and_stops_its_gradient() -> None:
    new = T([200.0, -200.0], requires_grad=True)
    got = losses.policy_loss(new, torch.zeros(2), T([-1.0, 1.0]), **(LOSS | {"dual_clip": None}))
    got.total.backward()
    assert got.total.item() == pytest.approx(math.exp(20), rel=1e-5) and new.grad.tolist() == [
        0.0,
        0.0,
    ]


def test_log_ratios_are_cut_on_both_sides() -> None:
    for ratio, cut in ((0.5, -0.1), (2.0, 0.1)):
        got, grad = policy_loss_of([ratio], [1.0], log_ratio_max=0.1)
        assert got.total.item() == pytest.approx(-math.exp(cut)) and grad.item() == 0.0


def test_policy_sums_and_means_by_hand() -> None:
    got, _ = policy_loss_of([1.5, 1.0, 5.0, 0.5], [2.0, 1.0, -2.0, -2.0])
    means = losses.means([got.sums | {"tokens": T(4.0)}])
    assert means["loss/policy_avg"] == pytest.approx((-2.6 - 1 + 6 + 1.6) / 4)
    assert means["policy/approxkl_avg"] == pytest.approx(
        sum(0.5 * math.log(r) ** 2 for r in (1.5, 1, 5, 0.5)) / 4
    )
    assert means["policy/clipfrac_avg"] == 0.5 and means["policy/clipfrac_lower_avg"] == 0.25
    assert means["val/ratio"] == pytest.approx(2) and means["val/ratio_var"] == pytest.approx(
        statistics.pvariance([1.5, 1, 5, 0.5])
    )


def test_means_of_one_token_and_of_ratios_near_one() -> None:
    got, _ = policy_loss_of([1.25], [2.0])
    means = losses.means([got.sums | {"tokens": T(1.0)}])
    assert means["loss/policy_avg"] == pytest.approx(-2.5)
    assert means["val/ratio"] == pytest.approx(1.25) and means["val/ratio_var"] < 1e-6
    got, _ = policy_loss_of([1.2, 1.1, 0.7], [1.0] * 3)
    means = losses.means([got.sums | {"tokens": T(3.0)}])
    assert means["val/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert means["val/ratio_var"] == pytest.approx(statistics.pvariance([1.2, 1.1, 0.7]), rel=1e-5)
    got, _ = policy_loss_of([1.2, 1.4], [1.0] * 2)
    assert losses.means([got.sums | {"tokens": T(2.0)}])["val/ratio_var"] == pytest.approx(
        0.01, rel=1e-4
    )


@pytest.mark.parametrize(
    ("value", "old", "ret", "loss", "slope"),
    [
        (1.0, 1.0, 3.0, 2.0, -2.0),
        (1.1, 1.0, 3.0, 0.5 * 1.9**2, -1.9),
        (2.0, 1.0, 3.0, 0.5 * 1.8**2, 0.0),  # moved past 1.2: no further reward for it
        (0.0, 1.0, 3.0, 4.5, -3.0),  # moved the wrong way: full error
        (0.5, 1.0, 0.2, 0.5 * 0.6**2, 0.0),  # moved past 0.8
    ],
)
def test_value_loss_and_its_gradient_by_hand(
    value: float, old: float, ret: float, loss: float, slope: float
) -> None:
    values = T([value], requires_grad=True)
    got = losses.value_loss(values, T([old]), T([ret]), cliprange_value=0.2)
    got.total.backward()
    assert got.total.item() == pytest.approx(loss) and values.grad.item() == pytest.approx(slope)
    assert {name: float(total) for name, total in got.sums.items()} == pytest.approx(
        {"loss/value_avg": loss, "val/clipfrac_avg": float(slope == 0)}
    )


def test_terms_are_weighed_in_the_total_and_not_in_what_is_logged() -> None:
    new = T([0.0, 0.0], requires_grad=True)
    policy = losses.policy_loss(new, torch.zeros(2), T([2.0, -1.0]), **LOSS)
    entropy = T([0.5, 1.5], requires_grad=True)
    kl = losses.kl_loss(T([0.1, 0.3]), T([0.2, 0.0]), estimator="k2", log_ratio_max=20.0)
    got = policy.plus(losses.entropy_bonus(entropy), -0.1).plus(kl, 3.0)
    assert got.total.item() == pytest.approx(-1.0 - 0.1 * 2.0 + 3 * (0.01 + 0.09) / 2)
    got.total.backward()
    assert entropy.grad.tolist() == pytest.approx([-0.1, -0.1])
    means = losses.means([got.sums | {"tokens": T(2.0)}])
    assert means["policy/entropy_avg"] == pytest.approx(1.0)
    assert means["loss/kl_avg"] == pytest.approx(0.025)


def test_the_kl_term_cuts_log_ratios() -> None:
    kl = losses.kl_loss(T([0.1, 0.3]), T([0.2, 0.0]), estimator="k2", log_ratio_max=0.05)
    assert kl.total.item() == pytest.approx(2 * 0.5 * 0.05**2)


def test_any_cut_of_the_tokens_gives_the_same_gradient_and_means() -> None:
    torch.manual_seed(0)
    new, old, advantages = (torch.randn(3, 11, dtype=torch.float64) * 0.3).unbind()

    def gradient(parts: list[list[int]]) -> tuple[Tensor, list[losses.Sums]]:
        leaf, sums = new.clone().requires_grad_(), []
        for at in parts:
            got = losses.policy_loss(leaf[at], old[at], advantages[at], **LOSS)
            (got.total / len(new)).backward()
            sums.append(got.sums | {"tokens": T(float(len(at)))})
        return leaf.grad, sums

    whole, whole_sums = gradient([list(range(11))])
    split, split_sums = gradient([[0, 1, 2], [3], [4, 5, 6, 7, 8, 9, 10]])
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-12)
    assert losses.means(split_sums) == pytest.approx(losses.means(whole_sums), rel=1e-12)


def test_the_kl_stop_looks_at_the_mean_over_tokens() -> None:
    sums = policy_loss_of([1.0, 1.0, 1.0, 2.0], [1.0] * 4)[0].sums | {"tokens": T(4.0)}
    # approxkl 0 over 3 tokens, 0.2402 over 1: 0.06 over all
    assert losses.kl_exceeds(sums, 0.05)
    assert not losses.kl_exceeds(sums, 0.07) and not losses.kl_exceeds(sums, None)
    still = losses.policy_loss(torch.zeros(1), torch.zeros(1), T([1.0]), **LOSS).sums
    assert not losses.kl_exceeds(still | {"tokens": T(1.0)}, 0.0)  # not further than 0
