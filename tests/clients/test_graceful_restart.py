"""A server that is stopped and started again, as for an upgrade: its clients go on by themselves."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from websockets.asyncio.server import ServerConnection

from clients.connection import Backoff
from clients.producer import Progress, stream_audio, stream_url
from clients.subscriber import subscribe
from streaming.protocol import (
    UNLOGGED,
    Ack,
    Envelope,
    Flushed,
    Gap,
    SessionClosed,
    TranscriptDelta,
)
from tests.clients.fake_server import CREATED, FakeServer, running
from tests.streaming.stream.test_lifetime import ServerProcess, server_process
from tests.streaming.support import TIMEOUT_S, eventually, s16, utterances

QUICK = Backoff(first_s=0.05, longest_s=0.2, max_attempts=200)
AUDIO = s16(utterances(2.5, 3.0, 1.5, 3.0, 2.0, 3.0))
CREATED_WITH_TOKEN = replace(CREATED, resume_token="secret")
CHUNK = 3_200  # bytes, 100 ms


async def audio(*, gap_ms: int = 0) -> AsyncIterator[bytes | Gap]:
    """Three times as fast as it was spoken; a gap first where one is wanted."""
    if gap_ms:
        yield Gap(gap_ms)
    for begin in range(0, len(AUDIO), CHUNK):
        yield AUDIO[begin : begin + CHUNK]
        await asyncio.sleep(0.033)


async def restart(server: ServerProcess) -> None:
    """SIGTERM, and a start as soon as it has ended."""
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(TIMEOUT_S):
        await server.process.wait()
    await server.start()


@pytest.mark.slow
@pytest.mark.parametrize("gap_ms", [0, 2_000])
async def test_a_restart_in_mid_speech_loses_no_audio(tmp_path: Path, gap_ms: int) -> None:
    """Twice: each session begins where the one before ended, and a subscriber sees all of them."""
    found: list[Envelope] = []
    read: list[Envelope] = []

    async def follow(server: str) -> None:
        async for envelope in subscribe(server, "a", after=0, wait_s=TIMEOUT_S, backoff=QUICK):
            read.append(envelope)

    def n_deltas() -> int:
        return sum(isinstance(envelope.message, TranscriptDelta) for envelope in found)

    async with server_process(tmp_path) as server:
        await asyncio.sleep(1.0)  # the first connection is not tried again, and the engine starts
        url = f"ws://127.0.0.1:{server.port}"
        reader = asyncio.create_task(follow(url))
        sender = asyncio.create_task(
            stream_audio(stream_url(url, "a"), audio(gap_ms=gap_ms), found.append, paced=False, backoff=QUICK)
        )
        async with asyncio.timeout(3 * TIMEOUT_S):
            for _ in range(2):
                before = n_deltas()
                await eventually(lambda before=before: n_deltas() > before)  # type: ignore[misc]
                await restart(server)
            closed = await sender
            await eventually(lambda: len(read) >= len(logged(found)))
        reader.cancel()
    ends = [e.message for e in found if isinstance(e.message, SessionClosed)]
    assert [end.reason for end in ends] == ["server_stopping", "server_stopping", "closed"]
    assert sum(end.duration_ms for end in ends) == pytest.approx(len(AUDIO) // 32 + gap_ms, abs=2)
    assert min(end.duration_ms for end in ends) > 100
    assert closed == ends[-1]
    assert logged([e for e in read if e.message.type not in UNLOGGED]) == logged(found)


def logged(envelopes: list[Envelope]) -> list[tuple[int, str]]:
    """What the log keeps of them, in order."""
    return [(e.seq, e.message.type) for e in envelopes if e.message.type not in UNLOGGED]


async def test_a_stop_after_the_flush_is_the_end() -> None:
    """Everything is final: no further session is begun for nothing."""

    async def handler(fake: FakeServer, connection: ServerConnection) -> None:
        await fake.send(connection, 1, CREATED_WITH_TOKEN)
        id_ = await fake.hear(connection)
        await fake.send(connection, 2, Flushed(id_, 100))
        await fake.send(connection, 3, SessionClosed("server_stopping", 100, 0, 0))

    progress = Progress()
    async with running(handler) as fake:
        closed = await stream_audio(
            stream_url(fake.url, "test"), few(5), lambda _: None, paced=False, progress=progress
        )
    assert closed.reason == "server_stopping"
    assert progress.flushed_at is not None
    assert len(fake.paths) == 1


async def test_a_stop_before_any_audio_came_sends_all_of_it_again() -> None:
    """Whatever was on its way; what the server had is not sent twice."""
    taken: list[int] = []

    async def handler(fake: FakeServer, connection: ServerConnection) -> None:
        n_before = fake.n_audio_bytes
        await fake.send(connection, 1, CREATED_WITH_TOKEN)
        if len(fake.paths) == 1:
            await fake.send(connection, 2, SessionClosed("server_stopping", 0, 0, 0))
            return
        if len(fake.paths) == 2:
            while fake.n_audio_bytes - n_before < 2 * 640:
                fake.n_audio_bytes += len(await connection.recv())
            taken.append(fake.n_audio_bytes - n_before)
            await fake.send(connection, 2, Ack(taken[0] // 2, taken[0] // 32))
            closed = SessionClosed("server_stopping", taken[0] // 32, 0, 0)
            await fake.send(connection, 3, closed)
            return
        id_ = await fake.hear(connection)
        taken.append(fake.n_audio_bytes - n_before)
        await fake.send(connection, 4, Flushed(id_, 100))
        await fake.send(connection, 5, SessionClosed("closed", taken[1] // 32, 0, 0))

    async with running(handler) as fake:
        closed = await stream_audio(
            stream_url(fake.url, "test"), few(20), lambda _: None, paced=True, backoff=QUICK
        )
    assert closed.reason == "closed"
    assert sum(taken) == 20 * 640
    assert "resume=" not in "".join(fake.paths)


async def few(n_chunks: int) -> AsyncIterator[bytes]:
    """So many chunks of 20 ms."""
    for _ in range(n_chunks):
        yield bytes(640)
