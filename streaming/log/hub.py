"""Fan-out: every message of a stream to every reader of it, none waiting for another.

A reader's queue is bounded. An interim or an ack in it is replaced by the next one of its stream;
a logged message is never dropped: a reader that would lose one is over (`SlowReader`).
A reader that asks for the past reads the log, in its order and at its own pace, up to its end; there
it becomes live, in one turn of the event loop, so that nothing is missing or comes twice.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from streaming.errors import SlowReader
from streaming.log.log import Log
from streaming.log.store import Query
from streaming.protocol import (
    UNLOGGED,
    Ack,
    Envelope,
    Lag,
    Subscribe,
    TranscriptInterim,
    is_pattern,
    matches,
)

REPLACEABLE = frozenset({TranscriptInterim.type, Ack.type})
REPLAY_BATCH = 64  # messages read from the log at a time
MAX_KNOWN = 10_000  # streams whose readers are remembered; then they are found anew

_Key = tuple[str, str | int]  # stream, and the type of what is replaceable or a running number


class Hub:
    """Who reads which stream. Belongs to the event loop: no locks."""

    def __init__(self, log: Log, capacity: int) -> None:
        self._log = log
        self._capacity = capacity  # messages that may wait for one reader
        self._by_name: dict[str, dict[Subscription, None]] = {}
        self._with_patterns: dict[Subscription, None] = {}
        self._known: dict[str, tuple[Subscription, ...]] = {}  # of streams that spoke: found readers
        self._all: set[Subscription] = set()

    def publish(self, envelope: Envelope) -> None:
        """Hand a message to every reader of its stream, without waiting."""
        readers = self._known.get(envelope.stream)
        if readers is None:
            readers = self._find(envelope.stream)
        for reader in readers:
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

        With `after`, logged messages come first, as `Subscribe` says. An `after` that a stream's log
        never reached replays all of it, because the stream is a new one.
        """
        self._leave(reader)
        reader.change(wanted)
        for name in wanted.streams:
            if is_pattern(name):
                self._with_patterns[reader] = None
            else:
                self._by_name.setdefault(name, {})[reader] = None

    def _find(self, name: str) -> tuple[Subscription, ...]:
        found = dict(self._by_name.get(name, {}))
        found |= {reader: None for reader in self._with_patterns if reader.reads(name)}
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known[name] = tuple(found)
        return self._known[name]

    def _leave(self, reader: Subscription) -> None:
        self._known.clear()
        self._with_patterns.pop(reader, None)
        for name in reader.streams:
            readers = self._by_name.get(name, {})
            readers.pop(reader, None)
            if not readers:
                self._by_name.pop(name, None)


@dataclass(slots=True)
class _Replay:
    """Where a reader of the past is in the log."""

    after: int | Mapping[str, int]  # as it was asked for
    at: int | None = None  # place up to which it was read; None: not found out yet
    after_seq: int = 0  # of each stream: those up to it are not wanted
    seqs: dict[str, int] | None = None  # last `seq` read of each stream, where every type is wanted


class Subscription:
    """The messages of one reader, taken by iterating over it."""

    def __init__(self, log: Log, capacity: int) -> None:
        self.streams: tuple[str, ...] = ()  # names and patterns
        self.is_behind = asyncio.Event()  # set for ever once a message could not be queued
        self._log = log
        self._capacity = capacity
        self._types: frozenset[str] = frozenset()
        self._queue: OrderedDict[_Key, Envelope] = OrderedDict()
        self._n_put = 0
        self._replay: _Replay | None = None  # None: live
        self._batch: list[Envelope] = []  # newest first
        self._last: Envelope | None = None  # the newest logged message that was taken
        self._ids: tuple[int, tuple[int, ...]] = (-1, ())  # the log's generation, and `streams` in it
        self._has_news = asyncio.Event()
        self._is_closed = False

    @property
    def n_waiting(self) -> int:
        """Messages that wait for the reader, those still in the log left out."""
        return len(self._queue) + len(self._batch)

    def reads(self, name: str) -> bool:
        """Whether a stream is one of those that are read."""
        return any(matches(wanted, name) for wanted in self.streams)

    def change(self, wanted: Subscribe) -> None:
        """Read other streams or types from here on; called by the hub."""
        self.streams = tuple(dict.fromkeys(wanted.streams))
        self._types = frozenset(wanted.types)
        self._batch.clear()
        self._ids = (-1, ())
        self._replay = None if wanted.after is None else self._replay_of(wanted.after)
        if self._last is not None and not self.reads(self._last.stream):
            self._last = None
        self._has_news.set()

    def publish(self, envelope: Envelope) -> None:
        """Queue a message of a stream, unless the replay will find it in the log."""
        if self._replay is None and self._wants(envelope):
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
        """What a reader that is behind is told, at the message after which it may resume."""
        if self._last is not None:
            return Envelope(self._last.stream, self._last.seq, Lag(self.n_waiting))
        return Envelope(self.streams[0] if len(self.streams) == 1 else "", 0, Lag(self.n_waiting))

    async def __aiter__(self) -> AsyncIterator[Envelope]:
        """The messages in order, until closed.

        Raises:
            SlowReader: the reader fell so far behind that it would lose a logged message.
        """
        while True:
            envelope = await self._next()
            if envelope is not None:
                if envelope.message.type not in UNLOGGED:
                    self._last = envelope
                yield envelope
            elif self._is_closed:
                return
            else:
                self._has_news.clear()
                await self._has_news.wait()

    async def _next(self) -> Envelope | None:
        if self.is_behind.is_set():
            raise SlowReader(f"{self.n_waiting} messages waited, at most {self._capacity} may")
        while self._replay is not None and not self._batch:
            await self._read_on(self._replay)
        if self._batch:
            return self._batch.pop()
        return self._queue.popitem(last=False)[1] if self._queue else None

    def _replay_of(self, after: int | Mapping[str, int]) -> _Replay:
        seqs = None if self._types else dict[str, int]()
        if not isinstance(after, int):
            return _Replay(after, seqs=seqs)
        if len(self.streams) == 1 and not is_pattern(self.streams[0]):
            after = after if after <= self._log.last_seq(self.streams[0]) else 0
        return _Replay(after, 0, after, seqs)

    async def _read_on(self, replay: _Replay) -> None:
        """Read on in the log; at its end the reader is live, with nothing awaited in between."""
        if replay.at is None:
            assert not isinstance(replay.after, int), replay
            ((name, seq),) = replay.after.items()
            replay.at = await self._log.place(name, seq) or 0
            return
        found = self._log.recent(replay.at)
        if found is not None:
            if self._replay is replay:  # else it was replaced while the place was looked for
                self._batch = [e for _, e in reversed(found) if self._is_asked(replay, e)]
                self._replay = None
            return
        before = replay.at
        trimmed = self._log.trimmed
        query = Query(before, self._log.published, self._stream_ids(), tuple(self._types), replay.after_seq)
        envelopes, replay.at = await self._log.read(query, REPLAY_BATCH)
        if self._log.trimmed != trimmed and self._log.trimmed > before > 0:
            raise SlowReader("messages left the log before they were read")
        self._check_gaps(replay, envelopes)
        if self._replay is replay:
            self._batch = [e for e in reversed(envelopes) if self._is_asked(replay, e)]

    def _check_gaps(self, replay: _Replay, envelopes: list[Envelope]) -> None:
        """What the reader would lose in the middle of a replay is not skipped in silence."""
        if replay.seqs is None:
            return
        for envelope in envelopes:
            last = replay.seqs.get(envelope.stream, envelope.seq - 1)
            if envelope.seq != last + 1:
                raise SlowReader(
                    f"messages {last + 1} to {envelope.seq - 1} left the log before they were read"
                )
            replay.seqs[envelope.stream] = envelope.seq

    def _stream_ids(self) -> tuple[int, ...]:
        if self._ids[0] != self._log.generation:
            self._ids = (self._log.generation, self._log.ids(self.streams))
        return self._ids[1]

    def _is_asked(self, replay: _Replay, envelope: Envelope) -> bool:
        return self.reads(envelope.stream) and envelope.seq > replay.after_seq and self._wants(envelope)

    def _wants(self, envelope: Envelope) -> bool:
        return not self._types or envelope.message.type in self._types
