"""`report.texts`: no text of a source that is not shown stands in anything that a report writes."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from jobs.__main__ import run_unit
from reports.cards import cards_page
from reports.page import plotly_script
from reports.texts import LEFT_OUT, shown_cards, shown_cause, shown_generations
from sarm.config import ReportConfig, UserError, config_yaml
from sarm.run import RunDir
from tests.reports.test_explorer import unpacked
from tests.runs import reference_config
from tests.tiny import tiny_config

PHASES = ("fetch", "encode", "probe", "select", "steer", "cards", "calibrate")
WORDS = 4
"""As many words in a row, of a text, are that text."""


def sentence(i: int, side: str) -> str:
    """Of no other text, and with what HTML and JSON write otherwise."""
    return f"the {side} says \"number {i}\" isn't <b>their</b> {side}{i} & no other's, ever again."


def their_pairs() -> list[dict[str, Any]]:
    return [
        {
            "prompt": sentence(i, "question"),
            "chosen": sentence(i, "answer"),
            "rejected": sentence(i, "reply"),
            "category": f"their-category-{i}",
        }
        for i in range(40)
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A tiny run on the demo's pairs and another's, the base policy evaluated, and a unit that
    failed with a text of the other's in its last words.
    """
    folder = tmp_path_factory.mktemp("texts")
    pairs = their_pairs()
    (folder / "theirs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    theirs = {
        "format": "jsonl",
        "label": "Theirs",
        "path": str(folder / "theirs.jsonl"),
        "split": {"test": 0.5, "policy_eval": 0.5},
    }
    config = tiny_config(
        folder,
        **{
            "data.sources.theirs": theirs,
            "encode.shards": 1,
            "probe.shards": 1,
            "evaluate.prompts": None,
            "cards.controls": 20,
        },
    )
    made = RunDir.create(folder / "run", config)
    for phase in PHASES:
        run_unit(made, phase, "all" if phase not in ("encode", "probe") else "shard-0000-of-0001")
    run_unit(made, "evaluate", "base")
    log = made.log("ppo", "penalty-seed0")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"error: the template refuses the turn {pairs[0]['prompt']!r}; leave it out\n")
    return made


def written(run: RunDir, **report: Any) -> dict[str, str]:
    """The files that the report phase leaves for people, by path, read as people would."""
    config = run.config.model_copy(update={"report": ReportConfig(**report)})
    (run.path / "config.yaml").write_text(config_yaml(config))
    again = RunDir.open(run.path)
    run_unit(again, "report", "all")
    files = [file for file in (*again.path.iterdir(), *again.folder("report").rglob("*"))]
    files = [f for f in files if f.suffix in (".txt", ".html", ".json") and f.is_file()]
    pages = {"report.html", "generations.html", "cards.html"}
    assert {"final_report.txt", "report.json", *pages} <= {f.name for f in files}
    return {str(file): as_read(file) for file in files}


def as_read(file: Path) -> str:
    """Without what HTML and JSON do to quotes, unpacked, on one line, and without Plotly's own
    megabytes.
    """
    text = html.unescape(file.read_text().replace(plotly_script(), ""))
    text += " ".join(json.dumps(data, ensure_ascii=False) for data in unpacked(text))
    return " ".join(text.replace('\\"', '"').replace("\\'", "'").split())


def passages(text: str) -> Iterator[list[str]]:
    words = text.split()
    n = min(WORDS, len(words))
    for i in range(len(words) - n + 1):
        yield words[i : i + n]


class Content:
    """A file's text, its words found by the two in the middle of a passage: looking through
    megabytes for each passage takes most of a minute.
    """

    def __init__(self, text: str) -> None:
        self.text, self.words = text, text.split()
        self.places: dict[tuple[str, str], list[int]] = {}
        for i, pair in enumerate(pairwise(self.words)):
            self.places.setdefault(pair, []).append(i)

    def __contains__(self, passage: list[str]) -> bool:
        """Whether the passage stands in the text, the ends of its first and last word free."""
        if len(passage) != WORDS:
            return " ".join(passage) in self.text
        first, second, third, last = passage
        return any(
            self.words[i - 1].endswith(first) and self.words[i + 2].startswith(last)
            for i in self.places.get((second, third), ())
            if 0 < i < len(self.words) - 2
        )


def texts_of(run: RunDir, source: str) -> dict[str, str]:
    """Every text that belongs to a source: prompts, answers, and what the policy said to them."""
    table = pd.read_parquet(run.read("evaluate", "base").path("generations.parquet"))
    mine = table[table["source"] == source]
    found = {f"response {i}": text for i, text in enumerate(mine["response"]) if len(text) > 11}
    found |= {f"prompt {i}": text for i, text in enumerate(mine["prompt"])}
    if source == "theirs":
        for i, pair in enumerate(their_pairs()):
            found |= {f"{key} {i}": text for key, text in pair.items()}
    return found


def leaks(run: RunDir, source: str, files: dict[str, str]) -> set[tuple[str, str]]:
    """(which text, in which file) of those that stand somewhere, in part at least."""
    contents = [(Path(file).name, Content(text)) for file, text in files.items()]
    return {
        (name, file)
        for name, text in texts_of(run, source).items()
        for passage in passages(text)
        for file, content in contents
        if passage in content
    }


def kinds(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """(prompt, answer, ... , in report or cards)."""
    return {(name.split()[0], file.split(".")[0]) for name, file in found}


def test_all_are_shown_by_default_and_the_report_says_so(run):
    files = written(run)
    shown = kinds(leaks(run, "theirs", files))
    assert {(what, "generations") for what in ("prompt", "response", "category")} <= shown
    assert {("prompt", "cards"), ("chosen", "cards"), ("rejected", "cards")} <= shown
    assert ("prompt", "final_report") in shown, "the log's last words"
    told = next(text for file, text in files.items() if file.endswith("run/final_report.txt"))
    assert "Texts of Demo, Look-alikes, Theirs are shown. Before you pass this on" in told


@pytest.mark.parametrize("texts", ["own", "none"])
def test_no_text_of_anothers_source_stands_anywhere(run, texts):
    own = ["demo", "lookalikes"] if texts == "own" else []
    files = written(run, texts=texts, own=tuple(own))
    assert leaks(run, "theirs", files) == set()
    mine = kinds(leaks(run, "demo", files))
    if texts == "own":
        assert {("prompt", "generations"), ("response", "generations"), ("prompt", "cards")} <= mine
    else:
        assert mine == set() and leaks(run, "lookalikes", files) == set()
    said = {
        "own": "Texts of Demo, Look-alikes are shown; of Theirs ids and numbers alone.",
        "none": "No text of a prompt, an answer or a policy is shown, ids and numbers alone.",
    }
    for name in ("final_report.txt", "generations.html", "cards.html"):
        assert said[texts] in files[str(run.path / name)], name
    page = files[str(run.path / "generations.html")]
    table = pd.read_parquet(run.read("evaluate", "base").path("generations.parquet"))
    theirs = table[table["source"] == "theirs"].iloc[0]
    assert f'"id": "{theirs["prompt_id"]}"' in page, "its id and numbers stand"


def test_an_earlier_report_with_more_texts_is_removed(run):
    (run.path / "report.incomplete.html").write_text(their_pairs()[3]["prompt"])
    written(run)
    assert leaks(run, "theirs", written(run, texts="none")) == set()


def test_a_label_is_made_of_texts():
    text = {"prompt": "p q", "response": "r s", "source": "a", "earlier_turns": 0}
    text |= {"label": "chosen", "part": "test", "reward": 0.5}
    edit = {"before": 1, "after": 2, "removed": "x", "added": "y", "z_before": 0.0, "z_after": 1.0}
    label = {"text": "speaks of p q", "detection": {"score": 0.75}}
    card = {"label": label, "edits": {"largest": [edit]}}
    cards = {"texts": {"1": text, "2": text | {"source": "b"}}, "cards": [card]}
    own = shown_cards(cards, ReportConfig(texts="own", own=("a",)))
    assert own["texts"]["1"] == text and own["texts"]["2"]["response"] == LEFT_OUT
    assert own["cards"][0]["label"] == label | {"text": LEFT_OUT}
    assert own["cards"][0]["edits"]["largest"][0]["removed"] == LEFT_OUT
    both = shown_cards(cards, ReportConfig(texts="own", own=("a", "b")))
    assert both["cards"][0]["edits"]["largest"][0]["removed"] == "x"
    assert shown_cards(cards, ReportConfig()) is cards
    assert cards["cards"][0]["label"]["text"] == "speaks of p q", "what was given stays"
    assert "of whom" in cards_page(
        {
            "n_texts": 0,
            "n_prompts": 0,
            "cards": [],
            "texts": {},
            "labels": None,
            "minimal_edits": {"n": 0, "enough": False, "needed": 20},
        },
        "run",
        "of whom",
    )


def test_what_a_log_quotes_is_left_out_and_names_are_not():
    cause = (
        "error: no 'table.parquet' in the run's folder; \"it's what they asked\" or 'a \\'b\\' c'"
    )
    none = ReportConfig(texts="none")
    assert shown_cause(cause, none) == (
        f"error: no 'table.parquet' in the run's folder; {LEFT_OUT} or {LEFT_OUT}"
    )
    assert shown_cause(cause, ReportConfig()) == cause


def test_generations_that_name_no_source_are_nobodys():
    table = pd.DataFrame({"prompt": ["a"], "response": ["b"], "reward": [0.5]})
    found = shown_generations(table, ReportConfig(texts="own", own=("x",)))
    assert found.to_dict("records") == [{"prompt": LEFT_OUT, "response": LEFT_OUT, "reward": 0.5}]


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ({"texts": "own"}, "report.own names no source"),
        ({"texts": "own", "own": ["rb3"]}, "rb3 is none of data.sources"),
        ({"texts": "some"}, "report.texts"),
    ],
)
def test_bad_settings_are_refused(report, words):
    with pytest.raises(UserError, match=words):
        reference_config(sections={"report": report})
