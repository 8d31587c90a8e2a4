"""Preference data: every format, the split, what is refused and in what words, the real files, and
the hub over loopback.
"""

from __future__ import annotations

import gzip
import hashlib
import http.server
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sarm.config import PARTS, ROOT, DataConfig, SourceConfig, UserError
from sarm.data.datasets import (
    Data,
    load_data,
    pairs_in,
    part_of,
    prompt_id,
    prompts_in,
    text_id,
    texts_to_encode,
)
from sarm.data.formats import FORMATS
from sarm.probing.baselines import word_scores
from tests.data.test_training_pairs import rows, shared

SPLIT = {"discovery": 0.34, "validation": 0.18, "test": 0.14, "ppo": 0.20, "policy_eval": 0.14}


def source(path: Path | str, format_: str = "jsonl", **more: Any) -> SourceConfig:
    return SourceConfig.model_validate(
        {"format": format_, "label": "L", "path": str(path), "split": {"test": 1.0}, **more}
    )


def load(path: Path | str, format_: str = "jsonl", *, salt: str = "sarm", **more: Any) -> Data:
    return load_data(DataConfig(salt=salt, sources={"s": source(path, format_, **more)}))


def write_lines(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def row(prompt: Any = "p", chosen: Any = "c", rejected: Any = "r", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def compared(data: Data) -> list[tuple[str, str, str]]:
    """What is compared, without order and ids."""
    return sorted(
        (pair.prompt.messages[-1]["content"], pair.chosen, pair.rejected) for pair in data.pairs
    )


def complaint(path: Path, format_: str = "jsonl", **more: Any) -> str:
    with pytest.raises(UserError) as raised:
        load(path, format_, **more)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# Formats


def test_plain_rows_cross_their_responses(tmp_path: Path) -> None:
    data = load(
        write_lines(
            tmp_path / "d.jsonl",
            row("p", ["a", "b"], ["x", "y"], category="k", id="ignored"),
            row("q"),
        )
    )
    assert compared(data) == [
        ("p", "a", "x"),
        ("p", "a", "y"),
        ("p", "b", "x"),
        ("p", "b", "y"),
        ("q", "c", "r"),
    ]
    first = next(p for p in data.prompts if p.messages[0]["content"] == "p")
    assert (first.messages, first.source, first.kind, first.category, first.part) == (
        ({"role": "user", "content": "p"},),
        "s",
        "unsafe",
        "k",
        "test",
    )
    assert [p.id for p in data.pairs if p.prompt == first] == [
        f"s-{first.id}-{i}-{j}" for i in (0, 1) for j in (0, 1)
    ]


def test_a_prompt_may_be_a_conversation(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u", "language": "en"},
    ]
    data = load(write_lines(tmp_path / "d.jsonl", row(messages)))
    assert data.prompts[0].messages == (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
    )


def test_prompts_alone(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "d.jsonl",
        {"prompt": "a", "kind": "safe"},
        {"prompt": "b"},
        {"prompt": "c", "kind": "unsafe", "category": "k"},
    )
    data = load(file, "prompts", kind="safe", split={"policy_eval": 1.0})
    assert not data.pairs and not texts_to_encode(data)
    assert sorted((p.messages[0]["content"], p.kind, p.category) for p in data.prompts) == [
        ("a", "safe", ""),
        ("b", "safe", ""),
        ("c", "unsafe", "k"),
    ]
    assert len(prompts_in(data, "policy_eval", "safe")) == 2 and not prompts_in(data, "ppo")


REWARDBENCH2 = [
    {
        "id": "1",
        "prompt": "p",
        "chosen": ["c"],
        "rejected": ["x", "y", "z"],
        "num_correct": 1,
        "total_completions": 4,
        "subset": "Safety",
    },
    {
        "id": "2",
        "prompt": "q",
        "chosen": ["c", "d"],
        "rejected": ["x"],
        "num_correct": 2,
        "total_completions": 3,
        "subset": "Ties",
    },
]


@pytest.mark.parametrize("name", ["test.parquet", "test.jsonl", "test.jsonl.gz", "test.json"])
def test_rewardbench2_as_published(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name.endswith("parquet"):
        import pandas as pd

        pd.DataFrame(REWARDBENCH2).to_parquet(file)
    elif name == "test.json":
        file.write_text(json.dumps(REWARDBENCH2, indent=1))
    else:
        text = "".join(json.dumps(r) + "\n" for r in REWARDBENCH2).encode()
        file.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    safety = load(file, "rewardbench2", subset="Safety")
    assert compared(safety) == [("p", "c", "x"), ("p", "c", "y"), ("p", "c", "z")]
    assert safety.prompts[0].category == "Safety"
    assert safety.skipped == {"s: other subset": 1}
    assert compared(load(tmp_path, "rewardbench2")) == [
        *compared(safety),
        ("q", "c", "x"),
        ("q", "d", "x"),
    ]
    assert (
        "holds no rows for format rewardbench2 (2 left out: other subset); check its path"
        in complaint(file, "rewardbench2", subset="safety")
    )


def test_labelled_answers_alone_are_crossed(tmp_path: Path) -> None:
    for label, answers in (("chosen", ["c", "d"]), ("rejected", ["x", "y", "x"])):
        write_lines(
            tmp_path / f"test_{label}.jsonl",
            *(
                {"question": "p", "answer": a, "label": label, "question_id": 1, "id": 2}
                for a in answers
            ),
        )
    expected = [("p", "c", "x"), ("p", "c", "y"), ("p", "d", "x"), ("p", "d", "y")]
    assert compared(load(tmp_path, "rewardbench2_sarm")) == expected
    # The training file holds the same prompts: no further ones, whatever the order.
    write_lines(tmp_path / "train.jsonl", row("p", "c", "x"), row("p", "d", "y"))
    both = load(tmp_path, "rewardbench2_sarm")
    assert compared(both) == expected and len(both.prompts) == 1
    assert compared(load(tmp_path, "rewardbench2_sarm", files=("train.jsonl",))) == [
        ("p", "c", "x"),
        ("p", "d", "y"),
    ]
    assert (
        compared(load(tmp_path, "rewardbench2_sarm", files=("train.jsonl", "test_rejected.jsonl")))
        == expected
    )
    assert not load(tmp_path, "rewardbench2_sarm", files=("test_chosen.jsonl",)).pairs


def test_an_unknown_label_is_refused(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "d.jsonl", {"question": "p", "answer": "a", "label": "good"})
    assert (
        complaint(file, "rewardbench2_sarm")
        == f"{file}, line 1: 'label' must be chosen or rejected, not 'good'"
    )


def test_rmb_pairs_and_best_of_n(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "u", "language": "en"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
    ]
    pair = {
        "pair_uid": "1",
        "conversation_input": turns,
        "chosen": {"llm_name": "m", "answer": "c"},
        "reject": {"llm_name": "n", "answer": "r"},
        "category_path": "Pairwise_set/Harmlessness/S3",
    }
    best = {
        "bon_uid": "1",
        "conversation_input": turns,
        "bon_best": {"answer": "c"},
        "loser_list": [{"answer": "x"}, {"answer": "y"}],
    }
    (tmp_path / "pairs").mkdir()
    (tmp_path / "bon").mkdir()
    (tmp_path / "pairs" / "S3.json").write_text(json.dumps([pair]))
    (tmp_path / "bon" / "S3.json").write_text(json.dumps([best]))
    pairs, bon = load(tmp_path / "pairs", "rmb_pairs"), load(tmp_path / "bon", "rmb_bon")
    assert compared(pairs) == [("v", "c", "r")] and compared(bon) == [
        ("v", "c", "x"),
        ("v", "c", "y"),
    ]
    assert pairs.prompts == bon.prompts
    assert pairs.prompts[0].category == "S3" and [m["role"] for m in pairs.prompts[0].messages] == [
        "user",
        "assistant",
        "user",
    ]
    assert "record 1: 'bon_best' is missing; this row has 'pair_uid'" in complaint(
        tmp_path / "pairs", "rmb_bon"
    )
    (tmp_path / "pairs" / "S3.json").write_text(
        json.dumps([pair, {**pair, "reject": {"answer": None}}])
    )
    assert "record 2: 'answer' must be text, not NoneType" in complaint(
        tmp_path / "pairs", "rmb_pairs"
    )


def test_hh_rlhf_transcripts(tmp_path: Path) -> None:
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?"
    rows = [
        {"chosen": f"{start}\n\nAssistant: no\n\nsorry", "rejected": f"{start}\n\nAssistant: yes"},
        {"chosen": "Human: one\n\nAssistant: a", "rejected": "Human: one\n\nAssistant: b"},
        {"chosen": f"{start}\n\nAssistant: a", "rejected": "\n\nHuman: other\n\nAssistant: b"},
        {"chosen": start, "rejected": start},
        {
            "chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c",
            "rejected": "\n\nHuman: a\n\nHuman: b\n\nAssistant: d",
        },
        {
            "chosen": "lost \n\nHuman: a\n\nAssistant: c",
            "rejected": "lost \n\nHuman: a\n\nAssistant: d",
        },
        {"chosen": "\n\nHuman: e\n\nAssistant:", "rejected": "\n\nHuman: e\n\nAssistant: d"},
        {"chosen": "\n\nHuman: \n\nAssistant: c", "rejected": "\n\nHuman: \n\nAssistant: d"},
    ]
    data = load(write_lines(tmp_path / "d.jsonl", *rows), "hh_rlhf")
    assert compared(data) == [("how?", "no\n\nsorry", "yes"), ("one", "a", "b")]
    conversation = next(p for p in data.prompts if len(p.messages) > 1)
    assert [(m["role"], m["content"]) for m in conversation.messages] == [
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "how?"),
    ]
    assert data.skipped == {
        "s: transcripts differ before the last turn": 1,
        "s: turns of Human and Assistant do not alternate up to an answer": 3,
        "s: empty response": 1,
        "s: empty prompt": 1,
    }


# Odd data


def test_duplicate_prompts_merge_under_one_id(tmp_path: Path) -> None:
    rows = [
        row("p  q", "a", "x"),
        row(" p q\n", "b", "y"),
        row("p q", "a", "x"),
        row("p q", "a", "z"),
        row("P q", "a", "x"),
    ]
    data = load(write_lines(tmp_path / "d.jsonl", *rows))
    assert len(data.prompts) == 2
    # Only what a row compares is compared: b was never set against x or z.
    assert compared(data) == [
        ("P q", "a", "x"),
        ("p  q", "a", "x"),
        ("p  q", "a", "z"),
        ("p  q", "b", "y"),
    ]


def test_unicode_forms_of_a_prompt_are_one(tmp_path: Path) -> None:
    assert (
        len(load(write_lines(tmp_path / "d.jsonl", row("caf\u00e9"), row("cafe\u0301"))).prompts)
        == 1
    )


def test_equal_and_empty_responses_are_left_out_and_counted(tmp_path: Path) -> None:
    data = load(
        write_lines(
            tmp_path / "d.jsonl",
            row("p", "same", ["same", "x"]),
            row("q", " ", "x"),
            row("r", "c", ""),
            row(" ", "c", "r"),
        )
    )
    assert compared(data) == [("p", "same", "x")]
    assert data.skipped == {
        "s: chosen equals rejected": 1,
        "s: empty response": 2,
        "s: empty prompt": 1,
    }


def test_one_row_is_enough(tmp_path: Path) -> None:
    data = load(write_lines(tmp_path / "d.jsonl", row()), split=SPLIT)
    assert len(data.prompts) == len(data.pairs) == 1
    assert data.prompts[0].part in SPLIT


@pytest.mark.parametrize("key", ["prompt", "chosen", "rejected"])
def test_long_texts_pass_whole(key: str, tmp_path: Path) -> None:
    long = "h\u00e4rm " * 20_000
    data = load(write_lines(tmp_path / "d.jsonl", row(**{key: long})))
    assert compared(data)[0][["prompt", "chosen", "rejected"].index(key)] == long
    assert len(texts_to_encode(data)) == 2


def test_odd_line_ends_marks_and_gaps_pass(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    lines = [
        json.dumps(row("a")),
        "",
        "   ",
        json.dumps(row("b", "x\u2028y", "\U0001f600"), ensure_ascii=False),
    ]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert compared(load(file)) == [("a", "c", "r"), ("b", "x\u2028y", "\U0001f600")]


def test_where_every_row_is_left_out_the_reasons_are_told(tmp_path: Path) -> None:
    def turns(question: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    lines = [json.dumps({"chosen": turns("q", "a"), "rejected": turns("r", "b")})] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        UserError, match=r"\(3 left out: conversations differ before the last turn\)"
    ):
        load(tmp_path / "rows.jsonl")
    transcript = "\n\nHuman: {}\n\nAssistant: a".format
    two = [
        {"chosen": transcript("q"), "rejected": transcript("r")},
        {"chosen": transcript("q"), "rejected": "b"},
    ]
    with pytest.raises(
        UserError,
        match=r"\(1 left out: transcripts differ before the last turn, 1 left out: turns of Human",
    ):
        load(write_lines(tmp_path / "two.jsonl", *two), "hh_rlhf")


GOOD = json.dumps(row()).encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"[]", "is empty"),
        (
            GOOD + b'\n{"prompt": "caf\xe9"}',
            "line 2: not UTF-8 (invalid continuation byte at byte 15); re-encode",
        ),
        ("\ufeff".encode("utf-16-le") + GOOD.decode().encode("utf-16-le"), "line 1: not UTF-8"),
        (GOOD + b"\n" + GOOD[:-9], "line 2: not JSON"),
        (GOOD + b"\n" + GOOD[:-9], "may be cut short"),
        (
            GOOD + b'\n{"prompt": "a", "chosen": "c", "prompt": "b"}',
            "line 2: not JSON ('prompt' is given twice)",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "run git lfs pull"),
        (b"[" + GOOD + b", ", "not JSON"),
        (GOOD + b'\n"text"', "line 2: expected an object, found str"),
        (b"[1]", "row.jsonl, record 1: expected an object, found int"),
        (
            b'{"chosen": "c", "rejected": "r"}',
            "line 1: 'prompt' is missing; this row has 'chosen', 'rejected'",
        ),
        (b"{}", "line 1: 'prompt' is missing; this row has no keys"),
        (b'{"prompt": "p", "chosen": "c"}', "line 1: 'rejected' is missing"),
        (
            b'{"prompt": 3, "chosen": "c", "rejected": "r"}',
            "line 1: 'prompt' must be a string or a list of messages",
        ),
        (
            b'{"prompt": [], "chosen": "c", "rejected": "r"}',
            "line 1: 'prompt' must be a string or a list of messages",
        ),
        (
            b'{"prompt": ["a"], "chosen": "c", "rejected": "r"}',
            "line 1: 'prompt' must be a string or a list of messages",
        ),
        (
            b'{"prompt": [{"role": "user"}], "chosen": "c", "rejected": "r"}',
            "line 1: 'content' is missing",
        ),
        (
            b'{"prompt": [{"role": "human", "content": "a"}], "chosen": "c", "rejected": "r"}',
            "it has human",
        ),
        (
            b'{"prompt": [{"role": "assistant", "content": "a"}], "chosen": "c", "rejected": "r"}',
            "end with the user's; it has assistant",
        ),
        (
            b'{"prompt": "p", "chosen": [], "rejected": "r"}',
            "line 1: 'chosen' must be text, not list",
        ),
        (
            b'{"prompt": "p", "chosen": ["c", null], "rejected": "r"}',
            "line 1: 'chosen' must be text, not NoneType",
        ),
        (
            b'{"prompt": "p", "chosen": "c", "rejected": {"a": 1}}',
            "line 1: 'rejected' must be text, not dict",
        ),
        (
            b'{"prompt": "p", "chosen": "\\ud83d", "rejected": "r"}',
            "line 1: 'chosen' holds half a surrogate pair at character 0",
        ),
        (
            b'{"prompt": "p", "chosen": "c", "rejected": "r", "kind": "nice"}',
            "line 1: 'kind' must be safe or unsafe, not 'nice'",
        ),
    ],
)
def test_bad_rows_are_refused_with_file_and_line(
    content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / "row.jsonl").write_bytes(content)
    message = complaint(tmp_path / "row.jsonl")
    assert words in message and str(tmp_path / "row.jsonl") in message


@pytest.mark.parametrize("length", [0, 5, 15, -20, -8, -1])
def test_a_gzip_file_cut_short_is_refused(length: int, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl.gz"
    file.write_bytes(
        gzip.compress("".join(json.dumps(row(f"p{i}")) + "\n" for i in range(500)).encode())[
            :length
        ]
    )
    assert str(file) in complaint(file)


def test_a_gzip_file_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl.gz"
    whole = gzip.compress(
        "".join(
            json.dumps(row(f"p{i}", hashlib.sha256(bytes([i % 256])).hexdigest())) + "\n"
            for i in range(500)
        ).encode()
    )
    for at in range(20, len(whole), len(whole) // 15):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert str(file) in complaint(file)


def test_a_parquet_file_cut_short_or_of_other_columns_is_refused(tmp_path: Path) -> None:
    import pandas as pd

    file = tmp_path / "d.parquet"
    pd.DataFrame([row("p", ["a"], ["b"]), row("q", None, ["b"])]).to_parquet(file)
    assert complaint(file) == f"{file}, row 2: 'chosen' must be text, not NoneType"
    whole = file.read_bytes()
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert f"{file}: not a whole Parquet file" in complaint(file)
    pd.DataFrame([{"question": "p"}]).to_parquet(file)
    assert "row 1: 'prompt' is missing; this row has 'question'" in complaint(file)


def test_places_that_hold_nothing_are_named(tmp_path: Path) -> None:
    assert "none.jsonl does not exist; correct data.sources.s.path" in complaint(
        tmp_path / "none.jsonl"
    )
    (tmp_path / "README.md").write_text("no data")
    assert "holds no file that ends in .jsonl" in complaint(tmp_path)
    write_lines(tmp_path / "a.jsonl", row())
    assert "b.jsonl" in complaint(tmp_path, files=("a.jsonl", "b.jsonl"))
    (tmp_path / "b.jsonl").touch()
    assert "b.jsonl is empty" in complaint(tmp_path)


# The split


@pytest.fixture
def many(tmp_path: Path) -> Path:
    return write_lines(
        tmp_path / "many.jsonl",
        *(row(f"prompt {i}", f"c{i}", [f"r{i}", f"s{i}"]) for i in range(2000)),
    )


def test_shares_are_as_asked_and_the_rest_is_unused(many: Path) -> None:
    data = load(many, split={"sarm_train": 0.2, "test": 0.5})
    counts = Counter(p.part for p in data.prompts)
    # Five standard deviations of a binomial.
    assert (
        abs(counts["sarm_train"] - 400) < 90
        and abs(counts["test"] - 1000) < 112
        and abs(counts[None] - 600) < 103
    )
    assert set(counts) == {"sarm_train", "test", None}


def test_the_part_is_the_hash_against_cumulative_shares(many: Path) -> None:
    for prompt in load(many, split=SPLIT).prompts[:200]:
        u = int(hashlib.sha256(f"sarm:{prompt.id}".encode()).hexdigest()[:16], 16) / 2**64
        edge = 0.0
        for part in PARTS:
            edge += SPLIT.get(part, 0.0)
            if u < edge:
                break
        assert prompt.part == part


def test_the_split_knows_neither_order_nor_neighbours(many: Path, tmp_path: Path) -> None:
    whole = load(many, split=SPLIT)
    lines = many.read_text().splitlines(keepends=True)
    (tmp_path / "half.jsonl").write_text("".join(reversed(lines[::2])))
    half = load(tmp_path / "half.jsonl", split=SPLIT)
    assert {(p.id, p.part) for p in half.prompts} <= {(p.id, p.part) for p in whole.prompts}
    (tmp_path / "back.jsonl").write_text("".join(reversed(lines)))
    assert load(tmp_path / "back.jsonl", split=SPLIT) == whole


def test_a_salt_changes_the_split(many: Path) -> None:
    parts = [[p.part for p in load(many, split=SPLIT, salt=salt).prompts] for salt in ("a", "b")]
    agree = sum(a == b for a, b in zip(*parts, strict=True)) / 2000
    assert abs(agree - sum(share**2 for share in SPLIT.values())) < 0.06


def test_a_limit_thins_every_part_alike(many: Path) -> None:
    whole, few = load(many, split=SPLIT), load(many, split=SPLIT, limit=500)
    assert len(few.prompts) == 500
    assert {p.id for p in load(many, limit=100).prompts} < {p.id for p in few.prompts}
    counts = Counter(p.part for p in few.prompts)
    for part, share in SPLIT.items():
        assert abs(counts[part] - 500 * share) < 5 * (500 * share * (1 - share)) ** 0.5
    assert {(p.id, p.part) for p in few.prompts} < {(p.id, p.part) for p in whole.prompts}


def test_a_prompt_in_two_sources_follows_the_first(tmp_path: Path) -> None:
    first = write_lines(
        tmp_path / "first.jsonl", row("shared", "a", "x", category="one"), row("mine")
    )
    second = write_lines(
        tmp_path / "second.jsonl", row("shared ", "a", "x"), row("shared", "a", "y"), row("other")
    )
    sources = {
        "one": source(first, split={"test": 1.0}),
        "two": source(second, split={"ppo": 1.0}, kind="safe"),
    }
    data = load_data(DataConfig(sources=sources))
    shared = [p for p in data.prompts if p.messages[0]["content"] == "shared"]
    assert [(p.source, p.part, p.kind, p.category) for p in shared] == [
        ("one", "test", "unsafe", "one")
    ]
    assert sorted((p.source, p.rejected) for p in data.pairs if p.prompt == shared[0]) == [
        ("one", "x"),
        ("two", "y"),
    ]
    assert [p.rejected for p in pairs_in(data, "test", "two")] == ["y"]
    assert Counter(p.part for p in data.prompts) == {"test": 2, "ppo": 1}
    assert Counter(
        p.part for p in load_data(DataConfig(sources=dict(reversed(sources.items())))).prompts
    ) == {"test": 1, "ppo": 2}


def test_part_of_takes_all_and_nothing() -> None:
    ids = [f"{i:016x}" for i in range(1000)]
    assert {part_of(i, "s", source("x", split={"test": 1.0})) for i in ids} == {"test"}
    assert {part_of(i, "s", source("x", split={"test": 0.0})) for i in ids} == {None}
    assert {part_of(i, "s", source("x", split=SPLIT)) for i in ids} == set(SPLIT)


# Texts


def test_texts_to_encode_are_distinct_sorted_and_of_three_parts(many: Path) -> None:
    data = load(many, split=SPLIT)
    texts = texts_to_encode(data)
    assert [(t.prompt_id, t.id) for t in texts] == sorted({(t.prompt_id, t.id) for t in texts})
    assert {t.part for t in texts} == {"discovery", "validation", "test"}
    pairs = [pair for part in ("discovery", "validation", "test") for pair in pairs_in(data, part)]  # type: ignore[arg-type]
    assert len(texts) == len(pairs) * 3 // 2, "a chosen response shared by two pairs is one text"
    by_id = {t.id: t for t in texts}
    for pair in pairs:
        text = by_id[
            f"{text_id((*pair.prompt.messages, {'role': 'assistant', 'content': pair.chosen}))}-c"
        ]
        assert (text.label, text.prompt_id, text.messages[-1]["content"]) == (
            "chosen",
            pair.prompt.id,
            pair.chosen,
        )


def test_a_response_on_both_sides_is_listed_once_a_label(tmp_path: Path) -> None:
    texts = texts_to_encode(
        load(write_lines(tmp_path / "d.jsonl", row("p", "a", "b"), row("p", "b", "c")))
    )
    assert sorted((t.messages[-1]["content"], t.label) for t in texts) == [
        ("a", "chosen"),
        ("b", "chosen"),
        ("b", "rejected"),
        ("c", "rejected"),
    ]


def test_ids_tell_texts_apart() -> None:
    def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
        return [{"role": role, "content": content} for role, content in turns]

    assert prompt_id(said(("user", " a  b\n"))) == prompt_id(said(("user", "a b")))
    assert text_id(said(("user", "a "))) != text_id(said(("user", "a")))
    different = [
        said(("user", "ab")),
        said(("user", "a"), ("user", "b")),
        said(("system", "ab")),
        said(("user", "AB")),
        said(("user", "a"), ("assistant", "b")),
    ]
    assert len({prompt_id(m) for m in different}) == len({text_id(m) for m in different}) == 5
    assert prompt_id(said(("user", "a b"))) == hashlib.sha256(b'[["user", "a b"]]').hexdigest()[:16]


# The shipped data


def test_the_demo_data_are_as_their_page_says() -> None:
    pairs = load("data/demo/pairs.jsonl", split=SPLIT)
    assert len(pairs.prompts) == len(pairs.pairs) == 408 and not pairs.skipped
    assert set(Counter(p.category for p in pairs.prompts).values()) == {34}
    safe = load("data/demo/lookalikes.jsonl", "prompts", kind="safe", split={"policy_eval": 1.0})
    assert len(safe.prompts) == 120 and set(Counter(p.category for p in safe.prompts).values()) == {
        10
    }
    assert {p.category for p in safe.prompts} == {p.category for p in pairs.prompts}
    assert not {p.id for p in safe.prompts} & {p.id for p in pairs.prompts}
    # The page and the demo's wall time rest on these.
    assert Counter(p.part for p in pairs.prompts) == {
        "discovery": 121,
        "validation": 81,
        "test": 68,
        "ppo": 86,
        "policy_eval": 52,
    }
    words = {
        label: [len(getattr(p, label).split()) for p in pairs.pairs]
        for label in ("chosen", "rejected")
    }
    assert abs(sum(words["chosen"]) - sum(words["rejected"])) < 0.02 * sum(words["chosen"])


def test_the_second_demo_source_is_of_another_style_that_words_hardly_give_away() -> None:
    first = load("data/demo/pairs.jsonl", split=SPLIT)
    advice = load("data/demo/advice.jsonl", split=SPLIT)
    assert len(advice.prompts) == len(advice.pairs) == 154 and not advice.skipped
    kinds = Counter(p.category for p in advice.prompts)
    assert set(kinds) == {p.category for p in first.prompts} and set(kinds.values()) == {12, 13}
    assert not {p.id for p in advice.prompts} & {p.id for p in first.prompts}
    longer = [len(p.chosen) > len(p.rejected) for p in advice.pairs]
    assert 0.45 < sum(longer) / len(longer) < 0.55
    trigrams = [
        {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
        for p in advice.pairs
        for words in (re.findall(r"\w+", answer.lower()) for answer in (p.chosen, p.rejected))
    ]
    shared = [len(a & b) / min(len(a), len(b)) for a, b in itertools.combinations(trigrams, 2)]
    assert max(shared) < 0.125
    # Words fitted on half of the prompts tell the other half's sides apart.
    half = [sorted(source.pairs, key=lambda p: p.prompt.id) for source in (first, advice)]
    accuracy = []
    for pairs in half:
        fit, rest = pairs[::2], pairs[1::2]
        weight = np.full(len(fit), 1 / len(fit))
        score = word_scores(fit, weight, np.arange(len(fit)))
        margin = score([p.chosen for p in rest]) - score([p.rejected for p in rest])
        accuracy.append((margin > 0).mean())
    assert accuracy[0] > 0.97 and accuracy[1] < 0.9


@pytest.mark.parametrize(("name", "each"), [("letters", 7), ("notes", 5)])
def test_letters_and_notes_hold_harmful_requests_and_lookalikes_of_even_length(
    name: str, each: int
) -> None:
    data = load(f"data/demo/{name}.jsonl", split={"discovery": 1.0})
    assert len(data.prompts) == len(data.pairs) == 18 * each and not data.skipped
    kinds = Counter((p.kind, p.category) for p in data.prompts)
    assert set(kinds.values()) == {each}
    assert Counter(kind for kind, _ in kinds) == {"unsafe": 14, "safe": 4}
    first = load("data/demo/pairs.jsonl", split=SPLIT)
    assert {p.category for p in first.prompts} < {c for kind, c in kinds if kind == "unsafe"}
    longer = [len(p.chosen) > len(p.rejected) for p in data.pairs]
    assert 0.45 < sum(longer) / len(longer) < 0.55


def test_no_two_texts_of_letters_and_notes_say_nearly_the_same_nor_as_another_source_does() -> None:
    files = ["train/pairs", *(f"demo/{n}" for n in ("pairs", "advice", "letters", "notes"))]
    texts = {
        f"{file}/{row['id']}/{part}": row[part]
        for file in files
        for row in rows(ROOT / "data" / f"{file}.jsonl")
        for part in ("prompt", "chosen", "rejected")
    }
    new = ("demo/letters", "demo/notes")
    assert [pair for pair in shared(texts) if any(name.startswith(new) for name in pair)] == []


def test_the_examples_of_the_data_page_are_valid() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    sources = {
        name: SourceConfig.model_validate(s)
        for block in blocks
        for name, s in block.get("data", {"sources": block})["sources"].items()
    }
    assert {s.format for s in sources.values()} | {"rewardbench2"} == set(FORMATS)
    assert all(f"`{format_}`" in page for format_ in FORMATS)


# Real data


def test_upstream_sarm_leak_is_one_set_of_450_prompts(real_data: Path) -> None:
    folder = real_data / "rewardbench2_safety"
    everything = load(folder, "rewardbench2_sarm", split=SPLIT)
    assert len(everything.prompts) == 450 and len(everything.pairs) == 1349
    seen: dict[str, set[str | None]] = {}
    for pair in everything.pairs:
        seen.setdefault(pair.prompt.messages[0]["content"], set()).add(pair.prompt.part)
    assert len(seen) == 450 and all(len(parts) == 1 for parts in seen.values())
    for files in (("train.jsonl",), ("test_chosen.jsonl", "test_rejected.jsonl")):
        alone = load(folder, "rewardbench2_sarm", split=SPLIT, files=files)
        assert compared(alone) == compared(everything)
        assert alone.prompts == everything.prompts
    # Two configs that give upstream's train and test files different parts: the first decides, none
    # is on both sides.
    sources = {
        "train": source(folder / "train.jsonl", "rewardbench2_sarm", split={"sarm_train": 1.0}),
        "test": source(
            folder,
            "rewardbench2_sarm",
            split={"test": 1.0},
            files=("test_chosen.jsonl", "test_rejected.jsonl"),
        ),
    }
    both = load_data(DataConfig(sources=sources))
    assert Counter(p.part for p in both.prompts) == {"sarm_train": 450} and len(both.pairs) == 1349


def test_rewardbench2_texts_are_those_of_the_raw_file(real_data: Path) -> None:
    raw = [
        json.loads(line)
        for line in (real_data / "rewardbench2_safety" / "train.jsonl").open(encoding="utf-8")
    ]
    data = load(real_data / "rewardbench2_safety", "rewardbench2_sarm")
    assert compared(data) == sorted({(r["prompt"], r["chosen"], r["rejected"]) for r in raw})
    texts = {(t.messages[0]["content"], t.messages[1]["content"]) for t in texts_to_encode(data)}
    assert texts == {(r["prompt"], r[label]) for r in raw for label in ("chosen", "rejected")}


RMB_ROWS = {"S1": 459, "S10": 360, "S2": 1040, "S3": 739, "S4": 537, "S6": 317, "S8": 519}


def test_rmb_counts(real_data: Path) -> None:
    folder = real_data / "rmb_harmlessness"
    raw = {
        file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")
    }
    assert {name: len(rows) for name, rows in raw.items()} == RMB_ROWS
    data = load(folder, "rmb_pairs")
    turns = {
        (
            name,
            json.dumps([m["content"] for m in r["conversation_input"]]),
            r["chosen"]["answer"],
            r["reject"]["answer"],
        )
        for name in raw
        for r in raw[name]
    }
    # Seven rows, five distinct, have the chosen answer for the rejected one.
    assert (
        sum(r["chosen"]["answer"] == r["reject"]["answer"] for rows in raw.values() for r in rows)
        == 7
    )
    pairs = Counter(
        (prompt_id(r["conversation_input"]), r["chosen"]["answer"], r["reject"]["answer"])
        for rows in raw.values()
        for r in rows
    )
    repeats = sum(pairs.values()) - len(pairs)
    assert data.skipped == {"s: chosen equals rejected": 5, "s: repeated pair": repeats}
    assert len(data.pairs) == len({t for t in turns if t[2] != t[3]}) == 3947
    assert len(data.prompts) == 554 and {p.category for p in data.prompts} == set(RMB_ROWS)
    assert Counter(p.prompt.category for p in data.pairs) == Counter(
        name for name, _, c, r in turns if c != r
    )
    assert Counter(len(p.messages) for p in data.prompts).keys() == {1, 3, 5}


def test_hh_rlhf_counts(real_data: Path) -> None:
    data = load(real_data / "hh_rlhf_harmless", "hh_rlhf")
    assert len(data.pairs) + sum(data.skipped.values()) == 2312
    assert len(data.pairs) == 2299 and len(data.prompts) == 2301
    for prompt in data.prompts:
        assert [m["role"] for m in prompt.messages] == ["user", "assistant"] * (
            len(prompt.messages) // 2
        ) + ["user"]


def test_no_prompt_is_in_two_parts_over_all_sources(real_data: Path) -> None:
    formats = {
        "rewardbench2_safety": "rewardbench2_sarm",
        "rmb_harmlessness": "rmb_pairs",
        "hh_rlhf_harmless": "hh_rlhf",
    }
    data = load_data(
        DataConfig(
            sources={
                name: source(real_data / name, format_, split=SPLIT)
                for name, format_ in formats.items()
            }
        )
    )
    parts: dict[str, set[str | None]] = {}
    for prompt in data.prompts:
        content = json.dumps([(m["role"], " ".join(m["content"].split())) for m in prompt.messages])
        parts.setdefault(content, set()).add(prompt.part)
    assert all(len(found) == 1 for found in parts.values())
    assert len({p.id for p in data.pairs}) == len(data.pairs) == 1349 + 3947 + 2299


# The hub, over loopback

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The two things the hub does for a file: small ones are served, large ones are a redirect to
    a store.
    """

    files: dict[str, bytes]
    requests: list[str]

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        self.requests.append(f"{self.command} {self.path}")
        in_store = self.path.startswith("/store/")
        prefix = "/store/" if in_store else f"/datasets/owner/bench/resolve/{COMMIT}/"
        name = self.path.removeprefix(prefix)
        body = self.files.get(name, b"") if self.path.startswith(prefix) else b""
        if not body:
            self.send_response(404)
            self.send_header(
                "X-Error-Code",
                (
                    "EntryNotFound"
                    if self.path.startswith("/datasets/owner/bench/")
                    else "RepoNotFound"
                ),
            )
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        if name.endswith(".parquet") and not in_store:
            self.send_response(302)
            self.send_header("Location", f"http://{self.headers['Host']}/store/{name}")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Etag", etag)
            self.send_header("X-Linked-Size", str(len(body)))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    """The address of a hub that holds owner/bench, and its handler."""
    import pandas as pd

    pd.DataFrame(REWARDBENCH2).to_parquet(tmp_path / "made.parquet")
    lines = "".join(json.dumps(row(f"p{i}")) + "\n" for i in range(5)).encode()
    files = {
        "data/test.parquet": (tmp_path / "made.parquet").read_bytes(),
        "test.jsonl.gz": gzip.compress(lines),
    }
    handler = type("Handler", (Hub,), {"files": files, "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()
    thread.join()


LOADER = """
import json, sys
from sarm.config import DataConfig, SourceConfig, UserError
from sarm.data.datasets import load_data
download, sources = json.loads(sys.argv[1])
try:
    sources = {name: SourceConfig(**source) for name, source in sources.items()}
    data = load_data(DataConfig(sources=sources), download=download)
    rows = sorted([p.prompt.messages[-1]["content"], p.chosen, p.rejected] for p in data.pairs)
    print(json.dumps([rows, sorted({"torch", "transformers"} & set(sys.modules))]))
except UserError as error:
    print("UserError:", error)
"""


def load_from(
    endpoint: str, cache: Path, *, download: bool, offline: bool = False, **sources: dict[str, Any]
) -> str:
    """What a fresh process reads or says: huggingface_hub reads HF_ENDPOINT when it is imported."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("HF_") and not key.lower().endswith("_proxy")
    }
    env = {
        **clean,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "NO_PROXY": "*",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    done = subprocess.run(
        [sys.executable, "-c", LOADER, json.dumps([download, sources])],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def at_hub(format_: str, *files: str, **more: Any) -> dict[str, Any]:
    return {
        "format": format_,
        "label": "L",
        "repo": "owner/bench",
        "revision": COMMIT,
        "files": list(files),
        "split": {"test": 1.0},
        **more,
    }


def test_data_from_the_hub_at_a_pinned_revision(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    endpoint, handler = hub
    sources = {
        "rb2": at_hub("rewardbench2", "data/test.parquet", subset="Safety"),
        "plain": at_hub("jsonl", "test.jsonl.gz"),
    }
    before = load_from(endpoint, tmp_path / "cache", download=False, **sources)
    assert (
        before
        == f"UserError: data source rb2: owner/bench at {COMMIT} is not in the cache; run make"
        " fetch where there is a network"
    )
    assert handler.requests == [], "without download nothing asks the network"

    expected = [[["p", "c", x] for x in "xyz"] + [[f"p{i}", "c", "r"] for i in range(5)], []]
    assert json.loads(load_from(endpoint, tmp_path / "cache", download=True, **sources)) == expected
    assert all(COMMIT in r or "/store/" in r for r in handler.requests if " /api/" not in r)
    asked = len(handler.requests)
    assert (
        json.loads(load_from(endpoint, tmp_path / "cache", download=False, **sources)) == expected
    )
    assert len(handler.requests) == asked, "what is in the cache is not asked for again"


def test_what_the_hub_does_not_have_is_named(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    endpoint, _ = hub
    missing_file = load_from(
        endpoint, tmp_path / "cache", download=True, s=at_hub("jsonl", "none.jsonl")
    )
    assert (
        missing_file.startswith(
            f"UserError: data source s: owner/bench at {COMMIT} could not be fetched: "
        )
        and "none.jsonl" in missing_file
    )
    missing_repo = load_from(
        endpoint,
        tmp_path / "cache",
        download=True,
        s={**at_hub("jsonl", "a.jsonl"), "repo": "owner/other"},
    )
    assert missing_repo.startswith(
        f"UserError: data source s: owner/other at {COMMIT} could not be fetched: "
    )
    malformed = load_from(
        endpoint,
        tmp_path / "cache",
        download=True,
        s={**at_hub("jsonl", "a.jsonl"), "repo": "a/b/c"},
    )
    assert malformed.startswith("UserError: data source s: a/b/c at ")


def test_a_hub_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    # Nobody listens on port 9 of loopback; offline mode spares the client's half minute of trying
    # again.
    message = load_from(
        "http://127.0.0.1:9",
        tmp_path / "cache",
        download=True,
        offline=True,
        s=at_hub("jsonl", "a.jsonl"),
    )
    assert (
        message
        == f"UserError: data source s: owner/bench at {COMMIT}: the hub could not be reached; check"
        " the network and HF_ENDPOINT"
    )


def test_texts_to_encode_know_source_part_and_label(tmp_path: Path) -> None:
    one = write_lines(tmp_path / "1", row("p", "c", "r"), row("p", "r", "x"))
    two = write_lines(tmp_path / "2", row("q", "c", "r"))
    sources = {"one": source(one), "two": source(two, split={"validation": 1.0})}
    texts = texts_to_encode(load_data(DataConfig(sources=sources)))
    assert sorted(
        (t.source, t.part, t.label, *(m["content"] for m in t.messages)) for t in texts
    ) == [
        ("one", "test", "chosen", "p", "c"),
        ("one", "test", "chosen", "p", "r"),
        ("one", "test", "rejected", "p", "r"),
        ("one", "test", "rejected", "p", "x"),
        ("two", "validation", "chosen", "q", "c"),
        ("two", "validation", "rejected", "q", "r"),
    ]
    for text in texts:
        assert text.id == f"{text_id(text.messages)}-{text.label[0]}"
        assert text.prompt_id == prompt_id(text.messages[:1])
