"""Reads the log's file away from the event loop.

One thread reads, and all readers share it: what it is asked for is bounded, so that a long answer is
made of many questions and others come in between. What is then made of the rows is made in another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from streaming.log.directory import Directory, Span
from streaming.log.row import Row
from streaming.log.store import Page, Query, SessionRow, Store, StreamRow
from streaming.patterns import Patterns
from streaming.protocol import MAX_SEQ

READ_ROWS = 512  # of a session in one question

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Left:
    """A live stream that a killed server left behind, and what it can resume from."""

    name: str
    state: bytes | None
    audio: list[tuple[int, bytes]] = field(default_factory=list)


class Reader:
    """What the log's file holds. Belongs to the event loop."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._store: Store | None = None
        self._reading = ThreadPoolExecutor(1, "log-read")
        self._working = ThreadPoolExecutor(1, "log-work")

    def open(self, store: Store) -> None:
        """Read this file from here on."""
        self._store = store

    async def close(self) -> None:
        """Wait until the last question is answered; none follows."""
        for executor in (self._reading, self._working):
            await in_thread(executor, lambda: None)
            executor.shutdown()

    async def ask(self, question: Callable[[Store], _T]) -> _T:
        """Ask the file something, in the reading thread.

        Raises:
            LogError: it cannot be read.
        """
        assert self._store is not None, "the log is not running"
        return await in_thread(self._reading, partial(question, self._store))

    async def apart(self, work: Callable[[], _T]) -> _T:
        """Work on rows in a thread where neither the event loop nor other readers wait."""
        return await in_thread(self._working, work)

    async def ids(self, wanted: Patterns) -> tuple[int, ...]:
        """The streams that names and patterns stand for now; of 10,000 streams not found on the loop."""
        if not wanted.has_patterns:
            known = self._directory
            return tuple(known[name].id for name in wanted.names if known.has(name))
        streams = self._directory.streams()
        return await self.apart(lambda: tuple(s.id for s in streams if wanted.match(s.name)))

    async def page(self, query: Query, limit: int) -> Page:
        """Messages of a query in order.

        Raises:
            LogError: as `ask`.
        """
        return await self.ask(lambda store: store.messages(query, limit))

    async def id_of(self, name: str, seq: int) -> int | None:
        """The id of a message; None where it is not kept.

        Raises:
            LogError: as `ask`.
        """
        if not self._directory.has(name):
            return None
        stream = self._directory[name].id
        return await self.ask(lambda store: store.id_of(stream, seq))

    async def before(self, positions: Mapping[str, int]) -> int | None:
        """The id before the first message after a `seq` of any of some streams; None: there is none.

        Raises:
            LogError: as `ask`.
        """
        known = self._directory
        pairs = [(known[name].id, seq) for name, seq in positions.items() if known.has(name)]
        ids = await self.ask(lambda store: [store.first_id(stream, seq) for stream, seq in pairs])
        found = [number for number in ids if number is not None]
        return min(found) - 1 if found else None

    async def session(self, name: str, session_id: str) -> SessionRow | None:
        """One session of a stream; None where it is not kept.

        Raises:
            LogError: as `ask`.
        """
        if not self._directory.has(name):
            return None
        stream = self._directory[name].id
        return await self.ask(lambda store: store.session(stream, session_id))

    async def span(self, name: str, session_id: str) -> Span | None:
        """The messages of one session of a stream; None where it is not kept.

        Raises:
            LogError: as `ask`.
        """
        newest = self._directory.span(name)
        if newest is not None and newest.session == session_id:
            return newest
        row = await self.session(name, session_id)
        return None if row is None else Span(row.id, row.first_seq, row.last_seq)

    async def of_session(
        self, row: StreamRow, types: Sequence[str], limit: int, session: int | None = None
    ) -> list[Row]:
        """The newest messages of some types in one session of a stream, oldest first.

        Args:
            row: The stream.
            types: Of messages.
            limit: Messages at most.
            session: Its number; None: the newest.

        Raises:
            LogError: as `ask`.
        """
        number = row.session if session is None else session
        pages: list[list[Row]] = []  # newest first
        n_left, before = limit, MAX_SEQ + 1
        while n_left:
            n = min(n_left, READ_ROWS)
            read = partial(
                _of_session, stream=row.id, session=number, types=types, limit=n, before_seq=before
            )
            page = await self.ask(read)
            pages.append(page)
            if len(page) < n:
                break
            n_left, before = n_left - n, page[0].seq
        return [found for page in reversed(pages) for found in page]

    async def read_left(self, name: str) -> Left:
        """What a stream that a killed server left behind can resume from.

        Raises:
            LogError: as `ask`.
        """
        stream = self._directory[name].id
        return await self.ask(lambda store: Left(name, store.saved(stream), store.audio(stream)))


async def in_thread(executor: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
    """Do something in an executor's thread."""
    return await asyncio.get_running_loop().run_in_executor(executor, work)


def _of_session(
    store: Store, *, stream: int, session: int, types: Sequence[str], limit: int, before_seq: int
) -> list[Row]:
    return store.of_session(stream, session, types, limit, before_seq)
