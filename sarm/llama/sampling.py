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

CHUNK = 256
"""Probabilities that are added up together."""
IN_CACHE = 1 << 19
"""Logits that a CPU takes through all steps at once, of 4 bytes each."""


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
    """One token a row from `logits` (b, v) by inverse CDF at `u` (b,) float64; greedy at
    temperature 0.

    Sums run in float64, but for those of CHUNK probabilities, so a token's chance is its softmax
    probability to about 1e-7. top-p keeps the smallest set of most likely tokens whose probability
    reaches top_p, ties going to the lower id.
    """
    rows = max(1, IN_CACHE // logits.shape[1])
    if len(logits) > rows and not logits.is_cuda:
        parts = [
            sample(some, us, temperature, top_p)
            for some, us in zip(logits.split(rows), u.split(rows), strict=True)
        ]
        return Sampled(*map(torch.cat, zip(*parts, strict=True)))
    p = (logits.float() / temperature if temperature not in (0, 1) else logits.float()).softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        tokens = _at(p if top_p == 1 else _likeliest(p, top_p), u)
    return Sampled(tokens, p.gather(1, tokens[:, None]).squeeze(1).log())


def _at(p: Tensor, u: Tensor) -> Tensor:
    """(b,) int64: where the cumulative sum of `p` (b, v) passes `u` (b,) of the whole. First the
    chunk, then the token within it: a running sum of everything takes longer than a layer.
    """
    chunks = F.pad(p, (0, -p.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))
    ends = chunks.sum(-1).double().cumsum(-1)
    target = (u * ends[:, -1])[:, None]
    # beyond the last where logits are NaN, which the log-probability then tells
    chunk = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)
    within = chunks.gather(1, chunk[..., None].expand(-1, -1, CHUNK)).squeeze(1).double()
    before = F.pad(ends, (1, 0)).gather(1, chunk)
    passed = (before + within.cumsum(-1) <= target).sum(-1)
    # Where rounding has the chunk's tokens end below u: the last of them that is possible.
    last = torch.where(within > 0, torch.arange(CHUNK, device=p.device), 0).amax(-1)
    return chunk.squeeze(1) * CHUNK + torch.minimum(passed, last)


def _likeliest(p: Tensor, top_p: float) -> Tensor:
    ordered, order = p.double().sort(dim=-1, descending=True, stable=True)
    kept = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0)
    return torch.zeros_like(ordered).scatter(1, order, kept)
