"""The commands of `moss-live`.

Further ones, such as `serve`, come from the entry points `moss_live.commands`, so that an
install of the clients alone needs neither torch nor the server's code. What a command needs is
imported when it runs.
"""

from __future__ import annotations

import contextlib
import signal
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import click

from clients.extras import how_to_install
from clients.run import (
    file_or_url,
    first_position,
    first_signal,
    microphone_of,
    missing_extra,
    produce,
    run_client,
)
from streaming.protocol import (
    AFTER_LIVE,
    DEFAULT_PORT,
    MAX_SEQ,
    MESSAGE_TYPES,
    STREAM_NAME,
    STREAM_PATTERN,
    Subscribed,
    encode,
)

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
reconnect_option = click.option(
    "--reconnect", is_flag=True, help="Open a live source again when it fails, and tell the gap."
)
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
@click.option("--track", metavar="NUMBER|LANGUAGE|TITLE",
              help="The sound track of a file that has several; by default the one with speech.")  # fmt: skip
@reconnect_option
def stream(
    source: str,
    server: str,
    token: str | None,
    name: str | None,
    language: str | None,
    with_captions: bool,
    fast: bool,
    track: str | None,
    reconnect: bool,
) -> None:
    """Send a recording, a URL's audio or - (standard input), as if it were live.

    Time stamps count: where a file has no sound for a while, captions behind it keep their times. A live
    URL that ends or fails ends the command with status 1, unless --reconnect is given.
    """
    with missing_extra():
        chunks = file_or_url(source, track, reconnect=reconnect)
        run_client(produce(chunks, server, token, name, language, with_captions, paced=not fast))


@group.command()
@server_option
@token_option
@name_option
@language_option
@captions_option
@click.option("--device", help="An input's name or number; `python -m sounddevice` lists them.")
@reconnect_option
def mic(
    server: str,
    token: str | None,
    name: str | None,
    language: str | None,
    with_captions: bool,
    device: str | None,
    reconnect: bool,
) -> None:
    """Send the microphone until Ctrl-C."""
    with missing_extra():
        chunks = microphone_of(device, reconnect=reconnect)
        run_client(produce(chunks, server, token, name, language, with_captions, paced=False))


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
    with missing_extra():
        from clients.cursor import CursorFile
        from clients.subscriber import subscribe as messages

        async def run() -> None:
            cursor = CursorFile(after, name) if isinstance(after, Path) else None
            position = first_position(cursor, after, session)
            found = messages(
                server,
                name,
                types=wanted,
                session=session,
                follow=follow,
                position=position,
                wait_s=wait_s,
                token=token,
            )
            with first_signal(signal.SIGTERM):
                async with contextlib.aclosing(found):
                    async for envelope in found:
                        # Nothing is awaited in between: a signal finds both done or neither.
                        click.echo(encode(envelope))
                        if cursor is not None:
                            cursor.save(position)

        run_client(run())


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
    with missing_extra():
        from rich.console import Console

        from clients.captions import WallPosition, captions_for
        from clients.subscriber import subscribe as messages

        def say_what_is_live(confirmed: Subscribed) -> None:
            if after is None and session is None and not confirmed.live:
                text = f"no session of {name} is live: waiting for the next; --after 0 shows what is kept"
                click.echo(text, err=True)

        async def run() -> None:
            heard = WallPosition()
            position = first_position(None, "live" if after is None and session is None else after, session)
            found = messages(
                server,
                name,
                session=session,
                position=position,
                on_subscribed=say_what_is_live,
                wait_s=wait_s,
                token=token,
            )
            with captions_for(Console(), heard) as shown:
                async with contextlib.aclosing(found):
                    async for envelope in found:
                        heard.see(envelope)
                        shown.show(envelope)

        run_client(run())
