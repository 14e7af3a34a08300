"""OpenAI's Realtime transcription: `/v1/realtime?intent=transcription`.

What is said in one turn (server_vad) or up to one commit is an item. Its text comes as deltas while
it is being spoken, as soon as words are committed; `completed` follows once the item ends. The API
has no word for text that may still change, so interims are not sent.
docs/openai.md says what is supported; event shapes are those of the package `openai`.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from streaming.adaptors.base import Adaptor, Event, check_text, new_id
from streaming.adaptors.openai_session import (
    FORMATS,
    Settings,
    beta_session_object,
    default_turn,
    session_object,
    updated,
    updated_beta,
)
from streaming.config import VadConfig
from streaming.errors import BadQuery
from streaming.protocol import (
    Ack,
    Envelope,
    Error,
    Flushed,
    Message,
    SessionClosed,
    SessionCreated,
    SpeechStarted,
    SpeechStopped,
    TranscriptDelta,
    TranscriptFinal,
    Word,
)
from streaming.protocol.codes import shown
from streaming.query import read
from streaming.server.conversation import BadMessage, Conversation
from streaming.server.routes import Handshake, StreamRoute
from streaming.text import join_words

PATH, STREAMS = "/v1/realtime", "openai-*"
BETA_HEADER, BETA = "OpenAI-Beta", "realtime=v1"
SUBPROTOCOL, BETA_SUBPROTOCOL = "realtime", "openai-beta.realtime-v1"  # what a browser can say
MIN_COMMIT_MS = 100  # of audio, as the API has it
MAX_ITEM_CHARS = 65_536  # over an hour of speech: an item that is never committed ends by itself there
MAX_PARTS = 32  # of a long text: an append of audio has a few fields
MAX_PARAMETERS = 32  # in the URL; those that are not named here are ignored, as the API does
MIN_LOGPROB = -10.0  # of a score that was rounded to nothing
# A turn that held no word has no final. It is over once the clock has been seen so often after its
# stop: by then everything that was found with the stop has come.
N_TICKS_TO_SETTLE = 2
CLIENT_EVENTS = (
    "session.update",
    "transcription_session.update",
    "input_audio_buffer.append",
    "input_audio_buffer.commit",
    "input_audio_buffer.clear",
)


class _Query(msgspec.Struct, frozen=True):
    """What the URL may say; the rest is ignored, as the API does."""

    intent: str = "transcription"
    call_id: str | None = None


def admit(handshake: Handshake, vad: VadConfig) -> OpenAi:
    """An adaptor for a handshake.

    Raises:
        BadQuery: the URL asks for another kind of session.
    """
    query = read(handshake.query, _Query, MAX_PARAMETERS)
    if query.intent != "transcription":
        raise BadQuery(
            f"intent is {shown(query.intent)}; expected 'transcription': this server does not speak"
        )
    if query.call_id is not None:
        raise BadQuery("call_id is not supported; expected a new transcription session")
    offered = [
        name.strip() for name in ",".join(handshake.headers.get_all("Sec-WebSocket-Protocol")).split(",")
    ]
    is_beta = BETA in handshake.headers.get_all(BETA_HEADER) or BETA_SUBPROTOCOL in offered
    headers = {"Sec-WebSocket-Protocol": SUBPROTOCOL} if SUBPROTOCOL in offered else {}
    return OpenAi(new_id(), vad, headers, is_beta=is_beta)


@dataclass(slots=True)
class _Item:
    """What the log says of one stretch of audio."""

    id: str
    start_ms: int
    end_ms: int | None = None  # where it ended; None while it goes on
    text: str = ""
    words: list[Word] = field(default_factory=list)  # kept only where their probabilities are asked for


class OpenAi(Adaptor):
    """One transcription session. Belongs to the event loop."""

    def __init__(self, key: str, vad: VadConfig, headers: Mapping[str, str], *, is_beta: bool) -> None:
        self.name = STREAMS.replace("*", key)
        self.headers = headers
        self._key = key
        self._vad = vad
        self._is_beta = is_beta
        self._settings = Settings(default_turn(vad))
        self._model = ""
        self._fed_ms = 0.0  # audio appended
        self._committed_ms = 0.0  # of it, up to the last item's end
        self._n_events = 0
        self._n_items = 0
        self._n_marks = 0
        self._item: _Item | None = None
        self._n_ticks = 0  # clock seen since the item's turn ended
        self._ended_ms = 0  # where the last item ended
        self._last_item_id: str | None = None

    def endpointing(self, default: VadConfig) -> VadConfig:
        """As the server is set to, until an update says otherwise."""
        return self._settings.vad(default)

    def start(self, talk: Conversation) -> Sequence[Message]:
        """Take audio of the format that holds until an update."""
        self._audio = talk.new_input(FORMATS[self._settings.encoding])
        return ()

    # --- what the client says ------------------------------------------------------------

    async def take(self, frame: str | bytes, talk: Conversation) -> bool:
        """Do what one client event asks for; the client ends by closing its connection.

        Raises:
            BadMessage: the event is not one of the API's, or asks for what this server cannot do.
        """
        event = read_event(frame)
        match event["type"]:
            case "input_audio_buffer.append":
                await self._feed(read_audio(event), talk)
            case "input_audio_buffer.commit":
                await self._commit(talk)
            case "input_audio_buffer.clear":
                await self._mark(talk, "clear")
            case "session.update" if not self._is_beta:
                await self._update(talk, updated, event)
                await self._say_updated(talk, "session.updated")
            case kind:
                await self._update(talk, updated_beta, event)
                await self._say_updated(talk, kind.replace(".update", ".updated"))
        return True

    async def _say_updated(self, talk: Conversation, kind: str) -> None:
        """The effective configuration; the current API knows one shape and one type of it."""
        if self._is_beta:
            await self.say(talk, lambda: [self._event(kind, session=self._beta_session())])
        else:
            await self.say(talk, lambda: [self._event("session.updated", session=self._session())])

    def complaint(self, exc: BadMessage, frame: str | bytes) -> list[Event]:
        """An `error` event that names the client's own event, where it named it."""
        return [self._error("invalid_request_error", exc.code, str(exc), exc.param, _event_id_of(frame))]

    async def _feed(self, data: bytes, talk: Conversation) -> None:
        self._fed_ms += self.audio.seconds_of(len(data)) * 1000
        await talk.feed(self.audio, data)

    async def _commit(self, talk: Conversation) -> None:
        waiting_ms = self._fed_ms - self._committed_ms
        if waiting_ms < MIN_COMMIT_MS:
            raise BadMessage(
                f"buffer too small: expected at least {MIN_COMMIT_MS} ms of audio, "
                f"but the buffer only has {waiting_ms:.2f} ms",
                "input_audio_buffer_commit_empty",
            )
        await self._mark(talk, "commit")

    async def _mark(self, talk: Conversation, kind: str) -> None:
        """Everything appended so far belongs to what ends here; `Flushed` comes at its place in the log."""
        await self.audio.flush()
        self._committed_ms = self._fed_ms
        self._n_marks += 1
        await talk.session.flush(f"{kind}-{self._n_marks}")

    async def _update(
        self, talk: Conversation, update: Callable[[Settings, Any, VadConfig], Settings], event: Event
    ) -> None:
        before, after = self._settings, update(self._settings, event.get("session"), self._vad)
        languages = talk.limits.languages
        if after.language is not None and after.language not in languages:
            raise BadMessage(
                f"language is {shown(after.language)}; expected one of {', '.join(languages)}",
                "invalid_value",
                "session.audio.input.transcription.language",
            )
        if after.encoding != before.encoding:
            await self.audio.flush()
            self._audio = talk.new_input(FORMATS[after.encoding])
        self._settings = after
        if after.language != before.language:
            talk.session.set_language(after.language or talk.limits.language)
        if after.turn != before.turn:
            talk.session.set_endpointing(after.vad(self._vad))

    # --- what the log says ---------------------------------------------------------------

    def translate(self, envelope: Envelope) -> list[Event]:
        """The events of one message of the log."""
        message = envelope.message
        match message:
            case SessionCreated():
                self._model = message.model
                if self._is_beta:
                    return [self._event("transcription_session.created", session=self._beta_session())]
                return [self._event("session.created", session=self._session())]
            case SpeechStarted() | SpeechStopped() if self._settings.turn is None:
                return []
            case SpeechStarted(start_ms=start_ms):
                events = self._complete_stopped()
                item = self._open(start_ms)
                fields = {"audio_start_ms": start_ms, "item_id": item.id}
                return [*events, self._event("input_audio_buffer.speech_started", **fields)]
            case SpeechStopped(start_ms=start_ms, end_ms=end_ms):
                item = self._open(start_ms)
                fields = {"audio_end_ms": end_ms, "item_id": item.id}
                return [
                    self._event("input_audio_buffer.speech_stopped", **fields),
                    *self._end(item, end_ms),
                ]
            case TranscriptDelta():
                return self._delta(message)
            case TranscriptFinal():
                return self._complete_stopped()
            case Flushed(id=mark, end_ms=end_ms):
                return self._flushed(mark, end_ms)
            case Ack():
                return self.due()
            case SessionClosed(duration_ms=end_ms):
                return self._closed(end_ms)
            case Error():
                is_theirs = message.code.startswith("bad_") or message.code == "too_fast"
                kind = "invalid_request_error" if is_theirs else "server_error"
                return [self._error(kind, message.code, message.message, None, None)]
            case _:
                return _untranslated(message)

    def due(self) -> list[Event]:
        """Complete an ended turn in which no word was found."""
        self._n_ticks += 1
        return self._complete_stopped() if self._n_ticks >= N_TICKS_TO_SETTLE else []

    def _open(self, start_ms: int) -> _Item:
        """The item that goes on, or a new one."""
        if self._item is None:
            self._n_items += 1
            self._item = _Item(f"item_{self._key}_{self._n_items}", start_ms)
        return self._item

    def _delta(self, delta: TranscriptDelta) -> list[Event]:
        item = self._open(self._ended_ms)
        whole = join_words((item.text, delta.text)) if item.text else delta.text
        piece, item.text = whole[len(item.text) :], whole
        fields: Event = {"item_id": item.id, "content_index": 0, "delta": piece}
        if self._settings.with_logprobs:
            item.words += delta.words
            fields["logprobs"] = _logprobs(delta.words)
        events = [self._event("conversation.item.input_audio_transcription.delta", **fields)]
        if len(item.text) >= MAX_ITEM_CHARS and item.end_ms is None:
            events += [*self._end(item, delta.end_ms), *self._complete(item, delta.end_ms)]
        return events

    def _end(self, item: _Item, end_ms: int) -> list[Event]:
        """The item's audio is complete: it becomes part of the conversation."""
        item.end_ms = self._ended_ms = end_ms
        self._committed_ms = max(self._committed_ms, end_ms)
        self._n_ticks = 0
        previous, self._last_item_id = self._last_item_id, item.id
        fields: Event = {"previous_item_id": previous, "item_id": item.id}
        events = [self._event("input_audio_buffer.committed", **fields)]
        for kind in ("created",) if self._is_beta else ("added", "done"):
            fields = {"previous_item_id": previous, "item": _item_object(item.id)}
            events.append(self._event(f"conversation.item.{kind}", **fields))
        return events

    def _complete(self, item: _Item, end_ms: int) -> list[Event]:
        self._item = None
        fields: Event = {
            "item_id": item.id,
            "content_index": 0,
            "transcript": item.text,
            "usage": {"type": "duration", "seconds": max(0, end_ms - item.start_ms) / 1000},
        }
        if self._settings.with_logprobs:
            fields["logprobs"] = _logprobs(item.words)
        return [self._event("conversation.item.input_audio_transcription.completed", **fields)]

    def _complete_stopped(self) -> list[Event]:
        """Complete the item whose turn has ended, if there is one."""
        item = self._item
        return [] if item is None or item.end_ms is None else self._complete(item, item.end_ms)

    def _flushed(self, mark: str, end_ms: int) -> list[Event]:
        """A commit ends an item, be there words in it or not; a clear drops it."""
        events = self._complete_stopped()
        if mark.startswith("clear"):
            self._item = None
            self._ended_ms = end_ms
            return [*events, self._event("input_audio_buffer.cleared")]
        item = self._open(self._ended_ms)
        return [*events, *self._end(item, end_ms), *self._complete(item, end_ms)]

    def _closed(self, end_ms: int) -> list[Event]:
        """Whoever still listens gets the last item whole."""
        events = self._complete_stopped()
        if self._item is None:
            return events
        item = self._item
        return [*events, *self._end(item, end_ms), *self._complete(item, end_ms)]

    # --- events --------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> Event:
        self._n_events += 1
        return {"type": kind, "event_id": f"event_{self._key}_{self._n_events}", **fields}

    def _error(self, kind: str, code: str, message: str, param: str | None, cause: str | None) -> Event:
        error = {"type": kind, "code": code, "message": message, "param": param, "event_id": cause}
        return self._event("error", error=error)

    def _session(self) -> Event:
        return session_object(self._settings, self.name, self._model)

    def _beta_session(self) -> Event:
        return beta_session_object(self._settings, self.name)


def read_event(frame: str | bytes) -> Event:
    """One event of the client's, of a type this server takes.

    Raises:
        BadMessage: it is not.
    """
    if isinstance(frame, bytes):
        raise BadMessage(
            f"got a binary frame of {len(frame)} bytes; expected a JSON object in a text frame",
            "invalid_json",
        )
    try:
        check_text(frame, MAX_PARTS)
        event = json.loads(frame)
    except (ValueError, RecursionError) as exc:
        raise BadMessage(f"no JSON: {exc}"[:200], "invalid_json") from exc
    if not isinstance(event, dict):
        raise BadMessage(f"got JSON of type {type(event).__name__}; expected an object", "invalid_json")
    kind = event.get("type")
    if kind is None:
        raise BadMessage("Missing required parameter: 'type'.", "missing_required_parameter", "type")
    if kind not in CLIENT_EVENTS:
        expected = ", ".join(repr(name) for name in CLIENT_EVENTS)
        raise BadMessage(
            f"Invalid value: {shown(kind)}. Supported values are: {expected}.", "invalid_value", "type"
        )
    return event


def _event_id_of(frame: str | bytes) -> str | None:
    """The client's own id of the event in a frame, where it can be read."""
    try:
        if isinstance(frame, str):
            check_text(frame, MAX_PARTS)
        event = json.loads(frame)
    except (ValueError, RecursionError):
        return None
    event_id = event.get("event_id") if isinstance(event, dict) else None
    return event_id[:512] if isinstance(event_id, str) else None


def read_audio(event: Event) -> bytes:
    """The audio of an `input_audio_buffer.append`.

    Raises:
        BadMessage: it is no base64.
    """
    audio = event.get("audio")
    if not isinstance(audio, str):
        raise BadMessage(f"audio is {shown(audio)}; expected a text in base64", "invalid_value", "audio")
    try:
        return base64.b64decode(audio, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise BadMessage(f"audio is no base64: {exc}", "invalid_value", "audio") from exc


def _item_object(item_id: str) -> Event:
    content = {"type": "input_audio", "transcript": None}
    return {
        "id": item_id,
        "object": "realtime.item",
        "type": "message",
        "status": "completed",
        "role": "user",
        "content": [content],
    }


def _logprobs(words: list[Word] | tuple[Word, ...]) -> list[Event]:
    """A word each instead of a token: the model's probability of the word."""
    return [
        {
            "token": word.text,
            "bytes": list(word.text.encode()),
            "logprob": math.log(word.score) if word.score > 0 else MIN_LOGPROB,
        }
        for word in words
    ]


def _untranslated(message: Message) -> list[Event]:
    """The API has no word for interims, sound events, emotion, answers and `degraded`."""
    del message
    return []


ROUTE = StreamRoute(PATH, STREAMS, admit)
