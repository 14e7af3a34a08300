"""Frames that a producer sent and its stream has not taken yet: in memory first, then in files.

A connection is read however full its stream is, for what is not read holds up the client's pings too,
and a client that gets no pong takes a healthy connection for dead. So the frames wait here, in their
order. At `max_bytes`, or while the disk is full, the connection is not read until there is room.

Reads and writes of a file are of the size of a frame and go to the page cache: they do not leave the
event loop.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from streaming.aio import Changed

logger = logging.getLogger(__name__)

Received = str | bytes  # text or binary, as it came

MEMORY_BYTES = 512 * 1024  # of frames in memory; what does not fit goes to files
SEGMENT_BYTES = 8 * 1024 * 1024  # a file is deleted when it was read, so that little of it is read already
FRAME_BYTES = 64  # what a frame takes beside its content
_HEAD = struct.Struct("<?I")  # is it text; bytes that follow


@dataclass(slots=True)
class _Segment:
    """A file without a name: gone when it is closed, and when the process dies."""

    file: IO[bytes]
    n_written: int = 0
    n_read: int = 0


class Spool:
    """A queue of frames, first in, first out, of at most `max_bytes` and one frame more."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Empty.

        Args:
            folder: Where files are made, if any are needed.
            max_bytes: Of all waiting frames; at most `MEMORY_BYTES` of them are in memory.
        """
        self._folder = folder
        self._max_bytes = max_bytes
        self._first: deque[Received] = deque()  # before what is in the files
        self._segments: deque[_Segment] = deque()
        self._last: deque[Received] = deque()  # after it: what the disk did not take
        self._n_first = 0  # bytes in `_first`
        self._n_bytes = 0

    @property
    def n_bytes(self) -> int:
        """Of all waiting frames."""
        return self._n_bytes

    @property
    def is_empty(self) -> bool:
        """Whether no frame waits."""
        return not self._n_bytes

    @property
    def is_full(self) -> bool:
        """Whether it takes no frame at the moment."""
        return self._n_bytes >= self._max_bytes or bool(self._last)

    def put(self, frame: Received) -> None:
        """Append a frame, while it is not full."""
        data = frame.encode() if isinstance(frame, str) else frame
        size = len(data) + FRAME_BYTES
        if not self._segments and self._n_first + size <= MEMORY_BYTES:
            self._first.append(frame)
            self._n_first += size
        else:
            self._write(frame, data)
        self._n_bytes += size

    def get(self) -> Received:
        """Remove the oldest frame, of at least one."""
        if self._first:
            frame = self._first.popleft()
            self._n_first -= _size(frame)
        elif self._segments:
            frame = self._read()
        else:
            frame = self._last.popleft()
        self._n_bytes -= _size(frame)
        return frame

    def close(self) -> None:
        """Drop everything."""
        for segment in self._segments:
            segment.file.close()
        self._segments.clear()
        self._first.clear()
        self._last.clear()
        self._n_first = self._n_bytes = 0

    def _write(self, frame: Received, data: bytes) -> None:
        try:
            if not self._segments or self._segments[-1].n_written >= SEGMENT_BYTES:
                self._segments.append(_Segment(tempfile.TemporaryFile(dir=self._folder)))  # noqa: SIM115
            segment = self._segments[-1]
            segment.file.seek(segment.n_written)
            segment.file.write(_HEAD.pack(isinstance(frame, str), len(data)))
            segment.file.write(data)
            segment.file.flush()
        except OSError as exc:  # what was written of the frame is overwritten by the next one
            logger.warning("%s: frames cannot be kept there: %s", self._folder, exc.strerror)
            self._last.append(frame)
            if self._segments and not self._segments[-1].n_written:
                self._segments.pop().file.close()
        else:
            segment.n_written += _HEAD.size + len(data)

    def _read(self) -> Received:
        segment = self._segments[0]
        segment.file.seek(segment.n_read)
        is_text, n_bytes = _HEAD.unpack(segment.file.read(_HEAD.size))
        data = segment.file.read(n_bytes)
        segment.n_read += _HEAD.size + n_bytes
        if segment.n_read == segment.n_written:
            segment.file.close()
            self._segments.popleft()
        return data.decode() if is_text else data


def _size(frame: Received) -> int:
    n_bytes = len(frame.encode()) if isinstance(frame, str) else len(frame)
    return n_bytes + FRAME_BYTES


class Inbox:
    """What one connection sent, read as it comes and taken when there is time."""

    def __init__(self, connection: ServerConnection, spool: Spool) -> None:
        """Of a connection that nobody else reads while `fill` runs."""
        self._connection = connection
        self._spool = spool
        self._over: ConnectionClosed | None = None
        self._changed = Changed()

    async def fill(self) -> None:
        """Read the connection until it is closed."""
        try:
            while True:
                await self._changed.wait_for(lambda: not self._spool.is_full)
                self._spool.put(await self._connection.recv())
                self._changed.notify()
        except ConnectionClosed as exc:
            self._over = exc
            self._changed.notify()
            await asyncio.Event().wait()  # what came before is still taken

    async def get(self) -> Received:
        """The next frame.

        Raises:
            ConnectionClosed: there is none, and none will come.
        """
        await self._changed.wait_for(lambda: not self._spool.is_empty or self._over is not None)
        if self._spool.is_empty:
            assert self._over is not None
            raise self._over
        frame = self._spool.get()
        self._changed.notify()
        return frame
