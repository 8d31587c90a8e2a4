"""The arithmetic of PPO as pure functions: KL, advantages, losses, controllers, schedules, running
statistics.

`python -m pytest tests/ppo/test_objective.py` checks each against numbers worked by hand.

Notation: b sequences, t response positions (right-padded), d_model the hidden size, v the
vocabulary. A `mask` is boolean and marks response tokens, the end-of-turn token among them. Losses
and statistics are *sums* over tokens: the trainer divides by the response tokens of the whole
optimizer step on all ranks, so that neither the number of ranks nor the micro-batch changes the
gradient. An `all_reduce` returns the sum of a tensor over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

AllReduce = Callable[[Tensor], Tensor]

KL_ERROR_CLIP = 0.2
"""Ziegler et al. 2019 (arXiv 1909.08593) clip the controller's proportional error at this."""


def sum_over_ranks(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of `tensor` over all ranks of the group, a new tensor where `tensor` was; without
    torch.distributed, its copy.
    """
    total = tensor.detach().clone()
    if not (dist.is_available() and dist.is_initialized()):
        return total
    if dist.get_backend(group) == "nccl":  # which knows no CPU tensors
        total = total.cuda()
    dist.all_reduce(total, group=group)
    return total.to(tensor.device)


# --- log-probabilities
# ------------------------------------------------------------------------------------------------


class TokenLogprobs(NamedTuple):
    logprobs: Tensor
    """(b, t) float32, of the labels, with gradient."""
    entropy: Tensor
    """(b, t) float32, of the whole distribution, without gradient: a statistic."""


def logprobs_from_hidden(
    hidden: Tensor,
    lm_head: nn.Linear,
    labels: Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> TokenLogprobs:
    """Log-probabilities of `labels` (b, t) under softmax(lm_head(hidden) / temperature), `hidden`
    (b, t, d_model).

    Works `chunk` tokens at a time, so at most (chunk, v) logits exist, forwards or backwards: by
    default 1,024 on a CPU and 4,096 on a GPU, where they stay in the head's dtype. Any leading
    shape will do: pass `hidden[mask]` (n, d_model) and `labels[mask]` (n,) to spend nothing on
    padding. Labels lie in [0, v) everywhere, padding included. Reads `lm_head.weight` and `.bias`
    without calling the module, so under ZeRO-3 the calling module registers them as external
    parameters.
    """
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    size = chunk or (4096 if hidden.is_cuda else 1024)
    logprobs, entropy = _ChunkedLogprobs.apply(
        flat, lm_head.weight, lm_head.bias, flat_labels, temperature, size, torch.is_grad_enabled()
    )
    return TokenLogprobs(logprobs.view(labels.shape), entropy.view(labels.shape))


class _ChunkedLogprobs(torch.autograd.Function):
    """d logprob / d logits = (onehot - softmax) / temperature, so a chunk's logits need not be
    kept.

    With a frozen head (LoRA) the forward pass keeps (W[label] - softmax·W) / temperature, (n,
    d_model), and backward is one multiplication. With a trained head backward computes each chunk's
    logits again.
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
    ) -> tuple[Tensor, Tensor]:
        head_trained = with_grad and (
            weight.requires_grad or (bias is not None and bias.requires_grad)
        )
        keep_slopes = with_grad and hidden.requires_grad and not head_trained
        logprobs, entropy, log_sum = (
            torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(3)
        )
        slopes = torch.empty_like(hidden) if keep_slopes else None
        for at in range(0, len(hidden), chunk):
            part = slice(at, at + chunk)
            logits = F.linear(hidden[part].to(weight.dtype), weight, bias)
            logprobs[part], entropy[part], log_sum[part] = _statistics(
                logits, labels[part], temperature
            )
            if slopes is not None:
                ones = torch.ones_like(log_sum[part])
                slopes[part] = (
                    _d_logits(logits, labels[part], log_sum[part], ones, temperature) @ weight
                ).to(slopes.dtype)
        ctx.temperature, ctx.chunk, ctx.keep_slopes = temperature, chunk, keep_slopes
        ctx.save_for_backward(
            *(
                (slopes,)
                if keep_slopes
                else (hidden, weight, bias, labels, log_sum)
                if with_grad
                else ()
            )
        )
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.keep_slopes:
            (slopes,) = ctx.saved_tensors
            return (
                (grad[:, None] * slopes.float()).to(slopes.dtype),
                None,
                None,
                None,
                None,
                None,
                None,
            )
        hidden, weight, bias, labels, log_sum = ctx.saved_tensors
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
        return d_hidden, _like(d_weight, weight), _like(d_bias, bias), None, None, None, None


def _statistics(
    logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(label's log-probability, entropy, log of the sum of exponentials), each (chunk,) float32,
    of logits (chunk, v) / temperature.
    """
    if logits.is_cuda:
        from sarm.ppo.learner import logprob_kernels

        return logprob_kernels.statistics(logits, labels, temperature)
    scaled = logits.float() / temperature
    log_sum = scaled.logsumexp(1)
    log_p = scaled.sub_(log_sum[:, None])
    return log_p.gather(1, labels[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1), log_sum


def _d_logits(
    logits: Tensor, labels: Tensor, log_sum: Tensor, grad: Tensor, temperature: float
) -> Tensor:
    """(chunk, v) in the logits' dtype and, on a GPU, in their place: (onehot(labels) - softmax) ·
    grad / temperature.
    """
    if logits.is_cuda:
        from sarm.ppo.learner import logprob_kernels

        return logprob_kernels.gradient(logits, labels, log_sum, grad, temperature)
    p = (logits.float() / temperature).sub_(log_sum[:, None]).exp_()
    d = p.neg_().scatter_add_(1, labels[:, None], torch.ones_like(labels[:, None], dtype=p.dtype))
    return (d * (grad[:, None] / temperature)).to(logits.dtype)


def _like(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if grad is None or parameter is None else grad.to(parameter.dtype)


# --- KL to the reference
# ----------------------------------------------------------------------------------------------


def kl_per_token(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: Literal["k1", "k3"],
    log_ratio_max: float = 20.0,
) -> Tensor:
    """(b, t): an unbiased estimate at each token of KL(policy || reference), from tokens the
    policy sampled.

    k1 = log(pi / ref), which may be negative; k3 = ref / pi - 1 + log(pi / ref), which may not
    (Schulman, "Approximating KL divergence"). `log_ratio_max` keeps k3's exponential finite.
    """
    log_ratio = (logprobs - ref_logprobs).clamp(-log_ratio_max, log_ratio_max)
    return log_ratio if estimator == "k1" else torch.expm1(-log_ratio) + log_ratio


def next_kl_coef(
    coef: float,
    kl: float,
    sequences: int,
    controller: Literal["fixed", "adaptive"],
    target: float,
    horizon: int,
) -> float:
    """The KL coefficient for the next step.

    `kl` is the mean over this step's `sequences` (all ranks) of the KL summed over the response.
    The adaptive controller is that of Ziegler et al. 2019: coef * (1 + clip(kl / target - 1, ±0.2)
    * sequences / horizon).
    """
    if controller == "fixed":
        return coef
    error = min(max(kl / target - 1, -KL_ERROR_CLIP), KL_ERROR_CLIP)
    return coef * (1 + error * sequences / horizon)


# --- rewards and advantages
# -------------------------------------------------------------------------------------------


def dock_missing_eos(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """(b,): scores less `penalty` where the response did not end in an end-of-turn token; `ended`
    (b,) bool.
    """
    return torch.where(ended, scores, scores - penalty)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """(b, t): -kl_coef * kl at every response token, and the sequence's score (b,) at its last one
    besides; 0 elsewhere.

    A sequence without response tokens gets its score nowhere.
    """
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    return rewards + torch.where(last_tokens(mask), scores[:, None].to(rewards.dtype), 0.0)


def last_tokens(mask: Tensor) -> Tensor:
    """(b, t) bool: True at each row's last marked position."""
    after = mask.flip(1).cumsum(1).flip(1)
    return mask & (after == 1)


class Advantages(NamedTuple):
    advantages: Tensor
    """(b, t), 0 outside the mask."""
    returns: Tensor
    """(b, t), advantages + values, 0 outside the mask."""


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Advantages:
    """Generalised advantage estimation (arXiv 1506.02438) along time; rewards, values (b, t).

    A response ends its episode: the value after its last token is 0. Positions outside the mask
    pass nothing on.
    """
    # In numpy, of which a call on so little takes a fifth of torch's.
    r, v, live = (x.T.contiguous().cpu().numpy() for x in (rewards, values, mask))
    advantages = np.zeros_like(r)
    ahead = next_value = np.zeros_like(r[0])
    for at in reversed(range(len(r))):
        delta = r[at] + gamma * next_value - v[at]
        ahead = advantages[at] = np.where(live[at], delta + gamma * lam * ahead, 0)
        next_value = np.where(live[at], v[at], 0)
    found = torch.from_numpy(advantages.T.copy()).to(rewards.device)
    return Advantages(found, torch.where(mask, found + values, 0.0))


class Moments(NamedTuple):
    """Of the marked values on all ranks, in float64."""

    n: Tensor
    mean: Tensor
    squares: Tensor
    """The sum of squared deviations from the mean."""


def moments(values: Tensor, mask: Tensor, all_reduce: AllReduce) -> Moments:
    """Two passes, so that a large mean costs no digits. A collective: every rank must call it,
    though it has no tokens.
    """
    marked = values.detach().double()[mask]
    n, total = all_reduce(torch.stack([marked.new_tensor(float(marked.numel())), marked.sum()]))
    mean = total / n.clamp(min=1)
    return Moments(n, mean, all_reduce((marked - mean).square().sum()))


def whiten(
    values: Tensor, mask: Tensor, all_reduce: AllReduce, *, shift_mean: bool = True
) -> Tensor:
    """(b, t): the marked values to variance 1 over *all ranks'* marked values, and to mean 0 with
    `shift_mean`.

    Population variance; 0 outside the mask. A collective.
    """
    m = moments(values, mask, all_reduce)
    whitened = (values.double() - m.mean) * torch.rsqrt(m.squares / m.n.clamp(min=1) + 1e-8)
    if not shift_mean:
        whitened = whitened + m.mean
    return torch.where(mask, whitened.to(values.dtype), 0.0)


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, all_reduce: AllReduce
) -> float:
    """1 - Var(returns - values) / Var(returns) over all ranks' marked positions; NaN where returns
    do not vary. A collective.
    """
    of_returns = moments(returns, mask, all_reduce).squares
    of_errors = moments(returns - values, mask, all_reduce).squares
    return float(1 - of_errors / of_returns) if of_returns > 0 else math.nan


# --- losses
# -----------------------------------------------------------------------------------------------------------


class PolicySums(NamedTuple):
    """Sums over response tokens, each () float64 without gradient. Add up micro-batches, then
    ranks, then `policy_means`.
    """

    tokens: Tensor
    loss: Tensor
    approxkl: Tensor
    """0.5 * log_ratio², as TRL's `policy/approxkl_avg`."""
    clipfrac: Tensor
    """Tokens whose clipped term is the larger."""
    clipfrac_lower: Tensor
    """Tokens held by the dual clip."""
    ratio_less_1: Tensor
    ratio_less_1_squared: Tensor
    entropy: Tensor


class PolicyLoss(NamedTuple):
    loss: Tensor
    """(), the sum over response tokens, with gradient."""
    tokens: Tensor
    """(), how many response tokens."""
    sums: PolicySums


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    cliprange_low: float,
    cliprange_high: float,
    dual_clip: float | None,
    log_ratio_max: float,
    entropy: Tensor | None = None,
) -> PolicyLoss:
    """The clipped surrogate of PPO, summed over response tokens; all tensors (b, t).

    A token's loss is max(-A·ratio, -A·clip(ratio, 1 - low, 1 + high)); with a dual clip c (arXiv
    1912.09729) it is at most -A·c where A < 0. Log-ratios beyond ±log_ratio_max are cut there and
    pass no gradient.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-log_ratio_max, log_ratio_max)
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()
    plain, clipped = (
        -advantages * ratio,
        -advantages * ratio.clamp(1 - cliprange_low, 1 + cliprange_high),
    )
    loss = torch.maximum(plain, clipped)
    held = torch.zeros_like(mask)
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        held = (advantages < 0) & (loss > ceiling)
        loss = torch.where(held, ceiling, loss)
    sums = PolicySums(
        tokens=_sum(mask),
        loss=_sum(loss),
        approxkl=_sum(0.5 * log_ratio.square()),
        clipfrac=_sum(mask & (clipped > plain)),
        clipfrac_lower=_sum(mask & held),
        ratio_less_1=_sum(torch.expm1(log_ratio)),
        ratio_less_1_squared=_sum(torch.expm1(log_ratio).square()),
        entropy=_sum(
            torch.zeros_like(loss) if entropy is None else torch.where(mask, entropy, 0.0)
        ),
    )
    return PolicyLoss(loss.sum(), mask.sum(), sums)


def policy_means(sums: PolicySums) -> dict[str, float]:
    """Under TRL's metric names. `val/ratio_var` is over tokens (TRL's is over minibatch means)."""
    tokens, loss, approxkl, clipfrac, clipfrac_lower, ratio_less_1, squared, entropy = torch.stack(
        sums
    ).tolist()
    tokens = max(tokens, 1.0)
    return {
        "loss/policy_avg": loss / tokens,
        "policy/approxkl_avg": approxkl / tokens,
        "policy/clipfrac_avg": clipfrac / tokens,
        "policy/clipfrac_lower_avg": clipfrac_lower / tokens,
        "policy/entropy_avg": entropy / tokens,
        "val/ratio": 1 + ratio_less_1 / tokens,
        "val/ratio_var": max(squared / tokens - (ratio_less_1 / tokens) ** 2, 0.0),
    }


class ValueSums(NamedTuple):
    """Sums over response tokens, each () float64 without gradient."""

    tokens: Tensor
    loss: Tensor
    clipfrac: Tensor
    """Tokens whose clipped error is the larger."""


class ValueLoss(NamedTuple):
    loss: Tensor
    """(), the sum over response tokens, with gradient."""
    tokens: Tensor
    """(), how many response tokens."""
    sums: ValueSums


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, cliprange_value: float
) -> ValueLoss:
    """½·max((v - R)², (clip(v, v_old ± range) - R)²) summed over response tokens; all tensors (b,
    t).
    """
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    clipped = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    plain_error, clipped_error = (values - returns).square(), (clipped - returns).square()
    loss = 0.5 * torch.maximum(plain_error, clipped_error)
    return ValueLoss(
        loss.sum(),
        mask.sum(),
        ValueSums(_sum(mask), _sum(loss), _sum(mask & (clipped_error > plain_error))),
    )


def value_means(sums: ValueSums) -> dict[str, float]:
    """Under TRL's metric names."""
    tokens, loss, clipfrac = torch.stack(sums).tolist()
    tokens = max(tokens, 1.0)
    return {"loss/value_avg": loss / tokens, "val/clipfrac_avg": clipfrac / tokens}


Sums = TypeVar("Sums", PolicySums, ValueSums)


def total_sums(parts: Sequence[Sums], all_reduce: AllReduce) -> Sums:
    """The field-wise sum of one or more micro-batches' sums, over all ranks. A collective."""
    total = all_reduce(torch.stack([torch.stack(part) for part in parts]).sum(0))
    return type(parts[0])(*total.unbind())


def kl_stop(sums: PolicySums, limit: float | None, all_reduce: AllReduce) -> bool:
    """Whether this rank's minibatch, together with the other ranks', has drifted further than
    `limit` from the rollout policy.

    Measured by approxkl, and the same on every rank. A collective, except where there is no limit.
    """
    if limit is None:
        return False
    approxkl, tokens = all_reduce(torch.stack([sums.approxkl, sums.tokens]))
    return bool(approxkl > limit * tokens)


def _sum(x: Tensor) -> Tensor:
    return x.detach().double().sum()


# --- schedules and running statistics
# ---------------------------------------------------------------------------------


def learning_rate(
    step: int,
    *,
    steps: int,
    peak: float,
    schedule: Literal["constant", "linear", "cosine"],
    warmup_steps: int = 0,
) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`. Never 0: the first and last steps
    count too.

    Linear warm-up over `warmup_steps`, then constant, linear or cosine decay that would reach 0 at
    `steps`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    left = 1 - (step - warmup_steps) / max(steps - warmup_steps, 1)
    if schedule == "constant":
        return peak
    return peak * left if schedule == "linear" else peak * 0.5 * (1 - math.cos(math.pi * left))


class RunningSd(NamedTuple):
    """Mean and standard deviation of all values seen, by the parallel form of Welford's algorithm
    (Chan et al. 1979).

    Plain floats: `_asdict()` is its checkpoint and `RunningSd(**state)` reads it back to the bit.
    """

    n: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """The sum of squared deviations from the mean."""

    def merged(self, other: RunningSd) -> RunningSd:
        n = self.n + other.n
        if n == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * other.n / n
        return RunningSd(
            n, mean, self.squares + other.squares + delta * delta * self.n * other.n / n
        )

    def updated(self, values: Tensor, all_reduce: AllReduce) -> RunningSd:
        """With every rank's values added, the same on every rank. A collective."""
        m = moments(values, torch.ones_like(values, dtype=torch.bool), all_reduce)
        return self.merged(RunningSd(float(m.n), float(m.mean), float(m.squares)))

    @property
    def sd(self) -> float:
        """The sample standard deviation; 1 until two different values have been seen, so that
        dividing by it is safe.
        """
        return math.sqrt(self.squares / (self.n - 1)) if self.n > 1 and self.squares > 0 else 1.0


def scaled_rewards(rewards: Tensor, sd: float, clip: float | None) -> Tensor:
    """(b,): rewards / sd, not centred, then cut at ±clip."""
    scaled = rewards / sd
    return scaled if clip is None else scaled.clamp(-clip, clip)
