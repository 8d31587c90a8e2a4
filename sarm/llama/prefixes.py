"""What rows of tokens begin alike with, so that it is computed once: `shared_prefixes`. No
torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Segment(NamedTuple):
    """Some tokens of one row, or of all the rows that share them."""

    tokens: Sequence[int]
    start: int
    """The position of the first of them in its rows."""
    parent: int
    """Which segment comes before it in its rows; -1 where none does."""


class Prefixes(NamedTuple):
    """Rows as paths through a tree of segments."""

    segments: list[Segment]
    """A parent before its children."""
    last: list[int]
    """Of each row, the segment that it ends with."""

    def path(self, segment: int) -> list[int]:
        """The segments from a row's beginning to this one."""
        found = []
        while segment >= 0:
            found.append(segment)
            segment = self.segments[segment].parent
        return found[::-1]


def shared_prefixes(rows: Sequence[Sequence[int]], at_least: int) -> Prefixes:
    """The rows with every run of `at_least` tokens or more that several of them begin with, or go
    on with, held once.

    Rows may be equal, or one the beginning of another; none may be empty.
    """
    order = sorted(range(len(rows)), key=lambda row: list(rows[row]))
    # Of rows in sorted order, neighbours share the most: that of any two is the least between them.
    common = [0] + [_common(rows[a], rows[b]) for a, b in pairwise(order)]
    segments: list[Segment] = []
    last = [-1] * len(rows)
    todo = [(0, len(rows), 0, -1)] if rows else []
    while todo:
        # rows low to high of the order share `depth` tokens, which end in `parent`
        low, high, depth, parent = todo.pop()
        first = rows[order[low]]
        shared = min(common[low + 1 : high], default=len(first))
        worth = high - low == 1 or shared - depth >= at_least
        if worth and shared > depth:
            segments.append(Segment(first[depth:shared], depth, parent))
            depth, parent = shared, len(segments) - 1
        while low < high and len(rows[order[low]]) == depth:
            last[order[low]] = parent
            low += 1
        ends = [
            i for i in range(low + 1, high) if common[i] - depth < (1 if worth else at_least)
        ] + [high]
        for start, end in zip([low, *ends], ends, strict=False):
            if start < end:
                todo.append((start, end, depth, parent))
    return Prefixes(segments, last)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two rows begin alike with, by bisection: comparing slices is quick."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
