"""Sampling against softmax, at a grid of the unit interval and with the noise it is given."""

from __future__ import annotations

import pytest
import torch

from sarm.llama.sampling import row_keys, sample
from sarm.philox import uniforms


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.8), (2.0, 0.6)])
def test_sampling_has_the_softmax_distribution(temperature: float, top_p: float) -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, float("-inf"), 1.0, 0.0])
    p = torch.softmax(logits.double() / temperature, 0)
    if top_p < 1:
        order = p.argsort(descending=True)
        kept = next(n for n in range(1, 7) if float(p[order[:n]].sum()) >= top_p)
        p[order[kept:]] = 0
        p /= p.sum()
    n = 25_000
    # each 1/n of the unit interval once: counts are exact
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    got = sample(logits.expand(n, -1), u, temperature, top_p)
    counts = torch.bincount(got.tokens, minlength=6).double()
    assert float((counts / n - p).abs().max()) < 2 / n
    assert counts[3] == 0
    torch.testing.assert_close(got.logprobs, torch.log_softmax(logits / temperature, 0)[got.tokens])


def test_the_ends_of_the_unit_interval() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(2, -1)
    assert sample(
        logits, torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64), 1.0, 1.0
    ).tokens.tolist() == [1, 2]


def test_with_its_own_noise_over_prompts_and_over_positions() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, float("-inf"), 1.0, 0.0])
    p = torch.softmax(logits.double() / 0.8, 0)
    rows = row_keys(3, 5, [str(i) for i in range(4000)])
    across = uniforms(rows, torch.tensor(7))
    along = uniforms(rows[:1], torch.arange(4000))
    for u in (across, along):
        tokens = sample(logits.expand(len(u), -1), u, 0.8, 1.0).tokens
        counts, expected = torch.bincount(tokens, minlength=6).double(), len(u) * p
        kept = p > 0
        assert counts[~kept].sum() == 0
        # chi-squared of four degrees of freedom: beyond 18.5 once in a thousand
        assert float(((counts - expected)[kept] ** 2 / expected[kept]).sum()) < 18.5
