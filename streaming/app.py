"""Builds the server and its engine, runs them, and stops them in good order."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from streaming import adaptors
from streaming.aio import race, until
from streaming.config import Config, ConfigError
from streaming.engine.client import ENGINE_COMMAND, EngineClient, engine_settings
from streaming.log.hub import Hub
from streaming.log.log import Log
from streaming.logging_setup import set_level
from streaming.metrics import Metrics
from streaming.server import native
from streaming.server.admission import Guard
from streaming.server.endpoints import Server
from streaming.server.pages import Pages
from streaming.server.producers import Producers, ProducerSettings
from streaming.server.routes import PageRoute, SocketRoute
from streaming.server.subscriber import Subscribers
from streaming.server.tls import tls_context
from streaming.stream.registry import Streams, StreamSettings

logger = logging.getLogger(__name__)

_STDERR = 2


async def run(
    config: Config,
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
    on_listening: Callable[[int], None] | None = None,
    read_config: Callable[[], Config] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then finalise every stream, close, and end the engine.

    SIGHUP reads tokens, certificate and log level again; no stream notices. Where it says that the
    terminal of the server is gone, it stops the server.

    Args:
        config: Every setting.
        engine_command: Starts the engine process.
        on_listening: Called with the port once connections are taken.
        read_config: Reads the configuration again, for SIGHUP; None: it cannot have changed.

    Raises:
        ConfigError: a file that the configuration names cannot be used.
        ExceptionGroup: of the `EngineLost` or `LogError` that ended it.
    """
    stop = asyncio.Event()
    engine, server = build(config, engine_command)
    was_at_terminal = os.isatty(_STDERR)

    def on_hangup() -> None:
        if was_at_terminal and not os.isatty(_STDERR):
            stop.set()  # its window was closed: nobody would find it again
        else:
            _reload(server, config, read_config or (lambda: config))

    with _on_signals({signal.SIGTERM: stop.set, signal.SIGINT: stop.set, signal.SIGHUP: on_hangup}):
        async with asyncio.TaskGroup() as group:
            supervisor = group.create_task(engine.run(), name="engine")
            async with server.listening() as port:
                if on_listening is not None:
                    on_listening(port)
                await race(until(stop), server.fault())
            supervisor.cancel()
    logger.info("stopped")


def build(config: Config, engine_command: Sequence[str] = ENGINE_COMMAND) -> tuple[EngineClient, Server]:
    """A server and its engine, of which nothing runs yet. Every part gets its own sections.

    Raises:
        ConfigError: a file that the configuration names cannot be used.
    """
    folder = Path(config.log.path).absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"log.path: {folder}: no such folder; make it, or name a file in one that exists")
    # 1. What everything else speaks to. The streams come later, and are asked for later.
    metrics = Metrics(config.engine.tick_ms)
    engine = EngineClient(config.engine, engine_settings(config), engine_command, metrics)
    log = Log(
        config.log,
        _unix_ms,
        on_closed=lambda name: producers.release(name),
        on_unsaved=lambda name: streams.fail(name),
    )
    hub = Hub(log, config.server.subscriber_queue)
    guard = Guard(config.server, config.access, config.limits, metrics, now_s=time.monotonic)
    tls = tls_context(config.server.tls_cert, config.server.tls_key)
    # 2. Streams, and who sends and reads them.
    streams = Streams(
        StreamSettings(config.server, config.ingest, config.vad, timeline=config),
        engine,
        log,
        metrics,
        clock_ms=_unix_ms,
        release=lambda name: producers.release(name),
    )
    settings = ProducerSettings(
        config.server,
        config.limits,
        config.ingest,
        config.vad,
        config.model,
        spool_folder=Path(config.log.path).parent,
    )
    producers = Producers(settings, engine, log, hub, streams, guard)
    subscribers = Subscribers(config.server, log, hub, guard, producers.finalised)
    pages = Pages(engine, log, hub, guard, producers, metrics)
    # 3. The paths: each part declares its own.
    routes: tuple[PageRoute | SocketRoute, ...] = (
        *pages.routes(),
        *subscribers.routes(),
        *producers.routes((native.ROUTE, *adaptors.routes())),
    )
    server = Server(
        config.server,
        routes,
        guard=guard,
        producers=producers,
        streams=streams,
        log=log,
        tls=tls,
        handshake_timeout_s=config.limits.handshake_timeout_s,
    )
    return engine, server


def _unix_ms() -> int:
    return time.time_ns() // 1_000_000


def _reload(server: Server, started: Config, read_config: Callable[[], Config]) -> None:
    """Take what can change while streams are live; say what cannot, and what is wrong."""
    try:
        config = read_config()
    except ConfigError as exc:
        logger.error("reload: nothing changes: %s", exc)  # noqa: TRY400  the file is wrong, not the server
        return
    set_level(config.server.log_level)
    try:
        server.reload(config.server)
    except* ConfigError as group:
        for problem in group.exceptions:
            logger.error("reload: what it was stays: %s", problem)  # noqa: TRY400  the same
    if fixed := _changed_for_the_next_start(started, config):
        logger.warning("reload: takes effect at the next start: %s", ", ".join(fixed))
    logger.info("reloaded; log level %s", config.server.log_level)


def _changed_for_the_next_start(started: Config, config: Config) -> list[str]:
    """The settings that changed and that a running server does not change."""
    reloaded = {"server.log_level"}
    if started.server.tls_cert and config.server.tls_cert:
        reloaded |= {"server.tls_cert", "server.tls_key"}
    before, now = started.model_dump(), config.model_dump()
    names = (f"{section}.{key}" for section in before for key in before[section])
    changed = [name for name in names if _value(before, name) != _value(now, name)]
    return [name for name in changed if name not in reloaded]


def _value(sections: dict[str, dict[str, object]], name: str) -> object:
    section, _, key = name.partition(".")
    return sections[section][key]


@contextmanager
def _on_signals(handlers: Mapping[signal.Signals, Callable[[], object]]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)
