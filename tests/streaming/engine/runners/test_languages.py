"""The embedded model follows a speaker who changes the language, and is not misled by music. Slow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import virtual
from bench.manifest import read_audio
from streaming.config import Config, EngineConfig
from streaming.engine.contract import Pcm, Runner
from streaming.engine.runners.loader import load_runner
from streaming.protocol import TranscriptFinal

pytestmark = pytest.mark.slow

DATA = Path(__file__).resolve().parents[5] / "shared" / "data"
CONFIG = Config(engine=EngineConfig(n_slots=1, shed_after_s=0.0, threads=1))
SECOND = 16_000


@pytest.fixture(scope="module")
def runner() -> Runner:
    """The embedded model."""
    return load_runner(CONFIG)


def recording(path: str, start_s: float = 0.0, end_s: float | None = None) -> Pcm:
    """A part of a recording beside the repository."""
    if not (DATA / path).exists():
        pytest.skip(f"no {DATA / path}")
    return read_audio(DATA / path)[int(start_s * SECOND) : None if end_s is None else int(end_s * SECOND)]


def silence(seconds: float) -> Pcm:
    """Of a pause."""
    return np.zeros(int(seconds * SECOND), np.float32)


def finals(runner: Runner, *pieces: Pcm) -> list[TranscriptFinal]:
    """The segments of these pieces in a row, with the language detected."""
    run = virtual.run([np.concatenate(pieces)], runner, CONFIG)
    return [message for _, message in run.runs[0].arrivals if isinstance(message, TranscriptFinal)]


def test_a_jingle_does_not_set_the_language(runner: Runner) -> None:
    """Nine seconds of it, then a French announcer: every segment of his is French, from the first on."""
    found = finals(runner, recording("other_langs/fr/linto_radio_short.opus", 22.0, 39.0))
    spoken = [final for final in found if final.end_ms > 10_000]
    assert [final.language for final in spoken] == ["fr"] * len(spoken)
    assert "poker" in " ".join(final.text for final in spoken)


def test_a_change_of_language_is_followed(runner: Runner) -> None:
    """An American president, then French with music behind it: each in the own language, none translated."""
    english = recording("speech_en/misc/jfk.flac")
    french = recording("other_langs/fr/linto_radio_short.opus", 46.0, 57.0)
    found = finals(runner, english, silence(1.0), french)
    change_ms = len(english) // 16 + 500
    assert {final.language for final in found if final.end_ms < change_ms} == {"en"}
    assert {final.language for final in found if final.start_ms > change_ms} == {"fr"}
    assert not [final for final in found if final.start_ms < change_ms < final.end_ms]
    text = " ".join(final.text for final in found)
    assert "ask what you can do for your country" in text
    assert "minutes" in text


def test_a_change_in_a_short_pause_is_followed(runner: Runner) -> None:
    """German, Chinese and Russian with less than half a second between them: endpointing sees no stop."""
    parts = {
        "de": [recording("other_langs/de/leopard_de.opus")],
        "zh": [recording("other_langs/zh/BAC009S0150W0300.opus")],
        "ru": [recording("other_langs/ru/ast_priv-introsaved.opus")],
    }
    pieces: list[Pcm] = []
    starts_ms = {}
    for language, audio in parts.items():
        starts_ms[language] = sum(map(len, pieces)) // 16
        pieces += [*audio, silence(0.4)]
    found = finals(runner, *pieces)
    assert [final.language for final in found] == ["de", "zh", "ru"]
    for final in found:
        assert abs(final.start_ms - starts_ms[str(final.language)]) < 1500
