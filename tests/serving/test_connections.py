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


def test_silent_connections_are_closed_and_working_ones_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "SILENT_S", 0.2)

    async def talk(port: int, said: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(said)
        heard = await reader.read()  # up to the end of the connection
        writer.close()
        return heard

    async def all_of_them() -> list[bytes]:
        listener = bound("127.0.0.1", 0)
        port = listener.getsockname()[1]
        uvicorn_server = server.StoppableServer(server.settings(app, 1.0))
        serving = asyncio.create_task(uvicorn_server.serve(sockets=[listener]))
        heard = await asyncio.gather(
            talk(port, b""),
            talk(port, b"GET / HTTP/1.1\r\nHost: a\r\n"),
            talk(port, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
        )
        uvicorn_server.should_exit = True
        await serving
        return list(heard)

    nothing, half_a_head, whole = asyncio.run(asyncio.wait_for(all_of_them(), 60))
    assert nothing == half_a_head == b""
    assert whole.startswith(b"HTTP/1.1 200") and b"done" in whole
