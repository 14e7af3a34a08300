"""Where audio comes from: files, URLs and microphones, as s16le mono chunks at 16 kHz.

Knows nothing of servers or messages. PyAV and sounddevice are imported when a source is
opened: sounddevice raises OSError at import where PortAudio is missing.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from clients.extras import how_to_install
from streaming.protocol import SAMPLE_RATE_HZ

STANDARD_INPUT = "-"
SAMPLE_BYTES = 2  # s16le, one channel
CHUNK_MS = 40  # small enough not to add to the lag, large enough to be cheap
OPEN_TIMEOUT_S = 10.0  # to open a URL
READ_TIMEOUT_S = 20.0  # for the next packet of a URL
MICROPHONE_QUEUE_S = 10.0  # audio kept while the connection is slow; beyond it the oldest is dropped


class SourceError(RuntimeError):
    """A source that gives no audio: names it and the reason, for the user to read."""


def bytes_of_ms(duration_ms: int) -> int:
    """Bytes of `duration_ms` milliseconds of s16le mono audio at 16 kHz."""
    return SAMPLE_RATE_HZ * duration_ms // 1000 * SAMPLE_BYTES


def decode(location: str, chunk_ms: int = CHUNK_MS) -> Iterator[bytes]:
    """Audio of any file or URL that PyAV can open, in chunks of `chunk_ms`; the last may be shorter.

    `-` is standard input.

    Blocks while it reads. Channels are mixed down; the first audio stream is taken.

    Raises:
        SourceError: it cannot be opened or read, or it has no audio.
    """
    import av  # here, so that a microphone needs no PyAV

    n_bytes = bytes_of_ms(chunk_ms)
    pending = bytearray()  # less than a chunk and one decoded frame
    try:
        source = sys.stdin.buffer if location == STANDARD_INPUT else location
        with av.open(source, "r", timeout=(OPEN_TIMEOUT_S, READ_TIMEOUT_S)) as container:
            if not container.streams.audio:
                raise SourceError(f"{location}: no audio in it")
            resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE_HZ)
            for frame in container.decode(container.streams.audio[0]):
                for resampled in resampler.resample(frame):
                    pending += resampled.to_ndarray().tobytes()
                while len(pending) >= n_bytes:
                    yield bytes(pending[:n_bytes])
                    del pending[:n_bytes]
            for resampled in resampler.resample(None):  # what the filter still holds
                pending += resampled.to_ndarray().tobytes()
    except (av.FFmpegError, OSError) as exc:
        raise SourceError(f"{location}: cannot be read: {exc}") from exc
    for begin in range(0, len(pending), n_bytes):
        yield bytes(pending[begin : begin + n_bytes])


async def file_chunks(location: str, chunk_ms: int = CHUNK_MS) -> AsyncIterator[bytes]:
    """`decode` for the event loop: every chunk is read in a thread, when it is asked for.

    Raises:
        SourceError: as `decode`.
    """
    chunks = decode(location, chunk_ms)
    while True:
        chunk = await asyncio.to_thread(next, chunks, b"")
        if not chunk:
            return
        yield chunk


class ChunkQueue:
    """Chunks from an audio callback to the event loop, at most `max_chunks` of them.

    When full, the oldest chunk is dropped and counted. `put` belongs to the event loop:
    the callback's thread reaches it through `call_soon_threadsafe`.
    """

    def __init__(self, max_chunks: int) -> None:
        self._chunks: deque[bytes] = deque(maxlen=max_chunks)
        self._arrived = asyncio.Event()
        self.n_dropped = 0  # chunks dropped because they were not taken in time

    def put(self, chunk: bytes) -> None:
        """Append `chunk`, dropping the oldest when full."""
        self.n_dropped += len(self._chunks) == self._chunks.maxlen
        self._chunks.append(chunk)
        self._arrived.set()

    async def take(self) -> bytes:
        """The oldest chunk, waiting for one where there is none."""
        while not self._chunks:
            self._arrived.clear()
            await self._arrived.wait()
        return self._chunks.popleft()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Every chunk as it comes, without end."""
        while True:
            yield await self.take()


@asynccontextmanager
async def microphone(device: str | int | None = None, chunk_ms: int = CHUNK_MS) -> AsyncIterator[ChunkQueue]:
    """An open microphone; iterate over the queue for its chunks.

    Args:
        device: sounddevice's name or number of the input; None takes the system's default.
        chunk_ms: Length of one chunk, milliseconds.

    Raises:
        SourceError: PortAudio or the device is missing, or it cannot record 16 kHz mono.
    """
    sounddevice = _sounddevice()
    loop = asyncio.get_running_loop()
    queue = ChunkQueue(max_chunks=max(1, round(MICROPHONE_QUEUE_S * 1000 / chunk_ms)))

    def on_audio(data: Any, _n_frames: int, _time: Any, _status: Any) -> None:
        """Runs on PortAudio's thread: copies, hands over, returns."""
        loop.call_soon_threadsafe(queue.put, bytes(data))

    try:
        stream = sounddevice.RawInputStream(
            samplerate=SAMPLE_RATE_HZ,
            blocksize=SAMPLE_RATE_HZ * chunk_ms // 1000,
            device=device,
            channels=1,
            dtype="int16",
            callback=on_audio,
        )
        stream.start()
    except (sounddevice.PortAudioError, ValueError) as exc:
        raise SourceError(f"no microphone: {exc}; `python -m sounddevice` lists the devices") from exc
    try:
        yield queue
    finally:
        stream.stop()
        stream.close()


def _sounddevice() -> Any:
    """The module `sounddevice`, or an error that says what to install."""
    try:
        import sounddevice
    except ModuleNotFoundError as exc:
        raise SourceError(f"no microphone: sounddevice is missing: {how_to_install('clients')}") from exc
    except OSError as exc:  # its binding looks for the library at import
        raise SourceError(
            "no microphone: PortAudio is missing (Debian: apt-get install libportaudio2); "
            "recordings can still be sent with `moss-live stream FILE`"
        ) from exc
    return sounddevice
