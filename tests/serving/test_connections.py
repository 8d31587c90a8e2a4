"""Connections that say nothing, on a real uvicorn with a small app."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serving import server
from serving.__main__ import bound


async def app(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await asyncio.sleep(1.0)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


async def talk(port: int, said: bytes) -> bytes:
    """What is heard up to the end of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(said)
    heard = await reader.read()
    writer.close()
    return heard


def heard_by(peers: list[bytes]) -> list[bytes]:
    """What peers hear that connect one after the other and each say this."""

    async def all_of_them() -> list[bytes]:
        listener = bound("127.0.0.1", 0)
        port = listener.getsockname()[1]
        stoppable = server.StoppableServer(server.settings(app, 1.0))
        serving = asyncio.create_task(stoppable.serve(sockets=[listener]))
        talks = []
        for said in peers:
            talks.append(asyncio.create_task(talk(port, said)))
            await asyncio.sleep(0.1)
        heard = await asyncio.gather(*talks)
        stoppable.should_exit = True
        await serving
        return list(heard)

    return asyncio.run(asyncio.wait_for(all_of_them(), 60))


WHOLE = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


def test_silent_connections_are_closed_and_working_ones_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "SILENT_S", 0.3)
    nothing, half_a_head, whole = heard_by([b"", WHOLE[:20], WHOLE])
    assert nothing == half_a_head == b""
    assert whole.startswith(b"HTTP/1.1 200") and b"done" in whole


def test_connections_beyond_the_most_are_closed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTIONS", 2)
    monkeypatch.setattr(server, "SILENT_S", 2.0)
    first, second, third = heard_by([WHOLE, b"", WHOLE])
    assert b"done" in first and second == third == b""


def test_there_are_no_more_connections_than_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.resource, "getrlimit", lambda which: (1024, 4096))
    assert server.most_connections() == 960
    monkeypatch.setattr(server.resource, "getrlimit", lambda which: (65536, 65536))
    assert server.most_connections() == 2048
