"""The compact AdamW: the way it goes against float32 AdamW's, its codes on average, and the kernel
against plain torch.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.optimizer import Shadow
from sarm.philox import ROUNDING, random_words
from sarm.ppo.learner import optimizer
from sarm.ppo.learner.distributed import World
from sarm.ppo.learner.optimizer import (
    BLOCK,
    CompactAdamW,
    Rates,
    State,
    _blocks,
    compacted,
    expanded,
    joined,
    power_of_two_above,
    update_plainly,
)
from tests.ranks import PlantedReward, run_interpreted, tiny_ppo, tiny_trainer


def gradients(step: int, n: int) -> Tensor:
    """Noisy, with a drift, over four orders of magnitude between neighbours, bf16."""
    size = 10.0 ** -(torch.arange(n) % 5).float()
    drift = torch.randn(n, generator=torch.Generator().manual_seed(1))
    return (
        size * (0.3 * drift + torch.randn(n, generator=torch.Generator().manual_seed(100 + step)))
    ).bfloat16()


def test_to_float32_and_back_the_weight_is_kept_to_the_bit_and_the_moments_to_a_code() -> None:
    n = 3 * BLOCK + 17
    weight = 0.3 * torch.randn(n, generator=torch.Generator().manual_seed(0))
    mean = gradients(0, n).float()
    square = (gradients(1, n).float() ** 2 + mean**2) / 2 + 1e-8  # within the range of codes
    kept, state = compacted(weight, mean, square, torch.bfloat16)
    assert kept.dtype == torch.bfloat16 and torch.equal(kept, weight.bfloat16())
    found = expanded(kept, state)
    assert torch.equal(found.weight, weight)
    # Codes of the second moment lie 9 % apart, those of the first a 127th of their block's largest
    # ratio.
    assert float((found.exp_avg_sq / square - 1).abs().max()) < 0.046
    ratio = mean / found.exp_avg_sq.sqrt()
    worst = (found.exp_avg / found.exp_avg_sq.sqrt() - ratio).abs()
    assert float((_blocks(worst) / _blocks(ratio.abs()).amax(1, keepdim=True)).max()) < 0.51 / 127
    again = expanded(*compacted(*found, torch.bfloat16))
    assert torch.equal(again.exp_avg_sq, found.exp_avg_sq) and torch.allclose(
        again.exp_avg, found.exp_avg, rtol=1e-5
    )
    plain, state = compacted(weight, mean, square, torch.float32)
    assert (
        torch.equal(plain, weight)
        and len(state.low) == 0
        and torch.equal(expanded(plain, state).weight, weight)
    )


@pytest.mark.parametrize("lr", [1e-6, 1e-4])
def test_a_hundred_steps_go_where_float32_masters_go(lr: float) -> None:
    n = 40_000
    start = (0.3 * torch.randn(n, generator=torch.Generator().manual_seed(0))).bfloat16()
    ours, master = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    compact, plain = (
        CompactAdamW([ours], lr=lr),
        torch.optim.AdamW([master], lr=lr, weight_decay=0.0),
    )
    for step in range(100):
        ours.grad = gradients(step, n)
        master.grad = ours.grad.float()
        compact.step()
        plain.step()
    a, b = compact.master(ours) - start.float(), master.detach() - start.float()
    assert float(torch.cosine_similarity(a, b, dim=0)) > 0.97
    assert float(a.norm() / b.norm()) == pytest.approx(1, abs=0.03)
    for size in range(5):  # weights with small gradients as well as those with large ones
        some = torch.arange(n) % 5 == size
        assert float(torch.cosine_similarity(a[some], b[some], dim=0)) > 0.96
    exact = compact.master(ours)  # to which what the model uses is the nearest bf16 number
    assert torch.equal(
        (ours.detach().float() - exact).abs(), (exact.bfloat16().float() - exact).abs()
    )


def test_float32_weights_have_no_lower_bits() -> None:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
    other = torch.nn.Parameter(weight.detach().clone())
    compact, plain = (
        CompactAdamW([weight], lr=0.01, weight_decay=0.1),
        torch.optim.AdamW([other], lr=0.01, weight_decay=0.1),
    )
    weight.grad = torch.randn(1000)
    other.grad = weight.grad.clone()
    compact.step()
    plain.step()
    torch.testing.assert_close(weight, other)  # the first step sees no rounding yet
    assert compact.state[weight]["low"].numel() == 0


def test_the_scale_multiplies_gradients() -> None:
    a, b = (torch.nn.Parameter(torch.ones(300)) for _ in range(2))
    one, two = CompactAdamW([a], lr=0.01, eps=1e-2), CompactAdamW([b], lr=0.01, eps=1e-2)
    a.grad = torch.randn(300)
    b.grad = a.grad * 0.25
    one.step(scale=torch.tensor(0.25))
    two.step()
    assert torch.equal(a, b)


def test_moments_are_right_on_average_where_a_step_is_far_smaller_than_a_code() -> None:
    """A second moment that grows by a thousandth a step, between codes 9 % apart."""
    n, steps = 50_000, 200
    weight = torch.nn.Parameter(torch.zeros(n))
    compact = CompactAdamW([weight], lr=0.0)
    for _ in range(steps):
        weight.grad = torch.ones(n)
        compact.step()
    state = State(*(compact.state[weight][field] for field in State._fields))
    square = optimizer.decoded_square(state).double()
    assert float(square.mean()) == pytest.approx(1 - 0.999**steps, rel=0.01)
    assert float(square.std() / square.mean()) < 0.2
    mean = (optimizer.decoded_ratio(state) * optimizer.decoded_square(state).sqrt()).double()
    assert float(mean.mean()) == pytest.approx(1 - 0.9**steps, rel=0.01)


def test_steps_far_below_a_bf16_number_are_not_lost() -> None:
    """A hundred steps of a 2,000th of the distance between neighbours."""
    weight = torch.nn.Parameter(torch.full((1000,), 0.3, dtype=torch.bfloat16))
    start, compact = weight.detach().float(), CompactAdamW([weight], lr=1e-6)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        compact.step()
    moved = compact.master(weight) - start
    assert float(moved.mean()) == pytest.approx(-1e-4, rel=0.02)
    assert float(moved.std()) < 0.1e-4  # what the codes of the moments leave


def test_powers_of_two() -> None:
    x = torch.tensor([0.0, 1.0, 0.99, 3e-20, 2.0**-60])
    assert power_of_two_above(x).tolist() == [
        0.0,
        2.0,
        1.0,
        2.0 ** math.ceil(math.log2(3e-20)),
        2.0**-59,
    ]


def test_the_noise_is_even_and_new_each_step() -> None:
    a, b = (
        random_words(100_000, 12345, ROUNDING, torch.device("cpu")),
        random_words(100_000, 12346, ROUNDING, torch.device("cpu")),
    )
    for x in (a >> 18, a >> 8 & 1023):
        top = int(x.max()) + 1
        assert float(x.double().mean() / top) == pytest.approx(0.5, abs=0.005)
    assert abs(float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])) < 0.01
    assert (
        abs(
            float(torch.corrcoef(torch.stack([(a >> 18).double(), (a >> 8 & 1023).double()]))[0, 1])
        )
        < 0.01
    )


def kernel_agrees(device: str) -> None:
    """Three steps of each from the same state; a code may differ by one where the chance was a
    rounding error away.
    """
    from sarm.ppo.learner.optimizer_kernel import update

    for n, dtype in (
        (5 * BLOCK + 17, torch.bfloat16),
        (100, torch.float32),
        (4 * BLOCK, torch.bfloat16),
    ):
        torch.manual_seed(n)
        weight = (0.05 * torch.randn(n)).to(device, dtype)
        other = weight.clone()
        mine, theirs = (optimizer._zero_state(weight) for _ in range(2))
        for t in range(1, 4):
            grad = gradients(t, n).to(device, dtype)
            grad[: BLOCK if n > 100 else 0] = 0.0
            rates = Rates(
                1e-3,
                0.999,
                0.9,
                0.999,
                1e-8,
                1 - 0.9**t,
                1 - 0.999**t,
                0x9E3779B97F4A7C15 * t % 2**64 - 2**63,
            )
            scale = torch.tensor(0.5, device=device)
            update_plainly(weight, grad, mine, rates, scale)
            update(other, grad, theirs, rates, scale)
            apart = _blocks((mine.exp_avg_sq.int() - theirs.exp_avg_sq.int()).abs())
            assert int(apart.max()) <= 1 and int(apart.sum()) <= 3
            assert torch.equal(mine.exp_avg_sq_top, theirs.exp_avg_sq_top)
            alike = apart.amax(1) == 0  # another code of the second moment makes another ratio
            torch.testing.assert_close(
                mine.exp_avg_scale[alike], theirs.exp_avg_scale[alike], rtol=1e-5, atol=0
            )
            apart = _blocks((mine.exp_avg_ratio.int() - theirs.exp_avg_ratio.int()).abs())[alike]
            assert int(apart.max()) <= 1 and int(apart.sum()) <= 3
            full = (
                (joined(weight, mine.low), joined(other, theirs.low))
                if dtype == torch.bfloat16
                else (weight, other)
            )
            torch.testing.assert_close(*full, rtol=1e-4, atol=1e-7)
            for a, b in zip(mine, theirs, strict=True):
                b.copy_(a)
            other.copy_(weight)


@pytest.mark.gpu
def test_the_kernel_is_the_plain_step() -> None:
    kernel_agrees("cuda")


def test_the_interpreted_kernel_is_the_plain_step() -> None:
    run_interpreted("from tests.ppo.test_optimizer import kernel_agrees; kernel_agrees('cpu')")


def test_ppo_goes_where_float32_masters_go(tiny_policy: Path) -> None:
    """Thirty PPO steps of the tiny policy in bf16, at a learning rate far below a bf16 step."""
    steps = 30
    trainer = tiny_trainer(
        World(device="cuda" if torch.cuda.is_available() else "cpu"),
        tiny_policy,
        PlantedReward(),
        tiny_ppo(steps=steps, weights="compact", learning_rate=1e-6),
        dtype="bfloat16",
    )
    shadow = Shadow(trainer)
    for _ in range(steps):
        trainer.run_step()
    cosine, norms, rounded = shadow.compared()
    assert cosine > 0.998 and norms == pytest.approx(1, abs=0.01)
    assert rounded < 0.9  # so that bf16 alone would not have passed
