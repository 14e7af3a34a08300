"""The server's sockets: a request finds its route, is let in or refused, and is served to its end."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import cast

from websockets.asyncio.server import Server as SocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.protocol import State

from streaming import aio
from streaming.config import ConfigError, ServerConfig
from streaming.errors import BadQuery, StreamFault
from streaming.log.log import Log
from streaming.logging_setup import socket_logger, where_raised
from streaming.protocol import CloseCode, HttpStatus
from streaming.refusals import Refusal
from streaming.server.admission import Guard, Refused
from streaming.server.auth import offered_token, without_token
from streaming.server.connection import GuardedConnection
from streaming.server.cors import for_request, preflight
from streaming.server.http import split_target, text_response
from streaming.server.producers import Producers
from streaming.server.refusal_log import RefusalLog
from streaming.server.routes import PageRoute, Routes, SocketRoute
from streaming.server.tls import renew
from streaming.stream.registry import Streams

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0  # for the peer's part of the closing handshake
MAX_FRAMES_WAITING = 8  # of one connection, before its socket is not read any more


class Server:
    """All connections of one server process. Belongs to the event loop."""

    def __init__(
        self,
        config: ServerConfig,
        routes: Iterable[PageRoute | SocketRoute],
        *,
        guard: Guard,
        producers: Producers,
        streams: Streams,
        log: Log,
        tls: ssl.SSLContext | None,
        handshake_timeout_s: float,
    ) -> None:
        """Put the parts of a server together.

        Args:
            config: Where it listens.
            routes: Every path it has.
            guard: Lets requests in.
            producers: Of the streams.
            streams: Live, or left by a dead server.
            log: Of all streams.
            tls: None: not encrypted.
            handshake_timeout_s: How long a whole request may take.
        """
        self._config = config
        self.routes = Routes(routes)
        self._guard = guard
        self._producers = producers
        self._streams = streams
        self._log = log
        self._tls = tls
        self._refusals = RefusalLog(time.monotonic)
        self._handshake_timeout_s = handshake_timeout_s

    @property
    def n_connections(self) -> int:
        """WebSocket connections that are open."""
        return len(self._guard.connections)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Serve; gives the port. On exit every stream is finalised and every connection closed.

        Raises:
            LogError: the log's file cannot be used.
        """
        async with self._log.running():
            self._producers.restore()
            async with aio.background(self._guard.watch_tokens(), "tokens"), self._serving() as port:
                yield port

    def reload(self, config: ServerConfig) -> None:
        """Read tokens and certificate again, each for itself: one that cannot be used stays as it was.

        Args:
            config: Names the files of the certificate.

        Raises:
            ExceptionGroup: of the `ConfigError` of each that cannot be used.
        """
        problems: list[ConfigError] = []
        try:
            self._guard.reload()
        except ConfigError as exc:
            problems.append(exc)
        try:
            if self._tls is not None and config.tls_cert:
                renew(self._tls, config.tls_cert, config.tls_key)
                logger.info("certificate read again: %s", config.tls_cert)
        except ConfigError as exc:
            problems.append(exc)
        if problems:
            raise ExceptionGroup("reload", problems)

    async def fault(self) -> None:
        """Raise what makes serving impossible, when it happens.

        Raises:
            LogError: the log's file is broken.
        """
        await self._log.fault()

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[int]:
        config, timeout_s = self._config, self._handshake_timeout_s
        sockets = await serve(
            self._handle,
            config.host,
            config.port,
            process_request=self._answer,
            process_response=self._admit,
            create_connection=cast("type[ServerConnection]", partial(GuardedConnection, guard=self._guard)),
            compression=None,  # audio does not compress, and captions are small
            max_size=config.max_message_bytes,
            max_queue=MAX_FRAMES_WAITING,
            ping_interval=config.ping_interval_s,
            ping_timeout=config.ping_interval_s,
            close_timeout=CLOSE_TIMEOUT_S,
            server_header=None,
            open_timeout=None,  # `GuardedConnection` has it: a long answer takes longer
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
        logger.info("stopping: %d streams live", self._producers.n_live)
        self._producers.stop()
        sockets.close(close_connections=False)
        self._guard.drop_half_open()
        # Where the log cannot be written, streams wait for it in vain, and longer helps little.
        giving_up = asyncio.get_running_loop().call_later(self._config.stop_timeout_s / 2, self._log.give_up)
        try:
            # Finalising stops after stop_timeout_s; what follows has its own limits.
            async with asyncio.timeout(self._config.stop_timeout_s + 2 * CLOSE_TIMEOUT_S):
                await sockets.wait_closed()
        except TimeoutError:
            logger.warning("stopping: %d connections did not close in time", self.n_connections)
            for connection in self._guard.connections:
                connection.transport.abort()
            await sockets.wait_closed()
        await self._streams.ended()
        giving_up.cancel()

    # --- one request, from its path to its end ---------------------------------------------

    async def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer a GET, or refuse a request; None: a WebSocket may be opened."""
        assert isinstance(connection, GuardedConnection), connection
        response = preflight(request, self._config.origins)
        if response is not None:
            self._guard.asked(connection)
        else:
            response = await self._answer_page(connection, request)
        if response is None and request.method == "HEAD":
            response = self._refuse(Refused(Refusal.NO_UPGRADE), connection, request)
        return None if response is None else for_request(response, request, self._config.origins)

    async def _finished(self, page: Awaitable[Response], request: Request) -> Response:
        return for_request(await page, request, self._config.origins)

    async def _answer_page(self, connection: GuardedConnection, request: Request) -> Response | None:
        path, query = split_target(request)
        route = self.routes.find(path)
        try:
            self._guard.check(connection, request, None if route is None else route.need(path))
            if isinstance(route, PageRoute) and route.is_long:
                with self._guard.answers.counted(connection):
                    page = route.answer(route.handshake(path, without_token(query), request.headers))
                    return await connection.answer(self._finished(page, request))
            if isinstance(route, PageRoute):
                return await route.answer(route.handshake(path, without_token(query), request.headers))
        except (Refused, BadQuery) as exc:
            return self._refuse(exc, connection, request)
        return None

    def _admit(self, connection: ServerConnection, request: Request, response: Response) -> Response | None:
        """Take what a WebSocket needs whose handshake succeeded, or say what there is none of."""
        assert isinstance(connection, GuardedConnection), connection
        if response.status_code == HttpStatus.UPGRADE_REQUIRED:
            refusal = self._refuse(Refused(Refusal.NO_UPGRADE), connection, request)
            return for_request(refusal, request, self._config.origins)
        if response.status_code != 101:
            return None
        if connection.state is not State.CONNECTING:  # lost meanwhile: nobody would give anything back
            return text_response(HttpStatus.BAD_REQUEST, "the connection is lost")  # to nobody
        path, query = split_target(request)
        route = self.routes.find(path)
        assert isinstance(route, SocketRoute), path
        try:
            admitted = route.admit(connection, route.handshake(path, without_token(query), request.headers))
        except (Refused, BadQuery) as exc:
            return self._refuse(exc, connection, request)
        offered = offered_token(request.headers.get_all("Sec-WebSocket-Protocol"))
        if offered is not None:  # a browser fails unless one of its subprotocols is taken
            response.headers["Sec-WebSocket-Protocol"] = offered[0]
        response.headers.update(admitted.headers)
        connection.admitted = admitted
        return None

    def _refuse(self, exc: Refused | BadQuery, connection: GuardedConnection, request: Request) -> Response:
        refused = Refused(Refusal.BAD_QUERY, str(exc)) if isinstance(exc, BadQuery) else exc
        name = refused.token if connection.grant is None else connection.grant.name
        self._refusals.log(refused.refusal, split_target(request)[0], connection.address, name)
        return self._guard.refuse(refused)

    async def _handle(self, connection: ServerConnection) -> None:
        """One connection, to its end; an internal error ends it and nothing else."""
        assert isinstance(connection, GuardedConnection), connection
        admitted, connection.admitted = connection.admitted, None
        assert admitted is not None, "opened before it was let in"
        try:
            await admitted.serve()
        except ConnectionClosed:
            logger.debug("a connection was lost while it was being closed")
        except StreamFault:
            await connection.close(CloseCode.INTERNAL, "a fault of the server's")
        except Exception as exc:
            # Without the text of the error, which may hold what a client sent.
            logger.error("%s: connection failed: %s", admitted.who, where_raised(exc))  # noqa: TRY400
            logger.debug("the error's text", exc_info=True)
            await connection.close(CloseCode.INTERNAL, "a fault of the server's")
