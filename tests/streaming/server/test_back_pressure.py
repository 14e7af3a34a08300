"""A stream that is full: its connection is read all the same, so that the client's pings are answered."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from streaming.adaptors import deepgram, openai
from streaming.protocol import Close, SessionClosed, Subscribe, encode_client
from tests.streaming.support import (
    TIMEOUT_S,
    Running,
    receive_until,
    running_server,
    s16,
    silence,
    utterances,
)

AUDIO = (s16(utterances(1.5, 2.0)) + s16(silence(1.0))) * 40  # 280 s at 16 kHz; the ring holds 90
CHUNK = 32_000  # bytes
N_PINGS = 3


@contextmanager
def engine_stopped(running: Running) -> Iterator[None]:
    """The engine's process stands still in the body."""
    assert running.engine.pid is not None
    os.kill(running.engine.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(running.engine.pid, signal.SIGCONT)


async def send_all(connection: ClientConnection, endpoint: str) -> None:
    """The audio, as fast as it is accepted."""
    for at in range(0, len(AUDIO), CHUNK):
        data = AUDIO[at : at + CHUNK]
        if endpoint == "openai":
            audio = base64.b64encode(data).decode()
            await connection.send(json.dumps({"type": "input_audio_buffer.append", "audio": audio}))
        else:
            await connection.send(data)


async def send_twice(connection: ClientConnection) -> None:
    """Twice the audio, over the native protocol."""
    for _ in range(2):
        await send_all(connection, "native")


async def read(connection: ClientConnection) -> None:
    """Whatever comes."""
    with suppress(ConnectionClosed):
        async for _ in connection:
            pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("endpoint", "path", "rate_hz", "last"),
    [
        ("native", "/v1/stream/full", 16_000, encode_client(Close())),
        ("deepgram", f"{deepgram.PATH}?encoding=linear16&sample_rate=8000", 8_000, '{"type": "CloseStream"}'),
        ("openai", openai.PATH, 24_000, None),  # it ends by closing
    ],
)
async def test_pings_are_answered_however_full_the_stream_is(
    endpoint: str, path: str, rate_hz: int, last: str | None
) -> None:
    """With the engine standing still and minutes of audio sent at once; then all of it is decoded."""
    async with running_server() as running, running.subscribe() as reader, asyncio.timeout(3 * TIMEOUT_S):
        await reader.send(encode_client(Subscribe(("*",))))
        url = f"ws://127.0.0.1:{running.port}{path}"
        async with connect(url, ping_interval=0.5, ping_timeout=TIMEOUT_S / 4) as connection:
            reading = asyncio.create_task(read(connection))
            with engine_stopped(running):
                await send_all(connection, endpoint)
                for _ in range(N_PINGS):
                    async with asyncio.timeout(TIMEOUT_S / 2):
                        await (await connection.ping())
            if last is not None:
                await connection.send(last)
                await reading
            else:
                await connection.close()
        closed = (await receive_until(reader, SessionClosed))[-1].message
    assert isinstance(closed, SessionClosed)
    assert closed.duration_ms == len(AUDIO) // 2 * 1000 // rate_hz
    assert closed.n_words > 100


async def test_at_the_bound_the_connection_is_not_read_and_nothing_is_lost() -> None:
    """What the spool cannot hold waits at the client."""
    settings = "[ingest]\nspool_mib = 1"
    async with running_server(settings) as running, running.stream("a") as connection:
        reading = asyncio.create_task(receive_until(connection, SessionClosed))
        with engine_stopped(running):
            sending = asyncio.create_task(send_twice(connection))
            for _ in range(20):  # turns in which the server could have read on
                assert await running.http_status("/healthz") == 200
            # Of 18 MB: the shares of ring and spool, and what the two sockets hold.
            assert not sending.done()
        await sending
        await connection.send(encode_client(Close()))
        closed = (await reading)[-1].message
    assert isinstance(closed, SessionClosed)
    assert closed.duration_ms == 2 * len(AUDIO) // 32
