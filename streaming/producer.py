"""The connection of one live stream: audio and control in, all messages of the stream out.

However it ends, the stream is finalised first and its reader is told why.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from streaming import connection as wire
from streaming.config import LimitsConfig, ServerConfig
from streaming.errors import (
    BadMessages,
    ConnectionOver,
    EngineLost,
    IdleConnection,
    ServerStopping,
    SlowReader,
)
from streaming.hub import Subscription
from streaming.limits import AudioPace
from streaming.log import Log
from streaming.protocol import (
    STREAM_MESSAGES,
    Ask,
    Close,
    Envelope,
    Error,
    Flush,
    Message,
    ProtocolError,
    SessionUpdate,
    decode_client,
)
from streaming.session import Session

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProducerLimits:
    """The settings a producer's connection goes by."""

    server: ServerConfig
    limits: LimitsConfig
    ack_interval_s: float
    languages: tuple[str, ...]  # codes the model can be set to
    tasks: tuple[str, ...]  # what the model does

    def new_pace(self) -> AudioPace:
        """What holds back a client whose audio comes too fast, from now on."""
        limits = self.limits
        now = asyncio.get_running_loop().time()
        return AudioPace(limits.audio_speed, limits.audio_burst_s, limits.audio_ahead_s, now)


class Producer:
    """One producer's conversation."""

    def __init__(
        self,
        connection: ServerConnection,
        session: Session,
        reader: Subscription,
        log: Log,
        limits: ProducerLimits,
        stopping: asyncio.Event,
    ) -> None:
        self._connection = connection
        self._session = session
        self._reader = reader
        self._log = log
        self._limits = limits
        self._stopping = stopping
        self._n_bad = 0
        self._pace = limits.new_pace()

    async def run(self) -> None:
        """Converse until the stream is over, finalise it, and close."""
        sender = asyncio.create_task(
            wire.send_all(self._connection, self._reader), name=f"send {self._session.name}"
        )
        taking = asyncio.create_task(self._session.run(), name=f"results {self._session.name}")
        discarding: asyncio.Task[None] | None = None
        try:
            over, reason = await self._converse(taking)
            discarding = asyncio.create_task(
                wire.discard(self._connection), name=f"discard {self._session.name}"
            )
            if isinstance(over, SlowReader):
                await wire.cancel(sender)
            await self._finish(reason, taking)
            if not sender.done():
                await wire.send_rest(self._connection, self._reader, sender)
            await wire.close(self._connection, self._reader, over)
        finally:
            await wire.cancel(sender, taking, *([] if discarding is None else [discarding]))

    def tell(self, message: Message) -> None:
        """Queue a message for this producer alone."""
        name = self._session.name
        self._reader.put(Envelope(name, self._log.last_seq(name), message))

    async def _converse(self, taking: asyncio.Task[None]) -> tuple[ConnectionOver | None, str]:
        """What ended it, if not the client, and the reason for `session.closed`."""
        try:
            await wire.race(
                self._receive(),
                wire.ended(taking),
                wire.raise_when(self._session.is_lost, EngineLost("the engine could not be brought back")),
                wire.raise_when(self._stopping, ServerStopping("the server is stopping")),
                wire.raise_when(self._reader.is_behind, SlowReader("the reader is too slow")),
            )
        except ConnectionClosed:
            return None, "disconnected"
        except ConnectionOver as over:
            name = self._session.name
            logger.log(
                logging.INFO if isinstance(over, ServerStopping) else logging.WARNING,
                "stream %s: ends: %s",
                name,
                over,
            )
            for envelope in wire.fatal_error(name, self._log.last_seq(name), over):
                self._reader.put(envelope)
            return over, over.reason
        return None, "closed"

    async def _finish(self, reason: str, taking: asyncio.Task[None]) -> None:
        """Finalise; a server that stops waits for the engine no longer than its stop timeout."""
        try:
            await wire.race(self._session.finish(reason), wire.ended(taking), self._stop_deadline())
        finally:
            self._session.abandon(reason)

    async def _stop_deadline(self) -> None:
        await self._stopping.wait()
        await asyncio.sleep(self._limits.server.stop_timeout_s)

    async def _receive(self) -> None:
        """Take frames until the client asks to close.

        Raises:
            ConnectionClosed: it is gone.
            ConnectionOver: it sent what it must not, or nothing for too long.
        """
        while True:
            frame = await self._next_frame()
            if isinstance(frame, bytes):
                now = asyncio.get_running_loop().time()
                wait_s = self._pace.take(self._session.seconds_of(len(frame)), now)
                await self._session.feed(frame)
                if wait_s:
                    await asyncio.sleep(wait_s)  # and the socket is not read meanwhile
                continue
            try:
                message = decode_client(frame, STREAM_MESSAGES)
            except ProtocolError as exc:
                self._complain(exc)
                continue
            match message:
                case Close():
                    return
                case Flush(id=flush_id):
                    await self._session.flush(flush_id)
                case SessionUpdate():
                    self._update(message)
                case Ask() if "answer" in self._limits.tasks:
                    self._session.ask(message)
                case Ask():
                    self.tell(Error("unsupported", "the loaded model answers no questions", fatal=False))

    async def _next_frame(self) -> str | bytes:
        """The next frame; audio that waits for its `ack` gets it in the meantime."""
        now = asyncio.get_running_loop().time()
        idle_at = now + self._limits.server.idle_timeout_s
        if self._session.has_unacknowledged:
            try:
                async with asyncio.timeout_at(min(now + self._limits.ack_interval_s, idle_at)):
                    return await self._connection.recv()
            except TimeoutError:
                self._session.acknowledge()
        try:
            async with asyncio.timeout_at(idle_at):
                return await self._connection.recv()
        except TimeoutError:
            raise IdleConnection(f"nothing came for {self._limits.server.idle_timeout_s} s") from None

    def _update(self, update: SessionUpdate) -> None:
        if update.language is None:
            return
        if update.language == "auto":
            self._session.set_language(None)
        elif update.language in self._limits.languages:
            self._session.set_language(update.language)
        else:
            expected = ", ".join(("auto", *self._limits.languages))
            self._complain(
                ProtocolError(
                    "bad_message",
                    f"session.update.language is {update.language!r}; expected one of {expected}",
                )
            )

    def _complain(self, exc: ProtocolError) -> None:
        self._n_bad += 1
        self.tell(Error(exc.code, str(exc), fatal=False))
        if self._n_bad >= self._limits.server.max_bad_messages:
            raise BadMessages(f"{self._n_bad} messages that could not be read")
