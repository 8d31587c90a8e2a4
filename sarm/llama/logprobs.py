"""Log-probabilities of given tokens, and the entropy beside them, without the logits of a whole
batch.

`python -m pytest tests/llama/test_logprobs.py` compares both and their gradients with a plain
log-softmax. Notation: n tokens, d_model the hidden size, v the vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IN_CACHE = 1 << 18
"""Logits that a CPU takes through all steps of the softmax at once, of 4 bytes each."""


class TokenLogprobs(NamedTuple):
    logprobs: Tensor
    """(b, t) float32, of the labels, with gradient."""
    entropy: Tensor
    """(b, t) float32, of the whole distribution; with gradient only where asked for."""


def logprobs_from_hidden(
    hidden: Tensor,
    lm_head: nn.Linear,
    labels: Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
    *,
    entropy_grad: bool = False,
) -> TokenLogprobs:
    """Log-probabilities of `labels` (b, t) under softmax(lm_head(hidden) / temperature), `hidden`
    (b, t, d_model).

    Works `chunk` tokens at a time, so at most (chunk, v) logits exist, forwards or backwards: by
    default 1,024 on a CPU and 4,096 on a GPU, where they stay in the head's dtype. Any leading
    shape will do: pass `hidden[mask]` (n, d_model) and `labels[mask]` (n,) to spend nothing on
    padding. Labels lie in [0, v) everywhere, padding included. `entropy_grad` costs a second
    product with a frozen head, and nothing with a trained one. Reads `lm_head.weight` and `.bias`
    without calling the module, so under ZeRO-3 the calling module registers them as external
    parameters.
    """
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    size = chunk or (4096 if hidden.is_cuda else 1024)
    logprobs, entropy = _ChunkedLogprobs.apply(
        flat,
        lm_head.weight,
        lm_head.bias,
        flat_labels,
        temperature,
        size,
        torch.is_grad_enabled(),
        entropy_grad,
    )
    return TokenLogprobs(logprobs.view(labels.shape), entropy.view(labels.shape))


class _ChunkedLogprobs(torch.autograd.Function):
    """With p the softmax and H its entropy,

        d logprob / d logits = (onehot - p) / temperature
        d H       / d logits = -p (log p + H) / temperature

    so a chunk's logits need not be kept. With a frozen head (LoRA) the forward pass keeps each of
    these times W, (n, d_model), and backward is one multiplication each. With a trained head
    backward computes each chunk's logits again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float,
        chunk: int,
        with_grad: bool,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        head_trained = with_grad and (
            weight.requires_grad or (bias is not None and bias.requires_grad)
        )
        keep_slopes = with_grad and hidden.requires_grad and not head_trained
        logprobs, entropy, log_sum = (
            torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(3)
        )
        slopes = [torch.empty_like(hidden) for _ in range((1 + entropy_grad) if keep_slopes else 0)]
        for at in range(0, len(hidden), chunk):
            part = slice(at, at + chunk)
            logits = F.linear(hidden[part].to(weight.dtype), weight, bias)
            in_place = len(slopes) == 1 and not logits.is_cuda
            logprobs[part], entropy[part], log_sum[part] = _statistics(
                logits, labels[part], temperature, in_place
            )
            if in_place:
                slopes[0][part] = (logits @ weight).to(hidden.dtype)
                continue
            for which, slope in reversed(list(enumerate(slopes))):
                # The last of them may take the logits' place.
                kept = logits.clone() if which else logits
                ones, zeros = torch.ones_like(log_sum[part]), torch.zeros_like(log_sum[part])
                of_entropy = (entropy[part], ones) if which else None
                d_logits = _d_logits(
                    kept,
                    labels[part],
                    log_sum[part],
                    zeros if which else ones,
                    temperature,
                    of_entropy,
                )
                slope[part] = (d_logits @ weight).to(slope.dtype)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.keep_slopes, ctx.entropy_grad = keep_slopes, entropy_grad
        kept_states = (hidden, weight, bias, labels, log_sum, entropy)
        ctx.save_for_backward(*(slopes if keep_slopes else kept_states if with_grad else ()))
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5
        if ctx.keep_slopes:
            grads = (grad, grad_entropy) if ctx.entropy_grad else (grad,)
            first, *more = (
                g[:, None] * s.float() for g, s in zip(grads, ctx.saved_tensors, strict=True)
            )
            d_hidden = sum(more, first).to(ctx.saved_tensors[0].dtype)
            return d_hidden, None, None, *nothing
        hidden, weight, bias, labels, log_sum, entropy = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if want_hidden else None
        d_weight: Tensor | None = None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if want_bias else None
        for at in range(0, len(hidden), ctx.chunk):
            part = slice(at, at + ctx.chunk)
            states = hidden[part].to(weight.dtype)
            d_logits = _d_logits(
                F.linear(states, weight, bias),
                labels[part],
                log_sum[part],
                grad[part],
                ctx.temperature,
                (entropy[part], grad_entropy[part]) if ctx.entropy_grad else None,
            )
            if d_hidden is not None:
                d_hidden[part] = (d_logits @ weight).to(hidden.dtype)
            if want_weight and len(hidden) <= ctx.chunk:
                d_weight = d_logits.T @ states
            elif want_weight:  # added up in float32
                d_weight = (
                    torch.zeros_like(weight, dtype=torch.float32) if d_weight is None else d_weight
                )
                d_weight += d_logits.T @ states
            if d_bias is not None:
                d_bias += d_logits.float().sum(0)
        return d_hidden, _like(d_weight, weight), _like(d_bias, bias), *nothing


def _statistics(
    logits: Tensor, labels: Tensor, temperature: float, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(label's log-probability, entropy, log of the sum of exponentials), each (chunk,) float32,
    of logits (chunk, v) / temperature.

    `in_place`, on a CPU: where the logits were, the first one's gradient by them is then.
    """
    if logits.is_cuda:
        from sarm.llama import logprob_kernels

        return logprob_kernels.statistics(logits, labels, temperature)
    logprobs, entropy, log_sum = (torch.empty(len(logits), dtype=torch.float32) for _ in range(3))
    rows = max(1, IN_CACHE // logits.shape[1])
    for at in range(0, len(logits), rows):
        part = slice(at, at + rows)
        label, x = labels[part, None], logits[part].to(torch.float32, copy=True)
        if temperature != 1:
            x /= temperature
        most = x.amax(1, keepdim=True)
        x -= most
        p = x.exp()
        total = p.sum(1, keepdim=True)
        log_total = total.log()
        logprobs[part] = (x.gather(1, label) - log_total).squeeze(1)
        mean = torch.bmm(p[:, None], x[..., None]).squeeze(2) / total
        entropy[part] = (log_total - mean).squeeze(1)
        log_sum[part] = (most + log_total).squeeze(1)
        if in_place:
            d = p.mul_(-1 / (temperature * total))
            logits[part] = d.scatter_add_(1, label, torch.full_like(most, 1 / temperature))
    return logprobs, entropy, log_sum


def _d_logits(
    logits: Tensor,
    labels: Tensor,
    log_sum: Tensor,
    grad: Tensor,
    temperature: float,
    of_entropy: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """(chunk, v) in the logits' dtype and, on a GPU, in their place: (onehot(labels) - softmax) ·
    grad / temperature; with `of_entropy`, the entropy and its gradient (chunk,), that one's part
    besides.
    """
    if logits.is_cuda:
        from sarm.llama import logprob_kernels

        return logprob_kernels.gradient(logits, labels, log_sum, grad, temperature, of_entropy)
    log_p = (logits.float() / temperature).sub_(log_sum[:, None])
    part = None
    if of_entropy is None:
        p = log_p.exp_()
    else:
        p = log_p.exp()
        entropy, grad_entropy = (x[:, None] for x in of_entropy)
        part = p * (log_p + entropy) * (grad_entropy / temperature)
    d = p.neg_().scatter_add_(1, labels[:, None], torch.ones_like(labels[:, None], dtype=p.dtype))
    d = d * (grad[:, None] / temperature)
    return (d if part is None else d - part).to(logits.dtype)


def _like(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if grad is None or parameter is None else grad.to(parameter.dtype)
