"""One live stream on the event loop: the I/O around its `Feed`.

Audio waits in the feed's ring until the engine is near it; when the ring is full, `feed` waits, and
with it the producer. When the engine dies, the next one gets the stream from the ring. Knows
nothing of sockets or of what a word is.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from streaming import aio
from streaming.aio import Changed
from streaming.audio.vad import FRAME, REVIEW, Vad
from streaming.config import VadConfig
from streaming.engine import messages
from streaming.engine.client import EngineClient, EngineState
from streaming.engine.contract import Pcm
from streaming.errors import EngineFault, EngineLost
from streaming.metrics import Metrics
from streaming.protocol import (
    SAMPLE_RATE_HZ,
    Ask,
    Degraded,
    Error,
    Message,
    SessionClosed,
    SessionCreated,
    TranscriptDelta,
    ms_of,
)
from streaming.stream.clock import StreamClock
from streaming.stream.feed import Feed, FromEngine
from streaming.stream.snapshot import SessionState

logger = logging.getLogger(__name__)

SLICE_S = 0.5  # more audio at once is taken in slices, so that other streams get their turn
SLICE = int(SLICE_S * SAMPLE_RATE_HZ)
REAL_TIME_SLACK_S = 2.0  # audio may be so far ahead of the clock and still count as live
FLUSHES_PER_S, FLUSHES_AT_ONCE = 10.0, 100
MAX_FLUSHES = 32  # unanswered ones of a stream; the next one waits
MAX_QUESTIONS = 4  # unanswered ones of a stream; the next one is refused

_M = TypeVar("_M", bound=Message)


class StreamState(enum.Enum):
    """Where a stream is in its life."""

    WAITING = "waiting"  # for an engine
    OPEN = "open"  # the running engine has it
    LOST = "lost"  # no engine will come back
    CLOSED = "closed"


_NEXT_STATES = {
    StreamState.WAITING: {StreamState.OPEN, StreamState.WAITING, StreamState.LOST, StreamState.CLOSED},
    StreamState.OPEN: {StreamState.WAITING, StreamState.LOST, StreamState.CLOSED},
    StreamState.LOST: {StreamState.CLOSED},
    StreamState.CLOSED: set[StreamState](),
}


async def _at_once() -> None:
    return


def _ignore(_: int) -> None:
    return


@dataclass(frozen=True, slots=True)
class Outlets:
    """Where a stream's messages go."""

    publish: Callable[[Message], None]  # to its log and every reader
    tell: Callable[[Message], None]  # to its producer alone
    began: Callable[[int], None] = _ignore  # called once, with the Unix time of the first sample
    room: Callable[[], Awaitable[None]] = _at_once  # returns when the log takes more
    # Whether the log saves the stream's state, so that it resumes after a restart of the server.
    is_saved: bool = False
    metrics: Metrics = field(default_factory=Metrics)


@dataclass(frozen=True, slots=True)
class Unsaved:
    """Audio that the log does not have yet."""

    start: int  # sample at which `pcm` begins
    stop: int
    pcm: bytes  # float32 little-endian


class _Timed:
    """What a session says, with the stream's times in place of the engine's."""

    def __init__(self, outlets: Outlets, clock: StreamClock, n_samples: int) -> None:
        self._outlets = outlets
        self._clock = clock
        # When the first sample came, or would have at the pace of speech.
        self._began_at = asyncio.get_running_loop().time() - n_samples / SAMPLE_RATE_HZ

    def say(self, message: _M) -> _M:
        """Publish a message whose times are the engine's; gives it as it was published."""
        placed = self._clock.placed(message)
        self._outlets.publish(placed)
        return placed

    def say_all(self, found: Sequence[Message], n_samples: int) -> None:
        """Publish what was found when the stream had so many samples."""
        for message in found:
            self.say(message)
            if isinstance(message, TranscriptDelta) and self._is_in_real_time(n_samples):
                self._outlets.metrics.committed(message, ms_of(n_samples))

    def _is_in_real_time(self, n_samples: int) -> bool:
        """Whether the audio came no faster than it was spoken, so that a lag on its clock is one."""
        elapsed_s = asyncio.get_running_loop().time() - self._began_at
        return n_samples <= (elapsed_s + REAL_TIME_SLACK_S) * SAMPLE_RATE_HZ

    def begin(self, duration_ms: int, *, is_first: bool) -> None:
        """So much audio came just now, or the time for which there is none."""
        if is_first:
            self._outlets.began(self._clock.now_ms() - duration_ms)

    def end_gap(self) -> None:
        """No further part of a gap comes: it is published if it is worth it."""
        if (gap := self._clock.end_gap()) is not None:
            self._outlets.publish(gap)  # its times are the stream's already


class Session:
    """A live stream, from the first sample to `session.closed`. Belongs to the event loop."""

    def __init__(
        self,
        name: str,
        number: int,
        feed: Feed,
        vad: Vad,
        clock: StreamClock,
        *,
        engine: EngineClient,
        outlets: Outlets,
    ) -> None:
        """A stream that no engine has yet; `open` or `reopen` is called next.

        Args:
            name: Of the stream.
            number: The engine's name for it, as the feed was given.
            feed: New, or restored.
            vad: Endpointing; new, or restored to the feed's newest sample.
            clock: New, or restored with the feed.
            engine: Runs, or will.
            outlets: Where messages go.
        """
        self.name = name
        self.clock = clock
        self._timed = _Timed(outlets, clock, feed.n_samples)
        self._number = number
        self._feed = feed
        self._flush_at = 0.0  # when the next flush is due, on the event loop's clock
        self._vad = vad
        self._engine = engine
        self._outlets = outlets
        self._state = StreamState.WAITING
        self._changed = Changed()
        self._inbox: deque[FromEngine] = deque()  # one result at most, and a progress per 0.5 s sent
        self._unsaved: deque[Pcm] = deque()  # audio that came since the last `take_unsaved`
        self._saved = feed.n_samples  # the log has the audio before it

    def open(self, epoch_ms: int) -> None:
        """Announce the stream and take its slot, at once or when the engine is back."""
        ready = self._engine.ready
        assert ready is not None, "admitted before the engine was ever ready"
        self._timed.say(SessionCreated(ready.model, ready.tasks, ready.languages, epoch_ms))
        self._attach()
        logger.info("stream %s: opened as %d", self.name, self._number)

    def reopen(self) -> None:
        """As `open`, of a stream that a dead server had announced already."""
        self._degraded("server_restart", "the server was restarted; captions go on from here")
        self._attach()
        logger.info(
            "stream %s: resumes at %.1f s as %d",
            self.name,
            self._feed.n_samples / SAMPLE_RATE_HZ,
            self._number,
        )

    def _attach(self) -> None:
        self._engine.attach(self._number, self)
        if self._engine.is_ready:
            self._open_on_engine()
        elif self._engine.state is EngineState.LOST:  # between admission and now
            self.on_engine_lost()

    @property
    def is_lost(self) -> bool:
        """Whether no engine will come back for it."""
        return self._state is StreamState.LOST

    async def watch_engine(self) -> None:
        """Wait for the loss of the engine.

        Raises:
            EngineLost: it will not come back.
        """
        await self._changed.wait_for(lambda: self.is_lost)
        raise EngineLost("the engine could not be brought back")

    # --- across the server's death -------------------------------------------------------

    def snapshot(self) -> SessionState:
        """What a new session continues from, with the audio since `SessionState.needed_from`."""
        return SessionState(self._feed.snapshot(), self._vad.snapshot(), self.clock.snapshot())

    def take_unsaved(self) -> Unsaved:
        """The audio since the last call, which belongs to the `snapshot` of the same moment."""
        start, self._saved = self._saved, self._feed.n_samples
        pcm = b"".join(piece.tobytes() for piece in self._unsaved)
        self._unsaved.clear()
        self._changed.notify()
        return Unsaved(start, self._saved, pcm)

    # --- from the producer ---------------------------------------------------------------

    @property
    def n_samples(self) -> int:
        """Samples taken so far, at 16 kHz, with all that gaps stand for."""
        return self._feed.n_samples + self.clock.jumped_ms * SAMPLE_RATE_HZ // 1000

    async def feed(self, pcm: Pcm) -> None:
        """Take 16 kHz mono audio, [n_samples], however much; waits while the ring is full.

        Cancelled while it waits, it has taken a part of it: `n_samples` says how much.
        """
        for at in range(0, len(pcm), SLICE):
            if at:
                await asyncio.sleep(0)  # minutes of audio must not hold up the other streams
            piece = pcm[at : at + SLICE]
            await self.wait_for_room(len(piece))
            self.push(piece)

    async def wait_for_room(self, n_samples: int) -> None:
        """Wait until so many samples can be taken: by the ring, and by the log where it keeps the audio."""
        await self._until(
            lambda: (
                self._feed.n_free >= n_samples and self._feed.n_samples - self._saved < self._feed.capacity
            )
        )

    def push(self, pcm: Pcm) -> None:
        """Take audio that `wait_for_room` was called for, without awaiting anything in between."""
        if self._state in (StreamState.LOST, StreamState.CLOSED):
            return  # no engine will decode it, and the connection is being closed for that
        if len(pcm):
            self._timed.begin(ms_of(len(pcm)), is_first=not self._feed.n_samples)
            self._timed.end_gap()
        self._take_audio(pcm)

    def push_gap(self, duration_ms: int) -> None:
        """Take a gap for whose silence `wait_for_room` was called, without awaiting in between."""
        if self._state in (StreamState.LOST, StreamState.CLOSED):
            return
        silence: Pcm = np.zeros(self.clock.silence_of(duration_ms), np.float32)
        self._timed.begin(duration_ms, is_first=not self._feed.n_samples)
        if len(silence):
            self._take_audio(silence)
        self.clock.gap(duration_ms, self._feed.n_samples)

    def _take_audio(self, pcm: Pcm) -> None:
        was_cut = self._vad.is_cut
        found = self._feed.push(pcm, self._vad.push(pcm))
        if self._vad.is_cut and not was_cut:
            found.append(_too_quiet(self._feed.n_samples))
        if self._outlets.is_saved:
            self._unsaved.append(pcm)
        else:
            self._saved = self._feed.n_samples
        self._outlets.metrics.heard(len(pcm))
        self._publish(found)
        self._send()

    async def flush(self, flush_id: str) -> None:
        """Commit everything taken so far; `flushed` follows when that is done."""
        # Each is logged, and as fast as they go they would push out what others said.
        now_s = asyncio.get_running_loop().time()
        self._flush_at = max(self._flush_at, now_s - FLUSHES_AT_ONCE / FLUSHES_PER_S) + 1 / FLUSHES_PER_S
        await aio.sleep_until(self._flush_at)
        await self._until(lambda: self._feed.n_unanswered("flush") < MAX_FLUSHES)
        self._feed.flush(flush_id)
        self._send()

    def ask(self, ask: Ask) -> None:
        """Answer a question about the last audio taken; refused while too many wait."""
        if self._feed.n_unanswered("ask") >= MAX_QUESTIONS:
            text = f"ask {ask.id!r}: {MAX_QUESTIONS} questions wait for their answers"
            self.tell(Error("busy", text, fatal=False))
            return
        self._feed.ask(ask)
        self._send()

    def set_language(self, language: str | None) -> None:
        """Decode in this language, or detect it, beginning with the audio that is taken next."""
        self._feed.set_language(language)

    def set_endpointing(self, vad: VadConfig) -> None:
        """Find the beginning and end of speech by these settings from the next audio on."""
        self._vad.change(vad)

    def tell(self, message: Message) -> None:
        """Send a message to the producer alone."""
        self._outlets.tell(message)

    async def finish(self, reason: str) -> None:
        """Finalise what was said and close the stream; waits for the engine unless it is lost.

        Cancelled while it waits, it leaves the stream to `abandon`.
        """
        if not self.is_lost:
            self._feed.flush(None)
            self._send()
            await self._until(lambda: self._feed.n_pending == 0)
        self.abandon(reason)

    def abandon(self, reason: str) -> None:
        """Close the stream with what is committed now; changes nothing where it is closed."""
        if self._state is StreamState.CLOSED:
            return
        if self._state is StreamState.OPEN and self._engine.is_ready:
            self._engine.send(messages.CloseStream(self._number))
        self._engine.detach(self._number)
        self._move(StreamState.CLOSED)
        self._timed.end_gap()
        self._publish(self._feed.close())
        closed = SessionClosed(reason, ms_of(self._feed.n_samples), self._feed.n_words, self._feed.n_segments)
        closed = self._timed.say(closed)
        logger.info(
            "stream %s: closed (%s), %.1f s, %d words in %d segments",
            self.name,
            reason,
            closed.duration_ms / 1000,
            closed.n_words,
            closed.n_segments,
        )

    # --- from the engine -----------------------------------------------------------------

    @property
    def is_waiting(self) -> bool:
        """Whether the engine owes this stream an answer."""
        return self._feed.is_owed

    async def run(self) -> None:
        """Take what the engine says, for as long as the stream lives.

        In a task of the stream's own, so that an error in it ends this stream and no other.
        """
        while True:
            await self._changed.wait_for(lambda: bool(self._inbox))
            await self._outlets.room()
            if self._inbox:  # else the engine died meanwhile
                self._take(self._inbox.popleft())

    def on_engine_message(self, message: FromEngine) -> None:
        """The engine found something: `run` takes it next."""
        self._inbox.append(message)
        self._changed.notify()

    def _take(self, message: FromEngine) -> None:
        match message:
            case messages.Result():
                self._outlets.metrics.decoded(message.n_repetitions_cut, is_silence=message.is_silence)
            case messages.Skipped():
                self._outlets.metrics.skipped(message.n_points)
        try:
            found = self._feed.take(message)
        except EngineFault as fault:
            self._engine.condemn(fault)
            return
        self._send()
        self._publish(found)
        self._changed.notify()

    def on_engine_down(self) -> None:
        """The engine died: keep everything for the next one."""
        if self._state is StreamState.OPEN:
            self.tell(Error("engine_lost", "the engine died and is being restarted", fatal=False))
        self._move(StreamState.WAITING)
        self._feed.engine_died()
        self._inbox.clear()  # not answered with a `Commit`, so the next engine finds it again

    def on_engine_up(self) -> None:
        """Open this stream on the new engine, where the dead one had decided everything."""
        self._degraded("engine_restart", "the engine was restarted; captions go on from here")
        self._open_on_engine()

    def on_engine_lost(self) -> None:
        """The engine will not come back: whoever waits here must not wait on."""
        self._feed.engine_died()
        self._inbox.clear()
        self._move(StreamState.LOST)

    # --- inside --------------------------------------------------------------------------

    def _open_on_engine(self) -> None:
        self._move(StreamState.OPEN)
        self._feed.reopen()
        self._send()

    def _move(self, state: StreamState) -> None:
        assert state in _NEXT_STATES[self._state], (self.name, self._state, state)
        self._state = state
        self._changed.notify()

    def _send(self) -> None:
        for message in self._feed.outgoing():
            self._engine.send(message)

    def _degraded(self, code: str, text: str) -> None:
        start, end = self._feed.undecided
        self._timed.say(Degraded(code, text, ms_of(start), ms_of(end)))

    def _publish(self, found: Sequence[Message]) -> None:
        self._timed.say_all(found, self._feed.n_samples)

    async def _until(self, is_true: Callable[[], bool]) -> None:
        """Wait for something that the engine's messages bring about, or for the stream's end or loss."""
        ended = (StreamState.LOST, StreamState.CLOSED)
        await self._changed.wait_for(lambda: is_true() or self._state in ended)


def _too_quiet(end: int) -> Degraded:
    """That most of what sounded like speech in the 30 s before a sample was not listened to."""
    text = "most of the speech is too quiet to be heard over the room: raise its level, or move closer"
    return Degraded("too_quiet", text, ms_of(max(0, end - REVIEW * FRAME)), ms_of(end))
