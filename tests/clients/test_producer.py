"""The producer, against a real WebSocket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from http import HTTPStatus

import pytest
from msgspec.structs import replace
from websockets.asyncio.server import ServerConnection

from clients.backlog import Backlog
from clients.connection import Backoff, ConnectFailed
from clients.producer import Progress, StreamFailed, stream_audio, stream_url
from clients.sources import Chunk, SourceError, bytes_of_ms
from streaming.protocol import (
    MAX_GAP_MS,
    Ack,
    Envelope,
    Error,
    Gap,
    SessionClosed,
    SessionResumed,
    SpeechStarted,
    TranscriptDelta,
)
from tests.clients.fake_server import CLOSED, CREATED, FakeServer, running


async def silence(n_chunks: int, chunk_ms: int = 20) -> AsyncIterator[bytes]:
    """Digital zeros."""
    for _ in range(n_chunks):
        yield bytes(bytes_of_ms(chunk_ms))


async def test_audio_is_sent_flushed_and_closed() -> None:
    """Everything arrives in order, and every message is handed on."""
    messages: list[Envelope] = []
    progress = Progress()
    async with running(FakeServer.transcribe) as fake:
        url = stream_url(fake.url, "test", "en")
        closed = await stream_audio(url, silence(10), messages.append, paced=False, progress=progress)
    assert closed == CLOSED
    assert fake.n_audio_bytes == bytes_of_ms(200)
    assert [request["type"] for request in fake.requests] == ["flush", "close"]
    assert fake.paths == ["/v1/stream/test?format=s16le&rate=16000&channels=1&language=en"]
    assert [m.message.text for m in messages if isinstance(m.message, TranscriptDelta)] == ["Hello world."]
    assert progress.sent_s == pytest.approx(0.2)
    assert progress.flush_sent_at is not None
    assert progress.flushed_at is not None
    assert progress.flush_sent_at <= progress.flushed_at


async def test_paced_audio_leaves_in_real_time() -> None:
    """200 ms of audio take no less than 180 ms until the last chunk comes."""
    async with running(FakeServer.transcribe) as fake:
        begun_s = time.monotonic()
        await stream_audio(stream_url(fake.url, "test"), silence(10), lambda _: None, paced=True)
    assert fake.chunk_times_s[-1] - begun_s >= 0.17


async def test_stop_ends_the_audio_but_not_the_stream() -> None:
    """What was heard is still flushed and closed."""
    stop = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        async for chunk in silence(1_000_000):
            if fake.n_audio_bytes:
                stop.set()
            yield chunk

    async with running(FakeServer.transcribe) as fake:
        url = stream_url(fake.url, "test")
        closed = await stream_audio(url, endless(), lambda _: None, paced=False, stop=stop)
    assert closed.reason == "closed"


async def test_a_source_that_fails_ends_the_stream_in_good_order() -> None:
    """What was sent is flushed and closed, not left to wait for a producer; then the failure is raised."""

    async def dying() -> AsyncIterator[bytes]:
        async for chunk in silence(50):
            yield chunk
        raise SourceError("camera: cannot be read: connection reset")

    seen: list[Envelope] = []
    async with running(FakeServer.transcribe) as fake:
        with pytest.raises(SourceError, match="connection reset"):
            await stream_audio(stream_url(fake.url, "test"), dying(), seen.append, paced=False)
        assert fake.n_audio_bytes == 32_000
    assert isinstance(seen[-1].message, SessionClosed)


async def test_a_refusal_carries_the_servers_text() -> None:
    """The body of the HTTP answer is what the user reads."""
    async with running(FakeServer.transcribe) as fake:
        fake.refusal = (HTTPStatus.CONFLICT, "stream test is live\n")
        with pytest.raises(ConnectFailed, match="409: stream test is live"):
            await stream_audio(stream_url(fake.url, "test"), silence(1), lambda _: None, paced=False)


async def test_a_fatal_error_ends_the_stream_with_its_text() -> None:
    """The error message, not the close code, is reported."""

    async def handler(fake: FakeServer, connection: ServerConnection) -> None:
        await fake.send(connection, 1, CREATED)
        await fake.send(connection, 1, Error("bad_audio", "3 bytes are no s16le", fatal=True))
        await connection.close(4401)

    async with running(handler) as fake:
        with pytest.raises(StreamFailed, match="3 bytes are no s16le"):
            await stream_audio(stream_url(fake.url, "test"), silence(500), lambda _: None, paced=True)


async def test_an_end_the_client_did_not_ask_for_is_a_failure() -> None:
    """A server that lost its engine, or a connection that breaks, is not a finished stream."""

    async def ending(fake: FakeServer, connection: ServerConnection) -> None:
        await fake.send(connection, 1, SessionClosed("engine_lost", 0, 0, 0))

    async def breaking(fake: FakeServer, connection: ServerConnection) -> None:
        connection.transport.abort()

    async with running(ending) as fake:
        with pytest.raises(StreamFailed, match="engine_lost"):
            await stream_audio(stream_url(fake.url, "test"), silence(500), lambda _: None, paced=True)
    async with running(breaking) as fake:
        with pytest.raises(StreamFailed, match="the connection was lost"):
            await stream_audio(stream_url(fake.url, "test"), silence(500), lambda _: None, paced=True)


async def test_no_server_says_how_to_start_one() -> None:
    """Connection refused is the most common first experience."""
    async with running(FakeServer.transcribe) as fake:
        url = stream_url(fake.url, "test")
    with pytest.raises(ConnectFailed, match="moss-live serve"):
        await stream_audio(url, silence(1), lambda _: None, paced=False)


CREATED_WITH_TOKEN = replace(CREATED, resume_token="secret")
QUICK = Backoff(first_s=0.01, longest_s=0.02, max_attempts=3)


async def test_a_lost_connection_is_gone_on_with_from_where_the_server_is() -> None:
    """What the server does not have is sent again, the rest is not; nobody else sees the token."""
    heard: list[bytes] = []

    async def handler(fake: FakeServer, connection: ServerConnection) -> None:
        if len(fake.paths) == 1:
            await fake.send(connection, 1, CREATED_WITH_TOKEN)
            while sum(map(len, heard)) < 5 * bytes_of_ms(20):
                heard.append(bytes(await connection.recv(decode=False)))
            await fake.send(connection, 1, Ack(3 * 320, 60))
            await fake.send(connection, 2, SpeechStarted(0))
            await asyncio.sleep(0)
            connection.transport.abort()
        else:
            await fake.send(connection, 2, SessionResumed(4 * 320, 80))
            await fake.hear(connection)
            await fake.send(connection, 3, CLOSED)

    async with running(handler) as fake:
        messages: list[Envelope] = []
        url = stream_url(fake.url, "test")
        closed = await stream_audio(url, counted(100), messages.append, paced=False, backoff=QUICK)
    assert closed == CLOSED
    assert fake.paths[1].endswith("&resume=secret&after=2")
    assert fake.n_audio_bytes == bytes_of_ms(20) * 96
    assert b"".join(heard).startswith(bytes(640) + b"\1")
    assert messages[0].message == CREATED


async def counted(n_chunks: int) -> AsyncIterator[bytes]:
    """Chunks that differ."""
    for i in range(n_chunks):
        yield bytes([i]) * bytes_of_ms(20)


async def test_a_server_that_gave_the_stream_up_is_not_asked_again() -> None:
    """The refusal's text is what the user reads."""

    async def handler(fake: FakeServer, connection: ServerConnection) -> None:
        await fake.send(connection, 1, CREATED_WITH_TOKEN)
        fake.refusal = (HTTPStatus.GONE, "the stream is over\n")
        connection.transport.abort()

    async with running(handler) as fake:
        with pytest.raises(StreamFailed, match=r"cannot be resumed: .*410: the stream is over"):
            await stream_audio(
                stream_url(fake.url, "test"), silence(500), lambda _: None, paced=True, backoff=QUICK
            )
    assert len(fake.paths) == 2


async def test_a_server_that_stays_away_is_given_up() -> None:
    """After the attempts there are."""

    async def handler(fake: FakeServer, connection: ServerConnection) -> None:
        if len(fake.paths) == 1:
            await fake.send(connection, 1, CREATED_WITH_TOKEN)
            fake.refusal = (HTTPStatus.SERVICE_UNAVAILABLE, "the engine is not ready\n")
        connection.transport.abort()

    async with running(handler) as fake:
        with pytest.raises(StreamFailed, match="503: the engine is not ready"):
            await stream_audio(
                stream_url(fake.url, "test"), silence(500), lambda _: None, paced=True, backoff=QUICK
            )
    assert len(fake.paths) == 3


async def test_a_server_that_dies_in_a_handshake_is_asked_again() -> None:
    """It answers nothing and is gone: that is no other kind of server."""

    async def vanish(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with await asyncio.start_server(vanish, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ConnectFailed) as failed:
            await stream_audio(
                stream_url(f"ws://127.0.0.1:{port}", "test"), silence(1), lambda _: None, paced=False
            )
    assert not failed.value.is_lasting


async def test_a_gap_is_told_once_wherever_the_connection_is_lost() -> None:
    """Before, within or behind it: what the server names decides what is sent again."""
    has_lost, received = False, 0

    async def chunks() -> AsyncIterator[Chunk]:
        for item in (bytes(640), Gap(7000), Gap(1000), bytes(640), Gap(MAX_GAP_MS), bytes(640)):
            yield item

    async def handler(fake: FakeServer, connection: ServerConnection) -> None:
        nonlocal has_lost
        if not has_lost:
            has_lost = True
            await fake.send(connection, 1, CREATED_WITH_TOKEN)
            for _ in range(2):
                await connection.recv()
            connection.transport.abort()
        else:
            await fake.send(connection, 2, SessionResumed(received, received // 16))
            await fake.hear(connection)
            await fake.send(connection, 3, CLOSED)

    for n_received, expected_ms in ((320, [8000, MAX_GAP_MS]), (320 + 16 * 8000, [MAX_GAP_MS])):
        has_lost, received = False, n_received
        async with running(handler) as fake:
            url = stream_url(fake.url, "test")
            await stream_audio(url, chunks(), lambda _: None, paced=False, backoff=QUICK)
        told_ms = [request["duration_ms"] for request in fake.requests if request["type"] == "gap"]
        assert told_ms == expected_ms
        assert fake.n_audio_bytes == 2 * 640


async def test_a_paced_gap_takes_its_time() -> None:
    """It is told when it has passed, so that the server's clock is that of the source."""

    async def chunks() -> AsyncIterator[Chunk]:
        for item in (bytes(640), Gap(300), bytes(640)):
            yield item

    async with running(FakeServer.transcribe) as fake:
        await stream_audio(stream_url(fake.url, "test"), chunks(), lambda _: None, paced=True)
    assert fake.requests[0] == {"type": "gap", "duration_ms": 300}
    assert fake.chunk_times_s[-1] - fake.chunk_times_s[0] >= 0.3


async def test_a_backlog_keeps_gaps_in_their_places() -> None:
    """They take positions and no room; those without audio between them are one."""
    backlog = Backlog(10)
    for item in (Gap(1), b"12", Gap(2), Gap(3), b"34"):
        await backlog.put(item)
    assert await backlog.read(0, 100) == Gap(1)
    assert await backlog.read(32, 100) == b"12"
    assert await backlog.read(34, 100) == Gap(5)
    assert await backlog.read(34 + 2 * 32, 100) == Gap(3)
    assert await backlog.read(34 + 5 * 32, 100) == b"34"
    backlog.forget(33)
    assert await backlog.read(33, 100) == b"2"
    backlog.forget(34 + 2 * 32)
    assert await backlog.read(backlog.start, 100) == Gap(3)
    backlog.forget(34 + 5 * 32 + 1)
    assert await backlog.read(backlog.start, 100) == b"4"


async def test_a_backlog_is_bounded_and_forgets_what_is_safe() -> None:
    """`put` waits for room, `read` for bytes; the end ends both."""
    backlog = Backlog(10)
    await backlog.put(b"12345")
    await backlog.put(b"67890")
    putting = asyncio.ensure_future(backlog.put(b"abc"))
    await asyncio.sleep(0)  # it looks once
    assert not putting.done()
    assert await backlog.read(3, 4) == b"4567"
    backlog.forget(4)
    await putting
    assert await backlog.read(9, 100) == b"0abc"
    reading = asyncio.ensure_future(backlog.read(13, 1))
    await asyncio.sleep(0)  # it looks once
    assert not reading.done()
    backlog.finish()
    assert await reading == b""
    await backlog.put(b"dropped")
    assert await backlog.read(4, 100) == b"567890abc"
