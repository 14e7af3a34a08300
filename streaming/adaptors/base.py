"""What every adaptor shares: the life of one connection that speaks a protocol of somebody else's.

The stream behind it is like any other. What is different is in an `Adaptor`: what a frame of the
client's means, and what a message of the log becomes. However the connection ends, the stream is
finalised first and the client is told why.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from streaming import aio
from streaming.audio.ingest import AudioFormat, Ingest
from streaming.config import VadConfig
from streaming.engine.contract import Pcm
from streaming.errors import (
    BadMessages,
    ConnectionOver,
    IdleConnection,
    ServerStopping,
    SlowReader,
)
from streaming.log.hub import Subscription
from streaming.log.log import Log
from streaming.protocol import SAMPLE_RATE_HZ, Envelope, decode
from streaming.server import ws
from streaming.server.producer import ProducerLimits
from streaming.stream.audio_input import Acknowledger
from streaming.stream.session import SLICE_S, Session

logger = logging.getLogger(__name__)

MAX_SHOWN_CHARS = 80  # of a client's value in an error text

Event = dict[str, Any]  # one JSON object of the foreign protocol


class BadMessage(ValueError):
    """One message that the client must not send; it is told so, and may go on.

    `code` and `param` are the foreign protocol's words for what is wrong and where.
    """

    def __init__(self, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


@dataclass(frozen=True, slots=True)
class Closing:
    """A WebSocket close frame."""

    code: int
    reason: str


class Adaptor(Protocol):
    """One foreign protocol on one connection. Belongs to the event loop."""

    stream: str  # the name its stream has in the log
    language: str | None  # as the URL asks; None: not said, "auto": detect
    headers: Mapping[str, str]  # added to the answer to the handshake

    def endpointing(self, default: VadConfig) -> VadConfig:
        """The endpointing this stream begins with."""

    def translate(self, envelope: Envelope) -> list[Event]:
        """What a message of the stream's becomes; nothing, where the protocol has no word for it."""

    def idle(self) -> list[Event]:
        """What is due after a while in which the client sent nothing."""

    async def work(self, talk: Conversation) -> None:
        """What goes on beside taking frames. Ends only by raising what ends the connection."""

    async def take(self, frame: str | bytes, talk: Conversation) -> bool:
        """Do what a frame asks for; False once the client wants nothing more but the end.

        Raises:
            BadMessage: it is not what the protocol allows.
            ConnectionOver: it ends the connection.
        """

    def complaint(self, exc: BadMessage, frame: str | bytes) -> list[Event]:
        """How the client is told of a bad message."""

    async def end_audio(self, talk: Conversation) -> None:
        """Feed the session what is still being decoded; nothing more comes."""

    def stop(self) -> None:
        """Give back what the adaptor holds, whatever happened before. Does not wait."""

    def closing(self, over: ConnectionOver | None) -> Closing:
        """The close frame for an end: the client's own (None), or one of the server's reasons."""


class Conversation:
    """One connection of an adaptor's, from its first frame to its close."""

    def __init__(
        self,
        connection: ServerConnection,
        session: Session,
        reader: Subscription,
        log: Log,
        limits: ProducerLimits,
        stopping: asyncio.Event,
        adaptor: Adaptor,
    ) -> None:
        self.session = session
        self.limits = limits
        self._acks = Acknowledger(session.tell, SAMPLE_RATE_HZ, limits.ack_interval_s)
        self._connection = connection
        self._reader = reader
        self._log = log
        self._stopping = stopping
        self._adaptor = adaptor
        self._sending = asyncio.Lock()  # what one message becomes is not cut in two
        self._has_begun = asyncio.Event()  # the stream's first message was sent
        self._n_bad = 0
        self._pace = limits.new_pace()

    async def run(self) -> None:
        """Converse until the stream is over, finalise it, and close."""
        name = self.session.name
        sender = asyncio.create_task(self._send_all(), name=f"send {name}")
        taking = asyncio.create_task(self.session.run(), name=f"results {name}")
        discarding: asyncio.Task[None] | None = None
        try:
            over, reason = await self._converse(taking, sender)
            discarding = asyncio.create_task(ws.discard(self._connection), name=f"discard {name}")
            if isinstance(over, SlowReader):
                await aio.cancel(sender)
            await self._finish(reason, taking)
            await self._log.settled()  # else the reader would be closed before it has the last messages
            if not sender.done():
                await ws.send_rest(self._connection, self._reader, sender)
            closing = self._adaptor.closing(over)
            # A close frame holds 123 bytes.
            reason = closing.reason.encode("ascii", "replace")[:120].decode()
            await self._connection.close(closing.code, reason)
        finally:
            self._adaptor.stop()
            await aio.cancel(sender, taking, *([] if discarding is None else [discarding]))

    async def decode(self, ingest: Ingest, audio_format: AudioFormat, data: bytes) -> None:
        """Take bytes of the client's, however many, through the ingest for their format.

        Raises:
            BadAudio, TooFast: as `feed`.
        """
        read_at = self._read_at(len(data) / audio_format.frame_bytes / audio_format.rate_hz)
        size = int(audio_format.rate_hz * SLICE_S) * audio_format.frame_bytes
        for at in range(0, len(data), size):
            if at:
                await asyncio.sleep(0)  # a frame of minutes must not hold up the other streams
            await self._take_pcm(ingest.push(data[at : at + size]))
        await _until(read_at)

    async def feed(self, pcm: Pcm) -> None:
        """Take 16 kHz mono audio of the client's; waits while the ring is full or it comes too fast.

        Raises:
            TooFast: it is further ahead of real time than the server puts up with.
        """
        read_at = self._read_at(len(pcm) / SAMPLE_RATE_HZ)
        await self._take_pcm(pcm)
        await _until(read_at)

    def _read_at(self, audio_s: float) -> float:
        """Count audio that came; when the next may be read, in the event loop's time."""
        now = asyncio.get_running_loop().time()
        return now + self._pace.take(audio_s, now)

    async def flush(self, flush_id: str) -> None:
        """Commit everything fed so far; `flushed` follows when that is done."""
        self._acks.acknowledge()
        await self.session.flush(flush_id)

    async def _take_pcm(self, pcm: Pcm) -> None:
        await self.session.feed(pcm)
        self._acks.received(self.session.n_samples)

    async def say(self, make: Callable[[], Sequence[Event]]) -> None:
        """Send events that are made when it is their turn.

        Raises:
            ConnectionClosed: the peer is gone.
        """
        async with self._sending:
            for event in make():
                # Escaped: a client can send half a surrogate pair in JSON, and it may be shown in an error.
                await self._connection.send(json.dumps(event, separators=(",", ":")))

    async def _send_all(self) -> None:
        async for row in self._reader:
            await self.say(partial(self._adaptor.translate, decode(row.frame)))
            self._has_begun.set()

    async def _converse(
        self, taking: asyncio.Task[None], sender: asyncio.Task[None]
    ) -> tuple[ConnectionOver | None, str]:
        """What ended it, if not the client, and the reason for `session.closed`."""
        try:
            await aio.race(
                self._receive(),
                self._adaptor.work(self),
                aio.ended(taking),
                aio.ended(sender),
                self.session.watch_engine(),
                aio.raise_when(self._stopping, ServerStopping("the server is stopping")),
                aio.raise_when(self._reader.is_behind, SlowReader("the reader is too slow")),
            )
        except ConnectionClosed:
            return None, "disconnected"
        except ConnectionOver as over:
            name = self.session.name
            level = logging.INFO if isinstance(over, ServerStopping) else logging.WARNING
            logger.log(level, "stream %s: ends: %s", name, over.reason)  # the text may hold what came
            for envelope in ws.fatal_error(name, self._log.directory.last_seq(name), over):
                self._reader.put(envelope)
            return over, over.reason
        return None, "closed"

    async def _finish(self, reason: str, taking: asyncio.Task[None]) -> None:
        """Finalise; a server that stops waits for the engine no longer than its stop timeout."""
        try:
            await aio.race(self._finalise(reason), aio.ended(taking), self._stop_deadline())
        finally:
            self.session.abandon(reason)

    async def _finalise(self, reason: str) -> None:
        try:
            await self._adaptor.end_audio(self)
        except ConnectionOver as over:  # the stream ends anyway; what can be heard is heard
            logger.warning("stream %s: its end is left out: %s", self.session.name, over.reason)
        self._acks.acknowledge()
        await self.session.finish(reason)

    async def _stop_deadline(self) -> None:
        await self._stopping.wait()
        await asyncio.sleep(self.limits.server.stop_timeout_s)

    async def _receive(self) -> None:
        """Take frames until the client asks to end.

        Raises:
            ConnectionClosed: it is gone.
            ConnectionOver: it sent what it must not, or nothing for too long.
        """
        await self._has_begun.wait()  # nothing is answered before the greeting
        while True:
            frame = await self._next_frame()
            try:
                if not await self._adaptor.take(frame, self):
                    return
            except BadMessage as exc:
                await self._complain(exc, frame)

    async def _next_frame(self) -> str | bytes:
        """The next frame; while there is none, the sample clock and the adaptor's waits go on."""
        now = asyncio.get_running_loop().time()
        idle_at = now + self.limits.server.idle_timeout_s
        while now < idle_at:
            try:
                async with asyncio.timeout_at(min(now + self.limits.ack_interval_s, idle_at)):
                    return await self._connection.recv()
            except TimeoutError:
                now = asyncio.get_running_loop().time()
                self._acks.acknowledge()
                await self.say(self._adaptor.idle)
        raise IdleConnection(f"nothing came for {self.limits.server.idle_timeout_s} s")

    async def _complain(self, exc: BadMessage, frame: str | bytes) -> None:
        self._n_bad += 1
        await self.say(lambda: self._adaptor.complaint(exc, frame))
        if self._n_bad >= self.limits.server.max_bad_messages:
            raise BadMessages(f"{self._n_bad} messages that could not be read")


async def _until(at: float) -> None:
    if (left_s := at - asyncio.get_running_loop().time()) > 0:
        await asyncio.sleep(left_s)


def new_id() -> str:
    """An id nobody can guess: the name of a stream that its client did not name."""
    return secrets.token_hex(8)


def shown(value: object) -> str:
    """A client's value for an error text: cut, so that it cannot flood logs or replies."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "..."
