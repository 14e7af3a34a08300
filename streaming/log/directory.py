"""What is known of every stream of the log, live or over, without reading the file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from streaming.log.store import Saved, StreamRow


class StateSource(Protocol):
    """A live stream that can go on after a restart of the server."""

    def save(self, stream: int) -> Saved:
        """What it resumes from, and the audio that came since the last call."""


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

    @property
    def row(self) -> StreamRow:
        """What others may know of it."""
        return StreamRow(
            self.id, self.name, self.session, self.last_seq, self.is_open, self.opened_ms, self.closed_ms, b""
        )


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
