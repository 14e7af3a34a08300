"""One stream's audio as YAMNet's patches and embeddings on the 12.5 Hz grid.

Patch p begins at sample 1280 p, an absolute position, so that the same audio gives the same patches
however it was cut and from wherever the stream was resumed. The scores of a row (the 80 ms from sample
1280 i on) depend on the `CONTEXT` patches up to patch i - `BACK`. Knows no sound and no score.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.sounds.mel import (
    CELL,
    CELL_AUDIO,
    CELL_FRAMES,
    N_MELS,
    PATCH_AUDIO,
    PATCH_CELLS,
    PATCH_FRAMES,
    cell,
)
from model.sounds.yamnet import WIDTH, Yamnet

BACK = 5  # the last patch of row i begins five rows before it: a look-ahead of 0.495 s behind the row's end
CONTEXT = 27  # patches a row depends on: the first begins 2.48 s before the row
LOOK_AHEAD = PATCH_AUDIO - (BACK + 1) * CELL  # samples after a row's end that it needs
PAST = (CONTEXT - 1 + BACK) * CELL  # samples before a row's start that it needs


@dataclass(frozen=True, slots=True)
class SoundRows:
    """Rows of the grid that are final."""

    start: int  # samples: where the first one begins
    embeddings: NDArray[np.uint8]  # [n_rows + CONTEXT - 1, 1024]; empty where there is no row


class SoundStream:
    """The end of one stream's audio as frames and embeddings; constant memory."""

    def __init__(self) -> None:
        self.start_at(0)

    def start_at(self, position: int) -> None:
        """Forget everything and continue at a sample; before the stream's first one is silence."""
        self.position = position  # the next sample to come
        first = -PAST if position == 0 else -(-position // CELL) * CELL
        self._cell_start = first  # where the next cell begins
        self._audio = torch.zeros(max(position - first, 0), dtype=torch.float64)  # from there on
        self._skip = max(first - position, 0)  # samples to skip before the first cell
        self._frames = np.empty((0, CELL_FRAMES, N_MELS), np.uint8)  # cells of incomplete patches
        self._embeddings = np.empty((0, WIDTH), np.uint8)  # of the patches from `_patch` on
        self._patch = first // CELL

    def push(self, pcm: NDArray[np.float32], yamnet: Yamnet) -> NDArray[np.uint8]:
        """Append audio [n], 16 kHz. Gives the patches that it completes, [k, 96, 64]."""
        self.position += len(pcm)
        n_skipped = min(self._skip, len(pcm))
        self._skip -= n_skipped
        self._audio = torch.cat([self._audio, torch.from_numpy(pcm[n_skipped:]).double()])
        n_cells = max(0, (self._audio.shape[0] - CELL_AUDIO) // CELL + 1)
        cells = [self._cell(i, yamnet) for i in range(n_cells)]
        self._audio = self._audio[n_cells * CELL :].clone()
        self._cell_start += n_cells * CELL
        if cells:
            self._frames = np.concatenate([self._frames, np.stack(cells)])
        n_patches = max(0, len(self._frames) - PATCH_CELLS + 1)
        patches = [self._frames[i : i + PATCH_CELLS].reshape(PATCH_FRAMES, N_MELS) for i in range(n_patches)]
        self._frames = self._frames[n_patches:]
        return np.stack(patches) if patches else np.empty((0, PATCH_FRAMES, N_MELS), np.uint8)

    def take(self, embeddings: NDArray[np.uint8]) -> SoundRows:
        """Append the embeddings [k, 1024] of the patches of `push`; returns the rows they complete."""
        known = np.concatenate([self._embeddings, embeddings])
        n_rows = max(0, len(known) - CONTEXT + 1)
        row = self._patch + CONTEXT - 1 + BACK
        self._embeddings = known[n_rows:].copy()
        self._patch += n_rows
        return SoundRows(row * CELL, known[: n_rows + CONTEXT - 1] if n_rows else known[:0])

    def _cell(self, i: int, yamnet: Yamnet) -> NDArray[np.uint8]:
        samples: Tensor = self._audio[i * CELL : i * CELL + CELL_AUDIO]
        return yamnet.quantise(cell(samples))
