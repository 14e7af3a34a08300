"""A live source that dies and comes back: its audio, and the gaps for the time without it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from clients.connection import Backoff
from clients.reconnect import reconnecting
from clients.sources import Chunk, SourceError, bytes_of_ms
from streaming.protocol import Gap

SECOND = bytes(bytes_of_ms(1000))
FAST = Backoff(first_s=0.001, longest_s=0.002)


class Clock:
    """Seconds that pass when something is read or waited for."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        """Now."""
        return self.now_s


def source(clock: Clock, lives: Sequence[tuple[float, int]]) -> Callable[[], AsyncIterator[Chunk]]:
    """A source of some lives: seconds until it gives audio, or fails to, and how many seconds it gives."""
    left = list(lives)

    async def read() -> AsyncIterator[Chunk]:
        opening_s, n_chunks = left.pop(0)
        clock.now_s += opening_s
        for _ in range(n_chunks):
            clock.now_s += 1.0
            yield SECOND
        raise SourceError("the camera is gone")

    return read


async def everything(chunks: AsyncIterator[Chunk]) -> tuple[list[Chunk], str]:
    """What comes until the source is given up, and why it was."""
    found: list[Chunk] = []
    try:
        async for chunk in chunks:
            found.append(chunk)
    except SourceError as exc:
        return found, str(exc)
    raise AssertionError("it was not given up")


async def test_the_time_without_audio_is_a_gap() -> None:
    """Through failed attempts; wall time and stream time agree behind it."""
    clock = Clock()
    chunks = reconnecting(
        source(clock, [(0.0, 2), (3.0, 0), (4.0, 2), (4000.0, 0)]),
        is_live=lambda: True,
        pace=FAST,
        now_s=clock,
    )
    found, why = await everything(chunks)
    audio = [chunk for chunk in found if not isinstance(chunk, Gap)]
    gap_ms = sum(chunk.duration_ms for chunk in found[:-1] if isinstance(chunk, Gap))
    assert len(audio) == 4
    assert gap_ms == pytest.approx(7000, abs=20)
    assert why == "the camera is gone"


async def test_a_source_that_never_gave_audio_is_not_opened_again() -> None:
    """A mistyped address fails at once."""
    clock = Clock()
    lives = [(0.0, 0), (0.0, 5)]
    found, why = await everything(
        reconnecting(source(clock, lives), is_live=lambda: True, pace=FAST, now_s=clock)
    )
    assert (found, why) == ([], "the camera is gone")


async def test_a_recording_is_not_opened_again() -> None:
    """What fails in mid-file would begin anew."""
    clock = Clock()
    found, _ = await everything(
        reconnecting(source(clock, [(0.0, 3), (0.0, 3)]), is_live=lambda: False, pace=FAST, now_s=clock)
    )
    assert found == [SECOND] * 3


async def test_a_source_that_ends_by_itself_ends() -> None:
    """Without a failure there is nothing to open again."""

    async def read() -> AsyncIterator[Chunk]:
        yield SECOND

    found = [chunk async for chunk in reconnecting(read, is_live=lambda: True, pace=FAST)]
    assert found == [SECOND]


async def test_a_long_outage_is_told_while_it_lasts() -> None:
    """In pieces, so that the stream on the server stays alive."""
    lives = iter([[SECOND], [SECOND]])

    async def read() -> AsyncIterator[Chunk]:
        chunks = next(lives)
        if chunks is not None and len(found) > 0:
            await asyncio.sleep(0.3)
        for chunk in chunks:
            yield chunk
        if len(found) > 2:
            return
        raise SourceError("the camera is gone")

    found: list[Chunk] = []
    async with asyncio.timeout(20):
        async for chunk in reconnecting(read, is_live=lambda: True, pace=FAST, piece_s=0.05):
            found.append(chunk)
    gaps = [chunk for chunk in found if isinstance(chunk, Gap)]
    assert len(gaps) >= 3
    assert found[0] == found[-1] == SECOND
