"""A stream's times: from the engine's sample clock to what the wire says, gaps of the sender included.

Pure, and plain data for the snapshot. A gap is silence in place of audio that the sender does not have.
The engine gets `MAX_SILENCE_MS` of one gap at most, enough for endpointing, sounds and windows to
end; the rest is a jump: later times are moved by it, and nothing is decoded, kept or logged for it.
So the engine's clock counts the samples that it was given, and the stream's clock the gaps in full.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import TypeVar

import msgspec

from streaming.protocol import SAMPLE_RATE_HZ, AudioGap, Message, Word, ms_of

MAX_SILENCE_MS = 10_000  # of one gap, that the engine gets
# Silence behind a jump: speech after the gap may be placed so far before its mark (`vad.start_ms`, `pad_ms`).
AFTER_JUMP_MS = 3_000
MIN_TOLD_MS = 1_000  # of a gap that is logged; shorter ones pass as silence
MAX_JUMPS = 64  # that are known one by one: ten seconds each, so ten minutes back at least

_M = TypeVar("_M", bound=Message)
_T = TypeVar("_T", bound="Message | Word")


class ClockState(msgspec.Struct, frozen=True):
    """What a clock remembers."""

    jumps: tuple[tuple[int, int], ...] = ()  # where on the engine's clock, and by how much in all up to it
    gap: tuple[int, int] | None = None  # the running gap on the stream's clock
    gap_silence_ms: int = 0  # of the running gap, that the engine got


class StreamClock:
    """Where a stream's audio is in time. All in milliseconds."""

    def __init__(self, now_ms: Callable[[], int], state: ClockState | None = None) -> None:
        """Of a new stream, or of one that continues.

        Args:
            now_ms: Unix time.
            state: Of the clock that this one continues.
        """
        state = state or ClockState()
        self.now_ms = now_ms
        self._jumps = list(state.jumps) or [(0, 0)]
        self._gap = state.gap
        self._gap_silence_ms = state.gap_silence_ms

    def snapshot(self) -> ClockState:
        """What another clock continues from."""
        return ClockState(tuple(self._jumps), self._gap, self._gap_silence_ms)

    @property
    def jumped_ms(self) -> int:
        """Of all gaps, what the engine did not get."""
        return self._jumps[-1][1]

    # --- gaps ----------------------------------------------------------------------------

    def silence_of(self, duration_ms: int) -> int:
        """Samples of silence that the engine gets for a gap told next."""
        left_ms = MAX_SILENCE_MS - (0 if self._gap is None else self._gap_silence_ms)
        return min(duration_ms, left_ms) * SAMPLE_RATE_HZ // 1000

    def gap(self, duration_ms: int, n_samples: int) -> None:
        """A gap follows, or the running one goes on; the engine got the silence for it.

        Args:
            duration_ms: Of the gap, or of its next piece.
            n_samples: That the engine was given, the silence included.
        """
        if self._gap is None:
            self._gap_silence_ms = 0
        silence_ms = min(duration_ms, MAX_SILENCE_MS - self._gap_silence_ms)
        self._gap_silence_ms += silence_ms
        if duration_ms > silence_ms:
            self._jump(ms_of(n_samples) - AFTER_JUMP_MS, duration_ms - silence_ms)
        end_ms = ms_of(n_samples) + self.jumped_ms
        self._gap = (end_ms - duration_ms if self._gap is None else self._gap[0], end_ms)

    def end_gap(self) -> AudioGap | None:
        """Audio follows, or nothing at all: the gap that ended, if it is long enough to be told."""
        gap, self._gap = self._gap, None
        return None if gap is None or gap[1] - gap[0] < MIN_TOLD_MS else AudioGap(*gap)

    def _jump(self, at_ms: int, by_ms: int) -> None:
        last_ms, total_ms = self._jumps[-1]
        if at_ms > last_ms:
            self._jumps.append((at_ms, total_ms + by_ms))
        else:  # the same gap goes on
            self._jumps[-1] = (last_ms, total_ms + by_ms)
        if len(self._jumps) > MAX_JUMPS:
            self._jumps[:2] = [(0, self._jumps[1][1])]

    # --- times ---------------------------------------------------------------------------

    def stream_ms(self, engine_ms: int) -> int:
        """A time of the engine's clock on the stream's."""
        at = bisect_right(self._jumps, engine_ms, key=lambda jump: jump[0]) - 1
        return engine_ms + self._jumps[max(0, at)][1]

    def placed(self, message: _M) -> _M:
        """A message whose times are the engine's, with the stream's."""
        return message if not self.jumped_ms else self._moved(message)

    def _moved(self, item: _T) -> _T:
        moved: dict[str, object] = {
            name: self.stream_ms(getattr(item, name))
            for name in ("start_ms", "end_ms", "duration_ms")
            if name in item.__struct_fields__
        }
        if "words" in item.__struct_fields__:
            words: tuple[Word, ...] = getattr(item, "words")  # noqa: B009  of some messages alone
            moved["words"] = tuple(map(self._moved, words))
        return msgspec.structs.replace(item, **moved)
