"""The live bench, against the clients' small real server."""

from __future__ import annotations

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection

from bench.live import audio_chunks, run_streams
from bench.manifest import Recording, RefWord
from bench.measures import measure
from clients.producer import StreamFailed
from streaming.protocol import SessionClosed
from tests.clients.fake_server import FakeServer, running

WORDS = (RefWord("hello", 0.0, 0.05), RefWord("world", 0.05, 0.1))
RECORDING = Recording(np.zeros(3_200, dtype=np.float32), "Hello, world", WORDS)  # 0.2 s


async def test_every_client_streams_and_is_measured() -> None:
    """Three streams at once: their words are found, and the lags count from the words' ends."""
    async with running(FakeServer.transcribe) as fake:
        outcomes = await run_streams(fake.url, [RECORDING] * 3, language="en")
    report = measure([outcome.run for outcome in outcomes])
    assert fake.n_audio_bytes == 3 * 6_400
    assert len(set(fake.paths)) == 3
    assert (report.wer, report.n_committed, report.committed_match_rate) == (0.0, 6, 1.0)
    assert 0.1 <= report.commit_lag_s.p50 < 5.0
    assert all(0.0 <= outcome.flush_s < 5.0 for outcome in outcomes)


async def test_a_stream_that_fails_fails_the_bench() -> None:
    """No numbers from half of the clients."""

    async def stopping(fake: FakeServer, connection: ServerConnection) -> None:
        await fake.send(connection, 1, SessionClosed("server_stopping", 0, 0, 0))

    async with running(stopping) as fake:
        with pytest.raises(StreamFailed, match="server_stopping"):
            await run_streams(fake.url, [RECORDING] * 2, language=None)


async def test_audio_is_sent_as_it_was_read() -> None:
    """Back to the 16-bit samples it came from, to the bit."""
    samples = np.array([-32768, -1, 0, 1, 32767], dtype="<i2")
    recording = Recording((samples / 32768.0).astype(np.float32), "", ())
    assert b"".join([chunk async for chunk in audio_chunks(recording)]) == samples.tobytes()
