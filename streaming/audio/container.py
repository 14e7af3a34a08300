"""A live container's bytes, in pieces as they come, to 16 kHz mono float32.

FFmpeg reads as from a file that is never complete, so it runs on a thread of its own and waits there.
Both sides are bounded: bytes wait in `push` once `MAX_WAITING_BYTES` are not read, and the thread
waits once `MAX_DECODED_S` of audio are not taken. Knows nothing of sockets or of the engine.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import av
import numpy as np
from av.audio.resampler import AudioResampler
from av.stream import Disposition

from streaming.aio import Changed
from streaming.audio.container_guard import (
    MAX_STREAMS,
    Guard,
    bound_allocations,
    check_codec,
    check_format,
    check_frame,
    guard_of,
)
from streaming.engine.contract import Pcm
from streaming.errors import BadAudio
from streaming.protocol import SAMPLE_RATE_HZ
from streaming.protocol.timestamps import MediaClock

logger = logging.getLogger(__name__)

MAX_WAITING_BYTES = 256 * 1024
PIECE_BYTES = 64 * 1024  # of a longer frame, at a time
READ_BYTES = 4096  # that the thread takes at once
MAX_DECODED_S = 2.0
SNIFF_BYTES = 12  # that tell one container from another

# The container is chosen here, by its first bytes, and never by FFmpeg: some of its formats (playlists)
# would have it open other files and addresses.
KNOWN = "Ogg, WebM or Matroska, FLAC, WAV, MP3, AAC (ADTS), MP4 (fragmented)"
CODECS = ("opus", "libopus", "vorbis", "libvorbis", "flac", "mp3", "mp3float", "aac", "alac")  # and pcm_*
_OPTIONS = {
    "probesize": "4096",  # bytes looked at before audio comes out
    "analyzeduration": "200000",  # microseconds
    "max_streams": str(MAX_STREAMS),
}
_OPTIONS_OF = {"wav": {"ignore_length": "1"}}  # see `WavGuard`
MAX_TRAILING_BYTES = 4096  # behind a container's end that need not be zeros: tags


def container_of(head: bytes) -> str:
    """FFmpeg's name of the container that begins with these bytes.

    Raises:
        BadAudio: none that this server reads.
    """
    if head.startswith(b"OggS"):
        return "ogg"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if head.startswith(b"fLaC"):
        return "flac"
    if head.startswith(b"RIFF") and head[8:12] == b"WAVE":
        return "wav"
    if head[4:8] == b"ftyp":
        return "mp4"
    if head.startswith(b"ID3"):
        return "mp3"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        is_adts = head[1] & 0x06 == 0  # the layer that MPEG audio has no use for
        return "aac" if is_adts else "mp3"
    raise BadAudio(
        f"the audio begins with {head.hex(' ') or 'nothing'}, which is no container known here; "
        f"expected {KNOWN}, or `encoding` in the URL"
    )


@dataclass(frozen=True, slots=True)
class Hole:
    """Audio that a container does not have, by its time stamps."""

    duration_ms: int


class ContainerDecoder:
    """One stream's container. Belongs to the event loop, but for its thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = Changed()  # anything below, as the loop's side sees it
        self._decoded: deque[Pcm | Hole] = deque()  # not taken yet
        self._is_taking = False  # the block that was taken last is still being worked on
        self._n_pushed = 0  # bytes
        self._starved_at = 0  # of them, when the thread had used all and waited for more
        self._is_over = False  # the thread gives no more
        self._n_trailing = 0  # bytes behind its end, but for zeros
        self._error: BadAudio | None = None
        self._thread: threading.Thread | None = None
        # Shared with the thread, under its lock.
        self._shared = threading.Condition()  # re-entrant
        self._bytes = bytearray()
        self._is_ended = False  # no more bytes come
        self._is_stopped = False  # nobody wants any more audio
        self._n_decoded = 0  # samples given to the loop's side and not taken
        # The thread's alone.
        self._guard = Guard()  # until the container is known
        self._checked = bytearray()  # what FFmpeg may read next
        self._is_checked = False  # all of it is there
        self._has_audio = False

    async def push(self, data: bytes) -> None:
        """Take bytes, however cut; waits while too many are not decoded.

        What follows the end of a container is dropped where it is zeros or a tag.

        Raises:
            BadAudio: what came before cannot be decoded, or more follows the container's end.
        """
        for at in range(0, len(data), PIECE_BYTES):
            await self._changed.wait_for(lambda: len(self._bytes) < MAX_WAITING_BYTES or self._is_over)
            if self._error is not None:
                raise self._error
            if self._is_over:
                self._trail(data[at:])
                return  # nobody reads any more: what is kept would only grow
            with self._shared:
                self._bytes += data[at : at + PIECE_BYTES]
                self._n_pushed += len(data[at : at + PIECE_BYTES])
                self._shared.notify()
            self._start()

    async def pull(self) -> Pcm | Hole | None:
        """The next audio, or a hole in it; None at its end. Asking again says that the last was dealt with.

        Raises:
            BadAudio: the bytes cannot be decoded.
        """
        self._is_taking = False
        self._changed.notify()
        await self._changed.wait_for(lambda: bool(self._decoded) or self._is_over)
        if self._decoded:
            piece = self._decoded.popleft()
            self._is_taking = True
            with self._shared:
                self._n_decoded -= _n_samples(piece)
                self._shared.notify()
            return piece
        if self._error is not None:
            raise self._error
        return None

    async def drained(self) -> None:
        """Wait until everything that can be decoded of the pushed bytes was pulled and dealt with."""

        def is_idle() -> bool:
            return not self._decoded and not self._is_taking

        await self._changed.wait_for(
            lambda: is_idle() and (self._is_over or self._starved_at == self._n_pushed)
        )

    def end(self) -> None:
        """No more bytes come; `pull` gives what is left, then None."""
        if self._thread is None:
            self._is_over = True  # nothing ever came
        with self._shared:
            self._is_ended = True
            self._shared.notify()
        self._changed.notify()

    def _trail(self, data: bytes | bytearray) -> None:
        """Count what follows the container's end. What was taken is heard, or is an error.

        Raises:
            BadAudio: it is more than a tag.
        """
        self._n_trailing += len(data.rstrip(b"\0"))
        if self._n_trailing > MAX_TRAILING_BYTES:
            raise BadAudio("more bytes follow the end of the container, by what its header says")

    def stop(self) -> None:
        """Nobody wants any more audio: the thread ends by itself, soon."""
        with self._shared:
            self._is_stopped = True
            self._shared.notify()

    def _start(self) -> None:
        if self._thread is None:
            # A daemon: a decoder that hangs must not keep the process.
            self._thread = threading.Thread(target=self._run, name="container", daemon=True)
            self._thread.start()

    # --- on the thread -------------------------------------------------------------------

    def _run(self) -> None:
        error: BadAudio | None = BadAudio("the container's decoder failed")
        try:
            for piece in self._decode():
                if not self._give(piece):
                    break
            error = None
        except BadAudio as exc:
            error = exc
        except (av.FFmpegError, ValueError, OSError, MemoryError) as exc:
            error = BadAudio(f"the container cannot be decoded: {exc}")
        finally:
            self._tell(lambda: self._on_over(error))

    def _decode(self) -> Iterator[Pcm | Hole]:
        name = container_of(self._peek())
        self._guard = guard_of(name)
        bound_allocations()
        options = _OPTIONS | _OPTIONS_OF.get(name, {})
        with av.open(self, format=name, mode="r", buffer_size=4096, options=options) as container:
            if not container.streams.audio:
                raise BadAudio(f"the {name} container has no audio")
            stream = _chosen(container.streams.audio)
            # PyAV gives None for a codec that FFmpeg cannot decode, though its types say otherwise.
            context: av.AudioCodecContext | None = stream.codec_context
            codec = "an unknown codec" if context is None else context.name
            if codec not in CODECS and not codec.startswith("pcm_"):
                raise BadAudio(
                    f"the {name} container holds {codec}; expected one of {', '.join(CODECS)} or PCM"
                )
            assert context is not None, codec
            check_format(name, context.sample_rate, context.layout.nb_channels)
            check_codec(codec, context.extradata)
            yield from _placed(self._frames_of(name, container, stream))
        if not self._has_audio:
            raise BadAudio(f"the {name} container ends without any audio")

    def _frames_of(
        self, name: str, container: av.container.InputContainer, stream: av.AudioStream
    ) -> Iterator[av.AudioFrame]:
        """The frames of a track, each within what a header may say."""
        for packet in container.demux(stream):
            for frame in packet.decode():
                check_frame(name, frame)
                self._guard.heard()
                self._has_audio = True
                yield frame

    def read(self, n_bytes: int) -> bytes:
        """What FFmpeg reads: at most so many bytes, none at the end. Called on the thread.

        Raises:
            BadAudio: the bytes must not be decoded.
        """
        while not (self._checked or self._is_checked):
            came = self._take()
            self._is_checked = not came
            self._checked += self._guard.take(came) if came else self._guard.end()
        piece = bytes(self._checked[:n_bytes])
        del self._checked[: len(piece)]
        return piece

    def _take(self) -> bytes:
        """Bytes that came; none at the end."""
        with self._shared:
            while not (self._bytes or self._is_ended or self._is_stopped):
                self._starve()
            if self._is_stopped:
                return b""
            piece = bytes(self._bytes[:READ_BYTES])
            del self._bytes[: len(piece)]
            self._tell(self._changed.notify)
            return piece

    def _starve(self) -> None:
        """Wait for more bytes, the lock being held."""
        n_pushed = self._n_pushed
        self._tell(lambda: self._on_starved(n_pushed))  # after all that was decoded before
        self._shared.wait()

    def _peek(self) -> bytes:
        with self._shared:
            while len(self._bytes) < SNIFF_BYTES and not (self._is_ended or self._is_stopped):
                self._starve()
            return bytes(self._bytes[:SNIFF_BYTES])

    def _give(self, piece: Pcm | Hole) -> bool:
        """Hand over audio once there is room; False when nobody wants it."""
        with self._shared:
            while self._n_decoded > MAX_DECODED_S * SAMPLE_RATE_HZ and not self._is_stopped:
                self._shared.wait()
            self._n_decoded += _n_samples(piece)
        return self._tell(lambda: self._on_decoded(piece))

    def _tell(self, call: Callable[[], None]) -> bool:
        """Call on the event loop, unless it may be gone."""
        with self._shared:
            if not self._is_stopped:
                self._loop.call_soon_threadsafe(call)
            return not self._is_stopped

    # --- on the loop, from the thread ----------------------------------------------------

    def _on_decoded(self, piece: Pcm | Hole) -> None:
        self._decoded.append(piece)
        self._changed.notify()

    def _on_starved(self, n_pushed: int) -> None:
        self._starved_at = n_pushed
        self._changed.notify()

    def _on_over(self, error: BadAudio | None) -> None:
        self._error = error
        self._is_over = True
        if error is None:
            try:
                self._trail(self._bytes)
            except BadAudio as exc:
                self._error = exc
        self._bytes.clear()  # the thread reads no more
        self._changed.notify()


def _chosen(tracks: Sequence[av.AudioStream]) -> av.AudioStream:
    """The default track; where none is marked so, the first."""
    chosen = next((track for track in tracks if track.disposition & Disposition.default), tracks[0])
    if len(tracks) > 1:
        logger.info("a container of %d audio tracks: number %d", len(tracks), tracks.index(chosen) + 1)
    return chosen


def _n_samples(piece: Pcm | Hole) -> int:
    return 0 if isinstance(piece, Hole) else len(piece)


def _placed(frames: Iterable[av.AudioFrame]) -> Iterator[Pcm | Hole]:
    """Frames at 16 kHz, mono, and the holes between them by their time stamps."""
    clock, resampler = MediaClock(), _new_resampler()
    for frame in frames:
        duration_s = frame.samples / (frame.sample_rate or SAMPLE_RATE_HZ)
        if hole_ms := clock.hole_before(frame.time, duration_s):
            yield from _blocks(resampler, None)
            resampler = _new_resampler()
            yield Hole(hole_ms)
        yield from _blocks(resampler, frame)
    yield from _blocks(resampler, None)


def _new_resampler() -> AudioResampler:
    return AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE_HZ)


def _blocks(resampler: AudioResampler, frame: av.AudioFrame | None) -> Iterator[Pcm]:
    """A frame at 16 kHz, mono; None gives the rest."""
    for out in resampler.resample(frame):
        pcm: Pcm = out.to_ndarray()[0].astype(np.float32, copy=False)
        if not np.isfinite(pcm).all():
            raise BadAudio("a decoded sample is infinite or not a number")
        yield pcm.clip(-1, 1)
