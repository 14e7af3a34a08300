"""All live streams of a server: begun, kept through lost connections, resumed after its death.

Knows sessions and the log, not connections.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np

from streaming import aio
from streaming.audio.ingest import AudioFormat
from streaming.audio.vad import Vad
from streaming.config import EngineSettings, IngestConfig, ServerConfig, VadConfig
from streaming.engine.client import EngineClient
from streaming.engine.contract import Pcm
from streaming.errors import LogError
from streaming.log.directory import new_session_id
from streaming.log.log import Log
from streaming.log.reader import Left
from streaming.logging_setup import where_raised
from streaming.metrics import Metrics
from streaming.protocol import SAMPLE_RATE_HZ, Error, Message, SessionClosed
from streaming.stream.audio_input import AudioInput
from streaming.stream.clock import StreamClock
from streaming.stream.feed import Feed
from streaming.stream.lifetime import TOKEN_BYTES, LiveStream, ProducerSlot, ResumableStream
from streaming.stream.recovery import Recovery
from streaming.stream.session import Outlets, Session
from streaming.stream.snapshot import InputState, SessionState, decode_stream, for_model
from streaming.timeline.transcript import new_timeline
from streaming.tokens import digest_of, new_token

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0  # for what is left to do when every connection is closed


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """What every stream of a server is set to."""

    server: ServerConfig
    ingest: IngestConfig
    vad: VadConfig
    timeline: EngineSettings  # its sections that a timeline reads


class Streams:
    """The live streams, by name. Belongs to the event loop."""

    def __init__(
        self,
        settings: StreamSettings,
        engine: EngineClient,
        log: Log,
        metrics: Metrics,
        *,
        clock_ms: Callable[[], int],
        release: Callable[[str], None],
    ) -> None:
        """There are none yet.

        Args:
            settings: Of every stream.
            engine: Runs, or will.
            log: Of all streams.
            metrics: Of the server.
            clock_ms: Unix time.
            release: Called with the name of a dead server's stream that this one leaves to the next.
        """
        self._settings = settings
        self._engine = engine
        self._log = log
        self._clock_ms = clock_ms
        self._metrics = metrics
        self._is_stopping = False
        self._live: dict[str, LiveStream] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count(1)
        self._recovery = Recovery(engine, log, resume=self._resume, publish=self.publish, release=release)

    def find(self, name: str) -> ResumableStream | None:
        """A live stream that its producer may resume."""
        live = self._live.get(name)
        return live if isinstance(live, ResumableStream) else None

    def begin(
        self, name: str, audio_format: AudioFormat, language: str | None
    ) -> tuple[ResumableStream, str]:
        """A new stream, and the token that it is resumed with."""
        token = new_token(TOKEN_BYTES)
        slot = ProducerSlot(self._log, name)
        session_id = new_session_id(self._clock_ms())
        session = self._session(name, language, slot.tell, event_prefix=f"{session_id}-")
        live = self._resumable(session, audio_format, slot)
        self._log.open(name, live, digest_of(token), session_id)
        self._open(live)
        return live, token

    def begin_unsaved(
        self,
        name: str,
        language: str | None,
        *,
        vad: VadConfig,
        end_audio: Callable[[], Coroutine[Any, Any, None]],
    ) -> LiveStream:
        """A new stream that ends with its connection, and is closed by the next server if this one dies.

        Args:
            name: Of the stream.
            language: That it is set to; None: detect.
            vad: Its endpointing.
            end_audio: Feeds its session what is still held of the received audio.
        """
        slot = ProducerSlot(self._log, name)
        session_id = new_session_id(self._clock_ms())
        session = self._session(
            name, language, slot.tell, vad=vad, event_prefix=f"{session_id}-", is_saved=False
        )
        stop_timeout_s = self._settings.server.stop_timeout_s
        live = LiveStream(
            session, slot, self._log, end_audio=end_audio, grace_s=0, stop_timeout_s=stop_timeout_s
        )
        self._log.open(name, session_id=session_id)
        self._open(live)
        return live

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
        self._is_stopping = True
        for live in self._live.values():
            live.stop()
        self._recovery.stop()

    async def ended(self) -> None:
        """Wait until every task has ended, within `STOP_TIMEOUT_S`; then end it."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=STOP_TIMEOUT_S)
            await aio.cancel(*late)

    def restore(self) -> tuple[str, ...]:
        """Resume a dead server's streams once the engine is ready; their names, which are taken."""
        names = self._recovery.begin()
        if names:
            self._spawn(asyncio.create_task(self._recovery.run(), name="restore"))
        return names

    # --- inside --------------------------------------------------------------------------

    def _open(self, live: LiveStream) -> None:
        """Announce a stream that the log knows, and let it live."""
        live.session.open(self._clock_ms())
        self._keep(live)

    def _resume(self, left: Left) -> None:
        """Resume one stream of a dead server.

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
        start = left.audio[0][0] if left.audio else feed.ring_end
        audio = np.frombuffer(b"".join(pcm for _, pcm in left.audio), "<f4")
        state = SessionState(feed, saved.session.vad, saved.session.clock)
        if start + len(audio) != feed.ring_end or start > state.needed_from:
            kept = f"its audio from {start} to {start + len(audio)} is kept"
            raise LogError(f"{kept}; expected it from {state.needed_from} to {feed.ring_end}")
        slot = ProducerSlot(self._log, left.name)
        session = self._session(left.name, feed.language, slot.tell, restored=(state, audio))
        live = self._resumable(session, saved.input.audio_format, slot, saved.input)
        self._log.reopen(left.name, live)
        session.reopen()
        for question in unanswered:
            text = f"ask {question.client_id!r}: the loaded model answers no questions"
            slot.tell_next(Error("unsupported", text, fatal=False))
        self._keep(live)

    def _session(
        self,
        name: str,
        language: str | None,
        tell: Callable[[Message], None],
        *,
        vad: VadConfig | None = None,
        event_prefix: str = "",
        restored: tuple[SessionState, Pcm] | None = None,
        is_saved: bool = True,
    ) -> Session:
        ready = self._engine.ready
        assert ready is not None, "admitted before the engine was ever ready"
        number, ingest = next(self._numbers), self._settings.ingest
        endpointing = Vad(vad or self._settings.vad)
        state = audio = None
        if restored is not None:
            state, kept = restored[0].feed, restored[1]
            start = state.ring_end - len(kept)
            endpointing.restore(restored[0].vad, kept[Vad.needed_from(restored[0].vad) - start :])
            audio = kept[state.ring_start - start :]
        feed = Feed(
            number,
            new_timeline(
                self._settings.timeline,
                ready.tasks,
                ready.sounds,
                None if state is None else state.timeline,
                event_prefix=event_prefix,
            ),
            language=language,
            ring=int(ingest.ring_s * SAMPLE_RATE_HZ),
            max_ahead=int(ingest.max_ahead_s * SAMPLE_RATE_HZ),
            max_step=ready.max_step,
            state=state,
            audio=audio,
        )
        outlets = Outlets(
            publish=lambda message: self.publish(name, message),
            tell=tell,
            began=lambda epoch_ms: self._log.began(name, epoch_ms),
            room=lambda: self._log.room(name),
            is_saved=is_saved,
            metrics=self._metrics,
        )
        clock = StreamClock(self._clock_ms, None if restored is None else restored[0].clock)
        return Session(name, number, feed, endpointing, clock, engine=self._engine, outlets=outlets)

    def _resumable(
        self,
        session: Session,
        audio_format: AudioFormat,
        slot: ProducerSlot,
        state: InputState | None = None,
    ) -> ResumableStream:
        ack_interval_s, server = self._settings.ingest.ack_interval_s, self._settings.server
        audio = AudioInput(audio_format, session, slot.tell, ack_interval_s=ack_interval_s, state=state)
        return ResumableStream(
            session,
            audio,
            slot,
            self._log,
            grace_s=server.resume_grace_s,
            stop_timeout_s=server.stop_timeout_s,
        )

    def _keep(self, live: LiveStream) -> None:
        """Let a stream live in a task of its own."""
        self._live[live.name] = live
        if self._is_stopping:
            live.stop()
        self._spawn(asyncio.create_task(self._live_through(live), name=f"stream {live.name}"))

    def _spawn(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """Log an error that a task did not expect."""
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            logger.error("the task %r failed: %s", task.get_name(), where_raised(exc))

    async def _live_through(self, live: LiveStream) -> None:
        """One stream, to its end; an internal error ends it and nothing else."""
        try:
            await live.run()
        except Exception as exc:
            # Without the text of the error, which may hold what a client sent.
            logger.error("stream %s failed: %s", live.name, where_raised(exc))  # noqa: TRY400
            logger.debug("the fault's text", exc_info=True)
        finally:
            if self._live.get(live.name) is live:
                del self._live[live.name]
