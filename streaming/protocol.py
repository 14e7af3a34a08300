"""The wire protocol: every message, close code and HTTP status, in one place.

Standard library only: clients import this module and nothing else of the server.
It knows nothing of sockets. Audio travels as binary frames; everything else is one JSON
object per text frame. Times are integers, milliseconds since the stream's first sample.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

DEFAULT_PORT = 8765
SAMPLE_RATE_HZ = 16_000  # the sample clock every time on the wire is counted on

STREAM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
STREAM_PATTERN = re.compile(r"[A-Za-z0-9*][A-Za-z0-9._*-]{0,63}")  # a name, or with `*` many of them
AUDIO_FORMATS = ("s16le", "f32le", "mulaw", "alaw")
MIN_RATE_HZ, MAX_RATE_HZ = 8_000, 48_000
MAX_CHANNELS = 8  # of a stream's audio, mixed to one
MAX_ID_CHARS = 64  # of a client's `flush` and `ask`
MAX_QUESTION_CHARS = 2_000  # of an `ask`
MAX_TEXT_CHARS = 65_536  # of a client's text frame; a subscriber's frame of more bytes closes with 1009
MAX_SUBSCRIBED_STREAMS = 64  # names and patterns in one `subscribe`
MAX_SEQ = 2**53  # what JavaScript can count to

STREAM_PATH = "/v1/stream/"
SUBSCRIBE_PATH = "/v1/subscribe"
HISTORY_PATH = "/v1/streams"  # and below it, by GET: what the log keeps

# Of a stream's URL: goes on with a stream whose connection was lost, and what was missed of its log.
# `resume` is the token of its `session.created`, `after` the last `seq` seen. The server answers with
# `session.resumed` first; the client sends its audio from that sample on.
RESUME_PARAMETER, AFTER_PARAMETER = "resume", "after"
HEALTH_PATH = "/healthz"
READY_PATH = "/readyz"
METRICS_PATH = "/metrics"
TOKEN_PARAMETER = "token"  # of a URL's query, for clients that cannot set the header `Authorization`


class CloseCode(enum.IntEnum):
    """Why the server closed a WebSocket connection."""

    NORMAL = 1000  # the client asked, or the stream it watched is over
    GOING_AWAY = 1001  # the server is stopping; everything said so far was sent
    TOO_BIG = 1009  # one message was larger than the server takes
    INTERNAL = 1011  # a fault of the server's
    BAD_MESSAGE = 4400  # too many messages that could not be read
    BAD_AUDIO = 4401  # audio that cannot be what the stream declared
    FORBIDDEN = 4403  # the token does not allow what was asked for
    NOT_FOUND = 4404  # no such stream
    IDLE = 4408  # nothing arrived for too long
    REPLACED = 4409  # the stream goes on over a newer connection of its producer
    TOO_SLOW = 4410  # the reader could not keep up: reconnect and resume after the last `seq`
    TOO_FAST = 4429  # audio came too far ahead of real time
    ENGINE_LOST = 4503  # the engine could not be brought back


class HttpStatus(enum.IntEnum):
    """What the server answers instead of opening a WebSocket, or to a plain GET."""

    OK = 200
    BAD_REQUEST = 400  # a query parameter is wrong; the body says which
    UNAUTHORIZED = 401  # no token, or one the server does not know
    FORBIDDEN = 403  # the token does not allow it, or the page's origin is not let in
    NOT_FOUND = 404  # no such path
    METHOD_NOT_ALLOWED = 405  # another method than GET
    CONFLICT = 409  # a stream of this name is live, and the request has no token of it
    GONE = 410  # the stream to resume was finalised, or the log does not keep it any more
    URI_TOO_LONG = 414  # the first line of the request has more than 8 KiB
    UPGRADE_REQUIRED = 426  # a WebSocket path without an upgrade
    TOO_MANY = 429  # connections, streams or subscriptions are at their limit, or attempts came too fast
    HEADERS_TOO_LARGE = 431  # a header has more than 8 KiB, or there are more than 128
    UNAVAILABLE = 503  # the engine is not ready, every slot is taken, or the log's disk is full


@dataclass(frozen=True, slots=True)
class Answer:
    """How a refusal is answered: before a WebSocket is open by a status, after it by a close code."""

    code: HttpStatus | CloseCode | None  # None: the connection is dropped, nobody could read an answer
    text: str  # what the client reads; details may follow it


class Refusal(enum.Enum):
    """Everything the server refuses, once each. The name in small letters is the metric's label."""

    BAD_PATH = Answer(HttpStatus.NOT_FOUND, "no such path")
    BAD_METHOD = Answer(HttpStatus.METHOD_NOT_ALLOWED, "only GET is answered here")
    BAD_QUERY = Answer(HttpStatus.BAD_REQUEST, "a parameter cannot be used")
    NO_TOKEN = Answer(
        HttpStatus.UNAUTHORIZED, "a token is needed: Authorization: Bearer TOKEN, or ?token=TOKEN"
    )
    UNKNOWN_TOKEN = Answer(HttpStatus.UNAUTHORIZED, "the token is not known here, or has expired")
    BAD_SCOPE = Answer(HttpStatus.FORBIDDEN, "the token does not allow this")
    BAD_ORIGIN = Answer(HttpStatus.FORBIDDEN, "pages of this origin are not let in")
    UNKNOWN_STREAM = Answer(HttpStatus.NOT_FOUND, "the log keeps nothing of this")
    NAME_TAKEN = Answer(HttpStatus.CONFLICT, "a stream of this name is live")
    NOT_ITS_TOKEN = Answer(HttpStatus.CONFLICT, "the stream is live, and is resumed with another token")
    IS_OVER = Answer(HttpStatus.GONE, "the stream is over, and was not this token's")
    NO_UPGRADE = Answer(HttpStatus.UPGRADE_REQUIRED, "this path takes WebSocket connections")
    TOO_MANY_ATTEMPTS = Answer(HttpStatus.TOO_MANY, "too many requests from this address")
    TOO_MANY_CONNECTIONS = Answer(HttpStatus.TOO_MANY, "every connection is taken")
    TOO_MANY_OF_ADDRESS = Answer(HttpStatus.TOO_MANY, "this address has all the connections it may have")
    TOO_MANY_STREAMS_OF_TOKEN = Answer(HttpStatus.TOO_MANY, "this token has all the streams it may have")
    TOO_MANY_READERS_OF_TOKEN = Answer(HttpStatus.TOO_MANY, "this token has all the subscribers it may have")
    ENGINE_NOT_READY = Answer(HttpStatus.UNAVAILABLE, "the engine is not ready")
    NO_SLOT = Answer(HttpStatus.UNAVAILABLE, "every slot is taken")
    LOG_FULL = Answer(HttpStatus.UNAVAILABLE, "the log's disk is full")
    TOO_BIG = Answer(CloseCode.TOO_BIG, "a message is larger than the server takes")
    BAD_MESSAGE = Answer(CloseCode.BAD_MESSAGE, "too many messages that could not be read")
    BAD_AUDIO = Answer(CloseCode.BAD_AUDIO, "audio that cannot be what the stream declared")
    FORBIDDEN = Answer(CloseCode.FORBIDDEN, "the token does not allow these streams")
    IDLE = Answer(CloseCode.IDLE, "nothing arrived for too long")
    REPLACED = Answer(CloseCode.REPLACED, "the stream goes on over a newer connection")
    TOO_SLOW = Answer(CloseCode.TOO_SLOW, "the reader could not keep up")
    TOO_FAST = Answer(CloseCode.TOO_FAST, "audio came too far ahead of real time")
    NO_HANDSHAKE = Answer(None, "no whole request came in time, or it was no HTTP")
    HALF_OPEN = Answer(None, "too many connections were waiting with an unfinished request")

    @property
    def label(self) -> str:
        """Its name where it is counted."""
        return self.name.lower()


ErrorCode = Literal[
    "bad_json",  # the text frame is no JSON object
    "bad_message",  # an object, but not a message this endpoint takes
    "bad_audio",  # bytes that cannot be samples of the declared format
    "unknown_stream",  # a subscription names a stream the server does not know
    "forbidden",  # the token does not allow it
    "too_fast",  # audio too far ahead of real time
    "unsupported",  # understood, but the loaded model cannot do it
    "busy",  # too many questions of this stream wait for their answers
    "engine_lost",  # the engine died; it is being restarted or could not be
    "internal",  # a fault of the server's, logged there
]


class ProtocolError(ValueError):
    """A message that is not what the protocol allows: says what came and what was expected."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


# --- what the server sends ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Word:
    """One word with its place on the stream's clock."""

    text: str
    start_ms: int
    end_ms: int
    score: float  # the model's probability of the word, 0 to 1


@dataclass(frozen=True, slots=True)
class SessionCreated:
    """A stream began. The only message that carries wall-clock time."""

    type: ClassVar[str] = "session.created"
    model: str
    tasks: tuple[str, ...]  # what the model answers: "transcript", "events", "emotion", "answer"
    languages: tuple[str, ...]
    epoch_ms: int  # Unix time of the stream's first sample
    sample_rate_hz: int = SAMPLE_RATE_HZ
    resume_token: str | None = None  # to the stream's producer alone: goes on after a lost connection


@dataclass(frozen=True, slots=True)
class SessionResumed:
    """The producer's connection is back: send the audio from sample `n_samples` on."""

    type: ClassVar[str] = "session.resumed"
    n_samples: int  # that the server has: per channel, at the client's own rate
    end_ms: int


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """A stream ended; nothing follows."""

    type: ClassVar[str] = "session.closed"
    # "closed", "disconnected", "idle", "server_stopping", "bad_input", "engine_lost", "internal",
    # "server_lost": after the server was killed, it could not be gone on with
    reason: str
    duration_ms: int
    n_words: int
    n_segments: int


@dataclass(frozen=True, slots=True)
class Ack:
    """Everything up to here has arrived and is on disk. Counted at the rate the client sends."""

    type: ClassVar[str] = "ack"
    n_samples: int  # per channel, at the client's own rate
    end_ms: int


@dataclass(frozen=True, slots=True)
class SpeechStarted:
    """Somebody began to speak."""

    type: ClassVar[str] = "speech.started"
    start_ms: int


@dataclass(frozen=True, slots=True)
class SpeechStopped:
    """Nobody speaks any more."""

    type: ClassVar[str] = "speech.stopped"
    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class TranscriptInterim:
    """Everything after the committed text, replacing the interim before it; may be empty."""

    type: ClassVar[str] = "transcript.interim"
    text: str
    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class TranscriptDelta:
    """Newly committed words; append-only. Joining every delta's text with a space is the transcript."""

    type: ClassVar[str] = "transcript.delta"
    text: str
    words: tuple[Word, ...]
    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class TranscriptFinal:
    """A closed segment: what its deltas said, whole."""

    type: ClassVar[str] = "transcript.final"
    text: str
    words: tuple[Word, ...]
    language: str | None
    speaker: str | None
    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class EventStarted:
    """A sound event began; `event.ended` will carry the same id."""

    type: ClassVar[str] = "event.started"
    id: str
    label: str
    score: float
    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class EventEnded:
    """A sound event is over: its onset and offset."""

    type: ClassVar[str] = "event.ended"
    id: str
    label: str
    score: float
    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class EmotionUpdate:
    """How the speaker sounded over a span."""

    type: ClassVar[str] = "emotion.update"
    label: str
    scores: Mapping[str, float]
    valence: float | None
    arousal: float | None
    description: str | None  # the model's own words, where it has them
    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """A piece of the answer to an `ask`."""

    type: ClassVar[str] = "answer.delta"
    id: str
    text: str


@dataclass(frozen=True, slots=True)
class AnswerFinal:
    """The whole answer to an `ask`."""

    type: ClassVar[str] = "answer.final"
    id: str
    text: str
    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class Lag:
    """The reader is behind: how many messages wait for it."""

    type: ClassVar[str] = "lag"
    n_waiting: int


@dataclass(frozen=True, slots=True)
class Degraded:
    """The server is behind on this stream, and what it gave up."""

    type: ClassVar[str] = "degraded"
    # "overload": decode points were skipped; "engine_restart", "server_restart": a gap in time
    reason: str
    message: str
    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class Flushed:
    """Echo of a client's `flush`: all audio before it is committed and its finals are sent."""

    type: ClassVar[str] = "flushed"
    id: str
    end_ms: int


@dataclass(frozen=True, slots=True)
class Error:
    """Something the server could not do; `fatal` means that the connection ends."""

    type: ClassVar[str] = "error"
    code: ErrorCode
    message: str
    fatal: bool


Message = (
    SessionCreated
    | SessionResumed
    | SessionClosed
    | Ack
    | SpeechStarted
    | SpeechStopped
    | TranscriptInterim
    | TranscriptDelta
    | TranscriptFinal
    | EventStarted
    | EventEnded
    | EmotionUpdate
    | AnswerDelta
    | AnswerFinal
    | Lag
    | Degraded
    | Flushed
    | Error
)

MESSAGE_TYPES: Mapping[str, type[Message]] = {
    cls.type: cls
    for cls in (
        SessionCreated,
        SessionResumed,
        SessionClosed,
        Ack,
        SpeechStarted,
        SpeechStopped,
        TranscriptInterim,
        TranscriptDelta,
        TranscriptFinal,
        EventStarted,
        EventEnded,
        EmotionUpdate,
        AnswerDelta,
        AnswerFinal,
        Lag,
        Degraded,
        Flushed,
        Error,
    )
}

# Not in the log: an interim is replaced by the next, the others concern one connection only.
UNLOGGED: frozenset[str] = frozenset(
    {TranscriptInterim.type, SessionResumed.type, Ack.type, Lag.type, Error.type}
)


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message with its place in its stream's log.

    A message that is not logged carries the `seq` of the last logged one before it.
    """

    stream: str
    seq: int
    message: Message
    _frame: list[str] = field(default_factory=list, init=False, repr=False, compare=False)  # once encoded


def encode(envelope: Envelope) -> str:
    """The text frame of one server message; made once, for however many readers."""
    if not envelope._frame:
        body = {"type": envelope.message.type, "stream": envelope.stream, "seq": envelope.seq}
        body |= dataclasses.asdict(envelope.message)
        envelope._frame.append(json.dumps(body, ensure_ascii=False, separators=(",", ":")))
    return envelope._frame[0]


def decode(text: str | bytes) -> Envelope:
    """Read one server message.

    Fields this version does not know are left out, so that older clients read newer servers.

    Raises:
        ProtocolError: the text is no message of a known type with its fields.
    """
    body = _json_object(text)
    cls = MESSAGE_TYPES.get(str(body.get("type")))
    if cls is None:
        raise ProtocolError("bad_message", f"unknown message type {body.get('type')!r}")
    values: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        if item.name in body:
            values[item.name] = body[item.name]
        elif item.default is dataclasses.MISSING:
            raise ProtocolError("bad_message", f"{cls.type} without {item.name!r}")
    try:
        if "words" in values:
            values["words"] = tuple(Word(**word) for word in values["words"])
        for name in ("tasks", "languages"):
            if name in values:
                values[name] = tuple(values[name])
        envelope = Envelope(str(body["stream"]), int(body["seq"]), cls(**values))
    except KeyError as exc:
        raise ProtocolError("bad_message", f"{cls.type} without {exc.args[0]!r}") from exc
    except (TypeError, ValueError) as exc:
        raise ProtocolError("bad_message", f"{cls.type} that cannot be read: {exc}") from exc
    if isinstance(text, str):
        envelope._frame.append(text)
    return envelope


# --- what a client sends -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SessionUpdate:
    """Change a setting of the live stream from here on. None leaves it as it is."""

    type: ClassVar[str] = "session.update"
    language: str | None = None


@dataclass(frozen=True, slots=True)
class Flush:
    """Commit everything heard so far, then answer `flushed` with this id."""

    type: ClassVar[str] = "flush"
    id: str


@dataclass(frozen=True, slots=True)
class Ask:
    """A question about the last `last_ms` milliseconds."""

    type: ClassVar[str] = "ask"
    id: str
    question: str
    last_ms: int


@dataclass(frozen=True, slots=True)
class Close:
    """No more audio: finalise, send `session.closed`, close the connection."""

    type: ClassVar[str] = "close"


@dataclass(frozen=True, slots=True)
class Subscribe:
    """What a subscriber wants to hear. An empty `types` means all of them.

    `streams` are names, or patterns in which `*` stands for any characters: those pick up every
    stream that begins later, and their subscription does not end by itself. `after` asks for
    logged messages first, oldest first:

    - a number: of each stream, those after this `seq`; 0 for all that is kept;
    - an object with one name and `seq`: the last logged message that was received, of whichever
      stream. It gives what the log took after that message, of all the streams. So a
      subscription of many streams resumes without a gap. All that is kept comes where the log
      does not have that message any more;
    - None: begins with the next message.
    """

    type: ClassVar[str] = "subscribe"
    streams: tuple[str, ...]
    types: tuple[str, ...] = field(default=())
    after: int | Mapping[str, int] | None = None


ClientMessage = SessionUpdate | Flush | Ask | Close | Subscribe
STREAM_MESSAGES: tuple[type[ClientMessage], ...] = (SessionUpdate, Flush, Ask, Close)
SUBSCRIBER_MESSAGES: tuple[type[ClientMessage], ...] = (Subscribe, Close)


def encode_client(message: ClientMessage) -> str:
    """The text frame of one client message."""
    return json.dumps({"type": message.type} | dataclasses.asdict(message), ensure_ascii=False)


def decode_client(text: str | bytes, allowed: Sequence[type[ClientMessage]]) -> ClientMessage:
    """Read one client message of the types this endpoint takes.

    Raises:
        ProtocolError: no JSON object, another type, an unknown field, or a value out of range.
    """
    if len(text) > MAX_TEXT_CHARS:
        raise ProtocolError(
            "bad_message", f"a text frame of {len(text)} characters; expected at most {MAX_TEXT_CHARS}"
        )
    body = _json_object(text)
    names = {cls.type: cls for cls in allowed}
    kind = body.pop("type", None)
    cls = names.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ProtocolError("bad_message", f"type is {_shown(kind)}; expected one of {sorted(names)}")
    unknown = sorted(set(body) - {item.name for item in dataclasses.fields(cls)})
    if unknown:
        raise ProtocolError("bad_message", f"{cls.type} has no field {_shown(unknown[0])}")
    return _READERS[cls](_Fields(cls.type, body))


class _Fields:
    """The fields of one client message, read with checks that name what was wrong."""

    def __init__(self, kind: str, body: Mapping[str, Any]) -> None:
        self._kind = kind
        self._body = body

    def text(self, name: str, max_chars: int) -> str:
        value = self._body.get(name)
        if not isinstance(value, str) or not 0 < len(value) <= max_chars:
            raise self._wrong(name, f"a text of 1 to {max_chars} characters")
        if not _is_text(value):
            raise self._wrong(name, "a text without half a surrogate pair")
        return value

    def optional_text(self, name: str, max_chars: int) -> str | None:
        return None if self._body.get(name) is None else self.text(name, max_chars)

    def integer(self, name: str, low: int, high: int) -> int:
        value = self._body.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self._wrong(name, f"an integer from {low} to {high}")
        return value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        return None if self._body.get(name) is None else self.integer(name, low, high)

    def texts(self, name: str, max_items: int, max_chars: int) -> tuple[str, ...]:
        value = self._body.get(name, [])
        if (
            not isinstance(value, list)
            or len(value) > max_items
            or not all(isinstance(item, str) and 0 < len(item) <= max_chars for item in value)
        ):
            raise self._wrong(name, f"a list of at most {max_items} texts")
        return tuple(value)

    def position(self, name: str) -> int | Mapping[str, int] | None:
        value = self._body.get(name)
        if not isinstance(value, dict):
            return self.optional_integer(name, 0, MAX_SEQ)
        for stream, seq in value.items():
            is_seq = isinstance(seq, int) and not isinstance(seq, bool) and 0 <= seq <= MAX_SEQ
            if len(value) == 1 and STREAM_NAME.fullmatch(stream) and is_seq:
                return {stream: seq}
        raise self._wrong(name, f"a number, or an object with one stream's name and its seq up to {MAX_SEQ}")

    def _wrong(self, name: str, expected: str) -> ProtocolError:
        got = _shown(self._body[name]) if name in self._body else "missing"
        return ProtocolError("bad_message", f"{self._kind}.{name} is {got}; expected {expected}")


def _read_session_update(fields: _Fields) -> SessionUpdate:
    return SessionUpdate(language=fields.optional_text("language", 16))


def _read_flush(fields: _Fields) -> Flush:
    return Flush(id=fields.text("id", MAX_ID_CHARS))


def _read_ask(fields: _Fields) -> Ask:
    return Ask(
        id=fields.text("id", MAX_ID_CHARS),
        question=fields.text("question", MAX_QUESTION_CHARS),
        last_ms=fields.integer("last_ms", 1, 24 * 3600 * 1000),
    )


def _read_close(_: _Fields) -> Close:
    return Close()


def _read_subscribe(fields: _Fields) -> Subscribe:
    streams = fields.texts("streams", MAX_SUBSCRIBED_STREAMS, 64)
    if not streams:
        raise ProtocolError("bad_message", "subscribe.streams is empty; expected a stream's name")
    for name in streams:
        if not STREAM_PATTERN.fullmatch(name):
            raise ProtocolError(
                "bad_message", f"{_shown(name)} is no stream name or pattern: {STREAM_PATTERN.pattern}"
            )
    types = fields.texts("types", len(MESSAGE_TYPES), 64)
    for name in types:
        if name not in MESSAGE_TYPES:
            raise ProtocolError("bad_message", f"unknown message type {_shown(name)}")
    return Subscribe(streams, types, fields.position("after"))


_READERS: Mapping[type[ClientMessage], Callable[[_Fields], ClientMessage]] = {
    SessionUpdate: _read_session_update,
    Flush: _read_flush,
    Ask: _read_ask,
    Close: _read_close,
    Subscribe: _read_subscribe,
}


def _json_object(text: str | bytes) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError("bad_json", f"no JSON: {exc}"[:200]) from exc
    if not isinstance(body, dict):
        raise ProtocolError("bad_json", f"got JSON of type {type(body).__name__}; expected an object")
    return body


def _is_text(value: str) -> bool:
    """Whether a text can be sent: JSON can write half a surrogate pair, UTF-8 cannot."""
    return not any("\ud800" <= char <= "\udfff" for char in value)


def _shown(value: object) -> str:
    """A client's value for an error text: cut, so that it cannot flood logs or replies."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_pattern(name: str) -> bool:
    """Whether it stands for more than one stream."""
    return "*" in name


def ms_of(n_samples: int) -> int:
    """Milliseconds of a position on the 16 kHz sample clock."""
    return n_samples * 1000 // SAMPLE_RATE_HZ
