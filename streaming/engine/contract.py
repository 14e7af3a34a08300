"""What the scheduler asks of a runner, and what it gets back.

Contracts only: no tensor library is imported here. Positions are samples at 16 kHz since the
stream's first one; audio is float32 mono in [-1, 1]. What is a msgspec struct here goes from the
engine's process to the server and into the timeline as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

Pcm = NDArray[np.float32]  # [n_samples], 16 kHz mono

Task = Literal["transcript", "events", "emotion", "answer"]

SOUND_FRAME = 1280  # samples of one row of `SoundScores`: 80 ms, the encoder's 12.5 Hz


class SoundLabel(msgspec.Struct, frozen=True, array_like=True):
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
    sounds: tuple[SoundLabel, ...] = ()  # columns of `SoundScores`; empty: it answers `events` forks instead
    events_every_s: float = 0.64  # how often it should look for events: what an `events` fork costs
    answer_tokens: int = 192  # the longest answer to a question, its thinking included
    language_every_s: float = 0.0  # how often to have the language of new speech estimated; 0: it cannot


class TimedWord(msgspec.Struct, frozen=True, array_like=True):
    """A word of a hypothesis or of the committed text, with its place on the stream's clock."""

    text: str  # as it is joined to the text before it with a space
    start: int  # samples
    end: int  # samples
    confidence: float  # probability, 0 to 1

    @property
    def middle(self) -> int:
        """Which window the word belongs to: runner, scheduler and timeline must agree on it."""
        return (self.start + self.end) // 2


@dataclass(frozen=True, slots=True)
class LanguageSpan:
    """Audio in which the language of the newest speech is estimated. Positions in samples."""

    start: int
    end: int  # where speech ended, or the live edge
    least_speech: int  # samples; with less there is no estimate


@dataclass(frozen=True, slots=True)
class Fork:
    """One question on one slot's audio, answered and forgotten."""

    task: Task
    # The audio from this sample on is looked at. That of an `emotion` fork lies inside the window of
    # the `transcript` fork that always stands before it, so that one encoding serves both.
    window_start: int
    prefix: tuple[TimedWord, ...]  # committed words inside the window; the answer continues them
    context: str  # text before the window, for the model's orientation only
    language: str | None  # None: detect
    max_tokens: int
    question: str = ""  # of an `answer` fork, in the asker's words
    language_span: LanguageSpan | None = None  # of a `transcript` fork: whose language is estimated too

    @property
    def prefix_texts(self) -> tuple[str, ...]:
        """The texts of `prefix`."""
        return tuple(word.text for word in self.prefix)


@dataclass(frozen=True, slots=True)
class SlotStep:
    """What one slot gets in one step. Where the runner scores sounds, it does so with or without forks."""

    slot_idx: int
    owner: int  # the stream that held the slot when this was planned
    start: int  # position of `pcm`; a jump ahead of the slot's position makes it forget the past
    pcm: Pcm  # samples not given before
    forks: tuple[Fork, ...]  # of each task at most one

    @property
    def end(self) -> int:
        """The live edge: position of the sample after `pcm`."""
        return self.start + len(self.pcm)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything due this tick."""

    slots: tuple[SlotStep, ...]


@dataclass(frozen=True, slots=True)
class LanguageEstimate:
    """Which language the newest speech of a fork's `language_span` is in. Positions in samples."""

    start: int  # of the speech that was looked at
    end: int
    scores: tuple[tuple[str, float], ...]  # probabilities of the likeliest languages, best first
    no_speech: float  # probability that there is no speech, 0 to 1
    pauses: tuple[tuple[int, int], ...]  # in the whole span, oldest first: where from and where to


class LanguageDoubt(msgspec.Struct, frozen=True, array_like=True):
    """Evidence that a stream's language is another one; goes to the server so that a restart has it."""

    language: str  # the likeliest other one
    evidence: float  # natural logarithm of how much likelier it is
    since: int  # samples; where its speech probably begins
    weighed_to: int  # samples; the end of the newest audio that counted


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What a transcript fork found: what follows the prefix."""

    words: tuple[TimedWord, ...]
    language: str | None
    no_speech: float  # probability that the window holds no speech, 0 to 1
    n_repetitions_cut: int  # by the loop guard
    estimate: LanguageEstimate | None = None  # where the fork has a `language_span` with enough speech


class SoundScores(msgspec.Struct, frozen=True, array_like=True):
    """How sure each sound is, on the 12.5 Hz grid, for audio of which more can no longer change it.

    Rows follow one another over the steps without a gap, from the first that can be known after the
    slot began; frame i of the grid is the audio from `SOUND_FRAME` i on. A row depends on the audio
    around it alone, at most 2.5 s back: after a restart the same rows come again.
    """

    start: int  # samples, a multiple of SOUND_FRAME: where the first row begins
    scores: bytes  # [n_frames, n_labels] uint8, row by row, in 255ths; at least one row
    # [n_frames] uint8: how sure a voice is, whether or not that is one of the labels; empty: not known.
    voice: bytes = b""

    @staticmethod
    def of(
        start: int, scores: NDArray[np.float32], voice: NDArray[np.float32] | None = None
    ) -> SoundScores | None:
        """Pack scores [n_frames, n_labels] and `voice` [n_frames] of 0 to 1; None where there is no row."""
        if not len(scores):
            return None
        return SoundScores(start, _packed(scores), b"" if voice is None else _packed(voice))

    def rows(self, n_labels: int) -> NDArray[np.uint8]:
        """The scores [n_frames, n_labels], in 255ths."""
        return np.frombuffer(self.scores, np.uint8).reshape(-1, n_labels)


def _packed(scores: NDArray[np.float32]) -> bytes:
    """Scores of 0 to 1 in 255ths, row by row."""
    assert not scores.size or 0.0 <= scores.min() <= scores.max() <= 1.0, (scores.min(), scores.max())
    packed: bytes = np.rint(scores * 255.0).astype(np.uint8).tobytes()
    return packed


class SoundEvent(msgspec.Struct, frozen=True, array_like=True):
    """A sound that a model named, with its place on the stream's clock."""

    label: str  # from a closed list, or the model's own words
    start: int  # samples
    end: int  # samples
    score: float  # probability, 0 to 1


class SoundEvents(msgspec.Struct, frozen=True, array_like=True):
    """What an events fork found in its window, in the order they begin."""

    window_start: int  # samples
    window_end: int  # samples; an event that ends here may continue
    stable_end: int  # samples; what rests on audio before this no longer changes with more audio
    events: tuple[SoundEvent, ...]


class EmotionEstimate(msgspec.Struct, frozen=True, array_like=True):
    """What an emotion fork found in its window."""

    start: int  # samples
    end: int  # samples
    label: str | None  # from a closed list; None where the model named none of it
    score: float  # probability of the label, 0 to 1
    scores: dict[str, float]  # of every label, where the model scores them
    valence: float | None  # -1 (unpleasant) to 1, where derivable
    arousal: float | None  # -1 (calm) to 1, where derivable
    traits: dict[str, str]  # what the model said of the voice: name, description


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What an answer fork found."""

    start: int  # samples: the audio it is about
    end: int
    text: str
    thinking: str = ""  # what the model wrote down before it answered, where it does
    is_cut: bool = False  # it did not end by itself: its budget ran out, or it repeated itself


class Findings(msgspec.Struct, frozen=True):
    """What a step found beside words in one slot; None where nothing was asked or nothing is complete."""

    sounds: SoundScores | None = None
    events: SoundEvents | None = None
    emotion: EmotionEstimate | None = None
    answer: Answer | None = None

    def or_else(self, earlier: Findings) -> Findings:
        """These, and what was found at an earlier try of the same point."""
        return Findings(
            self.sounds or earlier.sounds,
            self.events or earlier.events,
            self.emotion or earlier.emotion,
            self.answer or earlier.answer,
        )


@dataclass(frozen=True, slots=True)
class SlotResult:
    """What a step found in one slot."""

    hypothesis: Hypothesis | None = None  # None: no transcript was asked for
    found: Findings = field(default_factory=Findings)

    @property
    def words(self) -> tuple[TimedWord, ...]:
        """Of the hypothesis, if there is one."""
        return () if self.hypothesis is None else self.hypothesis.words


class Runner(Protocol):
    """One model on one device, serving `n_slots` live streams."""

    capabilities: Capabilities

    def step(self, plan: StepPlan) -> tuple[SlotResult, ...]:
        """Everything due this tick, batched: a result for each slot of the plan, in its order."""

    def reset(self, slots: Sequence[int]) -> None:
        """Forget; the other slots are untouched."""
