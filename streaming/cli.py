"""The `moss-live serve` command: finds the configuration, sets up logging, runs the server."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path

import click

from streaming.app import run
from streaming.config import CONFIG_ENV, Config, ConfigError, load_config, with_overrides
from streaming.errors import EngineLost, LogError

logger = logging.getLogger(__name__)

DEFAULT_PATH = Path("config.toml")
LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


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
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, format=LOG_FORMAT)
    logging.getLogger("websockets").setLevel(logging.WARNING)  # else three lines per connection
    try:
        config = _override(_find_config(path), host, port, model, log_path)
    except ConfigError as exc:
        click.echo(str(exc), err=True)
        sys.exit(2)
    try:
        asyncio.run(run(config))
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


def _find_config(path: Path | None) -> Config:
    """The configuration that the command line, the environment or the folder names.

    Raises:
        ConfigError: the file cannot be used.
    """
    named = path or (Path(os.environ[CONFIG_ENV]) if os.environ.get(CONFIG_ENV) else None)
    if named is None and DEFAULT_PATH.exists():
        named = DEFAULT_PATH
    if named is None:
        logger.info("no --config, $%s or ./%s: built-in settings", CONFIG_ENV, DEFAULT_PATH)
        return Config()
    logger.info("settings from %s", named)
    return load_config(named)


def _override(
    config: Config, host: str | None, port: int | None, model: str | None, log_path: str | None
) -> Config:
    server = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    name = {} if model is None else {"name": model}
    log = {} if log_path is None else {"path": log_path}
    return with_overrides(config, {"server": server, "model": name, "log": log})
