"""`sarm.philox` inside Triton kernels, over the Philox4x32-10 that Triton ships; imported only
where it runs. `TRITON_INTERPRET=1` runs it on a CPU (tests/test_philox.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sarm import philox

SAMPLING = tl.constexpr(philox.SAMPLING)


@triton.jit
def uniform(key, position):
    """float64 in [0, 1), as `philox.uniforms`: int64 key, int32 position."""
    high, low, _, _ = tl.philox(key, position, 0, 0, SAMPLING)
    return ((high.to(tl.uint64) << 20) | (low.to(tl.uint64) >> 12)).to(tl.float64) * (
        2.220446049250313e-16
    )


@triton.jit
def random_words(key, blocks, PURPOSE: tl.constexpr):
    """Four uint32 words of each of `blocks` (..., n) int32 one after another, (..., 4 n), as
    `philox.random_words`: one call serves four elements.
    """
    a, b, c, d = tl.philox(key, blocks, 0, 0, PURPOSE)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _uniforms(keys, positions, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    u = uniform(tl.load(keys + at, inside, 0), tl.load(positions + at, inside, 0))
    tl.store(out + at, u, inside)


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """`philox.uniforms` of (n,) int64 keys and int32 positions, in one launch."""
    out = torch.empty(len(keys), dtype=torch.float64, device=keys.device)
    _uniforms[(triton.cdiv(len(keys), 128),)](keys, positions, out, len(keys), 128)
    return out
