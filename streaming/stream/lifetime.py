"""A live stream across its producer's connections: who may go on with it, and when it is over.

A stream outlives a lost connection for the grace time, so that its producer may come back with the
token it was given. Knows the session and who reads for the producer, not what a connection says.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode

from streaming import aio
from streaming.errors import BadQuery, EngineLost, StreamFault
from streaming.log.hub import Subscription
from streaming.log.log import Log
from streaming.log.store import Saved
from streaming.protocol import AFTER_PARAMETER, MAX_SEQ, RESUME_PARAMETER, Ack, Envelope, Message
from streaming.stream.audio_input import AudioInput
from streaming.stream.session import Session
from streaming.stream.snapshot import SavedStream, encode_stream

logger = logging.getLogger(__name__)

TOKEN_BYTES = 24
MAX_TOKEN_CHARS = 64
MAX_PARAMETERS = 32  # in a stream's query


@dataclass(frozen=True, slots=True)
class Resumption:
    """A producer that was connected before: its token, and the last `seq` it saw."""

    token: str
    after: int | None  # None: it wants nothing of what it missed

    def is_for(self, digest: bytes) -> bool:
        """Whether it is the token of this digest; takes as long whether or not."""
        return hmac.compare_digest(digest_of(self.token), digest)


def new_token() -> str:
    """A token that nobody can guess."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def digest_of(token: str) -> bytes:
    """What is kept of a token: who reads the log cannot resume a stream."""
    return hashlib.sha256(token.encode()).digest()


def parse_resumption(query: str) -> tuple[Resumption | None, str]:
    """The resumption in a stream's query, and the query without it.

    Raises:
        BadQuery: a parameter is given twice, or is none.
    """
    found: dict[str, str] = {}
    rest = []
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=MAX_PARAMETERS)
    except ValueError as exc:
        raise BadQuery(f"too many parameters; expected at most {MAX_PARAMETERS}") from exc
    for key, value in pairs:
        if key not in (RESUME_PARAMETER, AFTER_PARAMETER):
            rest.append((key, value))
        elif key in found:
            raise BadQuery(f"{key} was given twice; expected once")
        else:
            found[key] = value
    token, after = found.get(RESUME_PARAMETER), found.get(AFTER_PARAMETER)
    if token is None:
        if after is not None:
            raise BadQuery(f"{AFTER_PARAMETER} without {RESUME_PARAMETER}; expected both or none")
        return None, query
    if not 0 < len(token) <= MAX_TOKEN_CHARS:
        raise BadQuery(f"{RESUME_PARAMETER} is no token; expected that of session.created")
    if after is not None:
        is_number = after.isascii() and after.isdecimal() and len(after) <= 16
        if not (is_number and int(after) <= MAX_SEQ):
            raise BadQuery(f"{AFTER_PARAMETER} is {after[:80]!r}; expected a seq up to {MAX_SEQ}")
    return Resumption(token, None if after is None else int(after)), urlencode(rest)


class Seat:
    """Where a live stream's producer sits: one connection's reader, or nobody."""

    def __init__(self, log: Log, name: str) -> None:
        self.reader: Subscription | None = None
        self.is_wanted = asyncio.Event()  # by another connection: this one ends
        self.changed = asyncio.Event()
        self._log = log
        self._name = name
        self._for_next: list[Message] = []

    def take(self, reader: Subscription) -> None:
        """Sit down; nobody else does."""
        assert self.reader is None, self._name
        self.reader = reader
        self.is_wanted.clear()
        self.changed.set()
        said, self._for_next = self._for_next, []
        for message in said:
            self.tell(message)

    def leave(self, reader: Subscription) -> None:
        """Stand up, if it is still this one that sits."""
        if self.reader is reader:
            self.reader = None
            self.changed.set()

    async def vacated(self) -> None:
        """Wait until nobody sits here, asking who does to leave."""
        while self.reader is not None:
            self.is_wanted.set()
            self.changed.clear()
            await self.changed.wait()

    def tell(self, message: Message) -> None:
        """Say something to the producer alone. An `ack` waits until what it acknowledges is on the disk."""
        if isinstance(message, Ack):
            self._log.confirm(self._name, message, self._put)
        else:
            self._put(Envelope(self._name, self._log.directory.last_seq(self._name), message))

    def tell_next(self, message: Message) -> None:
        """Keep a message for whoever sits down next. Only a restart does so, once for each lost question."""
        self._for_next.append(message)

    def _put(self, envelope: Envelope) -> None:
        if self.reader is not None:  # else it is told by `session.resumed`
            self.reader.put(envelope)


class LiveStream:
    """A stream's life, from its first connection, or the server's restart, to `session.closed`."""

    def __init__(
        self,
        session: Session,
        audio: AudioInput,
        seat: Seat,
        log: Log,
        *,
        grace_s: float,
        stop_timeout_s: float,
    ) -> None:
        self.session = session
        self.audio = audio
        self.seat = seat
        self.is_over = asyncio.Event()
        self._log = log
        self._grace_s = grace_s
        self._stop_timeout_s = stop_timeout_s
        self._reason: str | None = None  # that it ends for
        self._is_stopping = asyncio.Event()  # the server is
        self._is_unsaved = asyncio.Event()  # the log could not save it
        self._has_failed = True  # until it ended well

    @property
    def name(self) -> str:
        """The stream's."""
        return self.session.name

    def save(self, stream: int) -> Saved:
        """What the stream continues from after the server's death, and its audio since the last call."""
        session = self.session.snapshot()
        unsaved = self.session.take_unsaved()
        state = encode_stream(SavedStream(session, self.audio.snapshot()))
        return Saved(stream, state, unsaved.start, unsaved.stop, unsaved.pcm, session.needed_from)

    def end(self, reason: str) -> None:
        """Finalise it; the first reason counts."""
        self._reason = self._reason or reason
        self.seat.changed.set()

    def stop(self) -> None:
        """The server stops: nobody waits for a producer any more, and not for long for the engine."""
        self._is_stopping.set()
        self.seat.changed.set()

    def fail(self) -> None:
        """The log could not save it: it would not survive the server, and ends."""
        self._is_unsaved.set()

    async def ended(self) -> None:
        """Wait until it is over.

        Raises:
            StreamFault: it did not end well.
        """
        await self.is_over.wait()
        if self._has_failed:
            raise StreamFault(f"stream {self.name}: a fault of the server's")

    async def run(self) -> None:
        """Live until somebody ends it, or nobody came back in time; then finalise.

        Raises:
            Exception: a fault of ours; the stream is closed as "internal".
        """
        taking = asyncio.create_task(self.session.run(), name=f"results {self.name}")
        try:
            unsaved = StreamFault(f"stream {self.name}: its state cannot be saved")
            await aio.race(
                self._until_ended(),
                aio.ended(taking),
                self._watch_engine(),
                aio.raise_when(self._is_unsaved, unsaved),
            )
            reason = self._reason or "internal"
            try:
                await aio.race(self._finalise(reason), aio.ended(taking), self._stop_deadline())
            finally:
                self.session.abandon(reason)
            await self._log.settled()
            self._has_failed = False
        finally:
            self.session.abandon("internal")  # changes nothing unless something above failed
            self.is_over.set()
            await aio.cancel(taking)

    async def _finalise(self, reason: str) -> None:
        if not self.session.is_lost:
            await self.audio.end()
        await self.session.finish(reason)

    async def _until_ended(self) -> None:
        loop = asyncio.get_running_loop()
        while self._reason is None:
            self.seat.changed.clear()
            if self.seat.reader is not None:
                await self.seat.changed.wait()
                continue
            if self._is_stopping.is_set():
                self.end("server_stopping")
                continue
            logger.info("stream %s: waits %g s for its producer", self.name, self._grace_s)
            try:
                async with asyncio.timeout_at(loop.time() + self._grace_s):
                    await self.seat.changed.wait()
            except TimeoutError:
                self.end("disconnected")

    async def _watch_engine(self) -> None:
        """End the stream with a lost engine. A connected producer is told first, and ends it itself."""
        with suppress(EngineLost):
            await self.session.watch_engine()
        while self.seat.reader is not None:
            self.seat.changed.clear()
            await self.seat.changed.wait()
        self.end("engine_lost")

    async def _stop_deadline(self) -> None:
        await self._is_stopping.wait()
        await asyncio.sleep(self._stop_timeout_s)
