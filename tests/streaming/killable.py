"""A server process with the fake engine that is killed and started again on the same port and log."""

from __future__ import annotations

import asyncio
import http.client
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from clients.producer import stream_audio, stream_url
from scripts.demo import HOST, free_port
from streaming.protocol import READY_PATH, Envelope
from tests.streaming.support import TIMEOUT_S

CHUNK = 3200  # bytes: 100 ms
SCRIPT = Path(__file__).with_name("server_process.py")


class Killable:
    """The server, running or not."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log.sqlite"
        self.port = free_port()
        self._config = folder / "config.toml"
        self._config.write_text(f'[server]\nport = {self.port}\n[log]\npath = "{self.log}"\n')
        self._output = folder / "server.log"
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """Where its sockets are."""
        return f"ws://{HOST}:{self.port}"

    async def start(self) -> None:
        """Start it, and wait until it takes streams."""
        with self._output.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, str(SCRIPT), str(self._config), stdout=output, stderr=output
            )
        async with asyncio.timeout(TIMEOUT_S):
            while not await asyncio.to_thread(self._is_ready):  # noqa: ASYNC110  no event tells of it
                await asyncio.sleep(0.02)

    async def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    def delete_log(self) -> None:
        """As somebody does who wants the disk back; it does not run."""
        for path in self.log.parent.glob(f"{self.log.name}*"):
            path.unlink()

    async def get(self, path: str) -> str:
        """The body of a GET that succeeds."""
        status, body = await asyncio.to_thread(self._get, path)
        assert status == http.HTTPStatus.OK, (path, status, body)
        return body

    async def get_json(self, path: str) -> Any:
        """The same of a page in JSON."""
        return json.loads(await self.get(path))

    def _is_ready(self) -> bool:
        try:
            return self._get(READY_PATH)[0] == http.HTTPStatus.OK
        except OSError:
            return False

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=TIMEOUT_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()


@asynccontextmanager
async def killable(folder: Path) -> AsyncIterator[Killable]:
    """One that runs, and ends with the test."""
    server = Killable(folder)
    await server.start()
    try:
        yield server
    finally:
        await server.kill()


async def hold(server: Killable, name: str, audio: bytes, *, is_killed: bool = False) -> list[Envelope]:
    """One session by our own client; its messages.

    Args:
        server: Runs.
        name: Of the stream.
        audio: Sent as fast as it is accepted.
        is_killed: The server is, in the middle, and started again; the client comes back by itself.
    """
    found: list[Envelope] = []

    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(audio), CHUNK):
            yield audio[at : at + CHUNK]
            if is_killed and at // CHUNK == len(audio) // CHUNK // 2:
                async with asyncio.timeout(TIMEOUT_S):
                    while not found:  # noqa: ASYNC110  what it needs to come back is in the first message
                        await asyncio.sleep(0.01)
                await server.kill()
                await server.start()

    await stream_audio(stream_url(server.url, name), chunks(), found.append, paced=False)
    return found
