"""uvicorn as a service of many days needs it: it stops when asked, hangs up on peers that say
nothing, and logs no message that might hold a client's words.

`StoppableServer(settings(app, grace_s)).serve(sockets=[...])`
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 2048
"""At most; fewer where the process may not have so many files open."""
OWN_FILES = 64
KEEP_ALIVE_S = 75
SILENT_S = 60.0
"""A connection without a request under way is looked at this often; one that has begun none since
the last look is closed.
"""


def settings(app: Any, grace_s: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=PatientButNotForEver,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        limit_concurrency=most_connections(),
        timeout_graceful_shutdown=max(1, round(grace_s)),
    )


def most_connections() -> int:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(min(CONNECTIONS, files - OWN_FILES), 1)


class PatientButNotForEver(H11Protocol):
    """Closes connections on which a request's head does not come, and those beyond the most that
    there may be: uvicorn waits for ever and takes all, until no file is left to open.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look_later(None)
        if len(self.connections) > (self.config.limit_concurrency or CONNECTIONS):
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._look.cancel()
        super().connection_lost(exc)

    def _look_later(self, last: Any) -> None:
        self._look = self.loop.call_later(SILENT_S, self._look_at, last)

    def _look_at(self, last: Any) -> None:
        under_way = self.cycle is not None and not self.cycle.response_complete
        if under_way or self.cycle is not last:
            self._look_later(self.cycle)
        else:
            self.transport.close()


class StoppableServer(uvicorn.Server):
    """Stops when asked and returns: uvicorn's own raises the signal again, before the scoring
    process and the address file are seen to.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        self.should_exit = True


class Terse(logging.Formatter):
    """Kinds and places of errors, never their messages: those may hold what a client sent."""

    def formatException(self, ei: Any) -> str:
        return ei[0].__name__ if ei and ei[0] else ""

    def formatStack(self, stack_info: str) -> str:
        return ""


def quiet_logs() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(Terse("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("serving").setLevel(logging.INFO)
    # its warnings are about single connections, as many as a stranger likes
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
