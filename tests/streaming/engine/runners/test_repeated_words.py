"""Words that people repeat, and words that are whole, with the embedded weights. Slow."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from bench import virtual
from bench.manifest import read_audio
from streaming.config import Config, EmotionConfig, EngineConfig
from streaming.engine.contract import Pcm, Runner
from streaming.engine.runners.loader import load_runner
from streaming.protocol import TranscriptFinal

pytestmark = pytest.mark.slow

SPEECH = Path(__file__).resolve().parents[5] / "shared" / "data" / "speech_en"
CONFIG = Config(
    engine=EngineConfig(n_slots=1, shed_after_s=0.0, threads=1), emotion=EmotionConfig(enabled=False)
)


@pytest.fixture(scope="module")
def runner() -> Runner:
    """The embedded model with its sounds."""
    if not SPEECH.is_dir():
        pytest.skip(f"no recordings in {SPEECH}")
    return load_runner(CONFIG)


def text_of(runner: Runner, audio: Pcm) -> str:
    """The closed segments of one stream, joined; lower case."""
    (run,) = virtual.run([audio], runner, CONFIG, "en", speed=1000.0).runs
    return " ".join(m.text for _, m in run.arrivals if isinstance(m, TranscriptFinal)).lower()


def silence(seconds: float) -> Pcm:
    """Nothing."""
    return np.zeros(int(seconds * 16_000), np.float32)


def takes(digit: int, speaker: str, n: int) -> Pcm:
    """So many takes of a spoken digit, a quarter of a second between."""
    clips = [read_audio(SPEECH / "fsdd" / f"{digit}_{speaker}_{take}.flac") for take in range(n)]
    return np.concatenate([part for clip in clips for part in (clip, silence(0.25))])


def repeated(path: str, start_s: float, end_s: float, gap_s: float) -> Pcm:
    """Ten times a word of a recording."""
    word = read_audio(SPEECH / path)[int(start_s * 16_000) : int(end_s * 16_000)]
    return np.concatenate([word, silence(gap_s)] * 10)


@pytest.mark.parametrize(("digit", "speaker"), [(7, "george"), (7, "jackson"), (3, "jackson")])
def test_a_digit_said_twelve_times_is_heard_about_so_often(runner: Runner, digit: int, speaker: str) -> None:
    """However it is written: "seven, seven" or "777". Never fewer than ten, and no endless loop."""
    text = text_of(runner, takes(digit, speaker, 12))
    n_heard = len(re.findall(f"{digit}|seven|three", text))
    assert 10 <= n_heard <= 16, text


@pytest.mark.parametrize(
    ("path", "start_s", "end_s", "gap_s"),
    [
        ("philipp_reading/LJ003-0004.opus", 0.0, 0.30, 0.6),
        ("speechocean762/020020094.opus", 0.84, 1.18, 0.25),
        ("speechocean762/096260017.opus", 0.89, 1.49, 0.25),
    ],
)
def test_a_sentence_behind_repeated_words_is_heard(
    runner: Runner, path: str, start_s: float, end_s: float, gap_s: float
) -> None:
    """Ten times "no" of three people, then a sentence of another."""
    sentence = read_audio(SPEECH / "misc" / "jfk.flac")[: 5 * 16_000]
    text = text_of(runner, np.concatenate([repeated(path, start_s, end_s, gap_s), sentence]))
    assert "my fellow americans" in text
    assert len(text.split()) >= 6 + 5


def test_no_committed_word_is_half_a_word(runner: Runner) -> None:
    """Once "I don't ing they should get it", and "in it country" for "in this country"."""
    audio = read_audio(SPEECH / "misc" / "paa_diarizationExample.flac")[: 30 * 16_000]
    text = text_of(runner, audio)
    assert "i don't think they should get it" in text
    assert "paying for fuel in this country" in text
    assert not {"ing", "nd", "ters"} & set(text.split())
