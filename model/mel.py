"""Whisper's log-mel spectrogram, of a whole clip or of a stream.

A mel frame t is centred at sample 160 t and needs samples [160 t - 200, 160 t + 200). A clip of N
samples has N // 160 frames; at both ends the samples outside are the clip mirrored.

The clip's maximum enters only through the floor (80 dB below it). So the frames are kept as plain
log10 power, and `normalise` applies floor and scale, with whatever maximum the caller chooses: so far,
of a window, or of the clip. Knows no model.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

SAMPLE_RATE_HZ = 16_000
N_FFT = 400  # samples, 25 ms
HOP = 160  # samples, 10 ms: 100 mel frames a second
HALF = N_FFT // 2
MAX_HZ = 8_000.0
DYNAMIC_RANGE = 8.0  # decades of power below the maximum
SILENCE = -10.0  # log10 of the least power; lower ones are raised to it


def _hz_to_mel(hz: Tensor) -> Tensor:
    """Slaney's scale: linear below 1 kHz, logarithmic above."""
    log_step = math.log(6.4) / 27.0
    return torch.where(hz < 1000.0, hz * 3.0 / 200.0, 15.0 + (hz.clamp(min=1000.0) / 1000.0).log() / log_step)


def _mel_to_hz(mel: Tensor) -> Tensor:
    log_step = math.log(6.4) / 27.0
    return torch.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * ((mel - 15.0) * log_step).exp())


@functools.cache
def mel_filters(n_mels: int) -> Tensor:
    """Triangular filters of unit area, [n_mels, 201] float64. Read only: the result is shared.

    Source: librosa.filters.mel with its defaults, which Whisper was trained on.
    """
    top = _hz_to_mel(torch.tensor(MAX_HZ, dtype=torch.float64))
    edges = _mel_to_hz(torch.linspace(0.0, float(top), n_mels + 2, dtype=torch.float64))  # [M + 2]
    bins = torch.linspace(0.0, SAMPLE_RATE_HZ / 2, HALF + 1, dtype=torch.float64)  # [201]
    widths = edges[1:] - edges[:-1]  # [M + 1]
    rising = (bins[None, :] - edges[:-2, None]) / widths[:-1, None]
    falling = (edges[2:, None] - bins[None, :]) / widths[1:, None]
    area = 2.0 / (edges[2:] - edges[:-2])
    return torch.minimum(rising, falling).clamp(min=0.0) * area[:, None]


@functools.cache
def _window() -> Tensor:
    return torch.hann_window(N_FFT, periodic=True, dtype=torch.float64)


def _log_power(samples: Tensor, n_mels: int) -> Tensor:
    """Frames of `samples` [n] float64 without any padding: [(n - 400) // 160 + 1, M] float32."""
    if samples.shape[0] < N_FFT:
        return torch.empty(0, n_mels)
    frames = samples.unfold(0, N_FFT, HOP) * _window()  # [T, 400]
    # float64: a quiet cell 80 dB below the loudest is otherwise rounding noise of the loudest.
    power = torch.fft.rfft(frames).abs().square()  # [T, 201]
    log_power: Tensor = (power @ mel_filters(n_mels).T).clamp(min=1e-10).log10()
    return log_power.float()


def normalise(log_power: Tensor, peak: Tensor | float) -> Tensor:
    """The encoder's input: log10 power floored 80 dB below `peak` and scaled. Same shape."""
    floor = torch.as_tensor(peak, dtype=log_power.dtype, device=log_power.device) - DYNAMIC_RANGE
    return (torch.maximum(log_power, floor) + 4.0) / 4.0


def log_mel(pcm: Tensor, n_mels: int) -> Tensor:
    """Log-mel of a whole clip, floored by the clip's maximum.

    Args:
        pcm: [n_samples] at 16 kHz, n_samples at least 201 (half a window to mirror).
        n_mels: 80 or 128.

    Returns:
        [n_samples // 160, n_mels] float32.

    Source: transformers, WhisperFeatureExtractor._np_extract_fbank_features.
    """
    stream = StreamingMel(n_mels)
    frames = torch.cat([stream.push(pcm), stream.finish()])
    return normalise(frames, stream.peak)


class StreamingMel:
    """The log-mel of one stream, fed in pieces of any length.

    The frames of all `push` calls and of `finish` together are those of the whole clip.
    Keeps at most one window of samples.
    """

    def __init__(self, n_mels: int) -> None:
        self.n_mels = n_mels
        self.peak = SILENCE  # the largest log power so far
        self.n_frames = 0  # frames returned so far
        self._n_samples = 0
        # Samples from the next frame's first one on; all samples until there are the 201 that are
        # mirrored at the start.
        self._tail = torch.empty(0, dtype=torch.float64)

    def push(self, pcm: Tensor) -> Tensor:
        """Take samples [n], n >= 0; returns the frames they complete, [k, M] log10 power."""
        self._tail = torch.cat([self._tail, pcm.to(torch.float64)])
        was_started = self._n_samples > HALF
        self._n_samples += pcm.shape[0]
        if not was_started:
            if self._n_samples <= HALF:
                return torch.empty(0, self.n_mels)
            self._tail = torch.cat([self._tail[1 : HALF + 1].flip(0), self._tail])
        frames = _log_power(self._tail, self.n_mels)
        self._tail = self._tail[frames.shape[0] * HOP :]
        return self._given(frames)

    def finish(self) -> Tensor:
        """The frames that touch the mirrored end, [k, M]. No `push` may follow.

        Raises:
            ValueError: fewer than 201 samples were pushed: too few to mirror.
        """
        return self._given(self.mirrored())

    def mirrored(self) -> Tensor:
        """The frames `finish` would return if the clip ended here, [k, M]. State is not changed.

        k is 1 where the samples so far end within 40 samples of a whole frame, else 0.

        Raises:
            ValueError: fewer than 201 samples were pushed: too few to mirror.
        """
        if self._n_samples <= HALF:
            raise ValueError(f"{self._n_samples} samples; a spectrogram needs at least {HALF + 1}")
        mirrored = self._tail[-HALF - 1 : -1].flip(0)
        n_missing = self._n_samples // HOP - self.n_frames
        return _log_power(torch.cat([self._tail, mirrored]), self.n_mels)[:n_missing]

    def tail(self) -> Tensor:
        """The incomplete frames, as they are if only zeros follow, [k, M].

        State is not changed. k is such that the last sample is inside the last frame.
        """
        if self._n_samples <= HALF:
            return torch.empty(0, self.n_mels)
        n_frames = -(-self._tail.shape[0] // HOP)
        padded = torch.zeros((n_frames - 1) * HOP + N_FFT, dtype=torch.float64)
        padded[: self._tail.shape[0]] = self._tail
        return _log_power(padded, self.n_mels)

    def _given(self, frames: Tensor) -> Tensor:
        self.n_frames += frames.shape[0]
        if frames.shape[0]:
            self.peak = max(self.peak, float(frames.max()))
        return frames
