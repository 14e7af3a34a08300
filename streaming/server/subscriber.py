"""The connection of one subscriber: what it wants in, the streams' messages out."""

from __future__ import annotations

import asyncio
import logging

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from streaming import aio
from streaming.config import ServerConfig
from streaming.errors import (
    BadMessages,
    ConnectionOver,
    Forbidden,
    IdleConnection,
    ServerStopping,
    SlowReader,
)
from streaming.log.hub import Hub, Subscription
from streaming.log.log import Log
from streaming.protocol import (
    SUBSCRIBER_MESSAGES,
    ClientMessage,
    Envelope,
    Error,
    ErrorCode,
    ProtocolError,
    SessionClosed,
    SessionCreated,
    Subscribe,
    decode_client,
    is_pattern,
)
from streaming.server import ws
from streaming.server.auth import EVERYTHING, Grant, Scope
from streaming.server.limits import Attempts

logger = logging.getLogger(__name__)

SUBSCRIBES_PER_S, SUBSCRIBES_BURST = 2.0, 10  # of one connection


class Subscriber:
    """One subscriber's conversation.

    It ends when the client closes, and when all streams it reads were live or replayed and are over;
    with a pattern among them there may always be another.
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
        grant: Grant = EVERYTHING,
    ) -> None:
        self._connection = connection
        self._hub = hub
        self._known = log.directory
        self._config = config
        self._finalised = finalised  # the server is stopping, and no stream is live any more
        self._grant = grant
        self._over: set[str] = set()  # streams of which `session.closed` was sent
        self._n_bad = 0
        self._subscriptions = Attempts(SUBSCRIBES_PER_S, SUBSCRIBES_BURST)

    async def run(self) -> None:
        """Converse until it is over, and close."""
        with self._hub.subscription() as reader:
            sender = asyncio.create_task(self._send(reader), name="send subscriber")
            discarding: asyncio.Task[None] | None = None
            try:
                over = await self._converse(reader, sender)
                discarding = asyncio.create_task(ws.discard(self._connection), name="discard subscriber")
                if over is None or isinstance(over, SlowReader):
                    await aio.cancel(sender)
                else:
                    await ws.send_rest(self._connection, reader, sender)
                await ws.close(self._connection, reader, over)
            finally:
                await aio.cancel(sender, *([] if discarding is None else [discarding]))

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
            for envelope in ws.fatal_error("", 0, over):
                reader.put(envelope)
            return over
        return None

    async def _send(self, reader: Subscription) -> None:
        """Send until every stream that is read is over."""
        async for row in reader:
            await self._connection.send(row.frame, text=True)
            if row.type == SessionCreated.type:
                self._over.discard(row.stream)
            if row.type == SessionClosed.type and not self._known.is_open(row.stream):
                self._over.add(row.stream)
                if self._over.issuperset(reader.streams):
                    return

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
                self._complain(reader, exc.code, str(exc))
                continue
            if not isinstance(message, Subscribe):
                return
            self._check(message)
            await self._subscribe_slowly()
            self._over.clear()
            self._hub.subscribe(reader, message)
            unknown = [name for name in reader.streams if not (is_pattern(name) or self._known.has(name))]
            if unknown:
                text = f"no stream yet: {', '.join(unknown)}; messages come when it begins"
                reader.put(Envelope(unknown[0], 0, Error("unknown_stream", text, fatal=False)))

    async def _subscribe_slowly(self) -> None:
        """Wait while subscriptions come too fast: each looks at every stream that the log keeps."""
        clock = asyncio.get_running_loop()
        while not self._subscriptions.take("", clock.time()):  # noqa: ASYNC110  time passes by itself
            await asyncio.sleep(1 / SUBSCRIBES_PER_S)  # and the socket is not read meanwhile

    def _check(self, wanted: Subscribe) -> None:
        """Raises `Forbidden` where the token does not cover every stream that is asked for."""
        for name in wanted.streams:
            if not self._grant.covers(Scope.SUBSCRIBE, name):
                raise Forbidden(f"the token does not allow to subscribe to {name}")

    async def _next_frame(self, *, is_listening: bool) -> str | bytes:
        try:
            # A subscriber may listen in silence as long as it likes; pings find the dead ones.
            async with asyncio.timeout(None if is_listening else self._config.idle_timeout_s):
                return await self._connection.recv()
        except TimeoutError:
            raise IdleConnection(f"no subscribe for {self._config.idle_timeout_s} s") from None

    def _complain(self, reader: Subscription, code: ErrorCode, text: str) -> None:
        self._n_bad += 1
        reader.put(Envelope("", 0, Error(code, text, fatal=False)))
        if self._n_bad >= self._config.max_bad_messages:
            raise BadMessages(f"{self._n_bad} messages that could not be read")


def _read(frame: str | bytes) -> ClientMessage:
    if isinstance(frame, bytes):
        raise ProtocolError("bad_message", "a binary frame; expected subscribe or close")
    return decode_client(frame, SUBSCRIBER_MESSAGES)
