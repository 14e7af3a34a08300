"""A live stream across its producer's connections: who may resume it, and when it is over.

A stream outlives a lost connection for the grace time, so that its producer may come back with the
token it was given. Knows the session and who reads for the producer, not what a connection says.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from streaming import aio
from streaming.aio import Changed
from streaming.errors import EngineLost, Replaced, StreamFault
from streaming.log.hub import Subscription
from streaming.log.log import Log
from streaming.log.store import Saved
from streaming.protocol import Ack, Envelope, Message
from streaming.stream.audio_input import AudioInput
from streaming.stream.session import Session
from streaming.stream.snapshot import SavedStream, encode_stream
from streaming.tokens import is_token_of

logger = logging.getLogger(__name__)

TOKEN_BYTES = 24  # of randomness


@dataclass(frozen=True, slots=True)
class Resumption:
    """A producer that was connected before: its token, and the last `seq` it saw."""

    token: str
    after: int | None  # None: it wants nothing of what it missed

    def is_for(self, digest: bytes) -> bool:
        """Whether it is the token of this digest; takes as long whether or not."""
        return is_token_of(self.token, digest)


class ProducerSlot:
    """Who speaks for a live stream: the reader of one connection, or none.

    The newest connection that claims the slot gets it. Older ones, the one that has it included, are
    told so and leave. A connection takes the slot in three steps: `claim`, `wait_free`, `attach`.
    """

    def __init__(self, log: Log, name: str) -> None:
        self.changed = Changed()  # who has the slot, and whatever else its stream waits for
        self._reader: Subscription | None = None
        self._n_claims = 0
        self._n_attached = 0  # the newest claim that had the slot
        self._log = log
        self._name = name
        self._for_next: list[Message] = []

    @property
    def is_taken(self) -> bool:
        """Whether a connection has the slot."""
        return self._reader is not None

    @property
    def was_left(self) -> bool:
        """Whether a connection had the slot, and none has it or is about to take it."""
        return self._reader is None and 0 < self._n_attached == self._n_claims

    def claim(self) -> int:
        """The newest claim on the slot, before which every other one gives way."""
        self._n_claims += 1
        self.changed.notify()
        return self._n_claims

    async def wait_free(self, claim: int) -> None:
        """Wait until no connection has the slot.

        Raises:
            Replaced: a newer connection claimed it.
        """
        await self.changed.wait_for(lambda: self._reader is None or claim != self._n_claims)
        self._check(claim)

    def attach(self, claim: int, reader: Subscription) -> None:
        """Take the slot, which is free, and what was kept for the next producer.

        Raises:
            Replaced: a newer connection claimed it since `wait_free`.
        """
        self._check(claim)
        assert self._reader is None, self._name
        self._reader, self._n_attached = reader, claim
        self.changed.notify()
        kept, self._for_next = self._for_next, []
        for message in kept:
            self.tell(message)

    async def watch(self, claim: int) -> None:
        """Wait until another connection claims the slot.

        Raises:
            Replaced: it did.
        """
        await self.changed.wait_for(lambda: claim != self._n_claims)
        self._check(claim)

    def detach(self, reader: Subscription) -> None:
        """Give the slot back, if it is still this one that has it."""
        if self._reader is reader:
            self._reader = None
            self.changed.notify()

    def tell(self, message: Message) -> None:
        """Send a message to the producer alone. An `ack` waits until what it acknowledges is on the disk."""
        if isinstance(message, Ack):
            self._log.confirm(self._name, message, self._put)
        else:
            self._put(self._log.directory.envelope(self._name, message))

    def tell_next(self, message: Message) -> None:
        """Keep a message for the next producer. Only a restart does so, once for each lost question."""
        self._for_next.append(message)

    def _check(self, claim: int) -> None:
        if claim != self._n_claims:
            raise Replaced("the stream goes on over a newer connection")

    def _put(self, envelope: Envelope) -> None:
        if self._reader is not None:  # else `session.resumed` says how far its audio came
            self._reader.put(envelope)


class LifeState(enum.Enum):
    """Where a stream is in its life."""

    LIVE = "live"  # a producer speaks for it, or may come back
    ENDING = "ending"  # what was said is being finalised
    OVER = "over"  # closed in good order
    FAILED = "failed"  # closed as "internal"


_NEXT_STATES = {
    LifeState.LIVE: {LifeState.ENDING, LifeState.FAILED},
    LifeState.ENDING: {LifeState.OVER, LifeState.FAILED},
    LifeState.OVER: set[LifeState](),
    LifeState.FAILED: set[LifeState](),
}


class LiveStream:
    """A stream's life, from its first connection, or the server's restart, to `session.closed`."""

    def __init__(
        self,
        session: Session,
        slot: ProducerSlot,
        log: Log,
        *,
        end_audio: Callable[[], Coroutine[Any, Any, None]],
        grace_s: float,
        stop_timeout_s: float,
    ) -> None:
        """A stream that `run` lets live.

        Args:
            session: Open, or about to be.
            slot: Of its producer.
            log: Of all streams.
            end_audio: Feeds the session what is still held of the received audio; nothing more comes.
            grace_s: How long a stream waits for a producer that is away, seconds.
            stop_timeout_s: How long its end may take while the server stops, seconds.
        """
        self.session = session
        self.slot = slot
        self._end_audio = end_audio
        self._log = log
        self._grace_s = grace_s
        self._stop_timeout_s = stop_timeout_s
        self._state = LifeState.LIVE
        self._changed = slot.changed
        self._reason: str | None = None  # that it ends for
        self._fault: StreamFault | None = None  # that it ends with
        self._is_server_stopping = False

    @property
    def name(self) -> str:
        """The stream's."""
        return self.session.name

    @property
    def is_over(self) -> bool:
        """Whether it is closed, in good order or not."""
        return self._state in (LifeState.OVER, LifeState.FAILED)

    def end(self, reason: str) -> None:
        """Finalise it; the first reason counts."""
        self._reason = self._reason or reason
        self._changed.notify()

    def stop(self) -> None:
        """The server stops: it waits for no producer any more, and not for long for the engine."""
        self._is_server_stopping = True
        self._changed.notify()

    def fail(self) -> None:
        """The log could not save it: it would not survive the server, and ends."""
        self._fault = StreamFault(f"stream {self.name}: its state cannot be saved")
        self._changed.notify()

    async def wait_over(self) -> None:
        """Wait until it is closed, in good order or not."""
        await self._changed.wait_for(lambda: self.is_over)

    async def ended(self) -> None:
        """Wait until it is over.

        Raises:
            StreamFault: it did not end in good order.
        """
        await self.wait_over()
        if self._state is LifeState.FAILED:
            raise StreamFault(f"stream {self.name}: an internal error")

    async def run(self) -> None:
        """Live until somebody ends it, or no producer came back in time; then finalise.

        Raises:
            Exception: an internal error; the stream is closed as "internal".
        """
        taking = asyncio.create_task(self.session.run(), name=f"results {self.name}")
        try:
            # 1. Live.
            await aio.race(self._until_ended(), aio.ended(taking), self._watch_engine())
            # 2. Finalise, which needs the engine's last results, but no longer than a stop may take.
            self._move(LifeState.ENDING)
            reason = self._reason or "internal"
            try:
                await aio.race(self._finalise(reason), aio.ended(taking), self._stop_deadline())
            finally:
                self.session.abandon(reason)
            # 3. What it led to is on the disk.
            await self._log.settled()
            self._move(LifeState.OVER)
        finally:
            self.session.abandon("internal")  # changes nothing unless something above failed
            if not self.is_over:
                self._move(LifeState.FAILED)
            await aio.cancel(taking)

    def _move(self, state: LifeState) -> None:
        assert state in _NEXT_STATES[self._state], (self.name, self._state, state)
        self._state = state
        self._changed.notify()

    async def _finalise(self, reason: str) -> None:
        if not self.session.is_lost:
            await self._end_audio()
        await self.session.finish(reason)

    async def _until_ended(self) -> None:
        """Wait for a reason to end; a producer that stays away for the grace time is one.

        Raises:
            StreamFault: the stream failed.
        """
        while not self._is_ending:
            if self.slot.is_taken:
                await self._changed.wait_for(lambda: self._is_ending or not self.slot.is_taken)
            elif self._is_server_stopping:
                self.end("server_stopping")
            elif self.slot.was_left and not self._has_audio:
                self.end("disconnected")  # nothing would be lost: the name is free at once
            else:
                await self._wait_for_producer()
        if self._fault is not None:
            raise self._fault

    @property
    def _has_audio(self) -> bool:
        """Whether any audio came."""
        return self.session.n_samples > 0

    @property
    def _is_ending(self) -> bool:
        return self._reason is not None or self._fault is not None

    async def _wait_for_producer(self) -> None:
        logger.info("stream %s: waits %g s for its producer", self.name, self._grace_s)
        try:
            async with asyncio.timeout(self._grace_s):
                await self._changed.wait_for(
                    lambda: self._is_ending or self.slot.is_taken or self._is_server_stopping
                )
        except TimeoutError:
            self.end("disconnected")

    async def _watch_engine(self) -> None:
        """End the stream with a lost engine. A connected producer learns it first, and ends it itself."""
        with suppress(EngineLost):
            await self.session.watch_engine()
        await self._changed.wait_for(lambda: not self.slot.is_taken)
        self.end("engine_lost")

    async def _stop_deadline(self) -> None:
        await self._changed.wait_for(lambda: self._is_server_stopping)
        await asyncio.sleep(self._stop_timeout_s)


class ResumableStream(LiveStream):
    """A live stream that its producer, and the next server, may resume."""

    def __init__(
        self,
        session: Session,
        audio: AudioInput,
        slot: ProducerSlot,
        log: Log,
        *,
        grace_s: float,
        stop_timeout_s: float,
    ) -> None:
        """As `LiveStream`, with the producer's way into the session, which outlives its connections."""
        super().__init__(
            session, slot, log, end_audio=audio.end, grace_s=grace_s, stop_timeout_s=stop_timeout_s
        )
        self.audio = audio

    @property
    def _has_audio(self) -> bool:
        """Also less than the session gets at once."""
        return self.audio.n_samples > 0

    def save(self, stream: int) -> Saved:
        """What the stream continues from after the server's death, and its audio since the last call."""
        session = self.session.snapshot()
        unsaved = self.session.take_unsaved()
        state = encode_stream(SavedStream(session, self.audio.snapshot()))
        return Saved(stream, state, unsaved.start, unsaved.stop, unsaved.pcm, session.needed_from)
