"""Builds the server and its engine, runs them, and stops them in good order."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from streaming import adaptors
from streaming.aio import race, until
from streaming.config import Config
from streaming.engine.client import ENGINE_COMMAND, EngineClient, engine_settings
from streaming.log.hub import Hub
from streaming.log.log import Log
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


async def run(
    config: Config,
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
    on_listening: Callable[[int], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then finalise every stream, close, and end the engine.

    `on_listening` is called with the port once connections are taken.

    Raises:
        ConfigError: a file that the configuration names cannot be used.
        ExceptionGroup: of the `EngineLost` or `LogError` that ended it.
    """
    stop = asyncio.Event()
    engine, server = build(config, engine_command)
    with _set_by_signals(stop):
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


@contextmanager
def _set_by_signals(stop: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
