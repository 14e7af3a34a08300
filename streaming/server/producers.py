"""The producers of a server: which streams they may begin or resume, and their conversations.

Knows names and slots, not what a dialect says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from websockets.asyncio.server import ServerConnection

from streaming import aio
from streaming.config import IngestConfig, LimitsConfig, ModelConfig, ServerConfig, VadConfig
from streaming.engine.client import EngineClient
from streaming.errors import BadQuery, Replaced
from streaming.log.hub import Hub, Subscription
from streaming.log.log import Log
from streaming.protocol import CloseCode, Subscribe
from streaming.refusals import Refusal
from streaming.server.admission import Guard, Refused
from streaming.server.connection import Admitted, GuardedConnection
from streaming.server.conversation import Attachment, Conversation, Dialect, ResumableDialect
from streaming.server.limits import ProducerLimits
from streaming.server.routes import Handshake, SocketRoute, StreamRoute
from streaming.stream.lifetime import Resumption
from streaming.stream.registry import Streams

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProducerSettings:
    """What every producer's connection goes by."""

    server: ServerConfig
    limits: LimitsConfig
    ingest: IngestConfig
    vad: VadConfig
    model: ModelConfig
    spool_folder: Path  # on the disk of the log


class Producers:
    """Admits and serves them. Belongs to the event loop."""

    def __init__(
        self,
        settings: ProducerSettings,
        engine: EngineClient,
        log: Log,
        hub: Hub,
        streams: Streams,
        guard: Guard,
    ) -> None:
        self.finalised = asyncio.Event()  # the server is stopping, and no stream is live any more
        self._settings = settings
        self._engine = engine
        self._log = log
        self._hub = hub
        self._streams = streams
        self._guard = guard
        self._live: set[str] = set()  # names of streams, from their admission to `session.closed`
        self._stopping = asyncio.Event()

    @property
    def n_live(self) -> int:
        """Streams, from their admission to `session.closed`."""
        return len(self._live)

    def routes(self, declared: Iterable[StreamRoute]) -> tuple[SocketRoute, ...]:
        """The paths where streams are begun and resumed."""
        return tuple(
            SocketRoute(route.path, route.scope, route.streams, admit=partial(self._admit, route))
            for route in declared
        )

    def restore(self) -> None:
        """Resume the streams of a dead server, whose names are taken."""
        self._live.update(self._streams.restore())

    def release(self, name: str) -> None:
        """A stream is over: its name and its slot are free."""
        self._live.discard(name)  # a stop may have let go of a dead server's stream already
        self._guard.stream_over(name)
        self._check_finalised()

    def stop(self) -> None:
        """The server stops: finalise every stream."""
        self._stopping.set()
        self._streams.stop()
        self._check_finalised()

    def _check_finalised(self) -> None:
        if self._stopping.is_set() and not self._live:
            self.finalised.set()

    # --- who is let in -------------------------------------------------------------------

    def _admit(self, route: StreamRoute, connection: GuardedConnection, handshake: Handshake) -> Admitted:
        """Take what a producer needs, or say what there is none of.

        Raises:
            BadQuery: its URL asks for what cannot be.
            Refused: there is no engine, name, slot or room, or it may not resume the stream.
        """
        dialect = route.admit(handshake, self._settings.vad)
        language = self._language(dialect.language)
        if isinstance(dialect, ResumableDialect) and dialect.resumption is not None:
            admitted = self._admit_resumed(connection, dialect, dialect.resumption)
        else:
            admitted = self._admit_new(connection, dialect, language)
        # A pong would wait behind the audio while the spool is full; `idle_timeout_s` finds the dead.
        connection.ping_timeout = None
        return admitted

    def _admit_new(self, connection: GuardedConnection, dialect: Dialect, language: str | None) -> Admitted:
        """A new stream takes its name and a slot."""
        name, ready = dialect.name, self._engine.ready
        if ready is None or not self._engine.is_ready:
            raise Refused(Refusal.ENGINE_NOT_READY, self._engine.state.value)
        if self._log.blocked:
            raise Refused(Refusal.LOG_FULL, self._log.blocked)
        if name in self._live:
            raise Refused(Refusal.NAME_TAKEN)
        if self.n_live >= ready.n_slots:
            raise Refused(Refusal.NO_SLOT)
        self._guard.take_stream(connection, name)
        self._live.add(name)
        serve = partial(self._begin, connection, dialect, language)
        return Admitted(f"stream {name}", serve, partial(self.release, name), dialect.headers)

    def _admit_resumed(
        self, connection: GuardedConnection, dialect: ResumableDialect, resumption: Resumption
    ) -> Admitted:
        """A producer comes back; its stream has a name and a slot."""
        name, live = dialect.name, self._streams.find(dialect.name)
        if not resumption.is_for(self._log.directory.resume_digest(name)):
            raise Refused(Refusal.NOT_ITS_TOKEN if name in self._live else Refusal.IS_OVER)
        if live is None and name in self._live:  # a dead server's, and the engine is not there yet
            raise Refused(Refusal.ENGINE_NOT_READY, self._engine.state.value)
        if live is not None:
            dialect.check(live)
        self._guard.take_resumed(connection, name if name in self._live else None)
        serve = partial(self._resume, connection, dialect, resumption)
        return Admitted(f"stream {name}", serve, headers=dialect.headers)

    def _language(self, asked: str | None) -> str | None:
        """The language a stream is set to; None to detect it."""
        language = self._settings.model.language if asked is None else asked
        if language == "auto":
            return None
        known = () if self._engine.ready is None else self._engine.ready.languages
        if asked is not None and self._engine.ready is not None and asked not in known:
            raise BadQuery(f"language is {asked!r}; expected one of {', '.join(('auto', *known))}")
        return language

    # --- conversations -------------------------------------------------------------------

    async def _begin(self, connection: ServerConnection, dialect: Dialect, language: str | None) -> None:
        """The first connection of a new stream."""
        with self._hub.subscription() as reader:
            self._hub.subscribe(reader, Subscribe((dialect.name,)))
            live = dialect.begin(self._streams, language, self._settings.vad)
            await self._converse(connection, dialect, Attachment(live, live.slot.claim(), reader))

    async def _resume(
        self, connection: ServerConnection, dialect: ResumableDialect, resumption: Resumption
    ) -> None:
        """A further connection of a stream; what it missed is sent first."""
        name, live, claim = dialect.name, self._streams.find(dialect.name), 0
        try:
            if live is not None:
                claim = live.slot.claim()
                await aio.race(live.slot.wait_free(claim), live.wait_over())
            with self._hub.subscription() as reader:
                # Its own session alone: what was said before under this name may be others'.
                wanted = Subscribe((name,), after=resumption.after)
                self._hub.subscribe(reader, wanted, self._log.directory.span(name))
                if live is None or live.is_over:
                    await self._recite(connection, dialect, reader, resumption.after)
                    return
                logger.info("stream %s: its producer is back", name)
                dialect.resume(live)
                await self._converse(connection, dialect, Attachment(live, claim, reader))
        except Replaced as over:
            logger.info("stream %s: a connection that waited for it is replaced", name)
            await connection.close(over.close_code, str(over))

    async def _converse(self, connection: ServerConnection, dialect: Dialect, attachment: Attachment) -> None:
        envelope = self._log.directory.envelope
        limits, stopping = self._limits(), self._stopping
        await Conversation(
            connection, dialect, attachment, limits, envelope=envelope, stopping=stopping
        ).run()

    async def _recite(
        self, connection: ServerConnection, dialect: Dialect, reader: Subscription, after: int | None
    ) -> None:
        """Send a producer that comes back how its stream ended."""
        last = self._log.directory.last_seq(dialect.name)
        if after is not None and after < last:
            async for row in reader:
                for frame in dialect.frames(row):
                    await connection.send(frame, text=True)
                if row.seq == last:
                    break
        await connection.close(CloseCode.NORMAL)

    def _limits(self) -> ProducerLimits:
        ready, settings = self._engine.ready, self._settings
        assert ready is not None, "streams are begun and restored when it is"
        return ProducerLimits(
            settings.server,
            settings.limits,
            settings.ingest.ack_interval_s,
            ready.languages,
            None if settings.model.language == "auto" else settings.model.language,
            ready.tasks,
            settings.spool_folder,
            settings.ingest.spool_mib * 1024 * 1024,
        )
