"""One live stream: its PCM into the engine, the engine's results onto its timeline.

Nothing is lost on the way. Audio waits in the ring until the engine is near it; when the ring is
full, `feed` waits, and with it the producer. When the engine dies, the next one gets the stream from
the ring, at the last sample that was decided. Knows nothing of sockets or of what a word is.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import islice

from streaming.aio import Changed
from streaming.audio.ring import Ring
from streaming.audio.vad import Vad
from streaming.config import IngestConfig, VadConfig
from streaming.engine import messages
from streaming.engine.client import EngineClient, EngineState
from streaming.engine.contract import Pcm
from streaming.engine.messages import Mark
from streaming.errors import EngineFault
from streaming.metrics import Metrics
from streaming.protocol import (
    SAMPLE_RATE_HZ,
    AnswerDelta,
    AnswerFinal,
    Ask,
    Degraded,
    Error,
    Flushed,
    Message,
    SessionClosed,
    SessionCreated,
    TranscriptDelta,
    ms_of,
)
from streaming.stream.snapshot import PendingMark, SessionState
from streaming.timeline.transcript import Timeline

logger = logging.getLogger(__name__)

# Audio goes to the engine in whole encoder frames, on a grid that every tick lies on: fewer messages,
# and no tick waits for it. A mark or the end of the audio goes at once.
SEND_GRID = SAMPLE_RATE_HZ * 80 // 1000
MAX_SEND = SAMPLE_RATE_HZ  # samples in one message
SLICE_S = 0.5  # more audio at once is taken in slices, so that other streams get their turn
SLICE = int(SLICE_S * SAMPLE_RATE_HZ)
REAL_TIME_SLACK_S = 2.0  # audio may be so far ahead of the clock and still count as live
# More undecided audio means a decode point. The longest step of a grid is 2.88 s (MOSS-Audio's events at
# tick_ms = 960), the least that a stream may be ahead 3 s.
MAX_STEP = 3 * MAX_SEND - SEND_GRID
MAX_FLUSHES = 32  # unanswered ones of a stream; the next one waits
MAX_QUESTIONS = 4  # unanswered ones of a stream; the next one is refused

FromEngine = messages.Result | messages.Progress | messages.Skipped  # of one stream


async def _at_once() -> None:
    return


@dataclass(frozen=True, slots=True)
class Outlets:
    """Where a stream's messages go."""

    publish: Callable[[Message], None]  # to its log and every reader
    tell: Callable[[Message], None]  # to its producer alone
    room: Callable[[], Awaitable[None]] = _at_once  # returns when the log takes more
    # Whether the log saves the stream's state, so that it can go on after a restart of the server.
    is_saved: bool = False
    metrics: Metrics = field(default_factory=Metrics)


@dataclass(frozen=True, slots=True)
class Unsaved:
    """Audio that the log does not have yet."""

    start: int  # sample at which `pcm` begins
    stop: int
    pcm: bytes  # float32 little-endian


class Session:
    """A live stream, from the first sample to `session.closed`. Belongs to the event loop."""

    def __init__(
        self,
        name: str,
        number: int,
        language: str | None,
        *,
        ingest: IngestConfig,
        vad: VadConfig,
        timeline: Timeline,
        engine: EngineClient,
        outlets: Outlets,
    ) -> None:
        self.name = name
        self.is_lost = asyncio.Event()  # the engine will not come back
        self._opened_at = asyncio.get_running_loop().time()
        self._number = number  # the engine's name for this stream
        self._language = language  # None: detect
        self._language_from: int | None = None  # position of a change the engine has not been told of
        self._settled_language: str | None = None  # what the engine detected and stays with
        self._vad = Vad(vad)
        self._ring = Ring(int(ingest.ring_s * SAMPLE_RATE_HZ))
        self._max_ahead = int(ingest.max_ahead_s * SAMPLE_RATE_HZ)
        self._timeline = timeline
        self._engine = engine
        self._outlets = outlets
        self._is_open = False  # the running engine knows this stream
        self._is_over = False
        self._sent = 0  # position: the engine has the audio before it
        self._consumed = 0  # position: the engine has decided everything before it
        self._window_start = 0
        self._pending: deque[PendingMark] = deque()  # in order; a mark per 0.1 s of the ring at most
        self._n_marks_sent = 0  # how many of them this engine has
        self._speech_edge: int | None = None  # at `_consumed`: where the running speech began
        self._last_stop = 0  # at `_consumed`: where the speech before ended
        self._inbox: deque[FromEngine] = deque()  # one result at most, and a progress per 0.5 s sent
        self._has_mail = asyncio.Event()
        self._changed = Changed()
        self._unsaved: deque[Pcm] = deque()  # audio that came since the last `take_unsaved`
        self._saved = 0  # position: the log has the audio before it

    def open(self, epoch_ms: int) -> None:
        """Announce the stream and take its slot, at once or when the engine is back."""
        self._engine.attach(self._number, self)
        ready = self._engine.ready
        assert ready is not None, "admitted before the engine was ever ready"
        self._outlets.publish(SessionCreated(ready.model, ready.tasks, ready.languages, epoch_ms))
        if self._engine.is_ready:
            self._open_on_engine()
        elif self._engine.state is EngineState.LOST:  # between admission and now
            self.on_engine_lost()
        logger.info("stream %s: opened as %d", self.name, self._number)

    # --- across the server's death -------------------------------------------------------

    def take_unsaved(self) -> Unsaved:
        """The audio since the last call, which belongs to the `snapshot` of the same moment."""
        start, self._saved = self._saved, self._ring.end
        pcm = b"".join(piece.tobytes() for piece in self._unsaved)
        self._unsaved.clear()
        self._changed.notify()
        return Unsaved(start, self._saved, pcm)

    def restore(self, state: SessionState, start: int, audio: Pcm) -> None:
        """Continue where the session of a dead server was; called instead of `open`, before anything else.

        Args:
            state: Of that session, whose timeline this one was made with.
            start: Sample at which `audio` begins: not after what `state` needs.
            audio: Up to the state's end.
        """
        assert start + len(audio) == state.ring_end, (start, len(audio), state.ring_end)
        self._language = state.language
        self._language_from, self._settled_language = state.language_from, state.settled_language
        self._ring = Ring(max(self._ring.capacity, state.ring_end - state.ring_start), state.ring_start)
        self._ring.push(audio[state.ring_start - start :])
        self._consumed, self._window_start = state.consumed, state.window_start
        self._pending.extend(state.pending)
        self._speech_edge, self._last_stop = state.speech_edge, state.last_stop
        heard_from = Vad.needed_from(state.vad)
        self._vad.restore(state.vad, audio[heard_from - start :])
        self._saved = self._ring.end
        self._opened_at -= self._ring.end / SAMPLE_RATE_HZ
        self._engine.attach(self._number, self)
        text = "the server was restarted; captions go on from here"
        self._outlets.publish(Degraded("server_restart", text, ms_of(self._consumed), ms_of(self._ring.end)))
        if self._engine.is_ready:
            self._open_on_engine()
        elif self._engine.state is EngineState.LOST:
            self.on_engine_lost()
        logger.info(
            "stream %s: goes on at %.1f s as %d", self.name, self._ring.end / SAMPLE_RATE_HZ, self._number
        )

    def snapshot(self) -> SessionState:
        """What a new session continues from, with the audio since `SessionState.needed_from`."""
        return SessionState(
            language=self._language,
            language_from=self._language_from,
            settled_language=self._settled_language,
            ring_start=self._ring.start,
            ring_end=self._ring.end,
            consumed=self._consumed,
            window_start=self._window_start,
            pending=tuple(self._pending),
            speech_edge=self._speech_edge,
            last_stop=self._last_stop,
            vad=self._vad.state(),
            timeline=self._timeline.state(),
        )

    def tell(self, message: Message) -> None:
        """Send a message to the producer alone."""
        self._outlets.tell(message)

    # --- from the producer ---------------------------------------------------------------

    @property
    def n_samples(self) -> int:
        """Samples fed so far, at 16 kHz."""
        return self._ring.end

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
            lambda: self._ring.n_free >= n_samples and self._ring.end - self._saved < self._ring.capacity
        )

    def push(self, pcm: Pcm) -> None:
        """Take audio that `wait_for_room` was called for, without awaiting anything in between."""
        if self.is_lost.is_set() or self._is_over:
            return  # no engine will decode it, and the connection is being closed for that
        self._ring.push(pcm)
        if self._outlets.is_saved:
            self._unsaved.append(pcm)
        else:
            self._saved = self._ring.end
        self._outlets.metrics.heard(len(pcm))
        self._pending.extend(PendingMark(mark) for mark in self._vad.push(pcm))
        self._announce()
        self._pump()

    async def flush(self, flush_id: str) -> None:
        """Commit everything fed so far; `flushed` follows when that is done."""
        await self._until(lambda: self._n_flushes() < MAX_FLUSHES)
        self._mark_flush(flush_id)

    def ask(self, ask: Ask) -> None:
        """Answer a question about the last audio fed; refused while too many wait."""
        if sum(pending.mark.kind == "ask" for pending in self._pending) >= MAX_QUESTIONS:
            text = f"ask {ask.id!r}: {MAX_QUESTIONS} questions wait for their answers"
            self._outlets.tell(Error("busy", text, fatal=False))
            return
        at = self._ring.end
        since = max(0, at - ask.last_ms * SAMPLE_RATE_HZ // 1000)
        self._pending.append(PendingMark(Mark("ask", at, since, ask.question), ask.id))
        self._pump()

    def set_language(self, language: str | None) -> None:
        """Decode in this language, or detect it, beginning with the audio that is sent next."""
        self._language = language
        self._settled_language = None
        self._language_from = self._ring.end

    def set_endpointing(self, vad: VadConfig) -> None:
        """Find the beginning and end of speech by these settings from the next audio on."""
        self._vad.change(vad)

    async def finish(self, reason: str) -> None:
        """Finalise what was said and close the stream; waits for the engine unless it is lost.

        Cancelled while it waits, it leaves the stream to `abandon`.
        """
        if not self.is_lost.is_set():
            self._mark_flush(None)
            await self._until(lambda: not self._pending)
        self.abandon(reason)

    def abandon(self, reason: str) -> None:
        """Close the stream with what is committed now."""
        if self._is_over:
            return
        self._is_over = True
        self._changed.notify()
        if self._is_open and self._engine.is_ready:
            self._engine.send(messages.CloseStream(self._number))
        self._is_open = False
        self._engine.detach(self._number)
        self._publish(self._timeline.finish(self._ring.end))
        closed = SessionClosed(
            reason, ms_of(self._ring.end), self._timeline.n_words, self._timeline.n_segments
        )
        self._outlets.publish(closed)
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
        """Whether the engine has more undecided audio than lies between two points, or owes a result."""
        sent = islice(self._pending, self._n_marks_sent)
        owes_result = any(pending.mark.kind != "started" for pending in sent)
        return self._is_open and (owes_result or self._sent - self._consumed >= MAX_STEP)

    async def run(self) -> None:
        """Take what the engine says, for as long as the stream lives.

        In a task of the stream's own, so that a fault in it ends this stream and no other.
        """
        while True:
            while self._inbox:
                await self._outlets.room()
                if not self._inbox:  # the engine died meanwhile
                    break
                try:
                    self._take(self._inbox.popleft())
                except EngineFault as fault:
                    self._engine.condemn(fault)
            self._has_mail.clear()
            await self._has_mail.wait()

    def on_engine_message(self, message: FromEngine) -> None:
        """The engine found something: `run` takes it next."""
        self._inbox.append(message)
        self._has_mail.set()

    def _take(self, message: FromEngine) -> None:
        match message:
            case messages.Result():
                self._on_result(message)
            case messages.Progress():
                self._consume(message.consumed)
                self._window_start = max(self._window_start, message.window_start)
                self._ring.forget(message.needed_from)
            case messages.Skipped(start=start, end=end, n_points=n_points):
                self._outlets.metrics.skipped(n_points)
                text = f"{n_points} decode points skipped"
                self._outlets.publish(Degraded("overload", text, ms_of(start), ms_of(end)))
        self._pump()
        self._changed.notify()

    def on_engine_down(self) -> None:
        """The engine died: keep everything for the next one."""
        if self._is_open:
            self._outlets.tell(Error("engine_lost", "the engine died and is being restarted", fatal=False))
        self._is_open = False
        self._inbox.clear()  # not answered with a `Commit`, so the next engine finds it again

    def on_engine_up(self) -> None:
        """Open this stream on the new engine, where the dead one had decided everything."""
        text = "the engine was restarted; captions go on from here"
        self._outlets.publish(Degraded("engine_restart", text, ms_of(self._consumed), ms_of(self._ring.end)))
        self._open_on_engine()

    def on_engine_lost(self) -> None:
        """The engine will not come back: whoever waits here must not wait on."""
        self._is_open = False
        self._inbox.clear()
        self.is_lost.set()
        self._changed.notify()

    # --- inside --------------------------------------------------------------------------

    def _open_on_engine(self) -> None:
        committed, context = self._timeline.window(self._window_start)
        self._engine.send(
            messages.Open(
                stream=self._number,
                language=self._language or self._settled_language,
                start=self._ring.start,
                consumed=self._consumed,
                window_start=self._window_start,
                committed=committed,
                context=context,
                is_speech=self._speech_edge is not None,
                speech_edge=self._speech_edge or 0,
                last_stop=self._last_stop,
            )
        )
        self._language_from = None
        self._is_open = True
        self._sent = self._ring.start
        self._n_marks_sent = 0
        self._pump()

    def _mark_flush(self, flush_id: str | None) -> None:
        at = self._ring.end
        self._pending.append(PendingMark(Mark("flush", at, at), flush_id))
        self._pump()

    def _n_flushes(self) -> int:
        return sum(pending.mark.kind == "flush" for pending in self._pending)

    def _pump(self) -> None:
        """Send the engine what it may have: audio up to `max_ahead` beyond what it consumed."""
        if not self._is_open:
            return
        limit = min(self._ring.end, self._consumed + self._max_ahead)
        marks = [pending.mark for pending in self._pending if pending.mark.at <= limit]
        marks = marks[self._n_marks_sent :]
        if not marks:
            limit -= limit % SEND_GRID
        while self._sent < limit or marks:
            if self._language_from is not None:  # here, so that its number is bounded by audio
                self._engine.send(messages.Configure(self._number, self._language_from, self._language))
                self._language_from = None
            # A mark at or before the audio's start was not answered by an engine that died.
            is_late = bool(marks) and marks[0].at <= self._sent
            end = self._sent if is_late else min(limit, self._sent + MAX_SEND)
            due = tuple(mark for mark in marks if mark.at <= end)
            pcm = self._ring.read(self._sent, end).tobytes()
            self._engine.send(messages.Audio(self._number, self._sent, pcm, due))
            self._sent = end
            marks = marks[len(due) :]
            self._n_marks_sent += len(due)

    def _on_result(self, result: messages.Result) -> None:
        self._outlets.metrics.decoded(result)
        self._consume(result.point)
        self._window_start = max(self._window_start, result.window_start)
        if self._language_from is None:
            self._settled_language = result.settled_language
        answered: PendingMark | None = None
        if result.kind not in ("tick", "sound"):
            answered = self._answered(result)
            if answered.mark.kind == "stopped":
                self._speech_edge = None
                self._last_stop = answered.mark.edge
                self._publish(self._timeline.speech_stopped(answered.mark.edge))
        applied = self._timeline.apply(result)
        self._engine.send(messages.Commit(self._number, result.point, result.kind, applied.n_committed))
        self._publish(applied.messages)
        if answered is not None and answered.client_id is not None:
            self._reply(answered.client_id, answered.mark, result)
        self._announce()

    def _reply(self, client_id: str, mark: Mark, result: messages.Result) -> None:
        """Tell a client that its flush is done, or what the model answered."""
        if mark.kind == "flush":
            self._outlets.publish(Flushed(client_id, ms_of(mark.at)))
            return
        if result.answer is None:
            raise EngineFault(f"stream {self.name}: a question at {mark.at} without an answer")
        answer = result.answer
        if answer.text:
            self._outlets.publish(AnswerDelta(client_id, answer.text))
        self._outlets.publish(AnswerFinal(client_id, answer.text, ms_of(answer.start), ms_of(answer.end)))

    def _answered(self, result: messages.Result) -> PendingMark:
        """Take off the mark that this result answers."""
        mark = self._pending[0].mark if self._n_marks_sent else None
        if mark is None or mark.kind != result.kind or mark.at != result.point:
            raise EngineFault(
                f"stream {self.name}: a result of kind {result.kind} at {result.point}; expected {mark}"
            )
        self._n_marks_sent -= 1
        return self._pending.popleft()

    def _consume(self, position: int) -> None:
        """The engine decided everything before a position; that answers the `started` marks there."""
        self._consumed = max(self._consumed, position)
        while self._n_marks_sent:
            mark = self._pending[0].mark
            if mark.kind != "started" or mark.at > self._consumed:
                return
            self._n_marks_sent -= 1
            self._pending.popleft()
            self._speech_edge = mark.edge

    def _announce(self) -> None:
        """Put on the timeline the speech that has begun, in its order with the results.

        A `started` mark waits until every stop and flush before it has its result; then no result
        of earlier audio can follow, and the timeline sees the same order at any speed.
        """
        for pending in self._pending:
            if pending.mark.kind != "started":
                return
            if not pending.is_announced:
                pending.is_announced = True
                self._publish(self._timeline.speech_started(pending.mark.edge))

    def _publish(self, found: tuple[Message, ...] | list[Message]) -> None:
        for message in found:
            self._outlets.publish(message)
            if isinstance(message, TranscriptDelta) and self._is_in_real_time():
                self._outlets.metrics.committed(message, ms_of(self._ring.end))

    def _is_in_real_time(self) -> bool:
        """Whether the audio came no faster than it was spoken, so that a lag on its clock is one."""
        elapsed_s = asyncio.get_running_loop().time() - self._opened_at
        return self._ring.end <= (elapsed_s + REAL_TIME_SLACK_S) * SAMPLE_RATE_HZ

    async def _until(self, is_true: Callable[[], bool]) -> None:
        """Wait for something that the engine's messages bring about, or for the stream's end or loss."""
        await self._changed.wait_for(lambda: is_true() or self.is_lost.is_set() or self._is_over)
