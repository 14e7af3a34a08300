"""Audio that a server has not acknowledged: kept, to be sent again over a new connection."""

from __future__ import annotations

import asyncio

from streaming.protocol import MAX_GAP_MS, SAMPLE_RATE_HZ, Gap

_BYTES_PER_MS = 2 * SAMPLE_RATE_HZ // 1000
MAX_GAPS = 1_000  # that are kept beside the bytes


class Backlog:
    """A stream's bytes and gaps from a position on, at most `max_bytes` of them; then `put` waits.

    A position counts bytes of s16le mono at 16 kHz. A gap takes the positions that its silence would, and
    no memory. The server takes a gap whole, so a stream resumes before or behind what was sent as one.
    """

    def __init__(self, max_bytes: int) -> None:
        self.start = 0  # position of the oldest byte kept
        self._max_bytes = max_bytes
        self._bytes = bytearray()
        self._gaps: list[tuple[int, int]] = []  # begin and end, in order, from `start` on
        self._end = 0
        self._is_finished = False
        self._changed = asyncio.Event()

    async def put(self, data: bytes | Gap) -> None:
        """Append bytes or a gap, when there is room; after `finish` they are dropped."""
        n_bytes = 0 if isinstance(data, Gap) else len(data)
        while not self._is_finished and self._is_full(n_bytes):
            await self._change()
        if self._is_finished:
            return
        if isinstance(data, Gap):
            begin, self._end = self._end, self._end + data.duration_ms * _BYTES_PER_MS
            if self._gaps and self._gaps[-1][1] == begin:
                begin = self._gaps.pop()[0]
            self._gaps.append((begin, self._end))
        else:
            self._bytes += data
            self._end += n_bytes
        self._changed.set()

    def finish(self) -> None:
        """Nothing more comes."""
        self._is_finished = True
        self._changed.set()

    def forget(self, before: int) -> None:
        """Give back the room of what lies before a position."""
        before = min(max(self.start, before), self._end)
        del self._bytes[: self._n_bytes_before(before)]
        self._gaps = [(max(begin, before), end) for begin, end in self._gaps if end > before]
        self.start = before
        self._changed.set()

    def is_over(self, at: int) -> bool:
        """Whether a position is the end, and nothing more comes."""
        return self._is_finished and at >= self._end

    async def read(self, at: int, max_bytes: int) -> bytes | Gap:
        """What is at a position that is kept or comes next, waiting for it; no bytes at the end."""
        while at >= self._end:
            if self._is_finished:
                return b""
            await self._change()
        assert at >= self.start, (at, self.start)
        next_gap = next(((begin, end) for begin, end in self._gaps if end > at), None)
        if next_gap is not None and next_gap[0] <= at:
            return Gap(min((next_gap[1] - at) // _BYTES_PER_MS, MAX_GAP_MS))
        if next_gap is not None:
            max_bytes = min(max_bytes, next_gap[0] - at)
        begin = self._n_bytes_before(at)
        return bytes(self._bytes[begin : begin + max_bytes])

    def _is_full(self, n_bytes: int) -> bool:
        has_no_room = bool(self._bytes) and len(self._bytes) + n_bytes > self._max_bytes
        return has_no_room or len(self._gaps) >= MAX_GAPS

    def _n_bytes_before(self, position: int) -> int:
        """Bytes kept before a position: gaps have none."""
        in_gaps = sum(max(0, min(end, position) - begin) for begin, end in self._gaps)
        return position - self.start - in_gaps

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
