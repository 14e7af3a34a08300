"""Makes `data/saved_log.xz`: the log of a server that was killed with live streams in it.

Run in a checkout of the version whose snapshots are to be kept as a fixture:

    PYTHONPATH=. python /path/to/save_streams.py OUT.xz

The engine is stopped before the question and the flush, so that both are saved without an answer.
"""

from __future__ import annotations

import asyncio
import json
import lzma
import os
import signal
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from scripts.demo import free_port
from tests.streaming.support import TIMEOUT_S, s16, utterances

AUDIO = s16(utterances(0.9, 1.1))
STOPPED_AT = 80_000  # bytes: in the second utterance
ASKED_AT = STOPPED_AT + 4_800
CUT = ASKED_AT + 9_601  # bytes the server got: in the middle of a sample
RATES = {"a": 16_000, "b": 18_000}  # stream, and what its producer calls the rate of the same samples
ASK = json.dumps({"type": "ask", "id": "q", "question": "Who?", "last_ms": 1000})
FLUSH = json.dumps({"type": "flush", "id": "f"})


async def make(out: Path) -> None:
    """Start a server, stream into it, kill it, and pack its log, with each stream's token."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        text = f'[server]\nport = {port}\n[log]\npath = "{folder / "log.sqlite"}"\n'
        (folder / "config.toml").write_text(text)
        server = await asyncio.create_subprocess_exec(
            sys.executable,
            "tests/streaming/server_process.py",
            str(folder / "config.toml"),
            stdout=asyncio.subprocess.PIPE,
        )
        assert server.stdout is not None
        await server.stdout.readline()
        engine: list[int] = []
        try:
            async with asyncio.timeout(TIMEOUT_S):
                begun = {stream: await begin(port, stream, rate) for stream, rate in RATES.items()}
                tokens = {stream: token for stream, (_, token) in begun.items()}
                for connection, _ in begun.values():
                    await connection.send(AUDIO[:STOPPED_AT])
                    await until(connection, "transcript.delta")
                engine = children_of(server.pid)
                for pid in engine:
                    os.kill(pid, signal.SIGSTOP)
                for connection, _ in begun.values():
                    await connection.send(AUDIO[STOPPED_AT:ASKED_AT])
                    await connection.send(ASK)
                    await connection.send(FLUSH)
                    await until(connection, "ack")
                    await connection.send(AUDIO[ASKED_AT:CUT])
                    await until(connection, "ack")
        finally:
            server.kill()
            for pid in engine:
                os.kill(pid, signal.SIGKILL)
            await server.wait()
        pack(folder / "log.sqlite", out)
        sys.stdout.write(f"{tokens}\n")


def children_of(pid: int) -> list[int]:
    """The processes that a process started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def pack(log: Path, out: Path) -> None:
    """The log as one file, compressed."""
    with closing(sqlite3.connect(log, isolation_level=None)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.execute("PRAGMA journal_mode = DELETE")
    out.write_bytes(lzma.compress(log.read_bytes()))


async def begin(port: int, stream: str, rate: int) -> tuple[ClientConnection, str]:
    """A new stream, once the engine is ready, and its token."""
    while True:
        try:
            connection = await connect(f"ws://127.0.0.1:{port}/v1/stream/{stream}?rate={rate}")
        except InvalidStatus:
            await asyncio.sleep(0.05)  # the engine starts
        else:
            return connection, str((await until(connection, "session.created"))["resume_token"])


async def until(connection: ClientConnection, kind: str) -> dict[str, object]:
    """The next message of a type."""
    while True:
        message: dict[str, object] = json.loads(await connection.recv())
        if message["type"] == kind:
            return message


if __name__ == "__main__":
    asyncio.run(make(Path(sys.argv[1])))
