"""Bytes to 16 kHz mono: bit-identical for every cut, right in level and length."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import msgspec
import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.audio.ingest import AudioFormat, Encoding, Ingest, IngestState
from streaming.engine.contract import Pcm
from streaming.errors import BadAudio
from streaming.protocol import AUDIO_FORMATS, SAMPLE_RATE_HZ

encodings = st.sampled_from(get_args(Encoding))
rates = st.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100, 48_000])


def encoded(pcm: Pcm, encoding: Encoding) -> bytes:
    """Samples in a wire format that keeps them as they are, or noise in one that does not."""
    if encoding == "f32le":
        return pcm.astype("<f4").tobytes()
    if encoding == "s16le":
        return np.rint(pcm * 32767).astype("<i2").tobytes()
    return np.rint((pcm + 1) * 127).astype(np.uint8).tobytes()


@settings(max_examples=60)
@given(
    encoding=encodings,
    rate_hz=rates,
    channels=st.integers(1, 8),
    n_samples=st.integers(0, 3000),
    cuts=st.lists(st.integers(0, 100_000), max_size=12),
    flush_at=st.integers(0, 100_000),
)
def test_how_bytes_are_cut_changes_no_bit(
    encoding: Encoding, rate_hz: int, channels: int, n_samples: int, cuts: list[int], flush_at: int
) -> None:
    """Any cut, in the middle of a sample too, with a flush anywhere."""
    audio_format = AudioFormat(encoding, rate_hz, channels)
    rng = np.random.default_rng(n_samples)
    data = encoded(rng.uniform(-1, 1, n_samples * channels).astype(np.float32), encoding)
    flush_at = min(flush_at, len(data))

    def heard(borders: list[int]) -> bytes:
        ingest, out = Ingest(audio_format), []
        for start, end in pairwise(sorted({0, flush_at, len(data), *(b for b in borders if b < len(data))})):
            if start == flush_at:
                out.append(ingest.flush())
            out.append(ingest.push(data[start:end]))
        out.append(ingest.flush())
        assert ingest.n_samples == n_samples
        return np.concatenate(out).tobytes()

    assert heard(cuts) == heard([])


@settings(max_examples=60)
@given(
    encoding=encodings,
    rate_hz=rates,
    channels=st.integers(1, 3),
    n_samples=st.integers(0, 60_000),
    at=st.integers(0, 200_000),
    flush_at=st.integers(0, 200_000),
)
def test_the_state_goes_on_where_another_was(
    encoding: Encoding, rate_hz: int, channels: int, n_samples: int, at: int, flush_at: int
) -> None:
    """At any byte: to the bit at 16 kHz, to a float32's last places else; every position comes once.

    At 11,025 Hz blocks do not fall on samples of 16 kHz: places are off by up to half a sample.
    """
    audio_format = AudioFormat(encoding, rate_hz, channels)
    rng = np.random.default_rng(n_samples)
    data = encoded(rng.uniform(-1, 1, n_samples * channels).astype(np.float32), encoding)
    at = min(at, len(data))
    one, pieces = Ingest(audio_format), []
    if flush_at < at:
        pieces += [one.push(data[:flush_at]), one.flush(), one.push(data[flush_at:at])]
    else:
        pieces.append(one.push(data[:at]))
    other = Ingest(audio_format)
    other.restore(msgspec.msgpack.decode(msgspec.msgpack.encode(one.snapshot()), type=IngestState))
    n_most = one.max_out(len(data) - at)
    rest = [np.concatenate([it.push(data[at:]), it.flush()]) for it in (one, other)]
    assert abs(len(rest[0]) - len(rest[1])) <= (rate_hz == 11_025)
    assert len(rest[0]) <= n_most
    assert one.n_samples == other.n_samples == n_samples
    if rate_hz == SAMPLE_RATE_HZ:
        assert rest[0].tobytes() == rest[1].tobytes()
    elif rate_hz != 11_025:
        np.testing.assert_allclose(rest[1], rest[0], atol=2e-6)


def test_a_sample_that_is_not_whole_is_begun_again() -> None:
    """Its sender sends it from its first byte."""
    ingest = Ingest(AudioFormat("s16le", 16_000, 2))
    whole = ingest.push(bytes(range(1, 8)))
    ingest.drop_partial()
    assert ingest.n_samples == 1
    whole = np.concatenate([whole, ingest.push(bytes(range(5, 9))), ingest.flush()])
    undisturbed = Ingest(AudioFormat("s16le", 16_000, 2))
    undisturbed.push(bytes(range(1, 9)))
    np.testing.assert_array_equal(whole, undisturbed.flush())


@pytest.mark.parametrize("encoding", AUDIO_FORMATS)
@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 44_100])
def test_a_tone_keeps_its_level_length_and_pitch(encoding: Encoding, rate_hz: int) -> None:
    """Half a second of 440 Hz, the same on both channels."""
    n_samples = rate_hz // 2
    tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(n_samples) / rate_hz)).astype(np.float32)
    if encoding in ("mulaw", "alaw"):
        data = b"".join(bytes([code, code]) for code in companded(tone, encoding))
    else:
        data = encoded(np.repeat(tone, 2), encoding)
    ingest = Ingest(AudioFormat(encoding, rate_hz, 2))
    out = np.concatenate([ingest.push(data), ingest.flush()])
    assert abs(len(out) - 8000) <= 1
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(out)) / 16_000)
    np.testing.assert_allclose(out[500:-500], expected[500:-500], atol=0.02)


def companded(tone: Pcm, encoding: str) -> bytes:
    """Each sample as the code whose decoded value is nearest: an encoder without a table."""
    ingest = Ingest(AudioFormat("mulaw" if encoding == "mulaw" else "alaw"))
    values = np.concatenate([ingest.push(bytes(range(256))), ingest.flush()])
    return bytes(int(np.abs(values - sample).argmin()) for sample in tone)


@pytest.mark.parametrize(("code", "value"), [(0xFF, 0), (0x7F, 0), (0x80, 32_124), (0x00, -32_124)])
def test_mulaw_codes_of_the_standard(code: int, value: int) -> None:
    """ITU-T G.711, at both ends of the scale."""
    assert Ingest(AudioFormat("mulaw")).push(bytes([code]) * 320)[100] == np.float32(value / 32768)


def test_channels_are_averaged() -> None:
    """One full channel of four is a quarter of the level."""
    frames = np.zeros((320, 4), "<f4")
    frames[:, 2] = 0.8
    out = Ingest(AudioFormat("f32le", 16_000, 4)).push(frames.tobytes())
    np.testing.assert_allclose(out, 0.2, rtol=1e-6)


@given(st.lists(st.floats(width=32), min_size=1, max_size=8))
def test_floats_are_clipped_or_refused(values: list[float]) -> None:
    """What is not finite is an error, everything else ends in [-1, 1]."""
    ingest = Ingest(AudioFormat("f32le"))
    data = np.array(values, "<f4").tobytes() + bytes(4 * (320 - len(values)))
    if np.isfinite(values).all():
        assert np.abs(ingest.push(data)).max() <= 1
    else:
        with pytest.raises(BadAudio, match="not a number"):
            ingest.push(data)


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_a_resampler_that_overshoots_is_clipped(rate: int) -> None:
    """A full-scale square wave rings: what leaves the ingest stays within -1 to 1."""
    square = np.repeat(np.array([32767, -32768] * 50, "<i2"), rate // 100)
    ingest = Ingest(AudioFormat(rate_hz=rate))
    pcm = np.concatenate([ingest.push(square.tobytes()), ingest.flush()])
    raw = soxr.resample(square.astype(np.float32) / 32768, rate, 16_000)
    assert np.abs(raw).max() > 1.01
    assert np.abs(pcm).max() <= 1
