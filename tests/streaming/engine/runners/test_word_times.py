"""When words are said, by the embedded weights: after music, after pauses, and in unspaced scripts.

Slow. The recordings are those beside the repository.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bench import virtual
from bench.manifest import Clip, RefWord, load_manifest, read_audio
from streaming.config import Config, EmotionConfig, EngineConfig, EventsConfig
from streaming.engine.contract import Pcm, Runner
from streaming.engine.runners.loader import load_runner
from streaming.log.subtitles import MAX_CUE_MS, Spoken, cues_of
from streaming.protocol import Message, TranscriptDelta, TranscriptFinal, Word
from streaming.text import comparable, join_words

DATA = Path(__file__).resolve().parents[5] / "shared" / "data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="shared/data is not here"),
]
CONFIG = Config(
    engine=EngineConfig(n_slots=1, shed_after_s=0.0, threads=1),
    events=EventsConfig(enabled=False),
    emotion=EmotionConfig(enabled=False),
)
SECOND = 16_000
LONGEST_MS = 2_000  # no word of the recordings' own times is longer
EARLY_MS = 700  # before a word was spoken, at most


@pytest.fixture(scope="module")
def runner() -> Runner:
    """The embedded model, words alone."""
    return load_runner(CONFIG)


def clip(path: str) -> Clip:
    """A recording by its path."""
    manifest = DATA / path.split("/")[0] / "manifest.jsonl"
    (found,) = load_manifest(manifest, DATA, path)
    return found


def room_noise(seconds: float) -> Pcm:
    """At -62 dBFS."""
    noise = np.random.default_rng(0).standard_normal(int(seconds * SECOND)).astype(np.float32)
    pcm: Pcm = noise * np.float32(10 ** (-62 / 20))
    return pcm


def music(seconds: float) -> Pcm:
    """Hold music at -28 dBFS."""
    piece = read_audio(DATA / "noise_music" / "moh_macroform-cold_day.opus")[: int(seconds * SECOND)]
    pcm: Pcm = piece * np.float32(10 ** (-28 / 20)) / np.sqrt(np.mean(piece**2))
    return pcm


def messages_of(runner: Runner, audio: Pcm, language: str) -> list[Message]:
    """What a stream of this audio is told."""
    (run,) = virtual.run([audio], runner, CONFIG, language, speed=1000.0).runs
    return [message for _, message in run.arrivals]


def check_times(messages: list[Message], said: list[tuple[str, int]]) -> None:
    """Words have lengths that words have and begin when they are spoken, in order; so do segments and cues.

    Args:
        messages: Of a stream.
        said: Some of its words, in order, and when each was spoken, in milliseconds.
    """
    words = [word for m in messages if isinstance(m, TranscriptDelta) for word in m.words]
    finals = [m for m in messages if isinstance(m, TranscriptFinal)]
    assert all(word.end_ms - word.start_ms <= LONGEST_MS for word in words)
    assert all(a.end_ms <= b.start_ms for a, b in pairwise(words))
    assert all(a.end_ms <= b.start_ms for a, b in pairwise(finals))
    assert all(final.start_ms == final.words[0].start_ms for final in finals)
    cues = cues_of([Spoken(final.words) for final in finals])
    assert all(cue.end_ms - cue.start_ms <= MAX_CUE_MS for cue in cues)
    n_found = 0
    for text, start_ms in said:
        near = [word for word in words if comparable(word.text) == comparable(text)]
        if near:
            nearest = min(near, key=lambda word: abs(word.start_ms - start_ms))
            assert abs(nearest.start_ms - start_ms) <= EARLY_MS, (text, start_ms, words)
            n_found += 1
    assert n_found >= len(said) * 2 / 3, words


def test_words_after_a_jingle_begin_when_they_are_spoken(runner: Runner) -> None:
    """The first words of a radio programme, 10.9 s after its music begins, and those after the next music."""
    radio = clip("other_langs/fr/linto_radio_short.opus")
    first_s, last_s = 20.0, 48.0
    audio = read_audio(radio.path)[int(first_s * SECOND) : int(last_s * SECOND)]
    said = [
        (word.text, round((word.start_s - first_s) * 1000))
        for word in radio.words
        if word.text in ("Le", "plus", "important", "poker", "Bonsoir", "toutes") and word.start_s < 47.0
    ]
    assert len(said) > 5
    check_times(messages_of(runner, audio, "fr"), said)


@pytest.mark.parametrize("between", ["music", "noise"])
def test_words_after_a_pause_in_a_sentence_begin_when_they_are_spoken(runner: Runner, between: str) -> None:
    """A sentence with seven seconds of music or of a quiet room in its middle, and before it."""
    sentence = clip("speech_en/librispeech_test_other/1688-142285-0003.flac")
    pause = music(7.0) if between == "music" else room_noise(7.0)
    audio = read_audio(sentence.path)
    cut, at = _middle(sentence.words)
    said = [
        (word.text, round(word.start_s * 1000) + 7_000 * (1 + (i >= at)))
        for i, word in enumerate(sentence.words)
    ]
    check_times(
        messages_of(runner, np.concatenate([pause, audio[:cut], pause, audio[cut:], pause[:SECOND]]), "en"),
        said[at : at + 3],
    )


def _middle(words: tuple[RefWord, ...]) -> tuple[int, int]:
    """A sample between two words in the middle of a sentence, and the second one's index."""
    at = len(words) // 2
    return int((words[at - 1].end_s + words[at].start_s) / 2 * SECOND), at


@pytest.mark.parametrize(
    ("path", "language"), [("zh/BAC009S0150W0183.opus", "zh"), ("ja/leopard_ja.opus", "ja")]
)
def test_unspaced_scripts_have_no_spaces(runner: Runner, path: str, language: str) -> None:
    """In the deltas as a reader joins them, in the finals and in the cues."""
    audio = read_audio(DATA / "other_langs" / path)
    messages = messages_of(runner, np.concatenate([audio, room_noise(1.0)]), language)
    deltas = [m for m in messages if isinstance(m, TranscriptDelta)]
    finals = [m for m in messages if isinstance(m, TranscriptFinal)]
    joined = "".join(delta.separator + delta.text for delta in deltas)
    assert len(joined) > 8
    assert " " not in joined
    assert "".join(final.text for final in finals) == joined
    words: list[Word] = [word for delta in deltas for word in delta.words]
    assert join_words(word.text for word in words) == joined
    assert "".join("".join(cue.lines) for cue in cues_of([Spoken(words)])) == joined
