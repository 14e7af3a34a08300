"""Endpointing on the sample clock."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.audio.vad import FRAME, PERIOD, WARM_UP, Vad
from streaming.config import VadConfig
from streaming.engine.contract import Pcm
from streaming.engine.messages import Mark
from tests.streaming.support import silence, tone_speech, utterances

CONFIG = VadConfig()
SIGNAL = np.concatenate([utterances(1.0, 0.6, 2.0), tone_speech(0.05), silence(1.0), tone_speech(1.0)])


def marks_of(pcm: Pcm, borders: list[int], config: VadConfig = CONFIG) -> list[Mark]:
    """All decisions when the samples come cut at `borders`."""
    vad = Vad(config)
    edges = sorted({0, len(pcm), *(border for border in borders if border < len(pcm))})
    return [mark for start, end in pairwise(edges) for mark in vad.push(pcm[start:end])]


@settings(max_examples=25)
@given(st.lists(st.integers(0, len(SIGNAL)), max_size=30))
def test_how_samples_are_cut_changes_no_mark(borders: list[int]) -> None:
    """The decisions depend on the samples alone."""
    assert marks_of(SIGNAL, borders) == marks_of(SIGNAL, [])


def test_speech_is_found_with_its_edges() -> None:
    """Three utterances after half a second; the speech at the end has not stopped; a click is none."""
    marks = marks_of(SIGNAL, [])
    assert [mark.kind for mark in marks] == ["speech_start", "speech_stop"] * 3 + ["speech_start"]
    first, stopped = marks[0], marks[1]
    assert abs(first.boundary - (8000 - 300 * 16)) <= 2 * FRAME
    assert 0 <= first.at - 8000 <= 120 * 16 + 3 * FRAME
    assert abs(stopped.boundary - 24_000) <= 10 * FRAME
    assert stopped.at - stopped.boundary == VadConfig().stop_ms * 16


@given(st.lists(st.tuples(st.booleans(), st.integers(100, 1500)), max_size=8), st.integers(0, 3))
def test_marks_alternate_and_never_overlap(parts: list[tuple[bool, int]], seed: int) -> None:
    """Whatever is said: start, stop, start, ...; each edge at or after the stop before it."""
    pieces = [tone_speech(ms / 1000, seed) if voiced else silence(ms / 1000) for voiced, ms in parts]
    marks = marks_of(np.concatenate([silence(0.0), *pieces]), [])
    kinds = [mark.kind for mark in marks]
    assert kinds == ["speech_start", "speech_stop"] * (len(kinds) // 2) + ["speech_start"] * (len(kinds) % 2)
    assert all(0 <= mark.boundary <= mark.at and mark.at % FRAME == 0 for mark in marks)
    assert all(a.boundary <= b.boundary and a.at < b.at for a, b in pairwise(marks))


def test_what_is_too_quiet_is_no_speech() -> None:
    """The same voice 40 dB lower lies under the minimum level; without one it may be speech."""
    quiet = utterances(2.0) * np.float32(0.003)
    assert marks_of(quiet, []) == []
    assert marks_of(quiet, [], VadConfig(min_level_dbfs=-120, aggressiveness=0))


def test_digital_zeros_are_silence() -> None:
    """However long."""
    assert marks_of(silence(60.0), []) == []


@settings(max_examples=5)
@given(st.integers(0, 2 * PERIOD * FRAME), st.integers(0, 3))
def test_the_state_is_made_again_from_the_audio_before_it(at: int, seed: int) -> None:
    """At any sample: what follows is decided as if nothing had happened, by both detectors."""
    noisy = long_noise(seed)
    vad = Vad(CONFIG)
    vad.push(noisy[:at])
    state = vad.snapshot()
    again = Vad(CONFIG)
    again.restore(state, noisy[Vad.needed_from(state) : at])
    assert at - Vad.needed_from(state) <= (PERIOD + WARM_UP + 1) * FRAME
    assert again.push(noisy[at:]) == vad.push(noisy[at:])
    assert again.snapshot() == vad.snapshot()


def long_noise(seed: int) -> Pcm:
    """A minute and more of bursts in noise that changes its level: the detectors have to follow it."""
    rng = np.random.default_rng(seed)
    pieces = [
        tone_speech(float(rng.uniform(0.2, 1.5)), i) * np.float32(rng.uniform(0.02, 1.0))
        if i % 2
        else silence(float(rng.uniform(0.3, 2.0)))
        for i in range(100)
    ]
    joined = np.concatenate(pieces)[: 5 * PERIOD * FRAME // 2]
    level = 0.002 + 0.01 * np.sin(np.arange(len(joined)) / 100_000) ** 2
    pcm: Pcm = (joined + level * rng.standard_normal(len(joined))).astype(np.float32)
    return pcm
