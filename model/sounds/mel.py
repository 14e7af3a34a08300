"""YAMNet's log-mel spectrogram, cell by cell of the 12.5 Hz grid.

Frame f is the window of samples [160 f, 160 f + 400); cell c holds the eight frames from 8 c on and
needs the samples up to 1280 c + 1520. A patch is twelve cells. Cells are computed one at a time, so
that the arithmetic of a cell is the same however the audio was cut. Knows no stream.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SAMPLE_RATE_HZ = 16_000
WINDOW = 400  # samples, 25 ms
HOP = 160  # samples, 10 ms
N_FFT = 512
N_MELS = 64
MIN_HZ, MAX_HZ = 125.0, 7_500.0
LOG_OFFSET = 0.001

CELL_FRAMES = 8
CELL = CELL_FRAMES * HOP  # samples, 80 ms
CELL_AUDIO = (CELL_FRAMES - 1) * HOP + WINDOW  # samples a cell is computed from, 95 ms
PATCH_CELLS = 12
PATCH_FRAMES = PATCH_CELLS * CELL_FRAMES  # 96
PATCH_AUDIO = (PATCH_CELLS - 1) * CELL + CELL_AUDIO  # samples a patch is computed from, 0.975 s


def _mel_of(hz: Tensor) -> Tensor:
    """The scale of HTK."""
    return 1127.0 * torch.log1p(hz / 700.0)


@functools.cache
def mel_filters() -> Tensor:
    """Triangles of height 1 on the mel scale, [257, 64] float64. Read only: the result is shared.

    Source: tensorflow, tf.signal.linear_to_mel_weight_matrix, which YAMNet was trained on.
    """
    bins = _mel_of(torch.linspace(0.0, SAMPLE_RATE_HZ / 2, N_FFT // 2 + 1, dtype=torch.float64))
    low, high = _mel_of(torch.tensor([MIN_HZ, MAX_HZ], dtype=torch.float64)).tolist()
    edges = torch.linspace(low, high, N_MELS + 2, dtype=torch.float64)
    rising = (bins[:, None] - edges[None, :-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[None, 2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    filters = torch.minimum(rising, falling).clamp(min=0.0)
    filters[0] = 0.0  # a constant offset carries no sound
    return filters


@functools.cache
def _window() -> Tensor:
    return torch.hann_window(WINDOW, periodic=True, dtype=torch.float64)


def cell(samples: Tensor) -> Tensor:
    """One cell's frames, [8, 64] float64, of its `CELL_AUDIO` samples [n] float64."""
    assert samples.shape == (CELL_AUDIO,), samples.shape
    frames = samples.unfold(0, WINDOW, HOP) * _window()  # [8, 400]
    magnitude = torch.fft.rfft(frames, N_FFT).abs()  # [8, 257]
    log_mel: Tensor = (magnitude @ mel_filters() + LOG_OFFSET).log()
    return log_mel
