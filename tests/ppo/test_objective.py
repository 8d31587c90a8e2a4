"""PPO's arithmetic against numbers worked by hand, obvious loops and other libraries."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sarm.config import ROOT
from sarm.ppo import objective as o

T = torch.tensor


def alone(tensor: Tensor) -> Tensor:
    """The all-reduce of a single rank."""
    return tensor.clone()


class Ranks:
    """n threads, each a rank; `run(f)` gives f(rank, all_reduce) of every rank. A missed or extra
    collective hangs until the time limit.
    """

    def __init__(self, n: int) -> None:
        self.n, self.barrier, self.slots = n, threading.Barrier(n, timeout=20), [torch.empty(0)] * n

    def run(self, f: Callable[[int, o.AllReduce], Any]) -> list[Any]:
        def one(rank: int) -> Any:
            def all_reduce(tensor: Tensor) -> Tensor:
                self.slots[rank] = tensor
                self.barrier.wait()
                total = torch.stack(list(self.slots)).sum(0)
                self.barrier.wait()
                return total

            return f(rank, all_reduce)

        with ThreadPoolExecutor(self.n) as pool:
            return list(pool.map(one, range(self.n)))


def mask_of(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) < T(lengths)[:, None]


# Log-probabilities


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_logprobs_entropy_and_gradients_equal_a_whole_log_softmax(
    frozen: bool, bias: bool, chunk: int
) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 11, bias=bias).requires_grad_(not frozen)
    hidden, labels, grad = torch.randn(3, 5, 8), torch.randint(11, (3, 5)), torch.randn(3, 5)
    mine, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()

    got = o.logprobs_from_hidden(mine, head, labels, 0.7, chunk)
    (got.logprobs * grad).sum().backward()
    got_head = [None if p.grad is None else p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    log_p = (head(plain) / 0.7).log_softmax(-1)
    want = log_p.gather(-1, labels[..., None]).squeeze(-1)
    (want * grad).sum().backward()

    torch.testing.assert_close(got.logprobs, want)
    torch.testing.assert_close(got.entropy, -(log_p.exp() * log_p).sum(-1).detach())
    torch.testing.assert_close(mine.grad, plain.grad)
    for got_grad, parameter in zip(got_head, head.parameters(), strict=True):
        assert (got_grad is None) == (parameter.grad is None) == frozen
        if got_grad is not None:
            torch.testing.assert_close(got_grad, parameter.grad)


def test_logprobs_of_a_head_tied_to_trained_states_carry_both_gradients() -> None:
    embedding, head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
    head.weight = embedding.weight
    labels = T([[3, 1, 4]])
    o.logprobs_from_hidden(embedding(labels), head, labels, 1.0, 2).logprobs.sum().backward()
    got, embedding.weight.grad = embedding.weight.grad.clone(), None
    head(embedding(labels)).log_softmax(-1).gather(-1, labels[..., None]).sum().backward()
    torch.testing.assert_close(got, embedding.weight.grad)


@pytest.mark.parametrize("frozen", [True, False])
def test_no_tensor_of_tokens_by_vocabulary_exists_forwards_or_backwards(frozen: bool) -> None:
    tokens, vocabulary, chunk, largest = 64, 500, 8, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(
                [
                    largest,
                    *(
                        x.numel()
                        for x in (out if isinstance(out, tuple | list) else [out])
                        if isinstance(x, Tensor)
                    ),
                ]
            )
            return out

    head = nn.Linear(4, vocabulary, bias=False).requires_grad_(not frozen)
    hidden, labels = (
        torch.randn(tokens, 4, requires_grad=True),
        torch.randint(vocabulary, (tokens,)),
    )
    with Watch():
        o.logprobs_from_hidden(hidden, head, labels, 1.0, chunk).logprobs.sum().backward()
    assert chunk * vocabulary == largest < tokens * vocabulary


def test_logprobs_in_bfloat16_have_float32_softmax_and_none_has_gradient_under_no_grad() -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False).bfloat16()
    hidden, labels = torch.randn(7, 16).bfloat16().requires_grad_(), torch.randint(50, (7,))
    with torch.no_grad():
        got = o.logprobs_from_hidden(hidden, head, labels)
    assert (
        got.logprobs.dtype == got.entropy.dtype == torch.float32 and not got.logprobs.requires_grad
    )
    torch.testing.assert_close(
        got.logprobs,
        head(hidden).float().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1).detach(),
    )
    o.logprobs_from_hidden(hidden, head, labels).logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    assert o.logprobs_from_hidden(hidden[:0], head, labels[:0]).logprobs.shape == (0,)


# KL


def test_kl_estimators_by_hand() -> None:
    logprobs, ref = T([[math.log(0.5), math.log(0.2)]]), T([[math.log(0.25), math.log(0.4)]])
    torch.testing.assert_close(
        o.kl_per_token(logprobs, ref, "k1"), T([[math.log(2), -math.log(2)]])
    )
    torch.testing.assert_close(
        o.kl_per_token(logprobs, ref, "k3"), T([[0.5 - 1 + math.log(2), 2 - 1 - math.log(2)]])
    )


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators_have_the_exact_kl_as_their_mean(estimator: Any) -> None:
    p, q = T([0.5, 0.3, 0.2]), T([0.2, 0.2, 0.6])
    exact = (p * (p / q).log()).sum()
    torch.testing.assert_close((p * o.kl_per_token(p.log(), q.log(), estimator)).sum(), exact)


def test_kl_of_a_token_the_reference_almost_excludes_is_finite() -> None:
    assert o.kl_per_token(T([0.0, -300.0]), T([-300.0, 0.0]), "k3").isfinite().all()


def test_adaptive_kl_coefficient_by_hand() -> None:
    def after(kl: float, controller: Any = "adaptive") -> float:
        return o.next_kl_coef(0.05, kl, 64, controller, target=6.0, horizon=10_000)

    assert after(6.6) == pytest.approx(0.05 * (1 + 0.1 * 64 / 10_000))
    assert after(60.0) == pytest.approx(0.05 * (1 + 0.2 * 64 / 10_000))
    assert after(-3.0) == pytest.approx(0.05 * (1 - 0.2 * 64 / 10_000))
    assert after(6.0) == 0.05
    assert after(60.0, "fixed") == 0.05


# Rewards and advantages


def test_token_rewards_by_hand() -> None:
    kl = T([[1.0, 2.0, math.nan], [4.0, 5.0, 6.0], [math.nan, math.nan, math.nan]])
    got = o.token_rewards(T([10.0, 20.0, 30.0]), kl, mask_of(2, 3, 0), 0.1)
    torch.testing.assert_close(got, T([[-0.1, 9.8, 0.0], [-0.4, -0.5, 19.4], [0.0, 0.0, 0.0]]))


def test_missing_eos_costs_only_unended_responses() -> None:
    assert o.dock_missing_eos(T([1.0, 2.0]), T([True, False]), 0.5).tolist() == [1.0, 1.5]


def test_gae_by_hand_ignores_padding() -> None:
    nan = math.nan
    rewards, values = T([[1.0, 2.0, 3.0], [5.0, nan, nan]]), T([[0.5, 1.0, 1.5], [2.0, nan, nan]])
    got = o.gae(rewards, values, mask_of(3, 1), 0.9, 0.8)
    # delta = (1.4, 2.35, 1.5); A3 = 1.5, A2 = 2.35 + 0.72 * 1.5, A1 = 1.4 + 0.72 * A2
    torch.testing.assert_close(got.advantages, T([[3.8696, 3.43, 1.5], [3.0, 0.0, 0.0]]))
    torch.testing.assert_close(got.returns, T([[4.3696, 4.43, 3.0], [5.0, 0.0, 0.0]]))


def test_gae_equals_the_double_sum_of_its_definition_row_by_row() -> None:
    torch.manual_seed(0)
    gamma, lam, mask = 0.97, 0.9, mask_of(7, 1, 4, 0)
    rewards, values = torch.randn(4, 7).double(), torch.randn(4, 7).double()
    got = o.gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(mask.sum(1).tolist()):
        v = [*values[row, :length].tolist(), 0.0]
        deltas = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        want = [
            sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, length))
            for t in range(length)
        ]
        assert got.advantages[row].tolist() == pytest.approx(want + [0.0] * (7 - length))
    alone_row = o.gae(rewards[2:3], values[2:3], mask[2:3], gamma, lam)
    torch.testing.assert_close(alone_row.advantages[0], got.advantages[2], rtol=0, atol=0)


def test_whiten_by_hand() -> None:
    values, mask = T([[1.0, 3.0, 999.0], [5.0, 7.0, 9.0]]), mask_of(2, 3)  # mean 5, variance 8
    want = T([[-4.0, -2.0, 0.0], [0.0, 2.0, 4.0]]) / math.sqrt(8)
    torch.testing.assert_close(o.whiten(values, mask, alone), want)
    torch.testing.assert_close(
        o.whiten(values, mask, alone, shift_mean=False), torch.where(mask, want + 5.0, 0.0)
    )


def test_whitening_over_ranks_equals_whitening_all_at_once_though_a_rank_has_nothing() -> None:
    torch.manual_seed(0)
    values, mask = 1000 + torch.randn(6, 5), mask_of(5, 2, 4, 1, 0, 0)
    whole = o.whiten(values, mask, alone)
    parts = Ranks(3).run(
        lambda rank, all_reduce: o.whiten(
            values[2 * rank : 2 * rank + 2], mask[2 * rank : 2 * rank + 2], all_reduce
        )
    )
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)
    assert whole[mask].mean().abs() < 1e-5 and whole[mask].std(correction=0) == pytest.approx(
        1, abs=1e-5
    )


def test_whitening_equal_values_gives_zeros() -> None:
    assert o.whiten(torch.full((2, 3), 7.0), mask_of(3, 2), alone).abs().max() == 0


def test_explained_variance_by_hand_and_over_ranks() -> None:
    returns, mask = T([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 2, dtype=torch.bool)
    assert o.explained_variance(returns, returns, mask, alone) == 1
    assert o.explained_variance(torch.zeros(2, 2), returns, mask, alone) == 0
    values = T([[1.0, 2.0], [3.0, 2.0]])  # errors 0, 0, 0, 2: variance 0.75; returns: 1.25
    assert o.explained_variance(values, returns, mask, alone) == pytest.approx(0.4)
    over_ranks = Ranks(2).run(
        lambda r, all_reduce: o.explained_variance(
            values[r : r + 1], returns[r : r + 1], mask[r : r + 1], all_reduce
        )
    )
    assert over_ranks == pytest.approx([0.4, 0.4])
    assert math.isnan(o.explained_variance(values, torch.ones(2, 2), mask, alone))


# Losses

LOSS = {"cliprange_low": 0.2, "cliprange_high": 0.3, "dual_clip": 3.0, "log_ratio_max": 20.0}


def policy_loss_of(
    ratios: list[float], advantages: list[float], **changes: Any
) -> tuple[o.PolicyLoss, Tensor]:
    """The loss of tokens with these ratios, and the gradient on their log-probabilities."""
    new = T([ratios]).log().requires_grad_()
    got = o.policy_loss(
        new,
        torch.zeros_like(new),
        T([advantages]),
        torch.ones(1, len(ratios), dtype=torch.bool),
        **(LOSS | changes),
    )
    got.loss.backward()
    return got, new.grad[0]


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
    ],
)
def test_policy_loss_and_its_gradient_by_hand(
    ratio: float, advantage: float, loss: float, slope: float
) -> None:
    got, grad = policy_loss_of([ratio], [advantage])
    assert got.loss.item() == pytest.approx(loss) and grad.item() == pytest.approx(slope)


def test_policy_loss_without_dual_clip_is_unbounded() -> None:
    got, grad = policy_loss_of([5.0], [-2.0], dual_clip=None)
    assert got.loss.item() == pytest.approx(10) and grad.item() == pytest.approx(10)


def test_log_ratio_guard_keeps_the_loss_finite_and_stops_its_gradient() -> None:
    new = T([[200.0, -200.0]], requires_grad=True)
    got = o.policy_loss(
        new,
        torch.zeros(1, 2),
        T([[-1.0, 1.0]]),
        torch.ones(1, 2, dtype=torch.bool),
        **(LOSS | {"dual_clip": None}),
    )
    got.loss.backward()
    assert got.loss.item() == pytest.approx(math.exp(20), rel=1e-5) and new.grad.tolist() == [
        [0.0, 0.0]
    ]


def test_policy_sums_and_means_by_hand() -> None:
    got, _ = policy_loss_of([1.5, 1.0, 5.0, 0.5], [2.0, 1.0, -2.0, -2.0])
    means = o.policy_means(got.sums)
    assert got.tokens == 4
    assert means["loss/policy_avg"] == pytest.approx((-2.6 - 1 + 6 + 1.6) / 4)
    assert means["policy/approxkl_avg"] == pytest.approx(
        sum(0.5 * math.log(r) ** 2 for r in (1.5, 1, 5, 0.5)) / 4
    )
    assert means["policy/clipfrac_avg"] == 0.5 and means["policy/clipfrac_lower_avg"] == 0.25
    assert means["val/ratio"] == pytest.approx(2) and means["val/ratio_var"] == pytest.approx(
        statistics.pvariance([1.5, 1, 5, 0.5])
    )


def test_padding_changes_neither_loss_nor_gradient_nor_statistics() -> None:
    torch.manual_seed(0)
    new, old, advantages, entropy = torch.randn(4, 2, 3).unbind()
    mask = mask_of(3, 3)
    padded_mask = torch.cat([mask, torch.zeros(2, 2, dtype=torch.bool)], 1)

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x, torch.full((2, 2), math.nan)], 1)

    a, b = new.clone().requires_grad_(), padded(new).requires_grad_()
    plain = o.policy_loss(a, old, advantages, mask, entropy=entropy, **LOSS)
    with_padding = o.policy_loss(
        b, padded(old), padded(advantages), padded_mask, entropy=padded(entropy), **LOSS
    )
    plain.loss.backward()
    with_padding.loss.backward()
    assert [float(x) for x in plain.sums] == [float(x) for x in with_padding.sums]
    assert plain.sums.entropy == pytest.approx(entropy.sum().item())
    torch.testing.assert_close(b.grad, torch.cat([a.grad, torch.zeros(2, 2)], 1), rtol=0, atol=0)

    c, d = new.clone().requires_grad_(), padded(new).requires_grad_()
    o.value_loss(c, old, advantages, mask, cliprange_value=0.2).loss.backward()
    o.value_loss(
        d, padded(old), padded(advantages), padded_mask, cliprange_value=0.2
    ).loss.backward()
    torch.testing.assert_close(d.grad, torch.cat([c.grad, torch.zeros(2, 2)], 1), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("value", "old", "ret", "loss", "slope"),
    [
        (1.0, 1.0, 3.0, 2.0, -2.0),
        (1.1, 1.0, 3.0, 0.5 * 1.9**2, -1.9),
        (2.0, 1.0, 3.0, 0.5 * 1.8**2, 0.0),  # moved past 1.2: no further reward for it
        (0.0, 1.0, 3.0, 4.5, -3.0),  # moved the wrong way: full error
    ],
)
def test_value_loss_and_its_gradient_by_hand(
    value: float, old: float, ret: float, loss: float, slope: float
) -> None:
    values = T([[value]], requires_grad=True)
    got = o.value_loss(
        values, T([[old]]), T([[ret]]), torch.ones(1, 1, dtype=torch.bool), cliprange_value=0.2
    )
    got.loss.backward()
    assert got.loss.item() == pytest.approx(loss) and values.grad.item() == pytest.approx(slope)
    assert o.value_means(got.sums) == pytest.approx(
        {"loss/value_avg": loss, "val/clipfrac_avg": float(slope == 0)}
    )


def test_any_micro_batching_and_ranks_give_the_same_gradient_and_means() -> None:
    torch.manual_seed(0)
    mask = mask_of(5, 1, 3, 2)
    new, old, advantages = (torch.randn(3, 4, 5, dtype=torch.float64) * 0.3).unbind()

    def gradient(parts: list[list[int]]) -> tuple[Tensor, list[o.PolicySums]]:
        leaf, sums = new.clone().requires_grad_(), []
        for rows in parts:
            got = o.policy_loss(leaf[rows], old[rows], advantages[rows], mask[rows], **LOSS)
            (got.loss / mask.sum()).backward()
            sums.append(got.sums)
        return leaf.grad, sums

    whole, whole_sums = gradient([[0, 1, 2, 3]])
    split, split_sums = gradient([[0], [1, 3], [2]])
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-12)
    want = o.policy_means(o.total_sums(whole_sums, alone))
    for got in Ranks(2).run(
        lambda rank, all_reduce: o.policy_means(
            o.total_sums([split_sums[:2], split_sums[2:]][rank], all_reduce)
        )
    ):
        assert got == pytest.approx(want, rel=1e-12)


def test_kl_stop_is_one_decision_for_all_ranks() -> None:
    def sums(ratio: float, tokens: int) -> o.PolicySums:
        return policy_loss_of([ratio] * tokens, [1.0] * tokens)[0].sums

    # approxkl 0 over 3 tokens, 0.2402 over 1: 0.06 over all
    calm, wild = sums(1.0, 3), sums(2.0, 1)
    for limit, want in ((0.05, [True, True]), (0.07, [False, False]), (None, [False, False])):
        assert (
            Ranks(2).run(
                lambda rank, all_reduce, limit=limit: o.kl_stop(
                    (calm, wild)[rank], limit, all_reduce
                )
            )
            == want
        )


# Schedules and running statistics


def rates(schedule: Any, warmup: int = 0, steps: int = 5) -> list[float]:
    return [
        o.learning_rate(s, steps=steps, peak=1.0, schedule=schedule, warmup_steps=warmup)
        for s in range(steps)
    ]


def test_learning_rates_by_hand() -> None:
    assert rates("constant") == [1.0] * 5
    assert rates("linear") == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates("linear", warmup=2) == pytest.approx([1 / 3, 2 / 3, 1.0, 2 / 3, 1 / 3])
    assert rates("cosine", steps=4) == pytest.approx(
        [1.0, 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4]
    )
    assert rates("linear", warmup=9) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_running_sd_equals_that_of_all_values_at_once_and_survives_json() -> None:
    values = (1e6 + torch.randn(100, dtype=torch.float64)).tolist()
    running = o.RunningSd()
    for start, stop in ((0, 1), (1, 40), (40, 40), (40, 100)):
        running = running.updated(T(values[start:stop], dtype=torch.float64), alone)
        running = o.RunningSd(**json.loads(json.dumps(running._asdict())))
    assert running.sd == pytest.approx(statistics.stdev(values), rel=1e-9) and running.n == 100


def test_running_sd_over_ranks_is_the_same_everywhere() -> None:
    values = T([1.0, 2.0, 4.0, 8.0])
    by_rank = Ranks(2).run(
        lambda rank, all_reduce: o.RunningSd().updated(values[2 * rank : 2 * rank + 2], all_reduce)
    )
    assert by_rank[0] == by_rank[1] and by_rank[0].sd == pytest.approx(
        statistics.stdev([1, 2, 4, 8])
    )


def test_running_sd_is_one_until_values_differ_and_scaled_rewards_are_cut() -> None:
    assert (
        o.RunningSd().sd
        == o.RunningSd().updated(T([3.0]), alone).sd
        == o.RunningSd().updated(T([3.0, 3.0]), alone).sd
        == 1.0
    )
    assert o.scaled_rewards(T([1.0, -30.0]), 2.0, 10.0).tolist() == [0.5, -10.0]
    assert o.scaled_rewards(T([1.0, -30.0]), 2.0, None).tolist() == [0.5, -15.0]


def _gloo_rank(rank: int, meeting: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
    )
    mine = T([1.0 + rank, 10.0])
    total = o.sum_over_ranks(mine)
    Path(f"{out}{rank}").write_text(json.dumps([total.tolist(), mine.tolist()]))
    torch.distributed.destroy_process_group()


def test_sum_over_ranks_of_two_gloo_processes_leaves_its_argument(tmp_path: Path) -> None:
    assert o.sum_over_ranks(T([1.0])).tolist() == [1.0]
    mp.spawn(_gloo_rank, args=(str(tmp_path / "meeting"), str(tmp_path / "out")), nprocs=2)
    assert json.loads((tmp_path / "out0").read_text()) == [[3.0, 20.0], [1.0, 10.0]]
    assert json.loads((tmp_path / "out1").read_text()) == [[3.0, 20.0], [2.0, 10.0]]


def logprob_kernels_agree(device: str) -> None:
    """A vocabulary that is no multiple of a program's width, two temperatures."""
    from sarm.ppo.learner import logprob_kernels

    torch.manual_seed(0)
    logits, labels = 5 * torch.randn(6, 5000), torch.tensor([0, 4999, 17, 4096, 4095, 2500])
    grad = torch.randn(6)
    for temperature in (1.0, 0.7):
        expected = logits.clone().requires_grad_()
        log_p = torch.log_softmax(expected / temperature, -1)
        chosen = log_p[torch.arange(6), labels]
        chosen.backward(grad)
        logprobs, entropy, log_sum = logprob_kernels.statistics(
            logits.to(device), labels.to(device), temperature
        )
        torch.testing.assert_close(logprobs.cpu(), chosen.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            entropy.cpu(), -(log_p.exp() * log_p).sum(-1).detach(), rtol=1e-5, atol=1e-5
        )
        ours = logprob_kernels.gradient(
            logits.clone().to(device), labels.to(device), log_sum, grad.to(device), temperature
        )
        torch.testing.assert_close(ours.cpu(), expected.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_the_logprob_kernels() -> None:
    logprob_kernels_agree("cuda")


def test_the_interpreted_logprob_kernels() -> None:
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-c",
        "from tests.ppo.test_objective import logprob_kernels_agree; logprob_kernels_agree('cpu')",
    ]
    subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True, timeout=240
    )
