"""The log's file: one SQLite database, written by one thread and read by another.

Knows rows, not streams' lives: what goes into one transaction is the caller's (`log`). Blocks; never
called on the event loop. A commit is on the disk when `write` returns (WAL, synchronous=FULL), so
that neither a killed process nor a power cut takes it back.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streaming.errors import LogError, LogFull
from streaming.log.connections import Connections, failure_of
from streaming.log.row import Row
from streaming.protocol import MAX_SEQ

SCAN = 20_000  # rows one read of many streams looks at
TRIM_ROWS = 2_000  # rows one step of retention deletes, so that commits in between wait little
KEPT_LIVE = 1_000  # newest messages of a live stream, which retention by size leaves alone

# The columns of a `Row`. The cast gives the bytes of the text, which nobody needs as a str.
_ROW = "name, seq, type, CAST(frame AS BLOB)"
_FROM = "FROM messages AS m CROSS JOIN streams AS s ON s.id = m.stream"  # in the order of messages


@dataclass(frozen=True, slots=True)
class Opened:
    """A stream begins, or begins again."""

    stream: int
    name: str
    session: int
    last_seq: int
    at_ms: int
    resume_digest: bytes
    session_id: str = ""


@dataclass(frozen=True, slots=True)
class Began:
    """The first sample of a stream's session came."""

    stream: int
    session: int
    epoch_ms: int


@dataclass(frozen=True, slots=True)
class Logged:
    """A message."""

    id: int
    stream: int
    session: int
    seq: int
    type: str
    at_ms: int
    frame: bytes


@dataclass(frozen=True, slots=True)
class Closed:
    """A stream is over; its state and audio go."""

    stream: int
    at_ms: int
    reason: str | None = None  # of its `session.closed`


@dataclass(frozen=True, slots=True)
class Unsaved:
    """A live stream cannot go on after a restart any more: what was saved of it goes."""

    stream: int


@dataclass(frozen=True, slots=True)
class Saved:
    """What a live stream goes on from after a restart: replaces what was saved before."""

    stream: int
    state: bytes
    start: int  # sample at which `pcm` begins: where the last one ended
    stop: int
    pcm: bytes  # float32 little-endian
    keep_from: int  # audio before this sample is not needed any more


Op = Opened | Began | Logged | Closed | Saved | Unsaved


@dataclass(frozen=True, slots=True)
class StreamRow:
    """What the file knows of a stream."""

    id: int
    name: str
    session: int
    last_seq: int
    is_live: bool
    opened_ms: int
    closed_ms: int | None
    resume_digest: bytes
    session_id: str = ""
    first_seq: int = 1  # of its newest session
    epoch_ms: int | None = None  # Unix time of its first sample; None: none came yet
    closed_reason: str | None = None


@dataclass(frozen=True, slots=True)
class SessionRow:
    """What the file knows of one session of a stream."""

    number: int
    id: str
    opened_ms: int
    epoch_ms: int | None
    closed_ms: int | None
    reason: str | None
    first_seq: int
    last_seq: int
    is_live: bool


@dataclass(frozen=True, slots=True)
class Query:
    """Which messages are read: of these streams, and by their ids in the order of the log."""

    after_id: int  # exclusive
    upto_id: int  # inclusive
    streams: tuple[int, ...]
    types: tuple[str, ...]  # empty: all
    after_seq: int  # of each stream
    upto_seq: int = MAX_SEQ  # of each stream, inclusive


@dataclass(frozen=True, slots=True)
class Page:
    """Some messages in order, and the id up to which the log holds no others of the query."""

    rows: tuple[Row, ...]
    upto_id: int


@dataclass(frozen=True, slots=True)
class Trimmed:
    """What a step of retention deleted."""

    n_messages: int
    last_id: int  # the newest message deleted; 0: none
    names: tuple[str, ...]  # streams of which nothing is left
    is_done: bool


class Store:
    """The file, locked against other servers. `write` and `trim` belong to a thread, the rest to another."""

    def __init__(self, path: Path) -> None:
        """Open or create it.

        Raises:
            LogError: it is in use, corrupt, no log, or a log of another version; says what to do.
        """
        self.path = path
        self._open = Connections(path)
        self.id = self._open.id  # of this log, and of no other one

    def close(self) -> None:
        """Give the file back; nothing is called afterwards."""
        self._open.close()

    # --- the writing thread --------------------------------------------------------------

    def write(self, ops: Sequence[Op]) -> None:
        """Commit these together: all of them are on the disk on return, or none.

        Raises:
            LogFull: not now; the same may be tried again.
            LogError: the file is broken.
        """
        with self._transaction():
            for op in ops:
                self._apply(op)

    def trim(self, before_ms: int, max_bytes: int, max_closed: int) -> Trimmed:
        """One step of retention, in the order of age, size, number.

        Args:
            before_ms: Unix time; streams that ended before it and messages of live ones are too old.
            max_bytes: Of the file, without its free pages and the audio of live streams. Of a live stream
                the newest `KEPT_LIVE` messages stay in any case.
            max_closed: Streams that have ended and may stay.

        Raises:
            LogFull, LogError: as `write`.
        """
        with self._transaction():
            trimmed = self._trim(before_ms, max_bytes, max_closed)
        if trimmed.last_id:
            # What was deleted stays so, and a later step gives back the pages that this one cannot.
            with contextlib.suppress(LogFull), self._errors():
                # As a script: `execute` takes one step of it, and each step frees one page.
                self._open.writer.executescript(f"PRAGMA incremental_vacuum({TRIM_ROWS})")
        return trimmed

    def look_after(self) -> str:
        """See whether the file is where it was. Where it was not, it is made whole; gives what was wrong.

        Raises:
            LogFull, LogError: as `write`.
        """
        lost = self._open.lost()
        if lost:
            self._open.make_whole()
        return lost

    def shorten(self) -> None:
        """Give back what a long reader made the file's `-wal` grow by."""
        self._open.shorten()

    def _apply(self, op: Op) -> None:
        run = self._open.writer.execute
        match op:
            case Logged():
                run(
                    "INSERT INTO messages VALUES(?, ?, ?, ?, ?, ?, CAST(? AS TEXT))",
                    (op.id, op.stream, op.session, op.seq, op.type, op.at_ms, op.frame),
                )
                run("UPDATE streams SET last_seq = ? WHERE id = ?", (op.seq, op.stream))
            case Saved():
                run("INSERT OR REPLACE INTO states VALUES(?, ?)", (op.stream, op.state))
                if op.pcm:
                    run("INSERT INTO audio VALUES(?, ?, ?, ?)", (op.stream, op.start, op.stop, op.pcm))
                run("DELETE FROM audio WHERE stream = ? AND stop <= ?", (op.stream, op.keep_from))
            case Opened():
                # Retention may have taken the row between the stream's end and this.
                run(
                    "INSERT OR REPLACE INTO streams VALUES(?, ?, ?, ?, 1, ?, NULL, ?)",
                    (op.stream, op.name, op.session, op.last_seq, op.at_ms, op.resume_digest),
                )
                run(
                    "INSERT INTO sessions VALUES(?, ?, ?, ?, NULL, NULL, NULL, ?, NULL)",
                    (op.stream, op.session, op.session_id, op.at_ms, op.last_seq + 1),
                )
            case Began():
                run(
                    "UPDATE sessions SET epoch_ms = ? WHERE stream = ? AND number = ?",
                    (op.epoch_ms, op.stream, op.session),
                )
            case Closed():
                run("UPDATE streams SET is_live = 0, closed_ms = ? WHERE id = ?", (op.at_ms, op.stream))
                run(
                    "UPDATE sessions SET closed_ms = ?, reason = ?, last_seq = s.last_seq FROM streams AS s"
                    " WHERE s.id = ? AND sessions.stream = s.id AND sessions.number = s.session",
                    (op.at_ms, op.reason, op.stream),
                )
                self._forget(op.stream)
            case Unsaved():
                self._forget(op.stream)

    def _forget(self, stream: int) -> None:
        """Delete the state and the audio that a stream was saved with."""
        self._open.writer.execute("DELETE FROM states WHERE stream = ?", (stream,))
        self._open.writer.execute("DELETE FROM audio WHERE stream = ?", (stream,))

    def _trim(self, before_ms: int, max_bytes: int, max_closed: int) -> Trimmed:
        one = self._one
        n_closed = one("SELECT count(*) FROM streams WHERE NOT is_live")
        oldest = self._open.writer.execute(
            "SELECT id, name, closed_ms FROM streams WHERE NOT is_live ORDER BY closed_ms LIMIT 1"
        ).fetchone()
        used = (one("PRAGMA page_count") - one("PRAGMA freelist_count")) * one("PRAGMA page_size")
        is_large = used - one("SELECT coalesce(sum(length(pcm)), 0) FROM audio") > max_bytes
        if oldest is not None and (oldest[2] < before_ms or n_closed > max_closed or is_large):
            gone = self._delete("WHERE m.stream = ? ORDER BY m.seq LIMIT ?", oldest[0])
            if len(gone) == TRIM_ROWS:  # there may be more
                return Trimmed(len(gone), gone[-1], (), is_done=False)
            self._open.writer.execute("DELETE FROM streams WHERE id = ?", oldest[:1])
            self._open.writer.execute("DELETE FROM sessions WHERE stream = ?", oldest[:1])
            return Trimmed(len(gone), gone[-1] if gone else 0, (oldest[1],), is_done=False)
        # Of live streams the oldest: where the log is too large, of the one that says most, so that it
        # pushes nobody else out; or those that are too old.
        if is_large:
            most = (
                "SELECT id FROM streams AS l WHERE is_live ORDER BY"
                " last_seq - (SELECT min(seq) FROM messages WHERE stream = l.id) DESC LIMIT 1"
            )
            where = f"WHERE m.stream = ({most}) AND m.seq <= s.last_seq - ? ORDER BY m.seq LIMIT ?"
            gone = self._delete(where, KEPT_LIVE)
        else:
            # Ids are in the order of time: not all of a log is looked at where its first part is new.
            part = f"SELECT max(id) FROM (SELECT id FROM messages ORDER BY id LIMIT {TRIM_ROWS})"
            gone = self._delete(f"WHERE m.at_ms < ? AND m.id <= ({part}) ORDER BY m.id LIMIT ?", before_ms)
        return Trimmed(len(gone), gone[-1] if gone else 0, (), is_done=not gone)

    def _delete(self, where: str, value: int) -> list[int]:
        """Delete the first messages that a condition with a value finds; their ids, in its order."""
        gone = self._open.writer.execute(
            f"SELECT m.id, m.stream {_FROM} {where}", (value, TRIM_ROWS)
        ).fetchall()
        self._open.writer.executemany("DELETE FROM messages WHERE id = ?", [row[:1] for row in gone])
        # With its last message a session goes, unless it is the newest of its stream.
        self._open.writer.executemany(
            "DELETE FROM sessions WHERE stream = ?1 AND number < coalesce("
            "(SELECT session FROM messages WHERE stream = ?1 ORDER BY seq LIMIT 1),"
            " (SELECT session FROM streams WHERE id = ?1))",
            {row[1:] for row in gone},
        )
        return [int(row[0]) for row in gone]

    def _one(self, sql: str) -> int:
        return int(self._open.writer.execute(sql).fetchone()[0])

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            try:
                self._open.writer.execute("BEGIN IMMEDIATE")
                yield
                self._open.writer.execute("COMMIT")
            except sqlite3.Error:
                with contextlib.suppress(sqlite3.Error):  # a full disk may have rolled back by itself
                    self._open.writer.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What a write that fails is raised as."""
        try:
            yield
        except sqlite3.Error as exc:
            raise failure_of(self.path, exc) from exc

    # --- the reading thread --------------------------------------------------------------

    def streams(self) -> list[StreamRow]:
        """Every stream, in the order in which they first began."""
        rows = self._read(
            "SELECT s.id, name, session, s.last_seq, is_live, s.opened_ms, s.closed_ms, resume_digest,"
            " n.id, n.first_seq, n.epoch_ms, n.reason"
            " FROM streams AS s JOIN sessions AS n ON n.stream = s.id AND n.number = s.session ORDER BY s.id"
        )
        return [StreamRow(*row) for row in rows]

    def sessions(self, stream: int, before: int, limit: int) -> list[SessionRow]:
        """The newest sessions of a stream before the one of a number, newest first."""
        return self._sessions("n.number < ? ORDER BY n.number DESC LIMIT ?", stream, before, limit)

    def session(self, stream: int, session_id: str) -> SessionRow | None:
        """One session of a stream; None where it is not kept."""
        rows = self._sessions("n.id = ? LIMIT 1", stream, session_id)
        return rows[0] if rows else None

    def _sessions(self, where: str, *values: object) -> list[SessionRow]:
        """Sessions of a stream, which is the first value, that a condition finds."""
        rows = self._read(
            "SELECT n.number, n.id, n.opened_ms, n.epoch_ms, n.closed_ms, n.reason, n.first_seq,"
            " coalesce(n.last_seq, s.last_seq), s.is_live AND n.number = s.session"
            f" FROM sessions AS n JOIN streams AS s ON s.id = n.stream WHERE n.stream = ? AND {where}",
            *values,
        )
        return [SessionRow(*row) for row in rows]

    def n_messages(self) -> int:
        """How many messages are kept."""
        return int(self._read("SELECT count(*) FROM messages")[0][0])

    def last_id(self) -> int:
        """The id of the newest message of the log; 0 where there is none."""
        return int(self._read("SELECT coalesce(max(id), 0) FROM messages")[0][0])

    def last_seq(self, stream: int) -> int:
        """The `seq` of the newest message of a stream; 0 where there is none."""
        return int(self._read("SELECT coalesce(max(seq), 0) FROM messages WHERE stream = ?", stream)[0][0])

    def saved(self, stream: int) -> bytes | None:
        """The state of a live stream."""
        rows = self._read("SELECT body FROM states WHERE stream = ?", stream)
        return bytes(rows[0][0]) if rows else None

    def audio(self, stream: int) -> list[tuple[int, bytes]]:
        """The saved audio of a live stream: where each piece begins, and its samples."""
        return self._read("SELECT start, pcm FROM audio WHERE stream = ? ORDER BY start", stream)

    def id_of(self, stream: int, seq: int) -> int | None:
        """The id of a message; None where it is not kept."""
        rows = self._read("SELECT id FROM messages WHERE stream = ? AND seq = ?", stream, seq)
        return int(rows[0][0]) if rows else None

    def first_id(self, stream: int, after_seq: int) -> int | None:
        """The id of the first message of a stream after a `seq`; None where there is none."""
        rows = self._read(
            "SELECT id FROM messages WHERE stream = ? AND seq > ? ORDER BY seq LIMIT 1", stream, after_seq
        )
        return int(rows[0][0]) if rows else None

    def messages(self, query: Query, limit: int) -> Page:
        """The oldest messages of a query, at most `limit`; of many streams, from a part of the log."""
        where = "m.id > ? AND m.id <= ? AND seq > ? AND seq <= ?"
        values: list[int | str] = [query.after_id, query.upto_id, query.after_seq, query.upto_seq]
        if len(query.streams) == 1:
            where, order, upto = f"stream = ? AND {where}", "seq", query.upto_id
            values.insert(0, query.streams[0])
        else:
            upto = min(query.upto_id, query.after_id + SCAN)
            where, order = f"{where} AND +stream IN (SELECT value FROM json_each(?))", "m.id"
            values[1] = upto
            values.append(json.dumps(query.streams))
        if query.types:
            where += " AND type IN (SELECT value FROM json_each(?))"
            values.append(json.dumps(query.types))
        rows = self._read(
            f"SELECT {_ROW}, m.id {_FROM} WHERE {where} ORDER BY {order} LIMIT {limit}", *values
        )
        if len(rows) == limit:
            upto = int(rows[-1][-1])
        return Page(tuple(Row(*row[:-1]) for row in rows), upto)

    def of_session(
        self, stream: int, session: int, types: Sequence[str], limit: int, before_seq: int
    ) -> list[Row]:
        """The newest `limit` messages of some types in one session before a `seq`, oldest first."""
        rows = self._read(
            f"SELECT {_ROW} {_FROM} WHERE stream = ? AND m.session = ? AND seq < ?"
            " AND type IN (SELECT value FROM json_each(?)) ORDER BY seq DESC LIMIT ?",
            stream,
            session,
            before_seq,
            json.dumps(list(types)),
            limit,
        )
        return [Row(*row) for row in reversed(rows)]

    def _read(self, sql: str, *values: object) -> list[Any]:
        try:
            with self._open.reading:
                return self._open.reader.execute(sql, values).fetchall()
        except sqlite3.Error as exc:
            raise LogError(f"log {self.path}: cannot be read: {exc}") from exc
