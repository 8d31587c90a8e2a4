"""Log-probabilities, entropies and their gradients against a plain log-softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sarm.llama.logprobs import logprobs_from_hidden
from tests.ranks import run_interpreted

T = torch.tensor


@pytest.mark.parametrize("entropy_grad", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_logprobs_entropy_and_gradients_equal_a_whole_log_softmax(
    frozen: bool, bias: bool, chunk: int, entropy_grad: bool
) -> None:
    """In float64 but for the softmax, which is float32."""
    torch.manual_seed(0)
    head = nn.Linear(8, 11, bias=bias).double().requires_grad_(not frozen)
    hidden, labels = torch.randn(3, 5, 8).double(), torch.randint(11, (3, 5))
    grad, grad_entropy = torch.randn(2, 3, 5).double()
    mine, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()

    got = logprobs_from_hidden(mine, head, labels, 0.7, chunk, entropy_grad=entropy_grad)
    assert got.entropy.requires_grad == entropy_grad
    weighed = (got.logprobs * grad).sum()
    if entropy_grad:
        weighed = weighed + (got.entropy * grad_entropy).sum()
    weighed.backward()
    got_head = [None if p.grad is None else p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    log_p = (head(plain) / 0.7).log_softmax(-1)
    want = log_p.gather(-1, labels[..., None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    wanted = (want * grad).sum()
    if entropy_grad:
        wanted = wanted + (entropy * grad_entropy).sum()
    wanted.backward()

    close = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(got.logprobs, want, **close)
    torch.testing.assert_close(got.entropy, entropy, **close)
    torch.testing.assert_close(mine.grad, plain.grad, **close)
    for got_grad, parameter in zip(got_head, head.parameters(), strict=True):
        assert (got_grad is None) == (parameter.grad is None) == frozen
        if got_grad is not None:
            torch.testing.assert_close(got_grad, parameter.grad, **close)


def test_the_entropy_gradient_is_that_of_finite_differences() -> None:
    """Of a head so small that the sum can be written out: no autograd on the other side."""
    torch.manual_seed(1)
    head = nn.Linear(3, 4, bias=False).requires_grad_(False)
    hidden = torch.randn(1, 3).requires_grad_()
    labels = T([2])
    logprobs_from_hidden(hidden, head, labels, 1.3, entropy_grad=True).entropy.sum().backward()

    def entropy(states: Tensor) -> float:
        p = ((states.double() @ head.weight.double().T) / 1.3).softmax(-1)
        return -float((p * p.log()).sum())

    for i in range(3):
        step = torch.zeros(1, 3, dtype=torch.float64)
        step[0, i] = 1e-5
        slope = (entropy(hidden.double() + step) - entropy(hidden.double() - step)) / 2e-5
        assert float(hidden.grad[0, i]) == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_logprobs_of_a_head_tied_to_trained_states_carry_both_gradients() -> None:
    embedding, head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
    head.weight = embedding.weight
    labels = T([[3, 1, 4]])
    logprobs_from_hidden(embedding(labels), head, labels, 1.0, 2).logprobs.sum().backward()
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
        logprobs_from_hidden(hidden, head, labels, 1.0, chunk).logprobs.sum().backward()
    assert chunk * vocabulary == largest < tokens * vocabulary


def test_logprobs_in_bfloat16_have_float32_softmax_and_none_has_gradient_under_no_grad() -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False).bfloat16()
    hidden, labels = torch.randn(7, 16).bfloat16().requires_grad_(), torch.randint(50, (7,))
    with torch.no_grad():
        got = logprobs_from_hidden(hidden, head, labels)
    assert (
        got.logprobs.dtype == got.entropy.dtype == torch.float32 and not got.logprobs.requires_grad
    )
    torch.testing.assert_close(
        got.logprobs,
        head(hidden).float().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1).detach(),
    )
    logprobs_from_hidden(hidden, head, labels).logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    assert logprobs_from_hidden(hidden[:0], head, labels[:0]).logprobs.shape == (0,)


def logprob_kernels_agree(device: str) -> None:
    """A vocabulary that is no multiple of a program's width, two temperatures."""
    from sarm.llama import logprob_kernels

    torch.manual_seed(0)
    logits, labels = 5 * torch.randn(6, 5000), torch.tensor([0, 4999, 17, 4096, 4095, 2500])
    grad, grad_entropy = torch.randn(2, 6)
    for temperature in (1.0, 0.7):
        expected = logits.double().requires_grad_()
        log_p = torch.log_softmax(expected / temperature, -1)
        chosen, entropy = log_p[torch.arange(6), labels], -(log_p.exp() * log_p).sum(-1)
        (of_chosen,) = torch.autograd.grad(chosen, expected, grad.double(), retain_graph=True)
        (of_both,) = torch.autograd.grad(
            [chosen, entropy], expected, [grad.double(), grad_entropy.double()]
        )
        logprobs, found_entropy, log_sum = logprob_kernels.statistics(
            logits.to(device), labels.to(device), temperature
        )
        close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
        torch.testing.assert_close(logprobs.cpu(), chosen.detach(), **close)
        torch.testing.assert_close(found_entropy.cpu(), entropy.detach(), **close)
        for of_entropy, want in (
            (None, of_chosen),
            ((found_entropy, grad_entropy.to(device)), of_both),
        ):
            ours = logprob_kernels.gradient(
                logits.clone().to(device),
                labels.to(device),
                log_sum,
                grad.to(device),
                temperature,
                of_entropy,
            )
            torch.testing.assert_close(ours.cpu(), want, rtol=1e-4, atol=1e-6, check_dtype=False)


@pytest.mark.gpu
def test_the_logprob_kernels() -> None:
    logprob_kernels_agree("cuda")


def test_the_interpreted_logprob_kernels() -> None:
    run_interpreted(
        "from tests.llama.test_logprobs import logprob_kernels_agree; logprob_kernels_agree('cpu')"
    )
