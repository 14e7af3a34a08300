"""Emotion forks of the Whisper runner: read from the pass that the words use, whatever is beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.emotion import EmotionHead
from streaming.engine.contract import EmotionEstimate, Fork, Pcm, SlotResult, SlotStep, StepPlan
from streaming.engine.runners.whisper import WhisperRunner
from streaming.engine.stream_state import MARGIN
from tests.streaming.engine.runners.test_whisper import (
    CHECKPOINT,
    CPU,
    FORK,
    N_SLOTS,
    SECOND,
    chirps,
    step_of,
)

LABELS = ("neutral", "happy", "sad", "angry")
TAPS = (0, 2)
N_FEATURES = 2 * CHECKPOINT.model.config.width * len(TAPS)


def new_head() -> EmotionHead:
    """Random weights whose answers tell sounds apart."""
    weight = torch.randn(len(LABELS), N_FEATURES, generator=torch.Generator().manual_seed(5))
    ones = torch.ones(N_FEATURES)
    return EmotionHead(LABELS, TAPS, 0 * ones, 0.1 * ones, weight / N_FEATURES**0.5, torch.zeros(len(LABELS)))


def new_runner(n_slots: int = N_SLOTS, *, pads_fully: bool = False) -> WhisperRunner:
    """A runner with a head."""
    return WhisperRunner(
        CHECKPOINT, n_slots, device=CPU, dtype=torch.float32, pads_fully=pads_fully, emotion=new_head()
    )


RUNNER = new_runner()


def feeling(start: int) -> Fork:
    """An emotion fork."""
    return Fork("emotion", start, (), "", None, 8)


def run(runner: WhisperRunner, *steps: SlotStep) -> tuple[SlotResult, ...]:
    """One step of all these slots."""
    return runner.step(StepPlan(steps))


def emotion_of(result: SlotResult) -> EmotionEstimate:
    """Of a slot that was asked for it."""
    assert result.found.emotion is not None
    return result.found.emotion


def fresh(pcm: Pcm, start: int = 0, transcript: Fork = FORK, at: int = 0) -> EmotionEstimate:
    """The emotion from `start` on that a slot hears which heard nothing else."""
    RUNNER.reset([0])
    (result,) = run(RUNNER, step_of(0, pcm, transcript, feeling(start), start=at))
    return emotion_of(result)


def assert_same(ours: EmotionEstimate, theirs: EmotionEstimate) -> None:
    """Spans are equal; probabilities but for their last digits."""
    assert (ours.start, ours.end, ours.label) == (theirs.start, theirs.end, theirs.label)
    assert ours.scores == pytest.approx(theirs.scores, abs=1e-4)
    assert (ours.valence, ours.arousal) == pytest.approx((theirs.valence, theirs.arousal), abs=1e-3)


def test_an_answer_holds_every_label() -> None:
    """Probabilities that add up, the likeliest as the label, the span of the window."""
    heard = fresh(chirps(2 * SECOND), 3200)
    assert list(heard.scores) == list(LABELS)
    assert sum(heard.scores.values()) == pytest.approx(1.0)
    assert (heard.label, heard.score) == max(heard.scores.items(), key=lambda item: item[1])
    assert (heard.start, heard.end) == (3200, 2 * SECOND)
    assert heard.valence is not None


def test_the_sounds_are_told_apart() -> None:
    """The other tests of this file would say little if every sound had the same scores."""
    heard = [list(fresh(chirps(2 * SECOND, seed)).scores.values()) for seed in range(5)]
    assert np.std(heard, axis=0).max() > 0.01
    assert np.max(heard) < 0.99
    pcm = chirps(3 * SECOND)
    assert fresh(pcm, 0).scores != pytest.approx(fresh(pcm, 2 * SECOND).scores, abs=1e-3)


@given(
    lengths=st.lists(st.integers(400, 4 * SECOND), min_size=2, max_size=N_SLOTS),
    parts=st.lists(st.floats(0, 0.99), min_size=N_SLOTS, max_size=N_SLOTS),
    wants=st.lists(st.booleans(), min_size=N_SLOTS, max_size=N_SLOTS),
)
@settings(max_examples=12)
def test_a_batch_of_slots_feels_what_each_feels_alone(
    lengths: list[int], parts: list[float], wants: list[bool]
) -> None:
    """Windows of any length, emotion asked of some of them; answers in the order of the plan."""
    RUNNER.reset(range(N_SLOTS))
    steps, expected = [], []
    for slot, length in enumerate(lengths):
        start = int(parts[slot] * length)
        forks = (FORK, feeling(start)) if wants[slot] else (FORK,)
        steps.append(step_of(slot, chirps(length, slot), *forks))
        expected += [(slot, length, start)] if wants[slot] else []
    together = run(RUNNER, *steps)
    assert all(result.hypothesis is not None for result in together)
    asked = [slot for slot, result in enumerate(together) if result.found.emotion is not None]
    assert asked == [slot for slot, _, _ in expected]
    for slot, length, start in expected:
        assert_same(emotion_of(together[slot]), fresh(chirps(length, slot), start))


@given(lengths=st.lists(st.integers(0, SECOND), max_size=6), n_samples=st.integers(1000, 3 * SECOND))
@settings(max_examples=12)
def test_any_cut_of_the_audio_feels_the_same(lengths: list[int], n_samples: int) -> None:
    """Pushed in pieces of any length, with questions in between."""
    pcm = chirps(n_samples)
    RUNNER.reset([1])
    at = 0
    for length in lengths:
        piece = pcm[at : at + length]
        forks = (FORK, feeling(0)) if at + len(piece) >= 400 else ()
        run(RUNNER, step_of(1, piece, *forks, start=at))
        at += len(piece)
    (result,) = run(RUNNER, step_of(1, pcm[at:], FORK, feeling(n_samples // 2), start=at))
    assert_same(emotion_of(result), fresh(pcm, n_samples // 2))


def test_a_window_of_a_long_stream_is_as_of_a_fresh_slot() -> None:
    """Where the window lies on the stream's clock changes nothing."""
    pcm = chirps(12 * SECOND)
    window_start = 9 * SECOND
    transcript = Fork("transcript", window_start, (), "", "en", 16)
    RUNNER.reset([1])
    run(RUNNER, step_of(1, pcm))
    (old,) = run(RUNNER, step_of(1, pcm[:0], transcript, feeling(10 * SECOND), start=len(pcm)))
    begin = window_start - MARGIN
    assert_same(emotion_of(old), fresh(pcm[begin:], 10 * SECOND, transcript, begin))


def test_the_words_do_not_hear_the_question() -> None:
    """A transcript is the same to the bit with and without an emotion fork behind it."""
    pcm = chirps(3 * SECOND)
    RUNNER.reset([0])
    (with_it,) = run(RUNNER, step_of(0, pcm, FORK, feeling(0)))
    RUNNER.reset([0])
    (without,) = run(RUNNER, step_of(0, pcm, FORK))
    assert without.hypothesis == with_it.hypothesis


def test_padding_in_full_is_another_way_to_the_same_interface() -> None:
    """A full window needs no padding, so both ways feel the same there."""
    pcm = chirps(4 * SECOND)
    (result,) = run(new_runner(1, pads_fully=True), step_of(0, pcm, FORK, feeling(SECOND)))
    assert_same(emotion_of(result), fresh(pcm, SECOND))


def test_more_slots_than_a_batch_holds() -> None:
    """Answers come in the order of the plan, whatever the order of the work."""
    n_slots = 20
    runner = new_runner(n_slots)
    pcms = [chirps(2000 + 1700 * ((7 * i) % n_slots), i) for i in range(n_slots)]
    together = run(runner, *[step_of(i, pcm, FORK, feeling(0)) for i, pcm in enumerate(pcms)])
    assert len(together) == n_slots
    for i in (0, 3, n_slots - 1):
        assert_same(emotion_of(together[i]), fresh(pcms[i]))


def test_without_a_head_there_is_no_emotion() -> None:
    """The task is missing; with one, it is there."""
    plain = WhisperRunner(CHECKPOINT, 1, device=CPU, dtype=torch.float32, pads_fully=False)
    assert plain.capabilities.tasks == ("transcript",)
    assert RUNNER.capabilities.tasks == ("transcript", "emotion")
