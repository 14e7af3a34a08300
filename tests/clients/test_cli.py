"""`moss-live` as a user calls it: its own process, a real file, a real WebSocket."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import wave
from dataclasses import dataclass
from http import HTTPStatus
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from websockets.asyncio.server import ServerConnection

from clients import commands
from streaming.protocol import SpeechStarted, TranscriptFinal
from tests.clients.fake_server import CLOSED, FakeServer, running


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int
    out: str
    err: str


async def moss_live(*arguments: str, stdin: bytes | None = None, encoding: str = "utf-8") -> Ended:
    """Run the command line in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "clients.cli",
        *arguments,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate(stdin)
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


@pytest.fixture
def recording(tmp_path: Path) -> str:
    """A second of silence."""
    path = tmp_path / "silence.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(32_000))
    return str(path)


async def test_stream_prints_the_transcript(recording: str) -> None:
    """A segment a line on stdout; the way to its captions, and where it stays, on stderr."""
    async with running(FakeServer.transcribe) as fake:
        ended = await moss_live("stream", recording, "--server", fake.url, "--name", "test", "--fast")
    kept = f"transcript: {fake.url.replace('ws', 'http', 1)}/v1/streams/test/transcript.txt\n"
    about = f"stream test; read it with: moss-live captions test\n{kept}"
    assert ended == Ended(0, "Hello world.\n", about)
    assert fake.n_audio_bytes == 32_000


async def test_stream_shows_captions(recording: str) -> None:
    """Without a terminal they are lines."""
    async with running(FakeServer.transcribe) as fake:
        ended = await moss_live("stream", recording, "--server", fake.url, "--fast", "--captions")
    assert ended.status == 0, ended.err
    assert "[00:00.1]-[00:00.9] Hello world." in ended.out


async def test_stream_fails_with_the_servers_text(recording: str) -> None:
    """One line, exit status 1."""
    async with running(FakeServer.transcribe) as fake:
        fake.refusal = (HTTPStatus.CONFLICT, "stream test is live")
        ended = await moss_live("stream", recording, "--server", fake.url, "--name", "test")
    assert ended.status == 1
    assert ended.err.splitlines()[-1] == "Error: the server refused with 409: stream test is live"


async def test_subscribe_prints_lines_of_json() -> None:
    """A line a message, of the types that were asked for."""

    async def handler(fake: FakeServer, connection: Any) -> None:
        fake.requests.append(json.loads(await connection.recv()))
        await fake.send(connection, 8, SpeechStarted(100))
        await fake.send(connection, 9, CLOSED)

    async with running(handler) as fake:
        arguments = ["--server", fake.url, "--types", "speech.started", "--after", "7"]
        ended = await moss_live("subscribe", "test", *arguments)
    assert ended.status == 0, ended.err
    assert [json.loads(line) for line in ended.out.splitlines()] == [
        {"type": "speech.started", "stream": "test", "seq": 8, "start_ms": 100}
    ]
    assert fake.requests[0]["after"] == 7


@pytest.mark.parametrize(
    ("arguments", "after", "session"),
    [((), "live", None), (("--after", "0"), 0, None), (("--session", "s1"), 0, "s1")],
)
async def test_captions_begin_with_what_is_live(
    arguments: tuple[str, ...], after: int | str, session: str | None
) -> None:
    """Or with all that is kept, or with one session, where that is asked for."""

    async def handler(fake: FakeServer, connection: Any) -> None:
        fake.requests.append(json.loads(await connection.recv()))
        await fake.send(connection, 9, CLOSED)

    async with running(handler) as fake:
        ended = await moss_live("captions", "test", "--server", fake.url, *arguments)
    assert ended.status == 0, ended.err
    assert ended.out == "-- stream closed (closed): 1.0 s, 2 words in 1 segments\n"
    assert (fake.requests[0]["after"], fake.requests[0]["session"]) == (after, session)


def test_wrong_arguments_say_what_is_expected() -> None:
    """A name and a type are checked before anything is opened."""
    runner = CliRunner()
    assert "no stream name" in runner.invoke(commands.group, ["subscribe", "a/b"]).output
    result = runner.invoke(commands.group, ["subscribe", "a", "--types", "words"])
    assert result.exit_code == 2
    assert "transcript.delta" in result.output


def test_a_wrong_address_is_one_line() -> None:
    """No traceback for what the user mistyped."""
    result = CliRunner().invoke(commands.group, ["subscribe", "a", "--server", "ws://"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")


def test_a_command_whose_extra_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The help lists it, and calling it names the package and the extra."""
    entry = EntryPoint("serve", "no_such_package.cli:serve", commands.COMMANDS)

    def found(*, group: str, name: str = entry.name) -> EntryPoints:
        return EntryPoints((entry,) if (group, name) == (entry.group, entry.name) else ())

    monkeypatch.setattr(commands, "entry_points", found)
    runner = CliRunner()
    assert "serve" in runner.invoke(commands.group, ["--help"]).output
    result = runner.invoke(commands.group, ["serve", "--port", "1"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: serve needs no_such_package: pip install '.[server]'")


@pytest.mark.parametrize("content", [None, b"", b"no audio at all"], ids=["missing", "empty", "text"])
async def test_a_source_that_cannot_be_opened_begins_no_stream(content: bytes | None, tmp_path: Path) -> None:
    """The name stays free and no slot is taken; one line says what is wrong with the source."""
    path = tmp_path / "wrong-name.wav"
    if content is not None:
        path.write_bytes(content)
    async with running(FakeServer.transcribe) as fake:
        ended = await moss_live("stream", str(path), "--server", fake.url, "--name", "x")
        assert fake.paths == []
    assert ended.status == 1
    assert ended.err.count("\n") <= 2
    assert "wrong-name.wav" in ended.err


async def test_a_console_without_the_characters_gets_others(recording: str) -> None:
    """What the terminal cannot write is replaced; the stream goes on to its end."""

    async def chinese(fake: FakeServer, connection: ServerConnection) -> None:
        await fake.send(connection, 1, TranscriptFinal("\u4f60\u597d \u266a", (), "zh", None, 0, 500))
        await fake.transcribe(connection)

    async with running(chinese) as fake:
        ended = await moss_live("stream", recording, "--server", fake.url, encoding="cp1252")
    assert ended.status == 0
    assert ended.out.startswith("?? ?")


async def test_standard_input_is_a_source(recording: str) -> None:
    """`-` reads what another program writes."""
    data = await asyncio.to_thread(Path(recording).read_bytes)
    async with running(FakeServer.transcribe) as fake:
        ended = await moss_live("stream", "-", "--server", fake.url, stdin=data)
        assert fake.n_audio_bytes == 32_000
    assert ended.status == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("localhost:8765", "ws://localhost:8765"),
        ("127.0.0.1:80", "ws://127.0.0.1:80"),
        ("http://host:1/", "ws://host:1/"),
        ("HTTPS://host", "wss://host"),
        ("wss://host/below", "wss://host/below"),
    ],
)
def test_a_server_is_named_as_people_write_it(given: str, expected: str) -> None:
    """By host and port, or by the URL of a page or a socket."""
    assert commands._server_url(click.Context(commands.stream), commands.stream.params[1], given) == expected


def test_a_server_of_another_kind_is_refused() -> None:
    """With what was expected."""
    found = CliRunner().invoke(commands.stream, ["x.wav", "--server", "ftp://host"])
    assert found.exit_code == 2
    assert "expected ws, wss, http, https or none" in found.output


async def into_head(*arguments: str) -> Ended:
    """The command with a reader that takes one line and leaves."""
    command = " ".join([sys.executable, "-m", "clients.cli", *arguments])
    process = await asyncio.create_subprocess_shell(
        f"{{ {command}; echo status $? >&2; }} | head -n 1",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    status = int(err.decode().rpartition("status ")[2])
    return Ended(status, out.decode(), err.decode())


@pytest.mark.parametrize("command", ["subscribe", "captions"])
async def test_a_reader_that_leaves_ends_the_command_quietly(command: str) -> None:
    """As after `| head`: no traceback, however much would follow."""

    async def handler(fake: FakeServer, connection: Any) -> None:
        await connection.recv()
        for seq in range(1, 3000):
            final = TranscriptFinal("Hello. " * 10, (), "en", None, seq, seq + 1)
            await fake.send(connection, seq, final)
            if seq % 100 == 0:
                await asyncio.sleep(0.01)
        await fake.send(connection, 3000, CLOSED)

    async with running(handler) as fake:
        ended = await into_head(command, "test", "--server", fake.url, "--after", "0")
    assert len(ended.out.splitlines()) == 1
    assert ended.err.count("\n") == 1, ended.err
    assert ended.status in (0, 1)


@pytest.mark.parametrize("arguments", [(), ("--captions",)], ids=["transcript", "captions"])
async def test_a_stream_goes_on_when_nobody_reads_its_captions(
    recording: str, arguments: tuple[str, ...]
) -> None:
    """All of the audio is sent, and the end is a good one."""

    async def handler(fake: FakeServer, connection: ServerConnection) -> None:
        for seq in range(1, 2000):
            final = TranscriptFinal("Hello. " * 10, (), "en", None, seq, seq + 1)
            await fake.send(connection, seq, final)
        await fake.transcribe(connection)

    async with running(handler) as fake:
        ended = await into_head("stream", recording, "--server", fake.url, "--name", "x", *arguments)
        assert fake.n_audio_bytes == 32_000
    assert ended.status == 0, ended.err
    assert "Traceback" not in ended.err
    assert "BrokenPipe" not in ended.err
