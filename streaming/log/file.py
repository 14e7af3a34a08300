"""The log's file as a file: locked, created, checked, and brought to this version's schema."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import sqlite3
from pathlib import Path
from typing import IO

from streaming.errors import LogError

logger = logging.getLogger(__name__)

APPLICATION_ID = 0x6D6F7373  # "moss"
VERSION = 2  # of the schema; a file of version 1 is brought to it, one of another version is refused
CHECK_BYTES = 256 * 1024 * 1024  # a larger file is not read whole at each start

_OF_VERSION_2 = """
CREATE TABLE log(id TEXT NOT NULL);  -- one row
CREATE TABLE sessions(
    stream INTEGER NOT NULL,
    number INTEGER NOT NULL,  -- within its stream, from 1
    id TEXT NOT NULL,  -- unique
    opened_ms INTEGER NOT NULL,
    epoch_ms INTEGER,  -- of the first sample; NULL: none came yet
    closed_ms INTEGER,
    reason TEXT,  -- of `session.closed`
    first_seq INTEGER NOT NULL,
    last_seq INTEGER,  -- NULL: it is live, and the stream's counts
    PRIMARY KEY(stream, number)
) WITHOUT ROWID;
CREATE INDEX session_by_id ON sessions(stream, id);
"""
_SCHEMA = f"""
CREATE TABLE streams(
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    session INTEGER NOT NULL,  -- how many times a stream of this name began
    last_seq INTEGER NOT NULL,
    is_live INTEGER NOT NULL,
    opened_ms INTEGER NOT NULL,  -- Unix time, as every *_ms here
    closed_ms INTEGER,
    resume_digest BLOB NOT NULL  -- SHA-256 of the token its producer resumes with; empty: it cannot
);
CREATE INDEX closed ON streams(closed_ms) WHERE NOT is_live;
CREATE TABLE messages(
    id INTEGER PRIMARY KEY,  -- the order of the whole log
    stream INTEGER NOT NULL,
    session INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    type TEXT NOT NULL,
    at_ms INTEGER NOT NULL,
    frame TEXT NOT NULL  -- as it is sent
);
CREATE UNIQUE INDEX of_stream ON messages(stream, seq);
-- Of live streams: what a restarted server goes on from, and the audio that takes.
CREATE TABLE states(stream INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE audio(stream INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL, pcm BLOB NOT NULL);
CREATE INDEX audio_of_stream ON audio(stream, stop);
{_OF_VERSION_2}
"""
# Sessions of version 1 are those of which messages are kept, and the newest of each stream. Their
# messages stay as they were sent: without the session's id, and found by its first and last `seq`.
_FROM_VERSION_1 = f"""
{_OF_VERSION_2}
INSERT INTO sessions
SELECT m.stream, m.session, printf('%011x', min(m.at_ms)) || lower(hex(randomblob(4))), min(m.at_ms),
    max(CASE type WHEN 'session.created' THEN json_extract(frame, '$.epoch_ms') END),
    max(CASE type WHEN 'session.closed' THEN m.at_ms END),
    max(CASE type WHEN 'session.closed' THEN json_extract(frame, '$.reason') END),
    min(m.seq), max(m.seq)
FROM messages AS m JOIN streams AS s ON s.id = m.stream GROUP BY m.stream, m.session;
INSERT OR IGNORE INTO sessions
SELECT id, session, printf('%011x', opened_ms) || lower(hex(randomblob(4))), opened_ms, NULL, closed_ms, NULL,
    last_seq + 1, last_seq FROM streams;
UPDATE sessions SET last_seq = NULL
WHERE EXISTS (SELECT 1 FROM streams AS s WHERE s.id = stream AND s.session = number AND s.is_live);
"""


def locked(path: Path) -> IO[bytes]:
    """The lock that keeps other servers away, for as long as it is open.

    Raises:
        LogError: another server has it, or the folder cannot be written.
    """
    try:
        # A folder that is missing is not made: it may be a disk that is not mounted, or a typing error.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # what was said is its owner's business
        lock = path.with_name(path.name + ".lock").open("ab")
    except OSError as exc:
        raise LogError(f"log {path}: cannot be opened: {exc}") from exc
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        lock.close()
        why = "is another server's; give this one a [log] path of its own"
        raise LogError(f"log {path}: {why if exc.errno == errno.EWOULDBLOCK else exc}") from exc
    return lock


def prepare(writer: sqlite3.Connection, path: Path) -> str:
    """Create the tables in a new file; refuse one that is not ours or not whole. Gives the log's id.

    Raises:
        LogError: what is wrong, and what to do.
        sqlite3.Error: it is no database, or cannot be written.
    """
    application, version = _one(writer, "PRAGMA application_id"), _one(writer, "PRAGMA user_version")
    if not _one(writer, "SELECT count(*) FROM sqlite_master"):
        writer.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before the first table
        writer.executescript(f"BEGIN; {_SCHEMA} {_marks()} COMMIT")
    elif application != APPLICATION_ID:
        raise LogError(f"log {path}: is another program's database; set [log] path to another file")
    elif version not in (1, VERSION):
        raise LogError(
            f"log {path}: has schema version {version}; expected {VERSION}; "
            "move it away or set [log] path to another file"
        )
    elif path.stat().st_size <= CHECK_BYTES:
        found = writer.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise LogError(f"log {path}: is corrupt: {found}; move it away or set [log] path")
    writer.execute("PRAGMA journal_mode = WAL").fetchall()
    writer.execute("PRAGMA synchronous = FULL")
    if version == 1:
        logger.warning("log %s: is brought to schema %d, which earlier servers refuse", path, VERSION)
        writer.executescript(f"BEGIN IMMEDIATE; {_FROM_VERSION_1} {_marks()} COMMIT")
    return str(writer.execute("SELECT id FROM log").fetchone()[0])


def _marks() -> str:
    """What a file of this version is known by; a new log gets an id of its own."""
    return (
        f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION};"
        f" INSERT INTO log VALUES('{secrets.token_hex(8)}');"
    )


def _one(writer: sqlite3.Connection, sql: str) -> int:
    return int(writer.execute(sql).fetchone()[0])
