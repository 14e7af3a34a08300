"""A stream's bytes become 16 kHz mono float32: decode, clip, mix down, resample.

Everything after the byte level works on fixed blocks of the input, so that the output is
bit-identical however the bytes were cut. Knows nothing of sockets, speech or the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, cast, get_args
from urllib.parse import parse_qsl

import av
import numpy as np
import soxr
from numpy.typing import NDArray

from streaming.engine.plan import Pcm
from streaming.errors import BadAudio, BadQuery
from streaming.protocol import MAX_CHANNELS, MAX_RATE_HZ, MIN_RATE_HZ, SAMPLE_RATE_HZ

Encoding = Literal["s16le", "f32le", "mulaw", "alaw"]
BYTES_PER_SAMPLE = {"s16le": 2, "f32le": 4, "mulaw": 1, "alaw": 1}
BLOCK_MS = 20
MAX_LANGUAGE_CHARS = 16
_QUERY_KEYS = ("format", "rate", "channels", "language")


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


def parse_query(query: str) -> AudioFormat:
    """Read the query of a stream's URL; what is left out has its default.

    Raises:
        BadQuery: an unknown or repeated key, or a value out of range.
    """
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=len(_QUERY_KEYS))
    except ValueError as exc:
        raise BadQuery(f"too many parameters; expected at most {', '.join(_QUERY_KEYS)}") from exc
    values: dict[str, str] = {}
    for key, value in pairs:
        if key not in _QUERY_KEYS:
            raise BadQuery(f"{key[:80]!r} is no parameter; expected one of {', '.join(_QUERY_KEYS)}")
        if key in values:
            raise BadQuery(f"{key} was given twice; expected once")
        values[key] = value
    encoding = values.get("format", "s16le")
    if encoding not in get_args(Encoding):
        raise BadQuery(f"format is {encoding[:80]!r}; expected one of {', '.join(get_args(Encoding))}")
    return AudioFormat(
        cast("Encoding", encoding),
        _integer(values, "rate", SAMPLE_RATE_HZ, MIN_RATE_HZ, MAX_RATE_HZ),
        _integer(values, "channels", 1, 1, MAX_CHANNELS),
        _language(values.get("language")),
    )


class Ingest:
    """The audio path of one stream up to the 16 kHz sample clock.

    Holds less than one block of bytes, and what the resampler has not given out yet (under 0.2 s).
    """

    def __init__(self, audio_format: AudioFormat) -> None:
        self.n_samples = 0  # whole samples received, per channel, at the client's rate
        self._format = audio_format
        self._decode = _decoder(audio_format.encoding)
        self._buffer = bytearray()
        self._block_bytes = audio_format.rate_hz * BLOCK_MS // 1000 * audio_format.frame_bytes
        self._n_bytes = 0
        self._resampler = _new_resampler(audio_format.rate_hz)

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
        pieces = [
            self._resampler.resample_chunk(self._mono(whole[at : at + size]))
            for at in range(0, n_whole, size)
        ]
        return _joined(pieces)

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
        tail = self._resampler.resample_chunk(rest, last=True)
        self._resampler = _new_resampler(self._format.rate_hz)
        return tail

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


def _integer(values: dict[str, str], key: str, default: int, low: int, high: int) -> int:
    text = values.get(key)
    if text is None:
        return default
    # isdecimal: int() would also take " 8_000 ". The length keeps int() from its digit limit.
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and low <= int(text) <= high):
        raise BadQuery(f"{key} is {text[:80]!r}; expected an integer from {low} to {high}")
    return int(text)


def _language(text: str | None) -> str | None:
    if text is not None and not 0 < len(text) <= MAX_LANGUAGE_CHARS:
        raise BadQuery(f"language is {text[:80]!r}; expected a code like 'en', or 'auto'")
    return text
