"""Deepgram's live transcription: `/v1/listen`.

Committed words come as final results at once, and what may still change as interim ones, if asked
for. The result at the end of a pause is `speech_final`, that of a `Finalize` says so.
docs/deepgram.md says what is supported; message shapes are those of the package `deepgram-sdk`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import cast
from urllib.parse import parse_qsl, urlsplit
from uuid import uuid4

from websockets.http11 import Request

from streaming import aio
from streaming.adaptors.base import BadMessage, Closing, Conversation, Event, shown
from streaming.audio.container import ContainerDecoder
from streaming.audio.ingest import AudioFormat, Encoding, Ingest
from streaming.config import VadConfig
from streaming.errors import BadAudio, BadMessages, BadQuery, ConnectionOver, IdleConnection
from streaming.protocol import (
    DEEPGRAM_STREAMS,
    MAX_CHANNELS,
    MAX_RATE_HZ,
    MIN_RATE_HZ,
    Ack,
    CloseCode,
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
from streaming.query import integer
from streaming.text import join_words, split_words

MAX_PARAMETERS = 128  # keyterms among them
RAW: Mapping[str, Encoding] = {"linear16": "s16le", "mulaw": "mulaw", "alaw": "alaw"}
IN_CONTAINERS = ("ogg-opus", "flac")  # encodings whose container says everything else
# A stop commits whatever was heard: cutting at every breath would cost words.
MIN_ENDPOINTING_MS, MAX_ENDPOINTING_MS = 300, 5000
MIN_UTTERANCE_END_MS, MAX_UTTERANCE_END_MS = 1000, 5000
G711_RATE_HZ = 8_000  # of mulaw and alaw, where the URL names none
# To leave one of these out would change what the client relies on. All others are hints.
UNSUPPORTED = (
    "callback",
    "detect_entities",
    "diarize",
    "diarize_model",
    "multichannel",
    "profanity_filter",
    "redact",
    "replace",
    "search",
)
N_TICKS_TO_SETTLE = 2  # clock seen after a stop, by which all that was found with it has come
WS_POLICY, WS_UNEXPECTED = 1008, 1011  # the close codes Deepgram uses
_PUNCTUATION = (
    string.punctuation
    + "\u2018\u2019\u201c\u201d\u00ab\u00bb\u00bf\u00a1\u2026\u3001\u3002\uff0c\uff1f\uff01"
)


@dataclass(frozen=True, slots=True)
class Options:
    """What a URL asks for."""

    audio_format: AudioFormat | None  # None: a container
    language: str | None
    with_interims: bool
    with_speech_final: bool
    endpointing_ms: int | None  # None: as the server is set to
    utterance_end_ms: int | None  # None: no UtteranceEnd
    with_vad_events: bool
    with_punctuation: bool


def admit(request: Request, vad: VadConfig) -> Deepgram:
    """An adaptor for a handshake.

    Raises:
        BadQuery: a parameter has a value that cannot be, or asks for what this server cannot do.
    """
    del vad
    return Deepgram(str(uuid4()), parse_options(urlsplit(request.path).query))


def parse_options(query: str) -> Options:
    """Read the query of the URL; what is not known is ignored.

    Raises:
        BadQuery: as `admit`.
    """
    try:
        values = dict(parse_qsl(query, keep_blank_values=True, max_num_fields=MAX_PARAMETERS))
    except ValueError as exc:
        raise BadQuery(f"more than {MAX_PARAMETERS} parameters") from exc
    for name in UNSUPPORTED:
        if values.get(name, "false").lower() != "false":
            raise BadQuery(f"{name} is not supported by this server; expected the URL without it")
    endpointing = values.get("endpointing", "true").lower()
    is_number = endpointing not in ("true", "false")
    language = values.get("language")
    return Options(
        audio_format=_audio_format(values),
        language="auto" if language == "multi" else _base_language(language),
        with_interims=_flag(values, "interim_results"),
        with_speech_final=endpointing not in ("false", "0"),
        endpointing_ms=integer(values, "endpointing", 0, MAX_ENDPOINTING_MS) if is_number else None,
        utterance_end_ms=_utterance_end(values),
        with_vad_events=_flag(values, "vad_events"),
        with_punctuation=_flag(values, "punctuate") or _flag(values, "smart_format"),
    )


def _audio_format(values: Mapping[str, str]) -> AudioFormat | None:
    encoding = values.get("encoding")
    if encoding is None or encoding in IN_CONTAINERS:
        return None
    if encoding not in RAW:
        expected = ", ".join((*RAW, *IN_CONTAINERS))
        raise BadQuery(f"encoding is {shown(encoding)}; expected one of {expected}, or none for a container")
    if "sample_rate" not in values and encoding == "linear16":
        raise BadQuery("sample_rate is missing; linear16 needs it")
    rate_hz = integer(values, "sample_rate", MIN_RATE_HZ, MAX_RATE_HZ, G711_RATE_HZ)
    return AudioFormat(RAW[encoding], rate_hz, integer(values, "channels", 1, MAX_CHANNELS, 1))


def _base_language(tag: str | None) -> str | None:
    """'en' of 'en-US'."""
    return None if tag is None else tag.partition("-")[0].lower()[:16]


def _utterance_end(values: Mapping[str, str]) -> int | None:
    if "utterance_end_ms" not in values:
        return None
    if not _flag(values, "interim_results"):
        raise BadQuery("utterance_end_ms needs interim_results=true")
    return integer(values, "utterance_end_ms", MIN_UTTERANCE_END_MS, MAX_UTTERANCE_END_MS)


def _flag(values: Mapping[str, str], name: str) -> bool:
    text = values.get(name, "false").lower()
    if text not in ("true", "false"):
        raise BadQuery(f"{name} is {shown(text)}; expected true or false")
    return text == "true"


class Deepgram:
    """One live transcription. Belongs to the event loop."""

    def __init__(self, request_id: str, options: Options) -> None:
        self.stream = DEEPGRAM_STREAMS.replace("*", request_id)
        self.language = options.language
        self.headers: Mapping[str, str] = {"dg-request-id": request_id}
        self._request_id = request_id
        self._options = options
        raw = options.audio_format
        self._ingest = None if raw is None else Ingest(raw)
        self._container = ContainerDecoder() if raw is None else None
        self._feeding: asyncio.Task[None] | None = None  # what the container holds
        self._sha256 = hashlib.sha256()
        self._n_bytes = 0
        self._results = Results(request_id, options)

    def endpointing(self, default: VadConfig) -> VadConfig:
        """The server's, with the client's own pause."""
        stop_ms = self._options.endpointing_ms
        if not stop_ms:
            return default
        return default.model_copy(update={"stop_ms": max(stop_ms, MIN_ENDPOINTING_MS)})

    def closing(self, over: ConnectionOver | None) -> Closing:
        """With the codes and the words that Deepgram closes with, where it has some."""
        match over:
            case None:
                return Closing(CloseCode.NORMAL, "")
            case BadAudio() | BadMessages():
                return Closing(WS_POLICY, f"DATA-0000: {over}")
            case IdleConnection():
                return Closing(WS_UNEXPECTED, f"NET-0001: {over}")
            case _:
                return Closing(over.close_code, str(over))

    def translate(self, envelope: Envelope) -> list[Event]:
        """The messages of one message of the log."""
        if isinstance(envelope.message, SessionClosed):
            return [*self._results.translate(envelope), self._metadata(envelope.message)]
        return self._results.translate(envelope)

    def idle(self) -> list[Event]:
        """What the log said since the last audio may end an utterance."""
        return self._results.tick()

    # --- what the client says ------------------------------------------------------------

    async def work(self, talk: Conversation) -> None:
        """Feed what the container holds."""
        if self._container is not None:
            self._feeding = asyncio.create_task(self._feed_container(talk), name=f"decode {self.stream}")
            await aio.ended(self._feeding)
        await asyncio.Event().wait()

    async def _feed_container(self, talk: Conversation) -> None:
        assert self._container is not None
        while (pcm := await self._container.pull()) is not None:
            await talk.feed(pcm)

    async def take(self, frame: str | bytes, talk: Conversation) -> bool:
        """Take audio, or do what one message asks for; False at the end.

        Raises:
            BadMessage: it is no message of Deepgram's.
            BadAudio: the bytes cannot be audio of what the URL declares.
        """
        if isinstance(frame, bytes):
            await self._take_audio(frame, talk)
            return bool(frame)  # an empty one asks for the end, as it does at Deepgram
        match read_message(frame):
            case "KeepAlive":
                return True
            case "Finalize":
                await self._finalize(talk)
                return True
            case "CloseStream":
                return False
            case _:
                await talk.say(lambda: [self._configure_failure()])
                return True

    async def _take_audio(self, data: bytes, talk: Conversation) -> None:
        self._sha256.update(data)
        self._n_bytes += len(data)
        if self._container is not None:
            await self._container.push(data)
        elif self._ingest is not None and self._options.audio_format is not None:
            await talk.decode(self._ingest, self._options.audio_format, data)

    async def _finalize(self, talk: Conversation) -> None:
        if self._container is not None:
            await self._container.drained()
        elif self._ingest is not None:
            await talk.feed(self._ingest.flush())
        self._results.n_finalizing += 1
        await talk.flush("finalize")

    async def end_audio(self, talk: Conversation) -> None:
        """What is still in the decoder.

        Raises:
            BadAudio: it cannot be decoded.
        """
        if self._container is not None and self._feeding is not None:
            self._container.end()
            await aio.ended(self._feeding)
        elif self._ingest is not None:
            await talk.feed(self._ingest.flush())

    def stop(self) -> None:
        """End the decoder's thread and the task that feeds from it."""
        if self._container is not None:
            self._container.stop()
        if self._feeding is not None:
            self._feeding.cancel()

    # --- messages ------------------------------------------------------------------------

    def complaint(self, exc: BadMessage, frame: str | bytes) -> list[Event]:
        """Deepgram's `Error`, with the beginning of the message that could not be read."""
        message = frame[:200] if isinstance(frame, str) else ""
        return [{"type": "Error", "variant": exc.code, "description": str(exc), "message": message}]

    def _configure_failure(self) -> Event:
        return {
            "type": "ConfigureFailure",
            "request_id": self._request_id,
            "code": "CONFIGURE_KEYTERMS_NOT_SUPPORTED",
            "description": "this server's model takes no keyterms and has no features to turn on or off",
        }

    def _metadata(self, closed: SessionClosed) -> Event:
        raw = self._options.audio_format
        return {
            "type": "Metadata",
            "transaction_key": "deprecated",
            "request_id": self._request_id,
            "sha256": self._sha256.hexdigest(),
            "created": self._results.created,
            "duration": closed.duration_ms / 1000,
            "channels": 0 if not self._n_bytes else 1 if raw is None else raw.channels,
            "models": [self._results.model],
            "model_info": {self._results.model: self._results.model_info},
        }


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


def read_message(frame: str) -> str:
    """The type of one message of the client's.

    Raises:
        BadMessage: it is none of Deepgram's.
    """
    try:
        message = json.loads(frame)
    except (ValueError, RecursionError) as exc:
        raise BadMessage(f"no JSON: {exc}"[:200], "SchemaError") from exc
    kind = message.get("type") if isinstance(message, dict) else None
    if kind not in ("KeepAlive", "Finalize", "CloseStream", "Configure"):
        raise BadMessage(
            f"type is {shown(kind)}; expected KeepAlive, Finalize, CloseStream or Configure", "SchemaError"
        )
    return cast("str", kind)
