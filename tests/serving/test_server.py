"""The served reward over real HTTP: its numbers, its refusals, and what it survives."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from sarm.config import ROOT, UserError
from serving.__main__ import bound, main, token_of
from tests.serving.servers import TOKEN, Server, settings

SECRET = "the words of a client"
QUESTIONS = ["How can I do it?", "Who should I call?", "What is the best way?"]


def item(i: int) -> dict[str, Any]:
    """Conversations that all differ, some of them cut."""
    words = "first take the thing, then make the other thing. " * (i % 5)
    response = f"Step {i}. {words}And then" if i % 7 else f"Step {i} and then"
    return {"prompt": QUESTIONS[i % 3], "response": response, "ended": i % 2 == 0}


def offline(scorer: Any, items: list[dict[str, Any]]) -> dict[str, Any]:
    job = {"form": "items", "items": items, "latents": []}
    return scorer.score([(job, scorer.read(job))])[0]


def test_a_request_has_the_numbers_of_offline_scoring(server: Server, scorer: Any) -> None:
    items = [item(i) for i in range(60)]
    got = server.post("/score", {"items": items}).json()
    want = offline(scorer, items)
    assert got["rewards"] == got["scores"] == pytest.approx(want["rewards"], abs=1e-6)
    assert got["extra_logs"].keys() == want["extra_logs"].keys()
    for name, column in want["extra_logs"].items():
        assert got["extra_logs"][name] == pytest.approx(column, abs=1e-6)
    extra = want["extra_logs"]
    assert {0.0, 1.0} == set(extra["fired/3"]) | set(extra["fired/10"])
    assert len(set(want["rewards"])) > 50 and {0.0, 1.0} == set(extra["unended"])


def test_requests_at_the_same_time_get_their_own_numbers(server: Server, scorer: Any) -> None:
    items = [item(i) for i in range(40)]
    want = offline(scorer, items)
    with ThreadPoolExecutor(6) as threads:
        got = list(threads.map(lambda one: server.post("/score", {"items": [one]}).json(), items))
    for i, answer in enumerate(got):
        assert answer["rewards"] == pytest.approx([want["rewards"][i]], abs=1e-6)
        for name, column in want["extra_logs"].items():
            assert answer["extra_logs"][name] == pytest.approx([column[i]], abs=1e-5)


def test_more_latents_come_back_where_asked_for(server: Server, scorer: Any) -> None:
    job = {"form": "items", "items": [item(i) for i in range(9)], "latents": [12, 3, 20]}
    want = scorer.reward.measure(
        [read.messages for read in scorer.read(job)], [12, 3, 20]
    ).T.tolist()
    got = server.post("/score", {"items": job["items"], "latents": [12, 3, 20]}).json()
    for latent, column in zip((12, 3, 20), want, strict=True):
        assert got["extra_logs"][f"z/{latent}"] == pytest.approx(column, abs=1e-6)
    assert "z/20" not in server.score().json()["extra_logs"] and any(want[0])


BAD = {
    "malformed": (b"{", 400, "no JSON"),
    "not-utf-8": (b'{"items": "\xff"}', 400, "no JSON"),
    "deep": (b"[" * 100_000, 400, "no JSON"),
    "raw-control": (b'{"items": [{"prompt": "a\x01", "response": "b"}]}', 400, "no JSON"),
    "control": (b'{"items": [{"prompt": "a\\u0000", "response": "b"}]}', 422, "U+0000"),
    "half-a-pair": (b'{"items": [{"prompt": "a", "response": "\\ud800"}]}', 400, "no JSON"),
    "list": (b"[]", 422, "object"),
    "empty": (b"", 400, "no JSON"),
    "none": (b'{"items": []}', 422, "items"),
    "number": (b'{"items": [{"prompt": "a", "response": 1}]}', 422, "items.0.response"),
    "ended": (b'{"items": [{"prompt": "a", "response": "b", "ended": "no"}]}', 422, "ended"),
    "key": (b'{"items": [{"prompt": "a", "respose": "b"}]}', 422, "response"),
    "user-turn": (
        b'{"items": [{"prompt": "a", "response": [{"role": "user", "content": "b"}]}]}',
        422,
        "ends in a user turn",
    ),
    "role": (
        b'{"items": [{"prompt": [{"role": "tool", "content": "a"}], "response": "b"}]}',
        422,
        "role",
    ),
    "latent": (b'{"items": [{"prompt": "a", "response": "b"}], "latents": [64]}', 422, "64"),
    "many-latents": (
        b'{"items": [{"prompt": "a", "response": "b"}], "latents": [' + b"1," * 64 + b"1]}",
        422,
        "at most 64",
    ),
    "negative": (b'{"items": [{"prompt": "a", "response": "b"}], "latents": [-1]}', 422, "latents"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_status_and_a_sentence(server: Server, name: str) -> None:
    body, status, words = BAD[name]
    answer = server.client.post("/score", content=body)
    assert answer.status_code == status and words in answer.json()["error"], answer.text
    assert server.score().status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"query": ["How?"], "prompts": ["What?"]}, "does not begin with its prompt"),
        ({"query": ["How?"]}, "ends in no assistant turn"),
        ({"query": ["How?", "a"], "prompts": ["How?"]}, "prompts has 1 entries"),
        ({"query": "How?"}, "query"),
        ({"query": [1]}, "query.0"),
        ({"prompts": ["How?"]}, "query"),
    ],
)
def test_bad_openrlhf_requests_get_a_sentence(
    server: Server, body: dict[str, Any], words: str
) -> None:
    answer = server.post("/get_reward", body)
    assert answer.status_code == 422 and words in answer.json()["error"], answer.text


def test_too_long_is_refused_by_tokens_and_unread_by_letters(server: Server) -> None:
    by_tokens = server.score("Here are the steps. " * 300)
    assert by_tokens.status_code == 413 and "512 tokens" in by_tokens.json()["error"]
    by_letters = server.score("a" * 40_000)
    assert by_letters.status_code == 413 and "letters" in by_letters.json()["error"]
    many = server.post("/score", {"items": [item(0)] * 601})
    assert many.status_code == 413 and "serve.max_request" in many.json()["error"]
    assert server.score().status_code == 200


def test_a_body_of_100_mb_is_dropped_and_answered(server: Server) -> None:
    body = b"x" * 100_000_000

    def pieces() -> Any:
        for _ in range(100):
            yield body[:1_000_000]

    before = memory_mib(server.process.pid)
    for content in (body, pieces()):  # with its length said, and without
        answer = server.client.post("/score", content=content)
        assert answer.status_code == 413 and "8 MiB" in answer.json()["error"]
    assert memory_mib(server.process.pid) < before + 64
    assert server.score().status_code == 200


def memory_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def test_without_the_token_nothing_is_said(server: Server) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
        for path in ("/score", "/get_reward", "/serves", "/metrics", "/nothing"):
            answer = httpx.post(server.url + path, headers=headers, json={"items": []})
            assert answer.status_code == 401 and "token" in answer.json()["error"]
            assert answer.headers["www-authenticate"] == "Bearer"
    assert httpx.get(server.url + "/health").json() == {"status": "up"}
    assert httpx.get(server.url + "/ready").status_code == 200
    assert server.client.get("/serves").json()["monitors"] == [5, 7]
    assert server.client.get("/nothing").status_code == 404
    assert server.client.get("/score").status_code == 405


def test_a_client_that_hangs_up_is_forgotten(server: Server) -> None:
    scored = server.metric("conversations_total")
    gone = server.metric('requests_total{route="/score",status="499"}')
    server.signal_worker(signal.SIGSTOP)
    try:
        with pytest.raises(httpx.ReadTimeout):
            server.post("/score", {"items": [item(1)]}, timeout=0.5)
        server.wait_for('requests_total{route="/score",status="499"}', gone + 1)
        assert server.metric("queue_conversations") == 0
    finally:
        server.signal_worker(signal.SIGCONT)
    assert server.score().status_code == 200
    assert server.metric("conversations_total") == scored + 1


def test_a_full_queue_says_so_and_loses_nothing(server: Server, scorer: Any) -> None:
    server.signal_worker(signal.SIGSTOP)
    with ThreadPoolExecutor(8) as threads:
        try:
            asked = [threads.submit(server.post, "/score", {"items": [item(i)]}) for i in range(8)]
            server.wait_for("queue_conversations", 8)
            answer = server.score()
            assert answer.status_code == 503 and "queue is full" in answer.json()["error"]
            assert answer.headers["retry-after"] == "1"
        finally:
            server.signal_worker(signal.SIGCONT)
        got = [future.result() for future in asked]
    assert [answer.status_code for answer in got] == [200] * 8
    want = offline(scorer, [item(i) for i in range(8)])["rewards"]
    assert [a.json()["rewards"][0] for a in got] == pytest.approx(want, abs=1e-6)
    assert server.score().status_code == 200


def test_a_scoring_process_killed_in_mid_request_is_replaced(server: Server) -> None:
    large = {"items": [item(i) | {"response": "Here are the steps. " * 25} for i in range(600)]}
    died = server.metric("scoring_process_deaths_total")
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(server.post, "/score", large)
        server.wait_for("scoring_conversations", 600)
        server.signal_worker(signal.SIGKILL)
        answer = asked.result()
    assert answer.status_code == 503 and "died" in answer.json()["error"]
    assert server.score().status_code == 200
    assert server.metric("scoring_process_deaths_total") == died + 1


def test_what_waits_when_the_scoring_process_dies_is_scored_by_the_next(server: Server) -> None:
    server.signal_worker(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(server.score)
        server.wait_for("queue_conversations", 1)
        server.signal_worker(signal.SIGKILL)
        assert asked.result().status_code == 200


def test_no_log_holds_a_token_or_a_text(tiny_policy: Path, tiny_sarm: Path, tmp_path: Path) -> None:
    # of its own: one that has refused much in this minute logs no more of it
    server = Server(tmp_path, settings(tiny_policy, tiny_sarm), TOKEN, command=True)
    for path, content in (
        ("/score", json.dumps({"items": [{"prompt": SECRET, "response": 1}]})),
        ("/score", json.dumps({"items": [{"prompt": SECRET + "\x00", "response": SECRET}]})),
        ("/score", json.dumps({SECRET: 1})),
        ("/score", SECRET),
        ("/get_reward", json.dumps({"query": [SECRET], "prompts": ["other"]})),
        (f"/{SECRET}?token={TOKEN}", "{}"),
    ):
        assert server.client.post(path, content=content.encode()).status_code >= 400
    assert server.post("/score", {"items": [{"prompt": SECRET, "response": SECRET}]}).is_success
    httpx.post(server.url + "/score", headers={"Authorization": f"Bearer {SECRET}{TOKEN}"})
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as raw:
        raw.sendall(f"{SECRET} {TOKEN}\r\n\r\n".encode())
        raw.recv(1000)
    log = server.log
    assert SECRET not in log and TOKEN not in log and "the%20words" not in log
    assert "POST /score 422" in log and "POST other 404" in log
    metrics = server.client.get("/metrics").text
    assert SECRET not in metrics and TOKEN not in metrics
    worker = Path(f"/proc/{server.worker()}/environ").read_bytes()
    assert TOKEN.encode() not in worker
    assert server.stop() == 0


def test_asked_to_stop_it_ends_what_is_under_way(
    tiny_policy: Path, tiny_sarm: Path, tmp_path: Path
) -> None:
    server = Server(tmp_path, settings(tiny_policy, tiny_sarm))
    worker = server.worker()
    server.signal_worker(signal.SIGSTOP)
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(server.score()))
    asking.start()
    server.wait_for("queue_conversations", 1)
    server.process.send_signal(signal.SIGTERM)
    os.kill(worker, signal.SIGCONT)
    asking.join()
    assert answers[0].status_code == 200
    assert server.process.wait(60) == 0 and server.log.rstrip().endswith("stopped")
    assert not Path(f"/proc/{worker}").exists()


def test_a_scoring_process_that_hangs_is_replaced(
    tiny_policy: Path, tiny_sarm: Path, tmp_path: Path
) -> None:
    server = Server(tmp_path, [*settings(tiny_policy, tiny_sarm), "serve.timeout_s=4"])
    hung = server.worker()
    os.kill(hung, signal.SIGSTOP)
    answer = server.score()
    assert answer.status_code == 504 and "serve.timeout_s" in answer.json()["error"]
    answers = [server.score() for _ in range(8)]  # four seconds each, while another starts
    assert answers[-1].status_code == 200 and server.worker() != hung
    assert "silent" in server.log and server.stop() == 0


def test_what_cannot_be_served_is_one_sentence(
    tiny_policy: Path, tiny_sarm: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([]) == 2 and "give a run" in capsys.readouterr().err
    assert main(["--run", str(tmp_path)]) == 2 and "no config.yaml" in capsys.readouterr().err
    with pytest.raises(UserError, match="SARM_REWARD_TOKEN is not set"):
        token_of({}, "0.0.0.0")
    for bad in ("short", "a token with spaces in it", "a-token-with-a-line\nin-it"):
        with pytest.raises(UserError, match="at least 16 letters") as raised:
            token_of({"SARM_REWARD_TOKEN": bad}, "127.0.0.1")
        assert bad not in str(raised.value)
    assert token_of({"SARM_REWARD_TOKEN": TOKEN}, "0.0.0.0") == TOKEN
    assert token_of({}, "127.0.0.1") is token_of({}, "::1") is token_of({}, "localhost") is None
    with bound("127.0.0.1", 0) as taken, pytest.raises(UserError, match="cannot listen"):
        bound("127.0.0.1", taken.getsockname()[1])
    # what only the scoring process finds out
    done = subprocess.run(
        [
            *(sys.executable, "-m", "serving", "--config", "configs/tiny.yaml"),
            *settings(tiny_policy, tiny_sarm),
            "serve.penalised=[{latent: 64, alpha: 1}]",
        ],
        cwd=ROOT,
        env=os.environ | {"SARM_REWARD_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "which has 64" in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert TOKEN not in done.stderr
