"""Whether words were said: what the model of words and the model of sounds know together. Pure.

A recogniser of words always finds some. Over rain it is very unsure of them, and whoever listens for
sounds hears no voice; in quiet or bad speech one of the two is still sure. So a phrase must have one or
the other, or enough of both. What was measured to choose the limits is in docs/measurements.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec

from streaming.engine.contract import SOUND_FRAME, SoundScores, TimedWord
from streaming.protocol import SAMPLE_RATE_HZ

KEPT_ROWS = 400  # 32 s: longer than any window; the oldest go
REACH = SAMPLE_RATE_HZ // 2  # a voice so near to a phrase counts: word times are not better than that
PHRASE_GAP = SAMPLE_RATE_HZ // 2  # a longer pause between words ends a phrase
# A phrase counts as said if confidence / SURE_WORDS + voice / SURE_VOICE is 1 or more; the more so, the more
# the model of words doubts that anybody spoke in its window.
SURE_WORDS = 0.65
SURE_VOICE = 0.90
UNDOUBTED, DOUBT = 0.4, 1.5
# Where nobody listens for voices: unless its words are less sure than this and the model doubts all speech.
DOUBTFUL_WORDS = 0.35
NO_SPEECH = 0.5
MIN_CONFIDENCE = 1e-3  # of a word in a phrase's mean: one alone must not decide


class VoiceState(msgspec.Struct, frozen=True, array_like=True):
    """All that is remembered of the voices heard."""

    start: int = 0  # samples; where the first row begins
    rows: bytes = b""  # in 255ths


class Voices:
    """How sure the model of sounds was of a voice, over the last `KEPT_ROWS` rows of its grid."""

    def __init__(self, state: VoiceState = VoiceState()) -> None:  # noqa: B008  frozen
        """Nothing heard yet, or what a `snapshot()` remembers."""
        self._start, self._rows = state.start, state.rows

    def snapshot(self) -> VoiceState:
        """What another goes on from."""
        return VoiceState(self._start, self._rows)

    def push(self, sounds: SoundScores | None) -> None:
        """Take rows; those known already change nothing, and a gap before them forgets what was before it."""
        if sounds is None or not sounds.voice:
            return
        end = self._start + len(self._rows) * SOUND_FRAME
        if not self._rows or sounds.start > end:
            self._start, self._rows, end = sounds.start, b"", sounds.start
        self._rows += sounds.voice[max(0, (end - sounds.start) // SOUND_FRAME) :]
        n_gone = max(0, len(self._rows) - KEPT_ROWS)
        self._start, self._rows = self._start + n_gone * SOUND_FRAME, self._rows[n_gone:]

    def between(self, start: int, end: int) -> float | None:
        """How sure a voice was at best from sample `start` to `end`, 0 to 1; None where nothing is known.

        Of a span whose rows are not there yet, the newest rows tell.
        """
        if not self._rows:
            return None
        first = (start - REACH - self._start) // SOUND_FRAME
        last = -(-(end + REACH - self._start) // SOUND_FRAME)
        if last <= 0:
            return None
        return max(self._rows[min(max(first, 0), len(self._rows) - 1) : last]) / 255


def credible(words: Sequence[TimedWord], voices: Voices, no_speech: float) -> list[int]:
    """Which of a hypothesis' words were probably said: their indices. A phrase stays or goes as one.

    Args:
        words: In order.
        voices: Of the same stream.
        no_speech: The word model's own probability that its window holds no speech.
    """
    return [i for phrase in _phrases(words) if _is_said(words, phrase, voices, no_speech) for i in phrase]


def _phrases(words: Sequence[TimedWord]) -> Iterator[range]:
    first = 0
    for i in range(1, len(words) + 1):
        if i == len(words) or words[i].start - words[i - 1].end > PHRASE_GAP:
            yield range(first, i)
            first = i


def _is_said(words: Sequence[TimedWord], phrase: range, voices: Voices, no_speech: float) -> bool:
    logs = [math.log(max(words[i].confidence, MIN_CONFIDENCE)) for i in phrase]
    confidence = math.exp(math.fsum(logs) / len(logs))
    voice = voices.between(words[phrase[0]].start, words[phrase[-1]].end)
    if voice is None:
        return confidence >= DOUBTFUL_WORDS or no_speech < NO_SPEECH
    return confidence / SURE_WORDS + voice / SURE_VOICE >= 1 + DOUBT * max(0.0, no_speech - UNDOUBTED)
