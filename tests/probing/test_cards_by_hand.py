"""Cards, edits and names of latents, each returned record whole, on a few texts made by hand."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest

from sarm.config import CardsConfig, LabelConfig, UserError
from sarm.data.datasets import Text
from sarm.probing import labels
from sarm.probing.cards import (
    Activity,
    LabelRows,
    Listed,
    first_of_each,
    histogram,
    label_rows,
    latent_cards,
    selected_latents,
)
from sarm.probing.edits import ENOUGH, Edit, EditEffects, edit_effects, minimal_edits
from sarm.probing.effects import Encoded
from sarm.probing.labels import Endpoint, Example, Tokens
from sarm.reward_model.interventions import Ranks
from tests.runs import feature, features

# Texts by hand: prompt, part, label, response; and of each the latents of four ranks, two kept.
TEN = "one two three four five six seven eight nine ten"
ROWS: list[tuple[str, str, str, str]] = [
    ("p0", "discovery", "chosen", TEN),
    ("p0", "discovery", "rejected", TEN.replace("five", "5")),
    ("p1", "validation", "chosen", "no"),
    ("p1", "validation", "rejected", "yes"),
    ("p2", "test", "chosen", "never"),
    ("p2", "test", "rejected", "surely"),
    ("p3", "discovery", "rejected", "go on"),
]
INDICES = [[4, 1, 2, 0], [1, 4, 2, 0], [2, 0, 1, 4], [2, 4, 0, 3], [2, 1, 0, 3], [1, 3, 4, 0]]
INDICES += [[0, 3, 4, 2]]
VALUES = [
    [5, 3, 2.5, 1],
    [7, 6, 5.5, 2],
    [9, 8, 4, 1],
    [3, -1, -2, -3],
    [4, 2, 1, 0],
    [2, 1, 0.5, 0],
]
VALUES += [[2, 1.5, 1.25, 0]]


def made() -> tuple[Encoded, list[Text]]:
    table = pd.DataFrame(ROWS, columns=["prompt_id", "part", "label", "response"])
    table["reward"] = [0.5 * i for i in range(len(table))]
    ranks = Ranks(np.array(INDICES, np.int32), np.array(VALUES, np.float32), 2, 5)
    weight = np.array([1, -0.5, 2, 3, 0.25], np.float32)
    texts = [
        Text(f"t{i}", prompt, "s", part, label, said(prompt, response))
        for i, (prompt, part, label, response) in enumerate(ROWS)
    ]
    return Encoded(table, ranks, np.zeros((len(table), 2), np.float32), weight), texts


def said(prompt: str, response: str) -> tuple[dict[str, str], ...]:
    turns = [("user", "hello"), ("assistant", "yes?"), ("user", f"asked {prompt}")]
    turns.append(("assistant", response))
    return tuple({"role": role, "content": content} for role, content in turns)


def test_a_card_is_what_the_texts_say() -> None:
    encoded, texts = made()
    found = features(
        harming=[feature(1, "harming"), feature(4, "harming")],
        promoting=[],
        penalised=[{"latent": 1, "tau": 2.0, "alpha": 0.1}],
        monitors=[4],
    )
    table = pd.DataFrame(
        {
            "latent": [0, 1, 4],
            "weight": [1.0, -0.5, 0.25],
            "role": ["promoting", "harming", "misleading"],
            "upstream_s": [0.1, -0.75, 0.5],
        }
    )
    config = CardsConfig(top=2, controls=1)
    cards = latent_cards(encoded, found, table, texts, config, 3)
    assert {k: v for k, v in cards.items() if k not in ("cards", "texts")} == {
        "n_texts": 7,
        "n_prompts": 4,
        "minimal_edits": {"n": 1, "enough": False, "needed": 20},
        "labels": None,
        "why_no_words": "",
    }
    one, four = cards["cards"]
    (listed, monitor) = selected_latents(found)
    edges = [i * 7 / 20 for i in range(21)]
    counts = {name: [0] * 20 for name in ("chosen", "rejected")}
    for label, z in (("chosen", 3), ("chosen", 2), ("rejected", 7), ("rejected", 2)):
        counts[label][min(int(z / 7 * 20), 19)] += 1
    (control,) = one.pop("controls")
    assert control["row"] in (3, 6), "neither fires nor nearly"
    assert one.pop("histogram") == {"edges": pytest.approx(edges), **counts, "off": 3}
    assert one == {
        "latent": 1,
        "lists": ["harming", "penalised"],
        "weight": -0.5,
        "role": "harming",
        "upstream_s": -0.75,
        "figures": listed.figures,
        "density": {"all": 4 / 7, "chosen": 2 / 3, "rejected": 2 / 4},
        # of p0 and p2 the texts where it is largest; of p2's two equal ones the first
        "top": [{"row": 1, "z": 7.0, "reward": -3.5}, {"row": 4, "z": 2.0, "reward": -1.0}],
        "near_misses": [{"row": 2, "gap": 4.0}],
        "n_active": 4,
        "n_near_misses": 1,
        "edits": {
            "n": 1,
            "on_either": 1,
            "turned": 0,
            "largest": [
                {
                    "before": 0,
                    "after": 1,
                    "removed": "five",
                    "added": "5",
                    "z_before": 3.0,
                    "z_after": 7.0,
                }
            ],
        },
        "label": None,
        "siblings": {},
        "words": None,
    }
    # Kept below zero (row 3) is off: it neither fires nor nearly fires.
    assert (four["lists"], four["role"]) == (["harming", "monitor"], "misleading")
    assert four["n_active"] == 2 and four["histogram"]["off"] == 5
    assert [e["row"] for e in four["top"]] == [1]
    assert four["near_misses"] == [{"row": 6, "gap": 0.25}] and four["n_near_misses"] == 3
    assert four["controls"] == [{"row": 4}] and monitor.figures["tau"] == 0.0
    shown = {e["row"] for card in (one, four) for e in (*card["top"], *card["near_misses"])}
    shown |= {control["row"], 4, 0, 1}
    assert set(cards["texts"]) == {str(row) for row in shown}
    assert list(cards["texts"]) == [str(row) for row in sorted(shown)]
    assert cards["texts"]["1"] == {
        "prompt": "asked p0",
        "earlier_turns": 2,
        "response": TEN.replace("five", "5"),
        "label": "rejected",
        "part": "discovery",
        "source": "s",
        "reward": 0.5,
    }


def test_controls_are_drawn_by_the_seed_alone() -> None:
    encoded, texts = made()
    found = features(harming=[feature(3, "harming")], promoting=[], penalised=[], monitors=[])
    table = pd.DataFrame({"latent": [3], "weight": [1.0], "role": ["none"], "upstream_s": [0.0]})

    def drawn() -> list[int]:
        config = CardsConfig(top=1, controls=1)
        cards = [latent_cards(encoded, found, table, texts, config, n)["cards"] for n in range(12)]
        return [one["controls"][0]["row"] for (one,) in cards]

    first = drawn()
    assert first == drawn() and set(first) == {0, 1, 2}, "where it is silent"


def test_a_latent_is_listed_once_with_all_that_is_known_of_it() -> None:
    found = features(
        harming=[feature(3, "harming") | {"effect": 1.0}, feature(5, "harming")],
        promoting=[feature(2, "promoting")],
        misleading=[feature(9, "misleading")],
        penalised=[
            {"latent": 9, "tau": 2.0, "alpha": 0.1},
            {"latent": 3, "tau": 4.0, "alpha": 0.2},
        ],
        monitors=[5, 7],
    )
    listed = selected_latents(found)
    assert [(one.latent, one.lists) for one in listed] == [
        (3, ("harming", "penalised")),
        (5, ("harming", "monitor")),
        (2, ("promoting",)),
        (9, ("misleading", "penalised")),
        (7, ("monitor",)),
    ]
    first = listed[0]
    assert isinstance(first, Listed) and first.figures["tau"] == 4.0
    assert first.figures["effect"] == 1.0, "what a list says is not lost to a later one"


def test_texts_to_name_a_latent_by_and_to_score_the_name_on() -> None:
    """Of 60 prompts, half of discovery: five fire, seven nearly, the rest is silent."""
    n = 60
    part = np.where(
        np.arange(n) < 30, "discovery", np.where(np.arange(n) % 2, "test", "validation")
    )
    table = pd.DataFrame({"prompt_id": [f"p{i}" for i in range(n)], "part": part})
    z, gap = np.zeros(n), np.full(n, np.inf)
    for start in (0, 30):
        z[start : start + 5] = [1, 5, 2, 4, 3]
        gap[start + 5 : start + 12] = 0.5
    encoded = Encoded(table, None, None, None)  # type: ignore[arg-type]
    mine = Activity(z, gap)
    rows = label_rows(mine, encoded, CardsConfig(top=3, controls=2), 6, 0)
    assert rows.active == [1, 3, 4], "the largest, in order"
    assert [len(some) for some in rows] == [3, 4, 5, 6]
    assert set(rows.held_active) == set(range(30, 35))
    for some, start, nearly in ((rows.silent, 0, 2), (rows.held_silent, 30, 3)):
        assert all(start + 5 <= row < start + 12 for row in some[:nearly])
        assert all(start + 12 <= row < start + 30 for row in some[nearly:])
    again = label_rows(mine, encoded, CardsConfig(top=3, controls=2), 6, 1)
    assert again != rows and again.active == rows.active, "the others are drawn by the seed"
    few = label_rows(mine, encoded, CardsConfig(top=9, controls=9), 40, 0)
    assert [len(some) for some in few] == [5, 18, 5, 25]
    table["prompt_id"] = "p"
    one = label_rows(mine, encoded, CardsConfig(top=3, controls=2), 6, 0)
    assert [len(some) for some in one] == [1, 1, 1, 1], "at most one a prompt and list"
    assert isinstance(one, LabelRows)


def test_one_row_a_prompt_in_order() -> None:
    prompts = np.array(["a", "b", "a", "c", "b", "d"])
    order, wanted = np.array([2, 0, 4, 1, 5, 3]), np.array([1, 1, 1, 1, 1, 0], bool)
    assert first_of_each(order, wanted, prompts, 9) == [2, 4, 3]
    assert first_of_each(order, wanted, prompts, 2) == [2, 4]
    assert first_of_each(order, wanted, prompts, 0) == []


def test_a_histogram_by_hand() -> None:
    z = np.array([0.0, 10.0, 0.5, 0.4, 9.6, -1.0])
    found = histogram(z, np.array([True, True, False, True, False, True]))
    assert found == {
        "edges": pytest.approx([0.5 * i for i in range(21)]),
        "chosen": [1, *[0] * 18, 1],
        "rejected": [0, 1, *[0] * 17, 1],
        "off": 2,
    }
    assert histogram(np.zeros(2), np.array([True, False]))["edges"][-1] == 1e-9


# Edits


def test_edits_of_a_fifth_of_the_words_count_and_no_larger() -> None:
    five = "a b c d e"
    rows = [
        ("p", five),
        ("p", "a b c d x"),  # 2 of 10
        ("p", "a b c d e y z"),  # 2 of 12, and 4 of 12 from the second
        ("q", five),
        ("q", "x b c d y"),  # 4 of 10
        ("q", f"  {five}"),
        ("r", "a b c d e f g h i j k l m n o p q r s t"),
        ("r", "a X c d e f g h i j k l m n o p q r Y Z t"),
    ]
    assert minimal_edits(rows) == [
        Edit(0, 1, "e", "x", 0.2),
        Edit(0, 2, "", "y z", 2 / 12),
        Edit(6, 7, "b … s", "X … Y Z", 5 / 41),
    ]
    assert minimal_edits(rows[3:5], 0.4) == [Edit(0, 1, "a … e", "x … y", 0.4)]
    assert minimal_edits([("p", ""), ("p", " ")]) == []
    # a response that comes again stands for its first row
    assert [e[:2] for e in minimal_edits([("p", "z"), *rows[:2], rows[0]])] == [(1, 2)]
    many = [("p", f"{TEN} {i}") for i in range(8)]
    assert len(minimal_edits(many)) == 28 >= ENOUGH


def test_effects_of_edits_are_the_five_largest_moves() -> None:
    edits = [Edit(i, i + 1, "", "", 0.1) for i in range(0, 16, 2)]
    z = np.array([0, 2, 1, 1.5, 0, 0, 3, -1, 2, 2, 0, -1, 5, 2, 0, 0.25])
    assert edit_effects(edits, z) == EditEffects(8, 6, 3, [3, 6, 0, 5, 1])
    assert edit_effects([], z) == EditEffects(0, 0, 0, [])


# Names

CLIENT = httpx.Client


def endpoint(
    answers: list[httpx.Response | Exception],
    asked: list[httpx.Request],
    monkeypatch: pytest.MonkeyPatch,
    **given: Any,
) -> Endpoint:
    """An endpoint that gives these answers one after another."""

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    transport = httpx.MockTransport(answer)
    monkeypatch.setattr(labels.httpx, "Client", lambda **more: CLIENT(transport=transport, **more))
    waits: list[float] = []
    found = Endpoint(
        LabelConfig(**{"url": "http://h/v1/", "model": "m", **given}), sleep=waits.append
    )
    found.waits = waits  # type: ignore[attr-defined]
    return found


def completion(text: Any) -> httpx.Response:
    return httpx.Response(200, json={"choices": [{"message": {"content": text}}]})


def test_what_goes_to_an_endpoint_and_what_is_said_of_its_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("A_KEY", "sk-1")
    asked: list[httpx.Request] = []
    answers = [httpx.ConnectTimeout("no\nroute"), httpx.Response(429), completion("yes")]
    one = endpoint(answers, asked, monkeypatch, key_variable="A_KEY", max_tokens=7, timeout_s=2.5)
    assert one.ask("s", "u") == "yes" and one.waits == [2.0, 4.0]  # type: ignore[attr-defined]
    assert {str(r.url) for r in asked} == {"http://h/v1/chat/completions"}
    assert {r.headers["Authorization"] for r in asked} == {"Bearer sk-1"}
    assert asked[0].extensions["timeout"]["read"] == 2.5
    assert json.loads(asked[0].content)["max_tokens"] == 7
    one.__exit__()
    assert one._client.is_closed

    def refused(*answers: Any, **given: Any) -> str:
        two = endpoint(list(answers), [], monkeypatch, **given)
        with two as entered, pytest.raises(UserError) as error:
            assert entered is two
            two.ask("s", "u")
        assert two._client.is_closed
        return str(error.value)

    cure = "; correct cards.label, or set it to null for cards without labels"
    bad = httpx.Response(400, text=f"sk-1 is\n no key {'x' * 300}")
    assert refused(bad, key_variable="A_KEY") == (
        f"the label endpoint http://h/v1/ failed (HTTP 400: *** is no key {'x' * 185}){cure}"
    )
    for status in (408, 409, 429, 500):
        # what is no key is no secret
        assert refused(*[httpx.Response(status, text="later")] * 4) == (
            f"the label endpoint http://h/v1/ failed (HTTP {status}: later){cure}"
        )
    for status in (401, 410, 430, 499):
        assert f"(HTTP {status}: )" in refused(httpx.Response(status))
    assert "(ConnectError: gone)" in refused(*[httpx.ConnectError("gone")] * 4)
    broken = "its answer is no chat completion: "
    assert f"({broken}not json)" in refused(httpx.Response(200, text="not\n json"))
    for tree in ({}, [], {"choices": []}, {"choices": [{"message": {"content": 1}}]}):
        assert f"({broken}{json.dumps(tree, separators=(',', ':'))})" in refused(
            httpx.Response(200, json=tree)
        )
    long = httpx.Response(200, text="y" * 300)
    assert refused(long).endswith(f"({broken}{'y' * 200}){cure}")


def test_a_key_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv("A_KEY", raising=False)
        else:
            monkeypatch.setenv("A_KEY", value)
        with pytest.raises(UserError) as error:
            Endpoint(LabelConfig(url="http://h", model="m", key_variable="A_KEY"))
        assert str(error.value) == (
            "cards.label.key_variable names A_KEY, which is not set; export it, or set it to null"
            " for an endpoint without keys"
        )
    asked: list[httpx.Request] = []
    endpoint([completion("y")], asked, monkeypatch).ask("s", "u")
    assert "Authorization" not in asked[0].headers


def test_a_text_is_told_by_its_prompt_s_beginning_and_its_response_s_end() -> None:
    assert labels.told(Example("a  b\nc", " d\n\ne ")) == "Prompt: a b c\nResponse: d e"
    whole = "x" * 799 + "y"
    assert labels.told(Example("p" * 299 + "q!", whole)) == (
        f"Prompt: {'p' * 299}q\nResponse: {whole}"
    )
    assert labels.told(Example("p", f"z{whole}")) == f"Prompt: p\nResponse: …{whole}"


class Judge:
    """An endpoint that gives a label, and of numbered texts those with a word."""

    def __init__(self, label: str, word: str = "bread") -> None:
        self.label, self.word = label, word
        self.asked: list[tuple[str, str]] = []

    def ask(self, system: str, user: str) -> str:
        self.asked.append((system, user))
        if system == labels.EXPLAIN:
            return self.label
        texts = user.split("TEXT ")[1:]
        return str([int(t.split()[0]) for t in texts if self.word in t])


def test_a_latent_is_named_and_the_name_scored_as_asked() -> None:
    judge = Judge("Let me see.\n  Texts   with bread  \n\n")
    active, silent = [Example("p", "bread"), Example("q", "more bread")], [Example("r", "wine")]
    held = (
        [Example("h", f"bread {i}") for i in range(6)],
        [Example("h", f"wine {i}") for i in range(5)],
    )
    tokens = [Tokens(["a ", "bread ", "b ", "<end>"], [1, 3])] * 2
    found = labels.labelled(judge, active, silent, *held, tokens, 0)  # type: ignore[arg-type]
    name = "Texts with bread"
    assert found == {
        "text": name,
        "detection": {
            "score": 1.0,
            "true_positive": 1.0,
            "true_negative": 1.0,
            "n_fitting": 6,
            "n_others": 5,
            "unreadable": 0,
        },
        "fuzzing": {
            "score": 0.5,
            "true_positive": 1.0,
            "true_negative": 0.0,
            "n_fitting": 1,
            "n_others": 1,
            "unreadable": 0,
        },
    }
    explained, first, second, fuzz = judge.asked
    assert explained[1] == (
        "ACTIVE\nPrompt: p\nResponse: bread\n\nACTIVE\nPrompt: q\nResponse: more bread\n\nSILENT\n"
        "Prompt: r\nResponse: wine"
    )
    assert first[0] == second[0] == labels.DETECT.format(label=name)
    assert fuzz[0] == labels.FUZZ.format(label=name)
    assert first[1].startswith("TEXT 1\nPrompt: h\nResponse: ") and "\n\nTEXT 10\n" in first[1]
    assert second[1].startswith("TEXT 1\n") and second[1].count("TEXT") == 1, "ten a request"
    assert fuzz[1].startswith("TEXT 1\na <<bread >>b \n\nTEXT 2\n")
    nameless = labels.labelled(Judge(""), [], [], [], [], [], 0)  # type: ignore[arg-type]
    assert nameless["text"] == "" and nameless["detection"]["score"] is None
    long = labels.labelled(Judge("w" * 400), [], [], [], [], [], 0)  # type: ignore[arg-type]
    assert long["text"] == "w" * 300


def test_answers_without_a_list_are_counted_apart() -> None:
    class Mute(Judge):
        def ask(self, system: str, user: str) -> str:
            return "I will not say" if "TEXT 2" in user else "[1]"

    items = [(f"t{i}", i % 3 == 0) for i in range(11)]
    found = labels.judged(Mute(""), "q", items)  # type: ignore[arg-type]
    assert found == {
        "score": None,
        "true_positive": None,
        "true_negative": 0.0,
        "n_fitting": 0,
        "n_others": 1,
        "unreadable": 10,
    }


def test_both_kinds_are_spread_over_the_list_and_ties_tell_nothing() -> None:
    active = [Example("p", text) for text in ("m", "b")]
    silent = [Example("p", text) for text in ("a", "z", "c")]
    order = [(e.response, fires) for e, fires in labels.mixed(active, silent)]
    # places 1/4, 3/4 and 1/6, 1/2, 5/6
    assert order == [("a", False), ("m", True), ("z", False), ("b", True), ("c", False)]
    tied = labels.mixed([Example("p", "m")], [Example("p", "a")])
    assert [fires for _, fires in tied] == [False, True], "by the text, not the kind"
    tied = labels.mixed([Example("p", "a")], [Example("p", "m")])
    assert [fires for _, fires in tied] == [True, False]


@pytest.mark.parametrize(
    ("answer", "numbers"), [("[12, 3]", {12, 3}), ("[ 1,\n 2 ]", {1, 2}), ("[1] [a]", {1})]
)
def test_numbers_of_the_last_list(answer: str, numbers: set[int]) -> None:
    assert labels.numbers_in(answer) == numbers


def test_marks_are_moved_by_the_first_draw_that_takes_them_off() -> None:
    text = Tokens([*"abcdef", "<end>"], [1, 2, 6])
    for seed in range(6):
        rng = np.random.default_rng([seed, 2])
        _, second, _ = (rng.permutation(5) + 1 for _ in range(3))
        by = next(int(by) for by in second if not {1, 2} & {(1 + by) % 6, (2 + by) % 6})
        moved = labels.marked("abcdef", {(1 + by) % 6, (2 + by) % 6})
        right = ("a<<bc>>def", True)
        assert labels.fuzzed([text] * 3, seed) == [right, (moved, False), right]
