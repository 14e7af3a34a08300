"""A small real server that speaks the protocol, for clients to be tried against."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeAlias

from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from streaming.protocol import (
    Ack,
    Envelope,
    Flushed,
    Message,
    SessionClosed,
    SessionCreated,
    TranscriptDelta,
    TranscriptFinal,
    TranscriptInterim,
    Word,
    encode,
)

Handler: TypeAlias = Callable[["FakeServer", ServerConnection], Awaitable[None]]

CREATED = SessionCreated("fake", ("transcript",), ("en",), epoch_ms=0)
CLOSED = SessionClosed("closed", duration_ms=1000, n_words=2, n_segments=1)


@dataclass
class FakeServer:
    """What the clients did, and how to answer them."""

    url: str = ""
    paths: list[str] = field(default_factory=list)  # of every connection
    requests: list[dict[str, Any]] = field(default_factory=list)  # every text frame
    n_audio_bytes: int = 0
    chunk_times_s: list[float] = field(default_factory=list)
    refusal: tuple[HTTPStatus, str] | None = None

    async def send(self, connection: ServerConnection, seq: int, message: Message) -> None:
        """Send one message of the stream "test"."""
        await connection.send(encode(Envelope("test", seq, message)))

    async def hear(self, connection: ServerConnection) -> str:
        """Take audio and messages until a `close` comes; answers a flush. The flush's id."""
        flushed = ""
        async for frame in connection:
            if isinstance(frame, bytes):
                self.n_audio_bytes += len(frame)
                self.chunk_times_s.append(asyncio.get_running_loop().time())
                await self.send(connection, 1, Ack(self.n_audio_bytes // 2, self.n_audio_bytes // 32))
                continue
            request = json.loads(frame)
            self.requests.append(request)
            if request["type"] == "flush":
                flushed = request["id"]
            if request["type"] == "close":
                return flushed
        return flushed

    async def transcribe(self, connection: ServerConnection) -> None:
        """A whole stream as the real server would answer it."""
        await self.send(connection, 1, CREATED)
        await self.send(connection, 1, Ack(320, 20))
        flush_id = await self.hear(connection)
        words = (Word("Hello", 100, 400, 0.9), Word("world.", 400, 900, 0.8))
        await self.send(connection, 1, TranscriptInterim("Hello word", 100, 900))
        await self.send(connection, 2, TranscriptDelta("Hello world.", words, 100, 900))
        await self.send(connection, 3, TranscriptFinal("Hello world.", words, "en", None, 100, 900))
        await self.send(connection, 4, Flushed(flush_id, 1000))
        await self.send(connection, 5, CLOSED)


@asynccontextmanager
async def running(handler: Handler) -> AsyncIterator[FakeServer]:
    """A running server whose connections `handler` answers."""
    fake = FakeServer()

    async def on_connection(connection: ServerConnection) -> None:
        await handler(fake, connection)

    def on_request(connection: ServerConnection, request: Request) -> Response | None:
        fake.paths.append(request.path)
        return connection.respond(*fake.refusal) if fake.refusal else None

    async with serve(on_connection, "127.0.0.1", 0, process_request=on_request) as server:
        fake.url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield fake
