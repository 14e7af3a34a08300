"""The Whisper runner with random weights: slots are apart, cuts change nothing, old frames go."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sounds.head import load_weights
from model.sounds.yamnet import load as load_yamnet
from model.whisper.checkpoint import Checkpoint
from model.whisper.decoding import Decoded
from model.whisper.tokens import Vocabulary
from streaming.config import EventsConfig
from streaming.engine.contract import (
    SOUND_FRAME,
    Fork,
    Hypothesis,
    LanguageSpan,
    Pcm,
    SlotStep,
    StepPlan,
    TimedWord,
)
from streaming.engine.runners import whisper as whisper_runner
from streaming.engine.runners.loader import warm_up
from streaming.engine.runners.sounds import SoundScorer
from streaming.engine.runners.whisper import NO_SPEECH, WhisperRunner, is_invented
from streaming.engine.stream_state import MARGIN
from tests.tiny_whisper import tiny_checkpoint


def speaking_checkpoint() -> Checkpoint:
    """The tiny checkpoint, kept from saying bytes that are no letters: what it says is words."""
    checkpoint = tiny_checkpoint()
    vocabulary = Vocabulary(checkpoint.tokenizer)
    mute = [
        i
        for i in range(vocabulary.end)
        if not re.fullmatch(" ?[a-z]+|-source|[中文]", vocabulary.decode([i]))
    ]
    config = dataclasses.replace(checkpoint.model.config, suppressed_ids=tuple(mute))
    checkpoint.model.config = config
    return checkpoint


CHECKPOINT = speaking_checkpoint()
CPU = torch.device("cpu")
N_SLOTS = 4
SECOND = 16_000
FORK = Fork("transcript", 0, (), "", "en", 16)


def new_runner(*, pads_fully: bool = False) -> WhisperRunner:
    """A runner of its own over the shared weights."""
    return WhisperRunner(CHECKPOINT, N_SLOTS, device=CPU, dtype=torch.float32, pads_fully=pads_fully)


RUNNER = new_runner()  # of the tests that reset what they use


def chirps(n_samples: int, seed: int = 0) -> Pcm:
    """Sound that is nowhere twice the same."""
    rng = np.random.default_rng(seed)
    t = np.arange(n_samples) / SECOND
    sweep = np.sin(2 * np.pi * (300 + 200 * seed + 150 * t) * t) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t))
    pcm: Pcm = (0.2 * sweep + 0.02 * rng.standard_normal(n_samples)).astype(np.float32)
    return pcm


def step_of(slot: int, pcm: Pcm, *forks: Fork, start: int = 0, owner: int | None = None) -> SlotStep:
    """A slot's part of a plan; by default its owner is the slot's own number."""
    return SlotStep(slot, slot if owner is None else owner, start, pcm, forks)


def run(runner: WhisperRunner, *steps: SlotStep) -> tuple[Hypothesis, ...]:
    """One step of all these slots."""
    found = [result.hypothesis for result in runner.step(StepPlan(steps))]
    return tuple(hypothesis for hypothesis in found if hypothesis is not None)


def ask(runner: WhisperRunner, slot: int, pcm: Pcm, fork: Fork = FORK, *, start: int = 0) -> Hypothesis:
    """One slot alone."""
    (hypothesis,) = run(runner, step_of(slot, pcm, fork, start=start))
    return hypothesis


def assert_same(ours: Hypothesis, theirs: Hypothesis) -> None:
    """Words and times are equal; probabilities but for their last digits."""
    assert [(w.text, w.start, w.end) for w in ours.words] == [(w.text, w.start, w.end) for w in theirs.words]
    assert [w.confidence for w in ours.words] == pytest.approx([w.confidence for w in theirs.words], abs=1e-4)
    assert (ours.language, ours.n_repetitions_cut) == (theirs.language, theirs.n_repetitions_cut)
    assert ours.no_speech == pytest.approx(theirs.no_speech, abs=1e-4)


def fresh(pcm: Pcm, fork: Fork = FORK, *, start: int = 0) -> Hypothesis:
    """What a slot that heard nothing else says."""
    RUNNER.reset([0])
    return ask(RUNNER, 0, pcm, fork, start=start)


def test_the_sounds_are_told_apart() -> None:
    """The other tests of this file would say little if every sound said the same."""
    said = {tuple(word.text for word in fresh(chirps(3 * SECOND, seed)).words) for seed in range(5)}
    assert len(said) >= 4
    assert all(said)


@given(lengths=st.lists(st.integers(0, SECOND), max_size=8), n_samples=st.integers(1000, 3 * SECOND))
@settings(max_examples=12)
def test_any_cut_of_the_audio_gives_the_same(lengths: list[int], n_samples: int) -> None:
    """Pushed with nothing due, in pieces of any length."""
    pcm = chirps(n_samples)
    RUNNER.reset([1])
    at = 0
    for length in lengths:
        piece = pcm[at : at + length]
        assert run(RUNNER, step_of(1, piece, start=at)) == ()
        at += len(piece)
    assert_same(ask(RUNNER, 1, pcm[at:], start=at), fresh(pcm))


def test_what_was_asked_before_changes_nothing() -> None:
    """A question in between leaves a draft behind, which changes no word."""
    pcm = chirps(3 * SECOND)
    RUNNER.reset([1])
    for at in range(0, 3 * SECOND, 8000):
        last = ask(RUNNER, 1, pcm[at : at + 8000], start=at)
    assert_same(last, fresh(pcm))


@given(
    lengths=st.lists(st.integers(400, 4 * SECOND), min_size=2, max_size=N_SLOTS),
    n_words=st.lists(st.integers(0, 2), min_size=N_SLOTS, max_size=N_SLOTS),
)
@settings(max_examples=12)
def test_a_batch_of_slots_says_what_each_says_alone(lengths: list[int], n_words: list[int]) -> None:
    """Windows of any length, with prefixes of their own; times to the sample."""
    agreed = (TimedWord("the", 0, 0, 1.0), TimedWord("day", 0, 0, 1.0))
    forks = [Fork("transcript", 0, agreed[:n], "", "en", 12) for n in n_words]
    RUNNER.reset(range(N_SLOTS))
    pcms = [chirps(length, seed) for seed, length in enumerate(lengths)]
    together = run(RUNNER, *[step_of(i, pcm, forks[i]) for i, pcm in enumerate(pcms)])
    assert len(together) == len(lengths)
    for i, pcm in enumerate(pcms):
        assert_same(together[i], fresh(pcm, forks[i]))


@given(lengths=st.lists(st.integers(1, 200), min_size=2, max_size=N_SLOTS, unique=True))
@settings(max_examples=12)
def test_neighbours_do_not_change_the_last_positions(lengths: list[int]) -> None:
    """A row's convolutions look beyond its own audio, at the silence there, whatever the batch is.

    The scores of the first token tell: they depend on every position.
    """
    pcms = [chirps(length * 320, seed) for seed, length in enumerate(lengths)]
    RUNNER.reset(range(N_SLOTS))
    together = run(RUNNER, *[step_of(i, pcm, FORK) for i, pcm in enumerate(pcms)])
    for i, pcm in enumerate(pcms):
        alone = fresh(pcm)
        assert together[i].no_speech == pytest.approx(alone.no_speech, rel=1e-3)


def test_more_slots_than_a_batch_holds() -> None:
    """Answers come in the order of the plan, whatever the order of the work."""
    n_slots = 20
    runner = WhisperRunner(CHECKPOINT, n_slots, device=CPU, dtype=torch.float32, pads_fully=False)
    pcms = [chirps(2000 + 1700 * ((7 * i) % n_slots), i) for i in range(n_slots)]
    together = run(runner, *[step_of(i, pcm, FORK) for i, pcm in enumerate(pcms)])
    assert len(together) == n_slots
    for i in (0, 3, n_slots - 1):
        assert_same(together[i], fresh(pcms[i]))


def halves(others: Sequence[int]) -> Hypothesis:
    """Slot 2 hears two seconds in two steps, with other slots' steps between."""
    pcm = chirps(2 * SECOND, 2)
    RUNNER.reset(range(N_SLOTS))
    run(RUNNER, step_of(2, pcm[:SECOND]))
    for slot in others:
        ask(RUNNER, slot, chirps(SECOND, slot))
    return ask(RUNNER, 2, pcm[SECOND:], start=SECOND)


def test_an_idle_slot_is_as_if_the_step_never_happened() -> None:
    """Its neighbours' steps leave no trace in it."""
    assert_same(halves([0, 1, 3]), halves([]))


def test_reset_touches_only_its_slots() -> None:
    """The others go on where they were; the one that is reset begins anew."""
    first, second = chirps(SECOND, 1), chirps(SECOND, 2)
    RUNNER.reset(range(N_SLOTS))
    run(RUNNER, step_of(0, first), step_of(1, first))
    RUNNER.reset([0])
    kept = ask(RUNNER, 1, second, start=SECOND)
    anew = ask(RUNNER, 0, second)
    assert_same(kept, fresh(np.concatenate([first, second])))
    assert_same(anew, fresh(second))


def test_a_new_owner_begins_anew() -> None:
    """A slot that changed hands without a reset does not hear the stream before."""
    RUNNER.reset([1])
    run(RUNNER, step_of(1, chirps(SECOND, 1), owner=7))
    (anew,) = run(RUNNER, step_of(1, chirps(SECOND, 2), FORK, start=0, owner=8))
    assert_same(anew, fresh(chirps(SECOND, 2)))


@pytest.mark.parametrize("window_s", [5.0, 9.26, 12.0])
def test_a_window_of_a_long_stream_is_as_of_a_fresh_slot(window_s: float) -> None:
    """Old frames were evicted; a slot that began a margin before the window hears the same in it."""
    pcm = chirps(14 * SECOND)
    window_start = int(window_s * SECOND) // 320 * 320
    fork = Fork("transcript", window_start, (), "", "en", 16)
    RUNNER.reset([1])
    end = min(len(pcm), window_start + 3 * SECOND)
    for at in range(0, end, 7000):
        run(RUNNER, step_of(1, pcm[at : min(at + 7000, end)], start=at))
    old = ask(RUNNER, 1, pcm[:0], fork, start=end)
    begin = window_start - MARGIN
    assert old.words
    assert_same(old, fresh(pcm[begin:end], fork, start=begin))


def test_a_jump_ahead_forgets_the_past() -> None:
    """Audio that was left out in a long silence does not shift what comes after it."""
    RUNNER.reset([1])
    run(RUNNER, step_of(1, chirps(SECOND, 1)))
    start = 60 * SECOND - MARGIN
    fork = Fork("transcript", 60 * SECOND, (), "", "en", 16)
    pcm = chirps(2 * SECOND, 2)
    assert_same(ask(RUNNER, 1, pcm, fork, start=start), fresh(pcm, fork, start=start))


def test_words_lie_inside_the_window() -> None:
    """In order, with a probability, whatever is heard; no empty word, no punctuation alone."""
    for seed in range(6):
        pcm = chirps(20_000 + 7 * seed, seed)
        words = fresh(pcm, Fork("transcript", 320, (), "", None, 24)).words
        edges = [edge for word in words for edge in (word.start, word.end)]
        assert edges == sorted(edges)
        assert all(320 <= edge <= len(pcm) for edge in edges)
        assert all(0.0 < word.confidence <= 1.0 for word in words)
        assert all(
            any(c.isalnum() or ord(c) > 127 for c in word.text) for word in words if word.text.isascii()
        )


def test_padding_in_full_is_another_way_to_the_same_interface() -> None:
    """A full window needs no padding, so both ways say the same there."""
    pcm = chirps(4 * SECOND)
    assert_same(ask(new_runner(pads_fully=True), 0, pcm), fresh(pcm))


@pytest.mark.parametrize(
    ("least_score", "seconds", "language", "n_padded"),
    [(1.1, 3.5, None, 1), (1.1, 2.9, None, 0), (1.1, 3.5, "en", 0), (0.0, 3.5, None, 0)],
    ids=["unsure", "too short to settle", "told", "sure"],
)
def test_an_unsure_language_is_decided_by_the_padded_encoder(
    monkeypatch: pytest.MonkeyPatch, least_score: float, seconds: float, language: str | None, n_padded: int
) -> None:
    """And what is said then is what the padded encoder hears; nothing else is encoded twice."""
    monkeypatch.setattr(whisper_runner, "UNSURE_LANGUAGE", least_score)
    pcm = chirps(int(seconds * SECOND))
    fork = dataclasses.replace(FORK, language=language)
    expected = ask(new_runner(pads_fully=bool(n_padded)), 0, pcm, fork)
    n_calls = 0
    encode = CHECKPOINT.model.encoder.forward

    def counted(*args: Any) -> torch.Tensor:
        nonlocal n_calls
        n_calls += 1
        return encode(*args)

    monkeypatch.setattr(CHECKPOINT.model.encoder, "forward", counted)
    assert_same(fresh(pcm, fork), expected)
    assert n_calls == n_padded


def test_warming_up_leaves_nothing_behind() -> None:
    """The first stream hears itself alone."""
    runner = new_runner()
    warm_up(runner, N_SLOTS)
    assert_same(ask(runner, 0, chirps(SECOND)), fresh(chirps(SECOND)))


def test_capabilities_are_the_checkpoints() -> None:
    """Name, languages, window."""
    capabilities = RUNNER.capabilities
    assert capabilities.model == "tiny"
    assert capabilities.languages == ("en", "zh", "de", "ko")
    assert capabilities.max_window_s == 4.0


@pytest.mark.parametrize(
    ("scores", "no_speech", "expected"),
    [
        ((), 0.0, True),
        ((-3.0, -3.0), 0.99, True),
        ((-0.1, -0.1), 0.99, False),
        ((-3.0, -3.0), 0.0, False),
    ],
)
def test_text_is_taken_for_invented_when_the_model_doubts_twice(
    scores: tuple[float, ...], no_speech: float, expected: bool
) -> None:
    """That anybody spoke, and what was said."""
    assert 0.0 < NO_SPEECH < 0.99
    n = len(scores)
    decoded = Decoded(tuple(range(n)), scores, tuple(range(n + 1)), "en", 1.0, no_speech, 0)
    assert is_invented(decoded) is expected


def test_sounds_are_scored_with_and_without_forks() -> None:
    """Every slot that got audio has its rows, the same beside words as alone; a reset begins anew."""
    scorer = SoundScorer(load_yamnet(), load_weights(), EventsConfig(labels=["Speech", "Music"]), N_SLOTS)
    runner = WhisperRunner(
        CHECKPOINT, N_SLOTS, device=CPU, dtype=torch.float32, pads_fully=False, sounds=scorer
    )
    assert [sound.name for sound in runner.capabilities.sounds] == ["Speech", "Music"]
    assert runner.capabilities.tasks == ("transcript", "events")
    pcm = chirps(2 * SECOND)
    beside, alone = runner.step(StepPlan((step_of(0, pcm, FORK), step_of(1, pcm))))
    assert beside.hypothesis is not None
    assert alone.hypothesis is None
    assert alone.found.sounds is not None
    assert alone.found.sounds.start == 0
    assert beside.found == alone.found
    (more,) = runner.step(StepPlan((step_of(1, pcm[:5000], start=len(pcm)),)))
    assert more.found.sounds is not None
    assert more.found.sounds.start == len(alone.found.sounds.rows(2)) * SOUND_FRAME
    (nothing,) = runner.step(StepPlan((step_of(1, pcm[:0], start=len(pcm) + 5000),)))
    assert nothing.found.sounds is None
    runner.reset([1])
    (again,) = runner.step(StepPlan((step_of(1, pcm),)))
    assert again.found == alone.found
    (without,) = RUNNER.step(StepPlan((step_of(0, pcm),)))
    assert without.found.sounds is None


def spanning(start: int, end: int, least_speech: int = SECOND) -> Fork:
    """A fork that asks for the language of its newest speech too."""
    return dataclasses.replace(FORK, language_span=LanguageSpan(start, end, least_speech))


def test_the_language_of_the_newest_speech_is_estimated() -> None:
    """Of every language a probability; the words are as without."""
    pcm = chirps(3 * SECOND)
    hypothesis = fresh(pcm, spanning(SECOND, 3 * SECOND))
    assert_same(hypothesis, fresh(pcm))
    estimate = hypothesis.estimate
    assert estimate is not None
    assert (estimate.start, estimate.end) == (SECOND, 3 * SECOND)
    assert {code for code, _ in estimate.scores} == set(RUNNER.capabilities.languages)
    assert sum(score for _, score in estimate.scores) == pytest.approx(1.0, abs=1e-4)
    scores = [score for _, score in estimate.scores]
    assert scores == sorted(scores, reverse=True)
    assert 0.0 <= estimate.no_speech <= 1.0


def test_an_estimate_looks_at_its_span_alone() -> None:
    """What a window of nothing else gives; neighbours in the batch, of any length, change nothing."""
    pcm = chirps(3 * SECOND)
    alone = fresh(pcm, spanning(SECOND, 3 * SECOND)).estimate
    other = fresh(chirps(4 * SECOND, seed=1), spanning(0, 4 * SECOND)).estimate
    runner = new_runner()
    together = run(
        runner,
        step_of(0, pcm, spanning(SECOND, 3 * SECOND)),
        step_of(1, chirps(2 * SECOND, seed=2), FORK),
        step_of(2, chirps(4 * SECOND, seed=1), spanning(0, 4 * SECOND)),
    )
    assert together[1].estimate is None
    for ours, theirs in ((together[0].estimate, alone), (together[2].estimate, other)):
        assert ours is not None
        assert theirs is not None
        assert [code for code, _ in ours.scores] == [code for code, _ in theirs.scores]
        assert [p for _, p in ours.scores] == pytest.approx([p for _, p in theirs.scores], abs=1e-4)


def test_too_little_speech_has_no_estimate() -> None:
    """It would be a guess."""
    assert fresh(chirps(SECOND), spanning(0, SECOND, 2 * SECOND)).estimate is None
