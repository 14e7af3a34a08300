"""The subscriber, against a real WebSocket that loses connections."""

from __future__ import annotations

from http import HTTPStatus

import pytest
from websockets.asyncio.server import ServerConnection

from clients.connection import Backoff
from clients.subscriber import SubscriptionFailed, subscribe
from streaming.protocol import Envelope, Error, SessionClosed, SpeechStarted, TranscriptInterim, encode
from tests.clients.fake_server import CLOSED, CREATED, FakeServer, running

QUICK = Backoff(first_s=0.01, longest_s=0.02, max_attempts=3)


async def test_messages_end_with_the_stream() -> None:
    """Every message is given, and the iteration ends where the server says that this was all."""
    async with running(_whole_stream) as fake:
        types = [m.message.type async for m in subscribe(fake.url, "test", after=0, follow=False)]
    assert types == ["session.created", "speech.started", "transcript.interim", "session.closed"]
    assert fake.paths == ["/v1/subscribe"]
    (request,) = fake.requests
    assert request | {"type": "subscribe", "streams": ["test"], "types": [], "after": 0} == request
    assert (request["follow"], request["confirm"], request["log"]) == (False, True, None)


async def test_types_filter_and_the_end_is_seen() -> None:
    """The server's close ends the iteration, though no session.closed was asked for."""
    async with running(_whole_stream) as fake:
        messages = [m async for m in subscribe(fake.url, "test", types=["speech.started"], after=0)]
    assert [envelope.message.type for envelope in messages] == ["speech.started"]
    assert fake.requests[0]["types"] == ["speech.started"]


async def test_a_lost_connection_is_resumed_after_the_last_seq() -> None:
    """No logged message is missed or given twice, even where the server sends one again."""

    async def handler(fake: FakeServer, connection: ServerConnection) -> None:
        await _take_request(fake, connection)
        if len(fake.requests) == 1:
            await fake.send(connection, 1, CREATED)
            await fake.send(connection, 2, SpeechStarted(100))
            await fake.send(connection, 2, TranscriptInterim("hel", 100, 200))
            await connection.close(4410)
        else:
            await fake.send(connection, 2, SpeechStarted(100))
            await fake.send(connection, 2, TranscriptInterim("hello", 100, 200))
            await fake.send(connection, 3, CLOSED)

    async with running(handler) as fake:
        messages = [m async for m in subscribe(fake.url, "test", backoff=QUICK)]
    assert [request["after"] for request in fake.requests] == [None, 2]
    assert [m.message.type for m in messages] == [
        "session.created",
        "speech.started",
        "transcript.interim",
        "transcript.interim",
        "session.closed",
    ]


async def test_an_error_of_the_connection_does_not_move_the_position() -> None:
    """It has no stream and `seq` 0; the next connection still resumes after the last message."""

    async def handler(fake: FakeServer, connection: ServerConnection) -> None:
        await _take_request(fake, connection)
        if len(fake.requests) == 1:
            await fake.send(connection, 2, SpeechStarted(100))
            await connection.send(encode(Envelope("", 0, Error("bad_message", "unread", fatal=False))))
            await connection.close(4410)
        else:
            await fake.send(connection, 3, CLOSED)

    async with running(handler) as fake:
        messages = [m async for m in subscribe(fake.url, "test", after=0, backoff=QUICK)]
    assert [request["after"] for request in fake.requests] == [0, 2]
    assert [m.message.type for m in messages] == ["speech.started", "error", "session.closed"]


async def test_attempts_are_limited() -> None:
    """A server that only ever drops the connection is given up on."""

    async def handler(fake: FakeServer, connection: ServerConnection) -> None:
        connection.transport.abort()

    async with running(handler) as fake:
        with pytest.raises(SubscriptionFailed, match="lost"):
            _ = [m async for m in subscribe(fake.url, "test", backoff=QUICK)]
    assert len(fake.paths) == QUICK.max_attempts


async def test_a_refusal_for_good_is_not_tried_again() -> None:
    """400 stays 400; 503 may pass."""
    for status, n_attempts in ((HTTPStatus.BAD_REQUEST, 1), (HTTPStatus.SERVICE_UNAVAILABLE, 3)):
        async with running(_whole_stream) as fake:
            fake.refusal = (status, "no")
            with pytest.raises(SubscriptionFailed, match=f"{status.value}: no"):
                _ = [m async for m in subscribe(fake.url, "test", backoff=QUICK)]
        assert len(fake.paths) == n_attempts


async def test_an_unknown_stream_is_waited_for() -> None:
    """The captions may be started before the audio; without patience it is an error."""

    async def handler(fake: FakeServer, connection: ServerConnection) -> None:
        await _take_request(fake, connection)
        if len(fake.requests) < 3:
            await fake.send(connection, 0, Error("unknown_stream", "no stream test", fatal=True))
            await connection.close(4404)
        else:
            await fake.send(connection, 1, CLOSED)

    async with running(handler) as fake:
        messages = [m async for m in subscribe(fake.url, "test", wait_s=60.0, backoff=QUICK)]
    assert isinstance(messages[-1].message, SessionClosed)

    async with running(handler) as fake:
        with pytest.raises(SubscriptionFailed, match="no stream test"):
            _ = [m async for m in subscribe(fake.url, "test", backoff=QUICK)]


async def test_messages_of_a_newer_server_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """An unknown type is warned about and does not end the subscription."""

    async def handler(fake: FakeServer, connection: ServerConnection) -> None:
        await _take_request(fake, connection)
        await connection.send('{"type": "video.frame", "stream": "test", "seq": 1}')
        await fake.send(connection, 2, CLOSED)

    async with running(handler) as fake:
        messages = [m async for m in subscribe(fake.url, "test")]
    assert [m.message for m in messages] == [CLOSED]
    assert "video.frame" in caplog.text


def test_delays_grow_with_jitter_up_to_a_limit() -> None:
    """Half to all of the doubled step, never above the longest."""
    backoff = Backoff(first_s=1.0, longest_s=8.0)
    for n_failed, most_s in ((1, 1.0), (2, 2.0), (3, 4.0), (9, 8.0), (10_000, 8.0)):
        assert most_s / 2 <= backoff.delay_s(n_failed) <= most_s


async def _take_request(fake: FakeServer, connection: ServerConnection) -> None:
    import json

    fake.requests.append(json.loads(await connection.recv()))


async def _whole_stream(fake: FakeServer, connection: ServerConnection) -> None:
    await _take_request(fake, connection)
    wanted = fake.requests[-1]["types"]
    for seq, message in (
        (1, CREATED),
        (2, SpeechStarted(100)),
        (2, TranscriptInterim("hel", 100, 200)),
        (3, CLOSED),
    ):
        if not wanted or message.type in wanted:
            await fake.send(connection, seq, message)
