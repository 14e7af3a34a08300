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
from streaming.log.directory import Span
from streaming.log.log import Log
from streaming.log.row import Row, row_of
from streaming.log.store import Query
from streaming.patterns import Patterns
from streaming.protocol import (
    AFTER_LIVE,
    MAX_SEQ,
    UNLOGGED,
    Ack,
    Envelope,
    Lag,
    SessionClosed,
    Subscribe,
    Subscribed,
    TranscriptInterim,
    decode,
)

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

    def subscribe(self, reader: Subscription, wanted: Subscribe, only: Span | None = None) -> None:
        """Change what a reader reads; what already waits for it is still delivered.

        With `after`, logged messages come first, as `Subscribe` says. An `after` that a stream's log
        never reached, or of another log, replays all of it, because the stream is a new one.

        Args:
            reader: Of this hub.
            wanted: Its request.
            only: The one session that is read, of the one stream; None: all of each stream.
        """
        self._leave(reader)
        reader.change(wanted, only)
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

    position: Mapping[str, int]  # a message that was read; or of each stream the last that is not wanted
    is_resumed: bool = False  # it is the former
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
        self._follows = True  # it goes on when what it reads is over
        self._only: Span | None = None  # the session that it reads; None: all of them
        self._low: Mapping[str, int] = {}  # of streams: the last `seq` that is not wanted
        self._high = MAX_SEQ  # the last `seq` that is wanted
        self._may_be_over = False  # what it reads; to be looked at
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

    def change(self, wanted: Subscribe, only: Span | None) -> None:
        """Read other streams or types from here on; called by the hub."""
        self.streams = tuple(dict.fromkeys(wanted.streams))
        self.patterns = Patterns(self.streams)
        self._types = frozenset(wanted.types)
        self._follows = wanted.follow
        self._only = only
        self._low, self._high = {}, MAX_SEQ
        if only is not None:
            self._low = {self.streams[0]: only.first_seq - 1}
            self._high = MAX_SEQ if only.last_seq is None else only.last_seq
        self._may_be_over = True
        self._batch.clear()
        self._ids = (-1, ())
        is_of_this_log = wanted.log in (None, self._log.id)
        self._replay = self._replay_of(wanted.after if is_of_this_log else 0)
        if self._last is not None and not self.patterns.match(self._last.stream):
            self._last = None
        if wanted.confirm:
            self._batch.append(row_of(self._confirmation()))
        self._news.notify()

    def _confirmation(self) -> Envelope:
        """What `subscribed` says; it goes before everything else."""
        streams = self._log.directory.streams()
        live = tuple(s.name for s in streams if s.is_live and self.patterns.match(s.name))
        confirmed = Subscribed(self._log.id, live)
        is_resumed = self._replay is not None and self._replay.is_resumed
        if len(self.streams) > 1 or self.patterns.has_patterns or is_resumed:
            return Envelope("", 0, confirmed)
        name = self.streams[0]
        after = self._log.directory.delivered_seq(name) if self._replay is None else self._replay.after_seq
        return Envelope(name, after, confirmed)

    def publish(self, row: Row) -> None:
        """Queue a message of a stream, unless the replay will find it in the log."""
        if self._replay is None and self._wants(row):
            self._put(row)
        if row.type == SessionClosed.type:
            if self._only is not None and self._low[row.stream] < row.seq < self._high:
                self._high = row.seq
            self._may_be_over = True
            self._news.notify()

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
            session = decode(self._last.frame).session
            return Envelope(self._last.stream, self._last.seq, Lag(self.n_waiting), session)
        return Envelope(self.streams[0] if len(self.streams) == 1 else "", 0, Lag(self.n_waiting))

    async def __aiter__(self) -> AsyncIterator[Row]:
        """The messages in order, until closed, or what is read is over and it does not follow on.

        Raises:
            SlowReader: the reader fell so far behind that it would lose a logged message.
        """
        while True:
            row = await self._next()
            if row is not None:
                if row.type not in UNLOGGED:
                    self._last = row
                yield row
            elif self._is_closed or (self._may_be_over and self._is_over()):
                return
            else:
                await self._news.wait_for(self._has_news)

    def _has_news(self) -> bool:
        is_waiting = self._queue or self._batch or self._replay or self._may_be_over
        return bool(is_waiting or self._is_closed or self.is_behind.is_set())

    def _is_over(self) -> bool:
        """Whether nothing of what was asked for follows, where all that is there was given."""
        self._may_be_over = False
        if self._follows:
            return False
        known = self._log.directory
        if self._only is not None:
            newest = known.span(self.streams[0])
            return newest is None or newest.session != self._only.session or newest.last_seq is not None
        if not self.patterns.has_patterns:
            return not any(map(known.is_live, self.streams))
        return not any(stream.is_live and self.patterns.match(stream.name) for stream in known.streams())

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

    def _replay_of(self, after: int | Mapping[str, int] | str | None) -> _Replay | None:
        """Where a replay begins; None: nothing of the past is wanted."""
        if after is None:
            return None
        known, seqs = self._log.directory, None if self._types else dict[str, int]()
        if after == AFTER_LIVE:
            spans = {name: known.span(name) for name in self.streams}
            live = {name for name, span in spans.items() if span is not None and span.last_seq is None}
            starts = {name: span.first_seq - 1 for name, span in spans.items() if span and name in live}
            self._low = {name: known.delivered_seq(name) for name in self.streams} | starts | dict(self._low)
            if not live:
                return None
            after_seq = self._low[self.streams[0]] if len(self.streams) == 1 else 0
            return _Replay(starts, after_seq=after_seq, seqs=seqs)
        if isinstance(after, Mapping):
            return _Replay(after, is_resumed=True, seqs=seqs)
        assert isinstance(after, int), after
        if len(self.streams) == 1 and not self.patterns.has_patterns:
            after = after if after <= known.last_seq(self.streams[0]) else 0
            after = max(after, self._low.get(self.streams[0], 0))
        return _Replay({}, after_id=0, after_seq=after, seqs=seqs)

    async def _read_on(self, replay: _Replay) -> None:
        """Read on in the log; at its end the reader is live, with nothing awaited in between."""
        reader = self._log.reader
        # 1. Find where it begins.
        if replay.after_id is None:
            if replay.is_resumed:
                ((name, seq),) = replay.position.items()
                replay.after_id = await reader.id_of(name, seq) or 0
            else:
                replay.after_id = await reader.before(replay.position) or 0
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
        query = Query(before, upto, ids, tuple(self._types), replay.after_seq, self._high)
        page = await reader.page(query, REPLAY_BATCH)
        replay.after_id = page.upto_id
        if self._log.trimmed != trimmed and self._log.trimmed > before > 0:
            raise SlowReader("messages left the log before they were read")
        self._check_gaps(replay, page.rows)
        if self._replay is replay:
            self._batch = [row for row in reversed(page.rows) if self._is_within(row)]

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
        return (not self._types or row.type in self._types) and self._is_within(row)

    def _is_within(self, row: Row) -> bool:
        """Whether a message is of the part of its stream that is read."""
        # One that is not logged has the `seq` of the message before it.
        return self._low.get(row.stream, 0) < row.seq <= self._high if row.seq else not self._low
