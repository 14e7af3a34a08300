"""A token reaches the server by a header, and nobody else."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest
from websockets.asyncio.server import ServerConnection

from clients.cli import TOKEN_ENV, without_token
from tests.clients.fake_server import CLOSED, FakeServer, running

SECRET = "moss_a-token-of-this-test"


@pytest.mark.parametrize(
    ("argv", "rest", "token"),
    [
        (["x", "stream", "a.wav"], ["x", "stream", "a.wav"], None),
        (["x", "stream", "--token", "t", "a.wav"], ["x", "stream", "a.wav"], "t"),
        (["x", "stream", "a.wav", "--token=t=u"], ["x", "stream", "a.wav"], "t=u"),
        (["x", "--token=a", "--token", "b"], ["x"], "b"),
        (["x", "stream", "--token"], ["x", "stream"], None),
    ],
)
def test_a_command_line_without_its_token(argv: list[str], rest: list[str], token: str | None) -> None:
    """Both spellings, wherever they stand."""
    assert without_token(argv) == (rest, token)


def command_line_of(pid: int) -> bytes:
    """As every user of the machine may read it."""
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.parametrize("how", ["option", "environment"])
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="the command line is read from /proc")
async def test_the_token_is_sent_and_in_no_command_line(how: str) -> None:
    """While the client runs, its command line is that of a client without a token."""
    got: list[tuple[str | None, str, bytes]] = []
    process: asyncio.Future[asyncio.subprocess.Process] = asyncio.get_running_loop().create_future()

    async def handler(fake: FakeServer, connection: ServerConnection) -> None:
        assert connection.request is not None
        pid = (await process).pid
        headers, path = connection.request.headers, connection.request.path
        got.append((headers.get("Authorization"), path, command_line_of(pid)))
        await fake.send(connection, 1, CLOSED)

    async with running(handler) as fake:
        process.set_result(
            await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "clients.cli", "subscribe", "test", "--server", fake.url),
                *(("--token", SECRET) if how == "option" else ()),
                env=os.environ | ({TOKEN_ENV: SECRET} if how == "environment" else {}),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        )
        async with asyncio.timeout(60):
            out, err = await process.result().communicate()
    assert process.result().returncode == 0, err
    [(authorization, path, command_line)] = got
    assert authorization == f"Bearer {SECRET}"
    for shown in (path.encode(), command_line, out, err):
        assert SECRET.encode() not in shown
    assert b"subscribe" in command_line
