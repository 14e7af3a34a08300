"""How loud audio must be to count as speech: a gate that follows the room. Pure.

Audio at `LOUD` or above always counts. Quieter audio counts where it stands out of the room's noise
and is not far below what was last heard, so that quiet speech is speech, while the noise of a quiet
room and the tails of loud speech are not.

All it remembers is the level of the last `HISTORY` frames: it is made again from audio.
"""

from __future__ import annotations

import math
from collections import deque

BLOCK = 5  # frames, 100 ms: shorter than the gaps between words, in which the room is heard
HISTORY = 500  # frames, 10 s: a room's noise is the quietest block of them
LOUD_DBFS = -55.0
ABOVE_FLOOR_DB = 6.0
BELOW_MEAN_DB = 25.0  # quieter than this under the mean of the history are tails, breath and far noises


def power_of(db: float) -> float:
    """Mean square of a level; 0 dBFS is a full-scale square wave."""
    return float(10.0 ** (db / 10))


LOUD = power_of(LOUD_DBFS)
_ABOVE_FLOOR, _BELOW_MEAN = power_of(ABOVE_FLOOR_DB), power_of(-BELOW_MEAN_DB)


class LevelGate:
    """The least power of a frame that counts, from the frames before it."""

    def __init__(self, min_dbfs: float) -> None:
        self._blocks: deque[float] = deque(maxlen=HISTORY // BLOCK)  # mean power each
        self._block: list[float] = []  # powers of the frames of the growing block
        self.change(min_dbfs)

    def change(self, min_dbfs: float) -> None:
        """From now on nothing counts that is quieter than this."""
        self._min_power = power_of(min_dbfs)
        self.power = self._gate()

    def hear(self, power: float) -> None:
        """Take the next frame's power; a new gate after every whole block."""
        self._block.append(power)
        if len(self._block) == BLOCK:
            self._blocks.append(math.fsum(self._block) / BLOCK)
            self._block.clear()
            self.power = self._gate()

    def _gate(self) -> float:
        if not self._blocks:
            return max(self._min_power, LOUD)
        floor, mean = min(self._blocks), math.fsum(self._blocks) / len(self._blocks)
        return max(self._min_power, min(LOUD, max(floor * _ABOVE_FLOOR, mean * _BELOW_MEAN)))
