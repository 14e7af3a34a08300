"""The connection of a live stream's producer: audio and control in, all messages of the stream out.

Where the producer ends the stream, or does what it must not, the stream is finalised first and its
reader is told why. A connection that is merely lost leaves the stream to wait for the next one.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from streaming import aio
from streaming.config import LimitsConfig, ServerConfig
from streaming.errors import (
    BadMessages,
    ConnectionOver,
    IdleConnection,
    Replaced,
    ServerStopping,
    SlowReader,
)
from streaming.log.hub import Subscription
from streaming.log.log import Log
from streaming.protocol import (
    STREAM_MESSAGES,
    Ask,
    Close,
    CloseCode,
    Envelope,
    Error,
    Flush,
    Message,
    ProtocolError,
    SessionCreated,
    SessionUpdate,
    decode,
    decode_client,
    encode,
)
from streaming.server import ws
from streaming.server.limits import AudioPace
from streaming.stream.lifetime import LiveStream

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProducerLimits:
    """The settings a producer's connection goes by."""

    server: ServerConfig
    limits: LimitsConfig
    ack_interval_s: float
    languages: tuple[str, ...]  # codes the model can be set to
    language: str | None  # the server's setting, where a client asks for none; None: detect
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
        live: LiveStream,
        reader: Subscription,
        log: Log,
        limits: ProducerLimits,
        stopping: asyncio.Event,
        *,
        claim: int,
        token: str | None,
    ) -> None:
        """Speak for a stream whose slot is free.

        Args:
            connection: Open.
            live: The stream.
            reader: Of the stream's messages, for this connection.
            log: Of all streams.
            limits: What the connection goes by.
            stopping: Set when the server stops.
            claim: Of this connection on the stream's producer slot.
            token: Of a new stream, for its `session.created`; None: this connection resumes it.
        """
        self._connection = connection
        self._live = live
        self._session = live.session
        self._audio = live.audio
        self._reader = reader
        self._claim = claim
        self._token = token
        self._log = log
        self._limits = limits
        self._stopping = stopping
        self._n_bad = 0
        self._pace = limits.new_pace()

    async def run(self) -> None:
        """Converse until the stream is over or the connection is, and close.

        Raises:
            StreamFault: the stream failed.
            ConnectionClosed: the connection was lost before anything was said.
            Replaced: a newer connection claimed the slot before this one had it.
        """
        self._live.slot.attach(self._claim, self._reader)
        tasks: list[asyncio.Task[None]] = []
        try:
            if self._token is None:
                await self._connection.send(encode(self._envelope(self._audio.resume())))
            sender = asyncio.create_task(self._send(), name=f"send {self._session.name}")
            tasks.append(sender)
            over, reason = await self._converse(sender)
            tasks.append(
                asyncio.create_task(ws.discard(self._connection), name=f"discard {self._session.name}")
            )
            if reason is None:
                self._live.slot.detach(self._reader)
                await aio.cancel(sender)
            else:
                self._live.end(reason)
                await self._live.ended()
                if not sender.done():
                    await ws.send_rest(self._connection, self._reader, sender)
            await ws.close(self._connection, self._reader, over)
        finally:
            self._live.slot.detach(self._reader)
            await aio.cancel(*tasks)

    async def _send(self) -> None:
        """Send the stream's messages; only its producer learns the token."""
        async for row in self._reader:
            frame = row.frame
            if row.type == SessionCreated.type and self._token is not None:
                created = decode(frame)
                assert isinstance(created.message, SessionCreated), created
                message = replace(created.message, resume_token=self._token)
                frame = encode(replace(created, message=message)).encode()
            await self._connection.send(frame, text=True)

    def tell(self, message: Message) -> None:
        """Queue a message for this producer alone."""
        self._reader.put(self._envelope(message))

    def _envelope(self, message: Message) -> Envelope:
        name = self._session.name
        return Envelope(name, self._log.directory.last_seq(name), message)

    async def _converse(self, sender: asyncio.Task[None]) -> tuple[ConnectionOver | None, str | None]:
        """What ended it, if not the client, and the reason for `session.closed`; None: the stream goes on."""
        try:
            await aio.race(
                self._receive(),
                _overtaken(sender),
                self._live.ended(),
                self._live.slot.watch(self._claim),
                self._session.watch_engine(),
                aio.raise_when(self._stopping, ServerStopping("the server is stopping")),
                aio.raise_when(self._reader.is_behind, SlowReader("the reader is too slow")),
            )
        except ConnectionClosed as exc:
            return None, None if _is_lost(exc) else "disconnected"
        except (SlowReader, Replaced) as over:
            logger.warning("stream %s: connection ends: %s", self._session.name, over)
            return over, None
        except ConnectionOver as over:
            name = self._session.name
            logger.log(
                logging.INFO if isinstance(over, ServerStopping) else logging.WARNING,
                "stream %s: ends: %s",
                name,
                over,
            )
            for envelope in ws.fatal_error(name, self._log.directory.last_seq(name), over):
                self._reader.put(envelope)
            return over, over.reason
        return None, "closed"

    async def _receive(self) -> None:
        """Take frames until the client asks to close.

        Raises:
            ConnectionClosed: it is gone.
            ConnectionOver: it sent what it must not, or nothing for too long.
        """
        while True:
            frame = await self._next_frame()
            if isinstance(frame, bytes):
                loop = asyncio.get_running_loop()
                came_at = loop.time()
                wait_s = self._pace.take(self._audio.seconds_of(len(frame)), came_at)
                await self._audio.feed(frame)
                if (left_s := came_at + wait_s - loop.time()) > 0:
                    await asyncio.sleep(left_s)  # and the socket is not read meanwhile
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
                    await self._audio.flush()
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
        if self._audio.has_unacknowledged:
            try:
                async with asyncio.timeout_at(min(now + self._limits.ack_interval_s, idle_at)):
                    return await self._connection.recv()
            except TimeoutError:
                self._audio.acknowledge()
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


async def _overtaken(sender: asyncio.Task[None]) -> None:
    """Raise what ended the sender. A lost connection is no reason: what was received is still taken."""
    await asyncio.wait({sender})
    if not sender.cancelled() and not isinstance(sender.exception(), ConnectionClosed):
        sender.result()
    await asyncio.Event().wait()


def _is_lost(exc: ConnectionClosed) -> bool:
    """Whether a connection ended against the will of both sides; its producer may come back."""
    if exc.sent is not None and not exc.rcvd_then_sent:
        return False  # closed by us, for something the client sent
    return exc.rcvd is None or exc.rcvd.code != CloseCode.NORMAL
