"""Time stamps of a container against its audio: which are holes, and which are not believed."""

from __future__ import annotations

import pytest

from streaming.protocol.timestamps import MAX_HOLE_S, MediaClock


def holes(*starts_s: float | None, is_live: bool = False) -> list[int]:
    """What is missing before each of some frames of half a second, in milliseconds."""
    clock = MediaClock(is_live=is_live)
    return [clock.hole_before(start_s, 0.5) for start_s in starts_s]


@pytest.mark.parametrize(
    ("starts_s", "expected"),
    [
        ((0.0, 0.5, 1.0), [0, 0, 0]),
        ((5.0, 5.5), [5000, 0]),  # the track begins late
        ((-0.1, 0.4, 0.9), [0, 0, 0]),  # what a codec needs before zero
        ((0.0, 0.55, 1.05), [0, 0, 0]),  # rounded
        ((0.0, 3.5, 4.0), [0, 3000, 0]),  # a hole in the middle
        ((0.0, None, 1.0), [0, 0, 0]),  # a frame without a time stamp follows on
        ((0.0, 0.3, 0.8), [0, 0, 0]),  # a little back: the audio is ahead of its time stamps
        ((0.0, 36_000.0, 36_000.5, 36_003.0), [0, 0, 0, 2000]),  # ten hours: another time line
        ((100.0, 100.5, 3.0, 3.5, 6.0), [100_000, 0, 0, 0, 2000]),  # and one that begins anew
        ((0.0, 0.5 + MAX_HOLE_S), [0, 3_600_000]),  # as long as is believed
    ],
)
def test_holes(starts_s: tuple[float | None, ...], expected: list[int]) -> None:
    """Zero is the container's; what cannot be is not silence."""
    assert holes(*starts_s) == expected


def test_the_first_time_stamp_of_a_live_source_is_zero() -> None:
    """It may have run for days."""
    assert holes(90_000.0, 90_000.5, 90_003.0, is_live=True) == [0, 0, 2000]


def test_a_format_without_a_zero_begins_with_its_first_track() -> None:
    """A broadcast that has been on for 40 minutes, whose sound begins a second behind its picture."""
    clock = MediaClock(zero_s=2400.0)
    assert [clock.hole_before(start_s, 1.0) for start_s in (2401.0, 2402.0, 2405.0)] == [1000, 0, 2000]
