"""What trainers load, against a real server: TRL's, verl's and OpenRLHF's forms, and their
published shapes replayed.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sarm.config import ROOT
from sarm.ppo.reward import CompoundReward
from tests.serving.servers import TOKEN, Server

CLIENT = ROOT / "serving" / "client.py"
PROMPT = [{"role": "user", "content": "How can I make this work?"}]
ANSWERS = ["Here are the steps. First take the thing, then", "I am sorry, but I will not."]


@pytest.fixture
def client(server: Server, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file as verl and OpenRLHF load it: by its path."""
    monkeypatch.setenv("SARM_REWARD_URL", server.url)
    monkeypatch.setenv("SARM_REWARD_TOKEN", TOKEN)
    spec = importlib.util.spec_from_file_location("custom_module", CLIENT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_needs_nothing_but_python(tmp_path: Path) -> None:
    code = "import importlib.util as u, sys; s = u.spec_from_file_location('c', sys.argv[1]);"
    code += "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.compute_score.__name__)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, CLIENT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "compute_score", done.stderr


def test_trls_function_is_the_one_in_process(client: Any, scorer: Any) -> None:
    """Rewards, metrics and columns, of strings and of messages."""
    prompts = [PROMPT, PROMPT, PROMPT]
    completions = [[{"role": "assistant", "content": text}] for text in (*ANSWERS, ANSWERS[0])]
    ids = [[5, 6], [7, 3], [5, 3]]
    ours = CompoundReward(
        scorer.reward.model,
        scorer.reward.tokenizer,
        scorer.reward.penalised,
        monitors=scorer.reward.monitors,
        stop_ids=[3],
    )
    logged: list[tuple[dict[str, float], dict[str, list[float]]]] = []
    got = []
    for function in (ours, client.RemoteReward()):
        numbers: dict[str, float] = {}
        columns: dict[str, list[float]] = {}
        got.append(
            function(
                prompts=prompts,
                completions=completions,
                completion_ids=ids,
                log_metric=numbers.__setitem__,
                log_extra=columns.__setitem__,
            )
        )
        logged.append((numbers, columns))
    assert got[1] == pytest.approx(got[0], abs=1e-6)
    assert got[0][0] != pytest.approx(got[0][2], abs=1e-3), "one was cut and one ended"
    (numbers, columns), (remote_numbers, remote_columns) = logged
    assert numbers.keys() <= remote_numbers.keys() and columns.keys() <= remote_columns.keys()
    for name, number in numbers.items():
        assert remote_numbers[name] == pytest.approx(number, abs=1e-6), name
    for name, column in columns.items():
        assert remote_columns[name] == pytest.approx(column, abs=1e-6), name
    assert client.RemoteReward()([], []) == []


def test_verls_function_in_the_shapes_of_its_reward_manager(client: Any, scorer: Any) -> None:
    """verl 0.9: a coroutine function behind a partial, called by keywords for one response; of the
    dictionary every value becomes an array over the batch, and `score` the reward.
    """
    function = partial(client.compute_score, url=None)
    assert inspect.iscoroutinefunction(function)

    async def one(text: str, key: str, prompt: Any) -> dict[str, Any]:
        return await function(
            data_source="demo",
            solution_str=text,
            ground_truth="",
            extra_info={key: prompt, "num_turns": 2, "rollout_reward_scores": {}},
        )

    async def batch() -> list[dict[str, Any]]:
        return await asyncio.gather(
            one(ANSWERS[0], "prompt", np.array(PROMPT, dtype=object)),
            one(ANSWERS[1], "raw_prompt", PROMPT),
        )

    infos = asyncio.run(batch())
    arrays = {key: np.array([info[key] for info in infos]) for key in infos[0]}
    assert all(array.dtype == np.float64 and array.shape == (2,) for array in arrays.values())
    job = {"form": "items", "items": [
        {"prompt": PROMPT, "response": text, "ended": False} for text in ANSWERS]}  # fmt: skip
    want = scorer.score([(job, scorer.read(job))])[0]
    assert arrays["score"] == pytest.approx(want["rewards"], abs=1e-6)
    assert arrays.keys() == {"score", *want["extra_logs"]}
    with pytest.raises(ValueError, match="extra_info has no prompt"):
        asyncio.run(function(data_source="demo", solution_str="a", extra_info={}))


@pytest.mark.parametrize("how", ["http", "file"])
def test_openrlhfs_exchange_in_the_shapes_of_its_agent(
    how: str, client: Any, server: Server, scorer: Any
) -> None:
    """OpenRLHF 0.11: one response a request; `rewards`, `scores` and every extra log become
    tensors of one number each.
    """
    from sarm.data.conversations import template_text

    prompt = template_text(scorer.transcripts.tokenizer, PROMPT, add_generation_prompt=True)
    for text in ANSWERS:
        query, label = prompt + text + "<|eot_id|>", "a label"
        if how == "file":
            found = client.reward_func([query], [prompt], [label])
        else:
            payload = {"query": [query], "prompts": [prompt], "labels": [label]}
            found = server.post("/get_reward", payload).raise_for_status().json()
        job = {"form": "openrlhf", "query": [query], "prompts": [prompt]}
        want = scorer.score([(job, scorer.read(job))])[0]
        assert torch.tensor([found["rewards"]]).shape == (1, 1)
        assert found["rewards"] == found["scores"] == pytest.approx(want["rewards"], abs=1e-6)
        info = {key: torch.tensor([value]) for key, value in found["extra_logs"].items()}
        assert {tuple(t.shape) for t in info.values()} == {(1, 1)}
        assert all(t.dtype == torch.float32 for t in info.values())
        assert {"sarm_reward", "penalty", "fired/3", "z/3", "z/5", "unended"} <= info.keys()


def test_refusals_are_the_servers_sentences(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(client.ServerRefused, match=r"422: .*ends in a user turn"):
        client.RemoteReward()(["a"], [[{"role": "user", "content": "b"}]])
    with pytest.raises(client.ServerRefused, match="401: give the server's token"):
        client.ask("/score", {}, token="another token")
    monkeypatch.setattr(client, "TRIES", 2)
    monkeypatch.setenv("SARM_REWARD_URL", "http://127.0.0.1:9")
    with pytest.raises(client.ServerRefused, match="does not answer"):
        client.RemoteReward()(["a"], ["b"])


def test_a_busy_server_is_asked_again(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """503 twice, then the answer; a refusal that no repeating mends is not repeated."""
    import io
    import urllib.error

    asked: list[int] = []

    def opened(request: Any, timeout: float) -> Any:
        asked.append(len(asked))
        if len(asked) < 3:
            body = io.BytesIO(b'{"error": "the queue is full"}')
            raise urllib.error.HTTPError(request.full_url, 503, "busy", {}, body)  # type: ignore[arg-type]
        return io.BytesIO(b'{"rewards": [1.0]}')

    monkeypatch.setattr(client._DIRECT, "open", opened)
    monkeypatch.setattr(client.time, "sleep", lambda s: None)
    assert client.ask("/score", {}) == {"rewards": [1.0]} and asked == [0, 1, 2]


def test_a_server_that_restarts_is_waited_for_about_two_minutes(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waits of 1, 2, 4, 8, 16 and four times 30 s, each shortened by chance to half at most."""
    waits: list[float] = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    monkeypatch.setattr(client.random, "uniform", lambda low, high: (low + high) / 2)
    with pytest.raises(client.ServerRefused, match="does not answer"):
        client.ask("/score", {}, url="http://127.0.0.1:9")
    assert sum(waits) == 0.75 * 151
