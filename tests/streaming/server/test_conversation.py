"""One connection of a stream: what is sent, how fast it is read, and how it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from streaming.adaptors.base import Event
from streaming.adaptors.deepgram import Deepgram
from streaming.protocol import (
    Close,
    CloseCode,
    Envelope,
    Flush,
    Flushed,
    SessionClosed,
    SessionCreated,
    Subscribe,
    TranscriptDelta,
    encode_client,
)
from streaming.server.connection import GuardedConnection
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


async def test_a_fault_while_sending_ends_the_stream_of_a_dialect_that_is_not_resumable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its audio is decoded to the end, the readers are told "internal", and its slot is free."""
    translate = Deepgram.translate

    def fail_once(self: Deepgram, envelope: Envelope) -> list[Event]:
        if envelope.message.type == TranscriptDelta.type:
            monkeypatch.setattr(Deepgram, "translate", translate)
            raise RuntimeError(SECRET)
        return translate(self, envelope)

    monkeypatch.setattr(Deepgram, "translate", fail_once)
    async with running_server("[engine]\nn_slots = 1") as running, running.subscribe() as subscriber:
        await subscriber.send(encode_client(Subscribe(("deepgram-*",))))
        uri = f"ws://127.0.0.1:{running.port}/v1/listen?encoding=linear16&sample_rate=16000"
        async with connect(uri) as connection:
            await connection.send(AUDIO)
            async with asyncio.timeout(TIMEOUT_S):
                await connection.wait_closed()
            assert connection.close_code == CloseCode.INTERNAL
        found = await receive_until(subscriber, SessionClosed)
        assert isinstance(found[-1].message, SessionClosed)
        assert found[-1].message.reason == "internal"
        assert found[-1].message.n_words == len(said(found)) > 3
        async with running.stream("a") as other:
            assert isinstance((await receive(other)).message, SessionCreated)
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "connection failed: RuntimeError" in errors[0]
    assert SECRET not in errors[0]


async def test_bytes_that_ended_a_stream_are_not_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Though the client is told how its audio began."""
    caplog.set_level(logging.INFO)
    async with running_server() as running, connect(f"ws://127.0.0.1:{running.port}/v1/listen") as connection:
        await connection.send(SECRET.encode())
        heard = "".join([str(text) async for text in _until_closed(connection)])
    begin = SECRET.encode()[:4].hex(" ")
    assert begin in heard
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]
    assert any("ends: BadAudio" in line for line in lines)
    assert all(begin not in line for line in lines)


async def _until_closed(connection: ClientConnection) -> AsyncIterator[str | bytes]:
    """All that comes, whatever the close code is."""
    with suppress(ConnectionClosed):
        async for frame in connection:
            yield frame
