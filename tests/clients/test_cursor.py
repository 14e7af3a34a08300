"""A reader that keeps its place in a file goes on exactly where it was."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from clients import commands
from clients.cursor import CursorError, CursorFile, Position
from streaming.protocol import Close, Envelope, SessionClosed, encode, encode_client
from tests.streaming.support import (
    TIMEOUT_S,
    Running,
    eventually,
    logged,
    receive_until,
    running_server,
    s16,
    tone_speech,
)


@pytest.mark.parametrize("after", [0, 17, {"room-1": 3}])
def test_what_is_saved_is_loaded(after: int | dict[str, int], tmp_path: Path) -> None:
    """And nothing else is left in the folder."""
    cursor = CursorFile(tmp_path / "cursor", "room-*")
    assert cursor.load() == Position(0, None)
    for log in (None, "a1"):
        cursor.save(Position(after, log))
        assert cursor.load() == Position(after, log)
    assert os.listdir(tmp_path) == ["cursor"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("17", "is no cursor file"),
        ("\xff\xfe", "is no cursor file"),
        ('{"stream": "a", "log": null, "after": -1}', "is no cursor file"),
        ('{"stream": "b", "log": null, "after": 1}', "is a cursor of 'b', not of 'a'"),
    ],
)
def test_a_file_that_is_no_cursor_is_left_alone(body: str, expected: str, tmp_path: Path) -> None:
    """It may be anything that was named by mistake; the command ends with one line."""
    path = tmp_path / "cursor"
    path.write_bytes(body.encode("latin-1"))
    with pytest.raises(CursorError, match=expected):
        CursorFile(path, "a").load()
    result = CliRunner().invoke(commands.group, ["subscribe", "a", "--after", str(path)])
    assert (result.exit_code, expected in result.output) == (1, True)
    assert path.read_bytes() == body.encode("latin-1")


def test_an_empty_file_is_the_beginning(tmp_path: Path) -> None:
    """What a power cut may leave: everything comes again, nothing is lost."""
    (tmp_path / "cursor").touch()
    assert CursorFile(tmp_path / "cursor", "a").load() == Position(0)


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    """Before a message counts as read."""
    with pytest.raises(CursorError, match="cannot be written: No such file"):
        CursorFile(tmp_path / "none" / "cursor", "a").save(Position(1))


# --- the command -------------------------------------------------------------------------


@asynccontextmanager
async def reading(url: str, name: str, out: Path, cursor: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """`moss-live subscribe` with a cursor file, appending to a file; asked to end on the way out."""
    arguments = ["-m", "clients.cli", "subscribe", name, "--server", url, "--after", str(cursor)]
    with out.open("ab") as file:
        process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=file)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


def lines(out: Path) -> list[str]:
    """The whole lines of what was printed."""
    return out.read_text().splitlines() if out.exists() else []


async def hold(running: Running, name: str, seed: int) -> list[Envelope]:
    """One session's logged messages."""
    async with running.stream(name) as producer:
        await producer.send(s16(tone_speech(0.7, seed)))
        await producer.send(encode_client(Close()))
        return logged(await receive_until(producer, SessionClosed))


@pytest.mark.parametrize(
    ("pattern", "names"), [("room-1", ["room-1"] * 4), ("room-*", ["room-1", "room-2"] * 2)]
)
async def test_a_restarted_subscriber_goes_on_exactly_once(
    pattern: str, names: Sequence[str], tmp_path: Path
) -> None:
    """Ended by SIGTERM again and again, also between sessions: every logged message once, in order."""
    out, cursor = tmp_path / "out", tmp_path / "cursor"
    async with running_server() as running:
        url = f"ws://127.0.0.1:{running.port}"
        told: list[Envelope] = await hold(running, names[0], 0)
        for i, name in enumerate(names[1:], 1):
            async with reading(url, pattern, out, cursor) as process:
                n_before = len(told)
                await eventually(lambda n=n_before: len(kept(out)) >= n)  # type: ignore[misc]
                if i % 2:  # while it reads
                    told += await hold(running, name, i)
                    await eventually(lambda n=n_before: len(kept(out)) > n)  # type: ignore[misc]
            assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)  # the latter: not begun yet
            if not i % 2:  # while it is away
                told += await hold(running, name, i)
        async with reading(url, pattern, out, cursor):
            await eventually(lambda: len(kept(out)) >= len(told))
    assert kept(out) == [json.loads(encode(envelope)) for envelope in told]


def kept(out: Path) -> list[dict[str, object]]:
    """The logged messages that were printed."""
    unlogged = ("transcript.interim", "ack", "error")
    return [message for line in lines(out) if (message := json.loads(line))["type"] not in unlogged]


async def test_what_could_not_be_written_does_not_move_the_cursor(tmp_path: Path) -> None:
    """A full disk ends the command; the next run has everything."""
    out, cursor = tmp_path / "out", tmp_path / "cursor"
    async with running_server() as running:
        url = f"ws://127.0.0.1:{running.port}"
        told = await hold(running, "a", 0)
        async with reading(url, "a", Path("/dev/full"), cursor) as process, asyncio.timeout(TIMEOUT_S):
            assert await process.wait() != 0
        assert not cursor.exists()
        async with reading(url, "a", out, cursor):
            await eventually(lambda: len(kept(out)) >= len(told))
    assert kept(out) == [json.loads(encode(envelope)) for envelope in told]


@pytest.mark.parametrize(("name", "after"), [("a", 1000), ("a", {"a": 2}), ("*", {"a": 2}), ("*", 1000)])
async def test_a_cursor_of_another_log_is_the_beginning(
    name: str, after: int | dict[str, int], tmp_path: Path
) -> None:
    """However far it was there; from then on it is of this one."""
    out, cursor = tmp_path / "out", CursorFile(tmp_path / "cursor", name)
    cursor.save(Position(after, "another"))
    async with running_server() as running:
        told = await hold(running, "a", 0)
        async with reading(f"ws://127.0.0.1:{running.port}", name, out, tmp_path / "cursor"):
            await eventually(lambda: len(kept(out)) >= len(told))
    assert kept(out) == [json.loads(encode(envelope)) for envelope in told]
    last = told[-1].seq
    assert cursor.load().after == (last if name == "a" else {"a": last})
    assert cursor.load().log != "another"
