"""Endpointing on the sample clock."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.audio.vad import FRAME, PERIOD, WARM_UP, Vad
from streaming.config import VadConfig
from streaming.engine.contract import Pcm
from streaming.engine.messages import Mark
from streaming.protocol import SAMPLE_RATE_HZ
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


@pytest.mark.parametrize("dbfs", [-48, -53, -58, -63])
def test_quiet_speech_is_speech(dbfs: int) -> None:
    """In a quiet room a voice is found whatever its level, with its edges."""
    marks = marks_of(at_level(SIGNAL, dbfs) + room_noise(len(SIGNAL), dbfs - 25), [])
    loud = marks_of(SIGNAL, [])
    assert [mark.kind for mark in marks] == [mark.kind for mark in loud]
    assert all(abs(a.boundary - b.boundary) <= 10 * FRAME for a, b in zip(marks, loud, strict=True))


@pytest.mark.parametrize("dbfs", [-48, -53, -58, -63])
def test_an_absolute_minimum_can_be_set(dbfs: int) -> None:
    """Below it nothing counts, as before there was a gate that follows the room."""
    assert marks_of(at_level(SIGNAL, dbfs), [], VadConfig(min_level_dbfs=dbfs + 15)) == []


@pytest.mark.parametrize("dbfs", [-75, -69, -62, -57])
def test_the_noise_of_a_room_is_silence(dbfs: int) -> None:
    """Noise and hum, however loud the room: what is steady does not stand out of itself."""
    noise = room_noise(30 * SAMPLE_RATE_HZ, dbfs)
    t = np.arange(len(noise)) / SAMPLE_RATE_HZ
    hum = np.sum([np.sin(2 * np.pi * 50 * k * t) / k for k in (1, 2, 3, 5)], axis=0)
    assert marks_of(noise, []) == []
    assert marks_of(at_level(hum.astype(np.float32), dbfs), []) == []
    assert marks_of(np.concatenate([silence(5.0), noise[: len(noise) // 3], silence(5.0)]), []) == []


def test_tails_of_loud_speech_are_no_speech() -> None:
    """What is far below the speech just heard does not hold up its end."""
    loud, quiet = at_level(tone_speech(3.0), -26), at_level(tone_speech(3.0), -62)
    marks = marks_of(np.concatenate([loud, quiet, silence(1.0)]) + room_noise(7 * SAMPLE_RATE_HZ, -80), [])
    assert [mark.kind for mark in marks] == ["speech_start", "speech_stop"]
    assert abs(marks[1].boundary - len(loud)) <= 10 * FRAME


def test_speech_that_is_mostly_cut_is_noticed() -> None:
    """At the next review; not where most is heard, nor where nobody speaks."""
    vad = Vad(VadConfig(min_level_dbfs=-40))
    talk = at_level(np.concatenate([tone_speech(1.0, i) for i in range(30)]), -52)
    vad.push(talk)
    assert vad.is_cut
    again = Vad(VadConfig(min_level_dbfs=-40))
    state = vad.snapshot()
    again.restore(state, talk[Vad.needed_from(state) :])
    assert again.is_cut
    vad.push(at_level(talk, -26))
    assert not vad.is_cut
    vad.push(room_noise(30 * SAMPLE_RATE_HZ, -62))
    assert not vad.is_cut


def at_level(pcm: Pcm, dbfs: float) -> Pcm:
    """The same with another mean level of what is not silent."""
    loud = pcm[np.abs(pcm) > 0]
    scaled: Pcm = (pcm * np.float32(10 ** (dbfs / 20) / np.sqrt(np.mean(loud**2)))).astype(np.float32)
    return scaled


def room_noise(n_samples: int, dbfs: float) -> Pcm:
    """Steady noise that falls with frequency."""
    spectrum = np.fft.rfft(np.random.default_rng(n_samples).standard_normal(n_samples))
    spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(n_samples, 1 / SAMPLE_RATE_HZ), 50.0))
    return at_level(np.fft.irfft(spectrum, n_samples).astype(np.float32), dbfs)


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
