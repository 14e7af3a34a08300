"""What a server makes of the streams that a killed one left: also of those it cannot go on with."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from streaming.audio.vad import VadState
from streaming.engine.contract import LanguageDoubt
from streaming.engine.messages import Mark
from streaming.errors import LogError
from streaming.log.row import Row
from streaming.log.store import Store
from streaming.protocol import (
    AnswerFinal,
    Close,
    Degraded,
    Envelope,
    Error,
    Flushed,
    SessionClosed,
    SessionCreated,
    SessionResumed,
    Subscribe,
    TranscriptDelta,
    TranscriptFinal,
    Word,
    decode,
    encode_client,
)
from streaming.stream.feed import PendingMark
from streaming.stream.registry import Streams
from streaming.stream.snapshot import SavedStream, for_model
from streaming.timeline.transcript import TimelineState
from tests.streaming.stream.left import leave, state
from tests.streaming.support import TIMEOUT_S, Running, receive, receive_until, running_server

SLOTS = "[engine]\nn_slots = 2\n"
NO_FORMAT = state(rate_hz=0)  # a fault in what reads it
WORDS = (Word("one", 0, 400, 1.0), Word("two", 500, 900, 1.0))
SAID = (
    TranscriptDelta("one", WORDS[:1], 0, 400),
    TranscriptDelta("two", WORDS[1:], 500, 900),
    TranscriptFinal("one two", WORDS, "en", None, 0, 900),
)


async def closed(running: Running, name: str, after: int = 0) -> SessionClosed:
    """How a stream was closed, from what it said after a `seq`."""
    async with running.subscribe() as reader:
        await reader.send(encode_client(Subscribe((name,), after=after)))
        last = (await receive_until(reader, SessionClosed))[-1].message
        assert isinstance(last, SessionClosed)
        return last


async def restored(running: Running, name: str) -> None:
    """Wait until a stream is there again."""
    async with running.subscribe() as reader:
        await reader.send(encode_client(Subscribe((name,), after=0)))
        await receive_until(reader, Degraded)


async def goes_on(running: Running, name: str) -> bool:
    """Whether a stream is resumed and ends as its producer says."""
    await restored(running, name)
    async with running.stream(name, f"resume={name}") as connection:
        assert isinstance((await receive(connection)).message, SessionResumed)
        await connection.send(encode_client(Close()))
        last = (await receive_until(connection, SessionClosed))[-1].message
        assert isinstance(last, SessionClosed)
        return last.reason == "closed"


@pytest.mark.parametrize(
    "broken",
    [
        state(timeline=TimelineState(emotion="none of ours")),  # no `EmotionState`
        state(vad=VadState(is_speech=False, n_frames=7, n_run=0, speech_end=0, last_stop=0)),  # of no audio
        NO_FORMAT,
    ],
    ids=["voice", "vad", "rate"],
)
async def test_a_stream_that_cannot_go_on_costs_no_other(broken: SavedStream, tmp_path: Path) -> None:
    """It is closed, its name and slot are free, and the streams after it go on."""
    await leave(tmp_path, {"bad": broken, "good": state()})
    async with running_server(SLOTS, folder=tmp_path) as running:
        assert (await closed(running, "bad")).reason == "server_lost"
        async with running.stream("bad") as again:
            assert isinstance((await receive(again)).message, SessionCreated)
            assert await goes_on(running, "good")
        assert running.engine.n_restarts == 0


async def test_a_stream_that_cannot_be_read_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file fails at one of them alone: it is closed."""
    await leave(tmp_path, {"bad": state(), "good": state()})
    read = Store.saved

    def saved(store: Store, stream: int) -> bytes | None:
        if stream == 1:
            raise LogError("a bad sector")
        return read(store, stream)

    monkeypatch.setattr(Store, "saved", saved)
    async with running_server(SLOTS, folder=tmp_path) as running:
        assert (await closed(running, "bad")).reason == "server_lost"
        assert await goes_on(running, "good")


async def test_the_server_may_stop_while_it_closes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lets go of the stream; the next server closes it."""
    await leave(tmp_path, {"bad": NO_FORMAT})
    loop = asyncio.get_running_loop()
    is_reading, has_stopped = asyncio.Event(), threading.Event()
    stop, read = Streams.stop, Store.of_session

    def slow(store: Store, *question: Any) -> list[Row]:
        loop.call_soon_threadsafe(is_reading.set)
        assert has_stopped.wait(TIMEOUT_S)
        return read(store, *question)

    def stopped(streams: Streams) -> None:
        stop(streams)
        has_stopped.set()

    with monkeypatch.context() as patch:
        patch.setattr(Store, "of_session", slow)
        patch.setattr(Streams, "stop", stopped)
        async with asyncio.timeout(TIMEOUT_S), running_server(SLOTS, folder=tmp_path):
            await is_reading.wait()
    async with running_server(SLOTS, folder=tmp_path) as running:
        found = await closed(running, "bad")
    assert found == SessionClosed("server_lost", 0, 0, 0)


async def test_what_was_committed_is_counted_away_from_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be an hour of words, while other streams speak."""
    threads: list[str] = []

    def noted(frame: bytes) -> Envelope:
        threads.append(threading.current_thread().name)
        return decode(frame)

    monkeypatch.setattr("streaming.stream.recovery.decode", noted)
    await leave(tmp_path, {"bad": NO_FORMAT}, said=SAID)
    async with running_server(SLOTS, folder=tmp_path) as running:
        assert await closed(running, "bad") == SessionClosed("server_lost", 900, 2, 1)
    assert len(threads) == len(SAID)
    assert all(name.startswith("log-work") for name in threads)


async def test_words_that_cannot_be_read_are_not_counted(tmp_path: Path) -> None:
    """The stream is closed all the same."""
    await leave(tmp_path, {"bad": NO_FORMAT}, said=SAID)
    with closing(sqlite3.connect(tmp_path / "log.sqlite", isolation_level=None)) as database:
        database.execute("UPDATE messages SET frame = '{}' WHERE type = 'transcript.delta'")
    async with running_server(SLOTS, folder=tmp_path) as running:
        found = await closed(running, "bad", after=1 + len(SAID))
    assert found == SessionClosed("server_lost", 0, 0, 0)


def asked(*ids: str) -> tuple[PendingMark, ...]:
    """Questions without an answer, and a flush after them."""
    asks = [PendingMark(Mark("ask", 0, 0, "What was that?"), name) for name in ids]
    return (*asks, PendingMark(Mark("flush", 0, 0), "f"))


async def test_questions_to_another_model_are_refused(tmp_path: Path) -> None:
    """The next server's model answers none: the producer is told, the rest goes on, the engine lives."""
    await leave(tmp_path, {"a": state(pending=asked("q1", "q2"))})
    async with running_server(fault="answers_nothing", folder=tmp_path) as running:
        await restored(running, "a")
        async with running.stream("a", "resume=a&after=1") as connection:
            assert isinstance((await receive(connection)).message, SessionResumed)
            await connection.send(encode_client(Close()))
            found = [envelope.message for envelope in await receive_until(connection, SessionClosed)]
        assert running.engine.n_restarts == 0
    errors = [message for message in found if isinstance(message, Error)]
    assert [(error.code, error.message.split(":")[0], error.fatal) for error in errors] == [
        ("unsupported", "ask 'q1'", False),
        ("unsupported", "ask 'q2'", False),
    ]
    assert [message.id for message in found if isinstance(message, Flushed)] == ["f"]


async def test_questions_to_a_model_that_answers_are_answered(tmp_path: Path) -> None:
    """Nothing is left out."""
    await leave(tmp_path, {"a": state(pending=asked("q1"))})
    async with running_server(folder=tmp_path) as running:
        await restored(running, "a")
        async with running.stream("a", "resume=a&after=1") as connection:
            await connection.send(encode_client(Close()))
            found = [envelope.message for envelope in await receive_until(connection, SessionClosed)]
    assert [message.id for message in found if isinstance(message, AnswerFinal)] == ["q1"]
    assert not any(isinstance(message, Error) for message in found)


@pytest.mark.parametrize(
    ("languages", "expected"),
    [(("de", "en"), (None, "de")), (("cy",), ("cy", None)), ((), ("cy", "de"))],
    ids=["not set", "not settled", "no list"],
)
def test_a_language_that_the_model_does_not_know_is_detected(
    languages: tuple[str, ...], expected: tuple[str | None, str | None]
) -> None:
    """A model without a list takes any."""
    adapted, _ = for_model(state(language="cy", settled_language="de").session.feed, (), languages)
    assert (adapted.language, adapted.settled_language) == expected
    doubted = state(settled_language="de", doubt=LanguageDoubt("cy", 1.0, 0, 0)).session.feed
    assert (for_model(doubted, (), languages)[0].doubt is None) == bool(languages)
    assert for_model(state().session.feed, (), languages)[0] == state().session.feed
