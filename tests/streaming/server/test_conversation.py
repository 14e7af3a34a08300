"""One connection of a stream: what is sent, how fast it is read, and how it ends."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from streaming.protocol import (
    Close,
    CloseCode,
    Flush,
    Flushed,
    SessionClosed,
    SessionCreated,
    encode_client,
)
from streaming.server.admission import GuardedConnection
from streaming.stream.audio_input import AudioInput
from tests.streaming.support import (
    TIMEOUT_S,
    receive,
    receive_until,
    running_server,
    s16,
    said,
    utterances,
)

AUDIO = s16(utterances(1.5))
SECRET = "what the client said"


async def test_a_fault_while_sending_closes_the_connection_and_the_stream_resumes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """1011 and a line in the log, without what was to be sent; the next connection gets every word."""
    send = GuardedConnection.send

    async def fail_once(self: GuardedConnection, message: Any, *, text: bool | None = None) -> None:
        if isinstance(message, bytes) and b'"transcript.delta"' in message:
            monkeypatch.setattr(GuardedConnection, "send", send)
            raise AssertionError(SECRET)
        await send(self, message, text=text)

    monkeypatch.setattr(GuardedConnection, "send", fail_once)
    async with running_server() as running:
        async with running.stream("a") as connection:
            created = (await receive(connection)).message
            assert isinstance(created, SessionCreated)
            await connection.send(AUDIO)
            async with asyncio.timeout(TIMEOUT_S):
                await connection.wait_closed()
            assert connection.close_code == CloseCode.INTERNAL
        errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1
        assert errors[0].startswith("stream a: connection failed: AssertionError")
        assert SECRET not in errors[0]
        async with running.stream("a", f"resume={created.resume_token}&after=1") as connection:
            await connection.send(encode_client(Close()))
            found = await receive_until(connection, SessionClosed)
    assert len(said(found)) > 3
    assert isinstance(found[-1].message, SessionClosed)
    assert found[-1].message.n_words == len(said(found))


async def test_time_that_the_session_took_for_audio_is_not_waited_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Audio that may come in real time, of which each second takes 0.6 s: nothing is held back for it."""
    feed, sleep = AudioInput.feed, asyncio.sleep
    waits_s: list[float] = []

    async def slow(self: AudioInput, data: bytes) -> None:
        await feed(self, data)
        await sleep(0.6)

    async def noted(delay_s: float, *rest: Any) -> None:
        if delay_s > 0:
            waits_s.append(delay_s)
        await sleep(delay_s, *rest)

    limits = "[limits]\naudio_speed = 1.0\naudio_burst_s = 1.0\naudio_ahead_s = 10.0"
    async with running_server(limits) as running, running.stream("a") as connection:
        await receive(connection)
        monkeypatch.setattr(AudioInput, "feed", slow)
        monkeypatch.setattr(asyncio, "sleep", noted)
        for _ in range(2):
            await connection.send(bytes(2 * 16_000))
        await connection.send(encode_client(Flush("all")))
        assert (await receive_until(connection, Flushed))[-1].message == Flushed("all", 2000)
        monkeypatch.undo()
    assert not waits_s  # the second one is 0.4 s early when it comes, and in time when it is taken
