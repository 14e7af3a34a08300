"""The server's sockets: who is let in, where, and how everything ends.

HTTP answers and admission are here; what a connection says is in `producer` and `subscriber`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

from websockets.asyncio.server import Server as SocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.protocol import State

from streaming import aio, protocol
from streaming.adaptors import deepgram, openai
from streaming.adaptors.base import Adaptor, Conversation
from streaming.audio.ingest import AudioFormat, parse_query
from streaming.config import Config, VadConfig
from streaming.engine.client import EngineClient
from streaming.errors import BadQuery, LogError, Replaced, StreamFault
from streaming.log.history import History, UnknownStream, is_history
from streaming.log.hub import Hub, Subscription
from streaming.log.log import Log
from streaming.logging_setup import socket_logger, where_raised
from streaming.metrics import CONTENT_TYPE, Observed
from streaming.protocol import (
    MAX_TEXT_CHARS,
    STREAM_NAME,
    STREAM_PATH,
    SUBSCRIBE_PATH,
    CloseCode,
    Envelope,
    HttpStatus,
    Refusal,
    Subscribe,
)
from streaming.server.admission import Guard, GuardedConnection, split_target, tls_context
from streaming.server.auth import Scope, without_token
from streaming.server.producer import Producer, ProducerLimits
from streaming.server.subscriber import Subscriber
from streaming.stream.lifetime import Resumption, parse_resumption
from streaming.stream.registry import Streams

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0  # for the peer's part of the closing handshake
MAX_FRAMES_WAITING = 8  # of one connection, before its socket is not read any more

# Protocols of other people's: a path, and what makes an adaptor of its handshake or refuses it.
ADAPTORS: Mapping[str, Callable[[Request, VadConfig], Adaptor]] = {
    protocol.DEEPGRAM_PATH: deepgram.admit,
    protocol.OPENAI_PATH: openai.admit,
}


@dataclass(frozen=True, slots=True)
class _Admission:
    """A producer that was let in."""

    name: str
    audio_format: AudioFormat  # of the native protocol; an adaptor decodes what it gets
    language: str | None
    adaptor: Adaptor | None = None  # None: the native protocol
    resumption: Resumption | None = None  # None: a new stream, whose name and slot are taken


class _Connection(GuardedConnection):
    """A connection that gives back what it was admitted with, however it is lost."""

    admission: _Admission | None = None  # until the handler takes it over
    is_subscriber: bool = False
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
        """Read what the configuration names.

        Raises:
            ConfigError: the tokens file, an origin, the certificate or its key cannot be used.
        """
        self._config = config
        self._engine = engine
        self._clock_ms = clock_ms or _unix_ms
        self._log = Log(
            config.log,
            self._clock_ms,
            on_closed=self._release,
            on_unsaved=lambda name: self._streams.fail(name),
        )
        self._hub = Hub(self._log, config.server.subscriber_queue)
        self._metrics = engine.metrics
        self._guard = Guard(config, self._metrics, now_s=time.monotonic)
        self._tls = tls_context(config.server.tls_cert, config.server.tls_key)
        self._connections: set[_Connection] = set()  # WebSockets, from their admission to their loss
        self._live: set[str] = set()  # names of streams, from their admission to `session.closed`
        self._history = History(self._log)
        self._streams = Streams(config, engine, self._log, clock_ms=self._clock_ms, release=self._release)
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
            self._live.update(self._streams.restore())
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
        timeout_s = self._config.limits.handshake_timeout_s
        sockets = await serve(
            self._handle,
            config.host,
            config.port,
            process_request=self._answer,
            process_response=self._admit,
            create_connection=cast("type[ServerConnection]", partial(_Connection, guard=self._guard)),
            compression=None,  # audio does not compress, and captions are small
            max_size=config.max_message_bytes,
            max_queue=MAX_FRAMES_WAITING,
            ping_interval=config.ping_interval_s,
            ping_timeout=config.ping_interval_s,
            close_timeout=CLOSE_TIMEOUT_S,
            server_header=None,
            open_timeout=timeout_s,
            logger=socket_logger(),
            ssl=self._tls,
            ssl_handshake_timeout=None if self._tls is None else timeout_s,
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
        self._streams.stop()
        self._check_finalised()
        sockets.close(close_connections=False)
        self._guard.drop_half_open()
        try:
            # Finalising stops after stop_timeout_s; what follows has its own limits.
            async with asyncio.timeout(self._config.server.stop_timeout_s + 2 * CLOSE_TIMEOUT_S):
                await sockets.wait_closed()
        except TimeoutError:
            logger.warning("stopping: %d connections did not close in time", len(self._connections))
            for connection in list(self._connections):
                connection.transport.abort()
            await sockets.wait_closed()
        await self._streams.ended()

    # --- who is let in -------------------------------------------------------------------

    async def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        assert isinstance(connection, _Connection), connection
        refusal = self._guard.check(connection, request)
        if refusal is not None:
            return refusal
        path, query = split_target(request)
        if is_history(path):
            return await self._answer_history(connection, path, without_token(query))
        match path:
            case protocol.HEALTH_PATH:
                return connection.respond(HttpStatus.OK, "ok\n")
            case protocol.READY_PATH if self._log.is_full:
                return connection.respond(HttpStatus.UNAVAILABLE, "log: its disk is full\n")
            case protocol.READY_PATH if self._engine.is_ready:
                return connection.respond(HttpStatus.OK, "ready\n")
            case protocol.READY_PATH:
                return connection.respond(HttpStatus.UNAVAILABLE, f"engine: {self._engine.state.value}\n")
            case protocol.METRICS_PATH:
                return _page(connection, CONTENT_TYPE, self._metrics.render(self._observed()))
        return None

    async def _answer_history(self, connection: _Connection, path: str, query: str) -> Response:
        try:
            found = await self._history.answer(path, query)
        except BadQuery as exc:
            return self._guard.refuse(connection, Refusal.BAD_QUERY, str(exc))
        except UnknownStream as exc:
            return self._guard.refuse(connection, Refusal.UNKNOWN_STREAM, str(exc))
        except LogError as exc:
            logger.error("history: %s", exc)  # noqa: TRY400  the text says it all
            return connection.respond(HttpStatus.UNAVAILABLE, "log: cannot be read\n")
        return _page(connection, found.content_type, found.body)

    def _observed(self) -> Observed:
        """The state that the metrics show."""
        return Observed(
            n_streams=len(self._live),
            n_slots=0 if self._engine.ready is None else self._engine.ready.n_slots,
            n_connections=len(self._connections),
            n_half_open=self._guard.n_half_open,
            is_engine_ready=self._engine.is_ready,
            n_log_messages=self._log.n_messages,
            n_subscribers=sum(connection.is_subscriber for connection in self._connections),
            queue_depths=self._hub.depths(),
        )

    def _admit(self, connection: ServerConnection, request: Request, response: Response) -> Response | None:
        """Take a place, name and slot for a handshake that succeeded, or say what there is none of."""
        assert isinstance(connection, _Connection), connection
        if response.status_code != 101:
            if response.status_code == HttpStatus.UPGRADE_REQUIRED:
                return self._guard.refuse(connection, Refusal.NO_UPGRADE)
            return None
        if connection.state is not State.CONNECTING:  # lost meanwhile: nobody would give anything back
            return connection.respond(HttpStatus.BAD_REQUEST, "the connection is lost\n")  # to nobody
        path, query = split_target(request)
        is_stream = path != SUBSCRIBE_PATH
        admission: _Admission | None = None
        if is_stream:
            try:
                admission = self._admission(path, query, request)
            except BadQuery as exc:
                return self._guard.refuse(connection, Refusal.BAD_QUERY, str(exc))
            refusal = self._check_stream(connection, admission)
            if refusal is not None:
                return refusal
        if not is_stream:  # it sends no audio, and what half a message holds is memory
            connection.protocol.max_message_size = min(MAX_TEXT_CHARS, self._config.server.max_message_bytes)
        is_again = admission is not None and admission.resumption is not None
        refusal = self._guard.take_place(
            connection,
            Scope.PUBLISH if is_stream else Scope.SUBSCRIBE,
            # Whoever only asks how a stream ended has none that would ever be released.
            None if admission is None or (is_again and admission.name not in self._live) else admission.name,
            is_again=is_again,
        )
        if refusal is not None:
            return refusal
        connection.is_subscriber = not is_stream
        if admission is not None:
            if not is_again:
                self._live.add(admission.name)
            connection.admission = admission
            # A pong would wait behind the audio while the ring is full; `idle_timeout_s` finds the dead.
            connection.ping_timeout = None
            if admission.adaptor is not None:
                response.headers.update(admission.adaptor.headers)
        self._connections.add(connection)
        connection.on_lost = self._on_lost
        return None

    def _admission(self, path: str, query: str, request: Request) -> _Admission:
        """What a handshake asks for.

        Raises:
            BadQuery: its URL asks for what cannot be.
        """
        query = without_token(query)
        if path in ADAPTORS:
            adaptor = ADAPTORS[path](Request(f"{path}?{query}", request.headers), self._config.vad)
            return _Admission(adaptor.stream, AudioFormat(), self._language(adaptor.language), adaptor)
        name = path.removeprefix(STREAM_PATH)
        _check_name(name)
        resumption, query = parse_resumption(query)
        audio_format = parse_query(query)
        return _Admission(name, audio_format, self._language(audio_format.language), resumption=resumption)

    def _check_stream(self, connection: _Connection, admission: _Admission) -> Response | None:
        """Refuse a stream for which there is no engine, name or slot, or that cannot be resumed."""
        name, refuse = admission.name, self._guard.refuse
        if admission.resumption is not None:
            return self._check_again(connection, admission, admission.resumption)
        ready = self._engine.ready
        if ready is None or not self._engine.is_ready:
            return refuse(connection, Refusal.ENGINE_NOT_READY, self._engine.state.value)
        if self._log.is_full:
            return refuse(connection, Refusal.LOG_FULL)
        if name in self._live:
            return refuse(connection, Refusal.NAME_TAKEN)
        if len(self._live) >= ready.n_slots:
            return refuse(connection, Refusal.NO_SLOT)
        return None

    def _check_again(
        self, connection: _Connection, admission: _Admission, resumption: Resumption
    ) -> Response | None:
        """Refuse a producer that may not go on with a stream; it needs no slot."""
        name, refuse = admission.name, self._guard.refuse
        live = self._streams.find(name)
        if not resumption.is_for(self._log.directory.resume_digest(name)):
            return refuse(connection, Refusal.NOT_ITS_TOKEN if name in self._live else Refusal.IS_OVER)
        if live is None and name in self._live:  # a dead server's, and the engine is not there yet
            return refuse(connection, Refusal.ENGINE_NOT_READY, self._engine.state.value)
        if live is not None and not live.audio.format.is_as(admission.audio_format):
            declared = f"{admission.audio_format}; expected {live.audio.format}, as before"
            return refuse(connection, Refusal.BAD_QUERY, declared)
        return None

    def _language(self, asked: str | None) -> str | None:
        """The language a stream is set to; None to detect it."""
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
        self._live.discard(name)  # a stop may have let go of a dead server's stream already
        self._guard.stream_over(name)
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
                    connection, self._hub, self._log, self._config.server, self._finalised, connection.granted
                )
                await subscriber.run()
            elif admission.resumption is None:
                await self._produce(connection, admission)
            else:
                await self._resume(connection, admission.name, admission.resumption)
        except ConnectionClosed:
            logger.debug("a connection was lost while it was being closed")
        except Replaced as over:
            logger.info("a connection that waited for its stream: %s", over)
            await connection.close(over.close_code, str(over))
        except StreamFault:
            await connection.close(CloseCode.INTERNAL, "a fault of the server's")
        except Exception as exc:
            # Without the text of the fault, which may hold what a client sent.
            who = "a subscriber" if admission is None else f"stream {admission.name}"
            logger.error("%s: connection failed: %s", who, where_raised(exc))  # noqa: TRY400
            logger.debug("the fault's text", exc_info=True)
            await connection.close(CloseCode.INTERNAL, "a fault of the server's")

    async def _produce(self, connection: _Connection, admission: _Admission) -> None:
        """The first connection of a new stream."""
        name = admission.name
        with self._hub.subscription() as reader:
            self._hub.subscribe(reader, Subscribe((name,)))
            if admission.adaptor is not None:
                await self._adapt(connection, admission, admission.adaptor, reader)
                return
            live, token = self._streams.begin(name, admission.audio_format, admission.language)
            limits, stopping = self._limits(), self._stopping
            claim = live.slot.claim()
            await Producer(
                connection, live, reader, self._log, limits, stopping, claim=claim, token=token
            ).run()

    async def _adapt(
        self, connection: _Connection, admission: _Admission, adaptor: Adaptor, reader: Subscription
    ) -> None:
        """A stream of another protocol: its whole life is one connection."""
        name = admission.name
        session = self._streams.begin_unsaved(
            name,
            admission.language,
            vad=adaptor.endpointing(self._config.vad),
            tell=lambda message: reader.put(Envelope(name, self._log.directory.last_seq(name), message)),
        )
        try:
            session.open(self._clock_ms())
            limits = self._limits()
            await Conversation(connection, session, reader, self._log, limits, self._stopping, adaptor).run()
        finally:
            session.abandon("internal")  # changes nothing unless something above failed

    async def _resume(self, connection: _Connection, name: str, resumption: Resumption) -> None:
        """A further connection of a stream; it hears what it missed first."""
        live, claim = self._streams.find(name), 0
        if live is not None:
            claim = live.slot.claim()
            await aio.race(live.slot.wait_free(claim), live.wait_over())
        with self._hub.subscription() as reader:
            self._hub.subscribe(reader, Subscribe((name,), after=resumption.after))
            if live is None or live.is_over:
                await self._recite(connection, reader, name, resumption.after)
                return
            logger.info("stream %s: its producer is back", name)
            limits, stopping = self._limits(), self._stopping
            await Producer(
                connection, live, reader, self._log, limits, stopping, claim=claim, token=None
            ).run()

    async def _recite(
        self, connection: _Connection, reader: Subscription, name: str, after: int | None
    ) -> None:
        """Tell a producer that comes back how its stream ended."""
        last = self._log.directory.last_seq(name)
        if after is not None and after < last:
            async for row in reader:
                await connection.send(row.frame, text=True)
                if row.seq == last:
                    break
        await connection.close(CloseCode.NORMAL)

    def _limits(self) -> ProducerLimits:
        ready = self._engine.ready
        assert ready is not None, "streams are begun and restored when it is"
        return ProducerLimits(
            self._config.server,
            self._config.limits,
            self._config.ingest.ack_interval_s,
            ready.languages,
            None if self._config.model.language == "auto" else self._config.model.language,
            ready.tasks,
        )


def _check_name(name: str) -> None:
    if not STREAM_NAME.fullmatch(name):
        raise BadQuery(f"{name[:80]!r} is no stream name; expected {STREAM_NAME.pattern}")


def _page(connection: ServerConnection, content_type: str, body: bytes) -> Response:
    response = connection.respond(HttpStatus.OK, "")
    for name, value in (
        ("Content-Type", content_type),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
    ):
        if name in response.headers:
            del response.headers[name]
        response.headers[name] = value
    response.body = body
    return response


def _unix_ms() -> int:
    return time.time_ns() // 1_000_000
