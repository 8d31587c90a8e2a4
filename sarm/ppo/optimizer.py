"""AdamW on bf16 weights without a float32 copy: the new weights are rounded up or down at random, right on average.

At a learning rate of 1e-6 an Adam step is far smaller than a bf16 step of most weights, so rounding to the nearest
would leave them where they are. Used for `ppo.weights: stochastic_rounding`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """bf16 of float32 `x`: the next value below or above in magnitude, with chances that make the mean x."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    # bf16 is the upper half of float32: a carry out of the lower half happens with the right chance.
    return ((x.contiguous().view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) whose moments are float32 and whose bf16 weights are rounded stochastically.

    The noise depends on the seed, the rank, the tensor and its step count, so a resumed run repeats it.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for index, group in enumerate(self.param_groups):
            for at, weight in enumerate(group["params"]):
                if weight.grad is not None:
                    self._step(weight, group, self.seed + 1_000_003 * index + 7919 * at)

    def _step(self, weight: Tensor, group: dict[str, Any], seed: int) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(weight, dtype=torch.float32) for _ in range(2))
        beta1, beta2 = group["betas"]
        state["step"] += 1
        t, grad = int(state["step"]), weight.grad.float()  # type: ignore[union-attr]
        mean = state["exp_avg"].lerp_(grad, 1 - beta1) / (1 - beta1**t)
        square = state["exp_avg_sq"].lerp_(grad.square(), 1 - beta2) / (1 - beta2**t)
        moved = weight.float() * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * mean / (square.sqrt() + group["eps"])
        if weight.dtype == torch.bfloat16:
            generator = torch.Generator(weight.device).manual_seed(seed * 1_000_000_007 + t)
            weight.copy_(round_stochastically(moved, generator))
        else:
            weight.copy_(moved)
