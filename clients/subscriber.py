"""Reads a stream's messages, from session to session and through lost connections.

Knows the wire protocol and one WebSocket at a time, and resumes after the last `seq` it gave.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing

from msgspec.structs import replace
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from clients.connection import Backoff, ConnectFailed, closed_because, open_connection, receive
from clients.cursor import After, Position
from streaming.protocol import (
    SUBSCRIBE_PATH,
    UNLOGGED,
    CloseCode,
    Envelope,
    Error,
    SessionCreated,
    Subscribe,
    Subscribed,
    encode_client,
    is_pattern,
)

logger = logging.getLogger(__name__)

EAGER = Backoff()


def _ignore(_: object) -> None:
    return


class SubscriptionFailed(RuntimeError):
    """The server does not give the messages; says why, in its words."""


async def subscribe(
    server: str,
    stream: str,
    *,
    types: Sequence[str] = (),
    after: After = None,
    session: str | None = None,
    follow: bool = True,
    position: Position | None = None,
    on_subscribed: Callable[[Subscribed], None] = _ignore,
    wait_s: float = 0.0,
    backoff: Backoff = EAGER,
    token: str | None = None,
) -> AsyncGenerator[Envelope, None]:
    """The messages of `stream`, or of all that a pattern matches, from session to session, without end.

    Opens a lost connection again and resumes after the last `seq`: no logged message is missed or
    given twice. Of another log, whose `seq` counts anew, it takes all. An interim may be missed.

    Args:
        server: Such as ws://127.0.0.1:8765.
        stream: Its name, or a pattern.
        types: Message types to give; none means all.
        after: Give the logged messages after this first, as `Subscribe` says; None: none.
        session: Give this session alone, and end with it.
        follow: False: end when everything was given and nothing that is subscribed to is live.
        position: Begin there, not at `after`; kept up to date, before each message is given.
        on_subscribed: Called with what the server confirms, for each connection.
        wait_s: How long to wait for a stream that the server never knew, seconds.
        backoff: The pace of further attempts.
        token: For a server that requires one.

    Raises:
        SubscriptionFailed: the server refuses for good, does not know the stream within
            `wait_s`, or cannot be reached after `backoff.max_attempts`.
    """
    position = Position(after) if position is None else position
    request = Subscribe((stream,), tuple(types), session=session, follow=follow, confirm=True)
    subscription = _Subscription(server, request, position, on_subscribed, token)
    deadline = time.monotonic() + wait_s
    while True:
        async with aclosing(subscription.connection()) as messages:
            async for envelope in messages:
                if not types or envelope.message.type in types:  # else it concerns the connection
                    yield envelope
        match subscription.end:
            case _End.OVER:
                return
            case _End.REFUSED:
                raise SubscriptionFailed(subscription.reason)
            case _End.UNKNOWN:
                delay_s = backoff.delay_s(1)
                if time.monotonic() + delay_s > deadline:
                    raise SubscriptionFailed(subscription.reason)
            case _End.LOST:
                if subscription.n_failed >= backoff.max_attempts:
                    raise SubscriptionFailed(subscription.reason)
                delay_s = backoff.delay_s(subscription.n_failed)
                logger.warning("%s; trying again in %.1f s", subscription.reason, delay_s)
        await asyncio.sleep(delay_s)


class _End(enum.Enum):
    """Why a connection gives no more messages."""

    OVER = enum.auto()  # what was asked for
    UNKNOWN = enum.auto()  # the server knows no such stream, yet
    LOST = enum.auto()  # another connection may resume
    REFUSED = enum.auto()  # another attempt would not help


class _Subscription:
    """One subscription over all its connections."""

    def __init__(
        self,
        server: str,
        request: Subscribe,
        position: Position,
        on_subscribed: Callable[[Subscribed], None],
        token: str | None,
    ) -> None:
        self.end = _End.LOST  # of the last connection
        self.reason = ""
        self.n_failed = 0  # connections lost in a row without a message
        self._url = f"{server.rstrip('/')}{SUBSCRIBE_PATH}"
        self._request = request
        self._position = position
        self._on_subscribed = on_subscribed
        self._is_pattern = is_pattern(request.streams[0])
        self._is_known = False  # a server knew the stream once
        self._is_subscribed = False  # on this connection
        self._error: str | None = None  # that ends this connection
        self._token = token

    async def connection(self) -> AsyncGenerator[Envelope, None]:
        """The new messages of one more connection; then `end` and `reason` say why there are no more."""
        self._error = None
        self._is_subscribed = False
        request = replace(self._request, after=self._position.after, log=self._position.log)
        try:
            async with await open_connection(self._url, token=self._token) as connection:
                await connection.send(encode_client(request))
                try:
                    async for envelope in self._new(connection):
                        yield envelope
                except (GeneratorExit, asyncio.CancelledError):
                    connection.transport.abort()  # a goodbye would wait behind what is not read any more
                    raise
        except ConnectFailed as exc:
            self._ended(_End.REFUSED if exc.is_lasting else _End.LOST, str(exc))
        except ConnectionClosed as exc:
            self._is_known = self._is_known or self._is_subscribed
            self._ended(_end_of(exc), self._error or closed_because(exc))

    async def _new(self, connection: ClientConnection) -> AsyncIterator[Envelope]:
        """The new messages of a connection, until the server knows no such stream.

        Raises:
            ConnectionClosed: it is over.
        """
        while True:
            envelope = await receive(connection)
            self.n_failed = 0
            match envelope.message:
                case Subscribed() as confirmed:
                    self._is_subscribed = True
                    self._confirm(envelope, confirmed)
                    continue
                case Error(code="unknown_stream") if self._is_known:
                    continue  # another log, in which it has not begun yet: it is subscribed to
                case Error(code="unknown_stream", message=reason):
                    is_for_good = self._request.session is not None
                    self._ended(_End.REFUSED if is_for_good else _End.UNKNOWN, reason)
                    return
                case Error(message=reason, fatal=True):
                    self._error = reason  # the close code that follows decides
            if self._is_new(envelope):
                yield envelope

    def _ended(self, end: _End, reason: str) -> None:
        self.end, self.reason = end, reason
        self.n_failed += end is _End.LOST

    def _confirm(self, envelope: Envelope, confirmed: Subscribed) -> None:
        """Take over where the server begins, and of which log that is."""
        if self._position.log not in (None, confirmed.log):
            logger.warning("the server has another log; everything that it keeps is new")
            self._position.after = 0
        self._position.log = confirmed.log
        if envelope.stream:
            self._position.after = envelope.seq
        self._on_subscribed(confirmed)

    def _is_new(self, envelope: Envelope) -> bool:
        """Whether a message was not given before; it then moves the position to resume from.

        `session.created` is always new: with a `seq` already seen, the name has a new stream.
        """
        message, after = envelope.message, self._position.after
        is_logged = message.type not in UNLOGGED
        self._is_known = self._is_known or is_logged
        may_repeat = is_logged and not isinstance(message, SessionCreated)
        if self._is_pattern:
            if is_logged:
                self._position.after = {envelope.stream: envelope.seq}
            return True
        if may_repeat and isinstance(after, int) and envelope.seq <= after:
            return False
        if envelope.stream:  # else it concerns the connection, and its `seq` is no position
            self._position.after = envelope.seq
        return True


def _end_of(exc: ConnectionClosed) -> _End:
    match exc.rcvd.code if exc.rcvd else None:
        case CloseCode.NORMAL:
            return _End.OVER
        case CloseCode.NOT_FOUND:
            return _End.UNKNOWN
        case CloseCode.BAD_MESSAGE | CloseCode.FORBIDDEN:
            return _End.REFUSED
        case _:
            return _End.LOST
