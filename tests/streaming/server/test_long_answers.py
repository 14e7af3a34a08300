"""Long answers over HTTP: whole as long as the client reads, and few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from streaming.log.history import Document, History
from streaming.refusals import Refusal
from streaming.server import connection
from streaming.server.admission import MAX_ANSWERS_OF_ONE
from tests.streaming.server.admission_support import ask, counted, is_answer, settings
from tests.streaming.support import TIMEOUT_S, Running, eventually, running_server

BODY = b"0123456789abcdef" * (13 * 1024 * 1024 // 16)
SHORT = settings(limits="handshake_timeout_s = 0.3")


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page of history has 13 MB."""

    async def answer(history: History, path: str, query: str) -> Document:
        return Document("text/plain", BODY)

    monkeypatch.setattr(History, "answer", answer)


@asynccontextmanager
async def asked(running: Running) -> AsyncIterator[asyncio.StreamReader]:
    """A request for history, of which nothing is read yet."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port, limit=64 * 1024)
    writer.write(b"GET /v1/streams HTTP/1.1\r\nHost: localhost\r\n\r\n")
    try:
        yield reader
    finally:
        writer.close()


async def test_an_answer_is_whole_however_long_it_takes() -> None:
    """Longer than a request may take: reading is progress."""
    async with running_server(SHORT) as running, asked(running) as reader, asyncio.timeout(TIMEOUT_S):
        begun = asyncio.get_running_loop().time()
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert f"Content-Length: {len(BODY)}\r\n".encode() in head
        found = bytearray()
        while piece := await reader.read(512 * 1024):
            found += piece
            await asyncio.sleep(0.03)
        assert found == BODY
        assert asyncio.get_running_loop().time() - begun > 0.6
        assert await counted(running, Refusal.STALLED) == 0


async def test_an_answer_that_is_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while without progress; its place is free again."""
    monkeypatch.setattr(connection, "STALLED_S", 0.2)
    async with running_server(SHORT) as running:
        for n in range(1, 2 * MAX_ANSWERS_OF_ONE):
            async with asked(running), asyncio.timeout(TIMEOUT_S):
                while await counted(running, Refusal.STALLED) < n:  # noqa: ASYNC110  no event tells of it
                    await asyncio.sleep(0.02)
        assert len((await ask(running, "/v1/streams"))[1]) == len(BODY)


async def test_one_client_has_few_answers_at_a_time() -> None:
    """Others of its own are refused, with when to come again; a page that costs nothing is not."""
    async with running_server(SHORT) as running, AsyncExitStack() as stack:
        for _ in range(MAX_ANSWERS_OF_ONE):
            reader = await stack.enter_async_context(asked(running))
            await reader.readline()  # it is under way
        assert is_answer(await ask(running, "/v1/streams"), Refusal.TOO_MANY_ANSWERS)
        assert (await ask(running, "/healthz"))[0] == 200
        await stack.aclose()
        guard = running.server._guard
        await eventually(lambda: guard.answers._places.has_room(None, 1))
        assert (await ask(running, "/v1/streams"))[0] == 200
