"""One stream's samples, in pieces of any length, as mel blocks for the encoder.

A complete block is returned once, as soon as its last sample is known, and never changes. The growing
block is available at any time, and is then what the published code computes for a clip that ends
there.

The maximum that sets the mel floor is the largest so far: of the stream up to the end of the block.
It depends on the audio alone, not on how the audio was cut, and equals the published code's on the
clip that ends with the block. A block is not revised when a louder one follows.

Knows no encoder weights, no cache and no other stream.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from model.mel import HALF, SILENCE, StreamingMel, normalise
from model.moss.config import EncoderConfig
from model.moss.encoder import Block


class StreamingFrontend:
    """The audio front end of one stream. Keeps less than a block of mel frames."""

    def __init__(self, config: EncoderConfig, mel_dtype: str = "float32", min_peak: float = SILENCE) -> None:
        """A front end before the first sample.

        Args:
            config: The encoder the blocks are for.
            mel_dtype: The published processor rounds the mel to this (bfloat16), whatever the model's
                own dtype.
            min_peak: A lower bound of the maximum, log10 power: for a constant floor, or the whole
                clip's maximum to get the published mel of a clip exactly.
        """
        self.n_blocks = 0  # complete blocks returned so far
        self._config = config
        self._rounding: torch.dtype = getattr(torch, mel_dtype)
        self._mel = StreamingMel(config.num_mel_bins)
        self._peak = min_peak
        self._n_samples = 0
        self._frames = torch.empty(0, config.num_mel_bins)  # of the growing block, log10 power

    @property
    def n_samples(self) -> int:
        """Samples pushed so far."""
        return self._n_samples

    def push(self, pcm: Tensor) -> list[Block]:
        """Take samples [n], n >= 0, 16 kHz mono in [-1, 1]; returns the blocks they complete."""
        self._n_samples += pcm.shape[0]
        self._frames = torch.cat([self._frames, self._mel.push(pcm)])
        blocks = []
        while self._frames.shape[0] >= self._config.block_frames:
            frames = self._frames[: self._config.block_frames]
            self._frames = self._frames[self._config.block_frames :]
            self._peak = max(self._peak, float(frames.max()))
            blocks.append(self._block(frames, self._peak))
            self.n_blocks += 1
        return blocks

    def tail(self) -> Block | None:
        """The growing block, as if the clip ended here; None while it has no frame."""
        if self._n_samples <= HALF:
            return None
        frames = torch.cat([self._frames, self._mel.mirrored()])
        if not frames.shape[0]:
            return None
        return self._block(frames, max(self._peak, float(frames.max())))

    def _block(self, frames: Tensor, peak: float) -> Block:
        mel = normalise(frames, peak).to(self._rounding).float()
        return Block(mel, is_first=self.n_blocks == 0)


def blocks_of(pieces: Iterable[Tensor], config: EncoderConfig, mel_dtype: str = "float32") -> list[Block]:
    """The blocks of a clip given in pieces [n], the incomplete one last."""
    frontend = StreamingFrontend(config, mel_dtype)
    blocks = [block for piece in pieces for block in frontend.push(piece)]
    tail = frontend.tail()
    return [*blocks, tail] if tail is not None else blocks
