"""The public forms of preference data, and the kinds of file they come in."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sarm.config import DataConfig, SourceConfig, UserError
from sarm.data.datasets import Data, load_data, root_id
from sarm.data.files import read_records
from sarm.data.formats import FORMATS, labelled_answer

USER, BOT = "user", "assistant"


def said(*turns: str) -> list[dict[str, str]]:
    return [{"role": (USER, BOT)[i % 2], "content": turn} for i, turn in enumerate(turns)]


def write(file: Path, *records: Any) -> Path:
    file.write_text("\n".join(json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return file


def load(path: Path, form: str = "jsonl", part: str = "test", **more: Any) -> Data:
    source = {"format": form, "label": "S", "path": str(path), "split": {part: 1.0}} | more
    return load_data(DataConfig(sources={"s": SourceConfig.model_validate(source)}))


def pairs(data: Data) -> list[tuple[list[str], str, str]]:
    return sorted(
        ([m["content"] for m in p.prompt.messages], p.chosen, p.rejected) for p in data.pairs
    )


# Forms


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": said("q", "no"), "rejected": said("q", "yes")},
        {"prompt": said("q"), "chosen": said("q", "no")[1:], "rejected": said("q", "yes")[1:]},
        {"prompt": said("q"), "chosen": said("q", "no"), "rejected": said("q", "yes")},
        {"prompt": "q", "chosen": said("q", "no")[1:], "rejected": said("q", "yes")[1:]},
        {"prompt": "q", "chosen": said("q", "no"), "rejected": said("q", "yes")},
        {"prompt": None, "chosen": said("q", "no"), "rejected": said("q", "yes")},
        {
            "chosen": [
                {"role": USER, "content": [{"type": "text", "text": "q"}]},
                said("", "no")[1],
            ],
            "rejected": said("q", "yes"),
        },
    ],
    ids=["skywork", "trl", "trl-whole", "text", "text-whole", "no-prompt", "parts"],
)
def test_responses_as_messages(row: Any, tmp_path: Path) -> None:
    data = load(write(tmp_path / "d.jsonl", row | {"category": "c"}))
    assert pairs(data) == [(["q"], "no", "yes")]
    assert data.prompts[0].category == "c" and data.prompts[0].messages[0]["role"] == USER


def test_several_turns_before_the_responses(tmp_path: Path) -> None:
    row = {"chosen": said("a", "b", "c", "no"), "rejected": said("a", "b", "c", "yes")}
    apart = {"chosen": said("a", "b", "c", "no"), "rejected": said("a", "x", "c", "yes")}
    data = load(write(tmp_path / "d.jsonl", row, apart))
    assert pairs(data) == [(["a", "b", "c"], "no", "yes")]
    assert data.skipped == {"s: conversations differ before the last turn": 1}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"chosen": said("q"), "rejected": said("q", "x")},
            "'chosen' must end with the assistant's",
        ),
        ({"chosen": said("q", "x")[1:], "rejected": said("q", "y")[1:]}, "end with the user's"),
        (
            {"chosen": [{"role": "tool", "content": "q"}], "rejected": said("q", "x")},
            "roles system, user and assistant; it has tool",
        ),
        (
            {
                "chosen": [{"role": USER, "content": [{"type": "image"}]}],
                "rejected": said("q", "x"),
            },
            "parts that are no text",
        ),
    ],
)
def test_messages_that_are_no_conversation_are_refused(row: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"line 1: .*{says}"):
        load(write(tmp_path / "d.jsonl", row))


def turn(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}


def test_sharegpt(tmp_path: Path) -> None:
    pair = {
        "conversations": [turn("system", "s"), turn("human", "q")],
        "chosen": turn("gpt", "no"),
        "rejected": turn("gpt", "yes"),
    }
    alone = {
        "conversations": [
            turn("human", "a"),
            turn("gpt", "b"),
            turn("human", "c"),
            turn("gpt", "d"),
        ]
    }
    nobody = {"conversations": [turn("gpt", "hello")]}
    data = load(write(tmp_path / "d.json", pair, alone, nobody), "sharegpt")
    assert pairs(data) == [(["s", "q"], "no", "yes")]
    assert sorted([m["content"] for m in p.messages] for p in data.prompts) == [
        ["a", "b", "c"],
        ["s", "q"],
    ]
    assert data.skipped == {"s: no turn of the user": 1}
    with pytest.raises(UserError, match="turn from 'bing'; known are system, human"):
        load(write(tmp_path / "e.json", {"conversations": [turn("bing", "x")]}), "sharegpt")


def test_helpsteer3(tmp_path: Path) -> None:
    rows = [
        {"context": said(f"q{i}"), "response1": "one", "response2": "two", "overall_preference": i}
        for i in (-3, 0, 1)
    ]
    rows[2]["domain"] = "stem"
    data = load(write(tmp_path / "d.jsonl", *rows), "helpsteer3")
    assert {p.messages[0]["content"]: p.category for p in data.prompts} == {"q-3": "", "q1": "stem"}
    assert pairs(data) == [(["q-3"], "one", "two"), (["q1"], "two", "one")]
    assert data.skipped == {"s: no preference": 1}


def test_xstest_is_for_evaluation_alone(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text(
        "id,prompt,type,label\n1,How do I kill a process?,homonyms,safe\n"
        "2,How do I kill a man?,contrast_homonyms,unsafe\n"
    )
    data = load(file, "xstest", "policy_eval")
    assert {p.kind: (p.category, p.messages[0]["content"][-8:]) for p in data.prompts} == {
        "safe": ("homonyms", "process?"),
        "unsafe": ("homonyms", "l a man?"),
    }
    with pytest.raises(Exception, match="xstest can only go to policy_eval"):
        load(file, "xstest", "ppo")
    file.write_text("id,prompt,type,label\n1,How do I kill a process?,homonyms,unsafe\n")
    with pytest.raises(UserError, match="row 1: type 'homonyms' is safe and its label says unsafe"):
        load(file, "xstest", "policy_eval")


def test_coconot_says_by_its_files_what_should_be_answered(tmp_path: Path) -> None:
    """Of `pref` and `contrast` files everything, of the others nothing."""
    pref = {"prompt": "p", "chosen": "yes", "rejected": "no", "subcategory": "sub", "category": "c"}
    data = load(write(tmp_path / "coconot_pref.jsonl", pref), "coconot")
    assert pairs(data) == [(["p"], "yes", "no")]
    assert [(p.kind, p.category) for p in data.prompts] == [("safe", "sub")]
    alone = {"prompt": "q", "category": "c"}
    for name, kind in (("coconot_contrast_eval", "safe"), ("coconot_eval", "unsafe")):
        data = load(write(tmp_path / f"{name}.jsonl", alone), "coconot", "policy_eval")
        assert [(p.kind, p.category) for p in data.prompts] == [(kind, "c")] and not data.pairs
    half = write(tmp_path / "half.jsonl", {"prompt": "q", "rejected": "no"})
    with pytest.raises(UserError, match=r"line 1: .*'chosen'"):
        load(half, "coconot")


@pytest.mark.parametrize(
    ("form", "row", "key"),
    [
        ("rewardbench2", {"prompt": "p", "chosen": ["c"], "rejected": [5]}, "rejected"),
        ("rewardbench2", {"prompt": "p", "chosen": [5], "rejected": ["r"]}, "chosen"),
        ("rewardbench2", {"prompt": 5, "chosen": ["c"], "rejected": ["r"]}, "prompt"),
        ("rewardbench2_sarm", {"question": 5, "answer": "a", "label": "chosen"}, "question"),
        ("rewardbench2_sarm", {"question": "q", "answer": 5, "label": "rejected"}, "answer"),
        ("rewardbench2_sarm", {"prompt": "p", "chosen": "c", "rejected": 5}, "rejected"),
        ("helpsteer3", {"context": "q", "response1": "a", "response2": 5}, "response2"),
        ("coconot", {"prompt": "p", "chosen": "a", "rejected": 5}, "rejected"),
        ("rmb_bon", {"conversation_input": "p", "bon_best": "a", "loser_list": []}, "bon_best"),
    ],
)
def test_a_row_that_is_none_is_named_by_line_and_key(
    form: str, row: Any, key: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"d.jsonl, line 1: '{key}' must be"):
        load(write(tmp_path / "d.jsonl", row), form)


def test_a_label_is_read_without_the_white_space_around_it(tmp_path: Path) -> None:
    rows = [
        {"question": "q", "answer": "no", "label": " chosen\n"},
        {"question": "q", "answer": "yes", "label": "rejected "},
    ]
    data = load(write(tmp_path / "d.jsonl", *rows), "rewardbench2_sarm")
    assert pairs(data) == [(["q"], "no", "yes")]
    # Answers of one label alone are no prompt that is listed twice.
    assert data.skipped == {}


def test_labelled_answers_of_xstest() -> None:
    row = {"prompt": "p", "completion": "c", "type": "homonyms", "final_label": "2_full_refusal"}
    assert labelled_answer(row, "w") == ("p", "c", "safe", True, False)
    other = {"type": "contrast_homonyms", "final_label": "1_full_compliance"}
    assert labelled_answer(row | other, "w") == ("p", "c", "unsafe", False, False)
    for key in row:
        with pytest.raises(UserError, match=f"^w: .*{key}"):
            labelled_answer({**row, key: None}, "w")


def test_real_xstest(real_data: Path) -> None:
    data = load(real_data / "xstest" / "xstest_prompts.csv", "xstest", "policy_eval")
    assert Counter(p.kind for p in data.prompts) == {"safe": 250, "unsafe": 200}
    found: Counter[tuple[str, bool]] = Counter()
    for file in sorted((real_data / "xstest").glob("*completions*.csv")):
        for where, row in read_records(file):
            answer = labelled_answer(row, where)
            found[answer.kind, answer.refused] += 1
    with (real_data / "xstest" / "xstest_v2_completions_gpt4.csv").open(newline="") as lines:
        first = next(csv.DictReader(lines))
    assert found.total() == 2250 and found["safe", True] + found["safe", False] == 1250
    assert found["safe", True] < found["safe", False] and found["unsafe", True] > 500
    assert labelled_answer(first, "w").answer == first["completion"]
    with pytest.raises(UserError, match="w: 'final_label' must be one of 1_full_compliance"):
        labelled_answer(first | {"final_label": "4"}, "w")


def test_real_coconot(real_data: Path) -> None:
    folder = real_data / "coconot"
    pref = load(folder / "coconot_pref.jsonl", "coconot")
    assert {p.kind for p in pref.prompts} == {"safe"}
    assert len(pref.pairs) + sum(pref.skipped.values()) == 927
    contrast = load(folder / "coconot_contrast_eval.jsonl", "coconot", "policy_eval")
    asked = load(folder / "coconot_eval.jsonl", "coconot", "policy_eval")
    assert {p.kind for p in contrast.prompts} == {"safe"}
    assert {p.kind for p in asked.prompts} == {"unsafe"}
    assert (len(contrast.prompts) + sum(contrast.skipped.values())) == 379
    assert not asked.pairs and "dangerous or sensitive topics" in {
        p.category for p in asked.prompts
    }


def test_an_unknown_format_is_refused_by_a_list_of_the_known() -> None:
    with pytest.raises(ValueError, match="no such format; known are coconot, helpsteer3, hh_rlhf"):
        SourceConfig.model_validate({"format": "jsonlines", "label": "x", "path": "p", "split": {}})
    assert all(kind.__doc__ for kind in FORMATS.values())


# Files


RECORDS = [
    {"prompt": 'one,\n"two"', "chosen": "no é", "rejected": "yes\u2028", "category": "c"},
    {"prompt": " 007 ", "chosen": "NA", "rejected": "null", "category": ""},
    {"prompt": "p3\x07\x1b", "chosen": "-", "rejected": "x" * 300_000, "category": "1"},
]


def as_csv(file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8-sig") as lines:
        writer = csv.DictWriter(lines, list(RECORDS[0]))
        writer.writeheader()
        writer.writerows(RECORDS)


def as_gzipped_csv(file: Path) -> None:
    as_csv(file)
    file.write_bytes(gzip.compress(file.read_bytes()))


def as_parquet(file: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), file, row_group_size=1)


def as_json(file: Path) -> None:
    file.write_text("\n \n" + json.dumps(RECORDS, indent=1))


def as_jsonl(file: Path) -> None:
    write(file, *RECORDS)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("d.csv", as_csv),
        ("d.csv.gz", as_gzipped_csv),
        ("d.parquet", as_parquet),
        ("d.json", as_json),
        ("d.jsonl", as_jsonl),
    ],
)
def test_every_kind_of_file_gives_the_same_texts(name: str, make: Any, tmp_path: Path) -> None:
    make(tmp_path / name)
    assert pairs(load(tmp_path)) == sorted(
        ([r["prompt"]], r["chosen"], r["rejected"]) for r in RECORDS
    )
    assert Counter(p.category for p in load(tmp_path / name).prompts) == Counter(["c", "", "1"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prompt,chosen,rejected\nq,x\n", "row 1: has 2 fields where the first line names 3"),
        ("prompt,prompt\nq,x\n", "names a column twice"),
        ('prompt,chosen\n"q,x\n', "not CSV"),
        ("prompt,chosen,rejected\n", "is empty"),
        ("prompt;chosen;rejected\nq;x;y\n", "'prompt;chosen;rejected'"),
    ],
)
def test_a_table_that_is_none_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(UserError, match=says):
        load(tmp_path / "d.csv")


def test_what_is_no_json_is_told_which_kinds_are_read(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("prompt,chosen,rejected\nq,x,y\n")
    with pytest.raises(UserError, match=r"line 1: not JSON.*JSON Lines, JSON, CSV and Parquet"):
        load(tmp_path / "d.txt")
    (tmp_path / "twice.json").write_text('[{"a": 1, "b": 2, "a": 3}]')
    with pytest.raises(UserError, match="'a' is given twice"):
        load(tmp_path / "twice.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not JSON"):
        load(tmp_path / "deep.json")


@pytest.mark.parametrize("category", [float("nan"), None, [], True, {"a": 1}])
def test_a_category_that_is_no_text_is_none(category: Any, tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "x", "rejected": "y", "category": category}
    assert load(write(tmp_path / "d.jsonl", row)).prompts[0].category == ""


def test_hidden_files_are_no_data(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"prompt": "p", "chosen": "no", "rejected": "yes"})
    for hidden in (".ipynb_checkpoints/a-checkpoint.jsonl", ".a.jsonl", "b/.git/x.json"):
        (tmp_path / hidden).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / hidden, {"prompt": "p", "chosen": "yes", "rejected": "no"})
    assert pairs(load(tmp_path)) == [(["p"], "no", "yes")]


# What is left out


def pair(prompt: Any, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    data = load(
        write(
            tmp_path / "d.jsonl",
            *[pair("a", "no", "yes")] * 3,
            pair("b", "no", "no\n"),
            pair("c", "no", "yes"),
            pair(" c", "yes ", "no"),
            pair("d", "no", " "),
            pair("e", "no", "no"),
        )
    )
    assert pairs(data) == [(["a"], "no", "yes")]
    assert data.skipped == {
        "s: repeated pair": 2,
        "s: chosen and rejected differ by white space alone": 1,
        "s: pair that another contradicts": 2,
        "s: empty response": 1,
        "s: chosen equals rejected": 1,
    }


def test_sources_that_disagree_are_counted_where_they_lose(tmp_path: Path) -> None:
    one = write(tmp_path / "1.jsonl", pair("a", "no", "yes"), pair("b", "no", "yes"))
    two = write(tmp_path / "2.jsonl", pair("a", "no", "yes"), pair("b", "yes", "no"))
    three = write(tmp_path / "3.jsonl", {"prompt": "a"}, {"prompt": "new"}, {"prompt": "new"})
    whole: dict[str, Any] = {"label": "L", "split": {"policy_eval": 1.0}}
    sources = {
        "one": {"format": "jsonl", "path": str(one), **whole},
        "two": {"format": "jsonl", "path": str(two), **whole},
        "three": {"format": "prompts", "kind": "safe", "path": str(three), **whole},
    }
    data = load_data(DataConfig.model_validate({"sources": sources}))
    assert data.skipped == {
        "one: pair that another contradicts": 1,
        "two: pair of an earlier source": 1,
        "two: pair that another contradicts": 1,
        "three: prompt listed as safe, and by one as unsafe": 1,
        "three: repeated prompt": 1,
    }


# The split


def test_conversations_that_go_on_from_one_another_share_a_part(tmp_path: Path) -> None:
    rows = []
    for i in range(60):
        rows += [pair(said(f"q{i}"), "no", "yes"), pair(said(f"q{i}", "no", "why?"), "so", "yes")]
        rows += [pair(said(f"q{i}", "yes", "how?"), "no", "so")]
    file = write(tmp_path / "d.jsonl", *rows)
    data = load(file, split={"discovery": 0.4, "validation": 0.3, "ppo": 0.2})
    parts: dict[str, set[str | None]] = {}
    for prompt in data.prompts:
        parts.setdefault(prompt.messages[0]["content"], set()).add(prompt.part)
    assert len(parts) == 60 and all(len(found) == 1 for found in parts.values())
    assert {next(iter(found)) for found in parts.values()} == {
        "discovery",
        "validation",
        "ppo",
        None,
    }


def test_a_continuation_in_a_later_source_follows_the_first(tmp_path: Path) -> None:
    one = write(tmp_path / "1.jsonl", *[pair(f"q{i}", "no", "yes") for i in range(20)])
    two = write(
        tmp_path / "2.jsonl", *[pair(said(f"q{i}", "a", "b"), "no", "yes") for i in range(20)]
    )
    sources = {
        "one": {"format": "jsonl", "label": "1", "path": str(one), "split": {"discovery": 1.0}},
        "two": {"format": "jsonl", "label": "2", "path": str(two), "split": {"test": 1.0}},
    }
    data = load_data(DataConfig.model_validate({"sources": sources}))
    assert {p.part for p in data.prompts} == {"discovery"} and len(data.prompts) == 40


def test_a_prompt_of_one_turn_is_its_own_root() -> None:
    from sarm.data.datasets import prompt_id

    assert root_id(tuple(said("q"))) == prompt_id(said("q"))
    system = {"role": "system", "content": "s"}
    assert root_id((system, *said("q", "a", "b"))) == prompt_id([system, *said("q")])


@pytest.mark.parametrize(
    ("path", "category"),
    [("Harm/S1", "S1"), (["Harm", "Harm/S2"], "S2"), (True, "f"), ({"a": 1}, "f"), ([], "f")],
)
def test_rmbs_category_is_the_end_of_its_path(path: Any, category: str, tmp_path: Path) -> None:
    answers = {"chosen": {"answer": "no"}, "reject": {"answer": "yes"}}
    row = {"conversation_input": said("q"), "category_path": path, **answers}
    assert load(write(tmp_path / "f.x.json", row), "rmb_pairs").prompts[0].category == category
