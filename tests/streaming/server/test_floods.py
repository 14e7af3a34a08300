"""Connections that send too much, too fast, or never a whole request."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from streaming.protocol import (
    MAX_TEXT_CHARS,
    CloseCode,
    Error,
    Flush,
    Flushed,
    HttpStatus,
    SessionClosed,
    encode_client,
)
from streaming.refusals import Refusal
from streaming.stream import session
from tests.streaming.server.admission_support import (
    ask,
    counted,
    half_open,
    opened,
    settings,
)
from tests.streaming.support import (
    TIMEOUT_S,
    receive_until,
    running_server,
    s16,
    utterances,
)

MASKED = b"\x00\x00\x00\x00"  # a mask that changes nothing


async def test_audio_that_comes_too_fast_waits_and_far_too_fast_ends_the_stream() -> None:
    """Two seconds at once are heard in time; one frame of five is refused with 4429."""
    limits = "audio_speed = 20.0\naudio_burst_s = 1.0\naudio_ahead_s = 4.0"
    second = bytes(2 * 16_000)
    async with running_server(settings(limits=limits)) as running:
        async with running.stream("a") as connection:
            for _ in range(8):
                await connection.send(second)
            await connection.send(encode_client(Flush("all")))
            assert (await receive_until(connection, Flushed))[-1].message == Flushed("all", 8000)
        async with running.stream("b") as connection:
            await connection.send(5 * second)
            found = await receive_until(connection, SessionClosed)
            assert [e.message.code for e in found if isinstance(e.message, Error)] == ["too_fast"]
            async with asyncio.timeout(TIMEOUT_S):
                await connection.wait_closed()
            assert connection.close_code == CloseCode.TOO_FAST
        assert await counted(running, Refusal.TOO_FAST) == 1


async def test_a_frame_of_100_mb_is_refused_by_its_first_bytes() -> None:
    """The header says how long it is; nobody waits for the rest."""
    async with running_server() as running:
        for path in ("/v1/stream/a", "/v1/subscribe"):
            async with opened(running, path) as connection:
                header = bytes([0x82, 0xFF]) + (100 * 1024 * 1024).to_bytes(8, "big") + MASKED
                connection.transport.write(header + bytes(1000))
                async with asyncio.timeout(TIMEOUT_S):
                    await connection.wait_closed()
                assert connection.close_code == CloseCode.TOO_BIG
        assert await counted(running, Refusal.TOO_BIG) == 2


async def test_a_code_that_the_client_closed_with_is_no_refusal() -> None:
    """The server echoes it, and counts nothing."""
    async with running_server() as running:
        async with running.subscribe() as connection:
            await connection.close(CloseCode.TOO_SLOW, "mine")
        assert await counted(running, Refusal.TOO_SLOW) == 0


async def test_text_is_short_and_a_subscriber_sends_nothing_else() -> None:
    """A producer's long text is one bad message; a subscriber's does not even come in."""
    text = '{"type": "flush", "id": "' + "a" * MAX_TEXT_CHARS + '"}'
    async with running_server() as running:
        async with running.stream("a") as connection:
            await connection.send(text)
            error = (await receive_until(connection, Error))[-1].message
            assert isinstance(error, Error)
            assert (error.code, error.fatal) == ("bad_message", False)
            assert f"at most {MAX_TEXT_CHARS}" in error.message
        async with running.subscribe() as connection:
            await connection.send(text)
            async with asyncio.timeout(TIMEOUT_S):
                await connection.wait_closed()
            assert connection.close_code == CloseCode.TOO_BIG


async def test_a_header_that_never_ends_is_cut_off() -> None:
    """A byte now and then does not keep the connection: the whole request has one deadline."""
    async with running_server(settings(limits="handshake_timeout_s = 0.2")) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        closed = asyncio.create_task(reader.read(), name="until closed")
        writer.write(b"GET /v1/subscribe HTTP/1.1\r\nX-Slow: ")
        async with asyncio.timeout(TIMEOUT_S):
            while not closed.done():
                with suppress(ConnectionError):
                    writer.write(b"a")
                    await writer.drain()
                await asyncio.wait([closed], timeout=0.01)  # the attacker's pace
            with suppress(ConnectionError):
                assert await closed == b""
        writer.close()
        assert await counted(running, Refusal.NO_HANDSHAKE) == 1


@pytest.mark.parametrize("status", [HttpStatus.URI_TOO_LONG, HttpStatus.HEADERS_TOO_LARGE])
async def test_a_header_that_is_too_long_is_refused(status: HttpStatus) -> None:
    """A line has at most 8 KiB, a request at most 128 of them."""
    head = f"GET /{'a' * 10_000} HTTP/1.1\r\n" if status == HttpStatus.URI_TOO_LONG else "GET / HTTP/1.1\r\n"
    async with running_server() as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write((head + "X-Many: a\r\n" * 200 + "\r\n").encode())
        async with asyncio.timeout(TIMEOUT_S):
            assert int((await reader.readline()).split()[1]) == status
        writer.close()


async def test_a_thousand_half_open_connections_keep_nobody_out(many_files: None) -> None:
    """The oldest make room; whoever sends a whole request is let in beside them."""
    async with running_server(settings(limits="max_half_open = 50")) as running:
        async with half_open(running.port, 1000) as readers:
            async with running.stream("a") as connection:
                await connection.send(s16(utterances(1.0)))
                await connection.send(encode_client(Flush("all")))
                await receive_until(connection, Flushed)
            assert await counted(running, Refusal.HALF_OPEN) >= 950
            async with asyncio.timeout(TIMEOUT_S):
                with suppress(ConnectionError):
                    await readers[0].read()  # ends: it was dropped
        assert (await ask(running, "/healthz"))[0] == 200


async def test_half_open_connections_are_gone_after_the_timeout(many_files: None) -> None:
    """Those that the limit leaves, too."""
    async with (
        running_server(settings(limits="handshake_timeout_s = 0.3\nmax_half_open = 1000")) as running,
        half_open(running.port, 300) as readers,
    ):
        async with asyncio.timeout(TIMEOUT_S):
            for reader in readers:
                with suppress(ConnectionError):
                    await reader.read()
        assert await counted(running, Refusal.NO_HANDSHAKE) == 300


async def test_a_stopping_server_does_not_wait_for_half_open_connections() -> None:
    """They are dropped at once, long before their timeout."""
    async with (
        running_server(settings(limits="handshake_timeout_s = 300.0")) as running,
        half_open(running.port, 10) as readers,
    ):
        assert (await ask(running, "/healthz"))[0] == 200  # the others were accepted before it
        running.stop.set()
        async with asyncio.timeout(TIMEOUT_S):
            for reader in readers:
                with suppress(ConnectionError):
                    await reader.read()


PING = b"\x89\xfd" + MASKED + bytes(125)


@pytest.mark.parametrize("path", ["/v1/stream/a", "/v1/subscribe", "/v1/realtime?intent=transcription"])
async def test_pings_whose_pongs_are_not_read_end_the_connection(path: str) -> None:
    """The pongs wait in the server: a client that reads none of them would fill its memory."""
    async with running_server() as running, opened(running, path) as connection:
        connection.transport.pause_reading()
        async with asyncio.timeout(TIMEOUT_S):
            while not connection.transport.is_closing():
                connection.transport.write(PING * 4000)
                await asyncio.sleep(0.01)  # the server reads them meanwhile
        connection.transport.abort()
        assert await counted(running, Refusal.UNREAD) == 1


@pytest.mark.parametrize("first", [b"\x01\x80", b"\x02\x80"])
async def test_a_message_of_empty_fragments_is_too_big(first: bytes) -> None:
    """They count as no bytes, and are kept until the last one."""
    async with running_server() as running, opened(running, "/v1/stream/a") as connection:
        connection.transport.write(first + MASKED + (b"\x00\x80" + MASKED) * 5000)
        async with asyncio.timeout(TIMEOUT_S):
            await connection.wait_closed()
        assert connection.close_code == CloseCode.TOO_BIG
        assert await counted(running, Refusal.TOO_BIG) == 1


async def test_pongs_that_nobody_asked_for_cost_nothing() -> None:
    """Nor do pings whose pongs are read."""
    async with running_server() as running, opened(running, "/v1/subscribe") as connection:
        for _ in range(50):
            connection.transport.write((b"\x8a\xfd" + PING[2:] + PING) * 1000)
            await asyncio.sleep(0.001)
        async with asyncio.timeout(TIMEOUT_S):
            await (await connection.ping())
        assert await counted(running, Refusal.UNREAD) == 0


async def test_flushes_as_fast_as_they_go_are_answered_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, in order; each is logged, and a log full of them holds nothing else."""
    monkeypatch.setattr(session, "FLUSHES_AT_ONCE", 20)
    monkeypatch.setattr(session, "FLUSHES_PER_S", 40.0)
    async with running_server() as running, running.stream("a") as connection:
        begun = asyncio.get_running_loop().time()
        for i in range(60):
            await connection.send(encode_client(Flush(str(i))))
        for i in range(60):
            flushed = (await receive_until(connection, Flushed))[-1].message
            assert isinstance(flushed, Flushed)
            assert flushed.id == str(i)
        assert asyncio.get_running_loop().time() - begun >= 0.95
