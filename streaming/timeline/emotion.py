"""From what was heard in each window to `emotion.update`: smoothed, so that the label does not flicker.

Pure: no tensor, no clock but the sample count. One tracker per stream, owned by its timeline. Knows
nothing of who scored the windows: a head with scores of all labels, or a model that names one label,
or none, and describes the voice in its own words.

While somebody speaks an update tells of the last seconds: the windows since speech began, averaged,
the newest counting most. Its label changes only when another one is clearly ahead. The update that
goes with a `transcript.final` tells of that segment alone. Where no label is likely enough, both say
`neutral`. What was measured to choose the constants is in docs/measurements.md, section 7.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import msgspec

from streaming.config import EmotionConfig
from streaming.engine.contract import EmotionEstimate
from streaming.protocol import SAMPLE_RATE_HZ, EmotionUpdate, Message, ms_of

SAMPLES_PER_MS = SAMPLE_RATE_HZ // 1000
NEUTRAL = "neutral"
UNSURE = 0.35  # a likeliest label below this probability is not said: `neutral` is
MARGIN = 0.1  # by so much another label must be ahead of the one last said
SHARE_POWER = 4  # a window counts in a segment by this power of how much of it is inside
HALF_LIFE = 4 * SAMPLE_RATE_HZ  # a window that ended so long before the newest one counts half
MAX_WINDOWS = 64  # of one speech; the oldest go. More than any segment lasts at the shortest interval.
MAX_SPEECH_STARTS = 16  # beginnings of speech that no answer has reached yet; the oldest go
MAX_LABELS = 32  # in one update's scores; of a model that names more, the least likely are left out
MAX_DESCRIPTION = 200  # characters of a model's own words; what is longer is cut
DESCRIBING = ("emotion", "tone")  # the traits that tell of emotion


class Window(msgspec.Struct, frozen=True, array_like=True):
    """What is kept of one answer."""

    start: int  # samples
    end: int  # samples
    scores: dict[str, float]
    valence: float | None
    arousal: float | None
    description: str | None


class EmotionState(msgspec.Struct, frozen=True, array_like=True):
    """All a tracker remembers, as plain data: a restored tracker goes on as the old one would."""

    windows: tuple[Window, ...] = ()
    speech_starts: tuple[int, ...] = ()  # samples; where speech began that no answer has reached yet
    speech_start: int = 0  # samples; where the speech began that the newest answer is about
    label: str | None = None  # as last said of it
    last_update: int | None = None  # samples; the end of the last update about it


class EmotionTracker:
    """The emotion of one stream."""

    def __init__(self, config: EmotionConfig, state: EmotionState | None = None) -> None:
        """A tracker of a new stream, or one that goes on from a `snapshot()`."""
        state = state or EmotionState()
        # A mark (a stop, a flush) may follow a tick at once: what comes so soon is not said again.
        self._least_interval = int(config.interval_s * SAMPLE_RATE_HZ) // 2
        self._windows = deque(state.windows, maxlen=MAX_WINDOWS)
        self._speech_starts = deque(state.speech_starts, maxlen=MAX_SPEECH_STARTS)
        self._speech_start = state.speech_start
        self._label = state.label
        self._last_update = state.last_update

    def snapshot(self) -> EmotionState:
        """What a tracker needs to go on from here."""
        return EmotionState(
            tuple(self._windows),
            tuple(self._speech_starts),
            self._speech_start,
            self._label,
            self._last_update,
        )

    def speech_started(self, start: int) -> None:
        """Somebody speaks since sample `start`. Answers about what was said before may still come."""
        self._speech_starts.append(start)

    def push(self, emotion: EmotionEstimate) -> list[Message]:
        """Take an answer; an update, unless the last one was just now. Call it before `final`."""
        while self._speech_starts and self._speech_starts[0] <= emotion.start:  # the speech before is over
            self._speech_start = self._speech_starts.popleft()
            self._label = self._last_update = None
        self._windows.append(_window(emotion))
        recent = [window for window in self._windows if window.start >= self._speech_start]
        weights = [_recency(window, emotion.end) for window in recent]
        self._label = _steady(_average(recent, weights), self._label)
        if self._last_update is not None and emotion.end - self._last_update < self._least_interval:
            return []
        self._last_update = emotion.end
        return [_update(recent, weights, self._label, ms_of(emotion.start), ms_of(emotion.end))]

    def final(self, start_ms: int, end_ms: int) -> list[Message]:
        """The update of a closed segment; none where no answer tells of it."""
        start, end = start_ms * SAMPLES_PER_MS, end_ms * SAMPLES_PER_MS
        inside = [window for window in self._windows if window.start < end and window.end > start]
        if not inside:
            return []
        shown = [(min(window.end, end) - max(window.start, start)) / SAMPLE_RATE_HZ for window in inside]
        weights = [seconds**SHARE_POWER for seconds in shown]
        return [_update(inside, weights, _likeliest(_average(inside, weights)), start_ms, end_ms)]


def _recency(window: Window, now: int) -> float:
    """How much a window counts while speech goes on: by its length and its age."""
    return float((window.end - window.start) * 0.5 ** ((now - window.end) / HALF_LIFE))


def _window(emotion: EmotionEstimate) -> Window:
    """What counts of an answer. Of a model that scores no labels, the label it named."""
    scores = emotion.scores
    if not scores and emotion.label is not None:
        scores = {emotion.label: emotion.score}
    if len(scores) > MAX_LABELS:
        scores = dict(sorted(scores.items(), key=lambda item: item[1], reverse=True)[:MAX_LABELS])
    words = "; ".join(emotion.traits[name] for name in DESCRIBING if emotion.traits.get(name))
    return Window(emotion.start, emotion.end, scores, emotion.valence, emotion.arousal, _cut(words) or None)


def _cut(words: str) -> str:
    """At most `MAX_DESCRIPTION` characters, cut between words."""
    if len(words) <= MAX_DESCRIPTION:
        return words
    return words[: MAX_DESCRIPTION - 1].rsplit(None, 1)[0] + "…"


def _average(windows: Iterable[Window], weights: Sequence[float]) -> dict[str, float]:
    """The scores of windows, weighted; a label that a window does not score counts as 0 there."""
    sums: dict[str, float] = {}
    for window, weight in zip(windows, weights, strict=True):
        for label, score in window.scores.items():
            sums[label] = sums.get(label, 0.0) + weight * score
    total = sum(weights)
    return {label: value / total for label, value in sums.items()} if total else {}


def _mean(values: Iterable[float | None], weights: Sequence[float]) -> float | None:
    """The weighted mean of the values there are, if any."""
    pairs = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None


def _likeliest(scores: dict[str, float]) -> str:
    """The label with the highest score; `neutral` where that is too low to be said."""
    label = max(scores, key=scores.__getitem__, default=NEUTRAL)
    return label if scores.get(label, 0.0) >= UNSURE else NEUTRAL


def _steady(scores: dict[str, float], said: str | None) -> str:
    """As `_likeliest`, but what was said last stays until another label is clearly ahead of it."""
    label = _likeliest(scores)
    if said is None or label == said:
        return label
    ahead = max(scores.values(), default=0.0) if label != NEUTRAL else UNSURE
    return label if ahead - scores.get(said, 0.0) >= MARGIN else said


def _update(
    windows: Sequence[Window], weights: Sequence[float], label: str, start_ms: int, end_ms: int
) -> EmotionUpdate:
    """The message of some windows, with the description of the newest that has one."""
    scores = _average(windows, weights)
    kept = sorted(scores.items(), key=lambda item: item[1], reverse=True)[:MAX_LABELS]
    valence = _mean((window.valence for window in windows), weights)
    arousal = _mean((window.arousal for window in windows), weights)
    return EmotionUpdate(
        label=label,
        scores={name: round(score, 3) for name, score in kept},
        valence=None if valence is None else round(valence, 3),
        arousal=None if arousal is None else round(arousal, 3),
        description=next((w.description for w in reversed(windows) if w.description), None),
        start_ms=start_ms,
        end_ms=end_ms,
    )
