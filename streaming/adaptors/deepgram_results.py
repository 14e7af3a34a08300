"""The messages of a stream as Deepgram's results.

Committed words are final results at once. What a `Finalize` may be answered with, and the end of a
pause, are held back until it is known whether more belongs to them.
"""

from __future__ import annotations

import string
from datetime import UTC, datetime

from streaming.adaptors.base import Event
from streaming.adaptors.deepgram_query import Options
from streaming.protocol import (
    Ack,
    Envelope,
    Error,
    Flushed,
    SessionClosed,
    SessionCreated,
    SpeechStarted,
    SpeechStopped,
    TranscriptDelta,
    TranscriptFinal,
    TranscriptInterim,
    Word,
)
from streaming.text import join_words, split_words

N_TICKS_TO_SETTLE = 2  # clock seen after a stop, by which all that was found with it has come
_PUNCTUATION = (
    string.punctuation
    + "\u2018\u2019\u201c\u201d\u00ab\u00bb\u00bf\u00a1\u2026\u3001\u3002\uff0c\uff1f\uff01"
)


class Results:
    """The log as Deepgram writes it. Pure: the only clock is that of the samples."""

    def __init__(self, request_id: str, options: Options) -> None:
        self.model = ""
        self.created = ""
        self.n_finalizing = 0  # `Finalize` messages that are not answered
        self._request_id = request_id
        self._options = options
        self._start_ms = 0  # where the last final result ended
        self._stop_ms: int | None = None  # a pause whose `speech_final` has not been sent
        self._n_ticks = 0  # clock seen since that pause began
        self._now_ms = 0  # audio that has come, as the last `ack` said
        self._is_speech = False
        self._has_words = False  # since the last `speech_final`
        self._last_word_ms: int | None = None  # end of the last word, until its UtteranceEnd
        self._held: TranscriptDelta | None = None  # may turn out to be the last one of a `Finalize`

    @property
    def model_info(self) -> Event:
        """What is known of the model."""
        return {"name": self.model, "version": "", "arch": ""}

    def translate(self, envelope: Envelope) -> list[Event]:
        """The messages of one message of the log."""
        message = envelope.message
        match message:
            case SessionCreated():
                self.model = message.model
                self.created = datetime.fromtimestamp(message.epoch_ms / 1000, UTC).isoformat(
                    timespec="milliseconds"
                )
                return []
            case SpeechStarted(start_ms=start_ms):
                events = self.rest()
                self._is_speech = True
                if self._options.with_vad_events:
                    event = {"type": "SpeechStarted", "channel": [0, 1], "timestamp": start_ms / 1000}
                    events.append(event)
                return events
            case SpeechStopped(end_ms=end_ms):
                self._is_speech = False
                self._n_ticks = 0
                self._stop_ms = end_ms if self._options.with_speech_final else None
                return []
            case TranscriptInterim() if message.text and self._options.with_interims:
                return [*self._release(), self._interim(message)]
            case TranscriptDelta():
                return self._delta(message)
            case TranscriptFinal():
                return [] if self._stop_ms is None or self._held else self._speech_final(self._stop_ms)
            case Flushed(end_ms=end_ms):
                return self._flushed(end_ms)
            case Ack(end_ms=now_ms):
                self._now_ms = now_ms
                return self.tick()
            case SessionClosed(duration_ms=end_ms):
                self._now_ms = end_ms
                return [*self.rest(), *self._utterance_end()]
            case Error():
                return [{"type": "Error", "variant": message.code, "description": message.message}]
            case _:
                return []

    def tick(self) -> list[Event]:
        """The clock was looked at: end the pause in which nothing more was found, then the utterance."""
        self._n_ticks += 1
        events: list[Event] = []
        if self._stop_ms is not None and self._n_ticks >= N_TICKS_TO_SETTLE:
            events = self._speech_final(self._stop_ms)
        return [*events, *self._utterance_end()]

    def rest(self) -> list[Event]:
        """All that was kept back: something new begins, or nothing follows."""
        events = self._release()
        return events if self._stop_ms is None else [*events, *self._speech_final(self._stop_ms)]

    def _delta(self, delta: TranscriptDelta) -> list[Event]:
        events = self._release()
        self._last_word_ms = delta.end_ms
        self._has_words = True
        if self.n_finalizing:
            self._held = delta
            return events
        return [*events, self._final(delta)]

    def _release(self, *, from_finalize: bool = False) -> list[Event]:
        held, self._held = self._held, None
        return [] if held is None else [self._final(held, from_finalize=from_finalize)]

    def _flushed(self, end_ms: int) -> list[Event]:
        self.n_finalizing = max(0, self.n_finalizing - 1)
        events = self._release(from_finalize=True)
        return events or [self._empty(end_ms, is_speech_end=False, from_finalize=True)]

    def _speech_final(self, end_ms: int) -> list[Event]:
        """An empty result that only says that the speaker paused, if anything was said before."""
        self._stop_ms = None
        has_words, self._has_words = self._has_words, False
        return [self._empty(end_ms, is_speech_end=True, from_finalize=False)] if has_words else []

    def _utterance_end(self) -> list[Event]:
        last, gap_ms = self._last_word_ms, self._options.utterance_end_ms
        if last is None or gap_ms is None or self._is_speech or self._now_ms - last < gap_ms:
            return []
        self._last_word_ms = None
        return [*self.rest(), {"type": "UtteranceEnd", "channel": [0, 1], "last_word_end": last / 1000}]

    # --- results -------------------------------------------------------------------------

    def _final(self, delta: TranscriptDelta, *, from_finalize: bool = False) -> Event:
        is_speech_end = self._stop_ms is not None
        if is_speech_end:
            self._stop_ms = None
            self._has_words = False
        words = [self._word(word) for word in delta.words]
        score = sum(word.score for word in delta.words) / max(1, len(delta.words))
        alternative = {
            "transcript": self._text([word.text for word in delta.words]),
            "confidence": round(score, 3),
            "words": words,
        }
        return self._result(
            alternative, delta.end_ms, is_final=True, is_speech_end=is_speech_end, from_finalize=from_finalize
        )

    def _interim(self, interim: TranscriptInterim) -> Event:
        # The log has no times and no probabilities of words that may still change.
        alternative = {"transcript": self._text(split_words(interim.text)), "confidence": 0.0, "words": []}
        return self._result(
            alternative, interim.end_ms, is_final=False, is_speech_end=False, from_finalize=False
        )

    def _empty(self, end_ms: int, *, is_speech_end: bool, from_finalize: bool) -> Event:
        return self._result(
            {"transcript": "", "confidence": 0.0, "words": []},
            end_ms,
            is_final=True,
            is_speech_end=is_speech_end,
            from_finalize=from_finalize,
        )

    def _result(
        self, alternative: Event, end_ms: int, *, is_final: bool, is_speech_end: bool, from_finalize: bool
    ) -> Event:
        start_ms, end_ms = self._start_ms, max(self._start_ms, end_ms)
        if is_final:
            self._start_ms = end_ms
        return {
            "type": "Results",
            "channel_index": [0, 1],
            "start": start_ms / 1000,
            "duration": (end_ms - start_ms) / 1000,
            "is_final": is_final,
            "speech_final": is_speech_end,
            "channel": {"alternatives": [alternative]},
            "metadata": {
                "request_id": self._request_id,
                "model_info": self.model_info,
                "model_uuid": self.model,
            },
            "from_finalize": from_finalize,
        }

    def _word(self, word: Word) -> Event:
        event = {
            "word": _plain(word.text),
            "start": word.start_ms / 1000,
            "end": word.end_ms / 1000,
            "confidence": word.score,
        }
        return event | {"punctuated_word": word.text} if self._options.with_punctuation else event

    def _text(self, words: list[str]) -> str:
        return join_words(words if self._options.with_punctuation else [_plain(word) for word in words])


def _plain(word: str) -> str:
    """A word as Deepgram writes it without `punctuate`."""
    return word.strip(_PUNCTUATION).lower() or word
