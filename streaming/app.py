"""Builds the server and its engine, runs them, and stops them in good order."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from streaming.aio import race, until
from streaming.config import Config
from streaming.engine.client import ENGINE_COMMAND, EngineClient, engine_settings
from streaming.server.endpoints import Server

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
    engine = EngineClient(config.engine, engine_settings(config), engine_command)
    server = Server(config, engine)
    with _set_by_signals(stop):
        async with asyncio.TaskGroup() as group:
            supervisor = group.create_task(engine.run(), name="engine")
            async with server.listening() as port:
                if on_listening is not None:
                    on_listening(port)
                await race(until(stop), server.fault())
            supervisor.cancel()
    logger.info("stopped")


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
