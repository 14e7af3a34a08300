"""Words are those that somebody said: a sure word or a voice, or enough of both."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.engine.contract import SOUND_FRAME, Findings, SoundScores, TimedWord
from streaming.engine.messages import PointKind, Result
from streaming.protocol import TranscriptDelta, TranscriptInterim
from streaming.timeline.evidence import KEPT_ROWS, Voices, credible
from streaming.timeline.transcript import Timeline, TimelineState
from tests.streaming.timeline.test_transcript import CONFIG, SECOND, committed

NOBODY, SOMEBODY = 10, 250  # scores of a voice in 255ths


def word(text: str, start_s: float, end_s: float, confidence: float) -> TimedWord:
    """A word of a hypothesis."""
    return TimedWord(text, int(start_s * SECOND), int(end_s * SECOND), confidence)


def rows(*spans: tuple[float, int], start: int = 0) -> SoundScores:
    """Seconds and the score of a voice in them, one after another."""
    voice = b"".join(bytes([score]) * round(seconds * SECOND / SOUND_FRAME) for seconds, score in spans)
    return SoundScores(start, bytes(len(voice)), voice)


def voices(*spans: tuple[float, int]) -> Voices:
    """What was heard."""
    found = Voices()
    found.push(rows(*spans))
    return found


# What the default model said over clips that are not in the tests: text, confidence, no speech; voice.
INVENTED = [
    ("you", [0.02], 0.81, 0.69),  # fire
    ("video is about to end.", [0.10, 0.16, 0.10, 0.14, 0.41], 0.78, 0.50),  # a helicopter
    ("Thank you.", [0.02, 0.84], 0.80, 0.19),  # a clock
    ("NOOOOO!", [0.19], 0.49, 0.24),  # a rooster
    ("BAH!", [0.29], 0.65, 0.03),  # a dog
    ("Pfft!", [0.30], 0.62, 0.00),  # a sneeze
    ("ございます。", [0.71], 0.66, 0.09),  # a kitchen
]
SAID = [
    ("It was", [0.9, 0.95], 0.02, 0.98),  # clean
    ("judges and", [0.25, 0.30], 0.19, 0.90),  # in noise: unsure words, a sure voice
    ("And then", [0.80, 0.90], 0.05, 0.02),  # so quiet that no voice is found
    ("added", [0.45], 0.06, 0.75),  # both in doubt
]


@pytest.mark.parametrize(("text", "confidences", "no_speech", "voice"), INVENTED)
def test_what_nobody_said_is_no_word(
    text: str, confidences: list[float], no_speech: float, voice: float
) -> None:
    """Rain, animals and engines, as they were heard."""
    words = [
        word(part, 2 + i / 4, 2.25 + i / 4, c)
        for i, (part, c) in enumerate(zip(text.split(), confidences, strict=True))
    ]
    assert credible(words, voices((6.0, round(voice * 255))), no_speech) == []


@pytest.mark.parametrize(("text", "confidences", "no_speech", "voice"), SAID)
def test_what_was_said_is_a_word(text: str, confidences: list[float], no_speech: float, voice: float) -> None:
    """Clean, noisy and quiet speech, as it was heard."""
    words = [
        word(part, 2 + i / 4, 2.25 + i / 4, c)
        for i, (part, c) in enumerate(zip(text.split(), confidences, strict=True))
    ]
    assert credible(words, voices((6.0, round(voice * 255))), no_speech) == list(range(len(words)))


def test_each_phrase_is_decided_by_its_own_time() -> None:
    """Words over rain before a sentence go, the sentence stays; its one unsure word stays with it."""
    words = [
        word("Thank", 1.0, 1.4, 0.1),
        word("you.", 1.4, 1.6, 0.3),
        word("They", 4.0, 4.2, 0.9),
        word("erm", 4.2, 4.4, 0.05),
        word("left.", 4.4, 4.8, 0.8),
    ]
    assert credible(words, voices((3.0, NOBODY), (3.0, SOMEBODY)), 0.3) == [2, 3, 4]


def test_without_sounds_the_words_must_do() -> None:
    """Unsure words go where the model doubts that anybody spoke; a model that never doubts keeps all."""
    words = [word("you", 1.0, 2.0, 0.1)]
    assert credible(words, Voices(), 0.8) == []
    assert credible(words, Voices(), 0.0) == [0]
    assert credible([word("you", 1.0, 2.0, 0.6)], Voices(), 0.8) == [0]


def test_rows_that_are_not_there_yet_are_told_by_the_newest() -> None:
    """A flush comes before the rows of its last words."""
    heard = voices((2.0, NOBODY), (1.0, SOMEBODY))
    assert heard.between(5 * SECOND, 6 * SECOND) == SOMEBODY / 255
    assert heard.between(0, SECOND) == NOBODY / 255


@given(st.lists(st.integers(0, 255), min_size=1, max_size=900), st.lists(st.integers(1, 900), max_size=9))
def test_how_rows_come_changes_nothing(scores: list[int], cuts: list[int]) -> None:
    """In pieces, again after a restart, or through a saved state: the same newest rows are known."""
    whole, pieces = Voices(), Voices()
    whole.push(SoundScores(0, bytes(len(scores)), bytes(scores)))
    ends = sorted({*(cut for cut in cuts if cut < len(scores)), len(scores)})
    for end in ends:
        begin = max(0, end - 300) if end > 300 else 0  # rows come again from before
        known = ends[ends.index(end) - 1] if ends.index(end) else 0
        begin = min(begin, known)
        pieces.push(SoundScores(begin * SOUND_FRAME, bytes(end - begin), bytes(scores[begin:end])))
        pieces = Voices(pieces.snapshot())
    assert pieces.snapshot() == whole.snapshot()
    assert len(whole.snapshot().rows) == min(len(scores), KEPT_ROWS)


def test_a_jump_forgets() -> None:
    """What was before a gap says nothing of what is behind it."""
    heard = voices((2.0, SOMEBODY))
    heard.push(rows((1.0, NOBODY), start=100 * SOUND_FRAME))
    assert heard.snapshot().start == 100 * SOUND_FRAME
    assert heard.between(100 * SOUND_FRAME, 101 * SOUND_FRAME) == NOBODY / 255


def found(
    point_s: float, words: list[TimedWord], kind: PointKind, sounds: SoundScores, no_speech: float = 0.7
) -> Result:
    """What an engine says at a point, with rows of sounds."""
    point = int(point_s * SECOND)
    return Result(1, point, kind, tuple(words), "en", no_speech, 0, 0.0, found=Findings(sounds))


def test_invented_words_are_neither_shown_nor_committed() -> None:
    """At a tick, where speech stops, and at a flush."""
    kinds: tuple[PointKind, ...] = ("tick", "tick", "tick", "speech_stop", "flush")
    timeline = Timeline(CONFIG)
    for i, kind in enumerate(kinds):
        words = [word("Thank", 1.0, 1.5, 0.02), word("you.", 1.5, 2.0, 0.8)]
        applied = timeline.apply(found(3.0 + i, words, kind, rows((3.0 + i, NOBODY))))
        assert applied.n_committed == 0
        assert not applied.messages


def test_words_behind_invented_ones_are_committed_without_them() -> None:
    """The engine is told which of its words nobody said; a saved timeline goes on alike."""
    words = [word("you", 1.0, 1.5, 0.02), word("They", 4.0, 4.2, 0.9), word("left.", 4.2, 4.5, 0.9)]
    timeline = Timeline(CONFIG)
    sounds = rows((3.0, NOBODY), (3.0, SOMEBODY))
    shown = timeline.apply(found(6.0, words, "tick", sounds))
    assert [m.text for m in shown.messages if isinstance(m, TranscriptInterim)] == ["They left."]
    state = msgspec.msgpack.decode(msgspec.msgpack.encode(timeline.snapshot()), type=TimelineState)
    for going_on in (timeline, Timeline(CONFIG, state=state)):
        applied = going_on.apply(found(7.0, words, "speech_stop", sounds))
        assert committed(list(applied.messages)) == ["They", "left."]
        assert (applied.n_committed, applied.unsaid) == (3, (0,))
        assert sum(isinstance(m, TranscriptDelta) for m in applied.messages) == 1
