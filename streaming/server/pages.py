"""What is answered to a plain GET: health, readiness, metrics, and what the log keeps."""

from __future__ import annotations

import logging

from websockets.http11 import Response

from streaming.engine.client import EngineClient
from streaming.errors import LogError
from streaming.log.history import History, UnknownStream
from streaming.log.hub import Hub
from streaming.log.log import Log
from streaming.metrics import CONTENT_TYPE, Metrics, Observed
from streaming.protocol import HEALTH_PATH, HISTORY_PATH, METRICS_PATH, READY_PATH, HttpStatus
from streaming.refusals import Refusal
from streaming.server.admission import Guard, Refused
from streaming.server.auth import Scope
from streaming.server.http import page, text_response
from streaming.server.producers import Producers
from streaming.server.routes import Handshake, PageRoute

logger = logging.getLogger(__name__)


class Pages:
    """All pages of a server."""

    def __init__(
        self, engine: EngineClient, log: Log, hub: Hub, guard: Guard, producers: Producers, metrics: Metrics
    ) -> None:
        self._engine = engine
        self._log = log
        self._hub = hub
        self._guard = guard
        self._producers = producers
        self._metrics = metrics
        self._kept = History(log)

    def routes(self) -> tuple[PageRoute, ...]:
        """Their paths."""
        return (
            PageRoute(HEALTH_PATH, None, answer=self._health),
            PageRoute(READY_PATH, None, answer=self._ready),
            PageRoute(METRICS_PATH, Scope.READ, "*", is_for_this_machine=True, answer=self._numbers),
            PageRoute(HISTORY_PATH, Scope.READ, "*", answer=self._history, is_long=True),
            PageRoute(f"{HISTORY_PATH}/", Scope.READ, answer=self._history, is_long=True),
        )

    async def _health(self, _: Handshake) -> Response:
        """The process runs."""
        return text_response(HttpStatus.OK, "ok")

    async def _ready(self, _: Handshake) -> Response:
        """Streams can be begun."""
        if self._log.blocked:
            return text_response(HttpStatus.UNAVAILABLE, f"log: {self._log.blocked}")
        if not self._engine.is_ready:
            return text_response(HttpStatus.UNAVAILABLE, f"engine: {self._engine.state.value}")
        return text_response(HttpStatus.OK, "ready")

    async def _numbers(self, _: Handshake) -> Response:
        """The metrics, and the state that they show."""
        observed = Observed(
            n_streams=self._producers.n_live,
            n_slots=0 if self._engine.ready is None else self._engine.ready.n_slots,
            n_connections=len(self._guard.connections),
            n_half_open=self._guard.n_half_open,
            is_engine_ready=self._engine.is_ready,
            n_log_messages=self._log.n_messages,
            n_subscribers=self._guard.n_subscribers,
            queue_depths=self._hub.depths(),
        )
        return page(CONTENT_TYPE, self._metrics.render(observed))

    async def _history(self, handshake: Handshake) -> Response:
        """What the log keeps.

        Raises:
            BadQuery: a parameter cannot be used.
            Refused: there is nothing of it.
        """
        try:
            found = await self._kept.answer(handshake.path, handshake.query)
        except UnknownStream as exc:
            raise Refused(Refusal.UNKNOWN_STREAM, str(exc)) from exc
        except LogError as exc:
            logger.error("history: %s", exc)  # noqa: TRY400  the text says it all
            return text_response(HttpStatus.UNAVAILABLE, "log: cannot be read")
        return page(found.content_type, found.body)
