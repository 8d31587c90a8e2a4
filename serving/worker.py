"""The scoring process, which `serving.pool` starts: `python -m serving.worker FD`.

Reads a line of JSON a job from the socket FD, its first line being how to begin, and writes a line
for each step of a job. Ends when the server does: the socket is then closed. Holds no token.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sarm.cli import sentence
from sarm.config import UserError, parse_config
from sarm.threads import bound_threads
from serving.protocol import Refused

Send = Callable[[dict[str, Any]], None]
READ_BYTES = 1 << 20


class Waiting(NamedTuple):
    """A job that has been read and not scored."""

    job: dict[str, Any]
    reads: list[Any]

    @property
    def tokens(self) -> int:
        return sum(read.tokens for read in self.reads)


def main(fd: int) -> int:
    """Serve jobs until the socket closes. 0, or 2 where the scorer cannot be opened."""
    # Ctrl-C and a job's end reach all processes: the server says when it is over.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    bound_threads(os.environ)
    channel = socket.socket(fileno=fd)
    lines = channel.makefile("rb")
    send = sender(channel)
    begin = json.loads(lines.readline())
    try:
        scorer = opened(begin)
    except Exception as error:
        told = sentence(error)
        send({"failed": told or described(error)})
        return 2
    send({"ready": about(scorer)})
    incoming: queue.SimpleQueue[list[dict[str, Any]]] = queue.SimpleQueue()
    threading.Thread(target=receive, args=(lines, incoming), daemon=True).start()
    for done in work(scorer, incoming, send):
        send(done)
    raise AssertionError("work never ends")


def opened(begin: dict[str, Any]) -> Any:
    from serving.scorer import open_scorer

    return open_scorer(parse_config(begin["config"], "of the server"), begin["run"])


def about(scorer: Any) -> dict[str, Any]:
    """What is served."""
    reward = scorer.reward
    return {
        "penalised": [p._asdict() for p in reward.penalised],
        "kind": reward.kind,
        "monitors": list(reward.monitors),
        "d_sae": reward.model.d_sae,
        "dtype": str(reward.model.dtype).removeprefix("torch."),
        "device": str(reward.model.device),
        "max_length": reward.max_length,
        "transcripts": scorer.without,
        "stop_ids": list(scorer.transcripts.stop_ids) if scorer.transcripts else [],
    }


def sender(channel: socket.socket) -> Send:
    def send(message: dict[str, Any]) -> None:
        try:
            channel.sendall(json.dumps(message, allow_nan=False).encode() + b"\n")
        except OSError:  # the server is gone, and its socket with it
            os._exit(0)

    return send


def receive(lines: Any, incoming: queue.SimpleQueue[list[dict[str, Any]]]) -> None:
    """What has arrived at once is passed on at once, so that no job is begun of which the next line
    says that nobody waits for it any more.
    """
    rest = b""
    while data := lines.read1(READ_BYTES):
        *whole, rest = (rest + data).split(b"\n")
        incoming.put([json.loads(line) for line in whole])
    os._exit(0)  # also in the middle of a pass: nobody is there to answer


def work(
    scorer: Any, incoming: queue.SimpleQueue[list[dict[str, Any]]], send: Send
) -> Iterator[dict[str, Any]]:
    """Messages about jobs. Each round takes the oldest jobs that fit into one batch of
    `tokens_per_batch`; a larger job is a round of its own, in several batches.
    """
    waiting: dict[int, Waiting] = {}
    while True:
        block = not waiting
        with contextlib.suppress(queue.Empty):
            while True:
                messages, block = incoming.get(block=block), False
                for message in messages:
                    if "cancel" in message:
                        waiting.pop(message["cancel"], None)
                        continue
                    try:
                        waiting[message["job"]] = Waiting(message, scorer.read(message))
                    except Exception as error:
                        yield {"job": message["job"], **refusal(error)}
        if waiting:
            batch = first_that_fit(waiting, scorer.reward.tokens_per_batch)
            send({"started": batch})
            yield from scored(scorer, {id_: waiting.pop(id_) for id_ in batch})


def scored(scorer: Any, batch: dict[int, Waiting]) -> Iterator[dict[str, Any]]:
    """Messages about jobs scored together. Where that fails, each is scored by itself, so that one
    that cannot be scored takes no other with it.
    """
    began = time.monotonic()
    try:
        answers = scorer.score([(one.job, one.reads) for one in batch.values()])
        for answer in answers:
            if not all(map(math.isfinite, answer["rewards"])):
                raise UserError("a reward is not finite; set sarm.dtype=float32")
    except Exception as error:
        if is_fatal(error):
            raise
        for id_, one in batch.items():
            if len(batch) == 1:
                yield {"job": id_, **refusal(error)}
            else:
                yield from scored(scorer, {id_: one})
        return
    yield {
        "batch": sum(len(one.reads) for one in batch.values()),
        "tokens": sum(one.tokens for one in batch.values()),
        "seconds": time.monotonic() - began,
    }
    yield from ({"job": id_, "answer": answer} for id_, answer in zip(batch, answers, strict=True))


def is_fatal(error: Exception) -> bool:
    """Whether it outlives its cause, as CUDA's errors do: a new process is the cure."""
    return "CUDA" in str(error) and type(error).__name__ != "OutOfMemoryError"


def first_that_fit(waiting: dict[int, Waiting], tokens_per_batch: int) -> list[int]:
    """The oldest job, and those after it while they fit beside it."""
    batch: list[int] = []
    room = tokens_per_batch
    for id_, one in waiting.items():
        if batch and one.tokens > room:
            break
        batch.append(id_)
        room -= one.tokens
    return batch


def refusal(error: Exception) -> dict[str, Any]:
    """A status and a sentence. What is no fault of the sender's is described in the log without a
    word of theirs.
    """
    if isinstance(error, Refused):
        return {"status": error.status, "sentence": error.sentence}
    if isinstance(error, UserError):
        return {"status": 500, "sentence": str(error)}
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for its name
        told = "out of GPU memory; serve with a lower sarm.tokens_per_batch"
        return {"status": 500, "sentence": told}
    print(f"defect: {described(error)}", file=sys.stderr, flush=True)
    return {
        "status": 500,
        "sentence": f"scoring failed ({type(error).__name__}); the server's log says where",
    }


def described(error: BaseException) -> str:
    """The kind of an error and where it arose, without its message, which may hold texts."""
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{f.filename}:{f.lineno} {f.name}" for f in reversed(frames[-6:]))
    return f"{type(error).__name__} at {places}"


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
