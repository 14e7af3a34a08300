"""Sessions in the log's file: kept with their messages, gone with them, and found in older files."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from streaming.config import LogConfig
from streaming.errors import LogError
from streaming.log.log import Log
from streaming.log.store import TRIM_ROWS, Began, Closed, Logged, Op, Opened, Store
from streaming.protocol import Envelope, Flushed, SessionClosed, decode
from tests.streaming.support import TIMEOUT_S

OLD = Path(__file__).with_name("data") / "log_v1.db"
DAY_MS = 24 * 3600 * 1000


def ids(store: Store, stream: int) -> list[str]:
    """The sessions of a stream, newest first."""
    return [session.id for session in store.sessions(stream, 10**9, 10**9)]


def daily(store: Store, n_days: int, n_messages: int) -> None:
    """A name that is used every day, and is live on the last."""
    seq = 0
    for day in range(n_days):
        at_ms = day * DAY_MS
        ops: list[Op] = [
            Opened(1, "standup", day + 1, seq, at_ms, b"", f"s{day}"),
            Began(1, day + 1, at_ms + 5),
        ]
        for _ in range(n_messages):
            seq += 1
            ops.append(Logged(seq, 1, day + 1, seq, "flushed", at_ms, b"x"))
        store.write([*ops, *([Closed(1, at_ms + 9, "closed")] if day < n_days - 1 else [])])


def test_a_session_goes_with_its_last_message(tmp_path: Path) -> None:
    """In bounded steps; one of which some are kept stays, and so does the one that is live."""
    store = Store(tmp_path / "log.sqlite")
    daily(store, 5, TRIM_ROWS // 2 + 10)
    assert ids(store, 1) == ["s4", "s3", "s2", "s1", "s0"]
    assert not store.trim(1, 2**40, 1000).is_done  # takes a part of what is older than a day
    assert ids(store, 1) == ["s4", "s3", "s2", "s1"]
    for before_ms, expected in ((3 * DAY_MS, ["s4", "s3"]), (9 * DAY_MS, ["s4"])):
        while not store.trim(before_ms, 2**40, 1000).is_done:
            pass
        assert ids(store, 1) == expected
    store.write([Closed(1, 5 * DAY_MS, "closed")])
    while not store.trim(9 * DAY_MS, 2**40, 1000).is_done:
        pass
    assert (ids(store, 1), store.streams()) == ([], [])
    store.close()


def test_a_session_is_what_was_said_of_it(tmp_path: Path) -> None:
    """Its times, why it ended, and the range of its messages, which grows while it is live."""
    store = Store(tmp_path / "log.sqlite")
    daily(store, 2, 3)
    live, over = store.sessions(1, 10**9, 10)
    assert (over.number, over.opened_ms, over.epoch_ms, over.closed_ms) == (1, 0, 5, 9)
    assert (over.reason, over.first_seq, over.last_seq, over.is_live) == ("closed", 1, 3, False)
    assert (live.reason, live.closed_ms, live.first_seq, live.last_seq) == (None, None, 4, 6)
    assert live.is_live
    assert store.session(1, "s0") == over
    assert store.session(2, "s0") is None
    assert store.sessions(1, 2, 10) == [over]
    store.close()


async def test_sessions_are_there_again_after_a_restart(tmp_path: Path) -> None:
    """The directory knows the newest of each stream: its id, its range and its clock."""
    config = LogConfig(path=str(tmp_path / "log.sqlite"))
    log = Log(config, lambda: 1000)
    async with asyncio.timeout(TIMEOUT_S), log.running():
        for session_id in ("one", "two"):
            log.open("a", session_id=session_id)
            log.began("a", 77)
            log.append("a", Flushed(session_id, 0))
            if session_id == "one":
                log.append("a", SessionClosed("idle", 0, 0, 0))
                log.close("a")
    again = Log(config, lambda: 2000)
    found: list[Envelope] = []
    again.deliver_to(lambda row: found.append(decode(row.frame)))
    async with asyncio.timeout(TIMEOUT_S), again.running():
        assert again.id == log.id
        span = again.directory.span("a")
        assert span is not None
        assert (span.session, span.first_seq, span.last_seq) == ("two", 3, None)
        again.reopen("a", None)
        again.append("a", Flushed("on", 0))
        await again.settled()
        assert found == [Envelope("a", 4, Flushed("on", 0), "two", 77)]
        over = await again.reader.session("a", "one")
        assert over is not None
        assert (over.reason, over.first_seq, over.last_seq, over.epoch_ms) == ("idle", 1, 2, 77)


def test_an_older_file_gets_its_sessions_once(tmp_path: Path) -> None:
    """With ids that stay, from its messages; those are left as they were."""
    path = tmp_path / "log.sqlite"
    shutil.copy(OLD, path)
    with closing(sqlite3.connect(OLD)) as old:
        messages = old.execute("SELECT * FROM messages ORDER BY id").fetchall()
    seen = []
    for _ in range(2):
        store = Store(path)
        seen.append((store.id, [store.sessions(row.id, 10, 10) for row in store.streams()]))
        store.close()
    assert seen[0] == seen[1]
    ((talk,), (live,)) = seen[0][1]
    assert (talk.reason, talk.first_seq, talk.last_seq, talk.is_live) == ("closed", 1, 9, False)
    assert (live.reason, live.first_seq, live.last_seq, live.is_live) == (None, 1, 2, True)
    assert (talk.epoch_ms, live.epoch_ms) == (1764000000000, 1764000000000)
    assert talk.id != live.id
    with closing(sqlite3.connect(path)) as new:
        assert new.execute("SELECT * FROM messages ORDER BY id").fetchall() == messages


def test_an_older_file_with_several_sessions_and_with_none_of_the_newest(tmp_path: Path) -> None:
    """Sessions whose messages retention took in part, and a stream of which no message is left."""
    path = tmp_path / "log.sqlite"
    shutil.copy(OLD, path)
    with closing(sqlite3.connect(path, isolation_level=None)) as old:
        old.execute("UPDATE streams SET session = 3, last_seq = 12 WHERE id = 1")
        rows = [(100 + i, 1, 2 + i // 2, 10 + i, "flushed", 1000 + i, "{}") for i in range(3)]
        old.executemany("INSERT INTO messages VALUES(?, ?, ?, ?, ?, ?, ?)", rows)
        old.execute("DELETE FROM messages WHERE stream = 1 AND seq < 5 OR stream = 2")
    store = Store(path)
    talk = store.sessions(1, 10, 10)
    assert [(s.number, s.first_seq, s.last_seq) for s in talk] == [(3, 12, 12), (2, 10, 11), (1, 5, 9)]
    (live,) = store.sessions(2, 10, 10)
    assert (live.first_seq, live.last_seq, live.is_live) == (3, 2, True)
    store.close()


def test_an_older_file_that_cannot_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    """All of the upgrade, or none."""
    path = tmp_path / "log.sqlite"
    shutil.copy(OLD, path)
    with closing(sqlite3.connect(path, isolation_level=None)) as old:
        old.execute("CREATE TABLE log(id TEXT)")  # something is in its way
        version = old.execute("PRAGMA user_version").fetchone()
    with pytest.raises(LogError, match="cannot be used: table log already exists"):
        Store(path)
    with closing(sqlite3.connect(path)) as old:
        assert old.execute("PRAGMA user_version").fetchone() == version
        assert old.execute("SELECT count(*) FROM sqlite_master WHERE name = 'sessions'").fetchone() == (0,)
