"""A stream and its engine: crashes, back-pressure, order. Over real sockets, with the fake engine."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection

from streaming.engine.client import EngineState
from streaming.protocol import (
    UNLOGGED,
    AnswerDelta,
    AnswerFinal,
    Ask,
    Close,
    CloseCode,
    Degraded,
    Envelope,
    Error,
    Flush,
    Flushed,
    SessionClosed,
    SpeechStarted,
    SpeechStopped,
    TranscriptDelta,
    decode,
    encode_client,
)
from streaming.stream.session import MAX_QUESTIONS
from tests.streaming.support import (
    TIMEOUT_S,
    Running,
    receive,
    receive_until,
    running_server,
    s16,
    said,
    tone_speech,
    utterances,
)

AUDIO = s16(utterances(2.5, 3.0, 1.5))
ENOUGH_RESTARTS = "[engine]\nmax_restarts = 1000\n"


def pid_of(running: Running) -> int:
    """The engine's process."""
    assert running.engine.pid is not None
    return running.engine.pid


async def words_undisturbed() -> list[str]:
    """What the fake engine hears in AUDIO."""
    async with running_server() as running, running.stream("a") as connection:
        await connection.send(AUDIO)
        await connection.send(encode_client(Close()))
        return said(await receive_until(connection, SessionClosed))


async def test_an_engine_killed_in_mid_speech_loses_and_repeats_nothing() -> None:
    """SIGKILL after some words: captions go on, the text is that of the undisturbed run."""
    reference = await words_undisturbed()
    async with running_server() as running, running.stream("a") as connection:
        middle = len(AUDIO) * 5 // 8  # in the second utterance
        await connection.send(AUDIO[:middle])
        found = await receive_until(connection, TranscriptDelta)
        os.kill(pid_of(running), signal.SIGKILL)
        found += await receive_until(connection, Degraded)
        await connection.send(AUDIO[middle:])
        await connection.send(encode_client(Close()))
        found += await receive_until(connection, SessionClosed)
        assert running.engine.n_restarts == 1
    assert said(found) == reference
    assert [e.message.code for e in found if isinstance(e.message, Error)] == ["engine_lost"]
    assert sum(isinstance(e.message, SpeechStarted) for e in found) == 3
    assert sum(isinstance(e.message, SpeechStopped) for e in found) == 3
    logged = [e.seq for e in found if e.message.type not in UNLOGGED]
    assert logged == list(range(1, len(logged) + 1))


@pytest.mark.slow
def test_an_engine_killed_anywhere_loses_and_repeats_nothing() -> None:
    """However many messages were sent before each death, the committed words are the same."""
    reference = asyncio.run(words_undisturbed())

    @settings(max_examples=8)
    @given(kill_after=st.lists(st.integers(1, 40), min_size=1, max_size=2), cut=st.integers(300, 90_000))
    def check(kill_after: list[int], cut: int) -> None:
        assert asyncio.run(words_disturbed(kill_after, cut)) == reference

    check()


async def words_disturbed(kill_after: list[int], cut: int) -> list[str]:
    """What is heard in AUDIO when the engine is killed after so many messages, and after so many more."""
    found: list[Envelope] = []
    async with running_server(ENOUGH_RESTARTS) as running, running.stream("a") as connection:
        sending = asyncio.create_task(send_and_close(connection, AUDIO, cut))
        for n_messages in kill_after:
            for _ in range(n_messages):
                if not found or not isinstance(found[-1].message, SessionClosed):
                    found.append(await receive(connection))
            async with asyncio.timeout(TIMEOUT_S):
                await running.engine.until(EngineState.READY)
            with suppress(ProcessLookupError):  # dead already, and not noticed yet
                os.kill(pid_of(running), signal.SIGKILL)
        if not isinstance(found[-1].message, SessionClosed):
            found += await receive_until(connection, SessionClosed)
        await sending
    return said(found)


async def send_and_close(connection: ClientConnection, data: bytes, cut: int) -> None:
    """Send audio in frames of `cut` bytes, then `close`."""
    for at in range(0, len(data), cut):
        await connection.send(data[at : at + cut])
    await connection.send(encode_client(Close()))


async def test_a_question_is_answered_once_even_by_the_next_engine() -> None:
    """About the audio before it; it is asked again where the engine died before it answered."""
    async with running_server() as running, running.stream("a") as connection:
        await connection.send(AUDIO[: 3 * 32_000])
        await connection.send(encode_client(Ask("before", "Who?", 2000)))
        found = await receive_until(connection, AnswerFinal)
        os.kill(pid_of(running), signal.SIGSTOP)
        await connection.send(AUDIO[3 * 32_000 :])
        await connection.send(encode_client(Ask("after", "What?", 1_000_000)))
        os.kill(pid_of(running), signal.SIGKILL)
        await connection.send(encode_client(Close()))
        found += await receive_until(connection, SessionClosed)
    answers = [e.message for e in found if isinstance(e.message, AnswerFinal)]
    end_ms = len(AUDIO) // 32
    assert answers == [
        AnswerFinal("before", "Who? Nothing much.", 1000, 3000),
        AnswerFinal("after", "What? Nothing much.", 0, end_ms),
    ]
    assert [e.message.id for e in found if isinstance(e.message, AnswerDelta)] == ["before", "after"]
    assert said(found) == await words_undisturbed()


async def test_too_many_questions_are_refused() -> None:
    """Those that wait are answered; the stream goes on."""
    async with running_server() as running, running.stream("a") as connection:
        os.kill(pid_of(running), signal.SIGSTOP)
        for number in range(MAX_QUESTIONS + 2):
            await connection.send(encode_client(Ask(str(number), "Who?", 1000)))
        refused = [(await receive_until(connection, Error))[-1].message for _ in range(2)]
        os.kill(pid_of(running), signal.SIGCONT)
        await connection.send(encode_client(Close()))
        found = await receive_until(connection, SessionClosed)
    assert [e.code for e in refused if isinstance(e, Error)] == ["busy", "busy"]
    answered = [e.message.id for e in found if isinstance(e.message, AnswerFinal)]
    assert answered == [str(number) for number in range(MAX_QUESTIONS)]


async def test_flushes_survive_the_engine() -> None:
    """One that was not answered is answered by the next engine, once and in order."""
    async with running_server() as running, running.stream("a") as connection:
        await receive(connection)
        os.kill(pid_of(running), signal.SIGSTOP)
        await connection.send(AUDIO[: len(AUDIO) // 2])
        await connection.send(encode_client(Flush("one")))
        await connection.send(encode_client(Flush("two")))
        os.kill(pid_of(running), signal.SIGKILL)
        await connection.send(AUDIO[len(AUDIO) // 2 :])
        await connection.send(encode_client(Close()))
        found = await receive_until(connection, SessionClosed)
    flushed = [e.message.id for e in found if isinstance(e.message, Flushed)]
    assert flushed == ["one", "two"]


@pytest.mark.slow
async def test_a_full_ring_stops_reading_and_loses_nothing() -> None:
    """With the engine standing still, the producer is held up; afterwards everything is heard."""
    minutes = AUDIO * 40  # 400 s of audio against 90 s of ring
    async with running_server() as running, running.stream("a") as connection:
        await receive(connection)
        os.kill(pid_of(running), signal.SIGSTOP)

        sending = asyncio.create_task(send_and_close(connection, minutes, 320_000))
        acked_ms = 0
        while acked_ms < 89_500:
            acked_ms = getattr((await receive(connection)).message, "end_ms", acked_ms)
        for _ in range(20):  # the server has had many turns in which it could have read on
            assert await running.http_status("/healthz") == 200
        with suppress(TimeoutError):
            async with asyncio.timeout(0):  # what has arrived by now
                while True:
                    acked_ms = getattr(decode(await connection.recv()).message, "end_ms", acked_ms)
        assert acked_ms <= 90_000
        os.kill(pid_of(running), signal.SIGCONT)
        closed = (await receive_until(connection, SessionClosed))[-1].message
        await sending
    assert isinstance(closed, SessionClosed)
    assert closed.duration_ms == len(minutes) // 32


async def test_an_engine_that_cannot_be_brought_back_closes_the_stream() -> None:
    """The producer gets a fatal error, session.closed and its own close code."""
    async with running_server("[engine]\nmax_restarts = 0") as running, running.stream("a") as connection:
        await receive(connection)
        os.kill(pid_of(running), signal.SIGKILL)
        found = await receive_until(connection, SessionClosed)
        errors = [e.message for e in found if isinstance(e.message, Error)]
        assert [(e.code, e.fatal) for e in errors] == [("engine_lost", False), ("engine_lost", True)]
        closed = found[-1].message
        assert isinstance(closed, SessionClosed)
        assert closed.reason == "engine_lost"
        async with asyncio.timeout(TIMEOUT_S):
            await connection.wait_closed()
        assert connection.close_code == CloseCode.ENGINE_LOST
        assert await running.http_status("/healthz") == 200
        assert await running.http_status("/readyz") == 503


@pytest.mark.parametrize("fault", ["hangs", "wrong_result"])
async def test_an_engine_that_misbehaves_is_replaced(fault: str) -> None:
    """A step that never ends and a result nobody asked for are deaths; in the end it is given up."""
    limits = "[engine]\nstep_timeout_s = 0.3\nmax_restarts = 1"
    async with running_server(limits, fault) as running, running.stream("a") as connection:
        await connection.send(AUDIO * 2)
        closed = (await receive_until(connection, SessionClosed))[-1].message
        assert isinstance(closed, SessionClosed)
        assert closed.reason == "engine_lost"
        assert running.engine.n_restarts == 1


async def test_streams_do_not_touch_each_other() -> None:
    """Four streams of the same audio at once hear what one alone hears."""
    reference = await words_undisturbed()
    async with running_server() as running:

        async def one(name: str, cut: int) -> list[str]:
            async with running.stream(name) as connection:
                reading = asyncio.create_task(receive_until(connection, SessionClosed))
                await send_and_close(connection, AUDIO, cut)
                return said(await reading)

        heard = await asyncio.gather(*(one(f"s{i}", 1000 + 777 * i) for i in range(4)))
    assert heard == [reference] * 4


async def test_a_producer_whose_speech_is_cut_is_told_so() -> None:
    """Once, with the 30 s it is about; the stream goes on."""
    talk = np.concatenate([tone_speech(1.0, i) for i in range(40)]) * np.float32(0.05)
    async with running_server("[vad]\nmin_level_dbfs = -30\n") as running, running.stream("a") as connection:
        for second in range(0, len(talk), 16_000):
            await connection.send(s16(talk[second : second + 16_000]))
        await connection.send(encode_client(Close()))
        found = await receive_until(connection, SessionClosed)
    told = [e.message for e in found if isinstance(e.message, Degraded)]
    assert [(notice.reason, notice.start_ms, notice.end_ms // 1000) for notice in told] == [
        ("too_quiet", 0, 30)
    ]
