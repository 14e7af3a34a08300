"""Bad days: files taken away, a clock that jumps, locks and full disks at the end, a reader for hours."""

from __future__ import annotations

import asyncio
import logging
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus

from streaming.config import LogConfig
from streaming.errors import LogError
from streaming.log import connections
from streaming.log import log as log_module
from streaming.log.log import Log
from streaming.log.seen_clock import SeenClock
from streaming.log.store import KEPT_LIVE, Logged, Opened, Store
from streaming.protocol import Close, Flush, Flushed, SessionClosed, SessionCreated, encode_client
from tests.streaming.server.admission_support import ask
from tests.streaming.support import (
    TIMEOUT_S,
    Running,
    eventually,
    receive_until,
    running_server,
    s16,
    utterances,
)

DAY_MS = 24 * 3600 * 1000
DAY_S = 24 * 3600


def kept(path: Path, folder: Path) -> list[int]:
    """The `seq` of what a server would find if this one were killed now."""
    folder.mkdir()
    for name in (path.name, f"{path.name}-wal"):
        if (path.parent / name).exists():
            shutil.copy(path.parent / name, folder / name)
    with closing(sqlite3.connect(folder / path.name)) as copy:
        return [row[0] for row in copy.execute("SELECT seq FROM messages ORDER BY seq")]


def delete(*names: str) -> Callable[[Path], None]:
    """Files of a log, by their endings."""

    def take_away(path: Path) -> None:
        for name in names:
            path.with_name(path.name + name).unlink()

    return take_away


def move_wal(path: Path) -> None:
    """To where a cleaning script would put it."""
    path.with_name(path.name + "-wal").rename(path.with_name("elsewhere"))


def replace_wal(path: Path) -> None:
    """By an empty file."""
    path.with_name(path.name + "-wal").unlink()
    path.with_name(path.name + "-wal").touch()


@pytest.mark.parametrize(
    "take_away",
    [delete("-wal"), delete("-wal", "-shm"), move_wal, replace_wal, delete(""), delete("", "-wal", "-shm")],
    ids=["-wal", "-wal and -shm", "moved", "replaced", "the file", "all of it"],
)
async def test_a_file_that_is_taken_away_is_written_again(
    tmp_path: Path, take_away: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Within a second, with all that was in it; a kill after that costs nothing."""
    path = tmp_path / "log.sqlite"
    log = Log(LogConfig(path=str(path)), lambda: 0)
    async with asyncio.timeout(TIMEOUT_S), log.running():
        log.open("a")
        for number in range(1, 6):
            log.append("a", Flushed(str(number), 0))
        await log.settled()
        take_away(path)
        await eventually(lambda: "written again from what is open" in caplog.text)
        assert kept(path, tmp_path / "first") == [1, 2, 3, 4, 5]
        log.append("a", Flushed("6", 0))
        await log.settled()
        assert kept(path, tmp_path / "second") == [1, 2, 3, 4, 5, 6]
        row = log.directory.row("a")
        assert row is not None
        assert [found.seq for found in await log.reader.of_session(row, ("flushed",), 10)] == [
            1,
            2,
            3,
            4,
            5,
            6,
        ]
    assert kept(path, tmp_path / "third") == [1, 2, 3, 4, 5, 6]


async def test_a_log_that_is_replaced_ends_the_server(tmp_path: Path) -> None:
    """Another database is not written over."""
    path = tmp_path / "log.sqlite"
    log = Log(LogConfig(path=str(path)), lambda: 0)
    async with asyncio.timeout(TIMEOUT_S), log.running():
        path.unlink()
        path.write_text("mine")
        with pytest.raises(LogError, match="was replaced by another file"):
            await log.fault()
    assert path.read_text() == "mine"


@pytest.mark.parametrize("jump_s", [40 * DAY_S, 50 * 365 * DAY_S, -40 * DAY_S, 120])
def test_a_clock_that_jumps_makes_nothing_old(jump_s: int, caplog: pytest.LogCaptureFixture) -> None:
    """Ahead it is believed slowly, back at once; either way somebody is told."""
    clock = SeenClock(1_000_000_000_000, 0.0)
    before = clock.now_ms(1_000_000_030_000, 30.0)
    after = clock.now_ms(1_000_000_060_000 + jump_s * 1000, 60.0)
    assert after - before <= 33_000
    assert "the clock jumped by" in caplog.text
    later = clock.now_ms(1_000_000_060_000 + (jump_s + DAY_S) * 1000, 60.0 + DAY_S)
    assert 0.9 * DAY_MS < later - after < 1.2 * DAY_MS


def test_a_clock_that_is_corrected_is_followed(caplog: pytest.LogCaptureFixture) -> None:
    """Some seconds now and then, as NTP does."""
    clock = SeenClock(0, 0.0)
    for minute in range(1, 600):
        seen = clock.now_ms(minute * 60_000 + minute * 100, minute * 60.0)
        assert seen == minute * 60_000 + minute * 100
    assert not caplog.records


async def test_a_jump_of_40_days_deletes_no_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither one that has ended nor messages of a live one; those of after the jump count from there."""
    monkeypatch.setattr(log_module, "TRIM_INTERVAL_S", 0.05)
    now_ms = 1_700_000_000_000
    log = Log(LogConfig(path=str(tmp_path / "log.sqlite"), keep_days=30), lambda: now_ms)
    async with asyncio.timeout(TIMEOUT_S), log.running():
        for name in ("over", "live"):
            log.open(name)
            log.append(name, Flushed("1", 0))
        log.close("over")
        await log.settled()
        now_ms += 40 * DAY_MS
        await eventually(lambda: "the clock jumped" in caplog.text)
        log.append("live", Flushed("2", 0))
        await asyncio.sleep(0.3)  # retention looks several times
        await log.settled()
        assert log.n_messages == 3
        assert log.directory.has("over")


def test_a_long_reader_leaves_no_giant_wal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cut once nobody needs it any more; meanwhile nobody waits."""
    monkeypatch.setattr(connections, "MAX_WAL_BYTES", 256 * 1024)
    path = tmp_path / "log.sqlite"
    wal = path.with_name("log.sqlite-wal")
    store = Store(path)
    store.write([Opened(1, "a", 1, 0, 0, b"")])
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM messages").fetchall()
        for seq in range(1, 60):
            store.write([Logged(seq, 1, 1, seq, "flushed", 0, b"x" * 20_000)])
            store.shorten()
        assert wal.stat().st_size > 1_000_000
    store.shorten()
    assert wal.stat().st_size <= 256 * 1024
    assert store.n_messages() == 59
    store.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock is not waited for as long as in life."""
    monkeypatch.setattr(connections, "BUSY_TIMEOUT_S", 0.1)


async def test_a_stop_while_the_log_is_locked_ends_in_time(
    tmp_path: Path, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    """It says what was not kept; the next server goes on with the stream from what was."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "log.sqlite"
    audio = s16(utterances(1.0))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        limited = running_server("[server]\nstop_timeout_s = 2.0\n", folder=tmp_path)
        async with limited as running, running.stream("a") as connection:
            created = (await receive_until(connection, SessionCreated))[-1].message
            assert isinstance(created, SessionCreated)
            await connection.send(audio)
            await connection.send(encode_client(Flush("1")))
            await receive_until(connection, Flushed)
            other.execute("BEGIN IMMEDIATE")
            await connection.send(audio)
            await connection.send(encode_client(Flush("2")))
            await eventually(lambda: bool(running.server._log.blocked))
            status, body = await ask(running, "/readyz")
            assert (status, body) == (503, "log: another program holds a lock on it\n")
            begun = asyncio.get_running_loop().time()
            running.stop.set()
            async with asyncio.timeout(TIMEOUT_S):
                await eventually(lambda: "not kept:" in caplog.text)
                await connection.wait_closed()
        assert asyncio.get_running_loop().time() - begun < 5  # with the engine's end
        other.execute("ROLLBACK")
    assert "messages of 1 streams: a" in caplog.text
    async with running_server(folder=tmp_path) as running, asyncio.timeout(TIMEOUT_S):
        connection = await resumed(running, f"resume={created.resume_token}")
        await connection.send(audio)
        await connection.send(encode_client(Close()))
        closed = (await receive_until(connection, SessionClosed))[-1].message
        assert isinstance(closed, SessionClosed)
        assert closed.reason == "closed"


async def resumed(running: Running, query: str) -> ClientConnection:
    """A connection of a stream that a dead server left, once the engine has it again."""
    while True:
        try:
            return await running.stream("a", query)
        except InvalidStatus:
            await asyncio.sleep(0.05)


def test_a_live_stream_that_floods_the_log_pushes_nobody_out(tmp_path: Path) -> None:
    """Where only live streams are left, the one that says most loses its older messages."""
    store = Store(tmp_path / "log.sqlite")
    store.write([Opened(i, f"s{i}", 1, 0, 0, b"") for i in (1, 2)])
    n = 2 * KEPT_LIVE
    store.write([Logged(i + 1, 1, 1, i + 1, "flushed", 0, b"x") for i in range(n)])
    store.write([Logged(n + i + 1, 2, 1, i + 1, "flushed", 0, b"x" * 8000) for i in range(3 * n)])
    while not store.trim(0, 16 * 1024 * 1024, 1000).is_done:
        pass
    assert store.id_of(1, 1) is not None  # older than all of the flood
    assert store.id_of(2, 1) is None
    assert store.id_of(2, 3 * n) is not None
    store.close()
