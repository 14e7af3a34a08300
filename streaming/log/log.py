"""The log: gives every message of a stream its `seq`, and lets readers have it once it is on the disk.

The event loop numbers messages and collects them; one thread commits what was collected, with the
state that each live stream goes on from after a restart, in one transaction; then the messages are
delivered. While one batch is written the next one gathers, so the disk's pace changes how large
batches are and not what is said. A message that is not logged keeps its place among the logged ones.

Where the disk is full everything waits: nothing is delivered or acknowledged, streams stop being
read (`room`), and all goes on by itself when there is room. Any other failure ends the server.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from streaming.config import LogConfig
from streaming.errors import LogError, LogFull
from streaming.log.store import Closed, Logged, Op, Opened, Page, Query, Saved, Store, StreamRow
from streaming.protocol import UNLOGGED, Envelope, Message, decode, encode, is_pattern, matches

logger = logging.getLogger(__name__)

MAX_WAITING = 256  # messages of one stream on their way to the disk; then it is not read on
N_RECENT = 1024  # newest messages kept in memory: a reader that comes back soon needs no file
RETRY_S = 1.0  # between attempts to write to a full disk, at most, with jitter
TRIM_INTERVAL_S = 30.0  # between two looks at what retention takes
_DAY_MS = 24 * 3600 * 1000

_T = TypeVar("_T")


class StateSource(Protocol):
    """A live stream that can go on after a restart of the server."""

    def save(self, stream: int) -> Saved:
        """What it goes on from now, and the audio that came since the last call."""


@dataclass(slots=True)
class _Stream:
    """A stream of the log, live or over."""

    id: int
    name: str
    last_seq: int
    session: int
    resume_digest: bytes
    is_open: bool = False
    is_live_on_disk: bool = False  # left by a server that was killed, and not opened again yet
    opened_ms: int = 0
    closed_ms: int | None = None
    source: StateSource | None = None
    n_waiting: int = 0  # messages not delivered yet


@dataclass(frozen=True, slots=True)
class _Waiting:
    """Something on its way to the disk, and then to its readers."""

    stream: _Stream
    op: Op | None
    envelope: Envelope | None = None
    deliver: Callable[[Envelope], None] | None = None


@dataclass(frozen=True, slots=True)
class Left:
    """A live stream that a killed server left behind, and what it can go on from."""

    name: str
    state: bytes | None
    audio: list[tuple[int, bytes]] = field(default_factory=list)


class Log:
    """The messages of all streams. Belongs to the event loop; its two threads see only rows."""

    def __init__(
        self,
        config: LogConfig,
        deliver: Callable[[Envelope], None],
        clock_ms: Callable[[], int],
        *,
        n_recent: int = N_RECENT,
    ) -> None:
        self._config = config
        self._deliver = deliver
        self._clock_ms = clock_ms
        self._store: Store | None = None
        self._writing = ThreadPoolExecutor(1, "log-write")
        self._reading = ThreadPoolExecutor(1, "log-read")
        self._streams: dict[str, _Stream] = {}
        self._by_id: dict[int, _Stream] = {}
        self._next_stream = 1
        self._next_id = 1
        self._waiting: list[_Waiting] = []
        self._unsaved: dict[str, None] = {}  # live streams whose state must be saved with the next batch
        self._n_appended = 0
        self._n_delivered = 0
        self._has_work = asyncio.Event()
        self._changed = asyncio.Event()
        self._failure: LogError | None = None
        self._is_closing = False
        self._recent: deque[tuple[int, Envelope]] = deque(maxlen=n_recent)
        self.published = 0  # place in the log up to which everything was delivered
        self.trimmed = 0  # place of the newest message that retention took
        self.n_messages = 0  # that are kept
        self.generation = 0  # of the set of streams
        self.is_full = False  # the disk is, and everything waits

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open the file and write; on exit everything appended is committed, if the file can be written.

        Raises:
            LogError: the file cannot be used.
        """
        self._store = await self._in(self._writing, lambda: Store(Path(self._config.path)))
        try:
            await self._load(self._store)
            writer = asyncio.create_task(self._write(self._store), name="log")
            writer.add_done_callback(self._on_writer_end)
            try:
                yield
            finally:
                self._is_closing = True
                self._has_work.set()
                await writer
        finally:
            await self._in(self._reading, lambda: None)  # the last read is over
            await self._in(self._writing, self._store.close)
            self._writing.shutdown()
            self._reading.shutdown()

    async def fault(self) -> None:
        """Raise what ended the writing, when it does.

        Raises:
            LogError: the file is broken.
        """
        await self._until(lambda: False)

    # --- what streams say ----------------------------------------------------------------

    def open(self, name: str, source: StateSource | None = None, resume_digest: bytes = b"") -> None:
        """A stream of this name begins, or begins again: its `seq` goes on.

        Args:
            name: Of no open stream.
            source: Saved with everything it says; None: it is over when the server is killed.
            resume_digest: Of the token its producer may resume it with.
        """
        stream = self._streams.get(name)
        if stream is None:
            stream = _Stream(self._next_stream, name, 0, 0, b"")
            self._next_stream += 1
            self._streams[name] = self._by_id[stream.id] = stream
            self.generation += 1
        assert not stream.is_open, name
        stream.session += 1
        stream.is_open = True
        stream.source = source
        stream.resume_digest = resume_digest
        stream.opened_ms, stream.closed_ms = self._clock_ms(), None
        opened = Opened(stream.id, name, stream.session, stream.last_seq, stream.opened_ms, resume_digest)
        self._wait(_Waiting(stream, opened))

    def reopen(self, name: str, source: StateSource | None) -> None:
        """Go on with a stream that a killed server left behind."""
        stream = self._streams[name]
        assert stream.is_live_on_disk, name
        assert not stream.is_open, name
        stream.is_open, stream.is_live_on_disk = True, False
        stream.source = source

    def append(self, name: str, message: Message) -> Envelope:
        """Number a message of an open stream; it is delivered when it is on the disk.

        One that is not logged gets the `seq` of the last logged one before it, and waits for that.
        """
        stream = self._streams[name]
        assert stream.is_open, name
        if message.type in UNLOGGED:
            envelope = Envelope(name, stream.last_seq, message)
            if stream.n_waiting:
                self._wait(_Waiting(stream, None, envelope, self._deliver))
            else:
                self._deliver(envelope)
            return envelope
        stream.last_seq += 1
        envelope = Envelope(name, stream.last_seq, message)
        logged = Logged(
            self._next_id,
            stream.id,
            stream.session,
            envelope.seq,
            message.type,
            self._clock_ms(),
            encode(envelope),
        )
        self._next_id += 1
        self._wait(_Waiting(stream, logged, envelope, self._deliver))
        return envelope

    def confirm(self, name: str, message: Message, deliver: Callable[[Envelope], None]) -> None:
        """Deliver a message that is not logged, once everything the stream was given is on the disk."""
        stream = self._streams[name]
        self._wait(_Waiting(stream, None, Envelope(name, stream.last_seq, message), deliver))

    def close(self, name: str) -> None:
        """Nothing follows on this stream; it is kept among the closed ones."""
        stream = self._streams[name]
        stream.is_open = False
        stream.source = None
        stream.closed_ms = self._clock_ms()
        self._wait(_Waiting(stream, Closed(stream.id, stream.closed_ms)))

    async def room(self, name: str) -> None:
        """Wait until the stream may say more.

        Raises:
            LogError: the log failed; it never may.
        """
        stream = self._streams[name]
        await self._until(lambda: stream.n_waiting < MAX_WAITING)

    async def settled(self) -> None:
        """Wait until everything appended so far was delivered.

        Raises:
            LogError: the log failed; it never will be.
        """
        upto = self._n_appended
        await self._until(lambda: self._n_delivered >= upto)

    # --- what is known of streams --------------------------------------------------------

    def last_seq(self, name: str) -> int:
        """The `seq` of the newest logged message; 0 where there is none."""
        stream = self._streams.get(name)
        return 0 if stream is None else stream.last_seq

    def has(self, name: str) -> bool:
        """Whether anything is known of a stream, live or closed."""
        return name in self._streams

    def is_open(self, name: str) -> bool:
        """Whether the stream is live."""
        stream = self._streams.get(name)
        return stream is not None and stream.is_open

    def resume_digest(self, name: str) -> bytes:
        """Of the token that resumes the newest stream of a name; empty where nothing does."""
        stream = self._streams.get(name)
        return b"" if stream is None else stream.resume_digest

    def rows(self) -> list[StreamRow]:
        """Every stream, in the order in which they first began."""
        return [
            StreamRow(s.id, s.name, s.session, s.last_seq, s.is_open, s.opened_ms, s.closed_ms, b"")
            for s in self._streams.values()
        ]

    def row(self, name: str) -> StreamRow | None:
        """One stream."""
        s = self._streams.get(name)
        if s is None:
            return None
        return StreamRow(s.id, s.name, s.session, s.last_seq, s.is_open, s.opened_ms, s.closed_ms, b"")

    def ids(self, wanted: Iterable[str]) -> tuple[int, ...]:
        """The streams that names and patterns stand for now."""
        found: dict[int, None] = {}
        for name in wanted:
            if is_pattern(name):
                found |= {s.id: None for s in self._streams.values() if matches(name, s.name)}
            elif name in self._streams:
                found[self._streams[name].id] = None
        return tuple(found)

    def recent(self, after_id: int) -> list[tuple[int, Envelope]] | None:
        """What was delivered after a place in the log; None where memory does not go back so far."""
        if after_id >= self.published:
            return []
        if not self._recent or self._recent[0][0] > after_id + 1:
            return None
        n_skipped = max(0, after_id + 1 - self._recent[0][0])  # places are numbered without a hole
        return [self._recent[i] for i in range(n_skipped, len(self._recent))]

    # --- reading the file ----------------------------------------------------------------

    async def read(self, query: Query, limit: int) -> tuple[list[Envelope], int]:
        """Messages of a query in order, and the place up to which there are no others."""
        page = await self.page(query, limit)
        return [decode(frame) for frame in page.frames], page.upto_id

    async def page(self, query: Query, limit: int) -> Page:
        """As `read`, as the frames that were sent."""
        return await self._ask(lambda store: store.messages(query, limit))

    async def place(self, name: str, seq: int) -> int | None:
        """The place in the log of a message; None where it is not kept."""
        stream = self._streams.get(name)
        return None if stream is None else await self._ask(lambda store: store.place(stream.id, seq))

    async def of_session(self, row: StreamRow, types: Sequence[str], limit: int) -> list[str]:
        """The newest frames of some types in a stream's newest session, oldest first."""
        return await self._ask(lambda store: store.of_session(row.id, row.session, types, limit))

    async def apart(self, work: Callable[[], _T]) -> _T:
        """Do some work on what was read in the reading thread."""
        return await self._in(self._reading, work)

    def left(self) -> tuple[str, ...]:
        """The live streams that a killed server left behind."""
        return tuple(stream.name for stream in self._streams.values() if stream.is_live_on_disk)

    async def read_left(self, name: str) -> Left:
        """What one of those can go on from."""
        return await self._ask(partial(_left, stream=self._streams[name]))

    # --- inside --------------------------------------------------------------------------

    async def _load(self, store: Store) -> None:
        for row in await self._in(self._reading, store.streams):
            stream = _Stream(row.id, row.name, row.last_seq, row.session, row.resume_digest)
            stream.is_live_on_disk = row.is_live
            stream.opened_ms, stream.closed_ms = row.opened_ms, row.closed_ms
            self._streams[row.name] = self._by_id[row.id] = stream
            self._next_stream = max(self._next_stream, row.id + 1)
        self.published = await self._in(self._reading, store.last_id)
        self.n_messages = await self._in(self._reading, store.n_messages)
        self._next_id = self.published + 1

    def _wait(self, waiting: _Waiting) -> None:
        self._waiting.append(waiting)
        waiting.stream.n_waiting += 1
        self._n_appended += 1
        if waiting.stream.source is not None:
            self._unsaved[waiting.stream.name] = None
        self._has_work.set()

    async def _write(self, store: Store) -> None:
        """Commit and deliver batch after batch, and let retention have its turn between them."""
        loop = asyncio.get_running_loop()
        trim_at = loop.time() + TRIM_INTERVAL_S
        try:
            while not (self._is_closing and not self._waiting):
                if not self._waiting and loop.time() < trim_at:
                    self._has_work.clear()
                    try:
                        async with asyncio.timeout_at(trim_at):
                            await self._has_work.wait()
                    except TimeoutError:
                        pass
                    continue
                if self._waiting:
                    await self._commit(store)
                if loop.time() >= trim_at and not await self._trim(store):
                    trim_at = loop.time() + TRIM_INTERVAL_S
        except LogError as exc:
            logger.error("%s", exc)  # noqa: TRY400  the text says it all
            self._failure = exc
            self._changed.set()

    def _on_writer_end(self, writer: asyncio.Task[None]) -> None:
        """A fault of ours in it must not leave streams waiting for ever."""
        if not writer.cancelled() and writer.exception() is not None:
            self._failure = LogError("a fault ended the writing of the log")
            self._changed.set()

    async def _commit(self, store: Store) -> None:
        """Take all that waits and the states it led to, write them as one, deliver."""
        batch, self._waiting = self._waiting, []
        ops = [waiting.op for waiting in batch if waiting.op is not None]
        unsaved, self._unsaved = self._unsaved, {}
        for name in unsaved:
            stream = self._streams[name]
            if stream.source is not None:
                ops.append(stream.source.save(stream.id))
        if ops:
            await self._retried(lambda: store.write(ops))
        for waiting in batch:
            waiting.stream.n_waiting -= 1
            if isinstance(waiting.op, Logged) and waiting.envelope is not None:
                self._recent.append((waiting.op.id, waiting.envelope))
                self.published = waiting.op.id
                self.n_messages += 1
            if waiting.envelope is not None and waiting.deliver is not None:
                waiting.deliver(waiting.envelope)
        self._n_delivered += len(batch)
        self._changed.set()

    async def _trim(self, store: Store) -> bool:
        """One step of retention; whether there is more to do."""
        before_ms = self._clock_ms() - int(self._config.keep_days * _DAY_MS)
        max_bytes = self._config.max_mib * 1024 * 1024
        trimmed = await self._retried(lambda: store.trim(before_ms, max_bytes, self._config.closed_streams))
        self.trimmed = max(self.trimmed, trimmed.last_id)
        self.n_messages -= trimmed.n_messages
        for name in trimmed.names:
            stream = self._streams[name]
            if not stream.is_open and not stream.n_waiting:
                del self._streams[name], self._by_id[stream.id]
                self.generation += 1
        return not trimmed.is_done

    async def _retried(self, work: Callable[[], _T]) -> _T:
        """Do something in the writing thread, again and again while the disk is full."""
        while True:
            try:
                result = await self._in(self._writing, work)
            except LogFull as exc:
                if not self.is_full:
                    logger.error("%s; streams wait until it can", exc)  # noqa: TRY400
                self.is_full = True
                if self._is_closing:  # nobody waits any more; the next server goes on from what is there
                    raise
                await asyncio.sleep(RETRY_S * random.uniform(0.5, 1))
            else:
                if self.is_full:
                    logger.warning("log %s: can be written again", self._config.path)
                self.is_full = False
                return result

    async def _until(self, is_true: Callable[[], bool]) -> None:
        while self._failure is None:
            if is_true():
                return
            self._changed.clear()
            await self._changed.wait()
        raise LogError(str(self._failure))

    async def _ask(self, question: Callable[[Store], _T]) -> _T:
        assert self._store is not None, "the log is not running"
        store = self._store
        return await self._in(self._reading, lambda: question(store))

    @staticmethod
    async def _in(executor: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(executor, work)


def _left(store: Store, stream: _Stream) -> Left:
    return Left(stream.name, store.saved(stream.id), store.audio(stream.id))
