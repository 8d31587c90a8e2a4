"""Random numbers keyed by a counter: Philox4x32-10 (Salmon et al. 2011), in plain torch.

What is drawn depends on a key and a counter alone, never on the rank, row, batch or device that
draws it. `sarm.philox_triton` is the same inside a kernel. `python -m pytest tests/test_philox.py`
compares both with the published numbers and with numpy's Philox.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SAMPLING, LABELS, ROUNDING = range(3)
"""The counter's last word, by what the numbers are for: no two uses share a stream."""
MASK = 0xFFFFFFFF

Word = Tensor | int


def philox(counter: Sequence[Word], key: tuple[Word, Word]) -> tuple[Tensor, ...]:
    """Four counter words and two key words, 32 bits each in int64, to four random words.

    Tensors broadcast against each other; the first counter word is a tensor.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # modulo 2^64, which holds every bit of both halves; of the second and fourth word only the
        # lower half counts, which is cut off where it enters another
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (second >> 32 ^ c1 ^ k0) & MASK,
            second,
            (first >> 32 ^ c3 ^ k1) & MASK,
            first,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return tuple(torch.broadcast_tensors(*map(torch.as_tensor, (c0, c1 & MASK, c2, c3 & MASK))))


def words_of(key: Word) -> tuple[Word, Word]:
    """The lower and the upper half of a 64-bit key, signed or not."""
    return key & MASK, key >> 32 & MASK


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """float64 in [0, 1), one for each of `positions` in the stream of its key; both int64, of
    shapes that broadcast.
    """
    high, low, _, _ = philox((positions, 0, 0, SAMPLING), words_of(keys))
    # 52 bits: the largest value times any sum stays below that sum after rounding.
    return (high << 20 | low >> 12).double() * 2.0**-52


def random_words(n: int, key: int, purpose: int, device: torch.device) -> Tensor:
    """(n,) int64 of 32 random bits; element e is word e % 4 of block e // 4."""
    blocks = torch.arange(-(-n // 4), device=device)
    return torch.stack(philox((blocks, 0, 0, purpose), words_of(key)), -1).flatten()[:n]
