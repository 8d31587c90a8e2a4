"""Which rows of a batch a rank and a micro-batch take: pure functions of their lengths."""

from __future__ import annotations

from collections.abc import Sequence

from sarm.llama.generate import packs


def scatter(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Rows for each rank, about as many tokens each: the longest first, back and forth over the
    ranks.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for at, row in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))):
        turn, place = divmod(at, ranks)
        shares[place if turn % 2 == 0 else ranks - 1 - place].append(row)
    return shares


def micro_batches(
    rows: Sequence[int], lengths: Sequence[int], tokens: int, ranks: int
) -> list[list[list[int]]]:
    """For each rank its micro-batches of `rows`, as many on every rank: ZeRO needs every rank at
    every backward pass.

    Those that fill up the count are empty. `lengths` are those of all rows.
    """
    shares = [[rows[i] for i in share] for share in scatter([lengths[r] for r in rows], ranks)]
    batches = [
        [[share[i] for i in pack] for pack in packs([lengths[row] for row in share], tokens)]
        for share in shares
    ]
    most = max(map(len, batches))
    return [own + [[]] * (most - len(own)) for own in batches]
