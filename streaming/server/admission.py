"""Lets requests in or refuses them: the rules of `access` and `limits`, applied to connections.

Every refusal is one of `refusals.Refusal`, is answered as that says, and is counted.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from streaming.config import Config, ConfigError, is_loopback
from streaming.metrics import Metrics
from streaming.protocol import METRICS_PATH, CloseCode, HttpStatus
from streaming.refusals import Refusal
from streaming.server.auth import (
    EVERYTHING,
    Grant,
    Need,
    Scope,
    Tokens,
    is_host_allowed,
    is_origin_allowed,
    need_of,
    presented,
    site_of,
)
from streaming.server.limits import Attempts, Places, network_of

logger = logging.getLogger(__name__)

_CLOSES = {
    int(refusal.value.code): refusal for refusal in Refusal if isinstance(refusal.value.code, CloseCode)
}
_FORWARDED = ("X-Forwarded-For", "Forwarded")


@dataclass(frozen=True, slots=True)
class _Place:
    """What a connection counts as, from its admission to its loss."""

    address: str | None  # None: not counted
    role: tuple[str, Scope] | None  # a subscriber's token, by name, and what it does; None: not counted


class GuardedConnection(ServerConnection):
    """A connection that is known to the guard from its first byte to its loss."""

    def __init__(self, *args: Any, guard: Guard, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guard = guard
        self.grant: Grant | None = None  # what its token allows, once its request was let in
        self.address = ""  # the client's, behind a trusted proxy too

    @property
    def granted(self) -> Grant:
        """What its token allows; only for a connection that was let in."""
        assert self.grant is not None, "used before it was checked"
        return self.grant

    def connection_made(self, transport: Any) -> None:
        """A transport's callback: there is a connection, encrypted if it is to be."""
        super().connection_made(transport)
        self.guard.arrived(self)

    def data_received(self, data: bytes) -> None:
        """A transport's callback: bytes came."""
        self.guard.metrics.received(len(data))
        super().data_received(data)

    async def send(self, message: Any, *, text: bool | None = None) -> None:
        """Send a message, and count it."""
        if isinstance(message, str):
            message, text = message.encode(), True
        if isinstance(message, bytes):
            self.guard.metrics.sent(len(message))
        await super().send(message, text=text)

    def connection_lost(self, exc: Exception | None) -> None:
        """A transport's callback: the connection is gone."""
        super().connection_lost(exc)
        self.guard.lost(self)


class Guard:
    """Who is let in. Belongs to the event loop."""

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        *,
        now_s: Callable[[], float],
        today: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Read the tokens.

        Raises:
            ConfigError: the tokens file or an origin cannot be used.
        """
        self.metrics = metrics
        self._server = config.server
        self._limits = config.limits
        self._tokens = Tokens(Path(config.access.tokens)) if config.access.tokens else None
        self._is_loopback_only = self._tokens is None and not config.access.allow_anonymous
        self._now_s = now_s
        self._today = today
        self._attempts = Attempts(config.limits.attempts_per_s, config.limits.attempts_burst)
        self._of_address = Places()
        self._of_token = Places()
        self._half_open: dict[GuardedConnection, None] = {}  # oldest first
        self._places: dict[GuardedConnection, _Place] = {}
        self._of_stream: dict[str, tuple[str, Scope]] = {}  # whose place a live stream has, by its name
        for origin in config.server.origins:
            if origin != "*" and site_of(origin) is None:
                raise ConfigError(f'server.origins: {origin!r} is no origin; expected such as "https://host"')
        self._say_who_is_let_in()

    def _say_who_is_let_in(self) -> None:
        if self._tokens is not None:
            logger.info("tokens are asked for: %d in %s", self._tokens.n_tokens, self._tokens.path)
        elif self._is_loopback_only:
            logger.info("no access.tokens: everybody on this machine may send and read")
        else:
            logger.warning("access.allow_anonymous: everybody who reaches this server may send and read")

    @property
    def n_half_open(self) -> int:
        """Connections that have not sent a whole request."""
        return len(self._half_open)

    # --- before there is a request -------------------------------------------------------

    def arrived(self, connection: GuardedConnection) -> None:
        """A connection was accepted; past the limit, the one that has been silent longest goes."""
        if len(self._half_open) >= self._limits.max_half_open:
            oldest = next(iter(self._half_open))
            del self._half_open[oldest]
            self.metrics.refused(Refusal.HALF_OPEN)
            oldest.transport.abort()
        self._half_open[connection] = None

    def drop_half_open(self) -> None:
        """The server is stopping: it waits for nobody who has not asked for anything yet."""
        for connection in self._half_open:
            connection.transport.abort()

    def lost(self, connection: GuardedConnection) -> None:
        """A connection is gone, with whatever it held."""
        if connection in self._half_open:
            del self._half_open[connection]
            self.metrics.refused(Refusal.NO_HANDSHAKE)
        sent = connection.protocol.close_sent
        is_ours = not connection.protocol.close_rcvd_then_sent  # else it echoes the client's own code
        if is_ours and sent is not None and sent.code in _CLOSES:
            self.metrics.refused(_CLOSES[sent.code])
        place = self._places.pop(connection, None)
        if place is None:
            return
        if place.address is not None:
            self._of_address.give_back(place.address)
        if place.role is not None:
            self._of_token.give_back(place.role)

    # --- with a request ------------------------------------------------------------------

    def check(self, connection: GuardedConnection, request: Request) -> Response | None:
        """Refuse a request that may not be made at all, or give the connection its grant."""
        self._half_open.pop(connection, None)
        connection.address = self._address(connection, request)
        path, _ = split_target(request)
        need = need_of(path)
        if request.method != "GET":
            return self.refuse(connection, Refusal.BAD_METHOD)
        if need is not None and need.scope is None:
            return None  # for load balancers: it tells nothing, and they ask often
        is_local = is_loopback(connection.address)
        if not is_local and not self._attempts.take(network_of(connection.address), self._now_s()):
            return self.refuse(connection, Refusal.TOO_MANY_ATTEMPTS)
        hosts = request.headers.get_all("Host")
        if self._is_loopback_only and not is_host_allowed(hosts, self._server.origins):
            expected = "Host must be localhost, a loopback address or the host of one of server.origins"
            return self.refuse(connection, Refusal.BAD_ORIGIN, f"without tokens, {expected}")
        if not is_origin_allowed(
            request.headers.get_all("Origin"),
            next(iter(hosts), ""),
            self._server.origins,
            is_loopback_only=self._is_loopback_only,
        ):
            return self.refuse(connection, Refusal.BAD_ORIGIN)
        if need is None:
            return self.refuse(connection, Refusal.BAD_PATH)
        if path == METRICS_PATH and (self._tokens is None or is_local):
            # Numbers of the whole server: without a token for this machine alone; through a proxy on
            # it, or from a page whose name was made to point here, for nobody.
            is_forwarded = any(name in request.headers for name in _FORWARDED)
            if is_local and not is_forwarded and is_host_allowed(hosts, self._server.origins):
                return None
            if self._tokens is None:
                return self.refuse(connection, Refusal.BAD_SCOPE, "it is for this machine alone")
        return self._check_token(connection, request, need)

    def _check_token(self, connection: GuardedConnection, request: Request, need: Need) -> Response | None:
        if self._tokens is None:
            connection.grant = EVERYTHING
            return None
        _, query = split_target(request)
        token = presented(request.headers.get_all("Authorization"), query)
        if token is None:
            return self.refuse(connection, Refusal.NO_TOKEN)
        grant = self._tokens.grant(token, self._today())
        if grant is None:
            return self.refuse(connection, Refusal.UNKNOWN_TOKEN)
        assert need.scope is not None, need
        if not (grant.has(need.scope) if need.stream is None else grant.covers(need.scope, need.stream)):
            return self.refuse(connection, Refusal.BAD_SCOPE, f"{need.scope} is needed here")
        connection.grant = grant
        return None

    def take_place(
        self,
        connection: GuardedConnection,
        scope: Scope,
        stream: str | None = None,
        *,
        is_again: bool = False,
    ) -> Response | None:
        """Count a connection whose handshake succeeded, or refuse it where there is no room.

        The place is given back when the connection is lost; but a token's place for a stream is the
        stream's, however many connections it takes, until `stream_over`.

        Args:
            connection: Was let in.
            scope: What it is for.
            stream: The live stream that it publishes; None for a subscriber, and where the stream is over.
            is_again: Its producer comes back, and is not refused for its token's other streams. Where the
                stream has no place yet, because a dead server left it, it gets one beyond the limit too.
        """
        grant = connection.granted
        if len(self._places) >= self._server.max_connections:
            return self.refuse(connection, Refusal.TOO_MANY_CONNECTIONS)
        address = None if is_loopback(connection.address) else network_of(connection.address)
        if address is not None and not self._of_address.has_room(address, self._limits.address_connections):
            return self.refuse(connection, Refusal.TOO_MANY_OF_ADDRESS)
        is_counted = scope is not Scope.PUBLISH or (stream is not None and stream not in self._of_stream)
        role = (grant.name, scope) if self._tokens is not None and is_counted else None
        if role is not None:
            if scope is Scope.PUBLISH:
                limit, refusal = (
                    grant.max_streams or self._limits.token_streams,
                    Refusal.TOO_MANY_STREAMS_OF_TOKEN,
                )
            else:
                limit = grant.max_subscribers or self._limits.token_subscribers
                refusal = Refusal.TOO_MANY_READERS_OF_TOKEN
            if not is_again and not self._of_token.has_room(role, limit):
                return self.refuse(connection, refusal)
            self._of_token.take(role)
        if address is not None:
            self._of_address.take(address)
        if role is not None and stream is not None:
            self._of_stream[stream], role = role, None
        self._places[connection] = _Place(address, role)
        return None

    def stream_over(self, name: str) -> None:
        """A stream's name is free again, and with it the place of the token that began it."""
        role = self._of_stream.pop(name, None)
        if role is not None:
            self._of_token.give_back(role)

    def refuse(self, connection: ServerConnection, refusal: Refusal, detail: str = "") -> Response:
        """The answer of a refusal before a WebSocket is open; counts it."""
        self.metrics.refused(refusal)
        answer = refusal.value
        assert isinstance(answer.code, HttpStatus), refusal
        response = connection.respond(
            answer.code, f"{answer.text}: {detail}\n" if detail else f"{answer.text}\n"
        )
        match answer.code:
            case HttpStatus.UNAUTHORIZED:
                response.headers["WWW-Authenticate"] = "Bearer"
            case HttpStatus.METHOD_NOT_ALLOWED:
                response.headers["Allow"] = "GET"
            case HttpStatus.TOO_MANY | HttpStatus.UNAVAILABLE:
                response.headers["Retry-After"] = "1"
        return response

    def _address(self, connection: GuardedConnection, request: Request) -> str:
        """The client's address: of its socket, or what a trusted proxy says it is."""
        peer = connection.remote_address
        address = str(peer[0]) if peer else ""
        if address in self._server.trusted_proxies:
            forwarded = request.headers.get_all("X-Forwarded-For")
            if forwarded:  # the last one is the proxy's own finding, those before it the client's word
                return forwarded[-1].rpartition(",")[2].strip()[:64]
        return address


def split_target(request: Request) -> tuple[str, str]:
    """Path and query of a request; not by `urlsplit`, which finds hosts in paths and raises at some."""
    path, _, query = request.path.partition("?")
    return path, query


def tls_context(cert: str, key: str) -> ssl.SSLContext | None:
    """TLS with the certificate and key of two PEM files; None where none are named.

    Raises:
        ConfigError: they cannot be used.
    """
    if not cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"server.tls_cert, server.tls_key: {cert}, {key}: cannot be used: {exc}") from exc
    return context


def _no_password() -> str:
    """Instead of a prompt on the terminal, which a service does not have."""
    raise ValueError("the key is encrypted; expected one without a password")
