"""What the server sends: every message, its fields, and the text frame that carries it.

Times are integers, milliseconds since the stream's first sample.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, get_args

import msgspec
from msgspec import Meta

from streaming.protocol.codes import SAMPLE_RATE_HZ, ErrorCode, ProtocolError, shown


def _type_of(name: str) -> str:
    """The `type` of a message class: `TranscriptDelta` is `transcript.delta`."""
    return re.sub(r"(?<!^)([A-Z])", r".\1", name).lower()


class Tagged(msgspec.Struct, frozen=True, gc=False, tag_field="type", tag=_type_of):
    """A JSON object whose field `type` names its class."""

    type: ClassVar[str]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.type = _type_of(cls.__name__)


# --- what the server sends ---------------------------------------------------------------

# A field that came later: the log may hold messages without it.
SINCE_0_2 = {"since": "0.2"}
SEPARATOR = "what stands between the committed text before it and `text`: a space, or nothing"


class Word(msgspec.Struct, frozen=True, gc=False):
    """One word with its place on the stream's clock."""

    text: str
    start_ms: int
    end_ms: int
    score: Annotated[float, Meta(description="the model's probability of the word, 0 to 1")]


class SessionCreated(Tagged, frozen=True):
    """A stream began. The only message that carries wall-clock time."""

    model: str
    tasks: Annotated[
        tuple[str, ...],
        Meta(description='what the model answers: "transcript", "events", "emotion", "answer"'),
    ]
    languages: tuple[str, ...]
    epoch_ms: Annotated[int, Meta(description="Unix time of the stream's first sample")]
    sample_rate_hz: int = SAMPLE_RATE_HZ
    resume_token: Annotated[
        str | None, Meta(description="to the stream's producer alone: goes on after a lost connection")
    ] = None


class SessionResumed(Tagged, frozen=True):
    """The producer's connection is back: send the audio from sample `n_samples` on."""

    n_samples: Annotated[int, Meta(description="that the server has: per channel, at the client's own rate")]
    end_ms: int


class SessionClosed(Tagged, frozen=True):
    """A stream ended; nothing follows."""

    reason: Annotated[
        str,
        Meta(
            description='"closed", "disconnected", "idle", "server_stopping", "bad_input", "engine_lost", '
            '"internal", "server_lost": the server crashed and the stream could not be resumed'
        ),
    ]
    duration_ms: int
    n_words: int
    n_segments: int


class Ack(Tagged, frozen=True):
    """Everything up to here has arrived and is on disk. Counted at the rate the client sends."""

    n_samples: Annotated[int, Meta(description="per channel, at the client's own rate")]
    end_ms: int


class SpeechStarted(Tagged, frozen=True):
    """Somebody began to speak."""

    start_ms: int


class SpeechStopped(Tagged, frozen=True):
    """Nobody speaks any more."""

    start_ms: int
    end_ms: int


class TranscriptInterim(Tagged, frozen=True):
    """Everything after the committed text, replacing the interim before it; may be empty."""

    text: str
    start_ms: int
    end_ms: int
    separator: Annotated[str, Meta(description=SEPARATOR, extra=SINCE_0_2)] = " "


class TranscriptDelta(Tagged, frozen=True):
    """Newly committed words; append-only. All deltas' `separator` and `text`, joined, are the transcript."""

    text: str
    words: tuple[Word, ...]
    start_ms: int
    end_ms: int
    separator: Annotated[str, Meta(description=SEPARATOR, extra=SINCE_0_2)] = " "


class TranscriptFinal(Tagged, frozen=True):
    """A closed segment: what its deltas said, whole."""

    text: str
    words: tuple[Word, ...]
    language: str | None
    speaker: str | None
    start_ms: int
    end_ms: int


class EventStarted(Tagged, frozen=True):
    """A sound event began; `event.ended` will carry the same id."""

    id: str
    label: str
    score: float
    start_ms: int
    end_ms: int


class EventEnded(Tagged, frozen=True):
    """A sound event is over: its onset and offset."""

    id: str
    label: str
    score: float
    start_ms: int
    end_ms: int


class EmotionUpdate(Tagged, frozen=True):
    """How the speaker sounded over a span."""

    label: str
    scores: Mapping[str, float]
    valence: float | None
    arousal: float | None
    description: Annotated[str | None, Meta(description="the model's own words, where it has them")]
    start_ms: int
    end_ms: int


class AnswerDelta(Tagged, frozen=True):
    """A piece of the answer to an `ask`."""

    id: str
    text: str


class AnswerFinal(Tagged, frozen=True):
    """The whole answer to an `ask`."""

    id: str
    text: str
    start_ms: int
    end_ms: int


class Lag(Tagged, frozen=True):
    """The reader is behind: how many messages wait for it."""

    n_waiting: int


class Degraded(Tagged, frozen=True):
    """The server is behind on this stream, and what it gave up."""

    reason: Annotated[
        str,
        Meta(
            description='"overload": decode points were skipped; "engine_restart", "server_restart": '
            "a gap in time"
        ),
    ]
    message: str
    start_ms: int
    end_ms: int


class Flushed(Tagged, frozen=True):
    """Echo of a client's `flush`: all audio before it is committed and its finals are sent."""

    id: str
    end_ms: int


class Error(Tagged, frozen=True):
    """Something the server could not do; `fatal` means that the connection ends."""

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

MESSAGE_TYPES: Mapping[str, type[Message]] = {cls.type: cls for cls in get_args(Message)}

# Not in the log: an interim is replaced by the next, the others concern one connection only.
UNLOGGED: frozenset[str] = frozenset(
    {TranscriptInterim.type, SessionResumed.type, Ack.type, Lag.type, Error.type}
)


class Envelope(msgspec.Struct, frozen=True, gc=False):
    """A message with its place in its stream's log.

    A message that is not logged carries the `seq` of the last logged one before it.
    """

    stream: str
    seq: int
    message: Message


class _Head(msgspec.Struct, frozen=True, gc=False):
    """What every message of a server begins with."""

    type: str
    stream: str
    seq: int


_ENCODER = msgspec.json.Encoder()
_HEAD = msgspec.json.Decoder(_Head)
_DECODERS = {name: msgspec.json.Decoder(cls) for name, cls in MESSAGE_TYPES.items()}


def encode(envelope: Envelope) -> str:
    """The text frame of one server message: its head, then the fields of the message."""
    message = envelope.message
    head = _ENCODER.encode(_Head(message.type, envelope.stream, envelope.seq))
    fields = _ENCODER.encode(message)[len('{"type":""') + len(message.type) :]
    return (head[:-1] + fields).decode()


def decode(text: str | bytes) -> Envelope:
    """Read one server message.

    Fields this version does not know are left out, so that older clients read newer servers.

    Raises:
        ProtocolError: the text is no message of a known type with its fields.
    """
    try:
        head = _HEAD.decode(text)
        if head.type not in _DECODERS:
            raise ProtocolError("bad_message", f"unknown message type {shown(head.type)}")
        return Envelope(head.stream, head.seq, _DECODERS[head.type].decode(text))
    except msgspec.ValidationError as exc:
        raise ProtocolError("bad_message", f"a message that cannot be read: {exc}"[:200]) from exc
    except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        raise ProtocolError("bad_json", f"no JSON: {exc}"[:200]) from exc
