"""Refusals in the log: who asked for what and why not, so that nobody has to guess behind a browser's 1006.

A line has the reason, the path without its query, the address and the token's name; nothing else of the
request. At `PER_S` lines a second the others are counted, and the next line says how many there were.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from streaming.refusals import Refusal
from streaming.server.limits import Attempts

logger = logging.getLogger(__name__)

BURST, PER_S = 20, 2.0  # lines at once, and then a second
MAX_PATH_CHARS = 100


class RefusalLog:
    """The refusals of one server. Belongs to the event loop."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._lines = Attempts(PER_S, BURST)
        self._n_left_out = 0

    def log(self, refusal: Refusal, path: str, address: str, token: str) -> None:
        """A request was refused.

        Args:
            refusal: Why.
            path: That was asked for, without its query.
            address: Of the client.
            token: Its name in the tokens file; "" where none was known.
        """
        if not self._lines.take("", self._now_s()):
            self._n_left_out += 1
            return
        left_out = f" ({self._n_left_out} more were not logged)" if self._n_left_out else ""
        self._n_left_out = 0
        logger.info(
            "refused: %s, %s, from %s, token %s%s",
            refusal.label,
            path if len(path) <= MAX_PATH_CHARS else f"{path[:MAX_PATH_CHARS]}...",
            address or "nowhere",
            token or "-",
            left_out,
        )
