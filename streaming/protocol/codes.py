"""Paths, limits, close codes, HTTP statuses and error codes of the wire protocol."""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING, Annotated, Literal, Self

from msgspec import Meta

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


class _Code(enum.IntEnum):
    """A number on the wire and what it means."""

    meaning: str

    def __new__(cls, value: int, meaning: str = "") -> Self:
        code = int.__new__(cls, value)
        code._value_ = value
        code.meaning = meaning
        return code


class CloseCode(_Code):
    """Why the server closed a WebSocket connection."""

    NORMAL = 1000, "the client asked, or the stream it watched is over"
    GOING_AWAY = 1001, "the server is stopping; everything said so far was sent"
    TOO_BIG = 1009, "one message was larger than the server takes"
    INTERNAL = 1011, "a fault of the server's"
    BAD_MESSAGE = 4400, "too many messages that could not be read"
    BAD_AUDIO = 4401, "audio that cannot be what the stream declared"
    FORBIDDEN = 4403, "the token does not allow what was asked for"
    NOT_FOUND = 4404, "no such stream"
    IDLE = 4408, "nothing arrived for too long"
    REPLACED = 4409, "the stream goes on over a newer connection of its producer"
    TOO_SLOW = 4410, "the reader could not keep up: reconnect and resume after the last `seq`"
    TOO_FAST = 4429, "audio came too far ahead of real time"
    ENGINE_LOST = 4503, "the engine could not be brought back"


class HttpStatus(_Code):
    """What the server answers instead of opening a WebSocket, or to a plain GET."""

    OK = 200, "the answer to a GET"
    BAD_REQUEST = 400, "a query parameter is wrong; the body says which"
    UNAUTHORIZED = 401, "no token, or one the server does not know"
    FORBIDDEN = 403, "the token does not allow it, or the page's origin is not let in"
    NOT_FOUND = 404, "no such path"
    METHOD_NOT_ALLOWED = 405, "another method than GET"
    CONFLICT = 409, "a stream of this name is live, and the request has no token of it"
    GONE = 410, "the stream to resume was finalised, or the log does not keep it any more"
    URI_TOO_LONG = 414, "the first line of the request has more than 8 KiB"
    UPGRADE_REQUIRED = 426, "a WebSocket path without an upgrade"
    TOO_MANY = 429, "connections, streams or subscriptions are at their limit, or attempts came too fast"
    HEADERS_TOO_LARGE = 431, "a header has more than 8 KiB, or there are more than 128"
    UNAVAILABLE = 503, "the engine is not ready, every slot is taken, or the log's disk is full"


ERROR_CODES = {
    "bad_json": "the text frame is no JSON object",
    "bad_message": "an object, but not a message this endpoint takes",
    "bad_audio": "bytes that cannot be samples of the declared format",
    "unknown_stream": "a subscription names a stream the server does not know",
    "forbidden": "the token does not allow it",
    "too_fast": "audio too far ahead of real time",
    "unsupported": "understood, but the loaded model cannot do it",
    "busy": "too many questions of this stream wait for their answers",
    "engine_lost": "the engine died; it is being restarted or could not be",
    "internal": "a fault of the server's, logged there",
}
if TYPE_CHECKING:
    ErrorCode = Literal[
        "bad_json",
        "bad_message",
        "bad_audio",
        "unknown_stream",
        "forbidden",
        "too_fast",
        "unsupported",
        "busy",
        "engine_lost",
        "internal",
    ]
else:  # any text is read: an older client must read the code of a newer server
    ErrorCode = Annotated[str, Meta(extra_json_schema={"enum": list(ERROR_CODES)})]


class ProtocolError(ValueError):
    """A message that is not what the protocol allows: says what came and what was expected."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def is_pattern(name: str) -> bool:
    """Whether it stands for more than one stream."""
    return "*" in name


def ms_of(n_samples: int) -> int:
    """Milliseconds of a position on the 16 kHz sample clock."""
    return n_samples * 1000 // SAMPLE_RATE_HZ


def shown(value: object) -> str:
    """A client's value for an error text: cut, so that it cannot flood logs or replies."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
