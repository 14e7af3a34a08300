"""The streams that a dead server left: resumed one by one, or closed with what was committed.

Knows the log and the engine's state, not how a stream is made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from streaming.engine.client import EngineClient, EngineState
from streaming.errors import LogError
from streaming.log.log import Log
from streaming.log.reader import Left
from streaming.log.row import Row
from streaming.logging_setup import where_raised
from streaming.protocol import (
    Message,
    ProtocolError,
    SessionClosed,
    TranscriptDelta,
    TranscriptFinal,
    decode,
)

logger = logging.getLogger(__name__)

MAX_COUNTED = 100_000  # messages of a stream that cannot resume, whose words are counted


class Recovery:
    """Brings a dead server's streams back, once. Belongs to the event loop."""

    def __init__(
        self,
        engine: EngineClient,
        log: Log,
        *,
        resume: Callable[[Left], None],
        publish: Callable[[str, Message], None],
        release: Callable[[str], None],
    ) -> None:
        """Nothing is recovered before `begin`.

        Args:
            engine: Streams resume when it is ready.
            log: Of all streams.
            resume: Makes a stream live again, or raises `LogError` or `MsgspecError`.
            publish: Logs a message of a stream.
            release: Called with the name of a stream that is left to the next server.
        """
        self._engine = engine
        self._log = log
        self._resume = resume
        self._publish = publish
        self._release = release
        self._left: dict[str, None] = {}  # names of streams that are not back yet

    def begin(self) -> tuple[str, ...]:
        """The names of the streams that `run` will resume or close."""
        names = self._log.directory.left()
        self._left = dict.fromkeys(names)
        return names

    def stop(self) -> None:
        """The server stops: the next one finds the rest."""
        for name in self._left:
            self._release(name)
        self._left.clear()

    async def run(self) -> None:
        """Resume each stream, or close it, when the engine is ready. None where it is lost or stopped."""
        await self._engine.until(EngineState.READY, EngineState.LOST, EngineState.STOPPED)
        while self._left and self._engine.ready is not None:
            name = next(iter(self._left))
            try:
                left = await self._log.reader.read_left(name)
                if name not in self._left:
                    return  # the server stops
                self._resume(left)
            except (LogError, msgspec.MsgspecError) as exc:
                logger.warning("stream %s: cannot resume: %s", name, exc)
                await self._close(name)
            except Exception as exc:
                # An internal error costs this stream and no other. Its text may hold what a client sent.
                logger.error("stream %s: cannot resume: %s", name, where_raised(exc))  # noqa: TRY400
                logger.debug("the error's text", exc_info=True)
                await self._close(name)
            self._left.pop(name, None)

    async def _close(self, name: str) -> None:
        """Close a stream that cannot resume, with what was committed; with nothing if that is unreadable."""
        row = self._log.directory.row(name)
        assert row is not None
        if row.closed_ms is not None:
            return  # its session was there already, and closed it
        types = (TranscriptDelta.type, TranscriptFinal.type)
        try:
            rows = await self._log.reader.of_session(row, types, MAX_COUNTED)
            closed = await self._log.reader.apart(lambda: _server_lost(rows))
        except (LogError, ProtocolError) as exc:
            logger.warning("stream %s: its words are not counted: %s", name, exc)
            closed = _server_lost([])
        if name not in self._left:
            return  # the server stops, and has let go of it
        if not row.is_live:
            self._log.reopen(name, None)
        self._publish(name, closed)


def _server_lost(rows: list[Row]) -> SessionClosed:
    """The end of a stream that cannot resume, after its committed words and closed segments.

    Raises:
        ProtocolError: a message cannot be read.
    """
    said = [decode(row.frame).message for row in rows]
    deltas = [message for message in said if isinstance(message, TranscriptDelta)]
    n_words = sum(len(delta.words) for delta in deltas)
    end_ms = max((delta.end_ms for delta in deltas), default=0)
    return SessionClosed("server_lost", end_ms, n_words, len(said) - len(deltas))
