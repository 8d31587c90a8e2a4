"""Whatever a data file holds, it gives rows or one sentence: `python -m pytest
tests/data/test_any_bytes.py`, ten times as many with `-m slow`.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sarm.config import DataConfig, UserError
from sarm.data.conversations import prompt_ids, spelled_special_tokens, template_ids
from sarm.data.datasets import load_data, texts_to_encode
from sarm.data.files import SUFFIXES
from sarm.data.formats import FORMATS, Place, Row
from tests.tiny import SPECIAL, tiny_tokenizer

FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=2000)
KEYS = """prompt chosen rejected category kind subset question answer label conversation_input
reject bon_best loser_list category_path conversations context response1 response2
overall_preference type completion from value role content system user assistant
human gpt llm_name""".split()
TEXTS = st.text(max_size=12) | st.sampled_from(
    ["", " ", "\ud800", "\x00", "<!--", "\u2028", "contrast_x", "\n\nHuman: a\n\nAssistant: b"]
)
LEAVES = TEXTS | st.sampled_from(KEYS) | st.none() | st.booleans() | st.integers() | st.floats()
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)
RECORDS = st.dictionaries(st.sampled_from(KEYS), TREES, max_size=8)
BYTES = st.binary(max_size=200) | st.builds(
    lambda records, end: "\n".join(map(json.dumps, records)).encode() + end,
    st.lists(RECORDS | TREES, max_size=4),
    st.binary(max_size=6),
)


def rows_or_a_sentence(raw: bytes, suffix: str, form: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"d{suffix}"
        file.write_bytes(gzip.compress(raw) if suffix.endswith(".gz") else raw)
        source = {"format": form, "label": "S", "path": str(file), "split": {"policy_eval": 1.0}}
        try:
            data = load_data(DataConfig.model_validate({"sources": {"s": source}}))
        except UserError as error:
            assert str(error) and "\n" not in str(error).replace(folder, "")
            return
        for prompt in data.prompts:
            assert prompt.messages and all(m["content"].encode() for m in prompt.messages[-1:])
        texts_to_encode(data)


def a_record_or_a_sentence(record: dict[str, Any], form: str) -> None:
    missed: Counter[str] = Counter()
    try:
        rows = list(FORMATS[form].read(record, Place("here", Path("f.jsonl"), None), missed))
    except UserError as error:
        assert str(error).startswith("here: ")
        return
    assert rows or missed, "what gives no row is counted"
    for row in rows:
        assert isinstance(row, Row) and row.messages[-1]["role"] == "user"
        texts = (*row.chosen, *row.rejected, row.category, *(m["content"] for m in row.messages))
        assert all(isinstance(text.encode(), bytes) for text in texts), "a table can hold it"


def tokens_or_a_sentence(texts: list[str]) -> None:
    """As many BOS and end-of-turn tokens as turns, whatever the turns spell."""
    tokenizer = tiny_tokenizer()
    turns = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    ids = template_ids(tokenizer, [turns])[0]
    assert ids.count(0) == 1 and ids.count(3) == len(turns) and ids.count(1) == len(turns)
    if not spelled_special_tokens(tokenizer, turns):
        plain = [{**m, "content": m["content"].encode("utf-8", "replace").decode()} for m in turns]
        assert ids == tokenizer.apply_chat_template(plain, return_dict=False)
    assert prompt_ids(tokenizer, turns[:1])[0] == 0


SPELLED = st.lists(TEXTS | st.sampled_from(SPECIAL), max_size=5).map("".join)
ASKS = {
    "bytes": (rows_or_a_sentence, BYTES, st.sampled_from(SUFFIXES), st.sampled_from([*FORMATS])),
    "records": (a_record_or_a_sentence, RECORDS, st.sampled_from([*FORMATS])),
    "texts": (tokens_or_a_sentence, st.lists(SPELLED, min_size=1, max_size=4)),
}


@pytest.mark.parametrize("ask", ASKS)
def test_any_input_is_read_or_refused_in_a_sentence(ask: str) -> None:
    check, *strategies = ASKS[ask]
    FEW(given(*strategies)(check))()


@pytest.mark.slow
@pytest.mark.parametrize("ask", ASKS)
def test_very_many_inputs_are(ask: str) -> None:
    check, *strategies = ASKS[ask]
    MANY(given(*strategies)(check))()
