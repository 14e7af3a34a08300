"""The log: gives every message of a stream its `seq`, and lets readers have it once it is on the disk.

The event loop numbers messages and collects them; one thread commits what was collected, with the
state that each live stream resumes from after a restart, in one transaction; then the messages are
delivered. While one batch is written the next one gathers, so the disk's pace changes how large
batches are and not what is said. A message that is not logged keeps its place among the logged ones.

Where the disk is full everything waits: nothing is delivered or acknowledged, streams stop being
read (`room`), and all goes on by itself when there is room. Any other failure ends the server.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from streaming.aio import Changed, backoff_s
from streaming.config import LogConfig
from streaming.errors import LogError, LogFull
from streaming.log.directory import Directory, StateSource, Stream
from streaming.log.reader import Reader, in_thread
from streaming.log.row import Row, row_of
from streaming.log.seen_clock import SeenClock
from streaming.log.store import Began, Closed, Logged, Op, Opened, Store, Unsaved
from streaming.logging_setup import where_raised
from streaming.protocol import UNLOGGED, Envelope, Message, SessionClosed

logger = logging.getLogger(__name__)

MAX_WAITING = 256  # messages of one stream on their way to the disk; then it is not read on
N_RECENT = 1024  # newest messages kept in memory: a reader that comes back soon needs no file
LOOK_INTERVAL_S = 0.5  # between two looks at whether the file is where it was
RETRY_S = 1.0  # between attempts to write to a full disk, at most, with jitter
MAX_NAMED = 10  # streams in one line of the server's log
TRIM_INTERVAL_S = 30.0  # between two looks at what retention takes
_DAY_MS = 24 * 3600 * 1000

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Waiting:
    """Something on its way to the disk, and what is done once it is there."""

    stream: Stream
    op: Op | None
    deliver: Callable[[], None] | None = None


class _Recent:
    """The newest messages, whose ids are numbered without a hole."""

    def __init__(self, n_kept: int) -> None:
        self._kept: deque[tuple[int, Row]] = deque(maxlen=n_kept)

    def append(self, number: int, row: Row) -> None:
        """One more; the oldest goes where there is no room."""
        self._kept.append((number, row))

    def after(self, number: int) -> list[tuple[int, Row]] | None:
        """Those after an id; None where memory does not go back so far."""
        if not self._kept or self._kept[0][0] > number + 1:
            return None
        n_skipped = max(0, number + 1 - self._kept[0][0])
        return [self._kept[i] for i in range(n_skipped, len(self._kept))]


def _ignore(_: object) -> None:
    return


class Log:
    """The messages of all streams. Belongs to the event loop; its threads see only rows and ops."""

    def __init__(
        self,
        config: LogConfig,
        clock_ms: Callable[[], int],
        *,
        on_closed: Callable[[str], None] = _ignore,
        on_unsaved: Callable[[str], None] = _ignore,
        n_recent: int = N_RECENT,
    ) -> None:
        """Of a file that is opened by `running`.

        Args:
            config: Where the file is, and how much is kept.
            clock_ms: Unix time.
            on_closed: Called with the name of a stream whose end was delivered.
            on_unsaved: Called with the name of a live stream whose state could not be made. It is saved
                no more, and has to end.
            n_recent: Newest messages kept in memory.
        """
        self.id = ""  # of the file's log; another one has another
        self.directory = Directory()
        self.reader = Reader(self.directory)
        self._config = config
        self._deliver: Callable[[Row], None] = _ignore
        self._clock_ms = clock_ms
        self._seen = SeenClock(clock_ms(), time.monotonic())
        self._on_closed = on_closed
        self._on_unsaved = on_unsaved
        self._writing = ThreadPoolExecutor(1, "log-write")
        self._next_id = 1
        self._waiting: list[_Waiting] = []
        self._unsaved: dict[str, None] = {}  # live streams whose state must be saved with the next batch
        self._n_appended = 0
        self._n_delivered = 0
        self._work = Changed()  # for the writer
        self._progress = Changed()  # of the writer
        self._failure: LogError | None = None
        self._is_closing = self._gives_up = False
        self._recent = _Recent(n_recent)
        self.published = 0  # id of the message up to which everything was delivered
        self.trimmed = 0  # id of the newest message that retention took
        self.n_messages = 0  # that are kept
        self.blocked = ""  # why nothing can be written at the moment, and everything waits

    def deliver_to(self, deliver: Callable[[Row], None]) -> None:
        """Have every message handed to the fan-out, once it is on the disk; it must not wait."""
        self._deliver = deliver

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open the file and write; on exit everything appended is committed, if the file can be written.

        Raises:
            LogError: the file cannot be used.
        """
        store = await in_thread(self._writing, lambda: Store(Path(self._config.path)))
        try:
            self.reader.open(store)
            self.id = store.id
            await self._load()
            writer = asyncio.create_task(self._write(store), name="log")
            writer.add_done_callback(self._on_writer_end)
            try:
                yield
            finally:
                self._is_closing = True
                self._work.notify()
                await writer
        finally:
            await self.reader.close()
            await in_thread(self._writing, store.close)
            self._writing.shutdown()

    async def fault(self) -> None:
        """Raise what ended the writing, when it does.

        Raises:
            LogError: the file is broken.
        """
        await self.until(lambda: False)

    # --- what streams say ----------------------------------------------------------------

    def open(
        self,
        name: str,
        source: StateSource | None = None,
        resume_digest: bytes = b"",
        session_id: str | None = None,
    ) -> None:
        """A stream of this name begins, or begins again: its `seq` goes on, in another session.

        Args:
            name: Of no open stream.
            source: Saved with everything it says; None: it is over when the server is killed.
            resume_digest: Of the token its producer may resume it with.
            session_id: As `new_session_id` gives it; None: a new one.
        """
        stream = self.directory.get_or_add(name)
        stream.begin(self._clock_ms(), source, resume_digest, session_id)
        number, last_seq, at_ms = stream.session, stream.last_seq, stream.opened_ms
        opened = Opened(stream.id, name, number, last_seq, at_ms, resume_digest, stream.session_id)
        self._wait(_Waiting(stream, opened))

    def began(self, name: str, epoch_ms: int) -> None:
        """The first sample of an open stream came at a Unix time: messages from here on say so."""
        stream = self.directory[name]
        stream.epoch_ms = epoch_ms
        self._wait(_Waiting(stream, Began(stream.id, stream.session, epoch_ms)))

    def reopen(self, name: str, source: StateSource | None) -> None:
        """Go on with a stream that a killed server left behind."""
        stream = self.directory[name]
        assert stream.is_live_on_disk, name
        assert not stream.is_open, name
        stream.is_open, stream.is_live_on_disk = True, False
        stream.source = source

    def append(self, name: str, message: Message) -> None:
        """Number a message of an open stream; it is delivered when it is on the disk.

        One that is not logged gets the `seq` of the last logged one before it, and waits for that.
        """
        stream = self.directory[name]
        assert stream.is_open, name
        if message.type in UNLOGGED:
            row = row_of(stream.envelope(message))
            if stream.n_waiting:
                self._wait(_Waiting(stream, None, partial(self._deliver, row)))
            else:
                self._deliver(row)
            return
        stream.last_seq += 1
        row = row_of(stream.envelope(message))
        if isinstance(message, SessionClosed):
            stream.closed_reason = message.reason
        logged = Logged(
            self._next_id, stream.id, stream.session, row.seq, row.type, self._clock_ms(), row.frame
        )
        self._next_id += 1
        self._wait(_Waiting(stream, logged, partial(self._publish, stream, logged.id, row)))

    def confirm(self, name: str, message: Message, deliver: Callable[[Envelope], None]) -> None:
        """Deliver a message that is not logged, once everything the stream was given is on the disk."""
        stream = self.directory[name]
        self._wait(_Waiting(stream, None, partial(deliver, stream.envelope(message))))

    def close(self, name: str) -> None:
        """Nothing follows on this stream; it is kept among the closed ones."""
        stream = self.directory[name]
        stream.is_open = False
        stream.source = None
        stream.closed_ms = self._clock_ms()
        closed = Closed(stream.id, stream.closed_ms, stream.closed_reason)
        self._wait(_Waiting(stream, closed, partial(self._on_closed, name)))

    async def room(self, name: str) -> None:
        """Wait until the stream may say more.

        Raises:
            LogError: the log failed; it never may.
        """
        stream = self.directory[name]
        await self.until(lambda: stream.n_waiting < MAX_WAITING)

    async def until(self, is_true: Callable[[], bool]) -> None:
        """Wait until something holds that the writer changes.

        Raises:
            LogError: the log failed; it never will.
        """
        await self._progress.wait_for(lambda: self._failure is not None or is_true())
        if self._failure is not None:
            raise LogError(str(self._failure))

    async def settled(self) -> None:
        """Wait until everything appended so far was delivered.

        Raises:
            LogError: the log failed; it never will be.
        """
        upto = self._n_appended
        await self.until(lambda: self._n_delivered >= upto)

    def recent(self, after_id: int) -> list[tuple[int, Row]] | None:
        """What was delivered after an id; None where memory does not go back so far."""
        return [] if after_id >= self.published else self._recent.after(after_id)

    # --- inside --------------------------------------------------------------------------

    async def _load(self) -> None:
        self.directory.load(await self.reader.ask(Store.streams))
        self.published = await self.reader.ask(Store.last_id)
        self.n_messages = await self.reader.ask(Store.n_messages)
        self._next_id = self.published + 1

    def _wait(self, waiting: _Waiting) -> None:
        self._waiting.append(waiting)
        waiting.stream.n_waiting += 1
        self._n_appended += 1
        if waiting.stream.source is not None:
            self._unsaved[waiting.stream.name] = None
        self._work.notify()

    async def _write(self, store: Store) -> None:
        """Commit and deliver batch after batch, and let retention have its turn between them."""
        loop = asyncio.get_running_loop()
        trim_at = loop.time() + TRIM_INTERVAL_S
        look_at = loop.time()
        try:
            while self._waiting or not self._is_closing:
                if loop.time() >= look_at:
                    if lost := await self._retried(store.look_after):
                        logger.error("log %s: %s; it was written again from what is open", store.path, lost)
                    look_at = loop.time() + LOOK_INTERVAL_S
                if self._waiting:
                    await self._commit(store)
                if loop.time() >= trim_at and not await self._trim(store):
                    trim_at = loop.time() + TRIM_INTERVAL_S
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(min(trim_at, look_at)):
                        await self._work.wait_for(lambda: bool(self._waiting) or self._is_closing)
        except LogError as exc:
            logger.error("%s", exc)  # noqa: TRY400  the text says it all
            _say_lost(self.directory.streams())
            self._failure = exc
            self._progress.notify()

    def give_up(self) -> None:
        """The server must end: what cannot be written now is not waited for any more."""
        self._gives_up = True

    def _on_writer_end(self, writer: asyncio.Task[None]) -> None:
        """An internal error in it must not leave streams waiting for ever."""
        if not writer.cancelled() and writer.exception() is not None:
            self._failure = LogError("a fault ended the writing of the log")
            self._progress.notify()

    async def _commit(self, store: Store) -> None:
        """Take all that waits and the states it led to, write them as one, deliver."""
        batch, self._waiting = self._waiting, []
        ops = [waiting.op for waiting in batch if waiting.op is not None]
        unsaved, self._unsaved = self._unsaved, {}
        for name in unsaved:
            stream = self.directory[name]
            if stream.source is not None:
                ops.append(_state_of(stream, stream.source, self._on_unsaved))
        if ops:
            await self._retried(lambda: store.write(ops))
        for waiting in batch:
            waiting.stream.n_waiting -= 1
            if waiting.deliver is not None:
                waiting.deliver()
        self._n_delivered += len(batch)
        self._progress.notify()

    def _publish(self, stream: Stream, number: int, row: Row) -> None:
        """A logged message is on the disk."""
        stream.delivered_seq = row.seq
        self._recent.append(number, row)
        self.published = number
        self.n_messages += 1
        self._deliver(row)

    async def _trim(self, store: Store) -> bool:
        """One step of retention; whether there is more to do."""
        seen_ms = self._seen.now_ms(self._clock_ms(), time.monotonic())
        before_ms = seen_ms - int(self._config.keep_days * _DAY_MS)
        max_bytes = self._config.max_mib * 1024 * 1024
        trimmed = await self._retried(lambda: store.trim(before_ms, max_bytes, self._config.closed_streams))
        self.trimmed = max(self.trimmed, trimmed.last_id)
        self.n_messages -= trimmed.n_messages
        for name in trimmed.names:
            self.directory.forget(name)
        await in_thread(self._writing, store.shorten)
        return not trimmed.is_done

    async def _retried(self, work: Callable[[], _T]) -> _T:
        """Do something in the writing thread, again and again while the disk is full."""
        while True:
            try:
                result = await in_thread(self._writing, work)
            except LogFull as exc:
                if not self.blocked:
                    logger.error("%s; streams wait until it can", exc)  # noqa: TRY400
                self.blocked = exc.reason
                self._progress.notify()
                if (
                    self._is_closing or self._gives_up
                ):  # nobody waits any more; the next server goes on from what is there
                    raise
                await asyncio.sleep(backoff_s(1, RETRY_S, RETRY_S))
            else:
                if self.blocked:
                    logger.warning("log %s: can be written again", self._config.path)
                self.blocked = ""
                return result


def _say_lost(streams: Iterable[Stream]) -> None:
    """Name the streams of which something was not kept."""
    lost = {stream.name: stream.n_waiting for stream in streams if stream.n_waiting}
    if lost:
        some = ", ".join(list(lost)[:MAX_NAMED]) + (", ..." if len(lost) > MAX_NAMED else "")
        logger.error("not kept: %d messages of %d streams: %s", sum(lost.values()), len(lost), some)


def _state_of(stream: Stream, source: StateSource, on_unsaved: Callable[[str], None]) -> Op:
    """What a stream resumes from. Where it cannot be made, the stream is alone in that."""
    try:
        return source.save(stream.id)
    except Exception as exc:
        # Without the text of the fault, which may hold what a client sent.
        logger.error("stream %s: its state cannot be saved: %s", stream.name, where_raised(exc))  # noqa: TRY400
        logger.debug("the fault's text", exc_info=True)
    stream.source = None
    # Later, so that a fault in it is not one of the writer's.
    asyncio.get_running_loop().call_soon(on_unsaved, stream.name)
    return Unsaved(stream.id)
