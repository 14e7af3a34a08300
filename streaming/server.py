"""The server's sockets: who is let in, where, and how everything ends.

HTTP answers and admission are here; what a connection says is in `producer` and `subscriber`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np
from websockets.asyncio.server import Server as SocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from streaming import connection as wire
from streaming.config import Config
from streaming.engine_client import EngineClient
from streaming.errors import BadQuery, LogError, StreamFault
from streaming.hub import Hub, Subscription
from streaming.ingest import AudioFormat, parse_query
from streaming.live import LiveStream, Resumption, Seat, digest_of, new_token, parse_resumption
from streaming.log import Left, Log
from streaming.producer import Producer, ProducerLimits
from streaming.protocol import (
    HEALTH_PATH,
    READY_PATH,
    STREAM_NAME,
    STREAM_PATH,
    SUBSCRIBE_PATH,
    CloseCode,
    Envelope,
    HttpStatus,
    Message,
    SessionClosed,
    Subscribe,
    TranscriptDelta,
    TranscriptFinal,
    decode,
    encode,
)
from streaming.session import Outlets, Session
from streaming.state import decode_state
from streaming.subscriber import Subscriber
from streaming.timeline import Timeline
from streaming.vad import Vad

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0  # for the peer's part of the closing handshake
MAX_COUNTED = 100_000  # messages of a stream that cannot go on, whose words are counted
MAX_FRAMES_WAITING = 8  # of one connection, before its socket is not read any more


@dataclass(frozen=True, slots=True)
class _Admission:
    """A stream that was let in: its name and slot are taken."""

    name: str
    audio_format: AudioFormat
    language: str | None
    resumption: Resumption | None = None  # None: a new stream, whose name and slot it holds


class _Connection(ServerConnection):
    """A connection that gives back what it was admitted with, however it is lost."""

    admission: _Admission | None = None  # until the handler takes it over
    on_lost: Callable[[_Connection], None] | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost(self)


class Server:
    """All connections of one server process. Belongs to the event loop."""

    def __init__(
        self, config: Config, engine: EngineClient, clock_ms: Callable[[], int] | None = None
    ) -> None:
        self._config = config
        self._engine = engine
        self._clock_ms = clock_ms or _unix_ms
        self._log = Log(config.log, self._deliver, self._clock_ms)
        self._hub = Hub(self._log, config.server.subscriber_queue)
        self._connections: set[_Connection] = set()  # WebSockets, from their admission to their loss
        self._live: set[str] = set()  # names of streams, from their admission to `session.closed`
        self._streams: dict[str, LiveStream] = {}  # that can be resumed
        self._keeping: set[asyncio.Task[None]] = set()  # a task for each of them
        self._numbers = itertools.count(1)
        self._stopping = asyncio.Event()
        self._finalised = asyncio.Event()

    @property
    def n_connections(self) -> int:
        """WebSocket connections that are open."""
        return len(self._connections)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Serve; gives the port. On exit every stream is finalised and every connection closed.

        Raises:
            LogError: the log's file cannot be used.
        """
        async with self._log.running():
            await self._restore()
            async with self._serving() as port:
                yield port

    async def fault(self) -> None:
        """Raise what makes serving impossible, when it happens.

        Raises:
            LogError: the log's file is broken.
        """
        await self._log.fault()

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[int]:
        config = self._config.server
        sockets = await serve(
            self._handle,
            config.host,
            config.port,
            process_request=self._answer_http,
            process_response=self._admit,
            create_connection=_Connection,
            compression=None,  # audio does not compress, and captions are small
            max_size=config.max_message_bytes,
            max_queue=MAX_FRAMES_WAITING,
            ping_interval=config.ping_interval_s,
            ping_timeout=config.ping_interval_s,
            close_timeout=CLOSE_TIMEOUT_S,
            server_header=None,
        )
        port = int(sockets.sockets[0].getsockname()[1])
        logger.info("listening on %s:%d", config.host, port)
        try:
            yield port
        finally:
            await self._stop(sockets)

    async def _stop(self, sockets: SocketServer) -> None:
        """Let nobody in, finalise all streams, then let the subscribers have it and close."""
        logger.info("stopping: %d streams live", len(self._live))
        self._stopping.set()
        for live in self._streams.values():
            live.stop()
        self._check_finalised()
        sockets.close(close_connections=False)
        try:
            # Finalising stops after stop_timeout_s; what follows has its own limits.
            async with asyncio.timeout(self._config.server.stop_timeout_s + 2 * CLOSE_TIMEOUT_S):
                await sockets.wait_closed()
        except TimeoutError:
            logger.warning("stopping: %d connections did not close in time", len(self._connections))
            for connection in list(self._connections):
                connection.transport.abort()
            await sockets.wait_closed()
        if self._keeping:
            _, late = await asyncio.wait(self._keeping, timeout=CLOSE_TIMEOUT_S)
            await wire.cancel(*late)

    # --- who is let in -------------------------------------------------------------------

    def _answer_http(self, connection: ServerConnection, request: Request) -> Response | None:
        path = urlsplit(request.path).path
        if path == HEALTH_PATH:
            return connection.respond(HttpStatus.OK, "ok\n")
        if path == READY_PATH:
            if self._log.is_full:
                return connection.respond(HttpStatus.UNAVAILABLE, "log: its disk is full\n")
            if self._engine.is_ready:
                return connection.respond(HttpStatus.OK, "ready\n")
            return connection.respond(HttpStatus.UNAVAILABLE, f"engine: {self._engine.state.value}\n")
        if path != SUBSCRIBE_PATH and not path.startswith(STREAM_PATH):
            return connection.respond(HttpStatus.NOT_FOUND, "no such path\n")
        return None

    def _admit(self, connection: ServerConnection, request: Request, response: Response) -> Response | None:
        """Take a place, name and slot for a handshake that succeeded, or say what there is none of."""
        if response.status_code != 101:
            return None
        assert isinstance(connection, _Connection), connection
        n_max = self._config.server.max_connections
        if len(self._connections) >= n_max:
            return connection.respond(HttpStatus.TOO_MANY, f"all {n_max} connections are taken\n")
        url = urlsplit(request.path)
        if url.path != SUBSCRIBE_PATH:
            refusal = self._admit_stream(connection, url.path.removeprefix(STREAM_PATH), url.query)
            if refusal is not None:
                return refusal
        self._connections.add(connection)
        connection.on_lost = self._on_lost
        return None

    def _admit_stream(self, connection: _Connection, name: str, query: str) -> Response | None:
        try:
            _check_name(name)
            resumption, query = parse_resumption(query)
            audio_format = parse_query(query)
            language = self._language(audio_format)
            if resumption is not None:
                return self._admit_again(connection, _Admission(name, audio_format, language, resumption))
        except BadQuery as exc:
            return connection.respond(HttpStatus.BAD_REQUEST, f"{exc}\n")
        ready = self._engine.ready
        if ready is None or not self._engine.is_ready:
            return connection.respond(HttpStatus.UNAVAILABLE, f"engine: {self._engine.state.value}\n")
        if self._log.is_full:
            return connection.respond(HttpStatus.UNAVAILABLE, "log: its disk is full\n")
        if name in self._live:
            return connection.respond(HttpStatus.CONFLICT, f"stream {name} is live\n")
        if len(self._live) >= ready.n_slots:
            return connection.respond(HttpStatus.UNAVAILABLE, f"all {ready.n_slots} slots are taken\n")
        self._live.add(name)
        connection.admission = _Admission(name, audio_format, language)
        # A pong would wait behind the audio while the ring is full; `idle_timeout_s` finds the dead.
        connection.ping_timeout = None
        return None

    def _admit_again(self, connection: _Connection, admission: _Admission) -> Response | None:
        """A producer that comes back to its stream; it needs neither a slot nor the engine.

        Raises:
            BadQuery: it declares another format than before.
        """
        name = admission.name
        assert admission.resumption is not None
        if not admission.resumption.is_for(self._log.resume_digest(name)):
            if name in self._live:
                return connection.respond(HttpStatus.CONFLICT, f"stream {name} is live, with another token\n")
            return connection.respond(HttpStatus.GONE, f"stream {name} is over and cannot be resumed\n")
        live = self._streams.get(name)
        if live is not None and not live.session.audio_format.is_as(admission.audio_format):
            raise BadQuery(f"{admission.audio_format}; expected {live.session.audio_format}, as before")
        connection.admission = admission
        connection.ping_timeout = None
        return None

    def _language(self, audio_format: AudioFormat) -> str | None:
        """The language a stream is set to; None to detect it."""
        asked = audio_format.language
        language = self._config.model.language if asked is None else asked
        if language == "auto":
            return None
        known = () if self._engine.ready is None else self._engine.ready.languages
        if asked is not None and self._engine.ready is not None and asked not in known:
            raise BadQuery(f"language is {asked!r}; expected one of {', '.join(('auto', *known))}")
        return language

    def _on_lost(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        admission = connection.admission
        if admission is not None and admission.resumption is None:  # its handler never ran
            self._release(admission.name)

    def _release(self, name: str) -> None:
        self._live.remove(name)
        self._check_finalised()

    def _check_finalised(self) -> None:
        if self._stopping.is_set() and not self._live:
            self._finalised.set()

    # --- conversations -------------------------------------------------------------------

    async def _handle(self, connection: ServerConnection) -> None:
        """One connection, to its end; a fault of ours ends it and nothing else."""
        assert isinstance(connection, _Connection), connection
        admission, connection.admission = connection.admission, None
        try:
            if admission is None:
                subscriber = Subscriber(
                    connection, self._hub, self._log, self._config.server, self._finalised
                )
                await subscriber.run()
            elif admission.resumption is None:
                await self._produce(connection, admission)
            else:
                await self._resume(connection, admission.name, admission.resumption)
        except ConnectionClosed:
            logger.debug("a connection was lost while it was being closed")
        except StreamFault:
            await connection.close(CloseCode.INTERNAL, "a fault of the server's")
        except Exception:
            logger.exception("connection failed: %s", admission or "subscriber")
            await connection.close(CloseCode.INTERNAL, "a fault of the server's")

    async def _produce(self, connection: _Connection, admission: _Admission) -> None:
        """The first connection of a new stream."""
        name, token = admission.name, new_token()
        seat = Seat(self._log, name)
        session = self._session(admission, seat, Timeline(self._config.transcript))
        with self._hub.subscription() as reader:
            self._hub.subscribe(reader, Subscribe((name,)))
            self._log.open(name, session, digest_of(token))
            try:
                session.open(self._clock_ms())
                live = self._keep(session, seat)
            except BaseException:
                session.abandon("internal")
                raise
            await self._producer(connection, live, reader, token).run()

    async def _resume(self, connection: _Connection, name: str, resumption: Resumption) -> None:
        """A further connection of a stream; it hears what it missed first."""
        live = self._streams.get(name)
        if live is not None:
            await wire.race(live.seat.vacated(), wire.until(live.is_over))
        with self._hub.subscription() as reader:
            self._hub.subscribe(reader, Subscribe((name,), after=resumption.after))
            if live is None or live.is_over.is_set():
                await self._recite(connection, reader, name, resumption.after)
            else:
                logger.info("stream %s: its producer is back", name)
                await self._producer(connection, live, reader, None).run()

    async def _recite(
        self, connection: _Connection, reader: Subscription, name: str, after: int | None
    ) -> None:
        """Tell a producer that comes back how its stream ended."""
        if after is not None and after < self._log.last_seq(name):
            async for envelope in reader:
                await connection.send(encode(envelope))
                if isinstance(envelope.message, SessionClosed) and envelope.seq == self._log.last_seq(name):
                    break
        await connection.close(CloseCode.NORMAL)

    def _producer(
        self, connection: _Connection, live: LiveStream, reader: Subscription, token: str | None
    ) -> Producer:
        languages = () if self._engine.ready is None else self._engine.ready.languages
        tasks = () if self._engine.ready is None else self._engine.ready.tasks
        limits = ProducerLimits(self._config.server, self._config.ingest.ack_interval_s, languages, tasks)
        return Producer(connection, live, reader, self._log, limits, self._stopping, token=token)

    def _session(self, admission: _Admission, seat: Seat, timeline: Timeline) -> Session:
        name = admission.name
        return Session(
            name,
            next(self._numbers),
            admission.audio_format,
            admission.language,
            ingest=self._config.ingest,
            vad=self._config.vad,
            timeline=timeline,
            engine=self._engine,
            outlets=Outlets(
                publish=lambda message: self._publish(name, message),
                tell=seat.tell,
                room=lambda: self._log.room(name),
                is_saved=True,
            ),
        )

    def _keep(self, session: Session, seat: Seat) -> LiveStream:
        """Let a stream live in a task of its own."""
        config = self._config.server
        live = LiveStream(
            session,
            seat,
            self._log,
            grace_s=config.resume_grace_s,
            stop_timeout_s=config.stop_timeout_s,
        )
        self._streams[live.name] = live
        task = asyncio.create_task(self._live_through(live), name=f"stream {live.name}")
        self._keeping.add(task)
        task.add_done_callback(self._keeping.discard)
        return live

    async def _live_through(self, live: LiveStream) -> None:
        """One stream, to its end; a fault of ours ends it and nothing else."""
        try:
            await live.run()
        except Exception:
            logger.exception("stream %s failed", live.name)
        finally:
            if self._streams.get(live.name) is live:
                del self._streams[live.name]

    # --- what a killed server left -------------------------------------------------------

    async def _restore(self) -> None:
        """Go on with the streams of a server that was killed, as far as there are slots for them."""
        for left in await self._log.left():
            self._live.add(left.name)
            try:
                self._restore_one(left)
            except LogError as exc:
                logger.warning("stream %s: cannot go on: %s", left.name, exc)
                await self._close_left(left.name)

    def _restore_one(self, left: Left) -> None:
        """Raises `LogError` where there is no slot, no state, or not the audio that its state needs."""
        n_slots = self._config.engine.n_slots
        if left.state is None or len(self._streams) >= n_slots:
            raise LogError("it had no state" if left.state is None else f"there are {n_slots} slots")
        state = decode_state(left.state)
        start = left.audio[0][0] if left.audio else state.ring_end
        audio = np.frombuffer(b"".join(pcm for _, pcm in left.audio), "<f4")
        if start + len(audio) != state.ring_end or start > min(state.ring_start, Vad.needed_from(state.vad)):
            raise LogError(
                f"audio from {start} to {start + len(audio)} was kept; up to {state.ring_end} was heard"
            )
        audio_format = AudioFormat(state.encoding, state.rate_hz, state.channels, state.asked_language)
        seat = Seat(self._log, left.name)
        timeline = Timeline(self._config.transcript, state=state.timeline)
        session = self._session(_Admission(left.name, audio_format, state.language), seat, timeline)
        self._log.reopen(left.name, session)
        session.restore(state, start, audio)
        self._keep(session, seat)

    async def _close_left(self, name: str) -> None:
        """Close a stream that cannot go on, with what was committed."""
        row = self._log.row(name)
        assert row is not None
        frames = await self._log.of_session(row, (TranscriptDelta.type, TranscriptFinal.type), MAX_COUNTED)
        said = [decode(frame).message for frame in frames]
        deltas = [message for message in said if isinstance(message, TranscriptDelta)]
        n_words = sum(len(delta.words) for delta in deltas)
        end_ms = max((delta.end_ms for delta in deltas), default=0)
        self._log.reopen(name, None)
        self._publish(name, SessionClosed("server_lost", end_ms, n_words, len(said) - len(deltas)))

    # --- the log -------------------------------------------------------------------------

    def _publish(self, name: str, message: Message) -> None:
        """Log a message; it goes out when it is on the disk."""
        self._log.append(name, message)
        if isinstance(message, SessionClosed):
            self._log.close(name)

    def _deliver(self, envelope: Envelope) -> None:
        """A message is safe: let its readers have it. With the last one, name and slot are free."""
        if isinstance(envelope.message, SessionClosed):
            self._release(envelope.stream)
        self._hub.publish(envelope)


def _check_name(name: str) -> None:
    if not STREAM_NAME.fullmatch(name):
        raise BadQuery(f"{name[:80]!r} is no stream name; expected {STREAM_NAME.pattern}")


def _unix_ms() -> int:
    return time.time_ns() // 1_000_000
