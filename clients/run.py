"""What the commands share: sources, the stream they make, signals, and what goes wrong.

What a command needs is imported when it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clients.extras import how_to_install
from clients.pipes import silence_stdout
from streaming.protocol import AFTER_LIVE, Envelope, Gap, TranscriptFinal

if TYPE_CHECKING:
    from clients.cursor import CursorFile, Position
    from clients.sources import Chunk


def file_or_url(source: str, track: str | None, *, reconnect: bool) -> AsyncIterator[Chunk]:
    """The audio of a source; where it has several sound tracks, says which one is taken."""
    from clients.reconnect import reconnecting
    from clients.sources import Opened, file_chunks

    seen: list[Opened] = []

    def on_open(opened: Opened) -> None:
        if len(opened.tracks) > 1 and not seen:
            others = "; ".join(map(str, opened.tracks))
            click.echo(f"sound track {opened.taken} of {others}; --track takes another", err=True)
        seen[:] = [opened]

    if not reconnect:
        return file_chunks(source, track=track, on_open=on_open)
    return reconnecting(
        lambda: file_chunks(source, track=track, on_open=on_open), is_live=lambda: seen[-1].is_live
    )


async def microphone_of(device: str | None, *, reconnect: bool) -> AsyncIterator[Chunk]:
    """The audio of a microphone, given by its name or number; says when it begins and what was lost."""
    from clients.reconnect import reconnecting
    from clients.sources import microphone_chunks

    number_or_name = int(device) if device and device.isdecimal() else device
    chunks = microphone_chunks(number_or_name)
    if reconnect:
        chunks = reconnecting(lambda: microphone_chunks(number_or_name), is_live=lambda: True)
    is_first = True
    async for chunk in chunks:
        if is_first:
            click.echo("listening; Ctrl-C ends the stream", err=True)
            is_first = False
        if isinstance(chunk, Gap):
            click.echo(f"{chunk.duration_ms / 1000:.1f} s of audio were lost", err=True)
        yield chunk


async def produce(
    chunks: AsyncIterator[Chunk],
    server: str,
    token: str | None,
    name: str | None,
    language: str | None,
    with_captions: bool,
    *,
    paced: bool,
) -> None:
    """Send `chunks` and show the captions, or where they can be read."""
    from clients.producer import Progress, stream_audio, stream_url

    # Two that start within a second get two names.
    stream_name = name or f"{datetime.now(UTC):live-%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    progress = Progress()
    with contextlib.ExitStack() as stack:
        on_message: Callable[[Envelope], None] = _Transcript().show
        say: Callable[[str], None] = _say
        if with_captions:
            from clients.captions import LastingConsole, captions_for

            captions = stack.enter_context(captions_for(LastingConsole(), lambda: progress.sent_s))
            on_message, say = captions.show, captions.say
        else:
            say(f"stream {stream_name}; read it with: moss-live captions {stream_name}")
        stop = stack.enter_context(_first_interrupt(say))
        url = stream_url(server, stream_name, language)
        await stream_audio(url, chunks, on_message, paced=paced, progress=progress, stop=stop, token=token)
    _say(f"transcript: http{server.removeprefix('ws')}/v1/streams/{stream_name}/transcript.txt")


def _say(text: str) -> None:
    """A line of the client's own."""
    click.echo(text, err=True)


class _Transcript:
    """The transcript and nothing else on stdout, a segment a line, for pipes.

    When nobody reads it any more the stream continues without it.
    """

    def __init__(self) -> None:
        self._is_read = True

    def show(self, envelope: Envelope) -> None:
        """Print a segment that was closed."""
        if self._is_read and isinstance(envelope.message, TranscriptFinal):
            try:
                click.echo(envelope.message.text)
            except BrokenPipeError:
                self._is_read = False
                silence_stdout()


@contextlib.contextmanager
def _first_interrupt(say: Callable[[str], None]) -> Iterator[asyncio.Event]:
    """An event that the first Ctrl-C sets, which says so; the second one interrupts as ever."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)
        say("ending the stream; Ctrl-C again leaves at once")

    try:
        loop.add_signal_handler(signal.SIGINT, on_interrupt)
    except NotImplementedError:  # Windows: Ctrl-C leaves at once
        yield stop
        return
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def first_position(
    cursor: CursorFile | None, after: int | str | Path | None, session: str | None
) -> Position:
    """Where a reader begins: where the cursor file says, else as asked; a session from its beginning.

    Raises:
        CursorError: the file cannot be used.
    """
    from clients.cursor import Position

    if cursor is not None:
        return cursor.load()
    assert not isinstance(after, Path), after
    if after == AFTER_LIVE:
        return Position("live")
    assert not isinstance(after, str), after
    return Position(0 if after is None and session is not None else after)


@contextlib.contextmanager
def first_signal(number: signal.Signals) -> Iterator[None]:
    """End the body as an interrupt does, where it awaits something, when a signal comes."""
    task = asyncio.current_task()
    assert task is not None
    is_asked = False

    def on_signal() -> None:
        nonlocal is_asked
        is_asked = True
        task.cancel()

    loop = asyncio.get_running_loop()
    with contextlib.suppress(NotImplementedError):  # Windows: it ends at once
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    except asyncio.CancelledError:
        if not is_asked:
            raise
        raise SystemExit(128 + number) from None


@contextlib.contextmanager
def missing_extra() -> Iterator[None]:
    """Say what to install where a package that only some commands need is missing."""
    try:
        yield
    except ModuleNotFoundError as exc:
        raise click.ClickException(f"this needs {exc.name}: {how_to_install('clients')}") from exc


def run_client(work: Coroutine[Any, Any, None]) -> None:
    """Run a client to its end; what goes wrong is one line and exit status 1.

    Raises:
        click.ClickException: with the text of the server, the network or the source.
    """
    from clients.connection import ConnectFailed
    from clients.cursor import CursorError
    from clients.producer import StreamFailed
    from clients.sources import SourceError
    from clients.subscriber import SubscriptionFailed

    # Here and not in the group: `serve` sets up logging of its own.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        asyncio.run(work)
    except (ConnectFailed, CursorError, StreamFailed, SourceError, SubscriptionFailed) as exc:
        raise click.ClickException(str(exc)) from exc
    except BrokenPipeError:  # as after `| head`
        silence_stdout()
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
