"""Fan-out: every message of a stream to every reader of it, none waiting for another.

A reader's queue is bounded. An interim or an ack in it is replaced by the next one of its stream;
a logged message is never dropped: a reader that would lose one is over (`SlowReader`).
A reader that asks for the past reads the log, in its order and at its own pace, up to its end; there
it becomes live, in one turn of the event loop, so that nothing is missing or comes twice.
Nothing is encoded or decoded for a reader: a row carries the frame that is sent.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from streaming.aio import Changed
from streaming.errors import SlowReader
from streaming.log.log import Log
from streaming.log.row import Row, row_of
from streaming.log.store import Query
from streaming.patterns import Patterns
from streaming.protocol import UNLOGGED, Ack, Envelope, Lag, SessionClosed, Subscribe, TranscriptInterim

REPLACEABLE = frozenset({TranscriptInterim.type, Ack.type})
REPLAY_BATCH = 64  # messages read from the log at a time

_Key = tuple[str, str | int]  # stream, and the type of what is replaceable or a running number


class Hub:
    """Who reads which stream. Belongs to the event loop: no locks."""

    def __init__(self, log: Log, capacity: int) -> None:
        """Hand on what a log delivers.

        Args:
            log: Read by readers of the past.
            capacity: Messages that may wait for one reader.
        """
        self._log = log
        self._capacity = capacity
        self._by_name: dict[str, dict[Subscription, None]] = {}
        self._with_patterns: dict[Subscription, None] = {}
        self._found: dict[str, dict[Subscription, None]] = {}  # of live streams that spoke: their readers
        self._all: set[Subscription] = set()
        log.deliver_to(self.publish)

    def publish(self, row: Row) -> None:
        """Hand a message to every reader of its stream, without waiting."""
        readers = self._found.get(row.stream)
        if readers is None:
            readers = self._found[row.stream] = self._find(row.stream)
        for reader in readers:
            reader.publish(row)
        if row.type == SessionClosed.type:
            del self._found[row.stream]

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
        for name in reader.patterns.names:
            self._by_name.setdefault(name, {})[reader] = None
        if reader.patterns.has_patterns:
            self._with_patterns[reader] = None
        for name, readers in self._found.items():
            if reader.patterns.match(name):
                readers[reader] = None

    def _find(self, name: str) -> dict[Subscription, None]:
        found = dict(self._by_name.get(name, {}))
        return found | {reader: None for reader in self._with_patterns if reader.patterns.match(name)}

    def _leave(self, reader: Subscription) -> None:
        self._with_patterns.pop(reader, None)
        for readers in self._found.values():
            readers.pop(reader, None)
        for name in reader.patterns.names:
            readers = self._by_name.get(name, {})
            readers.pop(reader, None)
            if not readers:
                self._by_name.pop(name, None)


@dataclass(slots=True)
class _Replay:
    """How far a reader of the past is in the log."""

    after: int | Mapping[str, int]  # as it was asked for
    after_id: int | None = None  # of the message up to which it was read; None: not found out yet
    after_seq: int = 0  # of each stream: those up to it are not wanted
    seqs: dict[str, int] | None = None  # last `seq` read of each stream, where every type is wanted


class Subscription:
    """The messages of one reader, taken by iterating over it."""

    def __init__(self, log: Log, capacity: int) -> None:
        self.streams: tuple[str, ...] = ()  # names and patterns
        self.patterns = Patterns(())  # the same, to compare names with
        self.is_behind = asyncio.Event()  # set for ever once a message could not be queued
        self._log = log
        self._capacity = capacity
        self._types: frozenset[str] = frozenset()
        self._queue: OrderedDict[_Key, Row] = OrderedDict()
        self._n_put = 0
        self._replay: _Replay | None = None  # None: live
        self._batch: list[Row] = []  # newest first
        self._last: Row | None = None  # the newest logged message that was taken
        self._ids: tuple[int, tuple[int, ...]] = (-1, ())  # the log's generation, and `streams` in it
        self._news = Changed()
        self._is_closed = False

    @property
    def n_waiting(self) -> int:
        """Messages that wait for the reader, those still in the log left out."""
        return len(self._queue) + len(self._batch)

    def change(self, wanted: Subscribe) -> None:
        """Read other streams or types from here on; called by the hub."""
        self.streams = tuple(dict.fromkeys(wanted.streams))
        self.patterns = Patterns(self.streams)
        self._types = frozenset(wanted.types)
        self._batch.clear()
        self._ids = (-1, ())
        self._replay = None if wanted.after is None else self._replay_of(wanted.after)
        if self._last is not None and not self.patterns.match(self._last.stream):
            self._last = None
        self._news.notify()

    def publish(self, row: Row) -> None:
        """Queue a message of a stream, unless the replay will find it in the log."""
        if self._replay is None and self._wants(row):
            self._put(row)

    def put(self, envelope: Envelope) -> None:
        """Queue a message for this reader alone, or declare it too slow."""
        self._put(row_of(envelope))

    def close(self) -> None:
        """Nothing follows: iterating ends after what is queued."""
        self._is_closed = True
        self._news.notify()

    def lag(self) -> Envelope:
        """What is sent to a reader that is behind, with the message after which it may resume."""
        if self._last is not None:
            return Envelope(self._last.stream, self._last.seq, Lag(self.n_waiting))
        return Envelope(self.streams[0] if len(self.streams) == 1 else "", 0, Lag(self.n_waiting))

    async def __aiter__(self) -> AsyncIterator[Row]:
        """The messages in order, until closed.

        Raises:
            SlowReader: the reader fell so far behind that it would lose a logged message.
        """
        while True:
            row = await self._next()
            if row is not None:
                if row.type not in UNLOGGED:
                    self._last = row
                yield row
            elif self._is_closed:
                return
            else:
                await self._news.wait_for(self._has_news)

    def _has_news(self) -> bool:
        return bool(self._queue or self._replay or self._is_closed or self.is_behind.is_set())

    def _put(self, row: Row) -> None:
        self._n_put += 1
        key = (row.stream, row.type if row.type in REPLACEABLE else self._n_put)
        self._queue.pop(key, None)  # a newer interim comes after what was said in between
        if len(self._queue) >= self._capacity:
            self.is_behind.set()
        else:
            self._queue[key] = row
        self._news.notify()

    async def _next(self) -> Row | None:
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
        if len(self.streams) == 1 and not self.patterns.has_patterns:
            after = after if after <= self._log.directory.last_seq(self.streams[0]) else 0
        return _Replay(after, 0, after, seqs)

    async def _read_on(self, replay: _Replay) -> None:
        """Read on in the log; at its end the reader is live, with nothing awaited in between."""
        reader = self._log.reader
        # 1. Find where it begins.
        if replay.after_id is None:
            assert not isinstance(replay.after, int), replay
            ((name, seq),) = replay.after.items()
            replay.after_id = await reader.id_of(name, seq) or 0
            return
        # 2. From where memory goes back to, all that is left of it is there: the reader is live.
        recent = self._log.recent(replay.after_id)
        if recent is not None:
            if self._replay is replay:  # else it was replaced while something was read
                self._batch = self._asked([row for _, row in recent], replay)
                self._replay = None
            return
        # 3. Else read a batch. Streams that begin while ids are found have their messages after `upto`.
        before, trimmed, upto = replay.after_id, self._log.trimmed, self._log.published
        ids = await self._stream_ids(replay)
        query = Query(before, upto, ids, tuple(self._types), replay.after_seq)
        page = await reader.page(query, REPLAY_BATCH)
        replay.after_id = page.upto_id
        if self._log.trimmed != trimmed and self._log.trimmed > before > 0:
            raise SlowReader("messages left the log before they were read")
        self._check_gaps(replay, page.rows)
        if self._replay is replay:
            self._batch = list(reversed(page.rows))

    def _check_gaps(self, replay: _Replay, rows: Sequence[Row]) -> None:
        """What the reader would lose in the middle of a replay is not skipped in silence."""
        if replay.seqs is None:
            return
        for row in rows:
            last = replay.seqs.get(row.stream, row.seq - 1)
            if row.seq != last + 1:
                raise SlowReader(f"messages {last + 1} to {row.seq - 1} left the log before they were read")
            replay.seqs[row.stream] = row.seq

    async def _stream_ids(self, replay: _Replay) -> tuple[int, ...]:
        generation = self._log.directory.generation
        if self._ids[0] == generation:
            return self._ids[1]
        ids = await self._log.reader.ids(self.patterns)
        if self._replay is replay:
            self._ids = (generation, ids)
        return ids

    def _asked(self, rows: Sequence[Row], replay: _Replay) -> list[Row]:
        """Those of the newest rows of all streams that a replay is about, newest first."""
        is_read = {name: self.patterns.match(name) for name in {row.stream for row in rows}}
        return [
            row
            for row in reversed(rows)
            if is_read[row.stream] and row.seq > replay.after_seq and self._wants(row)
        ]

    def _wants(self, row: Row) -> bool:
        return not self._types or row.type in self._types
