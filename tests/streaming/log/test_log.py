"""The log: numbered, on the disk before it is read, there again after any death."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.config import LogConfig
from streaming.errors import LogError
from streaming.log.log import MAX_WAITING, Log
from streaming.log.row import Row
from streaming.log.store import TRIM_ROWS, Closed, Logged, Opened, Query, Saved, Store
from streaming.patterns import Patterns
from streaming.protocol import Ack, Flushed, Message, TranscriptInterim, decode
from tests.streaming.support import TIMEOUT_S

DAY_MS = 24 * 3600 * 1000


@dataclass
class Opener:
    """A log in a folder, what it delivered, and the clock it goes by."""

    log: Log
    delivered: list[Row] = field(default_factory=list)

    async def replay(self, name: str, after: int, types: tuple[str, ...] = ()) -> list[Row]:
        """Everything that is kept of a stream after a `seq`, from the file."""
        found: list[Row] = []
        at = 0
        ids = await self.log.reader.ids(Patterns([name]))
        while at < self.log.published:
            page = await self.log.reader.page(Query(at, self.log.published, ids, types, after), 7)
            found += page.rows
            at = page.upto_id
        return found


@asynccontextmanager
async def opened(folder: Path, *, now_ms: int = 0) -> AsyncIterator[Opener]:
    """A running log."""
    delivered: list[Row] = []
    config = LogConfig(path=str(folder / "log.sqlite"))
    log = Log(config, lambda: now_ms)
    log.deliver_to(delivered.append)
    async with asyncio.timeout(TIMEOUT_S), log.running():
        yield Opener(log, delivered)


messages = st.sampled_from([Flushed("f", 0), TranscriptInterim("t", 0, 0), Ack(1, 1)])


@settings(max_examples=20)
@given(st.lists(messages, max_size=60), st.integers(0, 70), st.lists(st.integers(0, 59), max_size=3))
def test_what_was_said_is_delivered_and_kept(said: list[Message], after: int, pauses: list[int]) -> None:
    """In order, each logged message with the next `seq`; the file has the logged ones, also when reopened."""

    async def check(folder: Path) -> None:
        async with opened(folder) as it:
            it.log.open("a")
            for i, message in enumerate(said):
                it.log.append("a", message)
                if i in pauses:
                    await it.log.settled()
            await it.log.settled()
            assert [decode(row.frame).message for row in it.delivered] == said
            logged = [row for row in it.delivered if row.type == Flushed.type]
            assert [e.seq for e in logged] == list(range(1, len(logged) + 1))
            assert await it.replay("a", after) == logged[after:]
            it.log.append("a", Flushed("last", 0))  # committed by the end of the log
        async with opened(folder) as again:
            assert again.log.directory.last_seq("a") == len(logged) + 1
            assert (await again.replay("a", 0))[:-1] == logged

    with TemporaryDirectory() as folder:
        asyncio.run(check(Path(folder)))


async def test_nothing_is_delivered_before_it_is_on_the_disk(tmp_path: Path) -> None:
    """And what is not logged waits for its place; with nothing before it, it goes at once."""
    async with opened(tmp_path) as it:
        it.log.open("a")
        await it.log.settled()
        it.log.append("a", TranscriptInterim("one", 0, 0))
        assert len(it.delivered) == 1
        it.log.append("a", Flushed("x", 0))
        it.log.append("a", TranscriptInterim("two", 0, 0))
        assert len(it.delivered) == 1
        await it.log.until(lambda: len(it.delivered) > 1)
        with sqlite3.connect(tmp_path / "log.sqlite") as reader:
            assert reader.execute("SELECT count(*) FROM messages").fetchone() == (1,)
        reader.close()
        assert [e.seq for e in it.delivered] == [0, 1, 1]


async def test_a_stream_that_begins_again_goes_on_counting(tmp_path: Path) -> None:
    """So that a reader who resumes after the last `seq` it saw misses nothing; other streams count alone."""
    async with opened(tmp_path) as it:
        for name in ("a", "b", "a"):
            it.log.open(name)
            it.log.append(name, Flushed(name, 0))
            it.log.close(name)
        await it.log.settled()
        assert [e.seq for e in await it.replay("a", 0)] == [1, 2]
        assert [e.seq for e in await it.replay("b", 0)] == [1]
        row = it.log.directory.row("a")
        assert row is not None
        assert (row.session, row.is_live) == (2, False)


async def test_a_stream_says_no_more_than_can_wait(tmp_path: Path) -> None:
    """`room` returns when the disk caught up."""
    async with opened(tmp_path) as it:
        it.log.open("a")
        for i in range(MAX_WAITING):
            it.log.append("a", Flushed(str(i), 0))
        waiting = asyncio.ensure_future(it.log.room("a"))
        await asyncio.sleep(0)  # it looks once
        assert not waiting.done()
        await waiting
        assert it.delivered


KILLED_AFTER = [1, 2, 17, 400]


@pytest.mark.parametrize("n_lines", KILLED_AFTER)
async def test_a_killed_writer_leaves_all_that_was_delivered(n_lines: int, tmp_path: Path) -> None:
    """SIGKILL while it writes: every message that was seen is there, `seq` has no hole and goes on."""
    script = Path(__file__).with_name("log_writer.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), str(tmp_path / "log.sqlite"), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    seen = 0
    async with asyncio.timeout(TIMEOUT_S):
        while seen < n_lines:
            seen = int(await process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        rest = (await process.stdout.read()).split(b"\n")[:-1]  # the last line may be cut
        seen = max([seen, *map(int, rest)])
        await process.wait()
    async with opened(tmp_path) as it:
        kept = await it.replay("a", 0)
        assert [e.seq for e in kept] == list(range(1, len(kept) + 1))
        assert len(kept) >= seen
        assert it.log.directory.last_seq("a") == len(kept)
        assert it.log.directory.left() == ("a",)
        left = await it.log.reader.read_left("a")
        assert left.state is not None
        assert int(left.state) == len(kept)  # the state is that of the last message, never another
        it.log.reopen("a", None)
        it.log.append("a", Flushed("next", 0))
        await it.log.settled()
        assert it.delivered[-1].seq == len(kept) + 1


# --- the file ----------------------------------------------------------------------------


def fill(store: Store, stream: int, n_messages: int, *, at_ms: int, first_id: int, n_chars: int = 10) -> None:
    """A stream of some messages that ends."""
    ops: list[Opened | Logged | Closed] = [Opened(stream, f"s{stream}", 1, 0, at_ms, b"")]
    ops += [
        Logged(first_id + i, stream, 1, i + 1, "flushed", at_ms, b"x" * n_chars) for i in range(n_messages)
    ]
    store.write([*ops, Closed(stream, at_ms)])


def kept(store: Store) -> dict[str, int]:
    """How many messages there are of each stream."""
    rows = {row.id: row.name for row in store.streams()}
    query = Query(0, store.last_id(), tuple(rows), (), 0)
    n_all = len(store.messages(query, 100_000).rows)
    counts = {
        name: len(store.messages(Query(0, store.last_id(), (number,), (), 0), 100_000).rows)
        for number, name in rows.items()
    }
    assert sum(counts.values()) == n_all
    return counts


def trim(store: Store, *, before_ms: int = 0, max_bytes: int = 2**40, max_closed: int = 1000) -> int:
    """All steps of retention; how many."""
    n_steps = 1
    while not store.trim(before_ms, max_bytes, max_closed).is_done:
        n_steps += 1
    return n_steps


def test_retention_by_age_and_number_takes_what_ended_first(tmp_path: Path) -> None:
    """Whole streams, in bounded steps."""
    store = Store(tmp_path / "log.sqlite")
    for i in range(5):
        fill(store, i + 1, TRIM_ROWS + 1, at_ms=i * DAY_MS, first_id=1 + i * (TRIM_ROWS + 1))
    assert trim(store, before_ms=2 * DAY_MS) == 5
    assert list(kept(store)) == ["s3", "s4", "s5"]
    trim(store, max_closed=1)
    assert kept(store) == {"s5": TRIM_ROWS + 1}
    store.close()


def test_retention_by_size_takes_live_streams_last(tmp_path: Path) -> None:
    """Of a live stream the oldest messages go, when nothing else is left; the file's size comes down."""
    path = tmp_path / "log.sqlite"
    store = Store(path)
    fill(store, 1, 2 * TRIM_ROWS, at_ms=0, first_id=1, n_chars=1000)
    store.write([Opened(2, "s2", 1, 0, 0, b"")])
    n_live = 3 * TRIM_ROWS
    first = 2 * TRIM_ROWS + 1
    store.write([Logged(first + i, 2, 1, i + 1, "flushed", 0, b"x" * 1000) for i in range(n_live)])
    trim(store, max_bytes=TRIM_ROWS * 1600)
    assert kept(store) == {"s2": TRIM_ROWS}
    store.close()
    assert path.stat().st_size < 2 * TRIM_ROWS * 1600


def test_saved_audio_is_kept_as_far_as_it_is_needed(tmp_path: Path) -> None:
    """Pieces that end before `keep_from` go; when the stream ends, all of it."""
    store = Store(tmp_path / "log.sqlite")
    store.write([Opened(1, "a", 1, 0, 0, b"")])
    for i in range(4):
        store.write([Saved(1, b"%d" % i, i * 10, i * 10 + 10, bytes(40), max(0, i * 10 - 15))])
    assert [start for start, _ in store.audio(1)] == [10, 20, 30]
    assert store.saved(1) == b"3"
    store.write([Closed(1, 0)])
    assert store.audio(1) == []
    assert store.saved(1) is None
    store.close()


def test_many_streams_are_read_in_the_order_of_the_log(tmp_path: Path) -> None:
    """Through the parts that one read looks at, with types and after a `seq`."""
    store = Store(tmp_path / "log.sqlite")
    store.write([Opened(i, f"s{i}", 1, 0, 0, b"") for i in (1, 2, 3)])
    kinds = ("flushed", "degraded")
    store.write(
        [Logged(n + 1, 1 + n % 3, 1, n // 3 + 1, kinds[n % 2], 0, b"%d" % n) for n in range(60)],
    )
    page = store.messages(Query(3, 50, (1, 3), ("flushed",), 2), 1000)
    expected = [n for n in range(3, 50) if n % 3 in (0, 2) and n % 2 == 0 and n // 3 + 1 > 2]
    assert [int(row.frame) for row in page.rows] == expected
    assert page.upto_id == 50
    assert store.messages(Query(3, 50, (1, 3), ("flushed",), 2), 2).upto_id == expected[1] + 1
    store.close()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("nonsense", "not a database"),
        ("other", "another program's database"),
        ("version", "schema version 99; expected 2"),
        ("torn", "corrupt|malformed"),
        ("folder", "cannot be opened"),
    ],
)
def test_a_file_that_cannot_be_used_is_said_to_be(damage: str, expected: str, tmp_path: Path) -> None:
    """At the start, with what to do; and it is left as it is."""
    path = tmp_path / "log.sqlite"
    store = Store(path)
    fill(store, 1, 2000, at_ms=0, first_id=1, n_chars=100)
    store.close()
    if damage == "nonsense":
        path.write_bytes(b"no database" * 1000)
    elif damage == "torn":
        data = bytearray(path.read_bytes())
        data[8192 : 8192 + 40_000] = os.urandom(40_000)
        path.write_bytes(data)
    elif damage == "folder":
        path = path / "log.sqlite"
    else:
        other = sqlite3.connect(path)
        other.execute("PRAGMA application_id = 7" if damage == "other" else "PRAGMA user_version = 99")
        other.close()
    before = path.read_bytes() if damage != "folder" else b""
    with pytest.raises(LogError, match=expected):
        Store(path)
    assert before == (path.read_bytes() if damage != "folder" else b"")


def test_two_servers_do_not_share_a_log(tmp_path: Path) -> None:
    """The second is told so; when the first is gone, it is free."""
    first = Store(tmp_path / "log.sqlite")
    with pytest.raises(LogError, match="another server's"):
        Store(tmp_path / "log.sqlite")
    first.close()
    Store(tmp_path / "log.sqlite").close()


async def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is delivered while it is full, the log says so, and all of it comes when there is room."""
    monkeypatch.setattr("streaming.log.log.RETRY_S", 0.01)
    connections: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def noted(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connections.append(connect(*args, **kwargs))
        return connections[-1]

    monkeypatch.setattr(sqlite3, "connect", noted)
    async with opened(tmp_path) as it:
        it.log.open("a")
        it.log.append("a", Flushed("first", 0))
        await it.log.settled()
        limit = connections[0]  # the writer's; a limit of the file stands for the disk's
        n_pages = limit.execute("PRAGMA page_count").fetchone()[0]
        limit.execute(f"PRAGMA max_page_count = {n_pages}")
        for i in range(100):
            it.log.append("a", Flushed(f"{i:04}" * 1000, i))
        await it.log.until(lambda: bool(it.log.blocked))
        assert len(it.delivered) == 1
        limit.execute("PRAGMA max_page_count = 1000000")
        await it.log.settled()
        assert [e.seq for e in it.delivered] == list(range(1, 102))
        assert not it.log.blocked
        assert await it.replay("a", 0) == it.delivered


async def test_a_broken_file_ends_the_waiting(tmp_path: Path) -> None:
    """Whoever waits for the log is told that it failed."""
    async with opened(tmp_path) as it:
        it.log.open("a")
        await it.log.settled()
        with closing(sqlite3.connect(tmp_path / "log.sqlite", isolation_level=None)) as other:
            other.execute("DROP TABLE messages")
        it.log.append("a", Flushed("x", 0))
        for waiting in (it.log.settled(), it.log.fault(), it.log.room("a")):
            with pytest.raises(LogError, match="no such table"):
                await waiting
        assert it.delivered == []
