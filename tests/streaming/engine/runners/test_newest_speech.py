"""Which part of a window a language is estimated on."""

from __future__ import annotations

import torch
from torch import Tensor

from streaming.engine.contract import Fork, LanguageSpan
from streaming.engine.runners.newest_speech import find_pauses, newest_part, newest_speech

SECOND = 16_000


def frames(*pieces: tuple[float, float]) -> Tensor:
    """Log power, [T, 80], of pieces of so many seconds and so many decades."""
    return torch.cat([torch.full((round(seconds * 100), 80), level) for seconds, level in pieces])


SPEECH = frames((2.0, -2.0), (0.5, -7.0), (1.0, -2.5), (0.1, -7.0), (2.0, -2.0))


def test_pauses_are_found() -> None:
    """The gap of a tenth of a second is none."""
    assert find_pauses(SPEECH) == [(200, 250)]


def test_silence_at_the_end_is_no_pause() -> None:
    """Nothing follows it."""
    assert find_pauses(frames((2.0, -2.0), (1.0, -7.0))) == []


def test_noise_hides_pauses() -> None:
    """And little audio has none."""
    assert find_pauses(frames((2.0, -2.0), (0.5, -3.0), (2.0, -2.0))) == []
    assert find_pauses(frames((0.1, -2.0), (0.2, -7.0))) == []


def test_newest_speech_begins_behind_the_last_pause_that_leaves_enough() -> None:
    """Else a fixed time before its end; never further back than four seconds."""
    pauses = [(SECOND, 2 * SECOND), (5 * SECOND, 6 * SECOND)]
    assert newest_speech(pauses, 9 * SECOND, 2 * SECOND) == 6 * SECOND - 3200
    assert newest_speech(pauses, 5 * SECOND, 2 * SECOND) == 2 * SECOND - 3200
    assert newest_speech(pauses, 20 * SECOND, 2 * SECOND) == 16 * SECOND
    assert newest_speech([], 9 * SECOND, 2 * SECOND) == 6 * SECOND


def fork(span: LanguageSpan | None) -> Fork:
    """With a window from second 1 on."""
    return Fork("transcript", SECOND, (), "", None, 8, language_span=span)


def test_a_part_lies_on_the_streams_clock() -> None:
    """Its frames are those of its samples."""
    end = SECOND + SPEECH.shape[0] * 160
    part = newest_part(fork(LanguageSpan(SECOND, end, 2 * SECOND)), SPEECH)
    assert part is not None
    assert part.pauses == ((3 * SECOND, 3 * SECOND + 8000),)
    assert (part.start, part.start + part.n_samples) == (3 * SECOND + 8000 - 3200, end)
    assert torch.equal(part.frames, SPEECH[(part.start - SECOND) // 160 :])


def test_too_little_speech_has_no_estimate() -> None:
    """Nor has a fork that asks for none."""
    assert newest_part(fork(None), SPEECH) is None
    assert newest_part(fork(LanguageSpan(SECOND, 2 * SECOND, 2 * SECOND)), SPEECH) is None
