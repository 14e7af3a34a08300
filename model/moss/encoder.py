"""MOSS-Audio's encoder: blocks of 400 mel frames, each encoded independently.

A block is 4.00 s of audio and 50 tokens. Positions restart in each block and attention does not
leave it, so a complete block is encoded once, and blocks of many streams go through in one call.
Knows no stream; `model.moss.frontend` makes blocks of audio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import EncoderLayer, rounded_up, send
from model.moss.config import EncoderConfig, n_audio_tokens

STEM_BLOCKS = 16  # blocks whose convolutions run at once: their channels take 50 MB each at full size
FRAME_MULTIPLE = 64  # growing blocks are padded to such lengths, for the reason of `forward.TOKEN_MULTIPLE`


@dataclass(frozen=True, slots=True)
class Block:
    """Mel frames of one block, complete or still growing."""

    mel: Tensor  # [n_frames, M], 1 to 400 frames, normalised
    is_first: bool  # the first of its clip: the published code pads it only if it is complete


@dataclass(frozen=True, slots=True)
class Encoded:
    """Encoder output for blocks of equal or different length, padded to the longest."""

    hidden: Tensor  # [B, T, D], after the last layer norm
    taps: tuple[Tensor, ...]  # each [B, T, D], outputs of the tapped layers
    n_tokens: tuple[int, ...]  # per block; positions after that are padding


def positions(n_positions: int, width: int, device: torch.device | None = None) -> Tensor:
    """Fixed positions, [n_positions, width] float32: sines, then cosines.

    Computed at each use. A buffer would be cast with the module, and left uninitialised when the
    module is built on the meta device; the published code suffers from both.

    Source: OpenMOSS/MOSS-Audio, 5cbb1d8, modeling_moss_audio.py, SinusoidsPositionEmbedding. It
    rounds the step to float32 after the division, unlike openai/whisper's `sinusoids`.
    """
    step = math.log(10_000.0) / (width // 2 - 1)
    rates = torch.exp(-step * torch.arange(width // 2, device=device).float())
    angles = torch.arange(n_positions, dtype=torch.float32, device=device)[:, None] * rates[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class AudioEncoder(nn.Module):
    """Convolution stem and transformer. Parameter names are the checkpoint's.

    Source: OpenMOSS/MOSS-Audio, 5cbb1d8, modeling_moss_audio.py, MossAudioEncoder.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.downsample_hidden_size
        self.conv1 = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.stem_proj = nn.Linear(channels * (config.num_mel_bins // 8), config.d_model)
        self.layers = nn.ModuleList(
            EncoderLayer(config.d_model, config.encoder_attention_heads, config.encoder_ffn_dim)
            for _ in range(config.encoder_layers)
        )
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.out_proj: nn.Module = (
            nn.Identity()
            if config.output_dim == config.d_model
            else nn.Linear(config.d_model, config.output_dim, bias=False)
        )

    def forward(self, blocks: Sequence[Block]) -> Encoded:
        """Encode blocks, of one stream or of many, complete or growing, in one call.

        A block's output does not depend on its neighbours in the call.
        """
        frames = [block.mel.shape[0] for block in blocks]
        limit = self.config.block_frames
        assert all(1 <= n <= limit for n in frames), frames
        # The published code pads a tail with zeros to 400 frames before the convolutions, but does not
        # pad a clip of less than a block. Frames beyond the last token's own 8 cannot influence it, so
        # a padded tail ends at the next multiple of 8; the rest of its row is masked after every
        # convolution.
        conv_frames = [
            n if b.is_first else 8 * n_audio_tokens(n) for n, b in zip(frames, blocks, strict=True)
        ]
        # Assembled on the host, where the mel is computed, and sent in one copy.
        n_frames = min(limit, rounded_up(max(conv_frames), FRAME_MULTIPLE))
        mel = torch.zeros(len(blocks), n_frames, self.config.num_mel_bins)
        for row, block in zip(mel, blocks, strict=True):
            row[: block.mel.shape[0]] = block.mel
        weight = self.stem_proj.weight
        mel = send(mel.to(weight.dtype), weight.device)
        lengths = send(torch.tensor(conv_frames), weight.device)
        n_tokens = tuple(n_audio_tokens(n) for n in frames)
        is_ragged = min(conv_frames) < mel.shape[1]
        pieces = zip(mel.split(STEM_BLOCKS), lengths.split(STEM_BLOCKS), strict=True)
        x = torch.cat([self._stem(piece, n, is_ragged=is_ragged) for piece, n in pieces])
        x = x + positions(x.shape[1], self.config.d_model, x.device).to(x.dtype)

        mask = None
        if min(n_tokens) < x.shape[1]:
            steps = torch.arange(x.shape[1], device=x.device)
            mask = steps[None, :] < send(torch.tensor(n_tokens), x.device)[:, None]  # [B, T]
        taps = []
        for idx, layer in enumerate(self.layers):
            x = layer(x, mask)
            if idx in self.config.tap_layers:
                taps.append(x)
        return Encoded(self.out_proj(self.layer_norm(x)), tuple(taps), n_tokens)

    def _stem(self, mel: Tensor, lengths: Tensor, *, is_ragged: bool) -> Tensor:
        """Three convolutions, [B, F, M] to [B, ceil(F / 8), D].

        Each row is computed as if its input ended after its `lengths` [B]: whatever a convolution
        writes behind that (at least its bias) is set to zero before the next one reads it.
        """
        x = mel.transpose(1, 2)[:, None]  # [B, 1, M, F]
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.gelu(conv(x))
            lengths = (lengths + 1) // 2
            if is_ragged:
                steps = torch.arange(x.shape[-1], device=x.device)
                x = x * (steps[None, :] < lengths[:, None])[:, None, None, :]
        x = x.permute(0, 3, 1, 2).flatten(2)  # [B, T, C * M / 8], channel by channel
        return self.stem_proj(x)  # type: ignore[no-any-return]


def split_blocks(mel: Tensor, config: EncoderConfig) -> list[Block]:
    """A whole clip's mel [n_frames, M] as blocks."""
    pieces = mel.split(config.block_frames)
    return [Block(piece, is_first=idx == 0) for idx, piece in enumerate(pieces)]
