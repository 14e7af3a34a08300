"""What a stranger's container may make FFmpeg do: checked on its bytes, before FFmpeg reads them.

A few hundred bytes can declare a table of millions of samples, for which FFmpeg takes memory at once,
whatever else comes. So an MP4's index is read here first. A WAV's length is not believed: many writers
of live audio put any number there. An ID3 tag, which may hold compressed data, is taken out.

Pure: bytes in, bytes out.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator

import av
from av import _core

from streaming.errors import BadAudio

MIN_RATE_HZ, MAX_RATE_HZ = 8_000, 192_000  # of a container's audio
MAX_CHANNELS = 8
MAX_FRAME_SAMPLES = 65_536  # of each channel, decoded at once: the longest block of FLAC is one less
MAX_STREAMS = 16  # in one container: audio, video, subtitles
MAX_SILENT_BYTES = 16 * 1024 * 1024  # read since the last audio: pictures, an index, a packet, video
MAX_ALLOCATION = 64 * 1024 * 1024  # bytes that FFmpeg may ask for at once, in this process
MAX_INDEX_BYTES = 16 * 1024 * 1024  # of an MP4's index, which is read whole
# Samples that an MP4's tables may declare: each costs FFmpeg some 36 bytes. Whoever really sends that many
# sends bytes for them.
FREE_SAMPLES = 1_000_000
BYTES_PER_SAMPLE = 4
_PCM_SAMPLES = 256  # samples of PCM that FFmpeg keeps one entry for, at the least
_TRAILERS = (b"LIST", b"id3 ", b"ID3 ", b"cue ", b"fact", b"JUNK", b"junk", b"bext", b"iXML", b"_PMX",
             b"smpl", b"inst", b"PEAK", b"afsp", b"plst", b"adtl", b"PAD ", b"acid", b"axml")  # fmt: skip
_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"edts", b"mvex")
# Bytes of an entry of the tables that are read by a count.
_ENTRY_BYTES = {b"stts": 8, b"ctts": 8, b"stsc": 12, b"stco": 4, b"co64": 8, b"stss": 4}


def bound_allocations() -> None:
    """Have FFmpeg refuse any single allocation above `MAX_ALLOCATION`, in this process; may be repeated."""
    ctypes.CDLL(_core.__file__).av_max_alloc(ctypes.c_size_t(MAX_ALLOCATION))


def check_format(name: str, rate_hz: int, n_channels: int) -> None:
    """Refuse what no microphone gives.

    Raises:
        BadAudio: the rate or the number of channels is out of bounds.
    """
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise BadAudio(
            f"the {name} container holds audio of {rate_hz} Hz; expected {MIN_RATE_HZ} to {MAX_RATE_HZ}"
        )
    if not 1 <= n_channels <= MAX_CHANNELS:
        raise BadAudio(f"the {name} container holds {n_channels} channels; expected 1 to {MAX_CHANNELS}")


def check_codec(codec: str, extradata: bytes | None) -> None:
    """Refuse a codec's header that would have its decoder take memory for samples that nobody sends.

    Raises:
        BadAudio: it declares more samples in a packet than any encoder writes.
    """
    if codec == "alac" and extradata is not None and len(extradata) >= 16:
        n_samples = int.from_bytes(extradata[12:16], "big")
        if n_samples > MAX_FRAME_SAMPLES:
            raise BadAudio(f"ALAC of {n_samples} samples a packet; expected at most {MAX_FRAME_SAMPLES}")


def check_frame(name: str, frame: av.AudioFrame) -> None:
    """Refuse a decoded frame that its container's header did not announce.

    Raises:
        BadAudio: its rate, channels or samples are out of bounds.
    """
    check_format(name, frame.sample_rate, frame.layout.nb_channels)
    if frame.samples > MAX_FRAME_SAMPLES:
        raise BadAudio(f"a packet of {frame.samples} samples; expected at most {MAX_FRAME_SAMPLES}")


class Guard:
    """Of one container: what FFmpeg may read of the bytes that came. Remembers at most an index."""

    def __init__(self) -> None:
        self._n_silent = 0  # bytes since the last audio

    def heard(self) -> None:
        """Audio came out."""
        self._n_silent = 0

    def take(self, data: bytes) -> bytes:
        """Check bytes; gives those that FFmpeg may read now, which may be fewer, earlier ones too.

        Raises:
            BadAudio: they must not be decoded.
        """
        self._n_silent += len(data)
        if self._n_silent > MAX_SILENT_BYTES:
            raise BadAudio(f"no audio in {MAX_SILENT_BYTES} bytes of the container")
        return data

    def end(self) -> bytes:
        """The bytes that were held back, as no more come."""
        return b""


def guard_of(container: str) -> Guard:
    """The guard of a container, by FFmpeg's name."""
    kinds: dict[str, type[Guard]] = {"mp4": Mp4Guard, "wav": WavGuard, "mp3": Id3Guard}
    return kinds.get(container, Guard)()


class Id3Guard(Guard):
    """Takes out the ID3v2 tag before the audio."""

    def __init__(self) -> None:
        super().__init__()
        self._head: bytearray | None = bytearray()  # None: the tag was seen
        self._n_skipped = 0  # bytes of it that are still to come

    def take(self, data: bytes) -> bytes:
        """As `Guard`."""
        data = super().take(data)
        if self._head is not None:
            self._head += data
            if len(self._head) < 10:
                return b""
            data, self._head = bytes(self._head), None
            if data.startswith(b"ID3"):
                sizes = data[6:10]
                size = sum((byte & 0x7F) << 7 * (3 - i) for i, byte in enumerate(sizes))
                self._n_skipped = 10 + size + (10 if data[5] & 0x10 else 0)  # a footer
        skipped = min(self._n_skipped, len(data))
        self._n_skipped -= skipped
        return data[skipped:]

    def end(self) -> bytes:
        """As `Guard`."""
        return bytes(self._head or b"")


class WavGuard(Guard):
    """Lets everything behind a WAV's header through but chunks that are no audio.

    FFmpeg is told to ignore the length of the audio. Where that was right, what follows is a chunk.
    """

    def __init__(self) -> None:
        super().__init__()
        self._head = bytearray()  # up to the end of the header of `data`, then of what follows the audio
        self._n_left: int | None = None  # bytes of audio as declared; None: no `data` yet
        self._is_open = False  # the length was wrong: all that comes is audio
        self._is_over = False

    def take(self, data: bytes) -> bytes:
        """As `Guard`."""
        data = super().take(data)
        if self._is_open:
            return data
        if self._is_over:
            return b""
        if self._n_left is None:
            self._head += data
            begin = _begin_of_audio(self._head)
            if begin is None:
                return b""
            size = int.from_bytes(self._head[begin - 4 : begin], "little")
            self._n_left = size + size % 2
            head, data = bytes(self._head[:begin]), bytes(self._head[begin:])
            self._head.clear()
            return head + self._audio(data)
        return self._audio(data)

    def _audio(self, data: bytes) -> bytes:
        assert self._n_left is not None
        audio, rest = data[: self._n_left], data[self._n_left :]
        self._n_left -= len(audio)
        self._head += rest
        if len(self._head) < 8:
            return audio
        if self._head.startswith(_TRAILERS):
            self._is_over = True
            return audio
        self._is_open = True
        return audio + bytes(self._head)

    def end(self) -> bytes:
        """As `Guard`."""
        return b"" if self._is_over or self._is_open or self._n_left is not None else bytes(self._head)


def _begin_of_audio(head: bytes | bytearray) -> int | None:
    """Where the samples of a WAV begin; None: further on."""
    at = 12  # behind RIFF, its size, WAVE
    while at + 8 <= len(head):
        if head[at : at + 4] == b"data":
            return at + 8
        size = int.from_bytes(head[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    return None


class Mp4Guard(Guard):
    """Reads an MP4's indices whole, and refuses tables of samples that nobody sends."""

    def __init__(self) -> None:
        super().__init__()
        self._n_bytes = 0  # that came
        self._n_samples = 0  # that the tables so far declare
        self._head = bytearray()  # of a box, until its size is known; of an index, until it is whole
        self._n_left = 0  # bytes of a box that are let through
        self._n_index = 0  # bytes of the index that is gathered

    def take(self, data: bytes) -> bytes:
        """As `Guard`."""
        data = super().take(data)
        self._n_bytes += len(data)
        free = data[: self._n_left]
        self._n_left -= len(free)
        self._head += data[len(free) :]
        pieces = [free]
        while not self._n_left and (piece := self._next()):
            pieces.append(piece)
        return b"".join(pieces)

    def end(self) -> bytes:
        """As `Guard`."""
        return b"" if self._n_index else bytes(self._head)

    def _next(self) -> bytes:
        """The next piece that can be let through: a whole index, or what is here of another box."""
        if len(self._head) < 16:
            return b""
        size, kind = struct.unpack_from(">I4s", self._head)
        if size == 1:
            size = struct.unpack_from(">Q", self._head, 8)[0]
        if size == 0:  # to the end of the file
            size = 1 << 62
        if kind in _PARENTS:
            if not 8 <= size <= MAX_INDEX_BYTES:
                raise BadAudio(f"an MP4 index of {size} bytes; expected at most {MAX_INDEX_BYTES}")
            self._n_index = size
            if len(self._head) < size:
                return b""
            self._n_index = 0
            self._check(kind, bytes(self._head[:size]))
        elif size < 8:
            raise BadAudio(f"an MP4 box of {size} bytes")
        piece = bytes(self._head[:size])
        del self._head[: len(piece)]
        self._n_left = size - len(piece)
        return piece

    def _check(self, kind: bytes, box: bytes) -> None:
        n_tracks = 0
        for name, body in _boxes(kind, box):
            n_tracks += name == b"trak"
            self._n_samples += _declared(name, body)
        if n_tracks > MAX_STREAMS:
            raise BadAudio(f"an MP4 of {n_tracks} tracks; expected at most {MAX_STREAMS}")
        if self._n_samples > FREE_SAMPLES + self._n_bytes // BYTES_PER_SAMPLE:
            raise BadAudio(f"an MP4 whose tables declare {self._n_samples} samples in {self._n_bytes} bytes")


def _boxes(kind: bytes, box: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Every box in an index, itself among them, and what it holds; those within it follow it.

    Raises:
        BadAudio: one does not end within the box that holds it.
    """
    waiting = [(kind, box[16 if box[:4] == b"\0\0\0\1" else 8 :])]
    while waiting:
        name, body = waiting.pop()
        yield name, body
        if name in _PARENTS:
            waiting += _inner_boxes(body)


def _inner_boxes(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The boxes in what a box holds, and what each of them holds.

    Raises:
        BadAudio: as `_boxes`.
    """
    at = 0
    while at + 8 <= len(body):
        size, name = struct.unpack_from(">I4s", body, at)
        begin = at + 8
        if size == 1 and at + 16 <= len(body):
            size, begin = struct.unpack_from(">Q", body, at + 8)[0], at + 16
        end = len(body) if size == 0 else at + size
        if end < begin or end > len(body):
            raise BadAudio(f"an MP4 box of {size} bytes in one of {len(body)}")
        yield name, body[begin:end]
        at = end


def _n_in_table(table: bytes) -> int:
    """For how many samples of a sample table FFmpeg keeps something.

    In PCM, where all samples are of one size and last one tick, it keeps one thing for a thousand.
    """
    boxes = list(_inner_boxes(table))
    sizes, times = ([body for name, body in boxes if name == kind] for kind in (b"stsz", b"stts"))
    is_steady = bool(times) and all(body[4:8] == body[12:16] == b"\0\0\0\1" for body in times)
    n_samples = 0
    for body in sizes:
        is_even = is_steady and body[4:8] != bytes(4)
        n_samples += int.from_bytes(body[8:12], "big") // (_PCM_SAMPLES if is_even else 1)
    return n_samples + sum(int.from_bytes(body[8:12], "big") for name, body in boxes if name == b"stz2")


def _declared(name: bytes, body: bytes) -> int:
    """How many samples a box declares for which FFmpeg keeps something.

    Raises:
        BadAudio: it declares more entries than it holds, or is compressed.
    """
    if name == b"cmov":
        raise BadAudio("an MP4 with a compressed index")
    if name in _ENTRY_BYTES and len(body) >= 8:
        count = int.from_bytes(body[4:8], "big")
        if count * _ENTRY_BYTES[name] > len(body) - 8:
            raise BadAudio(f"an MP4 table {name.decode()} of {count} entries in {len(body)} bytes")
    if name == b"stbl":
        return _n_in_table(body)
    if name == b"trun" and len(body) >= 8:
        return int.from_bytes(body[4:8], "big")
    return 0
