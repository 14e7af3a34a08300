"""Time stamps of a container, as positions on the sample clock.

Here because both sides read containers, and one file must get the same times from either: the server
where it is sent one, the clients where they send what is inside. Pure.
"""

from __future__ import annotations

MAX_JITTER_S = 0.1  # a time stamp so much later than the audio before it is no hole: they are rounded
MAX_HOLE_S = 3600.0  # a longer one is not believed
MAX_OVERLAP_S = 1.0  # a time stamp further back begins a new time line


class MediaClock:
    """One track's time stamps against the audio in it.

    - Zero is the container's zero: a track that begins at 5 s has a hole before it. Where the track
      begins before zero, zero is its first sample, and no audio is dropped.
    - A hole of `MAX_JITTER_S` to `MAX_HOLE_S` is reported, and silence stands for it.
    - A longer one, or a step back by more than `MAX_OVERLAP_S`, is a time stamp that is wrong or of
      another time line: the audio continues without a hole, and later time stamps count from there.
    - A smaller step back changes nothing: the audio is ahead of its time stamps until they catch up.
    """

    def __init__(self, *, is_live: bool = False, zero_s: float = 0.0) -> None:
        """No frame came yet.

        Args:
            is_live: The first time stamp, whatever it is, is zero.
            zero_s: Else the time stamp that is; of a format without a zero, where its first track begins.
        """
        self._is_live = is_live
        self._begin_s = zero_s
        self._zero_s: float | None = None
        self._end_s = 0.0  # of the audio and the holes so far

    def hole_before(self, start_s: float | None, duration_s: float) -> int:
        """Milliseconds that are missing before a frame.

        Args:
            start_s: Its time stamp; None: it has none, and follows on the one before it.
            duration_s: Of the frame.
        """
        hole_s = 0.0 if start_s is None else self._hole_s(start_s)
        hole_ms = round(hole_s * 1000)
        self._end_s += hole_ms / 1000 + duration_s
        return hole_ms

    def _hole_s(self, start_s: float) -> float:
        if self._zero_s is None:
            self._zero_s = start_s if self._is_live else min(self._begin_s, start_s)
        late_s = start_s - self._zero_s - self._end_s
        if late_s > MAX_HOLE_S or late_s < -MAX_OVERLAP_S:
            self._zero_s = start_s - self._end_s
        return late_s if MAX_JITTER_S <= late_s <= MAX_HOLE_S else 0.0
