"""What the tests of the service share: synthetic speech, a server with the fake engine on port 0."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from msgspec.structs import replace
from websockets.asyncio.client import ClientConnection, connect

from streaming.app import build
from streaming.config import Config, parse_config
from streaming.engine.client import EngineClient, EngineState
from streaming.engine.contract import Pcm
from streaming.errors import EngineLost
from streaming.protocol import UNLOGGED, Envelope, Message, SessionCreated, TranscriptDelta, decode
from streaming.server.endpoints import Server

TIMEOUT_S = 20.0  # for anything that a test waits for; only a broken one takes so long
FAKE_ENGINE = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))


def tone_speech(seconds: float, seed: int = 0) -> Pcm:
    """Harmonics of a wavering voice with a little noise: webrtcvad takes it for speech."""
    rng = np.random.default_rng(seed)
    n_samples = int(seconds * 16_000)
    t = np.arange(n_samples) / 16_000
    phase = 2 * np.pi * np.cumsum(120 + 20 * np.sin(2 * np.pi * 3 * t)) / 16_000
    harmonics = np.sum([np.sin(k * phase) / k for k in range(1, 25)], axis=0)
    voiced = 0.1 * harmonics * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * t))
    pcm: Pcm = (voiced + 0.01 * rng.standard_normal(n_samples)).astype(np.float32)
    return pcm


def silence(seconds: float) -> Pcm:
    """Digital zeros."""
    return np.zeros(int(seconds * 16_000), np.float32)


def utterances(*lengths_s: float) -> Pcm:
    """Speech of these lengths, each followed by a second of silence."""
    pieces = [silence(0.5)]
    for seed, length_s in enumerate(lengths_s):
        pieces += [tone_speech(length_s, seed), silence(1.0)]
    return np.concatenate(pieces)


def s16(pcm: Pcm) -> bytes:
    """The bytes of 16-bit samples."""
    return bytes(np.rint(pcm * 32767).astype("<i2").tobytes())


def logged(envelopes: list[Envelope]) -> list[Envelope]:
    """The logged ones, as every reader gets them: the token is its producer's alone."""
    found = [envelope for envelope in envelopes if envelope.message.type not in UNLOGGED]
    return [
        replace(envelope, message=replace(envelope.message, resume_token=None))
        if isinstance(envelope.message, SessionCreated)
        else envelope
        for envelope in found
    ]


def said(envelopes: list[Envelope]) -> list[str]:
    """The committed words."""
    return [
        word.text
        for envelope in envelopes
        if isinstance(envelope.message, TranscriptDelta)
        for word in envelope.message.words
    ]


@dataclass
class Running:
    """A server with its engine."""

    port: int
    engine: EngineClient
    server: Server
    stop: asyncio.Event

    def stream(self, name: str, query: str = "") -> connect:
        """A producer's connection."""
        uri = f"ws://127.0.0.1:{self.port}/v1/stream/{name}?{query}"
        return connect(uri, compression=None, max_size=None, ping_timeout=None)

    def subscribe(self) -> connect:
        """A subscriber's connection."""
        return connect(f"ws://127.0.0.1:{self.port}/v1/subscribe", compression=None, max_size=None)

    async def http_status(self, path: str) -> int:
        """What a plain GET is answered."""
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            status = int((await reader.readline()).split()[1])
            await reader.read()
            writer.close()
            await writer.wait_closed()
        return status


@asynccontextmanager
async def running_server(
    text: str = "",
    fault: str = "",
    *,
    wait: bool = True,
    command: Sequence[str] | None = None,
    folder: Path | None = None,
) -> AsyncIterator[Running]:
    """A server on port 0 with the fake engine or another; `text` is added to its configuration.

    Its log is in `folder`, or nowhere any more when it has stopped.
    """
    if folder is None:
        with TemporaryDirectory(prefix="moss-live-") as temporary:
            path = Path(temporary)
            async with running_server(text, fault, wait=wait, command=command, folder=path) as served:
                yield served
        return
    config = with_port_0(text, folder)
    command = (*FAKE_ENGINE, f"--fault={fault}") if command is None else command
    engine, server = build(config, command)
    stop = asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def listen() -> None:
        async with server.listening() as number:
            port.set_result(number)
            await stop.wait()

    running = asyncio.create_task(engine.run(), name="engine")
    listening = asyncio.create_task(listen(), name="server")
    try:
        if wait:
            async with asyncio.timeout(TIMEOUT_S):
                await engine.until(EngineState.READY)
        yield Running(await port, engine, server, stop)
    finally:
        stop.set()
        await listening
        running.cancel()
        with suppress(asyncio.CancelledError, EngineLost):
            await running


def with_port_0(text: str, folder: Path) -> Config:
    """A configuration that listens on any free port, with its log in a folder."""
    for section, setting in (("[server]", "port = 0"), ("[log]", f'path = "{folder / "log.sqlite"}"')):
        if section in text:
            text = text.replace(section, f"{section}\n{setting}")
        else:
            text = f"{section}\n{setting}\n{text}"
    return parse_config(text)


async def eventually(is_true: Callable[[], bool]) -> None:
    """Wait for what no event tells of; looks every 10 ms."""
    async with asyncio.timeout(TIMEOUT_S):
        while not is_true():  # noqa: ASYNC110  as it says
            await asyncio.sleep(0.01)


async def receive(connection: ClientConnection) -> Envelope:
    """The next message."""
    async with asyncio.timeout(TIMEOUT_S):
        return decode(await connection.recv())


async def receive_until(connection: ClientConnection, kind: type[Message]) -> list[Envelope]:
    """All messages up to and with the first of a kind."""
    found = [await receive(connection)]
    while not isinstance(found[-1].message, kind):
        found.append(await receive(connection))
    return found
