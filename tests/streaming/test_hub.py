"""Fan-out: bounded, in order, nobody waits for another."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.config import LogConfig
from streaming.errors import SlowReader
from streaming.hub import Hub, Subscription
from streaming.log import Log
from streaming.protocol import Ack, Envelope, Flushed, Lag, Message, Subscribe, TranscriptInterim


class Source:
    """A log with streams "a" and "b", and a hub on it."""

    def __init__(self, capacity: int, history: int = 1000) -> None:
        self.log = Log(LogConfig(history=history))
        self.hub = Hub(self.log, capacity)
        for name in ("a", "b"):
            self.log.open(name)

    def say(self, name: str, message: Message) -> None:
        """What a session's outlet does."""
        self.hub.publish(self.log.append(name, message))

    def say_many(self, name: str, n_messages: int) -> None:
        """Logged messages."""
        for i in range(n_messages):
            self.say(name, Flushed(str(i), i))


async def rest(reader: Subscription) -> list[Envelope]:
    """What still comes when nothing more is said."""
    reader.close()
    return [envelope async for envelope in reader]


async def take(reader: Subscription, n_messages: int) -> list[Envelope]:
    """The next messages."""
    found: list[Envelope] = []
    if n_messages:
        async for envelope in reader:
            found.append(envelope)
            if len(found) == n_messages:
                break
    return found


@given(
    kinds=st.lists(st.sampled_from("ifk"), max_size=60),
    after=st.one_of(st.none(), st.integers(0, 20)),
    n_before=st.integers(0, 20),
    reads=st.lists(st.integers(0, 60), max_size=8),
)
def test_a_reader_sees_every_logged_message_once_and_in_order(
    kinds: list[str], after: int | None, n_before: int, reads: list[int]
) -> None:
    """Replay then live, however reading and speaking alternate; interims only ever in their place."""

    async def check() -> None:
        source = Source(capacity=200)
        source.say_many("a", n_before)
        with source.hub.subscription() as reader:
            source.hub.subscribe(reader, Subscribe(("a",), after=after))
            found: list[Envelope] = []
            for i, kind in enumerate(kinds):
                message: Message = TranscriptInterim(str(i), 0, 0) if kind == "i" else Flushed(str(i), i)
                source.say("a", Ack(i, i) if kind == "k" else message)
                if i in reads and (reader.n_waiting or (after is not None and not found)):
                    found += await take(reader, min(1, reader.n_waiting))
            found += await rest(reader)
        first = n_before if after is None else (after if after <= n_before else 0)
        logged = [e.seq for e in found if isinstance(e.message, Flushed)]
        assert logged == list(range(first + 1, source.log.last_seq("a") + 1))
        assert all(a.seq <= b.seq for a, b in pairwise(found))
        interims = [int(e.message.text) for e in found if isinstance(e.message, TranscriptInterim)]
        assert interims == sorted(set(interims))

    asyncio.run(check())


async def test_an_interim_is_replaced_where_the_newest_belongs() -> None:
    """After the delta that was said in between, and never twice; each stream has its own."""
    source = Source(capacity=3)
    with source.hub.subscription() as reader:
        source.hub.subscribe(reader, Subscribe(("a", "b")))
        source.say("b", TranscriptInterim("b", 0, 0))
        source.say("a", TranscriptInterim("old", 0, 0))
        source.say("a", Flushed("between", 0))
        for i in range(1000):
            source.say("a", TranscriptInterim(f"new {i}", 0, 0))
        messages = [envelope.message for envelope in await rest(reader)]
    assert messages == [
        TranscriptInterim("b", 0, 0),
        Flushed("between", 0),
        TranscriptInterim("new 999", 0, 0),
    ]


async def test_a_slow_reader_is_over_and_delays_nobody() -> None:
    """It is told how far behind it was and after which `seq` it may resume; the fast one has all."""
    source = Source(capacity=20)
    with source.hub.subscription() as slow, source.hub.subscription() as fast:
        for reader in (slow, fast):
            source.hub.subscribe(reader, Subscribe(("a",)))
        source.say_many("a", 5)
        assert [e.seq for e in await take(slow, 3)] == [1, 2, 3]
        seen = []
        for _ in range(10):
            seen += await take(fast, fast.n_waiting)
            source.say_many("a", 10)
        seen += await rest(fast)
        assert [e.seq for e in seen] == list(range(1, 106))
        assert slow.is_behind.is_set()
        with pytest.raises(SlowReader):
            await rest(slow)
        assert slow.lag() == Envelope("a", 3, Lag(20))


async def test_a_replay_longer_than_the_queue_does_not_overflow() -> None:
    """It is read from the log at the reader's pace; live messages of the stream stay there meanwhile."""
    source = Source(capacity=16)
    source.say_many("a", 500)
    with source.hub.subscription() as reader:
        source.hub.subscribe(reader, Subscribe(("a",), after=100))
        found = await take(reader, 10)
        source.say_many("a", 50)
        found += await rest(reader)
    assert [e.seq for e in found] == list(range(101, 551))


async def test_a_reader_overtaken_by_the_end_of_the_log_is_over() -> None:
    """What it would lose in the middle of a replay is not skipped in silence."""
    source = Source(capacity=16, history=100)
    source.say_many("a", 300)
    with source.hub.subscription() as reader:
        source.hub.subscribe(reader, Subscribe(("a",), after=0))
        assert (await take(reader, 1))[0].seq == 201  # the log begins there: a jump a reader can see
        source.say_many("a", 200)
        with pytest.raises(SlowReader):
            await rest(reader)


async def test_types_choose_what_is_read() -> None:
    """In replay and live."""
    source = Source(capacity=16)
    source.say_many("a", 2)
    with source.hub.subscription() as reader:
        source.hub.subscribe(reader, Subscribe(("a",), ("transcript.interim",), after=0))
        assert await take(reader, 0) == []
        source.say_many("a", 100)
        reader.close()
        assert [envelope async for envelope in reader] == []


async def test_a_reader_that_leaves_is_forgotten() -> None:
    """Nothing is queued for it any more."""
    source = Source(capacity=16)
    with source.hub.subscription() as reader:
        source.hub.subscribe(reader, Subscribe(("a",)))
    source.say_many("a", 1)
    assert reader.n_waiting == 0
