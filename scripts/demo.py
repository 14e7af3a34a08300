"""The demo: a server, a recording streamed to it in real time, and its captions as they come.

Words, sound events and emotion stand on one timeline.

Starts `moss-live serve` on a free port with the repository's config.toml, streams through a
real WebSocket, and stops the server whatever happens. On a terminal the captions are redrawn in
place; elsewhere they are lines. The exit status is 1 where no word was committed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from bench.measures import wer
from clients.captions import captions_for
from clients.connection import ConnectFailed
from clients.producer import Progress, StreamFailed, stream_audio, stream_url
from clients.sources import SourceError, file_chunks
from streaming.protocol import (
    READY_PATH,
    EmotionUpdate,
    Envelope,
    EventEnded,
    Message,
    TranscriptDelta,
)

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
READY_TIMEOUT_S = 180.0  # the first start reads and checks 145 MB of weights
STOP_TIMEOUT_S = 20.0
LOG_LINES = 30  # of the server's log, shown when it fails


class DemoError(RuntimeError):
    """The demo cannot continue; says why."""


def main() -> int:
    """Run the demo over one recording."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recording", help="a file or URL that PyAV can open")
    recording: str = parser.parse_args().recording
    console = Console(highlight=False, force_terminal=False if os.environ.get("CI") else None)
    log = ROOT / ".demo" / "server.log"
    log.parent.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then too
    console.print("Starting the server; it loads its model first, which takes some seconds.", soft_wrap=True)
    try:
        with running_server(log) as port:
            console.print(f"Ready on port {port}. Streaming {recording} in real time.\n", markup=False)
            heard, flush_s = asyncio.run(stream(recording, port, console))
    except (DemoError, StreamFailed, ConnectFailed, SourceError) as exc:
        print(f"demo: {exc}", file=sys.stderr)
        print("\n".join(tail(log)), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return report(console, heard, flush_s, Path(recording).with_suffix(".txt"))


@dataclass(slots=True)
class Heard:
    """What the report needs of the messages."""

    transcript: str = ""  # every delta's separator and text
    sounds: Counter[str] = field(default_factory=Counter)  # events by label
    emotions: Counter[str] = field(default_factory=Counter)  # updates by label

    def add(self, message: Message) -> None:
        """Take in one message."""
        match message:
            case TranscriptDelta():
                self.transcript += message.separator + message.text
            case EventEnded():
                self.sounds[message.label] += 1
            case EmotionUpdate():
                self.emotions[message.label] += 1


async def stream(recording: str, port: int, console: Console) -> tuple[Heard, float | None]:
    """What was heard, and the seconds from the end of the audio to its last word.

    Raises:
        ConnectFailed, StreamFailed, SourceError: as `stream_audio`.
    """
    progress = Progress()
    heard = Heard()
    with captions_for(console, lambda: progress.sent_s) as captions:

        def on_message(envelope: Envelope) -> None:
            heard.add(envelope.message)
            captions.show(envelope)

        url = stream_url(f"ws://{HOST}:{port}", "demo")
        await stream_audio(url, file_chunks(recording), on_message, paced=True, progress=progress)
    flush_s = None
    if progress.flush_sent_at is not None and progress.flushed_at is not None:
        flush_s = progress.flushed_at - progress.flush_sent_at
    return heard, flush_s


def report(console: Console, heard: Heard, flush_s: float | None, reference: Path) -> int:
    """Print what was heard, and what was said where that is known; the exit status."""
    committed = heard.transcript
    if not committed:
        print("demo: no word was committed", file=sys.stderr)
        return 1
    console.print(f"\nTranscript:\n{committed}", markup=False)
    for what, found in (("Sounds", heard.sounds), ("Emotion", heard.emotions)):
        line = ", ".join(f"{label} ({n})" for label, n in found.most_common())
        console.print(f"\n{what}: {line or 'none'}", markup=False, soft_wrap=True)
    if flush_s is not None:
        console.print(f"\nEverything was final {flush_s:.2f} s after the last audio.")
    if reference.suffix == ".txt" and reference.is_file():
        said = " ".join(reference.read_text(encoding="utf-8").split())
        console.print(
            f"Against what was said ({reference}): {wer(said, committed):.1%} word errors.", markup=False
        )
    console.print(
        "Next: make serve, and in other terminals moss-live stream FILE, moss-live captions NAME.",
        soft_wrap=True,
    )
    return 0


@contextlib.contextmanager
def running_server(log: Path, config: Path = ROOT / "config.toml") -> Iterator[int]:
    """A server of our own, ready, on a free port; stopped on the way out, by force if need be.

    Args:
        log: Where its output goes; what it remembers goes beside it.
        config: Its settings.

    Raises:
        DemoError: it ended, or was not ready within `READY_TIMEOUT_S`.
    """
    port = free_port()
    command = [sys.executable, "-m", "clients.cli", "serve", "--config", str(config)]
    command += ["--host", HOST, "--port", str(port), "--log", str(log.with_suffix(".sqlite"))]
    with log.open("wb") as output:
        # A session of its own: Ctrl-C reaches the demo alone, which then stops the server.
        server = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_ready(server, port)
        yield port
    finally:
        stop(server)


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    """Ask /readyz until it says yes."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise DemoError(f"the server ended with status {server.returncode}; its log:")
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}{READY_PATH}", timeout=5):
                return
        except (urllib.error.URLError, OSError):  # not listening, or 503: not ready
            time.sleep(0.2)
    raise DemoError(f"the server was not ready after {READY_TIMEOUT_S:g} s; its log:")


def stop(server: subprocess.Popen[bytes]) -> None:
    """Ask the server to stop, then end it and whatever it started."""
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):  # all of its session ended
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.create_server((HOST, 0)) as probe:
        return int(probe.getsockname()[1])


def tail(log: Path) -> list[str]:
    """The last lines of the server's log."""
    return (
        log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:] if log.is_file() else []
    )


if __name__ == "__main__":
    sys.exit(main())
