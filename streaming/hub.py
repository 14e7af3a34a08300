"""Fan-out: every message of a stream to every reader of it, none waiting for another.

A reader's queue is bounded. An interim or an ack in it is replaced by the next one of its stream;
a logged message is never dropped: a reader that would lose one is over (`SlowReader`).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from streaming.errors import SlowReader
from streaming.log import Log
from streaming.protocol import Ack, Envelope, Lag, Subscribe, TranscriptInterim

REPLACEABLE = frozenset({TranscriptInterim.type, Ack.type})
_REPLAY_BATCH = 64  # messages read from the log at a time

_Key = tuple[str, str | int]  # stream, and the type of what is replaceable or a running number


class Hub:
    """Who reads which stream. Belongs to the event loop: no locks."""

    def __init__(self, log: Log, capacity: int) -> None:
        self._log = log
        self._capacity = capacity  # messages that may wait for one reader
        self._readers: dict[str, dict[Subscription, None]] = {}
        self._all: set[Subscription] = set()

    def publish(self, envelope: Envelope) -> None:
        """Hand a message to every reader of its stream, without waiting."""
        for reader in self._readers.get(envelope.stream, ()):
            reader.publish(envelope)

    @contextmanager
    def subscription(self) -> Iterator[Subscription]:
        """A reader of nothing yet, forgotten on exit."""
        reader = Subscription(self._log, self._capacity)
        self._all.add(reader)
        try:
            yield reader
        finally:
            self._all.remove(reader)
            self._leave(reader)

    def depths(self) -> list[int]:
        """How many messages wait for each reader, producers among them."""
        return [reader.n_waiting for reader in self._all]

    def subscribe(self, reader: Subscription, wanted: Subscribe) -> None:
        """Change what a reader reads; what already waits for it is still delivered.

        With `after`, the logged messages after that `seq` come first, from the oldest that is kept;
        an `after` that the log never reached replays all of it, because the stream is a new one.
        """
        self._leave(reader)
        reader.change(wanted)
        for name in wanted.streams:
            self._readers.setdefault(name, {})[reader] = None

    def _leave(self, reader: Subscription) -> None:
        for name in reader.streams:
            readers = self._readers.get(name, {})
            readers.pop(reader, None)
            if not readers:
                self._readers.pop(name, None)


class Subscription:
    """The messages of one reader, taken by iterating over it."""

    def __init__(self, log: Log, capacity: int) -> None:
        self.streams: tuple[str, ...] = ()
        self.is_behind = asyncio.Event()  # set for ever once a message could not be queued
        self._log = log
        self._capacity = capacity
        self._types: frozenset[str] = frozenset()
        self._queue: OrderedDict[_Key, Envelope] = OrderedDict()
        self._n_put = 0
        self._replays: dict[str, int] = {}  # streams read from the log, and the `seq` they are at
        self._started: set[str] = set()  # replays that gave something: from there on no hole may appear
        self._batch: list[Envelope] = []  # newest first
        self._delivered: dict[str, int] = {}
        self._has_news = asyncio.Event()
        self._is_closed = False

    @property
    def n_waiting(self) -> int:
        """Messages that wait for the reader, those still in the log left out."""
        return len(self._queue) + len(self._batch)

    def change(self, wanted: Subscribe) -> None:
        """Read other streams or types from here on; called by the hub."""
        self.streams = tuple(dict.fromkeys(wanted.streams))
        self._types = frozenset(wanted.types)
        self._batch.clear()
        self._started.clear()
        self._replays = {}
        if wanted.after is not None:
            for name in self.streams:
                self._replays[name] = wanted.after if wanted.after <= self._log.last_seq(name) else 0
        self._delivered = {name: seq for name, seq in self._delivered.items() if name in self.streams}
        self._has_news.set()

    def publish(self, envelope: Envelope) -> None:
        """Queue a message of a stream, unless the replay will find it in the log."""
        if envelope.stream not in self._replays and self._wants(envelope):
            self.put(envelope)

    def put(self, envelope: Envelope) -> None:
        """Queue a message for this reader alone, or declare it too slow."""
        kind = envelope.message.type
        self._n_put += 1
        key = (envelope.stream, kind if kind in REPLACEABLE else self._n_put)
        self._queue.pop(key, None)  # a newer interim comes after what was said in between
        if len(self._queue) >= self._capacity:
            self.is_behind.set()
        else:
            self._queue[key] = envelope
        self._has_news.set()

    def close(self) -> None:
        """Nothing follows: iterating ends after what is queued."""
        self._is_closed = True
        self._has_news.set()

    def lag(self) -> Envelope:
        """What a reader that is behind is told, with the `seq` after which it may resume."""
        name = self.streams[0] if len(self.streams) == 1 else ""
        return Envelope(name, self._delivered.get(name, 0), Lag(self.n_waiting))

    async def __aiter__(self) -> AsyncIterator[Envelope]:
        """The messages in order, until closed.

        Raises:
            SlowReader: the reader fell so far behind that it would lose a logged message.
        """
        while True:
            envelope = self._next()
            if envelope is not None:
                self._delivered[envelope.stream] = envelope.seq
                yield envelope
            elif self._is_closed:
                return
            else:
                self._has_news.clear()
                await self._has_news.wait()

    def _next(self) -> Envelope | None:
        if self.is_behind.is_set():
            raise SlowReader(f"{self.n_waiting} messages waited, at most {self._capacity} may")
        while self._replays and not self._batch:
            self._read_log(next(iter(self._replays)))
        if self._batch:
            return self._batch.pop()
        return self._queue.popitem(last=False)[1] if self._queue else None

    def _read_log(self, name: str) -> None:
        """Read on in the log; at its end the stream is live, with nothing awaited in between."""
        seq = self._replays[name]
        found = self._log.after(name, seq, _REPLAY_BATCH)
        if not found:
            del self._replays[name]
            return
        if name in self._started and found[0].seq != seq + 1:
            raise SlowReader(f"messages {seq + 1} to {found[0].seq - 1} left the log before they were read")
        self._started.add(name)
        self._replays[name] = found[-1].seq
        self._batch = [envelope for envelope in reversed(found) if self._wants(envelope)]

    def _wants(self, envelope: Envelope) -> bool:
        return not self._types or envelope.message.type in self._types
