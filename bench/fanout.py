#!/usr/bin/env python
"""One stream, many subscribers, on loopback: does everybody get everything, and how soon?

The server runs in a process of its own with the fake engine of the tests, the subscribers in others.
A producer sends speech in real time; some subscribers stop reading. Latency is from the moment at
which a message was given to the log (`at_ms` in its file, before the commit) to the moment at which a
subscriber has it. The last line is JSON; the exit status is 1 where anything was missed, or the slow
ones were not closed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from bench.kills import FRAME_MS, sound, until_ready
from clients.producer import stream_audio, stream_url
from scripts.demo import HOST, free_port
from streaming.protocol import UNLOGGED, CloseCode, SessionClosed, Subscribe, decode, encode_client

ROOT = Path(__file__).resolve().parent.parent
STREAM = "fanout"
SLOW_QUEUE = 50  # the server's `subscriber_queue` here: a reader that stops is behind within the run


def main() -> int:
    """Run it, or be one of its processes of subscribers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--subscribers", type=int, default=500)
    parser.add_argument("--slow", type=int, default=5, help="of them, that stop reading")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
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
            f'[log]\npath = "{log}"\n[limits]\nattempts_burst = 100000\n'
        )
        script = ROOT / "tests" / "streaming" / "server_process.py"
        server = await asyncio.create_subprocess_exec(
            sys.executable, str(script), str(config), stderr=asyncio.subprocess.DEVNULL
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
        await server.wait()
        return summary(arguments, log, found, cpu.user + cpu.system - cpu_before.user - cpu_before.system)


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
        logged = dict(database.execute("SELECT seq, at_ms FROM messages ORDER BY seq").fetchall())
    database.close()
    everything = list(logged)
    fast = [reader for part in found for reader in part["fast"]]
    # Unix milliseconds on both sides, of one machine's clock; half a millisecond is rounded away.
    delays = np.array([at - logged[seq] for reader in fast for seq, at in reader])
    return {
        "subscribers": arguments.subscribers,
        "seconds": arguments.seconds,
        "logged": len(everything),
        "fast": len(fast),
        "complete": sum([seq for seq, _ in reader] == everything for reader in fast),
        "slow": arguments.slow,
        "slow_closed": sum(part["slow_closed"] for part in found),
        "log_to_subscriber_ms": {
            f"p{q:g}": round(float(np.percentile(delays, q)), 1) for q in (50, 95, 99, 99.9, 100)
        },
        "deliveries": len(delays),
        "server_cpu_s": round(cpu_s, 1),
    }


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
    found = []
    async with connect(f"ws://{HOST}:{port}/v1/subscribe", compression=None, open_timeout=60) as connection:
        await connection.send(encode_client(Subscribe((STREAM,), after=0)))
        await ready.wait()
        while True:
            text = await connection.recv()
            at = time.time_ns() / 1e6
            envelope = decode(text)
            if envelope.message.type not in UNLOGGED:
                found.append((envelope.seq, at))
            if isinstance(envelope.message, SessionClosed):
                return found


async def stop_reading(port: int, ready: asyncio.Barrier, is_over: asyncio.Event) -> bool:
    """Subscribe, then read nothing until the others are done; whether it was closed as too slow.

    What the kernel's buffers hold would serve a quiet stream for hours, so it asks for many things
    first whose answers it does not read, as tests/streaming/test_server.py does.
    """
    async with connect(f"ws://{HOST}:{port}/v1/subscribe", compression=None, open_timeout=60) as connection:
        connection.transport.pause_reading()
        for _ in range(4000):
            await connection.send(encode_client(Subscribe(tuple(f"{i:064}" for i in range(64)))))
        await connection.send(encode_client(Subscribe((STREAM,), after=0)))
        await ready.wait()
        await is_over.wait()
        connection.transport.resume_reading()
        try:
            while True:
                await connection.recv()
        except ConnectionClosed as exc:
            return exc.rcvd is not None and exc.rcvd.code == CloseCode.TOO_SLOW


if __name__ == "__main__":
    sys.exit(main())
