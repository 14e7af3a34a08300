#!/usr/bin/env python
"""Kill server, engine and connections under a live stream, at random; nothing may be lost or said twice.

A producer and a subscriber of the product go on by themselves. What the subscriber got in the end is
compared with a run that nothing happened to. Its last line is JSON; the exit status is 1 where they
differ. `--engine fake` hears checksums of the samples (tests/streaming/fake_engine.py), so that one
lost or repeated sample shows; `--engine embedded` is the real model on a recording.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from websockets.asyncio.client import ClientConnection

import clients.producer
import clients.subscriber
from clients.connection import Backoff, open_connection
from clients.producer import stream_audio, stream_url
from clients.sources import bytes_of_ms, decode
from clients.subscriber import subscribe
from scripts.demo import HOST, free_port
from streaming.protocol import UNLOGGED, Envelope, TranscriptDelta
from tests.streaming.support import s16, utterances

ROOT = Path(__file__).resolve().parent.parent
QUICK = Backoff(first_s=0.05, longest_s=0.5, max_attempts=400)
KINDS = ("server", "engine", "producer", "subscriber")
FRAME_MS = 40
LONGER = 1.5  # the audio, than the kills would take if a kill took no time


@dataclass
class Victims:
    """What can be killed."""

    folder: Path
    engine: str
    port: int = field(default_factory=free_port)
    process: asyncio.subprocess.Process | None = None
    n_ended: int = 0  # servers that ended because their engine was killed while it started
    connections: dict[str, ClientConnection] = field(default_factory=dict)  # "producer", "subscriber"

    async def start(self) -> None:
        """Start the server; the clients find it by themselves."""
        config = self.folder / "config.toml"
        if self.engine == "fake":
            command = [str(ROOT / "tests" / "streaming" / "server_process.py"), str(config)]
        else:
            command = ["-m", "clients.cli", "serve", "--config", str(config)]
        with (self.folder / "server.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, *command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )

    async def kill(self, kind: str) -> bool:
        """End one of them as a crash would; whether there was one."""
        assert self.process is not None
        if self.process.returncode is not None:
            # An engine that dies before it was ever ready ends the server; a service is started again.
            log = (self.folder / "server.log").read_text(errors="replace")
            if "EngineLost" not in log[-4000:]:
                raise RuntimeError(
                    f"the server ended by itself with {self.process.returncode}:\n{log[-4000:]}"
                )
            self.n_ended += 1
            await self.start()
            return False
        if kind == "server":
            self.process.kill()
            await self.process.wait()
            await self.start()
            return True
        if kind == "engine":
            engines = psutil.Process(self.process.pid).children()
            for engine in engines:
                engine.kill()
            return bool(engines)
        connection = self.connections.pop(kind, None)
        if connection is None:
            return False
        connection.transport.abort()
        return True


def main() -> int:
    """Run both, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("fake", "embedded"), default="fake")
    parser.add_argument("--recording", help="of the embedded engine: a file that PyAV can open")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between kills, on average")
    arguments = parser.parse_args()
    if arguments.engine == "embedded" and arguments.recording is None:
        parser.error("--engine embedded needs a --recording")
    logging.basicConfig(level=logging.ERROR)
    rng = random.Random(arguments.seed)
    reference = asyncio.run(run(arguments, rng, n_kills=0))
    started_at = time.perf_counter()
    found = asyncio.run(run(arguments, rng, n_kills=arguments.kills))
    seqs = [e.seq for e in found.envelopes if e.message.type not in UNLOGGED]
    result = {
        "kills": found.kills,
        "servers_ended_by_a_killed_start": found.n_ended,
        "seed": arguments.seed,
        "engine": arguments.engine,
        "audio_s": round(found.audio_s, 1),
        "wall_s": round(time.perf_counter() - started_at, 1),
        "words": len(found.words),
        "words_undisturbed": len(reference.words),
        "same_text": found.words == reference.words,
        "seq_without_gap_or_duplicate": seqs == list(range(1, len(seqs) + 1)),
        "n_logged": len(seqs),
    }
    is_good = result["same_text"] and result["seq_without_gap_or_duplicate"] and bool(reference.words)
    print(json.dumps(result))
    return 0 if is_good else 1


@dataclass
class Found:
    """What a subscriber got."""

    envelopes: list[Envelope] = field(default_factory=list)
    kills: dict[str, int] = field(default_factory=dict)
    n_ended: int = 0
    audio_s: float = 0.0

    @property
    def words(self) -> list[tuple[str, int, int]]:
        """The committed words with their places."""
        deltas = [e.message for e in self.envelopes if isinstance(e.message, TranscriptDelta)]
        return [(word.text, word.start_ms, word.end_ms) for delta in deltas for word in delta.words]


async def run(arguments: argparse.Namespace, rng: random.Random, n_kills: int) -> Found:
    """A stream that goes on until `n_kills` have happened, or the audio is over where there are none."""
    found = Found()
    kills: Counter[str] = Counter()
    audio = b"".join(decode(arguments.recording)) if arguments.recording else None
    with tempfile.TemporaryDirectory(prefix="moss-live-kills-") as name:
        victims = Victims(Path(name), arguments.engine)
        (victims.folder / "config.toml").write_text(
            f'[server]\nport = {victims.port}\n[log]\npath = "{name}/log.sqlite"\n'
            "[engine]\nshed_after_s = 0.0\nmax_restarts = 1000\n[events]\nenabled = false\n"
        )
        await victims.start()
        await until_ready(victims.port)
        server = f"ws://{HOST}:{victims.port}"
        over = asyncio.Event()
        watch(victims)
        n_bytes = 0

        async def chunks() -> AsyncIterator[bytes]:
            nonlocal n_bytes
            async for chunk in sound(audio, arguments.kills * arguments.every * LONGER):
                n_bytes += len(chunk)
                yield chunk

        is_paced = n_kills > 0
        url = stream_url(server, "kills")
        async with asyncio.TaskGroup() as group:
            group.create_task(kill_all(victims, rng, n_kills, arguments.every, kills, over))
            group.create_task(read(server, found))
            await stream_audio(url, chunks(), lambda _: None, paced=is_paced, backoff=QUICK)
            over.set()
        assert victims.process is not None
        victims.process.terminate()
        await victims.process.wait()
        found.audio_s = n_bytes / bytes_of_ms(1000)
        found.kills = dict(kills)
        found.n_ended = victims.n_ended
    return found


async def sound(audio: bytes | None, seconds: float) -> AsyncIterator[bytes]:
    """A recording over and over, or utterances that are never the same, for about so long."""
    n_sent, seed = 0, 0
    while n_sent < seconds * bytes_of_ms(1000):
        rng = random.Random(seed)
        piece = s16(utterances(*(rng.uniform(0.5, 4.0) for _ in range(5)))) if audio is None else audio
        seed += 1
        for at in range(0, len(piece), bytes_of_ms(FRAME_MS)):
            yield piece[at : at + bytes_of_ms(FRAME_MS)]
        n_sent += len(piece)


async def read(server: str, found: Found) -> None:
    """Everything a subscriber gets from the beginning of the stream to its end."""
    async for envelope in subscribe(server, "kills", after=0, follow=False, wait_s=60, backoff=QUICK):
        found.envelopes.append(envelope)


async def kill_all(
    victims: Victims,
    rng: random.Random,
    n_kills: int,
    every_s: float,
    kills: Counter[str],
    over: asyncio.Event,
) -> None:
    """Kill something again and again, at times that follow no pattern."""
    while sum(kills.values()) < n_kills and not over.is_set():
        try:
            async with asyncio.timeout(rng.expovariate(1 / every_s)):
                await over.wait()
        except TimeoutError:
            kind = rng.choice(KINDS)
            kills[kind] += await victims.kill(kind)


def watch(victims: Victims) -> None:
    """Know the clients' connections, so that they can be broken."""

    def opener(kind: str) -> object:
        async def opened(url: str, **options: object) -> ClientConnection:
            connection = await open_connection(url, **options)  # type: ignore[arg-type]
            victims.connections[kind] = connection
            return connection

        return opened

    clients.producer.open_connection = opener("producer")  # type: ignore[attr-defined, assignment]
    clients.subscriber.open_connection = opener("subscriber")  # type: ignore[attr-defined, assignment]


async def until_ready(port: int) -> None:
    """Wait until the server takes streams."""
    while True:
        try:
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            status = await reader.readline()
            writer.close()
        except OSError:
            status = b""
        if b" 200 " in status:
            return
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
