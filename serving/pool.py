"""The queue before the scoring process, and that process: started, watched, replaced.

    pool = Pool(begin, limits, seen); await pool.start()
    answer = await pool.submit(job, conversations=1, letters=800)      # or raises Refused

No torch here: whatever becomes of the scoring process, the server goes on and says so. What was
being scored when it died is refused with 503, what waited is scored by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sarm.config import ROOT
from serving.protocol import Refused

log = logging.getLogger("serving")

LETTERS_WAITING = 2**24
"""Text that may wait, over all requests."""
LINE_BYTES = 2**28
STARTS = 5
"""Scoring processes that may die in a row before one is ready; then the server gives up."""
DEATHS = 2
"""Scoring processes that may die while one request waits unscored; then it is suspected."""
Seen = Callable[[dict[str, Any]], None]


@dataclass
class Waiting:
    """A request handed to the scoring process, or about to be."""

    line: bytes
    conversations: int
    letters: int
    answer: asyncio.Future[dict[str, Any]]
    started: bool = False
    deaths: int = 0
    since: float = field(default_factory=time.monotonic)


class GaveUp(Exception):
    """No scoring process could be started; the message is for the user."""


class Pool:
    """`begin` is what the scoring process is told first; `seen` hears of its messages about
    batches, starts and deaths.
    """

    def __init__(
        self, begin: dict[str, Any], *, max_queue: int, timeout_s: float, seen: Seen | None = None
    ) -> None:
        self.begin, self.max_queue, self.timeout_s = begin, max_queue, timeout_s
        self.seen: Seen = seen or (lambda message: None)
        self.waiting: dict[int, Waiting] = {}
        self.ready: dict[str, Any] | None = None
        """What is served; None while no scoring process is up."""
        self.process: asyncio.subprocess.Process | None = None
        self.gave_up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._writer: asyncio.StreamWriter | None = None
        self._next = 0
        self._heard = time.monotonic()
        self._keeping: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self) -> dict[str, Any]:
        """Start scoring; what is served. Raises GaveUp."""
        self._keeping = asyncio.create_task(self._keep())
        while self.ready is None:
            if self.gave_up.done():
                raise GaveUp(self.gave_up.result())
            await asyncio.sleep(0.02)
        return self.ready

    async def stop(self) -> None:
        self._stopping = True
        if self._keeping:
            self._keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeping
        await self._end()

    @property
    def conversations(self) -> int:
        """Waiting or being scored."""
        return sum(w.conversations for w in self.waiting.values())

    @property
    def scoring(self) -> int:
        """Conversations that the scoring process has begun with."""
        return sum(w.conversations for w in self.waiting.values() if w.started)

    async def submit(
        self, job: dict[str, Any], *, conversations: int, letters: int
    ) -> dict[str, Any]:
        """The answer. Cancelled, the job is taken out of the queue. Raises Refused."""
        if self.gave_up.done():
            raise Refused(503, "scoring has stopped and could not be started again; see the log")
        text = sum(w.letters for w in self.waiting.values())
        full = self.waiting and (
            self.conversations + conversations > self.max_queue or text + letters > LETTERS_WAITING
        )
        if full:
            raise Refused(
                503,
                f"the queue is full ({self.conversations} conversations wait, serve.max_queue is"
                f" {self.max_queue}); send it again in a moment",
                retry_after_s=1,
            )
        id_ = self._next = self._next + 1
        line = json.dumps(job | {"job": id_}).encode() + b"\n"
        one = Waiting(line, conversations, letters, asyncio.get_running_loop().create_future())
        self.waiting[id_] = one
        self._write(line)
        try:
            return await asyncio.wait_for(asyncio.shield(one.answer), self.timeout_s)
        except TimeoutError:
            if self.ready is not None and time.monotonic() - self._heard > self.timeout_s / 2:
                log.error("the scoring process is silent; it is replaced")
                self._kill()
            raise Refused(
                504,
                f"not scored within {self.timeout_s:g} s (serve.timeout_s); send fewer"
                " conversations at a time",
            ) from None
        finally:
            if self.waiting.pop(id_, None) and not one.answer.done():
                one.answer.cancel()
                self._write(json.dumps({"cancel": id_}).encode() + b"\n")

    # The scoring process

    async def _keep(self) -> None:
        """Start it, and again whenever it dies."""
        deaths = 0
        while not self._stopping:
            if deaths:
                await asyncio.sleep(2.0 ** (deaths - 1) - 0.9)
            try:
                was_ready, failed = await self._listen(await self._begin())
            except OSError as error:  # such as no memory or file left for another process
                was_ready, failed = False, f"no process can be started: {error.strerror or error}"
            self.ready = None
            code = await self._end()
            deaths = 1 if was_ready else deaths + 1
            if failed or deaths >= STARTS:
                why = (
                    failed or f"it died {deaths} times before it was ready, last with {_end(code)}"
                )
                self._refuse_all(503, f"scoring could not be started: {why}")
                self.gave_up.set_result(why)
                return
            log.error("the scoring process ended with %s; starting another", _end(code))
            self.seen({"died": code})
            self._after_death()

    async def _begin(self) -> asyncio.StreamReader:
        ours, theirs = socket.socketpair()
        environment = {k: v for k, v in os.environ.items() if k != "SARM_REWARD_TOKEN"}
        fd = theirs.fileno()
        with theirs:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "serving.worker", str(fd)),
                cwd=ROOT,
                env=environment,
                pass_fds=[fd],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                start_new_session=True,
            )
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES)
        self._writer.write(json.dumps(self.begin).encode() + b"\n")
        return reader

    async def _listen(self, reader: asyncio.StreamReader) -> tuple[bool, str]:
        """Whether it was ready before it died, and in words why it could not begin."""
        was_ready = False
        while True:
            try:
                line = await reader.readline()
            except (OSError, ValueError):
                return was_ready, ""
            if not line.endswith(b"\n"):
                return was_ready, ""
            message = json.loads(line)
            self._heard = time.monotonic()
            if "failed" in message:
                return was_ready, message["failed"]
            if "ready" in message:
                was_ready, self.ready = True, message["ready"]
                for one in self.waiting.values():
                    self._write(one.line)
            elif "started" in message:
                for id_ in message["started"]:
                    if id_ in self.waiting:
                        self.waiting[id_].started = True
            elif "job" in message:
                self._answer(message)
            self.seen(message)

    def _answer(self, message: dict[str, Any]) -> None:
        one = self.waiting.pop(message["job"], None)
        if one is None or one.answer.done():
            return
        if "answer" in message:
            one.answer.set_result(message["answer"])
        else:
            one.answer.set_exception(Refused(message["status"], message["sentence"]))

    def _after_death(self) -> None:
        for id_, one in list(self.waiting.items()):
            one.deaths += 1
            if one.started or one.deaths >= DEATHS:
                self.waiting.pop(id_)
                _refuse(
                    one,
                    503,
                    "the scoring process died while this request was with it; another is being"
                    " started: send the request again",
                )

    def _refuse_all(self, status: int, sentence: str) -> None:
        for one in self.waiting.values():
            _refuse(one, status, sentence)
        self.waiting.clear()

    def _write(self, line: bytes) -> None:
        """Jobs only once it is ready: then all that wait are sent."""
        if self._writer is not None and self.ready is not None:
            self._writer.write(line)

    def _kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()

    async def _end(self) -> int:
        """Close its socket, at which it ends by itself, and wait a moment for that."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self.process is None:
            return 0
        try:
            await asyncio.wait_for(self.process.wait(), 2.0)
        except TimeoutError:
            self._kill()
            await self.process.wait()
        return self.process.returncode or 0


def _refuse(one: Waiting, status: int, sentence: str) -> None:
    if not one.answer.done():
        one.answer.set_exception(Refused(status, sentence, retry_after_s=2))


def _end(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"code {code}"
