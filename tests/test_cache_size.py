"""A plan's arithmetic of the decoder's cache against the decoder's own shapes."""

from __future__ import annotations

import pytest

from sarm.cache_size import cached_positions, rows_at_once


def test_by_hand() -> None:
    assert [cached_positions(n) for n in (1, 192, 256, 257, 1024)] == [256, 256, 256, 512, 1024]
    # 2**17 positions: 512 rows of 256, of which no more than 256 are taken
    assert [rows_at_once(n) for n in (192, 320, 600, 3000, 10**6)] == [256, 256, 128, 32, 8]


def test_the_decoder_makes_its_shapes_of_it() -> None:
    graph_decoder = pytest.importorskip(
        "sarm.llama.graph_decoder", reason="Triton is for Linux", exc_type=ImportError
    )
    sampling = graph_decoder.Sampling(600, 0.7, 1.0, (2,))
    prompts = [[1] * 40] * 300
    wide = graph_decoder.Shape.holding(prompts, sampling, None)
    assert (wide.slots, wide.capacity, wide.width) == (128, 1024, 1024)
    assert graph_decoder.Shape.holding(prompts, sampling, 20).slots == 24  # in eights
    assert graph_decoder.Shape.holding(prompts[:10], sampling, None).slots == 16
