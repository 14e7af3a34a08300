"""The connection of one subscriber: what it wants in, the streams' messages out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

import msgspec
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from streaming import aio
from streaming.config import ServerConfig
from streaming.errors import (
    ConnectionOver,
    Forbidden,
    IdleConnection,
    ServerStopping,
    SlowReader,
)
from streaming.log.directory import Span
from streaming.log.hub import Hub, Subscription
from streaming.log.log import Log
from streaming.protocol import (
    MAX_TEXT_CHARS,
    SUBSCRIBE_PATH,
    SUBSCRIBER_MESSAGES,
    ClientMessage,
    Envelope,
    Error,
    ProtocolError,
    Subscribe,
    decode_client,
    encode,
    is_pattern,
)
from streaming.server import ws
from streaming.server.admission import Guard
from streaming.server.auth import Grant, Scope
from streaming.server.connection import Admitted, GuardedConnection
from streaming.server.limits import Attempts
from streaming.server.routes import Handshake, SocketRoute

logger = logging.getLogger(__name__)

SUBSCRIBES_PER_S, SUBSCRIBES_BURST = 2.0, 10  # of one connection


class Subscribers:
    """Admits and serves them."""

    def __init__(
        self, config: ServerConfig, log: Log, hub: Hub, guard: Guard, finalised: asyncio.Event
    ) -> None:
        """Subscribers of a server.

        Args:
            config: What their connections go by.
            log: Of all streams.
            hub: Of all readers.
            guard: Counts them.
            finalised: Set when the server is stopping and no stream is live any more.
        """
        self._config = config
        self._log = log
        self._hub = hub
        self._guard = guard
        self._finalised = finalised

    def routes(self) -> tuple[SocketRoute, ...]:
        """Where one subscribes; which streams, the connection says."""
        return (SocketRoute(SUBSCRIBE_PATH, Scope.SUBSCRIBE, admit=self._admit),)

    def _admit(self, connection: GuardedConnection, _: Handshake) -> Admitted:
        """Take a place.

        Raises:
            Refused: there is none.
        """
        self._guard.take_reader(connection)
        # It sends no audio, and what half a message holds is memory.
        connection.protocol.max_message_size = min(MAX_TEXT_CHARS, self._config.max_message_bytes)
        subscriber = Subscriber(
            connection,
            self._hub,
            self._log,
            self._config,
            self._finalised,
            partial(self._guard.granted_now, connection),
        )
        return Admitted("a subscriber", subscriber.run)


class Subscriber:
    """One subscriber's conversation.

    It goes on from one session of a stream to the next, until the client closes; where it asked for one
    session, or not to follow on, until all of that was sent and is over.
    A name that the server does not know is answered with a non-fatal `unknown_stream` and stays
    subscribed: its messages come when such a stream begins.
    """

    def __init__(
        self,
        connection: ServerConnection,
        hub: Hub,
        log: Log,
        config: ServerConfig,
        finalised: asyncio.Event,
        granted_now: Callable[[], Grant | None],
    ) -> None:
        self._connection = connection
        self._hub = hub
        self._log = log
        self._config = config
        self._finalised = finalised  # the server is stopping, and no stream is live any more
        self._granted_now = granted_now
        self._complaints = ws.Complaints(config.max_bad_messages)
        self._subscriptions = Attempts(SUBSCRIBES_PER_S, SUBSCRIBES_BURST)

    async def run(self) -> None:
        """Converse until it is over, and close."""
        with self._hub.subscription() as reader:
            async with aio.background(self._send(reader), "send subscriber") as sender:
                over = await self._converse(reader, sender)
                async with aio.background(ws.discard(self._connection), "discard subscriber"):
                    if over is None or isinstance(over, SlowReader):
                        await aio.cancel(sender)
                    else:
                        await ws.send_rest(reader, sender)
                    lag = [encode(reader.lag())] if isinstance(over, SlowReader) else []
                    await ws.close(self._connection, ws.closing_of(over), lag)

    async def _converse(self, reader: Subscription, sender: asyncio.Task[None]) -> ConnectionOver | None:
        """What ended it, if not the client or the streams."""
        try:
            await aio.race(
                self._receive(reader),
                aio.ended(sender),
                aio.raise_when(self._finalised, ServerStopping("the server is stopping")),
                aio.raise_when(reader.is_behind, SlowReader("the reader is too slow")),
            )
        except ConnectionClosed:
            return None
        except ConnectionOver as over:
            if over.error_code is not None:
                reader.put(Envelope("", 0, Error(over.error_code, str(over), fatal=True)))
            return over
        return None

    async def _send(self, reader: Subscription) -> None:
        """Send until what was asked for is over; a subscription that follows on never is."""
        async for row in reader:
            await self._connection.send(row.frame, text=True)

    async def _receive(self, reader: Subscription) -> None:
        """Take messages until the client asks to close.

        Raises:
            ConnectionClosed: it is gone.
            ConnectionOver: it sent what it must not, or subscribed to nothing for too long.
        """
        while True:
            frame = await self._next_frame(is_listening=bool(reader.streams))
            try:
                message = _read(frame)
            except ProtocolError as exc:
                reader.put(Envelope("", 0, Error(exc.code, str(exc), fatal=False)))
                self._complaints.count()
                continue
            if not isinstance(message, Subscribe):
                return
            self._check(message)
            await self._subscribe_slowly()
            if message.session is None:
                self._subscribe(reader, message)
            else:
                await self._subscribe_session(reader, message, message.session)

    def _subscribe(self, reader: Subscription, wanted: Subscribe) -> None:
        """Read streams, from session to session."""
        known = self._log.directory
        self._hub.subscribe(reader, wanted)
        unknown = [name for name in reader.streams if not (is_pattern(name) or known.has(name))]
        if unknown:
            text = f"no stream yet: {', '.join(unknown)}; messages come when it begins"
            reader.put(Envelope(unknown[0], 0, Error("unknown_stream", text, fatal=False)))

    async def _subscribe_session(self, reader: Subscription, wanted: Subscribe, session: str) -> None:
        """Read one session of a stream, up to its end.

        Raises:
            LogError: the log cannot be read.
        """
        name = wanted.streams[0]
        span = await self._log.reader.span(name, session)
        nothing = Span(session, 1, 0)
        self._hub.subscribe(reader, msgspec.structs.replace(wanted, follow=False), span or nothing)
        if span is None:
            text = f"no session {session!r} of {name} is kept"
            reader.put(Envelope(name, 0, Error("unknown_stream", text, fatal=False)))

    async def _subscribe_slowly(self) -> None:
        """Wait while subscriptions come too fast: each looks at every stream that the log keeps."""
        clock = asyncio.get_running_loop()
        while not self._subscriptions.take("", clock.time()):  # noqa: ASYNC110  time passes by itself
            await asyncio.sleep(1 / SUBSCRIBES_PER_S)  # and the socket is not read meanwhile

    def _check(self, wanted: Subscribe) -> None:
        """Raises `Forbidden` where the token does not cover every stream that is asked for."""
        grant = self._granted_now()
        if grant is None:
            raise Forbidden("the token was revoked, or has expired")
        for name in wanted.streams:
            if not grant.covers(Scope.SUBSCRIBE, name):
                raise Forbidden(f"the token does not allow to subscribe to {name}")

    async def _next_frame(self, *, is_listening: bool) -> str | bytes:
        try:
            # A subscriber may listen in silence as long as it likes; pings find the dead ones.
            async with asyncio.timeout(None if is_listening else self._config.idle_timeout_s):
                return await self._connection.recv()
        except TimeoutError:
            raise IdleConnection(f"no subscribe for {self._config.idle_timeout_s} s") from None


def _read(frame: str | bytes) -> ClientMessage:
    if isinstance(frame, bytes):
        raise ProtocolError("bad_message", "a binary frame; expected subscribe or close")
    return decode_client(frame, SUBSCRIBER_MESSAGES)
