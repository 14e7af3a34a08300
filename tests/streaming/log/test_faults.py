"""What goes wrong in one place stays there: one stream's state, a lock of another program, an old file."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from streaming.config import LogConfig
from streaming.log.directory import StateSource
from streaming.log.history import History
from streaming.log.hub import Hub
from streaming.log.log import Log
from streaming.log.store import KEPT_LIVE, TRIM_ROWS, Closed, Logged, Opened, Saved, Store
from streaming.protocol import (
    Close,
    Flushed,
    SessionClosed,
    Subscribe,
    TranscriptDelta,
    decode,
    encode_client,
)
from tests.streaming.support import TIMEOUT_S, receive_until, running_server, s16, utterances

OLD = Path(__file__).with_name("data") / "log_v1.db"  # a log of commit 353580c, its server killed
MIB = 1024 * 1024


class Broken:
    """A stream whose state cannot be made, from the second time on."""

    def __init__(self) -> None:
        self.n_saved = 0

    def save(self, stream: int) -> Saved:
        """Once."""
        self.n_saved += 1
        if self.n_saved > 1:
            raise ValueError("SECRET of the client")
        return Saved(stream, b"first", 0, 1, bytes(4), 0)


class Whole:
    """A stream whose state can always be made."""

    def save(self, stream: int) -> Saved:
        """The same each time."""
        return Saved(stream, b"whole", 0, 0, b"", 0)


async def test_a_state_that_cannot_be_made_costs_its_stream_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its messages are kept, nothing stale is left to resume from, and others are saved as before."""
    failed: list[str] = []
    log = Log(LogConfig(path=str(tmp_path / "log.sqlite")), lambda: 0, on_unsaved=failed.append)
    async with asyncio.timeout(TIMEOUT_S), log.running():
        log.open("bad", Broken())
        log.open("good", Whole())
        await log.settled()
        for name in ("bad", "good", "bad"):
            log.append(name, Flushed(name, 0))
            await log.settled()
        assert failed == ["bad"]
        assert (await log.reader.read_left("bad")).state is None
        assert (await log.reader.read_left("bad")).audio == []
        assert (await log.reader.read_left("good")).state == b"whole"
        assert log.directory.last_seq("bad") == 2
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "stream bad: its state cannot be saved: ValueError" in record.getMessage()
    assert "SECRET" not in caplog.text


async def test_a_stream_that_cannot_be_saved_ends_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed as `internal` and its connection with 1011; the server and the other streams go on."""
    begin = Log.open

    def failing(
        log: Log,
        name: str,
        source: StateSource | None = None,
        resume_digest: bytes = b"",
        session_id: str | None = None,
    ) -> None:
        begin(log, name, Broken() if name == "bad" else source, resume_digest, session_id)

    monkeypatch.setattr(Log, "open", failing)
    audio = s16(utterances(1.0))
    async with running_server() as running, running.stream("good") as good:
        for _ in range(2):  # the second time, the name is free again
            async with running.stream("bad") as bad, asyncio.timeout(TIMEOUT_S):
                sending = asyncio.create_task(keep_sending(bad, audio))
                with contextlib.suppress(ConnectionClosed):
                    async for _ in bad:
                        pass
                await sending
            assert bad.close_code == 1011
            async with running.subscribe() as reader:
                await reader.send(encode_client(Subscribe(("bad",), after=0)))
                assert await reason(reader) == "internal"
        await good.send(audio)
        await good.send(encode_client(Close()))
        assert await reason(good) == "closed"


async def keep_sending(connection: ClientConnection, audio: bytes) -> None:
    """Until a second state has to be saved: where the disk is slow, the first one holds a lot."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            await connection.send(audio)
            await asyncio.sleep(0.05)


async def reason(connection: ClientConnection) -> str:
    """What a stream ended for."""
    message = (await receive_until(connection, SessionClosed))[-1].message
    assert isinstance(message, SessionClosed)
    return message.reason


def filled(path: Path, n_messages: int) -> Store:
    """A log with one stream that ended."""
    store = Store(path)
    logged = [Logged(i + 1, 1, 1, i + 1, "flushed", 0, b"x" * 100) for i in range(n_messages)]
    store.write([Opened(1, "a", 1, 0, 0, b""), *logged, Closed(1, 0)])
    return store


def test_a_lock_in_the_middle_of_retention_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was deleted is deleted and said to be; pages are given back later, and nothing fails."""
    path = tmp_path / "log.sqlite"
    monkeypatch.setattr("streaming.log.connections.BUSY_TIMEOUT_S", 0.01)
    n_vacuums = 0

    class Interrupted(sqlite3.Connection):
        """Finds the file locked when it gives back pages."""

        def executescript(self, script: str, /) -> sqlite3.Cursor:
            nonlocal n_vacuums
            if "incremental_vacuum" not in script:
                return super().executescript(script)
            n_vacuums += 1
            if n_vacuums > 1:
                return super().executescript(script)
            with closing(connect(path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                return super().executescript(script)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **kw: connect(*a, **kw, factory=Interrupted))
    store = filled(path, 2 * TRIM_ROWS)
    try:
        first = store.trim(1, 2**40, 1000)
        assert (first.n_messages, first.is_done) == (TRIM_ROWS, False)
        n_trimmed = first.n_messages
        while not (step := store.trim(1, 2**40, 1000)).is_done:
            n_trimmed += step.n_messages
        assert n_trimmed == 2 * TRIM_ROWS
        assert n_vacuums == 2
        assert store.n_messages() == 0
    finally:
        store.close()


def test_live_streams_keep_their_messages_however_small_the_log(tmp_path: Path) -> None:
    """Their audio does not count, and the newest messages of each stay whatever their size."""
    store = Store(tmp_path / "log.sqlite")
    store.write([Opened(i, f"s{i}", 1, 0, 0, b"") for i in (1, 2)])
    store.write([Opened(3, "over", 1, 0, 0, b""), Logged(10_000, 3, 1, 1, "flushed", 0, b"x"), Closed(3, 0)])
    store.write([Saved(1, b"", 0, 5 * MIB, bytes(20 * MIB), 0)])
    store.write([Logged(i + 1, 1, 1, i + 1, "flushed", 0, b"x") for i in range(49)])
    assert store.trim(0, 16 * MIB, 1000).is_done
    assert store.n_messages() == 50
    n = KEPT_LIVE + 10
    store.write([Logged(50 + i, 2, 1, i + 1, "flushed", 0, b"x" * 20_000) for i in range(n)])
    while not store.trim(0, 16 * MIB, 1000).is_done:
        pass
    assert store.n_messages() == 49 + KEPT_LIVE
    assert store.id_of(2, 10) is None
    assert store.id_of(2, 11) is not None
    store.close()


async def test_a_log_of_the_version_before_is_read(tmp_path: Path) -> None:
    """Streams, history and replay are as they were written; what was live is found."""
    path = tmp_path / "log.sqlite"
    shutil.copy(OLD, path)
    with closing(sqlite3.connect(OLD)) as old:
        frames = [row[0] for row in old.execute("SELECT frame FROM messages WHERE stream = 1 ORDER BY seq")]
    log = Log(LogConfig(path=str(path)), lambda: 0)
    hub, history = Hub(log, 100), History(log)
    async with asyncio.timeout(TIMEOUT_S), log.running():
        assert log.directory.left() == ("live",)
        left = await log.reader.read_left("live")
        assert (left.state, left.audio) == (b"state", [(0, bytes(8))])
        assert log.directory.resume_digest("live") == b"d" * 32
        with hub.subscription() as reader:
            hub.subscribe(reader, Subscribe(("ta*",), after=0))
            reader.close()
            assert [row.frame.decode() async for row in reader] == frames
        text = await history.answer("/v1/streams/talk/transcript.txt", "")
        assert text.body.decode() == "Grüße aus Köln.\nThen more 你好\n"
        found = await history.answer("/v1/streams/talk/events", "types=transcript.final&limit=1")
        assert frames[4] in found.body.decode()
        log.reopen("live", None)
        log.append("live", TranscriptDelta("é", (), 0, 0))
        await log.settled()
        live = log.directory.row("live")
        assert live is not None
        (row,) = await log.reader.of_session(live, ("transcript.delta",), 1)
        assert decode(row.frame).seq == 3
    with closing(sqlite3.connect(path)) as new, contextlib.closing(new.cursor()) as cursor:
        kinds: list[Any] = cursor.execute("SELECT DISTINCT typeof(frame) FROM messages").fetchall()
    assert kinds == [("text",)]  # so that the version before reads it, too
