"""A stream of a day: flat memory, markers of every length, positions that never run out."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import pytest
import torch
from torch import Tensor

from model.moss.geometry import MarkerMode, WindowSettings
from model.moss.window import RollingCache
from tests.model.moss.tiny import LAYOUT, make_model, random_audio

MODEL = make_model(n_layers=1)


def logits_of(cache: RollingCache, slot_idx: int) -> Tensor:
    """Logits at the end of a question, [V]."""
    logits = cache.extend([cache.reserve(slot_idx)], [LAYOUT.question("What?")])[0]
    cache.release([slot_idx])
    return logits


def marker_digits(ids: Sequence[int]) -> list[int]:
    """The numbers in the markers of a sequence."""
    numbers: list[int] = []
    text = ""
    for idx in (*ids, LAYOUT.special.audio_end):
        if idx in LAYOUT.special.digits:
            text += str(LAYOUT.special.digits.index(idx))
        elif text:
            numbers.append(int(text))
            text = ""
    return numbers


def check_markers(cache: RollingCache, slot_idx: int) -> None:
    """The markers of a slot, with their offset, are the seconds of its blocks."""
    offset = cache.marker_offset_s(slot_idx)
    expected = [s for b in cache.blocks(slot_idx) for s in (4 * b + 2, 4 * b + 4)]
    assert [offset + s for s in marker_digits(cache.ids(slot_idx)[len(LAYOUT.prefix) :])] == expected
    if cache.settings.markers == "restart":
        assert cache.blocks(slot_idx).start * 4 == offset  # they begin at 2
    else:
        assert offset == 0


@pytest.mark.slow
@pytest.mark.parametrize("markers", ["absolute", "restart"])
def test_a_day_in_shifts(markers: MarkerMode) -> None:
    """Twenty-four streams, each resumed at another hour of the day, end that hour's last minutes.

    Among them the markers go through every number of digits, and from 59:59 to the next hour.
    """
    shifts, n_blocks = 24, 120
    cache = RollingCache(
        MODEL, LAYOUT, WindowSettings(n_blocks=2, scratch_tokens=64, markers=markers), shifts
    )
    audio = [random_audio(MODEL, s) for s in range(shifts)]
    for slot_idx in range(shifts):
        cache.reset([slot_idx], first_block=900 * (slot_idx + 1) - n_blocks)
    n_bytes = cache.n_bytes
    rss = 0
    for block in range(n_blocks):
        cache.append(dict(enumerate(audio)))
        if block == 40:
            rss = psutil.Process().memory_info().rss
        if block % 10 == 0:
            for slot_idx in range(shifts):
                check_markers(cache, slot_idx)
    for slot_idx in range(shifts):
        check_markers(cache, slot_idx)
        assert cache.end_position(slot_idx) < cache.settings.max_position
    if markers == "absolute":
        assert marker_digits(cache.ids(shifts - 1))[-1] == 86_400
    assert cache.n_bytes == n_bytes
    assert psutil.Process().memory_info().rss - rss < 8e6
    assert torch.isfinite(logits_of(cache, 0)).all()


@pytest.mark.slow  # half a minute
def test_a_day_of_one_stream() -> None:
    """21,600 blocks of one stream: flat memory, markers of the right second, finite answers."""
    cache = RollingCache(MODEL, LAYOUT, WindowSettings(n_blocks=2, scratch_tokens=64), 1)
    audio = random_audio(MODEL, 0)
    rss = 0
    for block in range(21_600):
        cache.append({0: audio})
        if block == 600:
            rss = psutil.Process().memory_info().rss
        if block % 900 == 0:
            check_markers(cache, 0)
    check_markers(cache, 0)
    assert marker_digits(cache.ids(0))[-1] == 86_400
    assert psutil.Process().memory_info().rss - rss < 8e6
    # A day ends as a stream that was resumed in its last minute.
    late = RollingCache(MODEL, LAYOUT, cache.settings, 1)
    late.reset([0], first_block=21_585)
    for _ in range(15):
        late.append({0: audio})
    torch.testing.assert_close(logits_of(cache, 0), logits_of(late, 0), atol=1e-3, rtol=0)
