"""The HTTP side: routes, the token, bounds on what is read, and a log without a word of anyone's.

`make_app(config, pool, token, metrics)` is a FastAPI app; `python -m serving` runs it. Every
failure is `{"error": "a sentence"}` under its status code.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from sarm.config import Config
from serving.metrics import Metrics
from serving.pool import Pool
from serving.protocol import Refused, items_request, letters, openrlhf_request, size

log = logging.getLogger("serving")

MIB = 2**20
BODIES_BYTES = 256 * MIB
"""Of all bodies that are being read."""
BODY_S = 30.0
"""A body must have come by then."""
DRAIN_BYTES, DRAIN_S = 512 * MIB, 10.0
"""What is read and dropped of a body that was refused, so that its sender hears why."""
HUNG_UP = 499
REFUSALS_A_MINUTE = 30
OPEN = ("/health", "/ready")
"""What needs no token: it says nothing but whether the server is up."""
Parse = Callable[..., dict[str, Any]]
NAMES = {
    404: "there is no such path; POST /score or /get_reward",
    405: "that method is not for this path",
}


def make_app(config: Config, pool: Pool, token: str | None, metrics: Metrics) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    server = _Server(config, pool)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "up"}

    @app.get("/ready")
    async def ready() -> Response:
        if pool.ready is None:
            return refused(Refused(503, "no scoring process is up yet; ask again", retry_after_s=2))
        return JSONResponse({"status": "ready"})

    @app.get("/serves")
    async def serves() -> Response:
        if pool.ready is None:
            return refused(Refused(503, "no scoring process is up yet; ask again", retry_after_s=2))
        return JSONResponse(pool.ready)

    @app.get("/metrics")
    async def scrape() -> Response:
        metrics.queue.set(pool.conversations)
        metrics.begun.set(pool.scoring)
        metrics.ready.set(pool.ready is not None)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/score")
    async def score(request: Request) -> Response:
        return await server.answer(request, items_request)

    @app.post("/get_reward")
    async def get_reward(request: Request) -> Response:
        return await server.answer(request, openrlhf_request)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return refused(Refused(error.status_code, NAMES.get(error.status_code, "not understood")))

    app.add_middleware(Guard, token=token, metrics=metrics, routes=_routes(app))
    return app


def _routes(app: FastAPI) -> frozenset[str]:
    return frozenset(str(getattr(route, "path", "")) for route in app.routes)


def refused(error: Refused) -> JSONResponse:
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error.sentence}, error.status, headers)


class _Server:
    """Reads a body within bounds, asks the pool, and gives up when the sender does."""

    def __init__(self, config: Config, pool: Pool) -> None:
        self.serve, self.max_length, self.pool = config.serve, config.sarm.max_length, pool
        self.reading = 0

    async def answer(self, request: Request, parse: Parse) -> Response:
        try:
            body = await self._body(request)
            job = parse(body, most=self.serve.max_request, max_length=self.max_length)
            return JSONResponse(await self._ask(request, job))
        except Refused as error:
            return refused(error)
        except ClientDisconnect:
            return Response(status_code=HUNG_UP)
        except asyncio.CancelledError:  # the time to end in has run out
            return refused(Refused(503, "the server is stopping; ask the next one"))

    async def _body(self, request: Request) -> bytes:
        """The body. Raises Refused where it is too large or too slow, and drops the rest."""
        most = self.serve.max_body_mib * MIB
        said = request.headers.get("content-length", "")
        too_large = Refused(
            413,
            f"the body is larger than {self.serve.max_body_mib} MiB (serve.max_body_mib); send"
            " fewer conversations at a time",
        )
        if said.isdecimal() and int(said) > most:
            await _drain(request)
            raise too_large
        chunks: list[bytes] = []
        length = 0
        try:
            async with asyncio.timeout(BODY_S):
                async for chunk in request.stream():
                    length += len(chunk)
                    self.reading += len(chunk)
                    if length > most:
                        await _drain(request)
                        raise too_large
                    if self.reading > BODIES_BYTES:
                        await _drain(request)
                        raise Refused(503, "too much is being sent at once; send it again", 1)
                    chunks.append(chunk)
        except TimeoutError:
            raise Refused(408, f"the body did not come within {BODY_S:g} s") from None
        finally:
            self.reading -= length
        return b"".join(chunks)

    async def _ask(self, request: Request, job: dict[str, Any]) -> dict[str, Any]:
        """The pool's answer, or ClientDisconnect as soon as the sender has gone."""
        asked = asyncio.ensure_future(
            self.pool.submit(job, conversations=size(job), letters=letters(job))
        )
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((asked, gone), return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                raise ClientDisconnect
            return await asked
        finally:
            for task in (asked, gone):
                if not task.done():
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError, Refused):
                        await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _drain(request: Request) -> None:
    """Read and drop what is still being sent, within bounds."""
    left = DRAIN_BYTES
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(DRAIN_S):
            while left > 0:
                message = await request.receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return


class Guard:
    """Around the app: the token, counts, the log, and a 500 for what nobody foresaw."""

    def __init__(
        self, app: Any, token: str | None, metrics: Metrics, routes: frozenset[str]
    ) -> None:
        self.app, self.metrics, self.routes = app, metrics, routes
        self.token = None if token is None else token.encode()
        self.minute, self.refusals = 0, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # what a client made up as a path is not repeated anywhere
        route = scope["path"] if scope["path"] in self.routes else "other"
        began, status, received = time.monotonic(), HUNG_UP, 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self._may(scope):
                await self.app(scope, counted, noted)
            else:
                await self._refuse(scope, counted, noted)
        except Exception as error:
            await self._defect(error, status == HUNG_UP, scope, counted, noted)
        finally:
            self._note(scope["method"], route, status, received, time.monotonic() - began)

    def _may(self, scope: Scope) -> bool:
        if self.token is None or scope["path"] in OPEN:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, token = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self.token)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _drain(Request(scope, receive))
        told = "give the server's token as the header Authorization: Bearer TOKEN"
        await refused(Refused(401, told))(scope, receive, send)

    async def _defect(
        self, error: Exception, unanswered: bool, scope: Scope, receive: Receive, send: Send
    ) -> None:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        where = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else "?"
        log.error("defect: %s at %s", type(error).__name__, where)
        if unanswered:
            told = f"the server failed ({type(error).__name__}); its log says where"
            with contextlib.suppress(Exception):
                await refused(Refused(500, told))(scope, receive, send)

    def _note(self, method: str, route: str, status: int, received: int, seconds: float) -> None:
        """Every answer is counted; refusals are logged, and of a flood of them only the first."""
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        if status < 400:
            return
        minute = int(time.monotonic() // 60)
        if minute != self.minute:
            if self.refusals > REFUSALS_A_MINUTE:
                log.warning("and %d more", self.refusals - REFUSALS_A_MINUTE)
            self.minute, self.refusals = minute, 0
        self.refusals += 1
        if self.refusals <= REFUSALS_A_MINUTE:
            method = method if method in ("GET", "POST", "HEAD", "PUT", "DELETE") else "other"
            log.warning("%s %s %d, %d bytes, %.3f s", method, route, status, received, seconds)
