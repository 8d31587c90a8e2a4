"""AdamW in eight bytes per parameter: bf16 weights and their lower halves, 8-bit moments, a bf16
gradient. For `ppo.weights: compact`.

Float32 master weights and moments beside bf16 weights and float32 gradients take eighteen, 145 GB
for an 8 B model. `benchmarks/optimizer.py` measures how little is lost.

Weights. At a learning rate of 1e-6 a step is less than a hundredth of the distance between
neighbouring bf16 numbers. Rounding bf16 weights stochastically moves them right on average, but
after a hundred steps the noise is larger than the way they went; eight bits more are enough for
small weights only. So the float32 weight is kept, in two halves: the upper 16 bits of its pattern
are the bf16 weight that the model uses (rounded to the nearest), the lower 16 lie beside it.

Second moment. An update changes it by a thousandth, its 256 codes lie 9 % apart: 2**(k/8), over a
range of 2**32 below the power of two above the block's largest. Codes are rounded stochastically,
so that small changes are kept on average, and because the grid does not depend on the block, a
change of its range costs no further rounding.

First moment. It is stored as its ratio to the root of the second, linearly, in units of the block's
largest. This ratio is what Adam's step consists of, so the error is an error of the step, the same
for weights with small gradients as for those with large ones.

The noise is keyed by the seed, the tensor, its step count and the element, so that a resumed run
repeats it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sarm.philox import ROUNDING, random_words

BLOCK = 256
"""Neighbouring elements that share a scale."""
CODES_PER_OCTAVE = 8
OCTAVE_STEP = 2 ** (1 / CODES_PER_OCTAVE) - 1


class State(NamedTuple):
    """Of n elements in m = ceil(n / BLOCK) blocks."""

    low: Tensor
    """(n,) int16: the float32 pattern's signed distance from the bf16 weight's; empty for float32
    weights.
    """
    exp_avg_ratio: Tensor
    """(n,) int8: first moment / root of the second, in units of the scale."""
    exp_avg_scale: Tensor
    """(m,) float32."""
    exp_avg_sq: Tensor
    """(n,) uint8: the second moment is top * 2**((code - 255) / CODES_PER_OCTAVE)."""
    exp_avg_sq_top: Tensor
    """(m,) float32: a power of two above the largest, 0 where all are 0."""


class Rates(NamedTuple):
    """One step's numbers."""

    lr: float
    decay: float
    """What is left of a weight: 1 - lr * weight_decay."""
    beta1: float
    beta2: float
    eps: float
    bias1: float
    """1 - beta1**t."""
    bias2: float
    key: int
    """Of the step's noise, 64 bits, signed."""


class CompactAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) on bf16 or float32 weights. All ranks that step the same weights
    give the same `seed`.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.seed = seed

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, scale: Tensor | None = None
    ) -> None:
        """`scale` (), where given, multiplies every gradient: clipping without another pass over
        them.
        """
        for index, group in enumerate(self.param_groups):
            for at, weight in enumerate(group["params"]):
                if weight.grad is not None:
                    self._step(
                        weight,
                        group,
                        f"{self.seed}/{index}/{at}",
                        torch.ones((), device=weight.device) if scale is None else scale,
                    )

    def _step(self, weight: Tensor, group: dict[str, Any], name: str, scale: Tensor) -> None:
        kept = self.state[weight]
        if not kept:
            kept |= {"step": torch.tensor(0.0), **_zero_state(weight)._asdict()}
        kept["step"] += 1
        t, (beta1, beta2) = int(kept["step"]), group["betas"]
        digest = hashlib.sha256(f"{name}/{t}".encode()).digest()
        rates = Rates(
            group["lr"],
            1 - group["lr"] * group["weight_decay"],
            beta1,
            beta2,
            group["eps"],
            1 - beta1**t,
            1 - beta2**t,
            int.from_bytes(digest[:8], "little", signed=True),
        )
        state = State(*(kept[field] for field in State._fields))
        grad = weight.grad.contiguous()  # type: ignore[union-attr]
        if weight.device.type == "cuda":
            from sarm.ppo.learner.optimizer_kernel import update
        else:
            update = update_plainly
        update(weight.detach().view(-1), grad.view(-1), state, rates, scale)

    def master(self, weight: Tensor) -> Tensor:
        """A weight as the optimizer knows it, float32."""
        state = self.state[weight]
        if weight.dtype != torch.bfloat16 or not state:
            return weight.detach().float()
        return joined(weight.detach().flatten(), state["low"]).view_as(weight)


def _zero_state(weight: Tensor) -> State:
    n, device = weight.numel(), weight.device
    blocks = -(-n // BLOCK)
    return State(
        torch.zeros(n if weight.dtype == torch.bfloat16 else 0, dtype=torch.int16, device=device),
        torch.zeros(n, dtype=torch.int8, device=device),
        torch.zeros(blocks, device=device),
        torch.zeros(n, dtype=torch.uint8, device=device),
        torch.zeros(blocks, device=device),
    )


# --- one tensor's step, in plain torch: what the kernel computes
# ------------------------------------------------------


def update_plainly(weight: Tensor, grad: Tensor, state: State, rates: Rates, scale: Tensor) -> None:
    """Step `weight` (n,) and its state in place."""
    n = len(weight)
    noise = random_words(n, rates.key, ROUNDING, weight.device)
    g = grad.float() * scale
    square = decoded_square(state)
    mean = decoded_ratio(state) * square.sqrt()
    mean += (1 - rates.beta1) * (g - mean)
    square += (1 - rates.beta2) * (g * g - square)
    moved = joined(weight, state.low) if len(state.low) else weight
    moved = moved * rates.decay - rates.lr * (mean / rates.bias1) / (
        (square / rates.bias2).sqrt() + rates.eps
    )

    _store(
        moved,
        mean,
        square,
        weight,
        state,
        (noise >> 18).float() * 2.0**-14,
        (noise >> 8 & 1023).float() * 2.0**-10,
    )


def _store(
    moved: Tensor,
    mean: Tensor,
    square: Tensor,
    weight: Tensor,
    state: State,
    noise_square: Tensor,
    noise_ratio: Tensor,
) -> None:
    """Write a float32 weight and its moments into `weight` and `state`; the noise, in [0, 1), says
    which way each is rounded.
    """
    n = len(weight)
    top = power_of_two_above(_blocks(square).amax(1))
    state.exp_avg_sq_top.copy_(top)
    state.exp_avg_sq.copy_(
        _square_codes(_blocks(square), top[:, None], _blocks(noise_square)).flatten()[:n]
    )
    root = decoded_square(state).sqrt()
    ratio = _blocks(torch.where(root > 0, mean / root, 0.0))
    unit = ratio.abs().amax(1) / 127
    codes = torch.where(unit[:, None] > 0, ratio / unit[:, None], 0.0) + _blocks(noise_ratio)
    state.exp_avg_scale.copy_(unit)
    state.exp_avg_ratio.copy_(codes.floor().clamp(-127, 127).flatten()[:n])
    if len(state.low):
        bits = moved.view(torch.int32)
        upper = (bits + 0x8000) >> 16
        weight.copy_((upper << 16).view(torch.float32))
        state.low.copy_(bits - (upper << 16))
    else:
        weight.copy_(moved)


# --- from and to float32, for a run that goes on with another kind of AdamW
# -------------------------------------------


class Expanded(NamedTuple):
    """(n,) float32 each: what AdamW keeps."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def expanded(weight: Tensor, state: State) -> Expanded:
    """The float32 weight and moments that `weight` (n,) and its state stand for."""
    square = decoded_square(state)
    return Expanded(
        joined(weight, state.low) if len(state.low) else weight.float(),
        decoded_ratio(state) * square.sqrt(),
        square,
    )


def compacted(
    weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, dtype: torch.dtype
) -> tuple[Tensor, State]:
    """A float32 weight (n,) and its moments as `CompactAdamW` keeps them: the weight to the bit,
    the moments rounded to the nearest code.
    """
    kept = torch.empty_like(weight, dtype=dtype)
    state = _zero_state(kept)
    half = torch.full_like(weight, 0.5)
    _store(weight, exp_avg, exp_avg_sq, kept, state, half, half)
    return kept, state


def joined(weight: Tensor, low: Tensor) -> Tensor:
    """(n,) float32 of bf16 weights and their lower halves."""
    return ((weight.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def decoded_square(state: State) -> Tensor:
    """(n,) float32."""
    n = len(state.exp_avg_sq)
    return (
        torch.exp2((_blocks(state.exp_avg_sq.float()) - 255) / CODES_PER_OCTAVE)
        * state.exp_avg_sq_top[:, None]
    ).flatten()[:n]


def decoded_ratio(state: State) -> Tensor:
    """(n,) float32."""
    return (_blocks(state.exp_avg_ratio.float()) * state.exp_avg_scale[:, None]).flatten()[
        : len(state.exp_avg_ratio)
    ]


def _square_codes(square: Tensor, top: Tensor, noise: Tensor) -> Tensor:
    """Codes of `square`: the one below or the one above, with chances that make the mean right;
    the lowest at least.
    """
    top_or_1 = torch.where(top > 0, top, 1.0)
    below = (
        ((square / top_or_1).clamp(min=1e-30).log2() * CODES_PER_OCTAVE + 255).floor().clamp(0, 254)
    )
    level = torch.exp2((below - 255) / CODES_PER_OCTAVE) * top_or_1
    codes = below + (noise < (square / level - 1) / OCTAVE_STEP).float()
    return torch.where(top > 0, codes, 0.0)


def power_of_two_above(x: Tensor) -> Tensor:
    """The next power of two above `x` >= 0, float32; 0 for 0."""
    bits = (x.view(torch.int32) & 0x7F800000) + 0x00800000
    return torch.where(x > 0, bits.view(torch.float32), 0.0)


def _blocks(x: Tensor) -> Tensor:
    """(m, BLOCK), padded with 0."""
    return F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
