"""Lets requests in or refuses them: the rules of `auth` and `limits`, applied to connections.

Every refusal is one of `refusals.Refusal`, raised as `Refused`, answered as it says, and counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from websockets.http11 import Request, Response
from websockets.protocol import State

from streaming.config import AccessConfig, ConfigError, LimitsConfig, ServerConfig, is_loopback
from streaming.metrics import Metrics
from streaming.protocol import CloseCode, HttpStatus
from streaming.refusals import Refusal
from streaming.server.auth import (
    EVERYTHING,
    NULL_ORIGIN,
    Grant,
    Need,
    Scope,
    Tokens,
    is_host_allowed,
    is_origin_allowed,
    presented,
    site_of,
)
from streaming.server.connection import GuardedConnection
from streaming.server.http import split_target, text_response
from streaming.server.limits import Attempts, Places, network_of
from streaming.tokens import digest_of

logger = logging.getLogger(__name__)

_CLOSES = {
    int(refusal.value.code): refusal for refusal in Refusal if isinstance(refusal.value.code, CloseCode)
}
REVOKED_AFTER_S = 5.0  # at most, a connection outlives its token, and its part of the closing handshake
MAX_ANSWERS, MAX_ANSWERS_OF_ONE = 16, 4  # answers of history at once; those of one token and address
_DAY_S = 24 * 3600
_FORWARDED = ("X-Forwarded-For", "Forwarded")


class Refused(Exception):
    """A request is not let in."""

    def __init__(self, refusal: Refusal, detail: str = "", token: str = "") -> None:
        super().__init__(refusal, detail)
        self.token = token  # the name of a known one, for the log
        self.refusal = refusal
        self.detail = detail  # for the client; nothing secret


@dataclass(frozen=True, slots=True)
class _Place:
    """What a connection counts as, from its admission to its loss."""

    address: str | None  # None: not counted
    role: tuple[str, Scope] | None  # a subscriber's token, by name, and what it does; None: not counted
    is_subscriber: bool


class Answers:
    """The answers of history that are being made or read: each takes memory until it was read."""

    def __init__(self) -> None:
        self._places = Places()

    @contextmanager
    def counted(self, connection: GuardedConnection) -> Iterator[None]:
        """Count an answer that takes memory until it is read, as long as the body runs.

        Raises:
            Refused: too many are under way.
        """
        asker = (connection.address, connection.digest)
        if not (
            self._places.has_room(None, MAX_ANSWERS) and self._places.has_room(asker, MAX_ANSWERS_OF_ONE)
        ):
            raise Refused(Refusal.TOO_MANY_ANSWERS)
        for holder in (None, asker):
            self._places.take(holder)
        try:
            yield
        finally:
            for holder in (None, asker):
                self._places.give_back(holder)


class Guard:
    """Who is let in. Belongs to the event loop."""

    def __init__(
        self,
        server: ServerConfig,
        access: AccessConfig,
        limits: LimitsConfig,
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
        self._server = server
        self._limits = limits
        self._tokens = Tokens(Path(access.tokens)) if access.tokens else None
        self._is_loopback_only = self._tokens is None and not access.allow_anonymous
        self._now_s = now_s
        self._today = today
        self._attempts = Attempts(limits.attempts_per_s, limits.attempts_burst)
        self._of_address = Places()
        self._of_token = Places()
        self._new_streams = Attempts(limits.token_new_streams / _DAY_S, limits.token_new_streams)
        self.answers = Answers()
        self._half_open: dict[GuardedConnection, None] = {}  # oldest first
        self._places: dict[GuardedConnection, _Place] = {}
        self._of_stream: dict[str, tuple[str, Scope]] = {}  # whose place a live stream has, by its name
        for origin in server.origins:
            if origin not in ("*", NULL_ORIGIN) and site_of(origin) is None:
                raise ConfigError(f'server.origins: {origin!r} is no origin; expected such as "https://host"')
        _say_who_is_let_in(self._tokens, is_loopback_only=self._is_loopback_only)

    def reload(self) -> None:
        """Read the tokens file again.

        Raises:
            ConfigError: it cannot be used; the tokens before stay in force.
        """
        if self._tokens is not None:
            self._tokens.reload()
            logger.info("tokens read again: %d", self._tokens.n_tokens)

    @property
    def handshake_timeout_s(self) -> float:
        """How long a whole request may take, and its answer where that is short."""
        return self._limits.handshake_timeout_s

    @property
    def n_half_open(self) -> int:
        """Connections that have not sent a whole request."""
        return len(self._half_open)

    @property
    def connections(self) -> tuple[GuardedConnection, ...]:
        """WebSockets, from their admission to their loss."""
        return tuple(self._places)

    @property
    def n_subscribers(self) -> int:
        """Those of them that read."""
        return sum(place.is_subscriber for place in self._places.values())

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
        if connection.admitted is not None:
            connection.admitted.give_back()
        if place is None:
            return
        if place.address is not None:
            self._of_address.give_back(place.address)
        if place.role is not None:
            self._of_token.give_back(place.role)

    # --- with a request ------------------------------------------------------------------

    def asked(self, connection: GuardedConnection) -> None:
        """A whole request came on a connection."""
        self._half_open.pop(connection, None)

    def check(self, connection: GuardedConnection, request: Request, need: Need | None) -> None:
        """Refuse a request that may not be made at all, or give the connection its grant.

        Args:
            connection: That it came on.
            request: Whole.
            need: Of its path; None: there is no such path.

        Raises:
            Refused: it may not be made.
        """
        self.asked(connection)
        connection.address = _address_of(connection, request, self._server.trusted_proxies)
        if request.method not in ("GET", "HEAD"):
            raise Refused(Refusal.BAD_METHOD)
        if need is not None and need.scope is None:
            return  # for load balancers: it tells nothing, and they ask often
        is_local = is_loopback(connection.address)
        if not is_local and not self._attempts.take(network_of(connection.address), self._now_s()):
            raise Refused(Refusal.TOO_MANY_ATTEMPTS)
        self._check_origin(request)
        if need is None:
            raise Refused(Refusal.BAD_PATH)
        if need.is_for_this_machine and (self._tokens is None or is_local):
            # Through a proxy on this machine, or from a page whose name was made to point here, it is
            # not this machine that asks.
            is_forwarded = any(name in request.headers for name in _FORWARDED)
            hosts = request.headers.get_all("Host")
            if is_local and not is_forwarded and is_host_allowed(hosts, self._server.origins):
                return
            if self._tokens is None:
                raise Refused(Refusal.BAD_SCOPE, "it is for this machine alone")
        if self._tokens is None:
            connection.grant = EVERYTHING
        else:
            connection.digest, connection.grant = self._grant(self._tokens, request, need)

    def _check_origin(self, request: Request) -> None:
        """Refuse what pages of other origins ask for."""
        hosts = request.headers.get_all("Host")
        if self._is_loopback_only and not is_host_allowed(hosts, self._server.origins):
            expected = "Host must be localhost, a loopback address or the host of one of server.origins"
            raise Refused(Refusal.BAD_ORIGIN, f"without tokens, {expected}")
        if not is_origin_allowed(
            request.headers.get_all("Origin"),
            next(iter(hosts), ""),
            self._server.origins,
            is_loopback_only=self._is_loopback_only,
        ):
            raise Refused(Refusal.BAD_ORIGIN)

    def _grant(self, tokens: Tokens, request: Request, need: Need) -> tuple[bytes, Grant]:
        """The digest of a request's token, and what it allows, where that is enough."""
        _, query = split_target(request)
        token = presented(
            request.headers.get_all("Authorization"), query, request.headers.get_all("Sec-WebSocket-Protocol")
        )
        if token is None:
            raise Refused(Refusal.NO_TOKEN)
        grant = tokens.grant(token, self._today())
        if grant is None:
            raise Refused(Refusal.UNKNOWN_TOKEN)
        if not need.is_met(grant):
            raise Refused(Refusal.BAD_SCOPE, need.text, grant.name)
        return digest_of(token), grant

    # --- as long as a connection is open -------------------------------------------------

    def granted_now(self, connection: GuardedConnection) -> Grant | None:
        """What the token of an open connection allows; None: it lost something since it was let in."""
        if self._tokens is None or connection.digest is None:
            return connection.grant
        grant = self._tokens.still(connection.digest, self._today())
        return grant if grant is not None and grant.allows_all_of(connection.granted) else None

    async def watch_tokens(self) -> None:
        """Close the connections of tokens that are revoked, expire or lose a right."""
        closing: set[asyncio.Task[None]] = set()
        while True:
            await asyncio.sleep(REVOKED_AFTER_S)
            for connection in self._places:
                if connection.state is State.OPEN and self.granted_now(connection) is None:
                    logger.info("a connection of %s ends: its token allows less now", connection.granted.name)
                    close = connection.close(CloseCode.FORBIDDEN, "the token was revoked, or has expired")
                    closing.add(task := asyncio.create_task(close, name="revoked"))
                    task.add_done_callback(closing.discard)

    # --- with a handshake that succeeded: what it takes is given back when the connection is lost ------

    def take_reader(self, connection: GuardedConnection) -> None:
        """Count a subscriber.

        Raises:
            Refused: there is no room for it, or for another one of its token.
        """
        self._check_room(connection)
        role, limit = None, connection.granted.max_subscribers or self._limits.token_subscribers
        if self._tokens is not None:
            role = (connection.granted.name, Scope.SUBSCRIBE)
            if not self._of_token.has_room(role, limit):
                raise Refused(Refusal.TOO_MANY_READERS_OF_TOKEN)
            self._of_token.take(role)
        self._take(connection, role, is_subscriber=True)

    def take_stream(self, connection: GuardedConnection, stream: str) -> None:
        """Count the producer of a new stream, and the stream as its token's, until `stream_over`.

        Raises:
            Refused: there is no room for it, or for another stream of its token.
        """
        self._check_room(connection)
        role, limit = (
            self._publisher(connection),
            connection.granted.max_streams or self._limits.token_streams,
        )
        if self._tokens is not None and not self._of_token.has_room(role, limit):
            raise Refused(Refusal.TOO_MANY_STREAMS_OF_TOKEN)
        if self._tokens is not None and not self._new_streams.take(role[0], self._now_s()):
            raise Refused(Refusal.TOO_MANY_NEW_STREAMS)  # each pushes an older one out of the log
        self._own(stream, role)
        self._take(connection, None)

    def take_resumed(self, connection: GuardedConnection, stream: str | None) -> None:
        """Count a producer that comes back; it is not refused for its token's other streams.

        Args:
            connection: Of the producer.
            stream: Its live stream. Where that has no place yet, because a dead server left it, it gets
                one beyond the limit too. None: the stream is over, and nothing would ever give it back.

        Raises:
            Refused: there is no room for it.
        """
        self._check_room(connection)
        if stream is not None and stream not in self._of_stream:
            self._own(stream, self._publisher(connection))
        self._take(connection, None)

    def _publisher(self, connection: GuardedConnection) -> tuple[str, Scope]:
        return connection.granted.name, Scope.PUBLISH

    def _own(self, stream: str, role: tuple[str, Scope]) -> None:
        if self._tokens is not None:
            self._of_token.take(role)
            self._of_stream[stream] = role

    def _check_room(self, connection: GuardedConnection) -> None:
        if len(self._places) >= self._server.max_connections:
            raise Refused(Refusal.TOO_MANY_CONNECTIONS)
        address = _counted_address(connection)
        if address is not None and not self._of_address.has_room(address, self._limits.address_connections):
            raise Refused(Refusal.TOO_MANY_OF_ADDRESS)

    def _take(
        self, connection: GuardedConnection, role: tuple[str, Scope] | None, *, is_subscriber: bool = False
    ) -> None:
        address = _counted_address(connection)
        if address is not None:
            self._of_address.take(address)
        self._places[connection] = _Place(address, role, is_subscriber)

    def stream_over(self, name: str) -> None:
        """A stream's name is free again, and with it the place of the token that began it."""
        role = self._of_stream.pop(name, None)
        if role is not None:
            self._of_token.give_back(role)

    def refuse(self, refused: Refused) -> Response:
        """The answer of a refusal before a WebSocket is open; counts it."""
        self.metrics.refused(refused.refusal)
        answer = refused.refusal.value
        assert isinstance(answer.code, HttpStatus), refused
        text = f"{answer.text}: {refused.detail}" if refused.detail else answer.text
        response = text_response(answer.code, text)
        match answer.code:
            case HttpStatus.UNAUTHORIZED:
                response.headers["WWW-Authenticate"] = "Bearer"
            case HttpStatus.METHOD_NOT_ALLOWED:
                response.headers["Allow"] = "GET, HEAD"
            case HttpStatus.TOO_MANY | HttpStatus.UNAVAILABLE:
                response.headers["Retry-After"] = "1"
        return response


def _address_of(connection: GuardedConnection, request: Request, trusted: Sequence[str]) -> str:
    """The client's address: of its socket, or what a trusted proxy says it is."""
    peer = connection.remote_address
    address = str(peer[0]) if peer else ""
    if address in trusted:
        forwarded = request.headers.get_all("X-Forwarded-For")
        if forwarded:  # the last one is the proxy's own finding, those before it the client's word
            return forwarded[-1].rpartition(",")[2].strip()[:64]
    return address


def _counted_address(connection: GuardedConnection) -> str | None:
    """As what a connection's address is counted; None: it is this machine's own."""
    return None if is_loopback(connection.address) else network_of(connection.address)


def _say_who_is_let_in(tokens: Tokens | None, *, is_loopback_only: bool) -> None:
    if tokens is not None:
        logger.info("tokens are asked for: %d in %s", tokens.n_tokens, tokens.path)
    elif is_loopback_only:
        logger.info("no access.tokens: everybody on this machine may send and read")
    else:
        logger.warning("access.allow_anonymous: everybody who reaches this server may send and read")
