"""The server over real sockets, with the fake engine."""

from __future__ import annotations

import asyncio
import time

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus

from streaming.engine.messages import Result
from streaming.protocol import (
    MAX_SUBSCRIBED_STREAMS,
    Ack,
    Ask,
    Close,
    CloseCode,
    Envelope,
    Error,
    Flush,
    Flushed,
    Lag,
    SessionClosed,
    SessionCreated,
    SessionUpdate,
    SpeechStarted,
    SpeechStopped,
    Subscribe,
    TranscriptFinal,
    encode_client,
)
from streaming.timeline.transcript import Applied, Timeline
from tests.streaming.support import (
    TIMEOUT_S,
    eventually,
    logged,
    receive,
    receive_until,
    running_server,
    s16,
    said,
    utterances,
)

AUDIO = s16(utterances(1.5, 2.0))


async def stream_whole(connection: ClientConnection, data: bytes, cut: int) -> list[Envelope]:
    """Send audio in frames of `cut` bytes, close, and give all messages."""
    reading = asyncio.create_task(receive_until(connection, SessionClosed))
    for at in range(0, len(data), cut):
        await connection.send(data[at : at + cut])
    await connection.send(encode_client(Close()))
    return await reading


async def close_code(connection: ClientConnection) -> int | None:
    """The code that the server closes with."""
    async with asyncio.timeout(TIMEOUT_S):
        await connection.wait_closed()
    return connection.close_code


async def test_a_stream_is_captioned_from_session_created_to_session_closed() -> None:
    """Every kind of message comes, in order, with `seq` counting the logged ones."""
    async with running_server() as running, running.stream("talk") as connection:
        found = await stream_whole(connection, AUDIO, 3200)
        assert await close_code(connection) == CloseCode.NORMAL
    kinds = [type(envelope.message) for envelope in found]
    assert kinds[0] is SessionCreated
    assert kinds.count(SpeechStarted) == kinds.count(SpeechStopped) == kinds.count(TranscriptFinal) == 2
    closed = found[-1].message
    assert isinstance(closed, SessionClosed)
    assert (closed.reason, closed.duration_ms) == ("closed", len(AUDIO) // 32)
    assert closed.n_words == len(said(found)) > 8
    seqs = [envelope.seq for envelope in logged(found)]
    assert seqs == list(range(1, len(seqs) + 1))


@pytest.mark.parametrize("cut", [31, 640, 32_000, len(AUDIO)])
async def test_how_bytes_are_cut_changes_no_committed_word(cut: int) -> None:
    """Frames of 1 ms (mid-sample), 20 ms, 1 s and everything at once say the same."""
    async with running_server() as running:
        async with running.stream("a") as connection:
            reference = await stream_whole(connection, AUDIO, 3200)
        async with running.stream("a") as connection:
            found = await stream_whole(connection, AUDIO, cut)
    assert [e.message for e in logged(found)][1:] == [e.message for e in logged(reference)][1:]


async def test_flush_is_answered_after_everything_before_it_is_committed() -> None:
    """In the middle of speech, and once more with no audio in between."""
    async with running_server() as running, running.stream("talk") as connection:
        await connection.send(AUDIO[: 16_000 * 2 * 2])
        await connection.send(encode_client(Flush("one")))
        await connection.send(encode_client(Flush("two")))
        first = await receive_until(connection, Flushed)
        second = await receive_until(connection, Flushed)
        assert [first[-1].message, second[-1].message] == [Flushed("one", 2000), Flushed("two", 2000)]
        finals = [e.message for e in first if isinstance(e.message, TranscriptFinal)]
        assert finals[-1].end_ms == 2000
        assert max(e.message.n_samples for e in first if isinstance(e.message, Ack)) == 32_000


async def test_a_disconnected_producer_is_finalised() -> None:
    """Everything sent before the connection was lost is heard, and subscribers are told."""
    async with running_server() as running, running.subscribe() as subscriber:
        async with running.stream("talk") as connection:
            await receive(connection)
            await subscriber.send(encode_client(Subscribe(("talk",), after=0, follow=False)))
            await connection.send(AUDIO)
        found = await receive_until(subscriber, SessionClosed)
        closed = found[-1].message
        assert isinstance(closed, SessionClosed)
        assert (closed.reason, closed.duration_ms) == ("disconnected", len(AUDIO) // 32)
        assert await close_code(subscriber) == CloseCode.NORMAL


async def test_http_answers() -> None:
    """Health, readiness, unknown paths, and a WebSocket path without an upgrade."""
    async with running_server() as running:
        assert await running.http_status("/healthz") == 200
        assert await running.http_status("/readyz") == 200
        assert await running.http_status("/nothing") == 404
        assert await running.http_status("/v1/stream/a") == 426


async def test_ready_only_when_the_engine_is() -> None:
    """The server answers health checks while the engine loads, and takes no streams."""
    async with running_server(fault="never_ready", wait=False) as running:
        assert await running.http_status("/healthz") == 200
        assert await running.http_status("/readyz") == 503
        with pytest.raises(InvalidStatus) as refused:
            await running.stream("a")
        assert refused.value.response.status_code == 503


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("format=mp3", "s16le"),
        ("rate=7999", "8000 to 48000"),
        ("rate=1e4", "8000 to 48000"),
        ("channels=9", "1 to 8"),
        ("chanels=1", "channels"),
        ("rate=8000&rate=8000", "once"),
        ("language=xx", "de"),
    ],
)
async def test_a_bad_query_is_refused_with_what_was_expected(query: str, expected: str) -> None:
    """HTTP 400 with a body a person can act on."""
    async with running_server() as running:
        with pytest.raises(InvalidStatus) as refused:
            await running.stream("a", query)
    assert refused.value.response.status_code == 400
    assert expected in (refused.value.response.body or b"").decode()


async def test_names_and_slots_are_taken_once() -> None:
    """A live name is a conflict; with all slots taken, every name is refused, until one is free."""
    async with (
        running_server("[engine]\nn_slots = 2") as running,
        running.stream("a") as first,
        running.stream("b"),
    ):
        for name, status in (("a", 409), ("c", 503)):
            with pytest.raises(InvalidStatus) as refused:
                await running.stream(name)
            assert refused.value.response.status_code == status
        await first.send(encode_client(Close()))
        await receive_until(first, SessionClosed)
        async with running.stream("a") as again:
            assert isinstance((await receive(again)).message, SessionCreated)


async def test_connections_are_limited() -> None:
    """One more than the limit is answered 429; a place that is given back is free."""
    async with running_server("[server]\nmax_connections = 1") as running:
        async with running.subscribe():
            with pytest.raises(InvalidStatus) as refused:
                await running.subscribe()
            assert refused.value.response.status_code == 429
        await eventually(lambda: not running.server.n_connections)
        async with running.subscribe():
            pass


async def test_bad_messages_are_answered_until_they_are_too_many() -> None:
    """Each gets a non-fatal error; the last one ends the connection, and the stream is closed."""
    async with running_server("[server]\nmax_bad_messages = 3") as running, running.stream("a") as connection:
        for text in ("{", '{"type": "subscribe"}', '{"type": "flush", "id": ""}'):
            await connection.send(text)
        found = await receive_until(connection, SessionClosed)
        errors = [e.message for e in found if isinstance(e.message, Error)]
        assert [(e.code, e.fatal) for e in errors] == [
            ("bad_json", False),
            ("bad_message", False),
            ("bad_message", False),
            ("bad_message", True),
        ]
        assert await close_code(connection) == CloseCode.BAD_MESSAGE


async def test_bad_audio_ends_the_stream() -> None:
    """A float that is not a number is a fatal error of this stream alone."""
    async with running_server() as running, running.stream("a", "format=f32le") as connection:
        await connection.send(b"\xff" * 4 * 320)
        found = await receive_until(connection, SessionClosed)
        assert [e.message.code for e in found if isinstance(e.message, Error)] == ["bad_audio"]
        assert await close_code(connection) == CloseCode.BAD_AUDIO


async def test_a_frame_that_is_too_big_closes_the_connection() -> None:
    """With the standard's own code."""
    async with (
        running_server("[server]\nmax_message_bytes = 2048") as running,
        running.stream("a") as connection,
    ):
        await connection.send(bytes(4096))
        assert await close_code(connection) == CloseCode.TOO_BIG


async def test_a_fault_of_ours_ends_one_stream_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timeline fails on one stream's result; that one is closed as internal, the other goes on."""
    apply = Timeline.apply

    def fail_once(self: Timeline, result: Result) -> Applied:
        monkeypatch.setattr(Timeline, "apply", apply)
        raise AssertionError(result.point)

    async with (
        running_server() as running,
        running.stream("a") as a,
        running.stream("b") as b,
        running.subscribe() as subscriber,
    ):
        await receive(a)
        await subscriber.send(encode_client(Subscribe(("a",), after=0)))
        monkeypatch.setattr(Timeline, "apply", fail_once)
        await a.send(AUDIO)
        closed = (await receive_until(subscriber, SessionClosed))[-1].message
        assert isinstance(closed, SessionClosed)
        assert closed.reason == "internal"
        assert await close_code(a) == CloseCode.INTERNAL
        assert len(said(await stream_whole(b, AUDIO, 3200))) > 8
        assert running.engine.n_restarts == 0


async def test_what_the_model_cannot_do_is_said() -> None:
    """A question, and a language it does not have; a language it has is taken."""
    async with running_server(fault="answers_nothing") as running, running.stream("a") as connection:
        await connection.send(encode_client(Ask("q", "What was that?", 1000)))
        await connection.send(encode_client(SessionUpdate("xx")))
        await connection.send(encode_client(SessionUpdate("de")))
        await connection.send(encode_client(Flush("end")))
        found = await receive_until(connection, Flushed)
        assert [e.message.code for e in found if isinstance(e.message, Error)] == [
            "unsupported",
            "bad_message",
        ]


async def test_an_idle_producer_is_closed() -> None:
    """After idle_timeout_s, with the audio before it finalised."""
    async with running_server("[server]\nidle_timeout_s = 0.2") as running, running.stream("a") as connection:
        await connection.send(AUDIO)
        found = await receive_until(connection, SessionClosed)
        closed = found[-1].message
        assert isinstance(closed, SessionClosed)
        assert closed.reason == "idle"
        assert await close_code(connection) == CloseCode.IDLE


async def test_acks_come_without_further_audio() -> None:
    """A little audio that is followed by nothing is acknowledged too."""
    async with (
        running_server("[ingest]\nack_interval_s = 0.05") as running,
        running.stream("a", "rate=8000&format=mulaw") as connection,
    ):
        await connection.send(bytes(80))
        ack = (await receive_until(connection, Ack))[-1].message
        assert isinstance(ack, Ack)
        assert (ack.n_samples, ack.end_ms) == (80, 10)
        assert ack.wall_ms is not None
        assert abs(ack.wall_ms / 1000 - time.time()) < TIMEOUT_S


async def test_a_subscriber_resumes_after_the_last_seq_it_saw() -> None:
    """Replay and live messages join without a gap or a duplicate, after the end of the stream too."""
    async with running_server() as running:
        async with running.subscribe() as live, running.stream("talk") as producer:
            await live.send(encode_client(Subscribe(("talk",), after=0)))
            whole = await stream_whole(producer, AUDIO, 3200)
            seen = await receive_until(live, SessionClosed)
        told = logged(whole)
        assert logged(seen) == told
        async with running.subscribe() as late:
            await late.send(encode_client(Subscribe(("talk",), after=4, follow=False)))
            assert await receive_until(late, SessionClosed) == told[4:]
            assert await close_code(late) == CloseCode.NORMAL


async def test_a_subscriber_may_come_before_its_stream() -> None:
    """It is told that there is none yet, and hears the stream from its beginning."""
    async with running_server() as running, running.subscribe() as subscriber:
        await subscriber.send(encode_client(Subscribe(("talk",), ("session.created", "transcript.final"))))
        error = (await receive(subscriber)).message
        assert isinstance(error, Error)
        assert (error.code, error.fatal) == ("unknown_stream", False)
        async with running.stream("talk") as producer:
            await stream_whole(producer, AUDIO, 3200)
        kinds = [type((await receive(subscriber)).message) for _ in range(3)]
        assert kinds == [SessionCreated, TranscriptFinal, TranscriptFinal]


async def test_a_subscription_is_replaced_by_the_next() -> None:
    """Only the newest counts."""
    async with (
        running_server() as running,
        running.subscribe() as subscriber,
        running.stream("a") as a,
        running.stream("b") as b,
    ):
        await receive(a)
        await receive(b)
        await subscriber.send(encode_client(Subscribe(("a",), after=0)))
        assert (await receive(subscriber)).stream == "a"
        await subscriber.send(encode_client(Subscribe(("b",), after=0)))
        assert (await receive(subscriber)).stream == "b"
        await a.send(encode_client(Flush("a")))
        await receive_until(a, Flushed)
        await b.send(encode_client(Flush("b")))
        assert {e.stream for e in await receive_until(subscriber, Flushed)} == {"b"}


@pytest.mark.slow
async def test_a_reader_that_does_not_read_is_closed_and_delays_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its queue overflows behind the kernel's buffers; another subscriber gets every message."""
    monkeypatch.setattr("streaming.server.subscriber.SUBSCRIBES_BURST", 4000)  # else the answers come slowly
    async with running_server("[server]\nsubscriber_queue = 100") as running:
        slow = await running.subscribe()
        slow.transport.pause_reading()
        names = tuple(f"{i:064}" for i in range(MAX_SUBSCRIBED_STREAMS))
        for _ in range(4000):  # 16 MB of answers: more than kernels keep for one socket
            await slow.send(encode_client(Subscribe(names)))
        async with running.subscribe() as fast, running.stream("a") as producer:
            await fast.send(encode_client(Subscribe(("a",), after=0)))
            whole = await stream_whole(producer, AUDIO, 3200)
            assert logged(await receive_until(fast, SessionClosed)) == logged(whole)
        slow.transport.resume_reading()
        lag = (await receive_until(slow, Lag))[-1].message
        assert lag == Lag(100)
        assert await close_code(slow) == CloseCode.TOO_SLOW


async def test_a_stopping_server_finalises_every_stream() -> None:
    """Producers and subscribers get the last words, session.closed, and code 1001."""
    async with running_server() as running:
        producer, subscriber = await running.stream("a"), await running.subscribe()
        await receive(producer)
        await subscriber.send(encode_client(Subscribe(("a",), after=0)))
        await producer.send(AUDIO[: 16_000 * 2 * 2])
        await receive_until(producer, SpeechStarted)
        running.stop.set()
        for connection in (producer, subscriber):
            found = await receive_until(connection, SessionClosed)
            assert isinstance(found[-2].message, TranscriptFinal)
            closed = found[-1].message
            assert isinstance(closed, SessionClosed)
            assert closed.reason == "server_stopping"
            assert await close_code(connection) == CloseCode.GOING_AWAY
