"""Long streams by GET: what is read of them, and where it is worked on."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from streaming.config import LogConfig
from streaming.log.history import LIVE_MS, LIVE_ROWS, History, transcript_of
from streaming.log.log import Log
from streaming.log.reader import READ_ROWS
from streaming.log.row import Row
from streaming.log.store import Store
from streaming.log.subtitles import webvtt
from streaming.protocol import (
    Envelope,
    Flushed,
    Message,
    SpeechStarted,
    TranscriptDelta,
    TranscriptFinal,
    Word,
    decode,
)
from tests.streaming.support import TIMEOUT_S


def talk(n_deltas: int, rng: random.Random, *, segment_words: int = 30) -> list[Message]:
    """Deltas of a few words, and segments that are closed a few words behind, as the timeline does."""
    said: list[Message] = []
    pending: list[Word] = []
    at = 0
    for i in range(n_deltas):
        words = []
        for j in range(rng.randint(1, 4)):
            start = at + rng.choice([0, 0, 200, 1_500])
            at = start + rng.choice([0, 80, 250, 400])
            words.append(Word(f"w{i}.{j}" + rng.choice(["", "", "."]), start, at, 0.9))
        said.append(TranscriptDelta("", tuple(words), words[0].start_ms, words[-1].end_ms))
        if rng.random() < 0.3:
            said.append(SpeechStarted(at))
        pending += words
        while len(pending) > segment_words:
            n = rng.randint(1, segment_words)
            closed, pending = tuple(pending[:n]), pending[n:]
            said.append(TranscriptFinal("", closed, "en", None, closed[0].start_ms, closed[-1].end_ms))
    return said


def last_minute(messages: Sequence[Message]) -> str:
    """The captions of all that was said, cut to the last minute."""
    transcript = transcript_of(messages)
    cues = transcript.cues(with_speakers=False)
    return webvtt(cue for cue in cues if cue.end_ms > transcript.end_ms - LIVE_MS)


@asynccontextmanager
async def logged(folder: Path, said: Sequence[Message]) -> AsyncIterator[tuple[Log, History]]:
    """A log with a live stream that said so much."""
    log = Log(LogConfig(path=str(folder / "log.sqlite")), lambda: 0)
    async with asyncio.timeout(TIMEOUT_S), log.running():
        log.open("a")
        for message in said:
            log.append("a", message)
        await log.settled()
        yield log, History(log)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many messages of a session each question found."""
    found: list[int] = []
    of_session = Store.of_session

    def noted(
        store: Store, stream: int, session: int, types: Sequence[str], limit: int, before_seq: int
    ) -> list[Row]:
        rows = of_session(store, stream, session, types, limit, before_seq)
        found.append(len(rows))
        return rows

    monkeypatch.setattr(Store, "of_session", noted)
    return found


async def test_live_captions_read_the_end_of_a_long_stream_once(tmp_path: Path, reads: list[int]) -> None:
    """However long it is; and again only when something was said."""
    said = talk(5_000, random.Random(1))
    async with logged(tmp_path, said) as (log, history):
        page = await history.answer("/v1/streams/a/live.vtt", "")
        assert page.body.decode() == last_minute(said)
        assert reads == [LIVE_ROWS]
        again = await asyncio.gather(*(history.answer("/v1/streams/a/live.vtt", "") for _ in range(5)))
        assert again == [page] * 5
        assert reads == [LIVE_ROWS]
        at = transcript_of(said).end_ms
        more = TranscriptDelta("new", (Word("new", at, at + 100, 0.9),), at, at + 100)
        log.append("a", more)
        await log.settled()
        page = await history.answer("/v1/streams/a/live.vtt", "")
        assert page.body.decode() == last_minute([*said, more])
        assert sum(reads) == 2 * LIVE_ROWS


@pytest.mark.parametrize("seed", range(12))
async def test_live_captions_are_the_end_of_the_whole_transcript(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the part that is read begins: in a segment, or between its words and its final."""
    monkeypatch.setattr("streaming.log.history.LIVE_ROWS", 7)
    monkeypatch.setattr("streaming.log.history.MAX_LIVE_ROWS", 10_000)
    rng = random.Random(seed)
    said = talk(rng.randint(0, 150), rng, segment_words=rng.choice([3, 10, 40]))
    async with logged(tmp_path, said) as (log, history):
        for i in range(3):
            page = await history.answer("/v1/streams/a/live.vtt", "")
            assert page.body.decode() == last_minute(said)
            log.append("a", Flushed(str(i), 0))
            await log.settled()


async def test_a_whole_transcript_is_read_in_parts_and_made_elsewhere(
    tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other readers' questions come in between, and the event loop decodes nothing."""
    threads: set[str] = set()

    def noted(frame: bytes) -> Envelope:
        threads.add(threading.current_thread().name.partition("_")[0])
        return decode(frame)

    monkeypatch.setattr("streaming.log.history.decode", noted)
    said = talk(1_500, random.Random(2))
    n_spoken = sum(not isinstance(message, SpeechStarted) for message in said)
    async with logged(tmp_path, said) as (_, history):
        page = await history.answer("/v1/streams/a/transcript.vtt", "")
    assert page.body.decode() == webvtt(transcript_of(said).cues(with_speakers=False))
    assert sum(reads) == n_spoken
    assert max(reads) == READ_ROWS
    assert threads == {"log-work"}
