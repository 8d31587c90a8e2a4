"""KL estimators and the controller of the coefficient, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sarm.ppo.kl import kl_per_token, next_kl_coef

T = torch.tensor


def test_kl_estimators_by_hand() -> None:
    logprobs, ref = T([[math.log(0.5), math.log(0.2)]]), T([[math.log(0.25), math.log(0.4)]])
    torch.testing.assert_close(kl_per_token(logprobs, ref, "k1"), T([[math.log(2), -math.log(2)]]))
    torch.testing.assert_close(
        kl_per_token(logprobs, ref, "k2"), T([[math.log(2) ** 2 / 2, math.log(2) ** 2 / 2]])
    )
    torch.testing.assert_close(
        kl_per_token(logprobs, ref, "k3"), T([[0.5 - 1 + math.log(2), 2 - 1 - math.log(2)]])
    )


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators_have_the_exact_kl_as_their_mean(estimator: Any) -> None:
    p, q = T([0.5, 0.3, 0.2]), T([0.2, 0.2, 0.6])
    exact = (p * (p / q).log()).sum()
    torch.testing.assert_close((p * kl_per_token(p.log(), q.log(), estimator)).sum(), exact)


def test_kl_of_a_token_the_reference_almost_excludes_is_finite() -> None:
    assert kl_per_token(T([0.0, -300.0]), T([-300.0, 0.0]), "k3").isfinite().all()


def test_log_ratios_are_cut_on_both_sides() -> None:
    logprobs, ref = T([0.0, -30.0, -1.0]), T([-30.0, 0.0, -1.2])
    assert kl_per_token(logprobs, ref, "k1", 5.0).tolist() == pytest.approx([5.0, -5.0, 0.2])
    assert kl_per_token(logprobs, ref, "k1").tolist() == pytest.approx([20.0, -20.0, 0.2])


def test_adaptive_kl_coefficient_by_hand() -> None:
    def after(kl: float, controller: Any = "adaptive") -> float:
        return next_kl_coef(0.05, kl, 64, controller, target=6.0, horizon=10_000)

    assert after(6.6) == pytest.approx(0.05 * (1 + 0.1 * 64 / 10_000))
    assert after(60.0) == pytest.approx(0.05 * (1 + 0.2 * 64 / 10_000))
    assert after(-3.0) == pytest.approx(0.05 * (1 - 0.2 * 64 / 10_000))
    assert after(6.0) == 0.05
    assert after(60.0, "fixed") == 0.05


@pytest.mark.parametrize(("estimator", "right"), [("k1", False), ("k2", True), ("k3", False)])
def test_which_estimator_has_the_kls_gradient_as_a_loss(estimator: Any, right: bool) -> None:
    """k2 alone, in expectation over the policy's own tokens; k1 has none, and k3 another's."""
    logits, q = T([0.3, -0.2, 1.1], requires_grad=True), T([0.2, 0.2, 0.6])
    log_p = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((log_p.exp() * (log_p - q.log())).sum(), logits)
    log_p = logits.log_softmax(-1)
    expected = (log_p.exp().detach() * kl_per_token(log_p, q.log(), estimator)).sum()
    (got,) = torch.autograd.grad(expected, logits)
    assert torch.allclose(got, exact, atol=1e-6) == right
    if estimator == "k1":
        torch.testing.assert_close(got, torch.zeros(3), atol=1e-6, rtol=0)
