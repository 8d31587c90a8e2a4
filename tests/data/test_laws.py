"""Laws of how data becomes prompts, pairs and texts, on any rows: neither their order nor their
neighbours, files and repeats decide anything, and the two sides are alike.

`python -m pytest tests/data/test_laws.py`
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sarm.config import PARTS, DataConfig, Part, SourceConfig
from sarm.data.datasets import Data, load_data, pairs_in, part_of, prompt_id, texts_to_encode

LAWS = settings(max_examples=40, deadline=None)
SPLIT = {"discovery": 0.3, "validation": 0.2, "test": 0.2, "ppo": 0.2}
Row = dict[str, Any]
WORDS = st.sampled_from(["a", "b", "c d", "e", "f  g", "h", ""])
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.integers(0, 8).map("ask {}".format),
            "chosen": st.lists(WORDS, min_size=1, max_size=2),
            "rejected": st.lists(WORDS, min_size=1, max_size=2),
        }
    ),
    min_size=1,
    max_size=9,
)


def read(*files: Sequence[Row], salt: str = "pepper", split: dict[str, float] = SPLIT) -> Data:
    """One source, of so many files."""
    with tempfile.TemporaryDirectory() as folder:
        for n, rows in enumerate(files):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (Path(folder) / f"{n}.jsonl").write_text(text, encoding="utf-8")
        source = {"format": "jsonl", "label": "S", "path": folder, "split": split}
        return load_data(DataConfig.model_validate({"salt": salt, "sources": {"s": source}}))


def compared(data: Data) -> set[tuple[str, str, str]]:
    return {(p.prompt.id, p.chosen, p.rejected) for p in data.pairs}


def texts(data: Data) -> list[tuple[str, str, str, str]]:
    return [(t.id, t.prompt_id, t.part, t.label) for t in texts_to_encode(data)]


@LAWS
@given(ROWS, st.integers(0, 9), st.data())
def test_rows_in_any_order_and_files_and_told_twice_are_the_same_data(
    rows: list[Row], at: int, data: Any
) -> None:
    whole = read(rows)
    shuffled = data.draw(st.permutations(rows))
    for other in (
        read(shuffled),
        read(*filter(None, (rows[at:], rows[:at]))),
        read([*rows, *shuffled]),
    ):
        assert [(p.id, p.part) for p in other.prompts] == [(p.id, p.part) for p in whole.prompts]
        assert compared(other) == compared(whole)
        assert texts(other) == texts(whole)
    assert [p.id for p in whole.prompts] == sorted(p.id for p in whole.prompts)
    order = [(prompt, id_) for id_, prompt, _, _ in texts(whole)]
    assert order == sorted(set(order)), "a prompt's texts lie together, each once"


@LAWS
@given(ROWS)
def test_either_side_in_place_of_the_other_gives_the_opposite_pairs(rows: list[Row]) -> None:
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    one, other = read(rows), read(swapped)
    assert {(id_, r, c) for id_, c, r in compared(one)} == compared(other)
    turned = {"c": "r", "r": "c"}
    assert {f"{id_[:-1]}{turned[id_[-1]]}" for id_, *_ in texts(one)} == {
        id_ for id_, *_ in texts(other)
    }


@LAWS
@given(ROWS, ROWS)
def test_what_else_there_is_changes_no_prompts_part_and_parts_share_no_prompt(
    rows: list[Row], others: list[Row]
) -> None:
    alone, together = read(rows), read(rows, others)
    parts = {p.id: p.part for p in together.prompts}
    assert all(parts[p.id] == p.part for p in alone.prompts)
    seen = [{p.prompt.id for p in pairs_in(together, part)} for part in PARTS]
    assert sum(map(len, seen)) == len(set().union(*seen))
    listed = [p for part in PARTS for p in pairs_in(together, part)]
    unused = [p for p in together.pairs if p.prompt.part is None]
    assert sorted(p.id for p in (*listed, *unused)) == [p.id for p in together.pairs]


@LAWS
@given(
    st.text(max_size=20),
    st.sampled_from(["", " ", "\n\t", "  "]),
    st.permutations(PARTS).map(lambda parts: parts[:2]),
)
def test_white_space_makes_no_other_prompt_and_a_larger_share_loses_none(
    text: str, space: str, parts: list[Part]
) -> None:
    """And whether a prompt is used goes by what all shares add up to."""
    id_, other = (
        prompt_id(({"role": "user", "content": t},)) for t in (text, f"{space}{text}{space}")
    )
    assert id_ == other
    assert id_ != prompt_id(({"role": "assistant", "content": text},))

    def found(eighths: int, others: int = 0) -> Part | None:
        split = dict(zip(parts, (eighths / 8, others / 8), strict=True))
        given = {"format": "jsonl", "label": "L", "path": "x", "split": split}
        return part_of(id_, "pepper", SourceConfig.model_validate(given))

    alone = [found(eighths) for eighths in range(9)]
    assert alone[0] is None and alone[8] == parts[0]
    assert alone == sorted(alone, key=lambda one: one is not None), "in once, in for good"
    for eighths in range(9):
        for others in range(9 - eighths):
            assert (found(eighths, others) is None) == (alone[eighths + others] is None)
