"""What is known of every stream of the log, live or over, without reading the file."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from streaming.log.store import Saved, StreamRow
from streaming.protocol import Envelope, Message


class StateSource(Protocol):
    """A live stream that can go on after a restart of the server."""

    def save(self, stream: int) -> Saved:
        """What it resumes from, and the audio that came since the last call."""


def new_session_id(opened_ms: int) -> str:
    """An id that no other session has; ids are in the order of time."""
    return f"{opened_ms:011x}{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class Span:
    """The messages of one session, by their `seq`, both inclusive."""

    session: str
    first_seq: int
    last_seq: int | None  # None: it is live


@dataclass(slots=True)
class Stream:
    """A stream of the log. Its name may begin again: each time is a session, and `seq` goes on."""

    id: int
    name: str
    last_seq: int = 0  # of the newest logged message
    session: int = 0
    resume_digest: bytes = b""  # of the token that resumes it; empty: nothing does
    is_open: bool = False
    is_live_on_disk: bool = False  # left by a server that was killed, and not opened again yet
    opened_ms: int = 0
    closed_ms: int | None = None
    source: StateSource | None = None
    n_waiting: int = 0  # messages not delivered yet
    session_id: str = ""
    first_seq: int = 1  # of the newest session
    delivered_seq: int = 0  # of the newest message that readers have
    epoch_ms: int | None = None  # Unix time of the newest session's first sample; None: none came yet
    closed_reason: str | None = None  # of the newest session

    def begin(
        self, now_ms: int, source: StateSource | None, resume_digest: bytes, session_id: str | None
    ) -> None:
        """Another session begins; the log's `open` says what each of these is."""
        assert not self.is_open, self.name
        self.session += 1
        self.session_id = session_id or new_session_id(now_ms)
        self.first_seq = self.last_seq + 1
        self.is_open = True
        self.source = source
        self.resume_digest = resume_digest
        self.opened_ms, self.epoch_ms = now_ms, None
        self.closed_ms, self.closed_reason = None, None

    @property
    def row(self) -> StreamRow:
        """What others may know of it."""
        return StreamRow(
            self.id,
            self.name,
            self.session,
            self.last_seq,
            self.is_open,
            self.opened_ms,
            self.closed_ms,
            b"",
            self.session_id,
            self.first_seq,
            self.epoch_ms,
            self.closed_reason,
        )

    @property
    def is_live(self) -> bool:
        """Whether readers have not seen the end of its newest session yet."""
        return self.is_open or self.is_live_on_disk or self.n_waiting > 0

    @property
    def span(self) -> Span:
        """Of the newest session."""
        return Span(self.session_id, self.first_seq, None if self.is_live else self.last_seq)

    def envelope(self, message: Message, seq: int | None = None) -> Envelope:
        """A message of the newest session; one that is not logged has the `seq` of the one before it."""
        at = self.last_seq if seq is None else seq
        return Envelope(self.name, at, message, self.session_id, self.epoch_ms)


class Directory:
    """The streams by name. Belongs to the event loop; only the log changes it."""

    def __init__(self) -> None:
        self.generation = 0  # of the set of streams
        self._streams: dict[str, Stream] = {}
        self._next_id = 1

    # --- for everybody -------------------------------------------------------------------

    def last_seq(self, name: str) -> int:
        """The `seq` of the newest logged message; 0 where there is none."""
        stream = self._streams.get(name)
        return 0 if stream is None else stream.last_seq

    def has(self, name: str) -> bool:
        """Whether anything is known of a stream, live or closed."""
        return name in self._streams

    def is_live(self, name: str) -> bool:
        """Whether readers of the stream have not seen the end of its newest session yet."""
        stream = self._streams.get(name)
        return stream is not None and stream.is_live

    def span(self, name: str) -> Span | None:
        """The newest session of a name; None where nothing is known of it."""
        stream = self._streams.get(name)
        return None if stream is None else stream.span

    def delivered_seq(self, name: str) -> int:
        """The `seq` of the newest message that readers have; 0 where there is none."""
        stream = self._streams.get(name)
        return 0 if stream is None else stream.delivered_seq

    def envelope(self, name: str, message: Message) -> Envelope:
        """A message that is not logged, for one reader of a stream that is known."""
        return self._streams[name].envelope(message)

    def is_open(self, name: str) -> bool:
        """Whether the stream is live."""
        stream = self._streams.get(name)
        return stream is not None and stream.is_open

    def resume_digest(self, name: str) -> bytes:
        """Of the token that resumes the newest stream of a name; empty where nothing does."""
        stream = self._streams.get(name)
        return b"" if stream is None else stream.resume_digest

    def row(self, name: str) -> StreamRow | None:
        """One stream."""
        stream = self._streams.get(name)
        return None if stream is None else stream.row

    def left(self) -> tuple[str, ...]:
        """The live streams that a killed server left behind."""
        return tuple(stream.name for stream in self._streams.values() if stream.is_live_on_disk)

    def streams(self) -> list[Stream]:
        """All of them, in the order in which they first began; to be read, not changed."""
        return list(self._streams.values())

    # --- for the log ---------------------------------------------------------------------

    def __getitem__(self, name: str) -> Stream:
        return self._streams[name]

    def load(self, rows: Iterable[StreamRow]) -> None:
        """Know what the file knows."""
        for row in rows:
            self._streams[row.name] = Stream(
                row.id,
                row.name,
                row.last_seq,
                row.session,
                row.resume_digest,
                is_live_on_disk=bool(row.is_live),
                opened_ms=row.opened_ms,
                closed_ms=row.closed_ms,
                session_id=row.session_id,
                first_seq=row.first_seq,
                delivered_seq=row.last_seq,
                epoch_ms=row.epoch_ms,
                closed_reason=row.closed_reason,
            )
            self._next_id = max(self._next_id, row.id + 1)

    def get_or_add(self, name: str) -> Stream:
        """The stream of a name, known from now on."""
        if name not in self._streams:
            self._streams[name] = Stream(self._next_id, name)
            self._next_id += 1
            self.generation += 1
        return self._streams[name]

    def forget(self, name: str) -> None:
        """Retention took what the file had of a stream; one that began again meanwhile stays."""
        stream = self._streams[name]
        if not stream.is_open and not stream.n_waiting:
            del self._streams[name]
            self.generation += 1
