"""The paths of the server: each is declared by who serves it, with the scope that a token needs for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from websockets.datastructures import Headers
from websockets.http11 import Response

from streaming.config import VadConfig
from streaming.server.auth import Need, Scope
from streaming.server.connection import Admitted, GuardedConnection
from streaming.server.conversation import Dialect


@dataclass(frozen=True, slots=True)
class Handshake:
    """What a request to a route asks for."""

    path: str
    below: str  # what follows the path of a route that ends with "/"
    query: str  # without the token
    headers: Headers


@dataclass(frozen=True)
class Route:
    """A path, and what a token needs for it."""

    path: str  # one that ends with "/" stands for all paths below it
    scope: Scope | None  # None: open to everybody, and as often as they like
    # The streams, as a name or pattern, that the token must cover. None: the one that is named below
    # the path; at a path with none below it, which streams it is about is seen later.
    streams: str | None = None
    is_for_this_machine: bool = False  # from which it needs no token; without tokens nobody else may

    def handshake(self, path: str, query: str, headers: Headers) -> Handshake:
        """What a request to a path of this route asks for; the query is without the token."""
        return Handshake(path, path.removeprefix(self.path), query, headers)

    def need(self, path: str) -> Need:
        """What a request to a path of this route needs."""
        stream = self.streams
        if stream is None and self.path.endswith("/"):
            stream = path.removeprefix(self.path).partition("/")[0]
        return Need(self.scope, stream, is_for_this_machine=self.is_for_this_machine)


@dataclass(frozen=True)
class PageRoute(Route):
    """A path that answers GETs."""

    answer: Callable[[Handshake], Awaitable[Response]] = field(kw_only=True)  # raises `BadQuery`, `Refused`
    is_long: bool = False  # its answers may be: they are counted, and sent as long as the client reads


@dataclass(frozen=True)
class SocketRoute(Route):
    """A path that opens WebSockets."""

    admit: Callable[[GuardedConnection, Handshake], Admitted] = field(kw_only=True)  # raises the same


@dataclass(frozen=True, slots=True)
class StreamRoute:
    """A path where producers begin a stream, in a dialect; what a protocol declares of itself."""

    path: str
    streams: str | None  # a pattern of the names that its streams get; None: the client names them
    admit: Callable[[Handshake, VadConfig], Dialect]  # raises `BadQuery`
    scope: Scope = Scope.PUBLISH


class Routes:
    """All routes of a server."""

    def __init__(self, routes: Iterable[PageRoute | SocketRoute]) -> None:
        self._routes: dict[str, PageRoute | SocketRoute] = {}
        for route in routes:
            assert route.path not in self._routes, route.path
            self._routes[route.path] = route
        self._prefixes = tuple(path for path in self._routes if path.endswith("/"))

    def find(self, path: str) -> PageRoute | SocketRoute | None:
        """The route of a path; None where there is none."""
        if path not in self._routes:
            path = next((prefix for prefix in self._prefixes if path.startswith(prefix)), path)
        return self._routes.get(path)
