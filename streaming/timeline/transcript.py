"""From hypotheses to messages: what is shown, what is committed, when a segment closes.

Sound events and emotion have trackers of their own; here they take their place among the words.

Pure: no socket, no tensor, no clock but the sample count. Interim text may be replaced; committed
words never change and are never taken back.

A word is committed when enough updates in a row agree on it and on all before it, and its end lies
far enough behind the live edge; everything is committed when speech stops or a client flushes.
What was measured to choose this is in docs/measurements.md, section 4.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from streaming.config import EngineSettings, TranscriptConfig
from streaming.engine.contract import (
    EmotionEstimate,
    Findings,
    SoundEvents,
    SoundLabel,
    SoundScores,
    TimedWord,
)
from streaming.engine.messages import Result, extended
from streaming.protocol import (
    SAMPLE_RATE_HZ,
    Message,
    SpeechStarted,
    SpeechStopped,
    TranscriptDelta,
    TranscriptFinal,
    TranscriptInterim,
    Word,
    ms_of,
)
from streaming.text import comparable, ends_sentence, join_words, separator
from streaming.timeline.emotion import EmotionState, EmotionTracker
from streaming.timeline.evidence import Voices, VoiceState, credible
from streaming.timeline.scored_events import EventTracker

STALE = 8 * SAMPLE_RATE_HZ  # a word so far behind the live edge is committed as it was last heard
KEPT = 120 * SAMPLE_RATE_HZ  # committed words stay so long, for a restart's window; longer than any window


@dataclass(frozen=True, slots=True)
class Applied:
    """What a result led to."""

    messages: tuple[Message, ...]
    n_committed: int  # of the result's words, from the first on
    unsaid: tuple[int, ...] = ()  # indices of those among them that nobody said


class TimelineState(msgspec.Struct, frozen=True):
    """All that a timeline remembers; one that is given it goes on as the other would."""

    guesses: tuple[tuple[str, ...], ...] = ()
    interim: str = ""
    segment: tuple[TimedWord, ...] = ()
    kept: tuple[TimedWord, ...] = ()
    context: str = ""
    language: str | None = None
    speech_start: int = 0
    n_words: int = 0
    n_segments: int = 0
    sounds: Any = None  # of the trackers, as plain data
    emotion: Any = None
    voices: VoiceState = VoiceState()


class EventTracking(Protocol):
    """From scores or names of sounds to events that begin and end."""

    def snapshot(self) -> Any:
        """What a tracker needs to go on from here: plain data, or a msgspec struct of it."""

    def push(self, sounds: SoundScores) -> list[Message]:
        """Take rows of scores; rows already taken change nothing."""

    def named(self, events: SoundEvents) -> list[Message]:
        """Take what the model named in a window."""

    def finish(self, end: int) -> list[Message]:
        """End what is open: nothing follows after sample `end`."""


class EmotionTracking(Protocol):
    """From what each window sounds like to how the speaker feels."""

    def snapshot(self) -> Any:
        """As of a `EventTracking`."""

    def speech_started(self, start: int) -> None:
        """Somebody speaks since sample `start`."""

    def push(self, emotion: EmotionEstimate) -> list[Message]:
        """Take what a window sounds like."""

    def final(self, start_ms: int, end_ms: int) -> list[Message]:
        """A segment was closed: what it sounded like."""


def new_timeline(
    settings: EngineSettings,
    tasks: Sequence[str],
    sounds: Sequence[SoundLabel],
    state: TimelineState | None = None,
    *,
    event_prefix: str = "",
) -> Timeline:
    """A timeline with the trackers of what is wanted and what the model does.

    Args:
        settings: What is wanted.
        tasks: What the model does.
        sounds: Columns of its scores; empty where it names sounds itself or hears none.
        state: Of the timeline that this one goes on from; None: of a new stream.
        event_prefix: Of the ids of a new stream's events; of another one its own counts.
    """
    state = state or TimelineState()
    emotion = None if state.emotion is None else msgspec.convert(state.emotion, EmotionState)
    has_events = settings.events.enabled and "events" in tasks
    has_emotion = settings.emotion.enabled and "emotion" in tasks
    return Timeline(
        settings.transcript,
        EventTracker(settings.events, sounds, state.sounds, event_prefix) if has_events else None,
        EmotionTracker(settings.emotion, emotion) if has_emotion else None,
        state,
    )


class Timeline:
    """One stream's text, sounds and emotion, from its first sample to its last."""

    def __init__(
        self,
        config: TranscriptConfig,
        sounds: EventTracking | None = None,
        emotion: EmotionTracking | None = None,
        state: TimelineState = TimelineState(),  # noqa: B008  frozen
    ) -> None:
        """A timeline of a new stream, or one that goes on from a `snapshot()`; so do its trackers."""
        self._config = config
        self._sounds = sounds  # None: no events are wanted
        self._emotion = emotion  # None: no emotion is wanted
        self._commit_delay = int(config.commit_delay_s * SAMPLE_RATE_HZ)
        self._unsure_delay = max(self._commit_delay, int(config.unsure_commit_delay_s * SAMPLE_RATE_HZ))
        self._max_segment = int(config.max_segment_s * SAMPLE_RATE_HZ)
        self._guesses: deque[list[str]] = deque(  # of the last updates, uncommitted
            map(list, state.guesses), maxlen=config.agreement - 1
        )
        self._interim = state.interim  # as last sent
        self._segment = list(state.segment)  # committed words of the open segment
        self._kept = deque(state.kept)  # committed words of the last KEPT samples
        self._context = state.context  # the end of the committed text before them
        self._language = state.language  # of the open segment
        self._speech_start = state.speech_start
        self._voices = Voices(state.voices)
        self.n_words = state.n_words  # committed
        self.n_segments = state.n_segments  # closed

    def snapshot(self) -> TimelineState:
        """What a timeline needs to go on from here."""
        return TimelineState(
            guesses=tuple(map(tuple, self._guesses)),
            interim=self._interim,
            segment=tuple(self._segment),
            kept=tuple(self._kept),
            context=self._context,
            language=self._language,
            speech_start=self._speech_start,
            n_words=self.n_words,
            n_segments=self.n_segments,
            sounds=None if self._sounds is None else self._sounds.snapshot(),
            emotion=None if self._emotion is None else self._emotion.snapshot(),
            voices=self._voices.snapshot(),
        )

    def speech_started(self, start: int) -> list[Message]:
        """Somebody speaks since sample `start`."""
        self._speech_start = start
        if self._emotion is not None:
            self._emotion.speech_started(start)
        return [SpeechStarted(ms_of(start))]

    def speech_stopped(self, end: int) -> list[Message]:
        """Nobody speaks since sample `end`."""
        return [SpeechStopped(ms_of(self._speech_start), ms_of(end))]

    def apply(self, result: Result) -> Applied:
        """Take what was found at a point: show it, commit of it what is sure."""
        events = self._apply_events(result.found)
        self._voices.push(result.found.sounds)
        if result.kind in ("idle_tick", "ask"):
            return Applied(tuple(events), 0)
        n_before = result.n_before  # words in the language before, which are committed as they are
        found = credible(result.words[n_before:], self._voices, result.no_speech)
        said = [*range(n_before), *(n_before + i for i in found)]
        words = [result.words[i] for i in said[n_before:]]
        n_committed, messages = self._apply_words(result, words)
        emotion = self._apply_emotion(result, words, messages)
        n_taken = n_before + n_committed
        n_words = said[n_taken - 1] + 1 if n_taken else 0
        unsaid = sorted(set(range(n_words)).difference(said))
        return Applied((*events, *messages, *emotion), n_words, tuple(unsaid))

    def _apply_events(self, found: Findings) -> list[Message]:
        """The sound events that begin or end."""
        if self._sounds is None:
            return []
        messages = [] if found.sounds is None else self._sounds.push(found.sounds)
        return messages if found.events is None else messages + self._sounds.named(found.events)

    def _apply_emotion(
        self, result: Result, words: Sequence[TimedWord], messages: Sequence[Message]
    ) -> list[Message]:
        """How the speaker sounds: of each segment that was closed, else as it is now.

        Endpointing takes some sounds for a voice; where no word was heard, nobody has an emotion.
        """
        finals = [message for message in messages if isinstance(message, TranscriptFinal)]
        if self._emotion is None or not (words or self._segment or finals):
            return []
        now = [] if result.found.emotion is None else self._emotion.push(result.found.emotion)
        if not finals:
            return now
        return [message for final in finals for message in self._emotion.final(final.start_ms, final.end_ms)]

    def _apply_words(self, result: Result, words: Sequence[TimedWord]) -> tuple[int, list[Message]]:
        """How many of the words are committed, and what that and the others lead to."""
        messages: list[Message] = []
        if result.language_before is not None:
            if result.n_before:
                messages += self._commit(result.words[: result.n_before], result.language_before)
            messages += self._close(len(self._segment))
            self._guesses.clear()  # they go on from what was committed before
        n_committed = len(words) if result.kind != "tick" else self._n_sure(words, result)
        if n_committed:
            messages += self._commit(words[:n_committed], result.language)
        rest = words[n_committed:]
        guesses = [[comparable(word.text) for word in words], *self._guesses]
        self._guesses.clear()
        if result.kind == "tick":
            # Every guess now goes on from the words just committed.
            self._guesses.extend(guess[n_committed:] for guess in guesses[: self._config.agreement - 1])
        messages += self._show(rest, result.point)
        if result.kind != "tick":
            messages += self._close(len(self._segment))
        else:
            messages += self._close_long(result.point)
        return n_committed, messages

    def finish(self, end: int) -> list[Message]:
        """Nothing follows after sample `end`: what is not committed is dropped, the segment closed."""
        self._guesses.clear()
        sounds = [] if self._sounds is None else self._sounds.finish(end)
        return [*self._show((), end), *self._close(len(self._segment)), *sounds]

    def window(self, window_start: int) -> tuple[tuple[TimedWord, ...], str]:
        """The committed words inside a window, and the end of the committed text before it.

        A word belongs to the window that holds its middle.
        """
        inside = [word for word in self._kept if word.middle >= window_start]
        before = [word.text for word in self._kept][: len(self._kept) - len(inside)]
        return tuple(inside), extended(self._context, before)

    def _n_sure(self, words: Sequence[TimedWord], result: Result) -> int:
        """How many words may be committed at a tick. Never the last: it may have been cut in two."""
        if len(self._guesses) < self._config.agreement - 1:
            return 0
        point, n = result.point, 0
        for word in words[:-1]:
            agree = all(n < len(guess) and guess[n] == comparable(word.text) for guess in self._guesses)
            is_sure = agree and word.confidence >= self._config.sure_confidence
            delay = self._commit_delay if is_sure else self._unsure_delay
            # A word that flips at every update must not hold up for ever what comes after it.
            if word.end > point - delay or not (agree or word.end <= point - STALE):
                break
            if result.held_from is not None and word.middle >= result.held_from:
                break
            n += 1
        return n

    def _commit(self, words: Sequence[TimedWord], language: str | None) -> list[Message]:
        """Commit words; those of another language than the open segment's begin one of their own."""
        language = language or self._language
        closed = self._close(len(self._segment)) if language != self._language else []
        self._language = language
        between = separator(self._text_before(), words[0].text)
        self._segment.extend(words)
        self._kept.extend(words)
        self.n_words += len(words)
        gone = []
        while self._kept[-1].end - self._kept[0].end > KEPT:
            gone.append(self._kept.popleft().text)
        if gone:
            self._context = extended(self._context, gone)
        delta = TranscriptDelta(
            join_words(word.text for word in words),
            _wire(words),
            ms_of(words[0].start),
            ms_of(words[-1].end),
            between,
        )
        return [*closed, delta]

    def _text_before(self) -> str:
        """The end of the committed text; empty where nothing is committed."""
        return self._kept[-1].text if self._kept else self._context

    def _show(self, words: Sequence[TimedWord], point: int) -> list[Message]:
        """An interim message, if what is shown changes."""
        text = join_words(word.text for word in words)
        if text == self._interim:
            return []
        self._interim = text
        start = words[0].start if words else point
        return [TranscriptInterim(text, ms_of(start), ms_of(point), separator(self._text_before(), text))]

    def _close_long(self, point: int) -> list[Message]:
        """Close a segment that goes on and on: at its last sentence, or, much later, wherever it is."""
        if not self._segment or point - self._segment[0].start <= self._max_segment:
            return []
        n_words = max((i + 1 for i, word in enumerate(self._segment) if ends_sentence(word.text)), default=0)
        if not n_words and point - self._segment[0].start > self._max_segment * 3 // 2:
            n_words = len(self._segment)
        return self._close(n_words)

    def _close(self, n_words: int) -> list[Message]:
        """Close a segment of the first words of the open one."""
        words, self._segment = self._segment[:n_words], self._segment[n_words:]
        if not words:
            return []
        self.n_segments += 1
        text = join_words(word.text for word in words)
        start, end = ms_of(words[0].start), ms_of(words[-1].end)
        return [TranscriptFinal(text, _wire(words), self._language, None, start, end)]


def _wire(words: Sequence[TimedWord]) -> tuple[Word, ...]:
    """Words as they are sent."""
    return tuple(Word(w.text, ms_of(w.start), ms_of(w.end), round(w.confidence, 3)) for w in words)
