"""Audio that a server has not acknowledged: kept, to be sent again over a new connection."""

from __future__ import annotations

import asyncio


class Backlog:
    """A stream's bytes from a position on, at most `max_bytes` of them; then `put` waits."""

    def __init__(self, max_bytes: int) -> None:
        self.start = 0  # position of the oldest byte kept
        self._max_bytes = max_bytes
        self._bytes = bytearray()
        self._is_finished = False
        self._changed = asyncio.Event()

    async def put(self, data: bytes) -> None:
        """Append bytes, when there is room; after `finish` they are dropped."""
        while not self._is_finished and self._bytes and len(self._bytes) + len(data) > self._max_bytes:
            await self._change()
        if not self._is_finished:
            self._bytes += data
            self._changed.set()

    def finish(self) -> None:
        """Nothing more comes."""
        self._is_finished = True
        self._changed.set()

    def forget(self, before: int) -> None:
        """Give back the room of what lies before a position."""
        n_bytes = min(max(0, before - self.start), len(self._bytes))
        del self._bytes[:n_bytes]
        self.start += n_bytes
        self._changed.set()

    async def read(self, at: int, max_bytes: int) -> bytes:
        """Bytes from a position on that is kept or comes next, waiting for them; none at the end."""
        while at >= self.start + len(self._bytes):
            if self._is_finished:
                return b""
            await self._change()
        begin = at - self.start
        assert begin >= 0, (at, self.start)
        return bytes(self._bytes[begin : begin + max_bytes])

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
