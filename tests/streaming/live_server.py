"""`moss-live serve` in a process of its own, and what a producer got from it."""

from __future__ import annotations

import asyncio
import http.client
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from clients.producer import stream_audio, stream_url
from clients.sources import bytes_of_ms
from scripts.demo import HOST, free_port, stop, wait_until_ready
from streaming.protocol import (
    READY_PATH,
    UNLOGGED,
    Envelope,
    Message,
    TranscriptDelta,
    TranscriptFinal,
    Word,
)

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120.0  # for a stream, a restart or a stop; only a broken one takes so long
FRAME_MS = 20


@dataclass(frozen=True, slots=True)
class LiveServer:
    """A server process of our own."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        """Where its streams are."""
        return f"ws://{HOST}:{self.port}"

    def engine(self) -> psutil.Process:
        """Its engine process."""
        children = psutil.Process(self.process.pid).children()
        (engine,) = (child for child in children if "streaming.engine" in child.cmdline())
        return engine

    def is_ready(self) -> bool:
        """What /readyz says."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
        try:
            connection.request("GET", READY_PATH)
            return connection.getresponse().status == http.HTTPStatus.OK
        finally:
            connection.close()


@dataclass(slots=True)
class Run:
    """What a producer was sent, in order."""

    envelopes: list[Envelope] = field(default_factory=list)
    at: list[float] = field(default_factory=list)  # `perf_counter` of each

    def add(self, envelope: Envelope) -> None:
        """Append a message that came now."""
        self.envelopes.append(envelope)
        self.at.append(time.perf_counter())

    @property
    def messages(self) -> list[Message]:
        """All messages."""
        return [envelope.message for envelope in self.envelopes]

    @property
    def words(self) -> list[Word]:
        """The committed words."""
        return [w for message in self.messages if isinstance(message, TranscriptDelta) for w in message.words]

    @property
    def text(self) -> str:
        """The transcript."""
        return " ".join(message.text for message in self.messages if isinstance(message, TranscriptDelta))

    @property
    def final_text(self) -> str:
        """What the closed segments say."""
        return " ".join(message.text for message in self.messages if isinstance(message, TranscriptFinal))

    @property
    def logged_seqs(self) -> list[int]:
        """`seq` of every message that has one of its own."""
        return [e.seq for e in self.envelopes if e.message.type not in UNLOGGED]

    def last(self, kind: type[Message]) -> int:
        """Where the last message of a kind is; -1 where there is none."""
        return max((i for i, message in enumerate(self.messages) if isinstance(message, kind)), default=-1)


def cut(audio: bytes, start_ms: int, end_ms: int) -> bytes:
    """The audio between two times."""
    return audio[bytes_of_ms(start_ms) : bytes_of_ms(end_ms)]


def launch(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """A server with its log in a folder, starting."""
    config = folder / "config.toml"
    config.write_text(f'[engine]\nshed_after_s = 0.0\n[log]\npath = "{folder / "log.sqlite"}"\n')
    command = [sys.executable, "-m", "clients.cli", "serve"]
    command += ["--config", str(config), "--host", HOST, "--port", str(port)]
    with (folder / "server.log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


@contextmanager
def serving(folder: Path) -> Iterator[LiveServer]:
    """A server that is ready; on the way out it is stopped, by force if need be."""
    port = free_port()
    process = launch(folder, port)
    try:
        wait_until_ready(process, port)
        yield LiveServer(process, port)
    finally:
        stop(process)


async def frames(audio: bytes, frame_ms: int = FRAME_MS) -> AsyncIterator[bytes]:
    """Audio in binary frames of a length."""
    n_bytes = bytes_of_ms(frame_ms)
    for begin in range(0, len(audio), n_bytes):
        yield audio[begin : begin + n_bytes]


async def streamed(
    server: LiveServer, name: str, audio: bytes, frame_ms: int = FRAME_MS, *, is_paced: bool = False
) -> Run:
    """What a stream of `audio` says, from `session.created` to `session.closed`."""
    run = Run()
    async with asyncio.timeout(TIMEOUT_S):
        await stream_audio(stream_url(server.url, name), frames(audio, frame_ms), run.add, paced=is_paced)
    return run
