"""Where audio comes from: files, URLs and microphones, as s16le mono chunks at 16 kHz, and gaps in it.

Knows nothing of servers. PyAV and sounddevice are imported when a source is opened: sounddevice
raises OSError at import where PortAudio is missing.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from clients.extras import how_to_install
from clients.tracks import (
    PROBE_RATE_HZ,
    PROBE_S,
    NoSuchTrack,
    Track,
    default_of,
    named,
    speech_score,
    with_speech,
)
from streaming.protocol import MAX_GAP_MS, SAMPLE_RATE_HZ, Gap
from streaming.protocol.timestamps import MediaClock

if TYPE_CHECKING:
    from av.container import InputContainer

logger = logging.getLogger(__name__)

STANDARD_INPUT = "-"
SAMPLE_BYTES = 2  # s16le, one channel
CHUNK_MS = 40  # small enough not to add to the lag, large enough to be cheap
OPEN_TIMEOUT_S = 10.0  # to open a URL
READ_TIMEOUT_S = 20.0  # for the next packet of a URL
MICROPHONE_QUEUE_S = 10.0  # audio kept while the connection is slow; beyond it the oldest is dropped

Chunk: TypeAlias = "bytes | Gap"  # of audio, or the time for which there is none


class SourceError(RuntimeError):
    """A source that gives no audio: names it and the reason, for the user to read."""


def bytes_of_ms(duration_ms: int) -> int:
    """Bytes of `duration_ms` milliseconds of s16le mono audio at 16 kHz."""
    return SAMPLE_RATE_HZ * duration_ms // 1000 * SAMPLE_BYTES


def duration_ms_of(chunk: Chunk) -> int:
    """How long a chunk lasts, in whole milliseconds."""
    return chunk.duration_ms if isinstance(chunk, Gap) else len(chunk) // bytes_of_ms(1)


@dataclass(frozen=True, slots=True)
class Opened:
    """What is known of a source once it is open."""

    tracks: tuple[Track, ...]
    taken: Track
    is_live: bool  # a URL without a length: its end is a failure


def _ignore(_: object) -> None:
    return


def read_chunks(
    location: str,
    chunk_ms: int = CHUNK_MS,
    *,
    track: str | None = None,
    on_open: Callable[[Opened], None] = _ignore,
) -> Iterator[Chunk]:
    """Audio of any file or URL that PyAV can open, in chunks of `chunk_ms`, and the gaps in it.

    The last chunk, and one before a gap, may be shorter. `-` is standard input. Blocks while it reads.
    Channels are mixed down. Time stamps count as `MediaClock` says.

    Args:
        location: Of the source.
        chunk_ms: Milliseconds.
        track: Number, language or title of a sound track; None: of several in a local file the one
            with speech, else the default.
        on_open: Called before the first chunk.

    Raises:
        SourceError: it cannot be opened or read, has no audio or no such track, or is live and ended.
    """
    import av  # here, so that a microphone needs no PyAV

    try:
        source = sys.stdin.buffer if location == STANDARD_INPUT else location
        with av.open(source, "r", timeout=(OPEN_TIMEOUT_S, READ_TIMEOUT_S)) as container:
            if not container.streams.audio:
                raise SourceError(f"{location}: no audio in it")
            opened = _opened(location, container, track)
            on_open(opened)
            frames = container.decode(container.streams.audio[opened.taken.number - 1])
            clock = MediaClock(is_live=opened.is_live, zero_s=_zero_s(container))
            yield from _chunks(frames, bytes_of_ms(chunk_ms), clock)
    except NoSuchTrack as exc:
        raise SourceError(f"{location}: {exc}") from exc
    except (av.FFmpegError, OSError) as exc:
        raise SourceError(f"{location}: cannot be read: {exc}") from exc
    if opened.is_live:
        raise SourceError(f"{location}: the live source ended")


def decode(location: str, chunk_ms: int = CHUNK_MS) -> Iterator[bytes]:
    """As `read_chunks`, with silence in place of gaps.

    Raises:
        SourceError: as `read_chunks`.
    """
    for chunk in read_chunks(location, chunk_ms):
        if isinstance(chunk, Gap):
            for begin_ms in range(0, chunk.duration_ms, chunk_ms):
                yield bytes(bytes_of_ms(min(chunk_ms, chunk.duration_ms - begin_ms)))
        else:
            yield chunk


async def file_chunks(
    location: str,
    chunk_ms: int = CHUNK_MS,
    *,
    track: str | None = None,
    on_open: Callable[[Opened], None] = _ignore,
) -> AsyncIterator[Chunk]:
    """`read_chunks` for the event loop: every chunk is read in a thread, when it is asked for.

    Raises:
        SourceError: as `read_chunks`.
    """
    chunks = read_chunks(location, chunk_ms, track=track, on_open=on_open)
    while True:
        chunk = await asyncio.to_thread(next, chunks, b"")
        if not chunk:
            return
        yield chunk


def _chunks(frames: Iterable[Any], n_bytes: int, clock: MediaClock) -> Iterator[Chunk]:
    pending = bytearray()  # less than a chunk and one decoded frame
    resampler = _new_resampler(SAMPLE_RATE_HZ)
    for frame in frames:
        duration_s = frame.samples / (frame.sample_rate or SAMPLE_RATE_HZ)
        if hole_ms := clock.hole_before(frame.time, duration_s):
            pending += _resampled(resampler, None)
            yield from _pieces(pending, n_bytes)
            yield Gap(hole_ms)
            resampler, pending = _new_resampler(SAMPLE_RATE_HZ), bytearray()
        pending += _resampled(resampler, frame)
        n_whole = len(pending) - len(pending) % n_bytes
        yield from _pieces(pending[:n_whole], n_bytes)
        del pending[:n_whole]
    pending += _resampled(resampler, None)  # what the filter still holds
    yield from _pieces(pending, n_bytes)


def _pieces(data: bytearray, n_bytes: int) -> Iterator[bytes]:
    return (bytes(data[at : at + n_bytes]) for at in range(0, len(data), n_bytes))


def _new_resampler(rate_hz: int) -> Any:
    import av

    return av.AudioResampler(format="s16", layout="mono", rate=rate_hz)


def _resampled(resampler: Any, frame: Any) -> bytes:
    return b"".join(out.to_ndarray().tobytes() for out in resampler.resample(frame))


# --- what there is, and what is taken ----------------------------------------------------


def _opened(location: str, container: InputContainer, track: str | None) -> Opened:
    tracks = tuple(Track.of(i, stream) for i, stream in enumerate(container.streams.audio, 1))
    is_remote = "://" in location and not location.startswith("file:")
    if track is not None:
        taken = named(tracks, track)
    elif len(tracks) == 1 or is_remote or location == STANDARD_INPUT:  # what cannot be read twice
        taken = default_of(tracks)
    else:
        taken = with_speech(tracks, _speech_scores(location, len(tracks)))
    return Opened(tracks, taken, is_remote and _is_endless(container))


def _zero_s(container: InputContainer) -> float:
    """The time stamp of a container's beginning: a broadcast counts on from anywhere."""
    is_broadcast = container.format.name in ("mpegts", "mpeg")
    return (container.start_time or 0) / 1_000_000 if is_broadcast else 0.0


def _is_endless(container: InputContainer) -> bool:
    """Whether nothing says how long it is. A live playlist has a size, but is none of audio."""
    return container.duration is None and (container.size <= 0 or "hls" in container.format.name)


def _speech_scores(location: str, n_tracks: int) -> list[float]:
    """`speech_score` of the beginning of every sound track, read over a connection of its own."""
    import av
    import numpy as np

    heard = [bytearray() for _ in range(n_tracks)]
    resamplers = [_new_resampler(PROBE_RATE_HZ) for _ in range(n_tracks)]
    n_bytes = 2 * PROBE_RATE_HZ * PROBE_S
    with av.open(location, "r") as container:
        streams = container.streams.audio
        numbers = {stream.index: i for i, stream in enumerate(streams)}
        for packet in container.demux(*streams):
            track = numbers[packet.stream.index]
            if len(heard[track]) < n_bytes:
                for frame in packet.decode():
                    heard[track] += _resampled(resamplers[track], frame)
            elif all(len(data) >= n_bytes for data in heard):
                break
            if packet.dts is not None and float(packet.dts * packet.time_base) > 2 * PROBE_S:
                break  # a track that has hardly any audio
    return [speech_score((np.frombuffer(data, "<i2") / 32768).astype(np.float32)) for data in heard]


# --- microphones -------------------------------------------------------------------------


class ChunkQueue:
    """Chunks from an audio callback to the event loop, at most `max_chunks` of them.

    When full, the oldest chunk is dropped and counted, and a gap takes its place. `put` and `fail`
    belong to the event loop: the callback's thread reaches them through `call_soon_threadsafe`.
    """

    def __init__(self, max_chunks: int) -> None:
        self._chunks: deque[Chunk] = deque(maxlen=max_chunks)
        self._arrived = asyncio.Event()
        self._dropped_ms = 0  # before the oldest chunk, and not told yet
        self._failure: SourceError | None = None
        self.n_dropped = 0  # chunks dropped because they were not taken in time

    def put(self, chunk: Chunk) -> None:
        """Append `chunk`, dropping the oldest when full."""
        if len(self._chunks) == self._chunks.maxlen:
            self.n_dropped += 1
            self._dropped_ms += duration_ms_of(self._chunks[0])
        self._chunks.append(chunk)
        self._arrived.set()

    def fail(self, failure: SourceError) -> None:
        """Nothing comes after what is queued."""
        self._failure = failure
        self._arrived.set()

    async def take(self) -> Chunk:
        """The oldest chunk, or the gap before it, waiting for one where there is none.

        Raises:
            SourceError: the source failed.
        """
        while not self._chunks:
            if self._failure is not None:
                raise self._failure
            self._arrived.clear()
            await self._arrived.wait()
        if self._dropped_ms:
            gap, self._dropped_ms = Gap(self._dropped_ms), 0
            return gap
        return self._chunks.popleft()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Every chunk as it comes, up to a failure."""
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

    came_s = time.time()  # when the newest audio did; written by PortAudio's thread
    is_closing = False

    def on_audio(data: Any, _n_frames: int, _time: Any, status: Any) -> None:
        """Runs on PortAudio's thread: copies, hands over, returns."""
        nonlocal came_s
        before_s, came_s = came_s, time.time()
        # The device, or a laptop that slept, lost audio: as much as the clock went on without it.
        lost_ms = (
            round((came_s - before_s) * 1000) - chunk_ms if getattr(status, "input_overflow", False) else 0
        )
        if lost_ms > 0:
            loop.call_soon_threadsafe(queue.put, Gap(min(lost_ms, MAX_GAP_MS)))
        loop.call_soon_threadsafe(queue.put, bytes(data))

    def on_end() -> None:
        """Runs on PortAudio's thread where the device is gone, and when it is closed here."""
        if not is_closing:
            loop.call_soon_threadsafe(queue.fail, SourceError("the microphone stopped"))

    try:
        stream = sounddevice.RawInputStream(
            samplerate=SAMPLE_RATE_HZ,
            blocksize=SAMPLE_RATE_HZ * chunk_ms // 1000,
            device=device,
            channels=1,
            dtype="int16",
            callback=on_audio,
            finished_callback=on_end,
        )
        stream.start()
    except (sounddevice.PortAudioError, ValueError) as exc:
        raise SourceError(f"no microphone: {exc}; `python -m sounddevice` lists the devices") from exc
    try:
        yield queue
    finally:
        is_closing = True
        stream.stop()
        stream.close()


async def microphone_chunks(device: str | int | None = None) -> AsyncIterator[Chunk]:
    """A microphone's chunks, from its opening to its failure.

    Raises:
        SourceError: as `microphone`; or it stopped.
    """
    async with microphone(device) as queue:
        async for chunk in queue:
            yield chunk


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
