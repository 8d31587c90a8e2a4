"""The tree of shared prefixes: rows come back whole, nothing worth sharing is held twice."""

from __future__ import annotations

import random

import pytest

from sarm.llama.prefixes import Prefixes, Segment, shared_prefixes


def rebuilt(found: Prefixes) -> list[list[int]]:
    return [
        [token for segment in found.path(last) for token in found.segments[segment].tokens]
        for last in found.last
    ]


def test_by_hand() -> None:
    rows = [[1, 2, 3, 4, 9], [1, 2, 3, 5], [7, 7], [1, 2, 3], [1, 2, 8], [1, 2, 3, 4, 9]]
    found = shared_prefixes(rows, 2)
    assert rebuilt(found) == rows
    held = {(tuple(s.tokens), s.start) for s in found.segments}
    # [3] alone, after [1, 2], is too short to be shared, and so are [4] and [5]; equal rows are
    # one.
    assert held == {((1, 2), 0), ((3, 4, 9), 2), ((3, 5), 2), ((7, 7), 0), ((3,), 2), ((8,), 2)}


def test_one_row_is_one_segment() -> None:
    assert shared_prefixes([[5, 6]], 1) == Prefixes([Segment([5, 6], 0, -1)], [0])
    assert shared_prefixes([], 1) == Prefixes([], [])


@pytest.mark.parametrize("at_least", [1, 2, 5, 100])
def test_any_rows(at_least: int) -> None:
    """With `at_least` 1 every distinct prefix of a row is held exactly once."""
    draw = random.Random(at_least)
    for _ in range(200):
        rows = [
            [draw.randrange(3) for _ in range(draw.randrange(1, 12))]
            for _ in range(draw.randrange(1, 12))
        ]
        found = shared_prefixes(rows, at_least)
        assert rebuilt(found) == rows
        assert all(s.parent < i and s.tokens for i, s in enumerate(found.segments))
        assert all(
            s.start == sum(len(found.segments[p].tokens) for p in found.path(i)[:-1])
            for i, s in enumerate(found.segments)
        )
        held = sum(len(s.tokens) for s in found.segments)
        distinct = len({tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)})
        assert distinct <= held <= sum(map(len, rows))
        if at_least == 1:
            assert held == distinct


def test_rows_that_grow_do_not_exhaust_the_stack() -> None:
    rows = [[1] * n for n in range(1, 3000)]
    found = shared_prefixes(rows, 1)
    assert sum(len(s.tokens) for s in found.segments) == 2999
    some = found._replace(last=found.last[::500])
    assert rebuilt(some) == rows[::500]
