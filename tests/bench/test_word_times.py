"""Word times against a reference, on words that can be counted by hand."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

from bench.manifest import Clip, RefWord
from bench.word_times import measure, pauses, with_pauses
from streaming.protocol import TranscriptDelta, TranscriptFinal, Word

SAID = (RefWord("the", 10.0, 10.2), RefWord("cat", 10.2, 10.6), RefWord("sat", 11.0, 11.5))


def test_times_are_held_against_those_of_the_words_that_were_found() -> None:
    """A word that spans a pause, one that is wrong, one that ends late, and one over another."""
    words = (
        Word("The", 4_000, 10_200, 1.0),
        Word("hat", 10_200, 10_600, 1.0),
        Word("sat.", 11_100, 12_300, 1.0),
        Word("um", 12_000, 12_400, 1.0),
    )
    finals = [TranscriptFinal("", words[:3], "en", None, 4_000, 12_300)]
    found = measure(SAID, [TranscriptDelta("", words, 4_000, 12_400), *finals])
    assert (found.n_said, found.n_committed, found.n_found, found.n_errors) == (3, 4, 2, 2)
    assert (found.n_early, found.n_late, found.n_too_long, found.n_overlaps) == (1, 1, 1, 1)
    assert found.longest == pytest.approx(6.2)
    assert found.start_mean == pytest.approx((6.0 + 0.1) / 2)
    assert found.end_mean == pytest.approx(0.8 / 2)


def test_nothing_found_is_no_error_of_times() -> None:
    """But of words."""
    found = measure(SAID, [])
    assert (found.n_found, found.n_errors, found.start_mean, found.longest) == (0, 3, 0.0, 0.0)


@pytest.mark.parametrize("is_inside", [False, True])
def test_pauses_move_the_words_behind_them(tmp_path: Path, is_inside: bool) -> None:
    """Between clips or in their middle, and the same in every run."""
    path = tmp_path / "clip.wav"
    tone = (np.sin(np.arange(32_000) * 0.3) * 10_000).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(tone.tobytes())
    clip = Clip(path, "a b", (RefWord("a", 0.2, 0.5), RefWord("b", 1.5, 1.8)), 2.0)
    found = with_pauses([clip, clip], pauses("noise"), is_inside=is_inside)
    assert np.array_equal(found.audio, with_pauses([clip, clip], pauses("noise"), is_inside=is_inside).audio)
    for word in found.words:
        spoken = found.audio[int(word.start_s * 16_000) : int(word.end_s * 16_000)]
        assert np.abs(spoken).max() == pytest.approx(10_000 / 32_768, rel=0.01)
    gap_s = [
        after.start_s - before.end_s for before, after in zip(found.words, found.words[1:], strict=False)
    ]
    assert (min(gap_s[0], gap_s[2]) > 5.0) == is_inside
    assert (gap_s[1] > 5.0) != is_inside
    assert with_pauses([clip], pauses(None), is_inside=False).duration_s == 4.0
