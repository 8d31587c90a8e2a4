"""Noise against the reference generator, sampling against softmax."""

from __future__ import annotations

import pytest
import torch

from sarm.llama.sampling import row_keys, sample, uniforms


def test_uniforms_are_splitmix64() -> None:
    # The reference generator seeded with 1234567, as published with Vigna's C code, is
    # 6457827717110365317, 3203168211198807973, ...
    u = [float(uniforms(torch.tensor([1234567]), t)) for t in range(2)]
    assert u == [(6457827717110365317 >> 12) / 2**52, (3203168211198807973 >> 12) / 2**52]
    many = torch.stack(
        [uniforms(row_keys(0, 0, [str(i) for i in range(500)]), t) for t in range(200)]
    )
    assert (
        abs(float(many.mean()) - 0.5) < 0.005 and float(many.min()) >= 0 and float(many.max()) < 1
    )
    assert abs(float(torch.corrcoef(many[:, :2].T)[0, 1])) < 0.2


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.8), (2.0, 0.6)])
def test_sampling_has_the_softmax_distribution(temperature: float, top_p: float) -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, float("-inf"), 1.0, 0.0])
    p = torch.softmax(logits.double() / temperature, 0)
    if top_p < 1:
        order = p.argsort(descending=True)
        kept = next(n for n in range(1, 7) if float(p[order[:n]].sum()) >= top_p)
        p[order[kept:]] = 0
        p /= p.sum()
    n = 100_000
    # each 1/n of the unit interval once: counts are exact
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    got = sample(logits.expand(n, -1), u, temperature, top_p)
    counts = torch.bincount(got.tokens, minlength=6).double()
    assert float((counts / n - p).abs().max()) < 2e-5
    assert counts[3] == 0
    torch.testing.assert_close(got.logprobs, torch.log_softmax(logits / temperature, 0)[got.tokens])


def test_the_ends_of_the_unit_interval() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(2, -1)
    assert sample(
        logits, torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64), 1.0, 1.0
    ).tokens.tolist() == [1, 2]
