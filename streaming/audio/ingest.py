"""A stream's bytes become 16 kHz mono float32: decode, clip, mix down, resample.

Everything after the byte level works on fixed blocks of the input, so that the output is
bit-identical however the bytes were cut. Knows nothing of sockets, speech or the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol, cast

import av
import msgspec
import numpy as np
import soxr
from numpy.typing import NDArray

from streaming.engine.contract import Pcm
from streaming.errors import BadAudio
from streaming.protocol import SAMPLE_RATE_HZ

Encoding = Literal["s16le", "f32le", "mulaw", "alaw"]
BYTES_PER_SAMPLE = {"s16le": 2, "f32le": 4, "mulaw": 1, "alaw": 1}
BLOCK_MS = 20
# Blocks whose bytes are kept to make a resampler's state again: half a second, and its filter looks
# back much less far. At 16 kHz nothing is resampled and none are kept.
KEPT_BLOCKS = 25
MAX_HELD = SAMPLE_RATE_HZ // 5  # samples that a resampler has not given out yet


@dataclass(frozen=True, slots=True)
class AudioFormat:
    """What a producer declares about its audio."""

    encoding: Encoding = "s16le"
    rate_hz: int = SAMPLE_RATE_HZ
    channels: int = 1
    language: str | None = None  # None: not said; "auto": detect

    @property
    def frame_bytes(self) -> int:
        """Bytes of one sample of all channels."""
        return BYTES_PER_SAMPLE[self.encoding] * self.channels

    def is_as(self, other: AudioFormat) -> bool:
        """Whether the same bytes mean the same audio."""
        return replace(self, language=None) == replace(other, language=None)


class IngestState(msgspec.Struct, frozen=True, array_like=True):
    """What the audio path of a stream continues from."""

    n_bytes: int  # received
    buffer: bytes  # of them, less than a block that was not worked on yet
    n_blocks: int  # since the resampler began
    n_out: int  # samples that it gave
    kept: bytes  # the newest of those blocks


class Ingest:
    """The audio path of one stream up to the 16 kHz sample clock.

    Holds less than one block of bytes, what the resampler has not given out yet (under 0.2 s), and the
    bytes of the last half second where that is resampled.
    """

    def __init__(self, audio_format: AudioFormat) -> None:
        self.n_samples = 0  # whole samples received, per channel, at the client's rate
        self._format = audio_format
        self._decode = _decoder(audio_format.encoding)
        self._buffer = bytearray()
        self._block_bytes = audio_format.rate_hz * BLOCK_MS // 1000 * audio_format.frame_bytes
        self._n_bytes = 0
        self._resampler = _new_resampler(audio_format.rate_hz)
        self._n_blocks = 0  # given to this resampler
        self._n_out = 0  # and got from it
        self._kept = bytearray()
        self._kept_bytes = 0 if audio_format.rate_hz == SAMPLE_RATE_HZ else KEPT_BLOCKS * self._block_bytes
        self._n_skip = 0  # samples that the resampler before this one gave already
        self._early: Pcm = np.zeros(0, np.float32)  # samples that this one gave too early

    def snapshot(self) -> IngestState:
        """What `restore` continues from."""
        return IngestState(self._n_bytes, bytes(self._buffer), self._n_blocks, self._n_out, bytes(self._kept))

    def restore(self, state: IngestState) -> None:
        """Continue where another was; called before the first `push`.

        Bit for bit at 16 kHz and in the first half second; else the resampler, begun anew on the
        kept blocks, rounds differently in the last place of a float32.
        """
        self._buffer += state.buffer
        self._count(state.n_bytes)
        first = state.n_blocks - len(state.kept) // self._block_bytes
        given = self._resample(state.kept)
        n_before = round(
            first * self._block_bytes / self._format.frame_bytes * SAMPLE_RATE_HZ / self._format.rate_hz
        )
        n_given = state.n_out - n_before  # of these, by the other
        self._early, self._n_skip = given[n_given:], max(0, n_given - len(given))
        self._n_blocks, self._n_out = state.n_blocks, state.n_out

    def max_out(self, n_bytes: int) -> int:
        """Samples that a push of so many bytes, or a flush after them, gives at most."""
        n_samples = (len(self._buffer) + n_bytes) // self._format.frame_bytes
        held = 0 if self._format.rate_hz == SAMPLE_RATE_HZ else MAX_HELD
        return n_samples * SAMPLE_RATE_HZ // self._format.rate_hz + 1 + held

    def drop_partial(self) -> None:
        """Forget the bytes of a sample that is not whole: its sender begins it again."""
        n_partial = self._n_bytes % self._format.frame_bytes
        if n_partial:
            del self._buffer[-n_partial:]
            self._count(-n_partial)

    def skip(self, n_samples: int) -> None:
        """Count samples that do not come as bytes, behind a `flush`: a gap of the sender."""
        self._count(n_samples * self._format.frame_bytes)

    def push(self, data: bytes) -> Pcm:
        """The 16 kHz audio that these bytes complete, possibly none.

        Raises:
            BadAudio: a float sample is not a number or infinite.
        """
        self._buffer += data
        self._count(len(data))
        size = self._block_bytes
        n_whole = len(self._buffer) - len(self._buffer) % size
        whole = bytes(self._buffer[:n_whole])
        del self._buffer[:n_whole]
        return self._given(self._resample(whole)).clip(-1, 1)  # a filter overshoots at full scale

    def flush(self) -> Pcm:
        """All the rest of what was received; the stream may go on after it.

        The resampler begins anew afterwards, so a flush is heard as a filter edge of some milliseconds.
        The bytes of an incomplete sample stay until the sample is whole.

        Raises:
            BadAudio: as `push`.
        """
        n_whole = len(self._buffer) - len(self._buffer) % self._format.frame_bytes
        rest = self._mono(bytes(self._buffer[:n_whole]))
        del self._buffer[:n_whole]
        tail = self._given(self._resampler.resample_chunk(rest, last=True))
        self._resampler = _new_resampler(self._format.rate_hz)
        self._n_blocks = self._n_out = self._n_skip = 0
        self._kept.clear()
        return tail.clip(-1, 1)

    def _resample(self, whole: bytes) -> Pcm:
        """What whole blocks of bytes become."""
        size = self._block_bytes
        pieces = [
            self._resampler.resample_chunk(self._mono(whole[at : at + size]))
            for at in range(0, len(whole), size)
        ]
        self._n_blocks += len(pieces)
        self._kept += whole
        del self._kept[: max(0, len(self._kept) - self._kept_bytes)]
        return _joined(pieces)

    def _given(self, pcm: Pcm) -> Pcm:
        """Samples of the resampler as they are given out: each position once."""
        if self._n_skip or len(self._early):
            n_skip = min(self._n_skip, len(pcm))
            pcm, self._early = np.concatenate([self._early, pcm[n_skip:]]), pcm[:0]
            self._n_skip -= n_skip
        self._n_out += len(pcm)
        return pcm

    def _count(self, n_bytes: int) -> None:
        self._n_bytes += n_bytes
        self.n_samples = self._n_bytes // self._format.frame_bytes

    def _mono(self, data: bytes) -> Pcm:
        samples = self._decode(data)
        if self._format.channels == 1:
            return samples
        mixed: Pcm = samples.reshape(-1, self._format.channels).mean(axis=1, dtype=np.float32)
        return mixed


class _Resampler(Protocol):
    def resample_chunk(self, x: Pcm, last: bool = ...) -> Pcm: ...


def _new_resampler(rate_hz: int) -> _Resampler:
    return cast("_Resampler", soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32"))


def _decoder(encoding: Encoding) -> Callable[[bytes], Pcm]:
    """Bytes of whole samples to float32 in [-1, 1], channels still interleaved."""
    if encoding == "s16le":
        return lambda data: _from_s16(np.frombuffer(data, "<i2"))
    if encoding == "f32le":
        return _from_f32
    codec = av.CodecContext.create(f"pcm_{encoding}", "r")
    assert isinstance(codec, av.AudioCodecContext), codec
    codec.sample_rate = SAMPLE_RATE_HZ  # PyAV wants one; the values do not depend on it
    codec.layout = "mono"

    def from_companded(data: bytes) -> Pcm:
        if not data:
            return np.zeros(0, np.float32)
        return _joined([_from_s16(frame.to_ndarray()[0]) for frame in codec.decode(av.Packet(data))])

    return from_companded


def _from_s16(samples: NDArray[np.int16]) -> Pcm:
    return samples.astype(np.float32) / np.float32(32768)


def _from_f32(data: bytes) -> Pcm:
    samples = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(samples).all():
        raise BadAudio("an f32le sample is infinite or not a number; expected values from -1 to 1")
    return samples.clip(-1, 1)


def _joined(pieces: list[Pcm]) -> Pcm:
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
