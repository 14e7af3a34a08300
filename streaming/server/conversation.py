"""One connection of a stream's producer, in whatever protocol: audio in, the stream's messages out.

The loop of receiving, pacing, idling, complaining, sending and ending is here, once; a `Dialect` says
what a protocol says differently. Where the client ends the stream, or does what it must not, the
stream is finalised first and the client gets the rest of its messages. Where a connection is merely
lost, a stream of a resumable dialect waits for the next one; every other stream ends with it.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Protocol

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from streaming import aio
from streaming.audio.ingest import AudioFormat
from streaming.config import VadConfig
from streaming.errors import ConnectionOver, IdleConnection, Replaced, ServerStopping, SlowReader
from streaming.log.hub import Subscription
from streaming.log.row import Row, row_of
from streaming.protocol import CloseCode, Envelope, Error, Message
from streaming.server import ws
from streaming.server.limits import ProducerLimits
from streaming.server.spool import Inbox, Spool
from streaming.stream.audio_input import AudioInput
from streaming.stream.lifetime import LiveStream, ResumableStream, Resumption
from streaming.stream.registry import Streams
from streaming.stream.session import Session

logger = logging.getLogger(__name__)

Frame = str | bytes  # text to be sent, encoded or not


class BadMessage(ValueError):
    """One message that the client must not send; it is answered, and the client may continue.

    `code` and `param` are the protocol's own words for what is wrong and where.
    """

    def __init__(self, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class Dialect(ABC):
    """What one protocol says differently, on one connection. Belongs to the event loop."""

    name: str  # of its stream
    language: str | None = None  # as the URL asks; None: not said, "auto": detect
    headers: Mapping[str, str] = MappingProxyType({})  # added to the answer to the handshake

    @abstractmethod
    def begin(self, streams: Streams, language: str | None, vad: VadConfig) -> LiveStream:
        """Begin the stream.

        Args:
            streams: All of the server.
            language: That the stream is set to; None: detect.
            vad: As the server is set to.
        """

    def start(self, talk: Conversation) -> Sequence[Message]:
        """Make what is needed to take frames; gives what is sent before all other messages."""
        del talk
        return ()

    @abstractmethod
    def frames(self, row: Row) -> Iterable[Frame]:
        """What a message of the stream becomes; nothing, where the protocol has no word for it."""

    @abstractmethod
    async def take(self, frame: str | bytes, talk: Conversation) -> bool:
        """Do what a frame asks for; False once the client wants nothing more but the end.

        Raises:
            BadMessage: it is not what the protocol allows.
            ConnectionOver: it ends the connection.
        """

    @abstractmethod
    async def complain(self, exc: BadMessage, frame: str | bytes, talk: Conversation) -> None:
        """Answer a bad message."""

    @abstractmethod
    async def idle(self, talk: Conversation) -> None:
        """Do what is due after a while in which the client sent nothing."""

    async def work(self, talk: Conversation) -> None:
        """What goes on beside taking frames. Ends only by raising what ends the connection."""
        await asyncio.Event().wait()

    def closing(self, over: ConnectionOver | None) -> ws.Closing:
        """The close frame for an end: the client's own (None), or one of the server's reasons."""
        return ws.closing_of(over)

    @abstractmethod
    def stop(self) -> None:
        """Release what the dialect holds, whatever happened before. Does not wait."""


class ResumableDialect(Dialect):
    """A dialect in which a producer may come back to its stream."""

    resumption: Resumption | None  # of a producer that comes back; None: it begins a stream

    @abstractmethod
    def check(self, live: ResumableStream) -> None:
        """Refuse a stream that this connection cannot continue.

        Raises:
            BadQuery: the client declared something else than before.
        """

    @abstractmethod
    def resume(self, live: ResumableStream) -> None:
        """Continue a stream."""


class ClientAudio(Protocol):
    """What takes a client's audio bytes."""

    def seconds_of(self, n_bytes: int) -> float:
        """How long so many bytes last."""

    async def feed(self, data: bytes) -> None:
        """Take bytes, however cut."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """What joins a connection to its stream."""

    live: LiveStream
    claim: int  # of this connection on the stream's producer slot, which is free
    reader: Subscription  # of the stream's messages


class Conversation:
    """One producer's connection, from its first frame to its close."""

    def __init__(
        self,
        connection: ServerConnection,
        dialect: Dialect,
        attachment: Attachment,
        limits: ProducerLimits,
        *,
        envelope: Callable[[str, Message], Envelope],
        stopping: asyncio.Event,
    ) -> None:
        """Speak for a stream whose slot is free.

        Args:
            connection: Open.
            dialect: That is spoken.
            attachment: To the stream.
            limits: What the connection goes by.
            envelope: Of a message of a stream, by its name, that is not logged.
            stopping: Set when the server stops.
        """
        self.limits = limits
        self._connection = connection
        self._dialect = dialect
        self._is_resumable = isinstance(dialect, ResumableDialect)
        self._live = attachment.live
        self._claim = attachment.claim
        self._reader = attachment.reader
        self._enveloped = envelope
        self._stopping = stopping
        self._sending = asyncio.Lock()  # what one message becomes is not cut in two
        self._spool = Spool(limits.spool_folder, limits.spool_bytes)
        self._inbox = Inbox(connection, self._spool)
        self._has_begun = asyncio.Event()  # the stream's first message was sent
        self._complaints = ws.Complaints(limits.server.max_bad_messages)
        self._pace = limits.new_pace(asyncio.get_running_loop().time())

    @property
    def session(self) -> Session:
        """Of the stream."""
        return self._live.session

    # --- for the dialect -----------------------------------------------------------------

    def new_input(self, audio_format: AudioFormat) -> AudioInput:
        """A way into the session for audio of a format."""
        interval_s = self.limits.ack_interval_s
        return AudioInput(audio_format, self.session, self.session.tell, ack_interval_s=interval_s)

    async def feed(self, audio: ClientAudio, data: bytes) -> None:
        """Take audio bytes, however cut; waits while the session is full or they come too fast.

        Raises:
            BadAudio: they cannot be audio of their format.
            TooFast: they are further ahead of real time than the server allows.
        """
        async with self.paced(audio.seconds_of(len(data))):
            await audio.feed(data)

    @asynccontextmanager
    async def paced(self, audio_s: float) -> AsyncIterator[None]:
        """Count audio that came, and take it in the body; waits where it came too fast.

        Raises:
            TooFast: it is further ahead of real time than the server allows.
        """
        now = asyncio.get_running_loop().time()
        read_at = now + self._pace.take(audio_s, now)
        yield
        await aio.sleep_until(read_at)  # and what comes meanwhile waits in the spool

    async def send(self, make: Callable[[], Iterable[Frame]]) -> None:
        """Send frames that are made when it is their turn; nothing goes before the first message.

        Raises:
            ConnectionClosed: the peer is gone.
        """
        await self._has_begun.wait()
        await self._send(make)

    # --- from the first frame to the last ------------------------------------------------

    async def run(self) -> None:
        """Converse until the stream is over or the connection is, and close.

        Raises:
            StreamFault: the stream failed.
            ConnectionClosed: the connection was lost before anything was said.
            Replaced: a newer connection claimed the slot before this one had it.
        """
        name, reader, slot = self._live.name, self._reader, self._live.slot
        slot.attach(self._claim, reader)
        try:
            # 1. Both ways, until something ends the connection.
            for message in self._dialect.start(self):
                await self._send(partial(self._dialect.frames, row_of(self._envelope(message))))
            async with aio.background(self._send_all(), f"send {name}") as sender:
                over, reason = await self._converse(sender)
                # 2. The stream waits for the next connection, or ends and says so.
                async with aio.background(ws.discard(self._connection), f"discard {name}"):
                    if reason is None or isinstance(over, SlowReader):
                        await aio.cancel(sender)
                    if reason is None:
                        slot.detach(reader)
                    else:
                        self._live.end(reason)
                        await self._live.ended()
                    if not sender.done():
                        await ws.send_rest(reader, sender)
                    # 3. The close frame says why.
                    lag = self._dialect.frames(row_of(reader.lag())) if isinstance(over, SlowReader) else ()
                    await ws.close(self._connection, self._dialect.closing(over), lag)
        finally:
            if not self._is_resumable:
                self._live.end("internal")  # changes nothing unless something above failed
                await self._live.wait_over()
            slot.detach(reader)
            self._dialect.stop()
            self._spool.close()

    async def _send_all(self) -> None:
        async for row in self._reader:
            await self._send(partial(self._dialect.frames, row))
            self._has_begun.set()

    async def _send(self, make: Callable[[], Iterable[Frame]]) -> None:
        async with self._sending:
            for frame in make():
                await self._connection.send(frame, text=True)

    async def _converse(self, sender: asyncio.Task[None]) -> tuple[ConnectionOver | None, str | None]:
        """What ended it, if not the client, and the reason for `session.closed`; None: the stream goes on."""
        name, is_resumable = self._live.name, self._is_resumable
        try:
            await aio.race(
                self._inbox.fill(),
                self._receive(),
                self._dialect.work(self),
                ws.failed(sender),
                self._live.ended(),
                self._live.slot.watch(self._claim),
                self.session.watch_engine(),
                aio.raise_when(self._stopping, ServerStopping("the server is stopping")),
                aio.raise_when(self._reader.is_behind, SlowReader("the reader is too slow")),
            )
        except ConnectionClosed as exc:
            return None, None if is_resumable and _is_lost(exc) else "disconnected"
        except (SlowReader, Replaced) as over:
            # Without the text of what ended it, here as below, which may hold what a client sent.
            logger.warning("stream %s: connection ends: %s", name, type(over).__name__)
            return over, None if is_resumable else over.reason
        except ConnectionOver as over:
            level = logging.INFO if isinstance(over, ServerStopping) else logging.WARNING
            logger.log(level, "stream %s: ends: %s", name, type(over).__name__)
            if over.error_code is not None:
                self._reader.put(self._envelope(Error(over.error_code, str(over), fatal=True)))
            return over, over.reason
        return None, "closed"

    def _envelope(self, message: Message) -> Envelope:
        return self._enveloped(self._live.name, message)

    async def _receive(self) -> None:
        """Take frames until the client asks to end.

        Raises:
            ConnectionClosed: it is gone.
            ConnectionOver: it sent what it must not, or nothing for too long.
        """
        while True:
            frame = await self._next_frame()
            try:
                if not await self._dialect.take(frame, self):
                    return
            except BadMessage as exc:
                await self._dialect.complain(exc, frame, self)
                self._complaints.count()

    async def _next_frame(self) -> str | bytes:
        """The next frame; while there is none, the dialect gets its turn after each interval."""
        loop, idle_timeout_s = asyncio.get_running_loop(), self.limits.server.idle_timeout_s
        idle_at = loop.time() + idle_timeout_s
        while (now := loop.time()) < idle_at:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(min(now + self.limits.ack_interval_s, idle_at)):
                    return await self._inbox.get()
            await self._dialect.idle(self)
        raise IdleConnection(f"nothing came for {idle_timeout_s} s")


def _is_lost(exc: ConnectionClosed) -> bool:
    """Whether a connection ended against the will of both sides; its producer may come back."""
    if exc.sent is not None and not exc.rcvd_then_sent:
        return False  # closed by us, for something the client sent
    return exc.rcvd is None or exc.rcvd.code != CloseCode.NORMAL
