"""A live source that is opened again when it dies; the time without it is told as a gap.

While it is away the gap is told in pieces, so that the stream on the server stays alive and readers
see that time passes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from clients.connection import Backoff
from clients.sources import Chunk, SourceError, duration_ms_of
from streaming.protocol import Gap

logger = logging.getLogger(__name__)

PIECE_S = 5.0  # of a gap that is told while it lasts; the server ends a stream that is silent for a minute
MAX_OUTAGE_S = 3600.0  # without any audio; then the source is given up
PACE = Backoff(first_s=0.5, longest_s=30.0)  # between attempts to open it


class _Clock:
    """How much time has passed since the newest audio that was not told yet."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._told_s = self._heard_s = now_s()

    def heard(self) -> None:
        """Audio came, up to now."""
        self._told_s = self._heard_s = self._now_s()

    @property
    def outage_s(self) -> float:
        """Since audio came."""
        return self._now_s() - self._heard_s

    def gap(self, less_ms: int = 0) -> Gap | None:
        """What passed since the audio and the gaps so far, less the audio that came just now."""
        passed_ms = int((self._now_s() - self._told_s) * 1000) - less_ms
        if passed_ms <= 0:  # a clock that was set back, too
            return None
        self._told_s += passed_ms / 1000
        return Gap(passed_ms)


async def reconnecting(
    open_source: Callable[[], AsyncIterator[Chunk]],
    *,
    is_live: Callable[[], bool],
    pace: Backoff = PACE,
    piece_s: float = PIECE_S,
    max_outage_s: float = MAX_OUTAGE_S,
    now_s: Callable[[], float] = time.time,
) -> AsyncIterator[Chunk]:
    """The audio of a source over all its connections, with gaps for the time between them.

    Args:
        open_source: Begins to read it.
        is_live: Whether it is worth opening again; asked after a failure.
        pace: Of the attempts; they go on for `max_outage_s`, however many there are.
        piece_s: Of a gap, that are told at once while it lasts.
        max_outage_s: Seconds without audio after which the source is given up.
        now_s: Wall-clock time, which goes on while a laptop sleeps.

    Raises:
        SourceError: it gave no audio at all, is not live, or was away for too long.
    """
    clock: _Clock | None = None  # None: no audio came yet
    n_failed = 0
    while True:
        chunks = open_source()
        try:
            while True:
                async for gap in _while_waiting(reading := _read(chunks), clock, n_failed, piece_s):
                    yield gap
                chunk = await reading
                if chunk is None:
                    return  # a source that has an end
                if n_failed and clock is not None and (late := clock.gap(duration_ms_of(chunk))) is not None:
                    logger.warning("the source is back after %.1f s", clock.outage_s)
                    yield late
                n_failed = 0
                clock = clock or _Clock(now_s)
                clock.heard()
                yield chunk
        except SourceError as exc:
            if clock is None or not is_live() or clock.outage_s > max_outage_s:
                raise
            n_failed += 1
            delay_s = pace.delay_s(n_failed)
            logger.warning("%s; opening it again in %.1f s", exc, delay_s)
            async for gap in _while_waiting(
                asyncio.ensure_future(asyncio.sleep(delay_s)), clock, n_failed, piece_s
            ):
                yield gap


def _read(chunks: AsyncIterator[Chunk]) -> asyncio.Future[Chunk | None]:
    async def read() -> Chunk | None:
        return await anext(chunks, None)

    return asyncio.ensure_future(read())


async def _while_waiting(
    work: asyncio.Future[Chunk | None] | asyncio.Future[None],
    clock: _Clock | None,
    n_failed: int,
    piece_s: float,
) -> AsyncIterator[Gap]:
    """The gap so far, in pieces, until the work is done; nothing while the source is not known to be away."""
    try:
        while not work.done():
            is_away = n_failed > 0 and clock is not None
            await asyncio.wait({work}, timeout=piece_s if is_away else None)
            if is_away and not work.done() and clock is not None and (gap := clock.gap()) is not None:
                yield gap
    finally:
        if not work.done():
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work
