"""Manifests and the recordings joined from them."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest

from bench.manifest import RefWord, join, load_manifest

TONE_S = 0.5


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a manifest of three clips; the 8 kHz one has no word times."""
    for name, rate in (("a.wav", 16_000), ("b.wav", 8_000)):
        samples = (np.sin(np.arange(int(TONE_S * rate)) * 0.3) * 10_000).astype("<i2")
        with wave.open(str(tmp_path / name), "wb") as file:
            file.setparams((1, 2, rate, 0, "NONE", ""))
            file.writeframes(samples.tobytes())
    rows = [
        {
            "path": "a.wav",
            "text": "Hello there",
            "duration": TONE_S,
            "words": [_word("hello"), _word("there")],
        },
        {"path": "b.wav", "text": "one two", "duration": TONE_S},
        {"path": "none.wav", "text": None, "duration": TONE_S},
    ]
    (tmp_path / "manifest.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def _word(text: str) -> dict[str, str | float]:
    return {"w": text, "start": 0.1, "end": 0.25}


def test_clips_without_a_text_are_left_out(root: Path) -> None:
    """Only what can be measured is loaded, filtered by a part of the path."""
    assert [clip.path.name for clip in load_manifest(root / "manifest.jsonl", root)] == ["a.wav", "b.wav"]
    assert [clip.text for clip in load_manifest(root / "manifest.jsonl", root, "b.")] == ["one two"]


def test_join_adds_silence_and_shifts_word_times(root: Path) -> None:
    """The second clip's words begin after the first clip and its second of silence."""
    recording = join(load_manifest(root / "manifest.jsonl", root))
    assert recording.duration_s == pytest.approx(3.0, abs=0.01)
    assert recording.text == "Hello there one two"
    assert recording.words[0] == RefWord("hello", 0.1, 0.25)
    last = recording.words[-1]
    assert (last.text, last.is_timed) == ("two", False)
    assert last.start_s == pytest.approx(1.5)
    assert last.end_s == pytest.approx(2.0)
    assert np.abs(recording.audio[8_000:24_000]).max() == 0.0
    assert 0.2 < np.abs(recording.audio).max() < 0.4


def test_join_stops_before_its_limit(root: Path) -> None:
    """Whole clips only, and at least one."""
    clips = load_manifest(root / "manifest.jsonl", root)
    assert join(clips, max_s=1.8).duration_s == pytest.approx(1.5)
    assert join(clips, max_s=0.1).text == "Hello there"


def test_a_long_recording_has_utterances(root: Path) -> None:
    """Their texts are joined and their words keep their times."""
    row = {
        "path": "a.wav",
        "duration": TONE_S,
        "utterances": [
            {"start": 0.0, "end": 0.2, "text": "Hello", "words": [_word("hello")]},
            {"start": 0.2, "end": 0.5, "text": "there"},
        ],
    }
    (root / "long.jsonl").write_text(json.dumps(row))
    (clip,) = load_manifest(root / "long.jsonl", root)
    assert clip.text == "Hello there"
    assert clip.words == (RefWord("hello", 0.1, 0.25), RefWord("there", 0.2, 0.5, is_timed=False))


def test_a_bad_line_is_named(root: Path) -> None:
    """What is no clip stops the load with its file and line."""
    (root / "bad.jsonl").write_text('{"text": "no path"}')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1"):
        load_manifest(root / "bad.jsonl", root)
    with pytest.raises(ValueError, match="no clip"):
        load_manifest(root / "manifest.jsonl", root, "elsewhere")
