"""The time by which retention counts ages: what the server saw pass, not what the clock says."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

JUMP_MS = 60_000  # more than this is no correction, but a jump
CATCH_UP = 0.1  # of the time that passes: how fast a jump ahead is believed


class SeenClock:
    """Unix time that never jumps ahead. Pure: both clocks are handed in.

    A clock that jumps ahead would make all that is kept too old at once. It is believed slowly instead, a
    tenth of real time: what came before the jump is kept that much longer. A jump back is believed at
    once, since it makes nothing older.
    """

    def __init__(self, wall_ms: int, monotonic_s: float) -> None:
        self._seen_ms = float(wall_ms)
        self._at_s = monotonic_s
        self._wall_ms = wall_ms

    def now_ms(self, wall_ms: int, monotonic_s: float) -> int:
        """The time for retention.

        Args:
            wall_ms: Unix time, as the clock says.
            monotonic_s: Seconds of a clock that nobody sets.
        """
        passed_ms = (monotonic_s - self._at_s) * 1000
        jump_ms = wall_ms - self._wall_ms - passed_ms
        if abs(jump_ms) > JUMP_MS:
            logger.warning(
                "the clock jumped by %+.0f s; nothing is deleted for that: ages are what the server saw",
                jump_ms / 1000,
            )
        self._seen_ms = min(float(wall_ms), self._seen_ms + passed_ms * (1 + CATCH_UP))
        self._at_s, self._wall_ms = monotonic_s, wall_ms
        return int(self._seen_ms)
