"""Which elements of which parameter each rank holds, against laying everything out and looking."""

from __future__ import annotations

import pytest
import torch

from sarm.ppo.learner.shards import cut_segments, flat_segments, share

SIZES = {"a": 5, "b": 1, "c": 12, "d": 3}


def laid_out(gap: int = 0) -> tuple[list[tuple[str, int] | None], list[int]]:
    """Parameters end to end with `gap` of padding between them; where each begins."""
    elements: list[tuple[str, int] | None] = []
    offsets = []
    for name, size in SIZES.items():
        offsets.append(len(elements))
        elements += [(name, i) for i in range(size)] + [None] * gap
    return elements, offsets


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("gap", [0, 2])
def test_a_flat_group_is_cut_across_parameters(ranks: int, gap: int) -> None:
    elements, offsets = laid_out(gap)
    elements += [None] * (-len(elements) % (2 * ranks))
    part = len(elements) // ranks
    for rank in range(ranks):
        expected = elements[rank * part : (rank + 1) * part]
        found: list[tuple[str, int] | None] = [None] * part
        for name, start, length, at in flat_segments(SIZES, offsets, rank * part, part):
            assert found[at : at + length] == [None] * length
            found[at : at + length] = [(name, start + i) for i in range(length)]
        assert found == expected


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_parameter_is_cut_by_itself(ranks: int) -> None:
    for rank in range(ranks):
        expected: list[tuple[str, int] | None] = []
        for name, size in SIZES.items():
            padded = [(name, i) for i in range(size)] + [None] * (-size % ranks)
            expected += padded[rank * len(padded) // ranks : (rank + 1) * len(padded) // ranks]
        found: list[tuple[str, int] | None] = [None] * len(expected)
        for name, start, length, at in cut_segments(SIZES, rank, ranks):
            found[at : at + length] = [(name, start + i) for i in range(length)]
        assert found == expected


@pytest.mark.parametrize("size", [0, 1, 3, 8])
def test_shares_together_are_everything(size: int) -> None:
    cuts = [share(size, rank, 3) for rank in range(3)]
    assert torch.cat([torch.arange(size)[a:b] for a, b in cuts]).tolist() == list(range(size))
