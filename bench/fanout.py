#!/usr/bin/env python
"""One stream, many subscribers, on loopback: does everybody get everything, and how soon?

The server runs in a process of its own with the fake engine of the tests, the subscribers in others.
A producer sends speech in real time; some subscribers stop reading.

Two latencies are told. From the log to the socket: from a message's commit to the return of `send` for
one subscriber, in the server. End to end: from the moment at which a message was given to the log
(`at_ms` in its file, before the commit) to the moment at which a subscriber in another process has it.
The last line is JSON; the exit status is 1 where anything was missed, or the slow ones were not closed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from bench.kills import FRAME_MS, sound, until_ready
from clients.producer import stream_audio, stream_url
from scripts.demo import HOST, free_port
from streaming.app import run as run_server
from streaming.config import load_config
from streaming.log.hub import Hub
from streaming.log.row import Row
from streaming.protocol import (
    UNLOGGED,
    CloseCode,
    SessionClosed,
    Subscribe,
    decode,
    encode_client,
)
from streaming.server.connection import GuardedConnection
from tests.streaming.support import FAKE_ENGINE

ROOT = Path(__file__).resolve().parent.parent
STREAM = "fanout"
LAST = f'{{"type":"{SessionClosed.type}"'
SLOW_QUEUE = 50  # the server's `subscriber_queue` here: a reader that stops is behind within the run


def main() -> int:
    """Run it, or be one of its processes of subscribers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--subscribers", type=int, default=500)
    parser.add_argument("--slow", type=int, default=5, help="of them, that stop reading")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve)
        return 0
    if arguments.port is not None:
        print(json.dumps(asyncio.run(read_all(arguments.port, arguments.subscribers, arguments.slow))))
        return 0
    result = asyncio.run(run(arguments))
    print(json.dumps(result))
    is_good = result["complete"] == result["fast"] and result["slow_closed"] == result["slow"]
    return 0 if is_good else 1


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Server, subscribers, producer; what was found."""
    with tempfile.TemporaryDirectory(prefix="moss-live-fanout-") as folder:
        port = free_port()
        log = Path(folder) / "log.sqlite"
        config = Path(folder) / "config.toml"
        config.write_text(
            f"[server]\nport = {port}\nmax_connections = 2000\nsubscriber_queue = {SLOW_QUEUE}\n"
            f'[log]\npath = "{log}"\n[limits]\nmax_half_open = 2000\n'
        )
        command = [sys.executable, "-m", "bench.fanout", "--serve", str(config)]
        server = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        await until_ready(port)
        readers = [
            await start_readers(port, n, arguments.slow if i == 0 else 0)
            for i, n in enumerate(shares(arguments.subscribers, arguments.processes))
        ]
        for reader in readers:
            assert reader.stdout is not None
            await reader.stdout.readline()  # all are subscribed
        process = psutil.Process(server.pid)
        cpu_before = process.cpu_times()
        await stream_audio(
            stream_url(f"ws://{HOST}:{port}", STREAM), chunks(arguments.seconds), lambda _: None, paced=True
        )
        found = [json.loads((await reader.communicate())[0].splitlines()[-1]) for reader in readers]
        cpu = process.cpu_times()
        server.terminate()
        sent = json.loads((await server.communicate())[0].splitlines()[-1])
        cpu_s = cpu.user + cpu.system - cpu_before.user - cpu_before.system
        return summary(arguments, log, found, cpu_s) | {"log_to_socket_ms": sent}


def shares(n: int, n_parts: int) -> list[int]:
    """`n` in parts as equal as can be."""
    return [n // n_parts + (i < n % n_parts) for i in range(n_parts)]


async def start_readers(port: int, n: int, n_slow: int) -> asyncio.subprocess.Process:
    """A process of subscribers."""
    command = ["-m", "bench.fanout", "--port", str(port), "--subscribers", str(n), "--slow", str(n_slow)]
    return await asyncio.create_subprocess_exec(
        sys.executable, *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )


async def chunks(seconds: float) -> AsyncIterator[bytes]:
    """Speech and pauses."""
    n_left = int(seconds * 1000 / FRAME_MS)
    async for chunk in sound(None, seconds):
        if not n_left:
            return
        n_left -= 1
        yield chunk


def summary(
    arguments: argparse.Namespace, log: Path, found: list[dict[str, Any]], cpu_s: float
) -> dict[str, Any]:
    """What everybody got, against what the log has."""
    with sqlite3.connect(log) as database:
        rows = database.execute("SELECT seq, at_ms, type FROM messages ORDER BY seq").fetchall()
    database.close()
    logged = {seq: at_ms for seq, at_ms, _ in rows}
    everything = list(logged)
    fast = [reader for part in found for reader in part["fast"]]
    # Unix milliseconds on both sides, of one machine's clock; half a millisecond is rounded away.
    delays = [at - logged[seq] for reader in fast for seq, at in reader]
    return {
        "subscribers": arguments.subscribers,
        "seconds": arguments.seconds,
        "logged": len(everything),
        "fast": len(fast),
        "complete": sum([seq for seq, _ in reader] == everything for reader in fast),
        "slow": arguments.slow,
        "slow_closed": sum(part["slow_closed"] for part in found),
        "log_to_subscriber_ms": percentiles(delays),
        "slowest_messages": slowest(fast, rows),
        "deliveries": len(delays),
        "server_cpu_s": round(cpu_s, 1),
    }


def percentiles(delays_ms: Sequence[float]) -> dict[str, float]:
    """The usual ones."""
    return {f"p{q:g}": round(float(np.percentile(delays_ms, q)), 1) for q in (50, 95, 99, 99.9, 100)}


def slowest(fast: list[list[Any]], rows: list[Any]) -> list[dict[str, Any]]:
    """The messages that took longest, by the median over their readers: a disk or a machine that stalls."""
    found = [
        {
            "seq": seq,
            "type": kind,
            "first_ms": round(min(reader[i][1] for reader in fast) - at_ms, 1),
            "last_ms": round(max(reader[i][1] for reader in fast) - at_ms, 1),
        }
        for i, (seq, at_ms, kind) in enumerate(rows)
        if all(len(reader) > i and reader[i][0] == seq for reader in fast)
    ]
    return sorted(found, key=lambda message: -message["last_ms"])[:4]


# --- the server's process ----------------------------------------------------------------


def serve(path: Path) -> None:
    """The server with the fake engine; at its end, how long messages took from the log to sockets."""
    committed: dict[bytes, float] = {}  # frame of a logged message -> when it was
    delays_ms: list[float] = []
    publish, send = Hub.publish, GuardedConnection.send

    def seen_publish(hub: Hub, row: Row) -> None:
        if row.type not in UNLOGGED:
            committed[row.frame] = time.perf_counter()
        publish(hub, row)

    async def seen_send(connection: GuardedConnection, message: Any, *, text: bool | None = None) -> None:
        await send(connection, message, text=text)
        at = committed.get(message)
        if at is not None:
            delays_ms.append((time.perf_counter() - at) * 1000)

    Hub.publish = seen_publish  # type: ignore[method-assign, assignment]
    GuardedConnection.send = seen_send  # type: ignore[method-assign, assignment]
    asyncio.run(run_server(load_config(path), engine_command=FAKE_ENGINE))
    print(json.dumps(percentiles(delays_ms)))


# --- a process of subscribers ------------------------------------------------------------


async def read_all(port: int, n: int, n_slow: int) -> dict[str, Any]:
    """Subscribe so many times, say so, and read to the end; the slow ones stop at once."""
    is_over = asyncio.Event()
    ready = asyncio.Barrier(n + 1)
    slow = [asyncio.create_task(stop_reading(port, ready, is_over)) for _ in range(n_slow)]
    fast = [asyncio.create_task(read_one(port, ready)) for _ in range(n - n_slow)]
    await ready.wait()
    print("ready", flush=True)
    read = await asyncio.gather(*fast)
    is_over.set()
    return {"fast": read, "slow_closed": sum(await asyncio.gather(*slow))}


async def read_one(port: int, ready: asyncio.Barrier) -> list[tuple[int, float]]:
    """`seq` of each logged message, and when it came, in Unix milliseconds."""
    came: list[tuple[str, float]] = []  # read later: the clients must not take the time they measure
    async with connect(f"ws://{HOST}:{port}/v1/subscribe", compression=None, open_timeout=60) as connection:
        await connection.send(encode_client(Subscribe((STREAM,), after=0)))
        await ready.wait()
        while True:
            text = str(await connection.recv())
            came.append((text, time.time_ns() / 1e6))
            if text.startswith(LAST):
                break
    found = [(decode(text), at) for text, at in came]
    return [(envelope.seq, at) for envelope, at in found if envelope.message.type not in UNLOGGED]


async def stop_reading(port: int, ready: asyncio.Barrier, is_over: asyncio.Event) -> bool:
    """Subscribe, then read nothing any more; whether it was closed, and as too slow if that can be seen.

    What the kernel's buffers hold would serve a quiet stream for hours, so it asks for many things
    whose answers it does not read, as tests/streaming/server/test_endpoints.py does.
    """
    much = encode_client(Subscribe((STREAM, *(f"{i:064}" for i in range(63)))))
    async with connect(f"ws://{HOST}:{port}/v1/subscribe", compression=None, open_timeout=60) as connection:
        await connection.send(encode_client(Subscribe((STREAM,), after=0)))
        await ready.wait()
        connection.transport.pause_reading()
        try:
            while not is_over.is_set():
                await connection.send(much)
                await asyncio.sleep(0.005)
            connection.transport.resume_reading()
            while True:
                async with asyncio.timeout(10):
                    await connection.recv()
        except ConnectionClosed as exc:
            return exc.rcvd is None or exc.rcvd.code == CloseCode.TOO_SLOW
        except TimeoutError:
            return False  # it is still open


if __name__ == "__main__":
    sys.exit(main())
