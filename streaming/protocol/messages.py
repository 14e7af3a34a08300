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
SEPARATOR = "goes between the committed text so far and `text`: a space or nothing"

StartMs = Annotated[int, Meta(description="start, in stream time")]
EndMs = Annotated[int, Meta(description="end, in stream time")]
Words = Annotated[tuple["Word", ...], Meta(description="the words of `text` with their times")]
EventId = Annotated[
    str, Meta(description="the same in an event's two messages, and of no other event of any session")
]
EventLabel = Annotated[str, Meta(description="what kind of sound")]
AskId = Annotated[str, Meta(description="the `id` of the `ask`")]


class Word(msgspec.Struct, frozen=True, gc=False):
    """One word and its time span."""

    text: Annotated[str, Meta(description="with its punctuation, without spaces around it")]
    start_ms: StartMs
    end_ms: EndMs
    score: Annotated[float, Meta(description="the model's probability of the word, 0 to 1")]


class SessionCreated(Tagged, frozen=True):
    """A session of the stream began; its audio may come much later."""

    model: Annotated[str, Meta(description="the name of the loaded model")]
    tasks: Annotated[
        tuple[str, ...],
        Meta(description='what the model can do: "transcript", "events", "emotion", "answer"'),
    ]
    languages: Annotated[tuple[str, ...], Meta(description="codes that `language` accepts beside `auto`")]
    epoch_ms: Annotated[
        int, Meta(description="Unix time of the opening, which may lie before the first sample")
    ]
    sample_rate_hz: Annotated[
        int, Meta(description="of the sample clock behind every time; not the client's own rate")
    ] = SAMPLE_RATE_HZ
    resume_token: Annotated[
        str | None,
        Meta(description="resumes the stream after a lost connection; null for all but its producer"),
    ] = None


class SessionResumed(Tagged, frozen=True):
    """The producer's connection is resumed: send audio from sample `n_samples` on."""

    n_samples: Annotated[
        int,
        Meta(
            description="samples that the server has, those of gaps included: per channel, at the client's "
            "own rate"
        ),
    ]
    end_ms: EndMs


class SessionClosed(Tagged, frozen=True):
    """The session ended; what follows under the stream's name is of another session."""

    reason: Annotated[
        str,
        Meta(
            description='"closed", "disconnected", "idle", "server_stopping", "bad_input", "engine_lost", '
            '"internal", "server_lost": the server crashed and the stream could not be resumed'
        ),
    ]
    duration_ms: Annotated[int, Meta(description="of the audio that arrived, and of the gaps in it")]
    n_words: Annotated[int, Meta(description="committed words")]
    n_segments: Annotated[int, Meta(description="closed segments: `transcript.final` messages")]


class AudioGap(Tagged, frozen=True):
    """The producer has no audio of this span and said so: silence stands for it."""

    start_ms: StartMs
    end_ms: EndMs


class Ack(Tagged, frozen=True):
    """All audio up to here has arrived and is on the server's disk."""

    n_samples: Annotated[
        int,
        Meta(
            description="samples since the stream began, those of gaps included: per channel, at the "
            "client's own rate"
        ),
    ]
    end_ms: EndMs
    wall_ms: Annotated[
        int | None,
        Meta(
            description="Unix time at which the newest of this audio came; null where that was before the "
            "server's start",
            extra=SINCE_0_2,
        ),
    ] = None


class SpeechStarted(Tagged, frozen=True):
    """Speech started."""

    start_ms: StartMs


class SpeechStopped(Tagged, frozen=True):
    """Speech stopped."""

    start_ms: StartMs
    end_ms: EndMs


class TranscriptInterim(Tagged, frozen=True):
    """The hypothesis after the committed text. Replaces the interim before it."""

    text: Annotated[str, Meta(description="may still change; empty where nothing is left uncommitted")]
    start_ms: StartMs
    end_ms: EndMs
    separator: Annotated[str, Meta(description=SEPARATOR, extra=SINCE_0_2)] = " "


class TranscriptDelta(Tagged, frozen=True):
    """Newly committed words, never revised. Every `separator` + `text`, in order, is the transcript."""

    text: Annotated[str, Meta(description="the committed words as running text")]
    words: Words
    start_ms: StartMs
    end_ms: EndMs
    separator: Annotated[str, Meta(description=SEPARATOR, extra=SINCE_0_2)] = " "


class TranscriptFinal(Tagged, frozen=True):
    """A closed segment: the text of its deltas, joined."""

    text: Annotated[str, Meta(description="the segment as running text")]
    words: Words
    language: Annotated[
        str | None,
        Meta(description="of all its words, where the model gives one; a change closes a segment"),
    ]
    speaker: Annotated[str | None, Meta(description="reserved; null")]
    start_ms: StartMs
    end_ms: EndMs


class EventStarted(Tagged, frozen=True):
    """A sound event began; its `event.ended` has the same id."""

    id: EventId
    label: EventLabel
    score: Annotated[float, Meta(description="the model's probability so far, 0 to 1")]
    start_ms: StartMs
    end_ms: EndMs


class EventEnded(Tagged, frozen=True):
    """A sound event ended: its onset and offset."""

    id: EventId
    label: EventLabel
    score: Annotated[float, Meta(description="the model's highest probability, 0 to 1")]
    start_ms: StartMs
    end_ms: EndMs


class EmotionUpdate(Tagged, frozen=True):
    """The speaker's emotion over a time span."""

    label: Annotated[str, Meta(description="the emotion chosen")]
    scores: Annotated[Mapping[str, float], Meta(description="the probability of each emotion")]
    valence: Annotated[float | None, Meta(description="unpleasant to pleasant, where the model gives it")]
    arousal: Annotated[float | None, Meta(description="calm to excited, where the model gives it")]
    description: Annotated[str | None, Meta(description="the voice in words, where the model gives it")]
    start_ms: StartMs
    end_ms: EndMs


class AnswerDelta(Tagged, frozen=True):
    """A piece of the answer to an `ask`."""

    id: AskId
    text: Annotated[str, Meta(description="continues the pieces before it")]


class AnswerFinal(Tagged, frozen=True):
    """The whole answer to an `ask`; the times are the audio that it is about."""

    id: AskId
    text: Annotated[str, Meta(description="the answer")]
    start_ms: StartMs
    end_ms: EndMs
    is_cut: Annotated[
        bool,
        Meta(
            description="the answer did not end by itself: its budget of tokens ran out, or it "
            "repeated itself",
            extra=SINCE_0_2,
        ),
    ] = False
    thinking: Annotated[
        str,
        Meta(description='what the model wrote before its answer; "" where it does not', extra=SINCE_0_2),
    ] = ""


class Subscribed(Tagged, frozen=True):
    """Answers a `subscribe` with `confirm`: of a single stream, the messages after this `seq` follow."""

    log: Annotated[str, Meta(description="the id of the server's log: another one counts `seq` anew")]
    live: Annotated[
        tuple[str, ...], Meta(description="the streams among those subscribed to that are live now")
    ]


class Lag(Tagged, frozen=True):
    """The reader is too slow; its connection is closed next."""

    n_waiting: Annotated[int, Meta(description="messages queued for it")]


class Degraded(Tagged, frozen=True):
    """The server lost or skipped work on this stream."""

    reason: Annotated[
        str,
        Meta(
            description='"overload": decode points were skipped; "engine_restart", "server_restart": '
            'a gap in time; "too_quiet": most of the speech is below what endpointing lets through'
        ),
    ]
    message: Annotated[str, Meta(description="the same for people to read")]
    start_ms: StartMs
    end_ms: EndMs


class Flushed(Tagged, frozen=True):
    """Answers a `flush`: everything sent before it is committed and its finals are sent."""

    id: Annotated[str, Meta(description="the `id` of the `flush`")]
    end_ms: EndMs


class Error(Tagged, frozen=True):
    """Something the server could not do."""

    code: ErrorCode
    message: Annotated[str, Meta(description="what came and what was expected")]
    fatal: Annotated[bool, Meta(description="the connection ends")]


Message = (
    SessionCreated
    | SessionResumed
    | SessionClosed
    | AudioGap
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
    | Subscribed
    | Lag
    | Degraded
    | Flushed
    | Error
)

MESSAGE_TYPES: Mapping[str, type[Message]] = {cls.type: cls for cls in get_args(Message)}

# Not logged: the next interim replaces an interim, the others concern one connection.
UNLOGGED: frozenset[str] = frozenset(
    {TranscriptInterim.type, SessionResumed.type, Ack.type, Subscribed.type, Lag.type, Error.type}
)


class Envelope(msgspec.Struct, frozen=True, gc=False):
    """A message with its position in its stream's log.

    A message that is not logged carries the `seq` of the last logged one before it.
    """

    stream: str
    seq: int
    message: Message
    session: str = ""  # id of the stream's session; empty: a message of a connection, or an older server's
    epoch_ms: int | None = None  # Unix time of stream time 0; None: not known


class _Head(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The first fields of every server message, which all but `session` and `epoch_ms` have had always."""

    type: str
    stream: str
    seq: int
    session: str | None = None
    epoch_ms: int | None = None


_ENCODER = msgspec.json.Encoder()
_HEAD = msgspec.json.Decoder(_Head)
_DECODERS = {name: msgspec.json.Decoder(cls) for name, cls in MESSAGE_TYPES.items()}


def encode(envelope: Envelope) -> str:
    """The text frame of one server message."""
    return encode_bytes(envelope).decode()


def encode_bytes(envelope: Envelope) -> bytes:
    """The text frame of one server message in UTF-8: its head, then the fields of the message."""
    message = envelope.message
    # `session.created` has the time as a field of its own.
    epoch_ms = None if isinstance(message, SessionCreated) else envelope.epoch_ms
    head = _ENCODER.encode(
        _Head(message.type, envelope.stream, envelope.seq, envelope.session or None, epoch_ms)
    )
    fields = _ENCODER.encode(message)[len('{"type":""') + len(message.type) :]
    return head[:-1] + fields


def decode(text: str | bytes) -> Envelope:
    """Read one server message.

    Ignores fields that this version does not know, so that older clients read newer servers.

    Raises:
        ProtocolError: the text is no message of a known type with its fields.
    """
    try:
        head = _HEAD.decode(text)
        if head.type not in _DECODERS:
            raise ProtocolError("bad_message", f"unknown message type {shown(head.type)}")
        message = _DECODERS[head.type].decode(text)
        epoch_ms = None if isinstance(message, SessionCreated) else head.epoch_ms
        return Envelope(head.stream, head.seq, message, head.session or "", epoch_ms)
    except msgspec.ValidationError as exc:
        raise ProtocolError("bad_message", f"a message that cannot be read: {exc}"[:200]) from exc
    except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        raise ProtocolError("bad_json", f"no JSON: {exc}"[:200]) from exc
