"""Augmentation of clips: other vocal tracts, rooms and microphones.

Six speakers and a few hundred sounds are little training data; without augmentation a model learns the
six speakers instead of the digits. All functions keep the times of words and sounds. Knows no label.
"""

from __future__ import annotations

import numpy as np
import soxr
from numpy.typing import NDArray

from streaming.protocol import SAMPLE_RATE_HZ
from training.mixtures import Audio

N_FFT = 512  # samples, 32 ms
HOP = 128
DB = float(np.log(10.0) / 20.0)  # of an amplitude, in natural logarithms
N_CEPSTRUM = 28  # quefrencies of the envelope: below the shortest pitch period, 1.75 ms
MAX_GAIN_DB = 20.0  # limit of a moved envelope: more would amplify the recording's noise


def resampled(audio: Audio, factor: float) -> Audio:
    """Played `factor` times as fast: tempo, pitch and formants move together."""
    faster: Audio = soxr.resample(audio, SAMPLE_RATE_HZ * factor, SAMPLE_RATE_HZ, quality="MQ")
    return faster


def coloured(audio: Audio, formants: float, gains_db: NDArray[np.float64]) -> Audio:
    """Formants moved by a factor and the spectrum shaped; pitch and length are kept.

    Args:
        audio: The clip.
        formants: Factor on the formants; above 1 for a shorter vocal tract.
        gains_db: Gains at evenly spaced frequencies from 0 to 8 kHz, interpolated linearly.
    """
    n = len(audio)
    padded = np.pad(audio, (N_FFT, N_FFT + HOP))
    window = np.hanning(N_FFT + 1)[:-1].astype(np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP] * window
    spectrum = np.fft.rfft(frames)  # [T, N_FFT / 2 + 1]
    bins = np.arange(spectrum.shape[1])
    gain = np.interp(bins, np.linspace(0, bins[-1], len(gains_db)), gains_db)[None].astype(np.float32)
    if formants != 1.0:
        level_db = np.log(np.abs(spectrum) + 1e-6) / DB
        cepstrum = np.fft.irfft(level_db)
        cepstrum[:, N_CEPSTRUM:-N_CEPSTRUM] = 0.0
        envelope = np.fft.rfft(cepstrum).real  # dB
        source = np.minimum(bins / formants, bins[-1] - 1e-6)
        low = source.astype(int)
        part = (source - low).astype(np.float32)
        moved = envelope[:, low] + part * (envelope[:, low + 1] - envelope[:, low])
        gain = gain + np.clip(moved - envelope, -MAX_GAIN_DB, MAX_GAIN_DB)
    frames = np.fft.irfft(spectrum * np.exp(gain * DB)) * window
    out, weight = np.zeros(len(padded), np.float32), np.zeros(len(padded), np.float32)
    for idx, frame in enumerate(frames):
        out[idx * HOP : idx * HOP + N_FFT] += frame
        weight[idx * HOP : idx * HOP + N_FFT] += np.square(window)
    return (out / np.maximum(weight, 1e-3))[N_FFT : N_FFT + n].astype(np.float32)


def coloured_noise(n: int, rng: np.random.Generator) -> Audio:
    """Noise between white and brown, `n` samples at an RMS of 1."""
    spectrum = np.fft.rfft(rng.standard_normal(_fast_length(n), np.float32))
    slope = np.float32(rng.uniform(0.0, 1.0))
    spectrum *= np.maximum(np.arange(len(spectrum), dtype=np.float32), 20.0) ** -slope
    noise = np.fft.irfft(spectrum)[:n]
    return (noise / level(noise)).astype(np.float32)


def in_room(audio: Audio, response: Audio) -> Audio:
    """`audio` convolved with an impulse response, cut to its own length."""
    n = _fast_length(len(audio) + len(response))
    wet = np.fft.irfft(np.fft.rfft(audio, n) * np.fft.rfft(response, n), n)
    return wet[: len(audio)].astype(np.float32)


def level(audio: NDArray[np.floating]) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(audio, dtype=np.float64)))) if len(audio) else 0.0


def _fast_length(n: int) -> int:
    """The next power of two: transforms of other lengths can take ten times as long."""
    return 1 << (n - 1).bit_length()
