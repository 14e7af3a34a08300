"""The last seconds of one stream's 16 kHz audio, by absolute position.

Bounded: the caller asks `n_free` first; nothing is overwritten that was not forgotten.
"""

from __future__ import annotations

import numpy as np

from streaming.engine.contract import Pcm


class Ring:
    """A circular buffer of audio; positions are samples since the stream's first one."""

    def __init__(self, capacity: int, start: int = 0) -> None:
        self.start = start  # position of the oldest sample kept
        self.end = start  # position after the newest
        self._samples: Pcm = np.empty(capacity, np.float32)

    @property
    def capacity(self) -> int:
        """Samples it can hold."""
        return len(self._samples)

    @property
    def n_free(self) -> int:
        """Samples that can be pushed now."""
        return self.capacity - (self.end - self.start)

    def push(self, pcm: Pcm) -> None:
        """Append `pcm`, of which there is room."""
        assert len(pcm) <= self.n_free, (len(pcm), self.n_free)
        at = self.end % self.capacity
        n_first = min(len(pcm), self.capacity - at)
        self._samples[at : at + n_first] = pcm[:n_first]
        self._samples[: len(pcm) - n_first] = pcm[n_first:]
        self.end += len(pcm)

    def read(self, start: int, end: int) -> Pcm:
        """A copy of what lies from `start` to `end`."""
        assert self.start <= start <= end <= self.end, (self.start, start, end, self.end)
        at = start % self.capacity
        n_first = min(end - start, self.capacity - at)
        return np.concatenate([self._samples[at : at + n_first], self._samples[: end - start - n_first]])

    def forget(self, before: int) -> None:
        """Give back the room of what lies before a position; going back changes nothing."""
        self.start = min(max(self.start, before), self.end)
