"""The commands of `moss-live`.

Further ones, such as `serve`, come from the entry points `moss_live.commands`, so that an
install of the clients alone needs neither torch nor the server's code. What a command needs is
imported when it runs.
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
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clients.extras import how_to_install
from streaming.protocol import (
    AFTER_LIVE,
    DEFAULT_PORT,
    MAX_SEQ,
    MESSAGE_TYPES,
    STREAM_NAME,
    STREAM_PATTERN,
    Envelope,
    Subscribed,
    TranscriptDelta,
    encode,
)

if TYPE_CHECKING:
    from clients.cursor import CursorFile, Position

COMMANDS = "moss_live.commands"
DEFAULT_SERVER = f"ws://127.0.0.1:{DEFAULT_PORT}"
DEFAULT_WAIT_S = 30.0
_SCHEMES = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}


class CommandGroup(click.Group):
    """The commands here and those of the entry points, each loaded when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every name, whether or not what it needs is installed."""
        return sorted({*super().list_commands(ctx), *entry_points(group=COMMANDS).names})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or one that says what is missing."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        for entry in entry_points(group=COMMANDS, name=cmd_name):
            return _load(entry)
        return None


def _load(entry: EntryPoint) -> click.Command:
    try:
        command = entry.load()
    except ModuleNotFoundError as exc:
        return _unavailable(entry.name, f"needs {exc.name}: {how_to_install('server')}")
    if not isinstance(command, click.Command):
        raise click.ClickException(f"{entry.value} is no click command")
    return command


def _unavailable(name: str, why: str) -> click.Command:
    """A command that cannot run here, and says so when it is called."""

    @click.command(name, short_help=f"({why})", context_settings={"ignore_unknown_options": True})
    @click.argument("arguments", nargs=-1)
    def command(arguments: tuple[str, ...]) -> None:
        raise click.ClickException(f"{name} {why}")

    return command


@click.group(cls=CommandGroup)
@click.version_option(package_name="moss-live")
def group() -> None:
    """Live captions: run a server, send it audio, read its captions."""


def _streams(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    if not STREAM_PATTERN.fullmatch(value):
        raise click.BadParameter(f"{value!r} is no stream name or pattern: letters, digits, ._- and *")
    return value


def _stream_name(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not STREAM_NAME.fullmatch(value):
        raise click.BadParameter(f"{value!r} is no stream name: letters, digits and ._-, at most 64")
    return value


def _server_url(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    """The address of a server as people write it: `host:port`, or a URL of a page or a socket."""
    scheme, found, rest = value.partition("://")
    if not found:
        return f"ws://{value}"
    if scheme.lower() not in _SCHEMES:
        raise click.BadParameter(f"{value!r} begins with {scheme}://; expected {', '.join(_SCHEMES)} or none")
    return f"{_SCHEMES[scheme.lower()]}://{rest}"


def _place(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | str | Path | None:
    """A `seq`, the word `live`, or the path of a cursor file."""
    if value is None or value == AFTER_LIVE:
        return value
    if not value.isdecimal():
        return Path(value)
    if int(value) > MAX_SEQ:
        raise click.BadParameter(f"{value} is no seq: expected at most {MAX_SEQ}")
    return int(value)


server_option = click.option(
    "--server", default=DEFAULT_SERVER, envvar="MOSS_LIVE_SERVER", show_default=True, callback=_server_url,
    help="Where it listens: host:port, or a URL.",
)  # fmt: skip
token_option = click.option(
    "--token", envvar="MOSS_LIVE_TOKEN", show_envvar=True, metavar="TOKEN",
    help="For a server that requires one; better in the variable, which no shell history keeps.",
)  # fmt: skip
name_option = click.option("--name", callback=_stream_name, help="The stream's name; by default a new one.")
name_argument = click.argument("name", callback=_stream_name)
language_option = click.option("--language", help="Such as en; by default the server's setting.")
captions_option = click.option("--captions", "with_captions", is_flag=True, help="Show the captions here.")
session_option = click.option(
    "--session", metavar="ID", help="One session alone, whole unless --after says otherwise; then end."
)
wait_option = click.option(
    "--wait", "wait_s", type=click.FloatRange(min=0), default=DEFAULT_WAIT_S, show_default=True,
    help="Seconds to wait for a stream that is not there yet.",
)  # fmt: skip


@group.command()
@click.argument("source", metavar="FILE_OR_URL")
@server_option
@token_option
@name_option
@language_option
@captions_option
@click.option("--fast", is_flag=True, help="As fast as the server accepts, not in real time.")
def stream(
    source: str,
    server: str,
    token: str | None,
    name: str | None,
    language: str | None,
    with_captions: bool,
    fast: bool,
) -> None:
    """Send a recording, a URL's audio or - (standard input), as if it were live."""
    with _missing_extra():
        from clients.sources import file_chunks

        _run(_produce(file_chunks(source), server, token, name, language, with_captions, paced=not fast))


@group.command()
@server_option
@token_option
@name_option
@language_option
@captions_option
@click.option("--device", help="An input's name or number; `python -m sounddevice` lists them.")
def mic(
    server: str,
    token: str | None,
    name: str | None,
    language: str | None,
    with_captions: bool,
    device: str | None,
) -> None:
    """Send the microphone until Ctrl-C."""
    with _missing_extra():
        _run(_produce_microphone(device, server, token, name, language, with_captions))


@group.command()
@click.argument("name", metavar="NAME_OR_PATTERN", callback=_streams)
@server_option
@token_option
@click.option("--types", help="Only these message types, by commas, such as transcript.final.")
@click.option("--after", callback=_place, metavar="SEQ|live|FILE",
              help="Begin after this seq of the log; 0 is all that is kept; live: with the session that is "
              "live. Or a cursor file, which keeps the place for the next run.")  # fmt: skip
@session_option
@click.option("--follow/--no-follow", default=True, show_default=True,
              help="Wait for the next session, or end when nothing is live.")  # fmt: skip
@wait_option
def subscribe(
    name: str,
    server: str,
    token: str | None,
    types: str | None,
    after: int | str | Path | None,
    session: str | None,
    follow: bool,
    wait_s: float,
) -> None:
    """Print a stream's messages, one line of JSON each; with a * in the name those of many streams."""
    wanted = tuple(part.strip() for part in types.split(",") if part.strip()) if types else ()
    for part in wanted:
        if part not in MESSAGE_TYPES:
            raise click.BadParameter(
                f"{part!r}: expected some of {', '.join(MESSAGE_TYPES)}", param_hint="--types"
            )
    with _missing_extra():
        from clients.cursor import CursorFile
        from clients.subscriber import subscribe as messages

        async def run() -> None:
            cursor = CursorFile(after, name) if isinstance(after, Path) else None
            position = _position(cursor, after, session)
            with _first_signal(signal.SIGTERM):
                async for envelope in messages(
                    server,
                    name,
                    types=wanted,
                    session=session,
                    follow=follow,
                    position=position,
                    wait_s=wait_s,
                    token=token,
                ):
                    # Nothing is awaited in between: a signal finds both done or neither.
                    click.echo(encode(envelope))
                    if cursor is not None:
                        cursor.save(position)

        _run(run())


@group.command()
@name_argument
@server_option
@token_option
@click.option("--after", type=click.IntRange(min=0),
              help="Begin after this seq of the log; 0 shows all that is kept. By default with the session "
              "that is live.")  # fmt: skip
@session_option
@wait_option
def captions(
    name: str, server: str, token: str | None, after: int | None, session: str | None, wait_s: float
) -> None:
    """Show a stream's captions, session after session: firm when committed, grey while they may change."""
    with _missing_extra():
        from rich.console import Console

        from clients.captions import WallPosition, captions_for
        from clients.subscriber import subscribe as messages

        def say_what_is_live(confirmed: Subscribed) -> None:
            if after is None and session is None and not confirmed.live:
                text = f"no session of {name} is live: waiting for the next; --after 0 shows what is kept"
                click.echo(text, err=True)

        async def run() -> None:
            heard = WallPosition()
            position = _position(None, "live" if after is None and session is None else after, session)
            with captions_for(Console(), heard) as shown:
                async for envelope in messages(
                    server,
                    name,
                    session=session,
                    position=position,
                    on_subscribed=say_what_is_live,
                    wait_s=wait_s,
                    token=token,
                ):
                    heard.see(envelope)
                    shown.show(envelope)

        _run(run())


async def _produce_microphone(
    device: str | None,
    server: str,
    token: str | None,
    name: str | None,
    language: str | None,
    with_captions: bool,
) -> None:
    from clients.sources import CHUNK_MS, microphone

    number_or_name = int(device) if device and device.isdecimal() else device
    async with microphone(number_or_name) as queue:
        click.echo("listening; Ctrl-C ends the stream", err=True)
        await _produce(aiter(queue), server, token, name, language, with_captions, paced=False)
        if queue.n_dropped:
            lost_s = queue.n_dropped * CHUNK_MS / 1000
            click.echo(f"{lost_s:.1f} s of audio were lost: the connection was too slow", err=True)


async def _produce(
    chunks: AsyncIterator[bytes],
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
        on_message: Callable[[Envelope], None] = _print_committed
        if with_captions:
            from rich.console import Console

            from clients.captions import captions_for

            on_message = stack.enter_context(captions_for(Console(), lambda: progress.sent_s)).show
        else:
            click.echo(f"stream {stream_name}; read it with: moss-live captions {stream_name}", err=True)
        stop = stack.enter_context(_first_interrupt())
        url = stream_url(server, stream_name, language)
        await stream_audio(url, chunks, on_message, paced=paced, progress=progress, stop=stop, token=token)


def _print_committed(envelope: Envelope) -> None:
    """The transcript and nothing else on stdout, for pipes."""
    if isinstance(envelope.message, TranscriptDelta):
        click.echo(envelope.message.text)


@contextlib.contextmanager
def _first_interrupt() -> Iterator[asyncio.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts as ever."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)
        click.echo("ending the stream; Ctrl-C again leaves at once", err=True)

    try:
        loop.add_signal_handler(signal.SIGINT, on_interrupt)
    except NotImplementedError:  # Windows: Ctrl-C leaves at once
        yield stop
        return
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _position(cursor: CursorFile | None, after: int | str | Path | None, session: str | None) -> Position:
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
def _first_signal(number: signal.Signals) -> Iterator[None]:
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
def _missing_extra() -> Iterator[None]:
    """Say what to install where a package that only some commands need is missing."""
    try:
        yield
    except ModuleNotFoundError as exc:
        raise click.ClickException(f"this needs {exc.name}: {how_to_install('clients')}") from exc


def _run(work: Coroutine[Any, Any, None]) -> None:
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
    except KeyboardInterrupt:
        raise SystemExit(130) from None
