"""All live streams of a server: begun, kept through lost connections, found again after its death.

Knows sessions and the log, not connections.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable

import msgspec
import numpy as np

from streaming import aio
from streaming.audio.ingest import AudioFormat
from streaming.audio.vad import Vad
from streaming.config import Config, VadConfig
from streaming.engine.client import EngineClient, EngineState
from streaming.engine.contract import Pcm
from streaming.errors import LogError
from streaming.log.log import Log
from streaming.log.reader import Left
from streaming.log.row import Row
from streaming.logging_setup import where_raised
from streaming.metrics import Metrics
from streaming.protocol import (
    SAMPLE_RATE_HZ,
    Error,
    Message,
    ProtocolError,
    SessionClosed,
    TranscriptDelta,
    TranscriptFinal,
    decode,
)
from streaming.stream.audio_input import AudioInput
from streaming.stream.feed import Feed
from streaming.stream.lifetime import LiveStream, Seat, digest_of, new_token
from streaming.stream.session import Outlets, Session
from streaming.stream.snapshot import InputState, SessionState, decode_stream, for_model
from streaming.timeline.transcript import new_timeline

logger = logging.getLogger(__name__)

MAX_COUNTED = 100_000  # messages of a stream that cannot go on, whose words are counted
STOP_TIMEOUT_S = 5.0  # for what is left to do when every connection is closed


class Streams:
    """The streams that can be gone on with, by name. Belongs to the event loop."""

    def __init__(
        self,
        config: Config,
        engine: EngineClient,
        log: Log,
        *,
        clock_ms: Callable[[], int],
        release: Callable[[str], None],
    ) -> None:
        """There are none yet.

        Args:
            config: Of the whole server.
            engine: Runs, or will.
            log: Of all streams.
            clock_ms: Unix time.
            release: Called with the name of a dead server's stream that this one leaves alone.
        """
        self._config = config
        self._engine = engine
        self._log = log
        self._clock_ms = clock_ms
        self._release = release
        self._metrics: Metrics = engine.metrics
        self._live: dict[str, LiveStream] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count(1)
        self._left: dict[str, None] = {}  # names of a dead server's streams that are not back yet

    def find(self, name: str) -> LiveStream | None:
        """A live stream."""
        return self._live.get(name)

    def begin(self, name: str, audio_format: AudioFormat, language: str | None) -> tuple[LiveStream, str]:
        """A new stream, and the token that it is resumed with."""
        token = new_token()
        seat = Seat(self._log, name)
        session = self._session(name, language, seat.tell)
        live = self._live_stream(session, self._input(session, audio_format, seat), seat)
        self._log.open(name, live, digest_of(token))
        session.open(self._clock_ms())
        self._keep(live)
        return live, token

    def begin_unsaved(
        self,
        name: str,
        language: str | None,
        *,
        vad: VadConfig,
        tell: Callable[[Message], None],
    ) -> Session:
        """A new stream that ends with its connection, and is closed by the next server if this one dies."""
        session = self._session(name, language, tell, vad=vad, is_saved=False)
        self._log.open(name)
        return session

    def publish(self, name: str, message: Message) -> None:
        """Log a message; it goes out when it is on the disk."""
        self._log.append(name, message)
        self._metrics.published(message)
        if isinstance(message, SessionClosed):
            self._log.close(name)

    def fail(self, name: str) -> None:
        """End a stream that cannot be saved any more, as "internal" and with what is committed."""
        live = self._live.get(name)
        if live is not None:
            live.fail()

    def stop(self) -> None:
        """The server stops: finalise every stream whose producer is away; the others' producers do it."""
        for live in self._live.values():
            live.stop()
        for name in self._left:  # the next server finds them again
            self._release(name)
        self._left.clear()

    async def ended(self) -> None:
        """Wait until every task has ended, within `STOP_TIMEOUT_S`; then end it."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=STOP_TIMEOUT_S)
            await aio.cancel(*late)

    # --- what a killed server left -------------------------------------------------------

    def restore(self) -> tuple[str, ...]:
        """Go on with a dead server's streams once the engine is ready; their names, which are taken."""
        names = self._log.directory.left()
        self._left = dict.fromkeys(names)
        if names:
            self._spawn(asyncio.create_task(self._restore(), name="restore"))
        return names

    async def _restore(self) -> None:
        await self._engine.until(EngineState.READY, EngineState.LOST, EngineState.STOPPED)
        while self._left and self._engine.ready is not None:
            name = next(iter(self._left))
            try:
                left = await self._log.reader.read_left(name)
                if name not in self._left:
                    return  # the server stops
                self._restore_one(left)
            except (LogError, msgspec.MsgspecError) as exc:
                logger.warning("stream %s: cannot go on: %s", name, exc)
                await self._close_left(name)
            except Exception as exc:
                # A fault of ours costs this stream and no other. Without its text, as in `_live_through`.
                logger.error("stream %s: cannot go on: %s", name, where_raised(exc))  # noqa: TRY400
                logger.debug("the fault's text", exc_info=True)
                await self._close_left(name)
            self._left.pop(name, None)

    def _restore_one(self, left: Left) -> None:
        """Go on with one stream.

        Raises:
            LogError: there is no slot, no state, or not the audio that its state needs.
            MsgspecError: its state is not what a timeline remembers.
        """
        ready = self._engine.ready
        assert ready is not None
        if left.state is None or len(self._live) >= ready.n_slots:
            raise LogError("it had no state" if left.state is None else f"there are {ready.n_slots} slots")
        saved = decode_stream(left.state)
        feed, unanswered = for_model(saved.session.feed, ready.tasks, ready.languages)
        state = SessionState(feed, saved.session.vad)
        start = left.audio[0][0] if left.audio else feed.ring_end
        audio = np.frombuffer(b"".join(pcm for _, pcm in left.audio), "<f4")
        end = start + len(audio)
        if end != feed.ring_end or start > state.needed_from:
            raise LogError(f"its audio from {start} to {end} is kept; expected it up to {feed.ring_end}")
        seat = Seat(self._log, left.name)
        session = self._session(left.name, feed.language, seat.tell, restored=(state, audio))
        live = self._live_stream(
            session, self._input(session, saved.input.audio_format, seat, saved.input), seat
        )
        self._log.reopen(left.name, live)
        session.reopen()
        for question in unanswered:
            text = f"ask {question.client_id!r}: the loaded model answers no questions"
            seat.tell_next(Error("unsupported", text, fatal=False))
        self._keep(live)

    async def _close_left(self, name: str) -> None:
        """Close a stream that cannot go on, with what was committed; with nothing if that is unreadable."""
        row = self._log.directory.row(name)
        assert row is not None
        if row.closed_ms is not None:
            return  # its session was there already, and closed it
        types = (TranscriptDelta.type, TranscriptFinal.type)
        try:
            rows = await self._log.reader.of_session(row, types, MAX_COUNTED)
            closed = await self._log.reader.apart(lambda: _server_lost(rows))
        except (LogError, ProtocolError) as exc:
            logger.warning("stream %s: its words are not counted: %s", name, exc)
            closed = _server_lost([])
        if name not in self._left:
            return  # the server stops, and has let go of it
        if not row.is_live:
            self._log.reopen(name, None)
        self.publish(name, closed)

    # --- inside --------------------------------------------------------------------------

    def _session(
        self,
        name: str,
        language: str | None,
        tell: Callable[[Message], None],
        *,
        vad: VadConfig | None = None,
        restored: tuple[SessionState, Pcm] | None = None,
        is_saved: bool = True,
    ) -> Session:
        ready = self._engine.ready
        assert ready is not None, "admitted before the engine was ever ready"
        number, ingest = next(self._numbers), self._config.ingest
        endpointing = Vad(vad or self._config.vad)
        state = audio = None
        if restored is not None:
            state, kept = restored[0].feed, restored[1]
            start = state.ring_end - len(kept)
            endpointing.restore(restored[0].vad, kept[Vad.needed_from(restored[0].vad) - start :])
            audio = kept[state.ring_start - start :]
        feed = Feed(
            number,
            new_timeline(self._config, ready.tasks, ready.sounds, None if state is None else state.timeline),
            language=language,
            ring=int(ingest.ring_s * SAMPLE_RATE_HZ),
            max_ahead=int(ingest.max_ahead_s * SAMPLE_RATE_HZ),
            state=state,
            audio=audio,
        )
        outlets = Outlets(
            publish=lambda message: self.publish(name, message),
            tell=tell,
            room=lambda: self._log.room(name),
            is_saved=is_saved,
            metrics=self._metrics,
        )
        return Session(name, number, feed, endpointing, engine=self._engine, outlets=outlets)

    def _input(
        self, session: Session, audio_format: AudioFormat, seat: Seat, state: InputState | None = None
    ) -> AudioInput:
        interval_s = self._config.ingest.ack_interval_s
        return AudioInput(audio_format, session, seat.tell, ack_interval_s=interval_s, state=state)

    def _live_stream(self, session: Session, audio: AudioInput, seat: Seat) -> LiveStream:
        config = self._config.server
        return LiveStream(
            session,
            audio,
            seat,
            self._log,
            grace_s=config.resume_grace_s,
            stop_timeout_s=config.stop_timeout_s,
        )

    def _keep(self, live: LiveStream) -> None:
        """Let a stream live in a task of its own."""
        self._live[live.name] = live
        self._spawn(asyncio.create_task(self._live_through(live), name=f"stream {live.name}"))

    def _spawn(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """A fault that a task did not expect is seen."""
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            logger.error("the task %r failed: %s", task.get_name(), where_raised(exc))

    async def _live_through(self, live: LiveStream) -> None:
        """One stream, to its end; a fault of ours ends it and nothing else."""
        try:
            await live.run()
        except Exception as exc:
            # Without the text of the fault, which may hold what a client sent.
            logger.error("stream %s failed: %s", live.name, where_raised(exc))  # noqa: TRY400
            logger.debug("the fault's text", exc_info=True)
        finally:
            if self._live.get(live.name) is live:
                del self._live[live.name]


def _server_lost(rows: list[Row]) -> SessionClosed:
    """The end of a stream that cannot go on, after its committed words and closed segments.

    Raises:
        ProtocolError: a message cannot be read.
    """
    said = [decode(row.frame).message for row in rows]
    deltas = [message for message in said if isinstance(message, TranscriptDelta)]
    n_words = sum(len(delta.words) for delta in deltas)
    end_ms = max((delta.end_ms for delta in deltas), default=0)
    return SessionClosed("server_lost", end_ms, n_words, len(said) - len(deltas))
