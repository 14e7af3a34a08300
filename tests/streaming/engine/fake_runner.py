"""A runner that reads words off the samples of `recording`s, and holds the scheduler to its contract.

Sounds, emotions and answers are checksums of the audio they are about, so that they show what was
looked at.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from streaming.engine.contract import (
    SOUND_FRAME,
    Answer,
    Capabilities,
    EmotionEstimate,
    Findings,
    Fork,
    Hypothesis,
    LanguageEstimate,
    LanguageSpan,
    Pcm,
    SlotResult,
    SlotStep,
    SoundEvent,
    SoundEvents,
    SoundScores,
    StepPlan,
    TimedWord,
)
from streaming.engine.stream_state import MARGIN
from streaming.engine.task_schedule import TRANSCRIPT_ONLY, TaskSchedule
from streaming.protocol import SAMPLE_RATE_HZ
from tests.streaming.engine.recording import GRID, UNIT

HOP = 160  # samples; a runner can begin on no finer grid
FRAGMENT = 320  # samples; less of a run, at a window's start, is not heard
LONGEST_WINDOW_S = 7.0  # what the runner can look at
SOUND_PAST = 2 * SAMPLE_RATE_HZ  # samples that a row of sound scores looks back on ...
SOUND_DELAY = SAMPLE_RATE_HZ * 3 // 5  # ... and how long it is waited for
SCORED = TaskSchedule(sound_ticks=1, emotion_ticks=4)  # as a model that scores sounds row by row
# As one that names them when asked.
NAMED = TaskSchedule(
    sound_ticks=4, events_ticks=4, emotion_ticks=6, reach=int(LONGEST_WINDOW_S * SAMPLE_RATE_HZ)
)
# As one that estimates languages: six words in one, six in the next.
MULTILINGUAL = TaskSchedule(sound_ticks=1, language_ticks=2)
WORDS_OF_A_LANGUAGE = 6
LANGUAGES = ("en", "de", "fr")
task_schedules = st.sampled_from([TRANSCRIPT_ONLY, SCORED, NAMED, MULTILINGUAL])


@dataclass(frozen=True)
class Asked:
    """One question that the runner got."""

    point: int
    fork: Fork
    window: int  # checksum of the audio that was looked at


@dataclass
class _Slot:
    owner: int
    start: int
    pcm: Pcm
    next_row: int = 0  # of sound scores, by position

    @property
    def end(self) -> int:
        return self.start + len(self.pcm)


class FakeRunner:
    """Hears the runs of its window, and holds the scheduler to the runner's contract."""

    capabilities = Capabilities("fake", ("transcript",), ("en",), 30.0)

    def __init__(self, tasks: TaskSchedule = TRANSCRIPT_ONLY) -> None:
        self.asked: dict[int, Asked] = {}  # the last transcript fork of each owner
        self._tasks = tasks
        self._slots: dict[int, _Slot] = {}

    def step(self, plan: StepPlan) -> tuple[SlotResult, ...]:
        """What a pure function of window and prefix makes of them."""
        assert len({step.slot_idx for step in plan.slots}) == len(plan.slots)
        return tuple(self._step(step) for step in plan.slots)

    def _step(self, step: SlotStep) -> SlotResult:
        slot = self._take(step)
        hypothesis, found = None, Findings()
        if self._tasks.sound_ticks and not self._tasks.events_ticks:
            found = Findings(self._score(slot))
        for fork in step.forks:
            about = slot.pcm[fork.window_start - slot.start :]
            text = f"{fork.task}-{zlib.crc32(about.tobytes()):08x}"
            span = (fork.window_start, slot.end)
            match fork.task:
                case "transcript":
                    hypothesis = self._hear(step, slot, fork)
                case "events":
                    events = SoundEvents(*span, slot.end, (SoundEvent(text, *span, 1.0),))
                    found = Findings(events=events).or_else(found)
                case "emotion":
                    assert step.forks[0].task == "transcript"
                    assert fork.window_start >= step.forks[0].window_start
                    emotion = EmotionEstimate(*span, text, 1.0, {}, None, None, {})
                    found = Findings(emotion=emotion).or_else(found)
                case "answer":
                    found = Findings(answer=Answer(*span, text, fork.question)).or_else(found)
        return SlotResult(hypothesis, found)

    def asked_at(self, owner: int) -> int | None:
        """Where the last transcript fork of an owner was."""
        return self.asked[owner].point if owner in self.asked else None

    def reset(self, slots: Sequence[int]) -> None:
        """Forget."""
        for slot_idx in slots:
            self._slots.pop(slot_idx, None)

    def _take(self, step: SlotStep) -> _Slot:
        slot = self._slots.get(step.slot_idx)
        if slot is None or slot.owner != step.owner:
            slot = self._begin(step)
        elif step.start == slot.end:
            slot.pcm = np.concatenate([slot.pcm, step.pcm])
        else:
            assert step.start > slot.end, "a jump goes ahead"
            assert not self._tasks.sound_ticks, "what hears everything misses nothing"
            slot = self._begin(step)
        self._slots[step.slot_idx] = slot
        assert slot.start % HOP == 0
        return slot

    @staticmethod
    def _begin(step: SlotStep) -> _Slot:
        known = step.start + SOUND_PAST if step.start else 0
        return _Slot(step.owner, step.start, step.pcm, -(-known // SOUND_FRAME) * SOUND_FRAME)

    @staticmethod
    def _score(slot: _Slot) -> SoundScores | None:
        """One label, whose score is a checksum of what the row looks at."""
        start, rows = slot.next_row, []
        while slot.next_row + SOUND_DELAY <= slot.end:
            first = max(0, slot.next_row - SOUND_PAST) - slot.start
            about = slot.pcm[first : slot.next_row + SOUND_DELAY - slot.start]
            rows.append(zlib.crc32(about.tobytes()) % 256 / 255)
            slot.next_row += SOUND_FRAME
        return SoundScores.of(start, np.array(rows, np.float32).reshape(-1, 1))

    def _hear(self, step: SlotStep, slot: _Slot, fork: Fork) -> Hypothesis:
        assert fork.window_start % GRID == 0
        assert slot.start <= max(0, fork.window_start - MARGIN), "the first mel frames look before the window"
        assert slot.end - fork.window_start <= LONGEST_WINDOW_S * SAMPLE_RATE_HZ
        window = slot.pcm[fork.window_start - slot.start :]
        self.asked[step.owner] = Asked(slot.end, fork, zlib.crc32(window.tobytes()))
        heard = runs(window, fork.window_start)[len(fork.prefix) :]
        language, estimate = fork.language or LANGUAGES[0], None
        if fork.language_span is not None:
            assert self._tasks.language_ticks
            estimate = estimate_language(slot, fork.language_span)
        return Hypothesis(tuple(heard), language, 0.0, 0, estimate)


def language_of(word: str) -> str:
    """The language that a word of a recording is in."""
    number = int(word[1:].split("x")[0])
    return LANGUAGES[(number - 1) // WORDS_OF_A_LANGUAGE % len(LANGUAGES)]


def estimate_language(slot: _Slot, span: LanguageSpan) -> LanguageEstimate | None:
    """By the samples of the newest second of a span."""
    assert slot.start <= span.start <= span.end <= slot.end
    if span.end - span.start < SAMPLE_RATE_HZ:
        return None
    start = span.end - SAMPLE_RATE_HZ
    found = runs(slot.pcm[start - slot.start : span.end - slot.start], start)
    n_samples = dict.fromkeys(LANGUAGES, 0)
    for word in found:
        n_samples[language_of(word.text)] += word.end - word.start
    total = max(1, sum(n_samples.values()))
    scores = sorted(
        ((code, n / total) for code, n in n_samples.items()), key=lambda item: (-item[1], item[0])
    )
    pauses = [
        (before.end, after.start) for before, after in itertools.pairwise(found) if after.start > before.end
    ]
    return LanguageEstimate(start, span.end, tuple(scores), 0.0 if found else 1.0, tuple(pauses))


def runs(window: Pcm, start: int) -> list[TimedWord]:
    """The words of a window; the text of one that goes on at the live edge tells how much of it came."""
    edges = [0, *(np.flatnonzero(np.diff(window)) + 1).tolist(), len(window)]
    found = []
    for first, last in itertools.pairwise(edges):
        if window[first : first + 1].any() and (first > 0 or last > FRAGMENT):
            number = round(float(window[first]) / UNIT)
            text = f"w{number}" if last < len(window) else f"w{number}x{last - first}"
            found.append(TimedWord(text, start + first, start + last, 1.0))
    return found
