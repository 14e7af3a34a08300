"""What the scheduler asks of a runner, and what it gets back.

Contracts only: no tensor library is imported here. Positions are samples at 16 kHz since the
stream's first one; audio is float32 mono in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

Pcm = NDArray[np.float32]  # [n_samples], 16 kHz mono

Task = Literal["transcript", "events", "emotion", "answer"]

SOUND_FRAME = 1280  # samples of one row of `SoundScores`: 80 ms, the encoder's 12.5 Hz


@dataclass(frozen=True, slots=True)
class SoundLabel:
    """A kind of sound that a model scores on the 12.5 Hz grid."""

    name: str
    parent: str | None  # the more general label it belongs to, where that is scored too
    threshold: float  # the score from which the sound is there, 0 to 1


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model can be asked."""

    model: str
    tasks: tuple[Task, ...]
    languages: tuple[str, ...]  # codes a stream may be set to; empty where it cannot be set
    max_window_s: float  # audio the model can look at in one go
    min_tick_s: float  # asking more often than this gives nothing
    sounds: tuple[SoundLabel, ...] = ()  # columns of `SoundScores`; empty: it answers `events` forks instead
    events_every_s: float = 0.64  # how often it should look for events: what an `events` fork costs
    answer_tokens: int = 192  # the longest answer to a question, its thinking included


class HeardWord(msgspec.Struct, frozen=True, array_like=True):
    """A word of a hypothesis or of the committed text, with its place on the stream's clock.

    The one type here that also goes between server and engine process as it is.
    """

    text: str  # as it is joined to the text before it with a space
    start: int  # samples
    end: int  # samples
    score: float  # probability, 0 to 1

    @property
    def middle(self) -> int:
        """Which window the word belongs to: runner, scheduler and timeline must agree on it."""
        return (self.start + self.end) // 2


@dataclass(frozen=True, slots=True)
class Fork:
    """One question on one slot's audio, answered and forgotten."""

    task: Task
    # The audio from this sample on is looked at. That of an `emotion` fork lies inside the window of
    # the `transcript` fork that always stands before it, so that one encoding serves both.
    window_start: int
    prefix: tuple[HeardWord, ...]  # agreed on already, inside the window; the answer goes on from them
    context: str  # text before the window, for the model's orientation only
    language: str | None  # None: detect
    max_tokens: int
    question: str = ""  # of an `answer` fork, in the asker's words

    @property
    def agreed(self) -> tuple[str, ...]:
        """The texts of `prefix`."""
        return tuple(word.text for word in self.prefix)


@dataclass(frozen=True, slots=True)
class SlotStep:
    """What one slot gets in one step. Where the runner scores sounds, it does so with or without forks."""

    slot_idx: int
    owner: int  # the stream that held the slot when this was planned
    start: int  # position of `pcm`; a jump ahead of what the slot has heard makes it forget the past
    pcm: Pcm  # samples not given before
    forks: tuple[Fork, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything due this tick."""

    slots: tuple[SlotStep, ...]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What a transcript fork found: what follows the agreed prefix."""

    slot_idx: int
    owner: int
    words: tuple[HeardWord, ...]
    stable_end: int  # samples; what rests on audio before this no longer changes with more audio
    language: str | None
    language_score: float  # probability of `language`; 1 where it was set
    no_speech: float  # probability that the window holds no speech, 0 to 1
    n_loops_cut: int  # repetitions the guard removed


@dataclass(frozen=True, slots=True)
class SoundScores:
    """How sure each sound is, on the 12.5 Hz grid, for audio of which more can no longer change it.

    Rows follow one another over the steps without a gap, from the first that can be known after the
    slot began; frame i of the grid is the audio from `SOUND_FRAME` i on. A row depends on the audio
    around it alone, at most 2.5 s back: after a restart the same rows come again.
    """

    slot_idx: int
    owner: int
    start: int  # samples, a multiple of SOUND_FRAME: where the first row begins
    scores: NDArray[np.float32]  # [n_frames, n_labels], 0 to 1; may be empty


@dataclass(frozen=True, slots=True)
class HeardEvent:
    """A sound with its place on the stream's clock."""

    label: str  # from a closed list, or the model's own words
    start: int  # samples
    end: int  # samples
    score: float  # probability, 0 to 1


@dataclass(frozen=True, slots=True)
class HeardEvents:
    """What an events fork found in its window, in the order they begin."""

    slot_idx: int
    owner: int
    window_start: int  # samples
    window_end: int  # samples; an event that ends here may go on
    stable_end: int  # samples, as in `Hypothesis`
    events: tuple[HeardEvent, ...]


@dataclass(frozen=True, slots=True)
class HeardEmotion:
    """What an emotion fork found in its window."""

    slot_idx: int
    owner: int
    window_start: int  # samples
    window_end: int  # samples
    label: str | None  # from a closed list; None where the model named none of it
    score: float  # probability of the answer, 0 to 1
    scores: tuple[tuple[str, float], ...] = ()  # of every label, where the model scores them
    valence: float | None = None  # -1 (unpleasant) to 1, where derivable
    arousal: float | None = None  # -1 (calm) to 1, where derivable
    traits: tuple[tuple[str, str], ...] = ()  # what the model said of the voice: name, description


@dataclass(frozen=True, slots=True)
class HeardAnswer:
    """What an answer fork was told."""

    slot_idx: int
    owner: int
    text: str
    thinking: str  # what the model wrote down before it answered, where it does
    is_cut: bool  # it did not end by itself: its budget ran out, or it repeated itself


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the runner found: per task, fork by fork, in the order of the plan; sounds per slot."""

    hypotheses: tuple[Hypothesis, ...]
    events: tuple[HeardEvents, ...] = ()
    emotions: tuple[HeardEmotion, ...] = ()
    answers: tuple[HeardAnswer, ...] = ()
    sounds: tuple[SoundScores, ...] = ()  # per slot of the plan at most one, in its order


class Runner(Protocol):
    """One model on one device, serving `n_slots` live streams."""

    capabilities: Capabilities

    def step(self, plan: StepPlan) -> StepResult:
        """Everything due this tick, batched."""

    def reset(self, slots: Sequence[int]) -> None:
        """Forget; the other slots are untouched."""
