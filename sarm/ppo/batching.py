"""Which prompts a step draws, and which rows of a batch a rank and a micro-batch take: pure
functions of seed, step and lengths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch

from sarm.llama.generate import packs


@lru_cache(maxsize=4)
def _epoch_order(ids: tuple[str, ...], seed: int, epoch: int) -> list[int]:
    return sorted(
        range(len(ids)), key=lambda i: hashlib.sha256(f"{seed}/{epoch}/{ids[i]}".encode()).digest()
    )


def rows_of_step(ids: Sequence[str], seed: int, step: int, batch_size: int) -> list[int]:
    """Which prompts step `step` draws: pass after pass over all of them, each pass in an order of
    its own.
    """
    drawn = range(step * batch_size, (step + 1) * batch_size)
    return [_epoch_order(tuple(ids), seed, at // len(ids))[at % len(ids)] for at in drawn]


def deal(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Rows for each rank, about as many tokens each: the longest first, back and forth over the
    ranks.
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for at, row in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))):
        turn, seat = divmod(at, ranks)
        hands[seat if turn % 2 == 0 else ranks - 1 - seat].append(row)
    return hands


def micro_batches(
    rows: Sequence[int], lengths: Sequence[int], tokens: int, ranks: int
) -> list[list[list[int]]]:
    """For each rank its micro-batches of `rows`, as many on every rank: ZeRO needs every rank at
    every backward pass.

    Those that fill up the count are empty. `lengths` are those of all rows.
    """
    hands = [[rows[i] for i in hand] for hand in deal([lengths[row] for row in rows], ranks)]
    batches = [
        [[hand[i] for i in pack] for pack in packs([lengths[row] for row in hand], tokens)]
        for hand in hands
    ]
    most = max(map(len, batches))
    return [own + [[]] * (most - len(own)) for own in batches]


def mini_batches(n: int, parts: int, seed: int, step: int, epoch: int) -> list[list[int]]:
    """`n` rows in `parts` equal random parts; as they are where there is one part."""
    if parts == 1:
        return [list(range(n))]
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(f"{seed}/{step}/{epoch}".encode()).digest()[:6], "little")
    )
    order = torch.randperm(n, generator=generator).tolist()
    return [order[part * n // parts : (part + 1) * n // parts] for part in range(parts)]
