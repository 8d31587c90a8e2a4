"""The served reward under load beside offline scoring, in turns on the same cores, and its numbers.

`python benchmarks/serving.py [--clients 100] [--seconds 300] [--round 30] [--dtype float32]`

Clients ask for one conversation at a time and send the next when the answer is there. A round lets
them ask for `--round` seconds and waits for the last answer, then scores as many of the same
conversations offline, in batches of the same size: throughput is a ratio of the two, so that what
else the machine does hits both. No text comes twice in a round: offline, both would share a pass.
Every answer is held against offline scoring: none lost, none mixed
up. The rounds go on until clients have asked for `--seconds` in all. Beside it: how much offline
scoring's own numbers differ between batch shapes, which is what answers may differ by.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MIXED_UP = 0.05
"""Beyond this, in rewards, an answer is taken for another conversation's; in bf16 the variation
of offline scoring is added.
"""


class Answer(NamedTuple):
    row: int
    seconds: float
    status: int
    reward: float


class Round(NamedTuple):
    answers: list[Answer]
    offline: list[float]
    """The reward of each answer's conversation."""
    seconds: float
    offline_s: float
    server_cpu_s: float
    offline_cpu_s: float

    @property
    def ratio(self) -> float:
        """Served over offline conversations a second."""
        return self.offline_s / self.seconds


def first_number(pattern: str, text: str) -> int:
    """Raises RuntimeError where the server said something else."""
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern} in what the server said: {text!r}")
    return int(found[1])


def conversations() -> list[list[dict[str, str]]]:
    """One answer to every prompt that ships: no two share a prompt, which would be computed once
    where both fall into one batch.
    """
    found: dict[str, list[dict[str, str]]] = {}
    for name in ("pairs.jsonl", "advice.jsonl"):
        for n, line in enumerate((ROOT / "data" / "demo" / name).read_text().splitlines()):
            row = json.loads(line)
            answer = row["chosen" if n % 2 else "rejected"]
            text = answer if isinstance(answer, str) else answer[-1]["content"]
            prompt = row["prompt"]
            asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            found.setdefault(
                asked, [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
            )
    return list(found.values())


class Clients:
    """Many connections, each with one request at a time; HTTP/1.1 by hand, to cost the machine as
    little as can be.
    """

    def __init__(self, port: int, bodies: list[bytes], n: int) -> None:
        self.port, self.bodies, self.n = port, bodies, n
        self.next = 0

    async def ask(self, seconds: float) -> list[Answer]:
        until = time.monotonic() + seconds
        found = await asyncio.gather(*(self._one(until) for _ in range(self.n)))
        return [answer for answers in found for answer in answers]

    async def _one(self, until: float) -> list[Answer]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        answers = []
        while time.monotonic() < until:
            row = self.next % len(self.bodies)
            self.next += 1
            began = time.monotonic()
            body = self.bodies[row]
            writer.write(
                b"POST /score HTTP/1.1\r\nHost: server\r\nContent-Length: %d\r\n\r\n" % len(body)
                + body
            )
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            length = first_number(r"content-length: (\d+)", head)
            answer = json.loads(await reader.readexactly(length))
            status = int(head.split()[1])
            reward = answer["rewards"][0] if status == 200 else float("nan")
            answers.append(Answer(row, time.monotonic() - began, status, reward))
        writer.close()
        return answers


class Served:
    """The server of these arguments, with the CPU time that it and its scoring process used."""

    def __init__(self, overrides: list[str]) -> None:
        command = [sys.executable, "-m", "serving", "--config", "configs/smollm2.yaml"]
        environment = {k: v for k, v in os.environ.items() if k != "SARM_REWARD_TOKEN"}
        self.process = subprocess.Popen(
            [*command, *overrides, "serve.port=0", "serve.timeout_s=900"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        print(said.strip(), flush=True)
        self.port = first_number(r":(\d+) serves", said)

    def cpu_s(self) -> float:
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return sum(map(cpu_s, [pid, *map(int, children)]))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def variation(reward: Any, texts: list[Any], whole: list[float], n: int) -> tuple[float, float]:
    """The largest difference and the 95th percentile of the first n rewards, between one batch of
    all, fives and each by itself.
    """
    differences = []
    for at_once in (1, 5):
        for start in range(0, n, at_once):
            part = reward.score(texts[start : start + at_once]).total.tolist()
            differences += [abs(a - b) for a, b in zip(part, whole[start:], strict=False)]
    return max(differences), sorted(differences)[int(0.95 * len(differences))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--round", type=float, default=30.0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--texts", type=int, default=10**6)
    parser.add_argument("--whole", type=int, default=100, help="texts of one request")
    parser.add_argument("--vary", type=int, default=24, help="texts for the variation of offline")
    args = parser.parse_args()

    from sarm.threads import bound_threads

    threads = bound_threads(os.environ)
    from sarm.config import load_config
    from serving.client import ask
    from serving.scorer import open_scorer

    latent = "serve.penalised=[{latent: 4160, tau: 0.5, alpha: 1.0}]"
    overrides = [f"sarm.dtype={args.dtype}", latent]
    reward = open_scorer(load_config(ROOT / "configs" / "smollm2.yaml", overrides), None).reward
    texts = conversations()[: args.texts]
    whole = reward.score(texts[: args.whole]).total.tolist()
    most, p95 = variation(reward, texts, whole, args.vary)
    print(
        f"{len(texts)} conversations, {args.dtype}, {threads} threads; offline scoring differs"
        f" between batch shapes by at most {most:.2e} ({p95:.2e} at the 95th percentile of"
        f" {2 * args.vary})",
        flush=True,
    )
    bodies = [
        json.dumps(
            {"items": [{"prompt": t[:-1], "response": t[-1]["content"], "ended": True}]}
        ).encode()
        for t in texts
    ]
    served = Served(overrides)
    items = [json.loads(body)["items"][0] for body in bodies]
    try:
        same = ask("/score", {"items": items[: args.whole]}, url=f"http://127.0.0.1:{served.port}")[
            "rewards"
        ]
        apart = max(abs(a - b) for a, b in zip(same, whole, strict=True))
        print(f"{len(whole)} in one request differ from offline scoring by at most {apart:.2e}")
        rounds = asyncio.run(measured(args, served, bodies, reward, texts))
    finally:
        served.stop()
    assert all(len({a.row for a in r.answers}) == len(r.answers) for r in rounds), "shorter rounds"
    report(args, rounds, most)


async def measured(
    args: argparse.Namespace, served: Served, bodies: list[bytes], reward: Any, texts: list[Any]
) -> list[Round]:
    clients = Clients(served.port, bodies, args.clients)
    await clients.ask(1.0)  # warm
    rounds: list[Round] = []
    while sum(r.seconds for r in rounds) < args.seconds:
        cpu, began, load = served.cpu_s(), time.monotonic(), os.getloadavg()[0]
        answers = await clients.ask(args.round)
        seconds, server_cpu = time.monotonic() - began, served.cpu_s() - cpu
        cpu, began = time.process_time(), time.monotonic()
        want = reward.score([texts[a.row] for a in answers]).total.tolist()
        offline, offline_cpu = time.monotonic() - began, time.process_time() - cpu
        rounds.append(Round(answers, want, seconds, offline, server_cpu, offline_cpu))
        print(
            f"  round {len(rounds)}: {len(answers)} answers in {seconds:.1f} s, offline"
            f" {offline:.1f} s, ratio {rounds[-1].ratio:.2f}; CPU {server_cpu:.1f} and"
            f" {offline_cpu:.1f} s; load {load:.1f}",
            flush=True,
        )
    return rounds


def report(args: argparse.Namespace, rounds: list[Round], most: float) -> None:
    answers = [a for r in rounds for a in r.answers]
    wrong = [a for a in answers if a.status != 200]
    off = [
        abs(a.reward - want)
        for r in rounds
        for a, want in zip(r.answers, r.offline, strict=True)
        if a.status == 200
    ]
    mixed = sum(d > MIXED_UP + most for d in off)
    latencies = sorted(a.seconds for a in answers)
    served_s, offline_s = sum(r.seconds for r in rounds), sum(r.offline_s for r in rounds)
    print(
        f"{len(answers)} requests by {args.clients} clients in {served_s:.0f} s: {len(wrong)} lost,"
        f" {mixed} further than {MIXED_UP + most:.2f} from offline scoring"
    )
    print(
        f"latency: median {latencies[len(latencies) // 2]:.2f} s, p95"
        f" {latencies[int(0.95 * len(latencies))]:.2f} s; {len(answers) / served_s:.2f} a second"
    )
    print(
        f"answers differ from offline scoring by at most {max(off):.2e}"
        f" ({sorted(off)[int(0.95 * len(off))]:.2e} at the 95th percentile); offline scoring from"
        f" itself by {most:.2e}"
    )
    cpu = sum(r.server_cpu_s for r in rounds) / sum(r.offline_cpu_s for r in rounds)
    print(
        f"throughput, served over offline: {offline_s / served_s:.2f} in all, rounds"
        f" {', '.join(f'{r.ratio:.2f}' for r in sorted(rounds, key=lambda r: r.ratio))}; CPU time a"
        f" conversation {cpu:.2f} times offline's",
        flush=True,
    )
    if wrong or mixed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
