"""Gaps on the sample clock: silence for a while, then a jump; cut and saved anywhere, the same."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.protocol import AudioGap, Flushed, SessionClosed, SpeechStarted, TranscriptDelta, Word
from streaming.stream.clock import AFTER_JUMP_MS, MAX_JUMPS, MAX_SILENCE_MS, ClockState, StreamClock

HOUR_MS = 3600 * 1000
MS = 16  # samples


def new_clock(state: ClockState | None = None) -> StreamClock:
    """Whose wall time does not matter."""
    return StreamClock(lambda: 0, state)


def tell(clock: StreamClock, n_samples: int, *pieces_ms: int) -> int:
    """A gap in pieces, as a session takes it; the samples that the engine then has."""
    for piece_ms in pieces_ms:
        n_samples += clock.silence_of(piece_ms)
        clock.gap(piece_ms, n_samples)
    return n_samples


def test_a_short_gap_is_silence_and_nothing_else() -> None:
    """Times are as they would be if the silence had been sent."""
    clock = new_clock()
    assert tell(clock, 5000 * MS, 8000) == 13_000 * MS
    assert [clock.stream_ms(ms) for ms in (0, 5000, 13_000, 20_000)] == [0, 5000, 13_000, 20_000]
    assert clock.end_gap() == AudioGap(5000, 13_000)
    assert clock.end_gap() is None


def test_of_a_long_gap_the_engine_gets_ten_seconds() -> None:
    """What comes after it is later by the rest; speech a little before the gap's end, too."""
    clock = new_clock()
    n_samples = tell(clock, 5000 * MS, HOUR_MS)
    assert n_samples == (5000 + MAX_SILENCE_MS) * MS
    assert clock.stream_ms(5000) == 5000
    assert clock.stream_ms(15_000) == 5000 + HOUR_MS
    assert clock.stream_ms(15_000 - AFTER_JUMP_MS) == 5000 + HOUR_MS - AFTER_JUMP_MS
    assert clock.end_gap() == AudioGap(5000, 5000 + HOUR_MS)


def test_a_gap_too_short_to_be_told_still_counts() -> None:
    """A producer that says so every few milliseconds fills no log."""
    clock = new_clock()
    assert tell(clock, 0, 999) == 999 * MS
    assert clock.end_gap() is None


def test_times_in_every_message_move() -> None:
    """Those of words, too; without a jump a message is not even copied."""
    clock = new_clock()
    word = Word("Hello", 16_000, 16_500, 0.9)
    delta = TranscriptDelta("Hello", (word,), 16_000, 16_500)
    assert clock.placed(delta) is delta
    tell(clock, 5000 * MS, HOUR_MS)
    by_ms = HOUR_MS - MAX_SILENCE_MS
    moved = Word("Hello", 16_000 + by_ms, 16_500 + by_ms, 0.9)
    assert clock.placed(delta) == TranscriptDelta("Hello", (moved,), moved.start_ms, moved.end_ms)
    assert clock.placed(SpeechStarted(4000)) == SpeechStarted(4000)
    assert clock.placed(Flushed("a", 15_000)) == Flushed("a", 15_000 + by_ms)
    assert clock.placed(SessionClosed("closed", 15_000, 1, 1)).duration_ms == 15_000 + by_ms


gaps = st.lists(
    st.tuples(st.integers(0, 60_000), st.lists(st.integers(1, 30_000), min_size=1, max_size=5)), max_size=8
)


@given(gaps)
def test_how_a_gap_is_cut_and_where_it_is_saved_changes_nothing(
    told: Sequence[tuple[int, Sequence[int]]],
) -> None:
    """In one piece or in several, by one server or several: the same silence, the same times."""
    whole, cut = new_clock(), new_clock()
    n_whole = n_cut = 0
    for audio_ms, pieces in told:
        for clock in (whole, cut):
            if audio_ms:
                clock.end_gap()
        n_whole, n_cut = n_whole + audio_ms * MS, n_cut + audio_ms * MS
        n_whole = tell(whole, n_whole, sum(pieces))
        for piece_ms in pieces:
            n_cut = tell(cut, n_cut, piece_ms)
            saved = msgspec.msgpack.encode(cut.snapshot())
            cut = new_clock(msgspec.msgpack.decode(saved, type=ClockState))
    assert n_whole == n_cut
    assert whole.snapshot() == cut.snapshot()
    total_ms = sum(audio_ms + sum(pieces) for audio_ms, pieces in told)
    assert whole.stream_ms(n_whole // MS) == n_whole // MS + whole.jumped_ms == total_ms
    placed = [whole.stream_ms(ms) for ms in range(0, n_whole // MS, 997)]
    assert placed == sorted(placed)


def test_jumps_are_bounded() -> None:
    """The oldest are one; times near the newest stay exact."""
    clock = new_clock()
    n_samples = 0
    for _ in range(3 * MAX_JUMPS):
        clock.end_gap()
        n_samples = tell(clock, n_samples + 1000 * MS, HOUR_MS)
    assert len(clock.snapshot().jumps) == MAX_JUMPS
    end_ms = n_samples // MS
    assert clock.stream_ms(end_ms) == 3 * MAX_JUMPS * (HOUR_MS + 1000)
    assert clock.stream_ms(end_ms - MAX_SILENCE_MS) == clock.stream_ms(end_ms) - HOUR_MS


@pytest.mark.parametrize("piece_ms", [1, 5000, HOUR_MS])
def test_a_gap_that_goes_on_for_hours_costs_ten_seconds(piece_ms: int) -> None:
    """However many pieces it is told in."""
    clock = new_clock()
    assert tell(clock, 0, *(piece_ms for _ in range(20_000))) == min(MAX_SILENCE_MS, 20_000 * piece_ms) * MS
    assert len(clock.snapshot().jumps) <= 2
