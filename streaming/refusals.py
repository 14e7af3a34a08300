"""Everything the server refuses, once each, and how each refusal is answered.

A refusal has one text for the client and one label for the metric.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from streaming.protocol import CloseCode, HttpStatus


@dataclass(frozen=True, slots=True)
class Reply:
    """How a refusal is answered: before a WebSocket is open by a status, after it by a close code."""

    code: HttpStatus | CloseCode | None  # None: the connection is dropped, nobody could read an answer
    text: str  # what the client reads; details may follow it


class Refusal(enum.Enum):
    """Everything the server refuses, once each. The name in small letters is the metric's label."""

    BAD_PATH = Reply(HttpStatus.NOT_FOUND, "no such path")
    BAD_METHOD = Reply(HttpStatus.METHOD_NOT_ALLOWED, "only GET and HEAD are answered here")
    BAD_QUERY = Reply(HttpStatus.BAD_REQUEST, "a parameter cannot be used")
    NO_TOKEN = Reply(
        HttpStatus.UNAUTHORIZED, "a token is needed: Authorization: Bearer TOKEN, or ?token=TOKEN"
    )
    UNKNOWN_TOKEN = Reply(HttpStatus.UNAUTHORIZED, "the token is not known here, or has expired")
    BAD_SCOPE = Reply(HttpStatus.FORBIDDEN, "the token does not allow this")
    BAD_ORIGIN = Reply(HttpStatus.FORBIDDEN, "pages of this origin are not let in")
    UNKNOWN_STREAM = Reply(HttpStatus.NOT_FOUND, "the log keeps nothing of this")
    NAME_TAKEN = Reply(HttpStatus.CONFLICT, "a stream of this name is live")
    NOT_ITS_TOKEN = Reply(HttpStatus.CONFLICT, "the stream is live, and is resumed with another token")
    IS_OVER = Reply(HttpStatus.GONE, "the stream is over, and was not this token's")
    NO_UPGRADE = Reply(HttpStatus.UPGRADE_REQUIRED, "this path takes WebSocket connections")
    TOO_MANY_ATTEMPTS = Reply(HttpStatus.TOO_MANY, "too many requests from this address")
    TOO_MANY_CONNECTIONS = Reply(HttpStatus.TOO_MANY, "every connection is taken")
    TOO_MANY_OF_ADDRESS = Reply(HttpStatus.TOO_MANY, "this address has all the connections it may have")
    TOO_MANY_STREAMS_OF_TOKEN = Reply(HttpStatus.TOO_MANY, "this token has all the streams it may have")
    TOO_MANY_NEW_STREAMS = Reply(HttpStatus.TOO_MANY, "this token has begun all the streams of a day")
    TOO_MANY_READERS_OF_TOKEN = Reply(HttpStatus.TOO_MANY, "this token has all the subscribers it may have")
    TOO_MANY_ANSWERS = Reply(HttpStatus.TOO_MANY, "too many answers of history are being read")
    ENGINE_NOT_READY = Reply(HttpStatus.UNAVAILABLE, "the engine is not ready")
    NO_SLOT = Reply(HttpStatus.UNAVAILABLE, "every slot is taken")
    LOG_FULL = Reply(HttpStatus.UNAVAILABLE, "the log cannot be written")
    TOO_BIG = Reply(CloseCode.TOO_BIG, "a message is larger than the server takes")
    BAD_MESSAGE = Reply(CloseCode.BAD_MESSAGE, "too many messages that could not be read")
    BAD_AUDIO = Reply(CloseCode.BAD_AUDIO, "audio that cannot be what the stream declared")
    FORBIDDEN = Reply(CloseCode.FORBIDDEN, "the token does not allow these streams")
    IDLE = Reply(CloseCode.IDLE, "nothing arrived for too long")
    REPLACED = Reply(CloseCode.REPLACED, "the stream goes on over a newer connection")
    TOO_SLOW = Reply(CloseCode.TOO_SLOW, "the reader could not keep up")
    TOO_FAST = Reply(CloseCode.TOO_FAST, "audio came too far ahead of real time")
    NO_HANDSHAKE = Reply(None, "no whole request came in time, or it was no HTTP")
    UNREAD = Reply(None, "the client did not read the answers to its pings")
    STALLED = Reply(None, "the client stopped reading an answer")
    HALF_OPEN = Reply(None, "too many connections were waiting with an unfinished request")

    @property
    def label(self) -> str:
        """Its name where it is counted."""
        return self.name.lower()
