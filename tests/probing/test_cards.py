"""Cards against brute force over all texts; minimal edits by hand; labels from a real server on
the loopback.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest

from jobs.__main__ import main, run_unit
from jobs.cards import texts_of
from reports.cards import bars, cards_page, marked, own_by_latent
from sarm.config import CardsConfig, LabelConfig, UserError
from sarm.data.datasets import Text
from sarm.probing.cards import (
    _text,
    activity,
    histogram,
    label_rows,
    latent_cards,
    selected_latents,
)
from sarm.probing.edits import edit_effects, minimal_edits
from sarm.probing.effects import Encoded, read_encoded
from sarm.probing.labels import (
    ATTEMPTS,
    Endpoint,
    Example,
    Tokens,
    balanced_accuracy,
    fuzzed,
    labelled,
    mixed,
    numbers_in,
)
from sarm.reward_model.interventions import Ranks, latent_values
from sarm.run import RunDir
from tests.runs import feature, features

KEY = "sk-not-a-real-key-0123"


@pytest.fixture(scope="module")
def made(selected_run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A copy of the selected run with cards made."""
    folder = tmp_path_factory.mktemp("cards")
    shutil.copytree(selected_run.path, folder / "run")
    run = RunDir.open(folder / "run")
    run_unit(run, "cards", "all")
    return run


@pytest.fixture(scope="module")
def encoded(made: RunDir) -> Encoded:
    return read_encoded(made.read_shards("encode"))


# Cards


def test_every_selected_latent_has_one_card(made: RunDir) -> None:
    features, found = (
        made.read("select").json("features.json"),
        made.read("cards").json("cards.json"),
    )
    wanted = {
        entry["latent"]
        for role in ("promoting", "harming", "misleading", "penalised")
        for entry in features[role]
    } | set(features["monitors"])
    latents = [card["latent"] for card in found["cards"]]
    assert set(latents) == wanted and len(latents) == len(wanted)
    by_latent = {card["latent"]: card for card in found["cards"]}
    for p in features["penalised"]:
        card = by_latent[p["latent"]]
        assert (
            {"harming", "penalised"} <= set(card["lists"])
            and card["figures"]["tau"] == p["tau"]
            and "effect" in card["figures"]
        )


def test_examples_are_those_of_a_loop_over_all_texts(made: RunDir, encoded: Encoded) -> None:
    """Ranks scanned text by text, in Python: z, the gap of a runner-up, silence, and one example a
    prompt.
    """
    found = made.read("cards").json("cards.json")
    ranks, prompts = encoded.ranks, encoded.texts["prompt_id"].tolist()
    for card in found["cards"]:
        z, gap = {}, {}
        for row in range(len(ranks.indices)):
            place = (
                ranks.indices[row].tolist().index(card["latent"])
                if card["latent"] in ranks.indices[row]
                else None
            )
            if place is not None and place < ranks.k:
                z[row] = float(ranks.values[row, place])
            elif place is not None:
                gap[row] = float(ranks.values[row, ranks.k - 1]) - float(ranks.values[row, place])
        best: dict[str, float] = {}
        for row, value in z.items():
            if value > 0:
                best[prompts[row]] = max(value, best.get(prompts[row], 0.0))
        expected = sorted(best.values(), reverse=True)[: made.config.cards.top]
        assert [e["z"] for e in card["top"]] == pytest.approx(expected)
        assert all(
            e["reward"] == pytest.approx(float(encoded.head_weight[card["latent"]]) * e["z"])
            for e in card["top"]
        )
        nearest: dict[str, float] = {}
        for row, value in gap.items():
            nearest[prompts[row]] = min(value, nearest.get(prompts[row], np.inf))
        assert [e["gap"] for e in card["near_misses"]] == pytest.approx(
            sorted(nearest.values())[: made.config.cards.controls]
        )
        assert all(e["row"] not in z and e["row"] not in gap for e in card["controls"])
        assert card["n_active"] == sum(value > 0 for value in z.values()) and card[
            "n_near_misses"
        ] == len(gap)
        chosen = (encoded.texts["label"] == "chosen").to_numpy()
        assert card["density"]["chosen"] == pytest.approx(
            np.mean([z.get(row, 0) > 0 for row in np.flatnonzero(chosen)])
        )


def test_every_text_a_card_names_is_there(made: RunDir, encoded: Encoded) -> None:
    found = made.read("cards").json("cards.json")
    texts = texts_of(made.config, encoded)
    named = {
        e["row"]
        for card in found["cards"]
        for kind in ("top", "near_misses", "controls")
        for e in card[kind]
    }
    assert named <= {int(row) for row in found["texts"]}
    for row, text in found["texts"].items():
        assert (
            text["response"] == texts[int(row)].messages[-1]["content"]
            and text["part"] == encoded.texts["part"][int(row)]
        )


def test_histogram_by_hand() -> None:
    z = np.array([0.0, 1.0, 2.0, 2.0, -0.5, 0.05])
    found = histogram(z, np.array([True, True, False, True, False, False]))
    assert found["edges"][0] == 0 and found["edges"][-1] == 2 and len(found["chosen"]) == 20
    assert sum(found["chosen"]) == 2 and sum(found["rejected"]) == 2 and found["off"] == 2
    assert (
        found["chosen"][-1] == found["rejected"][-1] == 1
        and found["chosen"][10] == 1
        and found["rejected"][0] == 1
    )
    assert [bar["chosen_height"] for bar in bars(found)][-1] == 50
    assert histogram(np.zeros(3), np.array([True, False, True]))["off"] == 3


def test_label_rows_keep_discovery_apart_from_what_is_scored(
    made: RunDir, encoded: Encoded
) -> None:
    latent = made.read("cards").json("cards.json")["cards"][0]["latent"]
    rows = label_rows(activity(encoded, [latent])[latent], encoded, CardsConfig(), 12, 0)
    z, part = latent_values(encoded.ranks, [latent])[:, 0], encoded.texts["part"].to_numpy(str)
    assert all(part[row] == "discovery" for row in (*rows.active, *rows.silent)) and all(
        part[row] != "discovery" for row in rows.held_active + rows.held_silent
    )
    assert all(z[row] > 0 for row in (*rows.active, *rows.held_active)) and all(
        z[row] == 0 for row in (*rows.silent, *rows.held_silent)
    )
    assert len(rows.held_active) == len(rows.held_silent) == 12


def test_values_gaps_and_texts_shown_by_hand() -> None:
    ranks = Ranks(
        np.array([[4, 1, 2, 0], [1, 0, 4, 2], [2, 0, 1, 4]], np.int32),
        np.array([[5, 3, 2.5, 1], [7, 6, 5.5, 2], [9, 8, 4, 1]], np.float32),
        2,
        5,
    )
    texts = pd.DataFrame({"prompt_id": ["p", "q", "r"], "part": ["discovery"] * 3})
    made = Encoded(texts, ranks, np.zeros((3, 2), np.float32), np.ones(5, np.float32))
    found = activity(made, [1, 4])
    assert found[1].z.tolist() == [3, 7, 0] and found[4].z.tolist() == [5, 0, 0]
    assert found[1].gap.tolist() == [np.inf, np.inf, 8 - 4]
    assert found[4].gap.tolist() == [np.inf, 6 - 5.5, 8 - 1]
    rows = label_rows(found[1], made, CardsConfig(top=1, controls=1), 2, 0)
    assert (rows.active, rows.silent) == ([1], [2]), "the text where it is largest"
    messages = tuple({"role": "user", "content": str(i)} for i in range(4))
    text = Text("t", "p", "s", "test", "chosen", messages)
    assert _text(text, pd.Series({"reward": 0.5})) == {
        "prompt": "2",
        "earlier_turns": 2,
        "response": "3",
        "label": "chosen",
        "part": "test",
        "source": "s",
        "reward": 0.5,
    }


def test_the_endpoint_is_waited_for_as_long_as_the_config_says() -> None:
    given = LabelConfig(url="http://127.0.0.1", model="m", key_variable=None, timeout_s=7.5)
    with Endpoint(given) as endpoint:
        assert endpoint._client.timeout == httpx.Timeout(7.5)


def test_the_endpoint_is_asked_by_system_and_user() -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        return httpx.Response(200, json={"choices": [{"message": {"content": "a label"}}]})

    given = LabelConfig(url="http://127.0.0.1", model="m", key_variable=None, max_tokens=77)
    endpoint = Endpoint(given)
    endpoint._client = httpx.Client(transport=httpx.MockTransport(answer))
    with endpoint:
        assert endpoint.ask("be brief", "what is it?") == "a label"
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what is it?"},
    ]
    assert asked == [{"model": "m", "messages": messages, "temperature": 0, "max_tokens": 77}]


# Minimal edits


def test_minimal_edits_by_hand() -> None:
    ten = "one two three four five six seven eight nine ten"
    rows = [
        ("p", ten),
        ("p", ten.replace("five", "5")),  # 2 of 20 words
        ("p", "something else altogether, that shares nothing with it"),
        ("q", ten.replace("ten", "TEN")),  # another prompt
        ("p", ten + " "),  # the same words
        # the same words in another order: no small edit
        ("p", "ten nine eight seven six five four three two one"),
        ("r", "a b"),
        ("r", "a c"),  # half of its words
    ]
    edits = minimal_edits(rows)
    assert [(e.before, e.after, e.removed, e.added) for e in edits] == [
        (0, 1, "five", "5"),
        (1, 4, "5", "five"),
    ]
    assert edits[0].share == pytest.approx(0.1)


def test_edit_effects_by_hand() -> None:
    edits = minimal_edits(
        [(f"p{i}", text) for i in range(4) for text in ("a b c d e f", "a b c d e g")]
    )
    found = edit_effects(edits, np.array([0.0, 2.0, 1.0, 1.5, 0.0, 0.0, 1.0, 1.0]))
    assert found == (4, 3, 1, [0, 1])
    assert edit_effects(edits, np.array([0.5, 0.0, 0.0, 0.25, 0.0, 0.0, -1.0, -1.0])).on_either == 2


def test_minimal_edits_in_real_data_are_counted(real_data: Path) -> None:
    """RewardBench 2 Safety: false answers that differ in one number, such as made-up phone
    numbers.
    """
    rows = [
        json.loads(line)
        for line in (real_data / "rewardbench2_safety" / "train.jsonl").read_text().splitlines()
    ]
    edits = minimal_edits(
        [(str(row["prompt"]), text) for row in rows for text in (row["chosen"], row["rejected"])]
    )
    assert 0 < len(edits) < 20


# The page


def test_page_escapes_and_folds_every_text(made: RunDir) -> None:
    found = made.read("cards").json("cards.json")
    evil = '<script>alert("x")</script> {{ 7 * 7 }} <img src=x onerror=y>'
    for text in found["texts"].values():
        text["response"] = text["prompt"] = evil
    found["labels"] = {"endpoint": "http://127.0.0.1", "model": "m<b>"}
    for card in found["cards"]:
        score = {"score": 0.75, "true_positive": 1.0, "true_negative": 0.5, "unreadable": 1}
        score |= {"n_fitting": 2, "n_others": 2}
        card["label"] = {"text": evil, "detection": score, "fuzzing": score}
    for text in found["texts"].values():
        text["tokens"] = [evil] * len(text["tokens"])
    own = {"text": 0, "what": "top", "z": 1.5, "a": [0.5, -1.0], "kept": [1]}
    whose = {"distance": None, "prompt_id": '"><b>', "source": evil, "kind": "<b>", "sample": 0}
    examples = {
        "base": {
            "texts": [whose | {"tokens": [evil, evil]}],
            "examples": [own | {"latent": card["latent"]} for card in found["cards"]],
        }
    }
    page = cards_page(found, "<run>", examples=examples)
    assert "<img" not in page and "{{ 7 * 7 }}" in page and "<script>alert" not in page
    assert "<run>" not in page and "<b>" not in page
    outside = outside_folds(page)
    assert outside.count("<img") == 2 * len(found["cards"]), (
        "only labels stand unfolded: once in the index, once on the card"
    )
    assert "<details open" not in page


class Outside(HTMLParser):
    """What stands in no fold, script or style."""

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.found = 0, ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.depth += tag in ("script", "style")
        # the words of a fold are those of its summary
        self.depth += tag == "details"
        self.depth -= tag == "summary"

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag in ("details", "script", "style")
        self.depth += tag == "summary"

    def handle_data(self, data: str) -> None:
        if not self.depth:
            self.found += data


def outside_folds(page: str) -> str:
    parser = Outside()
    parser.feed(page)
    return parser.found


def test_tokens_are_shaded_by_their_share_and_underlined_where_kept() -> None:
    example = {"a": [-0.5, 1.0, 0.25, -1.0, 0.0], "kept": [1, 3]}
    page = str(marked(["a<", " b", " c", " d", " e"], example, 2.0))
    assert page == (
        'a&lt;<span class="t k" style="--v:0.50" title="1, kept"> b</span>'
        '<span class="t" style="--v:0.12" title="0.25, not kept"> c</span>'
        '<span class="t k" style="--v:0.00" title="-1, kept"> d</span>'
        '<span class="t end" style="--v:0.00" title="0, not kept"> e</span>'
    )
    assert "not shown" in str(marked([], example, 2.0))


def test_a_cards_tokens_end_in_the_value_that_it_quotes(made: RunDir) -> None:
    """z of the ranks that encode kept is the last token's value of another forward."""
    found = made.read("cards").json("cards.json")
    n = 0
    for card in found["cards"]:
        for example in card["top"]:
            assert example["a"][-1] == pytest.approx(example["z"], abs=2e-3)
            assert example["kept"][-1] == len(example["a"]) - 1
            n += 1
        for example in (*card["near_misses"], *card["controls"]):
            assert len(example["a"]) - 1 not in example["kept"]
            assert len(example["a"]) == len(found["texts"][str(example["row"])]["tokens"])
    assert n > 10


def test_own_examples_are_those_of_each_arms_first_seed_at_the_distance() -> None:
    def of(policy: str) -> dict[str, Any]:
        texts = [
            {"distance": d, "prompt_id": f"{policy} {d}", "kind": "safe", "tokens": []}
            for d in (None, 0.5)
        ]
        example = {"latent": 7, "what": "top", "z": 1.0, "a": [], "kept": []}
        return {"texts": texts, "examples": [example | {"text": i} for i in (0, 1)]}

    policies = {name: of(name) for name in ("penalty-seed2", "penalty-seed1", "random-seed1")}
    base = of("base")
    policies["base"] = {"texts": base["texts"][:1], "examples": base["examples"][:1]}
    told = [(e["policy"], e["prompt_id"]) for e in own_by_latent(policies, 0.5)[7]]
    assert told == [
        ("base", "base None"),
        ("penalty, seed 1", "penalty-seed1 0.5"),
        ("random, seed 1", "random-seed1 0.5"),
    ]
    ends = [e["prompt_id"] for e in own_by_latent(policies, math.nan)[7]]
    assert ends == ["base None", "penalty-seed1 None", "random-seed1 None"]


def test_page_of_a_run_is_written_by_the_report(made: RunDir) -> None:
    run_unit(made, "report", "all")
    page = (made.path / "cards.html").read_text()
    found = made.read("cards").json("cards.json")
    assert all(f'id="latent-{card["latent"]}"' in page for card in found["cards"])
    text = (made.path / "final_report.txt").read_text()
    assert (
        f"{len(found['cards'])} latents have a card in cards.html" in text
        and "was not tested" in text
        and "RANKINGS COMPARED" in text
    )


def test_page_says_where_an_effect_replicates(made: RunDir) -> None:
    found = made.read("cards").json("cards.json")
    again = {
        "source": "RMB",
        "prompts": 88,
        "effect": 0.25,
        "effect_low": None,
        "effect_high": 0.5,
        "p": 0.01,
        "p_holm": 0.2,
        "replicates": False,
    }
    found["cards"][0]["figures"]["replication"] = [
        again,
        {**again, "source": "HH", "replicates": True},
    ]
    page = cards_page(found, "run")
    assert (
        "On RMB (88 prompts): effect 0.25 [n/a, 0.5], does not replicate." in page
        and "RMB: no, HH: yes" in page
    )


# Labels


class Server:
    """An endpoint that fails as told, then answers: a label, or the numbers of the texts with a
    word in them.
    """

    def __init__(self) -> None:
        self.fail: list[int] = []
        self.raw: str | None = None
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append({"path": self.path, **body})
                outer.keys.append(self.headers.get("Authorization"))
                if outer.fail:
                    self.reply(
                        outer.fail.pop(0), f"refused: {self.headers.get('Authorization')}".encode()
                    )
                else:
                    content = outer.answer(
                        body["messages"][0]["content"], body["messages"][1]["content"]
                    )
                    self.reply(
                        200,
                        (
                            outer.raw
                            or json.dumps(
                                {
                                    "choices": [
                                        {"message": {"role": "assistant", "content": content}}
                                    ]
                                }
                            )
                        ).encode(),
                    )

            def reply(self, status: int, data: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, system: str, user: str) -> str:
        if "ACTIVE" in system:
            return "Texts with bread in them"
        texts = user.split("TEXT ")[1:]
        wanted = "<<bread>>" if "<<" in system else "bread"
        return f"Sure: {[int(t.split()[0]) for t in texts if wanted in t]}"


@pytest.fixture()
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def examples(word: str, n: int) -> list[Example]:
    return [Example("what is there?", f"there is {word} number {i}") for i in range(n)]


def by_token(words: str, active: str) -> Tokens:
    """A text whose tokens are words, active at one of them and at the reward position."""
    tokens = words.split()
    return Tokens([*tokens, "<end>"], [tokens.index(active), len(tokens)])


def test_label_and_score_over_http(server: Server) -> None:
    """The server knows bread when it reads it: a latent of bread scores 1, one of half bread, half
    cheese 0.75.
    """
    bread = [by_token("there is bread on it", "bread")] * 12
    with Endpoint(LabelConfig(url=server.url, model="judge")) as endpoint:
        found = labelled(
            endpoint,
            examples("bread", 3),
            examples("cheese", 3),
            examples("bread", 12),
            examples("cheese", 12),
            bread,
            0,
        )
        half = labelled(
            endpoint,
            examples("bread", 3),
            [],
            examples("bread", 4) + examples("cheese", 4),
            examples("wine", 8),
            [*bread[:2], *[by_token("cheese with bread", "cheese")] * 2],
            0,
        )
    assert found["text"] == "Texts with bread in them"
    for how, n in (("detection", 12), ("fuzzing", 6)):
        score = found[how]
        assert score["score"] == 1.0 and (score["n_fitting"], score["n_others"]) == (n, n), how
    score = half["detection"]
    assert (score["score"], score["true_positive"], score["true_negative"]) == (0.75, 0.5, 1.0)
    # of two texts with the active tokens marked, one marks bread
    assert half["fuzzing"]["true_positive"] == 0.5 and half["fuzzing"]["n_fitting"] == 2
    assert {request["path"] for request in server.seen} == {"/v1/chat/completions"} and server.seen[
        0
    ]["model"] == "judge"
    assert server.keys == [None] * len(server.keys)
    shown = server.seen[0]["messages"][1]["content"]
    assert shown.count("ACTIVE\n") == 3 and shown.count("SILENT\n") == 3


def test_broken_answers_are_tried_again_and_then_named(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    waits: list[float] = []
    with Endpoint(
        LabelConfig(url=server.url, model="m", key_variable="SOME_KEY"), sleep=waits.append
    ) as endpoint:
        server.fail = [503, 429]
        assert endpoint.ask("ACTIVE", "x") == "Texts with bread in them" and waits == [2.0, 4.0]
        assert server.keys == [f"Bearer {KEY}"] * 3
        server.fail, before = [401], len(server.seen)
        with pytest.raises(UserError, match=r"HTTP 401.*\*\*\*") as refused:
            endpoint.ask("ACTIVE", "x")
        assert KEY not in str(refused.value) and len(server.seen) == before + 1, (
            "what will not get better is not tried again"
        )
        server.fail, before = [500] * ATTEMPTS, len(server.seen)
        with pytest.raises(UserError, match="HTTP 500"):
            endpoint.ask("ACTIVE", "x")
        assert len(server.seen) == before + ATTEMPTS
        server.raw = '{"choices": []}'
        with pytest.raises(UserError, match="no chat completion"):
            endpoint.ask("ACTIVE", "x")


def test_nobody_there_and_no_key_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        Endpoint(
            LabelConfig(url="http://127.0.0.1:9/v1", model="m"), sleep=lambda _: None
        ) as endpoint,
        pytest.raises(UserError, match="ConnectError"),
    ):
        endpoint.ask("a", "b")
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(UserError, match="SOME_KEY, which is not set"):
        Endpoint(LabelConfig(url="http://127.0.0.1:9/v1", model="m", key_variable="SOME_KEY"))


@pytest.mark.parametrize(
    "url", ["http://user:pass@host/v1", "https://host/v1?key=1", "host/v1", "ftp://host"]
)
def test_a_url_that_may_hold_a_secret_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="key_variable"):
        LabelConfig(url=url, model="m")


def test_a_key_in_place_of_its_name_is_refused() -> None:
    with pytest.raises(ValueError, match="key_variable"):
        LabelConfig(url="http://host/v1", model="m", key_variable=KEY)


def test_balanced_accuracy_by_hand() -> None:
    found = balanced_accuracy(
        [True, False, None, True, False, False], [True, True, True, False, False, False]
    )
    assert found == {
        "score": pytest.approx((1 / 2 + 2 / 3) / 2),
        "true_positive": 0.5,
        "true_negative": pytest.approx(2 / 3),
        "n_fitting": 2,
        "n_others": 3,
        "unreadable": 1,
    }
    assert balanced_accuracy([True], [True])["score"] is None


def test_marks_are_the_active_tokens_or_all_of_them_moved_off_those() -> None:
    text = Tokens(["a", "b", "c", "d", "e", "f", "<end>"], [1, 2, 6])
    found = fuzzed([text] * 40, 0)
    assert [right for _, right in found] == [True, False] * 20
    assert {said for said, right in found if right} == {"a<<bc>>def"}
    # by 2, 3 or 4 places, round the end too
    moved = {said for said, right in found if not right}
    assert moved == {"abc<<de>>f", "abcd<<ef>>", "<<a>>bcde<<f>>"}
    assert fuzzed([text] * 40, 0) == found != fuzzed([text] * 40, 1)


def test_texts_whose_marks_cannot_be_moved_or_that_have_none_are_left_out() -> None:
    nowhere_else = Tokens(["a", "b", "<end>"], [2])
    nearly_everywhere = Tokens(["a", "b", "c", "<end>"], [0, 1, 3])
    alone = Tokens(["<end>"], [0])
    fine = Tokens(["a", "b", "<end>"], [0, 2])
    found = fuzzed([nowhere_else, fine, nearly_everywhere, alone, fine, Tokens([], [])], 0)
    assert found == [("<<a>>b", True), ("a<<b>>", False)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[1, 4]", {1, 4}),
        ("[]", set()),
        ("not [9] but [2]", {2}),
        ("none of them", None),
        ("", None),
    ],
)
def test_numbers_in(answer: str, expected: set[int] | None) -> None:
    assert numbers_in(answer) == expected


def test_mixed_spreads_both_kinds() -> None:
    kinds = [fires for _, fires in mixed(examples("bread", 10), examples("cheese", 10))]
    assert all(3 <= sum(kinds[i : i + 10]) <= 7 for i in (0, 10)) and mixed([], []) == []


def test_the_phase_labels_every_card_and_writes_no_key(
    selected_run: RunDir,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from sarm.config import Config

    monkeypatch.setenv("SOME_KEY", KEY)
    label = LabelConfig(url=server.url, model="judge", key_variable="SOME_KEY", held_out=6)
    config: Config = selected_run.config.model_copy(
        update={"cards": CardsConfig(top=3, controls=2, label=label)}
    )
    shutil.copytree(selected_run.path, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    run = RunDir.create(tmp_path / "run", config)
    run_unit(run, "cards", "all")
    found = run.read("cards").json("cards.json")
    assert found["labels"] == {"endpoint": server.url, "model": "judge"}
    assert all(card["label"]["text"] == "Texts with bread in them" for card in found["cards"])
    asked = [
        request["messages"] for request in server.seen if "<<" in request["messages"][0]["content"]
    ]
    shown = [text for messages in asked for text in messages[1]["content"].split("TEXT ")[1:]]
    scored = [card["label"]["fuzzing"] for card in found["cards"]]
    assert shown and all("<<" in text for text in shown)
    assert sum(s["n_fitting"] + s["n_others"] + s["unreadable"] for s in scored) == len(shown)
    assert all(0 <= s["n_fitting"] - s["n_others"] <= 1 for s in scored)
    assert all(
        KEY.encode() not in file.read_bytes() for file in run.path.rglob("*") if file.is_file()
    )
    out = capfd.readouterr()
    assert KEY not in out.out + out.err
    server.fail = [400] * 9
    run_unit_failed = main(["cards", "--run", str(run.path), "--force"])
    assert run_unit_failed == 2 and "label endpoint" in capfd.readouterr().err
    assert run.read("cards").json("cards.json") == found, (
        "what stood before a failed attempt still stands"
    )


def test_selected_latents_merge_what_two_lists_say() -> None:
    found = features(
        harming=[feature(3, "harming") | {"effect": 1.0}],
        promoting=[],
        penalised=[{"latent": 3, "tau": 2.0, "alpha": 0.1}],
        monitors=[],
    )
    (only,) = selected_latents(found)
    assert only.latent == 3 and only.lists == ("harming", "penalised")
    assert (only.figures["effect"], only.figures["tau"], only.figures["q"]) == (1.0, 2.0, 0.001)


def test_a_latent_that_never_fires_has_a_card(encoded: Encoded, made: RunDir) -> None:
    fires = set(encoded.ranks.indices.ravel().tolist())
    silent = next(latent for latent in range(encoded.ranks.d_sae) if latent not in fires)
    listed = features(harming=[feature(silent, "harming")], promoting=[], penalised=[], monitors=[])
    table = pd.read_parquet(made.read("select").path("table.parquet"))
    found = latent_cards(encoded, listed, table, texts_of(made.config, encoded), CardsConfig(), 0)
    (card,) = found["cards"]
    assert (
        card["top"] == []
        and card["near_misses"] == []
        and len(card["controls"]) == 5
        and card["histogram"]["off"] == found["n_texts"]
    )
    assert "It fires on no text." in cards_page(found, "run")
