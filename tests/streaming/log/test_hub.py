"""Fan-out: bounded, in order, nobody waits for another."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.config import LogConfig
from streaming.errors import SlowReader
from streaming.log.hub import REPLAY_BATCH, Hub, Subscription
from streaming.log.log import Log
from streaming.patterns import Patterns
from streaming.protocol import (
    Ack,
    Envelope,
    Flushed,
    Lag,
    Message,
    SessionClosed,
    Subscribe,
    TranscriptInterim,
    decode,
)
from tests.streaming.support import TIMEOUT_S


class Source:
    """A log with streams "a" and "b", and a hub on it."""

    def __init__(self, path: Path, capacity: int, n_recent: int) -> None:
        self.path = path
        self.log = Log(LogConfig(path=str(path)), lambda: 0, n_recent=n_recent)
        self.hub = Hub(self.log, capacity)

    async def say(self, name: str, message: Message) -> None:
        """What a session's outlet does, up to where readers have it."""
        self.log.append(name, message)
        await self.log.settled()

    async def say_many(self, name: str, n_messages: int) -> None:
        """Logged messages."""
        for i in range(n_messages):
            self.log.append(name, Flushed(str(i), i))
        await self.log.settled()


@asynccontextmanager
async def source(capacity: int, n_recent: int = 0) -> AsyncIterator[Source]:
    """One that runs; readers of the past read the file, unless the newest messages are kept in memory."""
    with TemporaryDirectory() as folder:
        it = Source(Path(folder) / "log.sqlite", capacity, n_recent)
        async with asyncio.timeout(TIMEOUT_S), it.log.running():
            for name in ("a", "b"):
                it.log.open(name)
            yield it


async def rest(reader: Subscription) -> list[Envelope]:
    """What still comes when nothing more is said."""
    reader.close()
    return [decode(row.frame) async for row in reader]


async def take(reader: Subscription, n_messages: int) -> list[Envelope]:
    """The next messages."""
    found: list[Envelope] = []
    if n_messages:
        async for row in reader:
            found.append(decode(row.frame))
            if len(found) == n_messages:
                break
    return found


@settings(max_examples=30)
@given(
    kinds=st.lists(st.sampled_from("ifk"), max_size=60),
    after=st.one_of(st.none(), st.integers(0, 20)),
    n_before=st.integers(0, 20),
    reads=st.lists(st.integers(0, 60), max_size=8),
    n_recent=st.sampled_from([0, 3, 1000]),
)
def test_a_reader_sees_every_logged_message_once_and_in_order(
    kinds: list[str], after: int | None, n_before: int, reads: list[int], n_recent: int
) -> None:
    """Replay then live, however reading and speaking alternate; interims only ever in their place."""

    async def check() -> None:
        async with source(200, n_recent) as it:
            await it.say_many("a", n_before)
            with it.hub.subscription() as reader:
                it.hub.subscribe(reader, Subscribe(("a",), after=after))
                found: list[Envelope] = []
                for i, kind in enumerate(kinds):
                    message: Message = TranscriptInterim(str(i), 0, 0) if kind == "i" else Flushed(str(i), i)
                    await it.say("a", Ack(i, i) if kind == "k" else message)
                    if i in reads and reader.n_waiting:
                        found += await take(reader, 1)
                found += await rest(reader)
            last = it.log.directory.last_seq("a")
        first = n_before if after is None else (after if after <= n_before else 0)
        logged = [e.seq for e in found if isinstance(e.message, Flushed)]
        assert logged == list(range(first + 1, last + 1))
        assert all(a.seq <= b.seq for a, b in pairwise(found))
        interims = [int(e.message.text) for e in found if isinstance(e.message, TranscriptInterim)]
        assert interims == sorted(set(interims))

    asyncio.run(check())


async def test_an_interim_is_replaced_where_the_newest_belongs() -> None:
    """After the delta that was said in between, and never twice; each stream has its own."""
    async with source(capacity=3) as it:
        with it.hub.subscription() as reader:
            it.hub.subscribe(reader, Subscribe(("a", "b")))
            await it.say("b", TranscriptInterim("b", 0, 0))
            await it.say("a", TranscriptInterim("old", 0, 0))
            await it.say("a", Flushed("between", 0))
            for i in range(1000):
                await it.say("a", TranscriptInterim(f"new {i}", 0, 0))
            messages = [envelope.message for envelope in await rest(reader)]
    assert messages == [
        TranscriptInterim("b", 0, 0),
        Flushed("between", 0),
        TranscriptInterim("new 999", 0, 0),
    ]


async def test_a_slow_reader_is_over_and_delays_nobody() -> None:
    """It is told how far behind it was and after which `seq` it may resume; the fast one has all."""
    async with source(capacity=20) as it:
        with it.hub.subscription() as slow, it.hub.subscription() as fast:
            for reader in (slow, fast):
                it.hub.subscribe(reader, Subscribe(("a",)))
            await it.say_many("a", 5)
            assert [e.seq for e in await take(slow, 3)] == [1, 2, 3]
            seen = []
            for _ in range(10):
                seen += await take(fast, fast.n_waiting)
                await it.say_many("a", 10)
            seen += await rest(fast)
            assert [e.seq for e in seen] == list(range(1, 106))
            assert slow.is_behind.is_set()
            with pytest.raises(SlowReader):
                await rest(slow)
            session = it.log.directory["a"].session_id
            assert slow.lag() == Envelope("a", 3, Lag(20), session)


async def test_a_replay_longer_than_the_queue_does_not_overflow() -> None:
    """It is read from the log at the reader's pace; live messages of the stream stay there meanwhile."""
    async with source(capacity=16) as it:
        await it.say_many("a", 500)
        with it.hub.subscription() as reader:
            it.hub.subscribe(reader, Subscribe(("a",), after=100))
            found = await take(reader, 10)
            await it.say_many("a", 50)
            found += await rest(reader)
    assert [e.seq for e in found] == list(range(101, 551))


async def test_a_reader_overtaken_by_retention_is_over() -> None:
    """What it would lose in the middle of a replay is not skipped in silence."""
    async with source(capacity=16) as it:
        await it.say_many("a", 5 * REPLAY_BATCH)
        with it.hub.subscription() as reader:
            it.hub.subscribe(reader, Subscribe(("a",), after=0))
            assert (await take(reader, 1))[0].seq == 1
            with closing(sqlite3.connect(it.path, isolation_level=None)) as other:
                other.execute("DELETE FROM messages WHERE seq < ?", (3 * REPLAY_BATCH,))
            with pytest.raises(SlowReader, match="left the log"):
                await rest(reader)


async def test_types_choose_what_is_read() -> None:
    """In replay and live."""
    async with source(capacity=16) as it:
        await it.say_many("a", 2)
        with it.hub.subscription() as reader:
            it.hub.subscribe(reader, Subscribe(("a",), ("transcript.interim",), after=0))
            assert await take(reader, 0) == []
            await it.say_many("a", 100)
            reader.close()
            assert [row async for row in reader] == []


async def test_a_reader_that_leaves_is_forgotten() -> None:
    """Nothing is queued for it any more."""
    async with source(capacity=16) as it:
        with it.hub.subscription() as reader:
            it.hub.subscribe(reader, Subscribe(("a", "b*")))
        await it.say_many("a", 1)
        await it.say_many("b", 1)
        assert reader.n_waiting == 0


async def test_a_pattern_picks_up_streams_that_begin_later() -> None:
    """And no others; a name and a pattern that mean the same stream give it once."""
    async with source(capacity=16) as it:
        with it.hub.subscription() as reader:
            it.hub.subscribe(reader, Subscribe(("room-*", "room-1")))
            for name in ("room-1", "room", "room-22"):
                it.log.open(name)
                await it.say_many(name, 1)
            await it.say_many("a", 1)
            assert [(e.stream, e.seq) for e in await rest(reader)] == [("room-1", 1), ("room-22", 1)]


@settings(max_examples=20)
@given(
    said=st.lists(st.sampled_from("abcd"), min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    n_recent=st.sampled_from([0, 1000]),
)
def test_many_streams_are_resumed_after_the_last_message_of_any(
    said: list[str], cuts: list[int], n_recent: int
) -> None:
    """However often the reader is lost, also in the middle of a replay, it has every message once."""

    async def check() -> None:
        async with source(200, n_recent) as it:
            it.log.open("c")
            found: list[Envelope] = []
            after: int | dict[str, int] = 0
            for begin, end in pairwise(sorted({0, *(cut for cut in cuts if cut < len(said)), len(said)})):
                for name in said[begin:end]:
                    if not it.log.directory.has(name):  # "d" begins late
                        it.log.open(name)
                    await it.say(name, Flushed(name, 0))
                with it.hub.subscription() as reader:
                    it.hub.subscribe(reader, Subscribe(("*",), after=after))
                    found += await take(reader, (end - begin + 1) // 2)
                if found:
                    after = {found[-1].stream: found[-1].seq}
            with it.hub.subscription() as reader:
                it.hub.subscribe(reader, Subscribe(("*",), after=after))
                found += await rest(reader)
            assert [e.stream for e in found] == said

    asyncio.run(check())


async def test_patterns_are_compared_with_many_streams_away_from_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the loop compares does not grow with the number of streams that the log keeps."""
    compared: Counter[str] = Counter()
    match = Patterns.match

    def noted(patterns: Patterns, name: str) -> bool:
        compared[threading.current_thread().name.partition("_")[0]] += 1
        return match(patterns, name)

    async with source(capacity=16) as it:
        for i in range(300):
            it.log.open(f"s{i}")
            it.log.append(f"s{i}", SessionClosed("closed", 0, 0, 0))
            it.log.close(f"s{i}")
        await it.log.settled()
        monkeypatch.setattr(Patterns, "match", noted)
        with it.hub.subscription() as reader:
            it.hub.subscribe(reader, Subscribe(tuple(f"*{i}" for i in range(10)), after=0))
            assert len(await rest(reader)) == 300
        assert compared["log-work"] == 302
        assert compared["MainThread"] < 10


async def test_a_reader_that_comes_or_goes_leaves_other_streams_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who reads a stream is looked for once in its life, whatever other readers do."""
    compared: list[str] = []
    match = Patterns.match

    def noted(patterns: Patterns, name: str) -> bool:
        compared.append(name)
        return match(patterns, name)

    async with source(capacity=16) as it:
        await it.say_many("a", 1)
        await it.say_many("b", 1)
        with it.hub.subscription() as one, it.hub.subscription() as other:
            it.hub.subscribe(one, Subscribe(("a", "c")))
            it.hub.subscribe(other, Subscribe(("*",)))
            await it.say_many("a", 1)
            with it.hub.subscription() as third:
                it.hub.subscribe(third, Subscribe(("*",)))
            it.hub.subscribe(other, Subscribe(("b*",)))
            monkeypatch.setattr(Patterns, "match", noted)
            await it.say_many("a", 1)
            await it.say_many("b", 1)
            assert compared == []
            assert [(e.stream, e.seq) for e in await rest(one)] == [("a", 2), ("a", 3)]
            assert [(e.stream, e.seq) for e in await rest(other)] == [("a", 2), ("b", 2)]
