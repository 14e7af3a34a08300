"""What can go wrong with one connection or with the engine, and how it ends.

MossLiveError
├── BadQuery          a connection's URL asks for what cannot be; HTTP 400
├── LogError          the log's file cannot be used; the server does not start, or ends
│   └── LogFull           there is no room on its disk; everything waits until there is
├── StreamFault       a fault of the server's ended a stream; its connection closes with 1011
├── EngineFault       the engine exited, hung or broke its protocol; it is restarted
│   └── EngineUnfit       its settings or its model cannot be used; a first start ends the server
└── ConnectionOver    ends one connection; each kind knows its close code
    ├── BadAudio          4401, the stream ends with "bad_input"
    ├── BadMessages       4400, "bad_input"
    ├── Forbidden         4403, subscribers alone
    ├── TooFast           4429, "bad_input"
    ├── IdleConnection    4408, "idle"
    ├── Replaced          4409, the stream continues over another connection
    ├── SlowReader        4410, "disconnected"
    ├── EngineLost        4503, "engine_lost"
    └── ServerStopping    1001, "server_stopping"

Beside them `protocol.ProtocolError` (one unreadable message) and `config.ConfigError`.
"""

from __future__ import annotations

from typing import ClassVar

from streaming.protocol import CloseCode, ErrorCode


class MossLiveError(Exception):
    """The root of the errors listed above."""


class BadQuery(MossLiveError):
    """A query parameter cannot be used: says which, what came and what was expected."""


class EngineFault(MossLiveError):
    """The engine process cannot be used any more; says why."""


class EngineUnfit(EngineFault):
    """The engine cannot work with these settings or this model: says which, and what was expected."""


class LogError(MossLiveError):
    """The log's file cannot be used: says which, and what to do."""


class LogFull(LogError):
    """The log could not be written for now: no room, or another program holds the file."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason  # in a few words, for whoever asks why


class StreamFault(MossLiveError):
    """A fault of the server's ended this stream; it was logged where it happened."""


class ConnectionOver(MossLiveError):
    """The connection ends for a reason of the server's."""

    close_code: ClassVar[CloseCode]
    error_code: ClassVar[ErrorCode | None]  # of the `error` message sent first; None: none is sent
    reason: ClassVar[str]  # of the stream's `session.closed`


class BadAudio(ConnectionOver):
    """Bytes that cannot be audio of the declared format."""

    close_code = CloseCode.BAD_AUDIO
    error_code = "bad_audio"
    reason = "bad_input"


class BadMessages(ConnectionOver):
    """Too many malformed messages."""

    close_code = CloseCode.BAD_MESSAGE
    error_code = "bad_message"
    reason = "bad_input"


class Forbidden(ConnectionOver):
    """The token does not allow what a message asks for."""

    close_code = CloseCode.FORBIDDEN
    error_code = "forbidden"
    reason = "bad_input"


class TooFast(ConnectionOver):
    """Audio came too far ahead of real time."""

    close_code = CloseCode.TOO_FAST
    error_code = "too_fast"
    reason = "bad_input"


class IdleConnection(ConnectionOver):
    """Nothing arrived for too long."""

    close_code = CloseCode.IDLE
    error_code = None
    reason = "idle"


class Replaced(ConnectionOver):
    """The stream's producer is back on another connection."""

    close_code = CloseCode.REPLACED
    error_code = None
    reason = "disconnected"


class SlowReader(ConnectionOver):
    """The reader would lose a logged message."""

    close_code = CloseCode.TOO_SLOW
    error_code = None
    reason = "disconnected"


class EngineLost(ConnectionOver):
    """The engine could not be brought back."""

    close_code = CloseCode.ENGINE_LOST
    error_code = "engine_lost"
    reason = "engine_lost"


class ServerStopping(ConnectionOver):
    """The server was asked to stop."""

    close_code = CloseCode.GOING_AWAY
    error_code = None
    reason = "server_stopping"
