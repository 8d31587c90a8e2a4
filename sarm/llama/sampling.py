"""Which token is drawn: keys of the noise, and sampling by inverse CDF.

The noise behind a token, `philox.uniforms(row_keys(...), position)`, depends on the seed, the step,
the prompt's key and the position in the response, never on the rank, row or batch that the prompt
falls in. `python -m pytest tests/llama/test_sampling.py` compares with softmax.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def row_keys(seed: int, step: int, keys: Sequence[str]) -> Tensor:
    """(b,) int64: where each row's stream of random numbers begins."""
    digests = (hashlib.sha256(f"{seed}/{step}/{key}".encode()).digest() for key in keys)
    return torch.tensor(
        [int.from_bytes(d[:8], "little", signed=True) for d in digests], dtype=torch.int64
    )


class Sampled(NamedTuple):
    tokens: Tensor
    """(b,) int64."""
    logprobs: Tensor
    """(b,) float32."""


def sample(logits: Tensor, u: Tensor, temperature: float, top_p: float) -> Sampled:
    """One token a row from `logits` (b, v) by inverse CDF at `u` (b,); greedy at temperature 0.

    The cumulative sum runs in float64, so a token's chance is its softmax probability to about
    1e-7. top-p keeps the smallest set of most likely tokens whose probability reaches top_p, ties
    going to the lower id.
    """
    log_p = F.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = log_p.argmax(-1)
    else:
        p = log_p.exp().double()
        if top_p < 1:
            ordered, order = p.sort(dim=-1, descending=True, stable=True)
            p = torch.zeros_like(p).scatter(
                1, order, torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0)
            )
        c = p.cumsum(-1)
        tokens = torch.searchsorted(c, (u * c[:, -1])[:, None], right=True).squeeze(1)
        # beyond it where logits are NaN, which the log-probability then tells
        tokens = tokens.clamp(max=logits.shape[1] - 1)
    return Sampled(tokens, log_p.gather(1, tokens[:, None]).squeeze(1))
