"""Which jobs are scored together, and what becomes of the others when one cannot be scored, or when
no scoring process can be started.
"""

from __future__ import annotations

import asyncio
import queue
import subprocess
import sys
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest

from sarm.config import UserError
from serving.pool import GaveUp, Pool
from serving.protocol import Refused
from serving.worker import Waiting, first_that_fit, refusal, scored, work

SECRET = "the words of a client"


class Scorer:
    """Gives each conversation its token count as its reward; refuses what it is told to."""

    def __init__(self) -> None:
        self.reward = SimpleNamespace(tokens_per_batch=10)
        self.rounds: list[list[int]] = []

    def read(self, job: dict[str, Any]) -> list[Any]:
        if job.get("long"):
            raise Refused(413, "too long")
        return [SimpleNamespace(tokens=n) for n in job["tokens"]]

    def score(self, jobs: list[tuple[dict[str, Any], list[Any]]]) -> list[dict[str, Any]]:
        self.rounds.append([job["job"] for job, _ in jobs])
        if any(job.get("bad") for job, _ in jobs):
            raise UserError("a state is not finite")
        return [
            {"rewards": [float("nan") if job.get("nan") else r.tokens for r in reads]}
            for job, reads in jobs
        ]


def messages(jobs: list[dict[str, Any]], n: int) -> tuple[list[dict[str, Any]], Scorer]:
    incoming: queue.SimpleQueue[list[dict[str, Any]]] = queue.SimpleQueue()
    incoming.put(jobs[:1])
    incoming.put(jobs[1:])
    scorer, sent = Scorer(), []
    for message in islice(work(scorer, incoming, sent.append), n):
        sent.append(message)
    return [m for m in sent if "job" in m], scorer


def test_what_arrives_at_once_is_passed_on_at_once() -> None:
    """So a job that lies before its own withdrawal is never begun; a line that comes in two pieces
    is read as one.
    """
    code = """
import queue, socket, threading
from serving import worker
ours, theirs = socket.socketpair()
incoming = queue.SimpleQueue()
threading.Thread(target=worker.receive, args=(theirs.makefile("rb"), incoming), daemon=True).start()
for sent in (b'{"job": 1}\\n{"cancel": 1}\\n{"jo', b'b": 2}\\n'):
    ours.sendall(sent)
    print(incoming.get(timeout=60))
ours.close()
threading.Event().wait(60)
print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[{'job': 1}, {'cancel': 1}]", "[{'job': 2}]"], done.stderr
    assert done.returncode == 0


def test_the_oldest_jobs_that_fit_are_scored_together_and_a_large_one_by_itself() -> None:
    sizes = {1: [4, 3], 2: [3], 3: [30, 5], 4: [1], 5: [9]}
    found, scorer = messages([{"job": i, "tokens": t} for i, t in sizes.items()], 8)
    assert scorer.rounds == [[1, 2], [3], [4, 5]]
    assert [(m["job"], m["answer"]["rewards"]) for m in found] == [
        (i, [float(n) for n in t]) for i, t in sizes.items()
    ]


def test_a_cancelled_job_and_a_refused_one_are_not_scored() -> None:
    jobs = [
        {"job": 1, "tokens": [1]},
        {"job": 2, "tokens": [1]},
        {"cancel": 1},
        {"cancel": 77},
        {"job": 3, "tokens": [1], "long": True},
    ]
    found, scorer = messages(jobs, 3)
    assert scorer.rounds == [[2]]
    assert found == [
        {"job": 3, "status": 413, "sentence": "too long"},
        {"job": 2, "answer": {"rewards": [1]}},
    ]


def test_a_job_that_cannot_be_scored_takes_no_other_with_it() -> None:
    batch = {
        1: Waiting({"job": 1}, [SimpleNamespace(tokens=2)]),
        2: Waiting({"job": 2, "bad": True}, [SimpleNamespace(tokens=3)]),
        3: Waiting({"job": 3, "nan": True}, [SimpleNamespace(tokens=4)]),
        4: Waiting({"job": 4}, [SimpleNamespace(tokens=5)]),
    }
    found = {m["job"]: m for m in scored(Scorer(), batch) if "job" in m}
    assert found[1]["answer"] == {"rewards": [2]} and found[4]["answer"] == {"rewards": [5]}
    assert found[2]["status"] == 500 and "not finite" in found[2]["sentence"]
    assert found[3]["status"] == 500 and "not finite" in found[3]["sentence"]


def test_a_job_larger_than_a_batch_goes_first_where_it_is_oldest() -> None:
    waiting = {
        7: Waiting({}, [SimpleNamespace(tokens=50)]),
        8: Waiting({}, [SimpleNamespace(tokens=1)]),
    }
    assert first_that_fit(waiting, 10) == [7]


def test_what_nobody_foresaw_is_logged_without_its_message(capfd: Any) -> None:
    try:
        raise RuntimeError(SECRET)
    except RuntimeError as error:
        told = refusal(error)
    said = capfd.readouterr().err
    assert told["status"] == 500 and SECRET not in told["sentence"] + said
    assert "RuntimeError at" in said and "test_worker.py" in said


def test_where_no_process_can_be_started_serving_ends_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def none_left(*words: Any, **how: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", none_left)

    async def start() -> None:
        await asyncio.wait_for(Pool({}, max_queue=1, timeout_s=1.0).start(), 30)

    with pytest.raises(GaveUp, match="no process can be started: Cannot allocate memory"):
        asyncio.run(start())
