"""Paths, limits, close codes, HTTP statuses and error codes of the wire protocol."""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING, Annotated, Literal, Self

from msgspec import Meta

DEFAULT_PORT = 8765
SAMPLE_RATE_HZ = 16_000  # of the sample clock that every time on the wire counts

STREAM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
STREAM_PATTERN = re.compile(r"[A-Za-z0-9*][A-Za-z0-9._*-]{0,63}")  # a name, or with `*` many of them
AUDIO_FORMATS = ("s16le", "f32le", "mulaw", "alaw")
MIN_RATE_HZ, MAX_RATE_HZ = 8_000, 48_000
MAX_CHANNELS = 8  # of a stream's audio, mixed to one
MAX_ID_CHARS = 64  # of a client's `flush` and `ask`
MAX_QUESTION_CHARS = 2_000  # of an `ask`
MAX_GAP_MS = 24 * 3600 * 1000  # of one `gap`
MAX_TEXT_CHARS = 65_536  # of a client's text frame; a subscriber's frame of more bytes closes with 1009
MAX_SUBSCRIBED_STREAMS = 64  # names and patterns in one `subscribe`
MAX_SEQ = 2**53  # what JavaScript can count to
MAX_SESSION_CHARS = 64  # of the id of a session or of a log
AFTER_LIVE = "live"  # of a `subscribe`: from the beginning of the sessions that are live

STREAM_PATH = "/v1/stream/"
SUBSCRIBE_PATH = "/v1/subscribe"
HISTORY_PATH = "/v1/streams"  # and below it, by GET: what the log keeps

# Of a stream's URL: resumes a stream whose connection was lost, and replays the messages missed.
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

    NORMAL = 1000, "the client closed, or what was asked for has ended"
    GOING_AWAY = 1001, "the server is stopping; every message so far was sent"
    TOO_BIG = 1009, "a message is larger than the server accepts"
    INTERNAL = 1011, "an internal error"
    BAD_MESSAGE = 4400, "too many malformed messages"
    BAD_AUDIO = 4401, "the audio is not in the declared format"
    FORBIDDEN = 4403, "the token does not permit the request"
    NOT_FOUND = 4404, "no such stream"
    IDLE = 4408, "nothing arrived before the time limit"
    REPLACED = 4409, "the producer resumed the stream over a newer connection"
    TOO_SLOW = 4410, "the reader did not keep up: reconnect and resume after the last `seq`"
    TOO_FAST = 4429, "audio arrived too far ahead of real time"
    ENGINE_LOST = 4503, "the engine could not be restarted"


class HttpStatus(_Code):
    """What the server answers instead of opening a WebSocket, or to a plain GET."""

    OK = 200, "the answer to a GET"
    NO_CONTENT = 204, "the answer to a browser's preflight from one of `server.origins`"
    BAD_REQUEST = 400, "a query parameter is wrong; the body says which"
    UNAUTHORIZED = 401, "no token, or an unknown one"
    FORBIDDEN = 403, "the token does not permit it, or the page's origin is not allowed"
    NOT_FOUND = 404, "no such path"
    METHOD_NOT_ALLOWED = 405, "a method other than GET and HEAD"
    CONFLICT = 409, "a stream of this name is live, and the request lacks its resume token"
    GONE = 410, "the stream to resume was finalised, or is no longer in the log"
    URI_TOO_LONG = 414, "the first line of the request is longer than 8 KiB"
    UPGRADE_REQUIRED = 426, "a WebSocket path without an upgrade"
    TOO_MANY = 429, "a limit of connections, streams, subscriptions or attempts is reached"
    HEADERS_TOO_LARGE = 431, "a header is longer than 8 KiB, or there are more than 128"
    UNAVAILABLE = 503, "the engine is not ready, no slot is free, or the log cannot be written"


ERROR_CODES = {
    "bad_json": "the text frame is not a JSON object",
    "bad_message": "an object, but no message that this endpoint accepts",
    "bad_audio": "bytes that are no samples of the declared format",
    "unknown_stream": "a subscription names a stream the server does not know",
    "forbidden": "the token does not permit it",
    "too_fast": "audio too far ahead of real time",
    "unsupported": "valid, but the loaded model cannot do it",
    "busy": "too many questions of this stream are waiting",
    "engine_lost": "the engine crashed; it is restarting, or could not restart",
    "internal": "an internal error; the server's log has more",
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
    """A message that violates the protocol: says what came and what was expected."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def is_pattern(name: str) -> bool:
    """Whether a name stands for more than one stream."""
    return "*" in name


def ms_of(n_samples: int) -> int:
    """Milliseconds of a position on the 16 kHz sample clock."""
    return n_samples * 1000 // SAMPLE_RATE_HZ


def shown(value: object) -> str:
    """A client's value for an error text, shortened so that it cannot flood logs or replies."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
