"""Log-probabilities and their gradient from a chunk of logits, one pass each, imported only where
they run.

`TRITON_INTERPRET=1 python -m pytest tests/llama/test_logprobs.py` compares them with plain torch.
Notation: n rows, v the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDE = 4096
"""Logits of a row that a program takes at a time."""


@triton.jit
def _statistics(logits, labels, logprobs, entropy, log_sum, v, inverse, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    highest, total, weighted = -float("inf"), 0.0, 0.0
    for start in range(0, v, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * v + at, at < v, 0.0).to(tl.float32) * inverse
        new = tl.maximum(highest, tl.max(tl.where(at < v, x, -float("inf")), 0))
        e = tl.where(at < v, tl.exp(x - new), 0.0)
        shrink = tl.exp(highest - new)
        total = total * shrink + tl.sum(e, 0)
        weighted = weighted * shrink + tl.sum(e * x, 0)
        highest = new
    found = highest + tl.log(total)
    chosen = tl.load(logits + row * v + tl.load(labels + row)).to(tl.float32) * inverse
    tl.store(logprobs + row, chosen - found)
    tl.store(entropy + row, found - weighted / total)
    tl.store(log_sum + row, found)


@triton.jit
def _gradient(
    logits,
    labels,
    log_sum,
    grad,
    entropy,
    grad_entropy,
    v,
    inverse,
    BLOCK: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * v + at, at < v, 0.0).to(tl.float32) * inverse
    log_p = x - tl.load(log_sum + row)
    d = (
        (tl.where(at == tl.load(labels + row), 1.0, 0.0) - tl.exp(log_p))
        * tl.load(grad + row)
        * inverse
    )
    if ENTROPY:
        d -= (
            tl.exp(log_p) * (log_p + tl.load(entropy + row)) * tl.load(grad_entropy + row) * inverse
        )
    tl.store(logits + row * v + at, d.to(logits.dtype.element_ty), at < v)


def statistics(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability of the label, entropy, log of the sum of exponentials) of logits (n, v) /
    temperature, each (n,) float32.
    """
    n, v = logits.shape
    found = tuple(torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(3))
    _statistics[(n,)](logits, labels, *found, v, 1 / temperature, WIDE, num_warps=8)
    return found[0], found[1], found[2]


def gradient(
    logits: Tensor,
    labels: Tensor,
    log_sum: Tensor,
    grad: Tensor,
    temperature: float,
    of_entropy: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """(n, v): (onehot(label) - softmax) · grad / temperature, in the place of the logits; `grad`
    (n,) float32.

    With `of_entropy`, the entropy H and its gradient, both (n,) float32: besides, -softmax · (log
    softmax + H) · that gradient / temperature.
    """
    n, v = logits.shape
    entropy, grad_entropy = of_entropy or (log_sum, grad)  # not read without
    _gradient[(n, triton.cdiv(v, WIDE))](
        logits,
        labels,
        log_sum,
        grad.contiguous(),
        entropy,
        grad_entropy.contiguous(),
        v,
        1 / temperature,
        WIDE,
        of_entropy is not None,
        num_warps=8,
    )
    return logits
