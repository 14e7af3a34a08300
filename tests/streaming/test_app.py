"""The whole server process, from its start to SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from streaming.app import run
from streaming.config import ConfigError
from streaming.errors import EngineLost
from streaming.protocol import CloseCode, SessionClosed, SpeechStarted, TranscriptFinal
from tests.streaming.support import (
    FAKE_ENGINE,
    TIMEOUT_S,
    receive,
    receive_until,
    s16,
    utterances,
    with_port_0,
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_finalises_streams_and_ends_everything(number: signal.Signals, tmp_path: Path) -> None:
    """What was said is final, the connection closes with 1001, and no process is left."""
    children = set(psutil.Process().children())
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(
        run(with_port_0("", tmp_path), engine_command=FAKE_ENGINE, on_listening=port.set_result)
    )
    async with asyncio.timeout(TIMEOUT_S):
        connection = await connect_when_ready(await port)
        assert (await receive(connection)).seq == 1
        await connection.send(s16(utterances(2.0))[:60_000])
        await receive_until(connection, SpeechStarted)
        os.kill(os.getpid(), number)
        found = await receive_until(connection, SessionClosed)
        assert isinstance(found[-2].message, TranscriptFinal)
        await connection.wait_closed()
        assert connection.close_code == CloseCode.GOING_AWAY
        await server
    assert set(psutil.Process().children()) == children


async def connect_when_ready(port: int) -> ClientConnection:
    """A producer's connection, tried until the engine is ready."""
    while True:
        with suppress(InvalidStatus):
            return await connect(f"ws://127.0.0.1:{port}/v1/stream/a")


async def test_what_the_engine_finds_wrong_with_the_configuration_is_a_wrong_configuration(
    tmp_path: Path,
) -> None:
    """As if the server had found it: another start would end the same way."""
    with pytest.raises(ExceptionGroup) as caught:
        await run(with_port_0("", tmp_path), engine_command=(*FAKE_ENGINE, "--fault=unfit_at_start"))
    assert caught.group_contains(ConfigError, match=r"^events.labels: the model knows no sound 'Sirn'$")


async def test_a_folder_that_is_missing_is_reported_and_not_made(tmp_path: Path) -> None:
    """It may be a disk that is not mounted."""
    with pytest.raises(ConfigError, match=r"^log.path: .*/none: no such folder"):
        await run(with_port_0("", tmp_path / "none"), engine_command=FAKE_ENGINE)
    assert not (tmp_path / "none").exists()


async def test_an_engine_that_does_not_start_ends_the_server(tmp_path: Path) -> None:
    """With its reason."""
    with pytest.raises(ExceptionGroup) as caught:
        await run(with_port_0("", tmp_path), engine_command=(*FAKE_ENGINE, "--fault=fails_at_start"))
    assert caught.group_contains(EngineLost, match="no weights")
