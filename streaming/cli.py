"""The commands of the server: `moss-live serve` runs it, `moss-live token` makes a token for it."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import sys
from datetime import UTC, datetime
from pathlib import Path

import click

from streaming.app import run
from streaming.config import (
    CONFIG_ENV,
    DEFAULT_PATH,
    Config,
    ConfigError,
    config_path,
    find_config,
    with_overrides,
)
from streaming.errors import EngineLost, LogError
from streaming.logging_setup import configure
from streaming.server.auth import Scope, entry_text, new_token, parse_tokens

logger = logging.getLogger(__name__)

MAX_FILES = 65_536  # open at once; more are not asked for
PRIVATE = 0o600  # the tokens file is its owner's alone


@click.command()
@click.option(
    "--config", "path", type=click.Path(path_type=Path), help=f"Default: ${CONFIG_ENV}, ./config.toml."
)
@click.option("--host", help="Overrides server.host.")
@click.option("--port", type=int, help="Overrides server.port.")
@click.option("--model", help="Overrides model.name: embedded, a Hugging Face id, or a folder.")
@click.option("--log", "log_path", help="Overrides log.path.")
@click.option("--verbose", is_flag=True, help="Log every message.")
def serve(
    path: Path | None,
    host: str | None,
    port: int | None,
    model: str | None,
    log_path: str | None,
    *,
    verbose: bool,
) -> None:
    """Run the server until it is interrupted."""
    path = path or config_path()

    def read() -> Config:
        return _override(find_config(path), host, port, model, log_path, is_verbose=verbose)

    try:
        config = read()
    except ConfigError as exc:
        click.echo(str(exc), err=True)
        sys.exit(2)
    configure(config.server.log_format, config.server.log_level)
    if path is None:
        logger.info("no --config, $%s or ./%s: built-in settings", CONFIG_ENV, DEFAULT_PATH)
    else:
        logger.info("settings from %s", path)
    _raise_file_limit()
    try:
        asyncio.run(run(config, read_config=read))
    except* ConfigError as group:
        click.echo(str(group.exceptions[0]), err=True)
        sys.exit(2)
    except* EngineLost as group:
        click.echo(f"stopped: {group.exceptions[0]}", err=True)
        sys.exit(1)
    except* LogError as group:
        click.echo(f"stopped: {group.exceptions[0]}", err=True)
        sys.exit(1)
    except* OSError as group:
        click.echo(
            f"cannot serve on {config.server.host}:{config.server.port}: {group.exceptions[0]}", err=True
        )
        sys.exit(1)


@click.command()
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, required=True, type=click.Choice([s.value for s in Scope]),
              help="What it is good for; may come several times.")  # fmt: skip
@click.option("--stream", "streams", multiple=True, default=("*",), show_default=True,
              help="A stream's name, or a pattern with *; may come several times.")  # fmt: skip
@click.option("--expires", type=click.DateTime(["%Y-%m-%d"]), help="A day: at its begin, UTC, it ends.")
@click.option("--file", "path", type=click.Path(path_type=Path), help="Add it to this tokens file.")
def token(
    name: str, scopes: tuple[str, ...], streams: tuple[str, ...], expires: datetime | None, path: Path | None
) -> None:
    """Make a token, print it once, and add its hash to the tokens file under NAME."""
    made = new_token()
    expires = None if expires is None else expires.replace(tzinfo=UTC)
    try:
        entry = entry_text(made, name, [Scope(scope) for scope in scopes], streams, expires)
        if path is not None:
            _append(path, entry)
    except ConfigError as exc:
        raise click.ClickException(str(exc)) from exc
    except OSError as exc:
        raise click.ClickException(f"{path}: cannot be written: {exc}") from exc
    if path is None:
        click.echo(f"# for the tokens file that access.tokens names:\n{entry}", err=True)
    click.echo(made)


def _append(path: Path, entry: str) -> None:
    """Add an entry to a tokens file, which is made where it is missing.

    Raises:
        ConfigError: the file would not be one any more.
    """
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    parse_tokens(f"{before}\n{entry}", str(path))
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE), "a") as file:
        file.write(f"\n{entry}" if before else entry)


def _raise_file_limit() -> None:
    """As many open files as the system allows: every connection is one, half-open ones too."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if most == resource.RLIM_INFINITY else min(most, MAX_FILES)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _override(
    config: Config,
    host: str | None,
    port: int | None,
    model: str | None,
    log_path: str | None,
    *,
    is_verbose: bool,
) -> Config:
    level = "debug" if is_verbose else None
    options = (("host", host), ("port", port), ("log_level", level))
    server = {key: value for key, value in options if value is not None}
    name = {} if model is None else {"name": model}
    log = {} if log_path is None else {"path": log_path}
    return with_overrides(config, {"server": server, "model": name, "log": log})
